"""The suite of `relative`: its halves, paired differences, what it keeps, its variants and its character tasks."""

import jax
import numpy as np
import pytest

import rgsp_jax


@pytest.fixture(scope="module")
def suite(script):
    return script("relative_suite")


@pytest.fixture(scope="module")
def variants(script):
    return script("relative_variants")


@pytest.fixture(scope="module")
def characters(script):
    return script("character_tasks")


def make_row(suite, method, accuracy, seed=0, experts=3, regime="labels", rho=0.05):
    return suite.Row("digits", regime, "width 64", experts, seed, rho, method, accuracy)


def test_the_test_half_scores_what_was_chosen_alone(suite):
    chosen = [list(settings) for _, settings in suite.make_rows("test", candidates=False)]
    assert all(len(names) == 1 for names in chosen)
    assert sum(len(settings) for _, settings in suite.make_rows("development", candidates=True)) > 40


def test_halves_share_no_seed(suite):
    halves = list(suite.HALVES.values())
    assert not set(halves[0].seeds) & set(halves[1].seeds)
    assert not set(halves[0].text_seeds) & set(halves[1].text_seeds)


def test_the_error_is_over_seeds_and_the_worst_over_problems(suite):
    rows = [make_row(suite, "average", 0.5, seed, 3, regime) for seed in (0, 1) for regime in ("labels", "mixed")]
    gains = {(0, "labels"): 0.1, (0, "mixed"): 0.3, (1, "labels"): -0.1, (1, "mixed"): 0.1}
    rows += [make_row(suite, "relative", 0.5 + gain, *key[:1], 3, key[1]) for key, gain in gains.items()]
    found = suite.estimate_over_seeds(suite.differ(rows, "relative", "average"))
    assert found.mean == pytest.approx(0.1) and found.least == pytest.approx(-0.1) and found.repetitions == 4
    assert found.standard_error == pytest.approx(np.std([0.2, 0.0], ddof=1) / np.sqrt(2))
    text = "\n".join(suite.tabulate([*rows, *(make_row(suite, "individual", 1.0, s) for s in (0, 1))]))
    assert "| relative | 0.6000 | +0.1000 (0.1000) | -0.1000 | 1 |" in text


def test_problems_that_only_one_has_do_not_count(suite):
    rows = [make_row(suite, "average", 0.5), make_row(suite, "relative", 0.6), make_row(suite, "relative", 0.9, seed=1)]
    assert list(suite.differ(rows, "relative", "average").values()) == [pytest.approx(0.1)]


def test_what_was_scored_is_not_scored_again(suite, tmp_path):
    made = []

    def make():
        made.append(1)
        rng = np.random.default_rng(0)
        trees = [{"layer": {"kernel": rng.normal(size=(6, 5)).astype(np.float32)}} for _ in range(3)]
        return suite.Problem(
            trees, ["a", "b", "c"], lambda tree, part: [float(np.mean(tree["layer"]["kernel"]))] * 3, 0, base=trees[0]
        )

    cell = suite.Cell("digits", "labels", "none", 3, 0, make)
    contenders = [row for row in suite.make_rows("test", candidates=False) if row[0].name in ("average", "rgsp")]
    first = suite.score(cell, contenders, tmp_path)
    assert [r.method for r in first] == ["individual", "average"]  # rgsp takes two models
    assert suite.score(cell, contenders, tmp_path) == first and len(made) == 1
    mean = np.mean([x["layer"]["kernel"] for x in make().experts])
    assert {r.method: r.accuracy for r in first}["average"] == pytest.approx(mean, abs=1e-6)


@pytest.mark.slow
def test_every_variant_is_finite_and_a_merge_of_its_own(suite, variants):
    """All candidates and ablations of a stack in one compiled call, as the suite makes it; the first is `relative`."""
    rng = np.random.default_rng(0)
    stack = rng.normal(size=(3, 9, 8)) + 3 * rng.normal(size=(9, 8))
    settings = {**suite.CANDIDATES, **suite.ABLATIONS, **suite.SHARP, **suite.FUSED}
    problem = suite.Problem([{"kernel": x} for x in stack], list("abc"), lambda tree, part: [0.0] * 3, 0)
    contender = suite.make_contender(variants.VARIANT, grid={})
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        trees = suite.merge_settings(contender, problem, list(settings.values()))
        merged = {name: np.asarray(tree["kernel"]) for name, tree in zip(settings, trees, strict=True)}
    winner = merged.pop("winner")
    np.testing.assert_allclose(winner, rgsp_jax.methods["relative"](stack).merged, rtol=1e-9, atol=1e-9)
    for name, found in merged.items():
        assert np.isfinite(found).all(), name
    # Where every direction passes a rule of the rank, the merge stays as it is; nothing else may leave it so.
    rules = {name for name in merged if name.startswith("rank:")}
    assert {name for name, found in merged.items() if np.allclose(found, winner, rtol=1e-9, atol=1e-9)} <= rules


