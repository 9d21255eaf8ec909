"""Gromov-Wasserstein couplings and their gradient against ott-jax and POT: time, plan error, memory.

    python -m experiments.benchmarks.gromov_wasserstein            # one core, some minutes; POT where it is installed
    python -m experiments.benchmarks.gromov_wasserstein --check    # exit 1 where a target is missed

Every round runs all contenders once, in turn, in this one process; a ratio is the median over rounds of
contender/ours within the round, so that a machine busy with other work slows both sides. Plans are compared with our
float64 solution at tolerance 1e-10, which the tests compare with POT. "points": independent Gaussian clouds in 64
dimensions, squared distances. "spectral": points s_i u_i with orthonormal u_i, the geometry of singular pairs, where
Sinkhorn converges slowly. All in float32 but POT, which knows no stabilised kernel in this solver and runs in float64.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "gromov_wasserstein.json"
EPSILONS = (0.05, 0.01)
# The smallest accepted ratio of a contender's time to ours, and the largest accepted plan error (L1) of ours.
POT = "POT loop"
TARGETS = {"ott vmap": 3.0, POT: 15.0}
LARGEST_ERROR = 1e-3
GRADIENT_TARGETS = {"time": 15.0, "memory": 50.0}


def make_points(rng: np.random.Generator, rank: int) -> tuple[np.ndarray, np.ndarray]:
    clouds = rng.normal(size=(2, 64, rank))
    cost_a, cost_b = ((x[:, :, None] - x[:, None, :]) ** 2 for x in clouds)
    return cost_a.sum(0), cost_b.sum(0)


def make_spectral(rng: np.random.Generator, rank: int) -> tuple[np.ndarray, np.ndarray]:
    values = 3 - 2 * np.arange(rank) / rank
    other = np.sort(values * (1 + 0.05 * rng.normal(size=rank)))[::-1]
    cost_a, cost_b = ((s[:, None] ** 2 + s[None, :] ** 2) * (1 - np.eye(rank)) for s in (values, other))
    return cost_a, cost_b


GEOMETRIES: dict[str, Callable] = {"points": make_points, "spectral": make_spectral}


def build_problems(geometry: str, count: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(7)
    pairs = [GEOMETRIES[geometry](rng, rank) for _ in range(count)]
    scales = [max(a.max(), b.max()) for a, b in pairs]
    costs_a, costs_b = zip(*((a / s, b / s) for (a, b), s in zip(pairs, scales, strict=True)), strict=True)
    return np.stack(costs_a), np.stack(costs_b)


def describe_machine(cores: int) -> dict[str, str | int]:
    import jax
    import ott

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores_used": cores,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "ott-jax": ott.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def solve_by_ott(cost_a, cost_b, epsilon: float, unrolled: int | None = None):
    """ott-jax's own solver; unrolled over that many outer steps for its derivative."""
    from ott.geometry import geometry
    from ott.problems.quadratic import quadratic_problem
    from ott.solvers.linear import sinkhorn
    from ott.solvers.quadratic import gromov_wasserstein

    inner = sinkhorn.Sinkhorn(threshold=1e-4, max_iterations=2000)
    if unrolled:
        inner = sinkhorn.Sinkhorn(threshold=1e-4, max_iterations=2000, implicit_diff=None)
    solver = gromov_wasserstein.GromovWasserstein(
        inner,
        epsilon=epsilon / 2,
        warm_start=True,
        threshold=1e-6,
        min_iterations=unrolled or 5,
        max_iterations=unrolled or 200,
    )
    geom_a, geom_b = geometry.Geometry(cost_matrix=cost_a), geometry.Geometry(cost_matrix=cost_b)
    return solver(quadratic_problem.QuadraticProblem(geom_a, geom_b)).matrix


def solve_by_pot(costs_a: np.ndarray, costs_b: np.ndarray, epsilon: float) -> np.ndarray:
    import ot

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inner iterations that ran out
        plans = [
            ot.gromov.entropic_gromov_wasserstein(a, b, epsilon=epsilon, tol=1e-6, max_iter=1000, symmetric=True)
            for a, b in zip(costs_a, costs_b, strict=True)
        ]
    return np.stack(plans)


