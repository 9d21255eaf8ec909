"""The alignment experiment on small networks: twins are twins, recovery is counted, barriers are what they say."""

import json

import jax.numpy as jnp
import numpy as np
import pytest


@pytest.fixture(scope="module")
def experiment(script):
    module = script("permuted_twins")
    module.EPOCHS = 4
    return module


def test_twins_are_one_function_and_others_are_not(experiment):
    images, _ = experiment.flatten_rows(0, "test")
    for kind in experiment.KINDS:
        pair = experiment.make_pair(kind, 16, 0)
        b = pair.undo(pair.b)
        ours, theirs = (np.asarray(experiment.predict(model, images)) for model in (pair.a, b))
        assert np.allclose(ours, theirs, atol=1e-4) == (kind == "twin")
        assert (pair.truth is None) == (kind == "trained apart")
        assert np.allclose(pair.b["first.weight"], b["first.weight"], atol=1e-4) == (kind != "rotated twin")
        if pair.truth is not None:
            back = experiment.permute(b, experiment.SPEC, pair.truth)
            apart = np.abs(np.asarray(back["first.weight"]) - np.asarray(pair.a["first.weight"]))
            spread = experiment.NOISE * float(jnp.std(pair.a["first.weight"]))
            assert apart.max() == 0 if kind == "twin" else apart.std() == pytest.approx(0.6 * spread, rel=0.05)


def test_rotated_ends_are_one_function_in_other_coordinates(experiment):
    pair = experiment.make_pair("rotated twin", 16, 1)
    images, _ = experiment.flatten_rows(1, "test")
    back = pair.undo(pair.b)
    for name in ("first.weight", "last.weight"):
        assert not np.allclose(pair.b[name], back[name], atol=0.1)
    turned, plain = (np.asarray(experiment.predict(model, images)) for model in (pair.b, back))
    assert not np.allclose(turned, plain, atol=0.1)
    grams = [np.asarray(m["first.weight"]) @ np.asarray(m["first.weight"]).T for m in (pair.b, back)]
    np.testing.assert_allclose(*grams, atol=1e-4)


def test_recovered_counts_places(experiment):
    truth = {"h1": np.array([2, 0, 1]), "h2": np.array([0, 1, 2])}
    places = {"h1": np.eye(3)[[2, 0, 1]] * 0.9 + 0.05, "h2": np.eye(3)[[1, 0, 2]]}
    assert experiment.count_recovered(places, truth) == pytest.approx(4 / 6)


def test_a_small_run(experiment, tmp_path):
    out = tmp_path / "twins"
    rows = experiment.main(
        ["--kinds", "twin", "rotated twin", "trained apart", "--widths", "24", "--seeds", "0", "1", "--out", str(out)]
    )
    assert len(rows) == 3 * 2 * len(experiment.ALIGNMENTS)
    for row in rows:
        if row.kind == "twin" and row.alignment in ("weight matching", "OTFusion, exact", "OTFusion, Sinkhorn"):
            assert row.recovered == 1
            assert row.accuracy == pytest.approx(row.own)
            assert row.loss_barrier == pytest.approx(0, abs=1e-4)
        if row.kind == "rotated twin" and row.alignment == "GW, ends unknown":
            assert row.recovered == 1
            assert row.loss_barrier < 0
        if row.kind == "rotated twin" and row.alignment == "fused without geometry":
            assert row.recovered < 1
        if row.alignment == "none":
            assert row.loss_barrier > 0.05
            assert row.accuracy < row.own
    # The control knows nothing: the mean is the first model at half its size, whatever the second one is.
    control = [(row.seed, row.kind, row.recovered) for row in rows if row.alignment == "uniform coupling"]
    assert all(share is None or share < 0.3 for _, _, share in control)
    text = out.with_suffix(".md").read_text()
    assert "| weight matching | 1.000 (2 of 2) |" in text
    assert json.loads(out.with_suffix(".json").read_text())["headline"].startswith(
        "Twins recovered wholly: none 0 of 2"
    )
    assert out.with_suffix(".png").stat().st_size > 1000


def test_index_collects_records(script, tmp_path):
    index = script("index")
    here, beside = tmp_path / "results", tmp_path / "benchmarks" / "results"
    for directory in (here, beside):
        directory.mkdir(parents=True)
    (here / "b.json").write_text(json.dumps({"command": "python b.py", "headline": "B is best."}))
    (here / "b.png").write_bytes(b"")
    (here / "a.json").write_text(json.dumps({"settings": {"command": "python a.py"}}))
    (here / "a.md").write_text("# a\n\n    python a.py\n\nFirst words\nof prose.\n\nMore.\n")
    (beside / "c.json").write_text(json.dumps({"rows": []}))
    (beside.parent / "c.py").write_text(
        '"""What is asked.\n\nHardware: any. Expected: C is\n.5 throughout.\n\nMore.\n"""\n'
    )
    index.main(["--directories", str(here), str(beside), "--out", str(here / "index.md")])
    sections = (here / "index.md").read_text().split("\n## ")[1:]
    assert [section.split("\n")[0] for section in sections] == ["a", "b", "c"]
    assert "First words of prose.\n\n    python a.py\n\n[md](a.md) [json](a.json)" in sections[0]
    assert "B is best.\n\n    python b.py\n\n[json](b.json) [png](b.png)" in sections[1]
    assert "Expected: C is .5 throughout.\n\n" in sections[2]
    assert "[json](../benchmarks/results/c.json)" in sections[2]
    for link in ("../benchmarks/results/c.json", "a.md"):
        assert (here / link).exists()
    (here / "d.json").write_text("[]")
    with pytest.raises(SystemExit, match="no record"):
        index.main(["--directories", str(here), "--out", str(here / "index.md")])
