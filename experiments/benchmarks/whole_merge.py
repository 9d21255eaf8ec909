"""Whole merges of a decoder of 0.39 billion parameters: time and peak memory, beside a copy and mergekit.

    python -m experiments.benchmarks.whole_merge --work PLACE                 # writes results/whole_merge.json and .md
    python -m experiments.benchmarks.whole_merge --work PLACE --peers VENV    # with the peers' environment in VENV
    python -m experiments.benchmarks.whole_merge --work PLACE --check         # exit 1 where a target is missed

PLACE takes 4 GB: three siblings of random weights (`decoders.py`) and one output at a time; the models stay there for
the next run. Every contender is a command of its own, process start included, and contenders take turns, round by
round, so that a machine busy with other work slows all of them: ratios are medians of the ratios within a round. The
first round is not counted but told apart: there the persistent compilation cache is empty. "start" is `rgsp merge
--plan`, which reads no weights. The copy is `cat A B > /dev/null; cp A OUT`, with files in the page cache.

Methods that decompose run in fewer rounds. How much a full SVD of every matrix would take (`jnp.linalg.svd` in place of
the truncated one) is measured in this process on the matrices of one layer, in turns with the same kernels as they are.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from experiments.benchmarks.decoders import Decoder, draw_family, make_decoders_apart
from experiments.benchmarks.peers import find_versions, make_environment, own_environment
from experiments.benchmarks.processes import Measured, measure
from experiments.benchmarks.svd import describe_machine

RESULTS = Path(__file__).parent / "results" / "whole_merge.json"
PEERS = ("torch==2.13.0", "mergekit==0.1.5")
RANK = 64
COPY = "copy"
START = "start"
OURS = (sys.executable, "-c", "from rgsp_jax.cli import main; main()")
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Contender:
    """A command that merges into OUT, or does what a merge is compared with."""

    name: str
    command: tuple[Any, ...]
    costly: bool = False
    """Runs in fewer rounds."""


@dataclass(frozen=True)
class Target:
    """A bound on a number of the report."""

    text: str
    find: Callable[[Mapping[str, Any]], float]
    least: float | None = None
    most: float | None = None

    def judge(self, report: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found beside the bound; None where it was not measured."""
        try:
            value = self.find(report)
        except KeyError:
            return None
        met = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        bound = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return {"target": self.text, "bound": bound, "found": round(value, 3), "met": met}


