import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linalg.matrices import with_singular_values
from references import directional_derivative
from rgsp_jax.linalg import polar_factor

SHAPES = [(12, 7), (7, 12), (8, 8)]
factor = jax.jit(polar_factor)


def partial_isometry(x, eps):
    u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return (u * (s > 64 * eps * s[0])) @ vt if s[0] > 0 else np.zeros(x.shape)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(SHAPES),
    rank=st.integers(1, 7),
    condition=st.sampled_from([1.0, 3.0, 100.0]),
    scale=st.sampled_from([1.0, 1e-30, 1e30]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_against_the_singular_vectors(shape, rank, condition, scale, dtype):
    x = (scale * with_singular_values(*shape, np.geomspace(1, 1 / condition, rank), seed=rank)).astype(dtype)
    eps = np.finfo(dtype).eps
    y = np.asarray(factor(x))
    assert y.dtype == dtype
    # a rank-deficient x is only known up to rounding, and so are the directions that it drops
    np.testing.assert_allclose(
        y, partial_isometry(x, eps), atol=(1 if rank >= min(shape) else 4 * condition) * 60 * eps
    )
    gram = (y.T @ y if shape[0] >= shape[1] else y @ y.T).astype(np.float64)
    np.testing.assert_allclose(gram @ gram, gram, atol=8 * eps)
    np.testing.assert_allclose(np.trace(gram), min(rank, *shape), rtol=1e-5)


def test_accuracy_on_well_conditioned_input():
    x = with_singular_values(12, 7, np.geomspace(1, 1e-2, 7))
    np.testing.assert_allclose(factor(x), partial_isometry(x, 2e-16), atol=1e-11)
    y = np.asarray(factor(x.astype(np.float32)), np.float64)
    np.testing.assert_allclose(y.T @ y, np.eye(7), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_sixteen_bit_input_computes_in_float32(dtype):
    x = jnp.asarray(with_singular_values(12, 7, np.ones(7)), dtype)
    y = polar_factor(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, partial_isometry(x, 1e-7), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [np.geomspace(1, 0.1, 7), np.ones(7), [2, 2, 2, 1, 1, 0.5, 0.5]])
def test_derivatives(shape, values):
    rng = np.random.default_rng(1)
    values = [*values, values[-1]][: min(shape)]
    x, dx, c = with_singular_values(*shape, values), rng.standard_normal(shape), rng.standard_normal(shape)
    expected = directional_derivative(lambda x: partial_isometry(x, 2e-16), x, dx)
    tangent = jax.jvp(factor, (x,), (dx,))[1]
    np.testing.assert_allclose(tangent, expected, atol=1e-8)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(c * factor(x))))(x)
    np.testing.assert_allclose(np.sum(gradient * dx), np.sum(c * expected), atol=1e-7)


def test_second_derivative():
    rng = np.random.default_rng(1)
    x, dx, c = with_singular_values(8, 5, [2, 2, 1, 1, 0.5]), rng.standard_normal((8, 5)), rng.standard_normal((8, 5))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(c * factor(x))))
    expected = directional_derivative(lambda x: np.asarray(gradient(x)), x, dx, 1e-4)
    np.testing.assert_allclose(jax.jvp(gradient, (x,), (dx,))[1], expected, atol=1e-8)


def test_derivative_at_fixed_rank():
    rng = np.random.default_rng(3)
    left, dleft, right = rng.standard_normal((10, 3)), rng.standard_normal((10, 3)), rng.standard_normal((6, 3))
    expected = directional_derivative(lambda a: partial_isometry(a @ right.T, 2e-16), left, dleft)
    tangent = jax.jvp(lambda a: factor(a @ right.T), (left,), (dleft,))[1]
    np.testing.assert_allclose(tangent, expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_and_non_finite(dtype):
    zero = jnp.zeros((12, 7), dtype)
    assert not np.any(factor(zero))
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(factor(x))))
    assert not np.any(gradient(zero))
    deficient = jnp.asarray(with_singular_values(12, 7, [1, 1, 0.5]), dtype)
    assert np.all(np.isfinite(gradient(deficient)))
    for bad in (np.nan, np.inf):
        assert np.all(np.isnan(factor(zero.at[2, 3].set(bad))))


def test_batches_and_eager_agree():
    xs = jnp.stack([jnp.asarray(with_singular_values(12, 7, v, seed=i)) for i, v in enumerate([np.ones(7), [1, 0.1]])])
    batched = jax.vmap(factor)(xs)
    np.testing.assert_allclose(batched, jax.lax.map(factor, xs), atol=1e-14)
    np.testing.assert_allclose(batched, jnp.stack([polar_factor(x) for x in xs]), atol=1e-14)


def test_only_matrices_of_floats():
    for bad in (jnp.zeros(3), jnp.zeros((2, 2, 2)), jnp.zeros((2, 2), int)):
        with pytest.raises(ValueError, match="matrix of floats"):
            polar_factor(bad)
