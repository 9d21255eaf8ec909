"""Studies: samplers over spaces, resumable, and shared between workers that may die."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optuna
import pytest

from pipeline.toy_models import toy_family, write_family
from rgsp_jax import merge
from rgsp_jax.errors import RefusedError
from rgsp_jax.sweep import parse_sweep, read_results, run_study
from sweep import worker

pytestmark = pytest.mark.usefixtures("plain_report")
SPACE = {"method": ["slerp", "average"], "axes": {"t": {"low": 0.1, "high": 0.9}, "coefficients": [[0.3, 0.7], [1, 2]]}}


@pytest.fixture
def place(tmp_path):
    family = toy_family(2)
    for model, value in zip(family, (1.0, 0.0), strict=True):  # a merge at t holds 1 - t
        model["logit_scale"] = np.float32(value).reshape(())
    write_family(tmp_path, family)
    return tmp_path


def config(place, **fields):
    models = [str(place / name) for name in "ab"]
    return parse_sweep({"models": models, "include": ["logit_scale"], **(fields or SPACE)}, study=True)


def score(path):
    """Two goals that pull apart."""
    value = float(np.ravel(worker.read_model(path)["logit_scale"])[0])
    return {"near": -abs(value - 0.6), "size": value}


def trials_of(out):
    return optuna.load_study(study_name="sweep", storage=f"sqlite:///{out}/study.db").trials


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_samplers_over_methods_ranges_and_choices(place, sampler):
    directions = {"near": "maximise", "size": "minimise"}
    results = run_study(config(place), place / "out", score, 6, sampler=sampler, directions=directions)
    assert [r.point for r in results] == list(range(6)) and len(trials_of(place / "out")) == 6
    for result, trial in zip(results, trials_of(place / "out"), strict=True):
        assert trial.values == [result.metrics["near"], result.metrics["size"]]
        given = result.hyperparameters
        assert given.keys() == {"t"} and 0.1 <= given["t"] <= 0.9 if result.method == "slerp" else True
        if result.method == "average":
            assert list(given["coefficients"]) in ([0.3, 0.7], [1, 2])
    assert len({r.method for r in results}) == 2
    assert (place / "out" / "sweep.html").exists() and (place / "out" / "results.parquet").exists()


def test_cmaes_moves_towards_the_best(place):
    chosen = config(place, method="slerp", axes={"t": {"low": 0.01, "high": 0.99}})
    results = run_study(chosen, place / "out", score, 16, sampler="cmaes", directions={"near": "maximise"})
    first, last = ([r.metrics["near"] for r in part] for part in (results[:4], results[-4:]))
    assert max(last) > max(first) - 1e-9 and sum(last) > sum(first)


def test_a_grid_is_done_once_and_ends(place):
    chosen = config(place, method="slerp", axes={"t": {"low": 0.2, "high": 0.8, "count": 4}})
    results = run_study(chosen, place / "out", score, 50, sampler="grid", directions={"size": "maximise"})
    assert sorted(r.hyperparameters["t"] for r in results) == [0.2, 0.4, 0.6, 0.8]


def test_a_study_goes_on_and_scores_no_setting_twice(place):
    chosen = config(place, method="slerp", axes={"t": [0.2, 0.4]})
    asked = []

    def count(path):
        asked.append(path.name)
        return score(path) | {"lost": float("nan")}

    first = run_study(chosen, place / "out", count, 3, sampler="random", directions={"near": "maximise"})
    again = run_study(chosen, place / "out", count, 8, sampler="random", directions={"near": "maximise"})
    assert again[:3] == first and len(again) == 8 and len(asked) == len({r.hyperparameters["t"] for r in again})
    assert len(read_results(place / "out")) == 8
    with pytest.raises(RefusedError, match=r"another sweep \(objectives differs"):
        run_study(chosen, place / "out", count, 8, directions={"size": "maximise"})
    other = {"storage": f"sqlite:///{place}/out/study.db", "directions": {"size": "maximise"}}
    with pytest.raises(RefusedError, match="holds another study named 'sweep'"):
        run_study(chosen, place / "elsewhere", count, 8, **other)
    with pytest.raises(RefusedError, match="the score has no what; it has near, size, lost"):
        run_study(chosen, place / "third", count, 8, directions={"what": "maximise"})
    results = run_study(chosen, place / "fourth", count, 2, directions={"lost": "maximise"})
    assert all(r.problem == "lost is not finite" for r in results) and len(results) == 2


def test_trees_are_merged_in_memory_with_decompositions_kept(place):
    rng = np.random.default_rng(0)
    trees = [{"dense": {"kernel": jnp.asarray(rng.normal(size=(6, 5)))}} for _ in range(3)]
    space = {"rank": {"low": 1, "high": 4}, "scale": {"low": 0.5, "high": 2.0}}
    chosen = parse_sweep({"models": ["a", "b", "c"], "method": "relative", "axes": space}, study=True)
    seen = []

    def evaluate(tree):
        seen.append(tree["dense"]["kernel"])
        return float(jnp.abs(seen[-1]).sum())

    results = run_study(chosen, place / "out", evaluate, 4, trees=trees)
    last = results[-1]
    expected, _ = merge(trees, "relative", **last.hyperparameters)
    np.testing.assert_allclose(seen[-1], expected["dense"]["kernel"], atol=1e-9)
    assert len(seen) == 4 and all(1 <= r.hyperparameters["rank"] <= 4 for r in results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "cmaes", "directions": {"a": "maximise", "b": "minimise"}}, "takes one objective"),
        ({"sampler": "guess"}, "sampler must be one of"),
        ({"sampler": "grid"}, "axes.t: the sampler grid needs count"),
        ({"trials": 0}, "at least one trial"),
        ({"storage": "magic://place"}, "storage magic://place cannot be opened"),
    ],
)
def test_what_cannot_be_studied(place, options, message):
    options = {"trials": 2, **options}
    with pytest.raises(RefusedError, match=message):
        run_study(config(place), place / "out", score, options.pop("trials"), **options)


def test_workers_share_a_study_and_take_over_from_the_dead(place):
    """One worker dies in its first trial; two others do every trial, that one too, each once."""
    environment = os.environ | {"PYTHONPATH": ":".join([str(Path(__file__).parents[1]), *sys.path])}

    def start(*more):
        command = [sys.executable, worker.__file__, str(place), str(place / "out"), "9", *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    dying = start("die")
    dying.communicate(timeout=120)
    assert dying.returncode < 0
    workers = [start(), start()]
    printed = [process.communicate(timeout=200) for process in workers]
    assert [process.returncode for process in workers] == [0, 0], printed
    assert [out.strip() for out, _ in printed] == ["9", "9"]
    trials = trials_of(place / "out")
    states = Counter(trial.state.name for trial in trials)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert states["COMPLETE"] == 9 and set(states) == {"COMPLETE", "FAIL"}
    assert trials[0].state.name == "FAIL"  # the dead worker's, done again with its parameters
    assert sum(trial.params == trials[0].params for trial in done) == 1
    calls = [line.split() for line in (place / "calls").read_text().splitlines()]
    assert len({name for _, name in calls}) == len(calls) == 10  # no trial was scored twice
    assert len({pid for pid, _ in calls}) == 3  # both workers took part
    assert len({trial.params["t"] for trial in done}) == 9  # and drew numbers of their own
    assert {r.point for r in read_results(place / "out")} == {trial.number for trial in done}
    assert not (place / "out" / "models").exists()  # what the dead one left is gone too
