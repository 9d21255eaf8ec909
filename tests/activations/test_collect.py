"""Drawing, holding back, stopping, sketching, combining, refusing: what happens around the forward pass."""

import json

import numpy as np
import pytest
import torch

from activations import tiny_models as tiny
from rgsp_jax.activations import CovarianceSettings, collect, collect_covariances, combine_covariance_files
from rgsp_jax.activations.accumulators import HeldBackRows, RowAccumulator, chunk_rows, full_bytes, sketch_bytes
from rgsp_jax.activations.collect import draw_examples, make_batches, plan_stages
from rgsp_jax.activations.settings import Prepared
from rgsp_jax.checkpoint import open_checkpoint, open_covariances
from rgsp_jax.errors import RefusedError

TEXTS = tiny.draw_texts(40)
QUERY, DOWN = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("bert") / "model", tiny.make_bert(), tiny.make_tokenizer())


@pytest.fixture
def data(tmp_path):
    return tiny.write_texts(tmp_path / "data.jsonl", TEXTS)


def read_parts(path):
    with open_covariances(path) as file:
        return {
            f"{site.name}.{part}": file.read(site.name, part)
            for site in file.sites.values()
            for part in (("covariance", "mean") if site.kind == "full" else ("counts",))
        }


def test_held_back_rows_are_of_examples_in_no_sum(tmp_path, model):
    # Every text is one word of its own, so that each row of the first layer tells its example.
    texts = [word for word in tiny.WORDS for _ in range(2)]
    data = tiny.write_texts(tmp_path / "data.jsonl", texts)
    result = collect_covariances(model, data, tmp_path / "c.safetensors", CovarianceSettings(held_back=3, seed=5))
    assert (result.examples, result.held_back) == (21, 3)
    with open_covariances(tmp_path / "c.safetensors") as file:
        assert file.shape(QUERY, "held_back") == (3, tiny.WIDTH) and file.sites[QUERY].rows == 21
        counts, held = (file.read("embeddings.word_embeddings", part) for part in ("counts", "held_back_counts"))
        assert held.sum() == 3 and counts.sum() == 21
        assert np.array_equal(counts + held, np.bincount([tiny.VOCABULARY[t] for t in texts], minlength=len(counts)))
        assert file.data[0].examples == 21 and file.data[0].held_back == 3 and file.data[0].seed == 5


def test_draws_are_disjoint_reproducible_and_limited():
    settings = CovarianceSettings(held_back=4, seed=3)
    summed, held = draw_examples(100, settings)
    assert len(held) == 4 and len(summed) == 96 and not set(summed) & set(held)
    assert np.array_equal(summed, draw_examples(100, settings)[0])
    assert not np.array_equal(summed, draw_examples(100, CovarianceSettings(held_back=4, seed=4))[0])
    assert [len(x) for x in draw_examples(10, CovarianceSettings(held_back=256))] == [8, 2]
    assert [len(x) for x in draw_examples(1, settings)] == [1, 0]
    parts = [draw_examples(11, CovarianceSettings(held_back=0, part=(i, 3)))[0] for i in (1, 2, 3)]
    assert sorted(np.concatenate(parts)) == list(range(11))
    assert len(draw_examples(100, CovarianceSettings(held_back=0, max_rows=7))[0]) == 7


def test_an_equal_draw_of_rows():
    rows = np.arange(1000, dtype=np.float32)[:, None]
    means = []
    for seed in range(30):
        draw = HeldBackRows(1, 20, np.random.default_rng(seed))
        for start in range(0, 1000, 90):
            draw.add(rows[start : start + 90])
        kept = draw.finish()
        assert kept.shape == (20, 1) and len(set(kept[:, 0])) == 20
        means.append(kept.mean())
    assert abs(np.mean(means) - 499.5) < 5 * 288.7 / np.sqrt(600)


