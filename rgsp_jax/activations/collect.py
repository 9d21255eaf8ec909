"""From a model and data to a covariance file: draw examples, run them once, sum what the weights saw."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.activations.accumulators import HeldBackRows, IdAccumulator, RowAccumulator, full_bytes, sketch_bytes
from rgsp_jax.activations.examples import Dataset, read_examples
from rgsp_jax.activations.settings import CovarianceResult, CovarianceSettings, Prepared, Progress, Runner
from rgsp_jax.activations.sites import InputSite, explain_missing
from rgsp_jax.checkpoint import (
    Checkpoint,
    DataRecord,
    Site,
    check_disk,
    format_bytes,
    open_checkpoint,
    write_covariances,
)
from rgsp_jax.errors import RefusedError

HELD_BACK_SHARE = 5
"""At most one example in so many is held back."""
MIN_STAGE = 32
MAX_BATCH_TOKENS = 8192


@dataclass
class Tally:
    """Everything that is kept while the model runs."""

    settings: CovarianceSettings
    sketched_from: int
    """Sites at least this wide keep a sketch."""
    sums: dict[InputSite, RowAccumulator | IdAccumulator] = field(default_factory=dict)
    held_back: dict[InputSite, HeldBackRows | IdAccumulator] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = np.random.default_rng(self.settings.seed)

    def add(self, site: InputSite, rows: Any) -> None:
        """Count inputs in."""
        if site not in self.sums:
            self.sums[site] = self.make_sum(site)
        self.sums[site].add(rows)

    def hold_back(self, site: InputSite, rows: Any) -> None:
        """Keep inputs out, and some of them for the proof."""
        if site not in self.held_back:
            size = self.settings.held_back
            draw = HeldBackRows(site.width, size, self.generator) if site.kind == "rows" else IdAccumulator(site.width)
            self.held_back[site] = draw
        self.held_back[site].add(rows)

    def make_sum(self, site: InputSite) -> RowAccumulator | IdAccumulator:
        """An empty sum of the kind that the memory allows."""
        if site.kind == "ids":
            return IdAccumulator(site.width)
        sketch = min(self.settings.sketch_size, max(1, site.width // 2)) if site.width >= self.sketched_from else None
        return RowAccumulator(site.width, sketch)

    def measure_movement(self) -> dict[str, float]:
        """Site -> how far its leading subspace moved since the last call."""
        moved = {
            site.name: total.measure_movement()
            for site, total in self.sums.items()
            if isinstance(total, RowAccumulator)
        }
        return {name: value for name, value in moved.items() if value is not None}


def collect_covariances(
    model: str | Path,
    data: str | Path | Dataset,
    out: str | Path,
    settings: CovarianceSettings | None = None,
    progress: Progress | None = None,
) -> CovarianceResult:
    """Run a model over data and write the covariances of all its weights' inputs.

    Args:
        model: a Hugging Face directory or `hf://owner/name`.
        data: what `read_examples` reads.
        out: the file to write; it must not be there.
        settings: see there.
        progress: called after every batch.

    Raises:
        RefusedError: a model that cannot be run, data that it cannot take, inputs that are not finite, a file in the
            way. Nothing is written then.
    """
    started = time.monotonic()
    settings = settings or CovarianceSettings()
    out = Path(out)
    problems = find_output_problems(out)
    dataset, checkpoint = None, None
    try:
        dataset = read_dataset(data, settings)
    except RefusedError as error:
        problems += error.problems
    try:
        checkpoint = open_checkpoint(model)
    except RefusedError as error:
        problems += error.problems
    if problems or dataset is None or checkpoint is None:
        raise RefusedError(problems)
    with checkpoint:
        runner = make_runner(checkpoint, dataset, settings)
        return _collect(runner, checkpoint, str(model), dataset, out, settings, progress, started)


def read_dataset(data: str | Path | Dataset, settings: CovarianceSettings) -> Dataset:
    """Data as they are, or read from a file."""
    if isinstance(data, Dataset):
        return data
    return read_examples(data, field=settings.field, pair_field=settings.pair_field, image_field=settings.image_field)


def find_output_problems(out: Path) -> list[str]:
    """Why no file can be made at `out`."""
    if out.exists() or out.is_symlink():
        return [f"the output {out} is already there: choose another name or remove it"]
    if not out.absolute().parent.is_dir():
        return [f"the output's directory {out.absolute().parent} does not exist: create it first"]
    return []


def make_runner(checkpoint: Checkpoint, dataset: Dataset, settings: CovarianceSettings) -> Runner:
    """The backend that was asked for, or the one that can run the model here."""
    flax = import_module("rgsp_jax.activations.flax_runner")
    backend = settings.backend
    if backend == "auto":
        backend = "flax" if not has_torch() and flax.find_family(checkpoint) is not None else "torch"
    if backend == "flax":
        return flax.FlaxRunner(checkpoint, dataset.examples, settings)
    if not has_torch():
        raise RefusedError(
            f"{checkpoint.path} is run by torch and transformers, which are not installed here: "
            "pip install torch transformers"
        )
    return import_module("rgsp_jax.activations.torch_runner").TorchRunner(checkpoint, dataset.examples, settings)


def has_torch() -> bool:
    """True where torch and transformers can be imported."""
    try:
        import_module("torch")
        import_module("transformers")
    except ImportError:
        return False
    return True


def draw_examples(count: int, settings: CovarianceSettings) -> tuple[np.ndarray, np.ndarray]:
    """Which examples are summed, in random order, and which are held back: disjoint, and equal for equal settings."""
    part, parts = settings.part
    order = np.random.default_rng(settings.seed).permutation(count)[part - 1 :: parts][: settings.max_rows]
    held_back = min(settings.held_back, -(-len(order) // HELD_BACK_SHARE)) if len(order) > 1 else 0
    return order[held_back:], order[:held_back]


def plan_stages(count: int, settings: CovarianceSettings) -> list[int]:
    """How many examples are done at each look at the convergence: half and all, before that every halving."""
    ends = [count]
    while ends[0] > 1 and (len(ends) == 1 or (settings.until is not None and ends[0] // 2 >= MIN_STAGE)):
        ends.insert(0, ends[0] // 2)
    return ends


def make_batches(items: Sequence[Prepared], settings: CovarianceSettings, exact: bool) -> Iterator[list[Prepared]]:
    """Examples of like lengths together; with `exact` only of equal ones, without any padding."""
    ordered = sorted(items, key=lambda item: item.length or 0)
    batch: list[Prepared] = []
    for item in ordered:
        tokens = (len(batch) + 1) * (item.length or 0)
        alone = exact and batch and (item.length is None or item.length != batch[0].length)
        if batch and (len(batch) == settings.batch_size or tokens > MAX_BATCH_TOKENS or alone):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def plan_memory(runner: Runner, sites: Sequence[InputSite], settings: CovarianceSettings) -> int:
    """The width from which sites keep a sketch, so that all sums fit the memory; whole widths at a time.

    Raises:
        RefusedError: not even sketches fit.
    """
    widths = sorted(site.width for site in sites if site.kind == "rows")
    tables = sum(16 * site.width for site in sites if site.kind == "ids")
    held = 4 * settings.held_back * sum(widths)

    def cost(limit: int) -> int:
        sketched = sum(sketch_bytes(w, min(settings.sketch_size, max(1, w // 2))) for w in widths if w >= limit)
        full = [w for w in widths if w < limit]
        finishing = 12 * max(full, default=0) ** 2  # copies of one second moment while it is finished
        return tables + held + sketched + finishing + sum(map(full_bytes, full))

    limits = [*sorted(set(widths), reverse=True), 0] if widths else []
    for limit in [max(widths, default=0) + 1, *limits]:
        if cost(limit) <= settings.memory:
            return limit
    raise RefusedError(
        f"the sums of {len(sites)} sites need {format_bytes(cost(0))} even as sketches of {settings.sketch_size} rows, "
        f"and {format_bytes(settings.memory)} are allowed: raise --memory or lower --sketch-size"
    )


def _collect(
    runner: Runner,
    checkpoint: Checkpoint,
    model: str,
    dataset: Dataset,
    out: Path,
    settings: CovarianceSettings,
    progress: Progress | None,
    started: float,
) -> CovarianceResult:
    summed, held_back = draw_examples(len(dataset.examples), settings)
    if not len(summed):
        raise RefusedError(f"part {settings.part[0]}/{settings.part[1]} of the data {dataset.name} is empty")
    examples = [dataset.examples[i] for i in summed]
    items = runner.prepare(examples)
    if not items:
        raise RefusedError(f"the data {dataset.name} hold no example with a token in it")
    sites = runner.find_sites(items[:2])
    tally = Tally(settings, plan_memory(runner, sites, settings))
    if problems := check_disk(out, sum(4 * site.width**2 for site in sites if site.width < tally.sketched_from)):
        raise RefusedError(problems)
    total = len(items) + len(held_back)

    def run_batches(prepared: Sequence[Prepared], receive: Any) -> None:
        for batch in make_batches(prepared, settings, runner.exact_lengths):
            runner.run(batch, receive)
            if progress is not None:
                progress(len(batch), total)

    if len(held_back):
        run_batches(runner.prepare([dataset.examples[i] for i in held_back]), tally.hold_back)
    movement: dict[str, float] = {}
    done = 0
    stages = plan_stages(len(items), settings)
    for end in stages:
        run_batches(items[done:end], tally.add)
        done = end
        movement = tally.measure_movement() if len(stages) > 1 else {}
        if settings.until is not None and movement and max(movement.values()) <= settings.until:
            break
    record = DataRecord(
        dataset.name, dataset.digest, done, len(held_back), settings.seed, f"{settings.part[0]}/{settings.part[1]}"
    )
    stopped = done < len(items)
    written = write_tally(tally, runner, checkpoint, model, record, movement, out)
    return summarise(runner, tally, written, movement, record, out, model, stopped, time.monotonic() - started)


def write_tally(
    tally: Tally,
    runner: Runner,
    checkpoint: Checkpoint,
    model: str,
    record: DataRecord,
    movement: Mapping[str, float],
    out: Path,
) -> dict[str, str]:
    """Write the file; returns the weights that are not covered, with reasons."""
    sites: list[Site] = []
    tensors: dict[str, np.ndarray] = {}
    faults = []
    for site, total in tally.sums.items():
        weights = {name: runner.weights.digests[name] for name in site.weights}
        rows = total.rows
        if isinstance(total, IdAccumulator):
            kind = "counts"
            parts = {"counts": total.counts, "held_back_counts": finish_counts(tally, site)}
        else:
            kind = total.kind
            parts = {**total.finish(), "held_back": finish_rows(tally, site)}
        if any(part.dtype == np.float32 and not np.isfinite(part).all() for part in parts.values()):
            faults.append(f"{checkpoint.path}: the squares of the inputs of {site.name} overflow float32")
        tensors |= {f"{site.name}.{name}": part for name, part in parts.items()}
        sites.append(Site(site.name, weights, kind, site.width, rows, movement.get(site.name)))  # type: ignore[arg-type]
    if faults:
        raise RefusedError(faults)
    if not sites:
        raise RefusedError(
            f"{checkpoint.path}: no weight of the checkpoint was seen at work, so there is nothing to write"
        )
    covered = [name for site in sites for name in site.weights]
    reasons = explain_uncovered(checkpoint, runner, covered)
    write_covariances(out, name_model(model, checkpoint), (record,), sites, tensors, reasons)
    return reasons


def explain_uncovered(checkpoint: Checkpoint, runner: Runner, covered: Collection[str]) -> dict[str, str]:
    """Weights that are not covered, with reasons."""
    reasons = {**explain_missing(checkpoint, runner.weights, covered), **runner.not_covered}
    return {name: reason for name, reason in reasons.items() if name not in covered}


def name_model(model: str | Path, checkpoint: Checkpoint) -> str:
    """What a file calls a model: its address, or its directory's name."""
    return str(model) if "://" in str(model) else checkpoint.path.name


