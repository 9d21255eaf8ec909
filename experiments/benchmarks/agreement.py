"""Our merge methods beside mergekit's and fusion_bench's own code, on the same tensors in float32.

    python -m experiments.benchmarks.agreement                # makes the peers' environment, compares, removes it
    python -m experiments.benchmarks.agreement --peers VENV   # keeps it in VENV, and uses the one that is there
    python -m experiments.benchmarks.agreement --check        # exit 1 where an error is past its bound
    python -m experiments.benchmarks.agreement --golden       # also writes the goldens of tests/merging

Three minutes on two shared cores, and the installation (1.7 GB, two minutes more). What is installed for the peers is
in `REQUIREMENTS` and `WITHOUT_DEPENDENCIES`; fusion_bench comes without what it declares, since its kernels need little
of it. The peers' kernels run in that environment alone, in a process of their own that reads the tensors and the
settings of `ROWS` and writes its results; then ours run here. Expected: every error within 1e-5 but the two rows that
say by which definition they differ.

An error is Frobenius, relative: of the merged weights, and of their change from the base where there is one. Random
methods are compared on the mask that mergekit drew: our own draw is replaced by it, nothing else. The last part merges
toy Llama checkpoints from mergekit YAMLs with mergekit itself and with `rgsp merge`'s pipeline.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from experiments.benchmarks.agreement_cases import (
    DIFFERENCES,
    LLAMA,
    PROBLEMS,
    ROWS,
    SEED,
    TENSORS,
    TINY,
    WEIGHTS,
    YAMLS,
    Row,
    cut,
)

REQUIREMENTS = (
    "torch==2.13.0",
    "mergekit==0.1.5",
    *("hydra-core", "lightning", "bidict", "rich", "scipy", "joblib", "pillow", "h5py"),  # of fusion_bench, on import
)
WITHOUT_DEPENDENCIES = ("fusion-bench==0.2.33",)

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
GOLDEN = ROOT / "tests" / "merging" / "golden" / "agreement.json"
BOUND = 1e-5


# Our side.


def merge_ours(row: Row, arrays: Mapping[str, np.ndarray], mask: np.ndarray | None) -> np.ndarray:
    """`rgsp_jax.methods[...]` in float32; random ones on the mask given."""
    import jax
    import jax.numpy as jnp

    from rgsp_jax import methods
    from rgsp_jax.types import InputStatistics

    method, stack, base = methods[row.method], arrays["stack"], arrays["base"]
    settings = cut(row.ours, len(stack))
    if row.match_l1:
        vectors = np.abs(stack - base).astype(np.float64)
        factors = vectors.sum((1, 2)) / (vectors * mask).sum((1, 2)) * (1 - settings["drop_rate"])
        settings["coefficients"] = [float(c * f) for c, f in zip(settings["coefficients"], factors, strict=True)]
    needed: dict[str, Any] = {"base": jnp.asarray(base)} if "base" in method.needs else {}
    if "covariances" in method.needs:
        needed["inputs"] = InputStatistics(covariance=jnp.asarray(arrays["covariances"]))
    draw: Any = contextlib.nullcontext()
    if "key" in method.needs:
        needed["key"] = jax.random.key(0)
        draw = mock.patch("jax.random.uniform", given_draws(needed["key"], mask))
    with draw:
        return np.asarray(method(jnp.asarray(stack), **settings, **needed).merged)


def given_draws(key: Any, mask: Any) -> Callable[..., Any]:
    """In place of `jax.random.uniform`: past every probability where the mask of the key's model keeps, else below."""
    import jax
    import jax.numpy as jnp

    keys = [jax.random.key_data(jax.random.fold_in(key, i)) for i in range(len(mask))]
    table, draws = jnp.stack(keys), jnp.where(jnp.asarray(mask), 1.0, -1.0).astype(jnp.float32)
    return lambda own, *_: draws[jnp.argmax(jnp.all(table == jax.random.key_data(own)[None], axis=-1))]


def relative_error(actual: np.ndarray, expected: np.ndarray, origin: np.ndarray | float = 0.0) -> float:
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected - origin))


def compare_row(row: Row, index: int, directory: Path) -> dict[str, Any]:
    """Errors of one row on every problem it takes."""
    errors, changes = {}, {}
    for p, problem in enumerate(PROBLEMS):
        if row.takes(problem):
            arrays, theirs = np.load(directory / f"problems_{p}.npz"), np.load(directory / f"problems_{p}_{index}.npz")
            merged = merge_ours(row, arrays, theirs.get("mask"))
            errors[problem.name] = relative_error(merged, theirs["merged"])
            if row.method not in ("average", "slerp", "karcher", "regmean"):
                changes[problem.name] = relative_error(merged, theirs["merged"], arrays["base"])
    return {
        "peer": row.peer,
        "function": row.function,
        "theirs": dict(row.theirs),
        "method": row.method,
        "ours": dict(row.ours),
        "error": max(errors.values()),
        "error_of_change": max(changes.values()) if changes else None,
        "bound": BOUND if row.bounded else None,
        "note": row.note,
        "errors": errors,
    }


