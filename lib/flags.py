"""A command's flags are the fields of a dataclass, and flag() declares everything about a flag in one
place."""
import argparse
import dataclasses
import itertools
import sys
import typing

REQUIRED = dataclasses.MISSING  # as a flag's default: the flag must be given
GROUPS = ("model and data", "sft and test", "machine", "rollout", "reward", "judge", "advantage", "update",
          "held-out problems", "memory", "run")
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list of texts"}


def flag(group, default, help, low=None, high=None, choices=None, resume="same", again=False, option=None,
         empty=False):
    """A dataclass field that is a flag of the command line. Everything about the flag is declared here.

    group: its section in --help; low, high: inclusive bounds; option: its spelling, if not --like-its-name
    (without dashes it is a positional argument). resume: which value a resumed run may give it: only the
    "same" value, "any" value, one that makes the run "longer", or another path to the same "content"; a
    "once" flag applies to one start of the program and is not kept in config.json. again: the flag decides
    which code runs or who gets a key, so it must be given again rather than read from a config.json that
    someone else may have written. empty: "" is a valid value.
    """
    assert group in GROUPS and resume in ("same", "any", "longer", "content", "once"), (group, resume)
    return dataclasses.field(default=default, metadata=dict(
        group=group, help=help, low=low, high=high, choices=choices, resume=resume, again=again,
        option=option, empty=empty))


def pick(cls, *names, **defaults):
    """A dataclass with some of the flags of cls, as a base for commands that share them. The flags in
    `defaults` get other defaults."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    chosen = []
    for name in (*names, *defaults):
        f = fields[name]
        new = dataclasses.field(default=defaults.get(name, f.default), metadata=f.metadata)
        chosen.append((name, f.type, new))
    return dataclasses.make_dataclass("Picked", chosen, kw_only=True)


def kind(f):
    """The type of a flag's values, apart from None: int, float, bool, str or list."""
    if typing.get_origin(f.type) is list:
        return list
    return (*typing.get_args(f.type), f.type)[0]  # float for `float | None`


def option(f):
    return f.metadata["option"] or "--" + f.name.replace("_", "-")


def checked(f, value):
    """The value, if it is valid for the flag, else a ValueError. It comes from a command line, or from a
    file, which may hold anything."""
    m, expected, types = f.metadata, kind(f), {float: (int, float)}
    if value is None and f.default is None:
        return None
    # A shell's unset variable gives "". For --resume, resumed() has its own message.
    if value == "" and f.default != "" and f.name != "resume" and not m["empty"]:
        raise ValueError(f"nothing is given, expected {metavar(f)}")
    if type(value) not in types.get(expected, (expected,)) or expected is list and not (
            value and all(type(x) is str for x in value)):
        raise ValueError(f"{value!r:.60} is of the wrong type, expected {KINDS[expected]}")
    if m["choices"] and value not in m["choices"]:
        raise ValueError(f"{value!r:.60} is none of {', '.join(m['choices'])}")
    if expected in (int, float):
        low, high = m["low"], m["high"]
        shown = f"{value:g}" if type(value) is float else f"{value!r:.60}"
        largest = high if high is not None else 2**63 - 1 if type(value) is int else sys.float_info.max
        if not (-largest if low is None else low) <= value <= largest:  # refuses NaN as well
            bounds = [f"at least {low}"] if low is not None else []
            bounds += [f"at most {largest}"] if high is not None or value > 0 else []
            raise ValueError(f"{shown} is out of range, expected {' and '.join(bounds) or 'a finite number'}")
    return float(value) if expected is float else value


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that accepts only full flag names, leaves out flags that are not given, and raises
    ValueError."""

    def __init__(self, **how):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **how)

    def error(self, message):
        raise ValueError(message)


def parser(description, commands):
    """The parser of {name: dataclass of flags}."""
    top = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = top.add_subparsers(dest="command", required=True)
    for name, flags in commands.items():
        needed = [f for f in dataclasses.fields(flags) if f.default is REQUIRED]
        words = [f"{option(f)} {metavar(f)}".removeprefix("RUN ") for f in needed]
        usage = " ".join(["rlsp.py", name, *words, "[flags]"])
        help = " ".join(flags.__doc__.split())
        add_flags(subparsers.add_parser(name, help=help, description=help, usage=usage), flags)
    return top


def metavar(f):
    words = {int: "N", float: "X", bool: ""}
    return words.get(kind(f), option(f).lstrip("-").upper().replace("-", "_") + " ..." * (kind(f) is list))


def add_flags(command, flags):
    group = lambda f: f.metadata["group"]
    fields = sorted(dataclasses.fields(flags), key=lambda f: GROUPS.index(group(f)))
    for title, members in itertools.groupby(fields, key=group):
        section = command.add_argument_group(title)
        for f in members:
            m, name, default = f.metadata, option(f), ""
            if f.default is REQUIRED:
                default = " (required)"
            elif f.default not in (None, "") and f.default is not False:
                default = f" (default: {f.default:g})" if kind(f) is float else f" (default: {f.default})"
            how = dict(dest=f.name, help=(m["help"] + default).replace("%", "%%"))
            if kind(f) is bool:
                how["action"] = argparse.BooleanOptionalAction
            elif kind(f) is list:
                how |= dict(nargs="+", metavar=metavar(f).removesuffix(" ..."), type=word)
            elif m["choices"]:
                how["choices"] = m["choices"]
            else:
                how |= dict(type=converter(f), metavar=metavar(f))
            section.add_argument(*[name] * name.startswith("--"), **how)


def word(text):
    """An argparse type for one of a list of texts. It refuses "", which a shell's unset variable gives."""
    if not text:
        raise argparse.ArgumentTypeError("nothing is given, expected text")
    return text


def converter(f):
    """An argparse type that converts the flag's text to its value."""
    def convert(text):
        value = kind(f)(text)
        try:
            return checked(f, value)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None
    convert.__name__ = kind(f).__name__  # argparse: "invalid int value"
    return convert
