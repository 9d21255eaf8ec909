"""Models whose neurons stand in another order: what permutes together, as data, and Git Re-Basin's weight matching."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int

PermutationSpec = Mapping[str, Sequence[str | None]]
"""Tensor name -> the permutation that acts on each of its axes, None where none does.

A dense layer after a hidden layer `h1` and before `h2` is `{"dense.weight": ("h2", "h1"), "dense.bias": ("h2",)}` in
PyTorch's order of axes; what reads from or adds to a residual stream names the stream. Axes of inputs and outputs of
the whole model are None.
"""
Params = Mapping[str, Float[Array, "..."]]

HIGHEST = lax.Precision.HIGHEST


class Matching(NamedTuple):
    """Permutations of a model's neurons towards another's."""

    permutations: dict[str, Int[Array, "n"]]
    """Name -> for every place, the neuron of the second model that comes there."""
    similarity: Float[Array, ""]
    """Inner product of the first model with the permuted second one."""
    sweeps: Int[Array, ""]
    converged: Bool[Array, ""]
    """False where the last sweep still found something to improve."""


def permutation_sizes(spec: PermutationSpec, params: Params) -> dict[str, int]:
    """Name of each permutation -> how many neurons it orders.

    Raises:
        ValueError: tensors and spec do not name the same tensors, a tensor has another number of axes than its entry,
            or one permutation acts on axes of different lengths; all offenders at once.
    """
    problems = [f"{name} is not in the spec" for name in params if name not in spec]
    problems += [f"{name} is in the spec but not in the model" for name in spec if name not in params]
    sizes: dict[str, int] = {}
    first: dict[str, str] = {}
    for name in [name for name in spec if name in params]:
        shape, axes = jnp.shape(params[name]), spec[name]
        if len(shape) != len(axes):
            problems.append(f"{name} has {len(shape)} axes and its spec {len(axes)}")
            continue
        for length, permutation in zip(shape, axes, strict=True):
            if permutation is None:
                continue
            if sizes.setdefault(permutation, length) != length:
                problems.append(
                    f"{permutation} orders {sizes[permutation]} neurons in {first[permutation]} and {length} in {name}"
                )
            first.setdefault(permutation, name)
    if problems:
        raise ValueError("; ".join(problems))
    return sizes


def check_pair(spec: PermutationSpec, a: Params, b: Params) -> dict[str, int]:
    """`permutation_sizes` of two models that must have equal shapes."""
    sizes = permutation_sizes(spec, a)
    permutation_sizes(spec, b)
    shapes = {name: (jnp.shape(a[name]), jnp.shape(b[name])) for name in spec}
    if wrong := [f"{name} is {ours} and {theirs}" for name, (ours, theirs) in shapes.items() if ours != theirs]:
        raise ValueError("; ".join(wrong))
    return sizes


def permute(params: Params, spec: PermutationSpec, permutations: Mapping[str, Int[Array, "n"]]) -> dict[str, Array]:
    """The same function with its neurons in another order: every axis taken along its permutation."""
    permutation_sizes(spec, params)
    return {name: _take(x, spec[name], permutations) for name, x in params.items()}


def _take(x: Array, axes: Sequence[str | None], permutations: Mapping[str, Array], skipped: int | None = None) -> Array:
    for axis, permutation in enumerate(axes):
        if permutation is not None and axis != skipped:
            x = jnp.take(x, permutations[permutation], axis=axis)
    return x


def unfold(x: Float[Array, "..."], axis: int) -> Float[Array, "n rest"]:
    """One axis first, the others flattened."""
    moved = jnp.moveaxis(x, axis, 0)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:]))


def match_weights(a: Params, b: Params, spec: PermutationSpec, max_sweeps: int = 100) -> Matching:
    """Git Re-Basin's weight matching: permutations that bring b's weights nearest to a's.

    Coordinate ascent of `sum over tensors <a, permuted b>` (Ainsworth, Hayase & Srinivasa 2023, arXiv 2209.04836,
    algorithm 1): one permutation after the other is the solution of a linear assignment problem while the
    others stay, until a sweep changes nothing. The paper sweeps in random orders, this in the spec's, so that the
    result needs no key. It ends in a local maximum: a permuted copy's own order where the first layers tell neurons
    apart by themselves, none to rely on otherwise.

    Args:
        a, b: name -> tensor, of equal shapes.
        spec: which axes permute together.
        max_sweeps: bound of the sweeps.

    Raises:
        ValueError: the spec does not fit (see `permutation_sizes`), or shapes differ.
    """
    sizes = check_pair(spec, a, b)
    places = {p: [(name, i) for name, axes in spec.items() for i, q in enumerate(axes) if q == p] for p in sizes}
    dtype = jnp.result_type(*(x.dtype for x in (*a.values(), *b.values())))
    dtype = jnp.float64 if dtype == jnp.float64 else jnp.float32
    a, b = ({name: jnp.asarray(x).astype(dtype) for name, x in model.items()} for model in (a, b))

    def gains(permutation: str, current: Mapping[str, Array]) -> Float[Array, "n n"]:
        """What neuron j of b in the place of neuron i of a contributes."""
        total = jnp.zeros((sizes[permutation],) * 2, dtype)
        for name, axis in places[permutation]:
            others = _take(b[name], spec[name], current, skipped=axis)
            total += jnp.matmul(unfold(a[name], axis), unfold(others, axis).T, precision=HIGHEST)
        return total

    def sweep(state: Matching) -> Matching:
        current, changed = dict(state.permutations), jnp.asarray(False)
        for permutation, size in sizes.items():
            gain = gains(permutation, current)
            rows, columns = optax.assignment.hungarian_algorithm(-gain)
            best = jnp.zeros(size, jnp.int32).at[rows].set(columns.astype(jnp.int32))
            index = jnp.arange(size)
            before, after = jnp.sum(gain[index, current[permutation]]), jnp.sum(gain[index, best])
            slack = 8 * size * float(jnp.finfo(dtype).eps) * jnp.max(jnp.abs(gain))
            better = after > before + slack
            current[permutation] = jnp.where(better, best, current[permutation])
            changed |= better
        return Matching(current, state.similarity, state.sweeps + 1, ~changed)

    identity = {permutation: jnp.arange(size, dtype=jnp.int32) for permutation, size in sizes.items()}
    start = Matching(identity, jnp.zeros((), dtype), jnp.asarray(0, jnp.int32), jnp.asarray(False))
    found = lax.while_loop(lambda state: ~state.converged & (state.sweeps < max_sweeps), sweep, start)
    permuted = permute(b, spec, found.permutations)
    return found._replace(similarity=sum((jnp.sum(a[name] * permuted[name]) for name in a), start.similarity))
