"""Two processes of two devices each: a sweep's trees and a step of learning are one device's, in both."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from learning.member import work
from mesh.test_two_processes import free_port

MEMBER = Path(__file__).with_name("member.py")


@pytest.mark.slow
def test_two_processes_sweep_and_learn(tmp_path):
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
        for process in team:
            _, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
    finally:
        for process in team:
            process.kill()
    expected = work()
    for out in outs:
        found = np.load(out)
        assert set(found) == set(expected) and len(expected) > 20
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-11, err_msg=name)
