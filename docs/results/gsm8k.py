"""A real model on real problems: what `bash train.sh gsm8k` makes of GSM8K, and its table.

    python docs/results/gsm8k.py data GSM8K OUT          demonstrations, problems to train on, validation, test
    python docs/results/gsm8k.py hours OUT --model M     how long the runs will take on this machine
    python docs/results/gsm8k.py table RUN               test accuracy of each arm, paired with SFT's by problem

GSM8K is a folder with train.jsonl and test.jsonl as OpenAI publishes them. Of the training problems 200 are for validation, on
which every choice is made; half of the others are demonstrated, the other half is for PPO, so that PPO never meets an answer that
SFT has shown. The test problems are evaluated once, at the end.

A demonstration is a solution of GSM8K line by line, its answer in a box. In a third of them a line is checked ("Let me check:
48/2 = 24."), in a third of them a line first comes out wrong and is then put right ("Wait, 48/2 is not 26, it is 24."); the numbers
are those of GSM8K's own marks <<48/2=24>>. A wrong line is given and not learned: the model learns to put it right, not to err.
"""
import argparse
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402

from lib import chat, files, hf, logs, parallel, plan  # noqa: E402
import ppo  # noqa: E402
from experiment import mean_error  # noqa: E402  (beside this file)

VALIDATION = 200
MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
NUMBER = re.compile(r"\d+(\.\d+)?")
ARMS = {"none": "outcome only", "length": "+ length", "steps": "+ steps", "group": "outcome only, group advantage"}


def plain(line):
    """A line of a solution without the marks for a calculator."""
    return MARK.sub("", line).strip()


def wrong(number, draw):
    """Another number that somebody might get: a digit off, or ten."""
    value = float(number)
    other = value + draw.choice([-10, -2, -1, 1, 2, 10]) * (1 if value == int(value) else 0.1)
    return f"{other:g}" if other > 0 else f"{value + 3:g}"


def demonstrate(answer, draw):
    """(pieces [text, whether it is learned], gold) of a GSM8K answer: see the top of this file."""
    reasoning, gold = answer.split("####")
    gold = gold.strip().replace(",", "")
    lines = [line for line in reasoning.split("\n") if line.strip()]
    # lines whose one mark is followed by its result, a number: they can come out wrong
    sums = [i for i, line in enumerate(lines) if len(MARK.findall(line)) == 1
            and NUMBER.fullmatch(MARK.search(line)[2]) and line[MARK.search(line).end() :].startswith(MARK.search(line)[2])]
    how = draw.choice(["plain", "check", "slip"])
    at = draw.choice(sums) if sums and how != "plain" else None
    pieces = []
    for i, line in enumerate(lines):
        if i != at:
            pieces.append([plain(line) + "\n", True])
            continue
        found = MARK.search(line)
        left, result = found[1].strip(), found[2]
        if how == "check":
            pieces.append([f"{plain(line)}\nLet me check: {left} = {result}.\n", True])
        else:
            off = wrong(result, draw)
            slip = line[: found.start()] + off + line[found.end() + len(result) :]
            pieces.append([plain(slip) + "\n", False])
            pieces.append([f"Wait, {left} is not {off}, it is {result}.\n{plain(line)}\n", True])
    pieces.append([f"The answer is \\boxed{{{gold}}}.", True])
    return pieces, gold


def data(source, out):
    """Write sft.jsonl, train.jsonl, validation.jsonl and test.jsonl."""
    out.mkdir(parents=True)

    def rows(split):
        for number, row in files.read_jsonl(source / f"{split}.jsonl"):
            solution, answer = demonstrate(row["answer"], random.Random(f"{split}/{number}"))
            yield {"problem": row["question"], "answer": answer, "unique_id": f"gsm8k/{split}/{number}", "solution": solution}

    train = list(rows("train"))
    random.Random(0).shuffle(train)
    half = VALIDATION + (len(train) - VALIDATION) // 2
    parts = {"validation": train[:VALIDATION], "sft": train[VALIDATION:half], "train": train[half:], "test": list(rows("test"))}
    for name, part in parts.items():
        if name != "sft":
            part = [{key: row[key] for key in ("problem", "answer", "unique_id")} for row in part]
        files.write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        print(f"{name}: {len(part)} problems")


