"""Bad weights, full disks, lost files, failing memory: one clear sentence each, and nothing lost."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.toy_models import dtype_of, read_model, toy_family, tree_bytes, write_family, write_model
from rgsp_jax.checkpoint import write_safetensors
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, overview
from rgsp_jax.pipeline import merge as merging

pytestmark = pytest.mark.usefixtures("plain_report")


@pytest.fixture
def models(tmp_path):
    return write_family(tmp_path, toy_family(3))


def refused(config, out, **options):
    """The sentences of a refusal."""
    with pytest.raises(RefusedError) as refusal:
        merge_checkpoints(config, out, **options)
    assert all(problem and "\n" not in problem for problem in refusal.value.problems)
    return list(refusal.value.problems)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Values that are not finite


def test_every_tensor_that_is_not_finite_is_named_and_nothing_is_left(tmp_path, toy_methods):
    family = toy_family(3)
    family[1]["encoder.layer.0.attention.self.query.weight"][3, 2] = np.nan
    family[2]["encoder.layer.1.intermediate.dense.bias"][-1] = np.inf
    family[0]["embeddings.word_embeddings.weight"][-1, -1] = -np.inf
    family[2]["embeddings.word_embeddings.weight"][0, 0] = np.nan
    family[1]["moe.experts.down_proj"][2, 0, 0] = np.nan
    models = write_family(tmp_path, family)
    problems = refused(MergeConfig(models=models, method="tilt"), tmp_path / "out")
    expected = {
        (models[1], "encoder.layer.0.attention.self.query.weight"),
        (models[2], "encoder.layer.1.intermediate.dense.bias"),
        (models[0], "embeddings.word_embeddings.weight"),
        (models[2], "embeddings.word_embeddings.weight"),
        (models[1], "moe.experts.down_proj"),
    }
    assert {p for p in expected if any(s.startswith(f"{p[0]}: tensor {p[1]!r} ") for s in problems)} == expected
    assert len(problems) == len(expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_infinities_of_every_dtype_are_found(tmp_path, dtype):
    family = toy_family(2, dtypes=[dtype])
    family[1]["logit_scale"] = np.asarray(np.inf).astype(dtype_of(dtype))
    models = write_family(tmp_path, family)
    assert refused(MergeConfig(models=models, method="average"), tmp_path / "out") == [
        f"{models[1]}: tensor 'logit_scale' holds values that are not finite: repair or exclude it"
    ]


def test_what_is_excluded_passes_as_it_is(tmp_path):
    family = toy_family(2)
    family[0]["logit_scale"] = np.asarray(np.nan, np.float32)
    config = MergeConfig(models=write_family(tmp_path, family), method="average", exclude=("logit_scale",))
    assert np.isnan(read_model(merge_checkpoints(config, tmp_path / "out").out)["logit_scale"])


@pytest.mark.parametrize("exclude", [(), ("*bias",)])
def test_a_result_past_float16_is_refused(tmp_path, exclude):
    """Merged or copied: what the cast makes infinite is not let through."""
    family = toy_family(2)
    for model in family:
        model["encoder.layer.0.intermediate.dense.bias"][2] = 7e4
    config = MergeConfig(models=write_family(tmp_path, family), method="average", dtype="float16", exclude=exclude)
    problems = refused(config, tmp_path / "out")
    assert len(problems) == 1
    assert "'encoder.layer.0.intermediate.dense.bias' is not finite in float16" in problems[0]
    assert "--dtype bfloat16" in problems[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    fits = merge_checkpoints(config.model_copy(update={"dtype": "bfloat16"}), tmp_path / "out").out
    assert np.isfinite(read_model(fits)["encoder.layer.0.intermediate.dense.bias"].astype(np.float32)).all()


def test_the_scale_is_named_where_there_is_one(tmp_path, toy_methods):
    family = [{"a.weight": np.full((4, 4), 3e4 * k, np.float16)} for k in (1, -1)]
    config = MergeConfig(models=write_family(tmp_path, family), method="tilt", hyperparameters={"strength": 9.0})
    assert "--scale" not in refused(config, tmp_path / "out")[0]


# A disk too full


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch, models):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    problems = refused(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert len(problems) == 1
    assert "1 MB free" in problems[0] and "are needed" in problems[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_no_room_for_the_files_is_told_and_leaves_nothing(tmp_path, monkeypatch, models):
    monkeypatch.setattr(os, "posix_fallocate", full)
    problems = refused(MergeConfig(models=models, method="average", max_shard_size=3000), tmp_path / "out")
    assert len(problems) == 1 and "has no room" in problems[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def fail_after(monkeypatch, owner, name, count, error=full):
    """Let a function fail from its call number `count` on."""
    original, calls = getattr(owner, name), []

    def limited(*args, **kwargs):
        calls.append(args)
        return error() if len(calls) > count else original(*args, **kwargs)

    monkeypatch.setattr(owner, name, limited)


@pytest.mark.parametrize(
    ("owner", "name", "count"),
    [(os, "pwrite", 6), (os, "write", 3), (os, "fsync", 0), (shutil, "copyfile", 1), (Path, "write_text", 2)],
    ids=["weights", "journal", "flush", "companions", "report"],
)
def test_a_disk_that_fills_up_keeps_what_is_done(tmp_path, monkeypatch, models, small_items, owner, name, count):
    config = MergeConfig(models=models, method="average")
    (tmp_path / "first").mkdir()
    with monkeypatch.context() as patch:
        fail_after(patch, owner, name, count)
        problems = refused(config, tmp_path / "first/out")
    assert len(problems) == 1
    assert "room left" in problems[0] or "No space left" in problems[0]
    assert str(tmp_path / "first/out.incomplete") in problems[0] and "--resume" in problems[0]
    assert not (tmp_path / "first/out").exists()
    resumed = merge_checkpoints(config, tmp_path / "first/out", resume=True)
    assert resumed.resumed_items > 0
    (tmp_path / "second").mkdir()
    assert tree_bytes(resumed.out) == tree_bytes(merge_checkpoints(config, tmp_path / "second/out").out)
    assert [p.name for p in (tmp_path / "first").iterdir()] == ["out"]


# Files that are not what they were


def test_a_truncated_shard_is_refused_at_once(tmp_path, models):
    paths = [tmp_path / k / "model.safetensors" for k in "bc"]
    for path in paths:
        os.truncate(path, path.stat().st_size - 100)
    problems = refused(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert len(problems) == 2
    assert all(str(path) in problem for path, problem in zip(paths, problems, strict=True))
    assert not (tmp_path / "out.incomplete").exists()


@pytest.mark.parametrize("harm", ["truncated", "rewritten"])
def test_a_model_that_changes_under_the_merge_is_noticed(tmp_path, models, small_items, harm):
    path = tmp_path / "b/model.safetensors"

    def damage(stage, *_):
        if stage == "merge" and path.stat().st_size % 2 == 0:
            os.truncate(path, path.stat().st_size - 1001) if harm == "truncated" else path.write_bytes(bytes(1001))

    os.truncate(path, path.stat().st_size)
    assert path.stat().st_size % 2 == 0
    config = MergeConfig(models=models, method="average")
    problems = refused(config, tmp_path / "out", progress=damage)
    assert len(problems) == 1
    assert f"{path} was changed while it was being read" in problems[0]
    assert not (tmp_path / "out").exists()


def test_a_model_removed_under_the_merge_is_named(tmp_path, models, small_items):
    path = tmp_path / "c/model.safetensors"
    problems = refused(
        MergeConfig(models=models, method="average"), tmp_path / "out", progress=lambda *_: path.unlink(missing_ok=True)
    )
    assert len(problems) == 1
    assert "No such file" in problems[0] and str(path) in problems[0]
    assert not (tmp_path / "out").exists()


def test_a_companion_that_vanishes_is_named(tmp_path, models):
    config = MergeConfig(models=models, method="average")
    path = tmp_path / "a/tokenizer.json"
    problems = refused(config, tmp_path / "out", progress=lambda *_: path.unlink(missing_ok=True))
    assert problems == [f"{path} vanished while the model was being read"]
    path.write_text("{}")
    merge_checkpoints(config, tmp_path / "out", resume=True)


# Permissions (patched, as tests may run as root)


def deny(monkeypatch, path, flag):
    """Make opening one file fail for want of permission."""
    original = os.open

    def guarded(name, flags, *args, **kwargs):
        if os.fspath(name) == str(path) and (flags & flag) == flag:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", guarded)


def test_a_model_that_may_not_be_read_is_named(tmp_path, monkeypatch, models):
    path = tmp_path / "b/model.safetensors"
    deny(monkeypatch, path, os.O_RDONLY)
    problems = refused(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert problems == [f"{path} cannot be opened: Permission denied"]
    assert not (tmp_path / "out.incomplete").exists()


def test_an_output_that_may_not_be_written_is_named(tmp_path, monkeypatch, models):
    config = MergeConfig(models=models, method="average")
    with monkeypatch.context() as patch:
        deny(patch, tmp_path / "out.incomplete/model/model.safetensors", os.O_WRONLY)
        problems = refused(config, tmp_path / "out")
    assert len(problems) == 1 and "Permission denied" in problems[0] and "out.incomplete" in problems[0]
    merge_checkpoints(config, tmp_path / "out", resume=True)


def test_a_parent_that_may_not_be_written_is_named(tmp_path, monkeypatch, models):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    problems = refused(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert problems == [f"the output's parent {tmp_path} is not writable for you"]


def test_a_workshop_that_cannot_be_made_is_named(tmp_path, models):
    (tmp_path / "out.incomplete").write_text("a file in the way")
    config = MergeConfig(models=models, method="average")
    for resume in (False, True):
        problems = refused(config, tmp_path / "out", resume=resume)
        assert len(problems) == 1 and "out.incomplete" in problems[0]
    assert (tmp_path / "out.incomplete").read_text() == "a file in the way"


@pytest.mark.parametrize("out", ["", ".", "..", "/"])
def test_an_output_without_a_name_is_refused(tmp_path, monkeypatch, models, out):
    monkeypatch.chdir(tmp_path)
    assert refused(MergeConfig(models=models, method="average"), out)


# The audit


def test_a_bit_that_flips_after_writing_is_caught_and_mended(tmp_path, monkeypatch, models, small_items):
    config = MergeConfig(models=models, method="average")
    audit = merging.audit

    def flip(directory, *others):
        data = bytearray((directory / "model.safetensors").read_bytes())
        data[-3] ^= 16
        (directory / "model.safetensors").write_bytes(data)
        return audit(directory, *others)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "audit", flip)
        problems = refused(config, tmp_path / "out")
    last = list(read_model(tmp_path / "a"))[-2]
    assert len(problems) == 1 and problems[0].startswith("audit: ") and repr(last) in problems[0]
    assert not (tmp_path / "out").exists()
    resumed = merge_checkpoints(config, tmp_path / "out", resume=True)
    assert (
        tree_bytes(merge_checkpoints(config, tmp_path / "other").out)["model.safetensors"]
        == (resumed.out / "model.safetensors").read_bytes()
    )


def test_a_weight_file_that_is_not_the_plan_is_caught(tmp_path, monkeypatch, models):
    audit = merging.audit

    def replace(directory, *others):
        tensors = read_model(directory / "model.safetensors")
        tensors["surplus.weight"] = tensors.pop("logit_scale")
        tensors["stem.conv.weight"] = tensors["stem.conv.weight"].reshape(6, 18)
        write_safetensors(directory / "model.safetensors", tensors)
        return audit(directory, *others)

    monkeypatch.setattr(merging, "audit", replace)
    text = "\n".join(refused(MergeConfig(models=models, method="average"), tmp_path / "out"))
    for expected in (
        "'logit_scale' is missing",
        "'stem.conv.weight' is missing or differs",
        "'surplus.weight' was not",
    ):
        assert expected in text
    assert not (tmp_path / "out").exists()


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path, monkeypatch, models):
    config = MergeConfig(models=models, method="average")

    def intrude(stage, *_):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/mine.txt").write_text("mine")

    problems = refused(config, tmp_path / "out", progress=intrude)
    assert len(problems) == 1 and f"{tmp_path / 'out'} appeared" in problems[0]
    assert tree_bytes(tmp_path / "out") == {"mine.txt": b"mine"}
    shutil.rmtree(tmp_path / "out")
    assert merge_checkpoints(config, tmp_path / "out", resume=True).out.exists()


def test_a_report_that_fails_loses_nothing(tmp_path, monkeypatch, models):
    """A fault of our own: it shows as what it is, and the weights are not computed again."""
    config = MergeConfig(models=models, method="average")
    with monkeypatch.context() as patch:
        patch.setattr(overview, "model_card", lambda summary: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge_checkpoints(config, tmp_path / "out")
    result = merge_checkpoints(config, tmp_path / "out", resume=True)
    assert result.resumed_items > 0


def test_models_that_do_not_fit_are_all_named(tmp_path):
    family = toy_family(3)
    del family[1]["logit_scale"]
    family[1]["stem.conv.weight"] = family[1]["stem.conv.weight"][:5]
    family[2]["extra.weight"] = np.ones((2, 2), np.float32)
    models = [write_model(tmp_path / k, model) for k, model in zip("abc", family, strict=True)]
    models = [*map(str, models), str(tmp_path / "d")]
    text = "\n".join(refused(MergeConfig(models=models, method="average"), tmp_path / "out"))
    assert "d does not exist" in text
    text = "\n".join(refused(MergeConfig(models=models[:3], method="average"), tmp_path / "nowhere/out"))
    for expected in (
        "b lacks tensor 'logit_scale'",
        "'stem.conv.weight' has shape [5, 2, 3, 3]",
        "'extra.weight'",
        "nowhere",
    ):
        assert expected in text
