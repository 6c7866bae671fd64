"""Signals: a run that is asked to stop ends at the next place where its weights are those of a finished step."""
import contextlib
import os
import signal
import time

import torch

from lib import parallel


class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception: no `except Exception` of a reward function shall swallow it."""


class Signals:
    """SIGTERM and SIGINT. Before training there is nothing to save, and a signal leaves at once; during training it is noted, and
    all ranks stop together at the next place where the weights are those of a finished step. A second one ends the process."""

    def __init__(self):
        self.received, self.at, self.leave = 0, 0.0, True

    def install(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.received:
            self.received, self.at = number, time.monotonic()
            if self.leave:
                raise Stopped
        elif time.monotonic() - self.at > 1:  # `timeout` and some schedulers send the first one twice
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextlib.contextmanager
    def may_interrupt(self):
        """For long work of this rank alone: a signal breaks it off. Call stop_if_asked after it, the result may be missing."""
        before = self.leave
        try:
            try:
                self.leave = True
                yield
            finally:
                self.leave = before
        except Stopped:
            if before:
                raise

    def stop_if_asked(self):
        """Raise Stopped on every rank if any has got a signal."""
        if parallel.all_reduce(torch.tensor([float(self.received > 0)])) > 0:
            raise Stopped


signals = Signals()
