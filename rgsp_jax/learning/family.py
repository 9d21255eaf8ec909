"""Whole models as functions of a few coefficients: any method's run-time hyperparameters, leaf by leaf."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.learning.parameters import constrain, find_start, has_start, list_learnable, unconstrain
from rgsp_jax.method import Method, compute_dtype
from rgsp_jax.registry import methods
from rgsp_jax.rules import Layout, MatrixView, classify
from rgsp_jax.trees import assign_rule, check_trees, leaf_name, resolve_method
from rgsp_jax.types import InputStatistics

PyTree = Any
Coefficients = dict[str, dict[str, Array]]
"""Leaf's slashed path, or MATRICES and TENSORS where all leaves share them -> hyperparameter -> unconstrained value."""
Granularity = Literal["model", "layer", "direction"]
MATRICES, TENSORS = "matrices", "tensors"
DIRECTIONS = "directions"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixGroup:
    """Matrices of one shape, decomposed: B of them, of K models."""

    stack: Array
    """[B, K, m, n], in the models' dtype."""
    parts: Any
    """What the method's first stage made of each, on a leading axis."""
    solution: Any
    """What its second stage made of that, where nothing that is learned enters there; else None."""
    beside: dict[str, Any]
    """Base or input statistics of each, for methods that need them."""
    members: tuple[tuple[str, MatrixView, int], ...] = dataclasses.field(metadata=dict(static=True))
    """(leaf, how it is viewed as matrices, which of the B is its first)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """K models decomposed once: what `compose_tree` turns coefficients into a model with. A pytree: pass it to jit."""

    groups: tuple[MatrixGroup, ...]
    """Of what the method merges."""
    tensors: dict[str, Array]
    """Other leaf -> the K models' [K, *shape]; leaves that are no weights have the first model's alone."""
    starts: dict[str, dict[str, Array]]
    """Leaf of a group -> hyperparameter -> where learning starts."""
    learn: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
    """What may be learned: hyperparameters of the method, and TENSORS, coefficients of the leaves it leaves out."""
    method: str = dataclasses.field(metadata=dict(static=True))
    settings: tuple[tuple[str, Any], ...] = dataclasses.field(metadata=dict(static=True))
    """Hyperparameters that are given and not learned."""
    buffers: frozenset[str] = dataclasses.field(metadata=dict(static=True))
    """Leaves that are no weights: kept from the first model."""
    order: tuple[tuple[str, Any], ...] = dataclasses.field(metadata=dict(static=True))
    """(leaf, dtype) of the first model in the tree's order; the composed model has them."""
    structure: Any = dataclasses.field(metadata=dict(static=True))
    models: int = dataclasses.field(metadata=dict(static=True))


