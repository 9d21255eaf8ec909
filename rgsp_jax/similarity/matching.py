"""Whether rows of two matrices are the same neurons, and how often chance would make it look so.

Everything rests on one symmetry: the neurons of a layer are initialised alike and trained alike, so that in a model
trained independently their numbering is arbitrary. Against such a model, the best matching of rows is as likely to be
any permutation as any other, whatever the weights look like, and the number of rows it leaves in their place is that
of the fixed points of a random permutation (Montmort's matching problem): Poisson with mean 1, to 2^m / m! or better.
The same law holds for the number of rows that two matchings, found from disjoint sets of columns that have nothing to
do with each other, send to the same place. So a dozen coincidences settle the matter, whatever the kind of model.
`pytest tests/similarity -k chance` counts and measures it, on independent matrices with heavy tails and uneven rows.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class RowAgreement(NamedTuple):
    """Cosines between centred rows, split into what the even and the odd columns contribute: the cosine is the sum."""

    even: Float[Array, "k m"]
    odd: Float[Array, "k m"]


def compare_rows(
    a: Float[Array, "m n"], b: Float[Array, "m n"], rows: Int[Array, "k"], columns: Int[Array, "n"] | None = None
) -> RowAgreement:
    """`G[i, j] = cos(a_rows[i] - mean row of A, b_j - mean row of B)`, from even and from odd columns.

    Taking the mean row off takes off what all rows share, which says nothing about which is which; unit length keeps
    long rows from being everybody's best match.

    Args:
        a, b: matrices of one shape; the axis to be matched comes first.
        rows: of A that are looked at.
        columns: for every column of A the column of B that it is held to be; None as they lie.

    Raises:
        ValueError: shapes that differ.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"compare_rows wants two matrices of one shape, got {a.shape} and {b.shape}")

    def normalise(x: Array) -> Array:
        x = x - jnp.mean(x, axis=0, keepdims=True)
        square = jnp.sum(x**2, axis=1, keepdims=True)
        return x / jnp.where(square > 0, jnp.sqrt(square), 1.0)

    a, b = normalise(a)[rows], normalise(b)
    if columns is not None:
        b = b[:, columns]
    even, odd = (jnp.matmul(a[:, start::2], b[:, start::2].T, precision=jax.lax.Precision.HIGHEST) for start in (0, 1))
    return RowAgreement(even, odd)


def chance_of_coincidences(count: int) -> float:
    """`P(X >= count)` for X Poisson with mean 1: how often unrelated rows coincide this often.

    Summed from `count` upwards, so that tiny probabilities keep their digits.
    """
    if count <= 0:
        return 1.0
    term = math.exp(-1 - math.lgamma(count + 1))
    total = 0.0
    for j in range(count, count + 60):
        total += term
        term /= j + 1
    return total


def can_tell_apart(rows: int, columns: float) -> bool:
    """True where one of `rows` rows can be recognised by `columns` random numbers.

    The largest of m cosines between independent rows is about `sqrt(2 ln m / n)` (the maximum of m normal variables of
    variance 1/n); only where that is below 1 can a row be nearer to itself than to every other.
    """
    return columns > 2 * math.log(max(rows, 2))
