"""Candidates for `relative` that look beyond the departures of one matrix: heads, vectors, and where zero is.

A library of `relative_suite.py`; both families of its models have HEADS heads and kernels [in, out].
"""

from collections.abc import Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax import merge
from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import Hyperparameter, Method, Rank
from rgsp_jax.rgsp import prepare_relative, solve_relative
from rgsp_jax.rgsp.alignment import decompose
from rgsp_jax.rgsp.relative import build_relative, multiply
from rgsp_jax.types import MergeOutput

HEADS = 4
HEADED = ("query", "key", "value")

PyTree = Any
Strength = Annotated[Any, Hyperparameter("of the evidence; 1 is Bayes' rule", low=0)]
Level = Annotated[Any, Hyperparameter("log-odds beforehand that a departure is its own model's")]
Scale = Annotated[Any, Hyperparameter("as in `relative`", low=0)]


def merge_heads(problem: Mapping[str, Any]) -> PyTree:
    """`relative` with every head's queries, keys and values as a matrix of its own."""

    def is_headed(path: Any, leaf: Array) -> bool:
        return leaf.ndim == 2 and any(getattr(key, "key", None) in HEADED for key in path)

    def divide(path: Any, leaf: Array) -> Any:
        return jnp.split(leaf, HEADS, axis=1) if is_headed(path, leaf) else leaf

    trees = [jax.tree_util.tree_map_with_path(divide, tree) for tree in problem["experts"]]
    leaves = iter(jax.tree.leaves(merge(trees, "relative")[0]))

    def join(path: Any, leaf: Array) -> Array:
        if not is_headed(path, leaf):
            return next(leaves)
        return jnp.concatenate([next(leaves) for _ in range(HEADS)], axis=1)

    return jax.tree_util.tree_map_with_path(join, problem["experts"][0])


def merge_vectors(problem: Mapping[str, Any], ancestor: Any = 1.0, departures: Any = 0.0) -> PyTree:
    """`relative` with vectors by rule: so much of the way to their elementwise median, and so much of what departs.

    Args:
        problem: of a harness.
        ancestor: 0 leaves the mean, 1 is the median.
        departures: coefficient of their sum.
    """

    def merge_leaf(merged: Array, *leaves: Array) -> Array:
        if merged.ndim != 1:
            return merged
        stack = jnp.stack(leaves)
        median = jnp.median(stack, axis=0)
        moved = jnp.sum(stack - median[None], axis=0)
        return merged + ancestor * (median - stack.mean(0)) + departures * moved

    return jax.tree.map(merge_leaf, merge(problem["experts"], "relative")[0], *problem["experts"])


def merge_outward(
    stack: Float[Array, "k m n"],
    rank: Rank = 32,
    strength: Strength = 1.0,
    level: Level = 0.0,
    scale: Scale = 1.2,
) -> MergeOutput:
    """`relative` whose departures count by the odds that their own model moved, told by where zero is.

    Along a direction in which one model lies s away from the others, theirs is a coordinate a, its own a + s. Whose is
    the ancestor's? Its coordinates are drawn about zero with the variance tau^2 of the mean's, so the log-odds that
    this model moved are `((a + s)^2 - a^2) / (2 tau^2)`. Of two models, which share their directions, each direction is
    given to one of them by the same odds.
    """
    parts = prepare_relative(stack, rank)
    solution = solve_relative(parts)
    mean = multiply(multiply(parts.left.T, stack_mean(stack)), parts.right)
    variance = jnp.sum(mean**2) / (jnp.sum(parts.left**2) * jnp.sum(parts.right**2))
    if len(stack) == 2:
        u, s, v = parts.svds.u[0], parts.svds.s[0], parts.svds.v[0]
        between = jnp.sum(u * multiply(stack_mean(stack), v), axis=0)
        share = jnp.tanh(strength * between * s / variance)
        return build_relative(stack, parts, solution, scale=scale, directions=jnp.stack([share, -share]))
    svds = decompose(parts.cores - solution.ancestor[None], solution.rank, None)
    others = jnp.einsum("kqr,qp,kpr->kr", svds.u, mean + solution.ancestor, svds.v, precision="highest")
    odds = strength * svds.s * (2 * others + svds.s) / (2 * variance) + level
    return build_relative(stack, parts, solution, scale=scale, directions=jax.nn.sigmoid(odds))


OUTWARD = Method("relative_outward", merge_outward, "`relative` by the odds of who moved.", models=(2, None))