def read_median(name: str, what: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda report: report["contenders"][name][what]


def read_ratio(above: str, below: str, what: str = "wall") -> Callable[[Mapping[str, Any]], float]:
    return lambda report: report["ratios"][f"{above} / {below}"][what]


def read_full_svd(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda report: report["full_svd"][name]["ratio"]


TARGETS = (
    Target("average without its start, over the copy", read_ratio("average - start", COPY), most=3),
    Target("mergekit's linear over average", read_ratio("mergekit linear", "average"), least=4),
    Target("mergekit's slerp over slerp", read_ratio("mergekit slerp", "slerp"), least=4),
    Target("peak memory of average over mergekit's linear", read_ratio("average", "mergekit linear", "peak"), most=0.5),
    Target("peak memory of slerp over mergekit's slerp", read_ratio("slerp", "mergekit slerp", "peak"), most=0.5),
    *(
        Target(f"seconds of {name}", read_median(name, "wall"), most=60)
        for name in ("relative", "relative K=3", "rgsp", "rgsp_seed")
    ),
    *(
        Target(f"{name} with a full SVD over as it is", read_full_svd(name), least=5)
        for name in ("rgsp", "relative K=3")
    ),
)
RATIOS = (
    ("average - start", COPY),
    ("average", COPY),
    ("mergekit linear", "average"),
    ("mergekit slerp", "slerp"),
    ("average", "mergekit linear"),
    ("slerp", "mergekit slerp"),
)


# Contenders


def write_yamls(place: Path, models: Sequence[Path]) -> dict[str, Path]:
    """mergekit's configurations by name."""
    import yaml

    linear = [{"model": str(m), "parameters": {"weight": 0.5}} for m in models]
    fields: dict[str, dict[str, Any]] = {
        "linear": {"merge_method": "linear", "models": linear},
        "slerp": {
            "merge_method": "slerp",
            "base_model": str(models[0]),
            "models": [{"model": str(m)} for m in models],
            "parameters": {"t": 0.5},
        },
    }
    paths = {}
    for name, own in fields.items():
        paths[name] = place / f"{name}.yaml"
        paths[name].write_text(yaml.safe_dump({**own, "dtype": "bfloat16"}))
    return paths


def list_contenders(place: Path, models: Sequence[Path], peers: Path | None) -> list[Contender]:
    """In the order of a round; the first two models are merged where not said otherwise."""
    out = place / "out"
    first, second = (model / "model.safetensors" for model in models[:2])
    copy = f"cat {first} {second} > /dev/null; mkdir {out}; cp {first} {out}"

    def ours(method: str, count: int = 2) -> tuple[Any, ...]:
        rank = () if method in ("average", "slerp") else ("--rank", RANK)
        return (*OURS, "merge", *models[:count], "--method", method, *rank, "--out", out)

    found = [
        Contender(COPY, ("sh", "-c", copy)),
        Contender(START, (*OURS, "merge", *models[:2], "--method", "average", "--plan")),
        Contender("average", ours("average")),
        Contender("slerp", ours("slerp")),
    ]
    if peers is not None:
        yamls = write_yamls(place, models[:2])
        mergekit = peers.parent / "mergekit-yaml"
        found += [Contender(f"mergekit {name}", (mergekit, path, out)) for name, path in yamls.items()]
    decomposing = (("rgsp", 2), ("rgsp_seed", 2), ("relative", 2), ("relative", 3))
    found += [Contender(f"{m}{' K=3' * (k > 2)}", ours(m, k), costly=True) for m, k in decomposing]
    threads = f"OPENBLAS_NUM_THREADS={len(os.sched_getaffinity(0))}"
    return [*found, Contender("rgsp, a BLAS thread for each core", ("env", threads, *ours("rgsp")), costly=True)]


# The full SVD


def compile_layer(decoder: Decoder, method: str, count: int) -> list[Callable[[], Any]]:
    """The kernels of a merge on the matrices of one layer, compiled, each with its models."""
    import jax

    from rgsp_jax.pipeline.kernels import NOTHING, compile_item, split_static
    from rgsp_jax.registry import methods

    static, traced = split_static(methods[method], {"rank": RANK})
    kernel = compile_item("matrices", method, static, np.dtype(ml_dtypes.bfloat16), False)
    shapes = [x for name, x in decoder.shapes.items() if ".layers.0." in name and len(x) == 2]
    calls: list[Callable[[], Any]] = []
    for shape in dict.fromkeys(shapes):
        slots = shapes.count(shape)
        models = zip(*(draw_family(shape, number, count) for number in range(slots)), strict=True)
        arguments = (
            tuple(jax.device_put(np.stack(own)) for own in models),
            traced,
            np.zeros((slots, 2), np.uint32),
            np.uint32(0),
            NOTHING,
        )
        program = kernel.lower(*arguments).compile()
        calls.append(partial(program, *arguments))
    return calls


def compare_full_svd(decoder: Decoder, rounds: int) -> dict[str, Any]:
    """One layer merged with truncated and with full SVDs, in turns and in this process: seconds, ratios."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as the command has it; read when jax loads LAPACK
    import jax

    from rgsp_jax.linalg import svd_algorithms
    from rgsp_jax.pipeline.kernels import compile_item

    choose = svd_algorithms.choose_algorithms
    found: dict[str, Any] = {}
    for method, count in (("rgsp", 2), ("relative", 3)):
        programs: dict[str, list[Callable[[], Any]]] = {}
        for name in ("truncated", "full"):
            if name == "full":
                svd_algorithms.choose_algorithms = lambda problem: {"cpu": "full", "default": "full"}
            jax.clear_caches()
            compile_item.cache_clear()
            try:
                programs[name] = compile_layer(decoder, method, count)
            finally:
                svd_algorithms.choose_algorithms = choose
        times: dict[str, list[float]] = {name: [] for name in programs}
        for number in range(rounds + 1):
            for name, calls in programs.items():
                start = time.perf_counter()
                for call in calls:
                    jax.block_until_ready(call())
                if number:
                    times[name].append(time.perf_counter() - start)
        ratio = statistics.median(f / t for f, t in zip(times["full"], times["truncated"], strict=True))
        seconds = {name: round(statistics.median(own), 3) for name, own in times.items()}
        found[f"{method}{' K=3' * (count > 2)}"] = {"seconds": seconds, "ratio": round(ratio, 3)}
    return found


# Runs


def run_rounds(
    contenders: Sequence[Contender], place: Path, cache: Path, rounds: int, costly_rounds: int, deadline: float = 0
) -> dict[str, list[Measured]]:
    """Every contender's runs, that of the round before the first one first."""
    environment = own_environment() | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    found: dict[str, list[Measured]] = {one.name: [] for one in contenders}
    for number in range(rounds + 1):
        for one in contenders:
            if one.costly and number > costly_rounds:
                continue
            for left in ("out", "out.incomplete"):
                shutil.rmtree(place / left, ignore_errors=True)
            known = {k: v for k, v in environment.items() if not one.name.startswith("mergekit") or k != "PYTHONPATH"}
            run = measure(one.command, known, place / "log")
            found[one.name].append(run)
            print(f"round {number}  {one.name:28}{describe(run)}", flush=True)
    shutil.rmtree(place / "out", ignore_errors=True)
    return found


def describe(run: Measured) -> str:
    return f"{run.wall:8.2f} s wall {run.cpu:8.2f} s cpu {run.peak / 1e6:8.0f} MB"


def summarise(runs: Sequence[Measured]) -> dict[str, Any]:
    """Medians behind the first run."""
    counted = runs[1:] or runs
    return {
        "wall": round(statistics.median(run.wall for run in counted), 3),
        "cpu": round(statistics.median(run.cpu for run in counted), 3),
        "peak": int(statistics.median(run.peak for run in counted)),
        "first_wall": round(runs[0].wall, 3),
        "rounds": len(runs) - 1,
        "runs": [asdict(run) for run in runs],
    }


def compare(above: Sequence[Measured], below: Sequence[Measured], less: Sequence[Measured] = ()) -> dict[str, float]:
    """Medians of the ratios within a round; of `above` less what `less` took."""
    rounds = list(zip(above, below, strict=False))[1:]
    ratios: dict[str, float] = {}
    for what in ("wall", "cpu", "peak"):
        off = [0.0] * len(rounds) if not less or what == "peak" else [getattr(run, what) for run in less[1:]]
        own = [(getattr(a, what) - o) / getattr(b, what) for (a, b), o in zip(rounds, off, strict=False)]
        ratios[what] = round(statistics.median(own), 3)
    return ratios


def compare_all(runs: Mapping[str, Sequence[Measured]]) -> dict[str, dict[str, float]]:
    found = {}
    for above, below in RATIOS:
        name, _, less = above.partition(" - ")
        if name in runs and below in runs:
            found[f"{above} / {below}"] = compare(runs[name], runs[below], runs.get(less, ()))
    return found


# Report


def describe_place(place: Path) -> dict[str, Any]:
    """Facts of the machine beside the processor."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(place).free
    return {"memory": memory, "disk_free": free, "load": [round(x, 1) for x in os.getloadavg()]}


def render(report: Mapping[str, Any]) -> str:
    machine, decoder = report["machine"], report["decoder"]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    lines = [
        "# Whole merges",
        "",
        f"    {report['command']}",
        "",
        f"{decoder['parameters'] / 1e9:.2f} billion parameters in bfloat16 ({decoder['layers']} layers of width"
        f" {decoder['width']}), {decoder['nbytes'] / 1e9:.2f} GB a model. {machine['processor']},"
        f" {machine['cores_used']} cores, load {machine['load'][0]} at the end (what others on the machine take is in"
        f" it; seconds are to be read beside the copy's); {versions}. Medians over the rounds behind the first,"
        " which compiles; where there is none, the first.",
        "",
        "| what | rounds | wall s | CPU s | peak MB | first wall s |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in report["contenders"].items():
        cells = (f"{row['wall']:.2f}", f"{row['cpu']:.2f}", f"{row['peak'] / 1e6:.0f}", f"{row['first_wall']:.2f}")
        lines.append(f"| {name} | {row['rounds']} | " + " | ".join(cells) + " |")
    lines += ["", "| ratio (medians within rounds) | wall | CPU | peak |", "|---|---|---|---|"]
    for name, row in report["ratios"].items():
        lines.append(f"| {name} | {row['wall']:.2f} | {row['cpu']:.2f} | {row['peak']:.2f} |")
    for name, row in report.get("full_svd", {}).items():
        seconds = row["seconds"]
        text = f"{seconds['full']:.2f} s over {seconds['truncated']:.2f} s"
        lines.append(f"| {name}: a layer with full SVDs / as it is ({text}) | {row['ratio']:.2f} | | |")
    if note := report.get("note"):
        lines += ["", note]
    lines += ["", "| target | bound | found | met |", "|---|---|---|---|"]
    for row in report["targets"]:
        lines.append(f"| {row['target']} | {row['bound']} | {row['found']:g} | {'yes' if row['met'] else 'NO'} |")
    return "\n".join(lines) + "\n"


def write_headline(report: Mapping[str, Any]) -> str:
    """The result in a sentence."""
    rows, ratios = report["contenders"], report["ratios"]
    text = f"average of two models of 0.77 GB: {ratios['average - start / copy']['wall']:.1f} copies behind its start"
    for own, theirs in (("average", "mergekit linear"), ("slerp", "mergekit slerp")):
        if (ratio := ratios.get(f"{theirs} / {own}")) is not None:
            memory = ratios[f"{own} / {theirs}"]["peak"]
            text += f"; {own} {ratio['wall']:.1f}x faster than {theirs} at {memory:.2f} of its peak memory"
    slow = [f"{n} {rows[n]['cpu']:.0f}" for n in ("rgsp", "rgsp_seed", "relative", "relative K=3") if n in rows]
    return f"{text}; at rank {RANK}, seconds of processor time: {', '.join(slow)}."


def build_report(
    arguments: argparse.Namespace, runs: Mapping[str, Sequence[Measured]], full: Mapping[str, Any] | None, peers: Any
) -> dict[str, Any]:
    decoder = Decoder(layers=arguments.layers)
    versions = {} if peers is None else find_versions(peers, ["mergekit", "torch"])
    machine = describe_machine(len(os.sched_getaffinity(0)))
    report: dict[str, Any] = {
        "command": "python -m experiments.benchmarks.whole_merge --work PLACE",
        "machine": machine | describe_place(arguments.work),
        "versions": {"jax": machine["jax"], **versions},
        "decoder": asdict(decoder) | {"parameters": decoder.parameters, "nbytes": decoder.nbytes},
        "rank": RANK,
        "contenders": {name: summarise(own) for name, own in runs.items()},
        "ratios": compare_all(runs),
    }
    if full is not None:
        report["full_svd"] = full
    report["targets"] = [row for target in TARGETS if (row := target.judge(report)) is not None]
    report["headline"] = write_headline(report)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="Whole merges beside a copy and mergekit.")
    parser.add_argument("--work", type=Path, required=True, help="folder for models and outputs, 4 GB")
    parser.add_argument("--peers", type=Path, help="the peers' virtual environment; made there where there is none")
    parser.add_argument("--no-peers", action="store_true", help="without mergekit")
    parser.add_argument("--only", action="append", help="only these contenders, and those of the copy; repeatable")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--costly-rounds", type=int, default=2, help="of methods that decompose")
    parser.add_argument("--no-full-svd", action="store_true", help="without the full SVD's layer")
    parser.add_argument("--check", action="store_true", help="exit 1 where a target is missed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file written, a table beside it")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    models = make_decoders_apart(arguments.work, Decoder(layers=arguments.layers), 3)
    with ExitStack() as stack:
        peers = None
        if not arguments.no_peers:
            own = arguments.peers or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            peers = make_environment(own, PEERS)
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contenders = list_contenders(arguments.work, models, peers)
        if arguments.only:
            kept = {COPY, START, *arguments.only}
            contenders = [one for one in contenders if one.name in kept]
        runs = run_rounds(contenders, arguments.work, cache, arguments.rounds, arguments.costly_rounds)
        full = None if arguments.no_full_svd else compare_full_svd(Decoder(), arguments.rounds)
        report = build_report(arguments, runs, full, peers)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    text = render(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)
    missed = [row["target"] for row in report["targets"] if not row["met"]]
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
