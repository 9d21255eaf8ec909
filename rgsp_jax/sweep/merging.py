"""Many merges of the same trees: what their settings share is computed once, each tree when it is asked for."""

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.method import Method
from rgsp_jax.pipeline.kernels import Static, Traced, cast_traced, split_static
from rgsp_jax.registry import methods
from rgsp_jax.rules import Layout
from rgsp_jax.sweep.grid import Point, SweepConfig
from rgsp_jax.sweep.staging import Cut, Ranks, cut_setting, largest_ranks
from rgsp_jax.trees import (
    LeafGroup,
    SortedLeaves,
    join_leaves,
    keep_leaves,
    sort_leaves,
    split_group,
    stack_group,
    take_base,
)
from rgsp_jax.types import InputStatistics, MergeOutput

PyTree = Any


def sweep_merge(
    trees: Sequence[PyTree],
    points: SweepConfig | Sequence[Point | Mapping[str, Any]],
    *,
    base: PyTree | None = None,
    inputs: Mapping[str, InputStatistics] | None = None,
    key: Array | None = None,
    layout: Layout = "auto",
    model_type: str | None = None,
    memory: int = 1_000_000_000,
) -> Iterator[tuple[Point, PyTree]]:
    """Merge trees with every setting: each result is that of `rgsp_jax.merge` with the same setting, to rounding.

    Matrices are decomposed once, at the largest rank asked for; smaller ranks are masks. What needs the decompositions
    alone is computed once for all points that agree in it, batched over the others; one compilation serves them all,
    for each shape of matrix and each combination of static hyperparameters. Only the tree that is asked for is built.
    Points come so that those that share the most follow each other, methods in their order.

    Args:
        trees, base, inputs, key, layout, model_type: as in `rgsp_jax.merge`.
        points: a config, or settings as mappings: `method` (as a config's, where it is left out) and hyperparameters.
        memory: bytes that solutions computed ahead may take; decompositions come on top.

    Yields:
        (point, merged tree).

    Raises:
        ValueError: as `rgsp_jax.merge`, for all points at once, before anything is computed.
    """
    wanted = list_points(points, len(trees))
    chosen = {name: [p for p in wanted if p.method == name] for name in dict.fromkeys(p.method for p in wanted)}
    ranks = largest_ranks(wanted)
    sorted_leaves = {}
    for name, own in chosen.items():
        beside = dict(base=base, inputs=inputs, key=key, layout=layout, model_type=model_type)
        sorted_leaves[name] = sort_leaves(trees, methods[name], own[0].hyperparameters, **beside)  # type: ignore[arg-type]
    for name, own in chosen.items():
        yield from merge_points(methods[name], sorted_leaves[name], own, ranks.get(name, ()), memory)


def list_points(points: SweepConfig | Sequence[Point | Mapping[str, Any]], count: int) -> list[Point]:
    """Points of a config or of plain mappings; ValueError lists every value that is not allowed."""
    if isinstance(points, SweepConfig):
        wanted = points.plan_points()
    else:
        default = "rgsp" if count == 2 else "relative"
        wanted = [
            p
            if isinstance(p, Point)
            else Point(i, p.get("method", default), {name: v for name, v in p.items() if name != "method"})
            for i, p in enumerate(points)
        ]
    problems = [f"no method {p.method!r}; there are {', '.join(methods)}" for p in wanted if p.method not in methods]
    for point in wanted if not problems else ():
        problems += methods[point.method].problems(point.hyperparameters)
    if problems:
        raise ValueError("; ".join(dict.fromkeys(problems)))
    return wanted


@dataclass(frozen=True)
class Block:
    """Matrices of one shape in all trees."""

    group: LeafGroup
    stacks: Array
    """[B, K, m, n], the base last."""
    beside: Any


