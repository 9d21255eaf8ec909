"""Fusion weights learned by gradient: a family of merged models, losses of their outputs, optax's steps."""

from rgsp_jax.learning.family import (
    Coefficients,
    Granularity,
    ModelFamily,
    check_learned,
    compose_tree,
    expert_tree,
    export_settings,
    place_family,
    prepare_family,
    start_coefficients,
)
from rgsp_jax.learning.losses import (
    cross_entropy,
    distillation,
    entropy,
    feature_distance,
    feature_spread,
    squared_distance,
    weighted_entropy,
)
from rgsp_jax.learning.parameters import list_learnable
from rgsp_jax.learning.rows import place_rows
from rgsp_jax.learning.training import LearningState, learn, make_step, start_learning

__all__ = [
    "Coefficients",
    "Granularity",
    "LearningState",
    "ModelFamily",
    "check_learned",
    "compose_tree",
    "cross_entropy",
    "distillation",
    "entropy",
    "expert_tree",
    "export_settings",
    "feature_distance",
    "feature_spread",
    "learn",
    "list_learnable",
    "make_step",
    "place_family",
    "place_rows",
    "prepare_family",
    "squared_distance",
    "start_coefficients",
    "start_learning",
    "weighted_entropy",
]
