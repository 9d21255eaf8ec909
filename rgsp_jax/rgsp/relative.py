"""`relative`: base-free fusion of K models (SPEC.md section 3)."""

from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg import drop_null_directions, polar_factor
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank, Stages
from rgsp_jax.rgsp.alignment import PRECISION, decompose, unstack
from rgsp_jax.rgsp.stats import mask_svd, svd_stats
from rgsp_jax.types import MergeOutput, TruncatedSVD

Scale = Annotated[
    Any,
    Hyperparameter('of the decorrelated task vectors; "auto" is 2 / (1 + 20 rho)', low=0, choices=("auto",)),
]


def frobenius_norm(x: Float[Array, "... m n"]) -> Float[Array, "..."]:
    """`|x|_F` with the zero matrix's derivative set to zero (it has none)."""
    square = jnp.sum(x**2, axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def relative_distance(stack: Float[Array, "k m n"], mean: Float[Array, "m n"]) -> Float[Array, ""]:
    """`rho = mean_i |theta_i - mean| / |mean|`, 0 where the mean is 0: how far the experts moved apart."""
    size = frobenius_norm(mean)
    return jnp.mean(frobenius_norm(stack - mean[None])) / jnp.where(size > 0, size, 1.0)


def automatic_scale(rho: Float[Array, ""]) -> Float[Array, ""]:
    """`2 / (1 + 20 rho)` (SPEC.md section 3)."""
    return 2 / (1 + 20 * rho)


def relative(
    stack: Float[Array, "k m n"],
    rank: Rank = 0.05,
    active_rank: ActiveRank = None,
    scale: Scale = "auto",
) -> MergeOutput:
    """Base-free K-way merge: `W* = mean + scale * U diag(S) V^T` (SPEC.md section 3).

    U and V are the polar factors of the stacked leading singular vectors of the relative task vectors
    `theta_i - mean`, S their stacked singular values. Directions the experts share beyond rounding are counted once
    (the polar factor is a partial isometry), so that equal copies return the copy. Two models give their mean:
    `theta_2 - mean = -(theta_1 - mean)`.

    Args:
        stack: K >= 2 models [K, m, n].
        rank: directions kept of each relative task vector; a fraction is of min(m, n).
        active_rank: run-time rank; the result equals that at this rank.
        scale: a number, or "auto": `2 / (1 + 20 rho)` with rho the mean of |theta_i - mean| / |mean|.
    """
    parts = prepare_relative(stack, rank, active_rank)
    return build_relative(stack, parts, decorrelate(parts, active_rank), active_rank, scale)


class RelativeSvds(NamedTuple):
    """Truncated SVDs of the relative task vectors `theta_k - mean` of one matrix, r directions a model."""

    svds: TruncatedSVD
    """Of every model, on a leading axis [k]."""
    rho: Float[Array, ""]


class RelativeParts(NamedTuple):
    """What the family `mean + sum_k a_k tau_k + b_k rest_k` is made of, for one matrix and r directions a model."""

    u: Float[Array, "k m r"]
    """Decorrelated left directions of every model, times their singular values."""
    v: Float[Array, "k n r"]
    """Decorrelated right directions: `tau_k = u_k v_k^T`."""
    own_u: Float[Array, "k m r"]
    """Left singular vectors of every relative task vector, times their singular values."""
    own_v: Float[Array, "k n r"]
    """Right singular vectors: `rest_k = theta_k - mean - own_u_k own_v_k^T`."""
    rho: Float[Array, ""]


def prepare_relative(
    stack: Float[Array, "k m n"], rank: int | float = 0.05, active_rank: Array | int | None = None
) -> RelativeSvds:
    """What every member of the family takes, whatever its rank up to this one and its scale."""
    mean = stack_mean(stack)
    return RelativeSvds(decompose(stack - mean[None], rank, active_rank), relative_distance(stack, mean))


def decorrelate(parts: RelativeSvds, active_rank: Array | int | None = None) -> RelativeParts:
    """Polar factors of all models' directions side by side; every scale is then a few products away (`compose`)."""
    count = parts.svds.s.shape[0]
    svds = [mask_svd(x, active_rank) for x in unstack(parts.svds)]
    there = [drop_null_directions(d) for d in svds]
    u = polar_factor(jnp.concatenate([d.u for d in there], axis=1))
    v = polar_factor(jnp.concatenate([d.v for d in there], axis=1))
    s = jnp.stack([d.s for d in svds])
    left, right = (jnp.moveaxis(x.reshape(x.shape[0], count, -1), 1, 0) for x in (u, v))
    own_u, own_v = jnp.stack([d.u for d in svds]) * s[:, None, :], jnp.stack([d.v for d in svds])
    return RelativeParts(left * s[:, None, :], right, own_u, own_v, parts.rho)


def relative_parts(stack: Float[Array, "k m n"], rank: int | float = 0.05) -> RelativeParts:
    """Decompose and decorrelate K models."""
    return decorrelate(prepare_relative(stack, rank))


def relative_stats(parts: RelativeSvds, active_rank: Array | int | None) -> dict[str, Array]:
    """What the report says of one matrix."""
    svds = [mask_svd(x, active_rank) for x in unstack(parts.svds)]
    return svd_stats(svds, active_rank) | {"rho": parts.rho}


def build_relative(
    stack: Float[Array, "k m n"],
    parts: RelativeSvds,
    solution: RelativeParts,
    active_rank: Array | int | None = None,
    scale: Array | float | str = "auto",
) -> MergeOutput:
    """The member with one coefficient for all directions, see `relative`."""
    factor = automatic_scale(parts.rho) if isinstance(scale, str) else jnp.asarray(scale, stack.dtype)
    stats = relative_stats(parts, active_rank) | {"scale": factor}
    if stack.shape[0] == 2:  # the two task vectors cancel exactly; no rounding of theirs may leak in
        return MergeOutput(stack_mean(stack), stats)
    return MergeOutput(compose(solution, stack, factor), stats)


def compose(
    parts: RelativeParts, stack: Float[Array, "k m n"], directions: Array | float, rest: Array | float | None = None
) -> Float[Array, "m n"]:
    """`W* = mean + sum_k (sum_j a_kj u_kj v_kj^T + b_k rest_k)`, linear in a and b.

    Args:
        parts: of `stack`.
        stack: the K models [K, m, n].
        directions: a, a number, [K] or [K, r].
        rest: b, a number or [K]; None leaves the rest out.
    """
    count, _, rank = parts.u.shape
    mean = stack_mean(stack)
    a = jnp.asarray(directions, mean.dtype)
    a = jnp.broadcast_to(a[:, None] if a.ndim == 1 else a, (count, rank))
    merged = mean + join_directions(parts.u * a[:, None, :], parts.v)
    if rest is None:
        return merged
    b = jnp.broadcast_to(jnp.asarray(rest, mean.dtype), (count,))
    whole = jnp.tensordot(b, stack - mean[None], axes=1)
    return merged + whole - join_directions(parts.own_u * b[:, None, None], parts.own_v)


def join_directions(u: Float[Array, "k m r"], v: Float[Array, "k n r"]) -> Float[Array, "m n"]:
    """`sum_k u_k v_k^T` as one product."""
    left, right = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (u, v))
    return jnp.matmul(left, right.T, precision=PRECISION)


