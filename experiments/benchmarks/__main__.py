"""All benchmarks, one after the other, each as a process of its own.

    python -m experiments.benchmarks --list
    python -m experiments.benchmarks --work PLACE --peers VENV           # every one: about two hours on two cores
    python -m experiments.benchmarks --work PLACE --peers VENV --only svd --only whole_merge
    python -m experiments.benchmarks --work PLACE --peers VENV --check   # exit 1 where a target is missed

PLACE takes models and outputs (10 GB), VENV gets other people's packages (`peers.py`, 1.7 GB; made where it is not
there). What each one measures, and against what, it says itself: `python -m experiments.benchmarks.NAME --help`.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.peers import make_environment


@dataclass(frozen=True)
class Benchmark:
    """A module of this package, and what it is given."""

    name: str
    about: str
    work: bool = False
    peers: bool = False
    checks: bool = False

    def command(self, work: Path | None, peers: Path | None, check: bool) -> list[str]:
        """The command; SystemExit where a folder that it needs is not given."""
        found = [sys.executable, "-m", f"experiments.benchmarks.{self.name}"]
        for wanted, flag, place in ((self.work, "--work", work), (self.peers, "--peers", peers)):
            if wanted and place is None:
                raise SystemExit(f"{self.name} needs {flag} FOLDER")
            found += [flag, str(place)] if wanted else []
        return [*found, "--check"] if check and self.checks else found


BENCHMARKS = (
    Benchmark("svd", "truncated SVD beside the full one, torch, scikit-learn and scipy", peers=True, checks=True),
    Benchmark("kernel_rates", "truncated SVD, GFLOP/s beside a product of the same FLOPs"),
    Benchmark("gromov_wasserstein", "couplings and their gradient beside ott-jax and POT", checks=True),
    Benchmark("sweep", "64 settings beside one merge", checks=True),
    Benchmark("conversion", "formats into each other and back", checks=True),
    Benchmark("whole_merge", "merges of a decoder beside a copy and mergekit", work=True, peers=True, checks=True),
    Benchmark("growth", "time and memory with size, models and rank", work=True),
    Benchmark("scaling", "devices and processes of one machine, beside the planner's prediction"),
    Benchmark("plan_70b", "what the planner says of 70 billion parameters"),
    Benchmark("agreement", "merges beside mergekit's and fusion_bench's own", checks=True),
)


def main() -> int:
    names = [one.name for one in BENCHMARKS]
    parser = argparse.ArgumentParser(description="All benchmarks.")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", choices=names, action="append", help="only these, repeatable")
    parser.add_argument("--work", type=Path, help="folder for models and outputs")
    parser.add_argument("--peers", type=Path, help="the peers' virtual environment")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    arguments = parser.parse_args()
    if arguments.list:
        for one in BENCHMARKS:
            print(f"{one.name:20}{one.about}")
        return 0
    chosen = [one for one in BENCHMARKS if not arguments.only or one.name in arguments.only]
    commands = [one.command(arguments.work, arguments.peers, arguments.check) for one in chosen]
    if any(one.peers for one in chosen):
        make_environment(arguments.peers)
    failed = []
    for one, command in zip(chosen, commands, strict=True):
        print(f"\n=== {one.name}: {one.about}", flush=True)
        start = time.monotonic()
        if subprocess.run(command).returncode:
            failed.append(one.name)
        print(f"=== {one.name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed, or missed a target: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
