"""Parts of the command line: the flags of a resumed run, a run's folder, how a process ends."""
import contextlib
import dataclasses
import errno
import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lib import files, guards, hf, parallel, tracking
from lib.flags import REQUIRED, checked, option
from lib.signals import REQUEUE, Stopped, signals

ROOT = Path(__file__).resolve().parents[1]
SHARED_WAIT = 20.0  # seconds within which a file that one node wrote must be visible on the others


# ---------------------------------------------------------------------------------------------------- flags

def read_flags(parser, commands, words):
    """The command line as an instance of its command's dataclass. With --resume RUN, flags that are not given
    come from RUN/config.json."""
    given = vars(parser.parse_args(words))
    flags = commands[given.pop("command")]
    # config.json records what auto became, so that a resumed run keeps it on any machine
    if given.get("dtype") == "auto":
        given["dtype"] = parallel.compute_type()
    if "resume" in given:
        given = resumed(flags, given)
    missing = [option(f) for f in dataclasses.fields(flags) if f.default is REQUIRED and f.name not in given]
    if missing:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    args = flags(**given)
    if getattr(args, "dtype", "") == "auto":
        args.dtype = parallel.compute_type()
    return args


def resumed(flags, given):
    """The flags in the run's config.json, updated by those given now, which may differ only as each flag's
    `resume` allows."""
    run = given["resume"]
    if not run:
        raise ValueError(f"--resume: expected the run's folder: rlsp.py {flags.command} --resume RUN")
    file = Path(run) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected the folder of a run to resume "
                                "(without this file the run had not begun: start it again)")
    if Path(given.setdefault("run", run)) != Path(run):
        raise ValueError(f"--out {given['run']}: the run goes on in its own folder, --resume {run}")
    saved = saved_flags(flags, file)
    for f in dataclasses.fields(flags):
        how, then, now = f.metadata["resume"], saved.get(f.name, f.default), given.get(f.name)
        if f.metadata["again"] and then and f.name not in given:
            raise ValueError(f"--resume: the run has {option(f)} {then}; "
                             "give it again, since it is not taken from a file")
        if f.name not in given or may_become(how, then, now):
            continue
        more = f" (--{f.name} may only grow)" if how == "longer" else ""
        raise ValueError(f"--resume: {f.name} is {now!r}, but {run} was started with {then!r}{more}")
    return saved | given


def check_ranks(args):
    """Raise a ValueError on all ranks if their flags differ."""
    flags = parallel.gather({"the command": args.command} | dataclasses.asdict(args))
    for rank, other in enumerate(flags):
        for name, value in other.items():
            if flags[0].get(name) != value:
                here, there = f"{flags[0].get(name)!r:.60} on rank 0", f"{value!r:.60} on rank {rank}"
                error = ValueError(f"{name} is {here} and {there}, expected the same flags on all ranks")
                error.everywhere = True
                raise error


def may_become(how, then, now):
    """Whether a flag may be `now` in a run that was started with `then`. For "content" flags, check_inputs
    compares the contents."""
    if how == "longer":
        return now >= then
    return now == then or how in ("any", "once") or how == "content" and bool(now) == bool(then)


def saved_run(folder):
    """A run's config.json. Runs of older versions have no `inputs` and `changes`."""
    file = Path(folder) / "config.json"
    config = {"inputs": {}, "changes": []} | files.read_json(file)
    for name, kind in {"flags": dict, "inputs": dict, "changes": list}.items():
        if type(config.get(name)) is not kind:
            raise ValueError(f"{file}: {name} is {config.get(name)!r:.60}, expected {kind.__name__}")
    return config


def saved_flags(flags, file):
    """The flags in a run's config.json. Each value is checked as if it were given on the command line."""
    found = saved_run(file.parent)["flags"]
    if found.get("command") != flags.command:
        raise ValueError(f"{file}: not a run of rlsp.py {flags.command}")
    fields = {f.name: f for f in dataclasses.fields(flags)}
    saved = {}
    for name, value in found.items():
        if name != "command" and name not in fields:
            raise ValueError(f"{file}: flags: {name!r:.60} is not a flag of rlsp.py {flags.command}")
        if name != "command" and fields[name].metadata["resume"] != "once":
            try:
                saved[name] = checked(fields[name], value)
            except ValueError as e:
                raise ValueError(f"{file}: flags: {name}: {e}") from None
    return saved


# ---------------------------------------------------------------------------------------------------- input

