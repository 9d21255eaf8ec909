"""Whole models as functions of a few coefficients: `mean + sum_k a_k tau_k + b_k rest_k`, leaf by leaf."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.method import compute_dtype
from rgsp_jax.rgsp import RelativeParts, automatic_scale, compose, relative_parts
from rgsp_jax.rules import Layout, MatrixView, classify
from rgsp_jax.trees import check_structures, leaf_name

PyTree = Any
Coefficients = dict[str, dict[str, Array]]
"""Leaf's slashed path -> "directions" ([K] or [K, r], matrices only) and "rest" ([K])."""
Granularity = Literal["model", "direction"]
Part = Literal["directions", "rest"]
PARTS: tuple[Part, ...] = ("directions", "rest")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """K models decomposed once: what `compose_tree` turns coefficients into a model with. A pytree: pass it to jit."""

    stacks: dict[str, Array]
    """Leaf -> the K models' [K, *shape]; leaves that are no weights have the first model's alone."""
    parts: dict[str, RelativeParts]
    """Matrix leaf -> its decomposition; a leaf of several matrices has them on a leading axis."""
    views: tuple[tuple[str, MatrixView], ...] = dataclasses.field(metadata=dict(static=True))
    """(matrix leaf, how it is viewed as matrices)."""
    buffers: frozenset[str] = dataclasses.field(metadata=dict(static=True))
    """Leaves that are no weights: kept from the first model."""
    structure: Any = dataclasses.field(metadata=dict(static=True))
    dtypes: tuple[Any, ...] = dataclasses.field(metadata=dict(static=True))
    """Of the first model's leaves, in the tree's order; the composed model has them."""
    models: int = dataclasses.field(metadata=dict(static=True))


def prepare_family(
    trees: Sequence[PyTree],
    rank: int | float = 0.05,
    *,
    layout: Layout = "auto",
    model_type: str | None = None,
) -> ModelFamily:
    """Decompose K models: the SVDs that every later composition goes without.

    Args:
        trees: K >= 2 pytrees of one structure with leaves of equal shapes.
        rank: leading directions of each relative task vector; a fraction is of min(m, n).
        layout, model_type: how kernels are laid out, see `rgsp_jax.rules.classify`.

    Raises:
        ValueError: fewer than two trees, or structures or shapes that differ (all offenders are listed).
    """
    if len(trees) < 2:
        raise ValueError(f"a family takes two models or more, not {len(trees)}")
    flat = [jax.tree_util.tree_flatten_with_path(tree) for tree in trees]
    if problems := check_structures(flat):
        raise ValueError("; ".join(problems))
    stacks: dict[str, Array] = {}
    parts: dict[str, RelativeParts] = {}
    views, buffers = [], set()
    for i, (path, first) in enumerate(flat[0][0]):
        name = leaf_name(path)
        rule = classify(name, jnp.shape(first), jnp.asarray(first).dtype, layout, model_type)
        if rule.kind == "buffer":
            stacks[name] = jnp.asarray(first)[None]
            buffers.add(name)
            continue
        leaves = [jnp.asarray(leaves[i][1]) for leaves, _ in flat]
        dtype = compute_dtype(*(leaf.dtype for leaf in leaves))
        stacks[name] = jnp.stack([leaf.astype(dtype) for leaf in leaves])
        if rule.kind == "matrix" and rule.view is not None:
            views.append((name, rule.view))
            matrices = jnp.stack([rule.view.to_matrices(leaf) for leaf in stacks[name]], axis=1)
            parts[name] = jax.lax.map(lambda stack: relative_parts(stack, rank), matrices)
    dtypes = tuple(jnp.asarray(leaf).dtype for _, leaf in flat[0][0])
    return ModelFamily(stacks, parts, tuple(views), frozenset(buffers), flat[0][1], dtypes, len(trees))


