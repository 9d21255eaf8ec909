"""Hugging Face -> Flax in Orbax -> Hugging Face against a copy of the file, and against Orbax alone.

    python -m experiments.benchmarks.conversion                # 0.99 GB, about two minutes on 2 cores, 6 GB of disk
    python -m experiments.benchmarks.conversion --check        # exit 1 where conversion is slower than the target

The model has the shapes of a 24-layer, 896-wide bf16 decoder (random weights, made here). In every round each
contender runs once, in turn, in a fresh process, so that peak memory is its own; a ratio is the median over rounds of
contender/copy within the round. "copy" is a copy of the directory, flushed to the disk as conversions are; "orbax"
saves arrays that are in memory and in Flax's layout already, which no conversion through Orbax can beat. Seconds are
wall time inside the process once everything is imported; memory is the peak above what it held then.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "conversion.json"
CONTENDERS = ("copy", "orbax", "to_flax", "to_huggingface")
TARGET = 0.5
"""Smallest accepted rate of HF -> Flax -> Orbax, as a share of the copy's."""
WIDTH, INNER, VOCABULARY, HEADS, GROUPS = 896, 4864, 151936, 14, 2


def make_model(directory: Path, layers: int) -> None:
    """A Qwen2-shaped checkpoint in bf16 with random weights."""
    from rgsp_jax.checkpoint import DTYPES, ShardWriter, TensorSpec, plan_shards

    narrow = WIDTH // HEADS * GROUPS
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, outputs in (("q", WIDTH), ("k", narrow), ("v", narrow)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (outputs, WIDTH)
            shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (outputs,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (WIDTH, WIDTH)
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}.weight"] = (WIDTH,)
    shapes["model.norm.weight"] = (WIDTH,)
    specs = [TensorSpec(name, shape, DTYPES["BF16"]) for name, shape in shapes.items()]
    writer = ShardWriter(directory, plan_shards(specs, 5 << 30))
    rng = np.random.default_rng(0)
    for spec in specs:
        writer.write(spec.name, (0.02 * rng.standard_normal(spec.shape, dtype=np.float32)).astype(spec.dtype))
    writer.finish()
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))


def run_contender(name: str, work: Path) -> dict[str, float]:
    """Seconds, processor seconds and bytes of memory that one contender takes in this process."""
    import rgsp_jax.models  # noqa: F401
    from rgsp_jax.checkpoint import (
        build_manifest,
        convert_to_flax,
        convert_to_huggingface,
        open_checkpoint,
        save_orbax,
        to_flax,
    )

    model, out = work / "model", work / name
    shutil.rmtree(out, ignore_errors=True)
    facts: dict[str, float] = {}
    if name == "copy":
        started = begin()
        shutil.copytree(model, out)
        for path in out.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return end(started)
    if name == "to_huggingface":
        with open_checkpoint(work / "to_flax") as checkpoint:
            started = begin()
            convert_to_huggingface(checkpoint, out)
            return end(started)
    with open_checkpoint(model) as checkpoint:
        if name == "to_flax":
            planned = time.perf_counter()
            build_manifest(checkpoint)
            facts["manifest_seconds"] = time.perf_counter() - planned
            started = begin()
            convert_to_flax(checkpoint, out)
            return facts | end(started)
        tree = to_flax(checkpoint, build_manifest(checkpoint))
        started = begin()
        save_orbax(out, tree)
        return end(started)


Start = tuple[float, float, int]


def begin() -> Start:
    """Wall time, processor time and peak memory in kB until now (getrusage would tell the parent's as well)."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    return time.perf_counter(), time.process_time(), peak


def end(start: Start) -> dict[str, float]:
    """What was taken since."""
    wall, cpu, peak = (now - before for now, before in zip(begin(), start, strict=True))
    return {"seconds": wall, "cpu_seconds": cpu, "memory": peak * 1024}


def run(layers: int, rounds: int, work: Path) -> dict[str, Any]:
    """All contenders in every round; medians, ratios to the copy, and whether the way back gave the same bytes."""
    make_model(work / "model", layers)
    nbytes = (work / "model" / "model.safetensors").stat().st_size
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds):
        for name in CONTENDERS:
            command = [sys.executable, "-m", "experiments.benchmarks.conversion", "--contender", name, "--work", work]
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
            taken[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, times in taken.items():
        ratios = [copy["seconds"] / own["seconds"] for copy, own in zip(taken["copy"], times, strict=True)]
        medians = {key: statistics.median(own[key] for own in times) for key in times[0]}
        rate = nbytes / medians["seconds"]
        rows.append({"name": name, **medians, "bytes_per_second": rate, "share_of_copy": statistics.median(ratios)})
    first, second = (hash_of(work / place / "model.safetensors") for place in ("model", "to_huggingface"))
    return {"bytes": nbytes, "layers": layers, "rounds": rounds, "same_bytes_back": first == second, "rows": rows}


def hash_of(path: Path) -> str:
    from rgsp_jax.checkpoint import hash_file

    return hash_file(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="directory for the models, kept; a temporary one by default")
    options = parser.parse_args(arguments)
    if options.contender:
        print(json.dumps(run_contender(options.contender, options.work)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        results = run(options.layers, options.rounds, options.work or Path(temporary))
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    record = {"command": "python -m experiments.benchmarks.conversion", **machine, **results}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for row in results["rows"]:
        print(
            f"{row['name']:15} {row['seconds']:6.2f} s  {row['bytes_per_second'] / 1e6:6.0f} MB/s  "
            f"{row['share_of_copy']:5.2f} of the copy's rate  {row['memory'] / 1e6:6.0f} MB of memory"
        )
    if options.check and next(r for r in results["rows"] if r["name"] == "to_flax")["share_of_copy"] < TARGET:
        sys.exit(1)


if __name__ == "__main__":
    main()
