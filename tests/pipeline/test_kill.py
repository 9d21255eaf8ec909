"""Killed at any moment, a merge leaves what was there before or a directory that can be resumed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.toy_models import toy_family, tree_bytes, write_family
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

SCRIPT = Path(__file__).with_name("slow_merge.py")
KILLED = -signal.SIGKILL


def start(out, models, *options):
    command = [sys.executable, str(SCRIPT), str(out), *models, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(out, models, *options):
    """(exit code, what was printed)."""
    process = start(out, models, *options)
    printed, errors = process.communicate(timeout=120)
    assert errors == "" or process.returncode == KILLED
    return process.returncode, printed


def count_items(workshop):
    """Whole lines of the journal behind the first."""
    path = workshop / "journal.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.exists() else -1


def wait_for_items(process, workshop, count):
    deadline = time.monotonic() + 60
    while count_items(workshop) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("parents"), toy_family(2))


@pytest.fixture(scope="module")
def uninterrupted(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    assert run(out, models) == (0, "0\n")
    return tree_bytes(out)


def test_one_merge_killed_over_and_over(tmp_path, models, uninterrupted):
    """From outside while it computes, and by itself at the points where most could go wrong."""
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    process = start(out, models, "--delay", "0.1")
    wait_for_items(process, workshop, 1)
    with pytest.raises(RefusedError, match="is being written by another process"):
        merge_checkpoints(MergeConfig(models=models, method="average"), out, resume=True)
    process.kill()
    process.communicate()
    finished = [count_items(workshop)]
    for point in ("record:2", "publish:1"):
        assert not out.exists()
        assert run(out, models, "--resume", "--die", point)[0] == KILLED
        finished.append(count_items(workshop))
    assert 1 <= finished[0] < finished[1] < finished[2]
    assert not out.exists()
    assert tree_bytes(workshop / "model") == uninterrupted  # all but named
    assert run(out, models, "--resume") == (0, f"{finished[2]}\n")
    assert tree_bytes(out) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        *(f"pwrite:{i}" for i in (1, 2, 4, 6, 9, 12, 15)),
        *(f"record:{i}:after" for i in (1, 3, 5)),
        *(f"read_blocks:{i}" for i in (1, 7)),
        "audit:1",
        "audit:1:after",
        *(f"write_text:{i}" for i in (1, 2, 3, 4, 5)),
        "publish:1:after",
        "rmtree:1:after",
    ],
)
def test_killed_at_this_point_and_resumed(tmp_path, models, uninterrupted, point):
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    assert run(out, models, "--die", point)[0] == KILLED
    published = point in ("publish:1:after", "rmtree:1:after")
    assert out.exists() == published
    if published:
        assert tree_bytes(out) == uninterrupted
        code, printed = run(out, models, "--resume")
        assert code == 2 and ("is complete" in printed or "already there" in printed)
    else:
        finished = count_items(workshop)
        code, printed = run(out, models, "--resume")
        assert (code, int(printed)) == (0, finished)
    assert tree_bytes(out) == uninterrupted
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, models, uninterrupted):
    out, workshop = tmp_path / "out", tmp_path / "out.incomplete"
    for wait in (0.01, 0.13, 0.02, 0.31, 0.07):
        before = count_items(workshop)
        process = start(out, models, "--resume", "--delay", "0.05")
        wait_for_items(process, workshop, max(before, 0))
        time.sleep(wait)
        process.kill()
        process.communicate()
        assert not out.exists()
    assert run(out, models, "--resume")[0] == 0
    assert tree_bytes(out) == uninterrupted
