"""The inputs of a sequential graft: models run in step, every layer refitted before anything runs on past it.

Before each matrix meet forward passes of all models on the recipient's own inputs, of every donor on its own or on
pseudo-inputs, and of the merged model on all. There its moments are summed, its weight is solved for in the merged
model in memory, and the passes go on with it. What is written are the moments, one file a model: `rgsp merge` solves
for the same weights again, from the checkpoints.
"""

import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import xxhash
from jaxtyping import Array

from rgsp_jax.activations.collect import (
    Tally,
    draw_examples,
    explain_uncovered,
    find_output_problems,
    finish_rows,
    make_batches,
    name_model,
    read_dataset,
)
from rgsp_jax.activations.examples import Dataset
from rgsp_jax.activations.in_step import run_in_step
from rgsp_jax.activations.pseudo_inputs import draw_pseudo_inputs, find_moved
from rgsp_jax.activations.settings import CannotStepError, CovarianceSettings, Prepared, Progress
from rgsp_jax.activations.sites import InputSite, find_rule
from rgsp_jax.activations.step_moments import MERGED, Moments, PassName, sum_moments, weigh_moments
from rgsp_jax.activations.torch_inputs import TextEncoder
from rgsp_jax.activations.torch_runner import TorchRunner
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
from rgsp_jax.grafting.sequential import PULL, SHARE, interpolation_weights, sequential_graft
from rgsp_jax.rules import EXPERT_NAMES, MatrixView
from rgsp_jax.types import InputStatistics

POSITION_TABLE = re.compile(r"(^|[./])(position_embeddings?|embed_positions|wpe)([./]|$)")
TOKENS = 8_192
"""Of the recipient's inputs, and of the donor's: a few hundred sentences; a layer's inputs lie in memory for all."""
OWN_IMAGES = 64
HELD_BACK = 64
"""Rows per site for the proof, by default."""
PSEUDO = "pseudo-inputs: random sequences of the tokens whose embeddings moved"


@dataclass(frozen=True)
class SequentialResult:
    """What was collected."""

    files: tuple[Path, ...]
    """The recipient's and every donor's."""
    examples: tuple[int, ...]
    """Of the recipient and of every donor."""
    held_back: int
    sites: int
    nbytes: int
    seconds: float


class MergedModel:
    """The recipient in memory, turned into the interpolation and then refitted weight by weight."""

    def __init__(self, runner: TorchRunner, models: Sequence[TorchRunner], share: float, pull: float):
        self.runner = runner
        self._share, self._pull = share, pull
        self._solve = jax.jit(sequential_graft)
        weights = interpolation_weights(share, len(models))[1:]
        ours, *theirs = (model.floating() for model in models)
        with torch.no_grad():
            for name, tensor in runner.floating().items():
                for weight, its in zip(weights, theirs, strict=True):  # as differences: equal models stay what they are
                    tensor.add_(its[name] - ours[name], alpha=weight)

    def refit(self, weight: str, view: MatrixView, checkpoints: Sequence[Checkpoint], sides: Sequence[Moments]) -> None:
        """Solve for one weight and put it in place, rounded as the checkpoint keeps it."""
        first, *others = (checkpoint.read(weight) for checkpoint in checkpoints)
        stack = [view.to_matrices(np.asarray(x, np.float32))[0] for x in (first, *others)]
        inputs = InputStatistics(
            covariance=jnp.stack([side.covariance for side in sides]),
            drift=jnp.stack([side.drifts[0] for side in sides]),
        )
        output = self._solve(jnp.asarray(np.stack(stack)), inputs, self._share, self._pull)
        merged = view.from_matrices(np.asarray(output.merged)[None]).astype(first.dtype).astype(np.float32)
        self.runner.write(weight, merged)


