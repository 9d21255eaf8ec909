"""Step 6 of RGSP-TEFM: the fused task vector and the merged matrix (SPEC.md section 1)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.rgsp.alignment import PRECISION


def project(
    u: Float[Array, "m r"], change: Float[Array, "r"], v: Float[Array, "n r"], projection: str
) -> Float[Array, "m n"]:
    """`tau = U diag(dS) U^T` as written ("one_sided", square matrices), `U diag(dS) V^T` otherwise (R7)."""
    right = u if projection == "one_sided" and u.shape[0] == v.shape[0] else v
    return jnp.matmul(u * change[None, :], right.T, precision=PRECISION)


def fusion_coefficient(d_bar: Float[Array, ""], total_importance: Float[Array, ""]) -> Float[Array, ""]:
    """`lambda = sigmoid(-d) * (mean or sum of TFI)` (SPEC step 6)."""
    return jax.nn.sigmoid(-d_bar) * total_importance


def fuse(
    centre: Float[Array, "m n"],
    difference: Float[Array, "m n"],
    tau: Float[Array, "m n"],
    on_tau: Array | float,
    on_rest: Array | float,
) -> Float[Array, "m n"]:
    """The general family `W* = centre + a tau + b ((B - A) - tau)`; the source has a = lambda, b = 1 - lambda."""
    return centre + on_tau * tau + on_rest * (difference - tau)
