"""The benchmarks run, at toy size; their figures are not tested."""
import pytest

import bench
import torch
from lib import logs


@pytest.mark.parametrize("words", [["update"], ["step", "--prompts", "4", "--max-response", "8"]], ids=lambda words: words[0])
def test_benchmarks_run_at_toy_size(words, capsys):
    bench.main([*words, "--toy", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "GFLOP/s bfloat16" in out and ("peak RSS" if words[0] == "step" else "toy") in out


@pytest.mark.parametrize("flops_per_s, largest", [(3e8, 256), (1e11, 2048), (1e15, 8192)])
def test_the_peak_is_measured_at_a_size_that_the_processor_can_do(monkeypatch, flops_per_s, largest):
    sizes = []
    monkeypatch.setattr(torch, "ones", lambda n, m, **kw: n)
    monkeypatch.setattr(logs, "product_seconds", lambda n: sizes.append(n) or 2 * n**3 / flops_per_s)
    assert logs.matrix_peak.__wrapped__(torch.device("cpu"), torch.bfloat16) == pytest.approx(flops_per_s)
    assert max(sizes) == largest and sum(2 * n**3 for n in sizes) / flops_per_s < 3
