"""The demo's comparison: experts, every merge of them through the pipeline, and accuracies per task."""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.demo.experts import DemoSettings, Expert, evaluate, make_experts
from rgsp_jax.demo.tasks import load_split
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

MergeCall = Callable[[Sequence[Path], Path, str, Mapping[str, Any]], Any]
"""`merge(models, out, method, hyperparameters)` writes the merged model to the directory `out`."""

ALL_METHODS: Mapping[str, Mapping[str, Any]] = {"average": {}, "relative": {}}
"""Methods for all experts at once, with the hyperparameters that differ from their defaults: none."""
PAIR_METHODS: Mapping[str, Mapping[str, Any]] = {"average": {}, "rgsp_seed": {}, "rgsp": {}}
"""Methods for two models, with the average beside them for comparison."""


@dataclass(frozen=True)
class DemoRow:
    """One line of the table: a model, or each task's own expert, scored on the tasks that went into it."""

    method: str
    """A merge method; `individual` is every expert on its own task, `majority` always gives the commoner answer."""
    accuracies: dict[str, float]
    """Share of test rows answered rightly, by task."""
    model: Path | None = None
    """Directory of the merged model, with its report."""
    seconds: float = 0.0
    """Wall time of the merge, compilation included."""

    @property
    def mean(self) -> float:
        """Mean accuracy over the row's tasks."""
        return float(np.mean(list(self.accuracies.values())))


@dataclass(frozen=True)
class DemoResult:
    """The demo's outcome: rows for all tasks, then for every pair of them."""

    directory: Path
    tasks: tuple[str, ...]
    test_rows: int
    seed: int
    rows: tuple[DemoRow, ...]
    training_seconds: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data; paths are relative to `directory`."""
        return {
            "seed": self.seed,
            "tasks": list(self.tasks),
            "test_rows": self.test_rows,
            "training_seconds": self.training_seconds,
            "seconds": self.seconds,
            "rows": [
                {
                    "method": row.method,
                    "accuracies": row.accuracies,
                    "mean": row.mean,
                    "model": None if row.model is None else str(row.model.relative_to(self.directory)),
                    "seconds": row.seconds,
                }
                for row in self.rows
            ],
        }


def merge_by_pipeline(models: Sequence[Path], out: Path, method: str, hyperparameters: Mapping[str, Any]) -> None:
    """Merge as `rgsp merge` does."""
    paths = tuple(str(path) for path in models)
    merge_checkpoints(MergeConfig(models=paths, method=method, hyperparameters=dict(hyperparameters)), out)


def run(
    directory: Path | str,
    merge: MergeCall = merge_by_pipeline,
    settings: DemoSettings | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> DemoResult:
    """Train the experts, merge all of them and every pair, score everything; write `directory/results.json`.

    Args:
        directory: new or empty; gets `experts/<task>/`, `merged/<tasks>/<method>/` and `results.json`.
        merge: how to merge; the pipeline by default.
        settings: seed, schedules, model and tasks.
        progress: called with a sentence when a stage begins.

    Raises:
        RefusedError: `directory` is not empty, or a merge is refused.
    """
    settings = settings or DemoSettings()
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RefusedError(f"{directory} is there already: name a new directory for the demo, or delete this one")
    started = time.monotonic()
    progress("training one ancestor and an expert per task")
    experts = make_experts(directory / "experts", settings)
    individual = {expert.task.name: evaluate(expert.model, [expert])[expert.task.name] for expert in experts}
    trained = time.monotonic()
    rows = [DemoRow("majority", _score_majority(experts))]
    rows += _compare(directory, experts, individual, ALL_METHODS, merge, progress)
    if len(experts) > 2:
        for pair in itertools.combinations(experts, 2):
            rows += _compare(directory, pair, individual, PAIR_METHODS, merge, progress)
    result = DemoResult(
        directory=directory,
        tasks=tuple(individual),
        test_rows=len(load_split().test_digits),
        seed=settings.seed,
        rows=tuple(rows),
        training_seconds=trained - started,
        seconds=time.monotonic() - started,
    )
    (directory / "results.json").write_text(json.dumps(result.to_json(), indent=2) + "\n")
    return result


def _compare(
    directory: Path,
    experts: Sequence[Expert],
    individual: Mapping[str, float],
    methods: Mapping[str, Mapping[str, Any]],
    merge: MergeCall,
    progress: Callable[[str], None],
) -> list[DemoRow]:
    """Return the rows for one group of experts: each on its own, then merged by every method."""
    names = [expert.task.name for expert in experts]
    rows = [DemoRow("individual", {name: individual[name] for name in names})]
    for method, hyperparameters in methods.items():
        progress(f"merging {' + '.join(names)} by {method}")
        out = directory / "merged" / "+".join(names) / method
        out.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        merge([expert.model for expert in experts], out, method, hyperparameters)
        seconds = time.monotonic() - started
        rows.append(DemoRow(method, evaluate(out, experts), out, seconds))
    return rows


def _score_majority(experts: Sequence[Expert]) -> dict[str, float]:
    """Return the accuracy of always giving the training set's commoner answer, by task."""
    split = load_split()
    scores = {}
    for expert in experts:
        answer = round(float(expert.task.label(split.train_digits).mean()))
        scores[expert.task.name] = float((expert.task.label(split.test_digits) == answer).mean())
    return scores
