"""Our merge methods beside mergekit's and fusion_bench's own code, on the same tensors in float32.

    python -m experiments.benchmarks.agreement                # makes the peers' environment, compares, removes it
    python -m experiments.benchmarks.agreement --peers VENV   # keeps it in VENV, and uses the one that is there
    python -m experiments.benchmarks.agreement --check        # exit 1 where an error is past its bound
    python -m experiments.benchmarks.agreement --golden       # also writes the goldens of tests/merging

Two cores, a minute and a half beside the installation (3 GB, some minutes). What is installed for the peers is in
`REQUIREMENTS` and `WITHOUT_DEPENDENCIES`; fusion_bench comes without what it declares, since its kernels need little of
it. The peers' kernels run in that environment alone, in a process of their own that reads the tensors and the settings
of `ROWS` and writes its results; then ours run here.

An error is Frobenius, relative: of the merged weights, and of their change from the base where there is one. Random
methods are compared on the mask that mergekit drew: our own draw is replaced by it, nothing else. The last part merges
toy Llama checkpoints from mergekit YAMLs with mergekit itself and with `rgsp merge`'s pipeline.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

REQUIREMENTS = (
    "torch==2.13.0",
    "mergekit==0.1.5",
    *("hydra-core", "lightning", "bidict", "rich", "scipy", "joblib", "pillow", "h5py"),  # of fusion_bench, on import
)
WITHOUT_DEPENDENCIES = ("fusion-bench==0.2.33",)
RECORDED = ("mergekit", "fusion-bench", "torch", "transformers", "numpy")

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
GOLDEN = ROOT / "tests" / "merging" / "golden" / "agreement.json"
BOUND = 1e-5
SEED = 5


@dataclass(frozen=True)
class Problem:
    """K random models around a base; a single row is handed to the peers as a vector."""

    m: int
    n: int
    count: int
    spread: float
    """Standard deviation of the task vectors' entries where the base's is 1."""

    @property
    def name(self) -> str:
        return f"{self.count} models {self.m}x{self.n}, spread {self.spread:g}"

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """float32 base, models and input covariances; task vectors share a direction, so that signs agree and clash."""
        rng = np.random.default_rng(seed)
        base, common = rng.normal(size=(2, self.m, self.n))
        own = rng.normal(size=(self.count, self.m, self.n))
        rows = rng.normal(size=(self.count, 4 * self.n, self.n)) if self.n <= 200 else np.zeros((self.count, 1, 1))
        arrays = {
            "base": base,
            "stack": base + self.spread * (own + 0.5 * common),
            "covariances": np.einsum("kin,kim->knm", rows, rows) / rows.shape[1],
        }
        return {name: x.astype(np.float32) for name, x in arrays.items()}


PROBLEMS = (
    Problem(64, 48, 2, 0.3),
    Problem(128, 32, 2, 0.01),
    Problem(37, 120, 3, 0.3),
    Problem(96, 64, 4, 0.05),
    Problem(1, 257, 4, 0.3),
)
TINY = (Problem(4, 6, 3, 0.3), Problem(4, 6, 2, 0.3))
"""Of the goldens: the second is for methods that take two models."""


@dataclass(frozen=True)
class Row:
    """One method as a peer runs it and as we do; tuples among the settings are cut to the number of models."""

    peer: str
    function: str
    theirs: Mapping[str, Any]
    method: str
    ours: Mapping[str, Any]
    note: str = ""
    counts: tuple[int, ...] = (2, 3, 4)
    vectors: bool = True
    bounded: bool = True
    """False where the definitions differ, so that the difference is recorded and not judged."""
    match_l1: bool = False
    """Give every task vector the factor by which mergekit restored its L1 norm."""
    paper_rescale: bool = False
    """Divide what mergekit keeps by its probability, in place of its own rescaling."""

    def takes(self, problem: Problem) -> bool:
        return problem.count in self.counts and (self.vectors or problem.m > 1)


WEIGHTS = (1.0, 0.4, 1.7, 0.8)
GIVEN = {"weight": WEIGHTS, "lambda": 0.7}
OURS_GIVEN = {"coefficients": WEIGHTS, "scale": 0.7}


def mergekit_row(function: str, theirs: Mapping[str, Any], method: str, ours: Mapping[str, Any], **more: Any) -> Row:
    return Row("mergekit", function, theirs, method, ours, **more)


def fusion_bench_row(function: str, method: str, ours: Mapping[str, Any], **more: Any) -> Row:
    return Row("fusion_bench", function, more.pop("theirs", {}), method, ours, vectors=False, **more)


DROPPED, KEPT = 0.6, 0.4  # a drop rate is one minus mergekit's density
UNSCALED = {"coefficients": WEIGHTS, "scale": 0.7 * KEPT, "drop_rate": DROPPED}
"""Our division by 1 - p undone by the scale, for mergekit's `rescale: false`."""
DELLA = {"drop_rate": 0.5, "window": 0.4}

