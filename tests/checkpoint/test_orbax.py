"""Orbax checkpoints, written by its current and its old interface; read per array and written back."""

import json
import logging
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from orbax import checkpoint as orbax_v0
from orbax.checkpoint import v1 as orbax

from checkpoint.builders import CONFIG, make_tensor, same_bytes
from rgsp_jax.checkpoint import ShardWriter, TensorSpec, convert_to_orbax, find_problems, open_checkpoint, plan_shards
from rgsp_jax.checkpoint.orbax_writer import divide_tree
from rgsp_jax.errors import RefusedError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
logging.getLogger("absl").setLevel(logging.ERROR)


def make_tree():
    return {
        "params": {
            "dense": {"kernel": make_tensor(np.dtype(np.float32), (4, 6)), "bias": make_tensor(BFLOAT16, (6,))},
            "blocks": [{"w": make_tensor(np.dtype(np.float16), (3, 3), i)} for i in range(3)],
            "jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
            "double": jnp.arange(4, dtype=jnp.float64),
            "counts": np.arange(3, dtype=np.int64),
            "flag": np.array([True, False]),
            "scalar": np.array(2.5, np.float32),
        },
        "step": 7,
        "name": "toy",
        "nothing": {},
    }


EXPECTED = {
    *("params/dense/kernel", "params/dense/bias", "params/jax", "params/double", "params/counts", "params/flag"),
    *("params/scalar", "params/blocks/0/w", "params/blocks/1/w", "params/blocks/2/w"),
}


def save_v1(path, tree):
    orbax.save(path, tree, custom_metadata={"manifest": [1, 2]})


def save_v0(path, tree):
    orbax_v0.PyTreeCheckpointer().save(path, tree)


def save_v0_standard(path, tree):
    with orbax_v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {key: value for key, value in tree.items() if key != "name"})


