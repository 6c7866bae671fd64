"""docs/results/experiment.py, the table and figure of the comparison, and docs/results/hacking.py, its rewards with and without guards."""
import json
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs" / "results"))
import experiment  # noqa: E402
import hacking  # noqa: E402


def a_run(folder, accuracy, lengths, held_out, samples=1, old=False):
    """What `rlsp.py ppo` and `eval` write, as far as the table reads it; old: with the timing inside metrics.jsonl."""
    for name in ("ppo", "eval"):
        (folder / name).mkdir(parents=True)
    (folder / "ppo/config.json").write_text(json.dumps({"flags": {"rollout_batch": 10, "samples": 1}}))
    rows = [{"step": i + 1, "accuracy": accuracy, "response_length": n, "backtracking": 0.5, "verification": 0.0}
            for i, n in enumerate(lengths)]
    timing = {"seconds": 99.0, "cpu_seconds": 2.0}
    if old:
        rows = [row | {"timing": timing} for row in rows]
    else:
        (folder / "ppo/timing.jsonl").write_text("".join(json.dumps({"step": row["step"]} | timing) + "\n" for row in rows))
    (folder / "ppo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval/summary.json").write_text(json.dumps({"m": {"all": {"accuracy": held_out, "maj@4": held_out, "tokens": lengths[-1]}}}))
    answers = (["3", "2", "2", "4", "2", "5", "5", "2"] * 2)[:samples]
    output = {"responses": ["Wait. No.", "yes", "yes", "yes"], "answer": "2", "answers": answers, "correct": [a == "2" for a in answers],
              "tokens": [lengths[-1]] * samples, "truncated": [False] * samples}
    (folder / "eval/outputs-1.jsonl").write_text(json.dumps(output) + "\n")


def tables(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(folder), "--figure", str(folder / "f.svg")])
    experiment.main()
    return capsys.readouterr().out


def test_table_and_figure(tmp_path, capsys, monkeypatch):
    for seed, none, length in ((0, 0.2, 0.5), (1, 0.4, 0.9)):
        a_run(tmp_path / f"seed-{seed}/none", none, [4] * 8, none, old=seed == 0)
        a_run(tmp_path / f"seed-{seed}/length", length, [8] * 8, length)
    printed = tables(tmp_path, capsys, monkeypatch)
    assert "| outcome only | 2 | 30.0 ± 10.0 | 30.0 ± 10.0 | 4.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 |" in printed
    assert "| + length | 2 | 70.0 ± 20.0 |" in printed
    # pairs: 50 - 20 and 90 - 40; the standard error of 30 and 50 is 10
    for budget in ("step 8", "tokens 320", "processor seconds 16"):
        assert f"| {budget} | +40.0 ± 10.0 |" in printed
    assert "| + length | 100 % (from 0 to 8), 0 % | 100 % (from 8 to 320), 0 % | 100 % (from 0 to 16), 0 % |" in printed
    texts = [e.text for e in xml.etree.ElementTree.parse(tmp_path / "f.svg").getroot() if e.tag.endswith("text")]
    assert texts[:16] == ["accuracy of rollouts", "0", "20", "40", "60", "80", "100", "0", "2", "4", "6", "8", "PPO step", "% of responses",
                          "response length", "0"]
    assert texts[16:20] == ["2", "4", "6", "8"] and "thousand tokens sampled" in texts and "tokens per response" in texts


@pytest.mark.parametrize("top, ticks", [(40, [0, 10, 20, 30, 40]), (163, [0, 50, 100, 150, 200]), (100, [0, 20, 40, 60, 80, 100]),
                                        (548.7, [0, 100, 200, 300, 400, 500, 600]), (0.4, [0, 0.1, 0.2, 0.3, 0.4]), (6, [0, 1, 2, 3, 4, 5, 6])])
def test_ticks_are_round(top, ticks):
    assert experiment.ticks(top) == pytest.approx(ticks)


def test_an_arm_is_ahead_only_beyond_the_standard_error_and_at_equal_cost(tmp_path, capsys, monkeypatch):
    """The arm wins by 10 and 20 points in its second half, loses by 50 in one seed alone before, and costs 2 and 4 times as much."""
    for seed in (0, 1):
        a_run(tmp_path / f"seed-{seed}/none", 0.5, [4] * 40, 0.5)
        a_run(tmp_path / f"seed-{seed}/length", 0.5, [8] * 40, 0.5)
        file = tmp_path / f"seed-{seed}/length/ppo/metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for i, row in enumerate(rows):
            row["accuracy"] = 0.6 + 0.1 * seed if i >= 20 else 0.5 * seed
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.with_name("timing.jsonl").write_text("".join(json.dumps({"step": row["step"], "cpu_seconds": 8.0}) + "\n" for row in rows))
    printed = tables(tmp_path, capsys, monkeypatch)
    # of the means of five steps, those up to step 22 hear of the first half; the tokens and the time last for 20 and 10 steps
    assert "| + length | 45 % (from 23 to 40), 0 % | 0 %, 0 % | 0 %, 0 % |" in printed


def test_a_vote_costs_what_one_long_response_costs(tmp_path, capsys, monkeypatch):
    a_run(tmp_path / "seed-0/start", 0.2, [5], 0.2, samples=8)
    a_run(tmp_path / "seed-0/none", 0.2, [16], 0.2, samples=1)
    # 16 / 5 is 3 responses: majorities of 3,2,2 and of 4,2,5 (a tie: the earlier one); the last two are no group of three
    assert "| outcome only | 3.0 | 15.0 | 50.0 | 16.0 | 0.0 | -50.0 |" in tables(tmp_path, capsys, monkeypatch)
    a_run(tmp_path / "seed-0/length", 0.2, [60], 0.2)  # 12 responses; there are 8, of which four say 2
    assert "| + length | 8.0 | 40.0 | 100.0 | 60.0 | 0.0 | -100.0 |" in tables(tmp_path, capsys, monkeypatch)


def test_budgets_are_reached_from_below_and_a_short_run_keeps_its_last_value():
    run = [{"tokens": 10 * i, "accuracy": i} for i in range(1, 5)]
    assert [experiment.at(run, "tokens", b) for b in (5, 10, 11, 40, 1000)] == [1, 1, 2, 4, 4]
    assert experiment.mean_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))


def test_nothing_to_show_is_said(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "docs/results/experiment.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "no finished" in done.stderr and len(done.stderr.splitlines()) == 1


def test_only_the_guard_stops_repetition_from_paying():
    problem, once = {"answer": "4"}, "Two and two are four, I say.\n"
    for reward, pays in ((hacking.unguarded, True), (hacking.guarded, False)):
        assert (reward(once * 50 + r"\boxed{4}", problem) > reward(once + r"\boxed{4}", problem)) is pays
        assert (reward(r"\boxed{4} " + "and so on " * 90, problem) > reward(r"\boxed{4}", problem)) is pays
