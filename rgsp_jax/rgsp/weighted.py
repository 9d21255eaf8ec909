"""`relative_weighted`: K models' departures from their mean, decorrelated, each with its own coefficient."""

from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank, Stages
from rgsp_jax.rgsp.alignment import decompose, unstack
from rgsp_jax.rgsp.relative import decorrelate_directions, join_directions, relative_distance
from rgsp_jax.rgsp.stats import mask_svd, svd_stats
from rgsp_jax.types import MergeOutput, TruncatedSVD


def distance_scale(rho: Float[Array, ""], models: int) -> Float[Array, ""]:
    """`2 / (1 + 20 rho)` (SPEC.md section 3); of two models 0, as their two task vectors cancel exactly."""
    return 2 / (1 + 20 * rho) if models > 2 else jnp.zeros_like(rho)


class WeightedSvds(NamedTuple):
    """Truncated SVDs of the relative task vectors `theta_k - mean` of one matrix, r directions a model."""

    svds: TruncatedSVD
    """Of every model, on a leading axis [k]."""
    rho: Float[Array, ""]


class WeightedParts(NamedTuple):
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

    @property
    def rank(self) -> int:
        """Directions of each model that have a coefficient."""
        return self.u.shape[-1]


def prepare_weighted(
    stack: Float[Array, "k m n"], rank: int | float = 0.05, active_rank: Array | int | None = None
) -> WeightedSvds:
    """What every member of the family takes, whatever its rank up to this one and its scale."""
    mean = stack_mean(stack)
    departures = jax.lax.optimization_barrier(stack) - mean[None]  # not those of `compose`, or they would be kept
    return WeightedSvds(decompose(departures, rank, active_rank), relative_distance(stack, mean))


def decorrelate(parts: WeightedSvds, active_rank: Array | int | None = None) -> WeightedParts:
    """Polar factors of all models' directions side by side; every scale is then a few products away (`compose`)."""
    svds = jax.vmap(lambda x: mask_svd(x, active_rank))(parts.svds)
    left, right = decorrelate_directions(svds)
    return WeightedParts(left, right, svds.u * svds.s[:, None, :], svds.v, parts.rho)


def weighted_stats(parts: WeightedSvds, active_rank: Array | int | None) -> dict[str, Array]:
    """What the report says of one matrix."""
    svds = [mask_svd(x, active_rank) for x in unstack(parts.svds)]
    return svd_stats(svds, active_rank) | {"rho": parts.rho}


def compose(
    parts: WeightedParts, stack: Float[Array, "k m n"], directions: Array | float, rest: Array | float | None = None
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
    whole = jnp.sum(b[:, None, None] * (stack - mean[None]), axis=0)
    return merged + whole - join_directions(parts.own_u * b[:, None, None], parts.own_v)


Directions = Annotated[
    Any,
    Hyperparameter(
        "coefficients of the leading directions: one, one per model, or one per model and direction; null: one for"
        " all, 2 / (1 + 20 rho), 0 for two models",
        optional=True,
    ),
]
Rest = Annotated[Any, Hyperparameter("coefficients of what the directions leave: one, or one per model")]


def relative_weighted(
    stack: Float[Array, "k m n"],
    rank: Rank = 0.05,
    active_rank: ActiveRank = None,
    directions: Directions = None,
    rest: Rest = 0.0,
) -> MergeOutput:
    """Departures from the mean, weighed: `W* = mean + sum_k a_k tau_k + b_k rest_k` (SPEC.md sections 2 and 3).

    `tau_k` are the r leading directions of `theta_k - mean`, decorrelated from the other models' by the polar factors
    of all directions side by side; `rest_k` is what they leave of it. Directions that models share beyond rounding are
    counted once (the polar factor is a partial isometry), so that equal copies return the copy.

    Args:
        stack: K >= 2 models [K, m, n].
        rank: directions kept of each relative task vector; a fraction is of min(m, n).
        active_rank: run-time rank; the result equals that at this rank.
        directions: a number, [K], or [K, rank], or None: `2 / (1 + 20 rho)`, rho the mean of
            |theta_i - mean| / |mean|.
        rest: a number or [K].
    """
    parts = prepare_weighted(stack, rank, active_rank)
    return build_weighted(stack, parts, decorrelate(parts, active_rank), active_rank, directions, rest)


def build_weighted(
    stack: Float[Array, "k m n"],
    parts: WeightedSvds,
    solution: WeightedParts,
    active_rank: Array | int | None = None,
    directions: Array | float | None = None,
    rest: Array | float = 0.0,
) -> MergeOutput:
    """The member with these coefficients, see `relative_weighted`."""
    if directions is None:
        directions = distance_scale(parts.rho, stack.shape[0])
    return MergeOutput(compose(solution, stack, directions, rest), weighted_stats(parts, active_rank))


WEIGHTED_STAGES = Stages(prepare_weighted, decorrelate, build_weighted)
