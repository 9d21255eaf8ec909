"""Starting the processes of a merge on this machine and waiting for them."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMBER = Path(__file__).with_name("member.py")
HEARTBEAT = 6
"""Seconds: short, so that a lost process is noticed soon."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def environment() -> dict[str, str]:
    """One device in every process, and this directory's parent among the modules."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(MEMBER.parents[1]), "JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Special:
    """What is different about one process."""

    options: Sequence[object] = ()
    """Of member.py."""
    arguments: Sequence[object] = ()
    """Of rgsp, behind those of all."""
    directory: Path | None = None
    """Where it runs."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of its environment."""


def start(arguments: Sequence[object], special: Special = Special()) -> subprocess.Popen:
    """One process with these arguments of `rgsp merge`."""
    command = [sys.executable, str(MEMBER), *map(str, special.options), "--", "merge"]
    command += map(str, [*arguments, *special.arguments])
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(), **special.variables},
        cwd=special.directory,
    )


def start_team(
    arguments: Sequence[object], count: int, specials: Mapping[int, Special] | None = None, **all_of_them: Any
) -> list[subprocess.Popen]:
    """All processes of one merge."""
    port = free_port()
    usual = Special(**all_of_them)
    return [
        start(
            [
                *arguments,
                *("--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", index),
                *("--heartbeat-timeout", HEARTBEAT, "--start-timeout", 100),
            ],
            (specials or {}).get(index, usual),
        )
        for index in range(count)
    ]


def finish(team: Sequence[subprocess.Popen], timeout: float = 150) -> list[tuple[int, str, list[str]]]:
    """(exit code, what was printed, lines of errors) of every process."""
    outcomes = []
    try:
        for process in team:
            printed, errors = process.communicate(timeout=timeout)
            outcomes.append((process.returncode, printed, errors.splitlines()))
    finally:
        for process in team:
            process.kill()
    return outcomes


def count_items(workshop: Path) -> int:
    """Items that the journals of a workshop have."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in workshop.glob("journal*.jsonl"))


def wait_for_items(team: Sequence[subprocess.Popen], workshop: Path, count: int) -> None:
    """Wait until so many are done, and all processes still work."""
    deadline = time.monotonic() + 150
    while count_items(workshop) < count:
        assert time.monotonic() < deadline
        for process in team:
            assert process.poll() is None, process.communicate()
        time.sleep(0.02)
