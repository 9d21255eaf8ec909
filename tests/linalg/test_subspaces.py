import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import subspace_angles

from rgsp_jax.linalg import principal_angles, subspace_overlap


def basis(m, r, seed):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((m, r)))[0]


@pytest.mark.parametrize(("r", "q"), [(4, 4), (3, 6), (6, 3)])
def test_against_scipy(r, q):
    u, v = basis(20, r, 0), basis(20, q, 1)
    angles = subspace_angles(u, v)[::-1]
    np.testing.assert_allclose(principal_angles(u, v), angles, rtol=1e-12)
    np.testing.assert_allclose(subspace_overlap(u, v), np.mean(np.cos(angles) ** 2), rtol=1e-12)


def test_small_angles_keep_their_digits():
    rng = np.random.default_rng(2)
    u = basis(20, 3, 0)
    v = np.linalg.qr(u + 1e-9 * rng.standard_normal(u.shape))[0]
    np.testing.assert_allclose(principal_angles(u, v), subspace_angles(u, v)[::-1], rtol=1e-6)


def test_masked_columns_take_no_part():
    u, v = basis(20, 5, 0), basis(20, 5, 1)
    mask = np.array([1, 1, 1, 0, 0.0])
    expected = subspace_overlap(u[:, :3], v[:, :3])
    np.testing.assert_allclose(subspace_overlap(u * mask, v * mask, active_rank=jnp.asarray(3)), expected, rtol=1e-13)
    angles = principal_angles(u * mask, v * mask)
    np.testing.assert_allclose(angles[:3], principal_angles(u[:, :3], v[:, :3]), rtol=1e-12)
    np.testing.assert_allclose(angles[3:], np.pi / 2, rtol=1e-12)
    assert subspace_overlap(u * 0, v * 0, active_rank=0) == 0


def test_range_and_precision():
    u = basis(64, 8, 0).astype(np.float32)
    assert subspace_overlap(u, u).dtype == jnp.float32
    assert abs(float(subspace_overlap(u, u)) - 1) < 1e-6
    assert abs(float(jax.jit(subspace_overlap)(u.astype(jnp.bfloat16), u)) - 1) < 1e-2


def test_different_spaces_are_refused():
    for function in (principal_angles, subspace_overlap):
        with pytest.raises(ValueError, match="one length"):
            function(basis(5, 2, 0), basis(6, 2, 0))
