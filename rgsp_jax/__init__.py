"""Merge fine-tuned models from their weights alone: pure, jitted, differentiable JAX kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rgsp_jax.version import __version__ as __version__

if TYPE_CHECKING:
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

_PLACES = {
    "Coupling": "types",
    "MergeOutput": "types",
    "Method": "method",
    "RefusedError": "errors",
    "TreeReport": "trees",
    "TruncatedSVD": "types",
    "gromov_wasserstein": "transport",
    "merge": "trees",
    "methods": "registry",
    "polar_factor": "linalg",
    "truncated_svd": "linalg",
}
"""Where what this package offers is defined; imported when it is asked for, since JAX takes a second to start."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
