"""The benchmarks run, at toy size; their figures are not tested."""
import pytest

import bench


@pytest.mark.parametrize("words", [["update"], ["step", "--prompts", "4", "--max-response", "8"]], ids=lambda words: words[0])
def test_benchmarks_run_at_toy_size(words, capsys):
    bench.main([*words, "--toy", "--rounds", "1"])
    out = capsys.readouterr().out
    assert "GFLOP/s bfloat16" in out and ("peak RSS" if words[0] == "step" else "toy") in out
