"""Fusion weights learned by gradient: a family of merged models, losses of their outputs, optax's steps."""

from rgsp_jax.learning.family import (
    Coefficients,
    Granularity,
    ModelFamily,
    compose_tree,
    export_settings,
    prepare_family,
    start_coefficients,
)
from rgsp_jax.learning.losses import (
    cross_entropy,
    distillation,
    entropy,
    feature_distance,
    squared_distance,
    weighted_entropy,
)
from rgsp_jax.learning.parameters import list_learnable
from rgsp_jax.learning.training import LearningState, learn, make_step, start_learning

__all__ = [
    "Coefficients",
    "Granularity",
    "LearningState",
    "ModelFamily",
    "compose_tree",
    "cross_entropy",
    "distillation",
    "entropy",
    "export_settings",
    "feature_distance",
    "learn",
    "list_learnable",
    "make_step",
    "prepare_family",
    "squared_distance",
    "start_coefficients",
    "start_learning",
    "weighted_entropy",
]
