"""The graft as a merge method: one matrix of two models, with its proof on inputs that were held back."""

from typing import Annotated

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rgsp_jax.grafting.graft import graft, output_change, ridge_graft
from rgsp_jax.grafting.projector import (
    Spectrum,
    decompose_covariance,
    decompose_sketch,
    effective_rank,
    null_space_projector,
    numerical_rank,
)
from rgsp_jax.linalg.dense import matmul
from rgsp_jax.linalg.rows import divide_side
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import InputStatistics, MergeOutput

TRUSTED = 2.0
"""Held-back inputs may feel this many times what the calibration inputs feel before the record is flagged."""

Ridge = Annotated[
    float,
    Hyperparameter("soft: protects less as it grows, in units of the mean eigenvalue", low=0, exclusive_low=True),
]
Energy = Annotated[
    float | None,
    Hyperparameter("hard: protect the directions with this share of the inputs' energy", low=0, high=1, optional=True),
]
Threshold = Annotated[
    float | None, Hyperparameter("hard: protect eigenvalues of the covariance above this", low=0, optional=True)
]


def decompose_inputs(inputs: InputStatistics) -> Spectrum:
    """Spectrum of the first model's inputs, from whichever is there."""
    if inputs.covariance is not None:
        return decompose_covariance(inputs.covariance[0])
    if inputs.values is not None and inputs.basis is not None and inputs.rest is not None:
        return Spectrum(inputs.values[0], inputs.basis[0], inputs.rest[0])
    if inputs.sketch is None or inputs.trace is None:
        raise ValueError(
            "a graft needs the covariance of the recipient's inputs, a sketch with its trace, or a spectrum"
        )
    return decompose_sketch(inputs.sketch[0], inputs.trace[0])


def measure_disturbance(change: Float[Array, "m n"], inputs: InputStatistics) -> Float[Array, ""]:
    """`|change C^(1/2)|`, root mean square over the calibration inputs, on as many directions as are known."""
    if inputs.covariance is not None:
        squared = jnp.sum(matmul(change, inputs.covariance[0].astype(change.dtype)) * change)
        return jnp.sqrt(jnp.maximum(squared, 0))
    if inputs.sketch is not None:
        return jnp.linalg.norm(matmul(change, inputs.sketch[0].T.astype(change.dtype)))
    assert inputs.values is not None and inputs.basis is not None
    along = matmul(change, inputs.basis[0].astype(change.dtype))
    return jnp.sqrt(jnp.sum(along**2 * inputs.values[0].astype(change.dtype)[None, :]))


def graft_layer(
    stack: Float[Array, "2 m n"],
    inputs: InputStatistics,
    ridge: Ridge = 3.0,
    energy: Energy = None,
    threshold: Threshold = None,
) -> MergeOutput:
    """Null-space graft of one matrix, recipient first: `W* = A + (B - A) P` (SPEC.md section 4).

    Args:
      stack: A and B [2, m, n].
      inputs: of this matrix in A (the first of c), on the data that A must not get worse on; a second whole covariance
        is the metric of the donor's side, for a ridge.
      ridge: holds unless energy or threshold is given.
      energy, threshold: one of them at most.

    Returns:
      The graft; stats: `output_change` on held-back inputs and `output_change_seen` on those of the covariance,
      `|(W* - A) K| / |(B - A) K|`; `donor_share`, `|W* - A| / |B - A|`; `protected_rank`, the dimension of what is
      protected, and `input_rank`, of what the inputs span (hard projectors; the ridge's counts come from a trace);
      flag `calibration_too_small`, from the held-back inputs or else, for a hard projector, from the ranks.

    Raises:
      ValueError: both energy and threshold.
    """
    a, b = divide_side(stack, 0)  # each output is a problem of its own
    if energy is not None and threshold is not None:
        raise ValueError("give energy or threshold, not both")
    hard = {name: x for name, x in {"energy": energy, "threshold": threshold}.items() if x is not None}
    given = hard or {"ridge": ridge}
    stats: dict[str, Array] = {}
    small = jnp.asarray(False)
    if "ridge" in given and inputs.covariance is not None:
        covariances = inputs.covariance.astype(a.dtype)
        other = covariances[1] if covariances.shape[0] > 1 else None
        merged = ridge_graft(a, b, covariances[0], given["ridge"], other)
    else:
        spectrum = decompose_inputs(inputs)
        projector = null_space_projector(spectrum, **given)
        projector = projector._replace(**{k: v.astype(a.dtype) for k, v in projector._asdict().items()})
        merged = graft(a, b, projector)
        stats |= {"protected_rank": effective_rank(projector), "input_rank": numerical_rank(spectrum)}
        if "ridge" not in given:
            small = stats["input_rank"] <= stats["protected_rank"]
    return MergeOutput(merged, lax.stop_gradient(stats) | measure_graft(a, b, merged, inputs, small))


def measure_graft(
    a: Float[Array, "m n"],
    b: Float[Array, "m n"],
    merged: Float[Array, "m n"],
    inputs: InputStatistics,
    small: Bool[Array, ""] | bool = False,
) -> dict[str, Array]:
    """The stats that all grafts have, without derivative; `small` stands where no input was held back."""
    size = jnp.linalg.norm(b - a)
    stats = {"donor_share": jnp.linalg.norm(merged - a) / jnp.where(size > 0, size, 1)}
    seen = measure_disturbance(b - a, inputs)
    stats["output_change_seen"] = measure_disturbance(merged - a, inputs) / jnp.where(seen > 0, seen, 1)
    if inputs.held_back is not None:
        stats["output_change"] = output_change(a, b, merged, inputs.held_back[0].astype(a.dtype))
        unseen = stats["output_change"]
        small = (unseen > TRUSTED * stats["output_change_seen"]) & (unseen > 0.1)
    return lax.stop_gradient(stats) | {"calibration_too_small": jnp.asarray(small)}