def finish_counts(tally: Tally, site: InputSite) -> np.ndarray:
    """Held-back look-ups of a table."""
    found = tally.held_back.get(site)
    return found.counts if isinstance(found, IdAccumulator) else np.zeros(site.width, np.int64)


def finish_rows(tally: Tally, site: InputSite) -> np.ndarray:
    """Held-back rows of a site."""
    found = tally.held_back.get(site)
    return found.finish() if isinstance(found, HeldBackRows) else np.zeros((0, site.width), np.float32)


def summarise(
    runner: Runner,
    tally: Tally,
    not_covered: Mapping[str, str],
    movement: Mapping[str, float],
    record: DataRecord,
    out: Path,
    model: str,
    stopped: bool,
    seconds: float,
) -> CovarianceResult:
    """The result of a finished run, with what the user should know."""
    kinds = ["counts" if isinstance(total, IdAccumulator) else total.kind for total in tally.sums.values()]
    sketches = tuple(s.name for s, t in tally.sums.items() if isinstance(t, RowAccumulator) and t.kind == "sketch")
    warnings = list(runner.warnings)
    if not record.held_back and tally.settings.held_back:
        warnings.append("there is one example only: nothing could be held back to prove a graft with")
    thin = [s.name for s, t in tally.sums.items() if isinstance(t, RowAccumulator) and t.rows < s.width]
    if thin:
        warnings.append(
            f"{len(thin)} site(s) saw fewer inputs than they have entries ({thin[0]} first): directions that these "
            "data never took look free; give more data"
        )
    worst = max(movement, key=movement.__getitem__) if movement else None
    return CovarianceResult(
        out=out,
        model=model,
        backend=runner.backend,
        examples=record.examples,
        held_back=record.held_back,
        rows=sum(total.rows for total in tally.sums.values()),
        sites={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        sketches=sketches,
        not_covered=not_covered,
        movement_worst=movement[worst] if worst else None,
        movement_mean=float(np.mean(list(movement.values()))) if movement else None,
        worst_site=worst,
        stopped_early=stopped,
        nbytes=out.stat().st_size,
        seconds=seconds,
        warnings=tuple(warnings),
    )
