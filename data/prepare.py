"""Convert data sets as they are downloaded into the problem files of this project, and choose from them.

    python data/prepare.py MATH/train math.jsonl                       # Hendrycks' folders: algebra/1.json, ...
    python data/prepare.py DeepScaleR/deepscaler.json deepscaler.jsonl
    python data/prepare.py GSM8K/main/train-*.parquet gsm8k-1000.jsonl --limit 1000 --seed 0

The paper's data: QwQ's long chains of thought kept to the problems of NuminaMath-CoT and to 8,192 tokens, MATH's
training problems without those of MATH-500, and for evaluation MATH-500 and AIME:

    python data/prepare.py QwQ-LongCoT-130K/data sft.jsonl --only-in NuminaMath-CoT/data \\
        --without MATH-500/test.jsonl AIME_2024/aime_2024_problems.parquet \\
        --drop-long 8192 --tokenizer Llama-3.1-8B-Instruct
    python data/prepare.py MATH/train math.jsonl --without MATH-500/test.jsonl --check
    python data/prepare.py MATH-500/test.jsonl math500.jsonl
    python data/prepare.py AIME_2024/aime_2024_problems.parquet aime2024.jsonl

The input is jsonl, a JSON array, csv or parquet (which needs pyarrow), as files or folders of shards. The output has
one problem per line: problem, answer, unique_id and, where known, solution, subject and level. The format is
recognised from the fields of each record, in upper or lower case:

    OpenR1-Math    problem, generations            the first verified generation is the solution
    QwQ-LongCoT    problem, qwq                    the answer is what qwq's last \\boxed{} has
    DAPO           prompt, reward_model            without DAPO's instruction; each problem once
    MATH           problem, solution, level, type or subject         the answer is the last \\boxed{}'s
    MATH-500       problem, solution, level, subject, answer
    AIME           problem or question, answer from 0 to 999, and url, or year and problem number, or id 2024-I-1
    GSM8K          question, answer ending in "#### 72"     the reasoning becomes the solution, 72 in a \\boxed{}
    any other      problem or question, with answer or solution or both: DeepScaleR, NuminaMath, MathArena, ...
    chats          messages (role, content) or conversations (from, value): the first user's turn and its reply

For other formats, name the fields by --problem FIELD --answer FIELD --solution FIELD, with dots into nested objects:
extra_info.question, turns.0.text. Demonstrations without a box are kept without an answer, for SFT only. Any error
ends with one line that names file and line (for parquet the row), exit status 2, and no output file.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, when run as a script
from lib import files, records  # noqa: E402
from rewards import answers_equal, extract_answer  # noqa: E402

NO_ANSWER = ("proof", "notfound")  # what NuminaMath 1.5 and OpenR1-Math have in place of an answer
SHOWN = 5  # how many of the rows that --check finds are printed
TOKENIZED = 32  # rows tokenized at once; the library takes a processor core for each


class LeftOut(Exception):
    """A record that gives no row, although the file is valid. The message says why, and is counted."""


@dataclass
class Tally:
    """The counts that are printed at the end."""
    rows: int = 0
    unanswered: int = 0  # rows without an answer
    left_out: Counter = field(default_factory=Counter)  # {why: records}
    wrong: Counter = field(default_factory=Counter)  # {what --check found: rows}
    examples: list = field(default_factory=list)  # some of those, as lines


# ---- fields

def text_field(record, name):
    """A field's text, or its number as text. Raises a ValueError that says what was found instead."""
    value = files.answer_text(record.get(name)) if name == "answer" else record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "no such field" if name not in record else f"{value!r:.60}"
        raise ValueError(f"field {name}: found {found}, expected a non-empty string")
    return value.strip()


def optional(record, name):
    """text_field, or None if the field is missing or empty."""
    value = record.get(name)
    return None if value is None or isinstance(value, str) and not value.strip() else text_field(record, name)


def list_field(record, name):
    value = record.get(name)
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"field {name}: found {value!r:.60}, expected a list")
    return value or []


def level_number(value):
    """3 from "Level 3", "3" or 3."""
    found = re.fullmatch(r"(?:Level )?([1-9])", str(value))
    if not found:
        raise ValueError(f'field level: found {value!r:.60}, expected "Level 3" or 3')
    return int(found[1])


