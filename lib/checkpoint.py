"""Checkpoints, with the logs and signals that a stopped run needs to continue. SFT and PPO share them.

    RUN/checkpoints/step-000040/state.json
        the step, counts of updates, the KL coefficient; size and CRC of each file
    RUN/checkpoints/step-000040/shard-00001-model-00001-of-00002.safetensors
        the shards of rank 0, and so on

torch.distributed.checkpoint (DCP) writes them: each rank writes its own shards of the weights and of Adam's
moments, and any number of ranks can read them. The files are safetensors and not DCP's own format, whose
metadata is a pickle. No random state is saved: generators are functions of seed, purpose and step
(parallel.generator), and so is the position in the data.

CRC-32 detects accidental damage, and it is fast (4 GB/s per core, where SHA-256 reaches 1.8); a preempted job
has little time. A digest stored beside the data does not prove who wrote them, so a cryptographic one would
be no safer. Nothing in a checkpoint is executed.
"""
import contextlib
import json
import logging
import re
import shutil
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from lib import files, guards, logs, parallel
from lib.signals import Stopped, signals


# Bytes per file of a rank. DCP copies a file's tensors to the CPU, and again into the bytes of the file.
FILE_BYTES = 10**9


def rewind(run, step):
    """Undo what a run did after its checkpoint of `step`: remove later lines of logs and later checkpoints,
    including half-written ones."""
    for file in (run / f"{name}.jsonl" for name in logs.LOGS):
        if file.is_file():
            try:
                lines = file.read_text(encoding="utf-8").splitlines(True)
                whole = [line for line in lines if line.endswith("\n")]
                kept = [line for line in whole if json.loads(line)["step"] <= step]
                files.write_text(file, "".join(kept))
                files.sync(file)
            except (ValueError, KeyError, TypeError, RecursionError) as e:
                found = f"{type(e).__name__}: {e}"
                raise ValueError(f"{file}: not a log of this program: {found}") from None
    metrics = run / "metrics.jsonl"
    logged = {json.loads(line)["step"] for line in metrics.open()} if metrics.is_file() else set()
    if lost := set(range(1, step + 1)) - logged:
        logs.say(f"warning: {metrics}: {len(lost)} of the {step} steps before the checkpoint are not in it, "
                 f"the first of them {min(lost)}; the run continues without their lines")
    remove(f for f in steps(run) if int(f.name[5:]) > step)
    clear(run / "checkpoints")
    for pattern in (".tmp*", ".part-*", ".*.part"):  # a half-written model; .tmp* is from safetensors
        for left in (run / "model").glob(pattern):
            left.unlink()
    for mark in ("stopped", "done"):
        (run / mark).unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ checkpoints


