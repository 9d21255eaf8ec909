"""Truncated SVD against the full SVD: time, error, residual.

    python -m experiments.benchmarks.svd                  # one core, about two minutes
    python -m experiments.benchmarks.svd --check          # exit 1 where a target ratio is missed

    python -m experiments.benchmarks.svd --peers VENV     # torch, scikit-learn and scipy in turn with ours
    python -m experiments.benchmarks.svd --sweep          # where gram, lanczos and full cross, by shape and rank

Every round runs all contenders once, in turn, in this one process; a ratio is the median over rounds of full/contender
within the round, so that a machine busy with other work slows both sides. On a processor the clock is the process's own
time, which on one core is the wall time of an idle machine; on an accelerator it is the wall. Matrices have known
singular values: "task_vector" decays like the difference of two fine-tuned attention matrices, "gaussian" hardly at all
(hard for every iterative method). Errors are taken against those values. Peers run in a process of their own, with one
thread, on the same core and clock; `torch.svd_lowrank` with twice the rank's columns and several counts of iterations.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.peers import make_environment, own_environment
from experiments.benchmarks.svd_peers import CONTENDERS as PEERS

RESULTS = Path(__file__).parent / "results" / "svd.json"


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    rank: int
    spectrum: str
    target: float | None
    """Smallest accepted ratio full/auto; None only reports."""
    loose_target: float | None = None
    """The same at an excess of at most LARGEST_EXCESS, where torch must be behind, too."""

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n} r{self.rank} {self.spectrum}"


CASES = (
    Case(384, 384, 64, "task_vector", 1.6),
    Case(384, 384, 19, "task_vector", None),
    Case(1536, 384, 64, "task_vector", None),
    Case(1024, 1024, 16, "task_vector", 20.0),
    Case(1024, 1024, 64, "task_vector", 6.0, 6.5),
    Case(1024, 1024, 64, "gaussian", None),
    Case(2048, 2048, 64, "task_vector", 5.0, 15.0),
)
LARGEST_EXCESS = 3e-4
# Shapes and ranks around the thresholds of the automatic choice.
SWEEP = tuple(
    Case(m, n, rank, spectrum, None)
    for m, n, rank in (
        (96, 96, 8),
        (256, 256, 16),
        (256, 256, 32),
        (512, 512, 64),
        (512, 512, 96),
        (1024, 1024, 128),
        (1024, 1024, 192),
        (4096, 96, 10),
    )
    for spectrum in ("task_vector", "gaussian")
)
# name: (algorithm, tolerance); None is the default
CONTENDERS: dict[str, tuple[str, float | None]] = {
    "auto": ("auto", None),
    "auto tolerance 1e-2": ("auto", 1e-2),
    "auto tolerance 1e-3": ("auto", 1e-3),
    "gram": ("gram", None),
    "lanczos": ("lanczos", None),
    "subspace": ("subspace", None),
    "subspace tolerance 1e-3": ("subspace", 1e-3),
}


def task_vector(positions: np.ndarray) -> np.ndarray:
    """Singular values over relative position in 0..1: a power law that falls to zero at the end."""
    return (1 + 38.4 * positions) ** -0.6 * (1 - positions)


def gaussian(positions: np.ndarray) -> np.ndarray:
    """Singular values of a square Gaussian matrix (quarter-circle law), by their quantiles."""
    x = np.linspace(0, 2, 20001)
    cumulative = np.concatenate([[0], np.cumsum(np.sqrt(4 - ((x[1:] + x[:-1]) / 2) ** 2))])
    return np.interp(1 - positions, cumulative / cumulative[-1], x)


SPECTRA: dict[str, Callable[[np.ndarray], np.ndarray]] = {"task_vector": task_vector, "gaussian": gaussian}


def build_matrix(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A float32 matrix with Haar singular vectors, and its singular values."""
    rng = np.random.default_rng(7)
    k = min(case.m, case.n)
    s = SPECTRA[case.spectrum]((np.arange(k) + 0.5) / k)
    u, _ = np.linalg.qr(rng.standard_normal((case.m, k)))
    v, _ = np.linalg.qr(rng.standard_normal((case.n, k)))
    return ((u * s) @ v.T).astype(np.float32), s


def describe_machine(cores: int) -> dict[str, str | int]:
    import jax

    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores_used": cores,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def build_contenders(case: Case, names: list[str]) -> dict[str, Callable]:
    import jax
    import jax.numpy as jnp

    from rgsp_jax.linalg import truncated_svd

    def full(w):
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        return u[:, : case.rank], s[: case.rank], vt[: case.rank].T

    contenders: dict[str, Callable] = {"full": jax.jit(full)}
    for name in names:
        algorithm, tolerance = CONTENDERS[name]
        contenders[name] = jax.jit(
            lambda w, algorithm=algorithm, tolerance=tolerance: truncated_svd(
                w, case.rank, algorithm=algorithm, tolerance=tolerance
            )[:3]
        )
    return contenders


