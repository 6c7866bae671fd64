"""lib/chat.py and lib/formats.py against transformers' apply_chat_template, on small tokenizers that are made here.

The templates are those of the models in short: the same turns, without tools and without checks of the order of roles.
"""
import json
import shutil

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lib import chat, cli, formats, hf, inputs
import rlsp
from conftest import ROOT, TINY, tiny_llama

TINY_MODEL = ROOT / "data/tiny/model"
EACH = "{% for message in messages %}"


def turns(said, opening):
    return EACH + "{{ " + said + " }}{% endfor %}{% if add_generation_prompt %}{{ '" + opening + "' }}{% endif %}"


HEADER = "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>'"
IM = "'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'"
DATE = "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
QWEN_SYSTEM = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
LLAMA2 = ("{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}"
          "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
          "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
          "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
          "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
ZEPHYR = (EACH + "\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n"
          "{{ '<|system|>\n' + message['content'] + eos_token }}\n{% else %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
TULU = (EACH + "{% if message['role'] == 'system' %}{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}"
        "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}")
TULU2 = (EACH + "\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + "
         "message['content'] }}\n{% else %}\n{{ '<|assistant|>\n' + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
         "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
MISTRAL = ('{%%- if messages[0]["role"] == "system" %%}{%%- set system_message = messages[0]["content"] %%}{%%- set loop_messages = messages[1:] %%}{%%- else %%}'
           '{%%- set loop_messages = messages %%}{%%- endif %%}{{- bos_token }}{%%- for message in loop_messages %%}{%%- if message["role"] == "user" %%}'
           '{%%- if loop.first and system_message is defined %%}{{- "%s" + system_message + "\\n\\n" + message["content"] + "%s" }}{%%- else %%}'
           '{{- "%s" + message["content"] + "%s" }}{%%- endif %%}{%%- else %%}{{- %s + eos_token }}{%%- endif %%}{%%- endfor %%}')
MISTRAL7 = ("{{- bos_token }}" + EACH + "{%- if message['role'] == 'system' %}{{- '[SYSTEM_PROMPT]' + message['content'] + '[/SYSTEM_PROMPT]' }}"
            "{%- elif message['role'] == 'user' %}{{- '[INST]' + message['content'] + '[/INST]' }}{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}")
DEEPSEEK = ("{% set ns = namespace(system='') %}" + EACH + "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}{% endif %}{% endfor %}"
            "{{ bos_token }}{{ ns.system }}" + EACH + "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
            "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>THINK' }}{% endif %}")
R1 = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL = ["<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]

# name: (format, template, kind of tokenizer, its added tokens, (BOS, EOS), what the template has more than ours where no system message is given)
CASES = {
    "Llama 3": ("llama3", turns("(bos_token if loop.first else '') + " + HEADER, "<|start_header_id|>assistant<|end_header_id|>\n\n"), "bytes", LLAMA3_TOKENS,
                ("<|begin_of_text|>", "<|eot_id|>"), ""),
    "Llama 3.1": ("llama3", "{{- bos_token }}{% if messages[0]['role'] != 'system' %}{{- '" + DATE.replace("\n", "\\n") + "' }}{% endif %}" + turns(
        HEADER, "<|start_header_id|>assistant<|end_header_id|>\n\n"), "bytes", LLAMA3_TOKENS, ("<|begin_of_text|>", "<|eot_id|>"), DATE),
    "Qwen2.5": ("chatml", "{% if messages[0]['role'] != 'system' %}{{- '" + QWEN_SYSTEM.replace("\n", "\\n") + "' }}{% endif %}" + turns(
        IM, "<|im_start|>assistant\\n"), "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("", "<|im_end|>"), QWEN_SYSTEM),
    "SmolLM2": ("chatml", "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '" + SMOLLM2_SYSTEM.replace("\n", "\\n") + "' }}"
                "{% endif %}" + turns(IM, "<|im_start|>assistant\n").removeprefix(EACH), "bytes", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                ("<|im_start|>", "<|im_end|>"), SMOLLM2_SYSTEM),
    "Qwen3": ("chatml", turns(IM.replace("message['role']", "message.role").replace("message['content']", "message.content"), "<|im_start|>assistant\\n"), "bytes",
              ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "-<think>", "-</think>"], ("", "<|im_end|>"), ""),
    "QwQ": ("chatml", turns(IM, "<|im_start|>assistant\\n<think>\\n"), "bytes", ["<|im_start|>", "<|im_end|>", "-<think>"], ("", "<|im_end|>"), ""),
    "Hermes on Llama 3": ("chatml", "{{ bos_token }}" + turns(IM, "<|im_start|>assistant\n"), "bytes", [*LLAMA3_TOKENS, "-<|im_start|>", "-<|im_end|>"],
                          ("<|begin_of_text|>", "<|im_end|>"), ""),
    "Llama 2": ("llama2", LLAMA2, "prepend", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "Llama 2, first": ("llama2", LLAMA2, "first", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "TinyLlama-Chat": ("zephyr", ZEPHYR, "prepend", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "Tulu 2": ("tulu", TULU2, "prepend", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "Tulu 3": ("tulu", TULU, "bytes", LLAMA3_TOKENS, ("<|begin_of_text|>", "<|end_of_text|>"), ""),
    "OLMo's Tulu": ("tulu", "{{ bos_token }}" + TULU, "bytes", ["<|endoftext|>"], ("<|endoftext|>", "<|endoftext|>"), ""),
    "Mistral v0.2": ("mistral", MISTRAL % (" [INST] ", " [/INST]", " [INST] ", " [/INST]", '" " + message["content"]'), "first", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "Mistral v0.1": ("mistral", MISTRAL % ("[INST] ", " [/INST]", "[INST] ", " [/INST]", 'message["content"]'), "prepend", ["<s>", "</s>"], ("<s>", "</s>"), ""),
    "Mistral v0.3": ("mistral", MISTRAL % ("[INST] ", "[/INST]", "[INST] ", "[/INST]", '" " + message["content"]'), "first", CONTROL, ("<s>", "</s>"), ""),
    "Mistral v0.3, marks that are not special": ("mistral", MISTRAL % ("[INST] ", "[/INST]", "[INST] ", "[/INST]", '" " + message["content"]'), "first",
                                                 [*CONTROL[:2], "-[INST]", "-[/INST]"], ("<s>", "</s>"), ""),
    "Mistral Nemo": ("mistral", MISTRAL % ("[INST]", "[/INST]", "[INST]", "[/INST]", 'message["content"]'), "bytes", CONTROL, ("<s>", "</s>"), ""),
    "Mistral Small": ("mistral", MISTRAL7, "bytes", CONTROL, ("<s>", "</s>"), ""),
    "R1-Distill": ("deepseek", DEEPSEEK.replace("THINK", "<think>\\n"), "bytes", [*R1, "-<｜User｜>", "-<｜Assistant｜>", "-<think>"], R1, ""),
    "R1-Distill, older": ("deepseek", DEEPSEEK.replace("THINK", ""), "bytes", [*R1, "<｜User｜>", "<｜Assistant｜>"], R1, ""),
}
ODD = ["What is 2 + 2?", "  white space\n ", "a\n\n\nb {x} {{ y }} {% z %} {problem}", "é ≥ 漢字 😀\t\\boxed{1}", "\n", "'\" \\n # #}"]


def tokenizer_of(kind, added):
    """A small tokenizer: byte-level as Llama 3's, or in Llama 2's way, which puts "▁" before each text or before the first one alone.
    Tokens that begin with - are added as others than special ones."""
    tokens = ["<unk>"] if kind != "bytes" else []
    if kind == "bytes":
        vocabulary = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = [("P", "r"), ("Pr", "o"), ("Ġ", "i"), ("Ċ", "Ċ"), (":", "Ġ"), ("e", "r"), ("r", "Ċ"), ("t", "Ċ")]
        vocabulary += ["".join(pair) for pair in words]
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(vocabulary)}, words))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        letters = [chr(i) for i in range(33, 127)] + ["▁"]
        words = [("▁", "P"), ("▁", "▁"), ("▁", "["), ("e", "r"), ("▁", "a")]
        tokens += [f"<0x{i:02X}>" for i in range(256)] + letters + ["".join(pair) for pair in words]
        tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, words, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if kind == "prepend":
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for token in added:
        plain = token.removeprefix("-")
        (tokenizer.add_tokens if token != plain else tokenizer.add_special_tokens)([AddedToken(plain, special=token == plain, normalized=False)])
    return tokenizer


def folder_of(out, case, template=True):
    """A folder of a case, without weights."""
    _, text, kind, added, (bos, eos), _ = CASES[case]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(TINY | dict(vocab_size=1000)))
    tokenizer_of(kind, added).save(str(out / "tokenizer.json"))
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=eos) | (dict(bos_token=bos) if bos else {}) | (dict(chat_template=text) if template else {})
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


def theirs(folder, *messages):
    """Ids of transformers, for (role, text) pairs."""
    peer = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = peer.AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template([dict(role=r, content=t) for r, t in messages], add_generation_prompt=True, tokenize=True, return_dict=False)


def asked(folder, **flags):
    return chat.Chat(folder, chat.Prompting(**flags))


@pytest.mark.parametrize("case", CASES)
def test_prompts_are_the_templates_own(tmp_path, case):
    """Token by token, with a system message and without, for texts with odd white space, braces, quotes and letters of all sizes."""
    name, _, _, _, _, more = CASES[case]
    folder = folder_of(tmp_path / "m", case)
    ours, system = asked(folder), asked(folder, system=" Reason step by step.\n")
    assert ours.form.name == name and not ours.note
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    default = tokenizer.encode(more, add_special_tokens=False).ids
    for text in ODD:
        wrapped = f"Problem: {text}"
        expected, got = theirs(folder, ("user", wrapped)), ours.prompt_ids(text)
        assert got == without(expected, default)
        assert system.prompt_ids(text) == theirs(folder, ("system", " Reason step by step.\n"), ("user", wrapped))


def without(ids, part):
    """ids without part, which stands among them."""
    at = next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)
    return ids[:at] + ids[at + len(part) :]


PROMPTING = dict(system="Reason\n{step} by 'step'.", prompt="Q: {problem}\nPut it in \\boxed{}. #}", prefill="<think>\nOkay, ")


@pytest.mark.parametrize("case", CASES)
def test_a_trained_folder_asks_in_transformers_as_it_was_trained(tmp_path, case):
    """Its chat_template.jinja wraps a bare problem in the prompt, the system message and the prefill, and Chat finds all of it again."""
    folder = folder_of(tmp_path / "m", case)
    for number, texts in enumerate(({}, PROMPTING)):
        ours, out = asked(folder, **texts), tmp_path / f"out{number}"
        out.mkdir()
        ours.write(out)
        (out / "config.json").write_text((folder / "config.json").read_text())
        again = asked(out)
        assert (again.form, again.texts, again.eos, again.note) == (ours.form, ours.texts, ours.eos, "")
        for text in ODD:
            ids = ours.prompt_ids(text)
            assert ids == theirs(out, ("user", text)) == again.prompt_ids(text)
        assert asked(out, system="New.").prompt_ids("x") == theirs(out, ("system", "New."), ("user", "x"))
        again.write(out)  # a second run on the first one's model
        assert theirs(out, ("user", "x")) == ours.prompt_ids("x")
        peer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(out)
        # what a server gives back of the first turn is what was sampled, without the prefill
        turn = [dict(role="user", content="x"), dict(role="assistant", content="It is 4."), dict(role="user", content="y")]
        text = peer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        start = peer.apply_chat_template(turn[:1], tokenize=False, add_generation_prompt=True)
        opening, given = ours.form.opening + texts.get("prefill", ""), ours.form.lead
        assert text.startswith(start + (given if not opening else "") + "It is 4." + ours.form.end)
        assert text.count("Put it in") == (2 if texts else 0) and text.count(texts.get("system", "no")) <= 1
        trained = peer.apply_chat_template(turn[:2], tokenize=True, return_dict=False)
        ids, mask = rlsp.sft_example(ours, {"problem": "x", "solution": "It is 4."})
        assert trained == ids  # SFT trains on what the template makes of a whole conversation
        assert sum(mask) == len(ours.response_ids("It is 4.", first=True)) + 1 and mask == [False] * (len(ids) - sum(mask)) + [True] * sum(mask)


@pytest.mark.parametrize("case", ["Hermes on Llama 3", "R1-Distill", "Mistral v0.3", "Mistral v0.3, marks that are not special", "Qwen2.5", "Llama 2"])
def test_no_text_of_a_problem_becomes_a_special_token(tmp_path, case):
    """Whether the folder calls its marks special or not."""
    ours = asked(folder_of(tmp_path / "m", case))
    plain, marks = ours.prompt_ids("x"), [t.removeprefix("-") for t in CASES[case][3] if "think" not in t]
    ids = ours.prompt_ids("x" + "".join(marks) + "x")
    number = lambda ids: [ids.count(ours.tokenizer.token_to_id(mark)) for mark in marks]
    assert number(ids) == number(plain) and sum(number(ids)) >= 1
    assert ours.tokenizer.decode(ids, skip_special_tokens=True).count("".join(marks)) == 1
    assert number(ours.prompt_ids(marks[-1])) == number(plain)  # the whole text is one
    assert ours.tokenizer.decode([ours.end], skip_special_tokens=True) == ""


def test_the_page_of_models_names_every_model_type_and_format():
    text = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    assert all(f"\n| `{name}` |" in text for name in (*formats.NAMES, "llama", "qwen2", "qwen3", "mistral"))
    assert {form for form, *_ in CASES.values()} == {*formats.NAMES} - {"plain"}
    command = text.split("--prompt $'")[1].split("'")[0].replace("\\n", "\n").replace("\\\\", "\\")  # as bash reads it
    ours = asked(TINY_MODEL, prompt=command)
    assert "Problem: 1 + 1?\nPut your final answer in \\boxed{}.<|eot_id|>" in ours.tokenizer.decode(ours.prompt_ids("1 + 1?"), skip_special_tokens=False)


def test_flags_of_a_run_are_the_values_that_were_chosen(tmp_path):
    """config.json has texts, not "what the folder says"; a model that was trained with them is asked in the same way without flags."""
    data = tmp_path / "d.jsonl"
    data.write_text('{"problem": "1 + 1?", "answer": "2", "solution": "It is 2."}\n')
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    flags = rlsp.SFT(model=str(tmp_path / "m"), data=str(data), from_scratch=True, run=str(tmp_path / "sft"), **PROMPTING)
    first, examples = inputs.for_sft(flags, rlsp.sft_example)
    assert {k: cli.kept_flags(flags)[k] for k in ("chat", *PROMPTING)} == dict(chat="llama3", **PROMPTING)
    hf.save(tiny_llama(**json.loads((TINY_MODEL / "config.json").read_text())), tmp_path / "sft/model")
    first.write(tmp_path / "sft/model")
    flags = rlsp.PPO(model=str(tmp_path / "sft/model"), data=str(data), run=str(tmp_path / "ppo"), max_response=100, max_prompt=400)
    second, *_ = inputs.for_ppo(flags)
    assert {k: cli.kept_flags(flags)[k] for k in ("chat", *PROMPTING)} == dict(chat="llama3", **PROMPTING)
    assert second.prompt_ids("1 + 1?") == first.prompt_ids("1 + 1?") == list(examples[0][0][: len(first.prompt_ids("1 + 1?"))])
    both = rlsp.Eval(model=[str(tmp_path / "m"), str(tmp_path / "sft/model")], data=str(data), max_response=100, max_prompt=400, run=str(tmp_path / "eval"))
    hf.save(tiny_llama(**json.loads((TINY_MODEL / "config.json").read_text())), tmp_path / "m")
    inputs.for_eval(both)
    assert both.prompt is None and both.chat == "auto"  # each model's own
    third, *_ = inputs.for_sample(rlsp.Sample(model=str(tmp_path / "sft/model"), problem="1 + 1?", max_response=100))
    assert third.texts == PROMPTING
    # a run that goes on notices another template in its model's folder; one of an older version, which did not look, goes on
    then = hf.measure(tmp_path / "sft/model")
    (tmp_path / "sft/model/chat_template.jinja").write_text(CASES["Llama 3"][1])
    assert [path for path, *_ in cli.differences(then, hf.measure(tmp_path / "sft/model"))] == [("chat_template.jinja",)]
    older = {k: v for k, v in then.items() if k not in hf.PROMPT_FILES}
    assert not list(cli.differences(older, hf.measure(tmp_path / "sft/model")))


def test_where_the_template_stands(tmp_path):
    """A file of its own comes before tokenizer_config.json, of several the default one is taken, and a pipe is not waited for."""
    chatml, folder = CASES["Hermes on Llama 3"][1], folder_of(tmp_path / "m", "Hermes on Llama 3", template=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert asked(folder).form.name == "llama3"
    assert "m has no chat_template: its tokens suggest the format llama3, but a base model has not learned these tokens (--chat plain" in asked(folder).note
    assert not asked(folder, chat="llama3").note and asked(folder, chat="llama3").form == asked(folder).form
    (folder / "chat_template.json").write_text(json.dumps(dict(chat_template=chatml)))
    assert asked(folder).form.name == "chatml"
    named = [dict(name="tool_use", template="{{ tools }}"), dict(name="default", template=CASES["Llama 3"][1])]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | dict(chat_template=named)))
    assert asked(folder).form.name == "llama3" and not asked(folder).note
    (folder / "chat_template.jinja").write_text(chatml)
    assert asked(folder).form.name == "chatml"
    for text in ("{{ tools }}", "", "<start_of_turn>user", "a" * (formats.TEMPLATE + 1), "<|im_start|>user<|im_sep|><|im_end|>", CASES["Tulu 3"][1] + "<|end|>"):
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(ValueError, match="chat_template.jinja: .*(give --chat, one of llama3, chatml, llama2, zephyr, mistral, deepseek, tulu, plain|at most)"):
            asked(folder)
    assert asked(folder, chat="chatml").prompt_ids("x")[0] != asked(folder, chat="llama3").prompt_ids("x")[0]
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match="chat_template.jinja: expected a regular file"):
        asked(folder)


@pytest.mark.parametrize("case, form", [("Mistral v0.3", "mistral"), ("Mistral Nemo", "mistral"), ("Llama 2", "llama2"), ("TinyLlama-Chat", "zephyr"),
                                        ("R1-Distill, older", "deepseek"), ("Tulu 3", "tulu"), ("Qwen3", "chatml")])
def test_a_named_format_is_that_of_its_first_model(tmp_path, case, form):
    """--chat for a folder without a template gives what a folder with it has."""
    folder = folder_of(tmp_path / "m", case)
    expected = asked(folder).prompt_ids("x")
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in json.loads((folder / "tokenizer_config.json").read_text()).items() if k != "chat_template"}))
    assert asked(folder, chat=form).prompt_ids("x") == expected


