"""The compiled side of the pipeline: one work item in, merged weights and what the report needs out."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import ROWS
from rgsp_jax.method import MASKED, Method, compute_dtype
from rgsp_jax.pipeline.plan import CHUNK, MOST_IN_PARTS, PART, Group
from rgsp_jax.registry import methods
from rgsp_jax.types import InputStatistics, MergeOutput

LAYERS = "layers"
"""Axis of a mesh whose devices take matrices, or chunks of elements, of their own each."""
NOTHING = InputStatistics()
"""For methods that need no covariances."""
Static = tuple[tuple[str, Any], ...]
"""Hyperparameters that are compiled in, by name."""
Traced = dict[str, np.ndarray]
"""Hyperparameters that are passed at run time."""


class ItemOutput(NamedTuple):
    """Results of one item; `b` counts its matrix slots or blocks, `k` the models."""

    merged: Array
    """[b, m, n], in the output dtype."""
    stats: dict[str, Array]
    """[b, ...] each."""
    change: Array
    """[b, k] squared Frobenius distances of the merge from each model."""
    size: Array
    """[b, k] squared Frobenius norms of the models."""
    finite_in: Array
    """[b, sources] False where a source holds an infinity or a NaN."""
    finite_out: Array
    """[b]."""


def split_static(method: Method, hyperparameters: Mapping[str, Any]) -> tuple[Static, Traced]:
    """What is compiled in, and what is passed at run time, in the widest types: `cast_traced` narrows the floats."""
    fixed = {
        name: value
        for name, value in hyperparameters.items()
        if name in method.static or isinstance(value, (str, bool)) or value is None
    }
    traced = {name: np.asarray(v, np.float64) for name, v in hyperparameters.items() if name not in fixed}
    if MASKED in traced:
        traced[MASKED] = traced[MASKED].astype(np.int64)
    return tuple(sorted(fixed.items())), traced


def cast_traced(traced: Mapping[str, Array], dtype: Any) -> dict[str, Array]:
    """Hyperparameters in the kernel's own float; counts stay what they are."""
    return {name: v if jnp.issubdtype(v.dtype, jnp.integer) else v.astype(dtype) for name, v in traced.items()}


def run_item(
    group: Group,
    sources: tuple[Array, ...],
    salts: Array | np.ndarray,
    seed: int,
    with_base: bool,
    inputs: InputStatistics = NOTHING,
    mesh: Mesh | None = None,
) -> ItemOutput:
    """Merge one item on the device, or a wave on all devices of a mesh.

    Args:
        group: what to do.
        sources: of every model (the base last, where `with_base`) [b, m, n] or [b, block], dtypes as on disk.
        salts: [b, 2] unsigned integers that name each slot, for methods that need a random key.
        seed: of the run.
        with_base: the last source is the common ancestor.
        inputs: [b, c, ...] of every slot, for methods that need covariances.
        mesh: with an axis LAYERS that `sources`, `salts` and `inputs` are divided over by b.
    """
    method = methods[group.method]
    static, traced = split_static(method, group.hyperparameters)
    return compile_item(group.action, group.method, static, group.out_dtype, with_base, mesh)(
        sources, traced, salts, np.uint32(seed), inputs
    )


