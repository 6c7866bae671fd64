"""The formats in which chat models' turns are written, and which format a folder has.

No template is ever run. It is an untrusted text of bounded size that is searched for known marks; the turn is
then written by our own code (lib/chat.py).
"""
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from lib import files

NAMES = ("llama3", "chatml", "llama2", "zephyr", "mistral", "deepseek", "tulu", "plain")
TEMPLATE = 2**20  # longest template, in characters; the longest that occur have some 20,000
THINK = "<think>\n"
MARK = re.compile(r"<\|[^<>|\s]*\|>|<｜[^<>｜\s]*｜>|\[/?[A-Z_]+\]|</?s>|<</?SYS>>|<(?:start|end)_of_turn>")


@dataclass(frozen=True)
class Format:
    """The texts around the messages of a conversation. Special tokens are written by their names."""
    name: str
    bos: str  # at the beginning, or ""
    end: str  # the token that ends a response
    user: tuple  # before and after the problem's text
    assistant: str  # before a response
    after: str = ""  # after the end of a response, if another turn follows
    system: tuple = ("", "\n\n")  # before and after the system message
    inside: bool = False  # the system message stands in the first user turn
    trim: bool = False  # white space around messages is removed
    opening: str = ""  # the beginning of every response, which is part of the prompt
    lead: str = ""  # what stands between `assistant` and a response, and is sampled with it


def standard(name, bos, eos):
    """The format of this name, as its first model had it, for a tokenizer with these two special tokens."""
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    if name == "llama3":
        return Format(name, bos or "<|begin_of_text|>", "<|eot_id|>", (header("user"), "<|eot_id|>"),
                      header("assistant"), system=(header("system"), "<|eot_id|>"), trim=True)
    if name == "chatml":
        return Format(name, "", "<|im_end|>", ("<|im_start|>user\n", "<|im_end|>\n"),
                      "<|im_start|>assistant\n", "\n", ("<|im_start|>system\n", "<|im_end|>\n"))
    if name == "llama2":
        return Format(name, bos or "<s>", eos, ("[INST] ", " [/INST]"), "", bos or "<s>",
                      ("<<SYS>>\n", "\n<</SYS>>\n\n"), inside=True, trim=True, lead=" ")
    if name == "zephyr":
        return Format(name, "", eos, ("<|user|>\n", eos + "\n"), "<|assistant|>\n", "\n",
                      ("<|system|>\n", eos + "\n"))
    if name == "tulu":
        return Format(name, "", eos, ("<|user|>\n", "\n"), "<|assistant|>\n", "\n", ("<|system|>\n", "\n"))
    if name == "mistral":
        return Format(name, bos or "<s>", eos, ("[INST] ", " [/INST]"), "", inside=True, lead=" ")
    if name == "deepseek":
        return Format(name, bos or "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", ""),
                      "<｜Assistant｜>", system=("", ""))
    return Format("plain", bos, eos, ("", "\n"), "")


def recognised(template, bos, eos):
    """The Format of a chat_template, recognised by its marks, or None. A template with a mark that a format
    does not have is not of that format."""
    text = template.replace("\\n", "\n")
    text = re.sub(r"""message(\.content|\[['"]content['"]\])""", "CONTENT", text)
    marks = set(MARK.findall(text))

    def form(name, needed, allowed=()):
        if not set(needed) <= marks <= {*needed, *allowed, bos, eos}:
            return None
        said = "bos_token" in text or bos in marks - set(needed)  # SmolLM2 calls <|im_start|> its BOS
        new = standard(name, bos, eos)
        return dataclasses.replace(new, bos=(new.bos or bos) if said else "")

    llama3 = form("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                  ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|python_tag|>", "<|image|>"))
    chatml = form("chatml", ("<|im_start|>", "<|im_end|>"))
    if llama3:
        return llama3
    if chatml:
        turns = re.search(r"""<\|im_end\|>(['"]\s*[+~]\s*['"])?\n""", text)
        asked = "<|im_start|>assistant\n" in text
        opening = THINK if "<|im_start|>assistant\n" + THINK in text else ""
        return dataclasses.replace(chatml, opening=opening) if turns and asked else None
    if {"<｜User｜>", "<｜Assistant｜>"} <= marks and all("｜" in mark for mark in marks):
        new = form("deepseek", marks)
        return dataclasses.replace(new, opening=THINK if "<｜Assistant｜>" + THINK in text else "")
    if "<<SYS>>" in marks:
        return form("llama2", ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"))
    if "[INST]" in marks:
        return recognised_mistral(form, text)
    said = r"""<\|user\|>\n['"]\s*[+~]\s*CONTENT\s*([+~]\s*eos_token)?\s*(\}\}|[+~]\s*['"])\n"""
    turn = re.search(said, text)
    if turn:
        return form("zephyr" if turn[1] else "tulu", ("<|user|>", "<|assistant|>"), ("<|system|>",))
    return None


def recognised_mistral(form, text):
    """The Format of a Mistral template, or None. Its versions differ in the spaces around [INST] and [/INST],
    and the newest have a place for the system message."""
    tools = re.findall(r"\[/?(?:AVAILABLE_TOOLS|TOOL_[A-Z]+|CALL_ID|ARGS|IMG)\]", text)
    system = ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    new = form("mistral", ("[INST]", "[/INST]"), (*tools, *system))
    before = set(re.findall(r"""['"]( ?\[INST\] ?)""", text))
    after = set(re.findall(r"""( ?\[/INST\])['"]""", text))
    if not new or len(before) != 1 or len(after) != 1:
        return None
    lead = " " if re.search(r"""['"] ['"]\s*[+~]\s*CONTENT""", text) else ""
    new = dataclasses.replace(new, user=(before.pop(), after.pop()), lead=lead)
    return dataclasses.replace(new, system=system, inside=False) if system[0] in text else new


def read_template(folder):
    """(file, text) of a folder's chat template, or (None, None). As in transformers, chat_template.jinja
    comes before tokenizer_config.json; of several templates, the one called default is taken."""
    folder = Path(folder)
    path = folder / "chat_template.jinja"
    text = None
    if path.exists():
        with files.reading(path, "rb") as f:
            text = f.read(4 * TEMPLATE + 1).decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if text is None and (folder / name).exists():
            path = folder / name
            text = files.read_json(path).get("chat_template")
            if isinstance(text, list):
                named = {t.get("name"): t.get("template") for t in text if isinstance(t, dict)}
                text = named.get("default")
    if text is None:
        return None, None
    if not isinstance(text, str) or len(text) > TEMPLATE:
        raise ValueError(f"{path}: chat_template is {files.visible(repr(text), 60)}, "
                         f"expected text of at most {TEMPLATE} characters")
    return path, text


def named_token(folder, key):
    """The text of bos_token or eos_token in a folder's files, or ""."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(folder) / name
        value = files.read_json(path).get(key) if path.exists() else None
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            return value
    return ""


def by_tokens(tokenizer):
    """The format suggested by a tokenizer's special tokens, or None, for a folder without any template."""
    def has(*names):
        return all(tokenizer.token_to_id(name) is not None for name in names)

    if has("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>"):
        return "llama3"
    return "chatml" if has("<|im_start|>", "<|im_end|>") else None