def test_plain_text_for_a_base_model(tmp_path):
    """BOS where the tokenizer itself writes one; system message, prompt and prefill as they are; EOS at the end."""
    from tokenizers.processors import TemplateProcessing
    folder = folder_of(tmp_path / "m", "Llama 3", template=False)
    ours = asked(folder, chat="plain", prompt="Q: {problem}", prefill="A:")
    assert ours.tokenizer.decode(ours.prompt_ids("1 + 1?"), skip_special_tokens=False) == "Q: 1 + 1?\nA:"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)])
    tokenizer.save(str(folder / "tokenizer.json"))
    ours = asked(folder, chat="plain", system="Think.", prefill="A:")
    assert ours.tokenizer.decode(ours.prompt_ids("1 + 1?"), skip_special_tokens=False) == "<|begin_of_text|>Think.\n\nProblem: 1 + 1?\nA:"
    assert ours.form.end == "<|eot_id|>" and not ours.note
    (tmp_path / "out").mkdir()
    ours.write(tmp_path / "out")
    (tmp_path / "out/config.json").write_text((folder / "config.json").read_text())
    assert theirs(tmp_path / "out", ("user", "1 + 1?")) == ours.prompt_ids("1 + 1?")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no token '', with which a response in the format plain ends"):
        asked(folder, chat="plain")