def boxed(solution):
    return (extract_answer(solution) or "").strip() or None


def known(**fields):
    """A row of the fields that are known. A problem needs an answer for PPO, or a solution for SFT."""
    if not fields["problem"]:
        raise LeftOut("without a problem")
    if not fields["answer"] and not fields.get("solution"):
        raise LeftOut("without an answer and a solution")
    return {name: value for name, value in fields.items() if value is not None}


# ---- formats: (record with lower-case field names, a name for the row) -> row

def openr1(record, name):
    """The short `solution` is a textbook's, while a generation is a long chain of thought. It was verified by
    math_verify, or by a Llama if that could not decide."""
    generations = list_field(record, "generations")
    complete = list_field(record, "is_reasoning_complete") or [True] * len(generations)
    for judge in ("correctness_math_verify", "correctness_llama"):
        for generation, right, whole in zip(generations, list_field(record, judge), complete):
            if right is True and whole:
                return plain(record | {"solution": generation}, name)
    raise LeftOut("without a verified generation")


def qwq(record, name):
    solution = optional(record, "qwq")
    if not solution:
        raise LeftOut("without a response")
    return plain(record | {"solution": solution, "answer": None}, name)


def dapo(record, name):
    """DAPO and other data of verl. DAPO-Math-17k has each problem a hundred times, and asks for a line "Answer:",
    whereas our runs ask for a box."""
    prompt = record["prompt"]
    if isinstance(prompt, list):
        prompt = turns(prompt)[0]
    prompt = text_field({"prompt": prompt}, "prompt")
    prompt = re.sub(r"\ASolve the following math problem step by step\.[^\n]*\n\n", "", prompt)
    prompt = re.sub(r'\n\nRemember to put your answer on its own line after "Answer:"\.\Z', "", prompt).strip()
    gold = record["reward_model"].get("ground_truth") if isinstance(record["reward_model"], dict) else None
    return known(problem=prompt, answer=optional({"answer": gold}, "answer"), subject=optional(record, "data_source"),
                 unique_id=f"dapo/{key(prompt).hex()[:12]}")


def math(record, name):
    solution = text_field(record, "solution")
    answer = boxed(solution)
    if answer is None:
        raise ValueError("field solution: found no answer in it, expected a \\boxed{...}")
    row = {"problem": text_field(record, "problem"), "answer": answer, "solution": solution,
           "subject": text_field(record, "type" if "type" in record else "subject"), "level": None,
           "unique_id": str(record.get("unique_id") or name)}
    if record["level"] == "Level ?":  # MATH has a few of these; their rows get no level
        del row["level"]
    else:
        row["level"] = level_number(record["level"])
    return row


def gsm8k(record, name):
    text = text_field(record, "answer")
    reasoning, mark, answer = text.rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer):
        raise ValueError(f'field answer: found {text[-40:]!r} at its end, expected "#### number"')
    reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()  # <<48/2=24>>: marks for a calculator, not for a reader
    return {"problem": text_field(record, "question"), "answer": answer,
            "solution": f"{reasoning}\nThe answer is \\boxed{{{answer}}}.".lstrip(),
            "subject": "gsm8k", "unique_id": f"gsm8k/{name}"}