def start_coefficients(
    family: ModelFamily,
    per: Granularity = "model",
    *,
    learn: Sequence[Part] = PARTS,
    select: Any = None,
) -> Coefficients:
    """Coefficients at which the family's member is `relative` (of two models: their mean), leaf by leaf.

    Args:
        family: of the models.
        per: one coefficient of the directions per "model", or per model and "direction".
        learn: which kinds to hold; the others stay at their start in `compose_tree`.
        select: takes a leaf's path; leaves for which it is False are left out. All by default.
    """
    coefficients: Coefficients = {}
    for name, stack in family.stacks.items():
        if name in family.buffers or (select is not None and not select(name)):
            continue
        own: dict[str, Array] = {}
        if name in family.parts and "directions" in learn:
            start = start_directions(family.parts[name], family.models)
            rank = family.parts[name].u.shape[-1]
            own["directions"] = start if per == "model" else jnp.repeat(start[:, None], rank, axis=1)
        if "rest" in learn:
            own["rest"] = jnp.zeros(family.models, stack.dtype)
        if own:
            coefficients[name] = own
    return coefficients


def start_directions(parts: RelativeParts, models: int) -> Array:
    """[K] coefficients of `relative`: its automatic scale, the mean of it over stacked matrices; 0 for two models."""
    scale = automatic_scale(parts.rho).mean() if models > 2 else jnp.zeros((), parts.rho.dtype)
    return jnp.broadcast_to(scale, (models,))


def compose_tree(family: ModelFamily, coefficients: Coefficients) -> PyTree:
    """The family's member at some coefficients, in the first model's dtypes; linear in them, and differentiable.

    Matrices: `mean + sum_k (sum_j a_kj u_kj v_kj^T + b_k rest_k)`; vectors and embeddings `mean + sum_k b_k (theta_k -
    mean)`. What a leaf has no coefficients for is as at the start.
    """
    views = dict(family.views)
    leaves = []
    for (name, stack), dtype in zip(family.stacks.items(), family.dtypes, strict=True):
        own = coefficients.get(name, {})
        if name in family.buffers:
            leaf = stack[0]
        elif name in views:
            leaf = compose_leaf(family.parts[name], stack, views[name], own, family.models)
        else:
            leaf = stack_mean(stack)
            if "rest" in own:
                leaf = leaf + jnp.tensordot(own["rest"].astype(stack.dtype), stack - leaf[None], axes=1)
        leaves.append(leaf.astype(dtype))
    return jax.tree_util.tree_unflatten(family.structure, leaves)


def compose_leaf(parts: RelativeParts, stack: Array, view: MatrixView, own: Mapping[str, Array], models: int) -> Array:
    """One matrix leaf; the matrices it stacks share their coefficients."""
    directions = own["directions"] if "directions" in own else start_directions(parts, models)
    matrices = jnp.stack([view.to_matrices(leaf) for leaf in stack], axis=1)

    def compose_one(operands: tuple[RelativeParts, Array]) -> Array:
        return compose(*operands, directions.astype(stack.dtype), own.get("rest"))

    if view.matrices[0] == 1:
        only = jax.tree.map(lambda x: x[0], (parts, matrices))
        return view.from_matrices(compose_one(only)[None])
    return view.from_matrices(jax.lax.map(compose_one, (parts, matrices)))


def export_settings(
    family: ModelFamily, coefficients: Coefficients, rank: int | float
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Leaf -> (method, hyperparameters as plain data) that give the composed leaf again, without the data it was
    learned from: `relative_weighted` for matrices, `average` for the rest.

    `mean + sum_k b_k (theta_k - mean)` is the average with coefficients `1 / K + b_k - sum_j b_j / K`.
    """
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in family.stacks:
        own = coefficients.get(name, {})
        if name in family.buffers:
            continue
        if name in family.parts:
            start = start_directions(family.parts[name], family.models)
            directions = jnp.asarray(own.get("directions", start)).tolist()
            rest = jnp.asarray(own["rest"]).tolist() if "rest" in own else 0.0
            settings[name] = "relative_weighted", {"rank": rank, "directions": directions, "rest": rest}
        else:
            b = jnp.asarray(own.get("rest", jnp.zeros(family.models)))
            settings[name] = "average", {"coefficients": (1 / family.models + b - b.mean()).tolist()}
    return settings
