"""Turns a problem into the prompt tokens for a model, and gives a trained model's folder a chat template that
writes the same prompt.

    1. Prompting   the flags: format of a turn, system message, text around the problem, start of the response
    2. Chat        a tokenizer with its format: token ids of a prompt, what ends a response, a folder's files

Special tokens are placed by their ids, and the text of a problem never becomes one.

Unlike apply_chat_template in transformers, this adds no default system message, neither Llama 3.1's "Cutting
Knowledge Date" nor Qwen2.5's "You are Qwen". That is intended: the paper's prompt is one user turn, and
--system sets a system message.

A folder that was trained here has a chat_template.jinja whose first line, a comment, records in JSON how the
model was prompted. So `--model RUN/model` needs no flag to prompt in the same way, and wraps nothing twice;
flags take precedence over the folder. What an untrusted folder says there is only data: texts of bounded
size.
"""
import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from lib import files, formats, hf
from lib.flags import flag
from lib.formats import MARK, NAMES, Format

PROMPT = "Problem: {problem}"  # the paper's
TEXT = 2**16  # longest system message, prompt or prefill, in characters
OURS = "{#- rlsp "  # the beginning of a template that this project wrote


# --------------------------------------------------------------------------------------------------------
# 1. Prompting

@dataclass(kw_only=True)
class Prompting:
    """How a model is prompted. Flags not given have the values that the folder was trained with, if any."""
    chat: str = flag(
        "model and data", "auto", "format of a turn; auto: that of the folder's chat_template; plain: only "
        "text, for a base model", choices=("auto", *NAMES))
    system: str | None = flag(
        "model and data", None, "system message (default: what the folder was trained with, else none)",
        empty=True)
    prompt: str | None = flag(
        "model and data", None, "text with {problem} in it (default: what the folder was trained with, "
        f"else '{PROMPT}'); for a new line write $'...\\n...' in bash")
    prefill: str | None = flag(
        "model and data", None, "start of the response, such as $'<think>\\n'; it is given, not learned "
        "(default: what the folder was trained with, else none)", empty=True)


def check_texts(texts):
    """Raise a ValueError for a system message, prompt or prefill that cannot be intended."""
    for name, text in texts.items():
        if text:
            files.check_text(text + "x", name)
        if len(text) > TEXT:
            raise ValueError(f"{name} has {len(text)} characters, expected at most {TEXT}")
        odd = next((c for c in text if ord(c) < 32 and c not in "\n\t"), None)
        if odd:
            raise ValueError(f"{name} has the control character {odd!r}, expected text "
                             r"(bash turns \b in $'...' into one: write \\boxed there)")
        if re.search(r"\\n(?![a-z])", text):
            raise ValueError(f"{name} has a backslash and an n, expected a new line ($'...\\n...' in bash)")
    found = texts["--prompt"].count("{problem}")
    if found != 1:
        raise ValueError(f"--prompt has {{problem}} {found} times, expected once: the place of the problem")


# --------------------------------------------------------------------------------------------------------
# 2. Chat

