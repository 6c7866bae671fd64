"""The command line's parts: flags as dataclass fields, checks of what was given, a run's folder, how a process ends."""
import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import field
from pathlib import Path

import torch

from lib import files, hf, parallel

ROOT = Path(__file__).resolve().parents[1]


def flag(default, help, low=None, high=None, choices=None, kind=None):
    """A dataclass field that rlsp.py turns into a command-line flag; low and high are inclusive."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices, kind=kind or type(default)))


def number(kind, low=None, high=None):
    """An argparse type: a finite number of the kind within [low, high]."""
    def parse(text):
        value = kind(text)
        if (low is not None and value < low) or (high is not None and value > high) or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is out of range, expected {'' if low is None else f'at least {low}'}"
                                             f"{' and ' if None not in (low, high) else ''}{'' if high is None else f'at most {high}'}")
        return value
    parse.__name__ = kind.__name__
    return parse


@contextlib.contextmanager
def checked_input():
    """What goes wrong in here is the caller's input: one line, exit status 2."""
    try:
        yield
    except (ValueError, OSError) as e:
        leave(2, f"error: {e}", e)


def check_prompts(path, rows, tokenizer, allowed):
    """The length of the longest prompt, tokens; a ValueError names the first line whose prompt is longer than allowed."""
    lengths = [len(hf.chat_prompt(tokenizer, row["problem"])) for row in rows]
    for row, n in zip(rows, lengths):
        if n > allowed:
            raise ValueError(f"{path}:{row['line']}: the prompt has {n} tokens, expected at most {allowed} (--max-prompt)")
    return max(lengths)


def check_length(folder, tokens):
    allowed = hf.read_config(folder).max_position_embeddings
    if tokens > allowed:
        raise ValueError(f"{folder}/config.json: max_position_embeddings is {allowed}, but prompt and response may take {tokens} tokens")


def new_run(args):
    """Make the run's folder with config.json: every flag, versions, git commit. Rank 0 alone does it, the others wait."""
    def write():
        folder = Path(args.run)
        folder.mkdir(parents=True, exist_ok=True)  # must_be_new has looked
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "git": git.stdout.strip() or None,
                    "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {parallel.world_size()} process(es), {parallel.memory()[2]}"}
        files.write_text(folder / "config.json", json.dumps({"flags": vars(args), "versions": versions}, indent=2, default=str) + "\n")

    if not args.resume:
        parallel.together(write)
    return Path(args.run)


def must_be_new(args):
    """A new run's folder must not exist. (An empty one may: a kill before config.json was written leaves it.)"""
    folder = Path(args.run)
    if not args.resume and os.environ.get("RANK", "0") == "0" and folder.exists():
        if not folder.is_dir() or {f.name for f in folder.iterdir()} - {".config.json.part"}:
            raise FileExistsError(f"{folder}: exists already; nothing was overwritten, give another --out, or --resume {folder}")


def leave(status, line="", error=None):
    """End the process; of an error that every rank has, rank 0 speaks. One of several may be dead: nothing may wait for it, torch's own
    teardown neither."""
    if line and (parallel.rank() == 0 or not getattr(error, "everywhere", False)):
        print(f"rlsp.py: {files.visible(line, 1000)}", file=sys.stderr)  # whatever it quotes, it is one line
    if parallel.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
