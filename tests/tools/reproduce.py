"""Run the commands of docs/reproduce.md on stand-ins, from the downloads to the exported model.

    python tests/tools/reproduce.py [--work FOLDER]      FOLDER: where to leave what it makes; else a temporary one

The commands are taken out of the page: the blocks after `<!-- run -->`, in their order. What is replaced is said here and nowhere
else: each `hf download` of the block `<!-- run: downloads -->` makes the stand-in of its repository in STAND_INS, with the real
names of files and fields, and the words in TOY make the sizes those of a toy.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
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

PAGE = ROOT / "docs/reproduce.md"
PPO = "--steps 2 --rollout-batch 4 --train-batch 2 --max-response 16 --freeze-steps 0 --save-every 1 --dtype float32"
# What a command has in the page: what stands there in the run here.
TOY = {
    "bash train.sh": f'PPO_FLAGS="$PPO_FLAGS --eval-every 1" SFT_FLAGS="--epochs 1 --batch 4 --dtype float32" '
                     f'EVAL_FLAGS="$EVAL_FLAGS --samples 2 --max-response 8 --dtype float32" bash train.sh {PPO}',
    "--exploration none --out": f"{PPO} --exploration none --out",
    "--limit 1\n": "--limit 1 --max-response 8 --dtype float32\n",
    "--limit 200": "--limit 3"}


def blocks(kind):
    """The blocks of code after <!-- kind -->, in the page's order."""
    return re.findall(rf"^<!-- {re.escape(kind)} -->\n```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


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

def toy(block):
    for text, replacement in TOY.items():
        block = block.replace(text, replacement)
    return block


def checkout(work):
    """The project's files as a reader's checkout has them, with an environment that is there."""
    for name in ("rlsp.py", "model.py", "rewards.py", "ppo.py", "train.sh", "lib", "data", "requirements.txt"):
        (work / name).symlink_to(ROOT / name)
    (work / ".venv").symlink_to(sys.prefix)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | dict(VENV="none", PATH=path, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")


def reproduce(work, say=print):
    """Run all of it in the folder `work`; an AssertionError says which command failed, with its output."""
    env = checkout(work)
    for line in "".join(blocks("run: downloads")).splitlines():
        download(line, work)
    used = set()
    for block in blocks("run"):
        used |= {text for text in TOY if text in block}
        started = time.perf_counter()
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", toy(block)], cwd=work, env=env, capture_output=True, text=True,
                              timeout=600, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{toy(block)}\nexit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        say(f"{toy(block)}{done.stdout}({time.perf_counter() - started:.0f} s)\n")
    assert used == TOY.keys(), f"no command of the page has {sorted(TOY.keys() - used)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="a folder to make; else a temporary one")
    work = parser.parse_args().work
    with contextlib.ExitStack() as stack:
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        reproduce(work.resolve())


if __name__ == "__main__":
    main()
