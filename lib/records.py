"""Reads the records of downloaded data sets: jsonl, JSON, csv, parquet, one file or a folder of shards.

A record is a dict. Records are read one after the other, so that a file may be larger than memory; whatever
must be in memory at once has a limit. What cannot be read raises a ValueError that names the file and the
line (for parquet the row).
"""
import csv
import json
import os
import re
from pathlib import Path

from lib import files

KINDS = (".json", ".jsonl", ".csv", ".parquet")
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # without records
MOST_BYTES = 2**30  # largest JSON file that is one array or object; DeepScaleR has 21 MB
RECORD_BYTES = 2**24  # largest record; those with four long generations have some 300 KB
GROUP_BYTES = 2**31  # largest row group of parquet, unpacked; Hugging Face writes some 100 MB
BATCH = 16  # rows of parquet that are unpacked at once
SMALL_GROUP = 2**27  # larger row groups are unpacked row by row, since one row may hold most of it
SPACE = re.compile(r"[ \t\n\r]*")


def read(sources):
    """(FILE:LINE for messages, a name for the row, the record) for each record in files and folders."""
    for path, name in shards(sources):
        kind = {".csv": read_csv, ".parquet": read_parquet}.get(path.suffix.lower(), read_json)
        found = False
        try:
            with opened(path) as f:
                for number, part, record in kind(f, path):
                    found = True
                    yield f"{path}:{number}", f"{name}/{part}" if part else name, record
        except OSError as e:
            raise ValueError(f"{path}:0: found that it cannot be read ({e.strerror}), "
                             "expected records") from None
        if not found:
            raise ValueError(f"{path}:1: found an empty file, expected one problem per line")


def shards(sources):
    """(path, the name for its rows) of each file. Files of a folder are in numerical order, 2.json before
    10.json, whatever the order of the file system."""
    sources = [Path(source) for source in sources]
    found = []
    for source in sources:
        if not os.path.isdir(source):
            whole = len(sources) > 1 and len({s.stem for s in sources}) < len(sources)
            found.append((source, f"{source.parent.name}/{source.stem}" if whole else source.stem))
            continue
        inside = [p.relative_to(source) for p in source.rglob("*")
                  if p.suffix.lower() in KINDS and p.name not in ABOUT and not p.is_dir()]
        inside = [p for p in inside if not any(part.startswith(".") for part in p.parts)]  # hf's .cache
        if not inside:
            raise ValueError(f"{source}:0: found no .json file in this folder, and no .jsonl, .csv or "
                             ".parquet, expected files such as MATH's algebra/1.json, or shards")
        # train/algebra/1.json, as MATH-500 names its problems, so that an overlap can be found
        found += [(source / p, f"{source.resolve().name}/{p.as_posix()}")
                  for p in sorted(inside, key=lambda p: (p.parent, len(p.stem), p.stem, p.suffix))]
    return found


def opened(path):
    try:
        return files.reading(path, "rb")
    except OSError as e:
        raise ValueError(f"{path}:0: found no readable file ({e.strerror}), "
                         "expected jsonl, JSON, csv or parquet") from None
    except ValueError:
        raise ValueError(f"{path}:0: found a pipe or a device, expected a regular file") from None


# ---- JSON and csv

def text(data, path, line):
    """Decode bytes as text. `line` is the number of their first line in the file."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise ValueError(f"{path}:{line}: found bytes that are not UTF-8, "
                         "expected JSON or csv text (parquet is recognised by its name)") from None


def lines(f, path):
    """(number, text) of each line of a file."""
    for number, line in enumerate(iter(lambda: f.readline(RECORD_BYTES + 1), b""), 1):
        if len(line) > RECORD_BYTES:
            raise ValueError(f"{path}:{number}: found a line of more than {RECORD_BYTES} bytes, "
                             "expected fewer")
        yield number, text(line, path, number)


def parsed(path, line, load, *given):
    """load(*given). Its errors become a ValueError in which lines are counted from `line`."""
    try:
        return load(*given)
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{line + e.lineno - 1}: found invalid JSON ({e.msg} at column {e.colno}), "
                         "expected one JSON object") from None
    except RecursionError:
        raise ValueError(f"{path}:{line}: found JSON nested too deeply, "
                         "expected one object with fields") from None
    except ValueError as e:  # a number of 5000 digits
        raise ValueError(f"{path}:{line}: found invalid JSON ({e}), expected one JSON object") from None


def read_json(f, path):
    """(line, part of the name, record) for each record: in an array, one object on many lines as in MATH, or
    one object per line. Hugging Face's .json files may be any of these."""
    start = f.read(4096).removeprefix("\ufeff".encode()).lstrip()
    f.seek(0)
    if not start.startswith(b"[") and path.suffix.lower() != ".json":
        for number, line in lines(f, path):
            if line.strip():
                yield number, number, parsed(path, number, json.loads, line.rstrip())
        return
    data = f.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"{path}:0: found more than {MOST_BYTES} bytes of JSON, expected fewer, "
                         "or one object per line in a .jsonl file")
    whole = text(data, path, 1)
    del data
    at = SPACE.match(whole).end()
    if at == len(whole):
        return
    if whole[at] == "[":
        yield from read_array(whole, at + 1, path)
        return
    record, end = parsed(path, 1, json.JSONDecoder().raw_decode, whole, at)
    if SPACE.match(whole, end).end() == len(whole):
        yield 1, "", record
        return
    for number, line in enumerate(whole.split("\n"), 1):  # splitlines() would also split inside strings
        if line.strip():
            yield number, number, parsed(path, number, json.loads, line.rstrip())


