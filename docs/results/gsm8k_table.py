"""What came out of `bash train.sh gsm8k`: tables, a figure, ten responses before and after, logs to keep.

    python docs/results/gsm8k_table.py RUN [--out FOLDER]

RUN is what train.sh wrote, or a FOLDER that this script made of it. Arms and seeds that are not there (yet)
are left out. Accuracy is that of the test problems, whose samples are drawn at the temperature of training.
A difference is taken problem by problem and its standard error is over problems, so that what a problem is
like cancels. Means over seeds have a standard error over seeds.
"""
import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import experiment  # noqa: E402  (beside this file)
from experiment import ARMS, mean_error, table  # noqa: E402
from lib import files  # noqa: E402

PHASES = ("rollout", "scoring", "update", "copy", "eval")
WAYS = ("sampled", "greedy")
KEPT = ("problem", "answer", "level", "unique_id", "correct", "answers", "tokens", "truncated", "lines")
SHOWN = 10  # responses before and after


# --------------------------------------------------------------------------------------------------------
# What a run has

def evaluations(run):
    """{arm: {seed: {"sampled": rows, "greedy": rows}}}. SFT is the arm "start" with the one seed ""."""
    found = {}
    for folder in [run / "sft-test", *sorted(run.glob("seed-*/*-test"))]:
        if not (folder / "greedy/summary.json").is_file():
            continue
        arm = folder.name.removesuffix("-test")
        place = found.setdefault("start" if arm == "sft" else arm, {})
        place["" if arm == "sft" else folder.parent.name] = {how: evaluation(folder / how) for how in WAYS}
    return {arm: found[arm] for arm in ARMS if arm in found}


def evaluation(folder):
    """The rows of an evaluation, one per problem. lines: how many lines each sample has before its last."""
    found = experiment.rows(folder / "outputs-1.jsonl")
    for row in found:
        row.setdefault("lines", [text.strip().count("\n") for text in row.get("responses", [])])
    return found


def training_runs(run):
    """{arm: {seed: folder}} of the PPO runs that have a log."""
    found = {}
    for file in sorted(run.glob("seed-*/*/metrics.jsonl")):
        found.setdefault(file.parent.name, {})[file.parts[-3]] = file.parent
    return {arm: found[arm] for arm in ARMS if arm in found}


def each_run(runs):
    """(arm, its seed's number, the rows of metrics.jsonl, those of timing.jsonl) of each PPO run."""
    for arm, seeds in runs.items():
        for seed, folder in seeds.items():
            yield (ARMS[arm], number(seed), experiment.rows(folder / "metrics.jsonl"),
                   experiment.rows(folder / "timing.jsonl"))


def number(seed):
    return seed.removeprefix("seed-")


# --------------------------------------------------------------------------------------------------------
# Accuracy

def accuracies(rows):
    """{problem: share of right samples}."""
    return {row["problem"]: sum(row["correct"]) / len(row["correct"]) for row in rows}


def paired(after, before):
    """(mean, standard error) over problems of the difference in accuracy, in points."""
    after = accuracies(after)
    before = accuracies(before)
    return mean_error([100 * (after[problem] - before[problem]) for problem in after])


def points(pair):
    mean, error = pair
    return f"{mean:+.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def samples(rows):
    """(right, answer or None, lines of work, tokens) of each sample."""
    columns = ("correct", "answers", "lines", "tokens")
    return [sample for row in rows for sample in zip(*(row[name] for name in columns))]


def percent(values):
    """A share as a percentage; a dash where there is nothing to take it of."""
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def accuracy_table(found):
    """A line per model: its accuracy, and what that is made of."""
    lines = []
    for arm, seeds in found.items():
        for seed, kinds in seeds.items():
            cells = [ARMS[arm], number(seed)]
            for how in WAYS:
                cells.append(percent(right for right, *_ in samples(kinds[how])))
                before = found["start"][""][how]
                cells.append("" if arm == "start" else points(paired(kinds[how], before)))
            drawn = samples(kinds["sampled"])
            boxed = [right for right, answer, _, _ in drawn if answer is not None]
            worked = [right for right, _, work, _ in drawn if work > 0]
            cells += [percent(answer is not None for _, answer, _, _ in drawn), percent(boxed)]
            cells += [percent(work > 0 for _, _, work, _ in drawn), percent(worked)]
            cells.append(f"{sum(tokens for *_, tokens in drawn) / len(drawn):.1f}")
            lines.append(cells)
    return table(["model", "seed", "right %, sampled", "over SFT", "right %, greedy", "over SFT", "boxed %",
                  "right of these %", "with lines of work %", "right of these %", "tokens"], lines)


