"""How this process's threads share the cores with other programs and the other processes of its job.

torch divides an operation among threads that then wait for each other in a loop (OpenMP). This is fastest
while each thread has a core to itself. When another program needs a core it is disastrous: a thread that has
used up its time by waiting is suspended for milliseconds just when it should compute, and all others wait for
it. On two cores with one other busy program, a step of the tiny model took 25 to 40 times as long. Sleeping
instead costs a third more on an otherwise idle machine. So the threads wait in a loop while they can have
their cores, and sleep while they cannot. The work is divided in the same way, so no number depends on it.
"""
import functools
import os
import threading
import time
from pathlib import Path

import torch


def cores():
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def others_seconds():
    """Core-seconds that other programs have used on these cores since the machine started, on Linux."""
    mine = {f"cpu{i}" for i in cores()}
    ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *fields = line.split()
        if name in mine:
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class Sleepers:
    """While these threads exist, threads of OpenMP that have to wait sleep at once.

    GNU's library, which torch's builds for Linux use, does not wait in a loop if its process has more of the
    library's threads than there are cores. A Python thread gets a team of them with its first parallel
    operation and keeps it to its end. These threads make one such operation and then do nothing.
    """

    def __init__(self):
        self.end = threading.Event()
        team = torch.get_num_threads() - 1  # threads of a team beside the one that calls
        count = -(-len(cores()) // team) - 1
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(max(1, count))]
        for thread in self.threads:
            thread.start()

    def run(self):
        torch.ones(2**16).sum()  # large enough to be divided among threads
        self.end.wait()

    def leave(self):
        self.end.set()
        for thread in self.threads:
            thread.join()


def watch(stop, pause=0.5, patience=4):
    """Keep Sleepers while other programs need cores that torch's threads use, until the event `stop` is set.

    It checks every `pause` seconds, and after `patience` quiet checks the Sleepers end.
    """
    sleepers = None
    quiet = 0
    before = others_seconds()
    while not stop.wait(pause):
        now = others_seconds()
        unused = len(cores()) - torch.get_num_threads()
        busy = torch.get_num_threads() > 1 and (now - before) / pause > unused + 0.35
        before = now
        quiet = 0 if busy else quiet + 1
        if busy and sleepers is None:
            sleepers = Sleepers()
        elif sleepers and quiet == patience:
            sleepers.leave()
            sleepers = None
    if sleepers:
        sleepers.leave()


@functools.cache  # one watch is enough
def share_cores():
    """Let torch's threads sleep while other programs are busy, from now on. Returns the event that ends it.

    Only Linux has the counts that this needs; elsewhere it does nothing.
    """
    stop = threading.Event()
    if Path("/proc/stat").is_file():
        threading.Thread(target=watch, args=(stop,), daemon=True).start()
    return stop


def divide_cores():
    """Give each of several processes on this machine an equal part of the cores.

    torchrun gives each one thread, unless OMP_NUM_THREADS is set, which suits work on GPUs. Under --offload
    Adam runs on the processor.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if ranks > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(cores()) // ranks))