def read_array(whole, at, path):
    """The values of an array, the first of which begins at `at`. They are decoded one after the other, since
    all at once would take several times the memory of the text."""
    decode = json.JSONDecoder().raw_decode
    line = 1
    counted = 0
    part = 0
    more = SPACE.match(whole, at).end()
    if whole[more:more + 1] == "]":
        return
    while True:
        at = SPACE.match(whole, at).end()
        line += whole.count("\n", counted, at)
        counted = at
        try:
            record, at = decode(whole, at)
        except RecursionError:
            raise ValueError(f"{path}:{line}: found JSON nested too deeply, "
                             "expected objects with fields") from None
        except ValueError as e:
            where = f"{path}:{getattr(e, 'lineno', line)}"
            raise ValueError(f"{where}: found invalid JSON ({getattr(e, 'msg', e)}), "
                             "expected an array of objects") from None
        part += 1
        yield line, part, record
        at = SPACE.match(whole, at).end()
        if whole[at:at + 1] == "]":
            break
        if whole[at:at + 1] != ",":
            line += whole.count("\n", counted, at)
            raise ValueError(f"{path}:{line}: found {whole[at:at + 20]!r} after record {part}, "
                             "expected , or ]")
        at += 1
    if SPACE.match(whole, at + 1).end() != len(whole):
        raise ValueError(f"{path}:{line}: found more after the end of the array, expected nothing")


def read_csv(f, path):
    """(line, line, record) for each record. The first line has the names of the fields, and each value is
    text."""
    csv.field_size_limit(files.TEXT)
    taken = 0

    def bounded():
        nonlocal taken
        for number, line in lines(f, path):
            taken += len(line)
            if taken > RECORD_BYTES:
                raise ValueError(f"{path}:{number}: found a record of more than {RECORD_BYTES} "
                                 "characters, expected fewer (a quotation mark that is not closed?)")
            yield line

    rows = csv.reader(bounded(), strict=True)
    names = None
    before = 0
    try:
        for row in rows:
            line = before + 1
            before = rows.line_num
            taken = 0
            if names is None:
                names = row
            elif row:
                if len(row) != len(names):
                    raise ValueError(f"{path}:{line}: found {len(row)} fields, expected {len(names)}, "
                                     "as the first line has them")
                yield line, line, dict(zip(names, row))
    except csv.Error as e:
        raise ValueError(f"{path}:{max(1, rows.line_num)}: found invalid csv ({e}), expected csv "
                         "with the names of the fields in the first line") from None


# ---- parquet

def read_parquet(f, path):
    """(row, row, record) for each record. Only this function imports pyarrow, since nothing else needs it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}:0: found parquet, which pyarrow reads, expected it to be installed: "
                         "pip install pyarrow") from None
    row = 0
    try:
        # Without pre_buffer, a page is read when it is needed, instead of a whole row group.
        table = pyarrow.parquet.ParquetFile(f, buffer_size=2**20, pre_buffer=False)
        groups = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
        largest = max(groups, default=0)
        if largest > GROUP_BYTES:
            raise ValueError(f"a row group of {largest} bytes; with row_group_size=1000 it is written in "
                             "smaller ones")
        batch_size = BATCH if largest <= SMALL_GROUP else 1
        for batch in table.iter_batches(batch_size=batch_size, use_threads=False):
            if batch.nbytes > RECORD_BYTES * len(batch):  # a text that many rows share is unpacked many times
                raise ValueError(f"records of {batch.nbytes // len(batch)} bytes, at most {RECORD_BYTES} "
                                 "are read")
            for record in batch.to_pylist():
                row += 1
                yield row, row, record
    except (pyarrow.ArrowException, OSError, OverflowError, MemoryError, ValueError) as e:
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path}:{row + 1}: found {reason}, expected rows of parquet") from None
