"""`bash train.sh gsm8k`: its demonstrations, its table and the calls it makes."""
import json
import random
import re
import sys
import types
import xml.etree.ElementTree

import pytest
from conftest import ROOT, SHARED, tiny_llama
from test_train_sh import checkout, train_sh  # noqa: F401

from lib import hf
import rewards

sys.path.insert(0, str(ROOT / "docs" / "results"))
import gsm8k  # noqa: E402
import gsm8k_cost  # noqa: E402
import gsm8k_table  # noqa: E402

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


def test_a_demonstrated_sum_is_a_guess_or_work_that_is_right():
    kinds = {}
    for seed in range(120):
        pieces, gold = gsm8k.demonstrate_sum("5 - 33 + 40 - 100", random.Random(seed))
        text = "".join(text for text, _ in pieces)
        learned = "".join(text for text, trained in pieces if trained)
        assert gold == "-88" and text.endswith("\\boxed{-88}") and pieces[-1][1]
        slips = [text for text, trained in pieces if not trained]
        for line in learned.replace("Wait, ", "").replace("Check: ", "").splitlines()[:-1]:
            left, result = line.split("=")
            assert sum(map(int, re.findall(r"[+-]?\d+", left))) == int(result)
        work = [line for line in learned.replace("Wait, ", "").splitlines()[:-1] if "Check" not in line]
        assert work in ([], ["5-33=-28", "-28+40=12", "12-100=-88"])
        for slip in slips:
            left, off = slip.strip().split("=")
            (right,) = re.findall(r"Wait, (.*)=(.*)", learned)
            assert left == right[0] and off != right[1]
        kind = "guess" if not work else "slip" if slips else "check" if "Check: " in learned else "plain"
        assert len(slips) + learned.count("Check: ") == (kind in ("slip", "check"))
        kinds[kind] = kinds.get(kind, 0) + 1
    assert 45 < kinds.pop("guess") < 75 and set(kinds) == {"plain", "check", "slip"} and min(kinds.values()) > 8


def gym(monkeypatch, wrong=False):
    """A stand-in for reasoning-gym: sums in its form, the first of which comes twice."""
    def create_dataset(name, size, seed, **settings):
        assert name == "basic_arithmetic" and settings["operators"] == ["+", "-"]
        for i in range(size):
            expression = f"{i // 90} + {max(1, i) % 90} - 7"
            answer = i // 90 + max(1, i) % 90 - 7 + wrong
            yield {"question": f"Calculate {expression}.", "answer": str(answer),
                   "metadata": {"expression": expression, "num_terms": 3, "source_index": i}}

    def scorer(name):
        return lambda answer, entry: 1.0 if answer == entry["answer"] else 0.0

    found = types.SimpleNamespace(create_dataset=create_dataset, get_score_answer_fn=scorer)
    monkeypatch.setitem(sys.modules, "reasoning_gym", found)


def test_the_sums_are_of_one_stream_without_a_text_twice(tmp_path, monkeypatch, capsys):
    gym(monkeypatch)
    gsm8k.sums(tmp_path / "data")
    parts = {name: read(tmp_path / f"data/{name}.jsonl") for name in gsm8k.SUMS}
    assert {name: len(rows) for name, rows in parts.items()} == gsm8k.SUMS
    problems = [row["problem"] for rows in parts.values() for row in rows]
    assert len(set(problems)) == len(problems) == sum(gsm8k.SUMS.values())
    assert "solution" in parts["sft"][0] and "solution" not in parts["train"][0] | parts["test"][0]
    assert parts["sft"][0]["level"] == 3 and parts["sft"][1]["unique_id"] == "sums/2"
    gym(monkeypatch, wrong=True)
    with pytest.raises(ValueError, match=r"0 \+ 1 - 7 is -5 to reasoning-gym, expected -6"):
        gsm8k.sums(tmp_path / "wrong")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match="pip install reasoning-gym"):
        gsm8k.sums(tmp_path / "absent")


def evaluated(folder, texts):
    """What eval writes of two problems: texts are those of each, of which those with a 7 in a box are right."""
    for how, drawn in zip(("sampled", "greedy"), (texts, [each[:1] for each in texts])):
        (folder / how).mkdir(parents=True)
        rows = []
        for i, each in enumerate(drawn):
            answers = [rewards.extract_answer(text) for text in each]
            rows.append({"problem": f"p{i}", "answer": "7", "level": 3, "correct": [a == "7" for a in answers],
                         "answers": answers, "tokens": [len(text) for text in each], "responses": each,
                         "truncated": [False] * len(each)})
        (folder / how / "outputs-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / how / "summary.json").write_text(json.dumps({"/home/me/model": {"all": {"accuracy": 0.123456789}}}))


def trained(folder, accuracy):
    """What ppo writes: an evaluation before the first step, and four steps."""
    folder.mkdir(parents=True)
    flags = {"rollout_batch": 10, "samples": 1, "lr": 1e-5, "model": "/home/me/sft/model"}
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    rows = [{"step": 0, "eval_accuracy": 0.25}]
    timing = [{"step": 0, "eval_seconds": 12.0}]
    for step in range(1, 5):
        rows.append({"step": step, "accuracy": accuracy * step / 4, "response_length": 10.0 + step, "answered": 0.5,
                     "backtracking": 0.0, "verification": 0.0, "kl_response": 0.01 * step, "entropy": 0.123456789,
                     "explained_variance": 0.1 * step})
        timing.append({"step": step, "seconds": 12.0, "cpu_seconds": 20.0, "rollout_seconds": 3.0, "scoring_seconds": 3.0,
                       "update_seconds": 6.0, "rollout_tokens_per_s": 40.0, "update_tokens_per_s": 50.0})
    rows[-1] |= {"eval_accuracy": 0.75, "clip_frac": 0.02}
    for name, lines in (("metrics", rows), ("timing", timing)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))


