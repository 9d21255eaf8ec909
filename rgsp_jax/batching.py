"""Run a kernel for one matrix over a batch of them, the way the platform does it best."""

from collections.abc import Callable
from typing import Any

import jax


def map_batch(fn: Callable[..., Any], *batches: Any) -> Any:
    """`jax.vmap(fn)(*batches)`: on a CPU one after the other, elsewhere all at once.

    Under vmap a `lax.cond` pays for both branches and a `while_loop` runs every lane to the slowest, which a CPU
    gains nothing for; accelerators want the batched products.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.map(lambda operands: fn(*operands), batches)
    return jax.vmap(fn)(*batches)
