"""Symmetric positive definite systems with many right sides, each a row of a matrix that a mesh may divide."""

import jax
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import matmul
from rgsp_jax.linalg.rows import map_rows


def solve_for_rows(system: Float[Array, "n n"], x: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """`x system^-1` by one Cholesky factor, with one step of refinement: of a poor condition it gives digits back.

    NaN where the system is not positive definite to rounding. Rows that a mesh divides stay where they are.
    """
    factor = jax.scipy.linalg.cho_factor(system)[0]  # upper

    def solve(x: Array, factor: Array, system: Array) -> Array:
        right = x.T
        solved = jax.scipy.linalg.cho_solve((factor, False), right)
        return (solved + jax.scipy.linalg.cho_solve((factor, False), right - matmul(system, solved))).T

    return map_rows(solve, x, factor, system)
