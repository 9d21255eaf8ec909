"""The rank argument that every method shares: an integer, or a fraction of min(m, n)."""

import math
import numbers


def resolve_rank(rank: int | float, m: int, n: int) -> int:
    """Number of singular directions kept of an m x n matrix, in 1..min(m, n).

    An integer is clamped to min(m, n); a float is a fraction of min(m, n) in (0, 1], rounded, and at least 1.

    Args:
      rank: the integer or fraction as the user wrote it.
      m, n: the matrix's shape, both positive.

    Raises:
      ValueError: rank is a bool, not a number, not positive, or a fraction above 1; or the matrix is empty.
    """
    smaller = min(m, n)
    if smaller < 1:
        raise ValueError(f"rank {rank!r} of an empty {m} x {n} matrix: there is no direction to keep")
    if isinstance(rank, bool) or not isinstance(rank, numbers.Real):
        raise ValueError(f"rank must be an integer or a fraction of min(m, n), got {rank!r}")
    if isinstance(rank, numbers.Integral):
        if rank < 1:
            raise ValueError(f"rank as an integer must be at least 1, got {rank!r}")
        return min(int(rank), smaller)
    fraction = float(rank)
    if not (math.isfinite(fraction) and 0.0 < fraction <= 1.0):
        raise ValueError(
            f"rank as a fraction of min(m, n) must lie in (0, 1], got {rank!r}; a count of directions is an integer"
        )
    return max(1, round(fraction * smaller))
