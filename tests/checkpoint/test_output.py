"""Where a result may be written, whether there is room, and how it appears."""

import os
import re
import shutil
from collections import namedtuple

import pytest

from checkpoint.builders import write_model
from rgsp_jax.checkpoint import check_disk, check_output, format_bytes, open_checkpoint, publish
from rgsp_jax.errors import RefusedError


def test_a_fresh_place_is_fine(tmp_path):
    model = open_checkpoint(write_model(tmp_path / "m"))
    (tmp_path / "empty").mkdir()
    assert check_output(tmp_path / "out", [model, tmp_path / "other"]) == []
    assert check_output(tmp_path / "empty", [model]) == []
    assert check_output(tmp_path / "m2", [model]) == []


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("full", "already there and not empty"),
        ("file", "already there and is not a directory"),
        ("dangling", "already there and is not a directory"),
        ("m/out", "lies inside the input"),
        ("m/../m/a", "lies inside the input"),
        ("link/out", "lies inside the input"),
        ("m", "lies inside the input"),
        ("none/out", "parent .*none does not exist"),
        ("file/out", "parent .*file is not a directory"),
        (".", "lies inside the output"),
    ],
)
def test_bad_places_are_named(tmp_path, place, expected):
    model = open_checkpoint(write_model(tmp_path / "m"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    (tmp_path / "file").write_text("a")
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "link").symlink_to("m")
    problems = check_output(tmp_path / place, [model])
    assert any(re.search(expected, problem) for problem in problems), problems


def test_lone_files_are_inputs_too(tmp_path):
    write_model(tmp_path / "m")
    model = open_checkpoint(tmp_path / "m" / "model.safetensors")
    assert any("lies inside the output" in problem for problem in check_output(tmp_path / "m", [model]))
    assert check_output(tmp_path / "m" / "out", [model]) == []


def test_parents_without_permission_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert check_output(tmp_path / "out", []) == [f"the output's parent {tmp_path} is not writable for you"]


def test_disks_are_measured(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1_500_000))
    assert check_disk(tmp_path / "a" / "b", 1_500_000) == []
    (problem,) = check_disk(tmp_path / "a" / "b", 4_000_000_000)
    assert "1.5 MB free and 4 GB are needed: free 4 GB or choose" in problem and str(tmp_path) in problem


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (123456, "123 kB"),
        (999_600, "1 MB"),
        (1_240_000_000, "1.24 GB"),
        (5e15, "5 PB"),
    ],
)
def test_bytes_are_written_in_human_units(count, text):
    assert format_bytes(count) == text


def test_publishing_renames_all_at_once(tmp_path):
    (tmp_path / "out.incomplete" / "sub").mkdir(parents=True)
    (tmp_path / "out.incomplete" / "sub" / "a").write_text("a")
    publish(tmp_path / "out.incomplete", tmp_path / "out")
    assert (tmp_path / "out" / "sub" / "a").read_text() == "a"
    assert not (tmp_path / "out.incomplete").exists()


def test_everything_is_flushed_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    write_model(tmp_path / "out.incomplete")
    (tmp_path / "out.incomplete" / "sub").mkdir()
    (tmp_path / "out.incomplete" / "sub" / "a").write_text("a")
    events, fsync, rename = [], os.fsync, os.rename

    def recording_fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def recording_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    publish(tmp_path / "out.incomplete", tmp_path / "out")
    names = ["sub/a", "sub", "config.json", "model.safetensors", ""]
    before = events[: events.index("rename")]
    assert set(before) == {str(tmp_path / "out.incomplete" / name) for name in names}
    assert events[events.index("rename") + 1 :] == [str(tmp_path)]


def test_an_empty_directory_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    write_model(tmp_path / "out.incomplete")
    publish(tmp_path / "out.incomplete", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").specs


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_appeared_meanwhile_is_kept(tmp_path, kind):
    write_model(tmp_path / "out.incomplete")
    out = tmp_path / "out"
    if kind == "directory":
        out.mkdir()
        (out / "precious").write_text("a")
    elif kind == "file":
        out.write_text("precious")
    else:
        out.symlink_to("elsewhere")
    with pytest.raises(RefusedError, match="appeared while the model was being written"):
        publish(tmp_path / "out.incomplete", out)
    assert (tmp_path / "out.incomplete" / "model.safetensors").exists()
    assert (out / "precious").exists() or out.is_symlink() or out.read_text() == "precious"
