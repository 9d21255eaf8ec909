"""Rows divided between two processes that talk over loopback: one device's result in both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from mesh.member import compute, run

MEMBER = Path(__file__).with_name("member.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_divide_rows(tmp_path):
    port, outs = free_port(), [tmp_path / f"{i}.npz" for i in range(2)]
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables["PYTHONPATH"] = str(MEMBER.parents[1])
    team = [
        subprocess.Popen(
            [sys.executable, str(MEMBER), str(port), str(i), str(out)], env=variables, stderr=subprocess.PIPE, text=True
        )
        for i, out in enumerate(outs)
    ]
    try:
        expected = run(jax.jit(compute))
        for process in team:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in team:
            process.kill()
    for out in outs:
        found = np.load(out)
        assert len(found) == 8
        for shape, results in expected.items():
            for name, x in results.items():
                np.testing.assert_allclose(found[f"{shape}_{name}"], x, atol=1e-11, err_msg=f"{shape} {name}")
