"""RGSP-TEFM (SPEC.md sections 1 to 3): one file per step, and their compositions."""

from rgsp_jax.rgsp.asymmetric import dgsm, gsf
from rgsp_jax.rgsp.pairwise import LITERAL, PairTrace, decompose, literal_trace, relative_task_vector, rgsp, rgsp_seed
from rgsp_jax.rgsp.relative import automatic_scale, relative, relative_distance

__all__ = [
    "LITERAL",
    "PairTrace",
    "automatic_scale",
    "decompose",
    "dgsm",
    "gsf",
    "literal_trace",
    "relative",
    "relative_distance",
    "relative_task_vector",
    "rgsp",
    "rgsp_seed",
]