@contextlib.contextmanager
def checked_input():
    """Report errors in this block as bad input: one line, exit status 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        leave(2, f"error: {e}", e)


def kept_flags(args):
    """The flags of a run that are kept in config.json."""
    return {"command": args.command} | {f.name: getattr(args, f.name) for f in dataclasses.fields(args)
                                        if f.metadata["resume"] != "once"}


def commit():
    """The git commit of this program's folder, or None without git or a repository that git trusts."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def new_run(args, found=None):
    """Create the run's folder and its config.json: every flag, sizes and CRC-32 of the inputs, versions, git
    commit. A resumed run updates its flags and inputs and records under `changes` what they were until the
    step of the checkpoint `found`. Only rank 0 writes, and every rank checks that it sees the file."""
    folder = Path(args.run)

    def write():
        folder.mkdir(parents=True, exist_ok=True)
        files.lock(folder)  # for all ranks of this job
        must_be_new(args)  # another run may have come and gone since the first check
        versions = {
            "python": platform.python_version(), "torch": torch.__version__, "git": commit(),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
                       f"{parallel.world_size()} process(es), {parallel.memory()[2]}"}
        config = {"flags": kept_flags(args), "inputs": inputs(args), "versions": versions}
        files.write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")

    def update():
        config = saved_run(folder)
        now = {"flags": kept_flags(args), "inputs": inputs(args)}
        now["flags"]["run"] = config["flags"].get("run")  # a run whose folder was moved is the same run
        then = {part: {name: config[part].get(name) for name, value in now[part].items()
                       if config[part].get(name) != value} for part in now}
        if any(then.values()):
            step = found[1]["step"] if found else 0
            for name in then["flags"].keys() & {"steps", "epochs"}:
                print(f"{folder}: {name} is {getattr(args, name)} after {then['flags'][name]} until step "
                      f"{step}; the schedules now go to the new end", flush=True)
            now["changes"] = [*config["changes"], {"until_step": step} | then]
            files.write_text(folder / "config.json", json.dumps(config | now, indent=2) + "\n")

    def marks():
        """What this rank sees of the files that identify the run: the lock file names rank 0's process."""
        paths = folder / "config.json", folder / files.LOCK
        found = [path.read_bytes() if path.is_file() else b"" for path in paths]
        return found[0], found[1].split(b', "beat"')[0].rstrip(b"}")

    def look():
        until = time.monotonic() + SHARED_WAIT
        while marks() != first:
            if time.monotonic() > until:
                raise ValueError(
                    f"{folder.absolute()}: rank {parallel.rank()} (on {socket.gethostname()}) does not see "
                    f"the config.json that rank 0 (on {host}) wrote; the run's folder must be one that all "
                    "nodes share")
            time.sleep(0.5)
            if folder.is_dir():
                os.listdir(folder)  # makes network file systems refresh their cache

    parallel.together(update if args.resume else write)
    if parallel.world_size() > 1:
        first, host = parallel.together(lambda: (marks(), socket.gethostname()))[0]
        parallel.together(look, all_ranks=True)
    tracking.start(args, folder, found[1]["step"] if found else 0)
    return folder


def inputs(args):
    """{flag: bytes and CRC-32 of what it names}, for the "content" flags."""
    named = {f.name: getattr(args, f.name) for f in dataclasses.fields(args)
             if f.metadata["resume"] == "content"}
    return {name: measure(value) for name, value in named.items() if value}


def measure(named):
    """[bytes, CRC-32] of a file, followed by the function's name for FILE.py:FUNCTION; {file: [bytes,
    CRC-32]} for a model folder."""
    if isinstance(named, list):
        return [measure(one) for one in named]
    if Path(named).is_dir():
        return hf.measure(named)
    if Path(named).exists():
        return files.measure(named)
    file, _, function = named.rpartition(":")
    return [*files.measure(file), function]


def check_inputs(args):
    """Raise a ValueError if a resumed run's inputs are not those it was started with, unless --changed-input
    is given. Their paths may have changed."""
    if not args.resume or args.changed_input:
        return
    saved = saved_run(args.run)["inputs"]
    for name, found in inputs(args).items():
        for part, then, now in differences(saved.get(name, found), found):
            where = "/".join([str(getattr(args, name)), *part])
            raise ValueError(f"--resume: {where} is not what the run was started with: [bytes, CRC-32] is "
                             f"{now}, it was {then!r:.60}; --changed-input continues anyway")


def differences(then, now, path=()):
    """(path of keys, then, now) for each difference between two nested dicts. Runs of older versions did not
    record hf.PROMPT_FILES."""
    if isinstance(now, dict) and isinstance(then, dict):
        known = {key for key in now if key in then or key not in hf.PROMPT_FILES}
        for key in sorted(known | then.keys()):
            yield from differences(then.get(key), now.get(key), (*path, key))
    elif then != now:
        yield path, then, now


