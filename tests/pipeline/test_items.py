"""The result does not depend on how the work is cut up, on when or where it runs, or on who ran before."""

import subprocess
import sys

import pytest

from pipeline.toy_models import dtype_of, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.pipeline import MergeConfig, Override, merge_checkpoints, plan_merge

MIXED = dict(
    method="tilt",
    overrides=(
        Override(pattern="encoder.layer.?.output.dense*", method="jitter"),
        Override(pattern="*bias", method="jitter_elements"),
    ),
    exclude=("*LayerNorm*", "*intermediate*weight", "stem*"),
    dtype="bfloat16",
)
"""Every action: matrices, elements and copies, with keys and a cast."""


def merge_into(directory, models, **settings):
    """A directory of the same name in a place of its own."""
    directory.mkdir()
    return tree_bytes(merge_checkpoints(MergeConfig(models=models, **settings), directory / "out").out)


@pytest.mark.usefixtures("toy_methods")
def test_the_whole_directory_is_the_same_whatever_the_items(tmp_path, monkeypatch):
    models = write_family(tmp_path, toy_family(3, dtypes=["float32", "bfloat16"]))
    expected = merge_into(tmp_path / "large", models, **MIXED)
    counts = set()
    for memory, elements in ((700_000, 1 << 22), (1_000_000_000, 160), (1_300_000, 40_000)):
        monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", elements)
        specs = [open_checkpoint(path).specs for path in models]
        counts.add(len(plan_merge(MergeConfig(models=models, memory=memory, **MIXED), specs).items))
        found = merge_into(tmp_path / f"{memory}-{elements}", models, memory=memory, **MIXED)
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []
    assert len(counts) >= 3


@pytest.mark.usefixtures("toy_methods")
def test_twice_is_the_same_and_the_seed_is_not(tmp_path):
    models = write_family(tmp_path, toy_family(2))
    settings = dict(method="jitter", include=("*attention*",))
    first = merge_into(tmp_path / "first", models, seed=7, **settings)
    assert merge_into(tmp_path / "second", models, seed=7, **settings) == first
    other = merge_into(tmp_path / "third", models, seed=8, **settings)
    assert other["model.safetensors"] != first["model.safetensors"]


def test_two_processes_write_the_same_directory(tmp_path):
    """Plots, hashes of strings and the order of sets differ between processes; the output must not."""
    models = write_family(tmp_path, toy_family(3))
    code = "from rgsp_jax.cli import main; main()"
    processes = []
    for name, seed in (("one", "1"), ("two", "2")):
        (tmp_path / name).mkdir()
        command = [
            sys.executable,
            "-c",
            code,
            "merge",
            *models,
            "--method",
            "average",
            "--out",
            str(tmp_path / name / "out"),
        ]
        environment = {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, b"")
    one, two = (tree_bytes(tmp_path / name / "out") for name in ("one", "two"))
    assert "report.html" in one
    assert [name for name in one if one[name] != two.get(name)] == []
    assert one.keys() == two.keys()


def test_the_output_keeps_the_dtypes_of_the_first_model(tmp_path):
    family = toy_family(2, dtypes=["bfloat16", "float32"])
    family[0]["logit_scale"] = family[0]["logit_scale"].astype("float32")
    models = write_family(tmp_path, family)
    with open_checkpoint(merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out").out) as out:
        assert {name: spec.dtype for name, spec in out.specs.items()} == {n: x.dtype for n, x in family[0].items()}
        assert out.specs["stem.conv.weight"].dtype == dtype_of("bfloat16")
