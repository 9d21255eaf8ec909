"""Writing: in any order, from threads, resumed, onto disks that fill up."""

import errno
import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.builders import make_tensor, same_bytes, sample_tensors, tiny_tensors
from rgsp_jax.checkpoint import DTYPES, ShardWriter, TensorSpec, open_checkpoint, plan_shards, write_safetensors
from rgsp_jax.errors import RefusedError

F32 = np.dtype(np.float32)


def plan_for(tensors, max_shard_size=1 << 40):
    return plan_shards([TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()], max_shard_size)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_order_of_slices_gives_the_same_bytes(tmp_path_factory, data):
    dtypes = st.sampled_from(list(DTYPES.values()))
    shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
    tensors = {
        f"t{i}": make_tensor(data.draw(dtypes), data.draw(shapes), i) for i in range(data.draw(st.integers(1, 5)))
    }
    plan = plan_for(tensors, data.draw(st.integers(1, 300)))
    whole, pieces = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("pieces")
    writer = ShardWriter(whole, plan)
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    cuts = [(name, data.draw(st.integers(0, array.size))) for name, array in tensors.items()]
    jobs = [(name, array.reshape(-1)[:cut], 0) for (name, cut), array in zip(cuts, tensors.values(), strict=True)]
    jobs += [(name, array.reshape(-1)[cut:], cut) for (name, cut), array in zip(cuts, tensors.values(), strict=True)]
    writer = ShardWriter(pieces, plan)
    for name, piece, start in data.draw(st.permutations(jobs)):
        writer.write(name, piece, start)
    for name, array in tensors.items():
        out = np.empty(array.shape, array.dtype)
        writer.read_back(name, out)
        assert same_bytes(out, array)
    writer.finish()
    assert contents(whole) == contents(pieces)
    with open_checkpoint(whole) as checkpoint:
        assert all(same_bytes(checkpoint.read(name), array) for name, array in tensors.items())


def test_threads_write_at_once(tmp_path):
    tensors = {f"t{i}": make_tensor(F32, (100, 100), i) for i in range(12)}
    writer = ShardWriter(tmp_path / "m", plan_for(tensors, 100_000))
    threads = [threading.Thread(target=writer.write, args=item) for item in tensors.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.finish()
    checkpoint = open_checkpoint(tmp_path / "m")
    assert all(same_bytes(checkpoint.read(name), array) for name, array in tensors.items())


def test_strides_are_written_in_c_order(tmp_path):
    tensors = {name: array for name, array in sample_tensors().items() if name.startswith("transposed")}
    tensors["stepped"] = make_tensor(F32, (8, 6))[::2, ::-1]
    writer = ShardWriter(tmp_path, plan_for(tensors))
    for name, array in tensors.items():
        assert not array.flags.c_contiguous
        writer.write(name, array)
    checkpoint = open_checkpoint(tmp_path)
    assert all(same_bytes(checkpoint.read(name), np.asarray(array, order="C")) for name, array in tensors.items())


def test_a_resumed_write_ends_byte_identical(tmp_path):
    tensors = sample_tensors()
    plan = plan_for(tensors, 100)
    writer = ShardWriter(tmp_path / "once", plan)
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()
    names = list(tensors)
    for name in names[:7]:
        ShardWriter(tmp_path / "twice", plan, resume=True).write(name, tensors[name])
    (tmp_path / "twice" / ".model-00001-of-00009.safetensors.writing").write_bytes(b"left by a killed process")
    (tmp_path / "twice" / plan.shards[-1].file_name).unlink()
    writer = ShardWriter(tmp_path / "twice", plan, resume=True)
    for name in names[7:] + [name for name in plan.shards[-1].names if name in names[:7]]:
        writer.write(name, tensors[name])
    writer.finish()
    (tmp_path / "twice" / ".model-00001-of-00009.safetensors.writing").unlink(missing_ok=True)
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


def test_without_resume_files_in_the_way_are_refused(tmp_path):
    plan = plan_for(tiny_tensors(), 1)
    ShardWriter(tmp_path, plan)
    with pytest.raises(RefusedError) as raised:
        ShardWriter(tmp_path, plan)
    assert len(raised.value.problems) == 3 and all("is already there" in line for line in raised.value.problems)


@pytest.mark.parametrize("change", ["plan", "size", "link", "directory"])
def test_resume_refuses_foreign_files(tmp_path, change):
    tensors = tiny_tensors()
    ShardWriter(tmp_path / "m", plan_for(tensors))
    path = tmp_path / "m" / "model.safetensors"
    plan = plan_for(tensors)
    if change == "plan":
        plan = plan_for(tensors | {"more": np.zeros(3)})
    elif change == "size":
        os.truncate(path, path.stat().st_size - 1)
    elif change == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        path.mkdir()
    with pytest.raises(RefusedError, match=r"begun for other tensors|not a regular file"):
        ShardWriter(tmp_path / "m", plan, resume=True)


@pytest.mark.parametrize("resume", [True, False])
def test_shards_of_another_plan_are_not_left_among_ours(tmp_path, resume):
    tensors = tiny_tensors()
    ShardWriter(tmp_path, plan_for(tensors, 1))
    with pytest.raises(RefusedError, match="belongs to no shard of this output") as raised:
        ShardWriter(tmp_path, plan_for(tensors), resume=resume)
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    ("array", "start"),
    [
        (np.zeros((4, 3)), 0),
        (np.zeros(13, np.float32), 0),
        (np.zeros(2, np.float32), 11),
        (np.zeros(1, np.float32), -1),
    ],
    ids=["dtype", "too long", "past the end", "before the start"],
)
def test_wrong_arrays_are_rejected(tmp_path, array, start):
    writer = ShardWriter(tmp_path, plan_for(tiny_tensors()))
    with pytest.raises(ValueError):
        writer.write("encoder.weight", array, start)
    with pytest.raises(ValueError):
        writer.read_back("encoder.weight", array, start)
    with pytest.raises(KeyError):
        writer.write("nothing", np.zeros(1, np.float32))


