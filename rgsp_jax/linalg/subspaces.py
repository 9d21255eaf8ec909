"""How much two subspaces of one space share."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rgsp_jax.linalg.dense import matmul, project_out, widen
from rgsp_jax.linalg.qr import tsqr
from rgsp_jax.linalg.rows import ROWS, is_divided, map_parts


def subspace_overlap(
    u: Float[Array, "m r"], v: Float[Array, "m q"], *, active_rank: int | Int[Array, ""] | None = None
) -> Float[Array, ""]:
    """Mean squared cosine of the principal angles, `|u^T v|_F^2 / r`: 0 is orthogonal, 1 the same subspace.

    Args:
      u, v: orthonormal columns; columns masked to zero take no part.
      active_rank: how many columns are not masked (of the narrower one), which divides; None is min(r, q), none masked.

    Raises:
      ValueError: u and v do not live in the same space.
    """
    u, v = _check_pair(u, v)
    cosines = matmul(u.T, v)
    count = min(u.shape[1], v.shape[1]) if active_rank is None else active_rank
    count = jnp.asarray(count).astype(cosines.dtype)
    return jnp.sum(cosines * cosines) / jnp.maximum(count, 1)


def principal_angles(u: Float[Array, "m r"], v: Float[Array, "m q"]) -> Float[Array, "k"]:
    """Principal angles between span u and span v, k = min(r, q), ascending, in radians.

    Small angles keep their digits (the sines are measured, not derived from the cosines). For reports: derivatives
    are not defined where angles coincide; `subspace_overlap` has them everywhere.

    Args:
      u, v: orthonormal columns; every column masked to zero counts as orthogonal to everything.

    Raises:
      ValueError: u and v do not live in the same space.

    Bjorck & Golub, Math. Comp. 27 (1973).
    """
    u, v = _check_pair(u, v)
    if u.shape[1] < v.shape[1]:
        u, v = v, u
    cosines = jnp.linalg.svd(matmul(u.T, v), compute_uv=False)
    masked = jnp.diag(jnp.all(v == 0, axis=0).astype(v.dtype))
    outside = project_out(u, v)
    if is_divided(*outside.shape) and outside.shape[0] >= outside.shape[1]:
        (outside,) = map_parts(lambda part: tsqr(part, ROWS)[1:], outside, long=(False,))
    sines = jnp.linalg.svd(jnp.concatenate([outside, masked]), compute_uv=False)
    return jnp.arctan2(sines[::-1], cosines)


def _check_pair(u: Array, v: Array) -> tuple[Array, Array]:
    u, v = jnp.asarray(u), jnp.asarray(v)
    if u.ndim != 2 or v.ndim != 2 or u.shape[0] != v.shape[0]:
        raise ValueError(
            f"two sets of columns of one length are compared, got shapes {list(u.shape)} and {list(v.shape)}"
        )
    return widen(u), widen(v)
