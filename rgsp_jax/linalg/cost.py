"""Floating-point operations of the decompositions, to the leading order: what a planner compares and adds up."""

EIGENVECTORS = 9
"""Of a symmetric n x n matrix, in units of n^3: tridiagonal form, divide and conquer, vectors turned back."""
POLAR_PRODUCTS = 20
"""Of an m x q matrix, in units of m q^2: its Gram matrix twice, its eigenvectors' images, polish, the last step."""


def count_eigh(n: int) -> float:
    """Of `jnp.linalg.eigh` of an n x n matrix."""
    return float(EIGENVECTORS * n**3)


def count_truncated_svd(m: int, n: int, rank: int) -> float:
    """Of `truncated_svd`: the full decomposition, or a few passes of a block somewhat wider than the rank."""
    small, steps = min(m, n), min(3 * rank + 20, min(m, n))
    full = 2 * m * n * small + EIGENVECTORS * small**3
    return float(min(full, 4 * m * n * steps + 4 * (m + n) * steps**2))


def count_polar(m: int, q: int) -> float:
    """Of `polar_factor` of an m x q matrix."""
    long, short = max(m, q), min(m, q)
    return POLAR_PRODUCTS * long * short**2 + count_eigh(short)
