"""`rgsp graft` and `rgsp frontier` as commands."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from activations import tiny_models as tiny
from activations.test_sequential import save_pair
from pipeline.test_grafting import collect
from pipeline.toy_models import MATRICES, toy_family, tree_bytes, write_family
from sweep.test_frontier import SCORE, SKIP


@pytest.fixture
def place(tmp_path):
    family = toy_family(2)
    write_family(tmp_path, family)
    collect(tmp_path / "cov.safetensors", family[0], SKIP)
    return tmp_path


def test_a_graft_is_the_merge_that_its_config_reproduces(rgsp, place):
    models = (str(place / "a"), str(place / "b"))
    rules = ("--ridge", "2", "--per-layer", "*.query.* energy=0.9", "--per-layer", "*.1.output.* method=average")
    outcome = rgsp(
        "graft", *models, "--covariances", str(place / "cov.safetensors"), *rules, "--out", str(place / "out")
    )
    assert outcome.code == 0, outcome.err
    assert "by graft" in outcome.out
    records = {r["name"]: r for r in map(json.loads, (place / "out" / "report.jsonl").read_text().splitlines())}
    assert records["encoder.layer.0.attention.self.query.weight"]["hyperparameters"] == {"energy": 0.9}
    assert records["encoder.layer.1.output.dense.weight"]["method"] == "average"
    again = rgsp("merge", "--config", str(place / "out" / "merge_config.yaml"), "--out", str(place / "again"))
    assert again.code == 0, again.err
    ours, theirs = tree_bytes(place / "out"), tree_bytes(place / "again")
    assert ours["model.safetensors"] == theirs["model.safetensors"]


def test_a_plan_says_what_is_grafted(rgsp, place):
    models = (str(place / "a"), str(place / "b"))
    outcome = rgsp("graft", *models, "--covariances", str(place / "cov.safetensors"), "--plan", "--json")
    assert outcome.code == 0, outcome.err
    rules = {(r["rule"], r["method"]): r["tensors"] for r in json.loads(outcome.out)["rules"]}
    assert rules["matrix", "graft"] == len(MATRICES) - len(SKIP)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --covariances FILE, or --data FILE"),
        (["--covariances", "x", "--data", "y"], "and not both"),
        (["--data", "y", "--plan"], "say where to write with --out DIR"),
        (["--covariances", "nowhere", "--out", "out"], "nowhere does not exist"),
        (["--covariances", "cov.safetensors", "--out", "o", "--ridge", "1", "--energy", ".5"], "one of energy, ridge"),
        (["--covariances", "cov.safetensors", "--out", "o", "--energy", "1.5"], "energy of method 'graft' must be"),
        (["--covariances", "cov.safetensors", "--out", "o", "--per-layer", "x"], "changes nothing"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(rgsp, place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = sorted(p.name for p in place.iterdir())
    outcome = rgsp("graft", "a", "b", *arguments)
    assert outcome.code == 2 and message in outcome.err and "Traceback" not in outcome.err
    assert sorted(p.name for p in place.iterdir()) == before


def test_a_frontier_is_a_table_and_a_picture(rgsp, place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    (place / "score.py").write_text(SCORE)
    command = ("frontier", str(place / "a"), str(place / "b"), "--covariances", str(place / "cov.safetensors"))
    score = f"{sys.executable} {place}/score.py {{model}}"
    options = ("--ridges", "1", "--energies", "0.9", "--mixes", "0.5", "--out", str(place / "front"), "--json")
    outcome = rgsp(*command, "--score", score, *options)
    assert outcome.code == 0, outcome.err
    points = {p["series"]: p for p in json.loads(outcome.out)}
    assert set(points) == {"recipient", "donor", "interpolation", "soft ridge", "hard energy"}
    assert points["recipient"]["pareto"] and points["donor"]["pareto"]
    assert (place / "front" / "frontier.svg").stat().st_size > 1000
    table = (place / "front" / "frontier.md").read_text().splitlines()
    assert len(table) == 2 + len(points) and "soft ridge 1" in "".join(table)
    for bad in (("--ridges", "one"), ("--mixes", "0.5,2")):
        outcome = rgsp(*command, "--score", score, *bad, "--out", str(place / "front"))
        assert outcome.code == 2 and "Traceback" not in outcome.err


def test_data_alone_make_a_sequential_graft_that_its_config_reproduces(rgsp, tmp_path, monkeypatch):
    a, b = save_pair(tmp_path, tiny.make_bert)
    data = tiny.write_texts(tmp_path / "own.jsonl", tiny.draw_texts(20))
    command = ("graft", a, b, "--data", data, "--out", tmp_path / "out")
    outcome = rgsp(*command, "--share", "0.4")
    assert outcome.code == 0, outcome.err
    assert "by sequential_graft" in outcome.out and outcome.err == ""
    records = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    query = next(r for r in records if r["name"].endswith("0.attention.self.query.weight"))
    assert query["hyperparameters"] == {"share": 0.4} and 0 <= query["stats"]["output_change"] < 1
    assert next(r for r in records if r["name"].endswith("LayerNorm.weight"))["hyperparameters"]["coefficients"] == [
        pytest.approx(1 / 1.4),
        pytest.approx(0.4 / 1.4),
    ]
    again = rgsp("merge", "--config", tmp_path / "out" / "merge_config.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    ours, theirs = tree_bytes(tmp_path / "out"), tree_bytes(tmp_path / "again")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    # A collection that was stopped between its files is made again.
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.covariances.safetensors").unlink()
    outcome = rgsp(*command, "--share", "0.4", "--resume")
    assert outcome.code == 0, outcome.err
    assert tree_bytes(tmp_path / "out")["model.safetensors"] == ours["model.safetensors"]
    # A resumed graft does not collect again.
    monkeypatch.setattr("rgsp_jax.activations.sequential.collect_sequentially", None)
    shutil.rmtree(tmp_path / "out")
    outcome = rgsp(*command, "--share", "0.4", "--resume")
    assert outcome.code == 0, outcome.err
    assert tree_bytes(tmp_path / "out")["model.safetensors"] == ours["model.safetensors"]


def test_a_soft_graft_where_a_sequential_one_cannot_be(rgsp, tmp_path):
    """Embeddings that did not move, and torch that is not there; what was asked for by name is refused instead."""
    a, b = save_pair(tmp_path, tiny.make_bert, ("dense.weight",))
    data = tiny.write_texts(tmp_path / "own.jsonl", tiny.draw_texts(20))
    outcome = rgsp("graft", a, b, "--data", data, "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "a soft null-space graft instead" in outcome.err and "share their embeddings" in outcome.err
    assert "by graft" in outcome.out
    first = tree_bytes(tmp_path / "out")["model.safetensors"]
    shutil.rmtree(tmp_path / "out")
    outcome = rgsp("graft", a, b, "--data", data, "--out", tmp_path / "out", "--resume")
    assert outcome.code == 0, outcome.err
    assert tree_bytes(tmp_path / "out")["model.safetensors"] == first
    before = sorted(p.name for p in tmp_path.iterdir())
    outcome = rgsp("graft", a, b, "--data", data, "--out", tmp_path / "o", "--share", "0.1")
    assert outcome.code == 2 and "share their embeddings" in outcome.err
    outcome = rgsp("graft", a, b, "--data", data, "--out", tmp_path / "o", "--share", "0.1", "--ridge", "1")
    assert outcome.code == 2 and "--share: for sequential grafts" in outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    outcome = rgsp("graft", a, b, b, "--data", data, "--out", tmp_path / "o", "--ridge", "1")
    assert outcome.code == 2 and "several donors: for sequential grafts" in outcome.err
    outcome = rgsp("graft", a, b, b, "--data", data, "--donor-data", data, "--out", tmp_path / "o")
    assert outcome.code == 2 and "inputs of 1 donors are given for 2" in outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    given = ("--donor-data", data, "--donor-data", data)
    outcome = rgsp("graft", a, b, b, "--data", data, *given, "--out", tmp_path / "given")
    assert outcome.code == 0 and "by sequential_graft" in outcome.out


def test_qwen2_vl_with_images_end_to_end(rgsp, tmp_path):
    """The case the method was made for: vision tower and decoder, images through the model's own processor."""
    recipient = tiny.save_qwen2_vl(tmp_path / "qwen")
    donor = tmp_path / "ocr"
    shutil.copytree(recipient, donor)
    tuned = transformers.Qwen2VLForConditionalGeneration.from_pretrained(recipient)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tuned.save_pretrained(donor)
    pictures = tmp_path / "data"
    pictures.mkdir()
    lines = []
    for number, text in enumerate(tiny.draw_texts(12)):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        lines.append(json.dumps({"text": text, "image": f"{number}.png"}) + "\n")
    (pictures / "own.jsonl").write_text("".join(lines))
    outcome = rgsp("graft", recipient, donor, "--data", pictures / "own.jsonl", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    records = {r["name"]: r for r in map(json.loads, (tmp_path / "out" / "report.jsonl").read_text().splitlines())}
    grafted = {name for name, r in records.items() if r["method"] == "graft"}
    assert any("visual" in name for name in grafted) and any("self_attn" in name for name in grafted)
    assert all(0 <= records[name]["stats"]["output_change"] < 1 for name in grafted)
    loaded, info = transformers.Qwen2VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, theirs = dict(loaded.named_parameters()), dict(tuned.named_parameters())
    name = "model.visual.blocks.0.attn.qkv.weight"
    base = dict(transformers.Qwen2VLForConditionalGeneration.from_pretrained(recipient).named_parameters())
    moved = float((ours[name] - base[name]).detach().norm() / (theirs[name] - base[name]).detach().norm())
    assert 0 < moved < 1
    assert moved == pytest.approx(records["visual.blocks.0.attn.qkv.weight"]["stats"]["donor_share"], rel=1e-3)
