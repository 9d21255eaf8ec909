"""Starting the processes of a merge on this machine and waiting for them."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

MEMBER = Path(__file__).with_name("member.py")
HEARTBEAT = 6
"""Seconds: short, so that a lost process is noticed soon."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """One device in every process, and this directory's parent among the modules."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {"PYTHONPATH": str(MEMBER.parents[1]), "JAX_PLATFORMS": "cpu"}


def start(arguments: Sequence[object], options: Sequence[object] = ()) -> subprocess.Popen:
    """One process: what `rgsp` gets, and what happens to it."""
    command = [sys.executable, str(MEMBER), *map(str, options), "--", "merge", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def start_team(
    arguments: Sequence[object],
    count: int,
    options: Mapping[int, Sequence[object]] | None = None,
    extra: Mapping[int, Sequence[object]] | None = None,
) -> list[subprocess.Popen]:
    """All processes of one merge; `options` and `extra` are what single ones are told besides."""
    port = free_port()
    return [
        start(
            [
                *arguments,
                *("--distributed", "--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", index),
                *("--heartbeat-timeout", HEARTBEAT, "--start-timeout", 60),
                *(extra or {}).get(index, ()),
            ],
            (options or {}).get(index, ()),
        )
        for index in range(count)
    ]


def finish(team: Sequence[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, list[str]]]:
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
