"""What a sweep found: appended while it runs, tables and a page at its end."""

import csv
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rgsp_jax.errors import RefusedError

RECORDS, STAMP = "results.jsonl", "sweep.json"
Direction = Literal["maximise", "minimise"]
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """One point and what it scored."""

    point: int
    """Its place in the config, or the trial's number in a study."""
    method: str
    hyperparameters: Mapping[str, Any]
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    """None where a score is not finite."""
    merge_seconds: float = math.nan
    score_seconds: float = math.nan
    flags: Mapping[str, int] = field(default_factory=dict)
    """Tensors that carry each flag of numerical trouble."""
    problem: str = ""
    """Why there is no score, in a sentence."""


def find_best(results: Sequence[Result], metric: str, direction: Direction) -> Result | None:
    """The first of the best points by one metric."""
    scored = [r for r in results if r.metrics.get(metric) is not None]
    sign = 1 if direction == "maximise" else -1
    return max(scored, key=lambda r: sign * (r.metrics[metric] or 0.0), default=None)


def mark_front(results: Sequence[Result], directions: Mapping[str, Direction]) -> list[bool]:
    """True where no other point is at least as good in every metric and better in one."""
    signs = {name: 1 if direction == "maximise" else -1 for name, direction in directions.items()}
    found = [[r.metrics.get(name) for name in signs] for r in results]
    scores = [
        None if None in row else [sign * (x or 0.0) for sign, x in zip(signs.values(), row, strict=True)]
        for row in found
    ]

    def dominated(mine: list[float]) -> bool:
        return any(
            other is not None and other != mine and all(y >= x for x, y in zip(mine, other, strict=True))
            for other in scores
        )

    return [mine is not None and not dominated(mine) for mine in scores]


def list_metrics(results: Iterable[Result]) -> list[str]:
    """Names of the metrics, in the order they came."""
    return list(dict.fromkeys(name for result in results for name in result.metrics))


def list_hyperparameters(results: Iterable[Result]) -> list[str]:
    """Names of the hyperparameters, likewise."""
    return list(dict.fromkeys(name for result in results for name in result.hyperparameters))


def check_stamp(out: Path, stamp: Mapping[str, Any]) -> None:
    """Note what runs in `out`; RefusedError where another sweep has run there."""
    path = out / STAMP
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if not isinstance(there, dict) or any(there.get(name) != value for name, value in stamp.items()):
            differs = [name for name, value in stamp.items() if not isinstance(there, dict) or there.get(name) != value]
            raise RefusedError(
                f"{out} holds another sweep ({', '.join(differs)} differs from {path}): choose another --out, or"
                " delete it"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as fresh:
        fresh.write_text(json.dumps(dict(stamp), indent=2) + "\n", encoding="utf-8")


def read_results(out: Path) -> list[Result]:
    """What is there of an earlier run; a line that was cut short is left out."""
    found: dict[int, Result] = {}
    path = out / RECORDS
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                result = Result(**json.loads(line))
            except (ValueError, TypeError):
                continue
            found[result.point] = result
    return list(found.values())


def rewrite_results(out: Path, results: Iterable[Result]) -> None:
    """The file with these results and nothing else, whole or as it was."""
    with written_whole(out / RECORDS) as fresh:
        fresh.write_text("".join(to_line(result) for result in results), encoding="utf-8")


def append_result(out: Path, result: Result) -> None:
    """One more line, on the disk when this returns."""
    with (out / RECORDS).open("a", encoding="utf-8") as file:
        file.write(to_line(result))
        file.flush()
        os.fsync(file.fileno())


def to_line(result: Result) -> str:
    """A line of the file; what is not finite is null."""
    return json.dumps(finite(asdict(result)), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Plain data without infinities and NaN."""
    if isinstance(value, Mapping):
        return {name: finite(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tabulate(results: Sequence[Result]) -> dict[str, list[Any]]:
    """Columns by name: point, method, hyperparameters, metrics, times; None where a point has none."""
    plain = [finite(asdict(result)) for result in sorted(results, key=lambda r: r.point)]
    table: dict[str, list[Any]] = {name: [r[name] for r in plain] for name in ("point", "method")}
    for name in list_hyperparameters(results):
        table[name] = [as_cell(r["hyperparameters"].get(name)) for r in plain]
    for name in list_metrics(results):
        table[name if name not in table else f"{name} (metric)"] = [r["metrics"].get(name) for r in plain]
    return table | {name: [r[name] for r in plain] for name in ("merge_seconds", "score_seconds", "problem")}


def as_cell(value: Any) -> Any:
    """Lists as JSON text, so that every cell is a number or a word."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def write_tables(results: Sequence[Result], out: Path) -> list[Path]:
    """results.csv, and results.parquet where pyarrow is installed; their paths."""
    table = tabulate(results)
    with written_whole(out / "results.csv") as fresh, fresh.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(table)
        rows.writerows(zip(*table.values(), strict=True))
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return [out / "results.csv"]
    columns = {name: pyarrow.array(one_type(values)) for name, values in table.items()}
    with written_whole(out / "results.parquet") as fresh:
        parquet.write_table(pyarrow.table(columns), fresh)
    return [out / "results.csv", out / "results.parquet"]


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` at the end, whoever else writes it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def one_type(values: Sequence[Any]) -> list[Any]:
    """Values of a column as all numbers or, where there are words among them, as all text."""
    present = [v for v in values if v is not None]
    if all(isinstance(v, bool) for v in present) or all(type(v) is int for v in present):
        return list(values)
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in present):
        return [None if v is None else float(v) for v in values]
    return [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values]
