"""A run survives: checkpoints that are damaged or hostile, kills, signals, full disks, dead ranks, numbers that are not finite."""
import argparse
import fcntl
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib import checkpoint, cli, decode, evaluation, files, guards, hf, logs, parallel
from lib import signals as lib_signals
from lib.signals import Stopped
import kill
import model as M
import ppo
import rlsp
from conftest import ROOT
from test_cli import refused, rlsp_py  # noqa: F401  (refused is a fixture)
from test_ppo import folder, held_out, lines, trainer, weights  # noqa: F401  (folder is a fixture)

DATA = ROOT / "data/tiny/train.jsonl"
SMALL = ["--rollout-batch", "6", "--train-batch", "3", "--max-response", "16", "--freeze-steps", "0", "--dtype", "float32", "--save-every", "1",
         "--lr", "1e-3"]


@pytest.fixture
def run(folder, tmp_path):  # noqa: F811
    """A run with checkpoints of steps 1 and 2, which is to have 3."""
    t = trainer(folder, tmp_path / "run", steps=3, save_every=1)
    for _ in range(2):
        t.train_step()
        t.save()
    return tmp_path / "run"


def shard(run, step):
    return run / f"checkpoints/step-{step:06d}/shard-00001-model-00001-of-00001.safetensors"


def rewrite_state(run, **changes):
    """state.json of step 2 with other values and a CRC that fits them, as somebody with bad intent would."""
    file = run / "checkpoints/step-000002/state.json"
    state = {k: v for k, v in json.loads(file.read_text()).items() if k != "crc32"} | changes
    file.write_text(json.dumps(state | {"crc32": zlib.crc32(json.dumps(state).encode())}))


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def linked(file):
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")


# ---- damaged and hostile checkpoints

@pytest.mark.parametrize("damage, message", [
    (lambda run: os.truncate(shard(run, 2), 1000), "shard-00001-model-00001-of-00001.safetensors: truncated or altered: bytes 1000"),
    (lambda run: flip(shard(run, 2)), "of-00001.safetensors: truncated or altered: CRC-32"),
    (lambda run: shard(run, 2).unlink(), "of-00001.safetensors: no such file, but state.json names it"),
    (lambda run: (shard(run, 2).parent / ".metadata").write_bytes(pickle.dumps(1)), ".metadata: not in state.json"),
    (lambda run: linked(shard(run, 2)), "of-00001.safetensors: expected a regular file, not a link"),
    (lambda run: os.truncate(run / "checkpoints/step-000002/state.json", 50), "state.json: not valid JSON"),
    (lambda run: (run / "checkpoints/step-000002/state.json").unlink(), "state.json: expected a regular file"),
    (lambda run: flip(run / "checkpoints/step-000002/state.json"), "state.json: "),
    (lambda run: rewrite_state(run, files={"../../config.json": [1, 1]}), "no such file, but state.json names it"),
    (lambda run: rewrite_state(run, files={shard(run, 2).name: 7}), "not the state of a checkpoint"),
    (lambda run: rewrite_state(run, updates={"policy": -1}), "not the state of a checkpoint"),
    (lambda run: rewrite_state(run, kl_coef=10**400), "not the state of a checkpoint"),
    (lambda run: rewrite_state(run, step=3), "not the state of a checkpoint"),
    (lambda run: (run / "checkpoints/step-000002/state.json").write_text("[" * 10**5), "state.json: not valid JSON")])
def test_a_damaged_checkpoint_is_named_before_it_is_loaded_and_the_one_before_offered(run, monkeypatch, damage, message):
    damage(run)
    monkeypatch.setattr(checkpoint.dcp, "load", None)
    with pytest.raises(ValueError) as e:
        checkpoint.find(run)
    assert message in str(e.value) and "step-000002" in str(e.value) and len(str(e.value).splitlines()) == 1
    assert str(e.value).endswith(f"step-000001 is good: continue from there with --resume {run} --checkpoint step-000001")
    assert checkpoint.find(run, "step-000001")[1]["step"] == 1
    flip(shard(run, 1))
    with pytest.raises(ValueError, match="no checkpoint before it is good"):
        checkpoint.find(run)


def test_going_on_from_an_older_checkpoint_forgets_the_newer_ones(folder, run):  # noqa: F811
    flip(shard(run, 2))
    t = trainer(folder, run, steps=3, save_every=0)
    t.resume(checkpoint.find(run, "step-000001"))
    assert t.step == 1
    t.train()
    assert [f.name for f in checkpoint.steps(run)] == ["step-000001", "step-000003"]  # the damaged one is gone
    with pytest.raises(ValueError, match="--checkpoint ../../x: not one of step-000001, step-000003"):
        checkpoint.find(run, "../../x")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("policy.model.norm.weight"), "policy.model.norm.weight"),
    (lambda t: t.update({"policy.model.norm.weight": torch.ones(7)}), "policy.model.norm.weight"),
    (lambda t: None, "DCP_SHARDING_INFO is hostile")])
def test_a_consistent_but_wrong_checkpoint_gets_one_line(folder, run, change, message, capfd):  # noqa: F811
    tensors = load_file(shard(run, 2))
    change(tensors)
    offsets = {k: {"saved_offsets": [0] * v.dim()} for k, v in tensors.items()}
    info = json.dumps({} if "hostile" in message else offsets)
    save_file(tensors, shard(run, 2), metadata={"DCP_SHARDING_INFO": info, "format": "pt"})
    rewrite_state(run, files={shard(run, 2).name: files.measure(shard(run, 2))})
    t = trainer(folder, run)
    with pytest.raises(ValueError) as e:
        t.resume()
    assert ("hostile" in message or message in str(e.value)) and len(str(e.value).splitlines()) == 1 and "Traceback" not in capfd.readouterr().err


def test_checkpoints_hold_safetensors_and_json_only(run, monkeypatch, folder):  # noqa: F811
    assert {f.suffix for f in (run / "checkpoints").glob("*/*")} == {".safetensors", ".json"}
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "load", None)
    trainer(folder, run).resume()


