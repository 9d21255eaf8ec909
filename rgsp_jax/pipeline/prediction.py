"""How long a merge takes on devices of some kind, and what it is that takes so long; pure.

What runs beside what is as in `execute`, `hash_files` and `audit`: one thread reads, one moves to the devices and
computes, one writes, each a wave ahead of the next; one more hashes the models' files all the while; the output is read
back when a process's parts are written. Times of single steps are amounts over rates (`DeviceKind`), so a prediction is
never below any of them; what is not in the model is named in `LEFT_OUT`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.hardware import DeviceKind
from rgsp_jax.pipeline.parts import cut_parts, deal, imbalance, predict, weigh
from rgsp_jax.pipeline.placement import Devices, Placement, Wave, place_planned
from rgsp_jax.pipeline.plan import BLOCK, MergePlan, estimate_flops, is_factorised, step_bytes, step_rows

PASSES = 3
"""Times that a kernel passes over its stack in float32, besides reading and writing what is on the host: assumed."""
LEFT_OUT = (
    "starting processes, the report, what passes between devices that share a matrix, and waiting for a disk or a"
    " network that others use"
)
PlanPart = Callable[[Sequence[str] | None], MergePlan]
"""The plan of some tensors, of all for None."""


class Times(NamedTuple):
    """Seconds that one wave takes in each of the three threads."""

    read: float
    move: float
    """To the devices and back."""
    compute: float
    write: float
    useful: float
    """Of `compute`, what the devices are busy with on average."""


@dataclass
class Work:
    """What one process does, in seconds where nothing else is said."""

    parts: int = 0
    tensors: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_hashed: int = 0
    read: float = 0.0
    move: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    merge: float = 0.0
    """All of that, with what overlaps counted once."""
    audit: float = 0.0
    hash: float = 0.0
    compilation: float = 0.0
    fixed: float = 0.0
    useful: float = 0.0
    memory: int = 0
    device_memory: int = 0
    divided: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """From the first byte to the last."""
        return self.fixed + max(self.compilation + self.merge + self.audit, self.hash)

    @property
    def stages(self) -> dict[str, float]:
        """What could be the bottleneck: threads that run at once, or one after the other."""
        names = ("read", "move", "compute", "write", "audit", "hash", "compilation", "fixed")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Layout:
    """Processes, and what each has."""

    processes: int
    devices: int
    """Of each process."""
    hosts: int
    """That the processes are on."""

    @property
    def crowding(self) -> float:
        """Processes that one host's disk and, where its devices share it, arithmetic go to."""
        return self.processes / self.hosts


def lay_out_devices(kind: DeviceKind, devices: int | None, processes: int | None) -> Layout:
    """Which processes there are: as many as are given, or one for each host that so many devices take.

    Raises:
        RefusedError: devices that fill no whole number of hosts.
    """
    if devices is not None and devices < 1:
        raise RefusedError(f"--devices {devices}: give 1 or more")
    if processes is not None and processes < 1:
        raise RefusedError(f"--processes {processes}: give at least 1")
    if processes is not None:
        return Layout(processes, devices or kind.per_host, processes)
    count = devices or 1
    if kind.shared or count <= kind.per_host:
        return Layout(1, count, 1)
    if count % kind.per_host:
        raise RefusedError(
            f"--devices {count}: hosts of {kind.name} have {kind.per_host} devices each; give a multiple of that, or"
            " the devices of each process with --distributed --processes N"
        )
    hosts = count // kind.per_host
    return Layout(hosts, kind.per_host, hosts)


def predict_merge(
    plan_part: PlanPart,
    kind: DeviceKind,
    layout: Layout,
    *,
    max_shard_size: int,
    model_bytes: int,
    device_memory: int | None = None,
) -> dict[str, Any]:
    """Seconds, memory and idle devices of a merge, in plain data.

    Args:
        plan_part: plans the merge, or a part of it, for such devices.
        kind: of the devices, with its rates.
        layout: of processes and devices.
        max_shard_size: bytes of one output file.
        model_bytes: of all models' files, which are hashed for the report; 0 where they are not.
        device_memory: bytes to take of each device's; None is what the kind has, less a margin.

    Raises:
        RefusedError: a matrix has no room, or the memory to take is more than a host has.
    """
    whole = plan_part(None)
    if kind.host_memory is not None and whole.memory * layout.crowding > kind.host_memory.value:
        raise RefusedError(
            f"--memory: {whole.memory} bytes for each of {layout.processes} processes is more than hosts of"
            f" {kind.name} have: {kind.host_memory.value:.0f}"
        )
    dealt = deal_plans(plan_part, whole, layout, max_shard_size)
    members = [predict_process(plans, kind, layout, device_memory) for plans in dealt]
    for work in members:
        work.bytes_hashed = model_bytes // layout.processes
        work.fixed = kind.fixed.value
        work.hash = work.bytes_hashed / min(kind.hash.value, kind.read.value / layout.crowding)
    return describe(kind, layout, members)


def deal_plans(plan_part: PlanPart, whole: MergePlan, layout: Layout, max_shard_size: int) -> list[list[MergePlan]]:
    """For every process the plans of its parts, as `decide` deals them."""
    if layout.processes == 1:
        return [[whole]]
    loads = {name: weigh(task) for name, task in whole.tasks.items()}
    cut = cut_parts(list(loads.values()), max_shard_size, layout.processes)
    dealt = deal(predict(cut, loads), layout.processes)
    return [[plan_part(cut.parts[number]) for number in numbers] for numbers in dealt]


