"""Our methods against results of mergekit and fusion_bench, recorded with the tensors they were run on."""

import json
import math
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging.problems import assert_close, merge
from rgsp_jax import methods
from rgsp_jax.merging.sparsity import entry_count
from rgsp_jax.types import InputStatistics

GOLDEN = json.loads((Path(__file__).parent / "golden" / "agreement.json").read_text())
PROBLEMS = [{name: np.array(x, np.float32) for name, x in problem.items()} for problem in GOLDEN["problems"]]


def given_draws(key, mask):
    """In place of `jax.random.uniform`: what the mask of the key's model keeps is past every probability."""
    keys = jnp.stack([jax.random.key_data(jax.random.fold_in(key, i)) for i in range(len(mask))])
    draws = jnp.where(jnp.asarray(mask, bool), 1.0, -1.0).astype(jnp.float32)
    return lambda own, *_: draws[jnp.argmax(jnp.all(keys == jax.random.key_data(own)[None], axis=-1))]


def restored_l1(row, problem):
    """Coefficients that turn the division by 1 - p into mergekit's factor, which restores the L1 norm."""
    sizes = np.abs(problem["stack"] - problem["base"]).astype(np.float64)
    factors = sizes.sum((1, 2)) / (sizes * np.array(row["mask"])).sum((1, 2)) * (1 - row["ours"]["drop_rate"])
    return (factors * row["ours"]["coefficients"]).tolist()


def label(row):
    return "-".join([row["peer"], row["function"], *(f"{k}={v}" for k, v in row["theirs"].items() if k != "weight")])


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=label)
def test_agreement_with_public_implementations(row, monkeypatch):
    problem, method = PROBLEMS[row["problem"]], methods[row["method"]]
    settings, needed = dict(row["ours"]), {}
    if "base" in method.needs:
        needed["base"] = jnp.asarray(problem["base"])
    if "covariances" in method.needs:
        needed["inputs"] = InputStatistics(covariance=jnp.asarray(problem["covariances"]))
    if "key" in method.needs:
        needed["key"] = jax.random.key(3)
        monkeypatch.setattr("jax.random.uniform", given_draws(needed["key"], row["mask"]))
    if row["match_l1"]:
        settings["coefficients"] = restored_l1(row, problem)
    merged = method(jnp.asarray(problem["stack"]), **settings, **needed).merged
    expected = np.array(row["merged"], np.float32)
    assert merged.dtype == jnp.float32
    error = np.linalg.norm(np.asarray(merged, np.float64) - expected) / np.linalg.norm(expected)
    assert error < 1e-5
    if method.name != "average":  # that the settings matter: their effect is far from rounding
        plain = np.mean(problem["stack"], axis=0)
        assert np.linalg.norm(plain - expected) > 1e-3 * np.linalg.norm(expected)


def test_every_method_of_the_comparison_is_recorded():
    recorded = {(row["peer"], row["function"]) for row in GOLDEN["rows"]}
    mergekit = ("linear", "slerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della")
    assert recorded >= {("mergekit", name) for name in (*mergekit, "breadcrumbs", "model_stock")}
    assert recorded >= {("fusion_bench", name) for name in ("tsv_m", "iso_c", "iso_cts", "regmean", "wudi")}


def test_trimming_leaves_small_tensors_an_entry():
    """As mergekit does: a scalar, or a vector shorter than 1 / density, is merged and not reset to the base."""
    base = np.zeros((1, 3))
    stack = np.array([[[0.1, -0.4, 0.2]], [[0.3, -0.2, 0.0]]])
    assert_close(merge("ties", stack, {"density": 0.2}, base=base)[0], [[0.3, -0.4, 0.0]], 1e-15)
    np.testing.assert_array_equal(merge("ties", stack, {"density": 0.0}, base=base)[0], base)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_are_exact_at_the_size_of_embedding_tables(dtype):
    """One entry more of a large tensor is past 1e-5 of its weights."""
    for size in (1, 10, 768 * 768, 2048 * 2048, 4096 * 11008, 128256 * 8192):
        shares = [Fraction(i, 100) for i in range(101)] + [Fraction(1, 10_000), Fraction(1237, 10_000)]
        count = jax.jit(jax.vmap(lambda share, size=size: entry_count(share, size, dtype)))
        got = count(jnp.asarray([float(share) for share in shares], dtype))
        assert got.tolist() == [math.floor(share * size) for share in shares]
    rng = np.random.default_rng(0)
    for share in rng.uniform(size=20).astype(np.float32):
        assert abs(int(entry_count(share, 768 * 768, dtype)) - math.floor(Fraction(float(share)) * 768 * 768)) <= 1
