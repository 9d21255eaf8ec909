"""Sequential grafts: a layer refitted on what the merged model, its earlier layers refitted already, feeds it.

With inputs k in the merged model and k_i in model i on the same data, the layer sought answers every model's inputs as
that model did,

    W* = argmin sum_i E_i |W k - W_i k_i|^2 + pull |W - W_t|^2 tr(S) / n,   S = sum_i E_i k k^T.

RegMean is the case k = k_i. What is kept of the data are `C_i = E_i k k^T` and the drifts `D_i = E_i (k_i - k) k^T`:
differences, small where layers moved little, so that float32 sums lose nothing to cancellation.
"""

from typing import Annotated, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rgsp_jax.grafting.layer import measure_graft
from rgsp_jax.linalg.rows import divide_side
from rgsp_jax.linalg.solve import solve_for_rows
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import InputStatistics, MergeOutput

SHARE, PULL = 0.25, 0.2

Share = Annotated[
    Any,
    Hyperparameter("the donor's answers on the recipient's own inputs, against the recipient's: 0 keeps most", low=0),
]
Pull = Annotated[
    Any,
    Hyperparameter("to the interpolation, in mean eigenvalues: decides where no input says anything", low=0),
]


def interpolation_weights(share: Any, count: int = 2) -> list[Any]:
    """Weights of the recipient and of `count - 1` donors where nothing is refitted; `share / (1 + share)` is theirs."""
    return [1 / (1 + share)] + [share / (1 + share) / (count - 1)] * (count - 1)


def refit(
    stack: Float[Array, "k m n"],
    covariance: Float[Array, "k n n"],
    drift: Float[Array, "k n n"],
    start: Float[Array, "m n"],
    pull: float | Float[Array, ""] = PULL,
) -> Float[Array, "m n"]:
    """`argmin_W sum_i E_i |W k - W_i k_i|^2 + pull |W - start|^2 tr(S) / n` by one Cholesky factor.

    Args:
        stack: W_i [K, m, n] (outputs x inputs).
        covariance: C_i [K, n, n], symmetric, positive semi-definite, weighted as the terms are.
        drift: D_i [K, n, n], rows by the difference, columns by the merged model's input.
        start: W_t [m, n], kept where no input says anything.
        pull: 0 or more, dimensionless; no less than rounding is used.
    """
    n, dtype = stack.shape[2], stack.dtype
    total = covariance.sum(0)
    unit = jnp.trace(total) / n
    unit = jnp.where(unit > 0, unit, 1)
    least = 10 * n * float(jnp.finfo(dtype).eps)
    system = total / unit + jnp.maximum(jnp.asarray(pull, dtype), least) * jnp.eye(n, dtype=dtype)
    high = lax.Precision.HIGHEST
    right = jnp.einsum("kmn,knp->mp", stack - start[None], covariance, precision=high)
    right = (right + jnp.einsum("kmn,knp->mp", stack, drift, precision=high)) / unit
    return start + solve_for_rows(system, right)


def sequential_graft(
    stack: Float[Array, "k m n"], inputs: InputStatistics, share: Share = SHARE, pull: Pull = PULL
) -> MergeOutput:
    """A layer of the recipient refitted to answer its own inputs as before, and every donor's as the donor does.

    Args:
        stack: recipient and K - 1 donors [K, m, n].
        inputs: `covariance` and `drift` [K, n, n], collected in step with the merge (`rgsp graft --data`).
        share: what the inputs were collected with.
        pull: see `refit`.

    Returns:
        The graft; stats as of `graft_layer`, against the donors' mean; flag `refit_singular` where the system could not
        be solved and the interpolation stands.

    Raises:
        ValueError: inputs without drift, or not of all models.
    """
    count = stack.shape[0]
    if inputs.covariance is None or inputs.drift is None or inputs.covariance.shape[0] != count:
        raise ValueError("a sequential graft needs the covariances and drifts of every model's inputs")
    dtype = stack.dtype
    stack = divide_side(stack, 0)  # each output is a problem of its own
    donor = stack[0] + (stack[1:] - stack[:1]).mean(0)
    start = stack[0] + jnp.asarray(1 - interpolation_weights(share)[0], dtype) * (donor - stack[0])
    merged = refit(stack, inputs.covariance.astype(dtype), inputs.drift.astype(dtype), start, pull)
    singular = ~jnp.isfinite(merged).all()
    merged = jnp.where(singular, start, merged)
    stats = measure_graft(stack[0], donor, merged, inputs)
    return MergeOutput(merged, stats | {"refit_singular": singular})
