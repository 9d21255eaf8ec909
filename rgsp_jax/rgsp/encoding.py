"""Steps 4 and 5 of RGSP-TEFM: the code psi, the importance TFI and the overlap TOS (SPEC.md section 1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

TINY = 1e-12
"""Floor of TOS before the coupling is weighed by it (SPEC step 5)."""


class Encoding(NamedTuple):
    """Code of the change between two spectra, per direction and summed (SPEC R4)."""

    p: Float[Array, "r"]
    s_bar: Float[Array, ""]
    h_bar: Float[Array, ""]
    d_bar: Float[Array, ""]
    psi: Float[Array, "r 3"]


def encode(change: Float[Array, "r"], local_cost: Float[Array, "r"], active: Bool[Array, "r"]) -> Encoding:
    """`p = softmax(|dS|)`, `psi[k] = (p_k dS_k, -p_k ln p_k, d_k)`; the rows of psi sum to (s, h, d) (SPEC step 4).

    `local_cost[k]` is the share of the transport cost that row k of the coupling carries.
    """
    p = jax.nn.softmax(jnp.abs(change), where=active)
    entropy = -p * jnp.log(jnp.where(active, jnp.maximum(p, jnp.finfo(p.dtype).tiny), 1.0))
    psi = jnp.stack([p * change, entropy, jnp.where(active, local_cost, 0.0)], axis=1)
    s_bar, h_bar, d_bar = psi.sum(0)
    return Encoding(p, s_bar, h_bar, d_bar, psi)


def importance(code: Encoding, eps: float = 1e-8) -> Float[Array, "r"]:
    """`TFI_i = p_i s (1 - d) / (h + eps)` (SPEC step 5)."""
    return code.p * code.s_bar * (1 - code.d_bar) / (code.h_bar + eps)


def overlap_score(code: Encoding, beta: Float[Array, ""] | float) -> Float[Array, "r r"]:
    """`TOS_kp = cos(psi[k], psi[p]) exp(-beta d)` (SPEC step 5)."""
    square = jnp.sum(code.psi**2, axis=1, keepdims=True)
    # Masked before the root: the derivative of a norm at zero is not finite.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    unit = code.psi / norm
    cosine = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
    return cosine * jnp.exp(-jnp.asarray(beta, cosine.dtype) * code.d_bar)


def adjust_coupling(
    plan: Float[Array, "r r"], score: Float[Array, "r r"], active: Bool[Array, "r"]
) -> Float[Array, "r r"]:
    """`pi <- pi * max(TOS, tiny)`, rows divided by their sum (SPEC R5); masked rows are zero."""
    weighed = plan * jnp.maximum(score, TINY)
    total = weighed.sum(1, keepdims=True)
    return jnp.where(active[:, None], weighed / jnp.where(total > 0, total, 1.0), 0.0)
