"""A user's own function, given by --reward or --verifier. It is loaded from its file and called in threads.
Its errors are reported in one line with the file and line number."""
import contextlib
import copy
import importlib.util
import inspect
import os
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np
import torch

from lib import files
from lib.guards import TrainingError
from lib.signals import Stopped, keep_streams, signals

THREADS = 16  # calls at once on each rank; such functions often wait for a compiler or an endpoint


def verdict(value):
    """What a verifier returned, as a bool. Any other type is refused, because it may not be meant as a
    verdict: None, for example, comes from a forgotten return."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"returned {value!r:.80}, expected True or False")
    return bool(value)


def number(value):
    """What a reward function returned, as a float."""
    if not hasattr(type(value), "__float__"):  # refuses None, and text, which float() would read
        raise TypeError(f"returned {value!r:.80}, expected a number")
    return float(value)


def load(flag, spec, kind):
    """Load the function that FILE.py:FUNCTION names; None for an empty spec. The file is run as the user's
    own code. The result is a function of the same arguments; it converts its result by `kind` (verdict or
    number), and raises a TrainingError that has file, line and error in one line."""
    if not spec:
        return None
    file, _, name = spec.rpartition(":")
    if not file or not Path(file).is_file():
        raise FileNotFoundError(f"{flag} {spec}: expected an existing FILE.py:FUNCTION")
    module_name = f"rlsp_{kind.__name__}_function"
    loader = SourceFileLoader(module_name, file)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(module_name, loader))
    sys.modules[module_name] = module  # dataclasses look up their module there
    folder = str(Path(file).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # the file may import its neighbours
    try:
        with undisturbed():
            module.__spec__.loader.exec_module(module)
    except Stopped:
        raise
    except BaseException as e:
        raise ValueError(f"{flag} {spec}: {described(e, file)}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{flag} {spec}: {file} has no function {name!r}")
    code = getattr(inspect.unwrap(function), "__code__", None)

    def call(response, problem):
        try:
            return kind(function(response, copy.deepcopy(problem)))  # it may modify its argument
        except BaseException as e:
            line = code.co_firstlineno if code and code.co_filename == file else None
            raise TrainingError(f"{flag} {described(e, file, line)}", everywhere=False) from None

    return call


@contextlib.contextmanager
def undisturbed():
    """Restore what a user's code may have changed, since the run continues in the same process: the current
    folder (code may be tried out in another one), torch's defaults, the standard streams."""
    folder = os.open(".", os.O_RDONLY)
    dtype, gradients, streams = torch.get_default_dtype(), torch.is_grad_enabled(), (sys.stdout, sys.stderr)
    try:
        yield
    finally:
        os.fchdir(folder)
        os.close(folder)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        sys.stdout, sys.stderr = streams
        if any(stream.closed for stream in streams):
            keep_streams()


def described(error, file, line=None):
    """An error as FILE:LINE: error. The line is the last one of the file in the traceback, or else the given
    one."""
    lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == file]
    text = traceback.format_exception_only(error)[0]
    if isinstance(error, SyntaxError):
        text = f"SyntaxError: {error.msg}"
        lines += [error.lineno] * (error.filename == file)
    if isinstance(error, SystemExit):
        text = f"sys.exit({error.code!r}) was called, but it must not end the run"
    place = ":".join(str(x) for x in (file, lines[-1] if lines else line) if x)
    return f"{place}: {files.visible(' '.join(text.split()), 300)}"


def call_all(function, calls, threads=THREADS):
    """[function(*arguments) for arguments in calls], with many calls at once. The first error in the order of
    the calls is raised; calls that have not begun by then are not made."""
    pool = ThreadPoolExecutor(threads)
    try:
        return [future.result() for future in [pool.submit(function, *arguments) for arguments in calls]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ask(function, samples):
    """The results of a user's function for each sample's (text, problem), or Nones without a function."""
    if function is None:
        return [None] * len(samples)
    results = []
    with undisturbed(), signals.may_interrupt():
        results = call_all(function, [(s.text, s.problem) for s in samples])
    signals.stop_if_asked()
    return results
