"""The vocabulary of a donor's data, read off its embeddings."""

import numpy as np
import pytest

from rgsp_jax.activations.pseudo_inputs import SHORTEST, draw_pseudo_inputs, find_frame, find_moved


def test_pseudo_inputs_are_of_tokens_that_moved():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 8))
    other = table * (1 - 1e-5)  # decay of rows that were never looked up
    moved = np.array([101, 102, *range(200, 260)])
    other[moved] += 0.05 * rng.normal(size=(len(moved), 8))
    positions = np.zeros(64)
    positions[:20] = 1
    moves = find_moved(table, other)
    np.testing.assert_array_equal(np.flatnonzero(moves), moved)
    own = [[101, 7, 8, 102], [101, 9, 102]]
    drawn = draw_pseudo_inputs(moves, positions, own, 200, 48, seed=3)
    assert len(drawn) == 200
    assert {s[0] for s in drawn} == {101}
    assert {s[-1] for s in drawn} == {102}
    inside = np.concatenate([s[1:-1] for s in drawn])
    assert set(inside) == set(range(200, 260))
    assert np.mean(inside < 210) > 2 * np.mean(inside >= 250)
    assert {len(s) for s in drawn} == set(range(SHORTEST, 21))
    assert drawn == draw_pseudo_inputs(moves, positions, own, 200, 48, seed=3)


def test_without_a_table_of_positions_the_longest_is_given():
    drawn = draw_pseudo_inputs(np.ones(30), np.zeros(0), [[1, 2, 3], [4, 5]], 300, 11, seed=0)
    assert {len(s) for s in drawn} == set(range(SHORTEST, 12))


def test_frames():
    assert find_frame([[1, 2], [1, 3]]) == ([1], [])
    assert find_frame([[4, 2], [1, 2]]) == ([], [2])


@pytest.mark.parametrize("moves", [np.zeros(500), np.eye(500)[0], np.eye(500)[:, :5].sum(1)])
def test_shared_embeddings_are_said(moves):
    with pytest.raises(ValueError, match="share their embeddings"):
        draw_pseudo_inputs(moves, np.zeros(9), [[1, 2]], 5, 48, seed=0)
