"""`bash train.sh gsm8k`: its demonstrations, its table and the calls it makes."""
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED
from test_train_sh import checkout, train_sh  # noqa: F401

import rewards

sys.path.insert(0, str(ROOT / "docs" / "results"))
import gsm8k  # noqa: E402

ANSWER = ("She sold 48/2 = <<48/2=24>>24 clips in May.\nThat cost $<<24*0.5=12>>12 in all.\n"
          "In 2 months she sold 48+24 = <<48+24=1072>>1,072 clips.\n#### 1,072")


def test_a_demonstration_ends_in_the_answer_and_learns_no_slip():
    kinds = set()
    for seed in range(60):
        pieces, gold = gsm8k.demonstrate(ANSWER, random.Random(seed))
        text = "".join(text for text, _ in pieces)
        learned = "".join(text for text, trained in pieces if trained)
        assert gold == "1072" and rewards.verify(learned, gold) and text.endswith("The answer is \\boxed{1072}.") and "<<" not in text
        # the solution's own lines are all learned, in their order
        lines = [line for line in learned.splitlines() if not line.startswith(("Let me check", "Wait", "The answer"))]
        assert lines == ["She sold 48/2 = 24 clips in May.", "That cost $12 in all.", "In 2 months she sold 48+24 = 1,072 clips."]
        slips = [text for text, trained in pieces if not trained]
        checks = re.findall(r"Let me check: (.*) = (.*)\.", text)
        kinds.add("slip" if slips else "check" if checks else "plain")
        assert len(slips) + len(checks) <= 1 and all(check in {("48/2", "24"), ("24*0.5", "12")} for check in checks)
        for slip in slips:  # the third line has its result with a comma, and does not come out wrong
            off, right = re.search(r"Wait, .* is not (\S+), it is (\S+)\.", learned).groups()
            assert off != right and float(off) > 0 and slip.strip().replace(off, right, 1) in lines
    assert kinds == {"plain", "check", "slip"}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for name, n in (("train", 240), ("test", 5)):
        rows = [{"question": f"{name} {i}?", "answer": f"It is {i}+1 = <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(n)]
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "gsm8k"


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_no_problem_is_in_two_files_and_the_same_command_makes_the_same_files(source, tmp_path, capsys):
    for name in ("a", "b"):
        gsm8k.data(source, tmp_path / name)
    parts = {name: read(tmp_path / f"a/{name}.jsonl") for name in ("sft", "train", "validation", "test")}
    problems = [row["problem"] for rows in parts.values() for row in rows]
    assert {name: len(rows) for name, rows in parts.items()} == {"sft": 20, "train": 20, "validation": 200, "test": 5}
    assert len(set(problems)) == len(problems) == 245 and all("solution" not in row for row in parts["train"] + parts["test"])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_published_problems_give_demonstrations_that_are_right():
    if not (SHARED / "data/gsm8k/train.jsonl").is_file():
        pytest.skip("../shared/data/gsm8k is absent")
    rows = read(SHARED / "data/gsm8k/train.jsonl")[:1000]
    for i, row in enumerate(rows):
        pieces, gold = gsm8k.demonstrate(row["answer"], random.Random(i))
        assert rewards.verify("".join(text for text, _ in pieces), gold) and "<<" not in "".join(text for text, _ in pieces)


def test_the_table_pairs_problems_with_those_of_sft(tmp_path, capsys):
    def evaluated(folder, right):
        for how, samples in (("sampled", 4), ("greedy", 1)):
            (tmp_path / folder / how).mkdir(parents=True)
            rows = [{"problem": f"p{i}", "correct": [j < n for j in range(samples)]} for i, n in enumerate(right[how])]
            (tmp_path / folder / how / "outputs-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (tmp_path / folder / how / "summary.json").write_text(json.dumps({"m": {"all": {"answered": 0.5, "tokens": 99.6}}}))

    evaluated("sft-test", {"sampled": [0, 2, 4, 1], "greedy": [0, 1, 1, 0]})
    evaluated("seed-1/none-test", {"sampled": [1, 4, 4, 1], "greedy": [1, 1, 1, 1]})
    gsm8k.table(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| SFT |  | 43.75 |  | 50.00 |  | 50.0 | 100 |"
    # by hand: differences 25, 50, 0, 0: mean 18.75, deviation 23.94, / 2; greedy 100, 0, 0, 100: 50, 57.74, / 2
    assert lines[3] == "| outcome only | 1 | 62.50 | +18.75 ± 11.97 | 100.00 | +50.00 ± 28.87 | 50.0 | 100 |"
    assert len(lines) == 6


def test_each_stage_is_called_once_and_goes_on(checkout, source):  # noqa: F811
    for name in ("gsm8k.py", "gsm8k.sh"):
        (checkout / "docs/results" / name).write_bytes((ROOT / "docs/results" / name).read_bytes())
    # data, hours and table are tested above
    (checkout / "docs/results/gsm8k.py").write_text("import pathlib, sys\nif sys.argv[1] == 'data': pathlib.Path(sys.argv[3]).mkdir(parents=True)\n"
                                                    "print('gsm8k.py', sys.argv[1])\n")
    asked = dict(MODEL="m", GSM8K=source, SEEDS="0 1", ARMS="none group", STEPS=7, PPO_FLAGS="--lr 1e-6")
    done = train_sh(checkout, "gsm8k", **asked)
    assert done.returncode == 0, done.stderr
    calls = [call["words"] for call in read(checkout / "calls.jsonl")]
    names = [(words[0], words[2]) for words in calls]
    tests = [("eval", f"{{}}-test/{how}") for how in ("sampled", "greedy")]
    arms = [f"runs/gsm8k/seed-{seed}/{arm}" for seed in (0, 1) for arm in ("none", "group")]
    expected = [("sft", "runs/gsm8k/sft")] + [(k, name.format("runs/gsm8k/sft")) for k, name in tests]
    for arm in arms:
        expected += [("ppo", arm)] + [(k, name.format(arm)) for k, name in tests]
    assert names == expected
    ppo = [words for words in calls if words[0] == "ppo"]
    assert all(words[-4:] == ["--steps", "7", "--lr", "1e-6"] for words in ppo)
    assert "--advantage" in ppo[1] and "--advantage" not in ppo[0] and ppo[2][ppo[2].index("--seed") + 1] == "1"
    assert done.stdout.split("\n")[0] == "gsm8k.py data" and done.stdout.strip().endswith("gsm8k.py table")
    again = train_sh(checkout, "gsm8k", **asked)
    assert again.returncode == 0 and "gsm8k.py data" not in again.stdout
    assert all("--resume" in call["words"] for call in read(checkout / "calls.jsonl")[len(calls):])
    assert train_sh(checkout, "gsm8k", MODEL="m").stderr.startswith("train.sh: gsm8k: give MODEL=")
    assert "ARMS has wild" in train_sh(checkout, "gsm8k", **asked | dict(ARMS="wild")).stderr


def test_the_hours_are_said_at_the_start(source, tmp_path, smollm2):
    gsm8k.data(source, tmp_path / "data")
    done = subprocess.run([sys.executable, ROOT / "docs/results/gsm8k.py", "hours", tmp_path / "data", "--model", smollm2],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"FLOP/s in torch\.\w+; prompts of \d+ and answers of \d+ tokens: SFT some \d+\.\d hours, 60 steps of PPO some", done.stdout)
