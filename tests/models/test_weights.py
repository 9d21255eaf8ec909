"""The weight tables: a bijection in both directions, every refusal, and merged trees used in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import OPERATIONS, pack, to_flax_layout, to_flax_shape, to_torch_layout, to_torch_shape
from rgsp_jax.models import (
    Bert,
    BertClassifier,
    BertConfig,
    Vit,
    VitClassifier,
    VitConfig,
    WeightRule,
    WeightTable,
    export_weights,
    extract_parameters,
    load_weights,
    map_weights,
    replace_parameters,
)

BERT = BertConfig(37, 16, 11, 4, 24, "gelu", 12)  # eleven layers: two-digit indices must not be confused
VIT = VitConfig(16, 2, 4, 24, image_size=8, patch_size=2, num_channels=3)


MAKERS = {
    "bert": lambda rngs: Bert(BERT, rngs=rngs),
    "bert without pooler": lambda rngs: Bert(BertConfig(37, 16, 1, 4, 24, pooler=False), rngs=rngs),
    "bert classifier": lambda rngs: BertClassifier(BertConfig(37, 16, 1, 4, 24), 3, rngs=rngs),
    "vit": lambda rngs: Vit(VIT, rngs=rngs),
    "vit classifier": lambda rngs: VitClassifier(VIT, 5, rngs=rngs),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_inverse_pairs(operation):
    axes = OPERATIONS[operation]
    shape = (2, 3, 5, 7, 11)[: len(axes or (0, 1))]
    array = np.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(to_torch_layout(to_flax_layout(array, operation), operation), array)
    np.testing.assert_array_equal(to_flax_layout(to_torch_layout(array, operation), operation), array)
    turned = to_flax_layout(array, operation)
    assert turned.shape == to_flax_shape(shape, operation) and to_torch_shape(turned.shape, operation) == shape


@pytest.mark.parametrize("shape", [(), (0, 3), (1, 1), (16, 16), (17, 33), (5, 40), (3, 4, 5)], ids=str)
def test_packing_is_a_copy_in_order(shape):
    array = np.arange(np.prod(shape, dtype=int), dtype=np.int16).reshape(shape)
    packed = pack(array.T)
    assert packed.flags.c_contiguous and packed.shape == array.T.shape and packed.dtype == array.dtype
    np.testing.assert_array_equal(packed, array.T)
    assert pack(array) is array


@pytest.mark.parametrize("name", MAKERS)
def test_tables_are_bijections_and_round_trips_are_exact(name):
    model = MAKERS[name](nnx.Rngs(0))
    places = map_weights(model)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model))]
    assert sorted(map(str, paths)) == sorted(str(place.path) for place in places.values())
    exported = export_weights(model)
    assert exported.keys() == places.keys()
    assert all(array.flags.c_contiguous for array in exported.values())
    # Distinct values everywhere, so that two exchanged weights of one shape are seen.
    stamped = {
        key: (i + np.arange(array.size, dtype=np.float32) / array.size).reshape(array.shape)
        for i, (key, array) in enumerate(exported.items())
    }
    loaded = load_weights(model, stamped)
    again, untouched = export_weights(loaded), export_weights(model)
    for key in stamped:
        np.testing.assert_array_equal(again[key], stamped[key], err_msg=key)
        np.testing.assert_array_equal(untouched[key], exported[key], err_msg=key)


def test_loading_takes_prefixes_legacy_names_buffers_and_half_precision():
    model = Bert(BERT, rngs=nnx.Rngs(0))
    weights = export_weights(model, prefix="bert.")
    old = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): array for key, array in weights.items()}
    old = {key.replace("LayerNorm.bias", "LayerNorm.beta"): array.astype(np.float16) for key, array in old.items()}
    old["bert.embeddings.position_ids"] = np.arange(12)[None]
    loaded = export_weights(load_weights(model, old), prefix="bert.")
    for key, array in weights.items():
        assert loaded[key].dtype == np.float32
        np.testing.assert_array_equal(loaded[key], array.astype(np.float16).astype(np.float32))


def test_loading_names_every_offender_at_once():
    model = Vit(VIT, rngs=nnx.Rngs(0))
    weights = export_weights(model)
    del weights["layernorm.bias"]
    weights["classifier.weight"] = np.zeros((2, 16), np.float32)
    weights["vit.embeddings.cls_token"] = weights["embeddings.cls_token"]
    key = "encoder.layer.1.output.dense.weight"
    weights[key] = weights[key].T
    with pytest.raises(RefusedError) as refused:
        load_weights(model, weights)
    problems = "\n".join(refused.value.problems)
    assert len(refused.value.problems) == 4
    for part in ("'layernorm.bias' is missing", "'classifier.weight' has no place", "are the same weight", "(24, 16)"):
        assert part in problems


class Loose(nnx.Module):
    """Two arrays of which the table names one twice and the other never."""

    weight_table = WeightTable((WeightRule("a", "first"), WeightRule("b", "first")))

    def __init__(self):
        self.first, self.second = nnx.Param(jnp.zeros(2)), nnx.Param(jnp.zeros(2))


class Colliding(Loose):
    """Two arrays under one key."""

    weight_table = WeightTable((WeightRule("a", "first"), WeightRule("a", "second")))


def test_a_table_that_is_no_bijection_is_refused():
    with pytest.raises(RefusedError) as refused:
        map_weights(Loose())
    assert len(refused.value.problems) == 2
    with pytest.raises(RefusedError, match="'a' to several arrays"):
        map_weights(Colliding())
    with pytest.raises(TypeError, match="no model family"):
        map_weights(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_a_merged_tree_is_used_in_place():
    first, second = Vit(VIT, rngs=nnx.Rngs(0)), Vit(VIT, rngs=nnx.Rngs(1))
    merged = jax.tree.map(lambda a, b: (a + b) / 2, extract_parameters(first), extract_parameters(second))
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    before = first(images)
    called = jax.jit(lambda parameters, x: replace_parameters(first, parameters)(x))(merged, images)
    by_hand = {key: (array + export_weights(second)[key]) / 2 for key, array in export_weights(first).items()}
    np.testing.assert_allclose(called, load_weights(second, by_hand)(images), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(first(images), before)
    with pytest.raises(ValueError, match=r"missing.*layers\.0\.mlp\.up\.kernel"):
        replace_parameters(first, {"cls_token": merged["cls_token"]})
    as_strings = dict(merged, layers={str(key): layer for key, layer in merged["layers"].items()})
    np.testing.assert_array_equal(replace_parameters(first, as_strings)(images).shape, called.shape)
