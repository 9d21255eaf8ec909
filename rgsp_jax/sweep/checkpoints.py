"""Many merges of the same checkpoints: decompositions are kept between them, in memory or in a file."""

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.learning.dealing import Axis, deal_rows, divide_rows
from rgsp_jax.method import Method, Stages, compute_dtype
from rgsp_jax.pipeline.execute import ItemSources, compute_item
from rgsp_jax.pipeline.kernels import LAYERS, ItemOutput, Static, cast_traced, measure_output
from rgsp_jax.pipeline.plan import Group, MergePlan, WorkItem
from rgsp_jax.registry import methods
from rgsp_jax.sweep.grid import Point
from rgsp_jax.sweep.mesh import POINTS, divide, make_mesh, split_devices
from rgsp_jax.sweep.staging import Cut, Ranks, cut_setting

Rows = list[np.ndarray]
"""The leaves of what is known of one matrix."""


class Shelf:
    """Arrays by key, in memory up to a budget and in a nameless file in `directory` past it."""

    def __init__(self, directory: Path, memory: int):
        self.directory, self.memory, self.used = directory, memory, 0
        self.held: dict[Any, Rows] = {}
        self.spilled: dict[Any, tuple[int, list[tuple[tuple[int, ...], np.dtype]]]] = {}
        self.file: Any = None

    def __contains__(self, key: Any) -> bool:
        return key in self.held or key in self.spilled

    def put(self, key: Any, rows: Rows) -> None:
        """Keep arrays that are not there yet."""
        if key in self:
            return
        size = sum(x.nbytes for x in rows)
        if self.used + size <= self.memory:
            self.used += size
            self.held[key] = [np.array(x) for x in rows]  # a copy: a view would keep the whole batch
            return
        if self.file is None:
            self.file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115 it goes with the process
        start = self.file.seek(0, 2)
        for x in rows:
            self.file.write(np.ascontiguousarray(x).tobytes())
        self.spilled[key] = start, [(x.shape, x.dtype) for x in rows]

    def get(self, key: Any) -> Rows:
        """The arrays of a key."""
        if key in self.held:
            return self.held[key]
        start, specs = self.spilled[key]
        self.file.seek(start)
        return [
            np.frombuffer(self.file.read(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
            for shape, dtype in specs
        ]

    def close(self) -> None:
        """Give memory and file back."""
        self.held.clear()
        self.spilled.clear()
        if self.file is not None:
            self.file.close()


class SharedStages:
    """Computes items for `merge_checkpoints`, each decomposition once for all merges of one sweep.

    What is known of a matrix is kept under its tensor's name, so that merges may cut their work as they like. Of
    solutions the last is kept alone, as far as memory goes: let settings that share one follow each other.

    Several devices deal the matrices of an item out among them; those that are left solve the points that come next
    (see `expect`), whose solutions are kept as well. Everything passes through the host, nothing between devices.
    """

    def __init__(self, ranks: Ranks, directory: Path, memory: int, devices: Sequence[jax.Device] = ()):
        self.ranks, self.memory, self.devices = ranks, memory, tuple(devices)
        self.coming: Sequence[Point] = ()
        self.parts = Shelf(directory, memory // 2)
        self.solutions: dict[Any, dict[Any, Rows]] = {}
        self.solved_bytes = 0
        self.structures: dict[Any, Any] = {}

    def close(self) -> None:
        """Give memory and disk back."""
        self.parts.close()
        self.solutions.clear()

    def expect(self, points: Sequence[Point]) -> None:
        """The point that is merged next, and those behind it."""
        self.coming = points

    def compute(
        self, plan: MergePlan, item: WorkItem, sources: ItemSources, seed: int, with_base: bool
    ) -> ItemOutput | None:
        """As `compute_item`, which does what has no stages."""
        group = item.group
        method = methods.get(group.method)
        if group.action != "matrices" or method is None or method.stages is None:
            return compute_item(plan, item, sources, seed, with_base)
        cut = self.cut_group(group, group.hyperparameters)
        mesh = self.choose_mesh(item, 1)
        with jax.enable_x64(np.float64 in (*group.in_dtypes, group.out_dtype)):
            weights = place_slots(sources.weights, mesh)
            parts = self.recall_parts(item, (method.name, cut.prepare), weights, with_base, mesh)
            solution = self.recall_solution(item, cut, parts, mesh)
            build = compile_build(method.name, cut.build[0], group.out_dtype, with_base, mesh)
            return fetch_slots(build(weights, parts, solution, cut.build[1]), item.capacity, mesh)

    def cut_group(self, group: Group, hyperparameters: Mapping[str, Any]) -> Cut:
        """Cut a setting for the matrices of a group."""
        ranks = self.ranks.get(group.method, ())
        return cut_setting(methods[group.method], stages_of(group.method), hyperparameters, ranks, *group.matrix)

    def choose_mesh(self, item: WorkItem, solutions: int) -> Mesh | None:
        """Of the devices that an item's matrices at so many settings have work for, None where one has it all."""
        points, layers = split_devices(max(1, len(self.devices)), [item.capacity], solutions)
        return make_mesh(self.devices, points, layers) if points * layers > 1 else None

    def recall_parts(
        self,
        item: WorkItem,
        setting: tuple[str, Static],
        weights: tuple[Array, ...],
        with_base: bool,
        mesh: Mesh | None,
    ) -> Any:
        """The decompositions of an item's matrices, made where one of them is missing."""
        keys = [(setting, piece.name, piece.start) for piece in item.pieces]
        if all(key in self.parts for key in keys):
            known = self.stack_slots(item, ("parts", setting), [self.parts.get(key) for key in keys])
            return place_slots(known, mesh)
        parts = compile_prepare(*setting, with_base, mesh)(weights)
        leaves, self.structures["parts", setting] = jax.tree.flatten(fetch_slots(parts, item.capacity, mesh))
        for key, piece in zip(keys, item.pieces, strict=True):
            self.parts.put(key, [x[piece.slot] for x in leaves])
        return parts

    def recall_solution(self, item: WorkItem, cut: Cut, parts: Any, mesh: Mesh | None) -> Any:
        """The solution of an item's matrices at this setting; where it is missing, with others that cost no time."""
        method = item.group.method
        structure, setting = ("solution", method, cut.solve[0]), (method, cut.solution)
        keys = [(piece.name, piece.start) for piece in item.pieces]
        if all(setting in self.solutions.get(key, ()) for key in keys):
            known = self.stack_slots(item, structure, [self.solutions[key][setting] for key in keys])
            return place_slots(known, mesh)
        cuts = self.look_ahead(item.group, cut)
        wide = self.choose_mesh(item, len(cuts))
        cuts = cuts[: 1 if wide is None else wide.shape[POINTS]]
        if wide != mesh:
            parts = place_slots(fetch_slots(parts, item.capacity, mesh), wide)
        settings = {name: np.stack([own.solve[1][name] for own in cuts]) for name in cut.solve[1]}
        solved = compile_solve(method, cut.solve[0], wide)(parts, settings)
        leaves, self.structures[structure] = jax.tree.flatten(fetch_slots(solved, item.capacity, wide))
        for key, piece in zip(keys, item.pieces, strict=True):
            self.solved_bytes -= sum(map(count_bytes, self.solutions.pop(key, {}).values()))
            for lane, own in enumerate(cuts):
                rows = [np.array(x[piece.slot, lane]) for x in leaves]
                if self.solved_bytes + count_bytes(rows) <= self.memory // 2:
                    self.solutions.setdefault(key, {})[method, own.solution] = rows
                    self.solved_bytes += count_bytes(rows)
        return place_slots(jax.tree.unflatten(self.structures[structure], [x[:, 0] for x in leaves]), mesh)

    def look_ahead(self, group: Group, cut: Cut) -> list[Cut]:
        """This setting and those that come, of each solution one, as many as there are devices."""
        found = {cut.solution: cut}
        if not self.coming or self.coming[0].method != group.method:
            return [cut]
        now = self.coming[0].hyperparameters
        if any(name not in group.hyperparameters or group.hyperparameters[name] != v for name, v in now.items()):
            return [cut]  # an override has its own
        for point in self.coming[1:]:
            if len(found) >= len(self.devices) or point.method != group.method:
                break
            if point.hyperparameters.keys() == now.keys():
                other = self.cut_group(group, {**group.hyperparameters, **point.hyperparameters})
                if other.batch == cut.batch:
                    found.setdefault(other.solution, other)
        return list(found.values())

    def stack_slots(self, item: WorkItem, structure: Any, rows: Sequence[Rows]) -> Any:
        """Rows of the pieces in the item's slots; slots left empty repeat the first, as the sources do."""
        slots = {piece.slot: own for piece, own in zip(item.pieces, rows, strict=True)}
        filled = [slots.get(i, rows[0]) for i in range(item.capacity)]
        leaves = [np.stack(leaf) for leaf in zip(*filled, strict=True)]
        return jax.tree.unflatten(self.structures[structure], leaves)


def place_slots(tree: Any, mesh: Mesh | None) -> Any:
    """What an item's slots hold, on the device, or dealt out over the layers of a mesh."""
    return jax.device_put(tree) if mesh is None else divide_rows(tree, Axis(mesh, LAYERS))


def fetch_slots(tree: Any, count: int, mesh: Mesh | None) -> Any:
    """What the slots of an item hold, on the host."""
    found = jax.device_get(tree)
    if mesh is None:
        return found
    slots = deal_rows(count, mesh.shape[LAYERS]).slots
    return jax.tree.map(lambda x: x[slots], found)


def count_bytes(rows: Rows) -> int:
    """Of arrays together."""
    return sum(x.nbytes for x in rows)


def read_stack(sources: tuple[Array, ...], method: Method, with_base: bool) -> tuple[Array, dict[str, Array]]:
    """The models [K, m, n] in the precision they are computed in, and the base beside them where it is used."""
    dtype = compute_dtype(*(x.dtype for x in sources))
    stack = jnp.stack([x.astype(dtype) for x in sources[: len(sources) - with_base]])
    return stack, {"base": sources[-1].astype(dtype)} if with_base and "base" in method.needs else {}


@functools.cache
def compile_prepare(name: str, static: Static, with_base: bool, mesh: Mesh | None = None) -> Any:
    """`prepare(sources [b, m, n] each) -> parts [b, ...]`."""
    method, stages = methods[name], stages_of(name)

    def prepare(sources: tuple[Array, ...]) -> Any:
        stack, known = read_stack(sources, method, with_base)
        return stages.prepare(stack, **stages.pick("prepare", known), **dict(static))

    return divide(lambda sources: map_batch(lambda x: prepare(x), sources), mesh, (P(LAYERS),), P(LAYERS))


@functools.cache
def compile_solve(name: str, static: Static, mesh: Mesh | None = None) -> Any:
    """`solve(parts [b, ...], traced [p]) -> solution [b, p, ...]`, one setting on each of the p devices of an axis."""
    stages = stages_of(name)

    def solve(parts: Any, traced: dict[str, Array]) -> Any:
        floats = [x.dtype for x in jax.tree.leaves(parts) if jnp.issubdtype(x.dtype, jnp.floating)]
        return stages.solve(parts, **cast_traced(traced, compute_dtype(*floats)), **dict(static))

    def solve_all(parts: Any, settings: dict[str, Array]) -> Any:
        own = {name: x[0] for name, x in settings.items()}
        return jax.tree.map(lambda x: x[:, None], map_batch(lambda x: solve(x, own), parts))

    return divide(solve_all, mesh, (P(LAYERS), P(POINTS)), P(LAYERS, POINTS))


@functools.cache
def compile_build(name: str, static: Static, out_dtype: np.dtype, with_base: bool, mesh: Mesh | None = None) -> Any:
    """`build(sources, parts, solution, traced) -> ItemOutput`."""
    method, stages = methods[name], stages_of(name)

    def build(sources: tuple[Array, ...], parts: Any, solution: Any, traced: dict[str, Array]) -> ItemOutput:
        stack, known = read_stack(sources, method, with_base)
        given = stages.pick("build", known) | cast_traced(traced, stack.dtype) | dict(static)
        return measure_output(stages.build(stack, parts, solution, **given), stack, sources, out_dtype)

    def build_all(sources: tuple[Array, ...], parts: Any, solution: Any, traced: dict[str, Array]) -> ItemOutput:
        return map_batch(lambda *own: build(own[0], own[1], own[2], traced), sources, parts, solution)

    return divide(build_all, mesh, (P(LAYERS), P(LAYERS), P(LAYERS), P()), P(LAYERS))


def stages_of(name: str) -> Stages:
    """Of a method that has them."""
    stages = methods[name].stages
    if stages is None:
        raise ValueError(f"method {name!r} has no stages")
    return stages