def aime(record, name):
    answer = str(files.answer_text(record["answer"])).strip()
    # One problem (1983-2023) has "080 or 081 (both were accepted)"; a row has one answer, so the first is taken.
    found = re.fullmatch(r"([0-9]{1,3})(?: or [0-9]{1,3} \(both were accepted\))?", answer)
    if not found:
        raise ValueError(f"field answer: found {answer!r:.60}, expected an integer from 0 to 999")
    problem = text_field(record, "problem" if "problem" in record else "question")
    row = {"problem": problem, "answer": str(int(found[1]))}
    if optional(record, "solution"):
        row["solution"] = text_field(record, "solution")
    ends = str(record.get("url") or "").rpartition("_")[2], str(record.get("id") or "").rpartition("-")[2]
    number = str(record.get("problem number") or ends[0] or ends[1])
    if not re.fullmatch("[0-9]{1,3}", number):
        raise ValueError("found no problem number, expected it in field problem number or at the end of field url")
    # Problems 1 to 15 get harder: three to a level, so that tables by level say something.
    level = min(5, max(1, (int(number) + 2) // 3))
    return {**row, "subject": "aime", "level": level, "unique_id": f"aime/{record.get('id', name)}"}


def question(record, name):
    """GSM8K, or, if the answer is only a number, AIME as OpenCompass has it."""
    if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text_field(record, "answer")):
        return plain(record | {"problem": record["question"]}, name)
    return gsm8k(record, name)


def plain(record, name):
    if re.fullmatch(r"(?:19|20)[0-9]{2}-(?:I{1,2}-)?[0-9]{1,2}", str(record.get("id"))) and "answer" in record:
        return aime(record, name)
    solution = record.get("solution")
    if not isinstance(solution, list):  # else [text, trained] pieces, as sft takes them; row_of checks them
        solution = optional(record, "solution")
    answer = optional(record, "answer")
    if answer is None or answer.lower() in NO_ANSWER:
        answer = boxed(solution) if isinstance(solution, str) else None
    level = record.get("level")
    if re.fullmatch("(Level )?[1-9]", str(level)):
        level = level_number(level)
    return known(problem=optional(record, "problem"), answer=answer, solution=solution,
                 subject=optional(record, "subject" if record.get("subject") else "source"),
                 level=None if level in ("", "Level ?") else level,
                 unique_id=str(record.get("unique_id") or record.get("uuid") or name))


def turns(messages):
    """(the first user's turn, the reply to it or None)."""
    problem = None
    for turn in messages:
        if not isinstance(turn, dict):
            raise ValueError(f"found {turn!r:.60} among the turns, expected an object with role and content")
        role = turn.get("role", turn.get("from"))
        words = turn.get("content", turn.get("value"))
        if problem is None and role in ("user", "human"):
            problem = words
        elif problem is not None and role in ("assistant", "gpt"):
            return problem, words
    return problem, None


def chat(record, name):
    messages = record.get("messages") or record.get("conversations")
    if not isinstance(messages, list):
        raise ValueError(f"found {messages!r:.60}, expected a list of turns in messages or conversations")
    problem, solution = (optional({"turn": words}, "turn") for words in turns(messages))
    if not problem or not solution:
        raise LeftOut("without a user's turn and a reply")
    return known(problem=problem, answer=boxed(solution), solution=solution, unique_id=name)


FORMATS = (  # the fields that a record must have; the first that fits decides
    ({"problem", "generations"}, openr1),
    ({"problem", "qwq"}, qwq),
    ({"prompt", "reward_model"}, dapo),
    ({"level", "type"}, math),
    ({"problem", "answer", "url"}, aime),
    ({"problem", "answer", "year", "problem number"}, aime),
    ({"question", "answer", "year", "problem number"}, aime),
    ({"problem", "answer"}, plain),
    ({"problem", "solution", "level", "subject"}, math),
    ({"problem", "solution"}, plain),
    ({"question", "answer"}, question),
    ({"messages"}, chat),
    ({"conversations"}, chat),
)


def recognise(record):
    """The function that makes a row from such a record."""
    for fields, make in FORMATS:
        if fields <= record.keys():
            return make
    found = ", ".join(sorted(map(str, record)))
    raise ValueError(f"found the fields [{found:.200}], expected those of MATH, MATH-500, GSM8K, AIME, NuminaMath, "
                     "QwQ-LongCoT, OpenR1-Math, DAPO, DeepScaleR or chats, or --problem FIELD --answer FIELD "
                     "--solution FIELD")


def at(record, path):
    """The value of a field, or, with dots, of one nested in it: extra_info.question, turns.0.text."""
    if path in record:
        return record[path]
    value = record
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"field {path}: found no {part!r:.60} in it, expected it "
                             f"(fields: {', '.join(sorted(map(str, record))):.200})")
    return value


def row_of(record, name, fields):
    """(row, the function that made it). fields: what --problem, --answer and --solution name, or nothing."""
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected an object with fields")
    if fields:
        record = {name: at(record, path) for name, path in fields.items()}
        make = plain
    else:
        small = {str(name).lower(): value for name, value in record.items()}
        record = small | {name: record[name] for name in small.keys() & record.keys()}
        make = recognise(record)
    row = make(record, name)
    json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is an error here, not when writing
    files.check_problem(row, [name for name in ("problem", "answer", "solution") if name in row])
    return row, make


