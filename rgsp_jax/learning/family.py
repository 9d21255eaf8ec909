"""Whole models as functions of a few coefficients: any method's run-time hyperparameters, leaf by leaf."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.learning.dealing import Axis, deal_rows, divide_rows, gather_rows, map_rows
from rgsp_jax.learning.parameters import constrain, find_start, has_start, list_learnable, unconstrain
from rgsp_jax.method import Method, compute_dtype
from rgsp_jax.registry import methods
from rgsp_jax.rules import Layout, MatrixView
from rgsp_jax.trees import LeafGroup, SortedLeaves, find_rows, resolve_method, sort_leaves, stack_group, take_base
from rgsp_jax.types import InputStatistics

PyTree = Any
Coefficients = dict[str, dict[str, Array]]
"""Leaf's slashed path, or MATRICES and TENSORS where all leaves share them -> hyperparameter -> unconstrained value."""
Granularity = Literal["model", "layer", "direction"]
MATRICES, TENSORS = "matrices", "tensors"
DIRECTIONS = "directions"
LAYERS = "layers"
"""Axis of a mesh whose devices take matrices of their own each, unless another is named."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixGroup:
    """Matrices of one shape, decomposed: B of them, of K models; on a mesh in slots dealt out over an axis."""

    stack: Array
    """[B, K, m, n], in the models' dtype; the base behind the K, for methods that need it."""
    parts: Any
    """What the method's first stage made of each, on a leading axis."""
    solution: Any
    """What its second stage made of that, where nothing that is learned enters there; else None."""
    beside: dict[str, Any]
    """Input statistics of each, for methods that need them."""
    names: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))
    """Of the leaves."""
    views: tuple[MatrixView, ...] = dataclasses.field(metadata=dict(static=True))
    """How each is viewed as matrices."""
    axis: Axis | None = dataclasses.field(default=None, metadata=dict(static=True))
    """That the first axis of every array is divided over."""

    @property
    def slots(self) -> np.ndarray:
        """Where each of the matrices is among the B."""
        count = sum(view.matrices[0] for view in self.views)
        return np.arange(count) if self.axis is None else deal_rows(count, self.axis.size).slots

    @property
    def members(self) -> Iterator[tuple[str, MatrixView, np.ndarray]]:
        """(leaf, how it is viewed as matrices, which of the B are its own)."""
        slots = self.slots
        return zip(self.names, self.views, (slots[rows] for rows in find_rows(self.views)), strict=True)

    def divide(self, axis: Axis) -> "MatrixGroup":
        """The same, dealt out over an axis."""
        arrays = self.stack, self.parts, self.solution, self.beside
        if self.axis is not None:
            arrays = jax.tree.map(lambda x: x[self.slots], arrays)
        stack, parts, solution, beside = divide_rows(arrays, axis)
        return MatrixGroup(stack, parts, solution, beside, self.names, self.views, axis)


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
    axis: Axis | None = dataclasses.field(default=None, metadata=dict(static=True))
    """That it is divided over, on a mesh."""


def prepare_family(
    trees: Sequence[PyTree],
    method: str | Method = "relative",
    *,
    learn: Sequence[str] | None = None,
    base: PyTree | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    layout: Layout = "auto",
    model_type: str | None = None,
    mesh: Mesh | None = None,
    axis: str = LAYERS,
    **hyperparameters: Any,
) -> ModelFamily:
    """Decompose K models: what every later composition goes without. Pure and differentiable in the trees.

    Args:
        trees: K >= 2 pytrees of one structure with leaves of equal shapes.
        method: whose run-time hyperparameters are learned; a name in `rgsp_jax.methods`.
        learn: which of them, and "tensors" for coefficients of the vectors and embeddings that the method averages.
            By default all that are numbers by nature, but for a common factor of values for each model, and "tensors"
            where it averages the rest. What the method's decompositions depend on (its rank) cannot be.
        base, inputs: as in `rgsp_jax.merge`, for methods that need them.
        layout, model_type: how kernels are laid out, see `rgsp_jax.rules.classify`.
        mesh, axis: divide the family over an axis of a mesh, as `place_family` does; every device decomposes its own.
        hyperparameters: of the method, that stay as they are or where learning starts.

    Raises:
        ValueError: fewer than two trees, structures or shapes that differ (all offenders are listed), an unknown
            hyperparameter, or one that cannot be learned.
    """
    chosen = resolve_method(method)
    if len(trees) < 2:
        raise ValueError(f"a family takes two models or more, not {len(trees)}")
    learned = check_learned(chosen, learn, hyperparameters)
    leaves = sort_leaves(trees, chosen, hyperparameters, base=base, inputs=inputs, layout=layout, model_type=model_type)
    fixed = tuple(sorted((k, v) for k, v in hyperparameters.items() if k not in learned))
    along = None if mesh is None else Axis(mesh, axis)
    groups = tuple(make_group(chosen, group, leaves, learned, fixed, along) for group in leaves.groups)
    starts = {
        name: start
        for group in groups
        for name, start in start_group(chosen, group, learned, hyperparameters, len(trees)).items()
    }
    others = [facts for facts in zip(leaves.names, leaves.actions, leaves.columns, strict=True) if facts[1] != "method"]
    family = ModelFamily(
        groups=groups,
        tensors={name: jnp.stack(column[: 1 if action == "copy" else len(trees)]) for name, action, column in others},
        starts=starts,
        learn=learned,
        method=chosen.name,
        settings=fixed,
        buffers=frozenset(name for name, action, _ in others if action == "copy"),
        order=tuple((name, column[0].dtype) for name, column in zip(leaves.names, leaves.columns, strict=True)),
        structure=leaves.structure,
        models=len(trees),
    )
    return family if mesh is None else place_family(family, mesh, axis)


