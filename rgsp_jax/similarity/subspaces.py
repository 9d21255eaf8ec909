"""How much the leading subspaces of two matrices share."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg import principal_angles
from rgsp_jax.linalg.dense import matmul
from rgsp_jax.types import TruncatedSVD


class SubspaceAngles(NamedTuple):
    """Principal angles in radians, ascending, and the mean squared cosine of them on either side."""

    left: Float[Array, "r"]
    """Between the spaces of outputs."""
    right: Float[Array, "r"]
    """Between the spaces of inputs."""
    left_overlap: Float[Array, ""]
    right_overlap: Float[Array, ""]


def compare_subspaces(a: TruncatedSVD, b: TruncatedSVD) -> SubspaceAngles:
    """Principal angles between the leading subspaces of two matrices [m, n] at one rank r.

    The overlap `|U_a^T U_b|_F^2 / r` is the angles' mean squared cosine. Independent uniformly random subspaces give
    r/m on the left and r/n on the right: the mean of `(u . v)^2` over a unit vector in m dimensions is 1/m.

    Raises:
        ValueError: the matrices differ in shape.
    """
    left, right = principal_angles(a.u, b.u), principal_angles(a.v, b.v)
    return SubspaceAngles(left, right, jnp.mean(jnp.cos(left) ** 2), jnp.mean(jnp.cos(right) ** 2))


def share_basis(a: TruncatedSVD, b: TruncatedSVD) -> tuple[TruncatedSVD, TruncatedSVD]:
    """Both SVDs written in orthonormal bases of what their left and right vectors span together, at most 2r each.

    Inner products between any of the vectors stay as they are, and with them angles and distances.

    Raises:
        ValueError: the matrices differ in shape.
    """
    if a.u.shape != b.u.shape or a.v.shape != b.v.shape:
        raise ValueError(f"share_basis wants matrices of one shape, got factors {a.u.shape}, {a.v.shape}, {b.u.shape}")

    def rewrite(x: Array, y: Array) -> tuple[Array, Array]:
        basis, _ = jnp.linalg.qr(jnp.concatenate([x, y], axis=1))
        return matmul(basis.T, x), matmul(basis.T, y)

    (u_a, u_b), (v_a, v_b) = rewrite(a.u, b.u), rewrite(a.v, b.v)
    return a._replace(u=u_a, v=v_a), b._replace(u=u_b, v=v_b)
