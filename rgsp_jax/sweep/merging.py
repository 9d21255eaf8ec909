"""Many merges of the same trees: what their settings share is computed once, each tree when it is asked for."""

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from rgsp_jax.batching import map_batch
from rgsp_jax.learning.dealing import Axis, deal_rows, divide_rows
from rgsp_jax.method import Method
from rgsp_jax.pipeline.kernels import LAYERS, Static, Traced, cast_traced, split_static
from rgsp_jax.registry import methods
from rgsp_jax.rules import Layout
from rgsp_jax.sweep.grid import Point, SweepConfig
from rgsp_jax.sweep.mesh import POINTS, compile_collect, divide, name_axes
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
    mesh: Mesh | None = None,
) -> Iterator[tuple[Point, PyTree]]:
    """Merge trees with every setting: each result is that of `rgsp_jax.merge` with the same setting, to rounding.

    Matrices are decomposed once, at the largest rank asked for; smaller ranks are masks. What needs the decompositions
    alone is computed once for all points that agree in it, batched over the others; one compilation serves them all,
    for each shape of matrix and each combination of static hyperparameters. Only the tree that is asked for is built.
    Points come so that those that share the most follow each other, methods in their order.

    On a mesh matrices are dealt out evenly over its axis "layers" and settings over its axis "points": every device
    decomposes its own matrices, solves them at its own settings and merges them at one of these, by itself. So many
    points are merged at once as the axis "points" has devices; each tree is gathered when it is asked for, and lies on
    every device then.

    Args:
        trees, base, inputs, key, layout, model_type: as in `rgsp_jax.merge`.
        points: a config, or settings as mappings: `method` (as a config's, where it is left out) and hyperparameters.
        memory: bytes, of each device, that solutions computed ahead may take; decompositions come on top.
        mesh: with axes named "points" and "layers", or one of them. Several processes make the same call with the same
            trees, on a mesh of all their devices.

    Yields:
        (point, merged tree).

    Raises:
        ValueError: as `rgsp_jax.merge`, for all points at once, before anything is computed; a mesh with other axes.
    """
    mesh = None if mesh is None else name_axes(mesh)
    wanted = list_points(points, len(trees))
    chosen = {name: [p for p in wanted if p.method == name] for name in dict.fromkeys(p.method for p in wanted)}
    ranks = largest_ranks(wanted)
    sorted_leaves = {}
    for name, own in chosen.items():
        beside = dict(base=base, inputs=inputs, key=key, layout=layout, model_type=model_type)
        sorted_leaves[name] = sort_leaves(trees, methods[name], own[0].hyperparameters, **beside)  # type: ignore[arg-type]
    for name, own in chosen.items():
        yield from merge_points(methods[name], sorted_leaves[name], own, ranks.get(name, ()), memory, mesh)


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
    """Matrices of one shape in all trees, on a mesh dealt out over its layers."""

    group: LeafGroup
    stacks: Array
    """[B, K, m, n], the base last; on a mesh B slots (see `deal_rows`)."""
    beside: Any
    slots: np.ndarray
    """Of every matrix."""


class Lane(NamedTuple):
    """Where the solution of a point is."""

    device: int
    """Of the axis "points"."""
    place: int
    """Among the settings that the device solves."""


def make_block(group: LeafGroup, leaves: SortedLeaves, mesh: Mesh | None) -> Block:
    """Stack the matrices of a group, and deal them out."""
    stacks, beside = stack_group(group, leaves)
    if mesh is None:
        return Block(group, stacks, beside, np.arange(stacks.shape[0]))
    slots = deal_rows(stacks.shape[0], mesh.shape[LAYERS]).slots
    stacks, beside = divide_rows((stacks, beside), Axis(mesh, LAYERS))
    return Block(group, stacks, beside, slots)


def count_lanes(mesh: Mesh | None) -> int:
    """How many settings are solved side by side."""
    return 1 if mesh is None else mesh.shape[POINTS]


