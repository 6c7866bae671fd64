"""Real problems for a real model: the data of `bash train.sh gsm8k`.

    python docs/results/gsm8k.py data GSM8K OUT     demonstrations, problems to train on, validation, test
    python docs/results/gsm8k.py sums OUT           the same for sums that the package reasoning-gym makes

GSM8K is a folder with train.jsonl and test.jsonl as OpenAI publishes them. Of the training problems, 200 are
for validation, on which every choice is made. Half of the others are demonstrated and the other half is for
PPO, so that PPO never sees an answer that SFT has shown. The test problems are evaluated once, at the end.

A demonstration is a solution of GSM8K, line by line, with its answer in a box. In a third of them a line is
checked ("Let me check: 48/2 = 24."); in another third a line is first wrong and is then corrected ("Wait,
48/2 is not 26, it is 24."). The numbers are those of GSM8K's own marks <<48/2=24>>. A wrong line is given and
not learned, so the model learns to correct mistakes, not to make them.

The sums are for machines on which GSM8K takes days: "Calculate 4 - 1 - 7 + 10.", four or five numbers between
0 and 10, as the family basic_arithmetic of reasoning-gym makes them, without duplicates. Half of the
demonstrations guess the answer. The others write down the total after each number; a third of these check a
line ("Check: 17-1=16"), and a third make a mistake in a line and correct it ("Wait, 16+1=17"). PPO has to
find out that the work pays.
"""
import argparse
import itertools
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib import files  # noqa: E402

VALIDATION = 200
MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
NUMBER = re.compile(r"\d+(\.\d+)?")
# The sums: what reasoning-gym is asked for, and how many problems go into each file.
SUM = dict(min_terms=4, max_terms=5, min_digits=1, max_digits=1, operators=["+", "-"],
           allow_parentheses=False, seed=0)
SUMS = dict(sft=320, train=2000, validation=200, test=250)


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
    sums = []
    for i, line in enumerate(lines):
        found = MARK.search(line)
        alone = len(MARK.findall(line)) == 1 and NUMBER.fullmatch(found[2])
        if alone and line[found.end() :].startswith(found[2]):
            sums.append(i)
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


def demonstrate_sum(expression, draw):
    """(pieces, gold), as above, of a sum such as "4 - 1 - 7 + 10"."""
    terms = expression.split()
    total = int(terms[0])
    lines = []  # (sum, its result, the check of it)
    for sign, number in zip(terms[1::2], terms[2::2]):
        before = total
        total += int(sign + number)
        back = "-" if sign == "+" else "+"
        lines.append((f"{before}{sign}{number}", total, f"{total}{back}{number}={before}"))
    how = draw.choice(["guess", "guess", "guess", "plain", "check", "slip"])
    at = draw.randrange(len(lines))
    pieces = []
    for i, (left, result, check) in enumerate(lines if how != "guess" else []):
        if i == at and how == "slip":
            pieces.append([f"{left}={result + draw.choice([-10, -2, -1, 1, 2, 10])}\n", False])
            pieces.append([f"Wait, {left}={result}\n", True])
        else:
            pieces.append([f"{left}={result}\n", True])
        if i == at and how == "check":
            pieces.append([f"Check: {check}\n", True])
    pieces.append([f"\\boxed{{{total}}}", True])
    return pieces, str(total)


def sums(out):
    """Write the four files of problems that reasoning-gym makes. Each takes the next ones of one stream."""
    try:
        import reasoning_gym
    except ImportError as e:
        sys.exit(f"gsm8k.py: reasoning-gym, which makes the sums, cannot be imported ({e}): "
                 "pip install reasoning-gym")
    out.mkdir(parents=True)
    found = {}
    for row in reasoning_gym.create_dataset("basic_arithmetic", size=2 * sum(SUMS.values()), **SUM):
        about = row["metadata"]
        solution, answer = demonstrate_sum(about["expression"], random.Random(about["expression"]))
        if answer != row["answer"]:
            raise ValueError(f"{about['expression']} is {row['answer']} to reasoning-gym, expected {answer}")
        found.setdefault(row["question"], {
            "problem": row["question"], "answer": answer, "level": about["num_terms"],
            "unique_id": f"sums/{about['source_index']}", "solution": solution})
    stream = iter(found.values())
    write(out, {name: list(itertools.islice(stream, size)) for name, size in SUMS.items()})


def data(source, out):
    """Write sft.jsonl, train.jsonl, validation.jsonl and test.jsonl."""
    out.mkdir(parents=True)

    def rows(split):
        for number, row in files.read_jsonl(source / f"{split}.jsonl"):
            solution, answer = demonstrate(row["answer"], random.Random(f"{split}/{number}"))
            yield {"problem": row["question"], "answer": answer, "unique_id": f"gsm8k/{split}/{number}",
                   "solution": solution}

    train = list(rows("train"))
    random.Random(0).shuffle(train)
    half = VALIDATION + (len(train) - VALIDATION) // 2
    write(out, {"validation": train[:VALIDATION], "sft": train[VALIDATION:half], "train": train[half:],
                "test": list(rows("test"))})


def write(out, parts):
    """A jsonl file of each part; the demonstrations alone have a solution."""
    for name, part in parts.items():
        if name != "sft":
            part = [{key: value for key, value in row.items() if key != "solution"} for row in part]
        files.write_text(out / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
        print(f"{name}: {len(part)} problems")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("data")
    make.add_argument("source", type=Path)
    make.add_argument("out", type=Path)
    commands.add_parser("sums").add_argument("out", type=Path)
    args = parser.parse_args()
    if args.command == "data":
        data(args.source, args.out)
    else:
        sums(args.out)


if __name__ == "__main__":
    main()
