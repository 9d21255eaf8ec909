"""A grid of 64 (rank, beta) points of `rgsp` against one merge, on layers of the sizes that encoders have.

    python -m experiments.benchmarks.sweep            # one core, about two minutes
    python -m experiments.benchmarks.sweep --check    # exit 1 where the solutions of all points cost over 1.5 merges

Every round does, in turn and in this one process: one merge (its decompositions, its solution, its matrices); the
decompositions of the grid, at its largest rank; the solutions of all 64 points; their 64 merged matrices, each dropped
when it is there. A ratio is the median over rounds of the part over the merge within the round. On a processor the
clock is the process's own time, which on one core is the wall time of an idle machine; on an accelerator it is the
wall. The layers are siblings: a random matrix with a decaying spectrum plus a fine-tune's departure each.
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
SHAPES = ((384, 384), (1536, 384), (384, 1536))
LAYERS = 4
"""Of each shape."""
RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
BETAS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
TARGET = 1.5


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


def build_steps(m: int, n: int) -> dict[str, Callable[[], object]]:
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
    stacks = jnp.asarray(np.stack([np.stack(build_layer(rng, m, n)) for _ in range(LAYERS)]))
    view = flatten_view((m, n))
    block = Block(LeafGroup(tuple(range(LAYERS)), (view,) * LAYERS, ({},) * LAYERS), stacks, {})
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


def run_shape(m: int, n: int, rounds: int) -> dict[str, object]:
    """Medians in milliseconds, and ratios to one merge within the round."""
    import jax

    steps = build_steps(m, n)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            jax.block_until_ready(step())
            if round_number:  # the first compiles
                times[name].append(clock() - start)

    def ratio(*names: str) -> float:
        sums = [sum(values) for values in zip(*(times[name] for name in names), strict=True)]
        return statistics.median(part / whole for part, whole in zip(sums, times["merge"], strict=True))

    return {
        "m": m,
        "n": n,
        "layers": LAYERS,
        "points": len(RANKS) * len(BETAS),
        "rounds": rounds,
        "median_ms": {name: round(1e3 * statistics.median(values), 2) for name, values in times.items()},
        "ratio_to_merge": {
            "solutions": round(ratio("solutions"), 3),
            "decompositions and solutions": round(ratio("decompositions", "solutions"), 3),
            "solutions and matrices": round(ratio("solutions", "matrices"), 3),
            "everything": round(ratio("decompositions", "solutions", "matrices"), 3),
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="64 points of a sweep against one merge.")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds per shape")
    parser.add_argument("--cores", type=int, default=1, help="processor cores to run on (Linux)")
    parser.add_argument("--check", action="store_true", help="exit 1 where the target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written")
    arguments = parser.parse_args()
    # Before jax and its BLAS start their threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    results, missed = [], []
    for m, n in SHAPES:
        result = run_shape(m, n, arguments.rounds)
        results.append(result)
        print(f"{LAYERS} layers {m}x{n}, rank {max(RANKS)}")
        print("  median ms:       " + ", ".join(f"{name} {ms:g}" for name, ms in result["median_ms"].items()))  # type: ignore[attr-defined]
        ratios = result["ratio_to_merge"]
        print("  of one merge:    " + ", ".join(f"{name} {value:g}" for name, value in ratios.items()), flush=True)  # type: ignore[attr-defined]
        if ratios["decompositions and solutions"] > TARGET:  # type: ignore[index]
            missed.append(f"{m}x{n}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(arguments.cores), "target": TARGET, "shapes": results, "missed": missed}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {arguments.out}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