def score(w: np.ndarray, true_s: np.ndarray, factors: tuple) -> dict[str, float]:
    """Error of the singular values, excess of the approximation error over the best possible, residual."""
    u, s, v = (np.asarray(x, np.float64) for x in factors)
    w = w.astype(np.float64)
    rank = len(s)
    # |w - u diag(s) v^T|^2, without its cancellation where the tail is small.
    error = np.linalg.norm(w - (u * s) @ v.T)
    best = np.sqrt(np.sum(true_s[rank:] ** 2))
    residual = max(np.linalg.norm(w @ v - u * s, axis=0).max(), np.linalg.norm(w.T @ u - v * s, axis=0).max())
    return {
        "sigma_error": float(np.max(np.abs(s - true_s[:rank]) / true_s[:rank])),
        "excess": float(error / best - 1) if best > 0 else 0.0,
        "residual": float(residual / s[0]),
    }


class Peers:
    """Other people's decompositions, in a process of their own environment that waits for orders."""

    def __init__(self, venv: Path) -> None:
        python = make_environment(venv)
        environment = own_environment() | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-m", "experiments.benchmarks.svd_peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def leave(self) -> None:
        self.process.communicate("")


def run_case(case: Case, names: list[str], rounds: int, peers: Peers | None) -> dict:
    import jax

    w, true_s = build_matrix(case)
    on_device = jax.device_put(w)
    contenders = build_contenders(case, names)
    scores = {name: score(w, true_s, jax.block_until_ready(f(on_device))) for name, f in contenders.items()}
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    theirs = [name for name in PEERS if peers is not None and (name != "scipy svds" or case.n <= 1024)]
    times: dict[str, list[float]] = {name: [] for name in (*contenders, *theirs)}
    with tempfile.TemporaryDirectory() as directory:
        matrix, factors = Path(directory) / "matrix.npy", Path(directory) / "factors.npz"
        np.save(matrix, w)
        for name in theirs:
            assert peers is not None
            peers.ask(contender=name, matrix=str(matrix), rank=case.rank, factors=str(factors))
            with np.load(factors) as found:
                scores[name] = score(w, true_s, (found["u"], found["s"], found["v"]))
        for _ in range(rounds):
            for name, f in contenders.items():
                start = clock()
                jax.block_until_ready(f(on_device))
                times[name].append(clock() - start)
            for name in theirs:
                assert peers is not None
                times[name].append(peers.ask(contender=name, matrix=str(matrix), rank=case.rank)["seconds"])
    rows = {}
    for name in times:
        ratios = [full / own for full, own in zip(times["full"], times[name], strict=True)]
        rows[name] = {
            "median_ms": round(1e3 * statistics.median(times[name]), 3),
            "ratio_to_full": round(statistics.median(ratios), 2),
            **scores[name],
        }
    return {**asdict(case), "rounds": rounds, "contenders": rows}


def find_misses(case: Case, rows: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Names of the targets that a case misses."""
    missed = []
    auto, loose = rows.get("auto"), rows.get("auto tolerance 1e-2")
    if case.target and auto and (auto["ratio_to_full"] < case.target or auto["sigma_error"] > 1e-6):
        missed.append(case.name)
    if case.loose_target and loose:
        name = f"{case.name} at excess {LARGEST_EXCESS:g}"
        if loose["ratio_to_full"] < case.loose_target or loose["excess"] > LARGEST_EXCESS:
            missed.append(name)
        equal = [r["ratio_to_full"] for n, r in rows.items() if n.startswith("torch") and r["excess"] <= LARGEST_EXCESS]
        if equal and max(equal) > loose["ratio_to_full"]:
            missed.append(f"{name}, torch")
    return missed


def print_case(case: Case, result: dict) -> None:
    print(f"\n{case.name}" + (f"   (target: auto at least {case.target}x)" if case.target else ""))
    print(f"  {'contender':26}{'median ms':>10}{'ratio':>8}{'sigma error':>13}{'excess':>10}{'residual':>10}")
    for name, row in result["contenders"].items():
        print(
            f"  {name:26}{row['median_ms']:10.1f}{row['ratio_to_full']:7.1f}x{row['sigma_error']:13.1e}"
            f"{row['excess']:10.1e}{row['residual']:10.1e}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Truncated SVD against the full SVD.")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds per case")
    parser.add_argument("--cores", type=int, default=1, help="processor cores to run on (Linux)")
    parser.add_argument("--case", default="", help="only the cases whose name contains this")
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS), help="only these, repeatable")
    parser.add_argument("--peers", type=Path, help="the peers' virtual environment; made there where there is none")
    parser.add_argument("--sweep", action="store_true", help="the cases around the thresholds instead")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written")
    arguments = parser.parse_args()
    # Before jax and its BLAS start their threads.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-arguments.cores :])
    results, missed = [], []
    peers = Peers(arguments.peers) if arguments.peers else None
    for case in SWEEP if arguments.sweep else CASES:
        if arguments.case not in case.name:
            continue
        result = run_case(case, arguments.contender or list(CONTENDERS), arguments.rounds, peers)
        print_case(case, result)
        results.append(result)
        missed += find_misses(case, result["contenders"])
    if peers is not None:
        peers.leave()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": describe_machine(arguments.cores), "cases": results, "missed": missed}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {arguments.out}" + (f"; missed: {', '.join(missed)}" if missed else ""))
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