def prepare_family(
    trees: Sequence[PyTree],
    method: str | Method = "relative_weighted",
    *,
    learn: Sequence[str] | None = None,
    base: PyTree | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    layout: Layout = "auto",
    model_type: str | None = None,
    **hyperparameters: Any,
) -> ModelFamily:
    """Decompose K models: what every later composition goes without. Pure and differentiable in the trees.

    Args:
        trees: K >= 2 pytrees of one structure with leaves of equal shapes.
        method: whose run-time hyperparameters are learned; a name in `rgsp_jax.methods`.
        learn: which of them, and "tensors" for coefficients of the vectors and embeddings that the method averages.
            By default all that are numbers by nature, and "tensors" where it averages the rest. What the method's
            decompositions depend on (its rank) cannot be.
        base, inputs: as in `rgsp_jax.merge`, for methods that need them.
        layout, model_type: how kernels are laid out, see `rgsp_jax.rules.classify`.
        hyperparameters: of the method, that stay as they are or where learning starts.

    Raises:
        ValueError: fewer than two trees, structures or shapes that differ (all offenders are listed), an unknown
            hyperparameter, or one that cannot be learned.
    """
    chosen = resolve_method(method)
    if len(trees) < 2:
        raise ValueError(f"a family takes two models or more, not {len(trees)}")
    learned = check_learned(chosen, learn, hyperparameters)
    with_base = "base" in chosen.needs
    flat = [jax.tree_util.tree_flatten_with_path(tree) for tree in (*trees, *([base] if base is not None else []))]
    check_trees(chosen, flat, hyperparameters, {"base": base, "covariances": inputs, "key": None})
    inputs = inputs or {}
    tensors: dict[str, Array] = {}
    found: dict[Any, list[tuple[str, MatrixView, Array, Any]]] = defaultdict(list)
    buffers, order = set(), []
    for i, (path, _) in enumerate(flat[0][0]):
        name, leaves = leaf_name(path), [jnp.asarray(leaves[i][1]) for leaves, _ in flat]
        order.append((name, leaves[0].dtype))
        rule = classify(name, leaves[0].shape, leaves[0].dtype, layout, model_type)
        action, view = assign_rule(chosen, leaves[0].shape, rule, name in inputs)
        if view is not None:
            stack = jnp.stack([view.to_matrices(leaf) for leaf in leaves], axis=1)
            beside = {"inputs": inputs[name]} if "covariances" in chosen.needs else {}
            like = jax.tree.map(jnp.shape, beside)
            found[view.matrices[1:], stack.dtype, str(like)].append((name, view, stack, beside))
        elif action == "copy":
            tensors[name] = leaves[0][None]
            buffers.add(name)
        else:
            tensors[name] = jnp.stack(leaves[: len(trees)])
    fixed = tuple(sorted((k, v) for k, v in hyperparameters.items() if k not in learned))
    groups = tuple(make_group(chosen, members, learned, dict(fixed), with_base) for members in found.values())
    starts = {
        name: start
        for group in groups
        for name, start in start_group(chosen, group, learned, hyperparameters, len(trees)).items()
    }
    return ModelFamily(
        groups=groups,
        tensors=tensors,
        starts=starts,
        learn=learned,
        method=chosen.name,
        settings=fixed,
        buffers=frozenset(buffers),
        order=tuple(order),
        structure=flat[0][1],
        models=len(trees),
    )


