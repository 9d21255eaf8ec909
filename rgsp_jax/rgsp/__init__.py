"""RGSP-TEFM (SPEC.md sections 1 to 3): one file per step, and their compositions."""

from rgsp_jax.rgsp.asymmetric import dgsm, gsf
from rgsp_jax.rgsp.pairwise import LITERAL, PairTrace, decompose, literal_trace, relative_task_vector, rgsp, rgsp_seed
from rgsp_jax.rgsp.relative import (
    RelativeParts,
    automatic_scale,
    compose,
    relative,
    relative_distance,
    relative_parts,
    relative_weighted,
)

__all__ = [
    "LITERAL",
    "PairTrace",
    "RelativeParts",
    "automatic_scale",
    "compose",
    "decompose",
    "dgsm",
    "gsf",
    "literal_trace",
    "relative",
    "relative_distance",
    "relative_parts",
    "relative_task_vector",
    "relative_weighted",
    "rgsp",
    "rgsp_seed",
]
