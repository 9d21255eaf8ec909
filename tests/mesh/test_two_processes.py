"""Rows divided between two processes that talk over loopback: one device's result in both."""

from pathlib import Path

import jax
import numpy as np
import pytest

from mesh.member import compute, run
from mesh.team import started

MEMBER = Path(__file__).with_name("member.py")


@pytest.mark.slow
def test_two_processes_divide_rows(tmp_path):
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    with started(MEMBER, outs) as wait:
        expected = run(jax.jit(compute))
        wait(240)
    for out in outs:
        found = np.load(out)
        assert len(found) == 8
        for shape, results in expected.items():
            for name, x in results.items():
                np.testing.assert_allclose(found[f"{shape}_{name}"], x, atol=1e-11, err_msg=f"{shape} {name}")
