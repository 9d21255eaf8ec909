"""Grafts: what the recipient's inputs do not feel is taken from the donor (SPEC.md section 4)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.grafting.projector import NullSpaceProjector
from rgsp_jax.linalg.dense import matmul, widen
from rgsp_jax.linalg.solve import solve_for_rows

WHITE_SHARE = 0.02
"""Of mu I in a donor's metric, so that directions without inputs on either side go to the donor, not anywhere."""


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
    donor_covariance: Float[Array, "n n"] | None = None,
) -> Float[Array, "m n"]:
    """The soft graft `A + rho (B - A) C_0 (C + rho C_0)^-1` by one Cholesky factor: no eigenvectors.

    The minimiser of `rho |(W - B) C_0^(1/2)|^2 + |(W - A) C^(1/2)|^2`. Without a donor's covariance `C_0 = mu I`, mu
    the mean eigenvalue of C: SPEC section 4. With one, C_0 is that in units of C's trace, and a little of mu I: of
    equal covariances the graft is the interpolation at `rho / (1 + rho)`, of both models' own it is RegMean.

    Several times cheaper than the projector for one ridge, and differentiable in everything, C included, at any
    spectrum. A covariance of zero gives the donor.

    Args:
      recipient, donor: A and B [m, n].
      covariance: C [n, n] of the recipient's inputs, symmetric, positive semi-definite.
      ridge: rho, dimensionless, above 0; no less than rounding is used.
      donor_covariance: of what the donor's inputs are thought to be.
    """
    a, b = widen(recipient), widen(donor)
    c = widen(covariance)
    n = c.shape[0]
    least = 4 * n * float(jnp.finfo(c.dtype).eps)  # what a Cholesky factor of a singular C stands
    shift = jnp.maximum(jnp.asarray(ridge, c.dtype), least) * jnp.trace(c) / n
    shift = jnp.where(shift > 0, shift, 1)
    metric = jnp.eye(n, dtype=c.dtype)
    change = b - a
    if donor_covariance is not None:
        other = widen(donor_covariance)
        unit = jnp.trace(other) / n
        metric = WHITE_SHARE * metric + (1 - WHITE_SHARE) * other / jnp.where(unit > 0, unit, 1)
        change = matmul(change, metric)
    return a + solve_for_rows(c / shift + metric, change)


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