def write_checkpoints(directory: Path) -> None:
    """Toy Llamas (a base and two children), and a YAML for every entry of `YAMLS`."""
    import yaml

    from rgsp_jax.checkpoint import write_safetensors

    rng = np.random.default_rng(SEED)
    base = {name: rng.normal(size=shape) for name, shape in TENSORS.items()}
    for k, name in enumerate(("base", "a", "b")):
        model = {n: (x + 0.3 * (k > 0) * rng.normal(size=x.shape)).astype(np.float32) for n, x in base.items()}
        (directory / name).mkdir()
        write_safetensors(directory / name / "model.safetensors", model)
        (directory / name / "config.json").write_text(json.dumps(LLAMA))
    for file, (method, parameters) in YAMLS.items():
        weighed = method not in ("slerp", "karcher", "model_stock")
        models = [
            {"model": str(directory / name), **({"parameters": {"weight": weight}} if weighed else {})}
            for name, weight in zip("ab", WEIGHTS, strict=False)
        ]
        base_model = {"slerp": "a", "linear": None, "karcher": None}.get(method, "base")
        fields = {"merge_method": method, "models": models, "parameters": dict(parameters), "dtype": "float32"}
        if base_model:
            fields["base_model"] = str(directory / base_model)
        (directory / f"{file}.yaml").write_text(yaml.safe_dump(fields))


def compare_yamls(directory: Path) -> list[dict[str, Any]]:
    """The same YAML by mergekit and by our pipeline: the largest error over the tensors."""
    from rgsp_jax.checkpoint import open_checkpoint
    from rgsp_jax.pipeline import merge_checkpoints, parse_config, read_config_file

    def read(path: Path) -> dict[str, np.ndarray]:
        with open_checkpoint(str(path)) as checkpoint:
            return {name: checkpoint.read(name) for name in TENSORS}

    models = {name: read(directory / name) for name in ("base", "a", "b")}
    rows = []
    for file, (method, parameters) in YAMLS.items():
        path = directory / f"{file}.yaml"
        out = merge_checkpoints(parse_config(read_config_file(path), str(path)), directory / f"ours_{file}").out
        ours, theirs = read(out), read(directory / file)
        row: dict[str, Any] = {"method": method, "parameters": dict(parameters), "bound": BOUND}
        if method == "dare_linear":
            (error, ours_kept), (own_error, theirs_kept) = (recover_masks(x, models) for x in (ours, theirs))
            row |= {"error": max(error, own_error), "kept": {"ours": ours_kept, "theirs": theirs_kept}}
        else:
            row["error"] = max(relative_error(ours[name], theirs[name]) for name in TENSORS)
        rows.append(row)
    return rows


