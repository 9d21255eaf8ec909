"""What a merge holds at once, measured in a process of its own: `pytest -m slow tests/pipeline/test_memory.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "measured_merge.py"
BAR = 1_200_000_000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def siblings(tmp_path_factory):
    """Two 0.77 GB models in bfloat16."""
    place = tmp_path_factory.mktemp("siblings")
    run("make", place, 24)
    assert 0.7e9 < sum(f.stat().st_size for f in (place / "a").iterdir()) < 0.85e9
    return place


@pytest.mark.parametrize("method", ["average", "slerp", "relative", "rgsp"])
def test_two_large_models_merge_within_the_bar(siblings, method, tmp_path):
    found = json.loads(run("merge", siblings, method, tmp_path / "out").splitlines()[-1])
    assert found["bytes_in"] > 1.4e9
    assert found["peak"] < BAR, found


@pytest.mark.parametrize("method", ["average", "rgsp"])
def test_memory_does_not_grow_with_the_number_of_layers(siblings, method, tmp_path):
    peaks = []
    for layers, include in ((4, r"re:model\.layers\.[0-3]\..*"), (8, r"re:model\.layers\.[0-7]\..*")):
        out = tmp_path / f"out{layers}"
        peaks.append(json.loads(run("merge", siblings, method, out, include).splitlines()[-1])["peak"])
    assert peaks[1] < 1.1 * peaks[0] + 100_000_000, peaks


@pytest.mark.parametrize("method", ["average", "rgsp"])
def test_eight_devices_keep_to_the_memory(siblings, method, tmp_path):
    """Their waves are larger than one device's items, and no larger than what --memory leaves."""
    options = ("--devices", 8, "--memory", "1.2GB")
    include = r"re:model\.layers\.[0-7]\..*"
    found = json.loads(run("merge", siblings, method, tmp_path / "out", include, *options).splitlines()[-1])
    assert found["planned"] <= BAR
    assert found["peak"] < BAR, found


def test_a_head_of_150_000_rows_is_divided(tmp_path):
    """As a matrix, by rgsp: no simulated device may take more than a seventh of what the whole needs on one."""
    run("make", tmp_path, 0, "--head", 151_936)
    options = ("--memory", "12GB", "--devices", 8, "--device-memory", "900MB")
    found = json.loads(run("merge", tmp_path, "rgsp", tmp_path / "out", *options).splitlines()[-1])
    assert found["bytes_in"] == 2 * 2 * 151_936 * 896
    assert found["peak"] < found["planned"], found
