"""Files that strangers may have written or that a kill may cut off: JSON, jsonl, problem files, writing aside and renaming."""
import json
import os
import zlib
from pathlib import Path


def read_json(path):
    """A JSON object from a file, or a ValueError that names the file."""
    if path.stat().st_size > 2**26:  # the index of a model of a trillion parameters has a few MB
        raise ValueError(f"{path}: {path.stat().st_size} bytes, expected at most {2**26}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path, growing=False):
    """(line number, object) of each line of a jsonl file; growing: a last line still being written is left out."""
    with open(path, encoding="utf-8") as f:
        try:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    if growing and not line.endswith("\n"):
                        return
                    raise ValueError(f"{path}:{number}: not valid JSON: {e}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text: {e}") from None


def write_text(path, text):
    """Write aside and rename, so that no reader and no crash ever sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def append_jsonl(path, rows):
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None  # a failed write does not name its file


def sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def measure(path):
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as f:
        while chunk := f.read(1 << 22):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]


def regular(file):
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{file}: expected a file, and no link")


def load_problems(path, need=("problem", "answer"), limit=None):
    """Rows of a jsonl file, each with the texts `need` (solution may also be a list of [text, trained] pairs)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected problems as jsonl")
    rows = []
    for number, row in read_jsonl(path):
        for key in need:
            value = row.get(key)
            pieces = key == "solution" and isinstance(value, list) and value and all(
                isinstance(p, list) and [type(x) for x in p] == [str, bool] for p in value)
            if not pieces and not (isinstance(value, str) and value.strip()):
                found = "nothing" if value is None else repr(value)[:60]
                raise ValueError(f"{path}:{number}: {key} is {found}, expected text")
        rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path}: holds no problem")
    return rows[:limit]
