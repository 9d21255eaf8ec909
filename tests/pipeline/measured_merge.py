"""A merge in a process of its own that reports its memory; run by test_memory.py, or by hand:

python tests/pipeline/measured_merge.py make PLACE LAYERS            # writes PLACE/a and PLACE/b
python tests/pipeline/measured_merge.py merge PLACE METHOD [INCLUDE]  # merges them into PLACE/out, rank 64
"""

import json
import sys
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


def make(place: Path, layers: int) -> None:
    """Two siblings in bfloat16: decaying spectra like those of trained weights, differences of a few per cent."""
    from rgsp_jax.checkpoint import ShardWriter, TensorSpec, plan_shards

    shapes = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
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


def merge(place: Path, method: str, out: Path, include: str | None) -> None:
    """Print seconds, bytes read, planned peak and measured peak above the size after import, as JSON."""
    from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, prepare

    rank = {"rank": 64} if method in ("relative", "rgsp") else {}
    patterns = (include,) if include else ()
    models = (str(place / "a"), str(place / "b"))
    config = MergeConfig(models=models, method=method, hyperparameters=rank, include=patterns)
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    start = time.perf_counter()
    result = merge_checkpoints(config, out)
    seconds = time.perf_counter() - start
    peak = read_status("VmHWM") - before
    with prepare(config) as preparation:
        planned = preparation.plan.peak_memory
    found = {"method": method, "seconds": seconds, "bytes_in": result.bytes_in, "planned": planned, "peak": peak}
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        merge(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), (sys.argv[5:] or [None])[0])