def test_a_resumed_optimizer_has_the_state_that_it_would_have_made_itself(folder, run, monkeypatch):  # noqa: F811
    """Devices and types: PyTorch's fused Adam keeps its count of steps beside the parameter. The meta device stands for a GPU."""
    stepped, loaded = trainer(folder, run.parent / "other", steps=3), trainer(folder, run, steps=3)
    stepped.train_step()
    before = weights(loaded.policy)
    checkpoint.make_state(loaded.optimizers["policy"], 7)
    assert torch.equal(weights(loaded.policy), before)
    loaded.resume()
    for name, net in loaded.nets.items():
        for a, b in zip(net.parameters(), stepped.nets[name].parameters(), strict=True):
            a, b = loaded.optimizers[name].state[a], stepped.optimizers[name].state[b]
            assert {k: (v.dtype, v.device, v.shape) for k, v in a.items()} == {k: (v.dtype, v.device, v.shape) for k, v in b.items()}
            assert a["step"] == loaded.updates[name] == 4 and b["step"] == 2
    monkeypatch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda p: None)  # which knows the meta device not
    for fused in (True, False):
        for kind in (torch.optim.Adam, torch.optim.AdamW):
            p, q = (torch.nn.Parameter(torch.zeros(3, 2, device="meta", dtype=torch.bfloat16)) for _ in range(2))
            optimizer = kind([p, q], lr=1e-3, fused=fused)
            q.grad = torch.zeros_like(q)
            optimizer._init_group(optimizer.param_groups[0], [], [], [], [], [], [])
            made = optimizer.state.pop(q)
            q.grad = None
            checkpoint.make_state(optimizer, 3)
            where = lambda state: {k: (v.dtype, v.device, v.shape) for k, v in state.items()}
            assert where(optimizer.state[q]) == where(optimizer.state[p]) == where(made)
            assert made["step"].device.type == ("meta" if fused else "cpu") and optimizer.param_groups[0]["lr"] == 1e-3


