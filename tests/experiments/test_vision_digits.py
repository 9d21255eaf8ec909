"""The digit transformers: tasks and parts as they say, statistics against loops, a whole tiny run and its rerun."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rgsp_jax.models import extract_parameters, replace_parameters

EPOCHS = 3


@pytest.fixture(scope="module")
def digits(script):
    return script("digit_tasks")


@pytest.fixture(scope="module")
def training(script):
    module = script("digit_training")
    module.ANCESTOR_EPOCHS = EPOCHS  # of one length with the experts', so that training is compiled once
    return module


@pytest.fixture(scope="module")
def experiment(script):
    return script("vision_digits")


@pytest.fixture(scope="module")
def statistics(script):
    return script("model_statistics")


def test_parts_are_disjoint_and_of_their_seed(digits):
    parts = digits.load_parts(0)
    assert [len(part.digits) for part in parts.values()] == [900, 300, 597]
    every = np.concatenate([part.images.reshape(-1, 64) for part in parts.values()])
    both = np.concatenate([part.images.reshape(-1, 64) for part in digits.load_parts(1).values()])
    assert not np.array_equal(every, both)
    np.testing.assert_array_equal(every[np.lexsort(every.T)], both[np.lexsort(both.T)])  # the same rows, dealt anew
    assert every.min() == -1 and every.max() == 1


def test_tasks_answer_what_they_ask(digits):
    numbers = np.arange(10)
    for regime in digits.REGIMES.values():
        assert len(regime.tasks) >= 8 and len({task.name for task in regime.tasks}) == len(regime.tasks)
        for task in regime.tasks:
            shown = numbers[task.belongs(numbers)]
            np.testing.assert_array_equal(np.flatnonzero(task.answers), np.unique(task.label(shown)))
    by_name = {task.name: task for task in (*digits.LABELS, *digits.SUBSETS)}
    assert list(np.flatnonzero(by_name["prime"].label(numbers))) == [2, 3, 5, 7]
    assert list(np.flatnonzero(by_name["digits_691"].belongs(numbers))) == [1, 6, 9]
    rows = digits.load_parts(0)["test"]
    np.testing.assert_array_equal(digits.view(rows, "rotated"), digits.view(rows, "turned")[:, ::-1, ::-1])
    assert sum(np.array_equal(digits.view(rows, name), rows.images) for name in digits.DOMAINS) == 1


def test_more_experts_keep_the_tasks_that_fewer_had(digits, experiment):
    regime = digits.REGIMES["labels"]
    names = [[task.name for task in experiment.choose_tasks(regime, 0, count)] for count in (2, 4, 8)]
    assert names[0] == names[1][:2] and names[1] == names[2][:4]
    assert len({tuple(t.name for t in experiment.choose_tasks(regime, seed, 8)) for seed in range(4)}) > 1
    with pytest.raises(ValueError, match="8 tasks, not 9"):
        experiment.choose_tasks(regime, 0, 9)


class Small(nnx.Module):
    def __init__(self):
        self.patch = nnx.Conv(2, 3, (2, 2), strides=(2, 2), padding="VALID", rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 4, rngs=nnx.Rngs(1))

    def __call__(self, images):
        return self.head(jnp.tanh(self.patch(images).reshape(images.shape[0], -1, 3)).mean(1))


def test_inputs_are_what_kernels_multiply_and_fisher_the_squared_gradients(statistics):
    model = Small()
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 4, 2)), jnp.float32)
    seen = statistics.capture_inputs(model, lambda m: m(images))
    for name, layer, rows in (("patch/kernel", model.patch, 20), ("head/kernel", model.head, 5)):
        kernel = np.asarray(layer.kernel[...])
        assert seen[name].shape == (rows, kernel.size // kernel.shape[-1])
        expected = layer(images) if name.startswith("patch") else model(images)
        found = np.asarray(seen[name]) @ kernel.reshape(-1, kernel.shape[-1]) + np.asarray(layer.bias[...])
        np.testing.assert_allclose(found, np.asarray(expected).reshape(rows, -1), rtol=1e-4, atol=1e-5)
    tree = extract_parameters(model)
    covariances = statistics.collect_covariances(model, [tree, tree], [images, 2 * images])
    x = np.asarray(seen["patch/kernel"])
    np.testing.assert_allclose(covariances["patch/kernel"].covariance[0], x.T @ x / 20, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(covariances["patch/kernel"].covariance[1], 4 * x.T @ x / 20, rtol=1e-4, atol=1e-5)
    assert statistics.find_uncovered(tree, covariances) == set()

    def logits(tree, x):
        return replace_parameters(model, tree)(x)

    key = jax.random.key(0)
    fisher = statistics.estimate_fisher(logits, tree, images, key)
    squares = np.zeros(4)
    for x, k in zip(images, jax.random.split(key, 5), strict=True):
        scores = jax.nn.log_softmax(logits(tree, x[None])[0])
        drawn = int(jax.random.categorical(k, scores))
        squares += (np.eye(4)[drawn] - np.exp(scores)) ** 2 / 5  # the gradient of log p(y) in the logits is e_y - p
    np.testing.assert_allclose(fisher["head"]["bias"], squares, rtol=1e-4)


def test_a_common_head_is_kept_and_the_encoder_is_not(digits, training, tmp_path):
    store = training.Store(tmp_path)
    settings = training.Training(width=8, epochs=EPOCHS)
    regime = digits.REGIMES["domains"]
    ancestor = training.train_ancestor(store, settings, regime, 0)
    expert = training.train_expert(store, settings, regime, regime.tasks[1], 0)
    np.testing.assert_array_equal(expert.weight, ancestor.weight)
    assert not np.array_equal(
        expert.encoder["layers"][0]["mlp"]["up"]["kernel"], ancestor.encoder["layers"][0]["mlp"]["up"]["kernel"]
    )
    again = training.train_expert(training.Store(tmp_path), settings, regime, regime.tasks[1], 0)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(expert), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(list(tmp_path.iterdir())) == 2  # read back, not trained again


def test_a_small_run(training, experiment, tmp_path):
    out = tmp_path / "digits"
    settings = ["--regime", "classes", "--experts", "2", "--width", "8", "--epochs", str(EPOCHS), "--seeds", "0"]
    settings += ["--learning-rate", "0.003"]
    rows = experiment.main([*settings, "--methods", "average", "task_arithmetic", "--out", str(out)])
    assert [(r.method, r.column) for r in rows[2:]] == [
        (method, column) for method in ("average", "task_arithmetic") for column in ("untuned", "tuned")
    ]
    own = next(r for r in rows if r.method == "individual")
    assert own.mean > 0.5 and len(own.test) == 2  # three classes each
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["command"].endswith("--learning-rate 0.003 --epochs 3 --seeds 0 --methods average task_arithmetic")
    assert "| average |  |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
