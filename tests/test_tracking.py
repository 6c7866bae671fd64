"""--tensorboard and --wandb: the numbers of the logs, once each, through kills and resumes; a tracker that fails loses no run."""
import importlib.util
import json
import sys

import pytest

from lib import tracking
import ppo
from conftest import ROOT
from test_cli import call, refused  # noqa: F401  (fixtures)
from test_ppo import folder  # noqa: F401  (the fixture)

FAKE = """
calls = []
fails = False

class Run:
    def define_metric(self, *names, **how):
        pass
    def log(self, row):
        calls.append(row)
        if fails and len(calls) > 1:
            raise OSError(28, "No space left on device")
    def finish(self):
        calls.append("finish")

def init(**how):
    calls.append(how)
    return Run()
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module that writes down what it is called with. The real one is not needed, and would want a network."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "fake")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield importlib.import_module("wandb")
    sys.modules.pop("wandb", None)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step):
    inner = ppo.Trainer.train_step

    def train_step(t):
        if t.current == step:
            raise Killed
        return inner(t)
    monkeypatch.setattr(ppo.Trainer, "train_step", train_step)


def test_a_run_is_followed_without_a_step_twice_through_a_kill_and_a_resume(folder, tmp_path, wandb, call, monkeypatch):  # noqa: F811
    """Four steps with a checkpoint of the second, killed in the fourth: the third is done and told a second time."""
    installed = importlib.util.find_spec("tensorboard") is not None
    tiny, run = ROOT / "data/tiny", tmp_path / "run"
    flags = ["--wandb", *["--tensorboard"] * installed]
    with monkeypatch.context() as m:
        killed_at(m, 4)
        with pytest.raises(Killed):
            call("ppo", "--model", folder, "--data", tiny / "train.jsonl", "--eval-data", tiny / "test.jsonl", "--eval-every", "0", "--out", run, "--steps", "4",
                 "--save-every", "2", "--rollout-batch", "4", "--train-batch", "4", "--max-response", "4", "--freeze-steps", "0", "--dtype", "float32", *flags)
    assert not tracking.followed
    status, _, error = call("ppo", "--resume", run)
    assert status == 0 and "--wandb" not in error and "--tensorboard" not in error, error
    metrics, timing = rows(run / "metrics.jsonl"), rows(run / "timing.jsonl")
    expected = {(row["step"], name): x for row in metrics for name, x in row.items() if name != "step" and type(x) in (int, float)}
    expected |= {(row["step"], f"timing/{name}"): x for row in timing for name, x in row.items() if name != "step"}
    starts = [c for c in wandb.calls if "id" in c]
    assert len(starts) == 2 and starts[0] == starts[1] and starts[0]["dir"] == str(run) and starts[0]["resume"] == "allow" and starts[0]["name"] == "run"
    assert starts[0]["config"]["rollout_batch"] == 4 and wandb.calls.count("finish") == 2 and wandb.calls[-1] == "finish"
    told = [(row["step"], name, x) for row in wandb.calls if "step" in row for name, x in row.items() if name != "step"]
    assert len(told) == len({(step, name) for step, name, _ in told})  # nothing twice
    again = {(step, name) for step, name, _ in told if step == 3 and name.startswith("timing/")}  # seconds of the first time stay there
    assert {(step, name): x for step, name, x in told if (step, name) not in again} == {k: x for k, x in expected.items() if k not in again}
    assert {(0, "eval_accuracy"), (4, "eval_accuracy"), (3, "timing/seconds"), (1, "reward")} <= {(step, name) for step, name, _ in told}
    if not installed:
        pytest.skip("tensorboard is not installed (pip install tensorboard): its event files were not read")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = {(e.step, name): e.value for name in events.Tags()["scalars"] for e in events.Scalars(name)}
    assert found == pytest.approx(expected, rel=1e-6) and all(len(events.Scalars(name)) == len({e.step for e in events.Scalars(name)})
                                                                for name in events.Tags()["scalars"])


def test_a_run_is_followed_later_and_a_tracker_that_fails_is_given_up_once(tmp_path, wandb, call):  # noqa: F811
    run = tmp_path / "s"
    (tmp_path / "sft.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:8]))
    words = ["--batch", "4", "--dtype", "float32"]
    status, _, error = call("sft", "--model", ROOT / "data/tiny/model", "--from-scratch", "--data", tmp_path / "sft.jsonl", "--out", run, "--epochs", "1", *words)
    assert status == 0, error
    assert call("sft", "--resume", run, "--epochs", "2", "--wandb")[0] == 0  # what was logged before is brought as well
    told = [row for row in wandb.calls if "step" in row]
    assert [row["step"] for row in told if "loss" in row] == [1, 2, 3, 4] == [row["step"] for row in told if "timing/seconds" in row]
    assert [row["loss"] for row in told if "loss" in row] == [row["loss"] for row in rows(run / "metrics.jsonl")]
    wandb.calls.clear()
    wandb.fails = True
    status, _, error = call("sft", "--resume", run, "--epochs", "4")
    assert status == 0 and len(rows(run / "metrics.jsonl")) == 8 and (run / "done").is_file()
    assert error.count("warning: --wandb: OSError: [Errno 28] No space left on device; the run goes on without it") == 1 == error.count("--wandb")


def test_a_package_that_is_missing_is_told_before_anything_is_written(folder, tmp_path, refused, monkeypatch):  # noqa: F811
    words = ["--model", folder, "--data", ROOT / "data/tiny/sft.jsonl", "--out", tmp_path / "run"]
    for name, module in tracking.PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, None)
        for command in ("sft", "ppo"):
            error = refused(command, *words, f"--{name}")
            assert f"rlsp.py: error: --{name}: " in error and f"pip install {name}" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
