"""The report (`rlsp.py report`): everything that runs have logged, in one self-contained HTML file.

This file gathers the data, checks them and cuts them to size; lib/report.html is the page that shows them.
With --csv the curves are also written as a table for spreadsheets and data frames.
"""
import csv
import io
import json
import math
import os
import re
import time
from pathlib import Path

from lib import files
from lib.results import results
from lib.signals import Stopped
import rewards

READ_BYTES = 2**31  # largest log that is read; it is in memory as a whole
TITLE = "<title>RLSP report</title>"  # identifies a page that we wrote
CSV_HEAD = "run,step,cumulative_tokens,cumulative_seconds"  # the first line of a table, which identifies it
LAST_STEP = 10**9  # largest step in a log; beyond 2^53 a browser cannot count
METRICS = 1000  # most logged quantities; the page draws a curve for each
POINTS = 10_000  # points of all curves of a quantity together; one curve has at most a fifth of them
# Bytes of rollouts, and again of tokens, that a report embeds, so that it opens at once and can be e-mailed.
LOG_BYTES = 8_000_000
LIVE_SECONDS = 10  # between two checks of live runs; at least ten times the time for writing the page


def log_rows(path, need):
    """The rows of a log, perhaps of a run in progress. Raises a ValueError unless each row has the keys of
    `need`, {key: type}, and the lists in a row of tokens have the same length."""
    rows = []
    if path.stat().st_size > READ_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {READ_BYTES}")
    for number, row in files.read_jsonl(path, growing=True):
        for key, kind in need.items():
            if type(row.get(key)) is not kind:
                found = files.visible(repr(row.get(key)), 60)
                raise ValueError(f"{path}:{number}: {key} is {found}, expected {kind.__name__}")
        if "step" in need and not 0 <= row["step"] <= LAST_STEP:
            raise ValueError(f"{path}:{number}: step is {row['step']}, expected at most {LAST_STEP}")
        lists = [x for x in row.values() if isinstance(x, list)]
        if "tokens" in need and any(len(x) != len(row["tokens"]) for x in lists):
            raise ValueError(f"{path}:{number}: lists of different lengths, expected one number per token")
        rows.append(row)
    return rows


def outputs(file, samples):
    """The rows of an evaluation's outputs-N.jsonl, with a list of `samples` for each quantity."""
    lists = ("correct", "answers", "tokens", "truncated", "responses")
    rows = log_rows(file, {"problem": str} | dict.fromkeys(lists, list))
    for number, row in enumerate(rows, 1):
        if any(len(row[key]) != samples for key in lists):
            raise ValueError(f"{file}:{number}: lists of different lengths, expected {samples} samples")
    return rows