ROWS = (
    mergekit_row("linear", {"weight": WEIGHTS}, "average", {"coefficients": WEIGHTS}),
    mergekit_row("linear", {"weight": (1.0,) * 4}, "average", {}),
    mergekit_row("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, counts=(2,), note="both regimes of the 0.9995 threshold"),
    mergekit_row("karcher", {}, "karcher", {}, note="max_iter is iterations; mergekit has no weights"),
    mergekit_row("task_arithmetic", GIVEN, "task_arithmetic", OURS_GIVEN, note="lambda is scale"),
    mergekit_row(
        "task_arithmetic",
        {"weight": (1.0,) * 4, "normalize": True},
        "average",
        {},
        note="normalize: true divides by the sum of the weights",
    ),
    mergekit_row("ties", {**GIVEN, "density": 0.4}, "ties", {**OURS_GIVEN, "density": 0.4}),
    mergekit_row(
        "ties",
        {**GIVEN, "density": 0.4, "normalize": False},
        "ties",
        {**OURS_GIVEN, "density": 0.4, "normalize": False},
    ),
    mergekit_row("ties", GIVEN, "ties", {**OURS_GIVEN, "density": 1.0}, note="mergekit's default density is 1"),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT, "rescale": False},
        "dare",
        UNSCALED,
        note="drop_rate = 1 - density; rescale: false is our scale times density",
    ),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT},
        "dare",
        {**OURS_GIVEN, "drop_rate": DROPPED},
        match_l1=True,
        note="rescale: true restores the L1 norm: the same with that factor over 1 / density in the coefficients",
    ),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT},
        "dare",
        {**OURS_GIVEN, "drop_rate": DROPPED},
        bounded=False,
        note="differs: ours divides by the density, as the paper; mergekit restores the drawn tensor's L1 norm",
    ),
    mergekit_row(
        "dare_ties",
        {**GIVEN, "density": KEPT, "rescale": False, "normalize": True},
        "dare_ties",
        UNSCALED,
    ),
    mergekit_row(
        "dare_ties",
        {**GIVEN, "density": KEPT},
        "dare_ties",
        {**OURS_GIVEN, "drop_rate": DROPPED, "normalize": False},
        match_l1=True,
        note="as dare_linear; normalize is false by default there",
    ),
    mergekit_row(
        "della",
        {**GIVEN, "density": 0.5, "epsilon": 0.2, "rescale": False},
        "della",
        {**OURS_GIVEN, **DELLA},
        paper_rescale=True,
        note="window = 2 epsilon; mergekit's mask and merge with every kept entry divided by mergekit's probability",
    ),
    mergekit_row(
        "della",
        {**GIVEN, "density": 0.5, "epsilon": 0.2},
        "della",
        {**OURS_GIVEN, **DELLA},
        bounded=False,
        note="differs: mergekit restores the L1 norm with one factor, which favours large entries; ours is the paper's",
    ),
    mergekit_row(
        "breadcrumbs",
        {**GIVEN, "density": 0.7, "gamma": 0.05},
        "breadcrumbs",
        {**OURS_GIVEN, "density": 0.7, "gamma": 0.05},
    ),
    mergekit_row("model_stock", {}, "model_stock", {}),
    fusion_bench_row("tsv_m", "tsv_m", {}),
    fusion_bench_row("iso_c", "iso_c", {}),
    fusion_bench_row("iso_cts", "iso_cts", {"common_share": 0.8}, theirs={"common_space_fraction": 0.8}),
    fusion_bench_row(
        "regmean", "regmean", {"off_diagonal": 0.9}, theirs={"reduce_non_diagonal_ratio": 0.9}, note="inputs given"
    ),
    fusion_bench_row("regmean", "regmean", {"off_diagonal": 1.0}, theirs={"reduce_non_diagonal_ratio": 1.0}),
    fusion_bench_row("wudi", "wudi", {}, note="300 steps of Adam at 1e-5 from the sum of the task vectors"),
)


