"""The demo on a model small enough for a test: directories, scores, table, determinism, refusals."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from rgsp_jax.checkpoint import open_checkpoint, write_safetensors
from rgsp_jax.demo import TASKS, DemoSettings, evaluate, make_experts, run
from rgsp_jax.demo.tasks import load_split
from rgsp_jax.demo.training import Schedule, train_classifier
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import VitClassifier, VitConfig, export_weights, load_weights

TINY = VitConfig(16, 1, 2, 32, image_size=8, patch_size=4, num_channels=1)
SETTINGS = DemoSettings(ancestor=Schedule(8, 1e-2), expert=Schedule(4, 3e-3), model=TINY)


def read(path):
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def average_by_hand(models, out, method, hyperparameters):
    """A merge that owes nothing to the package's methods; the method's name is kept to see what was asked for."""
    weights = [read(model) for model in models]
    merged = {name: np.mean([w[name] for w in weights], axis=0, dtype=np.float64) for name in weights[0]}
    out.mkdir()
    write_safetensors(out / "model.safetensors", {name: array.astype(np.float32) for name, array in merged.items()})
    (out / "config.json").write_text((models[0] / "config.json").read_text())
    (out / "asked").write_text(json.dumps([method, dict(hyperparameters)]))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    return run(tmp_path_factory.mktemp("demo"), average_by_hand, SETTINGS)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return make_experts(tmp_path_factory.mktemp("experts"), SETTINGS)


def test_tasks_ask_what_they_say():
    digits = np.arange(10)
    expected = {"parity": digits % 2, "above_four": digits > 4, "closed_loop": [1, 0, 0, 0, 0, 0, 1, 0, 1, 1]}
    assert {task.name: task.label(digits).tolist() for task in TASKS} == {
        name: np.asarray(answers).astype(int).tolist() for name, answers in expected.items()
    }


def test_split_is_fixed_and_disjoint():
    split = load_split()
    assert len(split.train_images) + len(split.test_images) == 1797
    assert split.train_images.min() == -1 and split.train_images.max() == 1
    both = np.concatenate([split.train_images, split.test_images])
    original = sorted(map(bytes, (load_digits().images[..., None] / 8 - 1).astype(np.float32)))
    assert sorted(map(bytes, both)) == original


def test_training_learns_and_leaves_the_model_alone():
    split = load_split()
    model = VitClassifier(TINY, 10, rngs=nnx.Rngs(0))
    before = export_weights(model)
    trained, losses = train_classifier(
        model, split.train_images, split.train_digits, SETTINGS.ancestor, jax.random.key(0)
    )
    assert losses.shape == (8,)
    assert losses[0] > 2  # about ln 10, no knowledge
    assert losses[-1] < losses[0] / 2
    after = export_weights(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert any(not np.array_equal(before[key], array) for key, array in export_weights(trained).items())
    with pytest.raises(ValueError, match="do not fill a batch"):
        train_classifier(model, split.train_images[:9], split.train_digits[:9], SETTINGS.ancestor, jax.random.key(0))


def test_experts_are_directories_from_one_ancestor(experts):
    assert [expert.task for expert in experts] == list(TASKS)
    weights = [read(expert.model) for expert in experts]
    norms = [np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in w.values())) for w in weights]
    apart = np.sqrt(sum(((weights[0][key].astype(np.float64) - weights[1][key]) ** 2).sum() for key in weights[0]))
    assert 0 < apart < 0.5 * min(norms)
    for expert in experts:
        config = json.loads((expert.model / "config.json").read_text())
        assert VitConfig.from_huggingface(config) == TINY
        assert {name: array.shape for name, array in read(expert.head).items()} == {"weight": (2, 16), "bias": (2,)}


def test_expert_directories_load_in_transformers(experts):
    transformers = pytest.importorskip("transformers")
    _, info = transformers.ViTModel.from_pretrained(
        experts[0].model, add_pooling_layer=False, output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info


def test_experts_repeat_by_seed(experts, tmp_path):
    again = make_experts(tmp_path / "same", SETTINGS)
    other = make_experts(tmp_path / "other", replace(SETTINGS, seed=1))
    for first, second, third in zip(experts, again, other, strict=True):
        for one, same, different in (
            (first.model / "model.safetensors", second.model / "model.safetensors", third.model / "model.safetensors"),
            (first.head, second.head, third.head),
        ):
            assert one.read_bytes() == same.read_bytes()
            assert one.read_bytes() != different.read_bytes()


def test_evaluation_is_the_whole_classifier_on_the_test_rows(experts):
    split, expert = load_split(), experts[1]
    head = read(expert.head)
    classifier = {f"vit.{key}": array for key, array in read(expert.model).items()}
    classifier |= {"classifier.weight": head["weight"], "classifier.bias": head["bias"]}
    model = load_weights(VitClassifier(TINY, 2, rngs=nnx.Rngs(5)), classifier)
    answers = np.asarray(model(split.test_images)).argmax(axis=-1)
    expected = np.mean(answers == (split.test_digits > 4))
    assert evaluate(expert.model, experts)["above_four"] == pytest.approx(expected, abs=1e-12)


def test_run_scores_every_merge(result):
    names = [task.name for task in TASKS]
    groups = [tuple(names), (names[0], names[1]), (names[0], names[2]), (names[1], names[2])]
    table = [(row.method, tuple(row.accuracies)) for row in result.rows]
    expected = [("majority", groups[0])]
    expected += [(method, groups[0]) for method in ("individual", "average", "relative")]
    for pair in groups[1:]:
        expected += [(method, pair) for method in ("individual", "average", "rgsp_seed", "rgsp")]
    assert table == expected
    majority, individual = result.rows[:2]
    for name in names:
        assert individual.accuracies[name] > majority.accuracies[name] + 0.1
    for row in result.rows:
        assert row.mean == pytest.approx(sum(row.accuracies.values()) / len(row.accuracies))
        if row.model is not None:
            assert json.loads((row.model / "asked").read_text()) == [row.method, {}]
    assert individual.mean > result.rows[2].mean  # averaging has to cost something, or the demo shows nothing


def test_run_leaves_its_result_as_json(result):
    written = json.loads((result.directory / "results.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert written["test_rows"] == 797
    for row, plain in zip(result.rows, written["rows"], strict=True):
        assert plain["mean"] == row.mean
        assert plain["model"] is None or (result.directory / plain["model"] / "config.json").exists()


def test_run_refuses_a_directory_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RefusedError, match="new directory"):
        run(tmp_path, average_by_hand, SETTINGS)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_the_demo_as_shipped(tmp_path):
    result = run(tmp_path / "demo")
    rows = {(row.method, tuple(row.accuracies)): row for row in result.rows}
    names = tuple(task.name for task in TASKS)
    assert rows["individual", names].mean > 0.9
    for (method, group), row in rows.items():
        if row.model is not None:
            assert (row.model / "report.html").stat().st_size > 0
            by_hand = tmp_path / f"{method}-{'-'.join(group)}"
            average_by_hand([result.directory / "experts" / name / "model" for name in group], by_hand, method, {})
            merged = read(row.model)
            far = max(float(np.abs(array - merged[key]).max()) for key, array in read(by_hand).items())
            assert far < 1e-6 if method == "average" else far > 1e-4 or method == "rgsp"
