"""Where every tensor of the output will lie, fixed before anything is computed."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rgsp_jax.checkpoint.safetensors_header import build_header
from rgsp_jax.checkpoint.specs import TensorSpec
from rgsp_jax.errors import RefusedError

METADATA = {"format": "pt"}


@dataclass(frozen=True)
class Placement:
    """One tensor's place: shard number and absolute offset in that shard's file, in bytes."""

    shard: int
    offset: int
    spec: TensorSpec


@dataclass(frozen=True)
class Shard:
    """One file to write: its name, header (length prefix included), tensors in file order and size in bytes."""

    file_name: str
    header: bytes
    names: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class ShardPlan:
    """The files of one model and the place of every tensor in them; `total_size` counts tensor bytes only."""

    shards: tuple[Shard, ...]
    placements: Mapping[str, Placement]
    total_size: int

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.size for shard in self.shards)

    @property
    def weight_map(self) -> dict[str, str]:
        """Tensor name -> file name, sorted by tensor name."""
        return {name: self.shards[self.placements[name].shard].file_name for name in sorted(self.placements)}


def plan_shards(
    specs: Mapping[str, TensorSpec] | Iterable[TensorSpec],
    max_shard_size: int,
    metadata: Mapping[str, str] | None = None,
) -> ShardPlan:
    """Divide tensors into safetensors files of at most `max_shard_size` tensor bytes, in the given order.

    A tensor larger than the limit has a file of its own. One file is called `model.safetensors`, several
    `model-00001-of-0000N.safetensors`. Equal arguments give equal bytes.

    Args:
        specs: the tensors to write, in order.
        max_shard_size: bytes per file, headers not counted; at least 1.
        metadata: strings for the headers; `{"format": "pt"}` by default.

    Raises:
        RefusedError: no tensor, a name twice, a reserved or unencodable name, an unsupported dtype, a limit below 1.
    """
    ordered = list(specs.values() if isinstance(specs, Mapping) else specs)
    if not ordered:
        raise RefusedError("there is no tensor to write")
    if max_shard_size < 1:
        raise RefusedError(f"the maximum shard size is {max_shard_size} bytes; give at least 1")
    _check_names(ordered)
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in ordered:
        if groups[-1] and filled + spec.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    return _place(groups, METADATA if metadata is None else metadata)


def keep_shards(specs: Iterable[TensorSpec], numbers: Iterable[int]) -> ShardPlan:
    """Divide tensors into safetensors files as another model was: `numbers` are those of each one's file there.

    Raises:
        RefusedError: no tensor, a name twice, a reserved or unencodable name, an unsupported dtype.
    """
    groups: dict[int, list[TensorSpec]] = {}
    for spec, number in zip(specs, numbers, strict=True):
        groups.setdefault(number, []).append(spec)
    if not groups:
        raise RefusedError("there is no tensor to write")
    _check_names([spec for group in groups.values() for spec in group])
    return _place([groups[number] for number in sorted(groups)], METADATA)


def _place(groups: list[list[TensorSpec]], metadata: Mapping[str, str]) -> ShardPlan:
    shards: list[Shard] = []
    placements: dict[str, Placement] = {}
    for number, group in enumerate(groups):
        header, offsets = build_header(group, metadata)
        by_name = {spec.name: spec for spec in group}
        size = len(header) + sum(spec.nbytes for spec in group)
        shards.append(Shard(name_shard(number, len(groups)), header, tuple(offsets), size))
        placements |= {name: Placement(number, offset, by_name[name]) for name, offset in offsets.items()}
    return ShardPlan(tuple(shards), placements, sum(spec.nbytes for group in groups for spec in group))


def name_shard(number: int, count: int) -> str:
    """File name of shard `number` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _check_names(specs: list[TensorSpec]) -> None:
    problems = []
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            problems.append(f"the tensor name {spec.name!r} occurs twice")
        seen.add(spec.name)
        try:
            spec.name.encode("utf-8")
        except UnicodeEncodeError:
            problems.append(f"the tensor name {spec.name!r} is not valid Unicode")
    if problems:
        raise RefusedError(problems)
