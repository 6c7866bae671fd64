"""Live logging to TensorBoard (--tensorboard) or Weights & Biases (--wandb): the numbers of metrics.jsonl
under the same names, those of timing.jsonl as timing/NAME.

The packages must be installed. Only rank 0 writes. RUN/tracked.json records, for each quantity, the last step
that a tracker has. So a resumed run repeats no step, and a tracker added later also gets what was logged
before. A tracker that fails is dropped with a warning, and the run continues.
"""
import contextlib
import importlib
import json
import os
import secrets
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lib import files, parallel
from lib.flags import flag

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
STATE = "tracked.json"
followed = []  # the trackers of this process


@dataclass(kw_only=True)
class Tracking:
    """Where the numbers of a run are also logged, as flags of `rlsp.py sft` and `ppo`."""
    tensorboard: bool = flag("run", False, "also log to RUN/tensorboard; needs the package tensorboard",
                             resume="any")
    wandb: bool = flag("run", False, "also log to Weights & Biases, with files in RUN/wandb; needs the "
                       "package wandb", resume="any")


def check(args):
    """Raise a ValueError if a package that a flag needs cannot be imported."""
    for name, module in PACKAGES.items():
        if getattr(args, name) and parallel.rank() == 0:
            try:
                importlib.import_module(module)
            except Exception as e:  # an import may raise anything
                raise ValueError(f"--{name}: {type(e).__name__}: {e}; pip install {name}, or leave the flag "
                                 "out") from None


class TensorBoard:
    name = "tensorboard"

    def __init__(self, run, step, state, config):
        """What an earlier start logged after `step` is dropped, since the run repeats it."""
        self.last = {key: min(n, step) for key, n in state.get(self.name, {}).items()}
        writer = importlib.import_module(PACKAGES[self.name]).SummaryWriter
        self.writer = writer(str(run / self.name), purge_step=step + 1)

    def write(self, step, numbers):
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self):
        self.writer.close()


class Wandb:
    name = "wandb"

    def __init__(self, run, step, state, config):
        """The id lets a resumed run continue as the same run there. Logged steps cannot be removed, so they
        stay and are not repeated."""
        self.last = dict(state.get(self.name, {}))
        os.environ.setdefault("WANDB_CONSOLE", "off")  # standard streams are ours
        self.run = importlib.import_module(PACKAGES[self.name]).init(
            project=os.environ.get("WANDB_PROJECT", "rlsp"), name=run.resolve().name, id=state["wandb_id"],
            resume="allow", dir=str(run), config=config)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def write(self, step, numbers):
        self.run.log({"step": step} | numbers)

    def close(self):
        self.run.finish()


def start(args, run, step):
    """Start the trackers that the flags ask for. The run's last finished step is `step`."""
    wanted = [kind for kind in (TensorBoard, Wandb) if getattr(args, kind.name, False)]
    if parallel.rank() or not wanted:
        return
    run = Path(run)
    for kind in wanted:
        with giving_up(kind.name):
            state = files.read_json(run / STATE) if (run / STATE).is_file() else {}
            state.setdefault("wandb_id", secrets.token_hex(8))
            tracker = kind(run, step, state, files.read_json(run / "config.json")["flags"])
            tracker.run_folder = run
            files.write_text(run / STATE, json.dumps(state))
            followed.append(tracker)
    for name in ("metrics", "timing"):
        file = run / f"{name}.jsonl"
        rows = files.read_jsonl(file, growing=True) if file.is_file() else []
        log({name: [row for _, row in rows if row.get("step", step + 1) <= step]})


def log(rows):
    """Send the new numbers in the rows {log's name: rows} to the trackers."""
    if not followed:
        return
    steps = {}
    for name, prefix in {"metrics": "", "timing": "timing/"}.items():
        for row in rows.get(name, ()):
            numbers = {prefix + key: x for key, x in row.items() if key != "step" and files.finite(x)}
            steps.setdefault(row["step"], {}).update(numbers)
    for tracker in list(followed):
        with giving_up(tracker.name):
            for step, numbers in steps.items():
                new = {key: x for key, x in numbers.items() if step > tracker.last.get(key, -1)}
                if new:
                    tracker.write(step, new)
                    tracker.last |= dict.fromkeys(new, step)
            state = files.read_json(tracker.run_folder / STATE)
            files.write_text(tracker.run_folder / STATE, json.dumps(state | {tracker.name: tracker.last}))


@contextlib.contextmanager
def giving_up(name):
    """If a tracker raises an error, such as for a full disk or a lost network, drop it with a warning."""
    try:
        yield
    except Exception as e:
        followed[:] = [tracker for tracker in followed if tracker.name != name]
        error = files.visible(f"{type(e).__name__}: {e}", 300)
        tqdm.write(f"rlsp.py: warning: --{name}: {error}; the run goes on without it", file=sys.stderr)


@contextlib.contextmanager
def closing():
    """Close the trackers at the end of a command. One that uses a network may take up to a minute, but only
    seconds if the run was stopped, since a batch system waits for the exit status."""
    seconds = 5.0
    try:
        yield
        seconds = 60.0
    finally:
        for tracker in list(followed):
            def close(tracker=tracker):
                with giving_up(tracker.name):
                    tracker.close()

            thread = threading.Thread(target=close, daemon=True)
            thread.start()
            thread.join(seconds)
        followed.clear()
