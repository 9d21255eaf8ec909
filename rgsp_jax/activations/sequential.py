"""The inputs of a sequential graft: models run in step, every layer refitted before anything runs on past it.

Five kinds of forward pass meet before each matrix: the recipient and the donor on the recipient's own inputs, the donor
on pseudo-inputs, and the merged model on both. There its moments are summed, its weight is solved for in the merged
model in memory, and the passes go on with it. What is written are the moments, one file a model: `rgsp merge` solves
for the same weights again, from the checkpoints.
"""

import re
import tempfile
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import xxhash
from jaxtyping import Array, Float

from rgsp_jax.activations.accumulators import join_rows
from rgsp_jax.activations.collect import (
    Tally,
    draw_examples,
    find_output_problems,
    finish_rows,
    make_batches,
    read_dataset,
)
from rgsp_jax.activations.examples import Dataset
from rgsp_jax.activations.in_step import run_in_step
from rgsp_jax.activations.pseudo_inputs import draw_pseudo_inputs, find_moved
from rgsp_jax.activations.settings import CannotStepError, CovarianceSettings, Prepared, Progress
from rgsp_jax.activations.sites import InputSite, explain_missing
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
from rgsp_jax.rules import EXPERT_NAMES, MatrixView, classify
from rgsp_jax.types import InputStatistics

POSITION_TABLE = re.compile(r"(^|[./])(position_embeddings?|embed_positions|wpe)([./]|$)")
TOKENS = 8_192
"""Of the recipient's inputs, and of the donor's: a few hundred sentences; a layer's inputs lie in memory for all."""
OWN_IMAGES = 64
PSEUDO = "pseudo-inputs: random sequences of the tokens whose embeddings moved"
ROWS = 512
"""Inputs are summed in multiples of so many, so that few shapes are compiled."""

Model = Literal["recipient", "donor", "merged"]
Part = Literal["own", "others"]


class PassName(NamedTuple):
    """Which model runs on what."""

    model: Model
    part: Part
    batch: int


@dataclass(frozen=True)
class SequentialResult:
    """What was collected."""

    files: tuple[Path, Path]
    """The recipient's and the donor's."""
    examples: int
    pseudo_inputs: int
    held_back: int
    sites: int
    nbytes: int
    seconds: float


@dataclass
class Moments:
    """Sums over one part of the data at one site."""

    covariance: Any
    drifts: tuple[Any, ...]
    """A drift from the merged model's inputs per other model."""
    rows: int = 0

    @property
    def scale(self) -> Float[Array, ""]:
        """What makes the covariance one of trace 1."""
        trace = jnp.trace(self.covariance)
        return jnp.where(trace > 0, 1 / jnp.where(trace > 0, trace, 1), 0)


@jax.jit
def add_moments(
    covariance: Float[Array, "n n"],
    drifts: tuple[Float[Array, "n n"], ...],
    merged: Float[Array, "rows n"],
    others: tuple[Float[Array, "rows n"], ...],
) -> tuple[Float[Array, "n n"], tuple[Float[Array, "n n"], ...]]:
    """Add `k k^T` and `(k_i - k) k^T` of rows of inputs; rows of zeros do not count."""
    product = partial(jnp.matmul, precision="highest")
    moved = tuple(d + product((k - merged).T, merged) for d, k in zip(drifts, others, strict=True))
    return covariance + product(merged.T, merged), moved


