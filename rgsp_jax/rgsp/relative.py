"""`relative`: base-free fusion of K models by decorrelated departures from the ancestor that they suggest."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
from jax import lax, vmap
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import drop_null_directions, inverse_square_root, polar_factor, resolve_rank, solve_sylvester
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import ActiveRank, Hyperparameter, Rank, Stages
from rgsp_jax.rgsp.alignment import PRECISION, decompose, unstack
from rgsp_jax.rgsp.stats import mask_svd, svd_stats
from rgsp_jax.types import MergeOutput, TruncatedSVD

REWEIGHTINGS = 5
"""Steps of the median."""
FLOOR = 1e-2
"""Of squared singular values in the median's weights, in units of their mean over models and directions."""
DECORRELATED = 0.5
"""Share of every departure whose directions are turned away from the others'; the rest is added as it is."""

Scale = Annotated[Any, Hyperparameter("of the departure from the ancestor; 1 is as far as each model went", low=0)]
Reach = Annotated[
    Any,
    Hyperparameter(
        "rho times discord of the models at which half of the correction is left", low=0, exclusive_low=True
    ),
]
Departures = Annotated[
    Any,
    Hyperparameter("coefficients of the models' departures, in units of scale: one, one per model, or per direction"),
]
Outside = Annotated[
    Any, Hyperparameter("coefficients of what no model's directions reach, one per model; one for all adds nothing")
]


def relative(
    stack: Float[Array, "k m n"],
    rank: Rank = 32,
    active_rank: ActiveRank = None,
    scale: Scale = 1.2,
    reach: Reach = 0.0018,
    directions: Departures = 1.0,
    rest: Outside = 0.0,
) -> MergeOutput:
    """Base-free K-way merge: an ancestor estimated from the models, and their departures from it added up.

    With `D_k = theta_k - mean` and Y_u, Y_v orthonormal bases of all models' r leading left and right singular vectors
    of D_k, everything happens to the cores `c_k = Y_u^T D_k Y_v`:

    1. the ancestor's core is their median in the nuclear norm, `argmin_C sum_k |c_k - C|_*`: a direction in which few
       models moved is theirs, while a mean charges it to all;
    2. the departures `c_k - C`, truncated to `u_k S_k v_k^T` with r directions each, are added up half as they are and
       half decorrelated: `P = (sum_k u_k S_k v_k^T + U diag(S) V^T) / 2`, U and V the polar factors of all u and all v
       side by side, so that what models share counts less than twice.

    `W* = mean + t Y_u (C + scale P) Y_v^T` with `t = 1 / (1 + (rho discord / reach)^2)`. The farther apart the models
    are, `rho = mean_k |D_k| / |mean|`, the less is gained by leaving their mean. The more the departures agree in
    pairs, `discord`, the standard deviation over i < j of `<c_i - C, c_j - C> / mean_k |c_k - C|^2`, the more is lost:
    the ancestor of independent ones would have none, and what a majority shares was taken for it. Equal copies return
    the copy. Two models give their mean: `D_2 = -D_1`, and nothing in the weights tells which of them moved.

    Learning chooses from the family around it, linear in a and b:
    `mean + t Y_u (C + scale P(a)) Y_v^T + sum_k b_k (D_k - Y_u c_k Y_v^T)`, `a_k S_k` in place of S_k in P. Two models
    share their directions, each has half of what is along them, and `a_1 - a_2` counts.

    Args:
        stack: K >= 2 models [K, m, n].
        rank: directions kept of each model, at most min(m, n) / K; a fraction is of min(m, n).
        active_rank: run-time rank; the result equals that at this rank.
        scale: a number.
        reach: dimensionless; a large number keeps the correction whole.
        directions: a, a number, [K] or [K, directions kept].
        rest: b, a number (which adds nothing, as `sum_k D_k = 0`) or [K].

    Gargiulo et al., Task Singular Vectors (CVPR 2025), for the decorrelation, there about a given base.
    """
    if len(stack) == 2 and not jnp.ndim(directions) and not jnp.ndim(rest):  # nothing to decompose for
        resolve_rank(rank, *stack.shape[1:])
        mean = stack_mean(stack)
        rho = relative_distance(stack, mean)
        return MergeOutput(mean, describe_correction(rho, jnp.zeros_like(rho), scale, reach))
    parts = prepare_relative(stack, rank, active_rank)
    return build_relative(stack, parts, solve_relative(parts, active_rank), active_rank, scale, reach, directions, rest)


