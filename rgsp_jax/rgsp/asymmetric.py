"""Comparators from the source that take A as an absolute base: `dgsm`, and `gsf` without the dynamic map."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.method import ActiveRank, Rank
from rgsp_jax.rgsp.alignment import PRECISION
from rgsp_jax.rgsp.fusion import fuse, project
from rgsp_jax.rgsp.pairwise import Beta, Epsilon, Learned, PairTrace, Projection, literal_trace, pair_stats
from rgsp_jax.types import MergeOutput, TruncatedSVD


def fuse_on_base(
    stack: Float[Array, "2 m n"], trace: PairTrace, svds: list[TruncatedSVD], projection: str
) -> Float[Array, "m n"]:
    """`tau' = U_A diag(M pi S_B) U_A^T; W* = A + lambda tau' + (1 - lambda)((B - A) - tau')` (SPEC.md section 2)."""
    a, b = stack
    carried = jnp.matmul(
        trace.m, jnp.matmul(trace.adjusted_coupling, svds[1].s, precision=PRECISION), precision=PRECISION
    )
    tau = project(svds[0].u, carried, svds[0].v, projection)
    return fuse(a, b - a, tau, trace.lam, 1 - trace.lam)


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
    trace, svds = literal_trace(stack, rank, active_rank, beta=beta, epsilon=epsilon, w_q=w_q, w_k=w_k)
    return MergeOutput(fuse_on_base(stack, trace, svds, projection), pair_stats(trace, svds, active_rank))


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
    trace, svds = literal_trace(stack, rank, active_rank, beta=beta, epsilon=epsilon, mapped=False)
    return MergeOutput(fuse_on_base(stack, trace, svds, projection), pair_stats(trace, svds, active_rank))