def merge_points(
    method: Method,
    leaves: SortedLeaves,
    points: Sequence[Point],
    ranks: Sequence[int | float],
    memory: int,
    mesh: Mesh | None,
) -> Iterator[tuple[Point, PyTree]]:
    """Every point of one method, those that share the most behind each other."""
    blocks = [make_block(group, leaves, mesh) for group in leaves.groups]
    cuts = [[cut_point(method, point, ranks, block) for block in blocks] for point in points]
    kept: dict[str, Sequence[Array | None]] = {}
    for members in gather(range(len(points)), lambda i: tuple(cut.prepare for cut in cuts[i])):
        parts = [
            compile_prepare(method, cut.prepare, mesh)(block.stacks, block.beside)
            for cut, block in zip(cuts[members[0]], blocks, strict=True)
        ]
        for batch in gather(members, lambda i: tuple(cut.batch for cut in cuts[i])):
            own_cuts = [(i, cuts[i]) for i in batch]
            for chunk, solutions, lanes in solve_chunks(method, blocks, parts, own_cuts, memory, mesh):
                for turn in take_turns(chunk, lanes, cuts, mesh):
                    built = [
                        build_turn(
                            compile_build(method, first_of(turn, cuts)[b].build[0], mesh),
                            (block.stacks, block.beside, own, solution),
                            [None if i is None else (lane[i].place, cuts[i][b].build[1]) for i in turn],
                        )
                        for b, (block, own, solution, lane) in enumerate(
                            zip(blocks, parts, solutions, lanes, strict=True)
                        )
                    ]
                    for place, i in enumerate(turn):
                        if i is not None:
                            outputs = [collect(x, place, of, mesh) for x, of in zip(built, blocks, strict=True)]
                            yield points[i], join_point(method, leaves, points[i], blocks, outputs, kept, mesh)


def take_turns(
    chunk: Sequence[int],
    lanes: Sequence[Mapping[int, Lane]],
    cuts: Sequence[Sequence[Cut]],
    mesh: Mesh | None,
) -> Iterator[list[int | None]]:
    """Points that are built at once, on each device of the axis "points" one whose solution it has, if there is any."""
    count = count_lanes(mesh)
    if count == 1 or not lanes:
        for i in chunk:
            yield [i]
        return
    for alike in gather(chunk, lambda i: tuple((cut.build[0], shapes_of(cut.build[1])) for cut in cuts[i])):
        queues = [[i for i in alike if lanes[0][i].device == device] for device in range(count)]
        yield from (list(turn) for turn in itertools.zip_longest(*queues))


def first_of(turn: Sequence[int | None], cuts: Sequence[Sequence[Cut]]) -> Sequence[Cut]:
    """What all points of a turn are compiled with."""
    return next(cuts[i] for i in turn if i is not None)


def build_turn(build: Any, operands: tuple[Any, ...], turn: Sequence[tuple[int, Traced] | None]) -> Array:
    """The matrices [points, slots, m, n] of a turn; a device without a point does another's, with its own lane."""
    some = next(own for own in turn if own is not None)
    lanes, traced = zip(*(own or some for own in turn), strict=True)
    settings = {name: np.stack([own[name] for own in traced]) for name in traced[0]}
    return build(*operands, np.array(lanes, np.int32), settings)


def collect(built: Array, place: int, block: Block, mesh: Mesh | None) -> Array:
    """The matrices [B, m, n] of one point of a turn."""
    return built[0] if mesh is None else compile_collect(mesh)(built, np.int32(place), block.slots)


def shapes_of(traced: Traced) -> tuple[Any, ...]:
    """Of traced values: those that differ are compiled apart."""
    return tuple((name, value.shape) for name, value in sorted(traced.items()))