def collect_sequentially(
    recipient: str | Path,
    donors: Sequence[str | Path],
    data: str | Path | Dataset,
    files: Sequence[Path],
    settings: CovarianceSettings | None = None,
    *,
    share: float = SHARE,
    pull: float = PULL,
    others: Sequence[str | Path | Dataset] = (),
    progress: Progress | None = None,
) -> SequentialResult:
    """Run models and their sequential graft in step and write the moments of every matrix's inputs.

    `rgsp merge RECIPIENT DONOR ... --method sequential_graft --covariances files[0] --covariances files[1] ...` with
    the same share and pull then writes the graft.

    Args:
        recipient, donors: Hugging Face directories of one architecture, or `hf://owner/name`.
        data: inputs of the recipient, what `read_examples` reads; of texts the first TOKENS tokens are used.
        files: to write, one for each model; they must not be there.
        settings: see there; sketches, parts and early stopping are not for this.
        share: of the donors' answers on the recipient's own inputs; 0 or more.
        pull: see `sequential_graft`.
        others: inputs of every donor, where there are any; pseudo-inputs else.
        progress: called at every site.

    Raises:
        CannotStepError: no `others`, and the models share their embeddings or have none; or they do not run alike.
        RefusedError: as `collect_covariances`. Nothing is written then.
    """
    started = time.monotonic()
    settings = settings or CovarianceSettings(held_back=HELD_BACK)
    files = tuple(map(Path, files))
    problems = [problem for file in files for problem in find_output_problems(file)]
    if others and len(others) != len(donors):
        problems.append(f"inputs of {len(others)} donors are given for {len(donors)}: give every one's, or none")
    if problems:
        raise RefusedError(problems)
    dataset, theirs = read_dataset(data, settings), [read_dataset(x, settings) for x in others]
    with ExitStack() as stack:
        checkpoints = [stack.enter_context(open_checkpoint(model)) for model in (recipient, *donors)]
        runners = [TorchRunner(checkpoint, dataset.examples, settings) for checkpoint in checkpoints]
        ours, held_back, record = choose_own(runners[0], dataset, settings)
        parts, records = [ours], [record]
        for number, donor in enumerate(checkpoints[1:]):
            if theirs:
                drawn, _, record = choose_own(runners[0], theirs[number], settings)
            else:
                drawn, record = choose_pseudo_inputs(runners[0], (checkpoints[0], donor), ours, settings)
            parts.append(drawn)
            records.append(record)
        runner = TorchRunner(checkpoints[0], dataset.examples, settings)
        merged = MergedModel(runner, runners, share, pull)
        collection = stack.enter_context(Collection(runners, merged, checkpoints, settings, share))
        collection.find_sites(ours[:2], files[0])
        collection.hold_back(held_back)
        collection.run(parts, progress)
        names = [name_model(m, c) for m, c in zip((recipient, *donors), checkpoints, strict=True)]
        collection.write(files, names, records)
        nbytes, seconds = sum(file.stat().st_size for file in files), time.monotonic() - started
        examples = tuple(map(len, parts))
        return SequentialResult(files, examples, len(held_back), len(collection.done), nbytes, seconds)


def choose_own(
    runner: TorchRunner, dataset: Dataset, settings: CovarianceSettings
) -> tuple[list[Prepared], list[Prepared], DataRecord]:
    """What is summed and what is held back of a data set, as much as a sequential graft takes."""
    summed, held_back = draw_examples(len(dataset.examples), settings)
    if dataset.has_images:
        summed = summed[:OWN_IMAGES]
    items = runner.prepare([dataset.examples[i] for i in summed])
    items = items[: count_within(item.length or 0 for item in items)]
    if not items:
        raise RefusedError(f"the data {dataset.name} hold no example with a token in it")
    kept = runner.prepare([dataset.examples[i] for i in held_back[: len(items)]]) if len(held_back) else []
    return items, kept, DataRecord(dataset.name, dataset.digest, len(items), len(kept), settings.seed)


def count_within(lengths: Iterable[int]) -> int:
    """How many of these have TOKENS tokens together; at least one."""
    return max(1, int(np.searchsorted(np.cumsum(list(lengths)), TOKENS, side="right")))