class RelativeParts(NamedTuple):
    """The models of one matrix about their mean, seen from the directions that any of them has."""

    svds: TruncatedSVD
    """Of every relative task vector `theta_k - mean`, on a leading axis [k]."""
    left: Float[Array, "m q"]
    """Y_u, an isometry on its row space; q is the smaller of K r and m."""
    right: Float[Array, "n p"]
    """Y_v, likewise."""
    cores: Float[Array, "k q p"]
    """`Y_u^T (theta_k - mean) Y_v`."""
    rho: Float[Array, ""]


class RelativeSolution(NamedTuple):
    """The ancestor and the departures from it, in the coordinates of the cores; of two models the first one's alone."""

    ancestor: Float[Array, "q p"]
    u: Float[Array, "k q d"]
    """Left directions of every departure, times their singular values: r decorrelated ones, then r as they are; of two
    models r."""
    v: Float[Array, "k p d"]
    """Right directions: departures are `u_k v_k^T`."""
    discord: Float[Array, ""]
    """Of the departures, see `relative`."""

    @property
    def rank(self) -> int:
        """Directions of each departure that have a coefficient."""
        return self.u.shape[-1] // (1 if self.u.shape[-3] == 1 else 2)


def frobenius_norm(x: Float[Array, "... m n"]) -> Float[Array, "..."]:
    """`|x|_F` with the zero matrix's derivative set to zero (it has none)."""
    square = jnp.sum(x**2, axis=(-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def relative_distance(stack: Float[Array, "k m n"], mean: Float[Array, "m n"]) -> Float[Array, ""]:
    """`rho = mean_i |theta_i - mean| / |mean|`, 0 where the mean is 0: how far the experts moved apart."""
    size = frobenius_norm(mean)
    return jnp.mean(frobenius_norm(stack - mean[None])) / jnp.where(size > 0, size, 1.0)


def prepare_relative(
    stack: Float[Array, "k m n"], rank: int | float = 32, active_rank: Array | int | None = None
) -> RelativeParts:
    """Decompositions, bases and cores at this rank, from which any smaller one follows."""
    count, m, n = stack.shape
    mean = stack_mean(stack)
    rank = min(resolve_rank(rank, m, n), max(min(m, n) // count, 1))
    svds = decompose(stack - mean[None], rank, active_rank)
    left, right = join_sides(unstack(svds))
    stack, _ = lax.optimization_barrier((stack, svds.s))  # departures anew: the first ones would be kept until here
    cores = lax.map(lambda x: multiply(multiply(left.T, x - mean), right), stack)
    return RelativeParts(svds, left, right, cores, relative_distance(stack, mean))


def join_sides(svds: Sequence[TruncatedSVD]) -> tuple[Float[Array, "m q"], Float[Array, "n p"]]:
    """Orthonormal coordinates of all left and of all right singular vectors."""
    there = [drop_null_directions(d) for d in svds]
    return join_basis([d.u for d in there]), join_basis([d.v for d in there])


def join_basis(vectors: Sequence[Float[Array, "m r"]]) -> Float[Array, "m q"]:
    """Orthonormal coordinates of the span of all columns, as a partial isometry of at most m columns."""
    factor = polar_factor(jnp.concatenate(vectors, axis=1))
    return factor if factor.shape[1] <= factor.shape[0] else multiply(factor, factor.T)


def solve_relative(parts: RelativeParts, active_rank: Array | int | None = None) -> RelativeSolution:
    """The ancestor and the departures, from the cores alone."""
    count, rank = parts.svds.s.shape
    svds = [mask_svd(x, active_rank) for x in unstack(parts.svds)]
    if count == 2:  # decorrelated from its opposite, a direction is half of what it was
        u, v = multiply(parts.left.T, svds[0].u * (svds[0].s / 2)[None, :]), multiply(parts.right.T, svds[0].v)
        return RelativeSolution(jnp.zeros_like(parts.cores[0]), u[None], v[None], jnp.zeros_like(parts.rho))
    if active_rank is None:
        return solve_cores(parts.cores, count_directions(parts.left, parts.right), rank)
    inside = [d._replace(u=multiply(parts.left.T, d.u), v=multiply(parts.right.T, d.v)) for d in svds]
    left, right = join_sides(inside)
    found = solve_cores(project(left, parts.cores, right), count_directions(left, right), rank, active_rank)
    u, v = (vmap(multiply, (None, 0))(basis, x) for basis, x in ((left, found.u), (right, found.v)))
    return RelativeSolution(multiply(multiply(left, found.ancestor), right.T), u, v, found.discord)


def count_directions(left: Float[Array, "m q"], right: Float[Array, "n p"]) -> Float[Array, ""]:
    """The smaller dimension of the spans of two partial isometries' columns, at least 1."""
    sizes = [jnp.round(lax.stop_gradient(jnp.sum(basis**2))) for basis in (left, right)]
    return jnp.maximum(jnp.minimum(*sizes), 1)


def solve_cores(
    cores: Float[Array, "k q p"],
    directions: Float[Array, ""] | float,
    rank: int,
    active_rank: Array | int | None = None,
) -> RelativeSolution:
    """Steps 1 and 2 of `relative`.

    Args:
        cores: of every model; those of models that are all equal are zero.
        directions: dimension of the smaller span (a core's other rows and columns are zero).
        rank: directions kept of every departure.
    """
    size = jnp.sqrt(jnp.mean(frobenius_norm(cores) ** 2) + jnp.finfo(cores.dtype).tiny)
    ancestor = nuclear_median(cores / size, directions) * size
    departures = cores - ancestor[None]
    svds = drop_null_directions(decompose(departures, min(rank, *cores.shape[1:]), active_rank))
    left, right = decorrelate_directions(svds)
    left, own = DECORRELATED * left, (1 - DECORRELATED) * svds.u * svds.s[:, None, :]
    u, v = jnp.concatenate([left, own], axis=-1), jnp.concatenate([right, svds.v], axis=-1)
    return RelativeSolution(ancestor, u, v, overlap_deviation(departures))


def overlap_deviation(departures: Float[Array, "k q p"]) -> Float[Array, ""]:
    """Standard deviation, over pairs, of two departures' inner product in units of their mean squared norm.

    0, and with a derivative of 0, where they do not deviate.
    """
    count = departures.shape[0]
    flat = departures.reshape(count, -1)
    products = multiply(flat, flat.T)
    energy = jnp.trace(products) / count
    variance = jnp.var(products[jnp.triu_indices(count, 1)] / jnp.where(energy > 0, energy, 1))
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def nuclear_median(cores: Float[Array, "k q p"], directions: Float[Array, ""] | float) -> Float[Array, "q p"]:
    """`argmin_C sum_k |c_k - C|_*` of cores of mean square norm 1, by iteratively reweighted least squares.

    With the nuclear norm `|d|_* = tr (d d^T)^(-1/2) d d^T`, each step minimises
    `sum_k tr W_k d d^T + tr V_k d^T d` at the weights `W_k = (d d^T + e)^(-1/2)`, `V_k = (d^T d + e)^(-1/2)` of the
    step before.

    Mohan & Fazel, Iterative reweighted algorithms for matrix rank minimization, JMLR 13 (2012), for the weights.
    """
    floor = FLOOR / directions

    def weigh(d: Float[Array, "q p"]) -> Float[Array, "q q"]:
        return inverse_square_root(multiply(d, d.T) + floor * jnp.eye(d.shape[0], dtype=d.dtype))

    def reweigh(median: Float[Array, "q p"], _: None) -> tuple[Float[Array, "q p"], None]:
        rest = cores - median[None]
        left = map_batch(weigh, rest)
        rest, left = lax.optimization_barrier((rest, left))  # see solve_sylvester
        right = map_batch(lambda d: weigh(d.T), rest)
        pulled = vmap(multiply)(left, cores) + vmap(multiply)(cores, right)
        return solve_sylvester(left.sum(0), right.sum(0), pulled.sum(0)), None

    return lax.scan(reweigh, cores.mean(0), length=REWEIGHTINGS)[0]


def decorrelate_directions(svds: TruncatedSVD) -> tuple[Float[Array, "k m r"], Float[Array, "k n r"]]:
    """Polar factors of all models' vectors side by side, model by model, the left ones times their singular values.

    Directions that models share beyond rounding are counted once: the factors are partial isometries.
    """
    there = drop_null_directions(svds)
    u, v = (polar_factor(jnp.concatenate(list(x), axis=1)) for x in (there.u, there.v))
    left, right = (jnp.moveaxis(x.reshape(x.shape[0], len(svds.s), -1), 1, 0) for x in (u, v))
    return left * svds.s[:, None, :], right


def join_directions(u: Float[Array, "k m r"], v: Float[Array, "k n r"]) -> Float[Array, "m n"]:
    """`sum_k u_k v_k^T` as one product."""
    left, right = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in (u, v))
    return multiply(left, right.T)


def build_relative(
    stack: Float[Array, "k m n"],
    parts: RelativeParts,
    solution: RelativeSolution,
    active_rank: Array | int | None = None,
    scale: Array | float = 1.2,
    reach: Array | float = 0.0018,
    directions: Array | float = 1.0,
    rest: Array | float = 0.0,
) -> MergeOutput:
    """Back from the cores, see `relative`."""
    count, dtype = stack.shape[0], stack.dtype
    if active_rank is not None:
        active_rank = jnp.minimum(active_rank, parts.svds.s.shape[-1])
    svds = [mask_svd(x, active_rank) for x in unstack(parts.svds)]
    described = describe_correction(parts.rho, solution.discord, scale, reach)
    stats = svd_stats(svds, active_rank) | described
    mean = stack_mean(stack)
    a, b = jnp.asarray(directions, dtype), jnp.asarray(rest, dtype)
    core = solution.ancestor
    if count > 2 or a.ndim:  # two equal coefficients cancel; no rounding of the task vectors may leak in
        a = a[:1] - a[1:] if count == 2 else a
        if a.ndim > 1:  # the same of what is decorrelated and of what is not
            a = jnp.tile(a, solution.u.shape[-1] // solution.rank)
        u = solution.u * a.reshape(-1, 1, a.shape[1] if a.ndim > 1 else 1)
        core = core + jnp.asarray(scale, dtype) * join_directions(u, solution.v)
    elif not b.ndim:
        return MergeOutput(mean, stats)
    core, merged = described["trust"] * core, mean
    if b.ndim:
        core = core - jnp.tensordot(b, parts.cores, axes=1, precision=PRECISION)
        merged = merged + jnp.tensordot(b, stack - mean[None], axes=1, precision=PRECISION)
    return MergeOutput(merged + multiply(multiply(parts.left, core), parts.right.T), stats)


def describe_correction(
    rho: Float[Array, ""], discord: Float[Array, ""], scale: Array | float, reach: Array | float
) -> dict[str, Array]:
    """What the report says of how far the merge leaves the mean."""
    trust = trust_correction(rho, discord, reach)
    return {"rho": rho, "discord": discord, "trust": trust, "scale": jnp.asarray(scale, rho.dtype)}


def trust_correction(rho: Float[Array, ""], discord: Float[Array, ""], reach: Array | float) -> Float[Array, ""]:
    """`t = 1 / (1 + (rho discord / reach)^2)`, see `relative`."""
    return 1 / (1 + (rho * discord / jnp.asarray(reach, rho.dtype)) ** 2)


def project(
    left: Float[Array, "m q"], stack: Float[Array, "k m n"], right: Float[Array, "n p"]
) -> Float[Array, "k q p"]:
    """`left^T x right` of every x."""
    return jnp.stack([multiply(multiply(left.T, x), right) for x in stack])


def multiply(a: Float[Array, "m n"], b: Float[Array, "n p"]) -> Float[Array, "m p"]:
    """The product at full precision on every platform."""
    return jnp.matmul(a, b, precision=PRECISION)


RELATIVE_STAGES = Stages(prepare_relative, solve_relative, build_relative)
