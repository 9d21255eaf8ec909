"""Retention against acquisition: grafts of every strength beside interpolation and RegMean, scored by a command."""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import replace_file
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, prepare
from rgsp_jax.pipeline.spectra import write_spectra

OnPoint = Callable[["FrontierPoint", int], None]
"""`on_point(point just scored, points in all)`."""
RESULTS = "frontier.jsonl"
SPECTRA = "spectra.safetensors"


@dataclass(frozen=True)
class FrontierPoint:
    """One merge and its two scores; higher is better for both."""

    series: str
    """soft ridge, hard energy, interpolation, RegMean, recipient or donor."""
    knob: float | None
    retention: float = math.nan
    acquisition: float = math.nan
    pareto: bool = False

    @property
    def name(self) -> str:
        return self.series if self.knob is None else f"{self.series} {self.knob:g}"


def plan_points(
    ridges: Sequence[float], energies: Sequence[float], mixes: Sequence[float], *, regmean: bool
) -> list[FrontierPoint]:
    """The points of a frontier: both models, and every merge between them."""
    points = [FrontierPoint("recipient", None), FrontierPoint("donor", None)]
    points += [FrontierPoint("interpolation", t) for t in mixes]
    points += [FrontierPoint("soft ridge", ridge) for ridge in ridges]
    points += [FrontierPoint("hard energy", energy) for energy in energies]
    return points + ([FrontierPoint("RegMean", None)] if regmean else [])


def mark_pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The same points, marked where no other is at least as good in both scores and better in one."""

    def dominated(p: FrontierPoint) -> bool:
        return any(
            q.retention >= p.retention
            and q.acquisition >= p.acquisition
            and (q.retention > p.retention or q.acquisition > p.acquisition)
            for q in points
        )

    return [replace(p, pareto=not dominated(p)) for p in points]


def run_frontier(
    recipient: str,
    donor: str,
    covariances: str,
    score: str,
    out: Path,
    points: Sequence[FrontierPoint],
    *,
    donor_covariances: str | None = None,
    keep: bool = False,
    on_point: OnPoint | None = None,
) -> list[FrontierPoint]:
    """Merge and score every point; each covariance is decomposed once for all of them.

    Scores go into `out/frontier.jsonl` as they come, and a run that finds some there goes on behind them.

    Args:
        recipient, donor: checkpoints.
        covariances: of the recipient's inputs.
        score: shell command; `{model}` in it becomes the directory of a merge. The last line it prints is two
            numbers, or a JSON object with `retention` and `acquisition`.
        out: directory for results; made if it is not there.
        points: from `plan_points`.
        donor_covariances: of the donor's inputs, for RegMean.
        keep: leave the merges in `out/models`.
        on_point: called after each.

    Returns:
        The scored points, Pareto points marked.

    Raises:
        RefusedError: what the user can mend, before anything is written; a command that fails or prints something else.
    """
    if "{model}" not in score:
        raise RefusedError(f"--score {score!r} has no {{model}}, the place of the directory to score")
    out.mkdir(parents=True, exist_ok=True)
    spectra = out / SPECTRA
    whole = tuple(filter(None, (covariances, donor_covariances)))
    for point in points:  # everything that can be refused is, before the first hour is spent
        if (config := configure(point, recipient, donor, covariances, whole)) is not None:
            with prepare(config):
                pass
    done = read_results(out)
    if not spectra.exists() and any(p.series in ("soft ridge", "hard energy") and p.name not in done for p in points):
        write_spectra(covariances, spectra)
    scored = []
    for point in points:
        if point.name not in done:
            done[point.name] = score_point(point, recipient, donor, str(spectra), whole, score, out, keep=keep)
            write_results(out, done.values())
        scored.append(done[point.name])
        if on_point:
            on_point(scored[-1], len(points))
    spectra.unlink(missing_ok=True)
    return mark_pareto(scored)


def configure(
    point: FrontierPoint, recipient: str, donor: str, covariances: str, whole: tuple[str, ...]
) -> MergeConfig | None:
    """The merge of a point; None for a model itself."""
    settings: dict[str, dict[str, Any]] = {
        "interpolation": {
            "method": "average",
            "hyperparameters": {"coefficients": [1 - (point.knob or 0), point.knob]},
        },
        "soft ridge": {"method": "graft", "hyperparameters": {"ridge": point.knob}, "covariances": (covariances,)},
        "hard energy": {"method": "graft", "hyperparameters": {"energy": point.knob}, "covariances": (covariances,)},
        "RegMean": {"method": "regmean", "covariances": whole},
    }
    if point.series not in settings:
        return None
    return MergeConfig(models=(recipient, donor), **settings[point.series])


def score_point(
    point: FrontierPoint,
    recipient: str,
    donor: str,
    spectra: str,
    whole: tuple[str, ...],
    score: str,
    out: Path,
    *,
    keep: bool,
) -> FrontierPoint:
    """Merge one point, score it, and remove it again."""
    config = configure(point, recipient, donor, spectra, whole)
    if config is None:
        return run_score(score, Path(recipient if point.series == "recipient" else donor), point)
    model = out / "models" / point.name.replace(" ", "-")
    shutil.rmtree(model, ignore_errors=True)
    merge_checkpoints(config, make_parent(model))
    try:
        return run_score(score, model, point)
    finally:
        if not keep:
            shutil.rmtree(model)


def make_parent(path: Path) -> Path:
    """The path, in a directory that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def run_score(score: str, model: Path, point: FrontierPoint) -> FrontierPoint:
    """The two numbers that the user's command prints for a model."""
    command = score.replace("{model}", shlex.quote(str(model)))
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    if done.returncode:
        tail = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise RefusedError(f"--score failed with exit code {done.returncode} on {model}: {tail}")
    line = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        found = json.loads(line) if line.startswith("{") else dict(zip(SCORES, map(float, line.split()), strict=True))
        retention, acquisition = (float(found[name]) for name in SCORES)
    except (ValueError, KeyError, TypeError):
        raise RefusedError(
            f"--score printed {line!r} for {model}; the last line must be two numbers, retention and acquisition, or"
            ' {"retention": ..., "acquisition": ...}'
        ) from None
    return replace(point, retention=retention, acquisition=acquisition)


SCORES = ("retention", "acquisition")


def write_results(out: Path, points: Iterable[FrontierPoint]) -> None:
    """Everything scored so far, whole or as it was."""
    replace_file(out / RESULTS, "".join(json.dumps(asdict(point)) + "\n" for point in points).encode())


def read_results(out: Path) -> dict[str, FrontierPoint]:
    """Points that an earlier run scored, by name; a line that is none is left out."""
    found = {}
    if (out / RESULTS).exists():
        for line in (out / RESULTS).read_text(encoding="utf-8").splitlines():
            try:
                point = FrontierPoint(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[point.name] = point
    return found
