"""RegMean: the linear layer whose outputs are nearest to every model's on that model's own inputs."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.linalg.mean import stack_mean
from rgsp_jax.linalg.rows import divide_side, map_rows
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import InputStatistics, MergeOutput

Importances = Annotated[
    Any, Hyperparameter("weight of every model's covariance beside the others'; null is 1 each", low=0, optional=True)
]
OffDiagonal = Annotated[Any, Hyperparameter("factor on the covariances' off-diagonal entries", low=0, high=1)]


def regmean(
    stack: Float[Array, "k m n"],
    inputs: InputStatistics,
    off_diagonal: OffDiagonal = 0.9,
    coefficients: Importances = None,
) -> MergeOutput:
    """`(sum_i c_i W_i C_i) (sum_i c_i C_i)^-1`, the minimiser of `sum_i c_i tr (W - W_i) C_i (W - W_i)^T`.

    Jin et al. 2023, arXiv 2212.09849. Solved for the departure from the mean, in units where the summed
    covariance has a unit diagonal: equal models return the model, equal covariances the average, and inputs that no
    model ever saw (rows of zeros) keep the average. Off-diagonal entries are scaled by 0.9 by default (the paper's
    alpha, its choice for encoders; 0.1 for T5), which bounds the condition. Past 1 - n eps a ridge of n eps does.

    Args:
        stack: K >= 1 models [K, m, n] (outputs x inputs).
        inputs: every model's whole uncentred covariance [K, n, n], weighted by rows if the models should be.
        off_diagonal: the paper's alpha; 0 weighs every input by its own variance.
        coefficients: c [K], the paper's are 1; their common size does not matter.

    Returns:
        stats: `covariance_singular`, a flag, where the system could not be solved.

    Raises:
        ValueError: sketches or spectra in place of covariances, or other shapes.
    """
    covariances = inputs.covariance
    if covariances is None:
        raise ValueError("RegMean needs whole covariances, of every model")
    if covariances.shape != (stack.shape[0], stack.shape[2], stack.shape[2]):
        raise ValueError(f"covariances are {list(covariances.shape)} for models {list(stack.shape)}")
    n, dtype = stack.shape[2], stack.dtype
    stack = divide_side(stack, 0)  # each output is a problem of its own
    alpha = jnp.asarray(off_diagonal, dtype)
    eye = jnp.eye(n, dtype=dtype)
    weight = alpha + (1 - alpha) * eye
    mean = stack_mean(stack)
    scaled = covariances.astype(dtype) * weight[None]
    if coefficients is not None:
        scaled = scaled * jnp.asarray(coefficients, dtype)[:, None, None]
    total = scaled.sum(0)
    diagonal = jnp.diagonal(total)
    seen = diagonal > 0
    unit = jnp.where(seen, 1 / jnp.sqrt(jnp.where(seen, diagonal, 1)), 0)
    safe = n * float(jnp.finfo(dtype).eps)
    ridge = jnp.maximum(safe - (1 - alpha), 0)
    system = total * unit[:, None] * unit[None, :] + (ridge + jnp.where(seen, 0, 1)[:, None].astype(dtype)) * eye
    right = jnp.einsum("kmn,knp->mp", stack - mean[None], scaled, precision=lax.Precision.HIGHEST) * unit[None, :]
    factor = jnp.linalg.cholesky(system)
    solved = map_rows(lambda x, factor: jax.scipy.linalg.cho_solve((factor, True), x.T).T, right, factor)
    departure = solved * unit[None, :]
    singular = ~jnp.isfinite(departure).all()
    return MergeOutput(mean + jnp.where(singular, 0, departure), {"covariance_singular": singular})
