"""tests/gpu.py in its dry run: what is to be run on a GPU runs, at toy size, on whatever there is."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bench
import gpu


def test_the_proof_runs_dry_and_a_failed_check_lets_the_others_go_on(capsys, monkeypatch):
    if gpu.CUDA:
        pytest.skip("there is a GPU: run python -m tests.gpu")

    def broken(args):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(gpu.CHECKS, "environment", broken)
    assert gpu.main([]) == 1
    out = capsys.readouterr()
    assert re.findall(r"^(PASS|FAIL) (\w+)", out.out, re.M) == [
        ("FAIL" if name == "environment" else "PASS", name) for name in gpu.CHECKS]
    assert "failed: environment" in out.out and "no such kernel" in out.err
    by_blocks, by_pages, long_blocks, long_pages = map(int, re.findall(r": (\d+) kernels per token", out.out))
    assert by_pages == long_pages < by_blocks < long_blocks


def test_a_check_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["decoding"])
    assert "no check decoding, expected some of environment, " in capsys.readouterr().err


def test_each_peer_that_is_installed_is_asked_for_by_a_command_that_bench_takes(monkeypatch):
    commands, asked = [], []
    monkeypatch.setattr(gpu, "CUDA", True)
    installed = SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", lambda command, **how: commands.append(command) or installed)
    monkeypatch.setattr(bench, "rollout", asked.append)
    gpu.peers(SimpleNamespace(model="folder"))
    for command in commands:
        if "tests.tools.bench" in command:
            bench.main(command[3:])
    assert [args.peer for args in asked] == [["transformers"], ["vllm"]]
    assert all(args.model == "folder" and args.vllm_python == sys.executable for args in asked)
