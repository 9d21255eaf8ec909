"""One table of methods, many properties over it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import references
from rgsp_jax import methods
from rgsp_jax.types import InputStatistics

RANK = 3
SHAPES = ((7, 5), (5, 8))
TESTED = {"iso_cts": {"common_share": 0.4}, "dare": {"drop_rate": 0.4}, "dare_ties": {"drop_rate": 0.4}}
TESTED["relative_weighted"] = {"directions": (1.0, 0.5, 2.0), "rest": (0.1, 0.0, -0.2)}
RANKED = [name for name, method in methods.items() if "rank" in method.hyperparameters]
every_method = pytest.mark.parametrize("name", list(methods))
masked_method = pytest.mark.parametrize("name", [n for n in RANKED if "active_rank" in methods[n].hyperparameters])


def count_for(name):
    low, high = methods[name].models
    return high or max(low, 3)


def options(name, **more):
    """Hyperparameters under which small matrices take part in everything a method does."""
    return ({"rank": RANK} if name in RANKED else {}) | TESTED.get(name, {}) | more


def needed(name, stack):
    """What the method needs beside the stack, of the right shapes and always the same."""
    needs = methods[name].needs
    extras = {}
    if "base" in needs:  # near the models, moving with them and not with their order
        extras["base"] = 0.9 * stack.astype(jnp.float64).mean(0)
    if "key" in needs:
        extras["key"] = jax.random.key(3)
    if "covariances" in needs:
        count, n = methods[name].covariance_counts(stack.shape[0])[0], stack.shape[-1]
        wide = jnp.float64 if stack.dtype == jnp.float64 else jnp.float32
        rows = jnp.asarray(np.random.default_rng(11).normal(size=(count, 20, n)) * np.geomspace(1, 0.1, n), wide)
        covariance = jnp.einsum("cin,cim->cnm", rows[:, :15], rows[:, :15]) / 15
        extras["inputs"] = InputStatistics(covariance=covariance, held_back=rows[:, 15:])
        if methods[name].in_step:  # inputs drift as far apart as the models are
            wide_stack = stack.astype(wide)
            apart = jnp.linalg.norm(wide_stack - wide_stack[:1]) / jnp.linalg.norm(wide_stack)
            drift = 0.1 * apart * jnp.einsum("cin,cim->cnm", jnp.roll(rows[:, :15], 1, axis=1), rows[:, :15]) / 15
            extras["inputs"] = extras["inputs"]._replace(drift=drift)
    return extras


def run(name, stack, **hyperparameters):
    return methods[name](stack, **needed(name, stack), **options(name, **hyperparameters))


@functools.cache
def compiled(name, **hyperparameters):
    return jax.jit(lambda stack: run(name, stack, **hyperparameters))


def siblings(seed, count, shape, spread=0.3, dtype=np.float64):
    """Models that share an ancestor."""
    rng = np.random.default_rng(seed)
    ancestor = rng.normal(size=shape)
    return jnp.asarray(np.stack([ancestor + spread * rng.normal(size=shape) for _ in range(count)]).astype(dtype))


def assert_equal(actual, expected, bound=1e-9):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * scale)


seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from(SHAPES)
few = settings(max_examples=8, deadline=None, derandomize=True)


@every_method
@few
@given(seed=seeds, shape=shapes)
def test_equal_copies_return_the_copy(name, seed, shape):
    model = siblings(seed, 1, shape)[0]
    merged = compiled(name)(jnp.stack([model] * count_for(name))).merged
    if methods[name].keeps_copies:
        np.testing.assert_array_equal(merged, model)
    else:  # the table does not promise less than it could
        assert np.abs(merged - model).max() > 1e-3


@pytest.mark.parametrize("name", [n for n in methods if methods[n].keeps_copies])
def test_equal_copies_in_float32_return_the_copy_bit_for_bit(name):
    model = siblings(5, 1, (7, 5), dtype=np.float32)[0]
    np.testing.assert_array_equal(compiled(name)(jnp.stack([model] * count_for(name))).merged, model)


@every_method
@few
@given(seed=seeds, shape=shapes)
def test_order_matters_only_where_the_table_says(name, seed, shape):
    stack = siblings(seed, count_for(name), shape)
    forth, back = compiled(name)(stack).merged, compiled(name)(stack[::-1]).merged
    if methods[name].order_invariant or name == "slerp":  # slerp at one half is symmetric
        assert_equal(back, forth)
    else:
        assert np.abs(back - forth).max() > 1e-6


@pytest.mark.parametrize("name", [n for n in methods if methods[n].scale_equivariant])
@few
@given(seed=seeds, shape=shapes, factor=st.sampled_from([-3.0, -1.0, 1e-3, 250.0]))
def test_scaling_the_models_scales_the_merge(name, seed, shape, factor):
    stack = siblings(seed, count_for(name), shape)
    assert_equal(compiled(name)(factor * stack).merged / factor, compiled(name)(stack).merged)


@pytest.mark.parametrize("name", [n for n in methods if methods[n].rotation_equivariant])
@few
@given(seed=seeds, shape=shapes)
def test_signs_and_rotations_pass_through(name, seed, shape):
    """Turned rows flip and mix the signs an SVD picks, and must not change anything else."""
    rng = np.random.default_rng(seed)
    stack = siblings(seed, count_for(name), shape)
    rotation = jnp.asarray(np.linalg.qr(rng.normal(size=(shape[0], shape[0])))[0])
    signs = jnp.asarray(np.diag(rng.choice([-1.0, 1.0], size=shape[0])))
    for turn in (signs, rotation):
        turned = compiled(name)(jnp.einsum("ij,kjn->kin", turn, stack)).merged
        assert_equal(turned, turn @ compiled(name)(stack).merged)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
@every_method
def test_dtype_is_kept_and_small_floats_compute_in_float32(name, dtype):
    stack = siblings(1, count_for(name), (7, 5)).astype(dtype)
    merged = compiled(name)(stack).merged
    assert merged.dtype == dtype
    wide = compiled(name)(stack.astype(jnp.float64 if dtype == jnp.float64 else jnp.float32)).merged
    np.testing.assert_array_equal(merged, wide.astype(dtype))


@every_method
def test_integers_are_refused(name):
    with pytest.raises(ValueError, match="floating point"):
        methods[name](jnp.ones((count_for(name), 4, 4), jnp.int32), **needed(name, jnp.ones((2, 4, 4))))


@every_method
def test_jit_equals_eager_and_vmap_equals_loop(name):
    stacks = jnp.stack([siblings(seed, count_for(name), (7, 5)) for seed in range(3)])
    loop = [compiled(name)(stack) for stack in stacks]
    eager = run(name, stacks[0])
    assert_equal(eager.merged, loop[0].merged)
    batch = jax.jit(jax.vmap(lambda stack: run(name, stack)))(stacks)
    for i, single in enumerate(loop):
        assert_equal(batch.merged[i], single.merged, 1e-8)
        for key, value in single.stats.items():
            if value.dtype != bool and "residual" not in key and "gw_" not in key:
                assert_equal(batch.stats[key][i], value, 1e-7)


@masked_method
def test_a_masked_rank_is_the_smaller_rank(name):
    stack = siblings(2, count_for(name), (7, 5))
    masked = jax.jit(lambda r: methods[name](stack, rank=5, active_rank=r))
    for rank in (1, 3, 5):
        smaller, other = jax.jit(lambda x, rank=rank: methods[name](x, rank=rank))(stack), masked(rank)
        assert_equal(other.merged, smaller.merged, 1e-7)
        for key in ("psi", "lam", "tfi", "rho", "scale", "subspace_overlap", "gw_cost"):
            if key in smaller.stats:
                assert_equal(other.stats[key], smaller.stats[key], 1e-7)
    assert masked._cache_size() == 1


def in_stages(name, stack, **hyperparameters):
    """The method composed of its three steps, each given what its signature names."""
    stages, given = methods[name].stages, methods[name].defaults | hyperparameters | needed(name, stack)
    parts = stages.prepare(stack, **stages.pick("prepare", given))
    solution = stages.solve(parts, **stages.pick("solve", given))
    return stages.build(stack, parts, solution, **stages.pick("build", given))


VARIED = {
    "active_rank": ("int", (1, 2, 4)),
    "beta": ("float", (0.0, 1.0, 7.0)),
    "epsilon": ("float", (0.02, 0.05, 0.5)),
    "temperature": ("float", (0.03, 0.3, 1.0)),
    "fused_penalty": ("float", (0.0, 0.5, 0.1)),
    "scale": ("float", (0.3, 1.0, 2.0)),
}


@pytest.mark.parametrize("name", [n for n, method in methods.items() if method.stages])
def test_the_stages_compose_to_the_method(name):
    """For several traced values at once, under vmap and jit; and they take every hyperparameter there is."""
    method, stages = methods[name], methods[name].stages
    taken = set().union(*(stages.arguments(stage) for stage in ("prepare", "solve", "build")))
    assert set(method.hyperparameters) <= taken
    stack, fixed = siblings(7, count_for(name), (6, 5)), options(name, **({"rank": 4} if name in RANKED else {}))
    varied = [n for n in VARIED if n in method.hyperparameters]
    values = {n: jnp.asarray(VARIED[n][1], int if VARIED[n][0] == "int" else float) for n in varied}
    whole = jax.jit(jax.vmap(lambda v: method.fn(stack, **needed(name, stack), **fixed, **v)))(values)
    staged = jax.jit(jax.vmap(lambda v: in_stages(name, stack, **fixed, **v)))(values)
    assert jax.tree.structure(whole) == jax.tree.structure(staged)
    for ours, theirs in zip(jax.tree.leaves(staged), jax.tree.leaves(whole), strict=True):
        assert_equal(ours, theirs, 1e-10)
    assert np.abs(np.diff(whole.merged, axis=0)).max(axis=(1, 2)).min() > 1e-9


@every_method
def test_too_few_or_too_many_models(name):
    low, high = methods[name].models
    with pytest.raises(ValueError, match="models, not"):
        methods[name](jnp.zeros((low - 1, 4, 4)))
    if high is not None:
        with pytest.raises(ValueError, match="models, not"):
            methods[name](jnp.zeros((high + 1, 4, 4)))


@every_method
def test_defaults_are_allowed_and_documented(name):
    method = methods[name]
    assert method.problems({k: v for k, v in method.defaults.items() if v is not None}) == []
    assert all(h.help and h.expected() for h in method.hyperparameters.values())
    assert method.problems({"no_such": 1})[0].startswith(f"method {name!r} has no hyperparameter 'no_such'")


@pytest.mark.parametrize(
    ("name", "hyperparameter", "value"),
    [
        ("rgsp", "rank", 0), ("rgsp", "rank", 1.5), ("rgsp", "rank", True), ("rgsp", "epsilon", 0),
        ("rgsp", "beta", -1),
        ("rgsp", "overlap", "both"), ("rgsp", "symmetric", 1), ("rgsp", "geometry", None), ("relative", "scale", "big"),
        ("relative", "scale", -1), ("slerp", "t", 1.5), ("slerp", "t", float("nan")), ("slerp", "t", "half"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(name, hyperparameter, value):
    (problem,) = methods[name].problems({hyperparameter: value})
    assert problem.startswith(f"{hyperparameter} of method {name!r} must be") and repr(value) in problem


@few
@given(seed=seeds, shape=shapes, count=st.sampled_from([3, 5]), rank=st.integers(1, 2))
def test_relative_against_the_oracle(seed, shape, count, rank):
    stack = siblings(seed, count, shape)
    merged = compiled("relative", rank=rank, reach=0.5)(stack).merged
    assert_equal(merged, references.relative(stack, rank, reach=0.5), 1e-8)


def test_relative_of_two_is_their_mean_and_of_dependent_models_is_finite():
    a, b = siblings(3, 2, (7, 5))
    np.testing.assert_array_equal(compiled("relative")(jnp.stack([a, b])).merged, a + (b - a) / 2)
    merged = compiled("relative", rank=RANK)(jnp.stack([a, a, b])).merged  # departures are multiples of b - a
    mean, step = (2 * a + b) / 3, references.signed_svd(b - a, 1)  # a third of five
    along = np.linalg.lstsq((step[0] * step[1] @ step[2].T).reshape(-1, 1), np.ravel(merged - mean), rcond=None)[0]
    assert np.abs(np.asarray(merged - mean) - along[0] * (step[0] * step[1] @ step[2].T)).max() < 1e-9


@few
@given(seed=seeds, t=st.floats(0, 1), spread=st.sampled_from([1e-3, 0.3, 3.0]))
def test_slerp_against_the_oracle(seed, t, spread):
    a, b = siblings(seed, 2, (7, 5), spread)
    assert_equal(methods["slerp"](jnp.stack([a, b]), t=t).merged, references.slerp(np.asarray(a), np.asarray(b), t))


def test_average_with_coefficients():
    stack = siblings(4, 3, (4, 4))
    expected = np.tensordot([0.5, 0.3, 0.2], np.asarray(stack), axes=1)
    assert_equal(methods["average"](stack, coefficients=[5, 3, 2]).merged, expected, 1e-14)
