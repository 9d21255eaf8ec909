"""TSV-Merge: leading singular directions of every task vector, decorrelated across tasks."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import drop_null_directions, polar_factor, truncated_svd
from rgsp_jax.linalg.dense import multiply_factors, scale_columns
from rgsp_jax.merging.task_arithmetic import Scale, task_vectors
from rgsp_jax.method import Stages
from rgsp_jax.types import MergeOutput, TruncatedSVD

SVD_TOLERANCE = 1e-3
"""Residual relative to s_1 past which a decomposition is flagged."""


def side_by_side(x: Float[Array, "k m r"]) -> Float[Array, "m kr"]:
    """The columns of K matrices one behind the other."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)


def svd_stats(svds: TruncatedSVD) -> dict[str, Array]:
    """Residuals of a batch of SVDs and the flag that goes with them."""
    return {"residual": svds.residual, "svd_inexact": ~(jnp.max(svds.residual) <= SVD_TOLERANCE)}


def tsv_m(stack: Float[Array, "k m n"], base: Float[Array, "m n"], scale: Scale = 1.0) -> MergeOutput:
    """`base + scale * U diag(S) V^T` (Gargiulo et al. 2025, TSV-M, arXiv 2412.00081).

    Every task vector is cut to its leading `min(m, n) / K` singular triples (at least one); U and V are the polar
    factors of the triples' vectors side by side, S their singular values. Directions that tasks share beyond rounding
    are counted once, where the paper's SVD completes them arbitrarily. One model gives itself at scale 1.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        scale: the paper's alpha, 1 by its default.

    Returns:
        stats: `residual` [K] of the SVDs; `svd_inexact`, a flag.
    """
    parts = prepare_tsv(stack, base)
    return build_on_base(stack, parts, solve_nothing(parts), base, scale)


class TaskUpdate(NamedTuple):
    """What is added to a base, at any scale."""

    update: Float[Array, "m n"]
    stats: dict[str, Array]


def prepare_tsv(stack: Float[Array, "k m n"], base: Float[Array, "m n"]) -> TaskUpdate:
    """`U diag(S) V^T`."""
    vectors = task_vectors(stack, base)
    rank = max(1, min(base.shape) // stack.shape[0])
    svds = drop_null_directions(map_batch(lambda x: truncated_svd(x, rank), vectors))
    u, v = (polar_factor(side_by_side(x)) for x in (svds.u, svds.v))
    return TaskUpdate(multiply_factors(scale_columns(u, svds.s.reshape(-1)), v), svd_stats(svds))


def solve_nothing(parts: TaskUpdate) -> tuple[()]:
    """Nothing is left to solve behind the decompositions."""
    del parts
    return ()


def build_on_base(
    stack: Float[Array, "k m n"],
    parts: TaskUpdate,
    solution: tuple[()],
    base: Float[Array, "m n"],
    scale: Array | float = 1.0,
) -> MergeOutput:
    """`base + scale * update`."""
    del solution
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * parts.update, parts.stats)


TSV_STAGES = Stages(prepare_tsv, solve_nothing, build_on_base)
