"""One merge on 1, 2, 4 and 8 simulated devices and by 1, 2 and 4 processes: who does what, and what was predicted.

    python -m experiments.benchmarks.scaling                    # minutes; writes results/scaling.json and .md
    python -m experiments.benchmarks.scaling --layers 8 --width 384 --rounds 5

All devices and processes are on this machine and share its cores, so no speed-up is to be expected and none is claimed:
what is measured is how evenly the work is dealt, what is read, what passes between devices (counted in the compiled
program), what dividing costs, and how far the planner's prediction is off. The models are random decoders, siblings.
Workers start once, merge once to compile, then merge in turn, round by round; seconds are medians over rounds, ratios
medians of the ratios within a round. Rates of the machine are measured in every round, beside the merges.
OpenBLAS, which decompositions on processors call, has one thread in each process: where it has one for each core,
devices and processes that share the cores wait for each other's (`--threads 2` shows it).
"""

import argparse
import json
import math
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks.svd import describe_machine
from rgsp_jax.pipeline.hardware import DeviceKind, Figure, best_rate, measure_host

RESULTS = Path(__file__).parent / "results" / "scaling.json"
DEVICES, PROCESSES, METHODS = (1, 2, 4, 8), (1, 2, 4), ("average", "relative")
MODELS = 3
ANSWER = "answer "
"""Before a worker's line of JSON."""
COLLECTIVE = re.compile(
    r"= (\(?\S.*?) (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)"
    r"(?:-start)?\("
)


# Models


