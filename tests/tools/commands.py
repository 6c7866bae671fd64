"""Run the commands that README.md and the pages in docs/ show.

    python tests/tools/commands.py [PAGE ...] [--work FOLDER]

Without a PAGE all of them, README.md first. Each page gets an empty folder with a copy of the project's files, in which its commands
run in their order; FOLDER is where these folders are left (else they are temporary). A line says of each block whether it ended well, and the
exit status is 1 where one did not.

Above each block of code of a page stands one of these comments (tests/test_docs.py looks for them):

    <!-- run -->              run by bash, which stops at the first command that fails
    <!-- file: NAME -->       written to the file NAME
    <!-- not run: REASON -->  not run: it needs a GPU, hours, a download, or is what a command printed
    <!-- run: downloads -->   of docs/reproduce.md: each `hf download` makes the stand-in of its repository in STAND_INS

So that a page takes a minute or two, the files of data/tiny have their first 16 rows alone, and the words in TOY stand behind `bash train.sh`:
whatever else the page gives still counts. In docs/reproduce.md, whose real names of files and fields are filled with stand-ins, the words in
REPRODUCED take the places of others.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from lib import hf  # noqa: E402
import model as M  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE = ROOT / "docs/reproduce.md"
BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)  # (mark or "", language, text)
COPIED = ("rlsp.py", "model.py", "rewards.py", "ppo.py", "train.sh", "lib", "data", "docs", "tests", "requirements.txt", "pytest.ini")
ROWS = 16  # of each file of data/tiny
TOY = "--steps 2 --rollout-batch 8 --train-batch 4 --max-response 16 --freeze-steps 0"
PPO = "--steps 2 --rollout-batch 4 --train-batch 2 --max-response 16 --freeze-steps 0 --save-every 1 --dtype float32"
# What a command of docs/reproduce.md has in the page: what stands there in the run here.
REPRODUCED = {
    "bash train.sh": f'PPO_FLAGS="$PPO_FLAGS --eval-every 1" SFT_FLAGS="--epochs 1 --batch 4 --dtype float32" '
                     f'EVAL_FLAGS="$EVAL_FLAGS --samples 2 --max-response 8 --dtype float32" bash train.sh {PPO}',
    "--exploration none --out": f"{PPO} --exploration none --out",
    "--limit 1\n": "--limit 1 --max-response 8 --dtype float32\n",
    "--limit 200": "--limit 3"}


def blocks(kind, page=PAGE):
    """The blocks of code after <!-- kind -->, in the page's order."""
    return [text for mark, _, text in BLOCK.findall(page.read_text(encoding="utf-8")) if mark == kind]


# ---- stand-ins of the downloads

def problems(first, number):
    """(problem, answer): sums that are all different."""
    return [(f"What is ${i} + {i + 1}$?", 2 * i + 1) for i in range(first, first + number)]


def solution(answer):
    return f"We add the two numbers and find $\\boxed{{{answer}}}$."


def jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(file, rows):
    import pyarrow
    from pyarrow.parquet import write_table
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), file)


def llama(folder):
    """A random Llama of the tiny recipe's shape: Llama 3's special tokens and headers, room for long texts."""
    folder.mkdir(parents=True)
    raw = json.loads((ROOT / "data/tiny/model/config.json").read_text()) | dict(max_position_embeddings=16384)
    net = M.Llama(M.Config.from_dict(raw))
    M.init_weights(net, 0)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() == 2:
                p.mul_(1.5)
    hf.save(net, folder)
    hf.copy_tokenizer(ROOT / "data/tiny/model", folder)


def qwq(folder):
    rows = [dict(problem=p, qwq="Hmm. " * 5 + solution(a), source="synthetic_math", split="train") for p, a in problems(100, 24)]
    rows[3]["qwq"] = "Wait, again. " * 2000 + rows[3]["qwq"]  # longer than 8192 tokens
    rows.append(dict(problem="What is $7 + 8$?", qwq=solution(15), source="synthetic_math", split="train"))  # MATH-500 has it
    rows.append(dict(problem="Tell me a story.", qwq="Once upon a time.", source="magpie", split="train"))  # NuminaMath has not
    for i in range(2):
        parquet(folder / f"data/train-0000{i}-of-00002.parquet", rows[i::2])