def place_family(family: ModelFamily, mesh: Mesh, axis: str = LAYERS) -> ModelFamily:
    """A family divided over an axis of a mesh: each device holds, and composes, matrices of its own.

    Matrices of one shape are dealt out evenly. Other leaves are divided along the first of their dimensions that the
    axis divides, else whole on every device. The members are the same, to rounding.
    """
    along = Axis(mesh, axis)
    return dataclasses.replace(
        family,
        groups=tuple(group if group.axis == along else group.divide(along) for group in family.groups),
        tensors={name: divide_tensor(stack, along) for name, stack in family.tensors.items()},
        starts=jax.device_put(family.starts, along.whole),
        axis=along,
    )


def divide_tensor(stack: Array, axis: Axis) -> Array:
    """Models' [K, *shape] divided along the first dimension of the shape that is divided evenly, if there is one."""
    even = [i for i in range(1, stack.ndim) if stack.shape[i] and stack.shape[i] % axis.size == 0]
    spec = PartitionSpec(*[None] * even[0], axis.name) if even else PartitionSpec()
    return jax.device_put(stack, NamedSharding(axis.mesh, spec))


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
    group: LeafGroup,
    leaves: SortedLeaves,
    learned: Iterable[str],
    fixed: tuple[tuple[str, Any], ...],
    axis: Axis | None,
) -> MatrixGroup:
    """Decompose matrices of one shape."""
    dtype = jnp.result_type(*(x for i in group.members for x in leaves.columns[i]))
    stacks, beside = stack_group(group, leaves, dtype)
    if axis is not None:
        stacks, beside = divide_rows((stacks, beside), axis)
    parts = solution = None
    if method.stages is not None:
        known = not set(learned) & method.stages.arguments("solve")
        decompose = functools.partial(decompose_stacks, method, fixed, known)
        parts, solution = (decompose if axis is None else map_rows(decompose, axis))(stacks, beside)
    names = tuple(leaves.names[i] for i in group.members)
    return MatrixGroup(stacks, parts, solution, beside, names, group.views, axis)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def decompose_stacks(
    method: Method, settings: tuple[tuple[str, Any], ...], known: bool, stacks: Array, beside: dict[str, Any]
) -> tuple[Any, Any]:
    """(parts, solution) of every matrix; the solution is None where it is not `known` before learning."""
    stages, fixed = method.stages, dict(settings)
    assert stages is not None

    def decompose_one(stack: Array, own: dict[str, Any]) -> tuple[Any, Any]:
        models, base = take_base(method, widen(stack))
        parts = stages.prepare(models, **stages.pick("prepare", method.defaults, fixed, base, own))
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
    for name, _, rows in group.members:
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

    Of `relative` those are ones for directions and zeros for the rest.

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
        for name in group.names:
            if select is not None and not select(name):
                continue
            own = {key: family.starts[name][key] for key in wanted if key in family.starts[name]}
            if per == "direction" and DIRECTIONS in own and own[DIRECTIONS].ndim == 1:
                rank = group.solution.rank
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

    `relative`: matrices are `ancestor + scale sum_kj a_kj u_kj v_kj^T + sum_k b_k rest_k`, linear in a and b. Vectors
    and embeddings are `mean + sum_k c_k (theta_k - mean)`. What a leaf has no coefficients for is as at the start. The
    backward pass keeps no intermediate of a matrix (`jax.checkpoint`): it makes each again.

    Of a family on a mesh every device composes its own matrices, and all get the merged leaves whole.
    """
    leaves: dict[str, Array] = {}
    for group in family.groups:
        leaves |= compose_group(family, group, coefficients)
    for name, stack in family.tensors.items():
        if name in family.buffers:
            leaves[name] = gather_rows(stack[0], family.axis)
        else:
            weights = weigh_models(family, find_own(family, coefficients, name))
            mixed = jnp.tensordot(weights.astype(compute_dtype(stack.dtype)), widen(stack), axes=1)
            leaves[name] = gather_rows(mixed, family.axis)
    return order_leaves(family, leaves)


def order_leaves(family: ModelFamily, leaves: Mapping[str, Array]) -> PyTree:
    """A tree of leaves by name, in the first model's dtypes."""
    return jax.tree_util.tree_unflatten(family.structure, [leaves[name].astype(dtype) for name, dtype in family.order])


