"""The planner's figure for models of 70 billion parameters on a TPU v5e slice of 16 chips, from shapes alone.

    python -m experiments.benchmarks.plan_70b                                  # seconds
    python -m experiments.benchmarks.plan_70b --device-kind h100 --devices 8

No such merge was run and no such device was measured: every time here is a prediction, from rates that vendors publish
and others that are assumed (both are printed). Shapes are those of Llama-2-70B: 80 layers of width 8192, 64 heads of
which 8 have keys and values, inner width 28672, 32000 words, bfloat16, 138 GB.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rgsp_jax.checkpoint import TensorSpec, format_bytes
from rgsp_jax.pipeline import MergeConfig, plan_merge
from rgsp_jax.pipeline.config import parse_size
from rgsp_jax.pipeline.hardware import KINDS, DeviceKind, find_kind
from rgsp_jax.pipeline.prediction import lay_out_devices, predict_merge

RESULTS = Path(__file__).parent / "results" / "plan_70b.json"
LAYERS, WIDTH, KEYS, INNER, WORDS = 80, 8192, 1024, 28672, 32000
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS, WIDTH),
    "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
    "input_layernorm": (WIDTH,),
    "post_attention_layernorm": (WIDTH,),
}
MERGES = (("average", 2), ("rgsp", 2), ("relative", 3))
"""Method and models; `relative` of two is their average."""


def list_specs() -> dict[str, TensorSpec]:
    """Headers of one model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, WIDTH)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in LAYER.items()}
    shapes |= {"model.norm.weight": (WIDTH,), "lm_head.weight": (WORDS, WIDTH)}
    dtype = np.dtype(ml_dtypes.bfloat16)
    return {name: TensorSpec(name, shape, dtype) for name, shape in shapes.items()}


def predict(method: str, models: int, kind: DeviceKind, devices: int, memory: int) -> dict[str, Any]:
    """What the planner says of one merge."""
    config = MergeConfig(models=tuple("abcdefgh"[:models]), method=method, memory=memory)
    specs = [list_specs()] * models

    def plan_part(names: Sequence[str] | None) -> Any:
        return plan_merge(config, specs, names=names, model_type="llama", shared_memory=kind.shared)

    if problems := plan_part(None).problems:
        raise SystemExit("\n".join(problems))
    model_bytes = models * sum(spec.nbytes for spec in specs[0].values())
    layout = lay_out_devices(kind, devices, None)
    return predict_merge(
        plan_part, kind, layout, max_shard_size=config.max_shard_size, model_bytes=model_bytes
    )  # fmt: skip


def show(title: str, found: dict[str, Any]) -> None:
    """One merge in four lines."""
    print(
        f"{title}: {found['seconds']:.0f} s predicted on {found['processes']} hosts of"
        f" {found['devices_per_process']} {found['kind']['name']}; bottleneck {found['bottleneck']}"
    )
    print("  " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in found["stages"].items()))
    print(
        f"  {format_bytes(found['memory_per_process'])} a host, {format_bytes(found['memory_per_device'])} a device,"
        f" devices idle {found['idle_share']:.0%}, slowest host over mean {found['imbalance']:.2f}"
    )
    print(f"  rows divided: {', '.join(found['divided']) or 'no matrix'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The planner's figure for 70-billion-parameter models.")
    parser.add_argument("--device-kind", default="tpu-v5e", choices=[*KINDS])
    parser.add_argument("--devices", type=int, default=16)
    parser.add_argument("--memory", default="100GB", help="of each host's")
    parser.add_argument("--out", type=Path, help=f"the JSON file written, e.g. {RESULTS.name} in results/")
    arguments = parser.parse_args()
    kind = find_kind(arguments.device_kind)
    merges = []
    for method, models in MERGES:
        found = predict(method, models, kind, arguments.devices, parse_size(arguments.memory))
        show(f"{method} of {models}", found)
        merges.append({"method": method, "models": models, **{k: v for k, v in found.items() if k != "kind"}})
    print("what it rests on:")
    for name, figure in kind.figures.items():
        print(f"  {name} {figure.value:.3g} {figure.unit}: {figure.origin} ({figure.source})")
    print(f"left out: {merges[0]['left_out']}")
    if arguments.out:
        headline = "; ".join(f"{m['method']} of {m['models']}: {m['seconds']:.0f} s" for m in merges)
        record = {
            "headline": f"Predicted, not measured, on {arguments.devices} {kind.name}: {headline}",
            "command": f"python -m experiments.benchmarks.plan_70b --out experiments/benchmarks/results/{RESULTS.name}",
            "kind": kind.describe(),
            "merges": merges,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
