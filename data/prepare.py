"""Convert downloads of MATH, MATH-500, GSM8K and AIME into the problem format of this project.

    python data/prepare.py MATH/train math-train.jsonl                # Hendrycks' folders: algebra/1.json, ...
    python data/prepare.py math500/test.jsonl math500.jsonl
    python data/prepare.py gsm8k/train.jsonl gsm8k-1000.jsonl --limit 1000 --seed 0

The output has one problem a line: problem, answer, subject, level, unique_id and, where known, solution. The format
of the input is recognised from the fields of each record:

    MATH        problem, solution, level "Level 3", type        the answer is the last \\boxed{} of the solution
    MATH-500    problem, solution, answer, subject, level
    GSM8K       question, answer ending in "#### 72"            the reasoning becomes the solution, 72 in a \\boxed{}
    AIME        problem, answer (an integer), and url, or year and problem number

Anything else ends with one line that names file and line, exit status 2, and no output file.
"""

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, when run as a script
from lib import files  # noqa: E402
from rewards import extract_answer  # noqa: E402

MOST_BYTES = 2**30  # of a file of the input: the largest of these sets, all of MATH, has 20 MB


class BadInput(Exception):
    """Something in the input that cannot be converted; the message is the whole line shown to the user."""


def text_field(record, name):
    """A non-empty string field, or an error that says what was there instead."""
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        found = "no such field" if name not in record else f"{value!r:.60}"
        raise ValueError(f"field {name}: found {found}, expected a non-empty string")
    return value.strip()


def level_number(value):
    """3 from "Level 3", "3" or 3."""
    found = re.fullmatch(r"(?:Level )?([1-9])", str(value))
    if not found:
        raise ValueError(f'field level: found {value!r:.60}, expected "Level 3" or 3')
    return int(found[1])


def convert_math(record, name):
    solution = text_field(record, "solution")
    answer = extract_answer(solution)
    if answer is None or not answer.strip():
        raise ValueError("field solution: found no answer in it, expected a \\boxed{...}")
    row = {"problem": text_field(record, "problem"), "answer": answer.strip(), "solution": solution,
           "subject": text_field(record, "type"), "level": None, "unique_id": name}
    if record["level"] == "Level ?":  # MATH has a few: a row without a level
        del row["level"]
    else:
        row["level"] = level_number(record["level"])
    return row


def convert_math500(record, name):
    row = {key: text_field(record, key) for key in ("problem", "answer", "solution", "subject")}
    return {**row, "level": level_number(record["level"]), "unique_id": str(record.get("unique_id") or name)}


def convert_gsm8k(record, name):
    reasoning, mark, answer = text_field(record, "answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not mark or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", answer):
        raise ValueError(f'field answer: found {record["answer"][-40:]!r} at its end, expected "#### number"')
    reasoning = re.sub(r"<<[^<>]*>>", "", reasoning).strip()  # <<48/2=24>>: marks for a calculator, not for a reader
    return {"problem": text_field(record, "question"), "answer": answer,
            "solution": f"{reasoning}\nThe answer is \\boxed{{{answer}}}.".lstrip(),
            "subject": "gsm8k", "unique_id": f"gsm8k/{name}"}