WRITTEN = ("*.json", "*.jsonl", "*.safetensors", "done", "stopped", "model", "model/*", "checkpoints",
           "checkpoints/*", "tensorboard", "wandb")
FOLDERS = ("model", "checkpoints", "tensorboard", "wandb")  # those of them that are folders


def must_be_new(args):
    """Check the run's folder. For a new run it must not exist, or be empty, as a kill before config.json was
    written leaves it. A resumed run's folder, which someone else may have written, must have no links where
    this program writes, since they would lead it elsewhere."""
    folder = Path(args.run)
    if vars(args).get("checkpoint") and not args.resume:
        raise ValueError(f"--checkpoint {args.checkpoint}: expected --resume RUN with it")
    if args.resume:
        for path in sorted(path for pattern in WRITTEN for path in folder.glob(pattern)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise ValueError(f"{path}: expected a file or a folder, not a link")
            if path.parent == folder and path.is_dir() != (path.name in FOLDERS):
                raise ValueError(f"{path}: expected a {'folder' if path.name in FOLDERS else 'file'}")
    if not args.resume and os.environ.get("RANK", "0") == "0" and folder.exists():
        if not folder.is_dir() or {f.name for f in folder.iterdir()} - {".config.json.part", files.LOCK}:
            raise FileExistsError(f"{folder}: exists already; nothing was overwritten; "
                                  f"give another --out, or --resume {folder}")


def stopped(args):
    """Write RUN/stopped, for those who do not see the exit status, and return a line that says how to
    continue."""
    run, line = vars(args).get("run"), f"stopped by {signals.name()}"
    if not run or args.command not in ("sft", "ppo", "eval") or not (Path(run) / "config.json").is_file():
        return line
    line += f"; go on with: rlsp.py {args.command} --resume {run}"
    try:
        if parallel.rank() == 0:
            files.write_text(Path(run) / "stopped", signals.name() + "\n")
    except OSError as e:
        line += f" ({Path(run) / 'stopped'} could not be written: {e.strerror})"
    return line


def planned(args):
    """The planned length of the run, as RUN/done records it. If a longer run is asked for, it is not done."""
    return json.dumps({f.name: getattr(args, f.name) for f in dataclasses.fields(args)
                       if f.metadata["resume"] == "longer"}) + "\n"


def is_done(args):
    """Whether --resume has nothing left to do. With --checkpoint there is always something."""
    if not args.resume or getattr(args, "checkpoint", None):
        return False
    mark = Path(args.run) / "done"
    if not mark.is_file() or mark.read_bytes() != planned(args).encode():
        return False
    results = ["summary.json"] if args.command == "eval" else ["model/config.json", "model/tokenizer.json"]
    missing = [name for name in results if not (mark.parent / name).is_file()]
    if missing:
        print(f"{files.visible(mark.parent, 1000)}: {missing[0]} was removed after the run was done; it is "
              "made again", flush=True)
    return not missing


@contextlib.contextmanager
def exit_statuses(args):
    """End a command with status 0, or with one line and the status that rlsp.py's docstring promises."""
    try:
        with tracking.closing():
            yield
        if dist.is_initialized():
            parallel.stop()
    except Stopped as e:
        e.everywhere = True
        leave(REQUEUE, stopped(args), e)
    except (guards.TrainingError, OSError, SafetensorError) as e:
        leave(1, e, e)
    except RuntimeError as e:
        refused = [n for n in (errno.EMFILE, errno.ENFILE, errno.ENOSPC) if os.strerror(n) in str(e)]
        if refused:  # the system refused something to a library that does not raise OSError
            leave(1, e)
        if parallel.world_size() == 1 or not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        leave(1, f"rank {parallel.rank()}: lost another rank: {str(e).splitlines()[0]}")
    finally:
        files.release()
        if parallel.world_size() == 1 and dist.is_initialized():
            dist.destroy_process_group()


def leave(status, line="", error=None):
    """End the process. If every rank has the error, only rank 0 prints it. Another rank may be dead, so
    nothing here may wait for it, and torch's own teardown is skipped."""
    if line and (parallel.rank() == 0 or not getattr(error, "everywhere", False)):
        print(f"rlsp.py: {files.visible(line, 1000)}", file=sys.stderr)  # one line, whatever it quotes
    if parallel.world_size() > 1:
        if isinstance(error, Exception) and "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)  # torchrun then shows it in its summary
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
