"""Sweeps of checkpoints: every point is the merge it says, scored once, and told of in tables and a page."""

import csv
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pyarrow import parquet

from pipeline.toy_models import read_model, toy_family, write_family
from rgsp_jax import merge
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import merge_checkpoints
from rgsp_jax.sweep import Result, mark_front, parse_sweep, run_sweep, score_by_command
from rgsp_jax.sweep import run as running
from rgsp_jax.sweep.checkpoints import Shelf

pytestmark = pytest.mark.usefixtures("plain_report")
QUERY, INNER, EXPERTS = "encoder.layer.*.query.weight", "encoder.layer.*.intermediate.dense.weight", "moe.experts.*"


@pytest.fixture
def place(tmp_path):
    write_family(tmp_path, toy_family(3))
    return tmp_path


def config(place, models="ab", **fields):
    return parse_sweep({"models": [str(place / name) for name in models], **fields})


def read_score(path):
    """A number that every weight has a part in, and another."""
    model = read_model(path)
    return {
        "size": sum(float(np.abs(x.astype(np.float64)).sum()) for x in model.values()),
        "scale": float(model["logit_scale"]),
    }


@pytest.mark.parametrize(
    ("models", "fields"),
    [
        pytest.param(
            "ab",
            {"include": [QUERY], "axes": {"rank": [2, 0.75], "beta": [1.0, 3.0], "epsilon": [0.05, 0.2]}},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "abc",
            {"include": [QUERY, INNER, EXPERTS], "axes": {"rank": [1, 5], "scale": [0.7, 0.5]}},
            marks=pytest.mark.slow,
        ),
        ("abc", {"include": [EXPERTS], "axes": {"rank": [2, 0.75], "scale": [0.5, 1.5]}}),
        ("abc", {"base": "c", "method": ["iso_c", "ties"], "include": [QUERY], "axes": {"scale": [0.5, 1.0]}}),
        ("ab", {"method": ["slerp", "average"], "points": [{"method": "slerp", "t": 0.2}, {"method": "average"}]}),
    ],
)
def test_points_are_the_merges_of_their_configs(place, models, fields):
    if "base" in fields:
        fields = fields | {"base": str(place / fields["base"])}
    chosen, seen = config(place, models, **fields), {}

    def evaluate(path):
        seen[path.name] = read_model(path)
        return len(seen)

    results = run_sweep(chosen, place / "out", evaluate)
    assert [r.metrics["score"] for r in sorted(results, key=lambda r: r.metrics["score"])] == [
        float(i + 1) for i in range(len(results))
    ]
    for point, result in zip(chosen.plan_points(), results, strict=True):
        wanted = chosen.merge_config(point.method, point.hyperparameters)
        if point.index in (0, len(results) - 1):
            expected = read_model(merge_checkpoints(wanted, place / f"expected-{point.index}").out)
            ours = seen[f"point-{point.index:05d}"]
            assert ours.keys() == expected.keys()
            for name, x in expected.items():
                np.testing.assert_allclose(ours[name], x, rtol=0, atol=2e-4, err_msg=name)
        assert (result.point, result.method) == (point.index, point.method)
    assert {p.name for p in (place / "out").iterdir()} == {
        "results.jsonl", "results.csv", "results.parquet", "sweep.html", "sweep.json"
    }  # fmt: skip


def test_decompositions_are_made_once_and_may_lie_in_a_file(place, monkeypatch):
    fields = {"include": [QUERY, EXPERTS], "axes": {"rank": [1, 3], "scale": [0.5, 1.0, 2.0]}}
    calls = []

    def count(name):
        compiled = getattr(running.SharedStages.compute.__globals__["compile_" + name], "__wrapped__", None)
        original = running.SharedStages.compute.__globals__["compile_" + name]
        assert compiled is not None

        def counting(*arguments):
            step = original(*arguments)
            return lambda *operands: calls.append(name) or step(*operands)

        monkeypatch.setitem(running.SharedStages.compute.__globals__, "compile_" + name, counting)

    for name in ("prepare", "solve", "build"):
        count(name)
    chosen = config(place, "abc", **fields)
    in_memory = run_sweep(chosen, place / "memory", read_score)
    assert calls.count("prepare") == 2 and calls.count("solve") == 4  # shapes, and ranks of them
    assert calls.count("build") == 12
    calls.clear()
    monkeypatch.setattr(running, "sharing", lambda ranks, out, *_: sharing_little(ranks, out))
    in_file = run_sweep(chosen, place / "file", read_score)
    assert calls.count("prepare") == 2 and calls.count("solve") == 12
    for ours, theirs in zip(in_file, in_memory, strict=True):
        assert ours.metrics == pytest.approx(theirs.metrics, rel=1e-6)


