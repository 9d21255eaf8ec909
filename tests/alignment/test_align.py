"""Alignment of whole models: twins come back bit for bit, the function stays, what is not known is refused."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers")

from click.testing import CliRunner

from alignment import twins
from rgsp_jax.alignment import align_checkpoints
from rgsp_jax.checkpoint import write_safetensors
from rgsp_jax.cli import cli
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

every_family = pytest.mark.parametrize("kind", list(twins.BUILD))


def same(left, right):
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and left[n].tobytes() == right[n].tobytes() for n in left
    )


@every_family
def test_a_twin_is_brought_back(tmp_path, kind):
    model, places = twins.build(kind)
    weights, twin = twins.save_twin(model, places, tmp_path / "twin")
    assert sum(not np.array_equal(weights[n], twin[n]) for n in weights) > 3 * twins.LAYERS
    np.testing.assert_allclose(
        twins.outputs(twins.load(model, tmp_path / "twin")), twins.outputs(model), atol=1e-4, rtol=1e-4
    )
    twins.save(model, tmp_path / "model")
    for method in ("weights", "otfusion"):
        found = align_checkpoints(tmp_path / "twin", tmp_path / "model", tmp_path / method, method=method)
        assert same(twins.read(tmp_path / method), weights)
        assert found.after == pytest.approx(1, abs=1e-6) and found.before < 0.6 and found.moved > 0


@every_family
def test_another_model_keeps_its_function(tmp_path, kind):
    """Nothing to find between random models, and all the more to get wrong."""
    model, _ = twins.build(kind)
    other, _ = twins.build(kind, seed=9)
    paths = [twins.save(x, tmp_path / n) for x, n in ((model, "model"), (other, "other"))]
    found = align_checkpoints(*paths, tmp_path / "out")
    assert found.moved > 10 and found.before < found.after
    before, after = twins.read(paths[0]), twins.read(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(np.sort(before[name], axis=None), np.sort(after[name], axis=None))
    expected = twins.outputs(model)
    moved = twins.outputs(twins.load(model, tmp_path / "out"))
    np.testing.assert_allclose(moved, expected, atol=1e-5 * np.abs(expected).max())


@pytest.fixture
def bert(tmp_path):
    """(model, its directory, its twin's directory, its weights)"""
    model, places = twins.build("bert")
    weights, _ = twins.save_twin(model, places, tmp_path / "twin")
    return model, twins.save(model, tmp_path / "model"), tmp_path / "twin", weights


def test_aligned_twins_average_to_the_model(tmp_path, monkeypatch, bert):
    from rgsp_jax.pipeline import overview

    monkeypatch.setattr(overview, "render_report", lambda summary, records: "")
    _, model, twin, weights = bert
    align_checkpoints(twin, model, tmp_path / "aligned")
    config = MergeConfig(models=[str(model), str(tmp_path / "aligned")], method="average")
    merged = merge_checkpoints(config, tmp_path / "merged").out
    assert same(twins.read(merged), weights) and not (merged / "alignment.json").exists()
    naive = merge_checkpoints(config.model_copy(update={"models": (str(model), str(twin))}), tmp_path / "naive").out
    assert not same(twins.read(naive), weights)


def test_a_sibling_in_another_order_is_found_and_one_in_order_is_left_alone(tmp_path, bert):
    _, path, twin, weights = bert
    rng = np.random.default_rng(3)
    moved = {n: x + 0.05 * rng.normal(size=x.shape).astype(np.float32) for n, x in twins.read(twin).items()}
    write_safetensors(twin / "model.safetensors", moved)
    found = align_checkpoints(twin, path, tmp_path / "once")
    aligned = twins.read(tmp_path / "once")
    assert max(np.abs(aligned[n] - weights[n]).max() for n in weights) < 0.4 and found.after > 0.95 > 0.6 > found.before
    again = align_checkpoints(tmp_path / "once", path, tmp_path / "twice")
    assert again.moved == 0 and again.before == again.after == pytest.approx(found.after)
    assert same(twins.read(tmp_path / "twice"), aligned)
    report = json.loads((tmp_path / "once" / "alignment.json").read_text())
    assert report["all"]["moved"] == found.moved and len(report["sets"]) == 2 * twins.LAYERS
    assert report["sets"][0]["label"] == "encoder.layer.0.heads"


def test_heads_of_another_task_and_other_prefixes_do_not_matter(tmp_path, bert):
    model, _, twin, weights = bert
    twins.save(model.bert, tmp_path / "encoder")  # without the classifier, and without "bert." before its names
    align_checkpoints(twin, tmp_path / "encoder", tmp_path / "out")
    assert same(twins.read(tmp_path / "out"), weights)


def test_shards_dtypes_and_other_files_stay(tmp_path):
    import torch

    model, _ = twins.build("llama")
    twins.save(model.to(torch.bfloat16), tmp_path / "model", max_shard_size="4KB")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    other, _ = twins.build("llama", seed=4)
    twins.save(other, tmp_path / "other")
    align_checkpoints(tmp_path / "model", tmp_path / "other", tmp_path / "out")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files | {"alignment.json"}
    assert sum(name.endswith(".safetensors") for name in files) > 2
    assert {x.dtype for x in twins.read(tmp_path / "out").values()} == {
        x.dtype for x in twins.read(tmp_path / "model").values()
    }


def test_the_command(tmp_path, bert):
    _, model, twin, weights = bert
    arguments = ["align", str(twin), "--to", str(model), "--out"]
    shown = CliRunner().invoke(cli, [*arguments, str(tmp_path / "a")], standalone_mode=False)
    assert shown.exception is None and "encoder.layer.0.heads" in shown.output and "1.000" in shown.output
    asked = CliRunner().invoke(
        cli, [*arguments, str(tmp_path / "b"), "--method", "otfusion", "--json"], standalone_mode=False
    )
    summary = json.loads(asked.output)
    assert summary["method"] == "otfusion" and summary["all"]["after"] == pytest.approx(1)
    assert same(twins.read(tmp_path / "a"), weights) and same(twins.read(tmp_path / "b"), weights)


def refused(*arguments, **settings):
    with pytest.raises(RefusedError) as caught:
        align_checkpoints(*arguments, **settings)
    return caught.value.problems


def change_config(path, **fields):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **fields}))