def build_contenders(costs_a: np.ndarray, costs_b: np.ndarray, epsilon: float) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from rgsp_jax import gromov_wasserstein

    narrow = [jnp.asarray(x, jnp.float32) for x in (costs_a, costs_b)]

    def mapped(solve: Callable) -> Callable:
        run = jax.jit(lambda a, b: jax.lax.map(lambda pair: solve(*pair), (a, b)))
        return lambda: run(*narrow)

    def batched(solve: Callable) -> Callable:
        run = jax.jit(jax.vmap(solve))
        return lambda: run(*narrow)

    def ours(a, b):
        return gromov_wasserstein(a, b, epsilon=epsilon).plan

    def ours_through_ott(a, b):
        return gromov_wasserstein(a, b, epsilon=epsilon, solver="ott").plan

    def ott(a, b):
        return solve_by_ott(a, b, epsilon)

    contenders = {
        "ours": mapped(ours),
        "ours vmap": batched(ours),
        "ours, solver ott": mapped(ours_through_ott),
        "ott map": mapped(ott),
        "ott vmap": batched(ott),
    }
    try:
        import ot  # noqa: F401
    except ImportError:
        return contenders
    return contenders | {POT: lambda: solve_by_pot(costs_a, costs_b, epsilon)}


def solve_reference(costs_a: np.ndarray, costs_b: np.ndarray, epsilon: float) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    from rgsp_jax import gromov_wasserstein

    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (costs_a, costs_b)]

        def solve(pair):
            a, b = pair
            return gromov_wasserstein(a, b, epsilon=epsilon, tolerance=1e-10, max_iterations=5000)

        coupling = jax.jit(lambda a, b: jax.lax.map(solve, (a, b)))(*wide)
        if not coupling.converged.all():
            raise RuntimeError("the float64 reference did not converge")
        return np.asarray(coupling.plan)