class Chat:
    """A folder's tokenizer, and how its model is prompted.

    tokenizer: for everything but prompts; end: the id that ends a turn; eos: the ids that end a response;
    note: one line for the user, or "". flags: a Prompting; without it the folder's own values hold.
    """

    def __init__(self, folder, flags=None):
        flags = flags or Prompting()
        self.folder = Path(folder)
        self.note = ""
        self.tokenizer = hf.load_tokenizer(folder)
        path, template = formats.read_template(folder)
        trained = {"system": "", "prompt": PROMPT, "prefill": ""}
        found = None
        if template is not None and template.startswith(OURS):
            found, trained = restored(path, template)
        self.texts = {name: getattr(flags, name) for name in trained}
        for name, text in trained.items():
            if self.texts[name] is None:
                self.texts[name] = text
            elif found and self.texts[name] != text:
                self.note = f"--{name} is not what {folder} was trained with, {files.visible(repr(text))}"
        check_texts({f"--{name}": text for name, text in self.texts.items()})
        self.form = self.format(flags.chat, path, template, found)
        self.end = self.tokenizer.token_to_id(self.form.end)
        if self.end is None:
            raise ValueError(f"{folder}/tokenizer.json: no token {files.visible(repr(self.form.end))}, with "
                             f"which a response in the format {self.form.name} ends; give another --chat: "
                             f"{', '.join(NAMES)}")
        self.eos = sorted({self.end, *hf.named_eos(folder)})
        self.plain, self.prefix, self.first_only, self.unless_space = without_prefix(folder, self.tokenizer)
        self.special = self.special_tokens()

    def format(self, wanted, path, template, found):
        """The Format of the folder's template, or the one that --chat names."""
        bos = formats.named_token(self.folder, "bos_token")
        eos = formats.named_token(self.folder, "eos_token")
        if not eos:
            ids = hf.named_eos(self.folder)
            eos = (self.tokenizer.id_to_token(ids[0]) or "") if ids else ""
        if not found and template is not None:
            found = formats.recognised(template, bos, eos)
        if not found and template is None and wanted != "plain":
            name = formats.by_tokens(self.tokenizer)
            found = formats.standard(name, bos, eos) if name else None
            if name and wanted == "auto":
                self.note = (f"{self.folder} has no chat_template: its tokens suggest the format {name}, but "
                             "a base model has not learned these tokens (--chat plain writes only text)")
        if wanted == "auto" and not found:
            where = f"{path}: a chat_template" if path else f"{self.folder}: tokenizer.json has tokens"
            raise ValueError(f"{where} of no known chat format, such as Llama 3's <|start_header_id|>; "
                             f"give --chat, one of {', '.join(NAMES)}")
        if wanted == "auto" or found and found.name == wanted:
            return found
        new = formats.standard(wanted, bos, eos)
        if wanted == "plain":  # with a BOS if the tokenizer itself writes one
            first = self.tokenizer.encode("x", add_special_tokens=True).ids[:1]
            return dataclasses.replace(new, bos=bos if first == [self.tokenizer.token_to_id(bos)] else "")
        if wanted == "mistral" and self.tokenizer.token_to_id("[INST]") is not None:  # the third version
            tekken = self.tokenizer.token_to_id("▁") is None
            return dataclasses.replace(new, user=("[INST]" if tekken else "[INST] ", "[/INST]"),
                                       lead="" if tekken else " ")
        return new

    def special_tokens(self):
        """The names that become special tokens in our own texts, but not in the text of a problem. Some
        folders do not list the marks of their format as special tokens; here they are made special."""
        added = self.tokenizer.get_added_tokens_decoder().values()
        form = self.form
        ours = "".join((*form.user, *form.system, form.assistant, form.after))
        marks = {form.bos, form.end, *MARK.findall(ours)}
        more = [AddedToken(t.content, special=True, normalized=False) for t in added
                if t.content in marks and not t.special]
        self.tokenizer.add_special_tokens(more)
        self.plain.add_special_tokens(more)
        return {t.content for t in added if t.special or t.content in marks}

    def keep(self, flags):
        """Store the chosen values in the flags, so that the run's config.json has them."""
        flags.chat = self.form.name
        for name, text in self.texts.items():
            setattr(flags, name, text)

    def prompt_ids(self, problem):
        """Token ids of the prompt: the user's turn with the problem, and the opening of the response."""
        form = self.form
        before, after = self.texts["prompt"].split("{problem}")
        system = self.system()
        block = form.system[0] + system + form.system[1] if system else ""
        if form.inside:
            before = block + before
        text = before + problem + after
        start = len(before)
        end = start + len(problem)
        if form.trim:
            start -= len(text) - len(text.lstrip())
            end -= len(text) - len(text.lstrip())
            text = text.strip()
            start = max(start, 0)
        opening = form.opening + self.texts["prefill"]
        head = form.bos + ("" if form.inside else block) + form.user[0] + text[:start]
        end = max(start, end)
        tail = text[end:] + form.user[1] + form.assistant + (form.lead + opening if opening else "")
        return self.ids([(head, True), (text[start:end], False), (tail, True)])

    def system(self):
        trimmed = self.form.trim and not self.form.inside
        return self.texts["system"].strip() if trimmed else self.texts["system"]

    def response_ids(self, text, first=False):
        """Token ids of a text that follows a prompt. `first`: it is the beginning of the response."""
        opening = self.form.opening + self.texts["prefill"]
        lead = self.form.lead if first and not opening else ""
        return self.plain.encode(lead + text, add_special_tokens=False).ids

    def ids(self, pieces):
        """Token ids of the joined texts of `pieces`, pairs (text, whether names of special tokens in it
        become these tokens)."""
        ids = []
        segment = ""

        def close():
            if segment:
                first = not ids
                spaced = self.unless_space and segment[0] in (" ", self.prefix)
                prefix = self.prefix if (first or not self.first_only) and not spaced else ""
                ids.extend(self.plain.encode(prefix + segment, add_special_tokens=False).ids)

        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        for text, ours in pieces:
            for part in re.split(f"({names})", text) if ours and names else [text]:
                if ours and part in self.special:
                    close()
                    segment = ""
                    ids.append(self.tokenizer.token_to_id(part))
                else:
                    segment += part
        close()
        return ids

    def template(self):
        """A chat_template with which transformers and vLLM write this Chat's prompt from one user message,
        the bare problem. A conversation's own system message replaces ours, and earlier responses get the
        prefill that they were given."""
        form = self.form
        comment = json.dumps({"format": dataclasses.asdict(form)} | self.texts).replace("#", "\\u0023")
        before, after = map(literal, self.texts["prompt"].split("{problem}"))
        trim = " | trim" if form.trim else ""
        opening = form.opening + self.texts["prefill"]
        block = f"{literal(form.system[0])} + system{'' if form.inside else trim} + {literal(form.system[1])}"
        asked = f"{before} + message['content'] + {after}"
        if form.inside:
            asked = f"(({block}) if system and loop.first else '') + {asked}"
        assistant = literal(form.assistant)
        given = literal(opening)
        lines = [
            OURS + comment + " #}",
            f"{{%- set system = {literal(self.texts['system'])} %}}",
            "{%- if messages and messages[0]['role'] == 'system' %}",
            "{%- set system = messages[0]['content'] %}",
            "{%- set messages = messages[1:] %}",
            "{%- endif %}",
            f"{{{{- {literal(form.bos)} }}}}",
            "" if form.inside else f"{{%- if system %}}{{{{- {block} }}}}{{%- endif %}}",
            "{%- for message in messages %}",
            "{%- if message['role'] == 'user' %}",
            f"{{{{- {literal(form.user[0])} + ({asked}){trim} + {literal(form.user[1])} }}}}",
            "{%- elif message['role'] == 'assistant' %}",
            f"{{%- set given = '' if message['content'].startswith({given}) else {given} %}}",
            f"{{{{- {assistant} + {literal(form.lead)} + given + message['content'] }}}}",
            f"{{{{- {literal(form.end)} }}}}",
            "{%- if not loop.last or add_generation_prompt %}",
            f"{{{{- {literal(form.after)} }}}}",
            "{%- endif %}",
            "{%- else %}",
            "{{- raise_exception('expected the roles system (first), user and assistant') }}",
            "{%- endif %}",
            "{%- endfor %}",
            "{%- if add_generation_prompt %}",
            f"{{{{- {assistant} + {literal(form.lead + opening if opening else '')} }}}}",
            "{%- endif %}"]
        return "\n".join(line for line in lines if line)

    def write(self, target):
        """Write the files beside the weights of a model that was trained with this Chat. Only
        chat_template.jinja has the prompt; another template in tokenizer_config.json would contradict it."""
        target = Path(target)
        hf.copy_tokenizer(self.folder, target)
        path = target / "tokenizer_config.json"
        if path.exists():
            config = files.read_json(path)
            if config.pop("chat_template", None) is not None:
                files.write_text(path, json.dumps(config, indent=2) + "\n")
        files.write_text(target / "chat_template.jinja", self.template())


