"""Isotropic merging: a flat spectrum on the common, and on the task-specific, directions."""

from typing import Annotated

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import drop_null_directions, polar_factor, truncated_svd
from rgsp_jax.linalg.dense import multiply_factors, project_out
from rgsp_jax.merging.task_arithmetic import Scale, task_vectors
from rgsp_jax.merging.tsv import SVD_TOLERANCE, TaskUpdate, build_on_base, side_by_side, solve_nothing
from rgsp_jax.method import Hyperparameter, Stages
from rgsp_jax.types import MergeOutput

CommonShare = Annotated[
    float, Hyperparameter("share of the directions that all tasks have in common", low=0, high=1, static=True)
]


def iso_c(stack: Float[Array, "k m n"], base: Float[Array, "m n"], scale: Scale = 1.0) -> MergeOutput:
    """`base + scale * s U V^T`, U S V^T the SVD of the summed task vectors, s the mean of all of S.

    Marczak et al. 2025, Iso-C, arXiv 2502.04959. U V^T is the polar factor and s its inner product with the
    sum, so that no singular vector is needed. Directions the sum does not have (singular values within rounding of
    zero) stay zero; an SVD would fill them at random. The paper tunes the scale on validation data.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        scale: the paper's alpha.

    Returns:
        stats: `mean_singular_value`, s, in the units of the weights.
    """
    parts = prepare_iso_c(stack, base)
    return build_on_base(stack, parts, solve_nothing(parts), base, scale)


def prepare_iso_c(stack: Float[Array, "k m n"], base: Float[Array, "m n"]) -> TaskUpdate:
    """`s U V^T`."""
    total = task_vectors(stack, base).sum(0)
    directions = polar_factor(total)
    level = jnp.sum(directions * total) / min(base.shape)
    return TaskUpdate(level * directions, {"mean_singular_value": level})


def split_directions(smaller: int, count: int, common_share: float) -> tuple[int, int]:
    """(common directions, directions of each task): they fill min(m, n), the tasks' rounded to equal numbers."""
    common = int(smaller * common_share)
    each = round((smaller - common) / count)
    if each * count > smaller:
        each -= 1
    return smaller - each * count, each


def iso_cts(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    common_share: CommonShare = 0.8,
    scale: Scale = 1.0,
) -> MergeOutput:
    """`iso_c` with the weakest common directions replaced by task-specific ones.

    Marczak et al. 2025, Iso-CTS, arXiv 2502.04959: the leading directions of the summed task vectors span the
    common subspace; every task adds the leading directions of what its task vector has outside it (on the output
    side); U and V are the polar factors of all of them side by side, and
    `W* = base + scale * s U V^T` with s the mean of all their singular values.

    Args:
        stack: K >= 1 models [K, m, n].
        base: their common ancestor [m, n].
        common_share: of min(m, n), before rounding to equal numbers for the tasks; 0.8 in the paper.
        scale: the paper's alpha, which it tunes.

    Returns:
        stats: `mean_singular_value`, s; `residual` [2] of the SVDs (common, worst task); `svd_inexact`, a flag.
    """
    parts = prepare_iso_cts(stack, base, common_share)
    return build_on_base(stack, parts, solve_nothing(parts), base, scale)


def prepare_iso_cts(stack: Float[Array, "k m n"], base: Float[Array, "m n"], common_share: float = 0.8) -> TaskUpdate:
    """`s U V^T` of both kinds of direction."""
    vectors = task_vectors(stack, base)
    common, each = split_directions(min(base.shape), stack.shape[0], common_share)
    left, values, right, residuals = [], [], [], []
    outside = vectors
    if common:
        shared = drop_null_directions(truncated_svd(vectors.sum(0), common))
        outside = map_batch(lambda x: project_out(shared.u, x), vectors)
        left, values, right, residuals = [shared.u], [shared.s], [shared.v], [shared.residual]
    if each:
        own = map_batch(lambda x: truncated_svd(x, each), outside)
        own = drop_null_directions(own, jnp.linalg.norm(lax.stop_gradient(vectors), axis=(1, 2)))
        left, right = [*left, side_by_side(own.u)], [*right, side_by_side(own.v)]
        values, residuals = [*values, own.s.reshape(-1)], [*residuals, own.residual.max()]
    u, v = (polar_factor(jnp.concatenate(x, axis=1)) for x in (left, right))
    level = jnp.mean(jnp.concatenate(values))
    residual = jnp.stack(residuals)
    stats = {
        "mean_singular_value": level,
        "residual": residual,
        "svd_inexact": ~(residual.max() <= SVD_TOLERANCE),
    }
    return TaskUpdate(level * multiply_factors(u, v), stats)


ISO_C_STAGES = Stages(prepare_iso_c, solve_nothing, build_on_base)
ISO_CTS_STAGES = Stages(prepare_iso_cts, solve_nothing, build_on_base)
