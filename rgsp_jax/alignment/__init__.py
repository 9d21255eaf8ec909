"""Neurons of one model put into the order of another's: `rgsp align`."""

from rgsp_jax.alignment.align import Alignment, UnitAgreement, align_checkpoints
from rgsp_jax.alignment.families import FAMILIES, Place, Stack, Units

__all__ = ["FAMILIES", "Alignment", "Place", "Stack", "UnitAgreement", "Units", "align_checkpoints"]
