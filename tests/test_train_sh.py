"""train.sh: signals, exit statuses, stages that go on, set-up. Most tests run it beside stand-ins of rlsp.py and pip, which are quick."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_ppo import folder  # noqa: F401

# Stands in for rlsp.py: notes its words; with SLOW=stage it waits in that stage for a signal, which it answers as rlsp.py does.
STAND_IN = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
here = pathlib.Path(__file__).parent
with open(here / "calls.jsonl", "a") as f:
    f.write(json.dumps({"words": words, "cwd": os.getcwd(), "port": os.environ.get("MASTER_PORT")}) + "\\n")
resume, run = "--resume" in words, None
for flag in ("--out", "--resume"):
    if flag in words:
        run = pathlib.Path(words[words.index(flag) + 1])
if words[0] == "report":
    run = run.parent
assert run.is_absolute() or str(run).startswith(("runs", "mine")), run
assert resume == (run / "config.json").exists() or words[0] == "report"
run.mkdir(parents=True, exist_ok=True)
(run / "config.json").write_text("{}")
def stop(number, frame):
    time.sleep(float(os.environ.get("SAVING", "0.3")))
    (run / "stopped").write_text(signal.Signals(number).name)
    sys.exit(int(os.environ.get("STATUS", "75")))
if os.environ.get("SLOW") == f"{words[0]} {run.name}" and not resume:
    signal.signal(signal.SIGTERM, stop)
    (here / "ready").write_text(str(os.getpid()))
    time.sleep(30)
if os.environ.get("FAILS") == words[0]:
    sys.exit(int(os.environ["STATUS"]))
if not (run / "done").exists():
    (run / "done").write_text("")
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project's scripts with a stand-in for rlsp.py and a .venv that is whole."""
    here = tmp_path / "checkout of mine"
    for name in ("train.sh", "requirements.txt", "lib", "docs/results/experiment.sh"):
        source, target = ROOT / name, here / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "*.c", "__pycache__"))
        elif source.is_file():
            shutil.copyfile(source, target)
    (here / "rlsp.py").write_text(STAND_IN)
    (here / ".venv/bin").mkdir(parents=True)
    (here / ".venv/bin/python").symlink_to(sys.executable)
    sums = subprocess.run(["cksum"], stdin=open(here / "requirements.txt"), capture_output=True, text=True).stdout
    (here / ".venv/installed").write_text(sums)
    return here


def environment(**more):
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MODEL", "DATA", "RUN", "SEED", "VENV", "NNODES")
    return {k: v for k, v in os.environ.items() if k not in ours} | {k: str(v) for k, v in more.items()}


def train_sh(checkout, *words, cwd=None, shell="bash", **env):
    return subprocess.run([shell, str(checkout / "train.sh"), *words], cwd=cwd or checkout, capture_output=True, text=True, timeout=60,
                          env=environment(**env))


def calls(checkout):
    file = checkout / "calls.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def stages(checkout):
    """[command, last part of the run's folder, --out or --resume] of each call so far."""
    found = []
    for call in calls(checkout):
        words = call["words"]
        how = "--resume" if "--resume" in words else "--out"
        found.append((words[0], Path(words[words.index(how) + 1]).name, how))
    return found


def wait_for(file, process):
    for _ in range(1000):
        if file.exists() and file.read_text():
            return int(file.read_text())
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{file} did not come")


def start(checkout, *words, prefix=(), **env):
    return subprocess.Popen([*prefix, "bash", str(checkout / "train.sh"), *words], cwd=checkout, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(**env))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- signals

@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
def test_a_signal_to_the_shell_alone_reaches_the_stage_and_is_waited_for(checkout, name):
    process = start(checkout, RUN="mine", SLOW="ppo ppo", SAVING="0.5")
    child = wait_for(checkout / "ready", process)
    process.send_signal(getattr(signal, name))
    time.sleep(0.1)
    process.send_signal(getattr(signal, name))  # some schedulers send it twice
    _, error = process.communicate(timeout=20)
    assert process.returncode == 75 and not alive(child)
    assert (checkout / "mine/ppo/stopped").is_file()  # it has had its time to save
    assert stages(checkout)[-1] == ("ppo", "ppo", "--out")  # no stage began after it
    assert "the same command with RUN=mine continues it" in error
    # and goes on: what was begun is resumed (rlsp.py leaves alone what is done), the others begin
    assert train_sh(checkout, RUN="mine").returncode == 0
    again = stages(checkout)[4:]
    assert again[:5] == [("sft", "facts", "--resume"), ("sft", "steps", "--resume"), ("sft", "sft", "--resume"), ("ppo", "ppo", "--resume"),
                         ("eval", "eval", "--out")]
    assert not (checkout / "mine/ppo/stopped").exists()


