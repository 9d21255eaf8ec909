"""One matrix divided over several devices: the mesh axis, whether it is there, and functions of each device's part.

A mesh with an axis named `ROWS` (of JAX's `Auto` type, as `jax.sharding.Mesh(devices, names)` makes them), set by
`jax.set_mesh(mesh)` while a function is traced, divides every matrix that is worth it: products and sums are divided
by the compiler, which follows the data, and decompositions of long matrices by this package, along the longer side.

    mesh = Mesh(np.array(jax.devices()), (ROWS,))
    stack = jax.device_put(stack, NamedSharding(mesh, P(None, ROWS)))      # [K, m, n]
    with jax.set_mesh(mesh):
        merged = jax.jit(lambda x: relative(x, rank=64).merged)(stack)

With layers on another axis, map over that one by `jax.shard_map(..., axis_names={"layers"})`: a LAPACK call that `vmap`
has batched is gathered over the axis that the compiler divides its batch by.

Arrays that enter or leave a jitted function have to be divided evenly. Rows of zeros that fill up a matrix are
harmless to the decompositions but not to every method (ranks and densities are shares of the matrix), so methods get
the true rows: pad outside, and take `stack[:, :m]` inside the function, where parts may be uneven.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

ROWS = "rows"
LEAST_ENTRIES = 4096
"""A smaller matrix takes less time whole on every device than the words it costs to divide it."""


def count_parts() -> int:
    """How many devices share a matrix: the size of the ambient mesh's axis `ROWS`, 1 without one.

    1 as well inside a `shard_map` or `pmap` over that axis, where every device holds what it was given.

    Raises:
      ValueError: the axis is of JAX's `Explicit` type, under which ordinary products do not divide by themselves.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or ROWS not in mesh.shape:
        return 1
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[ROWS]
    if kind == AxisType.Explicit:
        raise ValueError(f'the mesh axis "{ROWS}" must be of type Auto, as jax.sharding.Mesh makes it, not Explicit')
    return mesh.shape[ROWS] if kind == AxisType.Auto else 1


def rows_divided() -> bool:
    """Whether the ambient mesh divides matrices; part of what `jax.jit` distinguishes its traces by."""
    return count_parts() > 1


def is_divided(m: int, n: int) -> bool:
    """Whether an m x n matrix is worked on by all devices of the axis together."""
    return m * n >= LEAST_ENTRIES and rows_divided()


def divide_side(x: Float[Array, "... m n"], side: int | None) -> Float[Array, "... m n"]:
    """x with the rows (0) or columns (1) of its matrices divided, or neither (None); x itself where no mesh divides it.

    From one side to the other every device passes on its own part only.
    """
    if not is_divided(*x.shape[-2:]):
        return x
    free = [P.UNCONSTRAINED] * (x.ndim - 2)
    return lax.with_sharding_constraint(x, P(*free, *(ROWS if i == side else None for i in range(2))))


def map_parts(
    kernel: Callable[..., tuple[Array, ...]],
    x: Float[Array, "m n"],
    *whole: Any,
    long: tuple[bool, ...],
    dimension: int = 0,
) -> tuple[Array, ...]:
    """`kernel(part of x, *whole)` on every device of the axis, where collectives over `ROWS` may be used.

    Args:
      kernel: gets zeros where the axis does not divide x's length; they are cut off again from what it returns.
      x: divided along `dimension`.
      whole: pytrees of arrays that every device gets.
      long: of each array that the kernel returns: True joins the devices' [length of the part, ...] to [length, ...],
        False is what all devices have alike.
    """
    length = x.shape[dimension]
    missing = -length % count_parts()
    padding = [(0, missing if i == dimension else 0) for i in range(x.ndim)]
    mapped = jax.shard_map(
        lambda *operands: tuple(kernel(*operands)),
        in_specs=(P(*[None] * dimension, ROWS), *[P()] * len(whole)),
        out_specs=tuple(P(ROWS) if joined else P() for joined in long),
        axis_names={ROWS},
        check_vma=False,
    )
    results = mapped(jnp.pad(x, padding) if missing else x, *whole)
    return tuple(result[:length] if joined else result for joined, result in zip(long, results, strict=True))


def map_rows(kernel: Callable[..., Float[Array, "b q"]], x: Float[Array, "m n"], *whole: Any) -> Float[Array, "m q"]:
    """`kernel(x, *whole)` for a kernel that treats every row alike and by itself: each device does its own rows.

    For what the compiler would gather x for, such as solving a triangular system for many right sides.
    """
    if not is_divided(*x.shape):
        return kernel(x, *whole)
    return map_parts(lambda *operands: (kernel(*operands),), x, *whole, long=(True,))[0]


def add_parts(x: Any, axis: str | None) -> Any:
    """The sum over the devices of an axis; x itself where there is none."""
    return x if axis is None else lax.psum(x, axis)


def largest_part(x: Array, axis: str | None) -> Array:
    """The largest of the devices of an axis, which all get; x itself where there is none."""
    return x if axis is None else lax.pmax(x, axis)


def on_all_parts(flag: Bool[Array, ""], axis: str | None) -> Bool[Array, ""]:
    """True where it is so on every device of an axis: loops with collectives in them must end together."""
    return flag if axis is None else lax.pmin(flag.astype(jnp.int32), axis) > 0