def test_chunks_take_rows_of_numpy_and_torch_alike():
    rows = np.random.default_rng(0).standard_normal((chunk_rows(16) * 2 + 37, 16)).astype(np.float32)
    results = []
    for convert in (np.asarray, torch.from_numpy):
        total = RowAccumulator(16)
        for start, stop in ((0, 5), (5, 300), (300, len(rows))):
            total.add(convert(rows[start:stop]))
        results.append(total.finish())
        assert total.rows == len(rows)
    exact = rows.astype(np.float64).T @ rows.astype(np.float64) / len(rows)
    np.testing.assert_allclose(results[0]["covariance"], exact, atol=1e-6)
    assert all(np.array_equal(results[0][part], results[1][part]) for part in ("covariance", "mean"))


def test_two_parts_add_up_to_the_whole(tmp_path, model, data):
    for name, part in (("whole", (1, 1)), ("a", (1, 2)), ("b", (2, 2))):
        settings = CovarianceSettings(held_back=0, part=part)
        collect_covariances(model, data, tmp_path / f"{name}.safetensors", settings)
    combine_covariance_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    whole, combined = (read_parts(tmp_path / f"{name}.safetensors") for name in ("whole", "c"))
    assert whole.keys() == combined.keys()
    for name in whole:
        np.testing.assert_allclose(combined[name], whole[name], atol=2e-6 * np.abs(whole[name]).max())
    with open_covariances(tmp_path / "whole.safetensors") as x, open_covariances(tmp_path / "c.safetensors") as y:
        assert {s.name: s.rows for s in x.sites.values()} == {s.name: s.rows for s in y.sites.values()}
        assert [record.part for record in y.data] == ["1/2", "2/2"]
        assert all(0 <= site.converged <= 1 for site in y.sites.values() if site.kind == "full")


def test_sketches_of_parts_add_up_and_sites_of_one_file_are_kept(tmp_path, model, data):
    settings = dict(memory=174_000, sketch_size=8, held_back=2)
    for name, part in (("a", (1, 2)), ("b", (2, 2))):
        result = collect_covariances(
            model,
            data,
            tmp_path / f"{name}.safetensors",
            CovarianceSettings(part=part, **settings),
        )
        assert result.sites == {"counts": 3, "sketch": 9} and QUERY in result.sketches
    combine_covariance_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    with (
        open_covariances(tmp_path / "a.safetensors") as a,
        open_covariances(tmp_path / "b.safetensors") as b,
        open_covariances(tmp_path / "c.safetensors") as c,
    ):
        site = c.sites[DOWN]
        share = a.sites[DOWN].rows / site.rows
        trace = share * a.read(DOWN, "trace") + (1 - share) * b.read(DOWN, "trace")
        np.testing.assert_allclose(c.read(DOWN, "trace"), trace, rtol=1e-6)
        both = sum(w * s.T @ s for w, s in ((share, a.read(DOWN, "sketch")), (1 - share, b.read(DOWN, "sketch"))))
        values, vectors = np.linalg.eigh(both)
        best = vectors[:, -8:] * values[-8:] @ vectors[:, -8:].T
        sketch = c.read(DOWN, "sketch")
        np.testing.assert_allclose(sketch.T @ sketch, best, atol=1e-5 * values[-1])
        assert c.shape(DOWN, "held_back") == (4, tiny.WIDTH)


def test_files_that_cannot_be_added_are_refused(tmp_path, model, data):
    other = tiny.save_model(tmp_path / "other", tiny.make_bert(), tiny.make_tokenizer(), seed=1)
    more = tiny.write_texts(tmp_path / "more.jsonl", tiny.draw_texts(12, seed=9))
    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "same", "foreign", "sketched", "out")}
    collect_covariances(model, data, files["a"])
    collect_covariances(model, data, files["same"], CovarianceSettings(seed=1))
    collect_covariances(other, more, files["foreign"])
    collect_covariances(model, more, files["sketched"], CovarianceSettings(memory=174_000, sketch_size=4, held_back=2))
    for name, message in (
        ("same", "both have inputs from data.jsonl"),
        ("foreign", "are of different models"),
        ("sketched", "collect both with the same --memory"),
        ("absent", "does not exist"),
    ):
        with pytest.raises(RefusedError, match=message):
            combine_covariance_files(files["a"], files.get(name, tmp_path / "absent"), files["out"])
        assert not files["out"].exists()
    with pytest.raises(RefusedError, match="already there"):
        combine_covariance_files(files["a"], files["sketched"], files["same"])


