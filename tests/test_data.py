"""data/: the generated problems and demonstrations are right, the files reproducible, the converters strict.

The generator is checked by other means than its own: problems are parsed from their text and solved by brute force,
and every arithmetic step of every demonstration is computed anew from the text.
"""

import filecmp
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import prepare as converter  # noqa: E402
from lib import records  # noqa: E402
from rewards import extract_answer  # noqa: E402

TINY = ROOT / "data" / "tiny"
SHARED = ROOT.parent / "shared" / "data"
SPLITS = ("sft", "train", "validation", "test")
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def read(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def run(script, *args):
    command = [sys.executable, str(ROOT / "data" / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)


@pytest.fixture(scope="module")
def rows():
    return {name: read(TINY / f"{name}.jsonl") for name in (*SPLITS, "facts", "steps")}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(TINY / "model" / "tokenizer.json"))


def left_side(problem):
    """(the left side as a Python expression, unknown, right side, modulus), read from the problem's text."""
    found = re.fullmatch(r"Find (?:the smallest )?([nx]) with (.+) = (\d+) mod (\d+)\.", problem)
    assert found, problem
    unknown, left, right, p = found.groups()
    left = re.sub(r"(\d)([nx])", r"\1*\2", left).replace("^", "**")
    return left, unknown, int(right), int(p)


def brute_force(problem):
    """Every solution among 0 .. p-1, in increasing order (for a power: 0 .. p-2, the length of its cycle)."""
    left, unknown, right, p = left_side(problem)
    code = compile(left, "problem", "eval")
    stop = p - 1 if unknown == "n" else p
    return [v for v in range(stop) if eval(code, {}, {unknown: v}) % p == right]


def steps_of(text):
    """Every arithmetic statement in a text: (left number, operator, right number, result)."""
    return [(int(a), op, int(b), int(c)) for a, op, b, c in re.findall(r"(\d+) ?([*+^]) ?(\d+) = (\d+)", text)]


def compute(a, op, b, p):
    return {"*": a * b, "+": a + b, "^": a**b}[op] % p


def test_generated_answers_by_brute_force(rows):
    """The answer of every line is the smallest solution; only quadratics have more than one."""
    for name in SPLITS:
        for row in rows[name]:
            solutions = brute_force(row["problem"])
            assert row["answer"] == str(solutions[0]), row
            assert len(solutions) == 1 or row["subject"] == "quadratic", row
            assert left_side(row["problem"])[3] == {1: 5, 2: 7, 3: 11}[row["level"]], row


def test_demonstrations_end_with_the_right_answer(rows):
    for row in rows["sft"]:
        assert extract_answer(row["solution"]) == row["answer"], row
        assert row["solution"].count("\\boxed") == 1, row


def test_every_step_of_every_demonstration(rows):
    """Each arithmetic step is right modulo p, follows from the step before it, and each verdict is honest."""
    kinds = Counter()
    for row in rows["sft"]:
        left, unknown, right, p = left_side(row["problem"])
        lines = row["solution"].split("\n")
        kinds[row["demonstration"]] += 1
        tried, fitted = [], []
        for line in lines:
            steps = steps_of(line)
            assert len(steps) == len(re.findall(r"[*+^]", line)), f"a step was not understood: {line}"
            for a, op, b, c in steps:
                assert compute(a, op, b, p) == c, (row["problem"], line)
            if line.startswith("Check"):
                assert line.endswith(f", {right} = {right}? Yes, {unknown} = {row['answer']}."), (row["problem"], line)
            if line.startswith("Try"):
                value = int(re.match(rf"Try {unknown} = (\d+): ", line)[1])
                result = eval(left, {}, {unknown: value}) % p
                assert steps[-1][3] == result, (row["problem"], line)
                verdict = f"Yes, {unknown} = {value}." if result == right else "No. Wait."
                assert line.endswith(f", {result} = {right}? {verdict}"), (row["problem"], line)
                tried.append(value)
                fitted += [value] if result == right else []
            for before, after in zip(steps, steps[1:]):
                assert before[3] in (after[0], after[2]), f"does not use the result before it: {line}"
            if line.startswith("Check"):
                assert steps[-1][3] == right, (row["problem"], line)
        if row["demonstration"] in ("search", "checked"):
            assert fitted == [int(row["answer"])] and tried[-1] == fitted[0], row
            in_order = tried[1:] if "Alternatively" in row["solution"] else tried
            start = 1 if row["subject"] == "quadratic" else 0
            assert in_order == list(range(start, fitted[0] + 1)), row
        else:
            assert not fitted, row
            assert len(tried) == 0 if row["demonstration"] == "direct" else 1 <= len(tried) <= 3, row
        assert ("Check: " in row["solution"]) == (row["demonstration"] == "checked"), row
    assert kinds == {"direct": 1650, "partial": 750, "search": 360, "checked": 240}


def test_no_problem_in_two_splits(rows):
    owner = {}
    for name in SPLITS:
        for row in rows[name]:
            for key in (row["problem"], row["unique_id"]):
                assert owner.setdefault(key, name) == name, f"{key} is in {owner[key]} and {name}"
    for name in ("train", "validation", "test"):
        assert len({row["problem"] for row in rows[name]}) == len(rows[name]), f"{name} has a problem twice"
    names = {}
    for name in SPLITS:
        for row in rows[name]:
            assert names.setdefault(row["unique_id"], row["problem"]) == row["problem"]
    assert {name: len(rows[name]) for name in SPLITS} == {"sft": 3000, "train": 650, "validation": 150, "test": 240}


def test_held_out_splits_are_balanced(rows):
    """Every family and every level is there; a small cell of family x level gives what it can spare."""
    for name, full in (("validation", 150 // 9), ("test", 240 // 9)):
        cells = Counter((row["subject"], row["level"]) for row in rows[name])
        assert len(cells) == 9
        assert all(n >= full for (_, level), n in cells.items() if level == 3), cells
        assert all(n > len(rows[name]) / 4 for n in Counter(row["subject"] for row in rows[name]).values())


def text_of(row):
    """A solution's text; facts come as [text, trained] pieces."""
    solution = row.get("solution", "")
    return solution if isinstance(solution, str) else "".join(text for text, _ in solution)


def test_facts_are_right_and_cover_every_demonstration(rows):
    """Facts are right modulo the p that the prompt names, hold no box, and contain every step of sft.jsonl."""
    known = {}
    for row in rows["facts"]:
        p = int(re.fullmatch(r"Facts mod (\d+)\.", row["problem"])[1])
        solution = text_of(row)
        facts = solution.rstrip(".").split(", ")
        assert 20 <= len(facts) <= 40 and "boxed" not in solution
        assert [text for text, trained in row["solution"] if trained] == [re.split(r" = |\? ", fact)[-1] for fact in facts]
        for fact in facts:
            if compared := re.fullmatch(r"(\d+) = (\d+)\? (Yes|No)", fact):
                assert (compared[1] == compared[2]) == (compared[3] == "Yes")
                continue
            a, op, b, c = steps_of(fact)[0]
            assert fact == (f"{a}^{b} = {c}" if op == "^" else f"{a} {op} {b} = {c}")
            assert compute(a, op, b, p) == c, (p, fact)
        known.setdefault(p, Counter()).update(facts)
    for row in rows["sft"]:
        p = left_side(row["problem"])[3]
        for fact in re.findall(r"\d+ [*+] \d+ = \d+|\d+\^\d+ = \d+|\d+ = \d+\? (?:Yes|No)", row["solution"]):
            assert known[p][fact] >= 10, f"{fact} mod {p} comes {known[p][fact]} times in facts.jsonl"


def test_same_seed_same_files(tmp_path):
    """Two runs are identical, and identical to the committed files; another seed gives others."""
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        result = run("generate.py", "--out", tmp_path / name, "--seed", seed)
        assert result.returncode == 0, result.stderr
    files = [f"{name}.jsonl" for name in (*SPLITS, "facts", "steps")] + [f"model/{name}" for name in MODEL_FILES]
    for other in (tmp_path / "two", TINY):
        different = filecmp.cmpfiles(tmp_path / "one", other, files, shallow=False)[1:]
        assert different == ([], []), f"differ or missing in {other}: {different}"
    assert (tmp_path / "other" / "sft.jsonl").read_bytes() != (TINY / "sft.jsonl").read_bytes()
    assert sum((TINY / name).stat().st_size for name in files) < 3_000_000


def test_generate_shares_and_bad_arguments(tmp_path):
    result = run("generate.py", "--out", tmp_path / "d", "--sft", 30, "--direct", 0, "--partial", 0.5, "--search", 0.5)
    assert result.returncode == 0, result.stderr
    assert Counter(r["demonstration"] for r in read(tmp_path / "d" / "sft.jsonl")) == {"partial": 15, "search": 15}
    for bad in (["--direct", 0.9, "--partial", 0.9], ["--vocab", 100], ["--test", 0], ["--hidden", 100, "--heads", 3]):
        result = run("generate.py", "--out", tmp_path / "bad", *bad)
        assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("generate.py: error: --")
        assert not (tmp_path / "bad").exists()
    for bad in (["--direct", "nan"], ["--vocab", 10**9], ["--sft", 10**9], ["--laye", 3]):
        result = run("generate.py", "--out", tmp_path / "bad", *bad)
        assert result.returncode == 2 and result.stderr.splitlines()[-1].startswith("generate.py: error: ")
    # what is there and not of this program stays
    (tmp_path / "file").write_text("precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text("precious")
    for out, words in (("file", "expected a folder"), ("mine", "has a train.jsonl that is not of this program")):
        result = run("generate.py", "--out", tmp_path / out)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == (tmp_path / "mine/train.jsonl").read_text() == "precious"
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["train.jsonl"]
    # a full disk, for which a limit on the size of files stands in
    command = ["bash", "-c", f"ulimit -f 100; exec {sys.executable} {ROOT}/data/generate.py --out {tmp_path}/full --sft 300 --steps 10"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "facts.jsonl" in result.stderr and result.stderr.count("\n") == 1
    assert not list((tmp_path / "full").iterdir())
    assert run("generate.py", "--out", tmp_path / "d", "--sft", 30, "--steps", 10, "--facts", 10).returncode == 0  # replaces its own
    result = run("generate.py", "--out", tmp_path / "bad", "--test", 100000)
    assert result.returncode != 0 and "100000 problems asked for" in result.stderr and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("text", [
    "", " ", "  a  b ", "x = 3", "n = = x", "\\boxed{\\frac{1}{\\sqrt{2}}}", "\r\n\t\n\n", "1234567890 007 -3.5",
    "naïve Ångström 東京 🤔👩‍👩‍👧 \u202e العربية", "\x00\x01\x7f\ufffd\ue000", "Wait.Wait .\nWait", "<|begin|> <|x",
    "".join(map(chr, range(0x250))), "\\" * 7 + "{" * 3])
def test_tokenizer_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_specials_and_single_tokens(tokenizer, rows):
    """Llama 3's special tokens exist and are one token inside text; so are the words and numbers that matter."""
    assert tokenizer.get_vocab_size() <= 512
    for token in SPECIALS:
        index = tokenizer.token_to_id(token)
        assert index is not None and tokenizer.encode(f"a{token}b").ids.count(index) == 1
        assert tokenizer.decode(tokenizer.encode(token).ids, skip_special_tokens=False) == token
        assert tokenizer.decode([index]) == ""
    words = ["Try ", "x = ", "n = ", "mod ", "\\boxed{", ": ", "Wait.\n", "No", "Yes", "? ", "Check", 
             "Alternatively", "The ", "answer ", "is ", "Find ", "with ", "user", "assistant", "Problem", "\n\n"]
    for word in words + [str(n) for n in range(12)]:
        assert len(tokenizer.encode(word).ids) == 1, (word, tokenizer.encode(word).tokens)
    # A number is the same token wherever it stands, or the facts would not carry over to the demonstrations.
    ten = tokenizer.encode("10").ids[0]
    assert tokenizer.encode("Try x = 10: 10 * 10 = 10, not 10. \\boxed{10}").ids.count(ten) == 6
    for name in (*SPLITS, "facts", "steps"):
        for row in rows[name][:200]:
            for text in (row["problem"], text_of(row)):
                assert tokenizer.decode(tokenizer.encode(text).ids) == text
    longest = max(len(tokenizer.encode(row["solution"]).ids) for row in rows["sft"])
    assert longest <= 390, "a rollout must fit into the response length that the tiny recipe uses"


def test_model_config_matches_tokenizer(tokenizer):
    config, generation, special = (json.loads((TINY / "model" / name).read_text()) for name in (
        "config.json", "generation_config.json", "tokenizer_config.json"))
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert config["hidden_size"] == config["num_attention_heads"] * config["head_dim"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    stops = [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")]
    assert generation["eos_token_id"] == stops and config["eos_token_id"] == stops
    assert config["bos_token_id"] == generation["bos_token_id"] == tokenizer.token_to_id("<|begin_of_text|>")
    assert special["bos_token"] == "<|begin_of_text|>" and special["eos_token"] == "<|eot_id|>"
    assert "<|start_header_id|>" in special["chat_template"]


# prepare.py

MATH = {"problem": "What is $1/2$?", "level": "Level 3", "type": "Algebra",
        "solution": "First \\boxed{9}, no: $\\boxed{\\frac{1}{\\sqrt{4}}}$."}
MATH500 = {"problem": "P?", "solution": "S \\boxed{(3, \\frac{\\pi}{2})}", "answer": "(3, \\frac{\\pi}{2})",
           "subject": "Precalculus", "level": 2, "unique_id": "test/precalculus/807.json"}
GSM8K = {"question": "How much?\u2028Say.", "answer": "She has 40*30=<<40*30=1200>>1,200 in all.\n#### 1,200"}
AIME24 = {"id": 60, "problem": "P?", "solution": "S", "answer": "025", "question": "P?",
          "url": "https://example.org/wiki/index.php/2024_AIME_I_Problems/Problem_7"}
AIME83 = {"id": "1989-4", "year": "1989", "problem number": "4", "answer": "675", "part": "", "problem": "P?"}


def prepare(tmp_path, records, *args):
    """Write the records (dicts, or raw lines) to in.jsonl, convert it; (the finished process, the output's path)."""
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    (tmp_path / "in.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return run("prepare.py", tmp_path / "in.jsonl", tmp_path / "out.jsonl", *args), tmp_path / "out.jsonl"


@pytest.mark.parametrize("record, expected", [
    (MATH, {**MATH, "answer": "\\frac{1}{\\sqrt{4}}", "subject": "Algebra", "level": 3, "unique_id": "in/1"}),
    (MATH500, MATH500),
    (GSM8K, {"problem": "How much?\u2028Say.", "answer": "1200", "subject": "gsm8k",
             "solution": "She has 40*30=1,200 in all.\nThe answer is \\boxed{1200}.", "unique_id": "gsm8k/in/1"}),
    (AIME24, {"problem": "P?", "answer": "25", "solution": "S", "subject": "aime", "level": 3,
              "unique_id": "aime/60"}),
    (AIME83, {"problem": "P?", "answer": "675", "subject": "aime", "level": 2, "unique_id": "aime/1989-4"}),
], ids=["math", "math500", "gsm8k", "aime2024", "aime1983"])
def test_prepare_each_format(tmp_path, record, expected):
    result, out = prepare(tmp_path, [record])
    assert (result.returncode, result.stderr) == (0, "")
    expected = {key: value for key, value in expected.items() if key != "type"}
    assert read(out) == [expected]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"], "a temporary file was left"


def test_prepare_math_folder(tmp_path):
    folder = tmp_path / "train" / "algebra"
    folder.mkdir(parents=True)
    for number in (10, 2, 1):
        (folder / f"{number}.json").write_text(json.dumps({**MATH, "problem": str(number)}, indent=4))
    (folder / "3.json").write_text(json.dumps({**MATH, "level": "Level ?"}))
    result = run("prepare.py", tmp_path / "train", tmp_path / "out.jsonl")
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "out.jsonl")
    assert [r["unique_id"] for r in rows] == [f"train/algebra/{n}.json" for n in (1, 2, 3, 10)]
    assert "level" not in rows[2] and rows[3]["problem"] == "10"
    (folder / "4.json").write_text('{"problem": "a",\n "solution": "b",\n oops}')
    result = run("prepare.py", tmp_path / "train", tmp_path / "again.jsonl")
    assert result.returncode == 2 and f"prepare.py: {folder / '4.json'}:3: found invalid JSON" in result.stderr
    assert not (tmp_path / "again.jsonl").exists()


@pytest.mark.parametrize("line, found", [
    ('{"question": "a", "answer"', "found invalid JSON"),
    ("[1, 2]", "found list, expected an object"),
    ("{}", "found the fields [], expected those of MATH"),
    (json.dumps({"question": "a"}), "found the fields [question]"),
    (json.dumps({"question": "a", "answer": "no mark"}), "found 'no mark' at its end, expected \"#### number\""),
    (json.dumps({"question": "a", "answer": "b #### twelve"}), 'expected "#### number"'),
    (json.dumps({"question": " ", "answer": "b #### 1"}), "field question: found ' ', expected a non-empty string"),
    (json.dumps({**MATH, "solution": "no box"}), "field solution: found no answer in it"),
    (json.dumps({k: v for k, v in MATH.items() if k != "problem"}), "field problem: found no such field"),
    (json.dumps({**MATH, "level": "hard"}), "field level: found 'hard'"),
    (json.dumps({**MATH500, "answer": [3]}), "field answer: found [3], expected a non-empty string"),
    (json.dumps({**AIME83, "answer": "1000"}), "expected an integer from 0 to 999"),
    (json.dumps({**GSM8K, "question": "\ud800"}), "surrogates not allowed"),
])
def test_prepare_bad_line(tmp_path, line, found):
    """One line on stderr with file and line, status 2, and no output, although the lines before were good."""
    result, out = prepare(tmp_path, [GSM8K, "", line, GSM8K])
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"prepare.py: {tmp_path / 'in.jsonl'}:3: ") and found in result.stderr
    assert result.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_prepare_bad_files(tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(GSM8K).encode() + b'\n{"question": "\xe9"}\n')
    (tmp_path / "folder").mkdir()
    for source, found in (("empty.jsonl", ":1: found an empty file"), ("latin.jsonl", ":2: found bytes"),
                          ("folder", ":0: found no .json file"), ("absent.jsonl", ":0: found no readable file")):
        result = run("prepare.py", tmp_path / source, out)
        assert result.returncode == 2 and result.stderr.startswith(f"prepare.py: {tmp_path / source}{found}")
        assert result.stderr.count("\n") == 1 and not out.exists()
    result, _ = prepare(tmp_path, [AIME83, AIME83])
    assert result.returncode == 2 and "in.jsonl:2: found unique_id aime/1989-4 again" in result.stderr
    out.write_text("precious")
    result, _ = prepare(tmp_path, [GSM8K])
    assert result.returncode == 2 and f"prepare.py: {out}:0: found an existing file" in result.stderr
    assert out.read_text() == "precious"


def test_prepare_ends_with_one_line_on_input_that_never_does(tmp_path):
    """A device and a pipe (which else would be read, or waited for, for ever), JSON that is nested too deeply, long names."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000)
    (tmp_path / "good.jsonl").write_text(json.dumps(GSM8K) + "\n")
    out, escape = tmp_path / "out.jsonl", tmp_path / "a\033[2Jb"
    for source, target, found in (("/dev/zero", out, "found a pipe or a device"), (tmp_path / "pipe", out, "found a pipe or a device"),
                                  (tmp_path / "deep.jsonl", out, "deep.jsonl:1: found JSON nested too deeply"),
                                  (tmp_path / ("x" * 300), out, "found no readable file (File name too long)"),
                                  (tmp_path / "good.jsonl", tmp_path / ("x" * 250), "cannot be written (File name too long)"),
                                  (tmp_path / "good.jsonl", tmp_path / ("x" * 300), "cannot be written (File name too long)"),
                                  (escape, out, "a\\x1b[2Jb:0: found no readable file")):
        result = run("prepare.py", source, target)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        assert found in result.stderr and "\033" not in result.stderr and not out.exists()
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    result = run("prepare.py", tmp_path / "good.jsonl", tmp_path / "dangling")
    assert result.returncode == 2 and "found an existing file" in result.stderr and not (tmp_path / "new").exists()


def test_prepare_takes_no_digits_but_0_to_9(tmp_path):
    """\\d of a regular expression is every decimal digit of Unicode; the verifier and the models are not meant by those."""
    for record, found in ((GSM8K | {"answer": "so\n#### \u0661\u0662"}, 'expected "#### number"'), (AIME83 | {"answer": "\u0661\u0662"}, "from 0 to 999"),
                          (AIME83 | {"problem number": "\u0664"}, "found no problem number")):
        result, out = prepare(tmp_path, [record])
        assert result.returncode == 2 and found in result.stderr and not out.exists()


def test_prepare_limit_is_a_seeded_choice(tmp_path):
    records = [{**GSM8K, "question": str(i)} for i in range(50)]
    kept = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        result, out = prepare(tmp_path / name, records, "--limit", 10, "--seed", seed)
        assert result.returncode == 0, result.stderr
        kept[name] = [int(r["problem"]) for r in read(out)]
    assert len(kept["a"]) == 10 and kept["a"] == kept["b"] == sorted(kept["a"]) and kept["a"] != kept["c"]
    result, out = prepare(tmp_path, records, "--limit", 0)
    assert result.returncode == 2 and "--limit" in result.stderr and not out.exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published problem sets are not at {SHARED}")
@pytest.mark.parametrize("file, count", [
    ("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319), ("math500/test.jsonl", 500),
    ("aime/aime_2024.jsonl", 30), ("aime/aime_1983_2023.jsonl", 918)])
def test_prepare_published_sets(tmp_path, file, count):
    result = run("prepare.py", SHARED / file, tmp_path / "out.jsonl")
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path / "out.jsonl")
    assert len(rows) == count == len({r["unique_id"] for r in rows})
    for row in rows:
        assert type(row.get("level")) is (type(None) if file.startswith("gsm8k") else int)  # GSM8K knows no levels
        assert all(isinstance(row[key], str) and row[key] for key in ("problem", "answer", "subject", "unique_id"))
        if file.startswith("gsm8k"):
            assert re.fullmatch(r"-?\d+(\.\d+)?", row["answer"]) and "<<" not in row["solution"]
            assert extract_answer(row["solution"]) == row["answer"]
        if file.startswith("aime"):
            assert 0 <= int(row["answer"]) <= 999 and row["answer"] == str(int(row["answer"]))


# prepare.py: the formats of the table in docs/data.md, with the fields that the data sets have on Hugging Face

DAPO_ASKS = ("Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer (without "
             "quotes) where $Answer is the answer to the problem.\n\n", '\n\nRemember to put your answer on its own line after "Answer:".')
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "P?"}, {"role": "assistant", "content": "Hm. \\boxed{7}"},
         {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No, \\boxed{8}"}]
SOLVED = {"problem": "P?", "answer": "7", "solution": "Hm. \\boxed{7}"}
FORMATS = {
    "DigitalLearningGmbH/MATH-lighteval": (MATH, {**MATH, "answer": "\\frac{1}{\\sqrt{4}}", "subject": "Algebra", "level": 3, "type": None}),
    "MATH with subject for type": ({**MATH, "type": None, "subject": "Algebra"}, {**MATH, "answer": "\\frac{1}{\\sqrt{4}}", "subject": "Algebra", "level": 3, "type": None}),
    "HuggingFaceH4/MATH-500": (MATH500, MATH500),
    "openai/gsm8k": (GSM8K, {"problem": GSM8K["question"], "answer": "1200", "subject": "gsm8k", "unique_id": "gsm8k/in/1",
                             "solution": "She has 40*30=1,200 in all.\nThe answer is \\boxed{1200}."}),
    "AI-MO/aimo-validation-aime": ({**AIME24, "question": None}, {"problem": "P?", "answer": "25", "solution": "S", "subject": "aime", "level": 3, "unique_id": "aime/60"}),
    "HuggingFaceH4/aime_2024": ({**AIME24, "question": None, "year": "2024"},
                                {"problem": "P?", "answer": "25", "solution": "S", "subject": "aime", "level": 3, "unique_id": "aime/60"}),
    "Maxwell-Jia/AIME_2024": ({"ID": "2024-II-4", "Problem": "P?", "Solution": "S", "Answer": 33},
                              {"problem": "P?", "answer": "33", "solution": "S", "subject": "aime", "level": 2, "unique_id": "aime/2024-II-4"}),
    "gneubig/aime-1983-2024": ({"ID": "1983-1", "Year": 1983, "Problem Number": 1, "Question": "P?", "Answer": "60", "Part": None},
                               {"problem": "P?", "answer": "60", "subject": "aime", "level": 1, "unique_id": "aime/1983-1"}),
    "minyichen/AIME2025": ({"ID": "2025-I-15", "Year": 2025, "Problem Number": 15, "problem": "P?", "answer": "735", "Part": "I", "question": "P?"},
                           {"problem": "P?", "answer": "735", "subject": "aime", "level": 5, "unique_id": "aime/2025-I-15"}),
    "MathArena/aime_2025": ({"problem_idx": 1, "answer": 70, "problem": "P?", "problem_type": ["Number Theory"]}, {"problem": "P?", "answer": "70"}),
    "opencompass/AIME2025": ({"question": "P?", "answer": "070"}, {"problem": "P?", "answer": "070"}),
    "math-ai/aime25": ({"problem": "P?", "answer": "70", "id": "0"}, {"problem": "P?", "answer": "70"}),
    "AI-MO/NuminaMath-CoT": ({"source": "cn_k12", "problem": "P?", "solution": "Hm. \\boxed{7}", "messages": TURNS[1:3]}, {**SOLVED, "subject": "cn_k12"}),
    "AI-MO/NuminaMath-1.5": ({"problem": "P?", "solution": "By symmetry.", "answer": "proof", "problem_type": "Algebra", "question_type": "proof",
                              "source": "olympiads", "synthetic": False}, {"problem": "P?", "solution": "By symmetry.", "subject": "olympiads"}),
    "amphora/QwQ-LongCoT-130K": ({"problem": "P?", "qwq": "Hm. \\boxed{7}", "source": "numina", "split": "train", "__index_level_0__": 3},
                                 {**SOLVED, "subject": "numina"}),
    "open-r1/OpenR1-Math-220k": (
        {"problem": "P?", "solution": "Short.", "answer": "7", "problem_type": "Algebra", "question_type": "math-word-problem", "source": "amc",
         "uuid": "u-1", "is_reasoning_complete": [True, False, True], "generations": ["wrong \\boxed{8}", "cut", "<think>Hm.</think> \\boxed{7}"],
         "correctness_math_verify": [False, True, True], "correctness_llama": None, "finish_reasons": None, "correctness_count": 1, "messages": TURNS[1:3]},
        {"problem": "P?", "answer": "7", "solution": "<think>Hm.</think> \\boxed{7}", "subject": "amc", "unique_id": "u-1"}),
    "OpenR1 by a Llama's verdict": (
        {"problem": "P?", "solution": "Short.", "answer": "7", "is_reasoning_complete": [True, True], "generations": ["a", "b \\boxed{7}"],
         "correctness_math_verify": [False, False], "correctness_llama": [False, True]}, {"problem": "P?", "answer": "7", "solution": "b \\boxed{7}"}),
    "BytedTsinghua-SIA/DAPO-Math-17k": (
        {"data_source": "math_dapo", "prompt": [{"content": DAPO_ASKS[0] + "Two\n\nparts?" + DAPO_ASKS[1], "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "34", "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "9a9b6eb4"}},
        {"problem": "Two\n\nparts?", "answer": "34", "subject": "math_dapo", "unique_id": "dapo/789846530d30"}),
    "open-r1/DAPO-Math-17k-Processed": (
        {"prompt": "Two\n\nparts?", "solution": "34", "data_source": "math_dapo", "source_prompt": [{"content": "x", "role": "user"}], "ability": "MATH",
         "reward_model": {"ground_truth": "34", "style": "rule"}, "extra_info": {"index": "9a9b6eb4"}},
        {"problem": "Two\n\nparts?", "answer": "34", "subject": "math_dapo", "unique_id": "dapo/789846530d30"}),
    "agentica-org/DeepScaleR-Preview-Dataset": ({"problem": "P?", "answer": "7", "solution": ""}, {"problem": "P?", "answer": "7"}),
    "messages": ({"messages": TURNS}, SOLVED),
    "conversations": ({"system": "s", "conversations": [{"from": "human", "value": "P?"}, {"from": "gpt", "value": "Hm. \\boxed{7}"}]}, SOLVED),
    "our own, with pieces": ({"problem": "P?", "answer": "1", "solution": [["a ", False], ["b", True]], "subject": "s", "level": 3, "unique_id": "u"},
                             {"problem": "P?", "answer": "1", "solution": [["a ", False], ["b", True]], "subject": "s", "level": 3, "unique_id": "u"}),
}


def convert(capsys, *words):
    """(exit status, what was said) of prepare.py, in this process."""
    try:
        status = converter.main([str(word) for word in words])
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr()
    assert bool(said.err) == (status != 0) and said.err.count("prepare.py: ") == (status != 0)
    return status, said.err or said.out


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows, **how):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow (pip install pyarrow)")
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **how)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_prepare_knows_the_formats_of_the_readme(tmp_path, capsys, name, kind):
    record, expected = FORMATS[name]
    if kind == "parquet" and name == "our own, with pieces":
        pytest.skip("a column of parquet has one type, and pieces are a text and a mark")
    record = {key: value for key, value in record.items() if value is not None or kind == "parquet"}
    record = {key: value for key, value in record.items() if (key, value) not in (("type", None), ("question", None))}
    file = tmp_path / f"in.{kind}"
    if kind == "parquet":
        parquet(file, [record])
    else:
        file.write_text(json.dumps([record] if kind == "json" else record))
    assert convert(capsys, file, tmp_path / "out.jsonl")[0] == 0
    expected = {"unique_id": "in/1", **expected}
    assert read(tmp_path / "out.jsonl") == [{key: value for key, value in expected.items() if value is not None and key != "type"}]


def test_the_page_of_data_names_each_format():
    table = (ROOT / "docs/data.md").read_text()
    for name in ("MATH", "MATH-500", "GSM8K", "AIME", "NuminaMath", "QwQ-LongCoT", "OpenR1-Math", "DAPO", "DeepScaleR", "`messages`", "`conversations`"):
        assert re.search(rf"^\| .*{re.escape(name)}.* \|", table, re.M), name


def test_prepare_reads_csv_by_the_same_fields(tmp_path, capsys):
    file = tmp_path / "aime.csv"
    file.write_bytes('\ufeffID,Year,Problem Number,Question,Answer,Part\r\n1983-1,1983,1,"Let ""x"",\r\ny?",60,\r\n1983-2,1983,2,Q,015,\r\n'.encode())
    assert convert(capsys, file, tmp_path / "out.jsonl")[0] == 0
    assert [(r["problem"], r["answer"], r["unique_id"]) for r in read(tmp_path / "out.jsonl")] == [
        ('Let "x",\r\ny?', "60", "aime/1983-1"), ("Q", "15", "aime/1983-2")]


def test_prepare_reads_shards_of_all_kinds_in_order(tmp_path, capsys):
    folder = tmp_path / "set"
    for part in ("data", ".cache/huggingface"):
        (folder / part).mkdir(parents=True)
    row = lambda n: {"problem": f"P{n}", "answer": str(n)}
    jsonl(folder / "data/train-2.jsonl", [row(3), row(4)])
    parquet(folder / "data/train-10.parquet", [row(5), row(6)])
    (folder / "data/train-1.json").write_text(json.dumps([row(1), row(2)]))
    (folder / "data/train-11.csv").write_text("problem,answer\nP7,7\n")
    (folder / "dataset_infos.json").write_text('{"default": {}}')
    (folder / ".cache/huggingface/x.json").write_text("no records")
    (folder / "README.md").write_text("no records")
    assert convert(capsys, folder, tmp_path / "out.jsonl") == (0, f"{tmp_path / 'out.jsonl'}: 7 problems; left out: nothing\n")
    rows = read(tmp_path / "out.jsonl")
    assert [r["answer"] for r in rows] == list("1234567")
    assert [r["unique_id"] for r in rows][::3] == ["set/data/train-1.json/1", "set/data/train-2.jsonl/2", "set/data/train-11.csv/2"]
    files = [folder / "data/train-2.jsonl", folder / "data/train-10.parquet"]  # as a shell's pattern gives them
    assert convert(capsys, *files, tmp_path / "two.jsonl")[0] == 0
    assert [r["unique_id"] for r in read(tmp_path / "two.jsonl")] == ["train-2/1", "train-2/2", "train-10/1", "train-10/2"]


def test_prepare_takes_fields_by_name(tmp_path, capsys):
    file = jsonl(tmp_path / "in.jsonl", [{"extra": {"q": "P?"}, "gold": 0.5, "turns": [{"text": "S"}], "a.b": "x"}])
    for words, row in ((["--problem", "extra.q", "--answer", "gold", "--solution", "turns.0.text"], {"problem": "P?", "answer": "0.5", "solution": "S"}),
                       (["--problem", "a.b", "--answer", "gold"], {"problem": "x", "answer": "0.5"})):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        assert convert(capsys, file, tmp_path / "out.jsonl", *words)[0] == 0
        assert read(tmp_path / "out.jsonl") == [row | {"unique_id": "in/1"}]
    for words, found in ((["--problem", "extra.z"], "in.jsonl:1: field extra.z: found no 'z' in it, expected it (fields: a.b, extra, gold, turns)"),
                         (["--problem", "extra"], "in.jsonl:1: field problem: found {'q': 'P?'}, expected a non-empty string"),
                         (["--answer", "gold"], "found no --problem FIELD")):
        status, said = convert(capsys, file, tmp_path / "no.jsonl", *words)
        assert status == 2 and found in said and not (tmp_path / "no.jsonl").exists()


def test_prepare_counts_what_makes_no_row(tmp_path, capsys):
    """Large sets have rows without an answer, without a verified generation or a reply, and DAPO each one a hundred times."""
    dapo = FORMATS["BytedTsinghua-SIA/DAPO-Math-17k"][0]
    r1 = FORMATS["open-r1/OpenR1-Math-220k"][0] | {"correctness_math_verify": [False] * 3}
    file = jsonl(tmp_path / "in.jsonl", [dapo, dapo, r1, {"problem": "P?", "answer": "", "solution": None}, {"problem": " ", "answer": "1"},
                                         {"messages": TURNS[:2]}, {"problem": "P?", "qwq": " "}, {"problem": "P?", "solution": "No box."}])
    status, said = convert(capsys, file, tmp_path / "out.jsonl")
    assert status == 0 and len(read(tmp_path / "out.jsonl")) == 2
    for what in ("2 problems; ", "1 said before", "1 without a verified generation", "1 without an answer and a solution", "1 without a problem",
                 "1 without a user's turn and a reply", "1 without a response", "; 1 have no answer, which only sft takes"):
        assert what in said, what
    status, said = convert(capsys, jsonl(tmp_path / "none.jsonl", [r1]), tmp_path / "no.jsonl")
    assert status == 2 and "found no problem that is left (1 without a verified generation), expected at least one" in said


@pytest.mark.parametrize("record, found", [
    ({"problem": "P?", "generations": "text"}, "field generations: found 'text', expected a list"),
    ({"problem": "P?", "generations": [3], "correctness_llama": [True]}, "field solution: found 3, expected"),
    ({"prompt": [3], "reward_model": {}}, "found 3 among the turns, expected an object with role and content"),
    ({"prompt": [], "reward_model": 3}, "field prompt: found None, expected"),
    ({"messages": "text"}, "found 'text', expected a list of turns"), ({"conversations": [{"from": "human", "value": 3}]}, "field turn: found 3"),
    ({"problem": "P?", "answer": True}, "field answer: found True"), ({"problem": ["P?"], "answer": "1"}, "field problem: found ['P?']"),
    ({"problem": "P?", "answer": "1", "solution": [["a"]]}, "solution is [['a']], expected text"),
    ({"problem": "P?", "answer": "1", "level": [1]}, "level is [1], expected a number or text"),
    ({"problem": "p" * (2**20 + 1), "answer": "1"}, "problem has 1048577 characters, expected at most 1048576"),
    ({"question": "P?", "answer": [7]}, "field answer: found [7]"), ({"problem": "P?", "answer": "1", "url": 3.5}, "expected it in field problem number"),
])
def test_prepare_bad_records_of_other_formats(tmp_path, capsys, record, found):
    status, said = convert(capsys, jsonl(tmp_path / "in.jsonl", [record]), tmp_path / "out.jsonl")
    assert status == 2 and said.startswith(f"prepare.py: {tmp_path / 'in.jsonl'}:1: ") and found in said and said.count("\n") == 1


def test_prepare_bad_json_and_csv(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "RECORD_BYTES", 4000)
    monkeypatch.setattr(records, "MOST_BYTES", 9000)
    good = '{"problem": "P", "answer": "1"}'
    for name, content, found in (
            ("a.json", f"[{good},\n {good}\n {good}]", "a.json:3: found '{\"problem\": \"P\", \"an' after record 2, expected , or ]"),
            ("a.json", f"[{good},\n\n{{oops}}]", "a.json:3: found invalid JSON (Expecting property name"),
            ("a.json", f"[{good}] x", "a.json:1: found more after the end of the array"), ("a.json", f"[\n{good}", "a.json:2: found '' after record 1"),
            ("a.json", f"[{good},\n]", "a.json:2: found invalid JSON"), ("a.json", "[]", "a.json:1: found an empty file"),
            ("a.json", f"[{good},\n3]", "a.json:2: found int, expected an object"), ("a.json", "[" * 8000, "a.json:1: found JSON nested too deeply"),
            ("a.json", " " * 9001, "a.json:0: found more than 9000 bytes"), ("a.json", f"{good}\n{good}\noops", "a.json:3: found invalid JSON"),
            ("a.jsonl", good + "\n" + " " * 4000 + good, "a.jsonl:2: found a line of more than 4000 bytes"),
            ("a.jsonl", '{"problem": ' + "9" * 5000 + "}", "a.jsonl:1: found a line of more"), ("a.csv", "", "a.csv:1: found an empty file"),
            ("a.csv", "problem,answer\nP,1,2\n", "a.csv:2: found 3 fields, expected 2"), ("a.csv", 'problem,answer\n"P\n', "a.csv:2: found invalid csv"),
            ("a.csv", 'problem,answer\n"' + "P\n" * 3000, "a.csv:2001: found a record of more than 4000 characters"),
            ("a.csv", "problem,answer\n\nP,1\n,,\n", "a.csv:4: found 3 fields"), ("a.csv", "P\n1\n", "a.csv:2: found the fields [p]")):
        (tmp_path / name).write_text(content)
        status, said = convert(capsys, tmp_path / name, tmp_path / "out.jsonl")
        assert status == 2 and found in said.replace("\\'", "'") and said.count("\n") == 1, (found, said)
        (tmp_path / name).unlink()
    monkeypatch.undo()
    monkeypatch.setattr(records.files, "TEXT", 100)
    (tmp_path / "a.csv").write_text("problem,answer\n" + "P" * 101 + ",1\n")
    assert "a.csv:2: found invalid csv (field larger than field limit (100))" in convert(capsys, tmp_path / "a.csv", tmp_path / "out.jsonl")[1]
    for device in ("pipe.csv", "pipe.parquet", "pipe.json"):
        os.mkfifo(tmp_path / device)
        assert "found a pipe or a device" in convert(capsys, tmp_path / device, tmp_path / "out.jsonl")[1]
    folder = tmp_path / "shards"
    folder.mkdir()
    os.mkfifo(folder / "0.jsonl")
    assert "0.jsonl:0: found a pipe or a device" in convert(capsys, folder, tmp_path / "out.jsonl")[1]


def test_prepare_bad_parquet(tmp_path, capsys, monkeypatch):
    """A file that is cut or none, a record of the wrong kind (the row is named), and texts that take all memory when they are unpacked."""
    rows = [{"problem": f"P{n}", "answer": n} for n in range(40)]
    good = parquet(tmp_path / "good.parquet", rows, row_group_size=7)
    assert convert(capsys, good, tmp_path / "good.jsonl")[0] == 0 and len(read(tmp_path / "good.jsonl")) == 40
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "torn.parquet").write_bytes(good.read_bytes().replace(b"P2", b"\xff\xff"))
    (tmp_path / "text.parquet").write_text("problem,answer\n")
    parquet(tmp_path / "many.parquet", [{"problem": "P" * 100_000, "answer": "1"}] * 1000)  # packed, some KB
    parquet(tmp_path / "none.parquet", rows + [{"problem": None, "answer": 3}, {"problem": "P", "answer": None}])
    parquet(tmp_path / "wrong.parquet", [row | {"answer": [1, 2]} for row in rows])
    monkeypatch.setattr(records, "RECORD_BYTES", 50_000)
    for name, found in (("cut", ":1: found "), ("text", ":1: found "), ("torn", "expected rows of parquet"), ("wrong", ":1: field answer: found [1, 2]"),
                        ("many", ":1: found records of 100009 bytes, at most 50000 are read")):
        status, said = convert(capsys, tmp_path / f"{name}.parquet", tmp_path / "out.jsonl")
        assert status == 2 and f"{name}.parquet" in said and found in said and said.count("\n") == 1, said
    assert "1 without a problem" in convert(capsys, tmp_path / "none.parquet", tmp_path / "out.jsonl")[1]
    monkeypatch.setattr(records, "SMALL_GROUP", 1)  # row by row
    assert convert(capsys, good, tmp_path / "again.jsonl")[0] == 0 and filecmp.cmp(tmp_path / "good.jsonl", tmp_path / "again.jsonl", False)
    monkeypatch.setattr(records, "GROUP_BYTES", 10)
    assert "with row_group_size=1000 it is written in smaller ones" in convert(capsys, good, tmp_path / "no.jsonl")[1]


def test_prepare_without_pyarrow_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, said = convert(capsys, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert status == 2 and said.endswith("expected it to be installed: pip install pyarrow\n")


# prepare.py: choosing

@pytest.mark.parametrize("one, two, same", [
    ("Find  $x^{2}+1$.", "find $x^2 + 1$", True), ("What is $\\dfrac{1}{2}$?", "what is \\frac{1}{2}", True), ("$a\\le b$", "$a \\leq\\, b$", True), ("$\\frac32\\quad2$", "$\\dfrac32 2$", True),
    ("$\\left(3,\\frac{\\pi}{2}\\right)$", "$(3, \\frac{\\pi}{2})$", True), ("A well-known\n fact", "a well known fact", True),
    ("$x - 1$", "$x \u2212 1$", True), ("3.5 apples", "35 apples", False), ("$x-1$", "$x+1$", False), ("$x<1$", "$x>1$", False), ("P 1 2", "P 12", False),
    ("$a_1$", "$a_2$", False), ("東京", "京都", False)])
def test_problems_with_the_same_words_are_the_same(one, two, same):
    assert (converter.key(one) == converter.key(two)) == same


def test_prepare_drops_and_keeps_problems_of_other_files(tmp_path, capsys):
    source = jsonl(tmp_path / "in.jsonl", [{"problem": f"Find  $x+{n}$ .", "answer": str(n)} for n in range(6)])
    test = jsonl(tmp_path / "test.jsonl", [{"question": "find $x + 2$", "answer": "so #### 2"}])
    (tmp_path / "more.csv").write_text("problem,answer\nFIND X+3,3\n")
    status, said = convert(capsys, source, tmp_path / "a.jsonl", "--without", test, tmp_path / "more.csv")
    assert status == 0 and said.endswith("4 problems; left out: 2 in --without\n")
    assert [r["answer"] for r in read(tmp_path / "a.jsonl")] == ["0", "1", "4", "5"]
    status, said = convert(capsys, source, tmp_path / "b.jsonl", "--only-in", tmp_path / "more.csv", test, "--without", test)
    assert status == 0 and said.endswith("1 problems; left out: 4 not in --only-in, 1 in --without\n")
    status, said = convert(capsys, source, tmp_path / "c.jsonl", "--without", tmp_path / "absent.jsonl")
    assert status == 2 and "absent.jsonl:0: found no readable file" in said and not (tmp_path / "c.jsonl").exists()
    status, said = convert(capsys, source, tmp_path / "c.jsonl", "--without", source)
    assert status == 2 and "found no problem that is left (6 in --without)" in said


def test_prepare_drops_long_rows_by_a_models_tokenizer(tmp_path, capsys, tokenizer):
    rows = [{"problem": "P", "qwq": "7 " * n + "\\boxed{1}"} for n in (5, 100, 40)] + [{"problem": "P", "answer": "1", "solution": [["7 " * 90, True]]}]
    source = jsonl(tmp_path / "in.jsonl", rows)
    most = len(tokenizer.encode("P" + rows[2]["qwq"]).ids)
    status, said = convert(capsys, source, tmp_path / "a.jsonl", "--drop-long", most, "--tokenizer", TINY / "model")
    assert status == 0 and said.endswith(f"2 problems; left out: 2 longer than {most} tokens\n")
    assert [r["unique_id"] for r in read(tmp_path / "a.jsonl")] == ["in/1", "in/3"]
    for words, found in ((["--drop-long", 9], "expected both or none"), (["--drop-long", 0, "--tokenizer", TINY / "model"], "expected at least 1"),
                         (["--drop-long", 9, "--tokenizer", tmp_path], "tokenizer.json: no such file")):
        status, said = convert(capsys, source, tmp_path / "b.jsonl", *words)
        assert status == 2 and found in said and not (tmp_path / "b.jsonl").exists()


def test_prepare_check_lists_what_is_wrong_and_drops_it_on_request(tmp_path, capsys):
    source = jsonl(tmp_path / "in.jsonl", [
        SOLVED, {"problem": "P?", "answer": "$$$"}, SOLVED | {"answer": "8"}, {"problem": "P?", "solution": "No box."}, SOLVED | {"answer": "7.0"}])
    status, said = convert(capsys, source, tmp_path / "a.jsonl", "--check")
    assert status == 0 and said.splitlines()[1:4] == [
        f"    {source}:2: an answer that the verifier cannot read '$$$'",
        f"    {source}:3: a solution whose box is another answer '7', answer '8'", f"    {source}:4: no answer"]
    assert said.startswith("--check: 1 an answer that the verifier cannot read, 1 a solution whose box is another answer, 1 no answer\n")
    assert len(read(tmp_path / "a.jsonl")) == 5
    status, said = convert(capsys, source, tmp_path / "b.jsonl", "--drop-wrong")
    assert status == 0 and [r["unique_id"] for r in read(tmp_path / "b.jsonl")] == ["in/1", "in/5"]
    assert said.splitlines()[-1].endswith("2 problems; left out: 1 with an answer that the verifier cannot read, "
                                          "1 with a solution whose box is another answer, 1 with no answer")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the published problem sets are not at {SHARED}")
def test_prepare_finds_the_overlap_of_published_sets(tmp_path, capsys):
    """MATH-500 with other spaces and marks is found again, and no two of its problems are the same."""
    rows = [json.loads(line) for line in (SHARED / "math500/test.jsonl").read_text().splitlines()]
    assert len({converter.key(row["problem"]) for row in rows}) == 500
    changed = [row | {"problem": row["problem"].replace("$", " $ ").replace("\\frac", "\\dfrac").upper().replace("\\DFRAC", "\\dfrac")}
               for row in rows[:400] if "\\left" not in row["problem"]]
    source = jsonl(tmp_path / "in.jsonl", rows)
    status, said = convert(capsys, source, tmp_path / "out.jsonl", "--without", jsonl(tmp_path / "changed.jsonl", changed))
    assert status == 0 and f"{500 - len(changed)} problems; left out: {len(changed)} in --without" in said
