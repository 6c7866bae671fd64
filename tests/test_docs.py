"""README.md and docs/: links, files, flags and variables that they name exist, and every block of commands says whether it is run."""
import dataclasses
import re

import pytest

import commands
import ppo
import rewards
import rlsp
from conftest import ROOT
from test_ppo import folder, trainer  # noqa: F401

PAGES = [*commands.PAGES, ROOT / "docs/results/README.md"]
LINK = re.compile(r"\]\(([^()\s]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
CODE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # it may go on in the next line
# Flags of other programs: hf, pip, torchrun, sbatch, docker, apptainer, pytest, vllm, llama-server.
FOREIGN = """--local-dir --repo-type --include --exclude --no-cache-dir --no-deps --no-install-recommends --nnodes --nproc_per_node --no-python
    --standalone --shutdown-timeout --job-name --nodes --ntasks-per-node --gpus-per-node --exclusive --mem --time --requeue --open-mode
    --signal --gpus --ipc --stop-timeout --nv --env --version --port --max-model-len --ctx-size --parallel""".split()
VARIABLES = "PIP_EXTRA_INDEX_URL TORCH_LOGS PYTHONIOENCODING OMP_NUM_THREADS WANDB_PROJECT WANDB_MODE".split()  # of pip, torch, Python, OpenMP, wandb
LOGGED_SOMETIMES = {"judge_failed", "math_accuracy", "warnings", "graph_seconds", "eval_seconds", "eval_pass@k", "eval_maj@k",
                    "loss", "grad_norm", "lr", "tokens"}  # with a judge, with --reward, on a GPU, with --eval-data, by sft


def read(page):
    return page.read_text(encoding="utf-8")


def prose(page):
    """A page without its blocks of code."""
    return commands.BLOCK.sub("", read(page))


def name(page):
    return page.relative_to(ROOT).as_posix()


def anchors(page):
    """What GitHub calls the headings of a page."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.M)
    texts = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", head).replace("`", "") for head in heads]
    return [re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts]


def sources(*patterns):
    return "\n".join(read(file) for pattern in patterns for file in sorted(ROOT.glob(pattern)))


def command_lines(page):
    """The lines of a page's blocks and of its code in sentences, those that go on behind a backslash joined."""
    blocks = "".join(text for _, _, text in commands.BLOCK.findall(read(page)))
    return [*blocks.replace("\\\n", " ").splitlines(), *CODE.findall(prose(page))]


def options(parser):
    return {option for action in parser._actions for option in action.option_strings}


def quoted_flags(*patterns):
    """The flags that programs which are not imported here give names to."""
    return set(re.findall(r"""["'](--[a-z][\w-]*)["']""", sources(*patterns)))


def flags_of_commands():
    """{command of rlsp.py, or of ours beside it: its flags}."""
    (stages,) = (action for action in rlsp.parser()._actions if isinstance(action.choices, dict))
    known = {command: options(parser) for command, parser in stages.choices.items()}
    return known | {"prepare": quoted_flags("data/prepare.py") | {"--help"}, "train": known["ppo"]}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_go_to_files_and_headings_that_exist(page):
    text = CODE.sub("", prose(page))
    wrong = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        if re.match(r"https?:|mailto:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_exist(page):
    named = set(re.findall(r"(?<![\w./-])(?:lib|tests|docs|data)/[\w./-]+\.(?:py|c|sh|md|html|svg|png|txt|jsonl)\b", read(page)))
    made = set(re.findall(r"^<!-- file: (.+) -->$", read(page), re.M))
    assert not [file for file in sorted(named - made) if not (ROOT / file).exists()]


def flags_of_diffs(page):
    """The flags of ppo that a page's own changes of the code make (docs/hack.md)."""
    fields = re.findall(r"^\+    (\w+): \w+ = flag\(", read(page), re.M)
    return {"--" + field.replace("_", "-") for field in fields}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_that_are_named_exist(page):
    known = set(FOREIGN).union(*flags_of_commands().values(), flags_of_diffs(page))
    known |= quoted_flags("data/*.py", "tests/*.py", "tests/tools/*.py", "docs/results/*.py")
    assert not sorted(set(FLAG.findall(read(page))) - known)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_of_a_command_are_flags_of_that_command(page):
    known = flags_of_commands()
    known["train"] = known["train"] | flags_of_diffs(page)
    found = re.compile(r"rlsp\.py (?P<one>\w+)(?= )(?P<words>[^#|&;]*)|data/(?P<two>prepare)\.py (?P<more>[^#|&;]*)"
                       r"|bash (?P<three>train)\.sh (?P<rest>[^#|&;]*)")
    wrong = []
    for line in command_lines(page):
        for match in found.finditer(line):
            command = match["one"] or match["two"] or match["three"]
            words = match["words"] or match["more"] or match["rest"] or ""
            other = command == "train" and re.match(r"(?:test|setup|experiment|gsm8k)\b", words)
            if command in known and not other:
                wrong += [(command, flag) for flag in FLAG.findall(words) if flag not in known[command]]
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_variables_that_are_named_exist(page):
    scripts = sources("train.sh", "lib/*.sh", "docs/results/*.sh")
    programs = scripts + sources("*.py", "lib/*.py", "tests/*.py") + "".join(text for *_, text in commands.BLOCK.findall(read(page)))
    set_there = [pair.split("=")[0] for line in command_lines(page) if "bash train.sh" in line
                 for pair in re.findall(r"\b[A-Z][A-Z0-9_]+=", line.split("bash train.sh")[0])]
    assert not [variable for variable in set_there if not re.search(rf"\b{variable}\b", scripts) and variable not in VARIABLES]
    spoken = {code for code in CODE.findall(prose(page)) if re.fullmatch(r"[A-Z][A-Z0-9]*_[A-Z0-9_]+|[A-Z]{4,}", code)}
    assert not [variable for variable in spoken if not re.search(rf"\b{variable}\b", programs) and variable not in VARIABLES]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_whether_it_is_run(page):
    text = read(page)
    found = commands.BLOCK.findall(text)
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.M)), "a block is indented, or not closed"
    bare = [block.split("\n")[0] for mark, language, block in found
            if not re.fullmatch(r"run|run: downloads|file: \S+|not run: \S.*", mark)
            or (mark.startswith("run") and language != "bash")]
    assert not bare


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_text_of_moderate_width(page):
    lines = prose(page).splitlines() + [line for _, language, text in commands.BLOCK.findall(read(page)) if language == "bash"
                                        for line in text.splitlines()]
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]
    text = re.sub(r"<!--.*?-->", "", CODE.sub("", prose(page)), flags=re.S)
    assert not re.findall(r"</?[a-zA-Z][^>\n]*>", text), "HTML"


