"""What is settled before any work: whether there is a place for it, how it is cut, and who does what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.agreement import fingerprint
from rgsp_jax.pipeline.journal import explain_other
from rgsp_jax.pipeline.parts import Cut, cut_parts, deal, imbalance, predict, weigh
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.site import Site, choose_site

AUDIT_SHARE = 0.1
"""Of a part's work, for one that is merged already: it is read and hashed once more."""


@dataclass(frozen=True)
class Decision:
    """What process 0 settles for all."""

    fingerprint: str
    cut: Cut | None
    """None: the merge is one part, of as many files as its size takes."""
    left: Sequence[float]
    """Nominal seconds of what is left to do of every part."""
    dealt: Sequence[Sequence[int]]
    """For every process the parts that it works on."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Decision":
        """From plain data."""
        cut = None if data["cut"] is None else Cut(tuple(map(tuple, data["cut"]["parts"])))
        return cls(data["fingerprint"], cut, data["left"], data["dealt"])


def check_place(
    preparation: Preparation, out: Path | RemotePath, *, resume: bool = False, scratch: Path | None = None
) -> list[str]:
    """Why the merge cannot begin at `out` as things lie: an unfinished one is there, or too little room."""
    return choose_site(out, scratch).find_problems(preparation, resume=resume)


def decide(preparation: Preparation, site: Site, *, processes: int, distributed: bool, resume: bool) -> Decision:
    """How the merge is cut, or was, and who works on which part of it.

    Args:
        preparation: models and plan.
        site: of the output.
        processes: how many are to work.
        distributed: cut a merge that was not begun before, into parts of one file each.
        resume: go on with what is there.
    """
    if problems := site.find_problems(preparation, resume=resume):
        raise RefusedError(problems)
    mark, plan = fingerprint(preparation), preparation.plan
    loads = {name: weigh(task) for name, task in plan.tasks.items()}
    cut = None
    if begun := site.read_cut():
        noted, cut = begun
        if noted != mark or sorted(cut.numbers) != sorted(plan.tasks):
            raise explain_other(site.workshop)
    elif site.takes_parts(distributed):
        cut = cut_parts(list(loads.values()), preparation.config.max_shard_size, processes)
    seconds = predict(cut or Cut((tuple(plan.tasks),)), loads)
    done = site.count_done(preparation, cut)
    left = [own * (1 - share + AUDIT_SHARE) for own, share in zip(seconds, done, strict=True)]
    return Decision(mark, cut, left, deal(left, processes))


def describe_work(
    decision: Decision, work: Sequence[Mapping[str, Any]], audited: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What every process had to do, by the planner and by the clock; imbalances are the largest over the mean.

    `bytes_read` are those of weights that were merged, `bytes_hashed` of the models' whole files, for the report.
    """
    predicted = [sum(decision.left[number] for number in numbers) for numbers in decision.dealt]
    total = sum(predicted) or 1.0
    seconds = [one["seconds"] for one in work]
    return {
        "processes": len(work),
        "parts": len(decision.left),
        "parts_by_process": [[number + 1 for number in numbers] for numbers in decision.dealt],
        "bytes_read": [one["bytes_read"] for one in work],
        "bytes_hashed": [one["bytes_hashed"] for one in audited],
        "seconds": seconds,
        "predicted_share": [round(own / total, 4) for own in predicted],
        "predicted_imbalance": round(imbalance(predicted), 4),
        "measured_imbalance": round(imbalance(seconds), 4),
    }
