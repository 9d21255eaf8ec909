"""Where the work of a plan is done: items joined into waves, each wave dealt out over the devices of this process."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax

from rgsp_jax.checkpoint import format_bytes
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.hardware import DeviceKind
from rgsp_jax.pipeline.plan import (
    BLOCK,
    IN_FLIGHT,
    Group,
    MergePlan,
    Piece,
    WorkItem,
    count_rows,
    is_factorised,
    matrix_workspace,
    step_bytes,
    step_rows,
)
from rgsp_jax.registry import methods

MARGIN = 0.1
"""Share of a device's memory left to compiled programs and to what lies between buffers."""
COMPILER = 400_000_000
"""Bytes of the host's that XLA takes for the kernels of a decomposition, while a wave is in memory already: what a
merge of `tests/pipeline/measured_merge.py` by rgsp has at its peak less what it has with a filled
JAX_COMPILATION_CACHE_DIR."""
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
    divided: int = 1
    """Devices that share each matrix of the one item, merged one after the other, where it is too large for one."""

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


@dataclass(frozen=True)
class PlannedDevice:
    """Stands for a device that need not be here, where only a plan is made."""

    platform: str


@dataclass(frozen=True)
class Devices:
    """Which devices of this process merge, as a user says it."""

    count: int | None = None
    """None is all accelerators, or one where there are none."""
    memory: int | None = None
    """Bytes to take of each one's; None is what it says that it has, less a margin."""


class Size(NamedTuple):
    """How a group's waves are cut."""

    items: int
    """Joined in one wave; the last has what is left."""
    devices: int
    steps: int
    """Of the kernel on each device in a wave."""
    divided: bool = False
    """The devices share each matrix, and take one after the other."""


