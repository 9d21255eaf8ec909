"""The last look at a finished output before it gets its name: everything expected is there, as it was computed."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rgsp_jax.checkpoint import ShardWriter, digest, hash_file, open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.plan import MergePlan


def read_piece(writer: ShardWriter, dtype: np.dtype, piece: Mapping[str, Any]) -> np.ndarray | None:
    """The data on disk, None where they are not those the journal noted."""
    data = np.empty(piece["size"], dtype)
    writer.read_back(piece["name"], data, piece["start"])
    return data if digest(data) == piece["digest"] else None


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
            whole = xxhash.xxh3_128()
            for piece in found:
                data = read_piece(writer, task.out_dtype, piece)
                if data is None:
                    problems.append(f"audit: {name!r} on disk is not what was computed: the disk or memory is failing")
                    break
                whole.update(data.view(np.uint8).data)
            digests[name] = whole.hexdigest()
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
