"""Two checks of the verifier on real golds: what does it accept wrongly, and what does it refuse wrongly?

    python -m tests.tools.mutate changed   [--golds FILE] [--list]      each gold changed in one place
    python -m tests.tools.mutate rewritten [--golds FILE] [--list]      each gold written in other ways

`changed` replaces, drops or adds one digit, sign, name, bracket, bound, index, function or word at each place in
turn, and compares the result with the original gold; --list shows each accepted change with the rule that
decided, for inspection. `rewritten` spells each gold in up to thirty equivalent ways and counts refusals.
"""
import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
from rewards import compare  # noqa: E402

GOLDS = ROOT.parent / "shared" / "data" / "math500" / "test.jsonl"
NAMES = "xyzabcknpqrtRC"

# kind: (pattern, replacements of a match)
CHANGES = {
    "digit": (r"\d", lambda m: [str((int(m[0]) + 1) % 10), str((int(m[0]) + 5) % 10)]),
    "digit dropped": (r"\d(?=\d)", lambda m: [""]),
    "digit added": (r"\d+", lambda m: [m[0] + "0", m[0] + "7"]),
    "point moved": (r"(\d)\.(\d)", lambda m: [m[1] + m[2] + "."]),
    "sign": (r"[+-]", lambda m: ["-" if m[0] == "+" else "+"]),
    "sign dropped": (r"^-|(?<=[{(,])-", lambda m: [""]),
    "sign added": (r"^(?=[\d\\x(])|(?<=[,{])(?=\d)", lambda m: ["-"]),
    "name": (r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z{])",
             lambda m: ["w" if m[0] != "w" else "v", m[0].swapcase()]),
    "exponent": (r"\^", lambda m: ["^-", "^2"]),
    "exponent dropped": (r"\^(?:\{[^{}]*\}|\w)", lambda m: [""]),
    "root": (r"\\sqrt", lambda m: ["", r"\sqrt[3]"]),
    "fraction turned": (r"\\frac\{([^{}]*)\}\{([^{}]*)\}", lambda m: [rf"\frac{{{m[2]}}}{{{m[1]}}}"]),
    "operation": (r"\\pm|\\cup", lambda m: [{r"\pm": "+", r"\cup": r"\cap"}[m[0]]]),
    "bracket": (r"[()\[\]]", lambda m: [{"(": "[", ")": "]", "[": "(", "]": ")"}[m[0]]]),
    "bound": (r"\\infty", lambda m: ["7", r"-\infty"]),
    "constant": (r"\\pi", lambda m: ["e", "3.14", "", "3"]),
    "relation": (r"=|<|>|\\le\b|\\ge\b", lambda m: ["<" if m[0] != "<" else ">"]),
    "entries turned": (r"^(\\left)?([(\[])(.+),([^,]+?)(\\right)?([)\]])$",
                       lambda m: [f"{m[2]}{m[4]},{m[3]}{m[6]}"] if m[3].strip() != m[4].strip() else []),
    "entry dropped": (r",[^,()\[\]]+(?=[)\]]|$)", lambda m: [""]),
    "entry added": (r"(?=[)\]]$)|$", lambda m: [", 7"]),
    "base": (r"_\{?\d\}?", lambda m: ["_{7}" if "7" not in m[0] else "_{8}", ""]),
    "word": (r"(?<=\{)[a-zA-Z]{3,}(?=\})", lambda m: ["not " + m[0], m[0] + "x", m[0][:-1]]),
    "letter": (r"(?<=\()[A-E](?=\))", lambda m: [chr((ord(m[0]) - 64) % 5 + 65)]),
    "words after": (r"$", lambda m: [
        r"\text{ million}", r"\text{ halves}", r"\text{ or } 7", r"\text{ squared}", r"\text{ factorial}",
        "!", "^2", "x", "i", r"\%", "+C", "'"]),
    "words before": (r"^", lambda m: [
        r"\text{not }", r"\text{at least }", "2", "1/", r"\neg ", r"\sin ", ">"]),
}

# A rewrite is a function of the gold that gives another spelling, or None where it has none.
def _fraction_as_slash(g):
    m = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", g)
    return m and f"{m[1]}{m[2]}/{m[3]}"

def _decimal(g):
    m = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(2|4|5|8|10|16|20|25|40|50|100)\}", g)
    return m and f"{m[1]}{int(m[2]) / int(m[3])!r}"

def _grouped(g):
    return f"{int(g):,}" if re.fullmatch(r"\d{4,}", g) else None

def _list_turned(g):
    if not re.fullmatch(r"[^()\[\]{}\\]*,[^()\[\]{}\\]*", g) or re.fullmatch(r"\d{1,3}(,\d{3})+", g):
        return None
    return ", ".join(reversed([item.strip() for item in g.split(",")]))

def _left_right(g):
    if "(" not in g or "text" in g or g.count("(") != g.count(")"):
        return None
    return re.sub(r"(?<!\\left)\(", r"\\left(", re.sub(r"(?<!\\right)\)", r"\\right)", g))