@pytest.mark.parametrize("texts, words", [
    (dict(prompt="Solve."), r"--prompt has \{problem\} 0 times, expected once"), (dict(prompt="{problem} {problem}"), "--prompt has {problem} 2 times"),
    (dict(prompt="{problem} in \boxed{}"), r"--prompt has the control character '\\x08'"), (dict(prefill="<think>\\n"), r"--prefill has a backslash and an n, expected a new line"),
    (dict(system="\ud800"), "--system has .*half a surrogate pair"), (dict(system="a" * 70_000), "--system has 70000 characters, expected at most 65536")])
def test_texts_that_cannot_be_meant_are_refused(texts, words):
    with pytest.raises(ValueError, match=words.replace("{problem} 2", r"\{problem\} 2")):
        asked(TINY_MODEL, **texts)
    assert asked(TINY_MODEL, prompt="{problem} \\neq {x}")  # LaTeX and braces are text


@pytest.mark.parametrize("line", [
    '{#- rlsp {"format": {}, "system": "", "prompt": "{problem}", "prefill": ""} #}', "{#- rlsp [] #}", "{#- rlsp {} #}", "{#- rlsp ", '{#- rlsp {"format": 3} #}',
    "{#- rlsp " + "[" * 100_000 + " #}", "name: nothing", "prompt: x", "inside: 1", "trim: x", "user: a", "user: 7", "end: 5", "end: <none>", "more: x", "prefill: \\ud800"])
