"""Converted trees at work: in modules, over devices, saved and loaded, merged, and refused where they are not whole."""

import copy
import json
import logging

import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from checkpoint.builders import same_bytes, write_model
from checkpoint.linen_resnet import ResNet
from checkpoint.zoo import make_model, save_model
from rgsp_jax.checkpoint import (
    build_manifest,
    convert_to_flax,
    convert_to_huggingface,
    from_flax,
    load_manifest,
    load_orbax,
    open_checkpoint,
    save_huggingface,
    save_orbax,
    start_saving,
    to_flax,
)
from rgsp_jax.checkpoint.manifest import find_manifest, read_manifest
from rgsp_jax.checkpoint.safetensors_source import SafetensorsCheckpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import FAMILIES, replace_parameters

logging.getLogger("absl").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_model(make_model("bert"), tmp_path_factory.mktemp("zoo") / "bert")


@pytest.fixture
def converted(bert):
    """(tree, manifest) in the style of nnx."""
    with open_checkpoint(bert) as checkpoint:
        manifest = build_manifest(checkpoint)
        return to_flax(checkpoint, manifest), manifest


def leaves_of(tree, path=""):
    if not isinstance(tree, dict):
        return {path[1:]: tree}
    return {name: x for key, value in tree.items() for name, x in leaves_of(value, f"{path}/{key}").items()}


def test_an_nnx_tree_drops_into_the_family(bert, converted):
    tree, _ = converted
    config = json.loads((bert / "config.json").read_text())
    with open_checkpoint(bert) as checkpoint:
        shapes = {name: spec.shape for name, spec in checkpoint.specs.items()}
    model = replace_parameters(FAMILIES["bert"].build(config, shapes), tree["params"])
    ids = np.arange(6, dtype=np.int32)[None]
    with torch.no_grad():
        expected = make_model("bert")(torch.tensor(ids.astype(np.int64))).last_hidden_state.numpy()
    np.testing.assert_allclose(model(ids), expected, rtol=0, atol=1e-5)


def test_a_linen_tree_drops_into_a_linen_module(tmp_path):
    theirs = make_model("resnet")
    with open_checkpoint(save_model(theirs, tmp_path / "model")) as checkpoint:
        tree = to_flax(checkpoint, build_manifest(checkpoint, style="linen"))
    config = theirs.config
    ours = ResNet(config.embedding_size, tuple(config.hidden_sizes), config.num_labels)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    expected_tree = jax.eval_shape(ours.init, jax.random.key(0), images)
    tree.pop("constants")
    assert jax.tree.structure(expected_tree) == jax.tree.structure(tree)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).logits.numpy()
    np.testing.assert_allclose(ours.apply(tree, images), expected, rtol=1e-5, atol=1e-5)


def mesh_of(count):
    return Mesh(np.array(jax.devices()[:count]), ("x",))


def shard_last(path, described):
    """The last axis over four devices where it divides, else a copy on each."""
    del path
    divides = described.shape and described.shape[-1] % 4 == 0
    spec = [None] * (len(described.shape) - 1) + ["x"] if divides else []
    return NamedSharding(mesh_of(4), PartitionSpec(*spec))


def test_loading_into_shards_gives_the_same_arrays(bert, converted, tmp_path):
    tree, manifest = converted
    save_orbax(tmp_path / "flax", tree, manifest)
    with open_checkpoint(bert) as checkpoint:
        direct = to_flax(checkpoint, manifest, shardings=shard_last)
    from_disk = load_orbax(tmp_path / "flax", shardings=shard_last)
    for sharded in (leaves_of(direct), leaves_of(from_disk)):
        for name, leaf in leaves_of(tree).items():
            assert isinstance(sharded[name], jax.Array) and sharded[name].dtype == leaf.dtype
            assert sharded[name].sharding == shard_last(name, leaf)
            np.testing.assert_array_equal(sharded[name], leaf)
    save_orbax(tmp_path / "again", direct, manifest)
    fewer = load_orbax(tmp_path / "again", shardings=SingleDeviceSharding(jax.devices()[0]))
    assert all(same_bytes(np.asarray(leaves_of(fewer)[name]), leaf) for name, leaf in leaves_of(tree).items())


