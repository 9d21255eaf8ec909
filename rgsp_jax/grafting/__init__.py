"""Covariances of layer inputs, projectors on their null space, and grafts through them."""

from rgsp_jax.grafting.graft import graft, output_change, ridge_graft
from rgsp_jax.grafting.layer import graft_layer
from rgsp_jax.grafting.projector import (
    NullSpaceProjector,
    Spectrum,
    decompose_covariance,
    decompose_sketch,
    null_space_projector,
)

__all__ = [
    "NullSpaceProjector",
    "Spectrum",
    "decompose_covariance",
    "decompose_sketch",
    "graft",
    "graft_layer",
    "null_space_projector",
    "output_change",
    "ridge_graft",
]
