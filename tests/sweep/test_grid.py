"""Sweep configs: which points there are, and every mistake at once."""

import pytest

from rgsp_jax.errors import RefusedError
from rgsp_jax.registry import methods
from rgsp_jax.sweep import Range, SweepConfig, parse_sweep, read_sweep
from rgsp_jax.sweep.grid import list_corners
from rgsp_jax.sweep.run import order_points
from rgsp_jax.sweep.staging import largest_ranks, ranks_of_space

PAIR = {"models": ["a", "b"]}


def settings(**fields):
    return [(p.method, dict(p.hyperparameters)) for p in parse_sweep(PAIR | fields).plan_points()]


def test_a_grid_is_every_combination_for_the_methods_that_have_the_axis():
    found = settings(
        method=["rgsp", "slerp"],
        hyperparameters={"projection": "one_sided"},
        axes={"rank": [4, 0.5], "beta": {"low": 1, "high": 100, "count": 3, "log": True}, "t": [0.2, 0.4]},
    )
    expected = [
        ("rgsp", {"projection": "one_sided", "rank": r, "beta": b}) for r in (4, 0.5) for b in (1.0, 10.0, 100.0)
    ]
    assert found == [*expected, ("slerp", {"t": 0.2}), ("slerp", {"t": 0.4})]


def test_points_are_taken_as_they_are_listed_and_once():
    found = settings(points=[{"rank": 8}, {"rank": 4, "beta": 2.0}, {"rank": 8}, {"method": "slerp", "t": 0.3}])
    assert found == [("rgsp", {"rank": 8}), ("rgsp", {"rank": 4, "beta": 2.0}), ("slerp", {"t": 0.3})]


@pytest.mark.parametrize(
    ("axis", "whole", "values"),
    [
        (Range(low=1, high=64, count=4, log=True), True, (1, 4, 16, 64)),
        (Range(low=1, high=3, count=9), True, (1, 2, 3)),
        (Range(low=0, high=1, count=3), False, (0.0, 0.5, 1.0)),
        (Range(low=0.1, high=0.7, count=4), False, (0.1, 0.3, 0.5, 0.7)),
    ],
)
def test_ranges(axis, whole, values):
    assert axis.values(whole) == values and [type(v) for v in axis.values(whole)] == [type(v) for v in values]


def test_ranges_of_ranks_are_whole_and_others_are_not():
    (first, *_, last) = settings(
        axes={"rank": {"low": 2, "high": 8, "count": 3}, "beta": {"low": 1, "high": 2, "count": 2}}
    )
    assert (first[1], last[1]) == ({"rank": 2, "beta": 1.0}, {"rank": 8, "beta": 2.0})
    assert isinstance(first[1]["rank"], int) and isinstance(first[1]["beta"], float)