def verdicts(found):
    """In how many seeds each arm is over SFT by three standard errors."""
    lines = []
    for arm, seeds in found.items():
        for how in WAYS if arm != "start" else ():
            pairs = [paired(kinds[how], found["start"][""][how]) for kinds in seeds.values()]
            passed = sum(mean > 0 and mean >= 3 * error for mean, error in pairs)
            lines.append(f"- {ARMS[arm]}, {how}: over SFT by at least 3 standard errors in {passed} of "
                         f"{len(pairs)} seeds")
    return "\n".join(lines)


def arms_table(found):
    """Each arm against outcome-only PPO of the same seed."""
    base = found.get("none", {})
    lines = []
    for arm, seeds in found.items():
        both = [seed for seed in seeds if seed in base]
        for how in WAYS if arm not in ("start", "none") and both else ():
            pairs = {number(seed): paired(seeds[seed][how], base[seed][how]) for seed in both}
            each = ", ".join(f"{seed}: {points(pair)}" for seed, pair in pairs.items())
            lines.append([ARMS[arm], how, each, points(mean_error([mean for mean, _ in pairs.values()]))])
    return table(["minus outcome only", "", "seed: over problems", "over seeds"], lines)


def votes(found):
    """SFT's majority at equal tokens; all seeds have the same SFT model."""
    drawn = {arm: {seed: kinds["sampled"] for seed, kinds in seeds.items()} for arm, seeds in found.items()}
    start = drawn["start"][""]
    experiment.votes(drawn | {"start": {seed: start for seeds in drawn.values() for seed in seeds}})


def score_of_the_package(found):
    """Whether reasoning-gym's scorer judges each answer as rewards.verify did, where it is installed."""
    try:
        import reasoning_gym
    except ImportError:
        return "reasoning-gym is not installed: its scorer was not asked."
    score = reasoning_gym.get_score_answer_fn("basic_arithmetic")
    same = []
    for rows in (rows for seeds in found.values() for kinds in seeds.values() for rows in kinds.values()):
        for row in rows:
            for right, answer in zip(row["correct"], row["answers"]):
                same.append((score(answer, {"answer": row["answer"]}) == 1) == right)
    return f"reasoning-gym's scorer gives 1 exactly where the verifier says right in {sum(same)} of " \
           f"{len(same)} responses."


# --------------------------------------------------------------------------------------------------------
# Training

