"""AdaMMS' search of a merge coefficient without labels: where the merged model's answers change least."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

MEASURES = ("exact", "cosine")
HIGHEST = lax.Precision.HIGHEST


class ResponseSearch(NamedTuple):
    """The coefficient chosen, and why."""

    alpha: Float[Array, ""]
    changes: Float[Array, "alphas"]
    """Of every candidate, in the order given; infinite at the two ends of the grid, which have one neighbour."""
    tied: Bool[Array, "alphas"]
    """Candidates whose answers change as little as the chosen one's, itself among them."""


def search_alpha(
    alphas: Float[Array, "alphas"],
    responses: Float[Array, "alphas inputs ..."] | Int[Array, "alphas inputs ..."],
    measure: str = "exact",
    smoothing: int = 0,
) -> ResponseSearch:
    """The merge coefficient at which answers differ least from those at its two neighbours on the grid.

    AdaMMS' unsupervised search (Du et al. 2025, CVPR, arXiv 2503.23733): merges are taken by linear interpolation
    with coefficients alpha on a grid (0.4 to 1 in steps of 0.1 in the authors' scripts), each answers the same
    unlabelled inputs, and

        changes_i = number of inputs whose answer at alpha_i differs from that at alpha_(i-1) or at alpha_(i+1)

    is least at the chosen one. "cosine" is the authors' measure for free text: the inputs' mean of `1 - cos` between
    the answers' embeddings, summed over both neighbours. Of equal candidates the smallest alpha is chosen, where
    their code prints them all.

    The rest of AdaMMS is no merge method of its own: its interpolation is `average` with coefficients, and its map
    between architectures is `rgsp merge --key-map`. Whole (`rgsp search` does so with checkpoints):

        alphas = jnp.linspace(0, 1, 11)
        merge_at = lambda alpha: merge([other, first], "average", coefficients=[alpha, 1 - alpha])[0]
        logits = jnp.stack([apply(merge_at(alpha), inputs) for alpha in alphas])
        best = merge_at(search_alpha(alphas, logits).alpha)

    Args:
        alphas: A >= 3 different candidates, in any order.
        responses: one answer per candidate and input. Integers [A, inputs, ...] (tokens, padded alike, or classes)
            are compared whole. Floats are logits [A, inputs, ..., classes] by "exact", of which the largest is the
            answer, and embeddings [A, inputs, dimension] by "cosine".
        measure: "exact" or "cosine".
        smoothing: changes are averaged over so many inner candidates on either side before the least is taken.

    Raises:
        ValueError: fewer than three candidates, another number of answers, an unknown measure, or integers by cosine.
    """
    alphas, responses = jnp.asarray(alphas), jnp.asarray(responses)
    count = alphas.shape[0]
    if alphas.ndim != 1 or count < 3:
        raise ValueError(f"a change between neighbours needs three candidates or more, not {list(alphas.shape)}")
    if responses.ndim < 2 or responses.shape[0] != count:
        raise ValueError(f"{count} candidates need responses [{count}, inputs, ...], not {list(responses.shape)}")
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, not {measure!r}")
    order = jnp.argsort(alphas)
    inner = _exact_changes(responses[order]) if measure == "exact" else _cosine_changes(responses[order])
    inner = _smooth(inner, smoothing)
    best = jnp.argmin(inner)  # the first of equal ones
    changes = jnp.full(count, jnp.inf, inner.dtype).at[order[1:-1]].set(inner)
    return ResponseSearch(alphas[order[1 + best]], changes, changes == inner[best])


def _exact_changes(responses: Array) -> Float[Array, "inner"]:
    """How many inputs are answered otherwise by either neighbour."""
    answers = responses if jnp.issubdtype(responses.dtype, jnp.integer) else jnp.argmax(responses, axis=-1)
    answers = answers.reshape(*answers.shape[:2], -1)
    differs = jnp.any(answers[1:] != answers[:-1], axis=-1)
    return jnp.sum(differs[1:] | differs[:-1], axis=1).astype(jnp.float32)


def _cosine_changes(embeddings: Array) -> Float[Array, "inner"]:
    """Mean cosine distance of answers to both neighbours'; an answer of zero is at right angles to all others."""
    if not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise ValueError(f"answers of type {embeddings.dtype.name} have no cosine: give embeddings, or measure='exact'")
    wide = jnp.float64 if embeddings.dtype == jnp.float64 else jnp.float32
    flat = embeddings.astype(wide).reshape(*embeddings.shape[:2], -1)
    sizes = jnp.linalg.norm(flat, axis=-1, keepdims=True)
    units = flat / jnp.where(sizes > 0, sizes, 1)
    steps = 1 - jnp.mean(jnp.einsum("aid,aid->ai", units[1:], units[:-1], precision=HIGHEST), axis=1)
    return steps[1:] + steps[:-1]


def _smooth(x: Float[Array, "inner"], reach: int) -> Float[Array, "inner"]:
    """Means over `reach` entries on either side, fewer at the ends."""
    index = jnp.arange(x.shape[0])
    window = (jnp.abs(index[:, None] - index[None, :]) <= reach).astype(x.dtype)
    return jnp.sum(window * x[None, :], axis=1) / jnp.sum(window, axis=1)
