"""`rgsp graft` and `rgsp frontier` as commands."""

import json
import sys

import pytest

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
