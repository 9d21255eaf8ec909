"""The environment that other people's packages run in, apart from this project's own.

python -m experiments.benchmarks.peers VENV      # makes it, or completes the one that is there

Two minutes, 1.7 GB.
"""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch==2.13.0", "mergekit==0.1.5", "POT==0.9.7.post1", "scikit-learn==1.9.1", "scipy")
"""What benchmarks compare with; versions are pinned where a result names one."""


def make_environment(directory: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """The python of an environment with these packages; it is made where there is none, and completed where it lacks
    some."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    names = [package.split("==")[0] for package in packages]
    if set(find_versions(python, names)) < set(names):
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def find_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages that an environment has."""
    code = (
        "import sys\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "for name in sys.argv[1:]:\n    try:\n        print(name, version(name))\n    except PackageNotFoundError:\n"
        "        pass"
    )
    found = subprocess.run([python, "-c", code, *packages], check=True, capture_output=True, text=True).stdout
    return dict(line.split() for line in found.splitlines())


def own_environment() -> dict[str, str]:
    """Variables for a process that asks no hub and sees only what its own interpreter has."""
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    python = make_environment(Path(sys.argv[1]))
    for name, number in find_versions(python, [p.split("==")[0] for p in PACKAGES]).items():
        print(name, number)
    print("jax", version("jax"))


if __name__ == "__main__":
    main()
