"""What the native code below JAX writes to stderr, and its abort(), while several processes work together.

Where the coordination service is lost, its client writes a stack trace and aborts the process, and takes no callback in
place of that (jaxlib cannot hand one its status). Here the descriptor leads to a file meanwhile, and SIGABRT to one
sentence and the exit code of a refusal.
"""

import ctypes
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FATAL = b"JAX distributed service detected fatal errors"
ENTRY = re.compile(rb"(?m)^(?=[IWEF]\d{4} \d\d:\d\d:\d\d)")
"""Where an entry of the native log begins."""
COORDINATION = re.compile(rb"\A[IWEF]\d{4} \S+ +\d+ (?:coordination_service|client\.h|preemption|add_port)")
"""Entries on the life and death of processes, which are told in other words."""


@contextmanager
def set_aside(describe: Callable[[], str], exit_code: int) -> Iterator[None]:
    """Keep native messages until the end; an abort over lost processes becomes a sentence and an exit code.

    Args:
        describe: the sentence, asked for when it is needed, from any thread.
        exit_code: of the process then.
    """
    sys.stderr.flush()
    outside = os.dup(2)
    before = sys.stderr
    with tempfile.TemporaryFile() as kept, open(outside, "w", buffering=1, errors="backslashreplace") as stderr:
        os.dup2(kept.fileno(), 2)
        if before is sys.__stderr__:  # anything else does not lead to the descriptor
            sys.stderr = stderr
        trap = make_trap(describe, exit_code, kept.fileno(), outside)
        signal_to(trap)
        try:
            yield
        finally:
            signal_to(None)
            stderr.flush()
            os.dup2(outside, 2)
            sys.stderr = before
            os.write(2, b"".join(e for e in read_entries(kept.fileno()) if not COORDINATION.match(e)))


HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


def make_trap(describe: Callable[[], str], exit_code: int, kept: int, outside: int) -> Callable[[int], None]:
    """The handler of SIGABRT. It runs in the thread that aborts; abort() ends the process where it returns."""

    def trap(number: int) -> None:
        text = b"".join(read_entries(kept))
        if FATAL in text:
            os.write(outside, describe().encode(errors="backslashreplace"))
            os._exit(exit_code)
        os.write(outside, text)

    return HANDLER(trap)


INSTALLED: list[Callable[[int], None]] = []
"""The handler in force, which must not be collected."""


def signal_to(trap: Callable[[int], None] | None) -> None:
    """Set the handler of SIGABRT, or the system's own. Python's would run too late, after abort() has ended all."""
    function = ctypes.CDLL(None).signal
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    function(signal.SIGABRT, ctypes.cast(trap, ctypes.c_void_p) if trap else None)  # type: ignore[arg-type]
    INSTALLED[:] = [trap] if trap else []


def read_entries(descriptor: int) -> list[bytes]:
    """The entries of a native log."""
    size = os.fstat(descriptor).st_size
    return ENTRY.split(os.pread(descriptor, size, 0)) if size else []
