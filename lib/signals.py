"""What comes from outside at any moment: signals, and standard streams that are closed or that nobody reads.

A run that is asked to stop ends at the next place where its weights are those of a finished step. What is
printed is a comfort, and what cannot be printed ends no run. rlsp.py prepares for both before it imports
torch, which takes seconds; therefore nothing here imports it.
"""
import contextlib
import errno
import io
import os
import signal
import sys
import time

REQUEUE = 75  # exit status of a run that a signal stopped: EX_TEMPFAIL of sysexits.h, "try again later"
# Requests to stop: Ctrl-C, those of batch systems and their warnings, the end of a terminal or ssh session.
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
PERSONAL = (signal.SIGTERM, signal.SIGINT)  # a second one of these ends the process at once


class Stopped(BaseException):
    """A signal asked the run to stop. It is not an Exception, so that no `except Exception` of a reward
    function swallows it."""


class Signals:
    """Before training there is nothing to save, and a signal leaves at once; during training it is noted, and
    all ranks stop together at the next place where the weights are those of a finished step. A second TERM or
    INT ends the process. (Others come again by themselves: XCPU each second, TERM some time after a batch
    system's USR1.)"""

    def __init__(self):
        self.received = 0  # number of the first signal
        self.insisted = None  # when the first TERM or INT came
        self.leave = True  # whether a signal raises Stopped at once
        self.importing = False

    def install(self, importing=False):
        """importing: until this is unset a signal ends the process, since no import expects one."""
        self.importing = importing
        for number in ASKED:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores it
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.importing:
            if os.environ.get("RANK", "0") == "0":
                with contextlib.suppress(OSError):
                    os.write(2, f"rlsp.py: stopped by {signal.Signals(number).name}\n".encode())
            os._exit(REQUEUE)
        if number in PERSONAL:
            now = time.monotonic()
            # `timeout` and some schedulers send the first one twice.
            if self.insisted is not None and now - self.insisted > 1:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.insisted = now if self.insisted is None else self.insisted
        if not self.received:
            self.received = number
            if self.leave:
                raise Stopped

    def uninstall(self):
        """In a child that a user function forked: it ends as processes do, for which a pool waits."""
        for number in ASKED:
            if signal.getsignal(number) == self.handle:
                signal.signal(number, signal.SIG_DFL)

    def name(self):
        return signal.Signals(self.received).name if self.received else "a signal to another rank"

    @contextlib.contextmanager
    def may_interrupt(self):
        """For long work of this rank alone: a signal breaks it off. Call stop_if_asked after it, since the
        result may be missing."""
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
        import torch  # see above

        from lib import parallel
        if parallel.all_reduce(torch.tensor([float(self.received > 0)])) > 0:
            raise Stopped


signals = Signals()
os.register_at_fork(after_in_child=signals.uninstall)


# ------------------------------------------------------------------------------------------ standard streams


class Stream(io.FileIO):
    """Standard output or error whose failures (nobody reads it, its disk is full, its terminal is gone) raise
    nothing: what cannot be written is lost. The first failure other than a reader who has left is kept."""
    failure = None

    def write(self, data):
        try:
            written = super().write(data)
        except OSError as e:
            if e.errno != errno.EPIPE and not self.failure:
                self.failure = e.strerror
            written = None
        return len(data) if written is None else written


def keep_streams():
    """Make print and progress bars safe: no failure of theirs ends the process, and no character that the
    terminal lacks. A stream that was closed becomes /dev/null: otherwise the next file that is opened would
    get its number, and with it the messages of libraries."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for number, name in (1, "stdout"), (2, "stderr"):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        stream = io.BufferedWriter(Stream(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(stream, encoding, errors="backslashreplace", line_buffering=True))


def end(status, output_matters):
    """End the process, without waiting for threads: of a silent judge, of a function that does not return, of
    libraries. Where the output is what was asked for, losing it is a failure."""
    sys.stdout.flush()
    lost = sys.stdout.buffer.raw.failure
    if lost and output_matters and not status:
        status = 1
        print(f"rlsp.py: standard output: {lost}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)
