"""What a model's weights see: capture of layer inputs, and files of their covariances."""

from rgsp_jax.activations.collect import collect_covariances
from rgsp_jax.activations.combine import combine_covariance_files
from rgsp_jax.activations.examples import Dataset, Example, read_examples
from rgsp_jax.activations.settings import CannotStepError, CovarianceResult, CovarianceSettings

__all__ = [
    "CannotStepError",
    "CovarianceResult",
    "CovarianceSettings",
    "Dataset",
    "Example",
    "collect_covariances",
    "combine_covariance_files",
    "read_examples",
]
