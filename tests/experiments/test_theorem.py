"""The theorem's experiment: layers whose optimum is what it should be, and a whole small run."""

import json

import numpy as np
import pytest


@pytest.fixture(scope="module")
def theorem(script):
    return script("theorem")


@pytest.mark.parametrize("size", [0.01, 0.1])
def test_layers_have_the_optimum_and_the_sizes_they_say(theorem, size):
    for kind in theorem.KINDS:
        layer = theorem.make_layer(kind, size, 3)
        ancestor = layer.models.sum(0) - layer.optimum  # A + B - (C + tau_A + tau_B)
        for model in layer.models:
            assert np.linalg.norm(model - ancestor) == pytest.approx(size * np.linalg.norm(ancestor))
        values = np.linalg.svd(ancestor, compute_uv=False)
        np.testing.assert_allclose(values, np.exp(-theorem.DECAY * np.arange(theorem.WIDTH)), rtol=1e-6)
        change = layer.models[0] - ancestor
        assert np.linalg.matrix_rank(change, tol=1e-10) == (theorem.CHANGED if kind == "spectra" else theorem.TASK_RANK)
        assert theorem.measure_error(layer, "average", 4) == pytest.approx(0.5)
    shared = theorem.make_layer("spectra", size, 3)
    u, v = (np.linalg.svd(model)[0] for model in shared.models)
    overlap = np.abs(u.T @ v) > 0.99
    assert (overlap.sum(0) == 1).all()  # one left basis, whatever the order of its vectors


def test_slope_of_a_power(theorem):
    ranks = (2, 4, 8, 16)
    assert theorem.fit_slope(ranks, [3 / rank**0.5 for rank in ranks]) == pytest.approx(-0.5)


@pytest.mark.slow
def test_a_small_run_writes_its_results(theorem, tmp_path):
    rows = theorem.main(["--seeds", "2", "--ranks", "4", "8", "--out", str(tmp_path / "theorem")])
    assert len(rows) == len(theorem.KINDS) * len(theorem.SIZES) * len(theorem.METHODS) * 2
    table = (tmp_path / "theorem.md").read_text()
    assert "| spectra | 0.01 | average | 0.500 (0.000) | 0.500 (0.000) | +0.00 |" in table
    assert len(json.loads((tmp_path / "theorem.json").read_text())["rows"]) == len(rows)
    assert (tmp_path / "theorem.png").stat().st_size > 1000