def test_a_link_or_a_file_in_a_checkpoints_place_is_taken_away_alone(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    checkpoints = run / "checkpoints"
    shutil.rmtree(checkpoints / "step-000001")
    (checkpoints / "step-000001").symlink_to(elsewhere)
    (checkpoints / "step-000000").write_text("a file")
    (checkpoints / ".step-000007.part").symlink_to(elsewhere)
    checkpoint.remove(checkpoint.steps(run)[:-1])
    checkpoint.clear(checkpoints)
    assert [f.name for f in checkpoints.iterdir()] == ["step-000002"] and (elsewhere / "precious").read_text() == "x"


# ---- written aside and renamed

@pytest.mark.parametrize("moment", ["write", "measure", "sync", "rename"])
def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(folder, run, monkeypatch, moment):  # noqa: F811
    """Every write of a third checkpoint broken off: what is found is the second, and what is left over goes with the next save."""
    t = trainer(folder, run, steps=4)
    t.resume()
    t.train_step()

    class Killed(BaseException):
        pass

    def killed(*args, **kw):
        raise Killed
    with monkeypatch.context() as m:
        if moment == "write":
            save_ = checkpoint.dcp.save
            m.setattr(checkpoint.dcp, "save", lambda *a, **kw: (save_(*a, **kw), killed()))
        elif moment == "rename":
            m.setattr(type(run), "rename", killed)
        else:
            m.setattr(files, moment, killed)
        with pytest.raises(Killed):
            t.save()
    assert list((run / "checkpoints").glob(".step-*"))
    assert checkpoint.find(run)[1]["step"] == 2
    t.save()
    assert [f.name for f in sorted((run / "checkpoints").iterdir())] == ["step-000002", "step-000003"]


def test_a_run_killed_before_its_first_checkpoint_begins_again(folder, tmp_path):  # noqa: F811
    whole = trainer(folder, tmp_path / "whole", steps=2)
    whole.train()
    broken = trainer(folder, tmp_path / "broken", steps=2)
    logs.log(broken.run, {"metrics": [{"step": 1, "reward": 0}], "tokens": []})
    (tmp_path / "broken/model").mkdir()
    (tmp_path / "broken/model/.tmpAbCdEf").write_text("what safetensors leaves of a file half written")
    broken.resume()
    assert not list((tmp_path / "broken/model").iterdir())
    assert broken.step == 0 and lines(tmp_path / "broken") == []
    broken.train()
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")


def test_killed_and_resumed_equals_unbroken_byte_for_byte(folder, tmp_path):  # noqa: F811
    """The short form of `python -m tests.tools.kill`: PPO alone, killed three times."""
    result = kill.trial(tmp_path, 1, 3, seed=1, steps=5, model=folder)
    assert result["differ"] == [] and result["kills"] == 3, result
    assert result["lines"]["p/metrics.jsonl"] == result["lines"]["p/timing.jsonl"] == 5 and result["lines"]["p/rollouts.jsonl"] == 40


# ---- signals

@pytest.fixture
def signals(monkeypatch):
    """This process's handlers, put back afterwards."""
    before = {n: signal.getsignal(n) for n in lib_signals.ASKED}
    lib_signals.signals.install()
    yield lib_signals.signals
    for n, handler in before.items():
        signal.signal(n, handler)
    lib_signals.signals.__init__()


def terminate(*args, **kw):
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where, step", [("rollout", 1), ("scoring", 1), ("first minibatch", 1), ("second minibatch", 2), ("logs", 2), ("last step", 3)])
def test_a_signal_stops_at_a_whole_step_with_a_checkpoint(folder, tmp_path, signals, monkeypatch, where, step):  # noqa: F811
    whole = trainer(folder, tmp_path / "whole", steps=3, save_every=0)
    whole.train()
    t = trainer(folder, tmp_path / "run", steps=3, save_every=0)

    def at(owner, name, call=2, then=terminate):
        """Send the signal in front of the call-th call of a function."""
        inner, calls = getattr(owner, name), []

        def function(*args, **kw):
            calls.append(1)
            if len(calls) == call:
                then()
            return inner(*args, **kw)
        monkeypatch.setattr(owner, name, function)

    generated = []
    if where == "rollout":
        at(decode, "generate")
        inner = M.Llama.decode
        monkeypatch.setattr(M.Llama, "decode", lambda *a: (generated.append(t.step), inner(*a))[1])
    elif where == "scoring":
        at(t, "experience")
    elif where == "first minibatch":
        at(t, "update")
    elif where == "second minibatch":
        at(t, "minibatch", call=4)
    elif where == "logs":
        at(logs, "token_rows")
    else:
        at(logs, "token_rows", call=3)
    if where == "last step":
        t.train()  # nothing is left to do: the run ends as it would have
        assert (tmp_path / "run/model/model.safetensors").is_file()
    else:
        with pytest.raises(Stopped):
            t.train()
        assert 1 not in generated  # the rollout was left at once
        assert not (tmp_path / "run/model").exists()
    assert [f.name for f in checkpoint.steps(tmp_path / "run")] == [f"step-{step:06d}"]
    monkeypatch.undo()
    signals.__init__()
    again = trainer(folder, tmp_path / "run", steps=3, save_every=0)
    again.resume()
    again.train()
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert torch.equal(weights(again.policy), weights(whole.policy)) and torch.equal(weights(again.critic), weights(whole.critic))


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_run_that_is_stopped_in_an_evaluation_goes_on_in_it(folder, tmp_path, signals, monkeypatch, step):  # noqa: F811
    """Or is killed in it, without a checkpoint of its step: before the first step, on the way, after the last one."""
    new = lambda name: trainer(folder, tmp_path / name, steps=3, save_every=0, eval_every=2, held_out=held_out())
    metrics = lambda name: b"".join(f.read_bytes() for f in (tmp_path / name).glob("metrics.jsonl"))
    new("whole").train()
    inner = evaluation.scores_on_held_out

    class Killed(BaseException):
        pass

    def killed(t):
        raise Killed

    for name, then in (("stopped", terminate), ("killed", killed)):
        monkeypatch.setattr(evaluation, "scores_on_held_out", lambda t: (t.step == step and then(t), inner(t))[1])
        with pytest.raises((Stopped, Killed)):
            new(name).train()
        assert len(metrics(name).splitlines()) == (step + 1 if step else 0)  # the training's numbers of the step are there
        assert [f.name for f in checkpoint.steps(tmp_path / name)] == [f"step-{step:06d}"] * (step == 3 or (step > 0 and name == "stopped"))
        monkeypatch.undo()
        signals.__init__()
        again = new(name)
        again.resume()
        assert again.step == (step if name == "stopped" or step == 3 else 0)
        again.train()
        assert metrics(name) == metrics("whole") and metrics("whole").count(b"eval_accuracy") == 3
    # its line lost: the evaluation is made again, and stands alone
    (tmp_path / "whole/metrics.jsonl").unlink()
    again = new("whole")
    again.resume()
    again.train()
    assert [set(row) - set(lines(tmp_path / "killed")[0]) for row in lines(tmp_path / "whole")] == [set()]


def test_the_best_checkpoint_is_kept_beside_the_newest(folder, tmp_path, monkeypatch):  # noqa: F811
    """Through stops and resumes; the first one of equal ones; the start does not count."""
    accuracy = {0: 0.9, 2: 0.3, 3: 0.0, 4: 0.5, 6: 0.5, 8: 0.2, 9: 0.1, 10: 0.6}
    new = lambda steps: trainer(folder, tmp_path / "run", steps=steps, save_every=3, keep=2, eval_every=2, keep_best=True, held_out=held_out())
    monkeypatch.setattr(evaluation, "scores_on_held_out", lambda t: dict.fromkeys(("problems", "standard_error", "tokens"), 1)
                        | {"accuracy": accuracy[t.step]})
    there = lambda: [int(f.name[5:]) for f in checkpoint.steps(tmp_path / "run")]
    train_step, seen = ppo.Trainer.train_step, []
    monkeypatch.setattr(ppo.Trainer, "train_step", lambda t: (seen.append(there()), train_step(t))[1])
    new(3).train()
    assert seen == [[], [], [2]] and there() == [2, 3]  # after step 2, which has one because it was the best
    t = new(9)
    t.resume()
    t.train()
    assert seen[3:] == [[2, 3], [3, 4], [3, 4], [4, 6], [4, 6], [4, 6]] and there() == [4, 6, 9]
    assert checkpoint.find(tmp_path / "run", "best")[1]["step"] == 4
    t = new(10)
    t.resume(checkpoint.find(tmp_path / "run", "step-000006"))  # the future is forgotten, the best one is not
    assert there() == [4, 6]
    t.train()
    assert there() == [4, 9, 10] and checkpoint.best(tmp_path / "run") == 10


def start(words, ranks=1, **env):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"} | env)


def wait_for(file, process, n=1):
    """Until a log has n lines."""
    while process.poll() is None and not (file.is_file() and len(file.read_text().splitlines()) >= n):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1][-2000:]


def last_line(error):
    return error.strip().splitlines()[-1]


def test_sigterm_has_its_exit_status_and_the_next_command_in_its_message(folder, tmp_path, refused):  # noqa: F811
    process = start([ROOT / "rlsp.py", "ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "500", *SMALL])
    wait_for(tmp_path / "run/metrics.jsonl", process, 2)
    error = refused("ppo", "--resume", tmp_path / "run")  # a second process on one folder
    assert f"{tmp_path / 'run'}: in use by process {process.pid} on {socket.gethostname()} since 20" in error, error
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75, error[-2000:]
    steps = [line for line in error.splitlines() if not line.startswith("rlsp.py: ")]  # a log that can be read: a line for each step
    assert len(steps) == len(lines(tmp_path / "run")) and "\r" not in error, error
    assert re.fullmatch(r"ppo: 2/500 \[\S+<\S+, .*, reward=.*, length=\d+\]", steps[1]), steps
    assert last_line(error) == f"rlsp.py: stopped by SIGTERM; go on with: rlsp.py ppo --resume {tmp_path / 'run'}"
    assert (tmp_path / "run/stopped").read_text() == "SIGTERM\n"
    state = checkpoint.find(tmp_path / "run")[1]
    assert state["step"] == len(lines(tmp_path / "run"))


def test_every_request_to_stop_is_heard_and_only_a_second_term_or_ctrl_c_ends_at_once(signals, monkeypatch):
    clock, ended = [0.0], []
    monkeypatch.setattr(lib_signals.time, "monotonic", lambda: clock[0])
    for first in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signals.__init__()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), first)
        signals.__init__()
        signals.leave = False
        os.kill(os.getpid(), first)
        assert signals.name() == first.name
        with monkeypatch.context() as m:
            m.setattr(lib_signals.os, "kill", lambda pid, number: ended.append(number))
            for number in (first, signal.SIGXCPU, signal.SIGUSR1, signal.SIGHUP):  # XCPU comes each second
                clock[0] += 5
                signals.handle(number, None)
            assert ended == ([first] if first in lib_signals.PERSONAL else [])
            if not ended:
                for seconds, number in (5, signal.SIGTERM), (0.5, signal.SIGTERM), (5, signal.SIGTERM):
                    assert not ended  # a batch system's TERM after its USR1 is the first one, and may come twice
                    clock[0] += seconds
                    signals.handle(number, None)
            assert ended.pop() in lib_signals.PERSONAL and not ended
        signals.install()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda number, handler: ended.append(number))
    signals.install()
    assert ended == [n for n in lib_signals.ASKED if n != signal.SIGHUP]  # nohup's wish