def training_table(runs):
    """How each run went: the validation problems when they were asked, and means over the first and over the
    last quarter of the steps."""
    names = {"accuracy": ("right % of rollouts", 100), "answered": ("boxed %", 100),
             "response_length": ("tokens", 1), "kl_response": ("KL per response", 1),
             "explained_variance": ("explained variance", 1), "entropy": ("entropy", 1),
             "clip_frac": ("clipped %", 100)}
    lines = []
    for arm, seed, metrics, _ in each_run(runs):
        asked = [f"{row['step']}: {100 * row['eval_accuracy']:.1f}"
                 for row in metrics if "eval_accuracy" in row]
        steps = [row for row in metrics if "accuracy" in row]
        quarter = -(-len(steps) // 4)
        cells = [arm, seed, str(len(steps)), ", ".join(asked)]
        for name, (_, scale) in names.items():
            ends = []
            for part in (steps[:quarter], steps[-quarter:]):
                values = [scale * row[name] for row in part if name in row]
                ends.append(f"{sum(values) / len(values):.3g}" if values else "-")
            cells.append(" to ".join(ends))
        lines.append(cells)
    head = ["arm", "seed", "steps", "step: validation %", *(title for title, _ in names.values())]
    return table(head, lines)


def time_table(runs):
    """Minutes of each run, where they went, and tokens per second."""
    lines = []
    for arm, seed, _, timing in each_run(runs):
        seconds = {phase: sum(row.get(f"{phase}_seconds", 0) for row in timing) for phase in PHASES}
        total = sum(seconds.values())
        processor = sum(row.get("cpu_seconds", 0) for row in timing)
        cells = [arm, seed, f"{total / 60:.1f}", f"{processor / 60:.1f}"]
        cells += [f"{100 * seconds[phase] / total:.0f}" for phase in PHASES]
        for name in ("rollout_tokens_per_s", "update_tokens_per_s"):
            rates = [row[name] for row in timing if name in row]
            cells.append(f"{sum(rates) / len(rates):.0f}")
        lines.append(cells)
    return table(["arm", "seed", "minutes", "of the processor", *(f"{phase} %" for phase in PHASES),
                  "rollout, tokens per s", "update, tokens per s"], lines)


# --------------------------------------------------------------------------------------------------------
# What is written

def print_tables(found, runs, curves):
    print(f"Test problems (± standard error over problems of the paired difference):\n\n"
          f"{accuracy_table(found)}\n\n{verdicts(found)}\n")
    print(f"With and without an exploration reward:\n\n{arms_table(found)}\n")
    print(f"Training, from the first quarter of the steps to the last:\n\n{training_table(runs)}\n")
    print(f"Time:\n\n{time_table(runs)}\n\n{score_of_the_package(found)}")
    if "none" in curves:
        experiment.compare(curves)
    votes(found)


def responses(found):
    """Markdown: the first test problems, each with the first sample of each model."""
    lines = [f"# The first {SHOWN} test problems\n\nThe first of the samples of each: of SFT, and of each "
             "arm's first seed after PPO.\n"]
    for i, row in enumerate(found["start"][""]["sampled"][:SHOWN]):
        lines.append(f"## {i + 1}. {row['problem']} ({row['answer']})\n")
        for arm, seeds in found.items():
            drawn = next(iter(seeds.values()))["sampled"][i]
            verdict = "right" if drawn["correct"][0] else "wrong"
            text = files.visible(drawn["responses"][0].strip(), 1500, files.LINES)
            lines.append(f"{ARMS[arm]}: {verdict}, {drawn['tokens'][0]} tokens\n\n```\n{text}\n```\n")
    return "\n".join(lines)


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, "".join(json.dumps(experiment.rounded(row)) + "\n" for row in rows))


def keep(run, out, found, runs):
    """Logs and verdicts without the responses: the tables can be made again from them."""
    for arm, seeds in found.items():
        for seed, kinds in seeds.items():
            folder = out / ("sft-test" if arm == "start" else f"{seed}/{arm}-test")
            for how, rows in kinds.items():
                kept = [{name: row[name] for name in KEPT if name in row} for row in rows]
                write_rows(folder / how / "outputs-1.jsonl", kept)
                # under a name that is the same on every machine
                summary = json.loads((run / folder.relative_to(out) / how / "summary.json").read_text())
                write_rows(folder / how / "summary.json", [{"model": next(iter(summary.values()))}])
    for folder in (folder for seeds in runs.values() for folder in seeds.values()):
        target = out / folder.relative_to(run)
        for name in ("metrics.jsonl", "timing.jsonl"):
            write_rows(target / name, experiment.rows(folder / name))
        flags = json.loads((folder / "config.json").read_text())["flags"]
        plain = {name: value for name, value in flags.items() if "/" not in str(value)}  # no paths
        write_rows(target / "config.json", [{"flags": plain}])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, help="folder to write, which must not exist: tables.md, "
                        "figure.svg, responses.md and the logs")
    args = parser.parse_args()
    found = evaluations(args.run)
    if "start" not in found:
        sys.exit(f"{args.run}/sft-test: no finished evaluation of the SFT model in there")
    if args.out and "responses" not in found["start"][""]["sampled"][0]:
        sys.exit(f"{args.run} has no responses, expected for --out a folder that train.sh wrote")
    runs = training_runs(args.run)
    curves = {arm: {seed: experiment.curve(folder) for seed, folder in seeds.items()}
              for arm, seeds in runs.items()}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_tables(found, runs, curves)
    print(printed.getvalue())
    if args.out:
        args.out.mkdir(parents=True)
        keep(args.run, args.out, found, runs)
        files.write_text(args.out / "tables.md", printed.getvalue())
        files.write_text(args.out / "responses.md", responses(found))
        if curves:
            files.write_text(args.out / "figure.svg", experiment.figure(curves))
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
