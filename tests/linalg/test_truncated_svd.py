"""Values of truncated_svd as a caller sees them: any shape, dtype and rank deficiency, masks, batches, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linalg.matrices import check_truncated_svd, slow_decay, with_singular_values
from references import signed_svd
from rgsp_jax.linalg import drop_null_directions, truncated_svd
from rgsp_jax.linalg import svd as svd_module

TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(24, 16, 5), (16, 24, 5), (12, 12, 12), (1, 1, 1), (40, 1, 1)]),
    dtype=st.sampled_from(["float32", "float64", "bfloat16", "float16"]),
    values=st.sampled_from(["slow", "equal", "steep", "pairs"]),
    deficiency=st.integers(0, 16),
    scale=st.sampled_from([1.0, 2.0**-12, 2.0**12]),
    seed=st.integers(0, 3),
)
def test_any_matrix(shape, dtype, values, deficiency, scale, seed):
    m, n, rank = shape
    k = min(m, n)
    spectrum = {
        "slow": slow_decay(k),
        "equal": np.ones(k),
        "steep": np.logspace(0, -9, k),
        "pairs": np.repeat(slow_decay(k), 2)[:k],
    }[values]
    w = jnp.asarray(scale * with_singular_values(m, n, spectrum[: max(k - deficiency, 0)], seed=seed), dtype)
    result = truncated_svd(w, rank)
    computed = "float64" if dtype == "float64" else "float32"
    assert {x.dtype.name for x in result} == {computed}
    check_truncated_svd(w, result, float(jnp.finfo(computed).eps), TOLERANCE[computed])


@pytest.mark.parametrize(("m", "n"), [(24, 16), (16, 24)])
def test_vectors_against_the_oracle(m, n):
    w = with_singular_values(m, n, slow_decay(16))
    for mine, reference in zip(truncated_svd(w, 5), signed_svd(w, 5), strict=False):
        np.testing.assert_allclose(mine, reference, atol=1e-12)
    for mine, reference in zip(truncated_svd(w.astype(np.float32), 5), signed_svd(w, 5), strict=False):
        np.testing.assert_allclose(mine, reference, atol=5e-6)


def test_ties_between_largest_entries_go_to_the_first():
    w = jnp.asarray([[0.0, 3.0], [0.0, -3.0], [0.0, -3.0]], jnp.float32)
    u, _, v, _ = truncated_svd(w, 1)
    np.testing.assert_allclose(u[:, 0], np.array([1, -1, -1]) / np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(v[:, 0], [0, 1], atol=1e-6)
    np.testing.assert_allclose(truncated_svd(-w, 1).u, u, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales_in_float32(scale):
    w = with_singular_values(24, 16, slow_decay(16)).astype(np.float32)
    plain, scaled = truncated_svd(w, 5), truncated_svd(np.float32(scale) * w, 5)
    np.testing.assert_allclose(scaled.s, np.float32(scale) * np.asarray(plain.s), rtol=1e-6)
    np.testing.assert_allclose(scaled.u, plain.u, atol=5e-6)


def test_masks_are_smaller_ranks():
    w = with_singular_values(24, 16, slow_decay(16))
    full = truncated_svd(w, 5)
    for active in (0, 1, 3, 5):
        masked = truncated_svd(w, 5, active_rank=active)
        for own, unmasked in zip(masked[:3], full[:3], strict=True):
            np.testing.assert_array_equal(own[..., :active], unmasked[..., :active])
            assert not np.any(own[..., active:])
        assert masked.residual <= full.residual
    for own, reference in zip(truncated_svd(w, 5, active_rank=3)[:3], truncated_svd(w, 3)[:3], strict=True):
        np.testing.assert_allclose(own[..., :3], reference, atol=1e-12)


def test_a_changing_mask_compiles_once():
    w = with_singular_values(24, 16, slow_decay(16)).astype(np.float32)
    truncated_svd(w, 6)
    compiled = svd_module._masked_svd._cache_size()
    for active in (1, 2, jnp.asarray(3), np.int64(4), None):
        truncated_svd(w, 6, active_rank=active)
    assert svd_module._masked_svd._cache_size() == compiled
    traces = 0

    @jax.jit
    def masked(active):
        nonlocal traces
        traces += 1
        return truncated_svd(w, 6, active_rank=active).s

    assert [int((masked(jnp.asarray(k)) > 0).sum()) for k in range(7)] == list(range(7))
    assert traces == 1


def test_one_factorisation_serves_all_masks():
    w = jnp.asarray(with_singular_values(24, 16, slow_decay(16)))
    over_masks = jax.vmap(lambda k: truncated_svd(w, 6, active_rank=k))
    counts = jnp.arange(1, 7)
    shapes = [
        variable.aval.shape
        for equation in _equations(jax.make_jaxpr(over_masks)(counts).jaxpr)
        if equation.primitive.name == "svd"
        for variable in equation.invars
    ]
    assert shapes and all(shape == (24, 16) for shape in shapes)
    for k, s in zip(counts, over_masks(counts).s, strict=True):
        np.testing.assert_allclose(s[:k], signed_svd(w, int(k))[1], rtol=1e-12)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: isinstance(x, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from _equations(value.jaxpr)
            elif isinstance(value, jax.extend.core.Jaxpr):
                yield from _equations(value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_gives_nan(bad):
    w = with_singular_values(24, 16, slow_decay(16)).astype(np.float32)
    w[3, 4] = bad
    result = truncated_svd(w, 5)
    assert all(np.all(np.isnan(x)) for x in result)


def test_float32_mode():
    w = with_singular_values(24, 16, slow_decay(16)).astype(np.float32)
    with jax.enable_x64(False):
        result = truncated_svd(w, 5, active_rank=4)
        gradient = jax.grad(lambda w: jnp.sum(truncated_svd(w, 5).u))(w)
    assert gradient.dtype == np.float32 and np.all(np.isfinite(gradient))
    np.testing.assert_allclose(result.s[:4], signed_svd(w, 4)[1], rtol=1e-6)


@pytest.mark.parametrize("rank", [0, -1, 17, True, 2.0])
def test_ranks_out_of_range(rank):
    with pytest.raises(ValueError, match=r"rank must be an integer in 1\.\.16"):
        jax.jit(lambda w: truncated_svd(w, rank))(jnp.zeros((24, 16)))


def test_other_refusals():
    w = jnp.zeros((24, 16))
    with pytest.raises(ValueError, match="tolerance"):
        truncated_svd(w, 2, tolerance=0.0)
    with pytest.raises(ValueError, match="auto, full, gram, lanczos, subspace"):
        truncated_svd(w, 2, algorithm="magic")
    for bad in (jnp.zeros(3), jnp.zeros((2, 3, 4)), jnp.zeros((3, 4), int)):
        with pytest.raises(ValueError, match="matrix of floats"):
            truncated_svd(bad, 1)
    with pytest.raises(ValueError, match="lanczos"):
        truncated_svd(w, 16, algorithm="lanczos")


def test_null_directions_are_dropped():
    """By the largest singular value, or by the size of what a matrix is a difference of; a zero matrix keeps none."""
    eps = float(np.finfo(np.float32).eps)
    w = np.zeros((6, 5), np.float32)
    w[range(4), range(4)] = [1, 0.5, 100 * eps, 10 * eps]
    svd = truncated_svd(w, 5)
    kept = drop_null_directions(svd)
    np.testing.assert_array_equal(kept.s, [1, 0.5, svd.s[2], 0, 0])
    np.testing.assert_array_equal(np.any(kept.u != 0, axis=0), [True, True, True, False, False])
    np.testing.assert_array_equal(kept.v[:, :3], svd.v[:, :3])
    both = jax.tree.map(lambda x: jnp.stack([x, x]), svd)
    kept = drop_null_directions(both, jnp.asarray([0.0, 2.0], jnp.float32))
    np.testing.assert_array_equal(np.any(kept.v != 0, axis=1).sum(1), [3, 2])
    assert not any(np.any(x) for x in drop_null_directions(truncated_svd(jnp.zeros((6, 5)), 5))[:3])
