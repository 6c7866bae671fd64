"""data/experiment.py, the table and figure of the comparison, and data/hacking.py, its rewards with and without guards."""
import json
import subprocess
import sys
import xml.etree.ElementTree

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
import experiment  # noqa: E402
import hacking  # noqa: E402


def a_run(folder, accuracy, lengths, held_out, old=False):
    """What `rlsp.py ppo` and `eval` write, as far as the table reads it; old: with the timing inside metrics.jsonl."""
    for name in ("ppo", "eval"):
        (folder / name).mkdir(parents=True)
    (folder / "ppo/config.json").write_text(json.dumps({"flags": {"rollout_batch": 10, "samples": 1}}))
    rows = [{"step": i + 1, "accuracy": accuracy, "response_length": n, "backtracking": 0.5, "verification": 0.0} | ({"timing": {"seconds": 2.0}} if old else {})
            for i, n in enumerate(lengths)]
    if not old:
        (folder / "ppo/timing.jsonl").write_text("".join(json.dumps({"step": row["step"], "seconds": 2.0}) + "\n" for row in rows))
    (folder / "ppo/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval/summary.json").write_text(json.dumps({"m": {"all": {"accuracy": held_out, "maj@4": held_out, "tokens": lengths[-1]}}}))
    (folder / "eval/outputs-1.jsonl").write_text(json.dumps({"responses": ["Wait. No.", "yes", "yes", "yes"]}) + "\n")


def test_table_and_figure(tmp_path, capsys, monkeypatch):
    for seed, none, length in ((0, 0.2, 0.5), (1, 0.4, 0.9)):
        a_run(tmp_path / f"seed-{seed}/none", none, [4] * 8, none, old=seed == 0)
        a_run(tmp_path / f"seed-{seed}/length", length, [8] * 8, length)
    monkeypatch.setattr(sys, "argv", ["experiment.py", str(tmp_path), "--figure", str(tmp_path / "f.svg")])
    experiment.main()
    printed = capsys.readouterr().out
    assert "| outcome only | 2 | 30.0 ± 10.0 | 30.0 ± 10.0 | 4.0 ± 0.0 | 25.0 ± 0.0 | 0.0 ± 0.0 |" in printed
    assert "| + length | 2 | 70.0 ± 20.0 |" in printed
    # pairs: 50 - 20 and 90 - 40; the standard error of 30 and 50 is 10
    assert "| step 8 | +40.0 ± 10.0 |" in printed and "| tokens 320 | +40.0 ± 10.0 |" in printed and "| seconds 16 | +40.0 ± 10.0 |" in printed
    assert len(xml.etree.ElementTree.parse(tmp_path / "f.svg").getroot()) > 20


def test_budgets_are_reached_from_below_and_a_short_run_keeps_its_last_value():
    run = [{"tokens": 10 * i, "accuracy": i} for i in range(1, 5)]
    assert [experiment.at(run, "tokens", b) for b in (5, 10, 11, 40, 1000)] == [1, 1, 2, 4, 4]
    assert experiment.mean_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(1 / 3**0.5))


def test_nothing_to_show_is_said(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "data/experiment.py"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "no finished" in done.stderr and len(done.stderr.splitlines()) == 1


def test_only_the_guard_stops_repetition_from_paying():
    problem, once = {"answer": "4"}, "Two and two are four, I say.\n"
    for reward, pays in ((hacking.unguarded, True), (hacking.guarded, False)):
        assert (reward(once * 50 + r"\boxed{4}", problem) > reward(once + r"\boxed{4}", problem)) is pays
        assert (reward(r"\boxed{4} " + "and so on " * 90, problem) > reward(r"\boxed{4}", problem)) is pays
