"""Many merges of the same checkpoints: decompositions are kept between them, in memory or in a file."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.method import Method, Stages, compute_dtype
from rgsp_jax.pipeline.execute import ItemSources, compute_item
from rgsp_jax.pipeline.kernels import ItemOutput, Static, cast_traced, measure_output
from rgsp_jax.pipeline.plan import MergePlan, WorkItem
from rgsp_jax.registry import methods
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
    """

    def __init__(self, ranks: Ranks, directory: Path, memory: int):
        self.ranks, self.memory = ranks, memory
        self.parts = Shelf(directory, memory // 2)
        self.solutions: dict[Any, tuple[Any, Rows]] = {}
        self.solved_bytes = 0
        self.structures: dict[Any, Any] = {}

    def close(self) -> None:
        """Give memory and disk back."""
        self.parts.close()
        self.solutions.clear()

    def compute(
        self, plan: MergePlan, item: WorkItem, sources: ItemSources, seed: int, with_base: bool
    ) -> ItemOutput | None:
        """As `compute_item`, which does what has no stages."""
        group = item.group
        method = methods.get(group.method)
        if group.action != "matrices" or method is None or method.stages is None:
            return compute_item(plan, item, sources, seed, with_base)
        ranks = self.ranks.get(method.name, ())
        cut = cut_setting(method, method.stages, group.hyperparameters, ranks, *group.matrix)
        with jax.enable_x64(np.float64 in (*group.in_dtypes, group.out_dtype)):
            weights = jax.device_put(sources.weights)
            parts = self.recall_parts(item, (method.name, cut.prepare), weights, with_base)
            solution = self.recall_solution(item, method.name, cut, parts)
            build = compile_build(method.name, cut.build[0], group.out_dtype, with_base)
            return jax.device_get(build(weights, parts, solution, cut.build[1]))

    def recall_parts(
        self, item: WorkItem, setting: tuple[str, Static], weights: tuple[Array, ...], with_base: bool
    ) -> Any:
        """The decompositions of an item's matrices, made where one of them is missing."""
        keys = [(setting, piece.name, piece.start) for piece in item.pieces]
        if all(key in self.parts for key in keys):
            return self.stack_slots(item, ("parts", setting), [self.parts.get(key) for key in keys])
        parts = compile_prepare(*setting, with_base)(weights)
        leaves, self.structures["parts", setting] = jax.tree.flatten(jax.device_get(parts))
        for key, piece in zip(keys, item.pieces, strict=True):
            self.parts.put(key, [x[piece.slot] for x in leaves])
        return parts

    def recall_solution(self, item: WorkItem, method: str, cut: Cut, parts: Any) -> Any:
        """The solution of an item's matrices at this setting."""
        setting = method, cut.solution
        keys = [(piece.name, piece.start) for piece in item.pieces]
        found = [self.solutions.get(key, (None, [])) for key in keys]
        if all(solved == setting for solved, _ in found):
            return self.stack_slots(item, ("solution", method, cut.solve[0]), [rows for _, rows in found])
        solution = compile_solve(method, cut.solve[0])(parts, cut.solve[1])
        leaves, self.structures["solution", method, cut.solve[0]] = jax.tree.flatten(jax.device_get(solution))
        for key, piece in zip(keys, item.pieces, strict=True):
            self.solved_bytes -= count_bytes(self.solutions.pop(key, (None, []))[1])
            rows = [np.array(x[piece.slot]) for x in leaves]
            if self.solved_bytes + count_bytes(rows) <= self.memory // 2:
                self.solutions[key] = setting, rows
                self.solved_bytes += count_bytes(rows)
        return solution

    def stack_slots(self, item: WorkItem, structure: Any, rows: Sequence[Rows]) -> Any:
        """Rows of the pieces in the item's slots; slots left empty repeat the first, as the sources do."""
        slots = {piece.slot: own for piece, own in zip(item.pieces, rows, strict=True)}
        filled = [slots.get(i, rows[0]) for i in range(item.capacity)]
        leaves = [np.stack(leaf) for leaf in zip(*filled, strict=True)]
        return jax.device_put(jax.tree.unflatten(self.structures[structure], leaves))


def count_bytes(rows: Rows) -> int:
    """Of arrays together."""
    return sum(x.nbytes for x in rows)


def read_stack(sources: tuple[Array, ...], method: Method, with_base: bool) -> tuple[Array, dict[str, Array]]:
    """The models [K, m, n] in the precision they are computed in, and the base beside them where it is used."""
    dtype = compute_dtype(*(x.dtype for x in sources))
    stack = jnp.stack([x.astype(dtype) for x in sources[: len(sources) - with_base]])
    return stack, {"base": sources[-1].astype(dtype)} if with_base and "base" in method.needs else {}


@functools.cache
def compile_prepare(name: str, static: Static, with_base: bool) -> Any:
    """`prepare(sources [b, m, n] each) -> parts [b, ...]`."""
    method, stages = methods[name], stages_of(name)

    def prepare(sources: tuple[Array, ...]) -> Any:
        stack, known = read_stack(sources, method, with_base)
        return stages.prepare(stack, **stages.pick("prepare", known), **dict(static))

    return jax.jit(lambda sources: map_batch(lambda x: prepare(x), sources))


@functools.cache
def compile_solve(name: str, static: Static) -> Any:
    """`solve(parts [b, ...], traced) -> solution [b, ...]`."""
    stages = stages_of(name)

    def solve(parts: Any, traced: dict[str, Array]) -> Any:
        floats = [x.dtype for x in jax.tree.leaves(parts) if jnp.issubdtype(x.dtype, jnp.floating)]
        return stages.solve(parts, **cast_traced(traced, compute_dtype(*floats)), **dict(static))

    return jax.jit(lambda parts, traced: map_batch(lambda x: solve(x, traced), parts))


@functools.cache
def compile_build(name: str, static: Static, out_dtype: np.dtype, with_base: bool) -> Any:
    """`build(sources, parts, solution, traced) -> ItemOutput`."""
    method, stages = methods[name], stages_of(name)

    def build(sources: tuple[Array, ...], parts: Any, solution: Any, traced: dict[str, Array]) -> ItemOutput:
        stack, known = read_stack(sources, method, with_base)
        given = stages.pick("build", known) | cast_traced(traced, stack.dtype) | dict(static)
        return measure_output(stages.build(stack, parts, solution, **given), stack, sources, out_dtype)

    def build_all(sources: tuple[Array, ...], parts: Any, solution: Any, traced: dict[str, Array]) -> ItemOutput:
        return map_batch(lambda *own: build(own[0], own[1], own[2], traced), sources, parts, solution)

    return jax.jit(build_all)


def stages_of(name: str) -> Stages:
    """Of a method that has them."""
    stages = methods[name].stages
    if stages is None:
        raise ValueError(f"method {name!r} has no stages")
    return stages
