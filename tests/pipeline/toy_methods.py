"""Merge methods for tests: cheap to compile, plain to compute by hand, each with one need of its own."""

from types import MappingProxyType
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from rgsp_jax.method import Hyperparameter, Method
from rgsp_jax.registry import methods
from rgsp_jax.types import MergeOutput

Strength = Annotated[Any, Hyperparameter("of the tilt", low=0)]


def tilt(stack, strength: Strength = 0.5):
    """The first matrix plus differences summed along its rows: tells rows from columns and the first from the last."""
    slope = jnp.asarray(strength, stack.dtype) * jnp.cumsum(stack[-1] - stack[0], axis=1) / stack.shape[2]
    merged = stack[0] + slope
    stats = {"corner": merged[0, 0], "slope": jnp.stack([slope[0, 0], slope[-1, -1]]), "falling": slope[0, -1] < 0}
    return MergeOutput(merged, stats)


def tilt_by_hand(stack: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """`tilt` in float64 NumPy."""
    stack = np.asarray(stack, np.float64)
    return stack[0] + strength * np.cumsum(stack[-1] - stack[0], axis=1) / stack.shape[2]


def add_task_vectors(stack, base):
    """`base + sum_i (theta_i - base)`."""
    return MergeOutput(base + (stack - base[None]).sum(0), {"base_size": jnp.sum(base**2)})


def jitter(stack, key):
    """The first model plus a random number for each entry."""
    return MergeOutput(stack[0] + jax.random.normal(key, stack.shape[1:], stack.dtype), {})


TOYS = (
    Method("tilt", tilt, "Summed differences.", models=(1, None)),
    Method("arithmetic", add_task_vectors, "Task vectors on a base.", needs=frozenset({"base"})),
    Method(
        "arithmetic_elements",
        add_task_vectors,
        "The same, anywhere.",
        needs=frozenset({"base"}),
        scope="tensors",
        elementwise=True,
    ),
    Method("jitter", jitter, "Noise on matrices.", models=(1, None), needs=frozenset({"key"})),
    Method(
        "jitter_elements",
        jitter,
        "Noise anywhere.",
        models=(1, None),
        needs=frozenset({"key"}),
        scope="tensors",
        elementwise=True,
    ),
)
EXTENDED = MappingProxyType({**methods, **{method.name: method for method in TOYS}})
"""The registry with the toys in it."""
USERS = ("config", "plan", "kernels", "placement", "records")
"""Modules of the pipeline that look methods up."""