def convert_aime(record, name):
    answer = str(record["answer"]).strip()
    # One problem (1983-2023) has "080 or 081 (both were accepted)"; a row has one answer, so the first is taken.
    found = re.fullmatch(r"([0-9]{1,3})(?: or [0-9]{1,3} \(both were accepted\))?", answer)
    if not found:
        raise ValueError(f"field answer: found {answer!r:.60}, expected an integer from 0 to 999")
    row = {"problem": text_field(record, "problem"), "answer": str(int(found[1]))}
    if record.get("solution"):
        row["solution"] = text_field(record, "solution")
    number = str(record.get("problem number") or str(record.get("url", "")).rpartition("_")[2])
    if not re.fullmatch("[0-9]{1,3}", number):
        raise ValueError("found no problem number, expected it in field problem number or at the end of field url")
    # Problems 1 to 15 get harder: three to a level, so that tables by level say something.
    level = min(5, max(1, (int(number) + 2) // 3))
    return {**row, "subject": "aime", "level": level, "unique_id": f"aime/{record.get('id', name)}"}


def convert(record, name):
    """One record of any known format -> one row. Raises ValueError with what was found and what was expected."""
    if not isinstance(record, dict):
        raise ValueError(f"found {type(record).__name__}, expected an object with fields")
    fields = set(record)
    if {"level", "type"} <= fields:
        return convert_math(record, name)
    if {"level", "subject", "answer"} <= fields:
        return convert_math500(record, name)
    if {"problem", "answer"} <= fields and ("url" in fields or {"year", "problem number"} <= fields):
        return convert_aime(record, name)
    if {"question", "answer"} <= fields and "problem" not in fields:
        return convert_gsm8k(record, name)
    found = ", ".join(sorted(map(str, fields)))
    raise ValueError(f"found the fields [{found:.200}], expected those of MATH, MATH-500, GSM8K or AIME")


def read_records(source):
    """Yield (where, name, text): FILE:LINE for messages, an id for the row, and the JSON text of one record."""
    if os.path.isdir(source):
        # algebra/2.json before algebra/10.json, whatever order the file system has
        paths = sorted(source.rglob("*.json"), key=lambda p: (p.parent, len(p.stem), p.stem))
        if not paths:
            raise BadInput(f"{source}:0: found no .json file in this folder, expected MATH's algebra/1.json and so on")
        for path in paths:
            # train/algebra/1.json, as MATH-500 names its problems, so that an overlap can be found
            yield f"{path}:1", f"{source.resolve().name}/{path.relative_to(source).as_posix()}", read_text(path)
        return
    # Not splitlines(): it also breaks at characters that may stand inside a JSON string.
    lines = read_text(source).split("\n")
    if not any(line.strip() for line in lines):
        raise BadInput(f"{source}:1: found an empty file, expected one problem a line")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"{source}:{number}", f"{source.stem}/{number}", line


def read_text(path):
    try:
        with files.reading(path, "rb") as f:
            data = f.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise BadInput(f"{path}:0: found more than {MOST_BYTES} bytes, expected fewer")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadInput(f"{path}:{line}: found bytes that are not UTF-8, expected JSON text") from None
    except OSError as error:
        raise BadInput(f"{path}:0: found no readable file ({error.strerror}), expected JSON text") from None
    except ValueError:
        raise BadInput(f"{path}:0: found a pipe or a device, expected a regular file") from None


def prepare(source, target, limit=None, seed=0):
    """Convert all of `source`, check it, then write `target`. With a limit, a random choice in the input's order."""
    if os.path.lexists(target):
        raise BadInput(f"{target}:0: found an existing file, expected a new name; nothing is overwritten")
    if not os.path.isdir(target.parent):
        raise BadInput(f"{target}:0: found no folder {target.parent}, expected it to exist")
    rows, seen = [], {}
    for where, name, text in read_records(source):
        try:
            row = convert(json.loads(text), name)
            first = seen.setdefault(row["unique_id"], where)
            if first != where:
                raise ValueError(f"found unique_id {row['unique_id']} again, expected it once (first at {first})")
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is an error here, not when writing
            rows.append(row)
        except json.JSONDecodeError as error:
            inner = error.lineno - 1  # a MATH file may have several lines
            path, _, line = where.rpartition(":")
            raise BadInput(f"{path}:{int(line) + inner}: found invalid JSON ({error.msg} at column {error.colno}), "
                           "expected one JSON object") from None
        except RecursionError:
            raise BadInput(f"{where}: found JSON nested too deeply, expected one object with fields") from None
        except ValueError as error:
            raise BadInput(f"{where}: {error}") from None
    if limit is not None:
        chosen = sorted(random.Random(seed).sample(range(len(rows)), min(limit, len(rows))))
        rows = [rows[i] for i in chosen]
    try:
        files.write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise BadInput(f"{target}:0: found that it cannot be written ({error.strerror}), expected a new file") from None
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("input", type=Path, help="a jsonl file, or the folder of MATH's json files")
    parser.add_argument("output", type=Path, help="the jsonl file to write; it must not exist yet")
    parser.add_argument("--limit", type=int, help="keep this many problems, chosen at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="for the choice of --limit (default: 0)")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit: found {args.limit}, expected at least 1")
    try:
        rows = prepare(args.input, args.output, args.limit, args.seed)
    except BadInput as error:
        print(f"prepare.py: {files.visible(error, 1000)}", file=sys.stderr)
        return 2
    print(f"{files.visible(args.output, 1000)}: {len(rows)} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
