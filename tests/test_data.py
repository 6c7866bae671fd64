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
sys.path.insert(0, str(ROOT))
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
    (json.dumps({**MATH500, "answer": 3}), "field answer: found 3, expected a non-empty string"),
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
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "a"}\n{"question": "\xe9"}\n')
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