def make_models(place: Path, layers: int, width: int) -> list[str]:
    """Siblings in float32: a random decoder whose matrices' spectra decay, and three departures from it."""
    from rgsp_jax.checkpoint import write_safetensors

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (16 * width, width)}
    for i in range(layers):
        names = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (width, width))
        shapes |= {f"model.layers.{i}.self_attn.{name}.weight": shape for name, shape in names.items()}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": (2 * width, width) for name in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (width, 2 * width)}
        shapes |= {f"model.layers.{i}.input_layernorm.weight": (width,)}
    found = []
    place.mkdir(exist_ok=True)
    for k in range(MODELS):
        tensors = {}
        for number, (name, shape) in enumerate(shapes.items()):
            ancestor, own = np.random.default_rng(number), np.random.default_rng([number, k])
            scale = np.geomspace(1, 0.05, shape[-1], dtype=np.float32) * 0.05
            weights = ancestor.standard_normal(shape, np.float32) + 0.1 * own.standard_normal(shape, np.float32)
            tensors[name] = weights * scale
        directory = place / f"model-{k}"
        directory.mkdir()
        write_safetensors(directory / "model.safetensors", tensors)
        (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
        found.append(str(directory))
    return found


# Workers


class Numbered:
    """A team that merges several times: what it says is told apart by the number of the merge."""

    def __init__(self, team: Any, number: int) -> None:
        self.team, self.number = team, number
        self.index, self.count, self.kept = team.index, team.count, team.kept
        self.check, self.say, self.fail = team.check, team.say, team.fail

    def meet(self, name: str, work: Any, conclude: Any = None, *, long: bool = False) -> Any:
        return self.team.meet(f"{self.number}-{name}", work, conclude, long=long)


def answer(found: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(found), flush=True)


def serve(arguments: argparse.Namespace) -> None:
    """Merge for every line of standard input, as one of several processes where there are several."""
    from rgsp_jax.pipeline.launch import connect_processes

    if arguments.processes > 1:
        where = f"127.0.0.1:{arguments.port}"
        with connect_processes(where, arguments.processes, arguments.process, heartbeat_timeout=100) as team:
            serve_lines(arguments, team)
    else:
        serve_lines(arguments, None)


def serve_lines(arguments: argparse.Namespace, team: Any) -> None:
    from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

    kernels: dict[int, tuple[Callable[[], object], float]] = {}
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        if order["do"] == "rates":
            kernel = kernels.setdefault(order["width"], kernels.get(order["width"]) or build_kernel(order["width"]))
            answer(measure_rates(Path(order["place"]), *kernel))
            continue
        if order["do"] == "collectives":
            answer(count_collectives(**order["settings"]))
            continue
        config = MergeConfig(models=tuple(order["models"]), method=order["method"])
        wall, cpu = time.perf_counter(), time.process_time()
        result = merge_checkpoints(
            config,
            order["out"],
            overview=False,
            devices=arguments.devices,
            processes=None if team is None else Numbered(team, number),
        )
        found: dict[str, Any] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        if team is None or team.index == 0:
            found |= {"bytes_in": result.bytes_in, "work": result.processes}
        answer(found)


class Worker:
    """A process of this script that merges when it is told to."""

    def __init__(
        self, devices: int, processes: int = 1, process: int = 0, port: int = 0, *, cache: Path, threads: int
    ) -> None:
        own = ("--devices", devices, "--processes", processes, "--process", process, "--port", port)
        command = [sys.executable, "-m", "experiments.benchmarks.scaling", "--serve", *map(str, own)]
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": str(threads),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise SystemExit(f"a worker ended with code {self.process.wait()}")

    def leave(self) -> None:
        """End of orders; the worker ends by itself."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self) -> None:
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@dataclass(frozen=True)
class Setting:
    """Devices and processes that merge."""

    devices: int
    processes: int

    @property
    def name(self) -> str:
        return f"{self.devices} devices" if self.processes == 1 else f"{self.processes} processes"

    def start(self, cache: Path, threads: int) -> list[Worker]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return [
            Worker(self.devices, self.processes, i, port, cache=cache, threads=threads) for i in range(self.processes)
        ]


SETTINGS = [Setting(devices, 1) for devices in DEVICES] + [Setting(1, count) for count in PROCESSES[1:]]


def merge_once(team: Sequence[Worker], method: str, models: Sequence[str], place: Path) -> dict[str, Any]:
    """Wall of the slowest, CPU time of all, and what process 0 says of the work."""
    out = place / "merged"
    for worker in team:
        worker.ask({"do": "merge", "method": method, "models": models, "out": str(out)})
    found = [worker.hear() for worker in team]
    shutil.rmtree(out)
    return found[0] | {"wall": max(f["wall"] for f in found), "cpu": sum(f["cpu"] for f in found)}


# What passes between devices


def count_collectives(width: int, method: str) -> dict[str, Any]:
    """(operation -> number, largest in entries) in the compiled programs of layers dealt out and of rows divided."""
    import jax
    from jax.sharding import Mesh

    from rgsp_jax.linalg import ROWS
    from rgsp_jax.pipeline.kernels import LAYERS, NOTHING, compile_divided, compile_item, split_static
    from rgsp_jax.registry import methods

    devices = np.array(jax.devices())
    static, traced = split_static(methods[method], {})
    float32, seed = np.dtype(np.float32), np.uint32(0)
    stack = tuple(jax.ShapeDtypeStruct((len(devices), width, width), float32) for _ in range(MODELS))
    salts = jax.ShapeDtypeStruct((len(devices), 2), np.uint32)
    layers = compile_item("matrices", method, static, float32, False, Mesh(devices, (LAYERS,)))
    found = {"layers": layers.lower(stack, traced, salts, seed, NOTHING).compile().as_text()}
    mesh, shape = Mesh(devices, (ROWS,)), (2 * width, width)
    with jax.set_mesh(mesh):
        matrix = tuple(jax.ShapeDtypeStruct(shape, float32) for _ in range(MODELS))
        salt = jax.ShapeDtypeStruct((2,), np.uint32)
        rows = compile_divided(method, static, float32, False, shape, mesh)
        found["rows"] = rows.lower(matrix, salt, traced, seed, NOTHING).compile().as_text()
    return {name: list_collectives(text) for name, text in found.items()}


def list_collectives(text: str) -> dict[str, dict[str, int]]:
    """Operation -> how often it stands in a compiled program, and the entries of the largest."""
    found: dict[str, dict[str, int]] = {}
    for types, operation in COLLECTIVE.findall(text):
        sizes = [math.prod(int(d) for d in dims.split(",") if d) for dims in re.findall(r"\[([\d,]*)\]", types)]
        own = found.setdefault(operation, {"count": 0, "largest": 0})
        own["count"] += 1
        own["largest"] = max([own["largest"], *sizes])
    return found


# Rates and predictions


def measure_storage(place: Path, size: int = 16_000_000) -> tuple[float, float]:
    """Bytes a second written to a file with what is in memory behind it synced, and read back from the page cache."""
    data, path = np.random.default_rng(0).bytes(size), place / "storage"
    start = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    middle = time.perf_counter()
    path.read_bytes()
    end = time.perf_counter()
    path.unlink()
    return size / (middle - start), size / (end - middle)


def build_kernel(width: int) -> tuple[Callable[[], object], float]:
    """A warm call that merges one matrix by `relative`, and the FLOPs that the planner gives it."""
    import jax

    from rgsp_jax import methods
    from rgsp_jax.checkpoint import TensorSpec
    from rgsp_jax.pipeline import MergeConfig, plan_merge

    rng = np.random.default_rng(0)
    weights = rng.standard_normal((MODELS, width, width)) * np.geomspace(1, 0.05, width)
    stack = jax.numpy.asarray(weights.astype(np.float32))
    kernel = jax.jit(lambda x: methods["relative"](x).merged)
    jax.block_until_ready(kernel(stack))
    name = "model.layers.0.self_attn.q_proj.weight"
    specs = {name: TensorSpec(name, (width, width), np.dtype(np.float32))}
    config = MergeConfig(models=tuple("abc"[:MODELS]), method="relative")
    return lambda: jax.block_until_ready(kernel(stack)), plan_merge(config, [specs] * MODELS).flops


def measure_rates(place: Path, kernel: Callable[[], object], flops: float, calls: int = 10) -> dict[str, float]:
    """What this process does alone, as the planner counts it."""
    kind = measure_host()
    write, read = measure_storage(place)
    rate = best_rate(calls * flops, lambda: [kernel() for _ in range(calls)], rounds=1)
    found = {"matmul": kind.matmul.value, "bandwidth": kind.bandwidth.value, "hash": kind.hash.value}
    return found | {"read": read, "write": write, "share": rate / kind.matmul.value}


def replace_figures(kind: DeviceKind, values: dict[str, float]) -> DeviceKind:
    """A kind with figures that were measured here."""
    source = "python -m experiments.benchmarks.scaling, median over its rounds"
    own = kind.figures
    return replace(kind, **{n: Figure(v, own[n].unit, "measured", source) for n, v in values.items()})  # type: ignore[arg-type]


def predict(setting: Setting, method: str, models: Sequence[str], kind: DeviceKind) -> dict[str, Any]:
    """What the planner says of a merge that has been compiled before."""
    from rgsp_jax.pipeline import MergeConfig, prepare
    from rgsp_jax.pipeline.prediction import Layout, predict_merge

    config = MergeConfig(models=tuple(models), method=method)
    with prepare(config, shared_memory=True) as preparation:
        plan = preparation.plan
        found = predict_merge(
            lambda names: plan if names is None else preparation.plan_part(names),
            replace(kind, compilation=kind.compilation._replace(value=0.0)),
            Layout(setting.processes, setting.devices, 1),
            max_shard_size=config.max_shard_size,
            model_bytes=0,
        )
    kept = ("seconds", "stages", "bottleneck", "padding_share", "imbalance", "by_process", "memory_per_process")
    return {name: found[name] for name in kept}


# The benchmark


def run(arguments: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All settings and methods, round by round."""
    models = make_models(place / "models", arguments.layers, arguments.width)
    tiny = make_models(place / "tiny", 1, 8)
    rates: dict[str, list[float]] = {}
    firsts: dict[str, dict[str, float]] = {}
    teams: dict[Setting, list[Worker]] = {}
    times: dict[tuple[str, Setting], list[dict[str, Any]]] = {(m, s): [] for m in METHODS for s in SETTINGS}
    try:
        for setting in SETTINGS:
            teams[setting] = setting.start(place / "cache", arguments.threads)
            first = {method: round(merge_once(teams[setting], method, models, place)["wall"], 2) for method in METHODS}
            print(f"{setting.name}: first merges {first}", flush=True)
            firsts[setting.name] = first
        (alone,) = teams[SETTINGS[0]]
        order = {"do": "rates", "width": arguments.width, "place": str(place)}
        for number in range(arguments.rounds + 1):
            alone.ask(order)
            found = alone.hear() | {"fixed": merge_once([alone], "average", tiny, place)["wall"]}
            if not number:  # compiled
                continue
            for name, value in found.items():
                rates.setdefault(name, []).append(value)
            for method in METHODS:
                for setting in SETTINGS:
                    times[method, setting].append(merge_once(teams[setting], method, models, place))
            print(f"round {number} of {arguments.rounds}", flush=True)
        largest = teams[SETTINGS[len(DEVICES) - 1]][0]
        collectives = {}
        for method in METHODS:
            largest.ask({"do": "collectives", "settings": {"width": arguments.width, "method": method}})
            collectives[method] = largest.hear()
    finally:
        members = [worker for team in teams.values() for worker in team]
        for worker in members:
            worker.leave()
        for worker in members:
            worker.end()
    kind = replace_figures(measure_host(), {name: statistics.median(values) for name, values in rates.items()})
    rows = [describe(m, s, times, predict(s, m, models, kind)) for m in METHODS for s in SETTINGS]
    off = [row["predicted"]["seconds"] / row["wall"] for row in rows]
    return {
        "headline": f"Merges on 1 to 8 simulated devices and by 1 to 4 processes of one machine: the planner says"
        f" {min(off):.2f} to {max(off):.2f} times the seconds that were seen (median {statistics.median(off):.2f})",
        "command": f"python -m experiments.benchmarks.scaling --layers {arguments.layers} --width {arguments.width}"
        f" --rounds {arguments.rounds} --threads {arguments.threads}",
        "settings": {
            "layers": arguments.layers,
            "width": arguments.width,
            "rounds": arguments.rounds,
            "threads": arguments.threads,
        },
        "machine": describe_machine(os.cpu_count() or 1) | {"load": os.getloadavg()[0]},
        "rates": {name: statistics.median(values) for name, values in rates.items()},
        "rates_of_rounds": rates,
        "first_merges": firsts,
        "collectives": collectives,
        "rows": rows,
    }


def describe(
    method: str, setting: Setting, times: dict[tuple[str, Setting], list[dict[str, Any]]], predicted: dict[str, Any]
) -> dict[str, Any]:
    """One method in one setting: medians, ratios to one device within the round, and the work of each process."""
    own, alone = times[method, setting], times[method, SETTINGS[0]]
    work = own[-1]["work"]

    def ratio(name: str) -> float:
        return round(statistics.median(a[name] / b[name] for a, b in zip(own, alone, strict=True)), 3)

    return {
        "method": method,
        "devices": setting.devices,
        "processes": setting.processes,
        "wall": round(statistics.median(t["wall"] for t in own), 4),
        "cpu": round(statistics.median(t["cpu"] for t in own), 4),
        "wall_ratio": ratio("wall"),
        "cpu_ratio": ratio("cpu"),
        "bytes_read": work["bytes_read"] if work else [own[-1]["bytes_in"]],
        "seconds_by_process": work["seconds"] if work else None,
        "predicted_imbalance": work["predicted_imbalance"] if work else 1.0,
        "measured_imbalance": (
            statistics.median(t["work"]["measured_imbalance"] for t in own) if work else 1.0
        ),
        "predicted": predicted,
    }  # fmt: skip


def write_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    machine, settings = record["machine"], record["settings"]
    lines = [
        "# Scaling on one machine",
        "",
        record["headline"] + ".",
        "",
        f"{machine['processor']}, {machine['cores_used']} cores that all devices and processes share, load"
        f" {machine['load']:.1f} at the end (others worked there too), JAX {machine['jax']}. **No speed-up is to be"
        " expected** from simulated devices, and none is claimed; ratios above 1 are what dividing costs here. Models:"
        f" {MODELS} decoders of {settings['layers']} layers of width {settings['width']}, float32;"
        f" {settings['rounds']} rounds, merges compiled before; OpenBLAS with {settings['threads']} thread(s)"
        " in each process (OPENBLAS_NUM_THREADS).",
        "",
        f"    {record['command']}",
        "",
        "| method | devices | processes | wall s | to 1 | CPU s | to 1 | MB read by each process | matrices and"
        " others by each | busiest over mean: predicted | measured | padding | predicted s | predicted / seen |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        predicted = row["predicted"]
        cells = (
            row["method"], row["devices"], row["processes"], f"{row['wall']:.2f}", f"{row['wall_ratio']:.2f}",
            f"{row['cpu']:.2f}", f"{row['cpu_ratio']:.2f}", ", ".join(f"{b / 1e6:.1f}" for b in row["bytes_read"]),
            ", ".join(str(own["tensors"]) for own in predicted["by_process"]), f"{row['predicted_imbalance']:.2f}",
            f"{row['measured_imbalance']:.2f}", f"{predicted['padding_share']:.0%}", f"{predicted['seconds']:.2f}",
            f"{predicted['seconds'] / row['wall']:.2f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "Collectives in the compiled programs of 8 devices (count, entries of the largest):", ""]
    for method, found in record["collectives"].items():
        for way, operations in found.items():
            said = ", ".join(f"{of['count']} {name} (up to {of['largest']})" for name, of in operations.items())
            lines.append(f"- {method}, {way} divided: {said or 'none'}")
    rates = ", ".join(f"{name} {value:.3g}" for name, value in record["rates"].items())
    lines += [
        "",
        f"Rates of this machine, medians over the rounds (`share` is of `matmul`, `fixed` in seconds): {rates}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Merges on simulated devices and by several processes.")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of OpenBLAS in each process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written, .md beside it")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    for name in ("--devices", "--processes", "--process", "--port"):
        parser.add_argument(name, type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    with tempfile.TemporaryDirectory() as place:
        record = run(arguments, Path(place))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(write_markdown(record))
    print(record["headline"])


if __name__ == "__main__":
    main()
