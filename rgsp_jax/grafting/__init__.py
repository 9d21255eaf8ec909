"""Covariances of layer inputs, projectors on their null space, and grafts through them."""

from rgsp_jax.grafting.convergence import leading_subspace, subspace_movement
from rgsp_jax.grafting.covariance import (
    combine_covariances,
    finish_covariance,
    initial_covariance,
    update_covariance,
)
from rgsp_jax.grafting.graft import graft, output_change, ridge_graft
from rgsp_jax.grafting.layer import graft_layer
from rgsp_jax.grafting.projector import (
    NullSpaceProjector,
    Spectrum,
    decompose_covariance,
    decompose_sketch,
    null_space_projector,
)
from rgsp_jax.grafting.sequential import interpolation_weights, refit, sequential_graft
from rgsp_jax.grafting.sketch import combine_sketches, finish_sketch, initial_sketch, update_sketch

__all__ = [
    "NullSpaceProjector",
    "Spectrum",
    "combine_covariances",
    "combine_sketches",
    "decompose_covariance",
    "decompose_sketch",
    "finish_covariance",
    "finish_sketch",
    "graft",
    "graft_layer",
    "initial_covariance",
    "initial_sketch",
    "interpolation_weights",
    "leading_subspace",
    "null_space_projector",
    "output_change",
    "refit",
    "ridge_graft",
    "sequential_graft",
    "subspace_movement",
    "update_covariance",
    "update_sketch",
]