def test_the_tables_of_finished_runs_and_what_is_kept_of_them(tmp_path, monkeypatch, capsys):
    right, wrong, worked, none = "\\boxed{7}", "\\boxed{8}", "3+4=7\n\\boxed{7}", "no idea"
    run = tmp_path / "run"
    evaluated(run / "sft-test", [[wrong, wrong, right, none], [wrong, right, worked, wrong]])
    evaluated(run / "seed-1/none-test", [[worked, worked, right, wrong], [right, worked, worked, wrong]])
    evaluated(run / "seed-1/length-test", [[worked, worked, worked, worked], [right, worked, worked, wrong]])
    trained(run / "seed-1/none", 0.5)
    trained(run / "seed-1/length", 1.0)
    evaluated(run / "seed-2/none-test", [[wrong, wrong, right, none], [wrong, right, worked, wrong]])  # no gain
    (run / "seed-3/none-test/sampled").mkdir(parents=True)  # not finished
    gym(monkeypatch)

    def printed(*words):
        monkeypatch.setattr(sys, "argv", ["gsm8k_table.py", *map(str, words)])
        gsm8k_table.main()
        return capsys.readouterr().out

    said = printed(run, "--out", tmp_path / "kept")
    # by hand: SFT has 1 and 2 of 4 right, outcome only 3 and 3: differences 50 and 25, deviation 17.68, / sqrt 2
    assert "| SFT, before PPO |  | 37.5 |  | 0.0 |  | 87.5 | 42.9 | 12.5 | 100.0 | 9.5 |" in said
    assert "| outcome only | 1 | 75.0 | +37.50 ± 12.50 | 100.0 | +100.00 ± 0.00 | 100.0 | 75.0 | 50.0 | 100.0 | 12.0 |" in said
    assert "- outcome only, sampled: over SFT by at least 3 standard errors in 1 of 2 seeds" in said  # 37.5 = 3 * 12.5
    assert "- + length, sampled: over SFT by at least 3 standard errors in 1 of 1 seeds" not in said  # 75 and 25
    assert "| + length | sampled | 1: +12.50 ± 12.50 | +12.50 |" in said
    assert "| outcome only | 1 | 4 | 0: 25.0, 4: 75.0 | 12.5 to 50 | 50 to 50 | 11 to 14 | 0.01 to 0.04 | 0.1 to 0.4 |" in said
    assert "| - to 2 |" in said
    # 12 s of evaluation and 4 steps of 12 s
    assert "| outcome only | 1 | 1.0 | 1.3 | 20 | 20 | 40 | 0 | 20 | 40 | 50 |" in said
    assert "exactly where the verifier says right in 40 of 40 responses" in said
    assert "| step 4 | +37.5 |" in said and "| outcome only | 1.0 ± 0.0 |" in said.split("majority vote")[1]

    kept = tmp_path / "kept"
    texts = [file.read_text() for file in kept.rglob("*") if file.is_file()]
    assert not any("/home/me" in text for text in texts) and "0.12346" in (kept / "seed-1/none/metrics.jsonl").read_text()
    assert xml.etree.ElementTree.parse(kept / "figure.svg")
    assert (kept / "tables.md").read_text().strip() == said.split("\nwrote")[0].strip()
    shown = (kept / "responses.md").read_text()
    assert "## 2. p1 (7)" in shown and f"outcome only: right, {len(worked)} tokens\n\n```\n{worked}\n```" in shown
    assert printed(kept).strip() == (kept / "tables.md").read_text().strip()
    with pytest.raises(SystemExit, match="has no responses"):
        printed(kept, "--out", tmp_path / "again")
    with pytest.raises(SystemExit, match="no finished evaluation"):
        printed(tmp_path)


def a_checkout(checkout):  # noqa: F811
    """The scripts, with stand-ins for those in Python, which are tested above and below."""
    for name in ("gsm8k.py", "gsm8k_cost.py", "gsm8k_table.py"):
        (checkout / "docs/results" / name).write_text(
            "import pathlib, sys\nif sys.argv[1] in ('data', 'sums'): pathlib.Path(sys.argv[-1]).mkdir(parents=True)\n"
            f"print('{name}', sys.argv[1])\n")
    (checkout / "docs/results/gsm8k.sh").write_bytes((ROOT / "docs/results/gsm8k.sh").read_bytes())


