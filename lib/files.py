"""Reading files that may be malformed or hostile, and writing files so that a kill leaves no half of one:
JSON, jsonl, problem files, the lock of a run's folder."""
import errno
import fcntl
import json
import os
import re
import socket
import sys
import threading
import time
import unicodedata
import zlib
from pathlib import Path

LOCK = ".lock"  # file in a run's folder that names the process writing to it
BEAT = 5.0  # seconds between heartbeats, on file systems without locks
held = {}  # {lock file: its descriptor} of this process
JSON_BYTES = 2**26  # largest JSON file; the index of a model of a trillion parameters has a few MB
LINE = 2**27  # longest line of a jsonl file, in characters; a hundred samples of one problem have 4 MB
GROUPS = ("subject", "level")  # fields of a problem by which `eval` groups its tables
TEXT = 2**20  # longest problem, answer or solution, in characters: some 250,000 tokens
LINES = "\n\t"  # control characters of a response that are printed as they are


def visible(text, length=100, keep=""):
    """An untrusted text (a name, a value, a response) made safe for messages and terminals. Characters that
    do not print, such as the escapes that move the cursor or reverse the order of letters, are written as in
    a Python string, except those in `keep`. If the text is longer than `length`, its middle is left out."""
    text = str(text)
    if length and len(text) > length:
        half = (length - 5) // 2
        text = f"{text[:half]} ... {text[-half:]}"

    def plain(c):  # Zs: spaces of any width
        return c.isprintable() or c in keep or unicodedata.category(c) == "Zs"

    return "".join(c if plain(c) else repr(c)[1:-1] for c in text)


def reading(path, mode="r"):
    """open(), but only for regular files: a pipe or a device may never end, and opening it may block."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: expected a regular file")
    return open(path, mode, encoding=None if "b" in mode else "utf-8")


def read_json(path):
    """Read a JSON object from a file. Errors are a ValueError that names the file."""
    with reading(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > JSON_BYTES:
            raise ValueError(f"{path}: {size} bytes, expected at most {JSON_BYTES}")
        text = f.buffer.read()
    try:
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_jsonl(path, growing=False):
    """(line number, object) for each line of a jsonl file. growing: skip a last line that is still being
    written."""
    with reading(path) as f:
        try:
            for number, line in enumerate(iter(lambda: f.readline(LINE), ""), 1):
                if len(line) == LINE and not line.endswith("\n"):
                    raise ValueError(f"{path}:{number}: expected a line of at most {LINE} characters")
                line = line.removeprefix("\ufeff") if number == 1 else line  # a byte order mark
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as e:  # a number of 5000 digits raises ValueError
                    if growing and not line.endswith("\n"):
                        return
                    raise ValueError(f"{path}:{number}: not valid JSON: {e}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
                yield number, row
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: not UTF-8 text: {e}") from None


def write_text(path, text):
    """Write text or bytes to a temporary file and rename it, so that nobody ever sees half a file, even after
    a crash. A failed write leaves nothing behind."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    try:
        with open(aside, "xb") as f:  # "x" does not follow links
            f.write(text if isinstance(text, bytes) else text.encode("utf-8"))
        os.replace(aside, path)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None  # a failed write does not name its file
    finally:
        aside.unlink(missing_ok=True)


def append_jsonl(path, rows):
    if os.path.lexists(path):
        regular(path)
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
    with reading(path, "rb") as f:
        while chunk := f.read(1 << 22):
            size += len(chunk)
            crc = zlib.crc32(chunk, crc)
    return [size, crc]