def time_in_turn(contenders: dict[str, Callable], rounds: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds per round and the last result of each; POT, which compiles nothing and is slow, runs in the first."""
    import jax

    for name, run in contenders.items():
        if name != POT:
            jax.block_until_ready(run())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, np.ndarray] = {}
    for turn in range(rounds):
        for name, run in contenders.items():
            if name == POT and turn:
                continue
            start = time.perf_counter()
            result = jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
            results[name] = np.asarray(result, np.float64)
    return times, results


def compare_times(times: dict[str, list[float]], name: str) -> dict[str, float]:
    ratios = [own / ours for own, ours in zip(times[name], times["ours"], strict=False)]
    return {
        "median_s": round(statistics.median(times[name]), 5),
        "ratio_to_ours": round(statistics.median(ratios), 2),
    }


def run_forward(geometry: str, epsilon: float, count: int, rank: int, rounds: int) -> dict:
    costs_a, costs_b = build_problems(geometry, count, rank)
    reference = solve_reference(costs_a, costs_b, epsilon)
    contenders = build_contenders(costs_a, costs_b, epsilon)
    times, plans = time_in_turn(contenders, rounds)
    rows: dict[str, dict[str, float]] = {}
    for name, plan in plans.items():
        errors = np.abs(plan - reference).sum((1, 2))
        rows[name] = {"plan_error_median": float(np.median(errors)), "plan_error_max": float(errors.max())}
        rows[name] |= compare_times(times, name)
    return {"geometry": geometry, "epsilon": epsilon, "problems": count, "rank": rank, "contenders": rows}


def run_gradient(geometry: str, epsilon: float, count: int, rank: int, rounds: int, unrolled: int) -> dict:
    """Gradient of sum(w * plan) with respect to one cost: ours, and ott's solver unrolled."""
    import jax
    import jax.numpy as jnp

    from rgsp_jax import gromov_wasserstein

    costs = build_problems(geometry, count, rank)
    weights = np.random.default_rng(8).normal(size=(rank, rank))

    def differentiate(solve: Callable, dtype) -> Callable:
        return jax.grad(lambda a, b: jnp.sum(jnp.asarray(weights, dtype) * solve(a, b)))

    def build(solve: Callable) -> tuple[Callable, int]:
        narrow = [jnp.asarray(x, jnp.float32) for x in costs]
        single = differentiate(solve, jnp.float32)
        analysis = jax.jit(jax.vmap(single)).lower(*narrow).compile().memory_analysis()
        memory = analysis.temp_size_in_bytes if analysis else 0
        run = jax.jit(lambda a, b: jax.lax.map(lambda pair: single(*pair), (a, b)))
        return lambda: run(*narrow), memory

    built = {
        "ours": build(lambda a, b: gromov_wasserstein(a, b, epsilon=epsilon).plan),
        "ott unrolled": build(lambda a, b: solve_by_ott(a, b, epsilon, unrolled)),
    }
    with jax.enable_x64(True):
        exact = differentiate(
            lambda a, b: gromov_wasserstein(a, b, epsilon=epsilon, tolerance=1e-11, max_iterations=5000).plan,
            jnp.float64,
        )
        wide = [jnp.asarray(x, jnp.float64) for x in costs]
        reference = np.asarray(jax.jit(lambda a, b: jax.lax.map(lambda pair: exact(*pair), (a, b)))(*wide))
    # A cost is used by its symmetric part, so that is what gradients are compared by.
    reference = reference + reference.transpose(0, 2, 1)
    size = np.linalg.norm(reference, axis=(1, 2))
    times, gradients = time_in_turn({name: run for name, (run, _) in built.items()}, rounds)
    rows: dict[str, dict[str, float]] = {}
    for name, (_, memory) in built.items():
        gradient = gradients[name] + gradients[name].transpose(0, 2, 1)
        errors = np.linalg.norm(gradient - reference, axis=(1, 2)) / size
        rows[name] = {"error_median": float(np.median(errors)), "error_max": float(errors.max())}
        rows[name] |= compare_times(times, name)
        rows[name] |= {"memory_bytes": memory, "memory_ratio_to_ours": round(memory / built["ours"][1], 2)}
    report = {"geometry": geometry, "epsilon": epsilon, "problems": count, "rank": rank, "unrolled_steps": unrolled}
    return report | {"contenders": rows}


def find_misses(case: dict) -> list[str]:
    title, rows = f"{case['geometry']} epsilon {case['epsilon']}", case["contenders"]
    if "unrolled_steps" in case:
        unrolled = rows["ott unrolled"]
        found = {"time": unrolled["ratio_to_ours"], "memory": unrolled["memory_ratio_to_ours"]}
        return [f"{title}: gradient {name}" for name, least in GRADIENT_TARGETS.items() if found[name] < least]
    missed = [
        f"{title}: {name}" for name, least in TARGETS.items() if name in rows and rows[name]["ratio_to_ours"] < least
    ]
    return missed + ([f"{title}: plan error"] if rows["ours"]["plan_error_max"] > LARGEST_ERROR else [])


def print_case(case: dict) -> None:
    print("\n" + ", ".join(f"{key} {value}" for key, value in case.items() if key != "contenders"))
    for name, row in case["contenders"].items():
        cells = "  ".join(f"{key} {value:.3g}" for key, value in row.items())
        print(f"  {name:18}{cells}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Gromov-Wasserstein couplings against ott-jax and POT.")
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds per case")
    parser.add_argument("--unrolled-steps", type=int, default=60, help="outer steps that ott differentiates through")
    parser.add_argument("--cores", type=int, default=1, help="processor cores to run on (Linux)")
    parser.add_argument("--geometry", choices=list(GEOMETRIES), action="append", help="only these, repeatable")
    parser.add_argument("--skip-gradient", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written")
    arguments = parser.parse_args()
    # Before jax and its BLAS start their threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    cases = []
    size = (arguments.problems, arguments.rank, arguments.rounds)
    for geometry in arguments.geometry or GEOMETRIES:
        for epsilon in EPSILONS:
            cases.append(run_forward(geometry, epsilon, *size))
            print_case(cases[-1])
    if not arguments.skip_gradient:
        cases.append(run_gradient("points", 0.01, *size, arguments.unrolled_steps))
        print_case(cases[-1])
    missed = [miss for case in cases for miss in find_misses(case)]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(arguments.cores), "cases": cases, "missed": missed}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {arguments.out}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
