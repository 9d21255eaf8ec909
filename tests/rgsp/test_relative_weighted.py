"""The family of `relative`: against a NumPy oracle, its special cases, and given as lists in a config."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import references
from pipeline.toy_models import write_family
from rgsp_jax import methods
from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import merge_checkpoints, parse_config

RANK = 3
DIRECTIONS = np.array([[1.0, 0.5, 2.0], [0.3, -1.2, 0.8], [1.1, 0.9, 0.4]])
REST = np.array([0.3, -0.2, 0.1])


def draw(shape=(9, 7), count=3):
    rng = np.random.default_rng(0)
    base = rng.normal(size=shape)
    return base + 0.2 * rng.normal(size=(count, *shape))


def oracle(stack, rank, directions, rest):
    """Sums of outer products, direction by direction."""
    mean = stack.mean(0)
    svds = [np.linalg.svd(w - mean, full_matrices=False) for w in stack]

    def polar(x):
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        return u @ vt

    u = polar(np.concatenate([x[0][:, :rank] for x in svds], axis=1))
    v = polar(np.concatenate([x[2][:rank].T for x in svds], axis=1))
    merged = mean.copy()
    for k, (own_u, s, own_vt) in enumerate(svds):
        for j in range(rank):
            merged += directions[k, j] * s[j] * np.outer(u[:, k * rank + j], v[:, k * rank + j])
        merged += rest[k] * (stack[k] - mean - (own_u[:, :rank] * s[:rank]) @ own_vt[:rank])
    return merged


@pytest.mark.parametrize("per", ["model", "direction"])
def test_against_the_oracle(per):
    stack = draw((12, 10))
    directions = DIRECTIONS[:, 0] if per == "model" else DIRECTIONS
    spread = np.broadcast_to(directions[:, None], (3, RANK)) if per == "model" else directions
    merged = methods["relative_weighted"](jnp.asarray(stack), rank=RANK, directions=directions, rest=REST).merged
    np.testing.assert_allclose(merged, oracle(stack, RANK, spread, REST), rtol=0, atol=1e-10)


def test_special_cases():
    stack = jnp.asarray(draw())
    weighted = jax.jit(
        lambda stack, directions, rest: (
            methods["relative_weighted"](stack, rank=RANK, directions=directions, rest=rest).merged
        )
    )
    for scale in (0.0, 1.5):
        expected = references.relative_weighted(stack, RANK, scale)
        np.testing.assert_allclose(weighted(stack, jnp.full(3, scale), jnp.zeros(3)), expected, rtol=0, atol=1e-12)
    untuned = methods["relative_weighted"](stack, rank=RANK).merged
    np.testing.assert_allclose(untuned, references.relative_weighted(stack, RANK), rtol=0, atol=1e-12)
    one = weighted(stack, jnp.array([1.0, 0.0, 0.0]), jnp.zeros(3)) - stack.mean(0)
    assert np.linalg.matrix_rank(one, tol=1e-9) == RANK
    pair = jnp.asarray(draw(count=2))  # unlike `relative`, two models are not bound to their mean
    assert jnp.abs(weighted(pair, jnp.array([1.0, 0.5]), jnp.zeros(2)) - pair.mean(0)).max() > 1e-3


def test_a_config_takes_a_number_or_lists(tmp_path):
    pairs = zip(draw().astype(np.float32), draw((8, 8)).astype(np.float32), strict=True)
    trees = [{"a.weight": first, "b.weight": second} for first, second in pairs]
    models = tuple(map(str, write_family(tmp_path, trees)))
    overrides = [{"pattern": "a.weight", "hyperparameters": {"directions": DIRECTIONS.tolist(), "rest": REST.tolist()}}]
    config = {
        "models": models,
        "method": "relative_weighted",
        "hyperparameters": {"rank": RANK, "directions": 1.0},
        "overrides": overrides,
    }
    merge_checkpoints(parse_config(config, "test"), tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as merged:
        expected = oracle(np.stack([tree["a.weight"] for tree in trees]).astype(float), RANK, DIRECTIONS, REST)
        np.testing.assert_allclose(merged.read("a.weight"), expected, rtol=0, atol=1e-5)
        uniform = oracle(np.stack([t["b.weight"] for t in trees]).astype(float), RANK, np.ones((3, RANK)), np.zeros(3))
        np.testing.assert_allclose(merged.read("b.weight"), uniform, rtol=0, atol=1e-5)
    for value in ([1.0, 2.0], [[1.0], [1.0, 2.0], [1.0]], ["x", 1, 2]):
        with pytest.raises(RefusedError, match="per model"):
            parse_config({**config, "overrides": (), "hyperparameters": {"directions": value}}, "test")