def _unicode(g):
    if not re.search(r"\\sqrt\{\d+\}|\\pi|-", g) or re.search(r"frac|begin|left", g):
        return None
    return re.sub(r"\\sqrt\{(\d+)\}", r"√\1", g).replace(r"\pi", "π").replace("-", "−")

def _inequality(g):
    m = re.fullmatch(r"([(\[])(-?\d+),(-?\d+|\\infty)([)\]])", g)
    if not m or m[3] != r"\infty" and (m[1], m[4]) == ("(", ")"):              # (2,4) may be a point
        return None
    low = m[2] + (" < x" if m[1] == "(" else r" \le x")
    return low if m[3] == r"\infty" else low + (" < " if m[4] == ")" else r" \le ") + m[3]

def _where(pattern, rewrite):
    """The rewrite, for golds that the whole pattern matches."""
    return lambda g: rewrite(g) if re.fullmatch(pattern, g) else None

def _replace(old, new):
    return lambda g: g.replace(old, new) if old in g else None

SIMPLE, ROOT_OR_PI = r"-?\d+|-?\\frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{\d+\}", r"\d+|\d*\\sqrt\{\d+\}|\d*\\pi"
REWRITES = {
    "spaces": lambda g: re.sub(r"(?<=[-+=,()])(?![,!])", " ", g) if "\\" not in g else None,
    "dollars": lambda g: f"${g}$" if "$" not in g else None,
    "braces": lambda g: "{" + g + "}" if "," not in g else None,
    "left and right": _left_right,
    "dfrac": _replace(r"\frac", r"\dfrac"),
    "full stop": lambda g: g + ".",
    "displaystyle": lambda g: r"\displaystyle " + g,
    "plain words": lambda g: re.sub(r"\\text\{([^{}]*)\}", r"\1", g) if r"\text" in g else None,
    "slash": _fraction_as_slash,
    "decimal": _decimal,
    "thousands": _grouped,
    "unit": _where(SIMPLE, lambda g: g + r"\text{ cm}"),
    "unit squared": _where(r"\d+", lambda g: g + r"\text{ cm}^2"),
    "named": _where(SIMPLE, lambda g: "x = " + g),
    "sentence": _where(SIMPLE, lambda g: r"\text{The answer is } " + g),
    "sum": _where(r"\d+", lambda g: f"{int(g) - 3} + 3"),
    "times one": _where(ROOT_OR_PI, lambda g: r"1 \cdot " + g),
    "doubled": _where(ROOT_OR_PI, lambda g: rf"\frac{{2 \cdot {g}}}{{2}}"),
    "star for times": _where(r"[\da-z+\-^ ]*\d[a-z][\da-z+\-^ ]*",
                             lambda g: re.sub(r"(\d)(?=[a-z])", r"\1*", g)),
    "root as power": _where(r"-?\\sqrt\{\d+\}", lambda g: re.sub(r"\\sqrt\{(\d+)\}", r"\1^{1/2}", g)),
    "list turned": _list_turned,
    "set braces": lambda g: r"\{" + g + r"\}" if _list_turned(g) else None,
    "degree sign": _replace(r"^\circ", r"^{\circ}"),
    "degrees in words": _replace(r"^\circ", r"\text{ degrees}"),
    "infinity": lambda g: re.sub(r"(?<!-)\\infty", r"+\\infty", g),
    "inequality": _inequality,
    "double backslash": _where(r"(?!.*(?:begin|\\\{)).*frac\{.*", lambda g: g.replace("\\", "\\\\")),
    "bold": _where(r"-?\d+", lambda g: r"\mathbf{" + g + "}"),
    "unicode": _unicode,
    "square brackets": _replace("pmatrix", "bmatrix"),
}

def changed(gold):
    """(kind, changed gold) for each change of each place."""
    for kind, (pattern, replacements) in CHANGES.items():
        for place in re.finditer(pattern, gold):
            for new in replacements(place):
                text = gold[:place.start()] + new + gold[place.end():]
                if text.strip() and text != gold:
                    yield kind, text

def rewritten(gold):
    for kind, rewrite in REWRITES.items():
        text = rewrite(gold)
        if text and text != gold:
            yield kind, text

def main(arguments):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("changed", "rewritten"))
    p.add_argument("--golds", type=Path, default=GOLDS, help="jsonl with 'answer'")
    p.add_argument("--list", action="store_true", help="list every pair that was accepted, or refused")
    args = p.parse_args(arguments)
    golds = list(dict.fromkeys(str(json.loads(line)["answer"]) for line in open(args.golds)))
    tried, found = Counter(), Counter()
    for gold in golds:
        for kind, text in (changed if args.what == "changed" else rewritten)(gold):
            verdict, rule = compare(text, gold)
            tried[kind] += 1
            if verdict == (args.what == "changed"):
                found[kind] += 1
                if args.list:
                    print(f"{kind:16} {text!r:60} {gold!r:40} {rule}")
    word = "accepted" if args.what == "changed" else "refused"
    for kind in tried:
        print(f"{kind:18} {tried[kind]:6} tried {found[kind]:5} {word}")
    print(f"{len(golds)} golds: {sum(found.values())} of {sum(tried.values())} {word}")
    return found

if __name__ == "__main__":
    main(sys.argv[1:])