def numina(folder):
    rows = [dict(source="synthetic_math", problem=p, solution=solution(a), messages=[dict(content=p, role="user")])
            for p, a in problems(0, 200)]
    parquet(folder / "data/train-00000-of-00005.parquet", rows)


def math(folder):
    for i, subject in enumerate(("Algebra", "Counting & Probability")):
        rows = [dict(problem=p, level="Level 2", type=subject, solution=solution(a)) for p, a in problems(10 * i, 10)]
        parquet(folder / subject.lower().replace(" & ", "_and_") / "train-00000-of-00001.parquet", rows)


def math500(folder):
    jsonl(folder / "test.jsonl", [dict(problem=p, solution=solution(a), answer=str(a), subject="Algebra", level=2,
                                       unique_id=f"test/algebra/{a}.json") for p, a in problems(6, 3)])


def aime(folder):
    rows = [dict(id=60 + i, problem=p, solution=solution(a), answer=f"{a:03d}", year="2024",
                 url=f"https://artofproblemsolving.com/wiki/index.php/2024_AIME_I_Problems/Problem_{i + 1}")
            for i, (p, a) in enumerate(problems(50, 2))]
    parquet(folder / "data/train-00000-of-00001.parquet", rows)


STAND_INS = {"meta-llama/Llama-3.1-8B-Instruct": llama, "amphora/QwQ-LongCoT-130K": qwq, "AI-MO/NuminaMath-CoT": numina,
             "EleutherAI/hendrycks_math": math, "HuggingFaceH4/MATH-500": math500, "HuggingFaceH4/aime_2024": aime}


def download(command, work):
    """The stand-in of `hf download REPOSITORY ... --local-dir FOLDER`."""
    words = shlex.split(command)
    assert words[:2] == ["hf", "download"], command
    STAND_INS[words[2]](work / words[words.index("--local-dir") + 1])


# ---- running

def toy(block, page):
    """A block as it is run here."""
    if page == PAGE:
        for text, replacement in REPRODUCED.items():
            block = block.replace(text, replacement)
        return block
    return re.sub(r"bash train\.sh(?! *(?:setup|test|experiment|gsm8k)\b)", f"bash train.sh {TOY}", block)


def checkout(work):
    """A copy of the project's files, with an environment that is there and short data. Returns the variables for its commands."""
    work.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, work / name)
    for file in (work / "data/tiny").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(True)[:ROWS]))
    (work / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | dict(VENV="none", PATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def run_block(mark, text, page, work, env):
    """What a block printed, or a RuntimeError that has what it printed."""
    if mark.startswith("file: "):
        (work / mark.removeprefix("file: ")).write_text(text)
        return ""
    if mark == "run: downloads":
        for line in text.splitlines():
            download(line, work)
        return ""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", toy(text, page)], cwd=work, env=env, capture_output=True, text=True,
                          timeout=3600, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{toy(text, page)}\nexit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return f"{toy(text, page)}{done.stdout}"


def run_page(page, work, say=print):
    """Run a page's blocks in the folder `work`, and go on after one that fails. Returns the errors."""
    env = checkout(work)
    errors = []
    for number, (mark, _, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1):
        if not mark.startswith(("run", "file: ")):
            continue
        started = time.perf_counter()
        try:
            run_block(mark, text, page, work, env)
            end = "ok"
        except (RuntimeError, AssertionError, OSError, subprocess.TimeoutExpired) as e:
            errors.append(str(e))
            end = f"FAILED\n{e}"
        first = text.split("\n", 1)[0]
        say(f"{page.name}, block {number} ({time.perf_counter() - started:.0f} s): {first:.80}: {end}")
    return errors


def reproduce(work, say=print):
    """Run docs/reproduce.md in the folder `work`; an AssertionError says which command failed, with its output."""
    errors = run_page(PAGE, work, say)
    assert not errors, "\n".join(errors)
    run = "".join(blocks("run"))
    unused = [text for text in REPRODUCED if text not in run]
    assert not unused, f"no command of the page has {unused}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", type=Path, nargs="*", metavar="PAGE", help="such as docs/runs.md; without one all pages")
    parser.add_argument("--work", type=Path, help="a folder to make; else a temporary one")
    args = parser.parse_args()
    failed = 0
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for page in [page.resolve() for page in args.pages] or PAGES:
            failed += len(run_page(page, work.resolve() / page.stem, lambda line: print(line, flush=True)))
    print(f"{failed} blocks failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
