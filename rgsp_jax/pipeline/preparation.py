"""Opened models and the plan of their merge, or everything that stands against it."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rgsp_jax.checkpoint import (
    Checkpoint,
    CovarianceFile,
    RenamedCheckpoint,
    as_on_disk,
    check_output,
    find_foreign,
    find_problems,
    open_checkpoint,
    open_covariances,
)
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.config import MergeConfig
from rgsp_jax.pipeline.plan import InputSite, MergePlan, is_merged, plan_merge
from rgsp_jax.rules import BUFFER_NAMES


@dataclass(frozen=True)
class Preparation:
    """Opened models and the plan of their merge."""

    config: MergeConfig
    checkpoints: tuple[Checkpoint, ...]
    """The base last, where the config has one."""
    plan: MergePlan
    labels: tuple[str, ...]
    covariances: tuple[CovarianceFile, ...] = ()
    model_type: str | None = None
    """Of the models' architecture, where known."""
    sites: tuple[Mapping[str, InputSite], ...] = ()
    """For every covariance file, tensor name -> where its inputs lie."""
    shared_memory: bool | None = None
    """The plan is for devices that work in the host's memory; None is as they do here."""

    @property
    def with_base(self) -> bool:
        return self.config.base is not None

    def plan_part(self, names: Sequence[str]) -> MergePlan:
        """The plan of some of the tensors, each done as in the plan of all."""
        specs = [checkpoint.specs for checkpoint in self.checkpoints]
        return plan_merge(
            self.config,
            specs,
            names=names,
            model_type=self.model_type,
            sites=self.sites,
            shared_memory=self.shared_memory,
        )


@contextmanager
def prepare(
    config: MergeConfig, out: Path | RemotePath | None = None, *, shared_memory: bool | None = None
) -> Iterator[Preparation]:
    """Open the models and plan their merge from headers.

    Args:
        config: what to merge and how.
        out: where to write.
        shared_memory: for devices that work in the host's memory; None is as they do here.

    Raises:
        RefusedError: everything that stands against the merge, over all models, at once.
    """
    problems: list[str] = config.problems()
    checkpoints: list[Checkpoint] = []
    labels = [*config.models, *([config.base] if config.base else [])]
    with ExitStack() as stack:
        for label in labels:
            try:
                checkpoints.append(stack.enter_context(open_checkpoint(label)))
            except RefusedError as error:
                problems += error.problems
        covariances: list[CovarianceFile] = []
        for path in config.covariances:
            try:
                covariances.append(stack.enter_context(open_covariances(path)))
            except RefusedError as error:
                problems += error.problems
        if out is not None:
            problems += check_output(out, checkpoints)
        if len(checkpoints) == len(labels) and checkpoints:
            checkpoints, unmapped = rename_others(config, checkpoints)
            models, first = checkpoints[: len(config.models)], checkpoints[0]
            # Only what is merged has to be in the base: buffers are the first model's, and a base may have a head.
            problems += unmapped or [
                *find_problems(models, skip=lambda name: not is_merged(config, name)),
                *find_problems(
                    [first, *checkpoints[len(models) :]], skip=lambda name: not needs_base(config, first, name)
                ),
            ]
        if problems:
            raise RefusedError(problems)
        first = checkpoints[0]
        # A Hugging Face model ties its weights itself; elsewhere every name must be in the file.
        tied = first.aliases if first.config is not None and first.format != "orbax" else {}
        names = [name for name in first.specs if name not in tied]
        model_type = (first.config or {}).get("model_type")
        for file, checkpoint in zip(covariances, checkpoints, strict=False):
            there = as_on_disk(checkpoint).specs
            if strangers := [name for name in file.site_of if name not in there]:
                others = f" and {len(strangers) - 1} others" if strangers[1:] else ""
                problems.append(
                    f"{file.path} was made with another model: {checkpoint.path} has no {strangers[0]!r}{others}"
                )
        if problems:
            raise RefusedError(problems)
        sites = [list_sites(*pair) for pair in zip(covariances, checkpoints, strict=False)]
        specs = [checkpoint.specs for checkpoint in checkpoints]
        plan = plan_merge(config, specs, names=names, model_type=model_type, sites=sites, shared_memory=shared_memory)
        if plan.problems:
            raise RefusedError(plan.problems)
        opened = tuple(checkpoints), plan, tuple(labels), tuple(covariances)
        yield Preparation(config, *opened, model_type, tuple(sites), shared_memory)


