"""The last look at a finished output before it gets its name: everything expected is there, as it was computed."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rgsp_jax.checkpoint import ShardWriter, TensorSpec, digest, hash_file, open_checkpoint
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
    """Compare the files of one writer with the plan of what is in them, and with the journal.

    Every key, shape and dtype is there and nothing else; every piece was written once and reads back as computed.

    Args:
        directory: of the files.
        plan: of the tensors in them.
        pieces: of every tensor, from the journal.
        writer: of the files.
        on_tensor: called with each tensor's name and bytes.

    Returns:
        Digest (XXH3-128) of every tensor, and SHA-256 of every weight file by name.

    Raises:
        RefusedError: lists every difference.
    """
    files = [directory / shard.file_name for shard in writer.shards]
    found: dict[str, TensorSpec] = {}
    for path in files:
        with open_checkpoint(path) as output:
            found |= output.specs
    problems = compare_specs(found, plan)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(1) as pool:
        hashes = {path.name: pool.submit(hash_file, path) for path in files}
        for name, task in plan.tasks.items():
            own = pieces.get(name, ())
            if not covers(own, task.size):
                problems.append(f"audit: {name!r} is not written whole")
                continue
            whole = xxhash.xxh3_128()
            for piece in own:
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


def compare_specs(found: Mapping[str, TensorSpec], plan: MergePlan) -> list[str]:
    """One sentence per tensor that is not as planned."""
    wrong = [
        f"audit: {n!r} is missing or differs from the plan" for n, spec in plan.specs.items() if found.get(n) != spec
    ]
    return wrong + [f"audit: {name!r} was not to be written" for name in found if name not in plan.tasks]


def audit_whole(directory: Path, plan: MergePlan, digests: Sequence[Mapping[str, str]]) -> None:
    """Check that audited parts are the whole: each tensor in one of them, and found through the index.

    Args:
        directory: of the output, with its index.
        plan: of all of it.
        digests: of the tensors of every part.

    Raises:
        RefusedError: lists every tensor that is in no part or in several, or not where the index says.
    """
    problems = find_uneven(plan, digests)
    if not problems:
        with open_checkpoint(directory) as output:
            problems = compare_specs(output.specs, plan)
    if problems:
        raise RefusedError(problems)


def find_uneven(plan: MergePlan, parts: Sequence[Mapping[str, str]]) -> list[str]:
    """One sentence per tensor that is not in exactly one of some parts, given by their tensors' digests."""
    count = Counter(name for part in parts for name in part)
    problems = [f"audit: {n!r} is in {count[n]} finished parts, not in one" for n in plan.tasks if count[n] != 1]
    return problems + [f"audit: {name!r} was not to be written" for name in count if name not in plan.tasks]


def covers(pieces: Sequence[Mapping[str, Any]], size: int) -> bool:
    """True where sorted pieces cover [0, size) without gap or overlap."""
    position = 0
    for piece in pieces:
        if piece["start"] != position:
            return False
        position += piece["size"]
    return position == size and bool(pieces)
