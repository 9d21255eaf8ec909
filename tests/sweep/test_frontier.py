"""Frontiers: every point is the merge it says, scored by a command, once."""

import json
import math
import sys

import numpy as np
import pytest

from pipeline.test_grafting import collect
from pipeline.toy_models import MATRICES, read_model, toy_family, write_family
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.pipeline.spectra import write_spectra
from rgsp_jax.sweep import FrontierPoint, mark_pareto, plan_points, run_frontier
from rgsp_jax.sweep.frontier_plot import draw_frontier

SKIP = ("stem.conv.weight", "moe.experts.down_proj")
SCORE = """
import sys
from pathlib import Path
from pipeline.toy_models import MATRICES, read_model
place = Path(__file__).parent
with (place / "calls").open("a") as calls:
    calls.write(sys.argv[1] + "\\n")
model, a, b = (read_model(p) for p in (sys.argv[1], place / "a", place / "b"))
far = [sum(float(((model[n] - x[n]) ** 2).sum()) for n in MATRICES) ** 0.5 for x in (a, b)]
print("scored")
print(-far[0], -far[1])
"""


@pytest.fixture
def place(tmp_path):
    family = toy_family(2)
    write_family(tmp_path, family)
    for name, model in zip("ab", family, strict=True):
        collect(tmp_path / f"{name}.covariances", model, SKIP)
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


@pytest.fixture
def score(place, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    return f"{sys.executable} {place}/score.py {{model}}"


def run(place, score, points, **options):
    return run_frontier(
        str(place / "a"), str(place / "b"), str(place / "a.covariances"), score, place / "out", points, **options
    )


def test_points_are_the_merges_they_say(place, score, plain_report):
    points = plan_points([1.0], [0.9], [0.25], regmean=False)
    scored = {p.name: p for p in run(place, score, points)}
    a, b = (read_model(place / k) for k in "ab")
    whole = math.sqrt(sum(float(((a[n] - b[n]) ** 2).sum()) for n in MATRICES))
    assert scored["recipient"].retention == 0 and scored["donor"].acquisition == 0
    assert scored["interpolation 0.25"].retention == pytest.approx(-0.25 * whole, rel=1e-4)
    for series, setting in (("soft ridge 1", {"ridge": 1.0}), ("hard energy 0.9", {"energy": 0.9})):
        config = MergeConfig(
            models=(str(place / "a"), str(place / "b")),
            method="graft",
            hyperparameters=setting,
            covariances=(str(place / "a.covariances"),),
        )
        merged = read_model(merge_checkpoints(config, place / series.replace(" ", "-")).out)
        far = math.sqrt(sum(float(((merged[n] - a[n]) ** 2).sum()) for n in MATRICES))
        assert -scored[series].retention == pytest.approx(far, rel=1e-4)
    assert not (place / "out" / "models").exists() or not list((place / "out" / "models").iterdir())
    assert not (place / "out" / "spectra.safetensors").exists()


def test_a_run_goes_on_behind_what_is_scored(place, score, plain_report):
    points = plan_points([], [], [0.5], regmean=False)
    run(place, score, points[:2])
    with (place / "out" / "frontier.jsonl").open("a") as results:
        results.write('{"series": "inter')  # a line cut short is no result
    done = run(place, score, points)
    assert (place / "calls").read_text().splitlines()[:2] == [str(place / "a"), str(place / "b")]
    assert len((place / "calls").read_text().splitlines()) == 3 and len(done) == 3
    lines = (place / "out" / "frontier.jsonl").read_text().splitlines()
    assert [json.loads(line)["series"] for line in lines] == ["recipient", "donor", "interpolation"]


def test_regmean_takes_both_covariances(place, score, plain_report):
    sketchless = [
        collect(place / f"{k}.whole", model, (*SKIP, "encoder.layer.0.output.dense.weight"))
        for k, model in zip("ab", toy_family(2), strict=True)
    ]
    (point,) = run_frontier(
        str(place / "a"), str(place / "b"), sketchless[0], score, place / "out", [FrontierPoint("RegMean", None)],
        donor_covariances=sketchless[1], keep=True,
    )  # fmt: skip
    merged = read_model(place / "out" / "models" / "RegMean")
    a, b = (read_model(place / k) for k in "ab")
    name = "encoder.layer.0.intermediate.dense.weight"
    # both covariances are equal here, so that RegMean is the mean
    np.testing.assert_allclose(merged[name], (a[name] + b[name]) / 2, atol=1e-5)
    assert point.retention < 0


def test_refusals_come_first(place, score):
    points = plan_points([1.0], [], [], regmean=False)
    with pytest.raises(RefusedError, match=r"no \{model\}"):
        run(place, "true", points)
    with pytest.raises(RefusedError, match=r"exit code 3 on .*: no luck"):
        run(
            place,
            f"{sys.executable} -c \"import sys; print('no luck', file=sys.stderr); sys.exit(3)\" {{model}}",
            points,
        )
    with pytest.raises(RefusedError, match="must be two numbers"):
        run(place, "echo {model} one", points)
    with pytest.raises(RefusedError, match="nowhere does not exist"):
        run_frontier(str(place / "a"), str(place / "b"), "nowhere", score, place / "out2", points)
    assert not (place / "calls").exists()


def test_pareto_points():
    scores = {"a": (1.0, 0.0), "b": (0.0, 1.0), "c": (0.5, 0.5), "d": (0.4, 0.5), "e": (0.5, 0.5), "f": (0.2, 0.2)}
    points = [FrontierPoint(name, None, *pair) for name, pair in scores.items()]
    assert {p.series for p in mark_pareto(points) if p.pareto} == {"a", "b", "c", "e"}


def test_the_picture_has_every_point(tmp_path):
    points = mark_pareto([FrontierPoint("recipient", None, 0.9, 0.1), FrontierPoint("soft ridge", 3.0, 0.8, 0.7),
                          FrontierPoint("interpolation", 0.5, 0.7, 0.6)])  # fmt: skip
    draw_frontier(points, tmp_path / "frontier.svg")
    draw_frontier(points, tmp_path / "again.svg")
    text = (tmp_path / "frontier.svg").read_text()
    assert text.count("<use") >= 3 and "retention" in text


def test_spectra_of_a_file_say_what_it_says(place):
    write_spectra(place / "a.covariances", place / "a.spectra")
    models = (str(place / "a"), str(place / "b"))
    for number, setting in enumerate(({"ridge": 0.5}, {"energy": 0.9})):
        merged = []
        for file in ("covariances", "spectra"):
            config = MergeConfig(
                models=models, method="graft", hyperparameters=setting, covariances=(str(place / f"a.{file}"),)
            )
            merged.append(read_model(merge_checkpoints(config, place / f"{file} {number}").out))
        for name in MATRICES:
            np.testing.assert_allclose(merged[0][name], merged[1][name], atol=2e-5)
