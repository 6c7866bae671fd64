"""Events from outside that may come at any time: signals, and standard streams that are closed or not read.

A run that is asked to stop ends as soon as its weights are those of a finished step. A failure to print never
ends a run. rlsp.py prepares for both before it imports torch, which takes seconds, so this module must not
import torch when it is loaded.
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
    """A signal asked the run to stop. It is not an Exception, so that no `except Exception` in a reward
    function catches it."""


class Signals:
    """The handler of signals. Before training there is nothing to save, and a signal ends the run at once.
    During training it is only noted, and all ranks stop together as soon as the weights are those of a
    finished step. A second TERM or INT ends the process. (A repetition of other signals does not, since they
    repeat by themselves: XCPU each second, TERM some time after a batch system's USR1.)"""

    def __init__(self):
        self.received = 0  # number of the first signal
        self.insisted = None  # when the first TERM or INT came
        self.leave = True  # whether a signal raises Stopped at once
        self.importing = False

    def install(self, importing=False):
        """importing: while this is set, a signal ends the process, because imports are not prepared for
        one."""
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
        """Restore the default handlers in a child that a user's function forked, so that a pool can end
        it."""
        for number in ASKED:
            if signal.getsignal(number) == self.handle:
                signal.signal(number, signal.SIG_DFL)

    def name(self):
        return signal.Signals(self.received).name if self.received else "a signal to another rank"

    @contextlib.contextmanager
    def may_interrupt(self):
        """Let a signal interrupt long work of this rank alone. Call stop_if_asked afterwards, since the
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
    """Standard output or error whose failures (no reader, a full disk, a closed terminal) raise nothing: what
    cannot be written is lost. The first failure other than a missing reader is kept."""
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
    """Make print and progress bars safe: neither their failures nor characters that the terminal lacks end
    the process. A closed stream is replaced by /dev/null; otherwise the next opened file would get its
    number, and with it the messages of libraries."""
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
    """End the process without waiting for threads, such as those of a silent judge, of a function that does
    not return, or of libraries. If the output is the command's purpose (output_matters), losing it is a
    failure."""
    sys.stdout.flush()
    lost = sys.stdout.buffer.raw.failure
    if lost and output_matters and not status:
        status = 1
        print(f"rlsp.py: standard output: {lost}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(status)
