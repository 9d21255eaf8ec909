"""Matrices with chosen singular values, and the shared checks of a truncated SVD."""

import numpy as np

from references import signed_svd


def with_singular_values(m, n, values, seed=0):
    """A float64 m x n matrix with Haar singular vectors and the given singular values, zeros after them."""
    rng = np.random.default_rng(seed)
    k = len(values)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return (u * np.asarray(values, np.float64)) @ v.T


def slow_decay(k):
    """Singular values like those of a task vector: a power law, no gap anywhere."""
    positions = (np.arange(k) + 0.5) / k
    return (1 + 38.4 * positions) ** -0.6 * (1 - 0.9 * positions)


def check_truncated_svd(w, result, eps, tolerance, signed=True):
    """Everything that holds for any matrix, against float64: orthonormal, signed, close, truthful about its residual.

    eps: unit roundoff of the computation; tolerance: largest accepted residual.
    """
    w = np.asarray(w, np.float64)
    u, s, v, residual = (np.asarray(x, np.float64) for x in result)
    rank = len(s)
    reference = signed_svd(w, rank)[1]
    largest = reference[0] if reference[0] > 0 else 1.0
    identity = np.eye(rank)
    assert np.abs(u.T @ u - identity).max() < 30 * eps
    assert np.abs(v.T @ v - identity).max() < 30 * eps
    assert np.all(np.diff(s) <= 0) and s[-1] >= 0
    assert np.abs(s - reference).max() / largest < max(40 * eps, 10 * tolerance**2)
    top = np.abs(u).max(0)
    for i in range(rank if signed else 0):  # a positive entry as large as any, up to rounding
        assert u[:, i].max() >= top[i] * (1 - 40 * eps)
    measured = max(np.linalg.norm(w @ v - u * s, axis=0).max(), np.linalg.norm(w.T @ u - v * s, axis=0).max())
    assert residual <= tolerance
    assert abs(measured / largest - residual) <= 40 * eps + 0.01 * residual
