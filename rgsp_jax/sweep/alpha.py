"""AdaMMS: merges of two models on a grid of coefficients, and the one whose answers change least beside it."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from rgsp_jax.checkpoint import replace_file
from rgsp_jax.errors import RefusedError
from rgsp_jax.merging import search_alpha
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, prepare

RESULTS, SUMMARY, MODEL = "answers.jsonl", "search.json", "model"
OnAnswers = Callable[[float, int], None]
"""`on_answers(alpha just answered, candidates in all)`."""


@dataclass(frozen=True)
class AlphaSearch:
    """The coefficient chosen, and why."""

    alpha: float
    """Share of the first model."""
    alphas: tuple[float, ...]
    changes: tuple[float | None, ...]
    """Inputs whose answer differs at either neighbour; None at the ends of the grid."""
    tied: tuple[float, ...]
    """Candidates whose answers change as little."""
    inputs: int
    model: Path
    """Where the merge with that coefficient is."""


def run_alpha_search(
    config: MergeConfig,
    answer: str,
    out: Path,
    alphas: Sequence[float],
    *,
    smoothing: int = 0,
    on_answers: OnAnswers | None = None,
) -> AlphaSearch:
    """Merge two models with every coefficient, let each merge answer, and keep the one that `search_alpha` chooses.

    Answers go into `out/answers.jsonl` as they come; a run that finds answers to the same command there goes on
    behind them. The merge chosen is `out/model`, what was found `out/search.json`.

    Args:
        config: two models, and whatever else their merge takes; its method is `average`.
        answer: shell command; `{model}` in it becomes the directory of a merge. It prints one answer a line, to the
            same inputs in the same order; upper and lower case are the same, as in the authors' code.
        out: directory for results; made if it is not there.
        alphas: shares of the first model, three or more in [0, 1].
        smoothing: see `search_alpha`.
        on_answers: called after each candidate.

    Raises:
        RefusedError: what the user can mend, before anything is merged; a command that fails, or prints another number
            of answers for one candidate than for the others.
    """
    grid = sorted(set(map(float, alphas)))
    if problems := find_problems(config, answer, out, grid):
        raise RefusedError(problems)
    with prepare(mix(config, grid[0])):  # everything that can be refused is, before the first merge
        pass
    out.mkdir(parents=True, exist_ok=True)
    key = {"config": mix(config, 0.5).to_yaml(), "command": answer}
    found = read_answers(out, key)
    for alpha in grid:
        if alpha not in found:
            found[alpha] = ask(config, alpha, answer, out)
            write_answers(out, key, found)
        if on_answers:
            on_answers(alpha, len(grid))
    check_counts(found, grid)
    texts = np.array([[text.strip().lower() for text in found[alpha]] for alpha in grid])
    numbers = np.unique(texts, return_inverse=True)[1].reshape(texts.shape).astype(np.int32)
    chosen = search_alpha(jnp.arange(len(grid), dtype=jnp.float32), jnp.asarray(numbers), smoothing=smoothing)
    best = grid[int(chosen.alpha)]
    merge_checkpoints(mix(config, best), out / MODEL)
    changes = tuple(float(x) if np.isfinite(x) else None for x in np.asarray(chosen.changes))
    tied = tuple(alpha for alpha, tie in zip(grid, np.asarray(chosen.tied), strict=True) if tie)
    result = AlphaSearch(best, tuple(grid), changes, tied, texts.shape[1], out / MODEL)
    (out / SUMMARY).write_text(json.dumps(summarise(result), indent=2) + "\n", encoding="utf-8")
    return result


def summarise(result: AlphaSearch) -> dict[str, Any]:
    """The result as plain data."""
    return asdict(result) | {"model": str(result.model)}


def mix(config: MergeConfig, alpha: float) -> MergeConfig:
    """The interpolation with this share of the first model."""
    return config.model_copy(update={"method": "average", "hyperparameters": {"coefficients": [alpha, 1 - alpha]}})


def find_problems(config: MergeConfig, answer: str, out: Path, grid: Sequence[float]) -> list[str]:
    """What is wrong before anything is opened."""
    problems = []
    if len(config.models) != 2:
        problems.append(f"a coefficient is searched between two models, not {len(config.models)}")
    if len(grid) < 3 or not all(0 <= alpha <= 1 for alpha in grid):
        problems.append(f"--alphas: give three different numbers or more between 0 and 1, not {list(grid)}")
    if "{model}" not in answer:
        problems.append(f"--answer {answer!r} has no {{model}}, the place of the directory that answers")
    if (out / MODEL).exists():
        problems.append(f"{out / MODEL} is already there: remove it or choose another --out")
    return problems


def ask(config: MergeConfig, alpha: float, answer: str, out: Path) -> list[str]:
    """The answers of one merge, which is removed again."""
    model = out / f"alpha-{alpha:g}"
    shutil.rmtree(model, ignore_errors=True)
    merge_checkpoints(mix(config, alpha), model)
    try:
        command = answer.replace("{model}", shlex.quote(str(model)))
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
    finally:
        shutil.rmtree(model)
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise RefusedError(f"--answer failed with exit code {done.returncode} at alpha {alpha:g}: {tail}")
    return done.stdout.splitlines()


def check_counts(found: Mapping[float, Sequence[str]], grid: Sequence[float]) -> None:
    """RefusedError where candidates gave different numbers of answers, or none."""
    counts = {alpha: len(found[alpha]) for alpha in grid}
    if len(set(counts.values())) > 1 or not counts[grid[0]]:
        listed = ", ".join(f"{count} at alpha {alpha:g}" for alpha, count in counts.items())
        raise RefusedError(
            f"--answer must print one line for every input, as many for every merge; it printed {listed}"
        )


def write_answers(out: Path, key: Mapping[str, str], found: Mapping[float, Iterable[str]]) -> None:
    """Everything answered so far, whole or as it was."""
    lines = (json.dumps({**key, "alpha": alpha, "answers": list(answers)}) + "\n" for alpha, answers in found.items())
    replace_file(out / RESULTS, "".join(lines).encode())


def read_answers(out: Path, key: Mapping[str, str]) -> dict[float, list[str]]:
    """Answers of an earlier run of the same search; a line that is none is left out."""
    found: dict[float, list[str]] = {}
    if (out / RESULTS).exists():
        for line in (out / RESULTS).read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                if key.items() <= record.items():
                    found[float(record["alpha"])] = list(record["answers"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return found