def literal(text):
    """A text as a Jinja string literal."""
    for character, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, written)
    return f"'{text}'"


def without_prefix(folder, tokenizer):
    """(tokenizer, prefix, first only, unless a space is there). A tokenizer such as Llama 2's puts a prefix,
    a space, before each text, but the continuation of a text must not begin with one. So this returns the
    same tokenizer without the prefix, and the prefix.

    Metaspace may add it only at the very beginning; the normalizer Prepend also adds it after each special
    token."""
    spec = files.read_json(Path(folder) / "tokenizer.json")

    def steps(part):
        part = spec.get(part) or {}
        return part.get("normalizers", part.get("pretokenizers", [part]))

    prefix = ""
    first_only = False
    unless_space = False
    for step in steps("normalizer"):
        if step.get("type") == "Prepend":
            prefix = step["prepend"]
            step |= {"type": "Replace", "pattern": {"String": "\0\0"}, "content": "\0\0"}  # does nothing
            del step["prepend"]
    for step in steps("pre_tokenizer")[:1]:
        if step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            prefix = step.get("replacement", "▁")
            first_only = step.get("prepend_scheme") == "first"
            unless_space = True
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            prefix = " "
            unless_space = True
            step["add_prefix_space"] = False
    if not prefix:
        return tokenizer, "", False, False
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain, prefix, first_only, unless_space


def restored(path, template):
    """(Format, texts) from the comment at the beginning of a template of this project."""
    try:
        found = json.loads(template[len(OURS) : template.index("#}")])
        texts = {name: found[name] for name in ("system", "prompt", "prefill")}
        form = Format(**found["format"])
        form = dataclasses.replace(form, user=tuple(form.user), system=tuple(form.system))
        flat = [*texts.values(), *form.user, *form.system, form.bos, form.end, form.assistant, form.after,
                form.opening, form.lead]
        if (len(form.user), len(form.system), form.name in NAMES) != (2, 2, True):
            raise ValueError("a format is missing")
        if any(type(t) is not str for t in flat) or {type(form.inside), type(form.trim)} != {bool}:
            raise ValueError("a text is missing")
        check_texts({f"--{name}": text for name, text in texts.items()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path}: its first line is not what a run of rlsp.py wrote there: "
                         f"{files.visible(e)}") from None
    return form, texts