def test_sketched_sites_come_near_the_whole(tmp_path, model, data):
    collect_covariances(model, data, tmp_path / "full.safetensors", CovarianceSettings(held_back=2))
    few = CovarianceSettings(held_back=2, memory=174_000, sketch_size=8)
    collect_covariances(model, data, tmp_path / "few.safetensors", few)
    with (
        open_covariances(tmp_path / "full.safetensors") as full,
        open_covariances(tmp_path / "few.safetensors") as sketched,
    ):
        for name in (QUERY, DOWN):
            exact, sketch = full.read(name, "covariance"), sketched.read(name, "sketch")
            values = np.linalg.eigvalsh(exact)
            left = np.linalg.eigvalsh(exact - sketch.T @ sketch)
            assert left.min() > -1e-5 * values[-1]  # a sketch never claims more than there is
            bound = min((1 + k / (8 - k - 1)) * values[: 16 - k].sum() for k in range(7))
            assert left.sum() < 2 * bound
            np.testing.assert_allclose(sketched.read(name, "trace"), np.trace(exact), rtol=1e-5)
            np.testing.assert_allclose(sketched.read(name, "held_back"), full.read(name, "held_back"), atol=1e-6)


def test_memory_is_shared_by_whole_widths():
    sites = [collect.InputSite(str(i), (str(i),), "rows", width) for i, width in enumerate((64, 64, 4096))]
    full = sum(full_bytes(site.width) for site in sites) + 4 * 256 * (64 + 64 + 4096) + 12 * 4096**2
    for memory, limit in ((full, 4097), (full - 1, 4096)):
        assert collect.plan_memory(None, sites, CovarianceSettings(memory=memory)) == limit
    assert sketch_bytes(4096, 512) < full_bytes(4096)
    with pytest.raises(RefusedError, match="even as sketches"):
        collect.plan_memory(None, sites, CovarianceSettings(memory=1000))


def test_collection_stops_when_nothing_moves(tmp_path, model):
    data = tiny.write_texts(tmp_path / "data.jsonl", tiny.draw_texts(300))
    done = []
    result = collect_covariances(
        model,
        data,
        tmp_path / "c.safetensors",
        CovarianceSettings(until=0.9, held_back=4),
        progress=lambda examples, total: done.append((examples, total)),
    )
    assert result.stopped_early and result.examples == 74 and result.movement_worst <= 0.9
    assert sum(count for count, _ in done) == 78 and done[0][1] == 300
    with open_covariances(tmp_path / "c.safetensors") as file:
        worst = max(site.converged for site in file.sites.values() if site.kind == "full")
        assert worst == pytest.approx(result.movement_worst) and file.sites[result.worst_site].converged == worst


def test_stages_double():
    assert plan_stages(100, CovarianceSettings()) == [50, 100]
    assert plan_stages(300, CovarianceSettings(until=0.1)) == [37, 75, 150, 300]
    assert plan_stages(1, CovarianceSettings()) == [1]


def test_batches_hold_like_lengths_and_bounded_tokens():
    items = [Prepared(i, length) for i, length in enumerate((5, 3, 5, 3, 4000, 4000, 4000))]
    lengths = [[item.length for item in batch] for batch in make_batches(items, CovarianceSettings(), False)]
    assert lengths == [[3, 3, 5, 5], [4000, 4000], [4000]]
    exact = [
        [item.length for item in batch] for batch in make_batches(items, CovarianceSettings(batch_size=1000), True)
    ]
    assert exact == [[3, 3], [5, 5], [4000, 4000], [4000]]