def sum_moments(here: Mapping[PassName, Any], part: Part, others: Sequence[Model], width: int) -> Moments | None:
    """The moments of one part of the data, None where no pass of it came here."""
    zero = jnp.zeros((width, width), jnp.float32)
    total = Moments(zero, (zero,) * len(others))
    for name in sorted(name for name in here if name.model == "merged" and name.part == part):
        rows = [here.get(name._replace(model=model)) for model in others]
        count = here[name].shape[0]
        if any(r is None or r.shape[0] != count for r in rows):
            continue
        merged, *seen = (join_rows([r], -(-count // ROWS) * ROWS) for r in (here[name], *rows))
        total.covariance, total.drifts = add_moments(total.covariance, total.drifts, merged, tuple(seen))
        total.rows += count
    return total if total.rows else None


def weigh_moments(own: Moments, others: Moments | None, share: float) -> tuple[Moments, Moments]:
    """The recipient's and the donor's side of the fit, weighted as `sequential_graft` takes them.

    Own inputs have trace 1 on the recipient's side and `share` on the donor's, where others have 1.
    """
    unit, (from_recipient, from_donor) = own.scale, own.drifts
    covariance, drift = share * unit * own.covariance, share * unit * from_donor
    rows = own.rows
    if others is not None:
        covariance += others.scale * others.covariance
        drift += others.scale * others.drifts[0]
        rows = others.rows
    return Moments(unit * own.covariance, (unit * from_recipient,), own.rows), Moments(covariance, (drift,), rows)


class MergedModel:
    """The recipient in memory, turned into the interpolation and then refitted weight by weight."""

    def __init__(self, runner: TorchRunner, recipient: TorchRunner, donor: TorchRunner, share: float, pull: float):
        self.runner = runner
        self._share, self._pull = share, pull
        self._solve = jax.jit(sequential_graft)
        t = interpolation_weights(share)[1]
        with torch.no_grad():
            for name, tensor in runner.floating().items():
                ours, theirs = recipient.floating()[name], donor.floating()[name]
                tensor.copy_(torch.lerp(ours, theirs, float(t)))

    def refit(self, weight: str, view: MatrixView, checkpoints: Sequence[Checkpoint], sides: Sequence[Moments]) -> None:
        """Solve for one weight and put it in place, rounded as the checkpoint keeps it."""
        first = checkpoints[0].read(weight)
        stack = [view.to_matrices(np.asarray(x, np.float32))[0] for x in (first, checkpoints[1].read(weight))]
        inputs = InputStatistics(
            covariance=jnp.stack([side.covariance for side in sides]),
            drift=jnp.stack([side.drifts[0] for side in sides]),
        )
        output = self._solve(jnp.asarray(np.stack(stack)), inputs, self._share, self._pull)
        merged = view.from_matrices(np.asarray(output.merged)[None]).astype(first.dtype).astype(np.float32)
        self.runner.write(weight, merged)


def collect_sequentially(
    recipient: str | Path,
    donor: str | Path,
    data: str | Path | Dataset,
    files: tuple[Path, Path],
    settings: CovarianceSettings | None = None,
    *,
    share: float = SHARE,
    pull: float = PULL,
    others: str | Path | Dataset | None = None,
    progress: Progress | None = None,
) -> SequentialResult:
    """Run two models and their sequential graft in step and write the moments of every matrix's inputs.

    `rgsp merge RECIPIENT DONOR --method sequential_graft --covariances files[0] --covariances files[1]` with the same
    share and pull then writes the graft.

    Args:
        recipient, donor: Hugging Face directories of one architecture, or `hf://owner/name`.
        data: inputs of the recipient, what `read_examples` reads; of texts the first TOKENS tokens are used.
        files: the two to write; they must not be there.
        settings: see there; sketches, parts and early stopping are not for this.
        share: of the donor's answers on the recipient's own inputs; 0 or more.
        pull: see `sequential_graft`.
        others: inputs of the donor, where there are any; pseudo-inputs else.
        progress: called at every site.

    Raises:
        CannotStepError: no `others`, and the models share their embeddings or have none; or they do not run alike.
        RefusedError: as `collect_covariances`. Nothing is written then.
    """
    started = time.monotonic()
    settings = settings or CovarianceSettings(held_back=64)
    problems = [problem for file in files for problem in find_output_problems(Path(file))]
    if problems:
        raise RefusedError(problems)
    dataset = read_dataset(data, settings)
    theirs = None if others is None else read_dataset(others, settings)
    with open_checkpoint(recipient) as a, open_checkpoint(donor) as b:
        runners: dict[Model, TorchRunner] = {
            "recipient": TorchRunner(a, dataset.examples, settings),
            "donor": TorchRunner(b, dataset.examples, settings),
            "merged": TorchRunner(a, dataset.examples, settings),
        }
        ours, held_back, record = choose_own(runners["recipient"], dataset, settings)
        if theirs is not None:
            drawn, _, other_record = choose_own(runners["recipient"], theirs, settings)
        else:
            drawn, other_record = choose_pseudo_inputs(runners["recipient"], (a, b), ours, settings)
        collection = Collection(runners, (a, b), settings, share, pull)
        with collection:
            collection.find_sites(ours[:2], Path(files[0]))
            collection.hold_back(held_back)
            collection.run({"own": ours, "others": drawn}, progress)
            labels = [str(m) if "://" in str(m) else c.path.name for m, c in ((recipient, a), (donor, b))]
            collection.write(files, labels, (record, other_record))
            nbytes = sum(Path(file).stat().st_size for file in files)
            return SequentialResult(
                (Path(files[0]), Path(files[1])),
                len(ours),
                len(drawn),
                len(held_back),
                len(collection.done),
                nbytes,
                time.monotonic() - started,
            )


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
        runners: Mapping[Model, TorchRunner],
        checkpoints: Sequence[Checkpoint],
        settings: CovarianceSettings,
        share: float,
        pull: float,
    ):
        self.runners, self.checkpoints, self.settings, self.share = runners, checkpoints, settings, share
        self.done: dict[str, tuple[InputSite, tuple[str, ...], tuple[int, int]]] = {}
        """Site -> it, the weights that were refitted, rows on either side."""
        self.again: set[str] = set()
        self.merged = MergedModel(runners["merged"], runners["recipient"], runners["donor"], share, pull)
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
        for batch in make_batches(items, self.settings, self.runners["recipient"].exact_lengths) if items else ():
            self.runners["recipient"].run(batch, self.tally.hold_back)

    def find_sites(self, items: Sequence[Prepared], out: Path) -> None:
        """See where the models stop; CannotStepError where they do not run alike or are too wide."""
        found = {model: runner.find_sites(items) for model, runner in self.runners.items()}
        orders = {model: [site.name for site in sites] for model, sites in found.items()}
        if len({tuple(order) for order in orders.values()}) > 1:
            raise CannotStepError(
                f"{self.checkpoints[0].path} and {self.checkpoints[1].path} do not run alike: their weights meet their"
                " inputs in other orders"
            )
        self.refitted = {site.name: self.find_views(site) for site in found["merged"]}
        self.refitted = {name: views for name, views in self.refitted.items() if views}
        self.sites = {site.name: site for site in found["merged"]}
        self.check_memory(out)
        self._spool = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent)

    def run(self, parts: Mapping[Part, Sequence[Prepared]], progress: Progress | None) -> None:
        """Run everything in step."""
        batches: dict[Part, list[list[Prepared]]] = {
            part: list(make_batches(items, self.settings, any(r.exact_lengths for r in self.runners.values())))
            for part, items in parts.items()
        }
        models: dict[Part, tuple[Model, ...]] = {"own": ("recipient", "donor", "merged"), "others": ("donor", "merged")}
        runs: dict[Hashable, Callable[[Callable[[Any, Any], None]], None]] = {
            PassName(model, part, i): partial(self.run_batch, model, batch)
            for part, these in models.items()
            for model in these
            for i, batch in enumerate(batches[part])
        }

        def meet(site: str, here: dict[Any, Any]) -> None:
            self.meet(self.sites[site], here)
            if progress is not None:
                progress(1, len(self.refitted))

        run_in_step(runs, list(self.sites), meet)
        if self.again:
            raise CannotStepError(
                f"{self.checkpoints[0].path} uses {', '.join(sorted(self.again)[:3])} more than once in a pass"
            )
        if not self.done:
            raise RefusedError(f"{self.checkpoints[0].path}: no matrix was seen at work, so there is nothing to graft")

    def run_batch(self, model: Model, batch: Sequence[Prepared], receive: Callable[[Any, Any], None]) -> None:
        """One pass, stopping at the sites that are refitted only."""

        def stop_here(site: InputSite, rows: Any) -> None:
            if site.name in self.refitted:
                receive(site.name, rows)

        self.runners[model].run(batch, stop_here)

    def find_views(self, site: InputSite) -> dict[str, MatrixView]:
        """The weights of a site that can be refitted, as matrices."""
        if site.kind != "rows":
            return {}
        first = self.checkpoints[0]
        model_type = (first.config or {}).get("model_type")
        views = {}
        for name in site.weights:
            spec = first.specs[name]
            rule = classify(name, spec.shape, spec.dtype, "pytorch", model_type)
            alike = name in self.checkpoints[1].specs and self.checkpoints[1].specs[name].shape == spec.shape
            plain = len(spec.shape) == 2 and EXPERT_NAMES.search(name) is None  # routed tokens cannot be paired
            if rule.kind == "matrix" and rule.view is not None and plain and alike and name in self.places:
                views[name] = rule.view
        return views

    @property
    def places(self) -> Mapping[str, Any]:
        return self.runners["merged"].weights.places

    def check_memory(self, out: Path) -> None:
        """RefusedError where the sums of the widest site, or the files, are too large."""
        widths = [site.width for site in self.sites.values() if site.name in self.refitted]
        need = 4 * 10 * max(widths, default=0) ** 2
        if need > self.settings.memory:
            raise CannotStepError(
                f"a sequential graft of {self.checkpoints[0].path} takes {format_bytes(need)} for inputs {max(widths)}"
                f" wide, and {format_bytes(self.settings.memory)} are allowed: raise --memory, or give --ridge"
            )
        if problems := check_disk(out, 8 * 4 * sum(width**2 for width in widths)):
            raise RefusedError(problems)

    def meet(self, site: InputSite, here: Mapping[PassName, Any]) -> None:
        """Sum the inputs of one site and refit its weights."""
        if site.name in self.done:
            self.again.add(site.name)
            return
        own = sum_moments(here, "own", ("recipient", "donor"), site.width)
        if own is None:
            return
        sides = weigh_moments(own, sum_moments(here, "others", ("donor",), site.width), self.share)
        for name, view in self.refitted[site.name].items():
            self.merged.refit(name, view, self.checkpoints, sides)
        for number, side in enumerate(sides):
            self.keep(f"{number}.{site.name}.covariance", side.covariance)
            self.keep(f"{number}.{site.name}.drift", side.drifts[0])
        self.done[site.name] = (site, tuple(self.refitted[site.name]), (sides[0].rows, sides[1].rows))

    def keep(self, name: str, array: Array) -> None:
        """Put an array aside, on disk."""
        assert self._spool is not None
        path = Path(self._spool.name) / f"{len(self.arrays)}.npy"
        np.save(path, np.asarray(array, np.float32))
        self.arrays[name] = np.load(path, mmap_mode="r")

    def write(self, files: Sequence[Path], labels: Sequence[str], records: Sequence[DataRecord]) -> None:
        """Write both files."""
        covered = [name for _, weights, _ in self.done.values() for name in weights]
        for number, (file, model) in enumerate(zip(files, ("recipient", "donor"), strict=True)):
            runner = self.runners[model]  # type: ignore[index]
            sites, tensors = [], {}
            for name, (site, weights, rows) in self.done.items():
                digests = {weight: runner.weights.digests[weight] for weight in weights}
                sites.append(Site(name, digests, "moments", site.width, rows[number]))
                held = finish_rows(self.tally, site) if number == 0 else np.zeros((0, site.width), np.float32)
                tensors[f"{name}.held_back"] = held
                for part in ("covariance", "drift"):
                    tensors[f"{name}.{part}"] = self.arrays[f"{number}.{name}.{part}"]
            reasons = {**explain_missing(self.checkpoints[number], runner.weights, covered), **runner.not_covered}
            reasons = {name: reason for name, reason in reasons.items() if name not in covered}
            write_covariances(file, labels[number], (records[number],), sites, tensors, reasons)
