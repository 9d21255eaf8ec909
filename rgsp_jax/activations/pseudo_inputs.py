"""Inputs for a donor whose data nobody has: random sequences of the tokens that its fine-tuning moved.

A row of an embedding table that neither of two fine-tunes of one ancestor looked up has been decayed at most; the rows
that differ are the vocabulary of their data, and the position rows that differ tell how long these were.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

MOVED = 0.2
"""A row has moved where the two models differ by this share of what the most moved rows differ by."""
SHORTEST = 8
COMMON = 5
"""Offset in the Zipf law: the first token of the vocabulary is not drawn all the time."""


def find_moved(
    recipient: Float[np.ndarray, "rows width"], donor: Float[np.ndarray, "rows width"]
) -> Float[np.ndarray, "rows"]:
    """How far each row of a table moved between the two; 0 where it did not."""
    distance = np.linalg.norm(donor.astype(np.float64) - recipient, axis=1)
    return np.where(distance > MOVED * np.quantile(distance, 0.99), distance, 0)


def find_frame(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The token that every sequence begins with and the one that every one ends with, where there are such."""
    first, last = {sequence[0] for sequence in sequences}, {sequence[-1] for sequence in sequences}
    return list(first) if len(first) == 1 else [], list(last) if len(last) == 1 else []


def draw_pseudo_inputs(
    token_moves: Float[np.ndarray, "vocabulary"],
    position_moves: Float[np.ndarray, "positions"],
    own: Sequence[Sequence[int]],
    count: int,
    longest: int,
    seed: int,
) -> list[list[int]]:
    """Random sequences of the tokens that moved, framed as the recipient's `own` inputs are.

    Tokens are drawn independently: in proportion to how far they moved, over their place in the vocabulary (which is in
    order of frequency, roughly; up to the framing tokens it is special tokens, left out). Lengths are uniform up to the
    last position that moved, or `longest`.

    Args:
        token_moves, position_moves: of the two tables, as `find_moved` tells; no positions is an empty array.
        own: token ids of the recipient's inputs.
        count: of sequences.
        longest: tokens of a sequence at most, its frame included.
        seed: of the draw.

    Raises:
        ValueError: too few tokens moved: the models share their embeddings.
    """
    before, after = find_frame(own)
    weights = token_moves.astype(np.float64)
    weights[: max([-1, *before, *after]) + 1] = 0
    if np.count_nonzero(weights) < SHORTEST:
        raise ValueError("the two models share their embeddings: what the donor was trained on is not to be seen there")
    weights /= np.maximum(np.arange(len(weights)) - np.flatnonzero(weights)[0], 0) + COMMON
    weights /= weights.sum()
    moved = np.flatnonzero(position_moves)
    limit = max(SHORTEST, min(longest, int(moved[-1]) + 1 if len(moved) else longest))
    rng = np.random.default_rng(seed)
    inside = rng.integers(SHORTEST, limit + 1, size=count) - len(before) - len(after)
    return [[*before, *rng.choice(len(weights), size=n, p=weights).tolist(), *after] for n in inside]
