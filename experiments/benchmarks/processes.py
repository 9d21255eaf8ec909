"""Commands measured from outside: wall time, processor time and peak memory of the whole tree of processes."""

import os
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

SAMPLE_SECONDS = 0.02
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Measured:
    """What one run of a command took."""

    wall: float
    """Seconds from start to end, the interpreter's start included."""
    cpu: float
    """Seconds of all processors, of the command and of what it waited for."""
    peak: int
    """Bytes resident in all its processes at once, mapped files included; at least the largest process's own peak."""


def list_tree(pid: int) -> Iterator[int]:
    """A process and all that it started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from list_tree(int(child))


def count_resident(pid: int) -> int:
    """Bytes of a tree of processes that are resident now."""
    total = 0
    try:
        for one in list_tree(pid):
            total += int(Path(f"/proc/{one}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        pass  # one of them has just ended
    return total


def measure(command: Sequence[Any], environment: Mapping[str, str], log: Path) -> Measured:
    """Run a command to its end.

    Raises:
        SystemExit: it failed; the end of what it printed.
    """
    peak, ended = [0], threading.Event()
    with log.open("w") as output:
        start = perf_counter()
        process = subprocess.Popen(
            list(map(str, command)), env=dict(environment), stdout=output, stderr=subprocess.STDOUT
        )

        def watch() -> None:
            while not ended.wait(SAMPLE_SECONDS):
                peak[0] = max(peak[0], count_resident(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)
        wall = perf_counter() - start
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    return Measured(wall, used.ru_utime + used.ru_stime, max(peak[0], used.ru_maxrss * 1024))
