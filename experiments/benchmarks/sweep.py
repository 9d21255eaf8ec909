"""A grid of 64 (rank, beta) points of `rgsp` against one merge, on layers of the sizes that encoders have.

    python -m experiments.benchmarks.sweep            # one core, about two minutes
    python -m experiments.benchmarks.sweep --check    # exit 1 where all points, before they are built, cost 1.5 merges

Every round does, in turn and in this one process: one merge (its decompositions, its solution, its matrices); the
decompositions of the grid, at its largest rank; the solutions of all 64 points; their 64 merged matrices, each dropped
when it is there. A ratio is the median over rounds of the part over the merge within the round. On a processor the
clock is the process's own time, which on one core is the wall time of an idle machine; on an accelerator it is the
wall. The matrices are those of two encoder layers of width 384, siblings: a random matrix with a decaying spectrum plus
a fine-tune's departure each.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.benchmarks.svd import describe_machine

RESULTS = Path(__file__).parent / "results" / "sweep.json"
SHAPES = {(384, 384): 8, (1536, 384): 2, (384, 1536): 2}
"""Shape -> matrices, as two encoder layers have them."""
RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
BETAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TARGET = 1.5
STEPS = ("merge", "decompositions", "solutions", "matrices")


def build_layer(rng: np.random.Generator, m: int, n: int) -> list[np.ndarray]:
    """Two siblings: singular values fall as in a trained layer; each departs by a tenth of its norm."""
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((x, k)))[0] for x in (m, n))
    ancestor = (u * (1 + 38.4 * (np.arange(k) + 0.5) / k) ** -0.6) @ v.T
    pair = []
    for _ in range(2):
        left, right = rng.standard_normal((m, 48)), rng.standard_normal((n, 48))
        change = (left * np.geomspace(1, 0.05, 48)) @ right.T
        pair.append((ancestor + 0.1 * np.linalg.norm(ancestor) / np.linalg.norm(change) * change).astype(np.float32))
    return pair


def build_steps(m: int, n: int, count: int) -> dict[str, Callable[[], object]]:
    """What a round times, in turn."""
    import jax
    import jax.numpy as jnp

    from rgsp_jax import methods
    from rgsp_jax.batching import map_batch
    from rgsp_jax.rules import flatten_view
    from rgsp_jax.sweep.grid import Point
    from rgsp_jax.sweep.merging import Block, compile_build, compile_prepare, cut_point, solve_chunks
    from rgsp_jax.trees import LeafGroup

    rng = np.random.default_rng(m + 7 * n)
    method = methods["rgsp"]
    stacks = jnp.asarray(np.stack([np.stack(build_layer(rng, m, n)) for _ in range(count)]))
    view = flatten_view((m, n))
    block = Block(LeafGroup(tuple(range(count)), (view,) * count, ({},) * count), stacks, {})
    points = [Point(i, "rgsp", {"rank": r, "beta": b}) for i, (r, b) in enumerate((r, b) for r in RANKS for b in BETAS)]
    cuts = [cut_point(method, point, RANKS, block) for point in points]
    one = jax.jit(lambda x, beta: map_batch(lambda w: method.fn(w, rank=max(RANKS), beta=beta), x))
    held: dict[str, object] = {}

    def prepare() -> object:
        held["parts"] = compile_prepare(method, cuts[0].prepare)(stacks, {})
        return held["parts"]

    def solve() -> object:
        batch = [(i, [cut]) for i, cut in enumerate(cuts)]
        (held["chunk"],) = solve_chunks(method, [block], [held["parts"]], batch, 1 << 40)
        return held["chunk"][1]  # type: ignore[index]

    def build() -> None:
        members, (solution,), (lane,) = held["chunk"]  # type: ignore[misc]
        for i in members:
            build_one = compile_build(method, cuts[i].build[0])
            jax.block_until_ready(build_one(stacks, {}, held["parts"], solution, lane[i], cuts[i].build[1]))

    return {"merge": lambda: one(stacks, jnp.float32(1.0)), "decompositions": prepare, "solutions": solve,
            "matrices": build}  # fmt: skip


Times = dict[str, list[float]]


def time_rounds(rounds: int) -> dict[tuple[int, int], Times]:
    """Shape -> step -> seconds of every round."""
    import jax

    steps = {shape: build_steps(*shape, count) for shape, count in SHAPES.items()}
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times: dict[tuple[int, int], Times] = {shape: {name: [] for name in own} for shape, own in steps.items()}
    for round_number in range(rounds + 1):
        for shape, own in steps.items():
            for name, step in own.items():
                start = clock()
                jax.block_until_ready(step())
                if round_number:  # the first compiles
                    times[shape][name].append(clock() - start)
    return times


def describe(times: Times) -> dict[str, dict[str, float]]:
    """Medians in milliseconds, and ratios to one merge within the round."""

    def ratio(*names: str) -> float:
        sums = [sum(values) for values in zip(*(times[name] for name in names), strict=True)]
        return round(statistics.median(part / whole for part, whole in zip(sums, times["merge"], strict=True)), 3)

    return {
        "median_ms": {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()},
        "ratio_to_merge": {
            "solutions": ratio("solutions"),
            "decompositions and solutions": ratio("decompositions", "solutions"),
            "solutions and matrices": ratio("solutions", "matrices"),
            "everything": ratio("decompositions", "solutions", "matrices"),
        },
    }


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """A title and two lines."""
    print(title)
    print("  median ms:       " + ", ".join(f"{name} {ms:g}" for name, ms in found["median_ms"].items()))
    print("  of one merge:    " + ", ".join(f"{name} {value:g}" for name, value in found["ratio_to_merge"].items()))


def write_headline(ratios: dict[str, float]) -> str:
    """The result in a sentence."""
    whole, behind, built = (ratios[n] for n in ("decompositions and solutions", "solutions", "everything"))
    return (
        f"{len(RANKS) * len(BETAS)} (rank, beta) points of rgsp cost {whole:g} merges up to their solutions ({behind:g}"
        f" behind the decompositions), {built:g} with every matrix built."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="64 points of a sweep against one merge.")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    parser.add_argument("--cores", type=int, default=1, help="processor cores to run on (Linux)")
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written")
    arguments = parser.parse_args()
    # Before jax and its BLAS start their threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    times = time_rounds(arguments.rounds)
    shapes = []
    for (m, n), count in SHAPES.items():
        found = describe(times[m, n])
        shapes.append({"m": m, "n": n, "matrices": count, **found})
        show(f"{count} matrices {m}x{n}", found)
    together = {name: [sum(x) for x in zip(*(own[name] for own in times.values()), strict=True)] for name in STEPS}
    total = describe(together)
    show(f"all {sum(SHAPES.values())}, {len(RANKS) * len(BETAS)} points up to rank {max(RANKS)}", total)
    missed = total["ratio_to_merge"]["decompositions and solutions"] > TARGET
    report = {
        "command": "python -m experiments.benchmarks.sweep",
        "headline": write_headline(total["ratio_to_merge"]),
        "machine": describe_machine(arguments.cores),
        "points": len(RANKS) * len(BETAS),
        "rounds": arguments.rounds,
        "target": TARGET,
        "together": total,
        "shapes": shapes,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {arguments.out}" + (f"; over the target of {TARGET}" if missed else ""))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
