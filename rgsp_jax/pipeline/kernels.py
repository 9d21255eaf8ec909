"""The compiled side of the pipeline: one work item in, merged weights and what the report needs out."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from rgsp_jax.batching import map_batch
from rgsp_jax.linalg import ROWS
from rgsp_jax.method import MASKED, Method, compute_dtype
from rgsp_jax.pipeline.plan import CHUNK, Group
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
    merge_one = merge_slot(name, static, out_dtype, with_base)

    def merge_matrices(
        sources: tuple[Array, ...], traced: dict[str, Array], salts: Array, seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        return map_batch(lambda x, salt, own: merge_one(x, salt, traced, seed, own), sources, salts, inputs)

    def merge_elements(
        sources: tuple[Array, ...], traced: dict[str, Array], salts: Array, seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        def merge_chunk(rows: tuple[Array, ...], salts: Array) -> ItemOutput:
            return jax.vmap(lambda x, salt: merge_one(x, salt, traced, seed, inputs))(rows, salts)

        rows = tuple(x.reshape(-1, CHUNK, 1, x.shape[-1]) for x in sources)
        output = map_batch(merge_chunk, rows, salts.reshape(-1, CHUNK, 2))
        output = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), output)
        return output._replace(merged=output.merged[:, 0])

    kernel = merge_elements if action == "elements" else merge_matrices
    return jax.jit(kernel) if mesh is None else divide_layers(kernel, mesh)


def merge_slot(name: str, static: Static, out_dtype: np.dtype, with_base: bool) -> Any:
    """The kernel of one matrix, or block: sources of every model, its salt, traced settings, seed and inputs."""
    method = methods[name]

    def merge_one(
        sources: tuple[Array, ...], salt: Array, traced: dict[str, Array], seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        dtype = compute_dtype(*(x.dtype for x in sources))
        count = len(sources) - with_base
        stack = jnp.stack([x.astype(dtype) for x in sources[:count]])
        needed: dict[str, Any] = {"key": slot_key(seed, salt)} if "key" in method.needs else {}
        if "covariances" in method.needs:
            needed["inputs"] = inputs
        if with_base and "base" in method.needs:
            needed["base"] = sources[-1].astype(dtype)
        output = method.fn(stack, **dict(static), **cast_traced(traced, dtype), **needed)
        return measure_output(output, stack, sources, out_dtype)

    return merge_one


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
    merge_one = merge_slot(name, static, out_dtype, with_base)

    def merge_divided(
        sources: tuple[Array, ...], salt: Array, traced: dict[str, Array], seed: Array, inputs: InputStatistics
    ) -> ItemOutput:
        # The method sees the matrix as it is: zeros would count in its ranks and densities.
        output = merge_one(tuple(x[:m, :n] for x in sources), salt, traced, seed, inputs)
        filled = [(0, full - true) for full, true in zip(sources[0].shape, matrix, strict=True)]
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
    """A merge in the output's dtype, with what the report says of it beside the method's own stats."""
    # XLA may leave a cast there and back out; what is measured here is what is written.
    precision = jnp.finfo(out_dtype)
    written = jax.lax.reduce_precision(output.merged, precision.nexp, precision.nmant)
    axes = tuple(range(1, stack.ndim))
    difference = written[None] - stack
    return ItemOutput(
        output.merged.astype(out_dtype),
        output.stats,
        jnp.sum(difference**2, axes),
        jnp.sum(stack**2, axes),
        jnp.stack([jnp.isfinite(x).all() for x in sources]),
        jnp.isfinite(written).all(),
    )


def slot_key(seed: Array, salt: Array) -> Array:
    """The random key of one slot: the same whatever item or device it is merged on."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), salt[0]), salt[1])
