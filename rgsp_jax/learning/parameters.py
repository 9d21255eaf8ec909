"""What of a method can be learned, where that starts, and the unconstrained values that an optimiser moves."""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from rgsp_jax.method import MASKED, PER_MODEL, SQUARES, Method
from rgsp_jax.rgsp import distance_scale

COMMON = frozenset({"scale", "reach"})
"""Hyperparameters that multiply all that a method adds to the mean or the base."""
SMALLEST = 1e-3
"""Where learning starts what may be zero and is: a logarithm of zero goes nowhere."""


def list_learnable(method: Method) -> tuple[str, ...]:
    """Hyperparameters that are numbers at run time: what a gradient can move."""
    fixed = set() if method.stages is None else method.stages.arguments("prepare")
    return tuple(
        name
        for name, h in method.hyperparameters.items()
        if not (h.static or h.integer or h.whole or name in {MASKED} | fixed)
    )


def is_positive(method: Method, name: str) -> bool:
    """Whether it must not be negative: its logarithm is learned."""
    return method.hyperparameters[name].low == 0


def constrain(method: Method, name: str, value: Array) -> Array:
    """The hyperparameter of an unconstrained value."""
    if name not in method.hyperparameters or not is_positive(method, name):
        return value
    high = method.hyperparameters[name].high
    return jnp.minimum(jnp.exp(value), high) if math.isfinite(high) else jnp.exp(value)


def unconstrain(method: Method, name: str, value: Array) -> Array:
    """The unconstrained value of a hyperparameter, the inverse of `constrain`."""
    return jnp.log(jnp.maximum(value, SMALLEST)) if is_positive(method, name) else value


def has_start(method: Method, name: str, given: Mapping[str, Any]) -> bool:
    """Whether it is a number, or numbers for each model, where it is not asked for by name.

    A common factor of what has numbers for each model of its own would only say again what they say.
    """
    value = given.get(name, method.defaults[name])
    if name in COMMON and PER_MODEL & method.hyperparameters.keys():
        return False
    return name in PER_MODEL or not (value is None or isinstance(value, str))


def find_start(method: Method, name: str, given: Mapping[str, Any], parts: Any, models: int, dtype: Any) -> Array:
    """Where learning starts: what is given, else the method's default, in the shape it is learned in.

    Args:
        parts: of a leaf's matrices, on a leading axis.
        models: K.
    """
    value = given.get(name, method.defaults[name])
    if name in SQUARES:
        rank = parts.left.shape[-1]
        return jnp.eye(rank, dtype=dtype) if value is None else jnp.asarray(value, dtype)
    if name == "directions" and value is None:
        return jnp.full(models, distance_scale(parts.rho, models).mean(), dtype)
    if name == "coefficients" and value is None:  # every method's null: where it divides by their sum, that is uniform
        return jnp.ones(models, dtype)
    if isinstance(value, str) or value is None:
        raise ValueError(f"{name} of {method.name!r} is {value!r} and no number: give the number to start at")
    array = jnp.asarray(value, dtype)
    return jnp.broadcast_to(array, (models,)) if name in PER_MODEL and array.ndim == 0 else array