def test_what_cannot_be_aligned_is_refused_and_leaves_nothing(tmp_path, bert):
    _, model, twin, weights = bert
    out = tmp_path / "out"
    change_config(twin, model_type="mamba")
    (problem,) = refused(twin, model, out)
    assert "'mamba'" in problem and "known are bert, roberta" in problem
    change_config(twin, model_type="roberta")
    assert refused(twin, model, out) == (f"{twin} is of model_type 'roberta', {model} of 'bert'",)
    change_config(twin, model_type="bert", num_attention_heads=8)
    assert any("4 units" in p and "8 units" in p for p in refused(twin, model, out))
    change_config(twin, num_attention_heads=3)
    assert any("does not hold 3 heads" in p for p in refused(twin, model, out))
    change_config(twin, num_attention_heads=twins.HEADS)
    bare = tmp_path / "bare.safetensors"
    write_safetensors(bare, weights)
    problems = refused(bare, tmp_path / "absent", model)
    assert any("no config.json" in p for p in problems) and any("absent" in p for p in problems)
    assert any("already there" in p for p in problems)  # everything at once
    assert "weights, otfusion" in refused(twin, model, out, method="nearest")[0]
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_tensors_that_do_not_fit_are_named(tmp_path, bert):
    _, model, twin, weights = bert
    out = tmp_path / "out"

    def with_changes(**changes):
        changed = {n: x for n, x in weights.items() if changes.get(n, x) is not None} | {
            n: x for n, x in changes.items() if x is not None
        }
        write_safetensors(twin / "model.safetensors", changed)
        return refused(twin, model, out)

    layer = "bert.encoder.layer.0"
    adapter = f"{layer}.output.adapter.weight"
    (problem,) = with_changes(**{adapter: np.ones((2, 2), np.float32)})
    assert adapter in problem and "not known here" in problem
    gone = f"{layer}.attention.self.key.weight"
    assert any("no 'attention.self.key.weight'" in p for p in with_changes(**{gone: None}))
    problems = with_changes(**{f"{layer}.intermediate.dense.bias": np.ones(7, np.float32)})
    assert any("[7] does not hold 20 mlp" in p for p in problems)
    wide = np.ones((twins.MLP, twins.HIDDEN + 4), np.float32)
    problems = with_changes(**{f"{layer}.intermediate.dense.weight": wide})
    assert any("[20, 20] in" in p and "[20, 16] in" in p for p in problems)
    broken = weights[f"{layer}.output.dense.weight"].copy()
    broken[1, 2] = np.nan
    assert "not finite" in with_changes(**{f"{layer}.output.dense.weight": broken})[0]
    only = {n: x for n, x in weights.items() if ".layer.1." not in n}
    write_safetensors(twin / "model.safetensors", only)
    assert any("layer.1." in p and "has not" in p for p in refused(twin, model, out))
    assert not out.exists()
