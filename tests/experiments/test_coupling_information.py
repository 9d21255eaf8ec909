"""What a coupling knows: nothing where entropy rules, and the match of siblings where it does not."""

import numpy as np
import pytest

from rgsp_jax.checkpoint import write_safetensors


@pytest.fixture(scope="module")
def experiment(script):
    return script("coupling_information")


def draw_siblings(seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(12, 12)))[0] for _ in range(2))
    ancestor = (u * np.geomspace(8, 0.1, 12)) @ v.T
    return [(ancestor + 0.001 * rng.normal(size=(12, 12))).astype(np.float32) for _ in range(2)]


def test_a_strong_entropy_knows_nothing_and_a_weak_one_the_match(experiment):
    stack = np.stack(draw_siblings())
    uniform, sharp = (experiment.measure(stack, np.float32(epsilon), 6) for epsilon in (100.0, 2e-4))
    assert float(uniform.information) == pytest.approx(0, abs=1e-3)
    assert float(uniform.diagonal) == pytest.approx(1 / 6, abs=1e-3)
    assert 0.3 < float(sharp.information) <= 1 + 1e-5
    assert float(sharp.diagonal) > 0.5
    assert float(sharp.critical) == pytest.approx(float(uniform.critical))


def test_every_pair_and_every_matrix_of_a_layer_counts(experiment, tmp_path):
    for name, weight in zip("ab", draw_siblings(), strict=True):
        tensors = {"layer.0.weight": weight, "layer.0.bias": weight[0], "embeddings.weight": weight}
        (tmp_path / name / "model").mkdir(parents=True)
        write_safetensors(tmp_path / name / "model" / "model.safetensors", tensors)
        (tmp_path / name / "model" / "config.json").write_text('{"model_type": "bert"}')
    options = ["--bench", tmp_path, "--tasks", "a", "b", "--rank", 4, "--out", tmp_path / "out"]
    found = experiment.main([str(option) for option in options])
    assert {len(values) for values in found.values()} == {1} and list(found) == list(experiment.EPSILONS)
    text = (tmp_path / "out.md").read_text()
    assert "--bench BENCH --tasks a b --rank 4" in text and "(medians of 1 pairs of matrices)" in text
