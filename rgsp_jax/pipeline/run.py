"""One call of `merge_checkpoints`, and what every merge ends with, wherever its output lies."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import ShardPlan, copy_companions
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import NotFiniteError, RefusedError
from rgsp_jax.pipeline.config import MergeConfig
from rgsp_jax.pipeline.decision import Decision, describe_work
from rgsp_jax.pipeline.execute import Compute
from rgsp_jax.pipeline.overview import dominant_dtype, needs_dtype, summarise, write_overview
from rgsp_jax.pipeline.placement import Devices
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.processes import Team
from rgsp_jax.pipeline.records import build_records, find_bad_inputs, find_bad_outputs
from rgsp_jax.pipeline.site import Site, choose_site
from rgsp_jax.pipeline.work import Progress

Pieces = Mapping[str, Sequence[Mapping[str, Any]]]
PROCESSES = "merge_processes.json"
"""What every process did, beside an output that several made."""


@dataclass(frozen=True)
class Run:
    """One process's call of `merge_checkpoints`."""

    config: MergeConfig
    out: Path | RemotePath
    team: Team
    distributed: bool
    resume: bool
    progress: Progress | None
    compute: Compute | None
    overview: bool
    devices: int | Devices | None
    scratch: Path | None = None
    """Where the files of an output in a store are made; None is a directory for temporary files."""

    @property
    def site(self) -> Site:
        return choose_site(self.out, self.scratch)

    @property
    def leads(self) -> bool:
        """True in the process that acts for all."""
        return self.team.index == 0


@dataclass
class Spoilt:
    """Whether what lies in the workshop is of no use to anyone who resumes."""

    all: bool = False


@dataclass
class Merged:
    """What process 0 gathers of the merged parts."""

    pieces: dict[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    work: list[dict[str, Any]] = field(default_factory=list)


def nothing() -> None:
    """The work of a process that only waits for process 0's."""


def refuse_non_finite(preparation: Preparation, pieces: Pieces) -> None:
    """Refuse inputs, and merges, that hold an infinity or a NaN; all of them at once."""
    if problems := find_bad_inputs(preparation.plan, pieces, preparation.labels):
        raise RefusedError(problems)
    if problems := find_bad_outputs(preparation.plan, pieces):
        raise NotFiniteError(problems)


def is_finite(preparation: Preparation, pieces: Pieces) -> bool:
    """Whether `refuse_non_finite` has nothing against some tensors."""
    with suppress(RefusedError):
        refuse_non_finite(preparation, pieces)
        return True
    return False


def complete(
    directory: Path,
    run: Run,
    preparation: Preparation,
    decision: Decision,
    shards: ShardPlan,
    merged: Merged,
    flags: Mapping[str, list[str]],
    audited: Sequence[Mapping[str, Any]],
    digests: Mapping[str, str],
    files: dict[str, str],
) -> dict[str, Any]:
    """Write everything beside the audited weights; facts of the result.

    Args:
        directory: to write to.
        run, preparation, decision, shards, flags: of the merge.
        merged, audited: what all processes found.
        digests: of every tensor.
        files: SHA-256 of every weight file of the output.
    """
    plan, first = preparation.plan, preparation.checkpoints[0]
    dtype = dominant_dtype(plan)
    copy_companions(first, directory, dtype=dtype if needs_dtype(first.config, dtype) else None)
    records = build_records(plan, merged.pieces, digests, flags)
    known = {(model, file): value for found in audited for model, file, value in found["hashes"]}
    hashes = [
        [known.get((k, i), "") for i in range(len(c.weight_files))] for k, c in enumerate(preparation.checkpoints)
    ]
    summary = summarise(preparation, run.out.name, records, hashes, shards)
    processes = describe_work(decision, merged.work, audited) if run.distributed or decision.cut else None
    if run.overview:
        write_overview(directory, summary, records, files)
    (directory / PROCESSES).unlink(missing_ok=True)  # of a run that got so far
    if processes is not None:
        (directory / PROCESSES).write_text(json.dumps(processes, indent=2) + "\n", encoding="utf-8")
    return {
        "method": summary.method,
        "tensors": len(plan.tasks),
        "counts_by_rule": dict(summary.counts_by_rule),
        "flag_counts": dict(summary.flag_counts),
        "warnings": tuple(summary.warnings),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "resumed_items": sum(one["resumed"] for one in merged.work),
        "files": files,
        "processes": processes,
    }
