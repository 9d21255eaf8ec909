"""Two processes of two devices each: a sweep's trees and a step of learning are one device's, in both."""

from pathlib import Path

import numpy as np
import pytest

from learning.member import work
from mesh.team import started

MEMBER = Path(__file__).with_name("member.py")


@pytest.mark.slow
def test_two_processes_sweep_and_learn(tmp_path):
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    with started(MEMBER, outs) as wait:
        wait(400)
    expected = work()
    for out in outs:
        found = np.load(out)
        assert set(found) == set(expected) and len(expected) > 20
        for name, x in expected.items():
            np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-11, err_msg=name)