def choose_pseudo_inputs(
    runner: TorchRunner, checkpoints: Sequence[Checkpoint], own: Sequence[Prepared], settings: CovarianceSettings
) -> tuple[list[Prepared], DataRecord]:
    """Pseudo-inputs of the donor, no more than there are own inputs."""
    table, encoder = runner.token_table(), runner.encoder
    if table is None or not isinstance(encoder, TextEncoder):
        raise CannotStepError(
            f"{checkpoints[0].path}: the donor's inputs can be told from embeddings of texts only; give some of them"
        )
    positions = [
        name for name, spec in checkpoints[0].specs.items() if POSITION_TABLE.search(name) and len(spec.shape) == 2
    ]
    moves = [
        find_moved(*(np.asarray(checkpoint.read(name), np.float32) for checkpoint in checkpoints))
        for name in (table, *positions[:1])
    ]
    ids = [list(item.payload["input_ids"]) for item in own]
    try:
        drawn = draw_pseudo_inputs(
            moves[0],
            moves[1] if positions else np.zeros(0),
            ids,
            len(own),
            min(encoder.max_length, max(map(len, ids))) if not positions else encoder.max_length,
            settings.seed,
        )
    except ValueError as error:
        raise CannotStepError(f"{checkpoints[0].path} and {checkpoints[1].path}: {error}") from None
    drawn = drawn[: count_within(map(len, drawn))]
    filling = {key: 1 if key == "attention_mask" else 0 for key in own[0].payload if key != "input_ids"}
    payloads = [{"input_ids": x} | {key: [value] * len(x) for key, value in filling.items()} for x in drawn]
    digest = xxhash.xxh3_128_hexdigest(np.concatenate(drawn).astype(np.int64).tobytes())
    return [Prepared(p, len(p["input_ids"])) for p in payloads], DataRecord(
        PSEUDO, digest, len(drawn), 0, settings.seed
    )