def merge_points(
    method: Method, leaves: SortedLeaves, points: Sequence[Point], ranks: Sequence[int | float], memory: int
) -> Iterator[tuple[Point, PyTree]]:
    """Every point of one method, those that share the most behind each other."""
    blocks = [Block(group, *stack_group(group, leaves)) for group in leaves.groups]
    cuts = [[cut_point(method, point, ranks, block) for block in blocks] for point in points]
    kept: dict[str, Sequence[Array | None]] = {}
    for members in gather(range(len(points)), lambda i: tuple(cut.prepare for cut in cuts[i])):
        parts = [
            compile_prepare(method, cut.prepare)(block.stacks, block.beside)
            for cut, block in zip(cuts[members[0]], blocks, strict=True)
        ]
        for batch in gather(members, lambda i: tuple(cut.batch for cut in cuts[i])):
            for chunk, solutions, lanes in solve_chunks(method, blocks, parts, [(i, cuts[i]) for i in batch], memory):
                for i in chunk:
                    outputs = [
                        compile_build(method, cut.build[0])(
                            block.stacks, block.beside, own, solution, lane[i], cut.build[1]
                        )
                        for block, own, solution, lane, cut in zip(
                            blocks, parts, solutions, lanes, cuts[i], strict=True
                        )
                    ]
                    yield points[i], join_point(method, leaves, points[i], blocks, outputs, kept)


class TreeMerger:
    """Merges the same trees with one setting after another, as a study asks for them; decompositions are kept.

    Arguments are those of `sweep_merge`; `ranks` are all that may be asked for, by method.
    """

    def __init__(self, trees: Sequence[PyTree], ranks: Ranks, **beside: Any):
        self.trees, self.ranks, self.beside = trees, ranks, beside
        self.known: dict[str, tuple[SortedLeaves, list[Block]]] = {}
        self.parts: dict[Any, Any] = {}
        self.kept: dict[str, dict[str, Sequence[Array | None]]] = {}

    def merge(self, point: Point) -> PyTree:
        """The merged tree of one setting; ValueError as in `rgsp_jax.merge`."""
        method = methods[point.method]
        if point.method not in self.known:
            leaves = sort_leaves(self.trees, method, point.hyperparameters, **self.beside)
            self.known[point.method] = leaves, [Block(group, *stack_group(group, leaves)) for group in leaves.groups]
        leaves, blocks = self.known[point.method]
        outputs = []
        for b, block in enumerate(blocks):
            cut = cut_point(method, point, self.ranks.get(point.method, ()), block)
            key = point.method, b, cut.prepare
            if key not in self.parts:
                self.parts[key] = compile_prepare(method, cut.prepare)(block.stacks, block.beside)
            solve, build = compile_solve(method, cut.solve[0]), compile_build(method, cut.build[0])
            solution = solve(block.stacks, block.beside, self.parts[key], stack_settings([cut.solve[1]]))
            outputs.append(build(block.stacks, block.beside, self.parts[key], solution, 0, cut.build[1]))
        return join_point(method, leaves, point, blocks, outputs, self.kept.setdefault(point.method, {}))


def join_point(
    method: Method,
    leaves: SortedLeaves,
    point: Point,
    blocks: Sequence[Block],
    outputs: Sequence[Array],
    kept: dict[str, Sequence[Array | None]],
) -> PyTree:
    """The tree of one point; leaves that the method leaves alone are computed once for all points."""
    settings = method.rest_settings(point.hyperparameters, leaves.count)
    name = json.dumps(settings, sort_keys=True, default=str)
    if name not in kept:
        kept[name] = keep_leaves(leaves, method, point.hyperparameters)[0]
    merged = list(kept[name])
    for block, output in zip(blocks, outputs, strict=True):
        for i, (leaf, _) in zip(
            block.group.members, split_group(block.group, leaves, MergeOutput(output, {})), strict=True
        ):
            merged[i] = leaf
    return join_leaves(leaves, merged)


def cut_point(method: Method, point: Point, ranks: Sequence[int | float], block: Block) -> Cut:
    """Cut a setting for the matrices of a block; methods without stages are solved in one piece."""
    if method.stages is None:
        return Cut((), split_static(method, {**method.defaults, **point.hyperparameters}), ((), {}))
    m, n = block.stacks.shape[2:]
    return cut_setting(method, method.stages, point.hyperparameters, ranks, m, n)


def gather(members: Sequence[int], key: Any) -> list[list[int]]:
    """Members by key, in the order of their first."""
    found: dict[Any, list[int]] = {}
    for i in members:
        found.setdefault(key(i), []).append(i)
    return list(found.values())


