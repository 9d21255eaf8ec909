"""Tangents of the leading singular triples, linear in the matrix's tangent, finite everywhere.

With P = u^T dw v, the tangents split into rotations within the kept triples and a turn out of their span:

    ds = diag P,   du = u R + x,   dv = v T + y,
    R_ij = sym(P)_ij / (s_j - s_i) + skew(P)_ij / (s_i + s_j),   T_ij the same with a minus between,
    s_i x_i - w y_i = (I - u u^T) dw v_i,   s_i y_i - w^T x_i = (I - v v^T) dw^T u_i   on the complements.

Dropping x and y's coupling through the discarded spectrum (w in the last line) is a common mistake.
Wan & Zhang, arXiv 1909.02659; Francuz, Schuch & Vanhecke, Phys. Rev. Research 7, 013237.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rgsp_jax.linalg.dense import matmul, multiply_transposed, power_of_two_scale, project_out, scale_columns

_MAX_STEPS = 1000


def singular_tangents(
    w: Float[Array, "m n"],
    u: Float[Array, "m r"],
    s: Float[Array, "r"],
    v: Float[Array, "n r"],
    dw: Float[Array, "m n"],
    active: Int[Array, ""],
) -> tuple[Float[Array, "m r"], Float[Array, "r"], Float[Array, "n r"]]:
    """du, ds, dv for the tangent dw; the turn of columns at and past `active` out of the span is not solved for."""
    scale = lax.stop_gradient(power_of_two_scale(w))
    dwv, dwtu = matmul(dw, v), matmul(u.T, dw).T
    p = matmul(u.T, dwv)
    ds = jnp.diagonal(p)
    # From here on in units where the entries of w are at most 1; u and v scale inversely to w.
    w, s, p, dwv, dwtu = w / scale, s / scale, p / scale, dwv / scale, dwtu / scale
    cutoff = _cutoff(s)
    symmetric, skew = (p + p.T) / 2, (p - p.T) / 2
    difference = symmetric * _inverse(s[None, :] - s[:, None], cutoff)
    total = skew * _inverse(s[None, :] + s[:, None], cutoff)
    turned_u, turned_v = _turn_out_of_span(w, u, s, v, dwv, dwtu, active)
    return matmul(u, difference + total) + turned_u, ds, matmul(v, difference - total) + turned_v


def _cutoff(s: Array) -> Array:
    """Singular values nearer to each other, or to zero, than the rounding of s_1 are the same."""
    largest = lax.stop_gradient(s[0])
    return 16 * float(jnp.finfo(s.dtype).eps) * jnp.where(largest > 0, largest, 1)


def _inverse(x: Array, cutoff: Array) -> Array:
    """1 / x, and 0 where |x| is under the cutoff."""
    large = jnp.abs(x) > cutoff
    return jnp.where(large, 1 / jnp.where(large, x, 1), 0)


def _turn_out_of_span(
    w: Array, u: Array, s: Array, v: Array, dwv: Array, dwtu: Array, active: Array
) -> tuple[Array, Array]:
    """x and y of the module's formula."""
    m, n = w.shape
    if m < n:
        y, x = _turn_out_of_span(w.T, v, s, u, dwtu, dwv, active)
        return x, y
    rank = s.shape[0]
    if rank == m:
        return jnp.zeros_like(u), jnp.zeros_like(v)
    cutoff = _cutoff(s)
    inverse = _inverse(s, cutoff)
    b = project_out(u, dwv)
    if rank == n:
        return scale_columns(b, inverse), jnp.zeros_like(v)
    wanted = (jnp.arange(rank, dtype=active.dtype) < active) & (s > cutoff)
    y = _solve_complement(w, u, v, inverse, b, project_out(v, dwtu), wanted)
    return scale_columns(b + project_out(u, matmul(w, y)), inverse), y


def _solve_complement(
    w: Array, u: Array, v: Array, inverse: Array, b: Array, c: Array, wanted: Bool[Array, "r"]
) -> Array:
    """y with `s_i^2 y_i - w_perp^T w_perp y_i = s_i c_i + w_perp^T b_i` per column, w_perp = (I - u u^T) w.

    The smaller complement's Schur complement: symmetric, positive definite while s_i > s_{r+1}, and half the steps
    of the coupled system. Divided by s_i^2 its eigenvalues lie in (0, 1].
    """

    def operator(y: Array) -> Array:
        image = project_out(v, multiply_transposed(w, project_out(u, matmul(w, y))))
        return y - scale_columns(image, inverse * inverse)

    right_side = jnp.where(
        wanted[None, :],
        scale_columns(c + scale_columns(project_out(v, multiply_transposed(w, b)), inverse), inverse),
        0,
    )
    y = lax.custom_linear_solve(operator, right_side, _conjugate_gradients, symmetric=True)
    return project_out(v, y)


class _Step(NamedTuple):
    x: Array
    residual: Array
    direction: Array
    energy: Array
    """Squared norm of every column's residual."""
    running: Array
    steps: Array


def _conjugate_gradients(operator, right_side: Array) -> Array:
    """Column-wise conjugate gradients; a column freezes when converged, or where the operator is singular to rounding.

    Going on past convergence lets rounding errors grow again, and they do in float32.
    """
    eps = float(jnp.finfo(right_side.dtype).eps)
    energy = jnp.sum(right_side * right_side, axis=0)
    goal = (4 * eps) ** 2 * energy

    def unfinished(step: _Step) -> Array:
        return jnp.any(step.running) & (step.steps < _MAX_STEPS)

    def advance(step: _Step) -> _Step:
        image = operator(step.direction)
        curvature = jnp.sum(step.direction * image, axis=0)
        length = jnp.sum(step.direction * step.direction, axis=0)
        running = step.running & (curvature > 4 * eps * length)
        rate = jnp.where(running, step.energy / jnp.where(running, curvature, 1), 0)
        x = step.x + scale_columns(step.direction, rate)
        residual = step.residual - scale_columns(image, rate)
        energy = jnp.sum(residual * residual, axis=0)
        turn = jnp.where(running, energy / jnp.where(running, step.energy, 1), 0)
        direction = jnp.where(running[None, :], residual + scale_columns(step.direction, turn), step.direction)
        return _Step(x, residual, direction, energy, running & (energy > goal), step.steps + 1)

    start = _Step(jnp.zeros_like(right_side), right_side, right_side, energy, energy > 0, jnp.asarray(0))
    return lax.while_loop(unfinished, advance, start).x
