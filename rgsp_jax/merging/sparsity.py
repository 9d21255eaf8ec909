"""Which entries of a task vector to keep: by magnitude, at random, or both."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

DECIMALS = 10_000


def entry_count(share: Any, size: int, dtype: Any) -> Int[Array, ""]:
    """`floor(share * size)`: exact for shares of at most four decimals, for others up to the rounding of the share.

    The decimals are read back from the share as rounded to `dtype`, and the product is one of integers: in float32 the
    rounding of 0.2 alone is worth entries in an embedding table, and 0.7 of 10 would be 6.
    """
    share, eps = jnp.clip(jnp.asarray(share, dtype), 0, 1), float(jnp.finfo(dtype).eps)
    decimals = jnp.round(share * DECIMALS)
    whole, rest = divmod(size, DECIMALS)
    numerator = decimals.astype(jnp.int32)
    exact = numerator * whole + numerator * rest // DECIMALS
    product = share * size
    rounded = jnp.minimum(jnp.floor(product + eps * product), jnp.ceil(product)).astype(jnp.int32)
    is_decimal = jnp.abs(share * DECIMALS - decimals) <= eps * decimals
    return jnp.clip(jnp.where(is_decimal, exact, rounded), 0, size)


def keep_largest(x: Float[Array, "m n"], count: Int[Array, ""] | int) -> Bool[Array, "m n"]:
    """True for exactly `count` entries of largest magnitude; of equal ones the first in row-major order.

    Bisection over the bits of the magnitudes, which order as the magnitudes do: one counting pass per bit and no sort,
    so that an embedding table takes no more memory than itself. No derivative flows through the choice.

    Args:
        x: the entries, finite.
        count: how many to keep, 0 to m n; may be traced.
    """
    unsigned = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(jnp.abs(lax.stop_gradient(x)), unsigned)
    count = jnp.asarray(count, jnp.int32)
    position = lax.broadcasted_iota(jnp.int32, x.shape, 0) * x.shape[1] + lax.broadcasted_iota(jnp.int32, x.shape, 1)

    def number(mask: Array) -> Array:
        return jnp.sum(mask, dtype=jnp.int32)

    def raise_threshold(step: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.ones((), unsigned) << (8 * x.dtype.itemsize - 2 - step).astype(unsigned))
        return jnp.where(number(bits >= candidate) >= count, candidate, threshold)

    threshold = lax.fori_loop(0, 8 * x.dtype.itemsize - 1, raise_threshold, jnp.zeros((), unsigned))

    def choose_ties(state: _Choice) -> _Choice:
        above, tied = bits > threshold, bits == threshold
        wanted = count - number(above)
        candidate = state.last | (jnp.int32(1) << state.bit)
        last = jnp.where(number(tied & (position < candidate)) < wanted, candidate, state.last)
        settled = number(tied) == wanted  # the common case: no second bisection
        chosen = above | (tied & (wanted > 0) & (settled | (position <= last)))
        return _Choice(state.bit - 1, last, chosen, settled | (state.bit == 0))

    # The mask is made in the loop too: outside, XLA would compute x anew and round it otherwise than the threshold.
    start = _Choice(jnp.int32(x.size.bit_length() - 1), jnp.int32(0), jnp.zeros(x.shape, bool), jnp.asarray(False))
    return lax.while_loop(lambda state: ~state.done, choose_ties, start).mask


class _Choice(NamedTuple):
    """Bisection for the position of the last tied entry that is kept."""

    bit: Int[Array, ""]
    last: Int[Array, ""]
    mask: Bool[Array, "m n"]
    done: Bool[Array, ""]


def rank_in_rows(x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """Rank of every entry's magnitude in its row, from 0 (smallest) to 1; 1/2 in rows of one entry."""
    order = jnp.argsort(jnp.abs(lax.stop_gradient(x)), axis=1, stable=True)
    ranks = jnp.argsort(order, axis=1).astype(x.dtype)
    return ranks / (x.shape[1] - 1) if x.shape[1] > 1 else jnp.full_like(ranks, 0.5)


def drop_at_random(
    vectors: Float[Array, "k m n"], key: Array, drop_rates: Float[Array, "..."]
) -> Float[Array, "k m n"]:
    """Zero entries with the given probabilities and divide what is left by 1 - p, so that the expectation stays.

    Args:
        vectors: K task vectors; the i-th one's entries are drawn from `fold_in(key, i)`, whatever K is.
        key: a PRNG key.
        drop_rates: p in [0, 1], a scalar or [K, m, n]; all is dropped at 1.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(vectors.shape[0], dtype=jnp.uint32))
    # float32 whatever is computed in, so that the draw does not depend on it.
    draws = jax.vmap(lambda k: jax.random.uniform(k, vectors.shape[1:], jnp.float32))(keys)
    drop_rates = jnp.broadcast_to(drop_rates, vectors.shape)
    kept = (draws >= lax.stop_gradient(drop_rates).astype(jnp.float32)) & (drop_rates < 1)
    return jnp.where(kept, vectors / jnp.where(kept, 1 - drop_rates, 1), 0)