def solve_chunks(
    method: Method,
    blocks: Sequence[Block],
    parts: Sequence[Any],
    batch: Sequence[tuple[int, Sequence[Cut]]],
    memory: int,
) -> Iterator[tuple[list[int], list[Any], list[dict[int, int]]]]:
    """(points, solutions of every block, point -> lane in each) of points that agree in all but traced values.

    A chunk holds as many solutions as the memory allows, evenly; all chunks have one size, so that they are compiled
    once.
    """
    cuts = dict(batch)
    shared = gather(list(cuts), lambda i: tuple(cut.solution for cut in cuts[i]))
    first = cuts[shared[0][0]]
    bytes_each = sum(
        solution_bytes(method, block, own, cut) for block, own, cut in zip(blocks, parts, first, strict=True)
    )
    most = max(1, min(len(shared), memory // max(1, bytes_each)))
    count = -(-len(shared) // most)
    size = -(-len(shared) // count)
    for start in range(0, len(shared), size):
        chunk = [i for members in shared[start : start + size] for i in members]
        solutions, lanes = [], []
        for b, (block, own) in enumerate(zip(blocks, parts, strict=True)):
            distinct = gather(chunk, lambda i, b=b: cuts[i][b].solution)
            lanes.append({i: lane for lane, members in enumerate(distinct) for i in members})
            settings = [cuts[members[0]][b].solve[1] for members in distinct]
            settings += [settings[-1]] * ((size if count > 1 else len(settings)) - len(settings))
            solve = compile_solve(method, first[b].solve[0])
            solutions.append(solve(block.stacks, block.beside, own, stack_settings(settings)))
        yield chunk, solutions, lanes


def stack_settings(settings: Sequence[Traced]) -> tuple[Traced, np.ndarray]:
    """Traced values on a leading axis, and that axis where there is nothing to trace."""
    return {name: np.stack([s[name] for s in settings]) for name in settings[0]}, np.zeros(len(settings), np.int32)


def solution_bytes(method: Method, block: Block, parts: Any, cut: Cut) -> int:
    """Of one setting on all matrices of a block."""
    solve = compile_solve(method, cut.solve[0])
    shapes = jax.eval_shape(solve, block.stacks, block.beside, parts, stack_settings([cut.solve[1]]))
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


@functools.cache
def compile_prepare(method: Method, static: Static) -> Any:
    """`prepare(stacks [B, K, m, n], beside) -> parts [B, ...]`; nothing for methods without stages."""

    def prepare(stack: Array, own: Any) -> Any:
        if method.stages is None:
            return ()
        models, known = take_base(method, stack)
        return method.stages.prepare(models, **method.stages.pick("prepare", known, own), **dict(static))

    return jax.jit(lambda stacks, beside: map_batch(prepare, stacks, beside))


@functools.cache
def compile_solve(method: Method, static: Static) -> Any:
    """`solve(stacks, beside, parts, settings [L]) -> solutions [B, L, ...]`: whole merges without stages."""

    def solve(stack: Array, own: Any, parts: Any, settings: tuple[dict[str, Array], Array]) -> Any:
        if method.stages is None:  # vmapped on every platform: what the settings share is then computed once

            def merge_one(traced: dict[str, Array], _: Array) -> Array:
                models, known = take_base(method, stack)
                return method.fn(models, **known, **own, **cast_traced(traced, stack.dtype), **dict(static)).merged

            return jax.vmap(merge_one)(*settings)
        stages = method.stages
        return map_batch(
            lambda traced, _: stages.solve(parts, **cast_traced(traced, stack.dtype), **dict(static)), *settings
        )

    def solve_all(stacks: Array, beside: Any, parts: Any, settings: Any) -> Any:
        return map_batch(lambda stack, own, part: solve(stack, own, part, settings), stacks, beside, parts)

    return jax.jit(solve_all)


@functools.cache
def compile_build(method: Method, static: Static) -> Any:
    """`build(stacks, beside, parts, solutions, lane, traced) -> merged [B, m, n]` of one setting, without its stats."""

    def build(stack: Array, own: Any, parts: Any, solution: Any, traced: dict[str, Array]) -> Array:
        if method.stages is None:
            return solution
        models, known = take_base(method, stack)
        given = method.stages.pick("build", known, own) | cast_traced(traced, stack.dtype) | dict(static)
        return method.stages.build(models, parts, solution, **given).merged

    def build_all(stacks: Array, beside: Any, parts: Any, solutions: Any, lane: Array, traced: Any) -> Array:
        own_lane = jax.tree.map(lambda x: jnp.take(x, lane, axis=1), solutions)
        return map_batch(
            lambda stack, own, part, solution: build(stack, own, part, solution, traced),
            stacks,
            beside,
            parts,
            own_lane,
        )

    return jax.jit(build_all)
