"""Models to merge on a mesh, what each method needs beside them, and what compiled programs say to each other."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from linalg.matrices import with_singular_values
from rgsp_jax import methods
from rgsp_jax.types import InputStatistics

EXPERTS, RANK = 3, 4
SETTINGS = {
    "sequential_graft": {"share": 0.5},
    "iso_cts": {"common_share": 0.5},
    "wudi": {"iterations": 3},
}
"""Beside the rank; everything else as it is by default."""


def count_models(name):
    low, high = methods[name].models
    return max(low, min(EXPERTS, high or EXPERTS))


def settings_of(name, rank=RANK):
    return ({"rank": rank} if "rank" in methods[name].hyperparameters else {}) | SETTINGS.get(name, {})


def make_models(count, m, n, seed=0):
    """(stack [K, m, n], ancestor [m, n]) in float64: spectra that fall by a tenth from value to value."""
    rng = np.random.default_rng(seed)
    ancestor = with_singular_values(m, n, 4 * 0.9 ** np.arange(min(m, n)), seed=seed)
    changes = [with_singular_values(m, n, 0.7 ** np.arange(min(m, n)), seed=seed + 1 + i) for i in range(count)]
    noise = 1e-3 * rng.standard_normal((count, m, n)) / math.sqrt(n)
    return ancestor + 0.2 * np.stack(changes) + noise, ancestor


def make_case(case, count, m, n):
    """The same with something special about the models."""
    stack, ancestor = make_models(count, m, n)
    if case == "equal":
        stack = np.broadcast_to(stack[:1], stack.shape)
    if case == "zero":
        stack, ancestor = np.zeros_like(stack), np.zeros_like(ancestor)
    if case == "one direction":
        stack, ancestor = np.stack([np.outer(x[:, 0], x[0]) for x in stack]), np.zeros_like(ancestor)
    if case == "repeated":
        flat = [with_singular_values(m, n, [*[1.0] * RANK, *[0.3] * 3], seed=9 + i) for i in range(count)]
        stack, ancestor = np.stack(flat), np.zeros_like(ancestor)
    return stack, ancestor


def make_arguments(name, stack, ancestor, dtype):
    """(stack, keywords) as arrays."""
    method, count, n = methods[name], stack.shape[0], stack.shape[2]
    rng = np.random.default_rng(7)
    given = {}
    if "base" in method.needs:
        given["base"] = jnp.asarray(ancestor, dtype)
    if "key" in method.needs:
        given["key"] = jax.random.key(3)
    if "covariances" in method.needs:
        files = method.covariance_counts(count)[0]
        x = rng.standard_normal((files, 3 * n, n)) * np.linspace(0.3, 2, n)
        covariance = np.einsum("kri,krj->kij", x, x) / (3 * n)
        drift = 0.01 * rng.standard_normal((files, n, n)) if method.in_step else None
        given["inputs"] = InputStatistics(
            covariance=jnp.asarray(covariance, dtype), drift=None if drift is None else jnp.asarray(drift, dtype)
        )
    return jnp.asarray(stack, dtype), given


def make_mesh(**axes):
    """A mesh of the first devices with these axes and sizes."""
    sizes = tuple(axes.values())
    return Mesh(np.array(jax.devices()[: math.prod(sizes)]).reshape(sizes), tuple(axes))


COLLECTIVE = re.compile(
    r"= (\(?\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def list_collectives(text):
    """(operation, entries that it carries) of every collective in a compiled program.

    Several sums that the compiler has joined are told apart; of an exchange of parts, what one device passes on.
    """
    found = []
    for types, operation in COLLECTIVE.findall(text):
        sizes = [math.prod(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", types)]
        found += [(operation, sum(sizes))] if operation == "all-to-all" else [(operation, size) for size in sizes]
    return found
