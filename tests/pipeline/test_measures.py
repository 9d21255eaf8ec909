"""What a kernel says of the merge it made: sums, infinities, in whatever parts it worked."""

import ml_dtypes
import numpy as np
import pytest

from rgsp_jax.pipeline import kernels
from rgsp_jax.pipeline.kernels import compile_item, run_item
from rgsp_jax.pipeline.plan import BLOCK, CHUNK, PART, Group, matrix_workspace

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture
def part(monkeypatch):
    """Parts of 64 elements."""
    monkeypatch.setattr(kernels, "PART", 64)
    compile_item.cache_clear()
    yield 64
    compile_item.cache_clear()


def merge(action, method, *sources, **settings):
    """What the kernel gives for arrays [slots, m, n], or [blocks, 1024]."""
    dtypes = tuple(x.dtype for x in sources)
    matrix = sources[0].shape[1:] if action == "matrices" else (0, 0)
    group = Group(action, method, settings, matrix, dtypes, dtypes[0])
    return run_item(group, sources, np.zeros((len(sources[0]), 2), np.uint32), 0, False)


def slerp(a, b, t):
    """In float64, as one vector."""
    angle = np.arccos(np.sum(a * b) / np.sqrt(np.sum(a * a) * np.sum(b * b)))
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, np.dtype(np.float16)], ids=str)
@pytest.mark.parametrize("n", [40, 64, 3 * 64, 5 * 64 + 7])
def test_slerp_in_parts(part, dtype, n):
    rng = np.random.default_rng(n)
    a, b = (rng.standard_normal((2, 1, n)).astype(dtype) for _ in range(2))
    found = merge("matrices", "slerp", a, b, t=0.3)
    assert found.merged.dtype == dtype and found.merged.shape == a.shape
    wide_a, wide_b, merged = (np.asarray(x, np.float64) for x in (a, b, found.merged))
    eps = float(ml_dtypes.finfo(dtype).eps)
    for slot in range(2):
        np.testing.assert_allclose(merged[slot], slerp(wide_a[slot], wide_b[slot], 0.3), rtol=eps, atol=4e-6)
    for k, x in enumerate((wide_a, wide_b)):
        np.testing.assert_allclose(found.size[:, k], (x**2).sum((1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found.change[:, k], ((merged - x) ** 2).sum((1, 2)), rtol=1e-5)
    assert found.finite_in.all() and found.finite_out.all()
    equal = merge("matrices", "slerp", a, a, t=0.3)
    np.testing.assert_array_equal(np.asarray(equal.merged), a)


def test_slerp_does_not_depend_on_its_parts(part):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((1, 1, 1000)).astype(np.float32) for _ in range(2))
    found = merge("matrices", "slerp", a, b)
    compile_item.cache_clear()
    kernels.PART = 1 << 20
    whole = merge("matrices", "slerp", a, b)
    np.testing.assert_allclose(found.merged, whole.merged, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.stats["cosine"], whole.stats["cosine"], rtol=1e-5)


@pytest.mark.parametrize("where", [0, 63, 64, 199])
def test_infinities_are_found_in_every_part(part, where):
    a, b = np.ones((2, 1, 200), np.float32), np.full((2, 1, 200), 0.5, np.float32)
    b[1, 0, where] = np.inf
    found = merge("matrices", "slerp", a, b)
    np.testing.assert_array_equal(found.finite_in, [[True, True], [True, False]])
    np.testing.assert_array_equal(found.finite_out, [True, False])


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_what_overflows_only_in_a_sum_is_finite(dtype):
    blocks = np.ones((CHUNK, BLOCK), dtype)
    blocks[3] = 1e30
    other = blocks.copy()
    other[5, 7], other[6, 8] = np.nan, -np.inf
    found = merge("elements", "average", blocks, other)
    assert not np.isfinite(found.size[3]).any() and np.asarray(found.finite_in)[3].all() and found.finite_out[3]
    spoilt = np.isin(np.arange(CHUNK), [5, 6])
    np.testing.assert_array_equal(found.finite_in, np.stack([np.ones(CHUNK, bool), ~spoilt], 1))
    np.testing.assert_array_equal(found.finite_out, ~spoilt)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_sums_of_blocks(dtype):
    rng = np.random.default_rng(1)
    sources = [rng.standard_normal((2 * CHUNK, BLOCK)).astype(dtype) for _ in range(3)]
    found = merge("elements", "average", *sources)
    wide = [x.astype(np.float64) for x in sources]
    mean = np.asarray(found.merged, np.float64)
    np.testing.assert_allclose(mean, sum(wide) / 3, rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-6)
    for k, x in enumerate(wide):
        np.testing.assert_allclose(found.size[:, k], (x**2).sum(1), rtol=1e-5)
        np.testing.assert_allclose(found.change[:, k], ((mean - x) ** 2).sum(1), rtol=1e-5)


def test_an_embedding_is_not_held_in_float32():
    """Twice the merge in the output's dtype, and parts: `slerp` of a large embedding fits the default memory."""
    group = Group("matrices", "slerp", {}, (1, 32000 * 896), (BFLOAT16, BFLOAT16), BFLOAT16)
    assert matrix_workspace(group) < 2 * 2 * 32000 * 896 + 10 * 2 * 4 * PART
    kernel = compile_item("matrices", "slerp", (), BFLOAT16, False)
    blocks = 40
    stack = tuple(np.zeros((1, 1, blocks * PART), BFLOAT16) for _ in range(2))
    lowered = kernel.lower(stack, {}, np.zeros((1, 2), np.uint32), np.uint32(0), kernels.NOTHING)
    memory = lowered.compile().memory_analysis()
    group = Group("matrices", "slerp", {}, (1, blocks * PART), (BFLOAT16, BFLOAT16), BFLOAT16)
    assert memory.temp_size_in_bytes <= matrix_workspace(group)