def read_rows(sources, fields, left_out):
    """(FILE:LINE, row) for every record that gives a row. The others are counted in left_out."""
    seen = {}
    for where, name, record in records.read(sources):
        try:
            row, make = row_of(record, name, fields)
            first = seen.setdefault(row["unique_id"], where)
            if first != where and make is dapo:
                raise LeftOut("said before")
            if first != where:
                raise ValueError(f"found unique_id {row['unique_id']} again, expected it once (first at {first})")
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from None
        else:
            yield where, row


# ---- choosing

SPACING = re.compile(r"\\(?:[,;:! ]|(?:q?quad|left|right|displaystyle|(?:small|med|big)skip|hfill)(?![a-z]))|~|&")
SPELLINGS = ((re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"), (re.compile(r"\\(le|ge|ne)q(?![a-z])"), r"\\\1"),
             (re.compile("[−–]"), "-"), (re.compile("(?<=[a-z])-(?=[a-z])"), " "))


def key(problem):
    """A problem's words as 16 bytes: equal for texts that differ in case, space, punctuation, brackets and
    LaTeX's spacing alone. Digits that were apart stay so: 3.5 is not 35."""
    text = unicodedata.normalize("NFKC", problem).casefold()
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    text = SPACING.sub(" ", text)
    text = re.sub(r"[^\w+*/^=<>-]+|_", " ", text)
    text = re.sub(r"(?<![0-9]) | (?![0-9])", "", text)
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()


def keys(sources):
    return {key(row["problem"]) for _, row in read_rows(sources, {}, Counter())}


def only(rows, left_out, reason, keep):
    """The rows for which keep(row) holds; the others are counted."""
    for where, row in rows:
        if keep(row):
            yield where, row
        else:
            left_out[reason] += 1


def tokens_at_most(rows, left_out, most, tokenizer):
    """The rows whose problem and solution have at most `most` tokens. The marks of a chat format are not counted."""
    rows = iter(rows)
    while some := list(itertools.islice(rows, TOKENIZED)):
        texts = [row["problem"] + solution_text(row) for _, row in some]
        for found, encoding in zip(some, tokenizer.encode_batch(texts, add_special_tokens=False)):
            if len(encoding.ids) <= most:
                yield found
            else:
                left_out[f"longer than {most} tokens"] += 1


def solution_text(row):
    solution = row.get("solution", "")
    return solution if isinstance(solution, str) else "".join(text for text, _ in solution)


def wrong_with(row):
    """What --check finds wrong in a row: (what, details), or None."""
    from lib.logs import readable  # it needs torch, which takes seconds to import
    answer = row.get("answer")
    if answer is None:
        return "no answer", ""
    if not readable(answer):
        return "an answer that the verifier cannot read", repr(answer)
    box = extract_answer(solution_text(row))
    if box and not answers_equal(box, answer):
        return "a solution whose box is another answer", f"{box!r}, answer {answer!r}"
    return None


def checked(rows, tally, drop):
    """The rows, or, with drop, only those in which --check finds nothing."""
    for where, row in rows:
        wrong = wrong_with(row)
        if wrong:
            tally.wrong[wrong[0]] += 1
        if wrong and len(tally.examples) < SHOWN:
            tally.examples.append(f"{where}: {wrong[0]} {files.visible(wrong[1], 160)}".rstrip())
        if wrong and drop:
            tally.left_out[f"with {wrong[0]}"] += 1
        else:
            yield where, row


# ---- the command

def prepare(args):
    """Convert the whole input, choose, check, then write the output. Returns the Tally."""
    target = args.output
    if os.path.lexists(target):
        raise ValueError(f"{target}:0: found an existing file, expected a new name; nothing is overwritten")
    if not os.path.isdir(target.parent):
        raise ValueError(f"{target}:0: found no folder {target.parent}, expected it to exist")
    tally = Tally()
    rows = chosen(args, tally)
    aside = target.with_name(f".{target.name}.part")
    try:
        aside.unlink(missing_ok=True)
        with open(aside, "x+b") as f:
            starts = [0]  # of each line
            for _, row in rows:
                starts.append(starts[-1] + f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n"))
                tally.unanswered += "answer" not in row
            tally.rows = len(starts) - 1
            if not tally.rows:
                raise ValueError(f"{args.input[0]}:0: found no problem that is left ({said(tally.left_out)}), "
                                 "expected at least one")
            if args.limit is not None and args.limit < tally.rows:
                limit(f, starts, args.limit, args.seed, tally)
        os.replace(aside, target)
    except OSError as e:
        raise ValueError(f"{target}:0: found that it cannot be written ({e.strerror}), expected a new file") from None
    finally:
        if os.path.lexists(aside):
            aside.unlink()
    return tally


def chosen(args, tally):
    """(FILE:LINE, row) for the rows of the input that the flags choose."""
    fields = {name: value for name in ("problem", "answer", "solution") if (value := getattr(args, name))}
    rows = read_rows(args.input, fields, tally.left_out)
    if args.only_in:
        wanted = keys(args.only_in)
        rows = only(rows, tally.left_out, "not in --only-in", lambda row: key(row["problem"]) in wanted)
    if args.without:
        unwanted = keys(args.without)
        rows = only(rows, tally.left_out, "in --without", lambda row: key(row["problem"]) not in unwanted)
    if args.check or args.drop_wrong:
        rows = checked(rows, tally, args.drop_wrong)
    if args.drop_long:
        from lib.hf import load_tokenizer  # it needs torch, which takes seconds to import
        rows = tokens_at_most(rows, tally.left_out, args.drop_long, load_tokenizer(args.tokenizer))
    return rows


def limit(f, starts, number, seed, tally):
    """Keep `number` random lines of a file, in their order."""
    tally.unanswered = 0
    tally.rows = number
    end = 0
    for i in sorted(random.Random(seed).sample(range(len(starts) - 1), number)):
        f.seek(starts[i])
        line = f.read(starts[i + 1] - starts[i])
        f.seek(end)
        end += f.write(line)
        tally.unanswered += "answer" not in json.loads(line)
    f.truncate(end)


def said(counts):
    return ", ".join(f"{count} {what}" for what, count in counts.most_common()) or "nothing"


def parser():
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False, prog="prepare.py")
    p.add_argument("input", type=Path, nargs="+", help="files or folders of jsonl, JSON, csv and parquet")
    p.add_argument("output", type=Path, help="the jsonl file to write; it must not exist yet")
    for name in ("problem", "answer", "solution"):
        p.add_argument(f"--{name}", metavar="FIELD", help=f"name of the field with the {name}, for other formats")
    p.add_argument("--only-in", metavar="FILE", type=Path, nargs="+",
                   help="keep only problems that these files or folders also have (with the same words)")
    p.add_argument("--without", metavar="FILE", type=Path, nargs="+",
                   help="drop problems that these files or folders have, such as those of an evaluation")
    p.add_argument("--drop-long", metavar="N", type=int,
                   help="drop rows whose problem and solution have more than N tokens")
    p.add_argument("--tokenizer", metavar="FOLDER", type=Path, help="model folder whose tokenizer counts the tokens")
    p.add_argument("--check", action="store_true",
                   help="list answers that the verifier cannot read, and solutions with another answer")
    p.add_argument("--drop-wrong", action="store_true", help="drop the rows that --check lists")
    p.add_argument("--limit", metavar="N", type=int, help="keep N problems, chosen at random (default: all)")
    p.add_argument("--seed", metavar="N", type=int, default=0, help="seed for the choice of --limit (default: 0)")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    for name in ("limit", "drop_long"):
        value = getattr(args, name)
        if value is not None and value < 1:
            p.error(f"--{name.replace('_', '-')}: found {value}, expected at least 1")
    if (args.drop_long is None) != (args.tokenizer is None):
        p.error("--drop-long N and --tokenizer FOLDER: found one of them, expected both or none")
    if (args.answer or args.solution) and not args.problem:
        p.error("--answer and --solution: found no --problem FIELD, expected it with them")
    try:
        tally = prepare(args)
    except (ValueError, OSError) as error:
        print(f"prepare.py: {files.visible(error, 1000)}", file=sys.stderr)
        return 2
    if args.check or args.drop_wrong:
        print(f"--check: {said(tally.wrong)}")
        print("".join(f"    {files.visible(line, 1000)}\n" for line in tally.examples), end="")
    print(f"{files.visible(args.output, 1000)}: {tally.rows} problems; left out: {said(tally.left_out)}"
          + f"; {tally.unanswered} have no answer, which only sft takes" * bool(tally.unanswered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
