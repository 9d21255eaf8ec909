"""Methods that need a base model or random numbers get them, whatever the items."""

import zlib

import jax
import numpy as np
import pytest

from pipeline.toy_models import AVERAGED, MATRICES, SHAPES, read_model, same_bits, toy_family, write_family
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, plan

pytestmark = pytest.mark.usefixtures("toy_methods", "plain_report")

ITEMS = (plan.ITEM_ELEMENTS, 160)
FEW = ("*embeddings*", "*query*", "moe.*", "logit_scale")


@pytest.fixture(scope="module")
def family():
    return toy_family(3, dtypes=["float32", "bfloat16", "float32"])


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    """Two models and their base."""
    return write_family(tmp_path_factory.mktemp("needs"), family)


@pytest.mark.parametrize("method", ["arithmetic", "arithmetic_elements"])
def test_the_base_is_the_base_and_no_model(tmp_path, monkeypatch, family, models, method):
    config = MergeConfig(models=models[:2], base=models[2], method=method, include=FEW)
    results = []
    for elements in ITEMS:
        monkeypatch.setattr(plan, "ITEM_ELEMENTS", elements)
        results.append(read_model(merge_checkpoints(config, tmp_path / f"out{elements}").out))
    a, b, base = ({n: x.astype(np.float64) for n, x in model.items()} for model in family)
    for name in (
        "embeddings.word_embeddings.weight",
        "encoder.layer.1.attention.self.query.weight",
        "moe.experts.down_proj",
    ):
        mean = method == "arithmetic" and name in AVERAGED
        expected = (a[name] + b[name]) / 2 if mean else a[name] + b[name] - base[name]
        np.testing.assert_allclose(results[0][name], expected, atol=1e-5)
    for name in SHAPES:
        assert same_bits(results[0][name], results[1][name])
        assert "stem" not in name or same_bits(results[0][name], family[0][name])


def test_a_base_that_is_not_finite_is_named(tmp_path, family, models):
    bad = {**family[2], "moe.experts.down_proj": np.full_like(family[2]["moe.experts.down_proj"], np.nan)}
    (path,) = write_family(tmp_path / "bad base", [bad])
    config = MergeConfig(models=models[:2], base=path, method="arithmetic", include=FEW)
    with pytest.raises(RefusedError) as refusal:
        merge_checkpoints(config, tmp_path / "out")
    assert refusal.value.problems == (
        f"{path}: tensor 'moe.experts.down_proj' holds values that are not finite: repair or exclude it",
    )


def test_a_base_that_does_not_fit_is_refused(tmp_path, family, models):
    (path,) = write_family(tmp_path / "other base", [{**family[2], "logit_scale": np.ones(2, np.float32)}])
    config = MergeConfig(models=models[:2], base=path, method="arithmetic")
    with pytest.raises(RefusedError, match=r"'logit_scale' has shape \[2\]"):
        merge_checkpoints(config, tmp_path / "out")


@pytest.mark.parametrize("method", ["jitter", "jitter_elements"])
def test_every_entry_has_its_own_random_number_whatever_the_items(tmp_path, monkeypatch, family, models, method):
    config = MergeConfig(models=models[:1], method=method, seed=5, include=FEW)
    results = []
    for elements in ITEMS:
        monkeypatch.setattr(plan, "ITEM_ELEMENTS", elements)
        results.append(read_model(merge_checkpoints(config, tmp_path / f"out{elements}").out))
    assert all(same_bits(results[0][name], results[1][name]) for name in SHAPES)
    names = [n for n in MATRICES if "query" in n or n.startswith("moe")]
    noise = np.concatenate([(results[0][name] - family[0][name]).ravel() for name in names])
    rounded = {f"{x:.3f}" for x in noise}
    assert len(rounded) > 0.9 * noise.size  # no two matrices share their numbers
    assert abs(noise.mean()) < 0.2 and 0.8 < noise.std() < 1.2
    if method == "jitter":
        name = "encoder.layer.1.attention.self.query.weight"
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), zlib.crc32(name.encode())), 0)
        expected = family[0][name] + np.asarray(jax.random.normal(key, (8, 8), np.float32))
        np.testing.assert_allclose(results[0][name], expected, atol=1e-6)