def hours(folder, model, steps, epochs):
    """Print how long SFT and an arm of PPO should take here, from the best matrix product that is measured now. A training pass
    reaches some 35 % of it, and so does a decode step of 64 rows; lengths are those of GSM8K."""
    config = hf.read_config(model)
    dtype = getattr(torch, parallel.compute_type())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = 0.35 * logs.matrix_peak(device, dtype)
    asked = chat.Chat(model)
    shown = [row for _, row in files.read_jsonl(folder / "sft.jsonl")]
    some = shown[:100]
    prompt = sum(len(asked.prompt_ids(row["problem"])) for row in some) / len(some)
    answer = sum(len(asked.response_ids("".join(text for text, _ in row["solution"]))) for row in some) / len(some)
    c = ppo.PPOConfig(rollout_batch=64, recompute=False)
    sft = epochs * len(shown) * 3 * (prompt + answer) * plan.flops_token(config, prompt + answer) / rate / 3600
    arm = steps * sum(plan.flops(config, c, prompt, 1.5 * answer).values()) / rate / 3600
    print(f"{rate / 0.35:.2g} FLOP/s in {dtype}; prompts of {prompt:.0f} and answers of {answer:.0f} tokens: SFT some {sft:.1f} hours, "
          f"{steps} steps of PPO some {arm:.1f} hours for each arm and seed, evaluations not counted")


def accuracies(folder):
    """{problem: share of right samples} of an evaluation of one model."""
    return {row["problem"]: sum(row["correct"]) / len(row["correct"]) for _, row in files.read_jsonl(folder / "outputs-1.jsonl")}


def paired(after, before):
    """(mean, standard error) over problems of the difference in accuracy, in points."""
    return mean_error([100 * (after[problem] - before[problem]) for problem in after])


def table(run):
    """Print a line per evaluated model: accuracy on the test problems, sampled and greedy, and over SFT."""
    print("| model | seed | accuracy %, 4 samples | over SFT, points | greedy % | over SFT | answered % | tokens |")
    print("|---|---|---|---|---|---|---|---|")
    base = {how: accuracies(run / "sft-test" / how) for how in ("sampled", "greedy")}
    for folder in [run / "sft-test", *sorted(run.glob("seed-*/*-test"))]:
        if not (folder / "greedy/summary.json").is_file():
            continue
        (scores,) = json.loads((folder / "sampled/summary.json").read_text()).values()
        cells = []
        for how in ("sampled", "greedy"):
            found = accuracies(folder / how)
            mean, error = paired(found, base[how])
            cells += [f"{100 * sum(found.values()) / len(found):.2f}", "" if folder == run / "sft-test" else f"{mean:+.2f} ± {error:.2f}"]
        arm = folder.name.removesuffix("-test")
        seed = folder.parent.name.removeprefix("seed-") if folder.parent != run else ""
        print(f"| {ARMS.get(arm, 'SFT')} | {seed} | {' | '.join(cells)} | {100 * scores['all']['answered']:.1f} | "
              f"{scores['all']['tokens']:.0f} |")
    print("\n(± standard error of the difference over problems, paired.)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("data")
    make.add_argument("source", type=Path)
    make.add_argument("out", type=Path)
    ask = commands.add_parser("hours")
    ask.add_argument("data", type=Path)
    ask.add_argument("--model", required=True)
    ask.add_argument("--steps", type=int, default=60)
    ask.add_argument("--epochs", type=int, default=3)
    commands.add_parser("table").add_argument("run", type=Path)
    args = parser.parse_args()
    if args.command == "data":
        data(args.source, args.out)
    elif args.command == "hours":
        hours(args.data, args.model, args.steps, args.epochs)
    else:
        table(args.run)


if __name__ == "__main__":
    main()