def test_a_shard_reads_its_own_bytes_alone(bert, monkeypatch):
    read = []
    fill = SafetensorsCheckpoint._fill_runs

    def count(self, spec, rows, starts):
        read.append(rows.nbytes)
        return fill(self, spec, rows, starts)

    monkeypatch.setattr(SafetensorsCheckpoint, "_fill_runs", count)
    name = "params/layers/0/mlp/up/kernel"
    with open_checkpoint(bert) as checkpoint:
        manifest = build_manifest(checkpoint)
        read.clear()
        tree = to_flax(checkpoint, manifest, select=lambda path: path == name, shardings=shard_last)
    kernel = leaves_of(tree)
    assert list(kernel) == [name] and read == [kernel[name].nbytes // 4] * 4


@pytest.mark.parametrize("shape", [(), (5,), (4, 6), (3, 4, 5), (2, 3, 4, 2)], ids=str)
def test_blocks_are_slices(tmp_path, shape):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int32).reshape(shape)
    write_model(tmp_path / "model", {"x": array}, config=None)
    rng = np.random.default_rng(0)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        for _ in range(20):
            ends = [sorted(rng.integers(0, length + 1, 2)) for length in shape]
            index = tuple(slice(None) if rng.random() < 0.4 else slice(*map(int, pair)) for pair in ends)
            assert same_bytes(checkpoint.read_block("x", index), np.asarray(array[index], order="C"))


def test_selected_leaves_are_read_alone(converted, tmp_path):
    tree, manifest = converted
    save_orbax(tmp_path / "flax", tree, manifest)
    chosen = load_orbax(tmp_path / "flax", select=lambda path: path.startswith("params/layers/1/"))
    expected = {name: leaf for name, leaf in leaves_of(tree).items() if name.startswith("params/layers/1/")}
    assert leaves_of(chosen).keys() == expected.keys() and list(chosen["params"]["layers"]) == [1]
    assert load_orbax(tmp_path / "flax", select=lambda path: False) == {}


