"""The search of a merge coefficient by how little the answers change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax import merge
from rgsp_jax.merging import search_alpha


def count_changes(texts):
    """Entry by entry, as the paper's text has it."""
    changes = [np.inf]
    for i in range(1, len(texts) - 1):
        near = zip(texts[i - 1], texts[i], texts[i + 1], strict=True)
        changes.append(sum(not (before == now == after) for before, now, after in near))
    return [*changes, np.inf]


@pytest.mark.parametrize("seed", range(4))
def test_against_counting(seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, size=(7, 12, 2))
    alphas = np.linspace(0.4, 1.0, 7)
    found = jax.jit(search_alpha)(jnp.asarray(alphas), jnp.asarray(tokens))
    expected = count_changes([[tuple(x) for x in row] for row in tokens])
    np.testing.assert_array_equal(found.changes, expected)
    assert found.alpha == alphas[np.argmin(expected)]  # the first, the smallest, of equal ones
    np.testing.assert_array_equal(found.tied, np.asarray(expected) == min(expected))


def test_the_order_of_the_grid_and_the_form_of_the_answers_do_not_matter():
    rng = np.random.default_rng(5)
    logits, alphas = rng.normal(size=(6, 30, 3)), np.linspace(0, 1, 6)
    found = search_alpha(jnp.asarray(alphas), jnp.asarray(logits))
    shuffled = rng.permutation(6)
    other = search_alpha(jnp.asarray(alphas[shuffled]), jnp.asarray(logits[shuffled].argmax(-1)))
    assert other.alpha == found.alpha
    np.testing.assert_array_equal(other.changes, found.changes[shuffled])


def test_by_cosine_and_smoothed():
    rng = np.random.default_rng(6)
    answers = rng.normal(size=(6, 9, 4))
    answers[3, 2] = 0
    units = answers / np.maximum(np.linalg.norm(answers, axis=-1, keepdims=True), 1e-300)
    steps = [1 - np.mean((units[i] * units[i + 1]).sum(-1)) for i in range(5)]
    inner = np.array([steps[i] + steps[i + 1] for i in range(4)])
    found = search_alpha(jnp.arange(6.0), jnp.asarray(answers), "cosine")
    np.testing.assert_allclose(found.changes[1:-1], inner, rtol=1e-12)
    smooth = [inner[max(0, i - 1) : i + 2].mean() for i in range(4)]
    found = search_alpha(jnp.arange(6.0), jnp.asarray(answers), "cosine", smoothing=1)
    np.testing.assert_allclose(found.changes[1:-1], smooth, rtol=1e-12)
    assert float(found.alpha) == 1 + np.argmin(smooth)
    assert np.isinf(found.changes[0]) and np.isinf(found.changes[-1])


def test_a_plateau_of_answers_is_found_through_merges():
    """Two linear classifiers with the docstring's loop: between their two kinds of answers lies where nothing moves."""
    inputs = jnp.asarray(np.random.default_rng(7).normal(size=(40, 2)))
    models = [{"kernel": jnp.asarray(np.array([[8.0, -8.0], [0.0, 0.0]]))}, {"kernel": jnp.asarray(np.eye(2)[::-1])}]
    alphas = jnp.linspace(0, 1, 11)

    def merge_at(alpha):
        return merge(models, "average", coefficients=[alpha, 1 - alpha])[0]

    logits = jnp.stack([inputs @ merge_at(float(alpha))["kernel"] for alpha in alphas])
    found = search_alpha(alphas, logits)
    answers = np.asarray(logits.argmax(-1))
    assert (answers[0] != answers[-1]).mean() > 0.2 and found.alpha > 0.5
    assert found.changes[1] > found.changes[-2] == found.changes[found.tied][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.arange(2.0), np.zeros((2, 3))), "three candidates"),
        ((np.arange(4.0), np.zeros((3, 5))), r"4 candidates need responses \[4, inputs"),
        ((np.arange(4.0), np.zeros(4)), "inputs"),
        ((np.arange(4.0), np.zeros((4, 5)), "edit"), "exact, cosine"),
        ((np.arange(4.0), np.zeros((4, 5), int), "cosine"), "int64 have no cosine"),
    ],
)
def test_what_cannot_be_searched(arguments, message):
    with pytest.raises(ValueError, match=message):
        search_alpha(*arguments)