@functools.cache
def compile_item(
    action: str, name: str, static: Static, out_dtype: np.dtype, with_base: bool, mesh: Mesh | None = None
) -> Any:
    """The jitted kernel of one method with its static hyperparameters; shapes and dtypes retrace it.

    On a mesh every device runs it on its own rows, by itself.
    """
    merge_slot = build_merge(name, static, with_base)

    def merge_matrices(
        sources: tuple[Array, ...], traced: dict[str, Array], salts: Array, seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        def merge_one(coded: tuple[Array, ...], salt: Array, known: InputStatistics) -> ItemOutput:
            if methods[name].combination is not None and coded[0].size <= MOST_IN_PARTS:
                return merge_in_parts(name, static, traced, coded, [x.dtype for x in sources], out_dtype)
            own = tuple(decode(x, of.dtype) for x, of in zip(coded, sources, strict=True))
            output, stack = merge_slot(own, salt, traced, seed, known)
            measured = measure_output(output, stack, own, out_dtype)
            return measured._replace(merged=encode(measured.merged))

        output = map_batch(merge_one, tuple(map(encode, sources)), salts, inputs)
        return output._replace(merged=decode(output.merged, out_dtype))

    def merge_elements(
        sources: tuple[Array, ...], traced: dict[str, Array], salts: Array, seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        def merge_chunk(coded: tuple[Array, ...], salts: Array) -> ItemOutput:
            rows = tuple(decode(x, of.dtype) for x, of in zip(coded, sources, strict=True))
            output, stack = jax.vmap(lambda x, salt: merge_slot(x, salt, traced, seed, inputs))(rows, salts)
            measured = measure_output(output, jnp.moveaxis(stack, 1, 0), rows, out_dtype)
            return measured._replace(merged=encode(measured.merged))

        rows = tuple(encode(x).reshape(-1, CHUNK, 1, x.shape[-1]) for x in sources)
        output = map_batch(merge_chunk, rows, salts.reshape(-1, CHUNK, 2))
        output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
        return output._replace(merged=decode(output.merged[:, 0], out_dtype))

    kernel = merge_elements if action == "elements" else merge_matrices
    return jax.jit(kernel) if mesh is None else divide_layers(kernel, mesh)


def build_merge(name: str, static: Static, with_base: bool) -> Any:
    """The method on one matrix, or block: (sources of every model, its salt, traced settings, seed, inputs) -> the
    merge, and the stack [k, m, n] that it was made from."""
    method = methods[name]

    def merge_slot(
        sources: tuple[Array, ...], salt: Array, traced: dict[str, Array], seed: Array, inputs: InputStatistics
    ) -> tuple[MergeOutput, Array]:
        dtype = compute_dtype(*(x.dtype for x in sources))
        count = len(sources) - with_base
        stack = jnp.stack([x.astype(dtype) for x in sources[:count]])
        needed: dict[str, Any] = {"key": slot_key(seed, salt)} if "key" in method.needs else {}
        if "covariances" in method.needs:
            needed["inputs"] = inputs
        if with_base and "base" in method.needs:
            needed["base"] = sources[-1].astype(dtype)
        return method.fn(stack, **dict(static), **cast_traced(traced, dtype), **needed), stack

    return merge_slot


def merge_in_parts(
    name: str, static: Static, traced: dict[str, Array], coded: tuple[Array, ...], dtypes: list[Any], out_dtype: Any
) -> ItemOutput:
    """A merge that is a `Combination`, of one matrix: twice over its parts, so that it is never held in float32 whole.

    Args:
        coded: the models [m, n], as `encode` has them.
        dtypes: theirs.

    Returns:
        The merge as `encode` has it.
    """
    combination = methods[name].combination
    assert combination is not None
    dtype, flat = compute_dtype(*dtypes), [x.reshape(-1) for x in coded]

    def read(start: Array | int, length: int) -> tuple[tuple[Array, ...], Array]:
        cut = [jax.lax.dynamic_slice_in_dim(x, start, length) for x in flat]
        own = tuple(decode(x, of)[None] for x, of in zip(cut, dtypes, strict=True))
        return own, jnp.stack([x.astype(dtype) for x in own])

    def multiply(start: Array | int, length: int) -> Array:
        _, stack = read(start, length)
        pairs = {(i, j): jnp.sum(stack[i] * stack[j]) for j in range(len(stack)) for i in range(j + 1)}
        return jnp.stack([pairs[min(i, j), max(i, j)] for i in range(len(stack)) for j in range(len(stack))])

    size = flat[0].shape[0]
    products = jnp.concatenate(map_parts(multiply, size)).sum(0).reshape(len(flat), len(flat))
    state, stats = combination.solve(products, **dict(static), **cast_traced(traced, dtype))

    def build(start: Array | int, length: int) -> ItemOutput:
        own, stack = read(start, length)
        output = measure_output(MergeOutput(combination.build(stack, state), {}), stack, own, out_dtype)
        return output._replace(merged=encode(output.merged[0]))

    stacks = map_parts(build, size)
    change, norms, finite_in, finite_out = (jnp.concatenate(x) for x in zip(*(own[2:] for own in stacks), strict=True))
    return ItemOutput(
        jnp.concatenate([own.merged.reshape(-1) for own in stacks]).reshape(coded[0].shape),
        stats,
        change.sum(0),
        norms.sum(0),
        finite_in.all(0),
        finite_out.all(0),
    )


def map_parts(fn: Any, size: int) -> list[Any]:
    """`fn(start, length)` of every part of so many elements, one after the other: whole ones stacked, then the rest."""
    whole, rest = divmod(size, PART)
    found = []
    if whole:
        found.append(jax.lax.map(lambda start: fn(start, PART), PART * jnp.arange(whole, dtype=jnp.int32)))
    if rest:
        found.append(jax.tree.map(lambda x: x[None], fn(whole * PART, rest)))
    return found


def encode(x: Array) -> Array:
    """Bits of bfloat16 as integers: XLA carries bfloat16 through a loop on a CPU as float32, several times slower."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def decode(x: Array, dtype: Any) -> Array:
    """The reverse of `encode`."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if dtype == jnp.bfloat16 else x


def divide_layers(kernel: Any, mesh: Mesh) -> Any:
    """The jitted kernel, run on each device's own rows: nothing passes between devices."""
    own, whole = PartitionSpec(LAYERS), PartitionSpec()
    specs = own, whole, own, whole, own
    # What is known of a device's values only serves collectives, and there are none.
    divided = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=own, check_vma=False)
    return jax.jit(divided, in_shardings=tuple(NamedSharding(mesh, spec) for spec in specs))


def run_divided(
    group: Group,
    sources: tuple[Array, ...],
    salt: np.ndarray,
    seed: int,
    with_base: bool,
    inputs: InputStatistics,
    mesh: Mesh,
) -> ItemOutput:
    """Merge one matrix whose longer side the devices of a mesh share.

    Args:
        group: what to do.
        sources: of every model [m, n], the longer side filled up with zeros to a multiple of the devices and divided
            over the mesh's axis ROWS.
        salt: [2] numbers that name the matrix.
        seed: of the run.
        with_base: the last source is the common ancestor.
        inputs: [c, ...], the same on every device.
        mesh: of all devices that share the matrix.

    Returns:
        What `run_item` returns, without its first axis; the merged matrix filled up and divided as the sources are.
    """
    static, traced = split_static(methods[group.method], group.hyperparameters)
    kernel = compile_divided(group.method, static, group.out_dtype, with_base, group.matrix, mesh)
    with jax.set_mesh(mesh):
        return kernel(sources, salt, traced, np.uint32(seed), inputs)


@functools.cache
def compile_divided(
    name: str, static: Static, out_dtype: np.dtype, with_base: bool, matrix: tuple[int, int], mesh: Mesh
) -> Any:
    """The jitted kernel of one divided matrix; JAX divides what follows, the decompositions divide themselves."""
    m, n = matrix
    merge_slot = build_merge(name, static, with_base)

    def merge_divided(
        sources: tuple[Array, ...], salt: Array, traced: dict[str, Array], seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        # The method sees the matrix as it is: zeros would count in its ranks and densities.
        true = tuple(x[:m, :n] for x in sources)
        merged, stack = merge_slot(true, salt, traced, seed, inputs)
        output = measure_output(merged, stack, true, out_dtype)
        filled = [(0, full - side) for full, side in zip(sources[0].shape, matrix, strict=True)]
        return output._replace(merged=jnp.pad(output.merged, filled))

    divided = NamedSharding(mesh, PartitionSpec(ROWS) if m >= n else PartitionSpec(None, ROWS))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        merge_divided,
        in_shardings=(divided, whole, whole, whole, whole),
        out_shardings=ItemOutput(divided, *[whole] * (len(ItemOutput._fields) - 1)),  # type: ignore[arg-type]
    )


def measure_output(
    output: MergeOutput, stack: Float[Array, "k ..."], sources: tuple[Array, ...], out_dtype: np.dtype
) -> ItemOutput:
    """A merge [..., m, n] in the output's dtype, with what the report says of it beside the method's own stats."""
    # XLA may leave a cast there and back out; what is measured here is what is written.
    precision = jnp.finfo(out_dtype)
    written = jax.lax.reduce_precision(output.merged, precision.nexp, precision.nmant)
    change = [sum_squares(written - x) for x in stack]
    size = [sum_squares(x) for x in stack]
    known = [*size, *[None] * (len(sources) - len(size))]
    return ItemOutput(
        output.merged.astype(out_dtype),
        output.stats,
        jnp.stack(change, -1),
        jnp.stack(size, -1),
        jnp.stack([is_finite(x, total) for x, total in zip(sources, known, strict=True)], -1),
        is_finite(written, change[0]),
    )


def sum_squares(x: Float[Array, "... m n"]) -> Float[Array, "..."]:
    """Squared Frobenius norms."""
    return jnp.sum(x**2, (-2, -1))


def is_finite(x: Float[Array, "... m n"], total: Float[Array, "..."] | None = None) -> Bool[Array, "..."]:
    """Whether every entry of a matrix is; `total`, a sum that is finite only where all of them are, mostly tells."""
    if total is None:
        return jnp.isfinite(x).all((-2, -1))
    told = jnp.isfinite(total)
    return jax.lax.cond(told.all(), lambda: told, lambda: jnp.isfinite(x).all((-2, -1)))


def slot_key(seed: Array, salt: Array) -> Array:
    """The random key of one slot: the same whatever item or device it is merged on."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), salt[0]), salt[1])
