"""Tasks on scikit-learn's digits: questions about a digit, views of its image, subsets of the classes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from sklearn.datasets import load_digits

TRAIN_ROWS, VALIDATION_ROWS = 900, 300
CLASSES = 10
"""Outputs of every head; those that are no answer of a task are masked."""

Images = Float[np.ndarray, "rows 8 8 1"]


def add_noise(images: Images) -> Images:
    """Gaussian noise of standard deviation 1/2 on images in [-1, 1]; parts of other sizes get other draws."""
    return images + np.random.default_rng(len(images)).normal(scale=0.5, size=images.shape).astype(np.float32)


def hide_half(images: Images) -> Images:
    """The lower half black."""
    hidden = images.copy()
    hidden[:, 4:] = -1
    return hidden


DOMAINS: Mapping[str, Callable[[Images], Images]] = {
    "plain": lambda x: x,
    "rotated": lambda x: np.rot90(x, 1, (1, 2)),
    "inverted": lambda x: -x,
    "shifted": lambda x: np.roll(x, (2, 2), (1, 2)),
    "noisy": add_noise,
    "mirrored": lambda x: x[:, :, ::-1],
    "flipped": lambda x: x[:, ::-1],
    "turned": lambda x: np.rot90(x, 3, (1, 2)),
    "halved": hide_half,
    "shuffled": lambda x: x[:, [0, 2, 4, 6, 1, 3, 5, 7]],
}
"""Name -> what is done to the images. Rows of `shuffled` are dealt out by parity."""

QUESTIONS: Mapping[str, Callable[[Int[np.ndarray, "rows"]], Int[np.ndarray, "rows"]]] = {
    "digit": lambda d: d,
    "parity": lambda d: d % 2,
    "above_four": lambda d: d > 4,
    "closed_loop": lambda d: np.isin(d, (0, 6, 8, 9)),
    "prime": lambda d: np.isin(d, (2, 3, 5, 7)),
    "mod_3": lambda d: d % 3,
    "square": lambda d: np.isin(d, (0, 1, 4, 9)),
    "mod_4": lambda d: d % 4,
    "fibonacci": lambda d: np.isin(d, (0, 1, 2, 3, 5, 8)),
}
"""Name -> label of a digit."""

EVERY_CLASS = tuple(range(CLASSES))


@dataclass(frozen=True)
class DigitTask:
    """What is asked, of which images."""

    name: str
    domain: str = "plain"
    question: str = "digit"
    digits: tuple[int, ...] = EVERY_CLASS
    """The rows that count show one of these."""

    def label(self, digits: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
        return np.asarray(QUESTIONS[self.question](digits)).astype(np.int32)

    @property
    def answers(self) -> Bool[np.ndarray, "classes"]:
        """Which outputs of a head are labels of this task."""
        return np.isin(np.arange(CLASSES), self.label(np.asarray(self.digits)))

    def belongs(self, digits: Int[np.ndarray, "rows"]) -> Bool[np.ndarray, "rows"]:
        """Which rows count."""
        return np.isin(digits, self.digits)


@dataclass(frozen=True)
class Regime:
    """How the tasks of an experiment differ."""

    name: str
    ancestor: DigitTask
    tasks: Sequence[DigitTask]
    """At least eight; a seed takes them in an order of its own."""
    common_head: bool = False
    """Whether all tasks answer by the ancestor's head, which is not trained further; else each trains its own."""


LABELS = tuple(DigitTask(name, question=name) for name in QUESTIONS if name != "digit")
VIEWS = tuple(DigitTask(name, domain=name) for name in DOMAINS if name != "plain")
SUBSETS = tuple(
    DigitTask("digits_" + "".join(map(str, digits)), domain="flipped", digits=digits)
    for digits in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 0, 3), (1, 4, 7), (2, 5, 8), (6, 9, 1), (0, 5, 7))
)
REGIMES: Mapping[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("labels", DigitTask("ancestor"), LABELS),
        Regime("domains", DigitTask("ancestor"), VIEWS, common_head=True),
        Regime("classes", DigitTask("ancestor"), SUBSETS),
        Regime("mixed", DigitTask("ancestor"), (*LABELS[:3], *VIEWS[:3], *SUBSETS[:3])),
    )
}


class DigitRows(NamedTuple):
    """Images in [-1, 1] with the digits they show."""

    images: Images
    digits: Int[np.ndarray, "rows"]


@cache
def load_parts(seed: int) -> Mapping[str, DigitRows]:
    """Return "train", "validation" and "test" rows, drawn by the seed."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.images[order, :, :, None] / 8 - 1).astype(np.float32)
    digits = data.target[order].astype(np.int32)
    ends = np.cumsum([0, TRAIN_ROWS, VALIDATION_ROWS, len(digits) - TRAIN_ROWS - VALIDATION_ROWS])
    parts = zip(("train", "validation", "test"), ends[:-1], ends[1:], strict=True)
    return {name: DigitRows(images[start:end], digits[start:end]) for name, start, end in parts}


def view(rows: DigitRows, domain: str) -> Images:
    """Return the rows' images as a domain shows them."""
    return np.ascontiguousarray(DOMAINS[domain](rows.images), dtype=np.float32)