def test_characters_are_rewritten_as_the_tasks_say(characters):
    words = np.arange(8)[None]
    rewritten = {name: task(words)[0].tolist() for name, task in characters.TASKS.items()}
    assert rewritten["reverse"] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert rewritten["next_letter"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rewritten["rotate"] == [1, 2, 3, 4, 5, 6, 7, 0]
    assert rewritten["swap_neighbours"] == [1, 0, 3, 2, 5, 4, 7, 6] == rewritten["odd_even_letters"]
    assert rewritten["complement"] == [15, 14, 13, 12, 11, 10, 9, 8]
    assert rewritten["swap_halves"] == [4, 5, 6, 7, 0, 1, 2, 3]
    assert rewritten["mirror"] == [0, 1, 2, 3, 3, 2, 1, 0]
    rng = np.random.default_rng(0)
    tokens = characters.write(None, characters.draw_words(rng, 50), rng)
    for row in tokens:
        task = list(characters.TASKS.values())[row[0] - characters.BAR - 1]
        assert row[9] == characters.BAR and row[10:].tolist() == task(row[None, 1:9])[0].tolist()


def test_a_decoder_learns_a_task_and_the_score_sees_it(characters, monkeypatch):
    monkeypatch.setattr(characters, "STEPS", 120)
    monkeypatch.setattr(characters, "ANCESTOR_STEPS", 120)
    characters.train_ancestor.cache_clear()
    problem = characters.make_problem(16, 3e-3, 0, 2)
    own = [problem.score(expert, "test")[i] for i, expert in enumerate(problem.experts)]
    base = problem.score(problem.base, "test")
    assert all(after > before + 0.02 for after, before in zip(own, base, strict=True))
    characters.train_ancestor.cache_clear()
    characters.train_expert.cache_clear()


@pytest.fixture(scope="module")
def others(script):
    return script("relative_others")


def draw_trees(count=3):
    rng = np.random.default_rng(0)
    ancestor = {name: rng.normal(size=shape) for name, shape in (("query", (6, 8)), ("out", (8, 6)))}
    bias = rng.normal(size=8)

    def draw():
        attention = {
            n: {"kernel": (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)} for n, x in ancestor.items()
        }
        return {"attention": attention | {"norm": {"scale": (bias + rng.normal(size=8)).astype(np.float32)}}}

    return [draw() for _ in range(count)]


def test_heads_are_merged_by_themselves_and_put_back(others):
    trees = draw_trees()
    merged = others.merge_heads({"experts": trees})["attention"]
    whole = rgsp_jax.merge(trees, "relative")[0]["attention"]
    for head in range(4):
        own = [{"kernel": tree["attention"]["query"]["kernel"][:, 2 * head : 2 * head + 2]} for tree in trees]
        expected = rgsp_jax.merge(own, "relative")[0]["kernel"]
        np.testing.assert_allclose(merged["query"]["kernel"][:, 2 * head : 2 * head + 2], expected, atol=1e-5)
    np.testing.assert_allclose(merged["out"]["kernel"], whole["out"]["kernel"], atol=1e-6)
    assert np.abs(merged["query"]["kernel"] - whole["query"]["kernel"]).max() > 1e-3


def test_vectors_by_rule(others):
    trees = draw_trees()
    stack = np.stack([tree["attention"]["norm"]["scale"] for tree in trees])
    median = np.median(stack, axis=0)
    found = others.merge_vectors({"experts": trees}, ancestor=1.0, departures=0.3)["attention"]
    np.testing.assert_allclose(found["norm"]["scale"], median + 0.3 * (stack - median).sum(0), atol=1e-6)
    whole = rgsp_jax.merge(trees, "relative")[0]["attention"]
    np.testing.assert_allclose(found["query"]["kernel"], whole["query"]["kernel"], atol=1e-6)


def test_the_odds_of_who_moved(others):
    """Certain of every departure it is `relative`; of two models it finds the one that left zero."""
    rng = np.random.default_rng(3)
    stack = rng.normal(size=(3, 9, 8)) + 3 * rng.normal(size=(9, 8))
    certain = others.merge_outward(stack, rank=2, strength=0.0, level=40.0).merged
    np.testing.assert_allclose(certain, rgsp_jax.methods["relative"](stack, rank=2).merged, atol=1e-8)
    ancestor = 0.01 * rng.normal(size=(16, 16))
    moved = ancestor + np.outer(*rng.normal(size=(2, 16)))
    found = others.merge_outward(np.stack([ancestor, moved]), rank=1, strength=20.0, scale=1.0).merged
    np.testing.assert_allclose(found, moved, atol=0.01)
