"""The last look at a finished output before it gets its name: everything expected is there, as it was computed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rgsp_jax.checkpoint import ShardWriter, digest, hash_file, open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.plan import MergePlan


def verify_piece(writer: ShardWriter, dtype: np.dtype, piece: Mapping[str, Any]) -> bool:
    """True where the data on disk are those the journal noted."""
    data = np.empty(piece["size"], dtype)
    writer.read_back(piece["name"], data, piece["start"])
    return digest(data) == piece["digest"]


def audit(
    directory: Path,
    plan: MergePlan,
    pieces: Mapping[str, Sequence[Mapping[str, Any]]],
    writer: ShardWriter,
    on_tensor: Callable[[str, int], None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Compare an output with its plan and journal.

    Every key, shape and dtype is there and nothing else; every piece was written once and reads back as computed.

    Returns:
        Digest (XXH3-128) of every tensor, and SHA-256 of every weight file by name.

    Raises:
        RefusedError: lists every difference.
    """
    with open_checkpoint(directory) as output:
        problems = [
            f"audit: {name!r} is missing or differs from the plan"
            for name, spec in plan.specs.items()
            if output.specs.get(name) != spec
        ]
        problems += [f"audit: {name!r} was not to be written" for name in output.specs if name not in plan.tasks]
        files = output.weight_files
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(1) as pool:
        hashes = {path.name: pool.submit(hash_file, path) for path in files}
        for name, task in plan.tasks.items():
            found = pieces.get(name, ())
            if not covers(found, task.size):
                problems.append(f"audit: {name!r} is not written whole")
                continue
            bad = [p for p in found if not verify_piece(writer, task.out_dtype, p)]
            if bad:
                problems.append(f"audit: {name!r} on disk is not what was computed: the disk or its memory is failing")
            digests[name] = found[0]["digest"] if len(found) == 1 else combine([p["digest"] for p in found])
            on_tensor(name, task.size * task.out_dtype.itemsize)
        if problems:
            raise RefusedError(problems)
        return digests, {name: future.result() for name, future in hashes.items()}


def covers(pieces: Sequence[Mapping[str, Any]], size: int) -> bool:
    """True where sorted pieces cover [0, size) without gap or overlap."""
    position = 0
    for piece in pieces:
        if piece["start"] != position:
            return False
        position += piece["size"]
    return position == size and bool(pieces)


def combine(digests: Sequence[str]) -> str:
    """Digest of digests, for tensors written in several pieces."""
    return digest(np.frombuffer("".join(digests).encode(), np.uint8))
