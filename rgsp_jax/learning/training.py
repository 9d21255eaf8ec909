"""Gradient steps on coefficients: a pure step, and the loop over batches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Loss = Callable[..., Float[Array, ""]]
"""`loss(parameters, *data) -> scalar`."""


class LearningState(NamedTuple):
    """Everything that the next step depends on; a pytree of arrays, so that it can be saved and resumed exactly."""

    step: Int[Array, ""]
    parameters: Any
    optimiser: Any


def start_learning(parameters: Any, optimiser: optax.GradientTransformation) -> LearningState:
    """The state before the first step."""
    return LearningState(jnp.zeros((), jnp.int32), parameters, optimiser.init(parameters))


Step = Callable[..., tuple[LearningState, Any]]
"""`step(state, *data) -> (state, loss)`, or `(state, (loss, what else there is to say))`."""


def make_step(loss: Loss, optimiser: optax.GradientTransformation, *, has_aux: bool = False) -> Step:
    """`step(state, *data) -> (state, loss)`, jitted: one gradient step of the optimiser.

    A step whose loss or gradient is not finite changes nothing but the count.

    Args:
        loss: of the parameters and data; differentiable.
        optimiser: of optax.
        has_aux: the loss returns `(value, anything)`, which the step hands on.
    """

    @jax.jit
    def step(state: LearningState, *data: Any) -> tuple[LearningState, Any]:
        value, gradient = jax.value_and_grad(loss, has_aux=has_aux)(state.parameters, *data)
        leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves((value[0] if has_aux else value, gradient))]
        finite = jnp.stack(leaves).all()
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes on purpose
            updates, inner = optimiser.update(gradient, state.optimiser, state.parameters)
        new, old = (optax.apply_updates(state.parameters, updates), inner), (state.parameters, state.optimiser)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        return LearningState(state.step + 1, *kept), value

    return step


def learn(state: LearningState, step: Step, batches: Iterable[tuple[Any, ...]]) -> Iterator[tuple[LearningState, Any]]:
    """Yield the state and the loss after every batch; what is done with them (report, save, stop) is the caller's."""
    for data in batches:
        state, value = step(state, *data)
        yield state, value