def recover_masks(merged: Mapping[str, np.ndarray], models: Mapping[str, Any]) -> tuple[float, float]:
    """(relative distance to the nearest choice of kept entries, largest over the tensors; share kept of all)."""
    error, kept, total = 0.0, 0, 0
    for name, values in merged.items():
        base = models["base"][name].astype(np.float64)
        vectors = [weight * (models[key][name] - base) for key, weight in zip("ab", WEIGHTS, strict=False)]
        choices = np.stack([base + i * vectors[0] + j * vectors[1] for i in (0, 1) for j in (0, 1)])
        nearest = np.abs(choices - values[None]).argmin(0)
        error = max(error, relative_error(values, np.take_along_axis(choices, nearest[None], 0)[0]))
        kept += int((nearest // 2 + nearest % 2).sum())
        total += 2 * values.size
    return error, kept / total


def write_golden(directory: Path, versions: Mapping[str, str]) -> None:
    """Tiny problems and the peers' results, for a test that needs no peer."""
    problems = [dict(np.load(directory / f"tiny_{p}.npz")) for p in range(len(TINY))]
    rows = []
    for r, row in enumerate(ROWS):
        p = next(p for p, problem in enumerate(TINY) if row.takes(problem))
        if row.bounded:
            theirs = np.load(directory / f"tiny_{p}_{r}.npz")
            mask = {"mask": theirs["mask"].astype(int).tolist()} if "mask" in theirs else {}
            ours = cut(row.ours, TINY[p].count)
            rows.append(
                {
                    "peer": row.peer,
                    "function": row.function,
                    "theirs": cut(row.theirs, TINY[p].count),
                    "method": row.method,
                    "ours": ours,
                    "match_l1": row.match_l1,
                    "problem": p,
                    "merged": as_text(theirs["merged"]),
                    **mask,
                }
            )
    golden = {
        "command": "python -m experiments.benchmarks.agreement --golden",
        "versions": versions,
        "problems": [{name: as_text(x) for name, x in problem.items()} for problem in problems],
        "rows": rows,
    }
    GOLDEN.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(golden, separators=(",", ":")).replace('{"peer"', '\n{"peer"').replace('"rows"', '\n"rows"')
    GOLDEN.write_text(lines + "\n")


def as_text(x: np.ndarray) -> Any:
    """Nested lists of the shortest numbers that round to the same float32."""
    return [as_text(row) for row in x] if x.ndim else float(str(x))


# The environment, the report.


def make_environment(directory: Path) -> Path:
    """The python of the peers' environment; it is made where there is none."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *REQUIREMENTS], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
    return python


def compare(peers: Path, golden: bool) -> dict[str, Any]:
    """Write the problems, run the peers on them, run ours; optionally the goldens."""
    import jax

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for part, problems in (("problems", PROBLEMS), ("tiny", TINY)):
            for p, problem in enumerate(problems):
                np.savez(directory / f"{part}_{p}.npz", **problem.draw(SEED + p))
        write_checkpoints(directory)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        command = [make_environment(peers), "-m", "experiments.benchmarks.agreement_peers", name]
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        versions = json.loads((directory / "versions.json").read_text())
        rows = [compare_row(row, r, directory) for r, row in enumerate(ROWS)]
        if golden:
            write_golden(directory, versions)
        yamls = compare_yamls(directory)
    return {
        "command": "python -m experiments.benchmarks.agreement",
        "versions": {**versions, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "problems": [problem.name for problem in PROBLEMS],
        "rows": rows,
        "yamls": yamls,
    }


def render(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        "# Agreement with public implementations",
        "",
        f"    {report['command']}",
        "",
        f"{versions}; {report['device']}, float32. Largest relative Frobenius error over random tensors (random methods"
        " on mergekit's mask), of the merged weights and of their change from the base; bound "
        f"{BOUND:.0e}. Problems: {'; '.join(report['problems'])}.",
        "",
        "| peer | its method | its settings | ours | our settings | error | of the change | within | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        change = "" if row["error_of_change"] is None else f"{row['error_of_change']:.1e}"
        within = "by definition not" if row["bound"] is None else "yes" if row["error"] <= row["bound"] else "NO"
        cells = [row["peer"], row["function"], show(row["theirs"]), row["method"], show(row["ours"])]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.1e}", change, within, row["note"]]) + " |")
    lines += [
        "",
        "The same mergekit YAML by `mergekit` and by `rgsp merge`, a toy Llama of "
        f"{len(TENSORS)} tensors: largest error over the tensors. DARE draws anew in each, so that every merged entry"
        " is compared with the nearest of the sums that a mask can give.",
        "",
        "| merge_method | parameters | error | within | kept |",
        "|---|---|---|---|---|",
    ]
    for row in report["yamls"]:
        kept = "; ".join(f"{side} {share:.3f}" for side, share in row.get("kept", {}).items())
        within = "yes" if row["error"] <= row["bound"] else "NO"
        lines.append(f"| {row['method']} | {show(row['parameters'])} | {row['error']:.1e} | {within} | {kept} |")
    lines += ["", "Where definitions differ:", "", *(f"- {difference}" for difference in DIFFERENCES)]
    return "\n".join(lines) + "\n"


def show(settings: Mapping[str, Any]) -> str:
    def text(x: Any) -> str:
        return f"{x:g}" if isinstance(x, float) else str(list(x) if isinstance(x, tuple) else x).lower()

    return ", ".join(f"{name} {text(x)}" for name, x in settings.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Our merge methods beside mergekit's and fusion_bench's.")
    parser.add_argument("--peers", type=Path, help="the peers' virtual environment; made there where there is none")
    parser.add_argument("--check", action="store_true", help="exit 1 where an error is past its bound")
    parser.add_argument("--golden", action="store_true", help="also write tests/merging/golden/agreement.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of agreement.json and agreement.md")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        peers = arguments.peers or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = compare(peers, arguments.golden)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "agreement.json").write_text(json.dumps(report, indent=1) + "\n")
    text = render(report)
    (arguments.out / "agreement.md").write_text(text)
    print(text)
    judged = [row for row in (*report["rows"], *report["yamls"]) if row["bound"] is not None]
    missed = any(not row["error"] <= row["bound"] for row in judged)
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