def needs_base(config: MergeConfig, first: Checkpoint, name: str) -> bool:
    """True for tensors that the base must have as the first model has them."""
    return is_merged(config, name) and name in first.specs and first.specs[name].kind == "float"


LENGTHS = {"sketch": "sketch", "spectrum": "values"}
"""Kind of site -> the array whose length is its number of rows."""


def rename_others(config: MergeConfig, checkpoints: list[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """The models under the first one's names, by the config's key map, and what stands against that."""
    if config.key_map is None:
        return checkpoints, []
    renamed: list[Checkpoint] = checkpoints[:1]
    problems: list[str] = []
    for checkpoint in checkpoints[1:]:
        try:
            same = checkpoint.specs.keys() == checkpoints[0].specs.keys()
            renamed.append(checkpoint if same else RenamedCheckpoint(checkpoint, config.key_map.translate))
        except RefusedError as error:
            renamed.append(checkpoint)
            problems += error.problems
    return renamed, problems


def list_sites(covariances: CovarianceFile, checkpoint: Checkpoint) -> dict[str, InputSite]:
    """Tensor name in the merge -> where its inputs lie and how much of them there is."""
    on_disk = checkpoint.on_disk if isinstance(checkpoint, RenamedCheckpoint) else {n: n for n in checkpoint.specs}
    held_back: Counter[int] = Counter()  # by width: one kernel serves all sites of a width
    for site in covariances.sites.values():
        if site.kind != "counts":
            held_back[site.width] = max(held_back[site.width], covariances.shape(site.name, "held_back")[0])
    found = {}
    for new, name in on_disk.items():
        if name not in covariances.site_of:
            continue
        site = covariances.site_of[name]
        rows = covariances.shape(site.name, LENGTHS[site.kind])[0] if site.kind in LENGTHS else 0
        found[new] = InputSite(site.name, site.kind, site.width, rows, held_back[site.width])
    return found


def check_covariances(preparation: Preparation, names: Collection[str] | None = None) -> None:
    """RefusedError where covariances were collected from other weights than the model's they stand for.

    Args:
        preparation: models and covariances.
        names: tensors of the merge to look at; None is all.
    """
    problems = []
    for file, checkpoint in zip(preparation.covariances, preparation.checkpoints, strict=False):
        there = {to_disk(checkpoint, name) for name in names} if names is not None else None
        problems += find_foreign(file, as_on_disk(checkpoint), there)
    if problems:
        raise RefusedError(problems)


def to_disk(checkpoint: Checkpoint, name: str) -> str | None:
    """The name that a tensor has in the model's own files."""
    return checkpoint.on_disk.get(name) if isinstance(checkpoint, RenamedCheckpoint) else name


def check_buffers(preparation: Preparation, names: Collection[str] | None = None) -> dict[str, list[str]]:
    """Flags of buffers that differ between models; RefusedError for integers that are no known buffer and differ.

    Args:
        preparation: models and plan.
        names: tensors to look at; None is all.
    """
    first, *others = preparation.checkpoints[: len(preparation.config.models)]
    flags: dict[str, list[str]] = {}
    problems = []
    for task in preparation.plan.tasks.values():
        if task.kind != "buffer" or (names is not None and task.name not in names):
            continue
        ours = first.read(task.name)
        for other in others:
            theirs = other.read(task.name)
            same = np.array_equal(theirs, ours) if theirs.dtype != ours.dtype else theirs.tobytes() == ours.tobytes()
            if same:
                continue
            if BUFFER_NAMES.search(task.name):
                flags[task.name] = ["buffer_differs"]
            else:
                problems.append(
                    f"tensor {task.name!r} holds {task.out_dtype} values that differ between {first.path} and"
                    f" {other.path}: such values cannot be merged; --exclude it to keep the first model's"
                )
    if problems:
        raise RefusedError(problems)
    return flags
