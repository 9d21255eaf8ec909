"""The harness on problems with known answers: what is best, what is picked, what is paired, what is refused."""

import dataclasses
import json
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax import Method, merge
from rgsp_jax.method import Hyperparameter
from rgsp_jax.types import MergeOutput

SIZE = (6, 5)


@pytest.fixture(scope="module")
def harness(script):
    return script("harness")


@pytest.fixture(scope="module")
def contenders(script):
    return script("contenders")


@pytest.fixture(scope="module")
def tables(script):
    return script("tables")


def draw_tree(seed):
    rng = np.random.default_rng(seed)
    return {"layer": {"kernel": jnp.asarray(rng.normal(size=SIZE)), "bias": jnp.asarray(rng.normal(size=SIZE[1]))}}


def distance(a, b):
    return float(
        np.sqrt(
            sum(
                np.sum((np.asarray(x) - np.asarray(y)) ** 2) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
            )
        )
    )


def make_quadratic(contenders, seed=0, count=3, optimum=None, **beside):
    """Every task is a paraboloid around its expert, or around `optimum`; accuracy 1 / (1 + mean squared distance)."""
    experts = [draw_tree((seed, i)) for i in range(count)]

    def score(tree, part):
        goals = experts if optimum is None else [optimum(part, experts)] * count
        return [1 / (1 + distance(tree, goal) ** 2 / 35) for goal in goals]

    return contenders.Problem(experts, [f"task {i}" for i in range(count)], score, seed, {"size": 5}, **beside)


def find(outcomes, method, column="untuned"):
    (found,) = [o for o in outcomes if (o.method, o.column) == (method, column)]
    return found


def test_average_is_best_on_equal_paraboloids(harness, contenders):
    problem = make_quadratic(contenders, base=draw_tree(99))
    names = ["average", "task_arithmetic", "ties"]
    outcomes = harness.run(problem, contenders.make_contenders(names))
    assert [o.method for o in outcomes[:2]] == ["individual", "zero-shot base"]
    assert find(outcomes, "individual").test == {f"task {i}": 1.0 for i in range(3)}
    mean = jax.tree.map(lambda *x: sum(x) / 3, *problem.experts)
    average = find(outcomes, "average")
    assert list(average.test.values()) == pytest.approx(problem.score(mean, "test"))
    assert average.normalised == pytest.approx(np.mean(problem.score(mean, "test")))  # individuals have 1
    for name in names[1:]:
        assert find(outcomes, name, "tuned").mean < average.mean
    # The average is task arithmetic at 1/3; of the grid .3 is nearest to it.
    assert find(outcomes, "task_arithmetic", "tuned").setting == {"scale": 0.3}
    assert find(outcomes, "task_arithmetic").setting == {}


def test_validation_chooses_and_test_does_not(harness, contenders):
    """Validation wants scale .2 and the test rows .9: .2 must be reported, with what it gives on the test rows."""
    base = draw_tree(7)

    def at(scale, experts):
        return merge(experts, "task_arithmetic", base=base, scale=scale)[0]

    asked = []

    def optimum(part, experts):
        asked.append(part)
        return at({"validation": 0.2, "test": 0.9}[part], experts)

    problem = make_quadratic(contenders, optimum=optimum, base=base)
    (contender,) = contenders.make_contenders(["task_arithmetic"])
    outcomes = harness.run(problem, [contender])
    tuned = find(outcomes, "task_arithmetic", "tuned")
    assert tuned.setting == {"scale": 0.2}
    assert list(tuned.test.values()) == pytest.approx(problem.score(at(0.2, problem.experts), "test"), rel=1e-5)
    assert np.mean(list(tuned.validation.values())) == pytest.approx(1, rel=1e-5)
    # Test rows: three experts, the base, untuned, tuned, and the score by hand above. Nothing else looked at them.
    assert asked.count("test") == 3 + 1 + 2 + 1
    assert asked.count("validation") == 1 + len(contender.settings) - 1