def predict_process(plans: Iterable[MergePlan], kind: DeviceKind, layout: Layout, device_memory: int | None) -> Work:
    """The work of one process."""
    work, compiled, divided = Work(), set(), dict[str, None]()
    for plan in plans:
        placement = place_planned(plan, Devices(layout.devices, device_memory), kind)
        times = []
        for wave in placement.waves(plan.items):
            times.append(time_wave(plan, wave, kind, layout))
            if wave.group.action == "matrices" and is_factorised(wave.group):
                compiled.add((wave.group.key, wave.steps, len(wave.shares), wave.divided))
            if wave.divided > 1:
                divided |= dict.fromkeys(piece.name for item in wave.items for piece in item.pieces)
        add_part(work, plan, placement, times, kind, layout)
    work.compilation = len(compiled) * kind.compilation.value
    work.divided = list(divided)
    return work


def add_part(
    work: Work, plan: MergePlan, placement: Placement, times: Sequence[Times], kind: DeviceKind, layout: Layout
) -> None:
    """Count one part with its waves and its audit, which come one after the other."""
    work.parts += 1
    work.tensors += len(plan.tasks)
    work.bytes_read += plan.bytes_in
    work.bytes_written += plan.bytes_out
    work.read += sum(t.read for t in times)
    work.move += sum(t.move for t in times)
    work.compute += sum(t.compute for t in times)
    work.write += sum(t.write for t in times)
    work.useful += sum(t.useful for t in times)
    work.merge += run_waves(times)
    work.audit += plan.bytes_out / min(kind.read.value / layout.crowding, kind.hash.value)
    work.memory = max(work.memory, placement.peak_memory(plan))
    work.device_memory = max(work.device_memory, placement.peak_device_memory(plan))


def time_wave(plan: MergePlan, wave: Wave, kind: DeviceKind, layout: Layout) -> Times:
    """Seconds of one wave, by amounts over rates; every device takes as long as one that is full."""
    read = sum(item.bytes_in for item in wave.items) / kind.read.value * layout.crowding
    write = sum(item.bytes_out for item in wave.items) / kind.write.value * layout.crowding
    if wave.group.action == "copy":
        return Times(read, 0.0, 0.0, write, 0.0)
    devices = max(len(wave.shares), wave.divided)
    own = wave.used / wave.divided if wave.divided > 1 else wave.steps  # steps' worth on each device
    move = 0.0 if kind.transfer is None else own * step_bytes(wave.group) / kind.transfer.value
    compute = own * time_step(plan, wave, kind) * (devices * layout.crowding if kind.shared else 1)
    return Times(read, move, compute, write, compute * wave.used / (own * layout.devices))


def time_step(plan: MergePlan, wave: Wave, kind: DeviceKind) -> float:
    """Seconds that one device alone takes for one matrix, or one chunk of elements."""
    group = wave.group
    matrices = group.action == "matrices"
    elements = group.matrix[0] * group.matrix[1] if matrices else step_rows(group) * BLOCK
    moving = (step_bytes(group) + PASSES * 4 * len(group.in_dtypes) * elements) / kind.bandwidth.value
    if not matrices or not is_factorised(group):
        return moving
    task = plan.tasks[wave.items[0].pieces[0].name]
    flops = estimate_flops(task) / (task.view.matrices[0] if task.view else 1)
    return max(moving, flops / (kind.matmul.value * kind.share.value))


def run_waves(times: Sequence[Times]) -> float:
    """Seconds until the last wave is written, as `execute` goes about it.

    A wave is read while the one before is computed; it is handed to the writer when that is done with the one before.
    """
    read = started = computed = written = 0.0
    for t in times:
        read = max(read, started) + t.read  # is begun when the wave before is taken up
        started = max(read, computed)
        computed = max(started + t.move + t.compute, written)
        written = computed + t.write
    return written


def describe(kind: DeviceKind, layout: Layout, members: Sequence[Work]) -> dict[str, Any]:
    """A prediction as plain data; the slowest process says how long it takes and why."""
    slowest = max(members, key=lambda work: work.total)
    seconds = slowest.total
    busy = sum(work.useful for work in members)
    computing = sum(work.compute for work in members)
    return {
        "kind": kind.describe(),
        "processes": layout.processes,
        "devices_per_process": layout.devices,
        "devices": layout.processes * layout.devices,
        "seconds": seconds,
        "stages": {name: round(value, 6) for name, value in slowest.stages.items()},
        "overlapping": "read, move + compute and write overlap wave by wave, hash runs beside all; compilation,"
        " audit and what is fixed come before and after",
        "bottleneck": max(slowest.stages, key=slowest.stages.__getitem__),
        "memory_per_process": max(work.memory for work in members),
        "memory_per_device": max(work.device_memory for work in members),
        "padding_share": round(max(0.0, 1 - busy / computing), 4) if computing else 0.0,
        "idle_share": round(1 - busy / (seconds * layout.processes), 4) if seconds else 0.0,
        "imbalance": round(imbalance([work.total for work in members]), 4),
        "divided": sorted({name for work in members for name in work.divided}),
        "by_process": [
            {
                "parts": work.parts,
                "tensors": work.tensors,
                "bytes_read": work.bytes_read,
                "bytes_written": work.bytes_written,
                "bytes_hashed": work.bytes_hashed,
                "seconds": round(work.total, 6),
            }
            for work in members
        ],
        "assumed": sorted(name for name, figure in kind.figures.items() if figure.origin == "assumed"),
        "left_out": LEFT_OUT,
    }