def test_the_checklist_names_its_tests_and_all_of_them():
    page = read(ROOT / "docs/checklist.md")
    named = re.findall(r"^- `(tests/test_\w+\.py)::(test_checklist_\w+)`$", page, re.M)
    there = [(name(file), test) for file in sorted((ROOT / "tests").glob("test_*.py"))
             for test in re.findall(r"^def (test_checklist_\w+)", read(file), re.M)]
    assert set(named) == set(there)
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", page, re.M)]
    assert sorted(numbers) == list(range(1, 21))
    for number, rest in re.findall(r"^\*\*(\d+)\. (.*?)(?=^\*\*\d|^#|\Z)", page, re.M | re.S):
        tests = re.findall(r"::test_checklist_([\d_and]+)_", rest)
        assert tests and all(number in re.findall(r"\d+", test) for test in tests), number
        assert "*Otherwise*" in rest, number


def test_the_page_of_logs_explains_what_a_run_logs(folder, tmp_path):  # noqa: F811
    """Each field of metrics.jsonl and timing.jsonl is in a table of docs/runs.md, and nothing else is."""
    run = trainer(folder, tmp_path)
    metrics, samples, _ = run.train_step()
    text = read(ROOT / "docs/runs.md")
    parts = re.search(r"^## rollouts.jsonl.*?^## ", text, re.M | re.S)[0]
    assert all(f"`{f.name}`" in parts for f in dataclasses.fields(rewards.RewardParts))
    tables = re.search(r"^## metrics.jsonl.*?^## rollouts", text, re.M | re.S)[0]
    explained = {field for line in re.findall(r"^\|(.*?)\|", tables, re.M) for field in CODE.findall(line)}
    logged = metrics.pop("timing").keys() | metrics.keys()
    assert logged - explained - LOGGED_SOMETIMES == set()
    assert explained - logged - LOGGED_SOMETIMES == set()


def test_the_papers_values_are_the_defaults():
    """docs/departures.md: the numbers in the rows of its table are those of the flags that they name."""
    table = re.search(r"^## The paper's values.*?^## ", read(ROOT / "docs/departures.md"), re.M | re.S)[0]
    defaults = {f.name: f.default for f in dataclasses.fields(ppo.PPOConfig)}
    seen = 0
    for _, value, flags in re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", table, re.M):
        names = [flag.removeprefix("--").replace("-", "_") for flag in re.findall(r"`(--[\w-]+)`", flags)]
        if "eval" in flags or "sft" in flags:
            continue
        numbers = [float(n) / (100 if percent else 1) for n, percent in re.findall(r"(\d[\d.e-]*\d|\d)( %)?", value)]
        for flag in names:
            seen += 1
            assert any(abs(defaults[flag] - n) < 1e-12 for n in numbers), (flag, defaults[flag], value)
    assert seen >= 20


def test_commands_are_run_in_order_and_the_one_that_fails_is_told(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- file: a.txt -->\n```\nhello\n```\n\n<!-- run -->\n```bash\ntest \"$(cat a.txt)\" = hello\necho more >> a.txt\n```\n"
                    "<!-- not run: never -->\n```bash\nfalse\n```\n<!-- run -->\n```bash\ngrep more a.txt\nfalse\necho not reached\n```\n")
    monkeypatch.setattr(commands, "COPIED", ("requirements.txt",))
    said = []
    errors = commands.run_page(page, tmp_path / "work", said.append)
    assert [line.rsplit(": ", 1)[1].split("\n")[0] for line in said] == ["ok", "ok", "FAILED"]
    assert len(errors) == 1 and errors[0].endswith("\nexit status 1\nmore\n")
    assert commands.toy("SEED=1 bash train.sh --alpha 0\n", page) == f"SEED=1 bash train.sh {commands.TOY} --alpha 0\n"
    assert commands.toy("bash train.sh experiment\n", page) == "bash train.sh experiment\n"