def test_saving_replaces_only_what_is_whole(converted, tmp_path, monkeypatch):
    tree, manifest = converted
    target = tmp_path / "flax"
    start_saving(target, tree, manifest).result()
    with pytest.raises(RefusedError, match="already there"):
        save_orbax(target, tree, manifest)
    changed = copy.deepcopy(tree)
    changed["params"]["pooler"]["bias"] += 1
    from rgsp_jax.checkpoint import flax_checkpoint

    def fail(fresh, directory):
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(flax_checkpoint, "swap", fail)
        with pytest.raises(OSError, match="disk is gone"):
            save_orbax(target, changed, manifest, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["flax"]
    np.testing.assert_array_equal(load_orbax(target)["params"]["pooler"]["bias"], tree["params"]["pooler"]["bias"])
    save_orbax(target, changed, manifest, overwrite=True)
    np.testing.assert_array_equal(load_orbax(target)["params"]["pooler"]["bias"], changed["params"]["pooler"]["bias"])
    assert [path.name for path in tmp_path.iterdir()] == ["flax"]


def test_a_save_killed_between_its_renames_loses_nothing(converted, tmp_path):
    tree, manifest = converted
    target, scratch = tmp_path / "flax", tmp_path / ".flax.saving"
    save_orbax(target, tree, manifest)
    scratch.mkdir()
    target.rename(scratch / "old")
    with pytest.raises(RefusedError, match="manifest says"):
        save_orbax(target, {"params": {**tree["params"], "pooler": {"bias": np.zeros(2)}}}, manifest, overwrite=True)
    save_orbax(target, tree, manifest, overwrite=True)
    assert load_manifest(target) == manifest and not scratch.exists()


def test_only_orbax_checkpoints_are_overwritten(converted, tmp_path):
    tree, manifest = converted
    (tmp_path / "notes").mkdir()
    with pytest.raises(RefusedError, match="no Orbax checkpoint"):
        save_orbax(tmp_path / "notes", tree, manifest, overwrite=True)
    with pytest.raises(RefusedError, match="parent"):
        save_orbax(tmp_path / "absent" / "flax", tree, manifest)


def test_trees_that_are_not_whole_name_every_difference(converted, tmp_path):
    tree, manifest = converted
    broken = copy.deepcopy(tree)
    del broken["params"]["pooler"]["bias"]
    broken["params"]["more"] = np.zeros(3)
    broken["params"]["word"]["embedding"] = np.zeros((2, 3))
    with pytest.raises(RefusedError) as refused:
        from_flax(broken, manifest)
    text = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 3
    for part in ("pooler/bias ('pooler.dense.bias' on disk) is missing", "params/more is not", "[2, 3]"):
        assert part in text
    for save in (save_orbax, save_huggingface):
        with pytest.raises(RefusedError):
            save(tmp_path / "out", broken, manifest)
    assert list(tmp_path.iterdir()) == []


def test_a_tree_in_memory_becomes_a_directory(bert, converted, tmp_path):
    tree, manifest = converted
    save_huggingface(tmp_path / "back", tree, manifest, companions=bert, max_shard_size=4096)
    assert (tmp_path / "back" / "config.json").read_bytes() == (bert / "config.json").read_bytes()
    with open_checkpoint(tmp_path / "back") as back, open_checkpoint(bert) as source:
        assert len(back.weight_files) > 1
        assert all(same_bytes(back.read(name), source.read(name)) for name in source.specs)


def test_unknown_keys_are_refused_or_passed_through(tmp_path):
    model = make_model("bert")
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    weights |= {"adapter.down": np.ones((3, 5), np.float32), "extra": np.zeros((0, 2), np.float32)}
    source = write_model(tmp_path / "model", weights, config=model.config.to_dict() | {"architectures": ["BertModel"]})
    for style in ("nnx", "linen"):
        with open_checkpoint(source) as checkpoint:
            with pytest.raises(RefusedError) as refused:
                convert_to_flax(checkpoint, tmp_path / style, style=style)
            problems = "\n".join(refused.value.problems)
            assert len(refused.value.problems) == 2 and "'adapter.down'" in problems and "'extra'" in problems
            assert not (tmp_path / style).exists()
            done = convert_to_flax(checkpoint, tmp_path / style, style=style, allow_unmapped=True)
        assert sorted(done.unmapped) == ["adapter.down", "extra"]
        with open_checkpoint(tmp_path / style) as checkpoint:
            convert_to_huggingface(checkpoint, tmp_path / f"{style} back")
        with open_checkpoint(tmp_path / f"{style} back") as back:
            assert all(same_bytes(back.read(name), array) for name, array in weights.items())


def test_a_family_names_the_weights_it_misses(bert, tmp_path):
    with open_checkpoint(bert) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.specs}
        config = checkpoint.config
    del weights["encoder.layer.1.output.dense.weight"], weights["embeddings.LayerNorm.bias"]
    with (
        open_checkpoint(write_model(tmp_path / "model", weights, config=config)) as checkpoint,
        pytest.raises(RefusedError) as refused,
    ):
        build_manifest(checkpoint)
    assert len(refused.value.problems) == 2 and all("is missing" in text for text in refused.value.problems)


def test_models_that_nothing_knows_are_refused(tmp_path):
    with (
        open_checkpoint(write_model(tmp_path / "toy")) as checkpoint,
        pytest.raises(RefusedError, match="cannot run a model of type 'toy'"),
    ):
        build_manifest(checkpoint)
    with (
        open_checkpoint(write_model(tmp_path / "bare", config=None)) as checkpoint,
        pytest.raises(RefusedError, match=r"no config\.json"),
    ):
        build_manifest(checkpoint)


