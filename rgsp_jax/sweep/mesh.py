"""The mesh of a sweep: settings over one axis, matrices over another; every device works by itself."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rgsp_jax.pipeline.kernels import LAYERS

POINTS = "points"
"""Axis of a mesh whose devices take settings of their own each."""


def name_axes(mesh: Mesh) -> Mesh:
    """The same devices with the axes POINTS and LAYERS, in this order; one that is missing has size 1.

    Raises:
        ValueError: another axis has several devices.
    """
    others = {name: size for name, size in mesh.shape.items() if name not in (POINTS, LAYERS) and size > 1}
    if others:
        raise ValueError(f"the mesh of a sweep has the axes {POINTS!r} and {LAYERS!r}, and none like {others}")
    order = sorted(
        range(mesh.devices.ndim), key=lambda i: (mesh.axis_names[i] == LAYERS) - (mesh.axis_names[i] == POINTS)
    )
    shape = mesh.shape.get(POINTS, 1), mesh.shape.get(LAYERS, 1)
    return Mesh(mesh.devices.transpose(order).reshape(shape), (POINTS, LAYERS))


def split_devices(count: int, matrices: Sequence[int], solutions: int) -> tuple[int, int]:
    """(points, layers) of at most `count` devices for which the busiest has the least to do.

    A device decomposes its matrices and solves each at its points; a decomposition counts as one solution. Of equal
    splits the one with the fewest devices.

    Args:
        count: of devices.
        matrices: of every shape, merged one shape after the other.
        solutions: that settings ask for.
    """

    def cost(split: tuple[int, int]) -> tuple[int, int]:
        points, layers = split
        return sum(-(-own // layers) for own in matrices) * (1 + -(-solutions // points)), points * layers

    splits = ((points, layers) for points in range(1, count + 1) for layers in range(1, count // points + 1))
    return min(splits, key=cost)


def make_mesh(devices: Sequence[jax.Device], points: int, layers: int) -> Mesh:
    """Of the first of some devices."""
    return Mesh(np.array(devices[: points * layers]).reshape(points, layers), (POINTS, LAYERS))


def divide(fn: Callable[..., Any], mesh: Mesh | None, in_specs: tuple[P, ...], out_specs: P) -> Any:
    """Jit a function, on a mesh so that each device runs it on its own part: nothing passes between devices."""
    if mesh is None:
        return jax.jit(fn)
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))


@functools.cache
def compile_collect(mesh: Mesh) -> Any:
    """`collect(outputs [points, slots, m, n] over both axes, point, slots [B]) -> [B, m, n]` on every device."""

    def collect(outputs: Array, point: Array, slots: Array) -> Array:
        own = outputs[0]
        if mesh.shape[POINTS] > 1:
            own = lax.psum(jnp.where(lax.axis_index(POINTS) == point, own, jnp.zeros_like(own)), POINTS)
        return lax.all_gather(own, LAYERS, tiled=True)[slots]

    return divide(collect, mesh, (P(POINTS, LAYERS), P(), P()), P())