def test_ties_go_to_the_defaults_and_what_is_not_finite_loses(harness):
    assert harness.pick([[0.5, 0.7], [0.7, 0.5], [0.6, 0.5]]) == 0
    assert harness.pick([[0.5, 0.5], [0.7, 0.5], [0.5, 0.7]]) == 1
    assert harness.pick([[np.nan, 0.9], [0.1, 0.1]]) == 1


def toy(stack, base, scale: Any = 1.0, power: Any = 2):
    """A method with a traced and a static hyperparameter."""
    return MergeOutput(base + jnp.asarray(scale, stack.dtype) * jnp.sum((stack - base[None]) ** power, axis=0), {})


def test_batched_settings_are_single_merges(contenders):
    """Traced hyperparameters run as one batch, static ones apart; each tree is that of its own setting."""
    hints = {"scale": Hyperparameter("factor"), "power": Hyperparameter("exponent", static=True, whole=True)}
    toy.__annotations__ |= {name: Annotated[Any, hint] for name, hint in hints.items()}
    method = Method("toy", toy, "For this test.", needs=frozenset({"base"}))
    contender = contenders.make_contender(method, grid={"power": (1, 2), "scale": (0.5, 0.25)}, scale=2.0)
    problem = make_quadratic(contenders, seed=3, base=draw_tree(5))
    assert contender.settings[0] == {"scale": 2.0}
    assert len(contender.settings) == 5
    before = contenders.compile_merge.cache_info().misses
    trees = list(contenders.merge_settings(contender, problem, contender.settings))
    assert contenders.compile_merge.cache_info().misses == before + 3  # no power given, power 1, power 2
    for setting, tree in zip(contender.settings, trees, strict=True):
        single = merge(problem.experts, method, base=problem.base, **setting)[0]
        np.testing.assert_allclose(tree["layer"]["kernel"], single["layer"]["kernel"], rtol=1e-12)
        np.testing.assert_allclose(tree["layer"]["bias"], single["layer"]["bias"], rtol=1e-12)


def test_random_methods_draw_by_the_problem_s_seed(contenders):
    (contender,) = contenders.make_contenders(["dare"])
    problem = make_quadratic(contenders, seed=3, base=draw_tree(5))
    trees = list(contenders.merge_settings(contender, problem, [{}, {"drop_rate": 0.5}, {"drop_rate": 0.9}]))
    single = jax.jit(lambda models, base: merge(models, "dare", base=base, key=jax.random.key(3))[0])
    assert distance(trees[0], single(problem.experts, problem.base)) < 1e-6
    assert distance(trees[2], trees[0]) < 1e-6 < distance(trees[1], trees[0])
    other = next(contenders.merge_settings(contender, dataclasses.replace(problem, seed=4), [{}]))
    assert distance(other, trees[0]) > 0.1


def test_fisher_row_is_the_weighted_average(contenders):
    problem = make_quadratic(contenders, fishers=[jax.tree.map(jnp.square, draw_tree((9, i))) for i in range(3)])
    (merged,) = contenders.merge_settings(contenders.FISHER, problem, [{"floor": 0.0}])
    for path, leaf in jax.tree.leaves_with_path(merged):
        models, weights = (
            np.stack([dict(jax.tree.leaves_with_path(tree))[path] for tree in trees])
            for trees in (problem.experts, problem.fishers)
        )
        np.testing.assert_allclose(leaf, (models * weights).sum(0) / weights.sum(0), rtol=1e-6)


def test_what_does_not_fit_is_left_out(harness, contenders):
    problem = make_quadratic(contenders)
    ran = {
        o.method
        for o in harness.run(problem, contenders.make_contenders(["average", "slerp", "ties", "regmean", "fisher"]))
    }
    assert ran == {"individual", "average"}
    with pytest.raises(ValueError, match="'no_such', 'sequential_graft'"):
        contenders.make_contenders(["average", "no_such", "sequential_graft"])