def embedded(value):
    """A value as JSON that is safe inside a <script>, since nothing in it opens or closes a tag."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def thinned(rows, size):
    """A selection of rows of about `size` bytes: as many per step as fit, or, if one per step is too many,
    rows of every second, fourth ... step."""
    steps = {}
    for row in rows:
        steps.setdefault(row["step"], []).append((row, len(embedded(row)) + 1))
    each = max(map(len, steps.values()), default=1)
    stride = 1
    while True:
        # Counted from the end, so that the last step stays.
        kept = [pair for pairs in list(steps.values())[::-1][::stride][::-1] for pair in pairs[:each]]
        if sum(length for _, length in kept) < size or (each == 1 and stride >= len(steps)):
            return [row for row, _ in kept]
        if each > 1:
            each = each * 3 // 4
        else:
            stride *= 2


def step_rows(folder):
    """What a run logged in each step: the numbers and texts of metrics.jsonl and timing.jsonl. Nested values
    get a name with a dot."""
    timing = {}
    if (folder / "timing.jsonl").is_file():
        timing = {row.pop("step"): row for row in log_rows(folder / "timing.jsonl", {"step": int})}
    out = []
    for row in log_rows(folder / "metrics.jsonl", {"step": int}):
        row = {"timing": timing.get(row["step"], {})} | row  # older runs have it in metrics.jsonl
        nested = {f"{k}.{name}": v for k, x in row.items() if isinstance(x, dict) for name, v in x.items()}
        out.append({k: v for k, v in (row | nested).items() if files.finite(v) or isinstance(v, str)})
    if not out:
        raise ValueError(f"{folder / 'metrics.jsonl'}: contains no step yet")
    names = {k for row in out for k in row}
    if len(names) > METRICS:
        raise ValueError(f"{folder / 'metrics.jsonl'}: {len(names)} quantities, expected at most {METRICS}")
    return out


def cumulative(rows, flags):
    """What a run had spent by the end of each step, as two lists: tokens (sampled by PPO, trained by SFT) and
    seconds. They are None from the first step for which it is unknown."""
    responses = flags.get("rollout_batch"), flags.get("samples", 1)
    tokens = seconds = 0
    spent = [], []
    for row in rows:
        if row["step"] > 0:  # before the first step nothing was sampled or trained
            new = row.get("tokens")
            if files.finite(row.get("response_length")) and all(map(files.finite, responses)):
                new = round(row["response_length"] * math.prod(responses))
            took = row.get("timing.seconds")
            tokens = tokens + new if files.finite(new) and tokens is not None else None
            seconds = seconds + took if files.finite(took) and seconds is not None else None
        spent[0].append(tokens)
        spent[1].append(seconds)
    return spent


def curves(rows, flags, points):
    """Each quantity of a run as a list over its steps, what had been spent by then, and the number of steps
    that a point averages: a power of two, so that points of runs of different lengths lie at the same
    steps."""
    stride = 1
    while len(rows) > stride * points:
        stride *= 2
    parts = {}
    for i, row in enumerate(rows):
        parts.setdefault((row["step"] - 1) // stride, []).append(i)
    names = dict.fromkeys(k for row in rows for k, v in row.items() if not isinstance(v, str))

    def mean(key, part):
        values = [rows[i][key] for i in part if files.finite(rows[i].get(key))]
        if not values:
            return None
        value = sum(values) / len(values) if len(values) > 1 else values[0]
        return float(f"{value:.6g}") if type(value) is float else value

    metrics = {k: [mean(k, part) for part in parts.values()] for k in names}
    metrics["step"] = [rows[part[-1]]["step"] for part in parts.values()]
    spent = zip(("tokens", "seconds"), cumulative(rows, flags))
    x = {k: [at[part[-1]] for part in parts.values()] for k, at in spent}
    return {"metrics": metrics, "x": x, "stride": stride}


def gather_run(folder, share, points):
    """(what the page shows of a run of sft or ppo: flags, each quantity as a list over the steps, and `share`
    bytes of its texts; the run's rows as they are)."""
    config = files.read_json(folder / "config.json")
    rows = step_rows(folder)
    out = config | curves(rows, config["flags"], points)
    out["state"] = next((mark for mark in ("done", "stopped") if (folder / mark).is_file()), None)
    texts = {"rollouts": {"response": str, "reward": dict}, "tokens": {"tokens": list, "reward": list}}
    for name, need in texts.items():
        file = folder / f"{name}.jsonl"
        found = log_rows(file, {"problem": str, "step": int} | need) if file.is_file() else []
        out[name] = thinned(found, share)
        out[f"{name}_logged"] = len(found)
    return out, rows


def interval(s, samples=1):
    """Wilson's 95 % interval of an accuracy, over problems. The samples of a problem are not independent. The
    variance between problems shows how many independent trials the accuracy is worth, which is at least the
    number of problems. A few problems may agree by chance, so the variance is estimated as if there were four
    more problems, whose samples are completely dependent."""
    p = s["accuracy"]
    z = 1.96
    problems = s["problems"]
    whole = p * (1 - p)  # variance between problems if each had one answer
    between = (problems * (problems - 1) * s["standard_error"] ** 2 + 4 * whole) / (problems + 3)
    n = max(problems, min(problems * samples, problems * whole / between)) if between else problems
    centre = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def gather_eval(folder):
    """The tables of an evaluation, and the behaviours in its responses."""
    config = files.read_json(folder / "config.json")
    flags = config["flags"]
    models = []
    for model, groups in files.read_json(folder / "summary.json").items():
        whole = groups["all"]
        for key in ("problems", "accuracy", "standard_error", "tokens"):
            if not files.finite(whole[key]):
                raise ValueError(f"{key} is {files.visible(repr(whole[key]), 60)}, expected a number")
        number = flags["model"].index(model) + 1  # older evaluations may have a model twice
        rows = outputs(folder / f"outputs-{number}.jsonl", flags["samples"])
        responses = [text for row in rows for text in row["responses"]]
        counts = [rewards.behaviours(text) for text in responses]
        rates = {k: sum(c[k] > 0 for c in counts) / len(counts) for k in rewards.BEHAVIOURS}
        rates["repetition"] = sum(map(rewards.repetition, responses)) / len(responses)
        groups = {k: s | {"interval": interval(s, flags["samples"])} for k, s in groups.items()}
        models.append({"model": model, "rates": rates, "groups": groups})
    return config | {"models": models}


def group_runs(runs, passing, defaults):
    """Give the same `group` and `label` to runs that differ only by their seed, by the model that came from
    this seed, by their evaluation flags and by the `passing` flags. defaults: the defaults of PPO's flags,
    since a run may be older than some of them."""
    groups = {}
    for run in runs:
        flags = (defaults if run["flags"].get("command") == "ppo" else {}) | run["flags"]
        flags = {k: "none" if v is None else str(v) for k, v in flags.items()
                 if k not in ("seed", "run", "model", *passing) and not k.startswith("eval_")}
        groups.setdefault(json.dumps(flags, sort_keys=True), (flags, []))[1].append(run)
    for key, (flags, members) in list(groups.items()):
        # If a seed occurs twice, the models are different ones.
        if len({run["flags"].get("seed") for run in members}) < len(members):
            del groups[key]
            groups |= {f"{key} {run['name']}": (dict(flags), [run]) for run in members}
    for i, (flags, members) in enumerate(groups.values()):
        # The label has as many flags as it takes to tell the group from the others of the same command.
        label = []
        others = [f for f, _ in groups.values()
                  if f is not flags and f.get("command") == flags.get("command")]
        for key, value in flags.items():
            alike = [f for f in others if f.get(key) == value]
            if len(alike) < len(others):
                label.append(f"{key}={value}")
                others = alike
        for run in members:
            run |= {"group": i, "label": ", ".join(label) if label and not others else members[0]["name"]}


def plain_text(value):
    """An untrusted text made safe for a spreadsheet, which takes text that begins with one of these signs for
    a formula, and may split columns at other signs than a comma."""
    return re.sub(r"(^|[,;|'\"])(?=\s*[=+\-@\uff1d\uff0b\uff0d\uff20])", r"\1'", files.visible(value, 1000))


def table(runs):
    """The CSV text of {run's name: (rows, flags)}, with a line for each run and step, as logged."""
    names = dict.fromkeys(k for rows, _ in runs.values() for row in rows for k in row if k != "step")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*CSV_HEAD.split(","), *map(plain_text, names)])
    for run, (rows, flags) in runs.items():
        for row, *spent in zip(rows, *cumulative(rows, flags)):
            values = [row.get(name) for name in names]
            cells = [run, row["step"], *spent, *values]
            writer.writerow([plain_text(x) if isinstance(x, str) else x for x in cells])
    return text.getvalue()


