"""Kill a recipe repeatedly, and check that its results do not differ from those of an unbroken run.

    python -m tests.tools.kill --kills 20 --ranks 1 2 --out FOLDER         (--seed picks the moments)

It runs SFT, PPO and evaluation of a tiny model on --ranks processes: once unbroken, then once with --kills SIGKILLs at random moments,
each followed by --resume. In the end metrics.jsonl, rollouts.jsonl, tokens.jsonl, the evaluation's outputs and every file of the
models must be equal byte for byte. It prints a line of JSON with the kills by phase, and exits with 1 if anything differs.

To learn the phase of a kill, the processes are started through this file (kill.py --child), which records which of rlsp.py's functions
is running; rlsp.py itself knows nothing of it. Every third kill hits one of several processes, not all of them.
"""
import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny"
SAME = ("metrics.jsonl", "rollouts.jsonl", "tokens.jsonl", "outputs-1.jsonl", "outputs-2.jsonl", "summary.json", "model/*")


# ---- the child: rlsp.py with its phases written down

def child(words):
    sys.path.insert(0, str(ROOT))
    import ppo
    import rlsp
    from lib import checkpoint, evaluation, hf
    file = Path(os.environ["KILL_PHASES"]) / os.environ.get("RANK", "0")

    def show(name):
        aside = file.with_name(f".{file.name}")
        aside.write_text(f"{os.getpid()} {name}")
        aside.rename(file)

    def watched(place, function, name):
        inner = getattr(place, function)
        def call(*args, **kwargs):
            current.append(name)
            show(name)
            try:
                return inner(*args, **kwargs)
            finally:
                current.pop()
                show(current[-1])
        setattr(place, function, call)

    current = ["startup"]
    show("startup")
    for place, function, name in (
            (rlsp, "sft", "SFT"), (ppo.Trainer, "train", "logs"), (ppo.Trainer, "rollout", "rollout"), (ppo.Trainer, "experience", "scoring"),
            (ppo.Trainer, "update", "update"), (ppo.Trainer, "resume", "resume"), (checkpoint, "save", "checkpoint"),
            (evaluation, "evaluate", "evaluation"), (hf, "save", "model")):
        watched(place, function, name)
    sys.argv = ["rlsp.py", *words]
    rlsp.main()


# ---- the parent

def alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def launch(words, ranks, phases):
    shutil.rmtree(phases, ignore_errors=True)
    phases.mkdir(parents=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, str(Path(__file__).resolve()), "--child", *map(str, words)], stdout=subprocess.DEVNULL,
                            stderr=open(phases.with_name("stderr.txt"), "ab"), stdin=subprocess.DEVNULL,
                            env=os.environ | {"KILL_PHASES": str(phases), "OMP_NUM_THREADS": "1"})


def look(phases, ranks):
    """[(pid, phase)] of the ranks that have begun."""
    found = []
    for rank in range(ranks):
        with contextlib.suppress(OSError):
            pid, name = (phases / str(rank)).read_text().split()
            found.append((int(pid), name))
    return found


def run_or_kill(words, ranks, phases, moment=None, one=False):
    """Run to the end; or, with moment = (phase, n, seconds), SIGKILL everything (or one process) so long after the phase is seen to begin
    for the nth time. Returns (exit status or None, the phase that the kill hit)."""
    process, times, last, due, hit = launch(words, ranks, phases), 0, None, None, None
    while process.poll() is None:
        now = look(phases, ranks)
        if moment and hit is None and len(now) == ranks:
            if now[0][1] != last:
                last = now[0][1]
                times += last == moment[0]
            if due is None and times == moment[1]:
                due = time.monotonic() + moment[2]
            if due is not None and time.monotonic() >= due:
                hit = (look(phases, ranks) or now)[0][1]
                for pid in [random.choice(now)[0]] if one and ranks > 1 else [process.pid, *(pid for pid, _ in now)]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        time.sleep(0.001)
    while any(alive(pid) for pid, _ in look(phases, ranks)):
        time.sleep(0.01)
    return process.returncode if hit is None else None, hit