def test_a_signal_while_torch_is_imported_has_its_status_and_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing')\ntime.sleep(60)\n")
    for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
        process = start([ROOT / "rlsp.py", "ppo", "--help"], PYTHONPATH=str(tmp_path))
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        assert process.communicate(timeout=10)[1] == f"rlsp.py: stopped by {number.name}\n" and process.returncode == 75


def test_a_silent_judge_keeps_nobody_from_leaving(folder, tmp_path):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start([ROOT / "rlsp.py", "ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "3", *SMALL, "--exploration",
                         "judge", "--judge-model", "m", "--judge-url", f"http://127.0.0.1:{server.getsockname()[1]}/v1"])
        server.settimeout(120)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(10)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, error = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in error, error
    assert time.monotonic() - started < 20  # the judge may take 120
    assert last_line(error).startswith("rlsp.py: stopped by SIGTERM; go on with")


def test_a_disk_that_is_read_only_does_not_hide_the_signal(run, signals, monkeypatch):
    def read_only(path, text):
        raise OSError(30, "Read-only file system", str(path))
    (run / "config.json").write_text("{}")
    monkeypatch.setattr(files, "write_text", read_only)
    signals.received = signal.SIGUSR1
    line = cli.stopped(argparse.Namespace(command="ppo", run=str(run)))
    assert line == (f"stopped by SIGUSR1; go on with: rlsp.py ppo --resume {run} ({run / 'stopped'} could not be written: Read-only file system)")


# ---- standard streams

def test_a_stream_that_fails_raises_nothing_and_remembers_why():
    reader, writer = os.pipe()
    os.close(reader)
    for fd, failure in (os.open("/dev/full", os.O_WRONLY), "No space left on device"), (writer, None):
        raw = lib_signals.Stream(fd, "w")
        with io.TextIOWrapper(io.BufferedWriter(raw), "ascii", errors="backslashreplace", line_buffering=True) as stream:
            for _ in range(3):
                print("x" * 10_000, "\u221a", file=stream, flush=True)
            assert raw.failure == failure
    reader, writer = os.pipe()
    with io.TextIOWrapper(io.BufferedWriter(lib_signals.Stream(writer, "w")), "ascii", errors="backslashreplace", line_buffering=True) as stream:
        print("2\u221a3", file=stream)
    assert os.read(reader, 100) == b"2\\u221a3\n"
    os.close(reader)


