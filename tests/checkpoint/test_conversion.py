"""PyTorch to Flax and back: every key, every bit, every file, over a zoo of tiny models."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from checkpoint.builders import same_bytes
from checkpoint.zoo import FAMILIES, OTHERS, add_sentence_transformer, make_model, save_model
from rgsp_jax.checkpoint import (
    build_manifest,
    convert_to_flax,
    convert_to_huggingface,
    from_flax,
    load_manifest,
    load_orbax,
    open_checkpoint,
    to_flax,
)
from rgsp_jax.rules import classify


def read_all(directory):
    """Key -> array of a model's weights as they lie on disk."""
    with open_checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def go_and_return(directory, tmp_path, **options):
    """The model as an Orbax checkpoint, and what that becomes again."""
    flax, back = tmp_path / "flax", tmp_path / "back"
    with open_checkpoint(directory) as checkpoint:
        convert_to_flax(checkpoint, flax, **options)
    with open_checkpoint(flax) as checkpoint:
        convert_to_huggingface(checkpoint, back)
    return flax, back


def assert_same_weights(first, second):
    first, second = read_all(first), read_all(second)
    assert first.keys() == second.keys()
    assert all(same_bytes(first[key], second[key]) for key in first)


def assert_loads(model, directory):
    """transformers finds every weight in its place and nothing else."""
    loaded, info = type(model).from_pretrained(directory, output_loading_info=True, local_files_only=True)
    assert not any(info.values()), info
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("style", ["nnx", "linen"])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_the_zoo_returns_bit_for_bit(name, style, tmp_path):
    model = make_model(name)
    source = save_model(model, tmp_path / "model")
    _, back = go_and_return(source, tmp_path, style=style)
    assert_same_weights(source, back)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert_loads(model, back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_shards_return(dtype, tmp_path):
    model = make_model("llama").to(dtype)
    source = save_model(model, tmp_path / "model", max_shard_size="4KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    _, back = go_and_return(source, tmp_path)
    assert sorted(path.name for path in back.glob("*.safetensors")) == shards
    index = "model.safetensors.index.json"
    assert (
        json.loads((back / index).read_text())["weight_map"] == json.loads((source / index).read_text())["weight_map"]
    )
    assert_same_weights(source, back)


def test_a_wider_dtype_on_the_way_is_undone(tmp_path):
    source = save_model(make_model("bert").to(torch.bfloat16), tmp_path / "model")
    flax, back = go_and_return(source, tmp_path, dtype="float32")
    assert {leaf.dtype.name for leaf in leaves(load_orbax(flax))} == {"float32"}
    assert_same_weights(source, back)


def leaves(tree):
    return [x for value in tree.values() for x in (leaves(value) if isinstance(value, dict) else [value])]


def test_shared_storages_of_a_pytorch_file_return(tmp_path):
    model = make_model("llama tied")
    source = tmp_path / "model"
    source.mkdir()
    model.config.save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    with open_checkpoint(source) as checkpoint:
        assert checkpoint.aliases
        manifest = build_manifest(checkpoint, style="linen")
    (tied,) = [record for record in manifest.records if record.tied_to]
    assert (tied.key, tied.tied_to) == ("lm_head.weight", "model.embed_tokens.weight")
    _, back = go_and_return(source, tmp_path)
    weights = safetensors.torch.load_file(back / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in model.state_dict().items())
    assert_loads(model, back)


def test_companions_travel_with_the_tree(tmp_path):
    source = add_sentence_transformer(save_model(make_model("bert"), tmp_path / "model"))
    (source / "tokenizer.json").write_text("{}")
    flax, back = go_and_return(source, tmp_path)
    for name in ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"):
        assert (flax / name).read_bytes() == (back / name).read_bytes() == (source / name).read_bytes()
    assert load_manifest(flax).companions == ("1_Pooling/config.json", "config.json", "modules.json", "tokenizer.json")


@pytest.mark.parametrize("style", ["nnx", "linen"])
def test_trees_in_memory_and_on_disk_agree(style, tmp_path):
    source = save_model(make_model("resnet"), tmp_path / "model")
    with open_checkpoint(source) as checkpoint:
        manifest = build_manifest(checkpoint, style=style)
        tree = to_flax(checkpoint, manifest)
        convert_to_flax(checkpoint, tmp_path / "flax", style=style)
        weights = {name: checkpoint.read(name) for name in checkpoint.specs}
    assert load_manifest(tmp_path / "flax") == manifest
    loaded = load_orbax(tmp_path / "flax")
    assert describe(tree) == describe(loaded)
    assert set(tree) == ({"params", "constants"} if style == "nnx" else {"params", "batch_stats", "constants"})
    back = from_flax(loaded, manifest)
    assert list(back) == list(weights)
    assert all(same_bytes(back[key], weights[key]) and back[key].flags.c_contiguous for key in weights)


def describe(tree):
    """Nested keys (integers told from strings), shapes, dtypes and bytes."""
    if isinstance(tree, dict):
        return {key: describe(tree[key]) for key in sorted(tree, key=str)}
    return tree.shape, tree.dtype, np.asarray(tree).tobytes()


def test_layouts_follow_the_module_and_not_the_shape(tmp_path):
    model = make_model("bert")
    with open_checkpoint(save_model(model, tmp_path / "model")) as checkpoint:
        manifest = build_manifest(checkpoint, style="linen")
        tree = to_flax(checkpoint, manifest)["params"]
    query = model.encoder.layer[1].attention.self.query.weight.detach().numpy()
    assert query.shape == (16, 16)
    np.testing.assert_array_equal(tree["encoder"]["layer"]["1"]["attention"]["self"]["query"]["kernel"], query.T)
    assert "embedding" in tree["embeddings"]["word_embeddings"] and "scale" in tree["embeddings"]["LayerNorm"]
    modules = {record.key: record.module for record in manifest.records}
    assert modules["encoder.layer.0.output.dense.weight"] == "Linear"
    assert modules["embeddings.LayerNorm.bias"] == "LayerNorm"


def test_a_changed_tree_returns_changed(tmp_path):
    source = save_model(make_model("gpt2"), tmp_path / "model")
    with open_checkpoint(source) as checkpoint:
        manifest = build_manifest(checkpoint)
        tree = to_flax(checkpoint, manifest)
    before = from_flax(tree, manifest)
    norm = tree["params"]["decoder"]["final_norm"]
    norm["scale"] = norm["scale"] + 1
    after = from_flax(tree, manifest)
    changed = [key for key in before if not np.array_equal(before[key], after[key])]
    assert changed == ["transformer.ln_f.weight"]


def test_the_style_of_nnx_has_integer_positions(tmp_path):
    source = save_model(make_model("convnext"), tmp_path / "model")
    with open_checkpoint(source) as checkpoint:
        tree = to_flax(checkpoint, build_manifest(checkpoint))
    assert 0 in tree["params"]["convnext"]["encoder"]["stages"]


@pytest.mark.parametrize("style", ["nnx", "linen"])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_trees_are_merged_by_the_rules_of_their_checkpoints(name, style, tmp_path):
    """A leaf is the kind of tensor that its key on disk is, with the same matrices: both merge alike."""
    with open_checkpoint(save_model(make_model(name), tmp_path / "model")) as checkpoint:
        manifest = build_manifest(checkpoint, style=style)
    for record in manifest.owners:
        on_disk = classify(record.key, record.shape, record.dtype, model_type=manifest.model_type)
        leaf = classify("/".join(map(str, record.path)), record.leaf_shape, record.dtype)
        assert leaf.kind == on_disk.kind, (record.key, record.path)
        if on_disk.kind == "matrix":
            assert leaf.view.matrices == on_disk.view.matrices, (record.key, record.path)


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_and_module_types_agree(name, tmp_path, monkeypatch):
    """Without transformers a family's own table decides, and gives the same linen tree."""
    from rgsp_jax.checkpoint import conversion

    source = save_model(make_model(name), tmp_path / "model")
    with open_checkpoint(source) as checkpoint:
        with_types = build_manifest(checkpoint, style="linen")
        monkeypatch.setitem(__import__("sys").modules, "transformers", None)
        monkeypatch.setattr(conversion, "infer_places", lambda _: pytest.fail("transformers was asked"))
        from_table = build_manifest(checkpoint, style="linen")
    strip = [record._replace(module="") for record in with_types.records]
    assert strip == list(from_table.records)