def test_each_stage_is_called_once_and_goes_on(checkout, source):  # noqa: F811
    a_checkout(checkout)
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
    assert [dict(zip(words, words[1:]))["--rollout-batch"] for words in ppo[:2]] == ["64", "16"]
    assert done.stdout.split("\n")[0] == "gsm8k.py data" and done.stdout.strip().endswith("gsm8k_table.py runs/gsm8k")
    again = train_sh(checkout, "gsm8k", **asked)
    assert again.returncode == 0 and "gsm8k.py data" not in again.stdout
    assert all("--resume" in call["words"] for call in read(checkout / "calls.jsonl")[len(calls):])
    assert train_sh(checkout, "gsm8k", GSM8K=source).stderr.startswith("train.sh: gsm8k: give MODEL=")
    assert train_sh(checkout, "gsm8k", MODEL="m").stderr.startswith("train.sh: gsm8k: give GSM8K=")
    assert "ARMS has wild" in train_sh(checkout, "gsm8k", **asked | dict(ARMS="wild")).stderr
    assert "SETTING is main" in train_sh(checkout, "gsm8k", **asked | dict(SETTING="main")).stderr


def test_the_sums_have_the_same_stages_and_settings_of_their_own(checkout):  # noqa: F811
    a_checkout(checkout)
    done = train_sh(checkout, "gsm8k", MODEL="m", SETTING="sums", SEEDS="2", SFT_FLAGS="--epochs 1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "gsm8k.py sums"
    calls = [call["words"] for call in read(checkout / "calls.jsonl")]
    folders = [words[2].removeprefix("runs/sums/") for words in calls]
    arms = ["seed-2/none", "seed-2/length"]
    assert folders == [f for stage in ("sft", *arms) for f in (stage, f"{stage}-test/sampled", f"{stage}-test/greedy")]
    flags = {words[0]: dict(zip(words, words[1:])) for words in calls}  # a flag: what stands after its last place
    assert flags["sft"]["--prompt"] == "{problem}" and flags["sft"]["--epochs"] == "1"
    assert flags["ppo"]["--exploration"] == "length" and flags["ppo"]["--length-scale"] == "10"
    assert all(flags[command]["--max-response"] == "96" for command in ("ppo", "eval"))
    assert flags["ppo"]["--rollout-batch"] == "48" and flags["ppo"]["--lam"] == "1"


def test_the_hours_are_said_at_the_start(source, tmp_path, capsys, monkeypatch):
    gsm8k.data(source, tmp_path / "data")
    tiny = str(ROOT / "data/tiny/model")
    monkeypatch.setattr(gsm8k_cost.logs, "matrix_peak", lambda device, dtype: 1e9)
    gsm8k_cost.hours(tmp_path / "data", tiny, 1, 10, 64)
    said = capsys.readouterr().out.splitlines()[-1]
    words = r"1e\+09 FLOP/s in \w+; prompts of (\d+) and answers of (\d+) tokens: SFT some 0 minutes, 10 steps of PPO some (\d+) minutes"
    first = re.match(words, said)
    assert first, said
    gsm8k_cost.hours(tmp_path / "data", tiny, 1, 20_000, 64)
    hours = float(re.search(r"PPO some (\d+\.\d) hours", capsys.readouterr().out)[1])
    assert hours == pytest.approx(int(first[3]) * 2000 / 60, rel=0.5)


def test_a_profile_has_each_phase_and_what_took_its_time(source, tmp_path, capsys):
    gsm8k.data(source, tmp_path / "data")
    words = json.loads((ROOT / "data/tiny/model/config.json").read_text())["vocab_size"]
    hf.save(tiny_llama(vocab_size=words), tmp_path / "model")
    hf.copy_tokenizer(ROOT / "data/tiny/model", tmp_path / "model")
    gsm8k_cost.profile(tmp_path / "data", str(tmp_path / "model"), 4, longest=8)
    said = capsys.readouterr().out
    for phase in ("rollout", "scoring", "update"):
        lines = re.search(rf"\n{phase}: [\d.]+ s, [\d.]+ s of processor time\n((?:  .*\n)+)", said)[1].splitlines()
        shares = [float(line.split("%")[0]) for line in lines]
        assert len(lines) == 8 and shares == sorted(shares, reverse=True) and sum(shares) <= 100.1
    assert "aten::" in said


def test_larger_models_are_planned_and_not_run(capsys):
    gsm8k_cost.plans()
    said = capsys.readouterr().out
    for name, parameters in (("Llama-3.2-1B", "1.24e9 parameters"), ("Qwen2.5-0.5B", "0.49e9 parameters")):
        part = said[said.index(f"MODEL={name} GSM8K=gsm8k STEPS=500 bash train.sh gsm8k"):]
        assert parameters in part and "500 steps in" in part and "DOES NOT FIT" not in part
