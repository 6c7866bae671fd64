"""From a problem to the tokens that a model is asked with, and from a finished run to a folder that asks the
same.

    1. Prompting   the flags: format of a turn, system message, text around the problem, start of the response
    2. Chat        a tokenizer with its format: token ids of a prompt, what ends a response, a folder's files

Special tokens are placed by their ids, and the text of a problem never becomes one.

What differs from transformers' apply_chat_template, on purpose: there is no default system message, neither
Llama 3.1's "Cutting Knowledge Date" nor Qwen2.5's "You are Qwen". The paper's prompt is one user turn, and
--system sets a system message.

A folder that was trained here has a chat_template.jinja whose first line, a comment, says in JSON what it was
trained with. So `--model RUN/model` asks in the same way without any flag and wraps nothing twice; a flag is
stronger than the folder. What a stranger's folder says there is data: texts of bounded size.
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
TEXT = 2**16  # characters of a system message, a prompt or a prefill
OURS = "{#- rlsp "  # how a template begins that this project wrote


# --------------------------------------------------------------------------------------------------------
# 1. Prompting

@dataclass(kw_only=True)
class Prompting:
    """How a model is asked. What is not given is what the folder was trained with, if it was trained here."""
    chat: str = flag(
        "model and data", "auto", "format of a turn; auto: what the folder's chat_template has; plain: text "
        "alone, for a base model", choices=("auto", *NAMES))
    system: str | None = flag(
        "model and data", None, "system message; without it what the folder was trained with, else none",
        empty=True)
    prompt: str | None = flag(
        "model and data", None, "text with {problem} in it; without it what the folder was trained with, "
        f"else '{PROMPT}'. A new line in bash: $'...\\n...'")
    prefill: str | None = flag(
        "model and data", None, "start of the response, such as $'<think>\\n', given and not learned; "
        "without it what the folder was trained with, else none", empty=True)


def check_texts(texts):
    """ValueError for a system message, prompt or prefill that cannot be what was meant."""
    for name, text in texts.items():
        if text:
            files.check_text(text + "x", name)
        if len(text) > TEXT:
            raise ValueError(f"{name} has {len(text)} characters, expected at most {TEXT}")
        odd = next((c for c in text if ord(c) < 32 and c not in "\n\t"), None)
        if odd:
            raise ValueError(f"{name} has the control character {odd!r}, expected text "
                             r"(bash makes one of \b in $'...': write \\boxed there)")
        if re.search(r"\\n(?![a-z])", text):
            raise ValueError(f"{name} has a backslash and an n, expected a new line ($'...\\n...' in bash)")
    found = texts["--prompt"].count("{problem}")
    if found != 1:
        raise ValueError(f"--prompt has {{problem}} {found} times, expected once: the place of the problem")


# --------------------------------------------------------------------------------------------------------
# 2. Chat

class Chat:
    """A folder's tokenizer, and how its model is asked.

    tokenizer: for all that is not a prompt; end: the id that ends a turn; eos: those that end a response;
    note: one line that the user should see, or "". flags: a Prompting; without it all is the folder's own.
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
        """The Format: of the folder's template, or the one that --chat names."""
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
                self.note = (f"{self.folder} has no chat_template: its turns are {name}'s by its tokens, "
                             "which are untrained in a base model (--chat plain writes text alone)")
        if wanted == "auto" and not found:
            where = f"{path}: a chat_template" if path else f"{self.folder}: tokenizer.json has tokens"
            raise ValueError(f"{where} of no known chat format, neither Llama 3's <|start_header_id|> nor "
                             f"another one's; give --chat, one of {', '.join(NAMES)}")
        if wanted == "auto" or found and found.name == wanted:
            return found
        new = formats.standard(wanted, bos, eos)
        if wanted == "plain":  # where the tokenizer itself writes a BOS
            first = self.tokenizer.encode("x", add_special_tokens=True).ids[:1]
            return dataclasses.replace(new, bos=bos if first == [self.tokenizer.token_to_id(bos)] else "")
        if wanted == "mistral" and self.tokenizer.token_to_id("[INST]") is not None:  # the third version
            tekken = self.tokenizer.token_to_id("▁") is None
            return dataclasses.replace(new, user=("[INST]" if tekken else "[INST] ", "[/INST]"),
                                       lead="" if tekken else " ")
        return new

    def special_tokens(self):
        """The names of the tokens that a text of ours becomes, and a text of a problem does not. Some folders
        have their marks as tokens that are not special: here they are."""
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
        """Put the values that were chosen into the flags, so that the run's config.json has them."""
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
        """Token ids of a text that goes on after a prompt; `first`: it is the beginning of the response."""
        opening = self.form.opening + self.texts["prefill"]
        lead = self.form.lead if first and not opening else ""
        return self.plain.encode(lead + text, add_special_tokens=False).ids

    def ids(self, pieces):
        """Token ids of (text, whether names of special tokens in it are these tokens), as of one text."""
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
        """A chat_template that gives transformers and vLLM the prompt of this Chat for one user message that
        is the bare problem. A conversation with a system message of its own has that one; earlier responses
        get the prefill that they were given."""
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
        """The files beside the weights of a model that was trained with this Chat. The prompt is in
        chat_template.jinja alone: another template in tokenizer_config.json would contradict it."""
        target = Path(target)
        hf.copy_tokenizer(self.folder, target)
        path = target / "tokenizer_config.json"
        if path.exists():
            config = files.read_json(path)
            if config.pop("chat_template", None) is not None:
                files.write_text(path, json.dumps(config, indent=2) + "\n")
        files.write_text(target / "chat_template.jinja", self.template())


def literal(text):
    """A text as Jinja writes it."""
    for character, written in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, written)
    return f"'{text}'"


def without_prefix(folder, tokenizer):
    """(tokenizer, prefix, first only, unless a space is there): what a tokenizer such as Llama 2's puts
    before a text, and the same tokenizer without it: a text that goes on is not to begin with a space.

    Metaspace may do it at the very beginning alone; the normalizer Prepend also does it after each special
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
    """(Format, texts) of the comment with which a template of this project begins."""
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
