"""tests/gpu.py in its dry run: what is to be run on a GPU runs, at toy size, on whatever there is."""
import re

import pytest

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