def flatten(tree, prefix=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if isinstance(value, (dict, list)):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("save", [save_v1, save_v0, save_v0_standard])
def test_arrays_round_trip(tmp_path, save):
    tree = make_tree()
    save(tmp_path / "m", tree)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.format == "orbax"
    assert set(checkpoint.specs) == EXPECTED
    values = dict(flatten(tree))
    for name in EXPECTED:
        assert same_bytes(checkpoint.read(name), np.asarray(values[name]))
    assert set(checkpoint.metadata["not_tensors"]) >= {"step", "nothing"}
    assert all(path.is_file() for path in checkpoint.weight_files)
    assert find_problems([checkpoint, checkpoint]) == []


def test_slices(tmp_path):
    array = make_tensor(BFLOAT16, (10, 7))
    orbax.save(tmp_path / "m", {"a": array, "b": array[:2]})
    checkpoint = open_checkpoint(tmp_path / "m")
    for begin, end in [(0, 70), (0, 10), (10, 33), (33, 70), (5, 6), (70, 70)]:
        out = np.empty(end - begin, BFLOAT16)
        checkpoint.read_into("a", out, begin)
        assert same_bytes(out, array.reshape(-1)[begin:end])
        assert same_bytes(checkpoint.read("b"), array[:2])


def test_equal_shapes_are_loaded_together_and_memory_is_bounded(tmp_path, monkeypatch):
    tree = {f"layer{i}": {"w": np.full((8, 8), i, np.float32), "b": np.full(8, i, np.float32)} for i in range(20)}
    orbax.save(tmp_path / "m", tree)
    calls, load = [], orbax.load

    def counting(*arguments):
        calls.append(arguments)
        return load(*arguments)

    monkeypatch.setattr(orbax, "load", counting)
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name in checkpoint.specs:
            assert (checkpoint.read(name) == int(name.split("/")[0][5:])).all()
        assert len(calls) == 2 and checkpoint._kept == {}
    monkeypatch.setattr("rgsp_jax.checkpoint.orbax_source.BATCH_BYTES", 600)
    calls.clear()
    with open_checkpoint(tmp_path / "m") as checkpoint:
        for name in reversed(checkpoint.specs):
            assert (checkpoint.read(name) == int(name.split("/")[0][5:])).all()
            assert sum(array.nbytes for array in checkpoint._kept.values()) <= 1200
        assert len(calls) > 20


def test_arrays_sharded_over_devices_are_read_whole(tmp_path):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    array = make_tensor(np.dtype(np.float32), (16, 4))
    orbax.save(tmp_path / "m", {"a": jax.device_put(array, sharding)})
    assert same_bytes(open_checkpoint(tmp_path / "m").read("a"), array)


def test_optimiser_state_is_left_out(tmp_path):
    tree = {"params": {"w": np.ones(3)}, "opt_state": [{"mu": np.ones(3)}], "step": 1}
    orbax.save(tmp_path / "m", tree)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert list(checkpoint.specs) == ["params/w"]
    assert "opt_state/0/mu" in checkpoint.metadata["not_tensors"]


def test_colliding_names_are_refused(tmp_path):
    orbax.save(tmp_path / "m", {"a/b": np.ones(2), "a": {"b": np.ones(2)}})
    with pytest.raises(RefusedError, match="two arrays are named 'a/b'"):
        open_checkpoint(tmp_path / "m")


def test_folder_of_steps_is_refused_with_a_hint(tmp_path):
    with orbax_v0.CheckpointManager(tmp_path / "m") as manager:
        manager.save(12, args=orbax_v0.args.StandardSave({"a": np.ones(3)}))
        manager.wait_until_finished()
    with pytest.raises(RefusedError, match=r"its folder.* 12 hold weights"):
        open_checkpoint(tmp_path / "m")
    assert open_checkpoint(tmp_path / "m" / "12").read("a").tolist() == [1, 1, 1]


def test_files_beside_are_companions_and_do_no_harm(tmp_path):
    orbax.save(tmp_path / "m", {"a": np.ones(3)})
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.config == CONFIG
    assert [path.name for path in checkpoint.companions] == ["config.json", "tokenizer.json"]
    assert checkpoint.read("a").tolist() == [1, 1, 1]


def test_damaged_arrays_are_refused(tmp_path):
    orbax.save(tmp_path / "m", {"a": np.arange(3000.0)})
    checkpoint = open_checkpoint(tmp_path / "m")
    for path in checkpoint.weight_files:
        if path.parent.name == "d":
            path.write_bytes(b"")
    with pytest.raises(RefusedError, match="'a' cannot be read"):
        checkpoint.read("a")


def write_result(directory, tensors, **shards):
    specs = [TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()]
    writer = ShardWriter(directory, plan_shards(specs, **({"max_shard_size": 100} | shards)))
    for name, array in tensors.items():
        writer.write(name, array)
    writer.finish()


@pytest.mark.parametrize("save", [save_v1, save_v0])
@pytest.mark.parametrize("piece_bytes", [1, 60, 1 << 20])
def test_results_have_the_tree_of_the_parent(tmp_path, save, piece_bytes):
    save(tmp_path / "parent", make_tree())
    parent = open_checkpoint(tmp_path / "parent")
    merged = {
        name: np.asarray(parent.read(name)[::-1] if spec.shape else parent.read(name))
        for name, spec in parent.specs.items()
    }
    write_result(tmp_path / "safetensors", merged)
    convert_to_orbax(tmp_path / "safetensors", parent, tmp_path / "out", piece_bytes=piece_bytes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parent", "safetensors"]
    result = open_checkpoint(tmp_path / "out")
    assert set(result.specs) == set(parent.specs)
    for name, array in merged.items():
        assert same_bytes(result.read(name), np.asarray(array, order="C"))
    loaded, original = orbax.load(tmp_path / "out"), orbax.load(tmp_path / "parent")
    assert jax.tree.structure(loaded) == jax.tree.structure(original)
    assert jax.tree.map(type, loaded) == jax.tree.map(type, original)
    assert (loaded["step"], loaded["name"]) == (7, "toy")
    assert result.metadata["custom_metadata"] == parent.metadata["custom_metadata"]


def test_the_parents_abstract_state_loads_the_result(tmp_path):
    tree = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": {"c": jnp.zeros(3)}}
    orbax.save(tmp_path / "parent", tree)
    write_result(tmp_path / "safetensors", {"a": np.zeros((3, 4), BFLOAT16), "b/c": np.ones(3)})
    convert_to_orbax(tmp_path / "safetensors", open_checkpoint(tmp_path / "parent"), tmp_path / "out")
    loaded = orbax.load(tmp_path / "out", jax.eval_shape(lambda: tree))
    assert loaded["a"].dtype == jnp.bfloat16 and not loaded["a"].any()
    assert loaded["b"]["c"].tolist() == [1, 1, 1]


def test_results_leave_training_state_out_and_may_change_dtype(tmp_path):
    orbax.save(tmp_path / "parent", {"params": {"w": np.ones(3, np.float32)}, "opt_state": {"mu": np.ones(3)}})
    write_result(tmp_path / "safetensors", {"params/w": np.ones(3, BFLOAT16)})
    convert_to_orbax(tmp_path / "safetensors", open_checkpoint(tmp_path / "parent"), tmp_path / "out")
    loaded = orbax.load(tmp_path / "out")
    assert list(loaded) == ["params"] and loaded["params"]["w"].dtype == BFLOAT16


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": np.ones(2), "c": np.ones(1)}, ["lacks 'b'", "has no array 'c'"]),
        ({"a": np.ones(3), "b": np.ones(2)}, [r"'a' has shape \[3\]"]),
    ],
)
def test_results_that_do_not_fit_are_refused(tmp_path, tensors, expected):
    orbax.save(tmp_path / "parent", {"a": np.ones(2), "b": np.ones(2)})
    write_result(tmp_path / "safetensors", tensors)
    with pytest.raises(RefusedError) as raised:
        convert_to_orbax(tmp_path / "safetensors", open_checkpoint(tmp_path / "parent"), tmp_path / "out")
    assert all(re.search(pattern, str(raised.value)) for pattern in expected)
    assert not (tmp_path / "out").exists()


