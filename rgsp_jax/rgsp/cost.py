"""What `relative` takes beside the models' decompositions: for planners, from shapes alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from rgsp_jax.linalg.cost import count_eigh, count_polar, count_truncated_svd
from rgsp_jax.method import Cost
from rgsp_jax.rgsp.relative import REWEIGHTINGS

CORES, SQUARES = 5, 16
"""Held at once: cores, what the median leaves of them, both weights and their product, of every model; and bases,
eigenvectors and LAPACK's room for one decomposition at a time."""


def limit_relative_rank(models: int, m: int, n: int) -> int:
    """Most directions that `relative` keeps of each model: together they are no more than the matrix has."""
    return max(min(m, n) // models, 1)


def is_mean(models: int, hyperparameters: Mapping[str, Any]) -> bool:
    """Whether `relative` has nothing to decompose for: two models without coefficients of their own."""
    own = (hyperparameters.get("directions"), hyperparameters.get("rest"))
    return models == 2 and not any(isinstance(value, Sequence) for value in own)


def count_relative(models: int, m: int, n: int, rank: int) -> Cost:
    """Bases of all directions, the cores in them, the cores' median, and their departures decorrelated.

    Two models have no median.
    """
    q = min(models * rank, m, n)
    words = (CORES * models + SQUARES) * q**2
    if models == 2:
        return Cost(0.0, words)
    bases = count_polar(m, q) + count_polar(n, q)
    cores = 2.0 * models * (m * n * q + n * q**2)
    weight = count_eigh(q) + 4.0 * q**3  # the square of a core, the decomposition, and what it is put together to
    median = REWEIGHTINGS * (2 * models * weight + 4.0 * models * q**3 + 2 * count_eigh(q) + 8.0 * q**3)
    departures = models * count_truncated_svd(q, q, min(rank, q)) + 2 * count_polar(q, q)
    return Cost(bases + cores + median + departures, words)
