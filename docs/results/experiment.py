"""The table and the figure of `bash train.sh experiment`: PPO with and without exploration rewards, over seeds.

    python docs/results/experiment.py runs/experiment [--figure FILE.svg]

Reads RUN/seed-*/{start,none,length,steps,anneal,only}/{ppo,eval}; missing arms are left out. Held-out numbers come from eval/
(problems that no stage was trained on), curves from ppo/*.jsonl (rollouts on training problems). Arms run in parallel, so their time
is processor time, which on a machine with one idle core equals wall-clock time. Standard errors are over seeds. Differences are
taken seed by seed, so that the quality of a seed's SFT model cancels out.
"""
import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib import evaluation  # noqa: E402
import rewards  # noqa: E402

ARMS = {"start": "SFT, before PPO", "none": "outcome only", "length": "+ length", "steps": "+ steps",
        "anneal": "+ length, fading", "only": "length alone", "unguarded": "words alone", "guarded": "words alone, guarded",
        "group": "outcome only, no critic"}
COLOURS = {"none": "#000000", "length": "#0072b2", "steps": "#009e73", "anneal": "#e69f00", "only": "#cc79a7",
           "unguarded": "#d55e00", "guarded": "#56b4e9", "group": "#56b4e9"}


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rounded(x):
    """A value of JSON whose numbers have five digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


def mean_error(values):
    """(mean, standard error of the mean; nan for one value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan


def held_out(folder):
    """The quantities of the table for one evaluated model."""
    (summary,) = json.loads((folder / "summary.json").read_text()).values()
    texts = [text for row in rows(folder / "outputs-1.jsonl") for text in row["responses"]]
    found = [rewards.behaviours(text) for text in texts]
    share = lambda name: 100 * sum(counts[name] > 0 for counts in found) / len(texts)
    everything = summary["all"]
    return {"accuracy %": 100 * everything["accuracy"], "maj@4 %": 100 * everything["maj@4"], "tokens": everything["tokens"],
            "backtracking %": share("backtracking"), "verification %": share("verification"),
            "repetition %": 100 * sum(map(rewards.repetition, texts)) / len(texts)}


def curve(folder):
    """Of a PPO run, step by step: accuracy of the rollouts, length, behaviours, tokens sampled and processor seconds so far."""
    tokens = seconds = 0.0
    config, out = json.loads((folder / "config.json").read_text())["flags"], []
    metrics, file = rows(folder / "metrics.jsonl"), folder / "timing.jsonl"
    timing = rows(file) if file.is_file() else [row["timing"] for row in metrics]  # there in older runs
    for row, took in zip(metrics, timing, strict=True):
        if "accuracy" not in row:  # an evaluation before the first step
            continue
        tokens += row["response_length"] * config["rollout_batch"] * config["samples"]
        seconds += took["cpu_seconds"]
        out.append({"step": row["step"], "accuracy": 100 * row["accuracy"], "length": row["response_length"],
                    "backtracking": 100 * row["backtracking"], "verification": 100 * row["verification"], "tokens": tokens,
                    "processor seconds": seconds})
    for key in ("accuracy", "length", "backtracking", "verification"):        # means of five steps: one is 96 responses
        values = [row[key] for row in out]
        for i, row in enumerate(out):
            near = values[max(0, i - 2): i + 3]
            row[key] = sum(near) / len(near)
    return out


def at(curve, key, budget, quantity="accuracy"):
    """The quantity where `key` reaches the budget; a run that ends before keeps its last value."""
    return next((row[quantity] for row in curve if row[key] >= budget), curve[-1][quantity])


def table(head, lines):
    lines = [head, *lines]
    return "\n".join(f"| {' | '.join(line)} |" + ("\n|" + "---|" * len(head) if i == 0 else "") for i, line in enumerate(lines))


def shown(values, sign=""):
    mean, error = mean_error(values)
    return f"{mean:{sign}.1f}" + ("" if math.isnan(error) else f" ± {error:.1f}")


def ticks(top):
    """Round values from 0 to at least `top`: at most six steps of 1, 2, 2.5 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(top / 6))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power * 6 >= top * 0.999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


def figure(curves):
    """Four panels as SVG: thin lines are seeds, thick ones their mean."""
    steps, tokens = ("step", 1, "PPO step"), ("tokens", 1000, "thousand tokens sampled")
    panels = [("accuracy of rollouts", "% of responses", steps, "accuracy", 100), ("response length", "tokens per response", steps, "length", None),
              ("responses with backtracking", "% of responses", steps, "backtracking", 100),
              ("accuracy by tokens sampled", "% of responses", tokens, "accuracy", 100)]
    out = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 650" font-family="sans-serif" font-size="12">',
           '<rect width="900" height="650" fill="#ffffff"/>']
    for number, (title, unit, (over, size, name), key, top) in enumerate(panels):
        x0, y0, width, height = 62 + 450 * (number % 2), 62 + 320 * (number // 2), 370, 220
        everything = [row for runs in curves.values() for run in runs.values() for row in run]
        right, ys = max(row[over] for row in everything), ticks(top or max(row[key] for row in everything))
        place = lambda row: f"{x0 + width * row[over] / right:.1f},{y0 + height * (1 - row[key] / ys[-1]):.1f}"
        out.append(f'<text x="{x0}" y="{y0 - 12}" font-weight="bold">{title}</text>')
        for v in ys:
            y = y0 + height * (1 - v / ys[-1])
            out.append(f'<path d="M{x0} {y:.1f}h{width}" stroke="#dddddd"/><text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{v:g}</text>')
        for v in ticks(right / size):
            if v <= right / size:
                x = x0 + width * v * size / right
                out.append(f'<path d="M{x:.1f} {y0 + height}v4" stroke="#888888"/><text x="{x:.1f}" y="{y0 + height + 17}" text-anchor="middle">{v:,g}</text>')
        middle = y0 + height / 2
        out.append(f'<text x="{x0 + width / 2}" y="{y0 + height + 34}" text-anchor="middle" fill="#555555">{name}</text>')
        out.append(f'<text transform="translate({x0 - 44} {middle}) rotate(-90)" text-anchor="middle" fill="#555555">{unit}</text>')
        for arm, runs in curves.items():
            for run in runs.values():
                out.append(f'<polyline points="{" ".join(map(place, run))}" fill="none" stroke="{COLOURS[arm]}" stroke-opacity="0.25"/>')
            if over == "step":
                together = [{over: step[0][over], key: sum(row[key] for row in step) / len(step)} for step in zip(*runs.values())]
            else:
                grid = [right * i / 40 for i in range(1, 41)]
                together = [{over: b, key: sum(at(run, over, b, key) for run in runs.values()) / len(runs)} for b in grid]
            out.append(f'<polyline points="{" ".join(map(place, together))}" fill="none" stroke="{COLOURS[arm]}" stroke-width="2.5"/>')
    for i, arm in enumerate(curves):
        out.append(f'<path d="M{62 + 170 * i} 20h24" stroke="{COLOURS[arm]}" stroke-width="3"/><text x="{92 + 170 * i}" y="24">{ARMS[arm]}</text>')
    return "\n".join([*out, "</svg>\n"])


def compare(curves):
    """Accuracy of the rollouts against outcome-only PPO of the same seed: at equal budgets, and when an arm is ahead."""
    base, arms = curves["none"], [arm for arm in curves if arm != "none" and curves[arm].keys() & curves["none"].keys()]
    gap = lambda arm, over, budget: [at(run, over, budget) - at(base[s], over, budget) for s, run in curves[arm].items() if s in base]
    lines, ahead = [], {arm: [ARMS[arm]] for arm in arms}
    for over in ("step", "tokens", "processor seconds"):
        longest = max(run[-1][over] for run in base.values())
        for part in (0.25, 0.5, 1.0):
            lines.append([f"{over} {part * longest:.0f}", *(shown(gap(arm, over, part * longest), "+") for arm in arms)])
        for arm in arms:  # 40 budgets up to the longest outcome-only run
            found = [mean_error(gap(arm, over, longest * i / 40)) for i in range(1, 41)]
            signs = [(m > e) - (m < -e) for m, e in found]
            ends = [f"{longest * (f(i for i, s in enumerate(signs, 1) if s > 0)) / 40:.0f}" for f in (min, max)] if 1 in signs else None
            ahead[arm].append(f"{100 * signs.count(1) / 40:.0f} %" + (f" (from {ends[0]} to {ends[1]})" if ends else "")
                              + f", {100 * signs.count(-1) / 40:.0f} %")
    print("\nAccuracy of the rollouts minus that of outcome-only PPO, seed by seed, points (training problems):\n")
    print(table(["at equal", *(ARMS[arm] for arm in arms)], lines))
    print("\nShare of training in which this mean gap is above its standard error (first and last time), and below minus it:\n")
    print(table(["arm", "by steps", "by tokens", "by processor seconds"], list(ahead.values())))


def votes(evaluated):
    """A majority of k responses of the SFT model against one of PPO, k such that both cost as many tokens. evaluated: {arm: {seed:
    rows of an evaluation's outputs}}."""
    print("\nOne sample after PPO against a majority vote of the SFT model for as many tokens, as far as its samples go (held-out problems):\n")
    lines = []
    for arm, seeds in evaluated.items():
        found = []  # (k, tokens of the vote, accuracy of the vote, tokens and accuracy of one sample)
        for seed, trained in seeds.items():
            if arm == "start" or seed not in evaluated["start"]:
                continue
            start = evaluated["start"][seed]
            tokens, long = (sum(sum(r["tokens"]) for r in x) / sum(len(r["tokens"]) for r in x) for x in (start, trained))
            k = min(len(start[0]["answers"]), max(1, round(long / tokens)))
            vote, one = 100 * evaluation.maj_at_k(start, k), 100 * evaluation.summarize(trained, 1)["accuracy"]
            found.append((k, k * tokens, vote, long, one, one - vote))
        if found:
            lines.append([ARMS[arm], *map(shown, list(zip(*found))[:-1]), shown(list(zip(*found))[-1], "+")])
    print(table(["arm", "k", "tokens of k short", "maj@k %", "tokens of one long", "accuracy %", "gap"], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder that train.sh experiment wrote")
    parser.add_argument("--figure", type=Path, help="SVG file to write")
    args = parser.parse_args()
    folders = {arm: {f.parent.name: f for f in sorted(args.run.glob(f"seed-*/{arm}"))} for arm in ARMS}
    folders = {arm: seeds for arm, seeds in folders.items() if seeds}
    if not folders:
        sys.exit(f"{args.run}: no finished seed-*/ARM in there")
    results = {arm: {seed: held_out(f / "eval") for seed, f in seeds.items()} for arm, seeds in folders.items()}
    curves = {arm: {seed: curve(f / "ppo") for seed, f in seeds.items()} for arm, seeds in folders.items() if arm != "start"}
    columns = list(next(iter(next(iter(results.values())).values())))
    print("Held-out problems, mean ± standard error over seeds:\n")
    print(table(["arm", "seeds", *columns], [[ARMS[arm], str(len(seeds)), *(shown([r[c] for r in seeds.values()]) for c in columns)]
                                             for arm, seeds in results.items()]))
    print("\nHeld-out accuracy seed by seed, %:\n")
    seeds = list(dict.fromkeys(seed for found in results.values() for seed in found))
    print(table(["arm", *seeds], [[ARMS[arm], *(f"{found[s]['accuracy %']:.1f}" if s in found else "" for s in seeds)]
                                  for arm, found in results.items()]))
    if "none" in curves:
        compare(curves)
        if "start" in folders:
            votes({arm: {seed: rows(f / "eval" / "outputs-1.jsonl") for seed, f in seeds.items()} for arm, seeds in folders.items()})
    if args.figure:
        args.figure.write_text(figure(curves), encoding="utf-8")
        print(f"\nwrote {args.figure}")


if __name__ == "__main__":
    main()
