"""Merging of pytrees of arrays: the same methods on any tree, Flax trees included, under jit."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.method import Method, compute_dtype
from rgsp_jax.registry import methods
from rgsp_jax.rules import Layout, MatrixView, TensorRule, classify, flatten_view
from rgsp_jax.types import InputStatistics, MergeOutput

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TreeReport:
    """What was done to every leaf of a merged tree; a pytree itself, so that it passes through jit."""

    stats: dict[str, dict[str, Array]]
    """Path -> the method's stats; leaves that stack several matrices have them stacked on a leading axis."""
    rules: tuple[tuple[str, str], ...] = dataclasses.field(metadata=dict(static=True))
    """(path, what was done: the method's name, "average" or "copy") of every leaf, in the tree's order."""


def leaf_name(path: Sequence[Any]) -> str:
    """Slashed path of a leaf; the accessors of Flax variables are no part of a name."""
    name = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/raw_value")


def merge(
    trees: Sequence[PyTree],
    method: str | Method = "relative",
    *,
    base: PyTree | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    key: Array | None = None,
    layout: Layout = "auto",
    model_type: str | None = None,
    **hyperparameters: Any,
) -> tuple[PyTree, TreeReport]:
    """Merge pytrees of arrays leaf by leaf; pure, and jit-compatible in the trees and in traced hyperparameters.

    Matrices and kernels of any rank (convolutions, stacked experts, attention heads) are merged by the method through
    an inverse pair of reshapes; leaves of equal matrix shape run as one batch. Vectors and embeddings are averaged,
    unless the method takes whole tensors (`scope`) or keeps the first tree's (`rest`), as it then does with matrices
    whose inputs are not known. Integers and buffers are the first tree's; the flag `buffer_differs` in their stats
    says where the others disagree.

    Args:
        trees: K trees of one structure with leaves of equal shapes; dtypes may differ, the first tree's are kept.
        method: a name in `rgsp_jax.methods`, or a Method.
        base: the common ancestor, of the same structure, for methods that need it.
        inputs: slashed path of a matrix leaf -> statistics of its inputs, for methods that need covariances.
        key: random key for methods that need one; every matrix gets its own from it.
        layout, model_type: how kernels are laid out, see `rgsp_jax.rules.classify`.
        hyperparameters: of the method.

    Returns:
        The merged tree and a report.

    Raises:
        ValueError: structures or shapes differ (all offenders are listed), unknown method or hyperparameter, K out of
            the method's range.
    """
    chosen = resolve_method(method)
    with_base = "base" in chosen.needs
    flat = [
        jax.tree_util.tree_flatten_with_path(tree)
        for tree in (*trees, *([base] if with_base and base is not None else []))
    ]
    check_trees(chosen, flat, hyperparameters, {"base": base, "covariances": inputs, "key": key})
    inputs, key = inputs or {}, key if "key" in chosen.needs else None
    names = [leaf_name(path) for path, _ in flat[0][0]]
    columns = [tuple(jnp.asarray(leaves[i][1]) for leaves, _ in flat) for i in range(len(names))]
    rules = [
        assign_rule(
            chosen,
            column[0].shape,
            classify(name, column[0].shape, column[0].dtype, layout, model_type),
            name in inputs,
        )
        for name, column in zip(names, columns, strict=True)
    ]
    merged: list[Array | None] = [None] * len(names)
    stats: dict[str, dict[str, Array]] = {}
    groups = defaultdict(list)
    for i, ((action, view), column) in enumerate(zip(rules, columns, strict=True)):
        if view is not None:
            known = inputs[names[i]] if "covariances" in chosen.needs else None
            like = tuple(x.shape for x in jax.tree.leaves(known)), jax.tree.structure(known)
            groups[view.matrices[1:], column[0].dtype, like].append(i)
        elif action == "average":
            merged[i] = average_leaf(column[: len(trees)], chosen.rest_settings(hyperparameters, len(trees)))
        elif action == "first":
            merged[i] = column[0]
        else:
            merged[i] = column[0]
            stats[names[i]] = {"buffer_differs": jnp.stack([jnp.any(x != column[0]) for x in column]).any()}
    for members in groups.values():
        views = [view for view in (rules[i][1] for i in members) if view is not None]
        beside = [
            ({"inputs": inputs[names[i]]} if "covariances" in chosen.needs else {})
            | ({} if key is None else {"key": fold_twice(key, i, part)})
            for i, view in zip(members, views, strict=True)
            for part in range(view.matrices[0])
        ]
        outputs = merge_group(chosen, [columns[i] for i in members], views, hyperparameters, beside)
        for i, (leaf, leaf_stats) in zip(members, outputs, strict=True):
            merged[i], stats[names[i]] = leaf, leaf_stats
    done = {"method": chosen.name, "average": "average", "copy": "copy", "first": "copy"}
    report = TreeReport(stats, tuple((name, done[action]) for name, (action, _) in zip(names, rules, strict=True)))
    return jax.tree_util.tree_unflatten(flat[0][1], merged), report