@pytest.mark.parametrize(
    ("fields", "study", "messages"),
    [
        ({"method": "magic"}, False, ["no method 'magic'", "axes: name at least one"]),
        (
            {"axes": {"rank": [0], "beta": [-1]}},
            False,
            ["rank of method 'rgsp' must be", "beta of method 'rgsp' must be"],
        ),
        ({"axes": {"rnak": [4]}}, False, ["axes.rnak: method rgsp has no such hyperparameter; there are rank, beta"]),
        ({"axes": {"rank": []}}, False, ["axes.rank: give at least one value"]),
        ({"axes": {"rank": 4}}, False, ["axes.rank: give a list of values, or low and high"]),
        ({"axes": {"beta": {"low": 1, "high": 2}}}, False, ["axes.beta: give count"]),
        (
            {"axes": {"beta": {"low": 2, "high": 1, "count": 1}}},
            False,
            ["low must be less", "count must be at least 2"],
        ),
        ({"axes": {"beta": {"low": 0, "high": 1, "log": True, "count": 3}}}, False, ["starts above 0"]),
        ({"axes": {"geometry": {"low": 0, "high": 1, "count": 2}}}, False, ["axes.geometry: no range of numbers"]),
        ({"axes": {"rank": [4]}, "points": [{"rank": 4}]}, False, ["give axes or points, not both"]),
        (
            {"axes": {"rank": [4]}, "hyperparameters": {"rank": 3, "what": 1}},
            False,
            ["rank: fixed and swept", "hyperparameters.what"],
        ),
        ({"axes": {"active_rank": [4]}}, False, ["sweep rank"]),
        ({"points": [{"t": 0.5}]}, False, ["method 'rgsp' has no hyperparameter 't'"]),
        ({"points": [{"method": 3}]}, False, ["no method 3"]),
        ({"axes": {"rank": [4]}, "colour": 1}, False, ["colour: no such setting; there are models, method"]),
        ({"method": ["rgsp", "tsv_m"], "axes": {"scale": [1]}}, False, ["method 'tsv_m' needs --base"]),
        (
            {"axes": {"rank": [4]}, "dtype": "int8", "include": ["re:("]},
            False,
            ["dtype must be", "no regular expression"],
        ),
        (
            {"axes": {"beta": {"low": 0, "high": 1, "count": 5000}, "epsilon": {"low": 0.1, "high": 1, "count": 5}}},
            False,
            ["25000 points are too many"],
        ),
        (
            {"axes": {"epsilon": {"low": 0, "high": 1}, "beta": {"low": -1, "high": 1}}},
            True,
            ["epsilon of method", "beta of method"],
        ),
        ({"points": [{"rank": 4}]}, True, ["a study chooses its own points"]),
    ],
)
def test_mistakes_are_named_all_at_once(fields, study, messages):
    with pytest.raises(RefusedError) as refusal:
        parse_sweep(PAIR | fields, "sweep.yaml", study=study)
    assert len(refusal.value.problems) == len(messages), refusal.value.problems
    for message in messages:
        assert any(message in problem for problem in refusal.value.problems), refusal.value.problems
    assert all(problem.startswith("sweep.yaml: ") for problem in refusal.value.problems)


def test_a_config_survives_its_own_yaml(tmp_path):
    config = parse_sweep(
        PAIR | {"axes": {"rank": [4, 0.5], "epsilon": {"low": 1e-3, "high": 1, "log": True, "count": 3}}}
    )
    (tmp_path / "sweep.yaml").write_text(config.to_yaml())
    assert read_sweep(tmp_path / "sweep.yaml") == config


def test_a_base_goes_to_the_methods_that_use_it():
    config = parse_sweep(PAIR | {"base": "z", "method": ["tsv_m", "average"], "axes": {"scale": [1.0]}})
    merges = [config.merge_config(p.method, p.hyperparameters) for p in config.plan_points()]
    assert [(m.method, m.base) for m in merges] == [("tsv_m", "z"), ("average", None)]
    assert all(m.problems() == [] for m in merges)


def test_corners_hold_every_end_and_every_choice():
    axes = {"rank": Range(low=2, high=9), "beta": Range(low=1, high=3), "geometry": ("spectral", "orthonormal")}
    assert list_corners(axes, methods["rgsp"]) == [
        {"rank": 2, "beta": 1.0, "geometry": "spectral"},
        {"rank": 9, "beta": 3.0, "geometry": "orthonormal"},
    ]


def test_ranks_asked_for():
    config = parse_sweep(PAIR | {"axes": {"rank": {"low": 2, "high": 9, "count": 3}, "beta": [1, 2]}})
    assert largest_ranks(config.plan_points()) == {"rgsp": (2, 6, 9)}  # 5.5 rounds to even
    assert ranks_of_space(config) == {"rgsp": (9,)}
    assert ranks_of_space(SweepConfig(models=("a", "b"), axes={"beta": (1, 2)})) == {"rgsp": (64,)}


def test_points_that_share_solutions_follow_each_other():
    config = parse_sweep(PAIR | {"method": ["rgsp", "slerp"], "axes": {"beta": [1, 2], "rank": [2, 4], "t": [0.5]}})
    ordered = [(p.method, p.hyperparameters.get("rank")) for p in order_points(config.plan_points())]
    assert ordered == [("rgsp", 2), ("rgsp", 2), ("rgsp", 4), ("rgsp", 4), ("slerp", None)]