def tensors(nets, optimizers, updates):
    """{name: tensor} of the trained nets {name: net}: the weights, and Adam's two moments if the net has been
    updated."""
    out = {}
    for name, net in nets.items():
        # After a forward without a backward pass, the root holds copies in the compute type, unknown to Adam.
        net.reshard()
        for key, p in net.named_parameters():
            out[f"{name}.{key}"] = p
            if updates[name]:
                state = optimizers[name].state[p]
                out |= {f"{name}.{key}.{moment}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
    return out


def make_state(optimizer, updates):
    """Let the optimizer create its state, into which values are then loaded. Only the optimizer knows the
    place and type of its tensors: fused Adam, for example, keeps its step count on the GPU. So it takes a
    step with gradients and learning rates of zero, which changes no weight. It does so for one parameter at a
    time, so that only one gradient is in memory."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        p.grad = None
        optimizer.state[p]["step"].fill_(updates)
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


@contextlib.contextmanager
def plain_errors(path):
    """Replace DCP's error, a list of tracebacks with one per rank, by the cause of the first one, with the
    path."""
    try:
        yield
    except dcp.api.CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(error.filename or path)) from None
        raise ValueError(f"{path}: {error}") from None


def save(run, nets, optimizers, step, updates, keep, keep_best=False, **more):
    """Write checkpoints/step-N under a temporary name, then rename it, so that a kill at any moment leaves
    the last good one. The newest `keep` are kept, and with keep_best also that of best(run). Every rank calls
    it."""
    folder = Path(run) / "checkpoints" / f"step-{step:06d}"
    aside = folder.with_name(f".{folder.name}.part")

    def publish():
        unseen = sorted({name for mine in written for name, _ in mine} - {f.name for f in aside.iterdir()})
        if unseen:
            raise OSError(f"{aside / unseen[0]}: written by another rank, but rank 0 does not see it; the "
                          "run's folder must be one that all nodes share. The checkpoint was not kept")
        listed = dict(sorted(x for mine in written for x in mine))
        state = dict(step=step, updates=updates, **more, ranks=parallel.world_size(), files=listed)
        state["crc32"] = zlib.crc32(json.dumps(state).encode())
        files.append_jsonl(aside / "state.json", [state])
        # Everything must be on disk even after a power cut, in this order: the logs' lines, the checkpoint
        # itself, its name.
        for path in (*(run / f"{name}.jsonl" for name in logs.LOGS), aside / "state.json", aside):
            if path.exists():
                files.sync(path)
        remove([folder] if folder.exists() else [])
        aside.rename(folder)
        files.sync(folder.parent)
        kept = best(run) if keep_best else None
        remove(f for f in steps(run)[:-keep] if int(f.name[5:]) != kept)

    named = tensors(nets, optimizers, updates)
    place = {}  # {tensor's name: number of its file}
    size = 0
    guards.check_saved(f"step {step}", named.items())
    try:
        parallel.together(lambda: (folder.parent.mkdir(parents=True, exist_ok=True), clear(folder.parent)))
        for name, tensor in named.items():
            place[name] = 1 + size // FILE_BYTES
            size += parallel.local(tensor).nbytes
        with plain_errors(aside):
            writer = dcp.HuggingFaceStorageWriter(str(aside), place, save_distributed=True)
            dcp.save(named, storage_writer=writer)
        pattern = f"shard-{parallel.rank() + 1:05d}-*"
        written = parallel.together(lambda: [(f.name, files.measure(f)) for f in aside.glob(pattern)],
                                    all_ranks=True)
        parallel.together(publish)
    except OSError:
        if parallel.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)  # the disk may be full
        raise


def after_step(step, last, every, save):
    """Call save() if a checkpoint is due or a signal has come. After a signal, Stopped ends the run."""
    stopped = None
    try:
        signals.stop_if_asked()
    except Stopped as e:
        stopped = e if step < last else None  # after the last step the run may as well finish
    if stopped or step == last or (every and step % every == 0):
        save()
    if stopped:
        raise stopped


def steps(run):
    """The folders of the run's checkpoints, oldest first."""
    found = [f for f in (Path(run) / "checkpoints").glob("step-*") if re.fullmatch("[0-9]+", f.name[5:])]
    return sorted(found, key=lambda f: int(f.name[5:]))


def remove(folders):
    """Delete checkpoints."""
    for folder in folders:
        # It is renamed first, so that a half-removed checkpoint does not count as one.
        delete(folder.rename(folder.with_name(f".{folder.name}.old.part")))


def clear(checkpoints):
    """Delete the remains of half-written and half-removed checkpoints."""
    for left in checkpoints.glob(".step-*.part"):
        delete(left)


def delete(path):
    """Delete a checkpoint's folder. If it is a link or a file, only that is deleted, not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def check(folder):
    """The state of a checkpoint. Raises a ValueError unless all its files are there and as they were written.
    Every rank reads some of the files."""
    def mine():
        file = folder / "state.json"
        files.regular(file)
        state = files.read_json(file)
        crc = state.pop("crc32", None)
        if crc != zlib.crc32(json.dumps(state).encode()):
            raise ValueError(f"{file}: altered: its CRC-32 is not {crc}")
        listed = state.get("files")
        updates = state.get("updates")
        kl_coef = state.get("kl_coef", 0)
        if not (state.get("step") == int(folder.name[5:])
                and type(kl_coef) in (int, float) and abs(kl_coef) < 1e9
                and isinstance(updates, dict)
                and all(type(n) is int and 0 <= n < 2**31 for n in updates.values())
                and isinstance(listed, dict)
                and all(isinstance(x, list) and len(x) == 2 for x in listed.values())):
            raise ValueError(f"{file}: not the state of a checkpoint of this program")
        for name in sorted(listed.keys() ^ ({p.name for p in folder.iterdir()} - {"state.json"})):
            wrong = "no such file, but state.json names it" if name in listed else "not in state.json"
            raise ValueError(f"{folder / name}: {wrong}")
        # By the comparison above, all names are those of files in the folder.
        for name in sorted(listed)[parallel.rank() :: parallel.world_size()]:
            files.regular(folder / name)
            for what, found, expected in zip(("bytes", "CRC-32"), files.measure(folder / name), listed[name]):
                if found != expected:
                    raise ValueError(f"{folder / name}: truncated or altered: {what} {found}, "
                                     f"expected {expected}")
        return state

    return parallel.together(mine, all_ranks=True)[0]


def best(run):
    """The step after which accuracy on held-out problems was best, by metrics.jsonl, and the first of equal
    ones; None if no step was evaluated. Step 0 does not count, since its model is the one given."""
    file = Path(run) / "metrics.jsonl"
    rows = [row for _, row in files.read_jsonl(file, growing=True)] if file.is_file() else []
    found = [(row["eval_accuracy"], -row["step"]) for row in rows
             if files.finite(row.get("eval_accuracy")) and files.finite(row.get("step")) and row["step"] > 0]
    return -max(found)[1] if found else None


def known(run, folders, name):
    """The name of a checkpoint, where "best" becomes that of best(run). Raises a ValueError if it is not one
    of these folders."""
    file = Path(run) / "metrics.jsonl"
    there = ", ".join(f.name for f in folders) or "none"
    if name == "best":
        step = best(run)
        if step is None:
            raise ValueError(f"--checkpoint best: no step of {file} was evaluated (ppo --eval-data); "
                             f"there are checkpoints {there}")
        name = f"step-{step:06d}"
        if name not in [f.name for f in folders]:
            raise ValueError(f"--checkpoint best: by {file} it is {name}, which has no checkpoint "
                             f"(ppo --keep-best keeps it); there are {there}")
    if name not in [f.name for f in folders]:
        raise ValueError(f"--checkpoint {name}: not one of {there} in {Path(run) / 'checkpoints'}")
    return name


def find(run, name=None):
    """(folder, state) of the run's newest checkpoint, or of the named one; None if the run has none yet. If
    it is damaged, a ValueError is raised before anything is loaded, and it names an earlier one that is
    good."""
    folders = parallel.together(lambda: steps(run))[0]
    if name:
        name = parallel.together(lambda: known(run, folders, name))[0]
        folders = [f for f in folders if int(f.name[5:]) <= int(name[5:])]
    if not folders:
        return None
    error = None
    for folder in reversed(folders):
        try:
            state = check(folder)
        except (ValueError, OSError) as e:
            error = error or e
            continue
        if error:
            raise ValueError(f"{error}; {folder.name} is good: continue from there with "
                             f"--resume {run} --checkpoint {folder.name}")
        return folder, state
    raise ValueError(f"{error}; no checkpoint before it is good")


def load(named, folder):
    """Fill the tensors {name: tensor} from a checkpoint, which any number of ranks may have written."""
    # DCP's warnings repeat the error as a traceback.
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)
    with plain_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # export loads without other processes
        dcp.load(named, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))


def resume(run, nets, optimizers, found):
    """Load the checkpoint that find() returned and cut the logs back to its step. Without a checkpoint the
    run starts from the beginning. Returns the state."""
    folder, state = found or (None, dict(step=0, updates=dict.fromkeys(nets, 0)))
    if folder:
        if not nets.keys() <= state["updates"].keys():
            raise ValueError(f"{folder / 'state.json'}: updates of {', '.join(state['updates'])}, "
                             f"expected {', '.join(nets)}")
        for name in nets:
            if state["updates"][name]:
                make_state(optimizers[name], state["updates"][name])
        load(tensors(nets, optimizers, state["updates"]), folder)
    parallel.together(lambda: rewind(Path(run), state["step"]))
    return state
