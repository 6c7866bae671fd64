"""The first table of a report: the outcome of runs, short enough to be read in ten seconds.

A line is a run of sft or ppo, with its seeds taken together: what was run, and the accuracy and length of its
responses before and after. Evaluated models that belong to none of the runs have lines of their own.
"""
import math
import os
from pathlib import Path

from lib import files

# Flags of an evaluation that may differ between evaluations whose numbers are compared.
COMPARABLE = {"command", "run", "model", "data", "seed", "dtype", "slots", "kv_gb", "sampler", "shard_ranks"}


def short(path):
    """A short name for a model or a file: sft for runs/sft/model."""
    parts = [part for part in Path(str(path)).parts if part != "model"] or [str(path)]
    return files.visible(parts[-1], 60)


def place(folder, flags, path):
    """The location of a path in a run's flags. It is relative to the folder where the command was started,
    which follows from the run's own folder unless that was renamed."""
    here = Path(folder).parts
    own = Path(os.path.normpath(str(flags.get("run")))).parts
    start = Path(*here[:-len(own)]) if here[-len(own):] == own else ""
    return os.path.normpath(os.path.join(start, str(path)))


def point(value, error, tokens, model=None):
    return {"value": value, "error": error, "tokens": tokens, "model": model}


def evaluated(run, evals, root):
    """What evaluations measured for the models that a run started from and made: one entry for each problem
    file (and number of samples, temperature ...)."""
    flags = run["flags"]
    folder = os.path.join(root, run["name"])
    ends = {place(folder, flags, f"{flags.get('run')}/model"): "after", f"{folder}/model": "after"}
    if not flags.get("from_scratch"):
        ends[place(folder, flags, flags.get("model"))] = "before"
    found = {}
    for e in evals:
        where = os.path.join(root, e["name"])
        same = {k: str(v) for k, v in e["flags"].items() if k not in COMPARABLE}
        same["data"] = place(where, e["flags"], e["flags"].get("data"))
        for model in e["models"]:
            end = ends.get(place(where, e["flags"], model["model"]))
            if end:
                s = model["groups"]["all"]
                new = {"on": measure(e, s), "quantity": "accuracy", "before": None, "after": None}
                entry = found.setdefault(tuple(sorted(same.items())), new)
                which = [e["name"], model["model"]]
                entry[end] = point(s["accuracy"], s["standard_error"], s["tokens"], which)
    return [entry for entry in found.values() if entry["after"]]


def measure(e, summary):
    """The problems that an evaluation used, in words."""
    samples = e["flags"].get("samples", 1)
    return (f"{summary['problems']} problems of {short(e['flags'].get('data'))}"
            + (f", {samples} samples each" if samples != 1 else ""))


def logged(run, rows):
    """What a run's own log says about its first and last step: results on held-out problems if it was
    evaluated during training, else those of its rollouts, which use training problems; for SFT the loss."""
    heldout = f"held-out problems of {short(run['flags'].get('eval_data'))}"
    for quantity, key, on in (("accuracy", "eval_accuracy", heldout), ("accuracy", "accuracy", "rollouts"),
                              ("accuracy", "math_accuracy", "rollouts, by the mathematics verifier"),
                              ("reward", "reward", "reward of the rollouts"),
                              ("loss", "loss", "loss on the demonstrations")):
        at = [row for row in rows if files.finite(row.get(key))]
        if at:
            error, tokens = ("eval_standard_error", "eval_tokens") if key == "eval_accuracy" else (None, None)
            ends = [point(row[key], row.get(error), row.get(tokens or "response_length")) for row in at]
            first = at[0]["step"]
            steps = f"steps {first:,} and {at[-1]['step']:,}" if len(at) > 1 else f"step {first:,}"
            return {"on": f"{on}, {steps}", "quantity": quantity, "after": ends[-1],
                    "before": ends[0] if len(ends) > 1 else None}
    return {"on": "", "quantity": "", "before": None, "after": None}


def what(runs, rows):
    """What was run, in words. The runs differ only by their seed; rows: the log of the first one."""
    flags = runs[0]["flags"]
    done = rows[-1]["step"]
    planned = flags["steps"] if type(flags.get("steps")) is int else done
    words = [f"{'SFT' if flags.get('command') == 'sft' else 'PPO'} of {short(flags.get('model'))} on "
             f"{short(flags.get('data'))}",
             f"{done:,} steps" if planned == done else f"{done:,} of {planned:,} steps"]
    words += ["stopped"] if runs[0]["state"] == "stopped" else []
    if flags.get("reward"):
        words.append(f"reward {short(flags['reward'])}")
    elif "exploration" in flags:
        words.append(f"exploration {files.visible(flags['exploration'])}")
    words.append(f"{len(runs)} seeds" if len(runs) > 1 else f"seed {files.visible(flags.get('seed'))}")
    return ", ".join(words)


def together(points):
    """The mean over seeds. If there are several, the standard error is that of this mean."""
    if len(points) == 1 or not all(points):
        return points[0] if len(points) == 1 else None
    values = [p["value"] for p in points]
    tokens = [p["tokens"] for p in points]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return point(mean, error, sum(tokens) / len(tokens) if all(map(files.finite, tokens)) else None)


def results(runs, evals, logs, root):
    """The lines of the table. logs: {run's name: its rows}; root: the folder that the runs' names start
    from."""
    lines = {}
    for run in runs:
        found = evaluated(run, evals, root) or [logged(run, logs[run["name"]])]
        for number, entry in enumerate(found):
            lines.setdefault((run["group"], entry["on"], number), []).append((run, entry))
    out = []
    told = []
    for (group, on, _), members in lines.items():
        several = [run for run, _ in members]
        seconds = [run["x"]["seconds"][-1] for run in several]
        entries = [entry for _, entry in members]
        told += [p["model"] for entry in entries for p in (entry["before"], entry["after"]) if p]
        out.append({"group": group, "name": several[0]["label"], "on": on, "quantity": entries[0]["quantity"],
                    "what": what(several, logs[several[0]["name"]]),
                    "before": together([e["before"] for e in entries]),
                    "after": together([e["after"] for e in entries]),
                    "seconds": sum(seconds) / len(seconds) if all(map(files.finite, seconds)) else None})
    for e in evals:
        for model in e["models"]:
            s = model["groups"]["all"]
            if [e["name"], model["model"]] not in told:
                out.append({"group": None, "name": short(model["model"]), "on": measure(e, s), "what": "",
                            "quantity": "accuracy", "before": None, "seconds": None,
                            "after": point(s["accuracy"], s["standard_error"], s["tokens"])})
    return out
