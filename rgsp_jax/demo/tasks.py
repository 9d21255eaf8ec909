"""What the demo's models learn: scikit-learn's digits, one fixed split, and questions with two answers."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits

TRAIN_ROWS = 1000
SPLIT_SEED = 0


@dataclass(frozen=True)
class Task:
    """A yes-or-no question about a digit, asked by the set of digits whose answer is yes."""

    name: str
    question: str
    digits: frozenset[int]

    def label(self, digits: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
        """Return 1 where the answer is yes, else 0."""
        return np.isin(digits, list(self.digits)).astype(np.int32)


TASKS = (
    Task("parity", "is the digit odd?", frozenset({1, 3, 5, 7, 9})),
    Task("above_four", "is the digit greater than four?", frozenset({5, 6, 7, 8, 9})),
    Task("closed_loop", "is the digit written with a closed loop (0, 6, 8, 9)?", frozenset({0, 6, 8, 9})),
)


class DigitsSplit(NamedTuple):
    """Images in [-1, 1] and the digits they show, for training and for testing."""

    train_images: Float[np.ndarray, "train 8 8 1"]
    train_digits: Int[np.ndarray, "train"]
    test_images: Float[np.ndarray, "test 8 8 1"]
    test_digits: Int[np.ndarray, "test"]


@cache
def load_split() -> DigitsSplit:
    """Return the split; the same for every seed, so that runs differ in training alone."""
    data = load_digits()
    order = np.random.RandomState(SPLIT_SEED).permutation(len(data.target))
    images = (data.images[order, :, :, None] / 8 - 1).astype(np.float32)
    digits = data.target[order].astype(np.int32)
    return DigitsSplit(images[:TRAIN_ROWS], digits[:TRAIN_ROWS], images[TRAIN_ROWS:], digits[TRAIN_ROWS:])