def lock(folder):
    """Lock a run's folder until release() or the end of the process, however it ends. Raises an OSError that
    names the process that already holds it."""
    path = (Path(folder) / LOCK).absolute()
    if path in held:
        return
    if os.path.lexists(path):
        regular(path)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    me = dict(host=socket.gethostname(), pid=os.getpid(), since=time.strftime("%Y-%m-%d %H:%M:%S %z"))
    try:
        beating = not flocked(fd)
        if beating and beats(path):
            raise BlockingIOError
    except BlockingIOError:
        text = os.pread(fd, 1000, 0).decode("utf-8", "replace")
        os.close(fd)
        try:
            found = json.loads(text)
            who = f"process {found['pid']} on {found['host']} since {found['since']}"
        except (ValueError, KeyError, TypeError):
            who = "another process"
        raise OSError(f"{folder}: in use by {visible(who)}; nothing was changed. Wait until it ends, or stop "
                      "it") from None
    held[path] = fd

    def write(**more):
        text = json.dumps(me | more).encode()
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))

    def beat():
        count = 0
        while path in held:
            count += 1
            try:
                write(beat=count)
            except OSError:
                pass  # the disk is full or a server is away; the next beat may get through
            time.sleep(BEAT)

    try:
        write()
    except OSError as e:
        release()
        raise OSError(e.errno, e.strerror, str(path)) from None  # a failed write does not name its file
    if beating:
        threading.Thread(target=beat, daemon=True).start()


def flocked(fd):
    """Lock the file for this process. Returns False if its file system has no locks; raises BlockingIOError
    if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        raise
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False


def beats(path):
    """Whether another process is still writing heartbeats to the lock file. They are compared with each other
    and not with the time, since clocks differ."""
    before = path.read_bytes()
    for _ in range(5 if b'"beat"' in before else 0):
        time.sleep(BEAT / 2)
        if path.read_bytes() != before:
            return True
    return False


def release():
    """Release what lock() holds. The file stays: if it were deleted, a process that had just opened it would
    lock a file that no other process sees."""
    while held:
        _, fd = held.popitem()
        os.close(fd)


# A child process that a user's function forks may outlive the run and must not keep its folder locked.
os.register_at_fork(after_in_child=release)


def regular(file):
    if file.is_symlink() or not file.is_file():
        raise ValueError(f"{file}: expected a regular file, not a link")


def check_text(value, name):
    """Raise a ValueError unless `value` is a string that is not blank, not too long, and can be encoded."""
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if value is None else visible(repr(value), 60)
        raise ValueError(f"{name} is {found}, expected text")
    if len(value) > TEXT:
        raise ValueError(f"{name} has {len(value)} characters, expected at most {TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f"{name} has {value[e.start]!r}, half a surrogate pair, at character {e.start + 1}, "
                         "expected text") from None


def finite(value):
    """Whether a value from a JSON file is a number in the range of a float."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # NaN is not


def answer_text(value):
    """An answer in the form that the verifier takes. A number from a JSON file becomes the text that one
    would write, 25 for 25.0. Anything else is left as it is, including 1e+22."""
    plain = type(value) in (int, float) and re.fullmatch(r"(-?[0-9]+)(?:\.0|(\.[0-9]+))?", repr(value))
    return plain[1] + (plain[2] or "") if plain else value


def check_problem(row, need):
    for key in need:
        value = row.get(key)
        pieces = key == "solution" and isinstance(value, list) and value and all(
            isinstance(p, list) and [type(x) for x in p] == [str, bool] for p in value)
        check_text("".join(text for text, _ in value) if pieces else value, key)
    for key in GROUPS:
        value = row.get(key, 0)
        if type(value) is str:
            check_text(value, key)
        elif not finite(value):
            raise ValueError(f"{key} is {visible(repr(value), 60)}, expected a number or text")


def read_problems(path, need=("problem", "answer")):
    """Yield the rows of a problem file in jsonl, and check that each has the texts in `need`. A solution may
    also be a list of [text, trained] pairs, and an answer may be a number."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected problems as jsonl")
    number = 0
    for number, row in read_jsonl(path):
        row = {key: value for key, value in row.items() if value is not None or key not in GROUPS}
        if "answer" in need:
            row["answer"] = answer_text(row.get("answer"))
        try:
            check_problem(row, need)
        except ValueError as e:
            raise ValueError(f"{path}:{number}: {e}") from None
        yield row | {"line": number}
    if not number:
        raise ValueError(f"{path}: contains no problem")


def load_problems(path, need=("problem", "answer"), limit=None):
    return list(read_problems(path, need))[:limit]
