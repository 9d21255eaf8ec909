"""`rgsp learn` as a command."""

import json

import numpy as np
import pytest

from activations import tiny_models as tiny
from pipeline.toy_models import tree_bytes
from training.test_learn import save_family, save_heads


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = save_family(tmp_path_factory.mktemp("learn"), tiny.make_bert, 2)
    save_heads(directory, 2)
    return directory


def name_files(place, *options):
    models = [place / "expert-0", place / "expert-1"]
    data = [word for k in range(2) for word in ("--data", place / f"{k}.jsonl")]
    return (*models, *data, *options)


def test_a_ridge_is_learned_and_its_config_makes_the_graft_again(rgsp, place, tmp_path):
    covariances = tmp_path / "cov.safetensors"
    made = rgsp(
        "covariances", place / "expert-0", "--data", place / "0.jsonl", "--out", covariances, "--backend", "flax"
    )
    assert made.code == 0, made.err
    heads = [word for k in range(2) for word in ("--head", place / f"head-{k}.safetensors")]
    options = ("--method", "graft", "--covariances", covariances, "--set", "ridge=2", "--per", "model", "--steps", 3)
    outcome = rgsp("learn", *name_files(place, *heads, *options, "--out", tmp_path / "out", "--json"))
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["steps"] == 3 and len(found["by_model"]) == 2 and found["agreement_after"] is not None
    records = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    ridges = {r["hyperparameters"]["ridge"] for r in records if r["method"] == "graft"}
    assert len(ridges) == 1 and ridges != {2.0} and 1 < ridges.pop() < 4
    again = rgsp("merge", "--config", tmp_path / "out.learning" / "merge.yaml", "--out", tmp_path / "again")
    assert again.code == 0, again.err
    first, second = (tree_bytes(tmp_path / name)["model.safetensors"] for name in ("out", "again"))
    assert first == second


def test_a_summary_is_printed(rgsp, place, tmp_path):
    outcome = rgsp("learn", *name_files(place, "--rank", 2, "--steps", 1, "--out", tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert "1 steps; model" in outcome.out and "expert-0" in outcome.out and "merge.yaml" in outcome.out


def test_mistakes_are_refused_at_once_and_leave_nothing(rgsp, place, tmp_path):
    wrong = ("--steps", -1, "--head", "one", "--set", "magic=1", "--out", tmp_path / "out")
    outcome = rgsp("learn", *name_files(place, *wrong))
    assert outcome.code == 2
    assert len(outcome.problems) == 3 and "Traceback" not in outcome.err
    (tmp_path / "empty.jsonl").write_text("")
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8), np.uint8))
    data = ("--data", tmp_path / "empty.jsonl", "--data", tmp_path / "images.npz")
    outcome = rgsp("learn", place / "expert-0", place / "expert-1", *data, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "is empty" in outcome.problems[0] and "takes texts, and the data hold images" in outcome.problems[1]
    outcome = rgsp("learn", place / "expert-0", *name_files(place, "--out", tmp_path / "out")[1:], "--label-field", "x")
    assert outcome.code == 2 and all("'x' is None" in problem for problem in outcome.problems)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "images.npz"]
