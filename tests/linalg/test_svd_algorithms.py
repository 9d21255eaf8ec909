"""Each algorithm on its own: right where it trusts itself, replaced where it should not, whatever the batching."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linalg.matrices import check_truncated_svd, slow_decay, with_singular_values
from rgsp_jax.linalg import truncated_svd
from rgsp_jax.linalg.dense import TallMatrix, multiply_transposed
from rgsp_jax.linalg.qr import cholesky_qr
from rgsp_jax.linalg.svd_algorithms import ALGORITHMS, Problem, choose_algorithms

M, N, RANK = 90, 70, 12
ITERATIVE = ("gram", "lanczos", "subspace")


@functools.cache
def attempt(algorithm, dtype):
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    return jax.jit(lambda w: ALGORITHMS[algorithm](Problem(TallMatrix(w), RANK, tolerance)))


@functools.cache
def solve(algorithm):
    return jax.jit(lambda w: truncated_svd(w, RANK, algorithm=algorithm))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_slow_decay_needs_no_help(algorithm, dtype):
    w = with_singular_values(M, N, slow_decay(N)).astype(dtype)
    factors, trusted = attempt(algorithm, dtype)(w)
    assert trusted
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    result = (factors.u, factors.s, factors.v, factors.residuals.max())
    check_truncated_svd(w, result, np.finfo(dtype).eps, tolerance, signed=False)
    if dtype == "float32":
        reference = np.linalg.svd(w.astype(np.float64), compute_uv=False)[:RANK]
        np.testing.assert_allclose(factors.s, reference, rtol=1e-6)


HARD = {
    "zero": np.zeros(0),
    "rank three": [1.0, 0.5, 0.1],
    "equal": np.ones(N),
    "many copies": [*[2.0] * 11, *slow_decay(N - 11)],
    "steep": np.logspace(0, -12, N),
    "one giant": [1e6, *slow_decay(N - 1)],
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("algorithm", ITERATIVE)
def test_hard_spectra(algorithm, name):
    w = with_singular_values(M, N, HARD[name], seed=4).astype(np.float32)
    check_truncated_svd(w, solve(algorithm)(w), np.finfo(np.float32).eps, 1e-5)


@pytest.mark.parametrize("algorithm", ITERATIVE)
def test_structured_matrices(algorithm):
    """Exact zeros and coordinate directions leave no rounding noise that could help a breakdown along."""
    diagonal = np.zeros((M, N), np.float32)
    diagonal[range(5), range(5)] = [5, 4, 4, 2, 1]
    tiled = np.tile(with_singular_values(9, 7, slow_decay(7)), (10, 10)).astype(np.float32)
    quantised = np.asarray(jnp.asarray(with_singular_values(M, N, slow_decay(N)), jnp.bfloat16), np.float32)
    for w in (diagonal, tiled, quantised, np.ones((M, N), np.float32)):
        check_truncated_svd(w, solve(algorithm)(w), np.finfo(np.float32).eps, 1e-5)


def test_gram_knows_what_the_squaring_lost():
    w = with_singular_values(M, N, np.logspace(0, -30, N)).astype(np.float32)
    assert not attempt("gram", "float32")(w).trusted
    assert attempt("gram", "float32")(jnp.zeros((M, N), jnp.float32)).trusted


def test_lanczos_knows_that_it_may_have_missed_copies():
    copies = with_singular_values(M, N, HARD["many copies"], seed=4).astype(np.float32)
    assert not attempt("lanczos", "float32")(copies).trusted
    for harmless in (np.zeros(0), [1.0, 0.5, 0.1], [2.0, 2.0, 2.0, *slow_decay(N - 3)]):
        assert attempt("lanczos", "float32")(with_singular_values(M, N, harmless).astype(np.float32)).trusted


@pytest.mark.parametrize("algorithm", ["lanczos", "subspace"])
def test_a_loose_tolerance_stops_early_and_says_so(algorithm):
    w = with_singular_values(300, 260, np.linspace(1, 0.6, 260)).astype(np.float32)
    result = truncated_svd(w, 8, algorithm=algorithm, tolerance=1e-1)
    assert result.residual > 1e-3
    check_truncated_svd(w, result, np.finfo(np.float32).eps, 1e-1)


def test_vmap_is_map_is_loop():
    ws = [with_singular_values(M, N, spectrum, seed=i) for i, spectrum in enumerate(HARD.values())]
    ws = jnp.asarray(np.stack(ws), jnp.float32)
    f = solve("gram")  # three of the six fall back
    looped = [f(w) for w in ws]
    nested = jax.tree.map(lambda x: x.reshape(6, *x.shape[2:]), jax.vmap(jax.vmap(f))(ws.reshape(2, 3, M, N)))
    mapped = jax.vmap(f)(ws)
    for batched in (mapped, jax.lax.map(f, ws), nested):
        for i, one in enumerate(looped):
            np.testing.assert_allclose(batched.s[i], one.s, atol=5e-6 * max(float(one.s[0]), 1e-30))
            check_truncated_svd(ws[i], jax.tree.map(lambda x, i=i: x[i], batched), np.finfo(np.float32).eps, 1e-5)
    # distinct singular values have unique vectors
    np.testing.assert_allclose(mapped.u[1][:, :3], looped[1].u[:, :3], atol=5e-6)


def test_fallback_under_vmap_is_one_branch_for_the_batch():
    ws = jnp.zeros((4, M, N), jnp.float32)
    text = jax.jit(jax.vmap(solve("gram"))).lower(ws).as_text()
    # were the predicate batched, the case would have become a select, and the full SVD unconditional
    assert text.count("stablehlo.case") == 1


def test_eager_is_jit():
    w = with_singular_values(M, N, slow_decay(N)).astype(np.float32)
    for eager, jitted in zip(truncated_svd(w, RANK, algorithm="gram"), solve("gram")(w), strict=True):
        np.testing.assert_allclose(eager, jitted, atol=2e-6)


def test_choice():
    def choice(m, n, rank, tolerance=1e-5):
        return choose_algorithms(Problem(TallMatrix(jax.ShapeDtypeStruct((m, n), jnp.float32)), rank, tolerance))

    assert choice(64, 64, 3) == {"cpu": "full", "default": "full"}
    assert choice(384, 384, 19) == {"cpu": "lanczos", "default": "gram"}
    assert choice(384, 384, 64) == {"cpu": "gram", "default": "gram"}
    assert choice(384, 384, 19, 1e-12) == {"cpu": "gram", "default": "gram"}
    assert choice(1024, 4096, 64) == {"cpu": "lanczos", "default": "subspace"}
    assert choice(4096, 4096, 4096) == {"cpu": "full", "default": "full"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("shape", [(400, 300), (700, 600)])
def test_accelerators_get_their_own_program(platform, shape):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    lowered = jax.jit(lambda w: truncated_svd(w, 8).s).trace(w).lower(lowering_platforms=(platform,))
    assert "lapack" not in lowered.as_text()


def test_cholesky_qr():
    rng = np.random.default_rng(0)
    orthonormal, _ = np.linalg.qr(rng.standard_normal((50, 6)))
    factorise = jax.jit(cholesky_qr)
    scaled = orthonormal * np.logspace(0, -10, 6)
    deficient = np.concatenate([orthonormal[:, :3], orthonormal[:, :3]], axis=1)
    for x in (scaled, deficient, np.zeros((50, 6))):
        x = x.astype(np.float32)
        q, r = (np.asarray(part, np.float64) for part in factorise(x))
        np.testing.assert_allclose(q.T @ q, np.eye(6), atol=2e-5)
        np.testing.assert_allclose(q @ r, x, atol=1e-6)


def test_transposed_product():
    rng = np.random.default_rng(0)
    a, x = rng.standard_normal((9, 5)), rng.standard_normal((9, 3))
    np.testing.assert_allclose(jax.jit(multiply_transposed)(a, x), a.T @ x, atol=1e-14)
    np.testing.assert_allclose(jax.vmap(multiply_transposed)(a[None], x[None])[0], a.T @ x, atol=1e-14)
    for matrix in (a, a.T):
        tall = TallMatrix(jnp.asarray(matrix))
        np.testing.assert_allclose(tall.gram(), a.T @ a, atol=1e-14)
        np.testing.assert_allclose(tall.times(np.eye(5)), a, atol=1e-14)
        np.testing.assert_allclose(tall.transpose_times(x), a.T @ x, atol=1e-14)
        np.testing.assert_allclose(tall.dense(), a)
