"""Networks of different widths: split twins are one function, what is carried has the other's shape."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def experiment(script):
    script("permuted_twins").EPOCHS = 4
    return script("permuted_widths")


def test_a_split_twin_is_one_function(experiment):
    small = experiment.train_model(16, 0, 0)
    large, halves = experiment.split(small, 0)
    images, digits = experiment.flatten_rows(0, "test")
    assert large["second.weight"].shape == (32, 32)
    np.testing.assert_allclose(
        experiment.measure(large, images, digits), experiment.measure(small, images, digits), atol=1e-5
    )
    plans = {layer: (found[None] == np.arange(16)[:, None]) / 32.0 for layer, found in halves.items()}
    carried = experiment.carry_both(small, large, {layer: jnp.asarray(p, jnp.float32) for layer, p in plans.items()})
    for name, x in small.items():
        np.testing.assert_allclose(carried.small[name], x, atol=1e-6)
        np.testing.assert_allclose(carried.large[name], large[name], atol=1e-6)


def test_padded_matching_finds_a_model_among_more_neurons(experiment):
    """The large model is the small one with idle neurons beside it, all in another order."""
    small = experiment.train_model(12, 1, 1)
    rng = np.random.default_rng(1)
    sizes = {"h1": 12, "h2": 12}
    spare = {
        name: jnp.asarray(np.pad(x, [(0, 5 if axis else 0) for axis in experiment.SPEC[name]]), x.dtype)
        for name, x in small.items()
    }
    order = {layer: jnp.asarray(rng.permutation(n + 5)) for layer, n in sizes.items()}
    with jax.numpy_dtype_promotion("standard"):
        carried = experiment.match_padded(small, experiment.take(spare, order))
    for name, x in small.items():
        np.testing.assert_allclose(carried.small[name], x, atol=1e-6)
        np.testing.assert_allclose(carried.large[name], experiment.take(spare, order)[name], atol=1e-6)


@pytest.mark.slow
def test_a_small_run(experiment, tmp_path):
    out = tmp_path / "widths"
    rows = experiment.main(["--small", "16", "--large", "24", "--seeds", "0", "1", "--out", str(out)])
    assert len(rows) == 2 * 2 * len(experiment.ALIGNMENTS)
    for row in rows:
        if row.kind == "split twin" and row.alignment.startswith(("GW", "fused")):
            assert row.recovered == 1
            np.testing.assert_allclose(row.losses, row.own_losses, rtol=1e-2)
        if row.alignment == experiment.CONTROL:
            assert row.losses[0] > row.own_losses[0] + 0.1
        assert row.large == (32 if row.kind == "split twin" else 24)
    assert "## trained apart, 16 and 24 wide" in out.with_suffix(".md").read_text()
    assert json.loads(out.with_suffix(".json").read_text())["headline"].startswith("Trained apart at different widths")
