"""Derivatives of truncated_svd against float64 finite differences of the NumPy oracle, and where there are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linalg.matrices import slow_decay, with_singular_values
from references import directional_derivative, signed_svd
from rgsp_jax.linalg import truncated_svd

SHAPES = [(12, 9, 4), (9, 12, 4), (8, 8, 8), (12, 9, 9), (9, 12, 9)]


def triple(w, rank, active=None):
    return truncated_svd(w, rank, active_rank=active)[:3]


def probe(triple, cotangents):
    return sum(jnp.sum(c * x) for c, x in zip(cotangents, triple, strict=True))


@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_forward_and_reverse(m, n, rank):
    rng = np.random.default_rng(5)
    w, dw = with_singular_values(m, n, slow_decay(min(m, n))), rng.standard_normal((m, n))
    expected = [directional_derivative(lambda w, i=i: signed_svd(w, rank)[i], w, dw, 1e-4) for i in range(3)]
    primal, tangent = jax.jvp(functools.partial(triple, rank=rank), (w,), (dw,))
    for mine, reference in zip(tangent, expected, strict=True):
        np.testing.assert_allclose(mine, reference, atol=2e-7 * np.abs(reference).max())
    for mine, plain in zip(primal, triple(w, rank), strict=True):
        np.testing.assert_array_equal(mine, plain)
    cotangents = [rng.standard_normal(x.shape) for x in expected]
    gradient = jax.grad(lambda w: probe(triple(w, rank), cotangents))(w)
    wanted = sum(np.sum(c * x) for c, x in zip(cotangents, expected, strict=True))
    np.testing.assert_allclose(np.sum(gradient * dw), wanted, rtol=1e-6)


def test_reverse_is_the_transpose_of_forward():
    rng = np.random.default_rng(6)
    w, dw = with_singular_values(80, 60, slow_decay(60)), rng.standard_normal((80, 60))
    f = jax.jit(functools.partial(triple, rank=10))
    primal, forward = jax.jvp(f, (w,), (dw,))
    cotangents = tuple(rng.standard_normal(x.shape) for x in primal)
    (reverse,) = jax.vjp(f, w)[1](cotangents)
    np.testing.assert_allclose(np.sum(reverse * dw), probe(forward, cotangents), rtol=1e-10)
    expected = directional_derivative(lambda w: signed_svd(w, 10)[0], w, dw, 1e-5)
    np.testing.assert_allclose(forward[0], expected, atol=1e-6 * np.abs(expected).max())


def test_float32_follows_float64():
    rng = np.random.default_rng(7)
    w, dw = with_singular_values(80, 60, slow_decay(60)), rng.standard_normal((80, 60))
    f = functools.partial(triple, rank=10)
    _, wide = jax.jvp(f, (w,), (dw,))
    _, narrow = jax.jvp(f, (w.astype(np.float32),), (dw.astype(np.float32),))
    for mine, reference in zip(narrow, wide, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, reference, atol=2e-3 * float(jnp.abs(reference).max()))


def test_second_derivative():
    rng = np.random.default_rng(8)
    w, dw = with_singular_values(9, 7, slow_decay(7)), rng.standard_normal((9, 7))
    cotangents = [rng.standard_normal(shape) for shape in ((9, 3), (3,), (7, 3))]
    gradient = jax.jit(jax.grad(lambda w: probe(triple(w, 3), cotangents)))
    expected = directional_derivative(lambda w: np.asarray(gradient(w)), w, dw, 1e-4)
    curvature = jax.jvp(gradient, (w,), (dw,))[1]
    np.testing.assert_allclose(curvature, expected, atol=1e-7 * np.abs(expected).max())


def test_masked_derivative_is_that_of_the_smaller_rank():
    rng = np.random.default_rng(9)
    w, dw = with_singular_values(12, 9, slow_decay(9)), rng.standard_normal((12, 9))
    masked = jax.jvp(functools.partial(triple, rank=6, active=3), (w,), (dw,))[1]
    smaller = jax.jvp(functools.partial(triple, rank=3), (w,), (dw,))[1]
    for mine, reference in zip(masked, smaller, strict=True):
        np.testing.assert_allclose(mine[..., :3], reference, atol=1e-10)
        assert not np.any(mine[..., 3:])
    cotangents = [rng.standard_normal(shape) for shape in ((12, 6), (6,), (9, 6))]
    mine = jax.grad(lambda w: probe(triple(w, 6, 3), cotangents))(w)
    reference = jax.grad(lambda w: probe(triple(w, 3), [c[..., :3] for c in cotangents]))(w)
    np.testing.assert_allclose(mine, reference, atol=1e-10)


DEGENERATE = {
    "zero": np.zeros(0),
    "equal": np.ones(6),
    "rank two": [1.0, 0.5],
    "pairs": [2.0, 2.0, 1.0, 1.0, 0.0, 0.0],
    "equal across the cut": [3.0, 1.0, 1.0, 1.0, 1.0, 0.5],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [3, 6])
def test_finite_where_singular_values_coincide(rank, dtype):
    gradient = jax.jit(jax.grad(lambda w: sum(jnp.sum(jnp.sin(x)) for x in triple(w, rank))))
    ws = [with_singular_values(8, 6, values) for values in DEGENERATE.values()]
    for w in (*ws, np.eye(8, 6), np.diag([2.0, 2, 1, 1, 0, 0])[[0, 1, 2, 3, 4, 5, 5, 5]]):
        assert np.all(np.isfinite(gradient(w.astype(dtype))))


def test_basis_free_functions_of_repeated_values():
    """Projectors, the polar factor and sums over the values do not see the basis chosen within a repeated value."""
    rng = np.random.default_rng(10)
    w, dw = with_singular_values(9, 7, [3, 3, 3, 1, 1, 0.5, 0.2]), rng.standard_normal((9, 7))

    def basis_free(u, s, v):
        return u @ u.T, v @ v.T, u @ v.T, (s**3).sum()

    _, tangents = jax.jvp(lambda w: basis_free(*triple(w, 3)), (w,), (dw,))
    for i, tangent in enumerate(tangents):
        expected = directional_derivative(lambda w, i=i: basis_free(*signed_svd(w, 3))[i], w, dw, 1e-4)
        np.testing.assert_allclose(tangent, expected, atol=1e-8)
    # nearly repeated values keep every term
    w = with_singular_values(9, 7, [3 + 1e-5, 3, 3 - 1e-5, 1, 1, 0.5, 0.2])
    _, tangent = jax.jvp(lambda w: (lambda u, s, v: (u * s[None, :]) @ v.T)(*triple(w, 3)), (w,), (dw,))
    expected = directional_derivative(lambda w: (lambda u, s, v: (u * s) @ v.T)(*signed_svd(w, 3)), w, dw, 1e-4)
    np.testing.assert_allclose(tangent, expected, atol=1e-7)


def test_full_rank_reconstruction_has_the_identity_as_derivative():
    rng = np.random.default_rng(11)
    w, dw = with_singular_values(9, 7, slow_decay(7)), rng.standard_normal((9, 7))
    _, tangent = jax.jvp(lambda w: (lambda u, s, v: (u * s[None, :]) @ v.T)(*triple(w, 7)), (w,), (dw,))
    np.testing.assert_allclose(tangent, dw, atol=1e-10)


def test_batched_gradients_are_the_looped_ones():
    rng = np.random.default_rng(12)
    ws = jnp.stack(
        [jnp.asarray(with_singular_values(12, 9, slow_decay(9), seed=i)) for i in range(2)] + [jnp.zeros((12, 9))]
    )
    cotangents = [rng.standard_normal(shape) for shape in ((12, 4), (4,), (9, 4))]
    gradient = jax.jit(jax.grad(lambda w: probe(triple(w, 4), cotangents)))
    looped = jnp.stack([gradient(w) for w in ws])
    np.testing.assert_allclose(jax.vmap(gradient)(ws), looped, atol=1e-9)
    np.testing.assert_allclose(jax.lax.map(gradient, ws), looped, atol=1e-9)


def test_sixteen_bit_gradients_keep_their_dtype():
    w = jnp.asarray(with_singular_values(12, 9, slow_decay(9)), jnp.bfloat16)
    gradient = jax.grad(lambda w: jnp.sum(truncated_svd(w, 4).u[0]))(w)
    reference = jax.grad(lambda w: jnp.sum(truncated_svd(w, 4).u[0]))(w.astype(jnp.float32))
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient, reference.astype(jnp.bfloat16))
