"""Text experts of several trainings: one encoder fine-tuned on MR, SUBJ, TREC and on two halves of TREC's classes.

A library of `relative_suite.py`. Every expert is one of `finetune_text.py`, on the first ROWS rows of its task. A seed
decides the head it starts with, the order of its rows, and which tasks are merged where not all are. What was trained
once is kept.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import finetune_text
from contenders import Problem
from text_suite import make_problem

ROWS = 1000
SCORED = (600, 200)
"""Rows for test and validation."""
TASKS: Mapping[str, tuple[str, Sequence[int] | None]] = {
    "mr": ("mr", None),
    "subj": ("subj", None),
    "trec": ("trec", None),
    "trec-012": ("trec", (0, 1, 2)),
    "trec-345": ("trec", (3, 4, 5)),
}
"""Name -> the folder its rows are in, and the labels kept of them."""
REGIMES: Mapping[str, tuple[Sequence[str], Sequence[int]]] = {
    "tasks": (("mr", "subj", "trec"), (2, 3)),
    "mixed": (("mr", "subj", "trec-012", "trec-345"), (4,)),
}
"""Name -> tasks, and how many of them a problem takes."""


def choose(regime: str, seed: int, count: int) -> list[str]:
    """Return the tasks of a problem: the first of a regime's, which every seed turns by one."""
    names = REGIMES[regime][0]
    return [names[(seed + i) % len(names)] for i in range(count)]


def train_expert(texts: Path, base: Path, kept: Path, name: str, settings: finetune_text.Settings) -> Path:
    """Return the directory of a fine-tuned expert, trained now where there is none."""
    folder, classes = TASKS[name]
    files = [Path(finetune_text.__file__), *sorted(base.glob("*.safetensors"))]
    decides = b"".join([*(file.read_bytes() for file in files), repr((settings, ROWS, classes)).encode()])
    out = kept / hashlib.sha256(decides).hexdigest()[:16] / name
    if not out.exists():
        partial = out.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        options: list[object] = [base, texts / folder, "--out", partial, "--rows", ROWS, "--seed", settings.seed]
        options += ["--learning-rate", settings.learning_rate, "--epochs", settings.epochs]
        options += ["--classes", *classes] if classes else []
        finetune_text.main([str(option) for option in options])
        partial.rename(out)
    return out


def make_text(
    texts: Path, base: Path, kept: Path, regime: str, training: tuple[float, float], seed: int, count: int
) -> Problem:
    """Return experts fine-tuned at (learning rate, epochs), their base, and the score on test rows."""
    settings = finetune_text.Settings(learning_rate=training[0], epochs=training[1], seed=seed)
    experts = [train_expert(texts, base, kept, name, settings) for name in choose(regime, seed, count)]
    return make_problem(experts, base, seed, SCORED)