@dataclass(frozen=True)
class Placement:
    """The devices of this process that merge, and what may be held for them."""

    devices: tuple[jax.Device, ...]
    memory: int
    """Bytes of this host's that the merge may take."""
    device_memory: int | None = None
    """Bytes of one device's that it may take; None is as many as are needed."""

    @property
    def shares_memory(self) -> bool:
        """True where the devices' memory is the host's."""
        return self.devices[0].platform == "cpu"

    def count_bytes(self, group: Group, size: Size) -> int:
        """Bytes of the host's that waves of this size take."""
        if size.divided:  # and the merged matrix, put together from its parts
            own = (IN_FLIGHT * size.steps + 1) * step_bytes(group)
            return own + (size.devices * matrix_workspace(group, size.devices) if self.shares_memory else 0)
        buffers = IN_FLIGHT * size.devices * size.steps * step_bytes(group)
        matrices = self.shares_memory and group.action == "matrices"
        return buffers + (size.devices * matrix_workspace(group) if matrices else 0)

    def count_device_bytes(self, group: Group, size: Size) -> int:
        """Bytes of one device's: for all matrices of its share at once, on a CPU for one after the other."""
        if group.action != "matrices":
            return size.steps * step_bytes(group)
        if size.divided:
            return matrix_workspace(group, size.devices) + -(-step_bytes(group) // size.devices)
        at_once = 1 if self.shares_memory else size.steps
        return size.steps * step_bytes(group) + at_once * matrix_workspace(group)

    def fits(self, group: Group, size: Size, spare: int = 0) -> bool:
        """Whether the host, less some bytes, and the devices have room for waves of this size."""
        on_device = self.device_memory is None or self.count_device_bytes(group, size) <= self.device_memory
        return on_device and self.count_bytes(group, size) + spare <= self.memory

    def is_too_large(self, group: Group) -> bool:
        """True where not even one matrix has room on a device."""
        one = self.count_device_bytes(group, Size(1, 1, 1))
        return group.action == "matrices" and self.device_memory is not None and one > self.device_memory

    def divide_matrices(self, group: Group, capacity: int) -> Size | None:
        """Every matrix of a group over as many devices as have room; None where there are not enough."""
        if not methods[group.method].row_divisible:
            return None
        sizes = (Size(1, count, capacity, divided=True) for count in range(len(self.devices), 1, -1))
        return next((size for size in sizes if self.fits(group, size)), None)

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
        if self.is_too_large(group):
            return self.divide_matrices(group, capacity) or single
        spare = COMPILER if self.shares_memory and group.action == "matrices" and is_factorised(group) else 0
        best = (len(items) * capacity, len(items), 1), single
        for devices in range(2, min(len(self.devices), sum(steps)) + 1):
            for joined in range(1, min(len(items), devices) + 1):
                loads = [-(-sum(steps[i : i + joined]) // devices) for i in range(0, len(items), joined)]
                size = Size(joined, devices, loads[0])
                rank = sum(loads), len(loads), devices
                if rank < best[0] and sum(steps[:joined]) >= devices and self.fits(group, size, spare):
                    best = rank, size
        return best[1]

    def peak_memory(self, plan: MergePlan) -> int:
        """Bytes of the host's above the process's size after import."""
        return max((self.count_bytes(wave.group, size_of(wave)) for wave in self.waves(plan.items)), default=0)

    def peak_device_memory(self, plan: MergePlan) -> int:
        """Bytes of one device's."""
        return max((self.count_device_bytes(wave.group, size_of(wave)) for wave in self.waves(plan.items)), default=0)

    def waves(self, items: Iterable[WorkItem]) -> Iterator[Wave]:
        """The items, in their order, joined into waves; a group's have one shape, the last may have another."""
        for _, members in itertools.groupby(items, key=lambda item: id(item.group)):
            own = list(members)
            size = self.size_waves(own)
            for first in range(0, len(own), size.items):
                yield deal_items(own[first : first + size.items], size)


def size_of(wave: Wave) -> Size:
    """Of one wave as it is."""
    return Size(len(wave.items), max(wave.divided, len(wave.shares)), wave.steps, wave.divided > 1)


def place_merge(plan: MergePlan, *, devices: int | Devices | None = None) -> Placement:
    """The devices that do a plan's work: so many, or as described.

    Raises:
        RefusedError: there are not so many, or a matrix has no room on one of them, nor divided over all.
    """
    wanted = devices if isinstance(devices, Devices) else Devices(devices)
    chosen = choose_devices(wanted.count)
    limit = read_limit(chosen) if wanted.memory is None else wanted.memory
    return checked(plan, Placement(chosen, plan.memory, limit))


def place_planned(plan: MergePlan, devices: Devices, kind: DeviceKind) -> Placement:
    """As `place_merge`, on devices of a kind that need not be here.

    Args:
        plan: made for such devices.
        devices: how many, and the bytes to take of each; None is what they have, less a margin.
        kind: of the devices.
    """
    stand_ins = tuple(PlannedDevice(kind.platform) for _ in range(devices.count or 1))
    limit = devices.memory
    if limit is None and kind.memory is not None:
        limit = int((1 - MARGIN) * kind.memory.value)
    return checked(plan, Placement(cast("tuple[jax.Device, ...]", stand_ins), plan.memory, limit))


def checked(plan: MergePlan, placement: Placement) -> Placement:
    """A placement that has room for all; RefusedError for one that has not."""
    if problems := find_too_large(plan, placement):
        raise RefusedError(problems)
    return placement


def read_limit(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that the smallest device lends, less a margin; None where devices do not say."""
    stats = [device.memory_stats() or {} for device in devices]
    limits = [of["bytes_limit"] for of in stats if "bytes_limit" in of]
    return int((1 - MARGIN) * min(limits)) if limits else None


def find_too_large(plan: MergePlan, placement: Placement) -> list[str]:
    """One sentence for each group of matrices that the devices have no room for."""
    problems = []
    first = {id(item.group): item for item in reversed(plan.items)}
    count = len(placement.devices)
    for group in plan.groups:
        item = first[id(group)]
        capacity = item.capacity // step_rows(group)
        if not placement.is_too_large(group) or placement.divide_matrices(group, capacity):
            continue
        whole = Size(1, 1, 1)
        name, limit = item.pieces[0].name, format_bytes(placement.device_memory or 0)
        shape = " x ".join(map(str, group.matrix))
        need = format_bytes(placement.count_device_bytes(group, whole))
        what = f"{name} ({shape}) by {group.method} needs {need} on a device"
        had = f"and {limit} are to be had"
        mend = f"merge it by its elements (--override '{name} method=average') or --exclude it"
        if not methods[group.method].row_divisible:
            problems.append(f"{what}, {had}: {group.method} cannot be divided over several; {mend}")
            continue
        if count == 1:
            problems.append(f"{what}, {had}: divide it over several --devices, or {mend}")
            continue
        parts = Size(1, count, capacity, divided=True)
        divided = placement.count_device_bytes(group, parts)
        if divided <= (placement.device_memory or 0):
            total = format_bytes(placement.count_bytes(group, parts))
            problems.append(f"{what}, {had}; divided over {count} it needs --memory {total} of this machine")
        else:
            each = format_bytes(divided)
            problems.append(
                f"{what}, or {each} on each of {count} that share it, {had}: use more devices, a smaller rank where it"
                f" has one, or {mend}"
            )
    return problems


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
    if size.devices == 1 or size.divided:
        (item,) = items
        used = item.pieces[-1].slot + count_rows(group, item.pieces[-1])
        share = Share(group, item.pieces, item.capacity)
        return Wave((item,), (share,), ((Segment(0, 0, used),),), size.devices)
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
        for number in range(devices):
            low, high = max(begin, bounds[number]), min(end, bounds[number + 1])
            if low < high:
                segment = Segment(number, (low - bounds[number]) * unit, (high - bounds[number]) * unit)
                own.append(segment)
                pieces[number] += cut_pieces(item, (low - begin) * unit, segment)
        segments.append(tuple(own))
        begin = end
    shares = tuple(Share(group, tuple(dealt), load * unit) for dealt in pieces)
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
