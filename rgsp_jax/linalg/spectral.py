"""Small symmetric problems by their eigenvectors: inverse square roots, two-sided linear systems.

Derivatives, forward and reverse, of any order, are finite at equal eigenvalues: eigenvectors only ever solve a linear
equation, they are never differentiated themselves.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import matmul, scale_columns, widen


def inverse_square_root(h: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """`h^(-1/2)` of a symmetric positive definite matrix.

    Computed in float32 for 16-bit and float32 input. The caller bounds the condition: eigenvalues below eps of the
    largest count as that.

    Raises:
      ValueError: h is not a square matrix.

    Higham, Functions of Matrices (SIAM 2008), chapter 6.
    """
    return _inverse_root(widen(_check_square(h)))


@jax.custom_jvp
def _inverse_root(h: Array) -> Array:
    values, q = _eigenvectors(h)
    return _symmetric(matmul(scale_columns(q, 1 / jnp.sqrt(values)), q.T))


@_inverse_root.defjvp
def _inverse_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """`r dr + dr r = -r^2 dh r^2`, of `r r = h^-1`."""
    (h,), (dh,) = primals, tangents
    root = _inverse_root(h)
    values, q = _eigenvectors(lax.stop_gradient(h))
    square = matmul(root, root)
    right = -matmul(square, matmul(_symmetric(dh), square))
    inverse = 1 / jnp.sqrt(values)
    return root, _solve_two_sided(root, root, right, (inverse, q), (inverse, q))


def solve_sylvester(a: Float[Array, "m m"], b: Float[Array, "n n"], right: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """x of `a x + x b = right`, a and b symmetric with `a_i + b_j > 0` for all their eigenvalues.

    The one minimiser of `|a^(1/2) x|^2 + |x b^(1/2)|^2 - 2 <x, right>`. Computed in float32 for 16-bit and float32.

    Raises:
      ValueError: a or b is not square, or they do not fit the right side.
    """
    a, b, right = widen(_check_square(a)), widen(_check_square(b)), widen(jnp.asarray(right))
    if right.shape != (a.shape[0], b.shape[0]):
        raise ValueError(f"a of {list(a.shape)} and b of {list(b.shape)} do not fit a right side {list(right.shape)}")
    first = jnp.linalg.eigh(lax.stop_gradient(a))
    # One after the other: two batched decompositions at a time can wait for each other's threads for ever on a CPU.
    later, first = lax.optimization_barrier((lax.stop_gradient(b), first))
    return _solve_two_sided(a, b, right, first, jnp.linalg.eigh(later))


def _solve_two_sided(
    a: Array, b: Array, right: Array, left_pairs: tuple[Array, Array], right_pairs: tuple[Array, Array]
) -> Array:
    (p, u), (q, v) = left_pairs, right_pairs
    total = p[:, None] + q[None, :]

    def product(x: Array) -> Array:
        return matmul(a, x) + matmul(x, b)

    def solve(_, y: Array) -> Array:
        return matmul(u, matmul(matmul(matmul(u.T, y), v) / total, v.T))

    return lax.custom_linear_solve(product, right, solve, symmetric=True)


def _eigenvectors(h: Array) -> tuple[Array, Array]:
    values, q = jnp.linalg.eigh(h)
    return jnp.maximum(values, values[-1] * float(jnp.finfo(h.dtype).eps)), q


def _symmetric(x: Array) -> Array:
    return (x + x.T) / 2


def _check_square(x: Array) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 2 or x.shape[0] != x.shape[1]:
        raise ValueError(f"a square matrix is taken, got shape {list(x.shape)}")
    return x
