"""Whether enough inputs were seen: how much the leading subspace of their second moments still moves."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import matmul, widen
from rgsp_jax.linalg.subspaces import subspace_overlap

LEADING, OVERSAMPLING, ITERATIONS = 32, 16, 8


def count_leading(n: int) -> int:
    """How many leading directions of inputs n wide are compared: LEADING, of narrow inputs a quarter."""
    return max(1, min(LEADING, n // 4))


def leading_subspace(second: Float[Array, "n n"], size: int | None = None) -> Float[Array, "n k"]:
    """Orthonormal basis near the leading k eigenvectors, by subspace iteration from a fixed start.

    Cheap (a few products with k + 16 columns) and as exact as an estimate of movement needs: directions whose
    eigenvalue is within some percent of the k-th may be mixed. A covariance of zero gives any basis.

    Args:
      second: symmetric, positive semi-definite.
      size: k; `count_leading(n)` by default.
    """
    c = widen(second)
    n = c.shape[0]
    k = count_leading(n) if size is None else size
    start = jax.random.normal(jax.random.key(0), (n, min(n, k + OVERSAMPLING)), c.dtype)
    basis = jax.lax.fori_loop(0, ITERATIONS, lambda _, x: orthonormalise(matmul(c, x)), orthonormalise(start))
    core = matmul(basis.T, matmul(c, basis))
    _, vectors = jnp.linalg.eigh((core + core.T) / 2)
    return matmul(basis, vectors[:, ::-1][:, :k])


def leading_rows(factor: Float[Array, "l n"]) -> Float[Array, "n k"]:
    """The same of a sketch, whose rows are orthogonal and of descending norm; zero columns where it has too few."""
    rows = factor[: count_leading(factor.shape[1])]
    lengths = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / jnp.where(lengths > 0, lengths, 1)).T


def orthonormalise(x: Float[Array, "n q"]) -> Float[Array, "n q"]:
    """Orthonormal columns of nearly the same span, from Gram matrices: XLA's QR takes a hundred times as long on CPUs.

    What rounding hides of nearly dependent columns grows back with the next product of a subspace iteration.
    """
    floor = x.shape[0] * jnp.finfo(x.dtype).eps
    for _ in range(3):
        lengths = jnp.linalg.norm(x, axis=0)
        x = x / jnp.where(lengths > 0, lengths, 1)[None, :]
        values, vectors = jnp.linalg.eigh(matmul(x.T, x))
        x = matmul(x, vectors) / jnp.sqrt(jnp.maximum(values, jnp.asarray(floor, x.dtype)))[None, :]
    return x


def subspace_movement(before: Float[Array, "n k"], after: Float[Array, "n k"]) -> Float[Array, ""]:
    """Mean squared sine of the principal angles between two subspaces: 0 has not moved, 1 shares nothing."""
    return jnp.clip(1 - subspace_overlap(before, after), 0, 1)
