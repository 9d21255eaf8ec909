"""The compiled side of a merge: hyperparameters that are compiled in, and those that are passed at run time."""

import jax.numpy as jnp
import numpy as np

from rgsp_jax.pipeline.kernels import cast_traced, run_item, split_static
from rgsp_jax.pipeline.plan import Group
from rgsp_jax.registry import methods


def test_what_is_compiled_in_and_what_is_not():
    given = {"rank": 4, "active_rank": 2, "beta": 1, "temperature": None, "align_signs": True, "geometry": "spectral"}
    static, traced = split_static(methods["rgsp"], given)
    assert dict(static) == {name: given[name] for name in ("rank", "temperature", "align_signs", "geometry")}
    assert static == tuple(sorted(static))
    narrow = cast_traced({name: jnp.asarray(value) for name, value in traced.items()}, jnp.float32)
    assert narrow.keys() == {"active_rank", "beta"}
    assert narrow["beta"].dtype == jnp.float32 and narrow["beta"] == 1
    assert jnp.issubdtype(narrow["active_rank"].dtype, jnp.integer) and narrow["active_rank"] == 2


def test_a_masked_rank_is_the_smaller_rank():
    rng = np.random.default_rng(0)
    sources = tuple(jnp.asarray(rng.normal(size=(2, 6, 5))) for _ in range(2))
    salts, double = np.zeros((2, 2), np.uint32), np.dtype(np.float64)

    def merge(**hyperparameters):
        group = Group("matrices", "rgsp", hyperparameters, (6, 5), (double, double), double)
        return run_item(group, sources, salts, 0, False)

    smaller, masked = merge(rank=2), merge(rank=4, active_rank=2)
    np.testing.assert_allclose(masked.merged, smaller.merged, rtol=0, atol=1e-9)
    assert not np.allclose(masked.merged, merge(rank=4).merged, rtol=0, atol=1e-6)
