"""Vision transformers in another order: folding keeps the function, twins are one function, and a small run."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx


@pytest.fixture(scope="module")
def experiment(script):
    module = script("permuted_vits")
    module.TRAINING = replace(module.TRAINING, epochs=1)
    return module


@pytest.fixture(scope="module")
def classifier(experiment):
    """With norms, biases and tokens that are not where they started."""
    encoder = experiment.extract_parameters(experiment.Vit(experiment.CONFIG, rngs=nnx.Rngs(0)))
    leaves, structure = jax.tree.flatten(encoder)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return experiment.Classifier(
        jax.tree.unflatten(structure, moved), *experiment.draw_head(experiment.TRAINING, jax.random.key(2))
    )


def logits(experiment, classifier):
    images = jnp.asarray(experiment.load_parts(0)["test"].images[:20])
    return np.asarray(experiment.answer(experiment.CONFIG, classifier, jnp.ones(10, bool), images))


def test_folding_and_twins_keep_the_function(experiment, classifier, monkeypatch):
    folded = experiment.fold(classifier)
    expected = logits(experiment, classifier)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(logits(experiment, experiment.unfold(folded)), expected, atol=1e-5)
    monkeypatch.setattr(experiment, "train_model", lambda seed, draw: folded)
    a, b, truth = experiment.make_pair("twin", 0)
    np.testing.assert_allclose(logits(experiment, experiment.unfold(b)), expected, atol=1e-5)
    assert max(float(jnp.abs(b[name] - a[name]).max()) for name in a) > 0.1
    back = experiment.rotate_heads(a, experiment.permute(b, experiment.SPEC, truth))
    for name in a:
        np.testing.assert_allclose(back[name], a[name], atol=1e-5)
    described = [experiment.describe_heads(model) for model in (a, b)]
    assert set(described[0]) == set(experiment.MATCHED)
    for name, x in experiment.permute(described[1], experiment.MATCHED, truth).items():
        np.testing.assert_allclose(x, described[0][name], atol=1e-5)


@pytest.mark.slow
def test_a_small_run(experiment, tmp_path):
    out = tmp_path / "vits"
    rows = experiment.main(["--kinds", "twin", "trained apart", "--seeds", "0", "--out", str(out)])
    assert len(rows) == 2 * (2 + len(experiment.ALIGNMENTS))
    for row in rows:
        if row.kind == "twin" and row.alignment in ("weight matching", "GW, ends unknown", "GW, fused"):
            assert row.recovered == 1
            assert row.loss_barrier == pytest.approx(0, abs=1e-3)
    assert "## trained apart" in out.with_suffix(".md").read_text()
    assert json.loads(out.with_suffix(".json").read_text())["headline"].startswith("Twins of a vision transformer")