def stages(out, data, steps):
    """(folder, rlsp.py's words, phases to kill in that come up again and again, and those of the end)."""
    return [
        ("s", ["sft", "--model", TINY / "model", "--from-scratch", "--data", data, "--out", out / "s", "--lr", "3e-3", "--batch", "8",
               "--epochs", "1", "--dtype", "float32", "--save-every", "3"], ["SFT", "checkpoint"], ["model"]),
        ("p", ["ppo", "--model", out / "s/model", "--data", TINY / "train.jsonl", "--out", out / "p", "--steps", steps, "--rollout-batch", "8",
               "--train-batch", "4", "--max-response", "32", "--freeze-steps", "1", "--dtype", "float32", "--save-every", "2", "--lr", "1e-4",
               "--critic-lr", "1e-3", "--temperature", "1"], ["rollout", "scoring", "update", "checkpoint", "logs", "startup"], ["model"]),
        ("e", ["eval", "--model", out / "s/model", out / "p/model", "--data", TINY / "test.jsonl", "--out", out / "e", "--limit", "24",
               "--max-response", "48", "--dtype", "float32", "--temperature", "1"], ["evaluation", "startup"], [])]


def same(a, b):
    """Names of files that differ between two folders of runs."""
    files = {f.relative_to(root) for root in (a, b) for pattern in SAME for f in root.glob(f"*/{pattern}")}
    return sorted(str(f) for f in files if not ((a / f).is_file() and (b / f).is_file()) or
                  (a / f).read_bytes().replace(str(a).encode(), b"") != (b / f).read_bytes().replace(str(b).encode(), b""))


def trial(out, ranks, kills, seed, steps=16, model=None):
    """The recipe twice on this number of ranks, the second time with kills. model: PPO from this one alone. Returns the result's line."""
    random.seed(seed)
    started, hits = time.monotonic(), collections.Counter()
    data = out / "sft.jsonl"
    data.write_text("".join((TINY / "sft.jsonl").read_text().splitlines(True)[:128]))
    for name in ("whole", "broken"):
        for stage, words, often, end in stages(out / name, data, steps):
            if model and stage != "p":
                continue
            words = [model or word if word == out / name / "s/model" else word for word in words]
            wanted = kills if model else -(-kills * {"s": 4, "p": 14, "e": 6}[stage] // 20)  # some moments may not come
            wanted = wanted if name == "broken" else 0
            left = [(phase, 1 if phase in ("startup", "evaluation") else random.randint(1, 2)) for phase in (often * wanted)[: wanted - len(end)]]
            left += [(phase, 1) for phase in end]
            random.shuffle(left)
            left = sorted(left, key=lambda x: x[0] in end)[:wanted]
            while True:
                run = out / name / stage
                again = [words[0], "--resume", run] if (run / "config.json").is_file() else words
                moment = (*left[0], random.choice((0.0, random.uniform(0, 0.05), random.uniform(0, 0.3)))) if left else None
                status, hit = run_or_kill(again, ranks, out / "phases", moment, one=sum(hits.values()) % 3 == 2)
                if hit is None:
                    if status:
                        raise RuntimeError(f"{name}/{stage}: exit status {status}:\n" + (out / "stderr.txt").read_text(errors="replace")[-3000:])
                    break
                hits[f"{words[0]}: {hit}"] += 1
                left.pop(0)
    return {"ranks": ranks, "kills": sum(hits.values()), "by_phase": dict(sorted(hits.items())), "differ": same(out / "whole", out / "broken"),
            "lines": {str(f.relative_to(out / "broken")): len(f.read_text().splitlines()) for f in sorted((out / "broken").glob("*/*.jsonl"))},
            "seed": seed, "seconds": round(time.monotonic() - started)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    args = parser.parse_args()
    bad = False
    for ranks in args.ranks:
        out = args.out.resolve() / f"ranks-{ranks}"
        out.mkdir(parents=True)
        result = trial(out, ranks, args.kills, args.seed)
        print(json.dumps(result), flush=True)
        bad |= bool(result["differ"]) or result["kills"] < args.kills
    sys.exit(bad)


if __name__ == "__main__":
    child(sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