class TreeMerger:
    """Merges the same trees with one setting after another, as a study asks for them; decompositions are kept.

    Arguments are those of `sweep_merge`; `ranks` are all that may be asked for, by method.
    """

    def __init__(self, trees: Sequence[PyTree], ranks: Ranks, *, mesh: Mesh | None = None, **beside: Any):
        self.trees, self.ranks, self.beside = trees, ranks, beside
        self.mesh = None if mesh is None else name_axes(mesh)
        self.known: dict[str, tuple[SortedLeaves, list[Block]]] = {}
        self.parts: dict[Any, Any] = {}
        self.kept: dict[str, dict[str, Sequence[Array | None]]] = {}

    def merge(self, point: Point) -> PyTree:
        """The merged tree of one setting; ValueError as in `rgsp_jax.merge`."""
        method, mesh = methods[point.method], self.mesh
        if point.method not in self.known:
            leaves = sort_leaves(self.trees, method, point.hyperparameters, **self.beside)
            self.known[point.method] = leaves, [make_block(group, leaves, mesh) for group in leaves.groups]
        leaves, blocks = self.known[point.method]
        idle = [None] * (count_lanes(mesh) - 1)
        outputs = []
        for b, block in enumerate(blocks):
            cut = cut_point(method, point, self.ranks.get(point.method, ()), block)
            key = point.method, b, cut.prepare
            if key not in self.parts:
                self.parts[key] = compile_prepare(method, cut.prepare, mesh)(block.stacks, block.beside)
            solve = compile_solve(method, cut.solve[0], mesh)
            operands = block.stacks, block.beside, self.parts[key]
            solution = solve(*operands, stack_settings([cut.solve[1]] * (1 + len(idle))))
            build = compile_build(method, cut.build[0], mesh)
            built = build_turn(build, (*operands, solution), [(0, cut.build[1]), *idle])
            outputs.append(collect(built, 0, block, mesh))
        return join_point(method, leaves, point, blocks, outputs, self.kept.setdefault(point.method, {}), mesh)


