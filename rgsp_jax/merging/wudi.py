"""WUDI: the task vector that interferes least with what every task vector says of its inputs."""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.linalg.dense import matmul
from rgsp_jax.merging.task_arithmetic import Scale, task_vectors
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

Iterations = Annotated[int, Hyperparameter("steps of Adam", low=1, static=True, whole=True)]
LearningRate = Annotated[Any, Hyperparameter("of Adam, in the units of the weights", low=0)]

HIGHEST = lax.Precision.HIGHEST

Apply = Callable[[Float[Array, "m n"]], Float[Array, "m n"]]


def input_metric(vectors: Float[Array, "k m n"]) -> tuple[Apply, Float[Array, "m n"], Float[Array, ""]]:
    """`tau -> sum_i tau G_i`, `sum_i tau_i G_i` and `sum_i tr tau_i G_i tau_i^T`, `G_i = tau_i^T tau_i / |tau_i|_F^2`.

    G_i stands in for the covariance of the i-th task's inputs, which its task vector's rows are combinations of. The
    n x n sum is formed where that is less work than the K products through the factors.
    """
    count, m, n = vectors.shape
    squares = jnp.sum(vectors**2, axis=(1, 2), keepdims=True)
    squares = jnp.where(squares > 0, squares, 1)
    scaled = vectors / squares
    grams = jnp.einsum("kmn,kpn->kmp", vectors, vectors, precision=HIGHEST)
    target = jnp.einsum("kmp,kpn->mn", grams, scaled, precision=HIGHEST)
    at_zero = jnp.sum(grams**2 / squares)
    if n <= 2 * count * m:
        total = matmul(vectors.reshape(-1, n).T, scaled.reshape(-1, n))
        return lambda tau: matmul(tau, total), target, at_zero
    across = jnp.moveaxis(vectors, 2, 0).reshape(n, count * m)
    return lambda tau: matmul(matmul(tau, across), scaled.reshape(-1, n)), target, at_zero


def wudi(
    stack: Float[Array, "k m n"],
    base: Float[Array, "m n"],
    iterations: Iterations = 300,
    learning_rate: LearningRate = 1e-5,
    scale: Scale = 1.0,
) -> MergeOutput:
    """`base + argmin_tau sum_i |(tau - tau_i) tau_i^T|_F^2 / |tau_i|_F^2`, approached by Adam from `sum_i tau_i`.

    Cheng et al. 2025, arXiv 2503.08099: the task vectors of a linear layer span its inputs, so that the
    loss bounds how far any task's outputs move. The number of steps is part of the method (few steps keep the start
    along directions that hardly matter): 300 at a learning rate of 1e-5 by default, as in fusion_bench. The
    gradient is taken in closed form, one product of two matrices a step.

    Args:
        stack: K >= 1 models [K, m, n] (outputs x inputs).
        base: their common ancestor [m, n].
        iterations: steps of Adam.
        learning_rate: an entry moves by about this much a step, whatever the gradient's size.
        scale: factor on the result; 1 in the paper, which needs none.

    Returns:
        stats: `interference` [2], the loss before and after, relative to that of the base (tau = 0).
    """
    vectors = task_vectors(stack, base)
    apply, target, at_zero = input_metric(vectors)

    def gradient(tau: Float[Array, "m n"]) -> Float[Array, "m n"]:
        return 2 * (apply(tau) - target)

    def relative_loss(tau: Float[Array, "m n"]) -> Float[Array, ""]:
        loss = jnp.sum(tau * (apply(tau) - 2 * target)) + at_zero
        return loss / jnp.where(at_zero > 0, at_zero, 1)

    # Under the root far below Adam's own 1e-8: it only keeps the derivative finite where a gradient is exactly zero.
    optimizer = optax.adam(jnp.asarray(learning_rate, stack.dtype), eps_root=1e-30)

    def step(_: Any, state: tuple[Array, Any]) -> tuple[Array, Any]:
        tau, moments = state
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its integer count
            updates, moments = optimizer.update(gradient(tau), moments)
        return optax.apply_updates(tau, updates), moments

    start = vectors.sum(0)
    tau, _ = lax.fori_loop(0, iterations, step, (start, optimizer.init(start)))
    stats = {"interference": jnp.stack([relative_loss(start), relative_loss(tau)])}
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * tau, stats)