def test_every_grid_names_hyperparameters_and_values_that_its_method_takes(contenders):
    rows = {contender.name: contender for contender in contenders.make_contenders(list(contenders.GRIDS))}
    for name, method in ((n, contenders.methods[n]) for n in rows if n != "fisher"):
        assert [problem for setting in rows[name].settings for problem in method.problems(setting)] == []
        kind = "data" if "covariances" in method.needs else "base" if "base" in method.needs else ""
        assert rows[name].kind == kind


def outcome(harness, method, seed, accuracy, column="untuned"):
    return harness.Outcome({"K": 2}, seed, method, "", column, {}, None, {"a": accuracy, "b": accuracy}, accuracy)


def test_differences_are_paired_by_seed(harness):
    ours, theirs = {0: 0.7, 1: 0.9, 2: 0.75}, {2: 0.7, 0: 0.6, 1: 0.85}
    rows = [outcome(harness, name, s, a) for name, x in (("average", theirs), ("ours", ours)) for s, a in x.items()]
    summary = {s.method: s for s in harness.summarise(rows)}["ours"]
    gains = np.array([0.1, 0.05, 0.05])
    assert summary.over_average.mean == pytest.approx(gains.mean())
    assert summary.over_average.standard_error == pytest.approx(np.sqrt(((gains - gains.mean()) ** 2).sum() / 2 / 3))
    assert summary.over_average.least == pytest.approx(0.05)
    assert summary.accuracy.standard_error == pytest.approx(np.std([0.7, 0.9, 0.75], ddof=1) / 3**0.5)
    assert summary.over_tsv_m is None
    with pytest.raises(ValueError, match="twice"):
        harness.summarise([*rows, rows[0]])


def test_differences_keep_to_the_seeds_that_both_have(tables):
    found = tables.compare({0: 1.0, 1: 3.0, 5: 9.0}, {1: 1.0, 0: 0.5, 7: 0.0})
    assert (found.mean, found.repetitions, found.least) == (1.25, 2, 0.5)
    assert tables.compare({0: 1.0}, {1: 1.0}) is None
    assert tables.estimate([0.5]).standard_error is None
    with pytest.raises(ValueError, match="no repetitions"):
        tables.estimate([])
    with pytest.raises(ValueError, match="2 cells"):
        tables.table(["a", "b"], [["1"]])


def test_tables_pictures_and_records(harness, tables, tmp_path):
    pairs = (("average", 0.6), ("tsv_m", 0.7), ("ours", 0.65))
    rows = [
        outcome(harness, name, seed, a + 0.01 * seed, column)
        for name, a in pairs
        for seed in (0, 1)
        for column in ("untuned", "tuned")
    ]
    text = harness.tabulate(rows)
    assert "| ours |  | 0.655 (0.005) / 0.655 (0.005) |" in "\n".join(text)
    assert "| ours |  | 0.655 (0.005) | +0.050 (0.000) | +0.050 | -0.050 (0.000) |" in "\n".join(text)
    headline = harness.find_headline(rows)
    assert "average 0.605" in headline and "best of the models alone: tsv_m 0.705" in headline
    tables.write_results(tmp_path / "name", "python x.py", headline, harness.to_record(rows), text)
    harness.draw(rows, tmp_path / "name.png")
    record = json.loads((tmp_path / "name.json").read_text())
    assert (record["command"], record["headline"]) == ("python x.py", headline)
    assert len(record["outcomes"]) == len(rows)
    assert (tmp_path / "name.png").stat().st_size > 1000
    assert [f.name for f in dataclasses.fields(harness.Summary)] == list(record["summaries"][0])


def test_compiled_functions_are_forgotten_when_there_are_many(script):
    compilations = script("compilations")
    traces = []

    @jax.jit
    def count(x):
        traces.append(x)
        return x + 1

    count(1.0)
    compilations.drop_compilations(limit=10**6)
    count(1.0)
    assert len(traces) == 1
    compilations.drop_compilations(limit=10)
    count(1.0)
    assert len(traces) == (2 if compilations.MAPS.exists() else 1)