def join_point(
    method: Method,
    leaves: SortedLeaves,
    point: Point,
    blocks: Sequence[Block],
    outputs: Sequence[Array],
    kept: dict[str, Sequence[Array | None]],
    mesh: Mesh | None,
) -> PyTree:
    """The tree of one point; leaves that the method leaves alone are computed once for all points."""
    settings = method.rest_settings(point.hyperparameters, leaves.count)
    name = json.dumps(settings, sort_keys=True, default=str)
    if name not in kept:
        found = keep_leaves(leaves, method, point.hyperparameters)[0]
        kept[name] = found if mesh is None else jax.device_put(found, Axis(mesh, LAYERS).whole)
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
    mesh: Mesh | None,
) -> Iterator[tuple[list[int], list[Any], list[dict[int, Lane]]]]:
    """(points, solutions of every block, point -> lane in each) of points that agree in all but traced values.

    A chunk holds as many solutions as the memory allows, evenly; all chunks have one size, so that they are compiled
    once.
    """
    cuts = dict(batch)
    shared = gather(list(cuts), lambda i: tuple(cut.solution for cut in cuts[i]))
    first, side_by_side = cuts[shared[0][0]], count_lanes(mesh)
    bytes_each = sum(
        solution_bytes(method, block, own, cut, mesh) for block, own, cut in zip(blocks, parts, first, strict=True)
    )
    most = min(len(shared), side_by_side * max(1, memory // max(1, bytes_each)))
    count = -(-len(shared) // most)
    size = -(-len(shared) // count)
    for start in range(0, len(shared), size):
        chunk = [i for members in shared[start : start + size] for i in members]
        solutions, lanes = [], []
        for b, (block, part) in enumerate(zip(blocks, parts, strict=True)):
            if side_by_side > 1:  # a point has its lane in every block on one device, though some could share more
                wanted = shared[start : start + size]
                held = -(-size // side_by_side)
                distinct = split_groups(wanted, side_by_side * held)
            else:
                distinct = gather(chunk, lambda i, b=b: cuts[i][b].solution)
                held = size if count > 1 else len(distinct)
            deal = deal_rows(len(distinct), side_by_side, held)
            slots = (Lane(*divmod(slot, held)) for slot in deal.slots.tolist())
            lanes.append({i: lane for lane, own in zip(slots, distinct, strict=True) for i in own})
            settings = [cuts[distinct[row][0]][b].solve[1] for row in deal.rows]
            solve = compile_solve(method, first[b].solve[0], mesh)
            solutions.append(solve(block.stacks, block.beside, part, stack_settings(settings)))
        yield chunk, solutions, lanes


def split_groups(groups: Sequence[list[int]], count: int) -> list[list[int]]:
    """At most `count` groups, the largest split in two again and again: devices with room solve the same, and build."""
    found = list(groups)
    while len(found) < count and len(largest := max(found, key=len)) > 1:
        at, half = found.index(largest), -(-len(largest) // 2)
        found[at : at + 1] = [largest[:half], largest[half:]]
    return found


def stack_settings(settings: Sequence[Traced]) -> tuple[Traced, np.ndarray]:
    """Traced values on a leading axis, and that axis where there is nothing to trace."""
    return {name: np.stack([s[name] for s in settings]) for name in settings[0]}, np.zeros(len(settings), np.int32)


def solution_bytes(method: Method, block: Block, parts: Any, cut: Cut, mesh: Mesh | None) -> int:
    """Of one setting on all matrices of a block, on each device that has some."""
    solve = compile_solve(method, cut.solve[0], mesh)
    settings = stack_settings([cut.solve[1]] * count_lanes(mesh))
    shapes = jax.eval_shape(solve, block.stacks, block.beside, parts, settings)
    everywhere = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return everywhere // (1 if mesh is None else mesh.size)


@functools.cache
def compile_prepare(method: Method, static: Static, mesh: Mesh | None = None) -> Any:
    """`prepare(stacks [B, K, m, n], beside) -> parts [B, ...]`; nothing for methods without stages."""

    def prepare(stack: Array, own: Any) -> Any:
        if method.stages is None:
            return ()
        models, known = take_base(method, stack)
        return method.stages.prepare(models, **method.stages.pick("prepare", known, own), **dict(static))

    return divide(lambda stacks, beside: map_batch(prepare, stacks, beside), mesh, (P(LAYERS), P(LAYERS)), P(LAYERS))


@functools.cache
def compile_solve(method: Method, static: Static, mesh: Mesh | None = None) -> Any:
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

    return divide(solve_all, mesh, (P(LAYERS), P(LAYERS), P(LAYERS), P(POINTS)), P(LAYERS, POINTS))


@functools.cache
def compile_build(method: Method, static: Static, mesh: Mesh | None = None) -> Any:
    """`build(stacks, beside, parts, solutions, lanes [P], traced [P]) -> merged [P, B, m, n]`, without stats.

    P is the devices of the axis "points", 1 without a mesh; lanes are counted on each by itself.
    """

    def build(stack: Array, own: Any, parts: Any, solution: Any, traced: dict[str, Array]) -> Array:
        if method.stages is None:
            return solution
        models, known = take_base(method, stack)
        given = method.stages.pick("build", known, own) | cast_traced(traced, stack.dtype) | dict(static)
        return method.stages.build(models, parts, solution, **given).merged

    def build_all(stacks: Array, beside: Any, parts: Any, solutions: Any, lanes: Array, settings: Any) -> Array:
        own_lane = jax.tree.map(lambda x: jnp.take(x, lanes[0], axis=1), solutions)
        traced = jax.tree.map(lambda x: x[0], settings)
        return map_batch(
            lambda stack, own, part, solution: build(stack, own, part, solution, traced),
            stacks,
            beside,
            parts,
            own_lane,
        )[None]

    own = P(LAYERS)
    return divide(build_all, mesh, (own, own, own, P(LAYERS, POINTS), P(POINTS), P(POINTS)), P(POINTS, LAYERS))
