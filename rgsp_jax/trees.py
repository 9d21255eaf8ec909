"""Merging of pytrees of arrays: the same methods on any tree, Flax trees included, under jit."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    leaves = sort_leaves(
        trees, chosen, hyperparameters, base=base, inputs=inputs, key=key, layout=layout, model_type=model_type
    )
    merged, stats = keep_leaves(leaves, chosen, hyperparameters)
    for group in leaves.groups:
        outputs = split_group(group, leaves, merge_group(chosen, *stack_group(group, leaves), hyperparameters))
        for i, (leaf, leaf_stats) in zip(group.members, outputs, strict=True):
            merged[i], stats[leaves.names[i]] = leaf, leaf_stats
    return join_leaves(leaves, merged), TreeReport(stats, leaves.done(chosen))


@dataclasses.dataclass(frozen=True)
class LeafGroup:
    """Leaves whose matrices have one shape and dtype, and what they are merged by is known in one form."""

    members: tuple[int, ...]
    views: tuple[MatrixView, ...]
    beside: tuple[dict[str, Any], ...]
    """For every matrix, what the method takes beside the stack and the base."""


@dataclasses.dataclass(frozen=True)
class SortedLeaves:
    """The leaves of some trees by what a method does with them."""

    structure: Any
    names: tuple[str, ...]
    columns: tuple[tuple[Array, ...], ...]
    """Of every leaf, the trees' arrays, the base's last where the method needs it."""
    actions: tuple[str, ...]
    """"method", "average", "first" or "copy"."""
    groups: tuple[LeafGroup, ...]
    """Of those merged by the method."""
    count: int
    """Trees, without the base."""

    def done(self, method: Method) -> tuple[tuple[str, str], ...]:
        """(path, what was done) for a report."""
        done = {"method": method.name, "average": "average", "copy": "copy", "first": "copy"}
        return tuple((name, done[action]) for name, action in zip(self.names, self.actions, strict=True))


def sort_leaves(
    trees: Sequence[PyTree],
    method: Method,
    hyperparameters: Mapping[str, Any],
    *,
    base: PyTree | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    key: Array | None = None,
    layout: Layout = "auto",
    model_type: str | None = None,
) -> SortedLeaves:
    """Check the trees and sort their leaves; arguments and ValueError as in `merge`."""
    with_base = "base" in method.needs
    flat = [
        jax.tree_util.tree_flatten_with_path(tree)
        for tree in (*trees, *([base] if with_base and base is not None else []))
    ]
    check_trees(method, flat, hyperparameters, {"base": base, "covariances": inputs, "key": key})
    inputs, key = inputs or {}, key if "key" in method.needs else None
    names = tuple(leaf_name(path) for path, _ in flat[0][0])
    columns = tuple(tuple(jnp.asarray(leaves[i][1]) for leaves, _ in flat) for i in range(len(names)))
    rules = [
        assign_rule(
            method,
            column[0].shape,
            classify(name, column[0].shape, column[0].dtype, layout, model_type),
            name in inputs,
        )
        for name, column in zip(names, columns, strict=True)
    ]
    found = defaultdict(list)
    for i, ((_, view), column) in enumerate(zip(rules, columns, strict=True)):
        if view is not None:
            known = inputs[names[i]] if "covariances" in method.needs else None
            like = tuple(x.shape for x in jax.tree.leaves(known)), jax.tree.structure(known)
            found[view.matrices[1:], column[0].dtype, like].append(i)
    groups = []
    for members in found.values():
        views = tuple(view for view in (rules[i][1] for i in members) if view is not None)
        beside = tuple(
            ({"inputs": inputs[names[i]]} if "covariances" in method.needs else {})
            | ({} if key is None else {"key": fold_twice(key, i, part)})
            for i, view in zip(members, views, strict=True)
            for part in range(view.matrices[0])
        )
        groups.append(LeafGroup(tuple(members), views, beside))
    return SortedLeaves(flat[0][1], names, columns, tuple(action for action, _ in rules), tuple(groups), len(trees))


def keep_leaves(
    leaves: SortedLeaves, method: Method, hyperparameters: Mapping[str, Any]
) -> tuple[list[Array | None], dict[str, dict[str, Array]]]:
    """Leaves that the method leaves alone, averaged or the first tree's, None for the others; and their stats."""
    merged: list[Array | None] = [None] * len(leaves.names)
    stats: dict[str, dict[str, Array]] = {}
    for i, (name, action, column) in enumerate(zip(leaves.names, leaves.actions, leaves.columns, strict=True)):
        if action == "average":
            merged[i] = average_leaf(column[: leaves.count], method.rest_settings(hyperparameters, leaves.count))
        elif action != "method":
            merged[i] = column[0]
        if action == "copy":
            stats[name] = {"buffer_differs": jnp.stack([jnp.any(x != column[0]) for x in column]).any()}
    return merged, stats


def join_leaves(leaves: SortedLeaves, merged: Sequence[Array | None]) -> PyTree:
    """The tree of these leaves."""
    return jax.tree_util.tree_unflatten(leaves.structure, merged)


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


def stack_group(group: LeafGroup, leaves: SortedLeaves, dtype: Any = None) -> tuple[Array, Any]:
    """The matrices of a group [B, K, m, n], the base the last of the K, and what each has beside it, in B too.

    They are in `dtype`, by default the one that they are merged in.
    """
    columns = [leaves.columns[i] for i in group.members]
    dtype = compute_dtype(columns[0][0].dtype) if dtype is None else dtype
    stacks = [
        jnp.stack([view.to_matrices(x.astype(dtype)) for x in column], axis=1)
        for view, column in zip(group.views, columns, strict=True)
    ]
    return jnp.concatenate(stacks), jax.tree.map(lambda *xs: jnp.stack(xs), *group.beside)


def merge_group(method: Method, stacks: Float[Array, "b k m n"], beside: Any, hyperparameters: Any) -> MergeOutput:
    """Merge matrices of one shape as one batch."""

    def merge_one(stack: Array, own: dict[str, Any]) -> MergeOutput:
        models, beside = take_base(method, stack)
        return method.fn(models, **beside, **own, **hyperparameters)

    return map_batch(merge_one, stacks, beside)


def take_base(method: Method, stack: Float[Array, "k m n"]) -> tuple[Array, dict[str, Array]]:
    """The models, and the base behind them for methods that need it."""
    return (stack[:-1], {"base": stack[-1]}) if "base" in method.needs else (stack, {})


def find_rows(views: Sequence[MatrixView]) -> list[slice]:
    """Where every leaf's matrices are among those of its group."""
    stops = list(itertools.accumulate(view.matrices[0] for view in views))
    return [slice(stop - view.matrices[0], stop) for view, stop in zip(views, stops, strict=True)]


def split_group(group: LeafGroup, leaves: SortedLeaves, output: MergeOutput) -> list[tuple[Array, dict[str, Array]]]:
    """Merged leaf and stats of every member."""
    results = []
    for i, view, rows in zip(group.members, group.views, find_rows(group.views), strict=True):
        leaf = view.from_matrices(output.merged[rows]).astype(leaves.columns[i][0].dtype)
        leaf_stats = {name: x[rows] if view.batch else x[rows.start] for name, x in output.stats.items()}
        results.append((leaf, leaf_stats))
    return results
