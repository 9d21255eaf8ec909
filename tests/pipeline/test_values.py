"""What the pipeline writes is what the methods compute, tensor by tensor."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
import rgsp_jax
from pipeline.toy_methods import EXTENDED, tilt_by_hand
from pipeline.toy_models import CONFIG, SHAPES, dtype_of, read_model, same_bits, toy_family, write_family
from rgsp_jax import methods
from rgsp_jax.pipeline import MergeConfig, Override, merge_checkpoints

pytestmark = pytest.mark.usefixtures("plain_report")

SQUARE = "*attention*.weight"
"""Eight by eight, and two vectors."""
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def merged(tmp_path, family, out="out", config=CONFIG, **settings):
    """Write the family, merge it, read the result."""
    paths = write_family(tmp_path / f"parents of {out}", family, config)
    return read_model(merge_checkpoints(MergeConfig(models=paths, **settings), tmp_path / out).out)


def assert_rounded(actual, expected, models, compute="float32", rounds=8):
    """`actual` is `expected` up to a few roundings in the dtype of the computation and one in its own."""
    size = max((np.abs(np.asarray(m, np.float64)).max(initial=0) for m in models), default=0)
    bound = EPSILON[actual.dtype.name] * np.abs(expected) + rounds * EPSILON[compute] * size
    bound += 2.0**-24 if actual.dtype == np.float16 else 0  # between its smallest numbers
    error = np.abs(np.asarray(actual, np.float64) - expected)
    assert actual.shape == expected.shape
    assert np.all(error <= bound), (error.max(), bound.min())


@pytest.mark.parametrize(
    ("dtypes", "out", "compute"),
    [
        (["float32"], None, "float32"),
        (["bfloat16"], None, "float32"),
        (["float16"], None, "float32"),
        (["float64"], None, "float64"),
        (["float32", "bfloat16", "float16"], None, "float32"),
        (["bfloat16", "float64", "float32"], None, "float64"),
        (["float32"], "bfloat16", "float32"),
        (["bfloat16"], "float32", "float32"),
        (["float64"], "float16", "float64"),
        (["float16"], "float64", "float32"),
    ],
)
def test_average_is_the_weighted_mean(tmp_path, dtypes, out, compute):
    family = toy_family(3, dtypes=dtypes)
    coefficients = np.array([1.0, 2.0, 5.0])
    result = merged(tmp_path, family, method="average", hyperparameters={"coefficients": list(coefficients)}, dtype=out)
    assert result.keys() == family[0].keys()
    for name in SHAPES:
        stack = np.stack([model[name].astype(np.float64) for model in family])
        expected = np.tensordot(coefficients / 8, stack, 1)
        assert result[name].dtype == dtype_of(out or dtypes[0])
        assert_rounded(result[name], expected, stack, compute)
    assert same_bits(result["embeddings.position_ids"], family[0]["embeddings.position_ids"])


def test_average_of_one_model_is_the_model(tmp_path):
    family = toy_family(1, dtypes=["bfloat16"])
    result = merged(tmp_path, family, method="average")
    assert all(same_bits(result[name], family[0][name]) for name in family[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_slerp_takes_every_tensor_as_one_vector(tmp_path, dtype):
    names = ["stem.conv.weight", "moe.experts.down_proj", "encoder.layer.0.intermediate.dense.bias", "logit_scale"]
    family = toy_family(2, dtypes=[dtype], spread=1.0)
    result = merged(tmp_path, family, method="slerp", hyperparameters={"t": 0.3}, include=names)
    for name in SHAPES:
        a, b = (model[name].astype(np.float64) for model in family)
        if name in names and name != "logit_scale":
            assert_rounded(result[name], references.slerp(a, b, 0.3), [a, b], dtype, rounds=64)
        elif name == "logit_scale":  # two numbers lie on one line
            assert_rounded(result[name], 0.7 * a + 0.3 * b, [a, b], dtype)
        else:
            assert same_bits(result[name], family[0][name])


@pytest.mark.parametrize(
    ("method", "count", "dtype"),
    [("relative", 3, "float32"), ("relative", 3, "bfloat16"), ("relative", 3, "float64"), ("rgsp", 2, "float32")],
)
def test_matrix_methods_match_a_call_for_each_matrix(tmp_path, method, count, dtype):
    family = toy_family(count, dtypes=[dtype])
    result = merged(tmp_path, family, method=method, hyperparameters={"rank": 2}, include=[SQUARE])
    by_hand = jax.jit(lambda stack: methods[method](stack, rank=2).merged)
    for name, shape in SHAPES.items():
        stack = np.stack([model[name] for model in family])
        if "attention" not in name or not name.endswith("weight"):
            assert same_bits(result[name], family[0][name])
        elif len(shape) == 1:
            assert_rounded(result[name], stack.astype(np.float64).mean(0), stack)
        elif dtype == "float32":
            assert_rounded(result[name], np.asarray(by_hand(jnp.asarray(stack)), np.float64), stack, rounds=64)
        if method == "relative" and name.endswith(("query.weight", "attention.output.dense.weight")):
            oracle = references.relative(stack.astype(np.float64), 2)
            error = np.linalg.norm(result[name].astype(np.float64) - oracle) / np.linalg.norm(oracle)
            assert error < max(EPSILON[dtype], 1e-5)


VIEWS = {
    "toy": {
        "encoder.layer.0.intermediate.dense.weight": ((20, 8), (0, 1)),
        "stem.conv.weight": ((6, 2, 3, 3), (0, 1, 2, 3)),
        "encoder.layer.1.output.dense.weight": ((8, 20), (0, 1)),
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": ((8, 24), (1, 0)),
        "transformer.h.0.mlp.c_fc.weight": ((8, 20), (1, 0)),
        "transformer.h.0.mlp.c_proj.weight": ((20, 8), (1, 0)),
        "score.weight": ((3, 8), (0, 1)),
    },
    "flax": {
        "encoder/dense/kernel": ((8, 20), (1, 0)),
        "encoder/attention/query/kernel": ((8, 2, 4), (1, 2, 0)),
        "stem/conv/kernel": ((3, 3, 2, 6), (3, 0, 1, 2)),
    },
}
"""Shape on disk, and the axes in the order outputs, inputs."""


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.parametrize("family_name", VIEWS)
@pytest.mark.parametrize("dtypes", [["float32"], ["bfloat16", "float16"]])
def test_layouts_are_seen_as_outputs_by_inputs(tmp_path, family_name, dtypes):
    layouts = VIEWS[family_name]
    rng = np.random.default_rng(3)
    family = [
        {n: rng.normal(size=s).astype(dtype_of(d)) for n, (s, _) in layouts.items()} for d in (*dtypes, dtypes[-1])
    ]
    result = merged(tmp_path, family, config={"model_type": family_name}, method="tilt")
    for name, (shape, axes) in layouts.items():
        stack = np.stack([model[name].astype(np.float64) for model in family])
        moved = stack.transpose(0, *(a + 1 for a in axes))
        outputs = moved.shape[1] if axes != (1, 2, 0) else moved.shape[1] * moved.shape[2]  # heads are outputs
        matrices = moved.reshape(len(family), outputs, -1)
        expected = tilt_by_hand(matrices).reshape([shape[a] for a in axes]).transpose(np.argsort(axes))
        assert_rounded(result[name], expected, stack)


@pytest.mark.usefixtures("toy_methods")
def test_stacked_experts_are_merged_one_by_one(tmp_path):
    family = toy_family(2)
    result = merged(tmp_path, family, method="tilt", hyperparameters={"strength": 0.25}, include=["moe.*"])
    stack = np.stack([model["moe.experts.down_proj"] for model in family])
    expected = np.stack([tilt_by_hand(stack[:, i], 0.25) for i in range(3)])
    assert_rounded(result["moe.experts.down_proj"], expected, stack)


@pytest.mark.usefixtures("toy_methods")
def test_library_and_pipeline_agree(tmp_path):
    kept = ("embeddings", "layer.0", "moe")
    family = [{n: x for n, x in model.items() if any(k in n for k in kept)} for model in toy_family(3)]
    result = merged(tmp_path, family, method="tilt")
    tree, report = jax.jit(lambda trees: rgsp_jax.merge(trees, method=EXTENDED["tilt"]))(family)
    assert dict(report.rules)["embeddings.word_embeddings.weight"] == "average"
    for name in family[0]:
        assert_rounded(result[name], np.asarray(tree[name], np.float64), [m[name] for m in family]) if (
            result[name].dtype.kind == "f"
        ) else np.testing.assert_array_equal(result[name], tree[name])


@pytest.mark.parametrize(("method", "count"), [("average", 3), ("slerp", 2), ("relative", 3), ("rgsp", 2)])
def test_equal_copies_return_the_copy_bit_for_bit(tmp_path, method, count):
    rank = {"hyperparameters": {"rank": 2}} if method in ("relative", "rgsp") else {}
    rest = {"overrides": [Override(pattern="*", method="average"), Override(pattern=SQUARE, method=method, **rank)]}
    for dtype in ("float32", "bfloat16") if method != "rgsp" else ("float32",):
        model = toy_family(1, dtypes=[dtype])[0]
        result = merged(tmp_path, [model] * count, out=dtype, method=method, **rank, **rest)
        assert all(same_bits(result[name], model[name]) for name in model)


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.parametrize("size", [1, 1023, 1025, 16384, 40_001])
def test_tensors_of_any_size_are_cut_and_put_together(tmp_path, monkeypatch, size):
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", 32_768)
    rng = np.random.default_rng(size)
    shapes = {"a.bias": (size,), "b.embedding": (3, size), "c.weight": (2, size), "d.bias": (7,)}
    family = [{name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(2)]
    result = merged(tmp_path, family, config=None, method="tilt")
    for name in shapes:
        stack = np.stack([model[name] for model in family])
        matrix = name == "c.weight" and size > 1
        assert_rounded(result[name], tilt_by_hand(stack) if matrix else stack.astype(np.float64).mean(0), stack)


def test_combinations_of_three_dtypes_do_not_mix_up_models(tmp_path):
    """Every model has its own constant, so that a swapped buffer shows."""
    for dtypes in itertools.permutations(["float32", "bfloat16", "float64"]):
        family = [{"w.weight": np.full((5, 3), 4.0**k).astype(dtype_of(d))} for k, d in enumerate(dtypes)]
        result = merged(tmp_path, family, out="-".join(dtypes), config=None, method="average")["w.weight"]
        assert result.dtype == dtype_of(dtypes[0])
        np.testing.assert_array_equal(result, np.full((5, 3), 7.0).astype(dtype_of(dtypes[0])))
