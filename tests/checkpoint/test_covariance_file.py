"""Covariance files: what is written comes back, what is not true is refused by name."""

import json

import numpy as np
import pytest

from checkpoint.builders import write_model
from rgsp_jax.checkpoint import (
    DataRecord,
    Site,
    digest,
    find_foreign,
    open_checkpoint,
    open_covariances,
    write_covariances,
    write_safetensors,
)
from rgsp_jax.checkpoint.covariance_file import FORMAT, VERSION
from rgsp_jax.errors import RefusedError

HASH = "0" * 32
DATA = (DataRecord("train.jsonl", HASH, 90, 10),)


def make_parts(seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((20, 4)).astype(np.float32)
    sites = [
        Site("layers.0", {"layers.0.q.weight": HASH, "layers.0.k.weight": "1" * 32}, "full", 4, 20, 0.01),
        Site("layers.1", {"layers.1.weight": HASH}, "sketch", 6, 20),
        Site("tokens", {"tokens.weight": HASH}, "counts", 5, 7),
    ]
    tensors = {
        "layers.0.covariance": rows.T @ rows / 20,
        "layers.0.mean": rows.mean(0),
        "layers.0.held_back": rows[:3],
        "layers.1.sketch": rng.standard_normal((2, 6)).astype(np.float32),
        "layers.1.trace": np.asarray(3.5, np.float32),
        "layers.1.mean": np.zeros(6, np.float32),
        "layers.1.held_back": np.zeros((0, 6), np.float32),
        "tokens.counts": np.arange(5),
        "tokens.held_back_counts": np.ones(5, np.int64),
    }
    return sites, tensors


def metadata_of(sites):
    entries = [{**vars(site), "weights": dict(site.weights)} for site in sites]
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": "toy",
        "data": json.dumps([vars(record) for record in DATA]),
        "sites": json.dumps(entries),
    }


def test_what_is_written_comes_back(tmp_path):
    sites, tensors = make_parts()
    write_covariances(tmp_path / "c.safetensors", "toy", DATA, sites, tensors, {"head.weight": "never called"})
    with open_covariances(tmp_path / "c.safetensors") as covariances:
        assert list(covariances.sites.values()) == sites
        assert covariances.data == DATA and covariances.model == "toy"
        assert covariances.site_of["layers.0.k.weight"] is covariances.sites["layers.0"]
        assert covariances.not_covered == {"head.weight": "never called"}
        assert covariances.shape("layers.1", "held_back") == (0, 6)
        for name, array in tensors.items():
            found = covariances.read(*name.rsplit(".", 1))
            assert found.dtype == array.dtype and np.array_equal(found, array)
        with pytest.raises(KeyError, match="no 'covariance'"):
            covariances.read("layers.1", "covariance")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_other_files_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="does not exist"):
        open_covariances(tmp_path / "none.safetensors")
    write_safetensors(tmp_path / "model.safetensors", {"a": np.zeros(2)})
    with pytest.raises(RefusedError, match="not a file of `rgsp covariances`"):
        open_covariances(tmp_path / "model.safetensors")
    write_safetensors(tmp_path / "new.safetensors", {"a": np.zeros(2)}, {"format": FORMAT, "version": "9"})
    with pytest.raises(RefusedError, match="version '9'"):
        open_covariances(tmp_path / "new.safetensors")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("name", "", "no valid name"),
        ("weights", {}, "no valid weights"),
        ("weights", {"w": "short"}, "no valid weights"),
        ("kind", "dense", "no valid kind"),
        ("width", 4.0, "no valid width"),
        ("width", 5, "its site says float32 .any, 5."),
        ("rows", 0, "no valid rows"),
        ("converged", "yes", "no valid converged"),
        ("surprise", 1, "no valid set of fields"),
    ],
)
def test_false_claims_are_refused(tmp_path, field, value, message):
    sites, tensors = make_parts()
    metadata = metadata_of(sites)
    entries = json.loads(metadata["sites"])
    entries[0][field] = value
    metadata["sites"] = json.dumps(entries)
    write_safetensors(tmp_path / "c.safetensors", tensors, metadata)
    with pytest.raises(RefusedError, match=message):
        open_covariances(tmp_path / "c.safetensors")


def test_every_missing_foreign_and_doubled_name_is_listed(tmp_path):
    sites, tensors = make_parts()
    del tensors["layers.0.mean"]
    tensors["stray"] = np.zeros(3, np.float32)
    write_safetensors(tmp_path / "c.safetensors", tensors, metadata_of(sites))
    with pytest.raises(RefusedError) as refusal:
        open_covariances(tmp_path / "c.safetensors")
    assert len(refusal.value.problems) == 2
    assert "'layers.0.mean' of a full site is absent" in str(refusal.value)
    assert "'stray' belongs to no site" in str(refusal.value)
    write_safetensors(tmp_path / "c.safetensors", tensors, metadata_of([*sites, sites[2]]))
    with pytest.raises(RefusedError, match=r"the weight 'tokens\.weight' is listed twice"):
        open_covariances(tmp_path / "c.safetensors")


@pytest.mark.parametrize("key, value", [("sites", "[]"), ("sites", "{"), ("data", '[{"name": 3}]'), ("data", "[1]")])
def test_unreadable_metadata_is_refused(tmp_path, key, value):
    sites, tensors = make_parts()
    write_safetensors(tmp_path / "c.safetensors", tensors, {**metadata_of(sites), key: value})
    with pytest.raises(RefusedError, match=f"'{key}'"):
        open_covariances(tmp_path / "c.safetensors")


def test_values_that_are_not_finite_are_refused(tmp_path):
    sites, tensors = make_parts()
    tensors["layers.0.covariance"][1, 2] = np.nan
    write_covariances(tmp_path / "c.safetensors", "toy", DATA, sites, tensors)
    with open_covariances(tmp_path / "c.safetensors") as covariances, pytest.raises(RefusedError, match="not finite"):
        covariances.read("layers.0", "covariance")


def test_the_writer_checks_its_own_claims(tmp_path):
    sites, tensors = make_parts()
    tensors["layers.0.covariance"] = tensors["layers.0.covariance"].astype(np.float64)
    with pytest.raises(ValueError, match="float64"):
        write_covariances(tmp_path / "c.safetensors", "toy", DATA, sites, tensors)
    assert not list(tmp_path.iterdir())


def test_covariances_of_another_model_are_told(tmp_path):
    model = open_checkpoint(write_model(tmp_path / "model"))
    site = Site("encoder", {"encoder.weight": digest(model.read("encoder.weight"))}, "counts", 3, 1)
    tensors = {"encoder.counts": np.ones(3, np.int64), "encoder.held_back_counts": np.zeros(3, np.int64)}
    write_covariances(tmp_path / "own.safetensors", "m", DATA, [site], tensors)
    write_covariances(
        tmp_path / "other.safetensors",
        "m",
        DATA,
        [Site("encoder", {"encoder.weight": HASH, "absent": HASH}, "counts", 3, 1)],
        tensors,
    )
    with open_covariances(tmp_path / "own.safetensors") as covariances:
        assert find_foreign(covariances, model) == []
    with open_covariances(tmp_path / "other.safetensors") as covariances:
        problems = find_foreign(covariances, model)
    assert len(problems) == 2 and "other values" in problems[0] and "does not have" in problems[1]
