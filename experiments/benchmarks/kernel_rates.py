"""Truncated SVDs from 384 to 4096, ranks 16 to 256: achieved GFLOP/s beside a plain product of the same FLOPs.

    python -m experiments.benchmarks.kernel_rates                    # one core; writes results/kernel_rates.*
    python -m experiments.benchmarks.kernel_rates --largest 2048     # a few minutes
    python -m experiments.benchmarks.kernel_rates --weights MODEL    # also a checkpoint's matrices, one of each shape

Every round runs all contenders of a case once, in turn: `truncated_svd` on float32 and on bfloat16 matrices (computed
in float32) at its default tolerance and at 1e-3, over a batch as a merge has it, the full SVD where it takes less than
a minute, and a product `[m, n] [n, q]` with q chosen so that it takes as many FLOPs as are counted for the truncated
SVD (`rgsp_jax.linalg.cost.count_truncated_svd`, to the leading order). On a processor the clock is the process's own
time. "of the product" is the rate over the product's: what is lost to small steps, to reading the matrix again and
again, and to iterations beyond those counted. Singular values are compared with numpy's in float64 on the same entries.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.svd import Case, build_matrix, describe_machine

RESULTS = Path(__file__).parent / "results" / "kernel_rates.json"
SHAPES = ((384, 384), (1536, 384), (896, 896), (4864, 896), (1024, 1024), (2048, 2048), (4096, 1024), (4096, 4096))
RANKS = (16, 64, 256)
FULL_ENTRIES = 2048 * 2048
"""Matrices with more have no full SVD beside them."""
BATCH_ENTRIES = 4 * 1024 * 1024
"""Of a batch, so that small matrices come several at a time."""


@dataclass(frozen=True)
class Problem:
    name: str
    matrix: np.ndarray
    rank: int

    @property
    def batch(self) -> int:
        return max(1, min(8, BATCH_ENTRIES // self.matrix.size))


def list_synthetic(largest: int, ranks: Sequence[int]) -> list[Problem]:
    """Matrices whose singular values decay like those of task vectors."""
    problems = []
    for m, n in SHAPES:
        if max(m, n) > largest:
            continue
        matrix, _ = build_matrix(Case(m, n, 1, "task_vector", None))
        problems += [Problem("task vector", matrix, rank) for rank in ranks if 2 * rank <= n]
    return problems


def list_weights(model: str, ranks: Sequence[int]) -> list[Problem]:
    """The first matrix of every shape in a checkpoint, embeddings left out."""
    from rgsp_jax.checkpoint import open_checkpoint

    found: dict[tuple[int, ...], np.ndarray] = {}
    with open_checkpoint(model) as checkpoint:
        for name, spec in checkpoint.specs.items():
            if len(spec.shape) == 2 and min(spec.shape) >= 64 and "embed" not in name and spec.shape not in found:
                found[spec.shape] = checkpoint.read(name).astype(np.float32)
    return [Problem("weights", w, rank) for w in found.values() for rank in ranks if 2 * rank <= min(w.shape)]


def build_contenders(problem: Problem) -> dict[str, Callable[[], Any]]:
    """What a round times, each over the whole batch."""
    import jax
    import jax.numpy as jnp

    from rgsp_jax.batching import map_batch
    from rgsp_jax.linalg import truncated_svd
    from rgsp_jax.linalg.cost import count_truncated_svd

    m, n = problem.matrix.shape
    stack = jnp.asarray(np.stack([problem.matrix] * problem.batch))
    narrow = stack.astype(jnp.bfloat16)
    width = max(1, round(count_truncated_svd(m, n, problem.rank) / (2 * m * n)))
    right = jnp.asarray(np.random.default_rng(0).standard_normal((n, width), np.float32))

    def truncated(tolerance: float | None) -> Callable[[Any], Any]:
        return jax.jit(lambda x: map_batch(lambda w: truncated_svd(w, problem.rank, tolerance=tolerance), x))

    exact, loose = truncated(None), truncated(1e-3)
    # The factor is another for every matrix, or XLA would take the product out of the loop.
    product = jax.jit(
        lambda x, y: jax.lax.map(lambda i: (x[i] @ (y + i.astype(y.dtype))).max(1), jnp.arange(x.shape[0]))
    )
    contenders: dict[str, Callable[[], Any]] = {
        "product": lambda: product(stack, right),
        "truncated": lambda: exact(stack),
        "truncated 1e-3": lambda: loose(stack),
        "truncated bf16": lambda: exact(narrow),
        "truncated bf16 1e-3": lambda: loose(narrow),
    }
    if m * n <= FULL_ENTRIES:
        full = jax.jit(lambda x: jax.lax.map(lambda w: jnp.linalg.svd(w, full_matrices=False), x))
        contenders["full"] = lambda: full(stack)
    return contenders


def run_problem(problem: Problem, rounds: int) -> dict[str, Any]:
    import jax

    from rgsp_jax.linalg.cost import count_truncated_svd

    contenders = build_contenders(problem)
    found = {name: jax.block_until_ready(run()) for name, run in contenders.items()}
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            jax.block_until_ready(run())
            times[name].append((clock() - start) / problem.batch)
    m, n = problem.matrix.shape
    flops = count_truncated_svd(m, n, problem.rank)
    true = np.linalg.svd(problem.matrix.astype(np.float64), compute_uv=False)[: problem.rank]
    row: dict[str, Any] = {"matrix": problem.name, "m": m, "n": n, "rank": problem.rank, "batch": problem.batch}
    row |= {"flops": flops, "contenders": {}}
    for name, own in times.items():
        seconds = statistics.median(own)
        cells = {"ms": round(1e3 * seconds, 2)}
        if name != "full":
            cells["gflops"] = round(flops / seconds / 1e9, 2)
            share = statistics.median(a / b for a, b in zip(times["product"], own, strict=True))
            cells["of_product"] = round(share, 4)
        if "full" in times:
            cells["to_full"] = round(statistics.median(a / b for a, b in zip(times["full"], own, strict=True)), 2)
        if name.startswith("truncated"):
            s = np.asarray(found[name].s[0], np.float64)
            cells |= {"sigma_error": float(np.max(np.abs(s - true) / true)), "residual": float(found[name].residual[0])}
        row["contenders"][name] = cells
    return row


def render(report: Mapping[str, Any]) -> str:
    machine = report["machine"]
    lines = [
        "# Rates of truncated SVDs",
        "",
        f"    {report['command']}",
        "",
        f"{report['headline']} {machine['processor']}, {machine['device']}, {machine['cores_used']} core(s), load"
        f" {machine['load'][0]} at the end, JAX {machine['jax']}; medians of {report['rounds']} alternating rounds.",
        "",
        "| matrix | r | contender | ms | GFLOP/s | of the product | full SVD / own | sigma error | residual |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in report["cases"]:
        for name, row in case["contenders"].items():
            cells = [f"{row['ms']:.1f}", f"{row['gflops']:.1f}" if "gflops" in row else ""]
            cells += [f"{row['of_product']:.2f}" if "of_product" in row else ""]
            cells += [f"{row['to_full']:.1f}" if "to_full" in row else ""]
            cells += [f"{row[x]:.1e}" if x in row else "" for x in ("sigma_error", "residual")]
            what = f"{case['matrix']} {case['m']} x {case['n']}"
            lines.append(f"| {what} | {case['rank']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_headline(cases: Sequence[Mapping[str, Any]]) -> str:
    """The result in a sentence."""
    shares = [case["contenders"]["truncated"]["of_product"] for case in cases]
    text = f"Truncated SVDs run at {min(shares):.2f} to {max(shares):.2f} of a product's rate of the same FLOPs"
    ratios = [c["contenders"]["truncated"]["to_full"] for c in cases if "to_full" in c["contenders"]["truncated"]]
    return f"{text} and are {min(ratios):.1f} to {max(ratios):.1f} times as fast as the full SVD." if ratios else text


def main() -> int:
    parser = argparse.ArgumentParser(description="Rates of truncated SVDs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=1, help="processor cores to run on (Linux)")
    parser.add_argument("--largest", type=int, default=4096, help="side of the matrices")
    parser.add_argument("--rank", type=int, action="append", help="only these, repeatable")
    parser.add_argument("--weights", help="a checkpoint to take matrices from as well")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written, a table beside it")
    arguments = parser.parse_args()
    # Before jax and its BLAS start their threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    ranks = arguments.rank or RANKS
    problems = list_synthetic(arguments.largest, ranks)
    if arguments.weights:
        problems += list_weights(arguments.weights, ranks)
    cases = []
    for problem in problems:
        cases.append(run_problem(problem, arguments.rounds))
        row = cases[-1]["contenders"]["truncated"]
        print(f"{problem.name} {problem.matrix.shape} r {problem.rank}: {row}", flush=True)
    machine = describe_machine(arguments.cores) | {"load": [round(x, 1) for x in os.getloadavg()]}
    report = {
        "command": "python -m experiments.benchmarks.kernel_rates " + shlex.join(sys.argv[1:]),
        "headline": write_headline(cases),
        "machine": machine,
        "rounds": arguments.rounds,
        "cases": cases,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    text = render(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
