"""`rgsp sweep` as a command."""

import csv
import json
import sys

import pytest
import yaml

from pipeline.toy_models import toy_family, write_family

SCORE = """
import json, struct, sys
from pathlib import Path
raw = (Path(sys.argv[1]) / "model.safetensors").read_bytes()
length = struct.unpack("<Q", raw[:8])[0]
start, _ = json.loads(raw[8 : 8 + length])["logit_scale"]["data_offsets"]
value = struct.unpack("<f", raw[8 + length + start :][:4])[0]
with Path(__file__).with_name("calls").open("a") as calls:
    calls.write(sys.argv[1] + "\\n")
print("scoring")
print(value, 1 - value)
"""


@pytest.fixture
def place(tmp_path):
    write_family(tmp_path, toy_family(2))
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def write_config(place, name="sweep.yaml", **fields):
    models = [str(place / "a"), str(place / "b")]
    (place / name).write_text(
        yaml.safe_dump({"models": models, "include": ["logit_scale"], "method": "slerp", **fields})
    )
    return place / name


def arguments(place, config, *more):
    score = f"{sys.executable} {place}/score.py {{model}}"
    return "sweep", config, "--score", score, "--out", place / "out", "--metrics", "up,down", *more


def test_a_sweep_is_a_table_a_page_and_nothing_else(rgsp, place):
    config = write_config(place, axes={"t": {"low": 0.2, "high": 0.8, "count": 3}})
    outcome = rgsp(*arguments(place, config, "--minimise", "down"))
    assert outcome.code == 0, outcome.err
    assert "slerp t=0.5" in outcome.out and "sweep.html" in outcome.out
    assert sorted(p.name for p in (place / "out").iterdir()) == [
        "results.csv", "results.jsonl", "results.parquet", "sweep.html", "sweep.json"
    ]  # fmt: skip
    with (place / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["t"]) for row in rows] == [0.2, 0.5, 0.8]
    assert all(float(row["up"]) + float(row["down"]) == pytest.approx(1) for row in rows)
    again = rgsp(*arguments(place, config, "--minimise", "down", "--json"))
    assert [r["metrics"]["up"] for r in json.loads(again.out)] == [float(row["up"]) for row in rows]
    assert len((place / "calls").read_text().splitlines()) == 3  # nothing was scored again
    other = rgsp(*arguments(place, write_config(place, axes={"t": [0.3]})))
    assert other.code == 2 and "holds another sweep (config differs" in other.err


def test_a_study_by_command(rgsp, place):
    config = write_config(place, axes={"t": {"low": 0.1, "high": 0.9}})
    outcome = rgsp(*arguments(place, config, "--study", "4", "--maximise", "up,down", "--json"))
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert [r["point"] for r in found] == [0, 1, 2, 3] and (place / "out" / "study.db").exists()
    assert "Traceback" not in outcome.err and "Warning" not in outcome.err


@pytest.mark.parametrize(
    ("fields", "more", "messages"),
    [
        ({"axes": {"t": [2], "beta": [1]}}, (), ["axes.beta: method slerp has no such"]),
        ({"axes": {"t": [2, 3]}}, (), ["t of method 'slerp' must be", "not 2", "not 3"]),
        ({"axes": {"t": [0.5]}, "models": ["nowhere", "gone"]}, (), ["nowhere does not exist", "gone does not exist"]),
        ({"axes": {"t": {"low": 0, "high": 1}}}, (), ["axes.t: give count"]),
        ({"axes": {"t": [0.5]}}, ("--minimise", "loss"), ["--metrics names no 'loss'"]),
        ({"axes": {"t": [0.5]}}, ("--minimise", "up", "--maximise", "up"), ["maximise it or minimise it"]),
        ({"axes": {"t": [0.5]}}, ("--study", "3", "--sampler", "cmaes", "--maximise", "up,down"), ["one objective"]),
        ({"axes": {"t": [0.5]}}, ("--metrics", "one"), ["--score printed", "the last line must be 1 number (one)"]),
        ({"axes": {"t": [0.5]}}, ("--score", "echo 1"), ["has no {model}"]),
        ({"axes": {"t": [0.5]}}, ("--score", "ls {model}/no"), ["--score failed with exit code"]),
    ],
)  # fmt: skip
def test_mistakes_are_sentences(rgsp, place, fields, more, messages):
    outcome = rgsp(*arguments(place, write_config(place, **fields), *more))
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert all(message in outcome.err for message in messages), outcome.err
    assert not (place / "out" / "models").exists() or not list((place / "out" / "models").iterdir())


def test_a_config_that_is_none(rgsp, place):
    (place / "broken.yaml").write_text("axes: [1")
    for name, message in (("broken.yaml", "not valid YAML"), ("absent.yaml", "cannot read the config")):
        outcome = rgsp(*arguments(place, place / name))
        assert outcome.code == 2 and message in outcome.err and not (place / "out").exists()
