"""A merge in a process of its own that reports its memory; run by test_memory.py, or by hand:

python tests/pipeline/measured_merge.py make PLACE LAYERS                # writes PLACE/a and PLACE/b
python tests/pipeline/measured_merge.py make PLACE LAYERS --head ROWS    # and a matrix of so many rows
python tests/pipeline/measured_merge.py merge PLACE METHOD OUT [INCLUDE] # merges them into OUT, rank 64
    --devices N --device-memory SIZE --memory SIZE                       # on simulated devices, as `rgsp merge` does
"""

import argparse
import json
import os
import time
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, INNER, KEYS, WORDS = 896, 4864, 128, 30_000
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
}


def make(place: Path, layers: int, head: int) -> None:
    """Two siblings in bfloat16: decaying spectra like those of trained weights, differences of a few per cent."""
    from rgsp_jax.checkpoint import ShardWriter, TensorSpec, plan_shards

    shapes: dict[str, tuple[int, ...]] = {"score.weight": (head, HIDDEN)} if head else {}
    shapes |= {"model.embed_tokens.weight": (WORDS, HIDDEN)} if layers else {}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in LAYER.items()}
    specs = [TensorSpec(name, shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()]
    for k, sibling in enumerate("ab"):
        writer = ShardWriter(place / sibling, plan_shards(specs, 5_000_000_000))
        for number, (name, shape) in enumerate(shapes.items()):
            ancestor, own = np.random.default_rng(number), np.random.default_rng([number, k])
            scale = np.geomspace(1, 0.1, shape[-1], dtype=np.float32) * 0.03
            weights = ancestor.standard_normal(shape, np.float32)
            weights += 0.02 * own.standard_normal(shape, np.float32)
            writer.write(name, (weights * scale).astype(ml_dtypes.bfloat16))
        writer.finish()
        config = {"model_type": "qwen2", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
        (place / sibling / "config.json").write_text(json.dumps(config))


def read_status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def merge(arguments: argparse.Namespace) -> None:
    """Print seconds, bytes read, planned peak and measured peak above the size after import, as JSON."""
    from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, prepare
    from rgsp_jax.pipeline.config import parse_size
    from rgsp_jax.pipeline.placement import Devices, place_merge

    method, place = arguments.method, arguments.place
    rank = {"rank": 64} if method in ("relative", "rgsp") else {}
    patterns = (arguments.include,) if arguments.include else ()
    models = (str(place / "a"), str(place / "b"))
    config = MergeConfig(
        models=models, method=method, hyperparameters=rank, include=patterns, memory=parse_size(arguments.memory)
    )
    held = parse_size(arguments.device_memory) if arguments.device_memory else None
    devices = Devices(arguments.devices, held)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    result = merge_checkpoints(config, arguments.out, devices=devices)
    seconds = time.perf_counter() - start
    peak = read_status("VmHWM") - before
    with prepare(config) as preparation:
        planned = place_merge(preparation.plan, devices=devices).peak_memory(preparation.plan)
    found = {"method": method, "seconds": seconds, "bytes_in": result.bytes_in, "planned": planned, "peak": peak}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    making, merging = commands.add_parser("make"), commands.add_parser("merge")
    making.add_argument("place", type=Path)
    making.add_argument("layers", type=int)
    making.add_argument("--head", type=int, default=0)
    merging.add_argument("place", type=Path)
    merging.add_argument("method")
    merging.add_argument("out", type=Path)
    merging.add_argument("include", nargs="?")
    merging.add_argument("--devices", type=int)
    merging.add_argument("--device-memory")
    merging.add_argument("--memory", default="1GB")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.place, arguments.layers, arguments.head)
        return
    if arguments.devices:
        simulated = f"--xla_force_host_platform_device_count={arguments.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {simulated}"
    merge(arguments)


if __name__ == "__main__":
    main()
