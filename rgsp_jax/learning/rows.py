"""Inputs divided over the devices that learn from them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from rgsp_jax.learning.dealing import Axis

DATA = "data"
"""Axis of a mesh whose devices take rows of a batch of their own each, unless another is named."""


def place_rows(batch: Any, mesh: Mesh, axis: str = DATA) -> Any:
    """A batch with its rows divided over an axis of a mesh, filled up with zeros to as many on every device.

    The losses of this package are sums over rows by counts of rows, both over all devices, so that on a divided batch
    they and their gradients are those of the whole one, to rounding, if they are told which rows count: `where` must be
    False for those that fill up, as a mask of trues in the batch is after this.

    Args:
        batch: pytree of arrays with rows along their first axis.
        mesh, axis: that the rows are divided over; one that `place_family` divides matrices over may serve both.
    """
    along = Axis(mesh, axis)

    def place(x: Array) -> Array:
        missing = -x.shape[0] % along.size
        return jax.device_put(jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) if missing else x, along.divided)

    return jax.tree.map(place, batch)
