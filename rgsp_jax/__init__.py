"""Merge fine-tuned models from their weights alone: pure, jitted, differentiable JAX kernels."""

from rgsp_jax.errors import RefusedError as RefusedError
from rgsp_jax.linalg import polar_factor as polar_factor
from rgsp_jax.linalg import truncated_svd as truncated_svd
from rgsp_jax.method import Method as Method
from rgsp_jax.registry import methods as methods
from rgsp_jax.transport import gromov_wasserstein as gromov_wasserstein
from rgsp_jax.trees import TreeReport as TreeReport
from rgsp_jax.trees import merge as merge
from rgsp_jax.types import Coupling as Coupling
from rgsp_jax.types import MergeOutput as MergeOutput
from rgsp_jax.types import TruncatedSVD as TruncatedSVD
from rgsp_jax.version import __version__ as __version__