def test_merged_trees_return_as_merged_models(tmp_path):
    """Merging two converted checkpoints and converting the result is merging the checkpoints."""
    from rgsp_jax.pipeline import merge_checkpoints, parse_config

    sources = [save_model(make_model("gpt2", seed), tmp_path / f"model{seed}") for seed in range(2)]
    flax = [tmp_path / f"flax{seed}" for seed in range(2)]
    for source, target in zip(sources, flax, strict=True):
        with open_checkpoint(source) as checkpoint:
            convert_to_flax(checkpoint, target)
    for models, out in ((sources, tmp_path / "merged"), (flax, tmp_path / "merged flax")):
        merge_checkpoints(parse_config({"models": tuple(map(str, models)), "method": "average"}, "test"), out)
    with open_checkpoint(tmp_path / "merged flax") as checkpoint:
        convert_to_huggingface(checkpoint, tmp_path / "back")
    with open_checkpoint(tmp_path / "merged") as expected, open_checkpoint(tmp_path / "back") as found:
        assert expected.specs.keys() == found.specs.keys()
        assert all(same_bytes(expected.read(name), found.read(name)) for name in expected.specs)
    assert (tmp_path / "back" / "config.json").exists()


def test_orbax_checkpoints_of_others_have_no_way_back(tmp_path):
    save_orbax(tmp_path / "mine", {"params": {"w": np.ones((2, 2), np.float32)}})
    with (
        open_checkpoint(tmp_path / "mine") as checkpoint,
        pytest.raises(RefusedError, match="no manifest"),
    ):
        convert_to_huggingface(checkpoint, tmp_path / "out")
    with pytest.raises(RefusedError, match="no manifest"):
        load_manifest(tmp_path / "mine")
    with open_checkpoint(tmp_path / "mine") as checkpoint, pytest.raises(RefusedError, match="a tree already"):
        build_manifest(checkpoint)
    assert find_manifest(None, "here") is None and find_manifest({"other": 1}, "here") is None


def tamper(value, change):
    value = copy.deepcopy(value)
    change(value)
    return value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=99), "later rgsp_jax"),
        (lambda m: m.pop("records"), "damaged"),
        (lambda m: m.update(style="keras"), "damaged"),
        (lambda m: m["records"][0].__setitem__(2, "rm"), "damaged"),
        (lambda m: m["records"][0].__setitem__(3, [-1, 4]), "damaged"),
        (lambda m: m["records"][0].__setitem__(4, "F8"), "damaged"),
        (lambda m: m["records"][0].__setitem__(1, []), "damaged"),
        (lambda m: m["records"].append(m["records"][0]), "recorded twice"),
        (lambda m: m["records"][1].__setitem__(1, m["records"][0][1]), "would both lie"),
        (lambda m: m["records"][1].__setitem__(1, [*m["records"][0][1], "x"]), "both a leaf and the branch"),
        (lambda m: m["records"][0].__setitem__(7, "nothing"), "tied to 'nothing'"),
    ],
)
def test_tampered_manifests_are_refused(converted, change, words):
    _, manifest = converted
    assert read_manifest(manifest.to_json(), "here") == manifest
    with pytest.raises(RefusedError, match=words):
        read_manifest(tamper(manifest.to_json(), change), "here")


def test_a_manifest_leads_no_file_out_of_its_directory(bert, converted, tmp_path):
    tree, manifest = converted
    (tmp_path / "secret").write_text("x")
    lying = read_manifest({**manifest.to_json(), "companions": ["../secret"]}, "here")
    (tmp_path / "model").mkdir()
    with pytest.raises(RefusedError, match="not inside the directory"):
        save_huggingface(tmp_path / "out", tree, lying, companions=tmp_path / "model")
    with pytest.raises(RefusedError, match="not inside the directory"):
        save_orbax(tmp_path / "flax", tree, lying, companions=tmp_path / "model")
    with pytest.raises(RefusedError, match=r"lacks 'config\.json'"):
        save_huggingface(tmp_path / "out", tree, manifest, companions=tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]
