import math

import numpy as np
import pytest

from rgsp_jax.linalg import resolve_rank


@pytest.mark.parametrize(
    ("rank", "m", "n", "expected"),
    [
        (3, 10, 7, 3),
        (7, 10, 7, 7),
        (100, 10, 7, 7),
        (np.int64(2), 10, 7, 2),
        (1, 1, 1, 1),
        (1.0, 10, 7, 7),
        (0.5, 10, 8, 4),
        (0.05, 384, 1536, 19),
        (1e-9, 10, 7, 1),
        (np.float32(0.25), 8, 16, 2),
    ],
)
def test_count_or_fraction(rank, m, n, expected):
    resolved = resolve_rank(rank, m, n)
    assert resolved == expected and type(resolved) is int


@pytest.mark.parametrize("rank", [0, -1, 0.0, -0.5, 1.5, 2.0, math.nan, math.inf, True, False, "4", None, np.bool_(1)])
def test_refusals_name_the_rank(rank):
    with pytest.raises(ValueError, match="rank"):
        resolve_rank(rank, 10, 7)


def test_an_empty_matrix_has_no_rank():
    with pytest.raises(ValueError, match="0 x 7"):
        resolve_rank(0.5, 0, 7)