def test_too_few_inputs_are_said(tmp_path, model):
    data = tiny.write_texts(tmp_path / "data.jsonl", ["how many cats"])
    result = collect_covariances(model, data, tmp_path / "c.safetensors")
    assert any("nothing could be held back" in warning for warning in result.warnings)
    assert any("fewer inputs than they have entries" in warning for warning in result.warnings)
    assert result.movement_worst is None


def spoil(directory, name, value):
    """Write a value into one tensor of a saved model."""
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    weights[name].view(-1)[0] = value
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("backend", ["torch", "flax"])
def test_inputs_that_are_not_finite_name_the_first_layer(tmp_path, data, backend):
    directory = tiny.save_model(tmp_path / "model", tiny.make_bert(), tiny.make_tokenizer())
    spoil(directory, "encoder.layer.0.output.dense.bias", float("nan"))
    with pytest.raises(
        RefusedError, match=r"the inputs of encoder\.layer\.1\.attention\.self\.query \(and of 4 later ones\)"
    ):
        collect_covariances(directory, data, tmp_path / "c.safetensors", CovarianceSettings(backend=backend))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "model"]


def test_a_failing_disk_leaves_nothing(tmp_path, model, data, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        collect_covariances(model, data, tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_everything_wrong_is_said_at_once(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"mine")
    with pytest.raises(RefusedError) as refused:
        collect_covariances(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "c.safetensors")
    assert len(refused.value.problems) == 3
    assert (tmp_path / "c.safetensors").read_bytes() == b"mine"
    with pytest.raises(RefusedError) as refused:
        CovarianceSettings(batch_size=0, until=2.0, part=(3, 2), backend="jax", dtype="int8")
    assert len(refused.value.problems) == 5


def test_models_that_cannot_be_run_are_refused(tmp_path, model, data):
    out = tmp_path / "c.safetensors"
    with pytest.raises(RefusedError, match=r"has no config\.json"):
        collect_covariances(model / "model.safetensors", data, out)
    no_tokenizer = tiny.save_model(tmp_path / "bare", tiny.make_gpt2())
    with pytest.raises(RefusedError, match="has no tokenizer"):
        collect_covariances(no_tokenizer, data, out)
    unknown = tiny.save_model(tmp_path / "unknown", tiny.make_bert())
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "modeling.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    names = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    (unknown / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": names}))
    with pytest.raises(RefusedError, match="'mine'"):
        collect_covariances(unknown, data, out)
    assert not out.exists()


def test_data_of_the_wrong_kind_are_refused(tmp_path, model, data):
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(RefusedError, match="takes no images"):
        collect_covariances(model, tmp_path / "images.npz", tmp_path / "c.safetensors")
    vit = tiny.save_model(tmp_path / "vit", tiny.make_vit())
    with pytest.raises(RefusedError, match="takes no texts"):
        collect_covariances(vit, data, tmp_path / "c.safetensors")
    with pytest.raises(RefusedError, match=r"no preprocessor_config\.json"):
        collect_covariances(vit, tmp_path / "images.npz", tmp_path / "c.safetensors")


def test_missing_torch_is_said_and_flax_takes_over(tmp_path, model, data, monkeypatch):
    monkeypatch.setattr(collect, "has_torch", lambda: False)
    result = collect_covariances(model, data, tmp_path / "c.safetensors")
    assert result.backend == "flax" and result.sites == {"counts": 3, "full": 9}
    other = tiny.save_model(tmp_path / "other", tiny.make_gpt2(), tiny.make_tokenizer())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neo"}))  # no Flax family here
    with pytest.raises(RefusedError, match="pip install torch transformers"):
        collect_covariances(other, data, tmp_path / "d.safetensors")


def test_torch_files_are_run_too(tmp_path, data):
    directory = tiny.save_model(tmp_path / "model", tiny.make_bert(), tiny.make_tokenizer())
    with open_checkpoint(directory) as checkpoint:
        weights = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.specs}
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    result = collect_covariances(directory, data, tmp_path / "c.safetensors")
    assert result.sites == {"counts": 3, "full": 9} and result.not_covered == {}