def fold_twice(key: Array, first: int, second: int) -> Array:
    """The random key of one matrix of one leaf."""
    return jax.random.fold_in(jax.random.fold_in(key, first), second)


def resolve_method(method: str | Method) -> Method:
    """The Method of a name; ValueError lists the names there are."""
    if isinstance(method, Method):
        return method
    if method not in methods:
        raise ValueError(f"no method {method!r}; there are {', '.join(methods)}")
    return methods[method]


def check_trees(method: Method, flat: Sequence[Any], hyperparameters: Any, needs: Mapping[str, Any]) -> None:
    """Raise one ValueError with everything that is wrong."""
    problems = method.problems(hyperparameters)
    if problem := method.count_problem(len(flat) - ("base" in method.needs and needs["base"] is not None)):
        problems.append(problem)
    words = {"base": "base=, the common ancestor", "covariances": "inputs=, statistics of its inputs", "key": "key="}
    problems += [f"method {method.name!r} needs {words[need]}" for need in sorted(method.needs) if needs[need] is None]
    problems += check_structures(flat)
    if problems:
        raise ValueError("; ".join(problems))


def check_structures(flat: Sequence[Any]) -> list[str]:
    """How flattened trees differ from the first in structure and shapes, as sentences."""
    problems = []
    for k, (leaves, treedef) in enumerate(flat[1:], 2):
        if treedef != flat[0][1]:
            ours, theirs = ({leaf_name(path) for path, _ in x} for x in (flat[0][0], leaves))
            problems.append(
                f"tree {k} has another structure than tree 1"
                f" (only in 1: {sorted(ours - theirs)}, only in {k}: {sorted(theirs - ours)})"
            )
            continue
        problems += [
            f"{leaf_name(path)} is {jnp.shape(first)} in tree 1 and {jnp.shape(other)} in tree {k}"
            for (path, first), (_, other) in zip(flat[0][0], leaves, strict=True)
            if jnp.shape(first) != jnp.shape(other)
        ]
    return problems


def assign_rule(
    method: Method, shape: tuple[int, ...], rule: TensorRule, has_inputs: bool
) -> tuple[str, MatrixView | None]:
    """("method" | "average" | "first" | "copy", view) of a leaf under a method."""
    if rule.kind == "buffer":
        return "copy", None
    if method.scope == "tensors":
        return "method", flatten_view(shape)
    if rule.kind == "matrix" and (has_inputs or "covariances" not in method.needs):
        return "method", rule.view
    return method.rest, None


def average_leaf(column: tuple[Array, ...], settings: Mapping[str, Any]) -> Array:
    """Mean of one leaf, in the first tree's dtype."""
    dtype = compute_dtype(column[0].dtype)
    stack = jnp.stack([x.astype(dtype) for x in column])
    return methods["average"].fn(stack, **settings).merged.astype(column[0].dtype)


def merge_group(
    method: Method,
    columns: Sequence[tuple[Array, ...]],
    views: Sequence[MatrixView],
    hyperparameters: Any,
    beside: Sequence[dict[str, Any]],
) -> list[tuple[Array, dict[str, Array]]]:
    """Merge leaves whose matrices have one shape as one batch [B, K, m, n]; merged leaf and stats of each.

    `beside` has, for every matrix, what the method takes beside the stack; the base is the last of each column.
    """
    dtype = compute_dtype(columns[0][0].dtype)
    stacks = [
        jnp.stack([view.to_matrices(x.astype(dtype)) for x in column], axis=1)
        for view, column in zip(views, columns, strict=True)
    ]
    extras = jax.tree.map(lambda *xs: jnp.stack(xs), *beside)
    with_base = "base" in method.needs

    def merge_one(stack: Array, own: dict[str, Any]) -> MergeOutput:
        if with_base:
            return method.fn(stack[:-1], base=stack[-1], **own, **hyperparameters)
        return method.fn(stack, **own, **hyperparameters)

    output = map_batch(merge_one, jnp.concatenate(stacks), extras)
    results, start = [], 0
    for view, column in zip(views, columns, strict=True):
        rows = slice(start, start + view.matrices[0])
        start = rows.stop
        leaf = view.from_matrices(output.merged[rows]).astype(column[0].dtype)
        leaf_stats = {name: x[rows] if view.batch else x[rows.start] for name, x in output.stats.items()}
        results.append((leaf, leaf_stats))
    return results
