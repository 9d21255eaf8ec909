"""DELLA: drop entries at random, the small ones of a row more often than the large ones."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.linalg.rows import divide_side
from rgsp_jax.merging.dare import DropRate
from rgsp_jax.merging.sparsity import drop_at_random, rank_in_rows
from rgsp_jax.merging.task_arithmetic import Scale, TaskCoefficients, task_vectors
from rgsp_jax.merging.ties import Normalize, merge_by_sign
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Window = Annotated[
    Any, Hyperparameter("drop probability of a row's smallest entry minus that of its largest", low=0, high=1)
]


def della(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    key: Array,
    drop_rate: DropRate = 0.5,
    window: Window = 0.3,
    scale: Scale = 1.0,
    coefficients: TaskCoefficients = None,
    normalize: Normalize = True,
) -> MergeOutput:
    """Magnitude-ranked dropping, then TIES' sign election and disjoint mean.

    Deep et al. 2024, DELLA-Merging, arXiv 2406.11617. In every row the drop probability falls linearly with the rank
    of the magnitude, from `drop_rate + window / 2` to `drop_rate - window / 2`; what is left is divided by one minus
    its own. The authors tune the rate, the window and the scale (their lambda); of the defaults here the window is
    mergekit's (its epsilon is half of it), the rate ours.

    Args:
        stack: K >= 1 models [K, m, n], rows are outputs; a vector is one row.
        base: their common ancestor [m, n].
        key: PRNG key; the i-th model draws from `fold_in(key, i)`.
        drop_rate: mean probability.
        window: 0 is DARE's dropping.
        scale, coefficients, normalize: see `ties`.

    Returns:
        stats: `sign_agreement`; `drop_rates_clipped`, a flag, where drop_rate +- window / 2 left [0, 1].
    """
    vectors = task_vectors(divide_side(stack, 0), divide_side(base, 0))  # each row is ranked by itself
    rate, window = jnp.asarray(drop_rate, stack.dtype), jnp.asarray(window, stack.dtype)
    rates = rate + window * (0.5 - jax.vmap(rank_in_rows)(vectors))
    clipped = (rate + window / 2 > 1) | (rate - window / 2 < 0)
    vectors = drop_at_random(vectors, key, jnp.clip(rates, 0, 1))
    merged, agreement = merge_by_sign(vectors, coefficients, normalize)
    stats = {"sign_agreement": agreement, "drop_rates_clipped": clipped}
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * merged, stats)
