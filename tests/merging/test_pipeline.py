"""Comparators through the pipeline: with a base, with a key, entry by entry, and the same whatever the items."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from merging import oracles
from merging.problems import merge
from pipeline.toy_models import AVERAGED, SHAPES, read_model, same_bits, toy_family, write_family
from rgsp_jax import methods
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, overview, plan

QUERY = "encoder.layer.1.attention.self.query.weight"
FEW = ("*embeddings*", "*layer.1.attention.self*", "moe.*", "logit_scale", "stem.*")
ITEMS = (plan.ITEM_ELEMENTS, 160)


@pytest.fixture(autouse=True)
def plain_report(monkeypatch):
    monkeypatch.setattr(overview, "render_report", lambda summary, records: f"<p>{len(records)}</p>")


@pytest.fixture(scope="module")
def family():
    """Three experts and their base, in float32."""
    return toy_family(4)


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("comparators"), family)


def run(models, out, **settings):
    config = MergeConfig(models=models[:3], base=models[3], include=FEW, **settings)
    return read_model(merge_checkpoints(config, out).out)


def wide(family, name):
    stack = np.stack([model[name].astype(np.float64) for model in family])
    return stack[:3], stack[3]


def test_a_method_for_matrices_with_a_base(tmp_path, family, models):
    merged = run(models, tmp_path / "out", method="tsv_m", hyperparameters={"scale": 0.5})
    stack, base = wide(family, QUERY)
    np.testing.assert_allclose(merged[QUERY], oracles.tsv_m(stack, base, 0.5), atol=1e-5)
    stack, base = wide(family, "moe.experts.down_proj")
    expected = np.stack([oracles.tsv_m(stack[:, i], base[i], 0.5) for i in range(3)])
    np.testing.assert_allclose(merged["moe.experts.down_proj"], expected, atol=1e-5)
    for name in AVERAGED:
        if name == "logit_scale" or "embeddings" in name:
            np.testing.assert_allclose(merged[name], wide(family, name)[0].mean(0), atol=1e-6)


def test_a_method_for_whole_tensors_with_a_base(tmp_path, family, models):
    merged = run(models, tmp_path / "out", method="ties", hyperparameters={"density": 0.5})
    for name in (QUERY, "encoder.layer.1.attention.self.query.bias", "stem.conv.weight", "moe.experts.down_proj"):
        stack, base = wide(family, name)
        flat, flat_base = stack.reshape(3, 1, -1), base.reshape(1, -1)
        expected = oracles.ties(flat, flat_base, density=0.5).reshape(base.shape)
        assert np.mean(np.abs(merged[name] - expected) > 1e-5) <= 1 / base.size  # a float32 tie may fall otherwise
    name = "embeddings.word_embeddings.weight"
    stack, base = wide(family, name)
    np.testing.assert_allclose(merged[name], merge("ties", stack, {"density": 0.5}, base=base)[0], atol=1e-5)


def test_an_elementwise_method_and_its_items(tmp_path, monkeypatch, family, models):
    assert methods["task_arithmetic"].elementwise
    results = []
    for elements in ITEMS:
        monkeypatch.setattr(plan, "ITEM_ELEMENTS", elements)
        settings = {"scale": 0.7, "coefficients": [1.0, 0.5, 2.0]}
        results.append(run(models, tmp_path / f"{elements}", method="task_arithmetic", hyperparameters=settings))
    assert all(same_bits(results[0][name], results[1][name]) for name in SHAPES)
    for name in ("embeddings.word_embeddings.weight", "logit_scale", QUERY, "moe.experts.down_proj"):
        stack, base = wide(family, name)
        expected = base + 0.7 * np.tensordot([1.0, 0.5, 2.0], stack - base, axes=1)
        np.testing.assert_allclose(results[0][name], expected, atol=1e-5)


@pytest.mark.parametrize("method", ["dare", "della"])
def test_a_seed_is_a_merge_whatever_the_items(tmp_path, monkeypatch, family, models, method):
    results = []
    for seed, elements in ((7, ITEMS[0]), (7, ITEMS[0]), (7, ITEMS[1]), (8, ITEMS[0])):
        monkeypatch.setattr(plan, "ITEM_ELEMENTS", elements)
        results.append(run(models, tmp_path / f"{len(results)}", method=method, seed=seed))
    for name in SHAPES:
        assert same_bits(results[0][name], results[1][name]) and same_bits(results[0][name], results[2][name])
    assert not same_bits(results[0][QUERY], results[3][QUERY])
    if method == "dare":
        for name in (QUERY, "embeddings.word_embeddings.weight"):
            stack, base = wide(family, name)
            change = (results[0][name] - base) / (0.4 / (1 - 0.9))  # a sum of some of the task vectors
            some = np.stack([np.tensordot(m, stack - base, 1) for m in np.ndindex(2, 2, 2)])
            assert np.abs(change[None] - some).min(0).max() < 1e-5
            dropped = (results[0][name] == base).mean()
            assert abs(dropped - 0.9**3) < 4 * np.sqrt(0.9**3 * (1 - 0.9**3) / base.size)


def test_a_base_free_method_of_many_models(tmp_path, family, models):
    config = MergeConfig(models=models, method="karcher", include=FEW)
    merged = read_model(merge_checkpoints(config, tmp_path / "out").out)
    for name in (QUERY, "encoder.layer.1.attention.self.query.bias"):
        stack = np.stack([model[name].astype(np.float64) for model in family])
        np.testing.assert_allclose(merged[name], oracles.karcher(stack), atol=1e-5)


@pytest.mark.parametrize("name", [n for n in methods if methods[n].elementwise and methods[n].models[0] == 1])
def test_elementwise_methods_see_one_entry_at_a_time(name):
    """What the declaration allows the pipeline to do: cut anywhere."""
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.normal(size=(3, 4, 6)))
    needs = {"base": jnp.asarray(rng.normal(size=(4, 6))), "key": jax.random.key(0)}
    needed = {k: v for k, v in needs.items() if k in methods[name].needs}
    whole = methods[name](stack, **needed).merged
    changed = methods[name](stack.at[:, 2, 3].add(10.0), **needed).merged
    differs = np.asarray(changed != whole)
    assert differs.sum() <= 1 and not np.delete(differs.ravel(), 2 * 6 + 3).any()


def test_a_base_may_hold_more_than_the_models_and_lack_their_buffers(tmp_path):
    family = toy_family(3)
    base = {name: x for name, x in family[2].items() if name != "embeddings.position_ids"}
    paths = write_family(tmp_path, [*family[:2], base | {"head.weight": np.ones((3, 8), np.float32)}])
    config = MergeConfig(
        models=paths[:2],
        base=paths[2],
        method="task_arithmetic",
        hyperparameters={"scale": 1.0, "coefficients": [1.0, -1.0]},  # task vectors may cancel, unlike an average
    )
    merged = read_model(merge_checkpoints(config, tmp_path / "out").out)
    assert merged.keys() == family[0].keys()
    a, b, c = (model["stem.conv.weight"].astype(np.float64) for model in family)
    np.testing.assert_allclose(merged["stem.conv.weight"], c + (a - c) - (b - c), atol=1e-5)
    incomplete = {name: x for name, x in base.items() if name != "stem.conv.weight"}
    lacking = write_family(tmp_path / "lacking", [incomplete])
    with pytest.raises(RefusedError, match=r"stem\.conv\.weight"):
        merge_checkpoints(config.model_copy(update={"base": lacking[0]}), tmp_path / "none")