def test_nobody_reads_a_disk_is_full_a_terminal_is_closed_git_is_missing(tmp_path):
    """None of this ends a training, and no file of the run gets a message that was meant for a closed stream."""
    (tmp_path / "d.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:8]))
    shown = {"full": ">/dev/full 2>/dev/full", "closed": ">&- 2>&-", "dead": "2>&1 | true"}
    for name, streams in shown.items():
        words = [sys.executable, ROOT / "rlsp.py", "sft", "--model", ROOT / "data/tiny/model", "--from-scratch", "--data", tmp_path / "d.jsonl", "--batch", "4",
                 "--epochs", "1", "--dtype", "float32", "--out", tmp_path / name]
        done = subprocess.run(["/bin/bash", "-c", f'"$@" {streams}; exit ${{PIPESTATUS[0]}}', "bash", *map(str, words)], env=os.environ | {"PATH": "/nowhere"},
                              timeout=120, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)
        assert (tmp_path / name / "done").is_file() and len(lines(tmp_path / name)) == 2
        assert json.loads((tmp_path / name / "config.json").read_text())["versions"]["git"] is None


def test_lost_output_that_was_asked_for_is_a_failure_and_a_reader_who_has_enough_is_none():
    help_ = [sys.executable, str(ROOT / "rlsp.py"), "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(help_, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "rlsp.py: standard output: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(help_, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == ""


def test_where_there_is_no_terminal_a_bar_is_a_line_for_each_step(capsys):
    with logs.bar("sft", 3, first=1) as bar:
        for loss in "ab":
            bar.update()
            bar.set_postfix(loss=loss)
    with logs.bar("eval m", 57, lines=10) as bar:
        for _ in range(57):
            bar.update()
    for _ in logs.bar("scoring", 3, inner=True, iterable=range(3)):
        pass
    error = capsys.readouterr().err
    assert "\r" not in error and len(error.splitlines()) == 12
    assert error.startswith("sft: 2/3 [00:00<") and error.splitlines()[1].endswith(", loss=b]")
    assert [line.split(" [")[0] for line in error.splitlines()[2:4]] == ["eval m: 6/57", "eval m: 12/57"] and "eval m: 57/57 [" in error


# ---- one run, one process

@pytest.fixture
def released():
    yield
    files.release()


def test_a_folder_is_held_by_one_process_until_its_end(tmp_path, released):
    path = tmp_path / ".lock"
    other = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)  # as another process would
    for text, who in (b"", "another process"), (b"[1]", "another process"), (
            b'{"host": "h", "pid": 7, "since": "now", "beat": 3}', "process 7 on h since now"):
        os.ftruncate(other, 0)
        os.pwrite(other, text, 0)
        with pytest.raises(OSError, match=f"in use by {who}; nothing was changed"):
            files.lock(tmp_path)
    os.close(other)  # a kill does that, too
    files.lock(tmp_path)
    files.lock(tmp_path)
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(BlockingIOError):
        fcntl.flock(path.open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    files.release()
    fcntl.flock(path.open(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_child_that_outlives_the_run_does_not_hold_its_folder(tmp_path, released):
    files.lock(tmp_path)
    ready, begun = os.pipe()
    waiting, end = os.pipe()
    pid = os.fork()
    if not pid:  # as one that a reward function left behind
        os.close(begun)
        os.close(end)
        os.read(waiting, 1)
        os._exit(0)
    os.close(begun)
    os.read(ready, 1)
    files.release()
    files.lock(tmp_path)
    os.close(end)
    os.waitpid(pid, 0)


def test_a_child_that_a_users_function_forks_ends_by_a_signal(signals):
    """As the workers of a multiprocessing.Pool are ended."""
    for leave in True, False:
        signals.leave = leave
        ready, begun = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.close(begun)
                time.sleep(10)
            finally:
                os._exit(0)
        os.close(begun)
        os.read(ready, 1)
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_what_lies_in_the_locks_place_is_named(tmp_path, released, monkeypatch):
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises(ValueError, match="/.lock: expected a regular file, not a link"):
        files.lock(tmp_path)
    (tmp_path / ".lock").unlink()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(files.os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device: '.*/.lock'"):
            files.lock(tmp_path)
    files.lock(tmp_path)


def test_without_locks_a_heartbeat_tells_who_lives(tmp_path, monkeypatch, released):
    def no_locks(*args):
        raise OSError(38, "Function not implemented")
    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    monkeypatch.setattr(files, "BEAT", 0.1)
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")  # by another path this process is another one
    files.lock(tmp_path / "run")
    time.sleep(0.05)
    with pytest.raises(OSError, match=f"in use by process {os.getpid()} on {re.escape(socket.gethostname())} since"):
        files.lock(tmp_path / "link")
    files.release()
    time.sleep(0.2)
    files.lock(tmp_path / "link")  # the file still names a process, which shows no sign of life


def test_sft_stops_on_ctrl_c_and_goes_on(tmp_path):
    (tmp_path / "d.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:300]))
    words = ["sft", "--model", ROOT / "data/tiny/model", "--from-scratch", "--data", tmp_path / "d.jsonl", "--batch", "4", "--epochs", "1",
             "--dtype", "float32", "--max-tokens", "400"]
    process = start([ROOT / "rlsp.py", *words, "--out", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", process, 3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) and process.returncode == 75
    for out in ("run", "whole"):
        done = rlsp_py(*(["sft", "--resume", tmp_path / "run"] if out == "run" else [*words, "--out", tmp_path / "whole"]))
        assert done.returncode == 0, done.stderr
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(lines(tmp_path / "run")) == 75 and not (tmp_path / "run/stopped").exists()


@pytest.mark.parametrize("who", ["torchrun", "rank 1"])
def test_all_ranks_stop_together(folder, tmp_path, who):  # noqa: F811
    phases = tmp_path / "phases"
    phases.mkdir()
    process = start([ROOT / "tests/tools/kill.py", "--child", "ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "500",
                     *SMALL], ranks=2, KILL_PHASES=str(phases))
    wait_for(tmp_path / "run/metrics.jsonl", process, 2)
    started = time.monotonic()
    os.kill(process.pid if who == "torchrun" else dict(enumerate(kill.look(phases, 2)))[1][0], signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 30  # torchrun's time until it kills
    assert process.returncode == 1 and (tmp_path / "run/stopped").is_file(), error[-3000:]  # torchrun makes 1 of any status
    assert error.count("rlsp.py: stopped by") == 1 and "lost another rank" not in error
    assert checkpoint.find(tmp_path / "run")[1]["step"] == len(lines(tmp_path / "run"))


# ---- what breaks from outside

def limited(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_last_checkpoint(folder, run):  # noqa: F811
    """A limit on the size of files stands in for a full disk: the same write fails, with EFBIG for ENOSPC."""
    t = trainer(folder, run, steps=3)
    t.resume()
    t.train_step()
    limited(100_000)
    try:
        with pytest.raises(OSError, match=r"File too large: .*\.step-000003\.part"):
            t.save()
    finally:
        limited(resource.RLIM_INFINITY)
    assert sorted(f.name for f in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert checkpoint.find(run)[1]["step"] == 2
    limited((run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 1)
    try:
        with pytest.raises(OSError, match="metrics.jsonl"):
            logs.log(run, {"metrics": [{"step": 3}] * 1000})
    finally:
        limited(resource.RLIM_INFINITY)
    again = trainer(folder, run, steps=3)
    again.resume()
    assert again.step == 2 and lines(run) == []


def test_outer_failures_get_one_line(folder, tmp_path):  # noqa: F811
    words = ["ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "1", *SMALL]
    process = subprocess.run([sys.executable, str(ROOT / "rlsp.py"), *map(str, words)], capture_output=True, text=True, preexec_fn=lambda: limited(100_000))
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert last_line(process.stderr).startswith("rlsp.py: [Errno 27] File too large: ")
    assert checkpoint.steps(tmp_path / "run") == []
    done = rlsp_py("ppo", "--resume", tmp_path / "run")  # there is room again
    assert done.returncode == 0, done.stderr
    done = rlsp_py(*[w if w != tmp_path / "run" else "/proc/rlsp" for w in words])  # no folder can be made there
    assert done.returncode == 2 and "'/proc/rlsp'" in last_line(done.stderr) and "Traceback" not in done.stderr


def test_vanished_files_are_named(folder, run, tmp_path, refused):  # noqa: F811
    shutil.copyfile(DATA, tmp_path / "data.jsonl")
    shutil.copytree(folder, tmp_path / "model")
    done = rlsp_py("ppo", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "r", "--steps", "1", *SMALL)
    assert done.returncode == 0, done.stderr
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "r/done").unlink()  # as if it had been killed at the very end
    assert "data.jsonl: no such file" in refused("ppo", "--resume", tmp_path / "r")
    assert checkpoint.find(tmp_path / "r")[1]["step"] == 1
    t = trainer(tmp_path / "model", tmp_path / "x", steps=1)
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="model/tokenizer.json"):
        t.train()
    assert checkpoint.find(tmp_path / "x")[1]["step"] == 1


def test_code_and_servers_that_a_runs_file_names_must_be_given_again(folder, tmp_path, refused):  # noqa: F811
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write('x')\ndef f(response, problem): return 1.0\n")
    words = ["--reward", f"{tmp_path}/mine.py:f"]
    done = rlsp_py("ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "1", *SMALL, *words)
    assert done.returncode == 0 and (tmp_path / "ran").read_text() == "x", done.stderr
    assert "mine.py:f; give it again" in refused("ppo", "--resume", tmp_path / "run") and (tmp_path / "ran").read_text() == "x"
    assert rlsp_py("ppo", "--resume", tmp_path / "run", *words).returncode == 0


# ---- runs that go on otherwise than they began

@pytest.fixture
def main(monkeypatch, capsys):
    """rlsp.py in this process; returns what it printed."""
    def call(*words):
        monkeypatch.setattr(lib_signals.signals, "install", lambda: None)
        monkeypatch.setattr(sys, "argv", ["rlsp.py", *map(str, words)])
        capsys.readouterr()
        rlsp.main()
        return capsys.readouterr().out
    return call


@pytest.fixture
def begun(folder, tmp_path, main):  # noqa: F811
    """A PPO run of one step with a reward of its own, on copies of model and data that a test may spoil."""
    shutil.copytree(folder, tmp_path / "model")
    shutil.copyfile(DATA, tmp_path / "data.jsonl")
    (tmp_path / "mine.py").write_text("def f(response, problem): return len(response) / 10\ndef g(response, problem): return 0.0\n")
    main("ppo", "--model", tmp_path / "model", "--data", tmp_path / "data.jsonl", "--out", tmp_path / "run", "--steps", "1", *SMALL, "--warmup", "0",
         "--reward", f"{tmp_path}/mine.py:f")
    return ["ppo", "--resume", tmp_path / "run", "--reward", f"{tmp_path}/mine.py:f"]


def test_a_done_run_whose_results_are_gone_makes_them_again(begun, main, tmp_path):
    run = tmp_path / "run"
    assert "is done" in main(*begun)
    before = (run / "model/model.safetensors").read_bytes()
    shutil.rmtree(run / "model")
    assert f"{run}: model/config.json was removed after the run was done; it is made again\n" in main(*begun)
    assert (run / "model/model.safetensors").read_bytes() == before
    (run / "done").write_bytes(b"\xff")  # says nothing, so the run ends once more
    assert "is done" not in main(*begun)
    assert "is done" in main(*begun)


@pytest.mark.parametrize("name, found", [("model", "folder"), ("checkpoints", "folder"), ("done", "file"), ("metrics.jsonl", "file")])
def test_a_run_with_a_file_in_a_folders_place_is_refused_before_it_goes_on(run, refused, name, found):  # noqa: F811
    path = run / name
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.touch() if found == "folder" else path.mkdir()
    flags = {"command": "ppo", "model": "m", "data": "d", "dtype": "float32"}
    (run / "config.json").write_text(json.dumps({"flags": flags}))
    assert f"{path}: expected a {found}\n" in refused("ppo", "--resume", run)


def test_lines_that_a_log_has_lost_are_missed(run, capsys):
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    checkpoint.rewind(run, 2)
    assert "metrics.jsonl" not in capsys.readouterr().err
    kept = (run / "metrics.jsonl").read_text().splitlines(True)
    (run / "metrics.jsonl").write_text(kept[1])
    checkpoint.rewind(run, 2)
    assert f"{run}/metrics.jsonl: 1 of the 2 steps before the checkpoint are not in it, the first of them 1" in capsys.readouterr().err
    (run / "metrics.jsonl").unlink()
    checkpoint.rewind(run, 2)
    assert "2 of the 2 steps" in capsys.readouterr().err


@pytest.mark.parametrize("error", ["socket: Too many open files", "unable to open file </m> in read-only mode: Too many open files (24)"])
def test_what_the_system_refuses_through_a_library_is_a_line_too(refused, monkeypatch, capsys, error):  # noqa: F811
    def use_up(args):
        raise RuntimeError(f"[enforce fail at socket.cc:24] rv != -1.\n{error}")

    monkeypatch.setattr(rlsp, "run_plan", use_up)
    monkeypatch.setattr(sys, "argv", ["rlsp.py", "plan", "--model", "m"])
    with pytest.raises(SystemExit) as e:
        rlsp.main()
    said = capsys.readouterr().err
    assert e.value.code == 1 and "Too many open files" in said and len(said.splitlines()) == 1


def config_of(run):
    return json.loads((run / "config.json").read_text())


def test_a_run_goes_on_beyond_its_planned_end(begun, main, tmp_path, refused):  # noqa: F811
    assert "is done" in main(*begun)
    said = main(*begun, "--steps", "3")
    assert f"{tmp_path}/run: steps is 3 after 1 until step 1; the schedules now go to the new end\n" in said
    rows = lines(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows[1:]:  # two updates a step, the metrics are their mean
        assert row["policy_lr"] == pytest.approx(1e-3 * sum(ppo.lr_factor(2 * row["step"] - i, 6, 0.0, 0.1) for i in (1, 2)) / 2)
    config = config_of(tmp_path / "run")
    assert config["flags"]["steps"] == 3 and config["changes"] == [{"until_step": 1, "flags": {"steps": 1}, "inputs": {}}]
    assert "is done" in main(*begun) and "is done" in main(*begun, "--steps", "3")  # the new end is the run's
    assert "steps is 2, but" in refused(*begun, "--steps", "2")


def test_sft_goes_on_for_more_epochs(main, tmp_path, refused):  # noqa: F811
    (tmp_path / "d.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:6]))
    words = ["sft", "--model", ROOT / "data/tiny/model", "--from-scratch", "--data", tmp_path / "d.jsonl", "--batch", "3", "--dtype", "float32"]
    main(*words, "--out", tmp_path / "run", "--epochs", "1")
    said = main("sft", "--resume", tmp_path / "run", "--epochs", "2")
    assert "epochs is 2 after 1 until step 2" in said and [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]
    assert "epochs is 1, but" in refused("sft", "--resume", tmp_path / "run", "--epochs", "1")


@pytest.mark.parametrize("change, message", [
    (lambda t: (t / "data.jsonl").write_bytes(b"".join((t / "data.jsonl").read_bytes().splitlines(True)[:9])), "data.jsonl is not what"),
    (lambda t: flip(t / "model/model.safetensors"), "model/model.safetensors is not what the run was started with"),
    (lambda t: (t / "mine.py").write_text("def f(response, problem): return 1.0\n"), "mine.py:f is not what"),
    (lambda t: (t / "model/config.json").write_text((t / "model/config.json").read_text() + " "), "model/config.json is not what")])
def test_a_run_does_not_go_on_with_other_inputs_unless_told_to(begun, main, tmp_path, refused, change, message):  # noqa: F811
    change(tmp_path)
    error = refused(*begun, "--steps", "2")
    assert message in error and "--changed-input continues" in error and len(error.splitlines()) == 1
    assert len(lines(tmp_path / "run")) == 1 and config_of(tmp_path / "run")["flags"]["steps"] == 1
    main(*begun, "--steps", "2", "--changed-input")
    assert len(lines(tmp_path / "run")) == 2
    assert "is done" in main(*begun)  # what it goes on with is known now
    (tmp_path / "run/done").unlink()
    main(*begun)


def test_a_run_and_its_inputs_may_move(begun, main, tmp_path, refused):  # noqa: F811
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("model", "data.jsonl", "run", "mine.py"):
        (tmp_path / name).rename(moved / name)
    words = ["ppo", "--resume", moved / "run", "--steps", "2", "--reward", f"{moved}/mine.py:f"]
    assert f"{tmp_path}/model" in refused(*words)
    assert "mine.py:g is not what the run was started with" in refused(
        *words[:-1], f"{moved}/mine.py:g", "--model", moved / "model", "--data", moved / "data.jsonl")
    main(*words, "--model", moved / "model", "--data", moved / "data.jsonl")
    assert len(lines(moved / "run")) == 2
    (moved / "run/done").unlink()
    main(*words)  # where they are now is remembered


# ---- folders that nodes do not share

def test_ranks_that_see_different_folders_are_told_so_at_the_start(tmp_path):
    """The same words in a folder for each rank, as on nodes whose disks are their own; on rank 1 a run of that name lies already."""
    (tmp_path / "d.jsonl").write_text("".join((ROOT / "data/tiny/sft.jsonl").read_text().splitlines(True)[:8]))
    (tmp_path / "1/run").mkdir(parents=True)
    (tmp_path / "1/run/config.json").write_text("{}")
    (tmp_path / "0").mkdir()
    (tmp_path / "go.py").write_text(f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nos.chdir(os.environ['RANK'])\nimport rlsp\n"
                                    "rlsp.cli.SHARED_WAIT = 1\nrlsp.main()\n")
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "go.py", "sft", "--model",
                              str(ROOT / "data/tiny/model"), "--from-scratch", "--data", str(tmp_path / "d.jsonl"), "--batch", "4", "--dtype", "float32",
                              "--out", "run"], cwd=tmp_path, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    ours = [line for line in process.stderr.splitlines() if line.startswith("rlsp.py: ")]
    host = socket.gethostname()
    assert process.returncode == 1 and ours == [
        f"rlsp.py: error: {tmp_path}/1/run: rank 1 (on {host}) does not see the config.json that rank 0 (on {host}) wrote; the run's folder must be one "
        "that all nodes share"], process.stderr[-2000:]
    assert "exitcode  : 2" in process.stderr and not (tmp_path / "0/run/metrics.jsonl").exists()


def test_a_checkpoint_whose_files_rank_0_does_not_see_is_none(folder, run, monkeypatch):  # noqa: F811
    t = trainer(folder, run, steps=3)
    t.resume()
    t.train_step()
    inner = parallel.together

    def two_ranks(f, all_ranks=False):
        found = inner(f, all_ranks)
        return (*found, [("shard-00002-model-00001-of-00001.safetensors", [1, 1])]) if all_ranks else found
    monkeypatch.setattr(parallel, "together", two_ranks)
    with pytest.raises(OSError, match="shard-00002-model-00001-of-00001.safetensors: written by another rank, but rank 0 does not see it"):
        t.save()
    monkeypatch.undo()
    assert checkpoint.find(run)[1]["step"] == 2 and [f.name for f in checkpoint.steps(run)] == ["step-000001", "step-000002"]


# ---- ranks that differ, and ranks that die

def without_torchrun(*words_of_ranks):
    """[(exit status, standard error)] of rlsp.py's ranks; no torchrun ends the others once one has failed: each must end by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(len(words_of_ranks)))
    ranks = [start([ROOT / "rlsp.py", *words], RANK=str(r), LOCAL_RANK=str(r), LOCAL_WORLD_SIZE=str(len(words_of_ranks)), **group)
             for r, words in enumerate(words_of_ranks)]
    return [(p.returncode, error) for p, (_, error) in zip(ranks, [p.communicate(timeout=90) for p in ranks])]


@pytest.mark.parametrize("both, one, message", [
    ([], ["--lr", "2e-3"], "lr is 0.001 on rank 0 and 0.002 on rank 1, expected the same flags on all ranks"),
    ([], ["--lr", "wild"], "rank 1: argument --lr: invalid float value: 'wild'"),
    (["--reward", "mine.py:f"], [], "rank 1: --reward"), (["--steps", "0"], [], "error: argument --steps: 0 is out of range")])
def test_ranks_that_differ_or_refuse_alone_end_all(folder, tmp_path, monkeypatch, both, one, message):  # noqa: F811
    (tmp_path / "mine.py").write_text("import os\nif os.environ['RANK'] == '1': raise OSError('broken disk')\ndef f(response, problem): return 0.0\n")
    monkeypatch.chdir(tmp_path)
    words = ["ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "1", *SMALL, *both]
    ended = without_torchrun(words, words + one)
    assert [status for status, _ in ended] == [2, 2], ended
    assert message in last_line(ended[0][1]) and "rlsp.py:" not in ended[1][1] and not (tmp_path / "run").exists()


def test_a_dead_rank_ends_the_run_within_a_minute(folder, tmp_path):  # noqa: F811
    phases = tmp_path / "phases"
    phases.mkdir()
    process = start([ROOT / "tests/tools/kill.py", "--child", "ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "500",
                     *SMALL], ranks=2, KILL_PHASES=str(phases))
    wait_for(tmp_path / "run/metrics.jsonl", process, 2)
    started = time.monotonic()
    os.kill(kill.look(phases, 2)[1][0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 60 and process.returncode == 1
    ours = error.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    assert ours.count("lost another rank") <= 1 and "Signal 9 (SIGKILL)" in error, error
    assert checkpoint.find(tmp_path / "run")[1]["step"] >= 1


def test_the_first_error_is_on_top(folder, tmp_path):  # noqa: F811
    (tmp_path / "mine.py").write_text("import os\ndef f(response, problem):\n    if os.environ['RANK'] == '1':\n        raise KeyError('broken here')\n"
                                      "    return 0.0\n")
    process = start([ROOT / "rlsp.py", "ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "5", *SMALL,
                     "--reward", f"{tmp_path}/mine.py:f"], ranks=2)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    first = next(line for line in error.splitlines() if line.startswith("rlsp.py: ") and "warning" not in line)
    assert "mine.py:4: KeyError: 'broken here'" in first, error  # and not that another rank was lost
    summary = error.split("ChildFailedError")[-1]
    assert "broken here" in summary  # torchrun's own last words name the rank and the error


# ---- numbers that are not finite

def poison(monkeypatch, key):
    """Spoil a gradient between the backward pass and the clipping."""
    inner = guards.clip_gradients

    def clip(net, limit):
        parallel.local(dict(net.named_parameters())[key].grad).view(-1)[0] = float("nan")
        return inner(net, limit)
    monkeypatch.setattr(guards, "clip_gradients", clip)


def test_the_first_tensor_that_is_not_finite_is_named(folder, run, monkeypatch):  # noqa: F811
    key = "model.layers.1.mlp.up_proj.weight"
    t = trainer(folder, run, steps=4)
    t.resume()
    poison(monkeypatch, key)
    with pytest.raises(guards.TrainingError, match=f"step 3: policy_grad_norm is not finite, nor is the gradient of policy's {key}; the batch is in"):
        t.train_step()
    assert "advantage" in load_file(run / "nonfinite-step-3.safetensors")
    assert checkpoint.find(run)[1]["step"] == 2
    monkeypatch.undo()
    t = trainer(folder, run, steps=4)
    t.resume()
    with torch.no_grad():
        parallel.local(dict(t.critic.named_parameters())[key]).view(-1)[5] = float("nan")
    with pytest.raises(guards.TrainingError, match=f"step 3: value is not finite, nor is critic's {key}; "):
        t.train_step()


def test_weights_that_are_not_finite_replace_nothing(folder, run, monkeypatch):  # noqa: F811
    """A last update may spoil the weights after every number of the step was seen to be finite."""
    t = trainer(folder, run, steps=3, keep=1, lr=1e308, train_batch=6)
    t.resume(checkpoint.find(run))
    with pytest.raises(guards.TrainingError, match=r"^step 3: policy\.\S+ is not finite; nothing was written"):
        t.train()
    assert checkpoint.find(run)[1]["step"] == 2 and not (run / "model").exists()
    good = trainer(folder, run, steps=3)
    good.resume()
    moment = good.optimizers["critic"].state[next(good.critic.parameters())]["exp_avg_sq"]
    parallel.local(moment).view(-1)[3] = float("inf")
    with pytest.raises(guards.TrainingError, match=r"step 2: critic\.model\.embed_tokens\.weight\.exp_avg_sq is not finite"):
        good.save()
    with torch.no_grad():
        good.policy.model.norm.weight[2] = 3.4e38  # infinite in bfloat16
    with pytest.raises(guards.TrainingError, match=r"model: model\.norm\.weight is not finite"):
        hf.save(good.policy, run / "model", torch.bfloat16)
    assert not (run / "model").exists()
    assert checkpoint.find(run)[1]["step"] == 2
    hf.save(good.policy, run / "model", torch.float32)


def test_a_last_step_with_a_rate_without_sense_does_not_end_well(folder, tmp_path):  # noqa: F811
    done = rlsp_py("ppo", "--model", folder, "--data", DATA, "--out", tmp_path / "run", "--steps", "1", *SMALL[:-1], "1e308", "--train-batch", "6")
    assert done.returncode == 1 and last_line(done.stderr).startswith("rlsp.py: step 1: policy.model."), done.stderr[-1000:]
    assert not (tmp_path / "run/done").exists() and not checkpoint.steps(tmp_path / "run")


def test_sft_names_it_too(tmp_path, monkeypatch, capsys):
    key = "model.layers.0.self_attn.q_proj.weight"
    poison(monkeypatch, key)
    monkeypatch.setattr(lib_signals.signals, "install", lambda: None)
    monkeypatch.setattr(sys, "argv", ["rlsp.py", "sft", "--model", str(ROOT / "data/tiny/model"), "--from-scratch", "--data",
                                      str(ROOT / "data/tiny/sft.jsonl"), "--out", str(tmp_path / "run"), "--batch", "4", "--dtype", "float32"])
    with pytest.raises(SystemExit) as e:
        rlsp.main()
    assert e.value.code == 1
    assert f"rlsp.py: step 1: grad_norm is not finite, nor is the gradient of policy's {key}; the batch is in" in last_line(capsys.readouterr().err)
    assert load_file(tmp_path / "run/nonfinite-step-1.safetensors")["tokens"].shape[0] == 4


def test_a_clipped_gradient_is_what_pytorchs_own_function_makes_of_it():
    nets = [torch.nn.Linear(5, 3) for _ in range(2)]
    for limit in (0.1, 100.0):
        for net in nets:
            for i, p in enumerate(net.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        norm = torch.nn.utils.clip_grad_norm_(nets[0].parameters(), limit)
        assert guards.clip_gradients(nets[1], limit) == float(norm)
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(*(net.parameters() for net in nets)))