class Collection:
    """The run and what it leaves behind; arrays lie in files beside the output until they are written."""

    def __init__(
        self,
        runners: Sequence[TorchRunner],
        merged: MergedModel,
        checkpoints: Sequence[Checkpoint],
        settings: CovarianceSettings,
        share: float,
    ):
        self.runners: dict[int, TorchRunner] = dict(enumerate(runners)) | {MERGED: merged.runner}
        self.merged, self.checkpoints, self.settings, self.share = merged, checkpoints, settings, share
        self.done: dict[str, tuple[InputSite, tuple[str, ...], tuple[int, ...]]] = {}
        """Site -> it, the weights that were refitted, rows on every model's side."""
        self.tally = Tally(settings, sketched_from=1 << 62)
        self.arrays: dict[str, np.ndarray] = {}
        self._spool: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "Collection":
        return self

    def __exit__(self, *_: object) -> None:
        self.arrays.clear()
        if self._spool is not None:
            self._spool.cleanup()

    def hold_back(self, items: Sequence[Prepared]) -> None:
        """Keep some of the recipient's inputs for the proof."""
        for batch in make_batches(items, self.settings, self.runners[0].exact_lengths) if items else ():
            self.runners[0].run(batch, self.tally.hold_back)

    def find_sites(self, items: Sequence[Prepared], out: Path) -> None:
        """See where the models stop; CannotStepError where they do not run alike or are too wide."""
        found = {model: runner.find_sites(items) for model, runner in self.runners.items()}
        orders = {model: [site.name for site in sites] for model, sites in found.items()}
        if strange := [self.checkpoints[model].path for model, order in orders.items() if order != orders[MERGED]]:
            raise CannotStepError(
                f"{strange[0]} does not run like {self.checkpoints[0].path}: its weights meet inputs in another order"
            )
        self.refitted = {site.name: self.find_views(site) for site in found[MERGED]}
        self.refitted = {name: views for name, views in self.refitted.items() if views}
        self.sites = {site.name: site for site in found[MERGED]}
        self.check_memory(out)
        self._spool = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent)

    def run(self, parts: Sequence[Sequence[Prepared]], progress: Progress | None) -> None:
        """Run all in step: every model on the recipient's data, each donor and the merged model on the donor's."""
        exact = any(runner.exact_lengths for runner in self.runners.values())
        runs: dict[Hashable, Callable[[Callable[[Any, Any], None]], None]] = {}
        for part, items in enumerate(parts):
            models = self.runners if part == 0 else (part, MERGED)
            for i, batch in enumerate(make_batches(items, self.settings, exact)):
                runs |= {PassName(model, part, i): partial(self.run_batch, model, batch) for model in models}

        def meet(site: str, here: dict[Any, Any]) -> None:
            self.meet(self.sites[site], here)
            if progress is not None:
                progress(1, len(self.refitted))

        run_in_step(runs, list(self.sites), meet)
        if not self.done:
            raise RefusedError(f"{self.checkpoints[0].path}: no matrix was seen at work, so there is nothing to graft")

    def run_batch(self, model: int, batch: Sequence[Prepared], receive: Callable[[Any, Any], None]) -> None:
        """One pass, stopping at the sites that are refitted only."""

        def stop_here(site: InputSite, rows: Any) -> None:
            if site.name in self.refitted:
                receive(site.name, rows)

        self.runners[model].run(batch, stop_here)

    def find_views(self, site: InputSite) -> dict[str, MatrixView]:
        """The weights of a site that can be refitted, as matrices."""
        if site.kind != "rows":
            return {}
        views = {}
        for name in site.weights:
            spec, rule = self.checkpoints[0].specs[name], find_rule(self.checkpoints[0], name)
            alike = all(name in c.specs and c.specs[name].shape == spec.shape for c in self.checkpoints)
            plain = len(spec.shape) == 2 and EXPERT_NAMES.search(name) is None  # routed tokens cannot be paired
            if (
                rule.kind == "matrix"
                and rule.view is not None
                and plain
                and alike
                and name in self.merged.runner.weights.places
            ):
                views[name] = rule.view
        return views

    def check_memory(self, out: Path) -> None:
        """RefusedError where the sums of the widest site, or the files, are too large."""
        widths = [site.width for site in self.sites.values() if site.name in self.refitted]
        need = 4 * (2 * len(self.runners) + 6) * max(widths, default=0) ** 2
        if need > self.settings.memory:
            raise CannotStepError(
                f"a sequential graft of {self.checkpoints[0].path} takes {format_bytes(need)} for inputs {max(widths)}"
                f" wide, and {format_bytes(self.settings.memory)} are allowed: raise --memory, or give --ridge"
            )
        if problems := check_disk(out, 16 * len(self.checkpoints) * sum(width**2 for width in widths)):
            raise RefusedError(problems)

    def meet(self, site: InputSite, here: Mapping[PassName, Any]) -> None:
        """Sum the inputs of one site and refit its weights."""
        if site.name in self.done:
            raise CannotStepError(f"{self.checkpoints[0].path} uses {site.name} more than once in a pass")
        donors = range(1, len(self.checkpoints))
        own = sum_moments(here, 0, (0, *donors), site.width)
        if own is None:
            return
        others = [sum_moments(here, donor, (donor,), site.width) for donor in donors]
        sides = weigh_moments(own, others, self.share)
        for name, view in self.refitted[site.name].items():
            self.merged.refit(name, view, self.checkpoints, sides)
        for number, side in enumerate(sides):
            self.keep(f"{number}.{site.name}.covariance", side.covariance)
            self.keep(f"{number}.{site.name}.drift", side.drifts[0])
        self.done[site.name] = (site, tuple(self.refitted[site.name]), tuple(side.rows for side in sides))

    def keep(self, name: str, array: Array) -> None:
        """Put an array aside, on disk."""
        assert self._spool is not None
        path = Path(self._spool.name) / f"{len(self.arrays)}.npy"
        np.save(path, np.asarray(array, np.float32))
        self.arrays[name] = np.load(path, mmap_mode="r")

    def write(self, files: Sequence[Path], labels: Sequence[str], records: Sequence[DataRecord]) -> None:
        """Write the files, the recipient's last: where it stands, all do."""
        covered = [name for _, weights, _ in self.done.values() for name in weights]
        for number, file in reversed(list(enumerate(files))):
            runner = self.runners[number]
            sites, tensors = [], {}
            for name, (site, weights, rows) in self.done.items():
                digests = {weight: runner.weights.digests[weight] for weight in weights}
                sites.append(Site(name, digests, "moments", site.width, rows[number]))
                held = finish_rows(self.tally, site) if number == 0 else np.zeros((0, site.width), np.float32)
                tensors[f"{name}.held_back"] = held
                for part in ("covariance", "drift"):
                    tensors[f"{name}.{part}"] = self.arrays[f"{number}.{name}.{part}"]
            reasons = explain_uncovered(self.checkpoints[number], runner, covered)
            write_covariances(file, labels[number], (records[number],), sites, tensors, reasons)