def test_destination_and_parent_are_checked(tmp_path):
    write_result(tmp_path / "safetensors", {"a": np.ones(2)})
    with pytest.raises(RefusedError, match="is no Orbax checkpoint"):
        convert_to_orbax(tmp_path / "safetensors", open_checkpoint(tmp_path / "safetensors"), tmp_path / "out")
    orbax.save(tmp_path / "parent", {"a": np.ones(2)})
    (tmp_path / "out").mkdir()
    with pytest.raises(RefusedError, match="is already there"):
        convert_to_orbax(tmp_path / "safetensors", open_checkpoint(tmp_path / "parent"), tmp_path / "out")


def test_pieces_are_bounded_and_complete():
    tree = {
        "a": {str(i): np.ones(10, np.float32) for i in range(7)},
        "l": [np.ones(30, np.float32)] * 2,
        "opt_state": {},
    }
    specs = {f"a/{i}": TensorSpec(f"a/{i}", (10,), np.dtype(np.float32)) for i in range(7)}
    specs |= {f"l/{i}": TensorSpec(f"l/{i}", (30,), np.dtype(np.float32)) for i in range(2)}
    pieces = list(divide_tree(tree, specs, 80))
    assert [sorted(piece.get("a", {})) for piece in pieces] == [["0", "1"], ["2", "3"], ["4", "5"], ["6"], []]
    assert [len(piece.get("l", [])) for piece in pieces] == [0, 0, 0, 0, 2]
    assert not any("opt_state" in piece for piece in pieces)