def test_as_process_1_of_a_container_it_hears_signals(checkout):
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    try:
        allowed = subprocess.run([*unshare, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("a PID namespace is not allowed here (unshare --pid --fork --mount-proc)")
    process = start(checkout, prefix=unshare, RUN="mine", SLOW="ppo ppo")
    wait_for(checkout / "ready", process)
    (shell,) = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    os.kill(shell, signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and (checkout / "mine/ppo/stopped").is_file()


def test_a_signal_that_the_stage_survives_ends_the_recipe_after_it(checkout):
    process = start(checkout, RUN="mine", SLOW="sft steps", STATUS="0")
    wait_for(checkout / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and stages(checkout)[-1][:2] == ("sft", "steps")


@pytest.mark.parametrize("status", [1, 2, 75, 143])
def test_the_status_of_a_stage_is_that_of_train_sh(checkout, status):
    done = train_sh(checkout, RUN="mine", FAILS="ppo", STATUS=status)
    assert done.returncode == status and stages(checkout)[-1][0] == "ppo"
    (checkout / "mine/ppo/stopped").write_text("of a signal long ago")
    assert train_sh(checkout, RUN="mine", FAILS="ppo", STATUS=status).returncode == status


def test_a_longer_ppo_run_is_evaluated_anew(checkout):
    assert train_sh(checkout, RUN="mine").returncode == 0
    assert train_sh(checkout, RUN="mine").returncode == 0
    assert stages(checkout)[-2] == ("eval", "eval", "--resume")
    (checkout / "mine/eval/old").write_text("")
    (checkout / "mine/ppo/done").write_text("60")  # as if it had gone on to more steps
    assert train_sh(checkout, RUN="mine").returncode == 0
    assert stages(checkout)[-2] == ("eval", "eval", "--out")
    (kept,) = (checkout / "mine").glob("eval-before-*")
    assert (kept / "old").is_file()


def test_a_real_run_is_stopped_and_goes_on_to_its_end(folder, tmp_path):  # noqa: F811
    words = "--steps 20 --rollout-batch 2 --train-batch 2 --max-response 32 --freeze-steps 0 --dtype float32 --save-every 0".split()
    env = dict(VENV="none", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}", RUN=tmp_path / "run", MODEL=folder,
               DATA=ROOT / "data/tiny/train.jsonl", OMP_NUM_THREADS="1")
    process = start(ROOT, *words, **env)
    metrics = tmp_path / "run/ppo/metrics.jsonl"
    for _ in range(3000):
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and (tmp_path / "run/ppo/stopped").read_text() == "SIGTERM\n", error
    assert not (tmp_path / "run/ppo/done").exists()
    done = train_sh(ROOT, *words, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(1, 21)]
    assert (tmp_path / "run/ppo/done").exists()


# ---- torchrun

def a_large_run(checkout):
    (checkout / "model").mkdir()
    for name in ("d.jsonl", "s.jsonl", "e.jsonl"):
        (checkout / name).write_text("{}\n")
    return dict(MODEL="model", DATA="d.jsonl", SFT_DATA="s.jsonl", EVAL_DATA="e.jsonl", RUN="mine")


def test_the_large_recipe_carries_the_papers_sft_and_evaluates_the_model_it_began_with(torchrun):
    checkout, env = torchrun, a_large_run(torchrun) | dict(GPUS="1", SEED="3", SHARD_RANKS="4", SAMPLER="sharded")
    assert train_sh(checkout, "--steps", "7", **env).returncode == 0
    sft, ppo, test = [call["words"] for call in calls(checkout)]
    assert sft[3:] == "--model model --data s.jsonl --seed 3 --shard-ranks 4 --epochs 5 --batch 64 --lr 2e-5 --max-tokens 8192".split()
    assert ppo[3:] == "--model mine/sft/model --data d.jsonl --seed 3 --shard-ranks 4 --sampler sharded --steps 7".split()
    assert test[3:] == "--model model mine/sft/model mine/ppo/model --data e.jsonl --seed 3 --shard-ranks 4 --sampler sharded".split()
    # without demonstrations there is no model between
    assert train_sh(checkout, **env | dict(SFT_DATA="", RUN="mine2")).returncode == 0
    ppo, test = [call["words"] for call in calls(checkout)[3:]]
    assert ppo[:5] == "ppo --out mine2/ppo --model model".split() and test[3:6] == "--model model mine2/ppo/model".split()


def test_each_stage_has_flags_of_its_own(torchrun):
    """Split as a shell does it, quotes and line ends in them kept, and nothing run or expanded."""
    (torchrun / "bait-one").write_text("")
    checkout, env = torchrun, a_large_run(torchrun) | dict(GPUS="1",
        SFT_FLAGS="--epochs 2 --prompt 'Solve:\n {problem}  in \\boxed{}'", PPO_FLAGS='--alpha 0.9  --system "" --wandb $HOME`touch oops`',
        EVAL_FLAGS="--samples 4 --prefill bait-* .")
    done = train_sh(checkout, "--alpha", "1", **env)
    assert done.returncode == 0, done.stderr
    sft, ppo, test = [call["words"] for call in calls(checkout)]
    assert sft[-6:] == ["--max-tokens", "8192", "--epochs", "2", "--prompt", "Solve:\n {problem}  in \\boxed{}"]
    assert ppo[-9:] == ["--alpha", "0.9", "--system", "", "--wandb", "$HOME`touch", "oops`", "--alpha", "1"]
    assert test[-5:] == ["--samples", "4", "--prefill", "bait-*", "."] and not (checkout / "oops").exists()


@pytest.mark.parametrize("name", ["SFT_FLAGS", "PPO_FLAGS", "EVAL_FLAGS", "EVAL_DATA"])
def test_a_quote_that_is_not_closed_is_said_before_a_stage_begins(checkout, name):
    done = train_sh(checkout, **a_large_run(checkout) | {name: "--system 'Think"})
    assert (done.returncode, done.stderr) == (2, f"train.sh: {name} is --system 'Think: No closing quotation\n") and not calls(checkout)


def test_several_evaluation_files_have_a_folder_each(torchrun):
    checkout, env = torchrun, a_large_run(torchrun) | dict(GPUS="1")
    for name in ("math500.jsonl", "my aime.jsonl", "more/math500.jsonl"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text("{}\n")
    assert train_sh(checkout, **env | dict(EVAL_DATA="math500.jsonl\n'my aime.jsonl'")).returncode == 0
    assert stages(checkout)[2:] == [("eval", "eval-math500", "--out"), ("eval", "eval-my aime", "--out")]
    assert [call["words"][call["words"].index("--data") + 1] for call in calls(checkout)[2:]] == ["math500.jsonl", "my aime.jsonl"]
    # a path with a space is one file where there is such a file
    assert train_sh(checkout, **env | dict(EVAL_DATA="my aime.jsonl", RUN="mine2")).returncode == 0
    assert stages(checkout)[-1] == ("eval", "eval", "--out")
    before = len(calls(checkout))
    done = train_sh(checkout, **env | dict(EVAL_DATA="math500.jsonl more/math500.jsonl"))
    assert done.returncode == 2 and "EVAL_DATA has two files called math500" in done.stderr
    done = train_sh(checkout, **env | dict(EVAL_DATA="math500.jsonl none.jsonl"))
    assert done.returncode == 2 and done.stderr == "train.sh: EVAL_DATA is none.jsonl: no such file\n" and len(calls(checkout)) == before
    # what a longer PPO run makes old is evaluated anew, each file
    (checkout / "mine/ppo/done").write_text("60")
    for folder in ("eval-math500", "eval-my aime"):
        os.utime(checkout / "mine" / folder / "config.json", (1, 1))
    assert train_sh(checkout, **env | dict(EVAL_DATA="math500.jsonl 'my aime.jsonl'")).returncode == 0
    assert stages(checkout)[-2:] == [("eval", "eval-math500", "--out"), ("eval", "eval-my aime", "--out")]


JOB = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="29400", TORCHELASTIC_RUN_ID="none")


@pytest.mark.parametrize("status", [1, 2, 75])
def test_inside_a_job_of_torchrun_a_stage_that_fails_ends_the_recipe(checkout, status):
    done = train_sh(checkout, **a_large_run(checkout), **JOB, FAILS="sft", STATUS=status)
    assert done.returncode == status and stages(checkout) == [("sft", "sft", "--out")]


def test_inside_a_job_of_torchrun_each_stage_has_a_port_of_its_own(checkout):
    assert train_sh(checkout, **a_large_run(checkout), **JOB).returncode == 0
    assert [(call["words"][0], call["port"]) for call in calls(checkout)] == [("sft", "29401"), ("ppo", "29402"), ("eval", "29403")]


@pytest.fixture
def torchrun(checkout):
    """A stand-in for torch with two GPUs, whose torchrun passes TERM on, once, and makes 1 of every status."""
    for name in ("torch/__init__.py", "torch/cuda.py", "torch/distributed/__init__.py"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    (checkout / "torch/__init__.py").write_text("from torch import cuda\n")
    (checkout / "torch/cuda.py").write_text("import os\n\ndef device_count():\n    return int(os.environ.get('GPUS', 2))\n")
    (checkout / "torch/distributed/run.py").write_text("""
import os, signal, subprocess, sys
words = sys.argv[1:]
with open("torchrun", "a") as f:
    f.write(" ".join(words) + "\\n" + os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] + "\\n")
at = [i for i, word in enumerate(words) if word.endswith("rlsp.py")][0]
child = subprocess.Popen([sys.executable, *words[at:]], start_new_session=True)
heard = []
def pass_on(number, frame):
    heard.append(number)
    if len(heard) > 1:
        sys.exit("a second signal broke off the wait")
    child.send_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, pass_on)
signal.signal(signal.SIGINT, pass_on)
sys.exit(1 if child.wait() else 0)
""")
    return checkout


def test_a_stage_that_a_signal_stopped_below_torchrun_gives_75(torchrun):
    process = start(torchrun, **a_large_run(torchrun), SLOW="ppo ppo")
    wait_for(torchrun / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and "--standalone --nproc_per_node 2" in (torchrun / "torchrun").read_text()


def test_an_old_stop_does_not_ask_for_requeuing_when_the_stage_fails_now(torchrun):
    env = a_large_run(torchrun)
    assert train_sh(torchrun, **env, FAILS="ppo", STATUS=3).returncode == 1
    (torchrun / "mine/ppo/stopped").write_text("SIGTERM")
    assert train_sh(torchrun, **env, FAILS="ppo", STATUS=3).returncode == 1


def test_a_ctrl_c_at_the_terminal_reaches_torchrun_once(torchrun):
    """The terminal signals the whole foreground group; torchrun would break off its wait for the ranks at a second signal."""
    process = subprocess.Popen(["bash", "train.sh"], cwd=torchrun, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment(**a_large_run(torchrun), SLOW="ppo ppo"), start_new_session=True)
    wait_for(torchrun / "ready", process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert process.returncode == 75 and "broke off" not in error, error


def test_several_nodes_give_torchrun_the_place_to_meet(torchrun):
    env = a_large_run(torchrun) | dict(NNODES="2")
    assert "RDZV (host:port of node 0" in train_sh(torchrun, **env).stderr
    assert "NODE_RANK (0 to NNODES - 1)" in train_sh(torchrun, **env, RDZV="n0:29500").stderr
    assert train_sh(torchrun, **env, RDZV="n0:29500", NODE_RANK="1").returncode == 0
    expected = "--nnodes 2 --node_rank 1 --master_addr n0 --master_port 29500 --nproc_per_node 2"
    seen = (torchrun / "torchrun").read_text()
    assert expected in seen and seen.splitlines()[1] == "600"  # seconds for a checkpoint after a signal
    (torchrun / "torchrun").unlink()
    assert train_sh(torchrun, **env, RDZV="n0:29500", NODE_RANK="1", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1800").returncode == 0
    assert (torchrun / "torchrun").read_text().splitlines()[1] == "1800"
    del env["RUN"]
    assert "RUN is not given" in train_sh(torchrun, **env, RDZV="n0:29500", NODE_RANK="1").stderr


# ---- where it is called from, and by what

def test_relative_paths_start_where_the_caller_stands(torchrun, tmp_path):
    checkout, elsewhere = torchrun, tmp_path / "else where"
    elsewhere.mkdir()
    env = a_large_run(checkout) | dict(PYTHONPATH=checkout, GPUS="1")
    for name in ("model", "d.jsonl", "s.jsonl", "e.jsonl"):
        (checkout / name).rename(elsewhere / name)
    done = train_sh(checkout, "--reward", "mine.py:f", cwd=elsewhere, **env)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "mine/ppo/config.json").is_file() and not (checkout / "mine").exists()
    assert {call["cwd"] for call in calls(checkout)} == {str(elsewhere)}
    # the tiny recipe's own files are found from everywhere
    assert train_sh(checkout, cwd=elsewhere, RUN="mine2").returncode == 0
    words = calls(checkout)[-2]["words"]
    assert words[0] == "eval" and words[words.index("--data") + 1] == str(checkout / "data/tiny/test.jsonl")
    # and missing ones are named before a stage begins
    before = len(calls(checkout))
    done = train_sh(checkout, cwd=elsewhere, **env | dict(EVAL_DATA="nowhere.jsonl"))
    assert done.returncode == 2 and "EVAL_DATA is nowhere.jsonl: no such file" in done.stderr and len(calls(checkout)) == before


def test_sh_train_sh(checkout):
    for shell in ("sh", "dash"):
        if shutil.which(shell):
            done = train_sh(checkout, shell=shell, RUN="mine")
            assert done.returncode == 0 and "done in" in done.stdout, done.stderr
    assert train_sh(checkout, RUN="mine", POSIXLY_CORRECT="1").returncode == 0


def test_what_is_missing_is_said_in_one_line(checkout):
    done = train_sh(checkout, MODEL="m")
    assert (done.returncode, done.stderr) == (2, "train.sh: MODEL is given, DATA (a jsonl file of problems) is not\n")
    done = train_sh(checkout, "experiment", SETTING="x")
    assert (done.returncode, done.stderr) == (2, "train.sh: SETTING is x, expected main, rare or hacking\n")
    done = train_sh(checkout, "experiment", ARMS="leng", RUN="mine")
    assert done.returncode == 2 and "ARMS has leng, expected none" in done.stderr


# ---- set-up

@pytest.fixture
def python3(checkout, tmp_path):
    """A python3 whose venv has a stand-in for pip: `pip install` notes that it began, does what $PIP says, notes that it ended."""
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python3").write_text(f"""#!/bin/bash
if [ "$1 $2" != "-m venv" ]; then exec {sys.executable} "$@"; fi
folder=${{@: -1}}
case " $* " in *" --clear "*) rm -rf "$folder"/* ;; esac
mkdir -p "$folder/bin"
rm -f "$folder/bin/python"
touch "$folder/pyvenv.cfg"
cat > "$folder/bin/python" <<'END'
#!/bin/bash
case "$*" in
    *"pip install"*) ;;
    *) exec {sys.executable} "$@" ;;
esac
echo begun >> {tmp_path}/pip
here=$(dirname "$0")
eval "${{PIP:-true}}" || exit
echo ended >> {tmp_path}/pip
END
chmod +x "$folder/bin/python"
""")
    (bin / "python3").chmod(0o755)
    shutil.rmtree(checkout / ".venv")
    return {"PATH": f"{bin}:{os.environ['PATH']}"}


def pip(tmp_path):
    return (tmp_path / "pip").read_text().split()


def test_set_up_from_two_places_at_once_installs_once(checkout, python3, tmp_path):
    both = [start(checkout, "setup", **python3, PIP="sleep 1") for _ in range(2)]
    for process in both:
        process.communicate(timeout=30)
    assert [process.returncode for process in both] == [0, 0]
    assert pip(tmp_path) == ["begun", "ended"]
    assert not (checkout / ".venv.lock").exists()


def test_a_set_up_that_failed_says_what_to_do_and_is_begun_anew(checkout, python3, tmp_path):
    failing = "touch \"$here/half-a-package\"; echo WARNING: Retrying >&2; echo 'ERROR: No matching distribution found for torch==2.13.0' >&2; false"
    done = train_sh(checkout, "setup", **python3, PIP=failing)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "No matching distribution found" in done.stderr and "run the same command again, or give VENV=none" in done.stderr
    assert not (checkout / ".venv/installed").exists() and (checkout / ".venv/bin/half-a-package").exists()
    assert train_sh(checkout, RUN="mine", **python3).returncode == 0
    assert (checkout / ".venv/installed").exists() and not (checkout / ".venv/bin/half-a-package").exists()
    assert pip(tmp_path) == ["begun", "begun", "ended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_set_up_that_was_interrupted_is_not_taken_for_whole(checkout, python3, tmp_path, number):
    process = start(checkout, "setup", **python3, PIP=f"touch \"$here/half-a-package\"; echo $$ > {tmp_path}/ready; exec sleep 30")
    child = wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    if number == signal.SIGKILL:  # nobody could tell pip; it has the lock as long as it lives
        process.wait(20)
        os.kill(child, signal.SIGKILL)
    else:
        process.communicate(timeout=20)
        assert process.returncode == 75 and not alive(child)
    assert not (checkout / ".venv/installed").exists()
    assert train_sh(checkout, "setup", **python3).returncode == 0
    assert not (checkout / ".venv/bin/half-a-package").exists() and pip(tmp_path) == ["begun", "begun", "ended"]


def test_a_venv_that_is_broken_or_dangling(checkout, python3, tmp_path):
    venv = checkout / ".venv"
    venv.symlink_to(tmp_path / "unmounted")
    done = train_sh(checkout, "setup", **python3)
    assert done.returncode == 2 and "unmounted, which does not exist: remove the link" in done.stderr
    venv.unlink()
    assert train_sh(checkout, "setup", **python3).returncode == 0
    (venv / "bin/python").unlink()
    (venv / "bin/python").symlink_to("/usr/bin/python2.2")  # an interpreter that an upgrade of the system has removed
    assert train_sh(checkout, RUN="mine", **python3).returncode == 0
    assert pip(tmp_path) == ["begun", "ended"] * 2
    # a folder that is not ours is not emptied
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1").write_text("x")
    done = train_sh(checkout, "setup", **python3, VENV=tmp_path / "thesis")
    assert done.returncode == 2 and "is not a virtual environment" in done.stderr and (tmp_path / "thesis/chapter1").exists()


def test_a_checkout_that_cannot_be_written(checkout, python3, tmp_path):
    (checkout / "file").write_text("")
    done = train_sh(checkout, "setup", **python3, VENV="file/venv")  # root may write everywhere, but not below a file
    assert done.returncode == 2 and "cannot be written: give VENV=FOLDER" in done.stderr and len(done.stderr.splitlines()) == 1
    assert train_sh(checkout, **python3, VENV="../packages", RUN=tmp_path / "run").returncode == 0
    assert (tmp_path / "packages/installed").is_file() and not (checkout / ".venv").exists()


def test_changed_requirements_are_installed_into_what_is_there(checkout, python3, tmp_path):
    assert train_sh(checkout, "setup", **python3).returncode == 0
    with open(checkout / "requirements.txt", "a") as f:
        f.write("another\n")
    (checkout / ".venv/mine").touch()
    assert train_sh(checkout, "setup", **python3, PIP="false").returncode == 1
    assert train_sh(checkout, "setup", **python3).returncode == 0
    assert pip(tmp_path) == ["begun", "ended", "begun", "begun", "ended"] and (checkout / ".venv/mine").exists()


def test_a_stopped_experiment_keeps_what_is_finished_and_goes_on_with_the_rest(checkout):
    (checkout / "docs/results/experiment.py").write_text("")
    env = dict(SEEDS="0 1", ARMS="none", RUN="mine")
    process = start(checkout, "experiment", **env, SLOW="ppo ppo")
    wait_for(checkout / "ready", process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75 and (checkout / "mine/seed-0/start/sft/done").exists()
    before = len(calls(checkout))
    assert train_sh(checkout, "experiment", **env).returncode == 0
    again = stages(checkout)[before:]
    assert again[:2] == [("ppo", "ppo", "--resume"), ("eval", "eval", "--out")] and again[2][:2] == ("sft", "facts")
    assert [f.name for f in sorted((checkout / "mine").glob("seed-*/*"))] == ["none", "start"] * 2


def test_venv_none_takes_the_active_python_and_says_what_it_has(checkout, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bin / "python3").chmod(0o755)
    shutil.rmtree(checkout / ".venv")
    env = {"PATH": f"{bin}:{os.environ['PATH']}", "VENV": "none", "RUN": "mine"}
    done = train_sh(checkout, **env)
    assert done.returncode == 0 and not (checkout / ".venv").exists(), done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "VENV=none" in line]
    assert "torch 2." in line and "tokenizers 0." in line and "pytest" not in line
    (checkout / "requirements.txt").write_text("torch==1.2.3\nnumpy>=99,<100\ntqdm<2\nno-such-package>=1\n")
    done = train_sh(checkout, **env)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for text in ("numpy is ", "expected >=99,<100", "tqdm is", "no-such-package is missing"):
        assert text in done.stderr
    assert "torch" not in done.stderr  # another version of it may do
    (checkout / "requirements.txt").write_text("torch==1.2.3\n")
    assert "(tested with 1.2.3)" in train_sh(checkout, **env).stdout