def test_a_strangers_comment_is_data(tmp_path, line):
    """What is not as this project writes it is one line that names the file; nothing of a template is run."""
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    asked(TINY_MODEL).write(tmp_path / "m")
    file = tmp_path / "m/chat_template.jinja"
    if not line.startswith("{"):
        key, value = line.split(": ")
        said = json.loads(file.read_text().splitlines()[0].removeprefix(chat.OURS).removesuffix(" #}"))
        (said if key in said else said["format"])[key] = json.loads(f'"{value}"') if not value.isdigit() else int(value)
        line = chat.OURS + json.dumps(said) + " #}"
    file.write_text(line + "\n{{ cycler.__init__ }}")
    with pytest.raises(ValueError, match="chat_template.jinja: its first line is not what|no token '<none>'"):
        asked(tmp_path / "m")


def test_a_flag_is_stronger_than_the_folder_and_says_so(tmp_path):
    shutil.copytree(TINY_MODEL, tmp_path / "m")
    asked(TINY_MODEL, **PROMPTING).write(tmp_path / "m")
    ours = asked(tmp_path / "m", prefill="", prompt="{problem}")
    assert ours.texts == dict(system=PROMPTING["system"], prompt="{problem}", prefill="")
    assert "--prefill is not what" in ours.note or "--prompt is not what" in ours.note
    assert not asked(tmp_path / "m", **PROMPTING).note
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert "chat_template" not in config and config["eos_token"] == "<|eot_id|>"  # nothing contradicts the template
    words = ["--model", "m", "--data", "d", "--system", "", "--prefill", ""]
    given = vars(rlsp.parser().parse_args(["sft", *words]))
    assert given["system"] == given["prefill"] == ""
    with pytest.raises(ValueError, match="--prompt"):
        rlsp.parser().parse_args(["sft", "--model", "m", "--data", "d", "--prompt", ""])
