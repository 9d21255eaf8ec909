"""Experts around a common ancestor, and methods compiled once per setting."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rgsp_jax import merging, methods
from rgsp_jax.types import InputStatistics

SHAPES = ((9, 6), (5, 12))


def experts(seed, count=3, shape=(9, 6), spread=0.3):
    """(stack, base) in float64 NumPy; task vectors share a direction, so that signs agree and disagree."""
    rng = np.random.default_rng(seed)
    base, common = rng.normal(size=(2, *shape))
    return base + spread * (rng.normal(size=(count, *shape)) + 0.5 * common), base


@functools.cache
def compiled(name, **settings):
    """A jitted `fn(stack, needed) -> MergeOutput` of a method, or of a kernel that has no row in the table."""
    fn = methods[name] if name in methods else getattr(merging, name)
    return jax.jit(lambda stack, needed: fn(stack, **needed, **settings))


def merge(name, stack, settings=None, **needed):
    """The merged matrix and the stats as NumPy."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in (settings or {}).items()}
    needed = {k: v if k == "key" else jnp.asarray(v) for k, v in needed.items()}
    if "covariances" in needed:
        needed["inputs"] = InputStatistics(covariance=needed.pop("covariances"))
    output = compiled(name, **settings)(jnp.asarray(stack), needed)
    return np.asarray(output.merged), {k: np.asarray(v) for k, v in output.stats.items()}


def assert_close(actual, expected, bound=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound * max(1.0, np.abs(expected).max()))