def check_file(path, mark, kind, option):
    """Raise an error unless the path is free or has a file that an earlier report wrote."""
    if os.path.lexists(path):
        files.regular(path)
        with files.reading(path, "rb") as f:
            if mark.encode() not in f.read(2**10):
                raise FileExistsError(f"{path}: exists and is not a {kind}; nothing was overwritten; "
                                      f"give another {option}")


def begun(folder):
    """Whether a folder has something to show. (For a folder that is not a run, write() raises an error.)"""
    log = folder / "metrics.jsonl"
    if not (folder / "config.json").is_file() or (folder / "summary.json").is_file():
        return True
    return log.is_file() and any(files.read_jsonl(log, growing=True))


def ended(folder):
    return any((folder / mark).is_file() for mark in ("done", "stopped"))


def logs_of(folder):
    """A value that changes when one of a run's logs changes."""
    logs = sorted([*folder.glob("*.jsonl"), *folder.glob("*.json")])
    return [(log.name, log.stat().st_mtime, log.stat().st_size) for log in logs]


def write(folders, out, csv_file, passing, defaults, live=None):
    """Read the folders that sft, ppo and eval wrote, and write the page and, if csv_file is not None, the
    table. passing: flags that do not distinguish runs. defaults: those of PPO's flags. live: what a page that
    reloads itself has to know; see follow()."""
    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    check_file(out, TITLE, "report", "--out")
    if csv_file:
        check_file(csv_file, CSV_HEAD, "table of a report", "--csv")
        if csv_file.absolute() == out.absolute():
            raise ValueError(f"--csv is {csv_file}, which is also the page's file; expected another one")
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for folder in folders:
        there = {f for f in ("config.json", "metrics.jsonl", "summary.json") if (folder / f).is_file()}
        if "config.json" not in there or len(there) == 1:
            raise FileNotFoundError(f"{folder}: not a run of sft, ppo or eval: "
                                    "no config.json with metrics.jsonl or summary.json")
    root = os.path.commonpath([folder.parent for folder in folders])
    share = LOG_BYTES // max(1, sum((folder / "rollouts.jsonl").is_file() for folder in folders))
    points = max(POINTS // 50, POINTS // max(5, len(folders)))
    data = {"runs": [], "evals": [], "behaviours": rewards.BEHAVIOURS, "live": live}
    logged = {}
    for folder in folders:
        kind = "runs" if (folder / "metrics.jsonl").is_file() else "evals"
        try:
            found, rows = gather_run(folder, share, points) if kind == "runs" else (gather_eval(folder), None)
            found |= {"flags": dict(found["flags"]), "versions": dict(found["versions"]),
                      "name": os.path.relpath(folder, root)}
            if len(found["flags"]) + len(found["versions"]) > METRICS:
                raise ValueError(f"{folder / 'config.json'}: expected at most {METRICS} flags and versions")
            embedded(found)  # raises its error here, where the run is known
            data[kind].append(found)
            if rows:
                logged[found["name"]] = rows, found["flags"]
        except (KeyError, TypeError, AttributeError, ZeroDivisionError) as e:
            raise ValueError(f"{folder}: not what this program writes: {files.visible(repr(e))}") from None
        except ValueError as e:
            if str(folder) in str(e):
                raise
            # Errors of JSON's writer (a NaN) and of list.index (another model) name no file.
            raise ValueError(f"{folder}: not what this program writes: {files.visible(e)}") from None
    if csv_file and not logged:
        raise ValueError("--csv: expected a run of sft or ppo: an evaluation has no curves")
    group_runs(data["runs"], passing, defaults)
    logs = {name: rows for name, (rows, _) in logged.items()}
    data["results"] = results(data["runs"], data["evals"], logs, root)
    if csv_file:
        files.write_text(csv_file, table(logged))
    files.write_text(out, page.replace("{{DATA}}", embedded(data)))


def follow(folders, out, *how):
    """Call write() repeatedly while one of the runs is going on, and once more when all of them are done or
    stopped, or at Ctrl-C. It writes nothing into the runs and does not lock them."""
    folders = [Path(folder) for folder in folders]
    ready = []
    before = None
    seconds = LIVE_SECONDS
    try:
        while not all(map(ended, folders)):
            ready = [folder for folder in folders if begun(folder)]
            now = [logs_of(folder) for folder in ready]
            if before is None:
                print(f"{files.visible(out, 1000)} shows the runs live until they are done or stopped, or "
                      "Ctrl-C" + ("" if ready else "; waiting for the first step"), flush=True)
            if ready and now != before:
                started = time.monotonic()
                logged = max((log[1] for logs in now for log in logs), default=0)
                write(ready, out, *how, live={"seconds": seconds, "logged": logged})
                seconds = max(LIVE_SECONDS, round(10 * (time.monotonic() - started)))
            before = now
            time.sleep(seconds)
    except Stopped:
        pass
    write(folders if all(map(ended, folders)) else ready or folders, out, *how)
