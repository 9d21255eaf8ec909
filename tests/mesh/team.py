"""Two processes on loopback that run a script each, for tests of a mesh that spans them."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(member, outs):
    """`wait(seconds)` for processes that run `member PORT INDEX OUT`, one for each of `outs`; none outlives it."""
    port = free_port()
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables["PYTHONPATH"] = str(member.parents[1])
    commands = [[sys.executable, str(member), str(port), str(i), str(out)] for i, out in enumerate(outs)]
    team = [subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True) for command in commands]

    def wait(seconds):
        for process in team:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors

    try:
        yield wait
    finally:
        for process in team:
            process.kill()