def cut(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: list(x[:count]) if isinstance(x, tuple) else x for name, x in settings.items()}


# The peers' side: runs in their environment, without jax or rgsp_jax.


@dataclass
class Draws:
    """Every mask that torch.bernoulli draws, in order."""

    divide: bool
    masks: list[np.ndarray] = field(default_factory=list)

    def bernoulli(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def draw(probabilities: Any, *args: Any, **kwargs: Any) -> Any:
            mask = original(probabilities, *args, **kwargs)
            self.masks.append(mask.numpy().astype(bool))
            return mask / probabilities if self.divide else mask

        return draw


def run_mergekit(row: Row, problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mergekit's registered method on one tensor group; the masks it drew."""
    import torch
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import TensorGroup

    method = registry.get(row.function)
    base, stack = (torch.from_numpy(arrays[name]) for name in ("base", "stack"))
    if problem.m == 1:
        base, stack = base[0], stack[:, 0]
    needs_base = row.function not in ("linear", "slerp", "karcher")
    tensors = [base, *stack] if needs_base else [*stack]
    group = TensorGroup.from_tensors(tensors, base_index=0 if needs_base or row.function == "slerp" else None)
    draws = Draws(row.paper_rescale)
    torch.manual_seed(SEED)
    with mock.patch("torch.bernoulli", draws.bernoulli(torch.bernoulli)):
        (merged,) = method([group], parameters=cut(row.theirs, problem.count))
    shape = (problem.count, problem.m, problem.n)
    masks = {"mask": np.stack(draws.masks).reshape(shape)} if draws.masks else {}
    return {"merged": merged.numpy().reshape(problem.m, problem.n), **masks}


def run_fusion_bench(row: Row, problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """fusion_bench's function on one weight."""
    import torch
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.wudi.wudi import wudi_merging

    base, stack, covariances = (torch.from_numpy(arrays[name]) for name in ("base", "stack", "covariances"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if row.function == "regmean":
            weights = [{"layer": x} for x in covariances]
            merged = merging_with_regmean_weights({"layer.weight": list(stack)}, weights, **row.theirs)["layer.weight"]
        else:
            functions = {"tsv_m": compute_and_sum_svd_mem_reduction, "iso_c": iso_c, "iso_cts": iso_cts}
            function = {**functions, "wudi": wudi_merging}[row.function]
            vectors = [{"layer.weight": x} for x in stack - base]
            merged = base + function(vectors, accelerator="cpu", **row.theirs)["layer.weight"].detach()
    return {"merged": merged.numpy()}


RUN = {"mergekit": run_mergekit, "fusion_bench": run_fusion_bench}


def write_peers(directory: Path) -> None:
    """Every row on every problem of a directory, and the merges of its YAMLs; versions."""
    from importlib.metadata import version

    import torch

    torch.set_num_threads(2)
    for part, problems in (("problems", PROBLEMS), ("tiny", TINY)):
        for p, problem in enumerate(problems):
            arrays = dict(np.load(directory / f"{part}_{p}.npz"))
            for r, row in enumerate(ROWS):
                if row.takes(problem):
                    np.savez(directory / f"{part}_{p}_{r}.npz", **RUN[row.peer](row, problem, arrays))
    merge_yamls(directory)
    (directory / "versions.json").write_text(json.dumps({name: version(name) for name in RECORDED}))


def merge_yamls(directory: Path) -> None:
    """`mergekit-yaml` for every YAML, in this process."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(copy_tokenizer=False, random_seed=SEED, quiet=True)
    for path in sorted(directory.glob("*.yaml")):
        run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(path.with_suffix("")), options
        )


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


LAYER = {
    **{f"self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")},
    "mlp.down_proj.weight": (16, 24),
    **{f"{name}_layernorm.weight": (16,) for name in ("input", "post_attention")},
}
TENSORS = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
YAMLS: Mapping[str, Mapping[str, Any]] = {
    "linear": {},
    "slerp": {"t": [0.2, 0.9]},
    "karcher": {"max_iter": 10},
    "task_arithmetic": {"lambda": 0.7},
    "ties": {"density": 0.4, "lambda": 0.7},
    "dare_linear": {"density": 0.4, "rescale": False},
    "breadcrumbs": {"density": 0.7, "gamma": 0.05},
    "model_stock": {},
}
"""merge_method and its common parameters; every model but the base has a weight, where there are weights."""


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
    for method, parameters in YAMLS.items():
        weighed = method not in ("slerp", "karcher", "model_stock")
        models = [
            {"model": str(directory / name), **({"parameters": {"weight": weight}} if weighed else {})}
            for name, weight in zip("ab", WEIGHTS, strict=False)
        ]
        base_model = {"slerp": "a", "linear": None, "karcher": None}.get(method, "base")
        fields = {"merge_method": method, "models": models, "parameters": dict(parameters), "dtype": "float32"}
        if base_model:
            fields["base_model"] = str(directory / base_model)
        (directory / f"{method}.yaml").write_text(yaml.safe_dump(fields))


def compare_yamls(directory: Path) -> list[dict[str, Any]]:
    """The same YAML by mergekit and by our pipeline: the largest error over the tensors."""
    from rgsp_jax.checkpoint import open_checkpoint
    from rgsp_jax.pipeline import merge_checkpoints, parse_config, read_config_file

    def read(path: Path) -> dict[str, np.ndarray]:
        with open_checkpoint(str(path)) as checkpoint:
            return {name: checkpoint.read(name) for name in TENSORS}

    models = {name: read(directory / name) for name in ("base", "a", "b")}
    rows = []
    for method, parameters in YAMLS.items():
        path = directory / f"{method}.yaml"
        out = merge_checkpoints(parse_config(read_config_file(path), str(path)), directory / f"ours_{method}").out
        ours, theirs = read(out), read(directory / method)
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
        command = [make_environment(peers), __file__, "--write-peers", name]
        subprocess.run(command, check=True, env=environment)
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
    return "\n".join(lines) + "\n"


def show(settings: Mapping[str, Any]) -> str:
    def text(x: Any) -> str:
        return str(list(x) if isinstance(x, tuple) else x).lower()

    return ", ".join(f"{name} {text(x)}" for name, x in settings.items())


def main() -> int:
    parser = argparse.ArgumentParser(description="Our merge methods beside mergekit's and fusion_bench's.")
    parser.add_argument("--peers", type=Path, help="the peers' virtual environment; made there where there is none")
    parser.add_argument("--check", action="store_true", help="exit 1 where an error is past its bound")
    parser.add_argument("--golden", action="store_true", help="also write tests/merging/golden/agreement.json")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of agreement.json and agreement.md")
    parser.add_argument("--write-peers", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write_peers:
        write_peers(arguments.write_peers)
        return 0
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
