"""`rgsp compare` as a shell sees it."""

import json

import numpy as np
import pytest

from comparison.toy_transformer import ancestor, as_float32, fine_tune, permute_neurons
from pipeline.toy_models import write_family

BASE = ancestor(0)


@pytest.fixture
def models(tmp_path):
    """Two siblings, a permuted twin, a stranger, on disk."""
    siblings = [fine_tune(BASE, seed, 0.02) for seed in range(2)]
    family = [*siblings, permute_neurons(BASE, 1), ancestor(1)]
    return write_family(tmp_path, [as_float32(model) for model in family])


def test_help(rgsp):
    assert "compare" in rgsp("--help").out
    outcome = rgsp("compare", "--help")
    assert outcome.code == 0 and all(flag in outcome.out for flag in ("--out", "--memory", "--json", "MODEL"))


def test_siblings_and_a_page(rgsp, models, tmp_path):
    out = tmp_path / "out"
    outcome = rgsp("compare", *models[:2], "--out", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert "siblings of one ancestor" in outcome.out and "--method rgsp" in outcome.out
    assert str(out / "compare.html") in outcome.out
    assert {path.name for path in out.iterdir()} == {"compare.html", "compare.jsonl", "compare.json"}
    again = rgsp("compare", *models[:2], "--out", out)
    assert again.code == 2 and again.problems == [
        f"the output {out} is already there and not empty: choose another name or remove it"
    ]


def test_every_relation_as_json(rgsp, models):
    outcome = rgsp("compare", *models, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    summary = json.loads(outcome.out)
    verdict = summary["verdict"]
    relations = {tuple(pair["models"]): pair["relation"] for pair in verdict["pairs"]}
    assert relations.pop((0, 1)) == "siblings"
    assert {pair: relations[pair] for pair in ((0, 2), (1, 2))} == {(0, 2): "permuted", (1, 2): "permuted"}
    assert {relation for pair, relation in relations.items() if 3 in pair} == {"unrelated"}
    assert verdict["families"] == [[0, 1], [2], [3]] and verdict["odd"] == [2, 3] and verdict["level"] == "check"
    assert [model["code"] for model in summary["models"]] == ["A", "B", "C", "D"]
    assert all(np.isfinite(pair["rho"]) for pair in verdict["pairs"])


def test_refusals(rgsp, models, tmp_path):
    outcome = rgsp("compare", models[0])
    assert outcome.code == 2 and outcome.problems == ["name two to 8 models to compare, not 1"]
    outcome = rgsp("compare", models[0], tmp_path / "x", tmp_path / "y", "--memory", "1kB")
    assert (outcome.code, outcome.out) == (2, "") and len(outcome.problems) == 3
    assert "--memory" in outcome.problems[0] and "does not exist" in outcome.problems[2]
    assert "--memory must be a size" in rgsp("compare", *models[:2], "--memory", "lots").problems[0]