class sharing_little:
    """Stages that may keep nothing in memory."""

    def __init__(self, ranks, out):
        self.stages = running.SharedStages(ranks, out, 1)

    def __enter__(self):
        return self.stages

    def __exit__(self, *error):
        assert self.stages.parts.spilled and not self.stages.parts.held and not self.stages.solutions
        self.stages.close()


def test_a_shelf_gives_back_what_was_put(tmp_path):
    shelf, rng = Shelf(tmp_path, 500), np.random.default_rng(0)
    rows = {i: [rng.normal(size=(3, 5)), np.arange(i), np.array(True)] for i in range(8)}
    for key, own in rows.items():
        shelf.put(key, own)
        shelf.put(key, [])  # what is there stays
    assert 0 < len(shelf.held) < 8 and len(shelf.spilled) == 8 - len(shelf.held)
    for key in (7, 0, 3, 7):
        for ours, theirs in zip(shelf.get(key), rows[key], strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_array_equal(ours, theirs)
    assert 9 not in shelf and not list(tmp_path.iterdir())
    shelf.close()


def test_a_run_goes_on_behind_what_is_scored(place):
    fields = {"method": "slerp", "axes": {"t": [0.2, 0.4, 0.6]}}
    asked = []

    def tire(path):
        asked.append(path.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return len(asked)

    with pytest.raises(KeyboardInterrupt):
        run_sweep(config(place, **fields), place / "out", tire)
    with (place / "out" / "results.jsonl").open("a") as file:
        file.write('{"point": 2, "meth')  # a line cut short is no result
    results = run_sweep(config(place, **fields), place / "out", tire, stamp=None)
    assert asked == ["point-00000", "point-00001", "point-00002", "point-00002"]
    assert [r.metrics["score"] for r in results] == [1.0, 2.0, 4.0]
    assert len((place / "out" / "results.jsonl").read_text().splitlines()) == 3
    assert run_sweep(config(place, **fields), place / "out", tire) == results and len(asked) == 4
    with pytest.raises(RefusedError, match=r"holds another sweep \(config differs"):
        run_sweep(config(place, method="slerp", axes={"t": [0.3]}), place / "out", tire)


def test_merges_are_kept_with_their_reports_where_asked(place):
    chosen = config(place, method="slerp", axes={"t": [0.25]})
    run_sweep(chosen, place / "out", read_score, keep=True)
    model = place / "out" / "models" / "point-00000"
    assert (model / "report.html").exists() and "t: 0.25" in (model / "merge_config.yaml").read_text()


def test_a_point_that_cannot_be_merged_is_told_and_the_others_go_on(place):
    (place / "a").rename(place / "first")
    family = toy_family(2, dtypes=("float32", "float32"))
    family[0]["encoder.layer.0.attention.self.query.weight"] *= np.float32(6e4)
    write_family(place, family)
    chosen = config(place, dtype="float16", method="average", axes={"coefficients": [[0.9, 0.1], [0.0, 1.0]]})
    first, second = run_sweep(chosen, place / "out", read_score)
    assert "query.weight" in first.problem and not first.metrics
    assert not second.problem and second.metrics
    assert "1 points without a score" in (place / "out" / "sweep.html").read_text()


def test_models_that_are_not_sound_stop_the_sweep(place):
    family = toy_family(2)
    family[1]["logit_scale"] = np.float32(np.nan).reshape(())
    write_family(place, family)
    with pytest.raises(RefusedError, match="logit_scale"):
        run_sweep(config(place, method="slerp", axes={"t": [0.2, 0.4]}), place / "out", read_score)
    assert (place / "out" / "results.jsonl").read_text() == ""


def test_trees_are_scored_in_memory(place):
    trees = [{"dense": {"kernel": jnp.asarray(x["encoder.layer.0.attention.self.query.weight"])}} for x in
             map(read_model, (place / k for k in "abc"))]  # fmt: skip
    chosen = config(place, "abc", axes={"rank": [1, 4], "scale": [0.5, 1.5]})
    results = run_sweep(chosen, place / "out", lambda tree: float(jnp.abs(tree["dense"]["kernel"]).sum()), trees=trees)
    for result in results:
        expected, _ = jax.jit(lambda trees, s, r=result: merge(trees, rank=r.hyperparameters["rank"], scale=s))(
            trees, jnp.float32(result.hyperparameters["scale"])
        )
        assert result.metrics["score"] == pytest.approx(float(jnp.abs(expected["dense"]["kernel"]).sum()), rel=1e-5)
    assert not (place / "out" / "models").exists()


def test_tables_and_page_hold_every_point(place):
    chosen = config(place, method=["slerp", "average"], axes={"t": [0.2, 0.8], "coefficients": [[0.3, 0.7]]})
    results = run_sweep(chosen, place / "out", lambda path: read_score(path) | {"lost": float("nan")})
    with (place / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(place / "out" / "results.parquet").to_pydict()
    assert list(rows[0]) == list(table)
    assert table["t"] == [0.2, 0.8, None] and table["coefficients"] == [None, None, "[0.3, 0.7]"]
    assert table["lost"] == [None] * 3 and table["size"] == [r.metrics["size"] for r in results]
    assert [float(row["scale"]) for row in rows] == table["scale"]
    page = (place / "out" / "sweep.html").read_text()
    data = json.loads(re.search(r'id="sweep-data">(.*?)</script>', page, re.S)[1])
    assert [row["point"] for row in data["rows"]] == [0, 1, 2] and data["metrics"] == ["size", "scale", "lost"]
    outside = re.findall(r"(?:src|href|url\(|@import|fetch\()\s*=?\s*[\"']?(?!#)(https?:[^\"' >]*)", page)
    assert not outside and set(re.findall(r"https?://[^\"' ]*", page)) == {"http://www.w3.org/2000/svg"}


def test_the_front_is_what_nothing_beats():
    scores = [(1.0, 5.0), (2.0, 4.0), (2.0, 5.0), (3.0, 9.0), (None, 0.0), (2.0, 4.0)]
    results = [Result(i, "average", {}, {"up": a, "down": b}) for i, (a, b) in enumerate(scores)]
    assert mark_front(results, {"up": "maximise", "down": "minimise"}) == [False, True, False, True, False, True]
    assert mark_front(results, {"up": "maximise"}) == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("printed", "metrics", "found"),
    [
        ("loading\\n0.5", (), {"score": 0.5}),
        ("0.5 0.25", ("a", "b"), {"a": 0.5, "b": 0.25}),
        ("0.5, 0.25", ("a", "b"), {"a": 0.5, "b": 0.25}),
        ('{"a": 1, "b": 2}', (), {"a": 1.0, "b": 2.0}),
        ('{"a": 1, "b": 2}', ("b",), {"b": 2.0}),
        ("0.5 0.25", (), None),
        ("0.5", ("a", "b"), None),
        ("done", (), None),
        ("", (), None),
        ('{"a": "x"}', (), None),
        ('{"a": 1}', ("b",), None),
    ],
)
def test_what_a_command_may_print(tmp_path, printed, metrics, found):
    evaluate = score_by_command(f"printf '{printed}\\n' # {{model}}", metrics)
    if found is not None:
        assert evaluate(tmp_path) == found
        return
    with pytest.raises(RefusedError, match="the last line must be"):
        evaluate(tmp_path)
