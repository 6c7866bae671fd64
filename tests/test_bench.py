"""The benchmarks run, at toy size; their figures are not tested."""
import os
import subprocess
import sys

import pytest

import bench
import torch
from conftest import ROOT
from lib import logs, parallel, threads


@pytest.mark.parametrize("words", [["update"], ["busy"], ["step", "--prompts", "4", "--max-response", "8"]], ids=lambda words: words[0])
def test_benchmarks_run_at_toy_size(words, capsys):
    bench.main([*words, "--toy", "--rounds", "1"])
    out = capsys.readouterr().out
    expected = {"update": ("GFLOP/s bfloat16", "toy"), "step": ("GFLOP/s bfloat16", "peak RSS"), "busy": ("decode step", "ratio")}
    assert all(word in out for word in expected[words[0]])


@pytest.mark.parametrize("flops_per_s, largest", [(3e8, 256), (1e11, 2048), (1e15, 8192)])
def test_the_peak_is_measured_at_a_size_that_the_processor_can_do(monkeypatch, flops_per_s, largest):
    sizes = []
    monkeypatch.setattr(torch, "ones", lambda n, m, **kw: n)
    monkeypatch.setattr(logs, "product_seconds", lambda n: sizes.append(n) or 2 * n**3 / flops_per_s)
    assert logs.matrix_peak.__wrapped__(torch.device("cpu"), torch.bfloat16) == pytest.approx(flops_per_s)
    assert max(sizes) == largest and sum(2 * n**3 for n in sizes) / flops_per_s < 3


SPIN = """
import time
import torch
from lib import threads

def spent():
    start = time.process_time()
    for _ in range(20):
        torch.ones(2**18).sum()
        time.sleep(0.01)
    return time.process_time() - start

torch.set_num_threads(2)
spent()
alone = spent()
sleepers = threads.Sleepers()
beside = spent()
sleepers.leave()
print(alone, beside, spent())
"""


@pytest.mark.skipif(len(threads.cores()) < 2, reason="one core: there are no threads that wait for each other")
def test_beside_sleepers_threads_that_wait_cost_nothing():
    """Processor time of a process that mostly waits, which no other program disturbs."""
    free = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", SPIN], cwd=ROOT, env=free, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    before, during, after = map(float, done.stdout.split())
    assert during < 0.5 * before and during < 0.5 * after


def test_threads_sleep_from_the_first_busy_look_to_the_fourth_quiet_one(monkeypatch):
    """Two threads on two cores; others' seconds of each half second."""
    log, looks = [], iter([0, 0.15, 0.3, 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4])
    total = [0.0]

    class Fake:
        def __init__(self):
            log.append("sleep")

        def leave(self):
            log.append("wake")

    class Stop:
        def wait(self, pause):
            more = next(looks, None)
            total[0] += more or 0
            log.append(more)
            return more is None

    monkeypatch.setattr(threads, "others_seconds", lambda: total[0])
    monkeypatch.setattr(threads, "Sleepers", Fake)
    monkeypatch.setattr(threads, "cores", lambda: [0, 1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    threads.watch(Stop())
    assert log == [0, 0.15, 0.3, "sleep", 0.0, 0.2, 0.0, 0.0, 0.0, 0.0, "wake", 0.0, 0.4, "sleep", None, "wake"]


@pytest.mark.skipif(not os.path.isfile("/proc/stat"), reason="no /proc/stat here")
def test_others_seconds_are_those_of_other_programs():
    start = threads.others_seconds()
    program = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"])
    program.wait(60)
    assert threads.others_seconds() - start > 0.4


def test_under_torchrun_offloading_takes_a_share_of_the_cores(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(threads, "cores", lambda: list(range(16)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parallel.start(1, offload=False)
    assert given == []
    parallel.start(1, offload=True)
    assert given == [4]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's word
    parallel.start(1, offload=True)
    assert given == [4]