def test_short_writes_are_continued(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, position: pwrite(fd, view[:7], position))
    array = make_tensor(F32, (9, 11))
    ShardWriter(tmp_path, plan_for({"a": array})).write("a", array)
    write_safetensors(tmp_path / "b.safetensors", {"a": array})
    assert same_bytes(open_checkpoint(tmp_path / "model.safetensors").read("a"), array)
    assert same_bytes(open_checkpoint(tmp_path / "b.safetensors").read("a"), array)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    array = make_tensor(F32, (9, 11))
    write_safetensors(tmp_path / "a.safetensors", {"a": array})
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, position: preadv(fd, [views[0][:7]], position))
    assert same_bytes(open_checkpoint(tmp_path / "a.safetensors").read("a"), array)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_at_once_and_leaves_nothing(tmp_path, monkeypatch, code):
    calls = []

    def fallocate(descriptor, offset, length):
        calls.append(length)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    with pytest.raises(RefusedError, match=r"has no room for the .* of the output"):
        ShardWriter(tmp_path / "m", plan_for(tiny_tensors(), 1))
    assert len(calls) == 2 and list((tmp_path / "m").iterdir()) == []


def test_a_disk_that_fills_up_while_writing_keeps_what_was_written(tmp_path, monkeypatch):
    tensors = tiny_tensors()
    plan = plan_for(tensors)
    writer = ShardWriter(tmp_path, plan)
    writer.write("encoder.bias", tensors["encoder.bias"])
    pwrite = os.pwrite

    def fail(descriptor, view, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=r"no room left while writing tensor 'norm.weight'.*resume") as raised:
        writer.write("norm.weight", tensors["norm.weight"])
    assert raised.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "pwrite", pwrite)
    resumed = ShardWriter(tmp_path, plan, resume=True)
    out = np.empty(4, np.float32)
    resumed.read_back("encoder.bias", out)
    assert same_bytes(out, tensors["encoder.bias"])


LIMITED = """
import resource, signal, sys
import numpy as np
from rgsp_jax.checkpoint import ShardWriter, TensorSpec, plan_shards, write_safetensors
from rgsp_jax.errors import RefusedError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ShardWriter(sys.argv[1], plan_shards([TensorSpec("a", (100_000,), np.dtype(np.float32))], 1 << 40))
except RefusedError as error:
    print(error)
try:
    write_safetensors(sys.argv[1] + "/b.safetensors", {"a": np.zeros(100_000)})
except OSError as error:
    print(error.strerror)
"""


def test_a_real_limit_on_file_size_is_refused(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, tmp_path / "m"], cwd=tmp_path, capture_output=True, text=True)
    assert "has no room for the 400 kB of the output" in done.stdout, done.stderr
    assert "File too large" in done.stdout
    assert list((tmp_path / "m").iterdir()) == []


def test_a_directory_without_permission_is_refused(tmp_path, monkeypatch):
    def deny(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "posix_fallocate", deny)
    with pytest.raises(RefusedError, match="cannot be written: Permission denied"):
        ShardWriter(tmp_path / "m", plan_for(tiny_tensors()))


@pytest.mark.parametrize(
    ("specs", "limit", "expected"),
    [
        ([], 1, "no tensor to write"),
        ([TensorSpec("a", (2,), F32)] * 2, 1, "'a' occurs twice"),
        ([TensorSpec("a", (2,), F32)], 0, "give at least 1"),
        ([TensorSpec("__metadata__", (2,), F32)], 1, "cannot hold the tensor name '__metadata__'"),
        ([TensorSpec("\ud800", (2,), F32)], 1, "not valid Unicode"),
        ([TensorSpec("a", (2,), np.dtype(np.complex64))], 1, "is complex"),
        ([TensorSpec("a", (2,), np.dtype(ml_dtypes.float8_e4m3fn))], 1, "is quantised"),
    ],
)
def test_impossible_plans_are_refused(specs, limit, expected):
    with pytest.raises(RefusedError, match=expected):
        plan_shards(specs, limit)


def test_shards_hold_at_most_the_limit_and_large_tensors_lie_alone():
    sizes = [3, 3, 3, 20, 1, 1, 8, 2]
    specs = [TensorSpec(f"t{i}", (size,), np.dtype(np.int8)) for i, size in enumerate(sizes)]
    plan = plan_shards(specs, 10)
    assert [shard.names for shard in plan.shards] == [("t0", "t1", "t2"), ("t3",), ("t4", "t5", "t6"), ("t7",)]
    assert plan.shards[0].file_name == "model-00001-of-00004.safetensors"
    assert [shard.size - len(shard.header) for shard in plan.shards] == [9, 20, 10, 2]
    assert plan.file_bytes == sum(shard.size for shard in plan.shards)


def test_write_safetensors_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(3, np.float32)})
    before = path.read_bytes()

    def fail(descriptor, view, position):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(OSError):
            write_safetensors(path, {"a": np.ones(3, np.float32)})
    assert contents(tmp_path) == {"a.safetensors": before}
    write_safetensors(path, {"a": np.ones(3, np.float32)})
    assert open_checkpoint(path).read("a").tolist() == [1, 1, 1]
