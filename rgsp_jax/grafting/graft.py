"""Grafts: what the recipient's inputs do not feel is taken from the donor (SPEC.md section 4)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.grafting.projector import NullSpaceProjector
from rgsp_jax.linalg.dense import matmul, widen


def graft(
    recipient: Float[Array, "m n"], donor: Float[Array, "m n"], projector: NullSpaceProjector
) -> Float[Array, "m n"]:
    """`W* = A + (B - A) P`.

    With a hard projector the nearest matrix to B that keeps `W* K = A K` on the protected inputs K; with a soft one
    the minimiser of `|W - B|^2 + |(W - A) C^(1/2)|^2 / (rho mu)`.

    Args:
      recipient, donor: A and B [m, n] (outputs x inputs), fine-tuned from one ancestor.
      projector: of A's inputs, n wide.

    Raises:
      ValueError: shapes that do not fit.
    """
    n = projector.basis.shape[0]
    if recipient.shape != donor.shape or recipient.ndim != 2 or recipient.shape[1] != n:
        raise ValueError(
            f"recipient {list(recipient.shape)} and donor {list(donor.shape)} must be equal, with {n} columns as the"
            " projector has rows"
        )
    a, b = widen(recipient), widen(donor)
    return a + projector.project(b - a)


def ridge_graft(
    recipient: Float[Array, "m n"],
    donor: Float[Array, "m n"],
    covariance: Float[Array, "n n"],
    ridge: float | Float[Array, ""] = 3.0,
) -> Float[Array, "m n"]:
    """The soft graft `A + rho mu (B - A) (C + rho mu I)^-1` by one Cholesky factor: no eigenvectors.

    Several times cheaper than the projector for one ridge, and differentiable in everything, C included, at any
    spectrum. A covariance of zero gives the donor.

    Args:
      recipient, donor: A and B [m, n].
      covariance: C [n, n], symmetric, positive semi-definite.
      ridge: rho, in units of the mean eigenvalue mu, above 0.
    """
    a, b = widen(recipient), widen(donor)
    c = widen(covariance)
    n = c.shape[0]
    shift = jnp.asarray(ridge, c.dtype) * jnp.trace(c) / n
    shift = jnp.where(shift > 0, shift, 1)
    shifted = c / shift + jnp.eye(n, dtype=c.dtype)
    factor = jax.scipy.linalg.cho_factor(shifted)
    change = (b - a).T
    solved = jax.scipy.linalg.cho_solve(factor, change)
    # One step of refinement: with a small ridge the condition number eats float32's digits.
    solved += jax.scipy.linalg.cho_solve(factor, change - matmul(shifted, solved))
    return a + solved.T


def output_change(
    recipient: Float[Array, "m n"],
    donor: Float[Array, "m n"],
    merged: Float[Array, "m n"],
    inputs: Float[Array, "rows n"],
) -> Float[Array, ""]:
    """`|(W* - A) K| / |(B - A) K|` on rows of inputs K: the share of the donor's disturbance that is left.

    Zero where the donor changes nothing there. Rows of zeros do not count.
    """
    a = widen(recipient)
    k = widen(inputs).T
    left = jnp.linalg.norm(matmul(widen(merged) - a, k))
    whole = jnp.linalg.norm(matmul(widen(donor) - a, k))
    return jnp.where(whole > 0, left / jnp.where(whole > 0, whole, 1), 0)