def check_learned(method: Method, learn: Sequence[str] | None, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What is learned; ValueError names what cannot be."""
    possible = list_learnable(method)
    averaged = (TENSORS,) if method.scope == "matrices" and method.rest == "average" else ()
    if learn is None:
        return tuple(name for name in possible if has_start(method, name, given)) + averaged
    if unknown := [name for name in learn if name not in (*possible, *averaged)]:
        known = ", ".join((*possible, *averaged)) or "nothing"
        raise ValueError(f"{', '.join(map(repr, unknown))} of {method.name!r} cannot be learned; there is {known}")
    return tuple(dict.fromkeys(learn))


def make_group(
    method: Method,
    members: Sequence[tuple[str, MatrixView, Array, Any]],
    learned: Iterable[str],
    fixed: Mapping[str, Any],
    with_base: bool,
) -> MatrixGroup:
    """Decompose matrices of one shape."""
    stacks = jnp.concatenate([stack for _, _, stack, _ in members])
    counts = [view.matrices[0] for _, view, _, _ in members]
    beside = jax.tree.map(
        lambda *xs: jnp.stack(xs), *(own for (*_, own), n in zip(members, counts, strict=True) for _ in range(n))
    )
    if with_base:
        beside = {**beside, "base": stacks[:, -1]}
        stacks = stacks[:, :-1]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    where = tuple((name, view, start) for (name, view, _, _), start in zip(members, starts, strict=True))
    parts = solution = None
    if method.stages is not None:
        known = not set(learned) & method.stages.arguments("solve")
        parts, solution = decompose_stacks(method, tuple(sorted(fixed.items())), known, stacks, beside)
    return MatrixGroup(stacks, parts, solution, beside, where)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def decompose_stacks(
    method: Method, settings: tuple[tuple[str, Any], ...], known: bool, stacks: Array, beside: dict[str, Any]
) -> tuple[Any, Any]:
    """(parts, solution) of every matrix; the solution is None where it is not `known` before learning."""
    stages, fixed = method.stages, dict(settings)
    assert stages is not None

    def decompose_one(stack: Array, own: dict[str, Any]) -> tuple[Any, Any]:
        parts = stages.prepare(widen(stack), **stages.pick("prepare", method.defaults, fixed, own))
        return parts, stages.solve(parts, **stages.pick("solve", fixed)) if known else None

    return map_batch(decompose_one, stacks, beside)


def widen(x: Array) -> Array:
    """In the dtype that merges are computed in."""
    return x.astype(compute_dtype(x.dtype))


def start_group(
    method: Method, group: MatrixGroup, learned: Sequence[str], given: Mapping[str, Any], models: int
) -> dict[str, dict[str, Array]]:
    """Leaf -> hyperparameter -> unconstrained value at which learning starts."""
    starts: dict[str, dict[str, Array]] = {}
    dtype = compute_dtype(group.stack.dtype)
    for name, view, first in group.members:
        rows = slice(first, first + view.matrices[0])
        parts = jax.tree.map(lambda x, rows=rows: x[rows], group.parts)
        values = {key: find_start(method, key, given, parts, models, dtype) for key in learned if key != TENSORS}
        starts[name] = {key: unconstrain(method, key, value) for key, value in values.items()}
    return starts


def start_coefficients(
    family: ModelFamily,
    per: Granularity = "layer",
    *,
    learn: Sequence[str] | None = None,
    select: Callable[[str], bool] | None = None,
) -> Coefficients:
    """Coefficients at which the family's member is the method with the settings it was prepared with.

    Of `relative_weighted` that is `relative` (of two models: their mean).

    Args:
        family: of the models.
        per: values per "layer" (tensor), for all of the "model" in common, or per "direction" where the
            hyperparameter has one for each; those for a whole model count in units of each layer's start.
        learn: which of `family.learn` to hold; the others stay at their start in `compose_tree`.
        select: takes a leaf's path; leaves for which it is False are left out. All by default.
    """
    wanted = family.learn if learn is None else tuple(learn)
    coefficients: Coefficients = {}
    for group in family.groups:
        for name, *_ in group.members:
            if select is not None and not select(name):
                continue
            own = {key: family.starts[name][key] for key in wanted if key in family.starts[name]}
            if per == "direction" and DIRECTIONS in own:
                rank = group.solution.u.shape[-1]
                own[DIRECTIONS] = jnp.repeat(own[DIRECTIONS][:, None], rank, axis=1)
            if own:
                coefficients[name] = own
    if TENSORS in wanted:
        for name, stack in family.tensors.items():
            if name not in family.buffers and (select is None or select(name)):
                coefficients[name] = {TENSORS: jnp.zeros(family.models, compute_dtype(stack.dtype))}
    return share_coefficients(family, coefficients) if per == "model" else coefficients


def share_coefficients(family: ModelFamily, coefficients: Coefficients) -> Coefficients:
    """One value of each for all leaves: offsets from every leaf's start, of directions in units of it."""
    shared: Coefficients = {}
    for name, own in coefficients.items():
        for key, value in own.items():
            start = jnp.ones_like(value) if key == DIRECTIONS else jnp.zeros_like(value)
            first = shared.setdefault(TENSORS if key == TENSORS else MATRICES, {}).setdefault(key, start)
            if first.shape != start.shape:
                raise ValueError(
                    f"{key} has shape {first.shape} in one layer and {start.shape} in {name}: learn it per layer"
                )
    return shared


def find_own(family: ModelFamily, coefficients: Coefficients, name: str) -> dict[str, Array]:
    """A leaf's unconstrained values, from its own entry, from what all leaves share, or from the start."""
    start = family.starts.get(name, {})
    shared = coefficients.get(MATRICES if start or name not in family.tensors else TENSORS, {})
    own = {key: start[key] * v if key == DIRECTIONS else start.get(key, 0) + v for key, v in shared.items()}
    return {**start, **own, **coefficients.get(name, {})}


def compose_tree(family: ModelFamily, coefficients: Coefficients) -> PyTree:
    """The family's member at some coefficients, in the first model's dtypes; differentiable in them.

    `relative_weighted`: matrices are `mean + sum_k (sum_j a_kj u_kj v_kj^T + b_k rest_k)`, linear in a and b. Vectors
    and embeddings are `mean + sum_k c_k (theta_k - mean)`. What a leaf has no coefficients for is as at the start. The
    backward pass keeps no intermediate of a matrix (`jax.checkpoint`): it makes each again.
    """
    leaves: dict[str, Array] = {}
    for group in family.groups:
        leaves |= compose_group(family, group, coefficients)
    for name, stack in family.tensors.items():
        if name in family.buffers:
            leaves[name] = stack[0]
        else:
            weights = weigh_models(family, find_own(family, coefficients, name))
            leaves[name] = jnp.tensordot(weights.astype(compute_dtype(stack.dtype)), widen(stack), axes=1)
    return jax.tree_util.tree_unflatten(family.structure, [leaves[name].astype(dtype) for name, dtype in family.order])


def expert_tree(family: ModelFamily, model: Array | int) -> PyTree:
    """One of the K models itself, `model` counting from 0; leaves that are no weights are the first's."""
    leaves = {name: stack[0] if name in family.buffers else stack[model] for name, stack in family.tensors.items()}
    for group in family.groups:
        for name, view, first in group.members:
            leaves[name] = view.from_matrices(group.stack[first : first + view.matrices[0], model])
    return jax.tree_util.tree_unflatten(family.structure, [leaves[name].astype(dtype) for name, dtype in family.order])


def weigh_models(family: ModelFamily, own: Mapping[str, Array]) -> Array:
    """Coefficients of the K models in a leaf that the method leaves out."""
    method, count = methods[family.method], family.models
    if method.rest == "first":
        return jnp.zeros(count).at[0].set(1)
    offsets = own.get(TENSORS, jnp.zeros(count))
    return 1 / count + offsets - offsets.mean()


def compose_group(family: ModelFamily, group: MatrixGroup, coefficients: Coefficients) -> dict[str, Array]:
    """The leaves of one group; matrices that a leaf stacks share its coefficients."""
    method = methods[family.method]
    values = [find_own(family, coefficients, name) for name, *_ in group.members]
    settings = [{key: constrain(method, key, value) for key, value in own.items()} for own in values]
    settings = match_shapes(settings)
    repeats = [view.matrices[0] for _, view, _ in group.members]
    each = [own for own, count in zip(settings, repeats, strict=True) for _ in range(count)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *each)
    merged = map_batch(
        jax.checkpoint(functools.partial(compose_matrix, method, dict(family.settings))),
        group.stack,
        group.parts,
        group.solution,
        group.beside,
        stacked,
    )
    return {name: view.from_matrices(merged[first : first + view.matrices[0]]) for name, view, first in group.members}


def match_shapes(settings: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    """The same with [K] made [K, r] where another leaf of the group has a value per direction."""
    ranks = [own[DIRECTIONS].shape[1] for own in settings if DIRECTIONS in own and own[DIRECTIONS].ndim == 2]
    if not ranks:
        return list(settings)

    def widen_directions(own: dict[str, Array]) -> dict[str, Array]:
        value = own[DIRECTIONS]
        full = value if value.ndim == 2 else jnp.repeat(value[:, None], ranks[0], axis=1)
        return {**own, DIRECTIONS: full}

    return [widen_directions(own) for own in settings]


def compose_matrix(
    method: Method,
    fixed: Mapping[str, Any],
    stack: Array,
    parts: Any,
    solution: Any,
    beside: Mapping[str, Any],
    own: Mapping[str, Array],
) -> Array:
    """One merged matrix [m, n]."""
    stack, stages = widen(stack), method.stages
    if stages is None:
        return method.fn(stack, **beside, **{**fixed, **own}).merged
    if solution is None:
        solution = stages.solve(parts, **stages.pick("solve", fixed, own))
    return stages.build(stack, parts, solution, **stages.pick("build", beside, fixed, own)).merged


def export_settings(family: ModelFamily, coefficients: Coefficients) -> dict[str, tuple[str, dict[str, Any]]]:
    """Leaf -> (method, hyperparameters as plain data) that give the composed leaf again, without the data it was
    learned from: the family's method for what it merges, `average` for the rest.
    """
    method = methods[family.method]
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for group in family.groups:
        for name, *_ in group.members:
            own = find_own(family, coefficients, name)
            values = {key: jnp.asarray(constrain(method, key, value)).tolist() for key, value in own.items()}
            settings[name] = method.name, dict(family.settings) | values
    for name in family.tensors:
        if name not in family.buffers:
            weights = weigh_models(family, find_own(family, coefficients, name))
            settings[name] = "average", {"coefficients": weights.tolist()}
    return settings