Directions = Annotated[
    Any, Hyperparameter("coefficients of the leading directions: one, one per model, or one per model and direction")
]
Rest = Annotated[Any, Hyperparameter("coefficients of what the directions leave: one, or one per model")]


def relative_weighted(
    stack: Float[Array, "k m n"],
    rank: Rank = 0.05,
    active_rank: ActiveRank = None,
    directions: Directions = 1.0,
    rest: Rest = 0.0,
) -> MergeOutput:
    """The family that learning chooses from: `W* = mean + sum_k a_k tau_k + b_k rest_k` (SPEC.md sections 2 and 3).

    `tau_k` is model k's part of `relative`, decorrelated from the other models'; `rest_k` is what its leading
    directions leave of `theta_k - mean`. With one number for `directions` and no `rest` this is `relative` of three or
    more models.

    Args:
        stack: K >= 2 models [K, m, n].
        rank: directions kept of each relative task vector; a fraction is of min(m, n).
        active_rank: run-time rank; the result equals that at this rank.
        directions: a number, [K], or [K, rank].
        rest: a number or [K].
    """
    parts = prepare_relative(stack, rank, active_rank)
    return build_weighted(stack, parts, decorrelate(parts, active_rank), active_rank, directions, rest)


def build_weighted(
    stack: Float[Array, "k m n"],
    parts: RelativeSvds,
    solution: RelativeParts,
    active_rank: Array | int | None = None,
    directions: Array | float = 1.0,
    rest: Array | float = 0.0,
) -> MergeOutput:
    """The member with these coefficients, see `relative_weighted`."""
    return MergeOutput(compose(solution, stack, directions, rest), relative_stats(parts, active_rank))


RELATIVE_STAGES = Stages(prepare_relative, decorrelate, build_relative)
WEIGHTED_STAGES = Stages(prepare_relative, decorrelate, build_weighted)