def expert_tree(family: ModelFamily, model: Array | int) -> PyTree:
    """One of the K models itself, `model` counting from 0; leaves that are no weights are the first's."""
    leaves = {
        name: gather_rows(stack[0] if name in family.buffers else stack[model], family.axis)
        for name, stack in family.tensors.items()
    }
    for group in family.groups:
        matrices = gather_rows(group.stack[:, model], group.axis)
        for name, view, rows in group.members:
            leaves[name] = view.from_matrices(matrices[rows])
    return order_leaves(family, leaves)


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
    values = [find_own(family, coefficients, name) for name in group.names]
    settings = [{key: constrain(method, key, value) for key, value in own.items()} for own in values]
    settings = match_shapes(settings)
    each = [own for own, view in zip(settings, group.views, strict=True) for _ in range(view.matrices[0])]
    if group.axis is not None:
        each = [each[row] for row in deal_rows(len(each), group.axis.size).rows]
    stacked = jax.tree.map(lambda *xs: gather_rows(jnp.stack(xs), group.axis), *each)
    operands = group.stack, group.parts, group.solution, group.beside, stacked
    if group.axis is None:
        merged = compose_matrices(method, family.settings, *operands)
    else:
        merged = gather_rows(compile_compose(method, family.settings, group.axis)(*operands), group.axis)
    return {name: view.from_matrices(merged[rows]) for name, view, rows in group.members}


def compose_matrices(method: Method, settings: tuple[tuple[str, Any], ...], *batches: Any) -> Array:
    """Merged matrices [B, m, n] of their stacks, parts, solutions, what is beside them, and coefficients."""
    return map_batch(jax.checkpoint(functools.partial(compose_matrix, method, dict(settings))), *batches)


@functools.cache
def compile_compose(method: Method, settings: tuple[tuple[str, Any], ...], axis: Axis) -> Any:
    """`compose_matrices` on every device of an axis, of its own matrices."""
    return map_rows(functools.partial(compose_matrices, method, settings), axis)


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
    (models, base), stages = take_base(method, widen(stack)), method.stages
    if stages is None:
        return method.fn(models, **base, **beside, **{**fixed, **own}).merged
    if solution is None:
        solution = stages.solve(parts, **stages.pick("solve", fixed, own))
    return stages.build(models, parts, solution, **stages.pick("build", base, beside, fixed, own)).merged


def export_settings(family: ModelFamily, coefficients: Coefficients) -> dict[str, tuple[str, dict[str, Any]]]:
    """Leaf -> (method, hyperparameters as plain data) that give the composed leaf again, without the data it was
    learned from: the family's method for what it merges, `average` for the rest.
    """
    method = methods[family.method]
    settings: dict[str, tuple[str, dict[str, Any]]] = {}
    for group in family.groups:
        for name in group.names:
            own = find_own(family, coefficients, name)
            values = {key: jnp.asarray(constrain(method, key, value)).tolist() for key, value in own.items()}
            settings[name] = method.name, dict(family.settings) | values
    for name in family.tensors:
        if name not in family.buffers:
            weights = weigh_models(family, find_own(family, coefficients, name))
            settings[name] = "average", {"coefficients": weights.tolist()}
    return settings
