"""Where the work of a plan is done: items joined into waves, each wave dealt out over the devices of this process."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.plan import (
    BLOCK,
    IN_FLIGHT,
    Group,
    MergePlan,
    Piece,
    WorkItem,
    count_rows,
    matrix_workspace,
    step_bytes,
    step_rows,
)

SIMULATED = "XLA_FLAGS=--xla_force_host_platform_device_count={}"
"""What makes one machine's processors so many devices."""


@dataclass(frozen=True)
class Share:
    """What one device does of a wave."""

    group: Group
    pieces: tuple[Piece, ...]
    """Their slots are the share's own; a piece of elements may be part of an item's. None where nothing is left."""
    capacity: int
    """Matrix slots or blocks, the same on every device."""


class Segment(NamedTuple):
    """Matrix slots or blocks [start, stop) of a share that hold some of an item, which has them in this order."""

    share: int
    start: int
    stop: int


@dataclass(frozen=True)
class Wave:
    """Items of one group that are computed together: one call of the kernel, one share for each device."""

    items: tuple[WorkItem, ...]
    shares: tuple[Share, ...]
    segments: tuple[tuple[Segment, ...], ...]
    """Of every item."""

    @property
    def group(self) -> Group:
        return self.items[0].group

    @property
    def used(self) -> int:
        """Steps of the kernel that are not padding."""
        return sum(item.steps for item in self.items)

    @property
    def steps(self) -> int:
        """Steps of the kernel that every device takes."""
        return self.shares[0].capacity // step_rows(self.group)


class Size(NamedTuple):
    """How a group's waves are cut."""

    items: int
    """Joined in one wave; the last has what is left."""
    devices: int
    steps: int
    """Of the kernel on each device in a wave."""


@dataclass(frozen=True)
class Placement:
    """The devices of this process that merge, and what may be held for them."""

    devices: tuple[jax.Device, ...]
    memory: int
    """Bytes of this host's that the merge may take."""

    @property
    def shares_memory(self) -> bool:
        """True where the devices' memory is the host's."""
        return self.devices[0].platform == "cpu"

    def count_bytes(self, group: Group, size: Size) -> int:
        """Bytes of the host's that waves of this size take."""
        buffers = IN_FLIGHT * size.devices * size.steps * step_bytes(group)
        matrices = self.shares_memory and group.action == "matrices"
        return buffers + (size.devices * matrix_workspace(group) if matrices else 0)

    def size_waves(self, items: Sequence[WorkItem]) -> Size:
        """The cut of a group's items that takes the fewest steps, then the fewest waves, then the fewest devices.

        One item on one device is always possible: the plan has seen to that.
        """
        group = items[0].group
        capacity = items[0].capacity // step_rows(group)
        steps = [item.steps for item in items]
        single = Size(1, 1, capacity)
        if group.action == "copy":
            return single
        best = (len(items) * capacity, len(items), 1), single
        for devices in range(2, min(len(self.devices), sum(steps)) + 1):
            for joined in range(1, min(len(items), devices) + 1):
                loads = [-(-sum(steps[i : i + joined]) // devices) for i in range(0, len(items), joined)]
                size = Size(joined, devices, loads[0])
                rank = sum(loads), len(loads), devices
                idle = sum(steps[:joined]) < devices
                if rank < best[0] and not idle and self.count_bytes(group, size) <= self.memory:
                    best = rank, size
        return best[1]

    def peak_memory(self, plan: MergePlan) -> int:
        """Bytes of the host's above the process's size after import."""
        return max(
            (self.count_bytes(w.group, Size(1, len(w.shares), w.steps)) for w in self.waves(plan.items)), default=0
        )

    def waves(self, items: Iterable[WorkItem]) -> Iterator[Wave]:
        """The items, in their order, joined into waves; a group's have one shape, the last may have another."""
        for _, members in itertools.groupby(items, key=lambda item: id(item.group)):
            own = list(members)
            size = self.size_waves(own)
            for first in range(0, len(own), size.items):
                yield deal_items(own[first : first + size.items], size)


def place_merge(plan: MergePlan, *, devices: int | None = None) -> Placement:
    """The devices that do a plan's work.

    Args:
        plan: without problems.
        devices: how many of this process's devices to take; None is all accelerators, or one where there are none.

    Raises:
        RefusedError: there are not so many.
    """
    return Placement(choose_devices(devices), plan.memory)


def choose_devices(count: int | None) -> tuple[jax.Device, ...]:
    """The first devices of this process; RefusedError where there are fewer."""
    local = tuple(jax.local_devices())
    if count is None:
        return local[:1] if local[0].platform == "cpu" else local
    if count < 1:
        raise RefusedError(f"--devices {count}: give 1 or more")
    if count > len(local):
        kind = f"{len(local)} {local[0].platform} device{'s' if local[1:] else ''}"
        raise RefusedError(
            f"--devices {count}: this process has {kind}; a machine's processors count as so many devices with"
            f" {SIMULATED.format(count)} in the environment"
        )
    return local[:count]


def deal_items(items: Sequence[WorkItem], size: Size) -> Wave:
    """One wave: the items' matrices, or chunks, in order over the devices, to each as many as to the next or one more.

    A last wave that needs another shape than the ones before is dealt to no more devices than it has work for.
    """
    group = items[0].group
    if size.devices == 1:
        (item,) = items
        used = item.pieces[-1].slot + count_rows(group, item.pieces[-1])
        return Wave((item,), (Share(group, item.pieces, item.capacity),), ((Segment(0, 0, used),),))
    unit = step_rows(group)
    total = sum(item.steps for item in items)
    load = -(-total // size.devices)
    devices = size.devices if load == size.steps else min(size.devices, total)
    bounds = [0]
    for device in range(devices):
        bounds.append(bounds[-1] + total // devices + (device < total % devices))
    pieces: list[list[Piece]] = [[] for _ in range(devices)]
    segments: list[tuple[Segment, ...]] = []
    begin = 0
    for item in items:
        end = begin + item.steps
        own = []
        for share in range(devices):
            low, high = max(begin, bounds[share]), min(end, bounds[share + 1])
            if low < high:
                segment = Segment(share, (low - bounds[share]) * unit, (high - bounds[share]) * unit)
                own.append(segment)
                pieces[share] += cut_pieces(item, (low - begin) * unit, segment)
        segments.append(tuple(own))
        begin = end
    shares = tuple(Share(group, tuple(own), load * unit) for own in pieces)
    return Wave(tuple(items), shares, tuple(segments))


def cut_pieces(item: WorkItem, first: int, segment: Segment) -> Iterator[Piece]:
    """The pieces of an item's rows from `first` on, as they lie in a segment."""
    last = first + segment.stop - segment.start
    for piece in item.pieces:
        low, high = max(piece.slot, first), min(piece.slot + count_rows(item.group, piece), last)
        if low >= high:
            continue
        slot = segment.start + low - first
        if item.group.action == "matrices":
            yield Piece(piece.name, piece.start, piece.size, slot)
        else:
            skipped = (low - piece.slot) * BLOCK
            yield Piece(piece.name, piece.start + skipped, min(piece.size - skipped, (high - low) * BLOCK), slot)
