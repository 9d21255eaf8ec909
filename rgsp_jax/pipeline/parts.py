"""Cutting a merge into parts that processes do one by one, and dealing these to processes; pure.

A part is a set of whole tensors with a weight file and a journal of its own. Tensors are dealt to parts, and parts to
processes, by longest processing time first: the heaviest goes to where there is least. For equal processes without a
limit on size the last to finish takes at most 4/3 of the best possible time (Graham, Bounds on Multiprocessing Timing
Anomalies, 1969).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.plan import MergePlan, TensorTask, estimate_flops

NAME = "parts.json"
"""File of an unfinished output that says how it was cut."""
BYTES_A_SECOND, FLOPS_A_SECOND = 0.8e9, 20e9
"""What weighs a tensor's bytes against its arithmetic. Fixed, so that a cut is the same wherever it is made."""


@dataclass(frozen=True)
class Load:
    """What one tensor costs."""

    name: str
    bytes_out: int
    seconds: float
    """Of a nominal process; only ratios matter."""


@dataclass(frozen=True)
class Cut:
    """How the tensors of a merge are divided: the names of every part, in the model's order."""

    parts: tuple[tuple[str, ...], ...]

    @property
    def numbers(self) -> dict[str, int]:
        """Tensor name -> number of its part."""
        return {name: number for number, names in enumerate(self.parts) for name in names}


def weigh(task: TensorTask) -> Load:
    """The load of one tensor: its bytes, read from every model and written, and its arithmetic."""
    bytes_out = task.size * task.out_dtype.itemsize
    moved = bytes_out + task.size * sum(dtype.itemsize for dtype in task.in_dtypes)
    if task.inputs is not None and task.view is not None:
        moved += task.view.matrices[0] * task.inputs.bytes
    return Load(task.name, bytes_out, moved / BYTES_A_SECOND + estimate_flops(task) / FLOPS_A_SECOND)


def cut_parts(loads: Sequence[Load], max_bytes: int, processes: int) -> Cut:
    """Divide tensors into parts of about equal load, whose bytes do not pass a limit.

    As few parts as the limit allows, in a multiple of the number of processes where there are tensors for so many.
    The heaviest tensors are dealt first, so that those of one load spread over all parts.

    Args:
        loads: of every tensor, in the model's order.
        max_bytes: of the tensors of one part; a tensor that is larger is a part by itself.
        processes: that are to work on the parts.
    """
    order = sorted(range(len(loads)), key=lambda i: (-loads[i].seconds, -loads[i].bytes_out, i))
    large = [load for load in loads if load.bytes_out > max_bytes]
    rest = sum(load.bytes_out for load in loads) - sum(load.bytes_out for load in large)
    count = processes * max(1, -(-(len(large) + -(-rest // max_bytes)) // processes))
    while True:
        packed = pack([loads[i] for i in order], max_bytes, count)
        if packed is not None:
            break
        count += processes
    position = {load.name: i for i, load in enumerate(loads)}
    return Cut(tuple(tuple(sorted(names, key=position.__getitem__)) for names in packed if names))


def pack(loads: Sequence[Load], max_bytes: int, count: int) -> list[list[str]] | None:
    """Names of `count` parts, every load given to the least busy part that has room; None where one fits nowhere."""
    parts: list[list[str]] = [[] for _ in range(count)]
    seconds, filled = [0.0] * count, [0] * count
    for load in loads:
        open_parts = [i for i in range(count) if not parts[i] or filled[i] + load.bytes_out <= max_bytes]
        if not open_parts:
            return None
        chosen = min(open_parts, key=lambda i: (seconds[i], filled[i], len(parts[i]), i))
        parts[chosen].append(load.name)
        seconds[chosen] += load.seconds
        filled[chosen] += load.bytes_out
    return parts


def deal(seconds: Sequence[float], processes: int) -> list[list[int]]:
    """For every process the numbers of its parts, the longest first given to whoever has least."""
    dealt: list[list[int]] = [[] for _ in range(processes)]
    busy = [0.0] * processes
    for number in sorted(range(len(seconds)), key=lambda i: (-seconds[i], i)):
        chosen = min(range(processes), key=lambda p: (busy[p], len(dealt[p]), p))
        dealt[chosen].append(number)
        busy[chosen] += seconds[number]
    return [sorted(numbers) for numbers in dealt]


def imbalance(values: Sequence[float]) -> float:
    """Largest over mean: 1 is even, P is all on one of P processes."""
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 1.0


def to_json(cut: Cut, fingerprint: str) -> str:
    """A cut as it lies beside an unfinished output."""
    return json.dumps({"fingerprint": fingerprint, "parts": cut.parts}, indent=1) + "\n"


def read_cut(path: Path) -> tuple[str, Cut]:
    """Fingerprint and cut as noted; RefusedError where the file is damaged."""
    return parse_cut(path.read_bytes(), path, path.parent)


def parse_cut(text: bytes, path: object, workshop: object) -> tuple[str, Cut]:
    """As `read_cut`, of what was noted at `path` in `workshop`."""
    try:
        found = json.loads(text)
        return str(found["fingerprint"]), Cut(tuple(tuple(map(str, names)) for names in found["parts"]))
    except (ValueError, KeyError, TypeError):
        raise RefusedError(f"{path} cannot be read, so the merge cannot be resumed: delete {workshop}") from None


def describe_parts(plan: MergePlan, max_bytes: int, processes: int) -> list[dict[str, Any]]:
    """For every process what would be its work, for `--plan`."""
    loads = {name: weigh(task) for name, task in plan.tasks.items()}
    cut = cut_parts(list(loads.values()), max_bytes, processes)
    seconds = predict(cut, loads)
    dealt = deal(seconds, processes)
    mean = sum(seconds) / processes
    rows = []
    for process, numbers in enumerate(dealt):
        tasks = [plan.tasks[name] for number in numbers for name in cut.parts[number]]
        rows.append(
            {
                "process": process,
                "parts": [number + 1 for number in numbers],
                "tensors": len(tasks),
                "bytes_in": sum(count_bytes_in(task) for task in tasks),
                "bytes_out": sum(loads[task.name].bytes_out for task in tasks),
                "load": round(sum(seconds[number] for number in numbers) / mean, 4) if mean else 0.0,
            }
        )
    return rows


def count_bytes_in(task: TensorTask) -> int:
    """Bytes of a tensor in all models that are read for it."""
    return task.size * sum(dtype.itemsize for dtype in task.in_dtypes)


def predict(cut: Cut, loads: Mapping[str, Load]) -> list[float]:
    """Nominal seconds of every part."""
    return [sum(loads[name].seconds for name in names) for names in cut.parts]
