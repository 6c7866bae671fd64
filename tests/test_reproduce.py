"""docs/reproduce.md: its commands on stand-ins, and its Slurm script beside stand-ins of Slurm."""
import json
import os
import signal
import subprocess
import time

import pytest

import commands
from conftest import ROOT


def test_the_commands_of_the_page_run_on_stand_ins(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install pyarrow)")
    said = []
    commands.reproduce(tmp_path, said.append)
    rows = [json.loads(line) for line in (tmp_path / "problems/sft.jsonl").read_text().splitlines()]
    assert len(rows) == 23  # of 26: one was too long, one is of MATH-500, one is not of NuminaMath
    assert all("Hmm." in row["solution"] for row in rows)
    kept = [{json.loads(line)["problem"] for line in (tmp_path / f"problems/{name}.jsonl").read_text().splitlines()}
            for name in ("math", "validation", "math500")]
    assert [len(x) for x in kept] == [14, 3, 3] and len(set.union(*kept)) == 20
    for name, problems in (("math500", 3), ("aime2024", 2)):
        summary = json.loads((tmp_path / f"runs/8b/eval-{name}/summary.json").read_text())
        assert [*summary] == ["downloads/Llama-3.1-8B-Instruct", "runs/8b/sft/model", "runs/8b/ppo/model"]
        assert {s["all"]["problems"] for s in summary.values()} == {problems}
    assert (tmp_path / "runs/8b/report.html").is_file()
    flags = json.loads((tmp_path / "runs/8b/ppo/config.json").read_text())["flags"]
    assert flags["eval_data"] == "problems/validation.jsonl" and flags["model"] == "runs/8b/sft/model"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (tmp_path / "runs/8b/best" / name).is_file()


# ---- the Slurm script

@pytest.fixture
def slurm(tmp_path):
    """srun runs its command on one node and passes TERM on; scontrol notes what it is asked."""
    (tmp_path / "rlsp.sbatch").write_text("".join(commands.blocks("file: rlsp.sbatch")))
    (tmp_path / "bin").mkdir()
    for name, text in dict(
            srun='trap \'kill -TERM "$p"\' TERM\nSLURM_NODEID=0 "$@" & p=$!\nwait "$p"; s=$?\nwhile kill -0 "$p" 2> /dev/null; do wait "$p"; s=$?; done\nexit "$s"',
            scontrol='echo "$*" >> asked; echo node7').items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "train.sh").write_text(
        'echo "$NNODES $NODE_RANK $RDZV $MODEL $RUN $SFT_DATA $DATA $EVAL_DATA" > seen\n'
        'trap "sleep 0.3; exit 75" TERM\nwhile [ "${WAIT:-}" ]; do sleep 0.05; done\nexit "${STATUS:-0}"\n')
    env = dict(PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}", SLURM_NNODES="1", SLURM_JOB_NODELIST="node[7]", SLURM_JOB_ID="42")

    def start(**more):
        return subprocess.Popen(["bash", "rlsp.sbatch"], cwd=tmp_path, env=env | more)
    start.folder = tmp_path
    return start


def test_a_job_that_is_signalled_is_queued_again(slurm):
    job = slurm(WAIT="1")
    for _ in range(500):
        if (slurm.folder / "seen").exists():
            break
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 75
    assert (slurm.folder / "asked").read_text().splitlines() == ["show hostnames node[7]", "requeue 42"]
    assert (slurm.folder / "seen").read_text().split()[:3] == ["1", "0", "node7:29500"]


@pytest.mark.parametrize("status", [0, 1, 2])
def test_a_job_that_ends_is_not_queued_again(slurm, status):
    assert slurm(STATUS=str(status)).wait(20) == status
    assert (slurm.folder / "asked").read_text().splitlines() == ["show hostnames node[7]"]


def test_the_slurm_script_runs_what_the_page_runs(slurm):
    assert slurm().wait(20) == 0
    train = next(block for block in commands.blocks("run") if "bash train.sh" in block)
    shown = subprocess.run(["bash", "-c", train.replace("bash train.sh", "") + '\necho "$MODEL $RUN $SFT_DATA $DATA $EVAL_DATA"'],
                           capture_output=True, text=True).stdout
    assert (slurm.folder / "seen").read_text().split(" ", 3)[3] == shown


def test_the_plan_of_the_page_is_what_plan_prints(tmp_path):
    """The numbers of the page, printed anew from the 8B model's config.json."""
    from test_plan import LLAMA_8B
    page = commands.PAGE.read_text()
    command, printed = page.split("$ python rlsp.py ", 1)[1].split("```", 1)[0].split("\n", 1)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    words = [str(tmp_path) if word.startswith("downloads/") else word for word in command.split()]
    done = subprocess.run([commands.sys.executable, str(ROOT / "rlsp.py"), *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == printed
    assert "\n".join([*printed.splitlines()[:20], "..."]) in (ROOT / "docs/gpus.md").read_text()
