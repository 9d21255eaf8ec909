"""Merge methods other than RGSP-TEFM, one file per family."""

from rgsp_jax.merging.average import average
from rgsp_jax.merging.slerp import slerp

__all__ = ["average", "slerp"]
