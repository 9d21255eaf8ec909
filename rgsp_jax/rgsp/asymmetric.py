"""Comparators from the source that take A as an absolute base: `dgsm`, and `gsf` without the dynamic map."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.method import ActiveRank, Rank, Stages
from rgsp_jax.rgsp.alignment import PRECISION
from rgsp_jax.rgsp.fusion import fuse, project
from rgsp_jax.rgsp.pairwise import (
    Beta,
    Epsilon,
    Learned,
    PairCoupling,
    PairParts,
    Projection,
    couple_literal,
    pair_stats,
    prepare_pair,
    trace_literal,
)
from rgsp_jax.rgsp.stats import mask_svd
from rgsp_jax.types import MergeOutput


def build_on_base(
    stack: Float[Array, "2 m n"],
    parts: PairParts,
    coupled: PairCoupling,
    active_rank: Array | int | None = None,
    beta: Array | float = 1.0,
    projection: str = "one_sided",
) -> MergeOutput:
    """`tau' = U_A diag(M pi S_B) U_A^T; W* = A + lambda tau' + (1 - lambda)((B - A) - tau')` (SPEC.md section 2)."""
    a, b = stack
    trace = trace_literal(parts, coupled, active_rank, beta)
    spectrum = mask_svd(parts.b, active_rank).s
    carried = jnp.matmul(
        trace.m, jnp.matmul(trace.adjusted_coupling, spectrum, precision=PRECISION), precision=PRECISION
    )
    tau = project(parts.a.u, carried, parts.a.v, projection)
    return MergeOutput(fuse(a, b - a, tau, trace.lam, 1 - trace.lam), pair_stats(trace, parts, active_rank))


def dgsm(
    stack: Float[Array, "2 m n"],
    rank: Rank = 64,
    active_rank: ActiveRank = None,
    beta: Beta = 1.0,
    epsilon: Epsilon = 0.05,
    projection: Projection = "one_sided",
    w_q: Learned = None,
    w_k: Learned = None,
) -> MergeOutput:
    """The source's comparator with A as absolute base (SPEC.md section 2).

    M, pi and lambda are those of `rgsp_seed`. tau' carries B's whole spectrum, not its change, so two equal models do
    not return themselves.

    Args:
        stack: A (the base) and B [2, m, n]; the other arguments as in `rgsp_seed`.
    """
    parts = prepare_pair(stack, rank, active_rank)
    coupled = couple_literal(parts, active_rank, epsilon, w_q, w_k)
    return build_on_base(stack, parts, coupled, active_rank, beta, projection)


def gsf(
    stack: Float[Array, "2 m n"],
    rank: Rank = 64,
    active_rank: ActiveRank = None,
    beta: Beta = 1.0,
    epsilon: Epsilon = 0.05,
    projection: Projection = "one_sided",
) -> MergeOutput:
    """`dgsm` with M = I, in the map and in the fusion alike (SPEC.md section 2).

    Args:
        stack: A (the base) and B [2, m, n]; the other arguments as in `rgsp_seed`.
    """
    parts = prepare_pair(stack, rank, active_rank)
    coupled = couple_unmapped(parts, active_rank, epsilon)
    return build_on_base(stack, parts, coupled, active_rank, beta, projection)


def couple_unmapped(
    parts: PairParts, active_rank: Array | int | None = None, epsilon: Array | float = 0.05
) -> PairCoupling:
    """`couple_literal` with M = I."""
    return couple_literal(parts, active_rank, epsilon, mapped=False)


DGSM_STAGES = Stages(prepare_pair, couple_literal, build_on_base)
GSF_STAGES = Stages(prepare_pair, couple_unmapped, build_on_base)
