"""A plan in plain data, for `--plan`: what would be done, and about how long it would take."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import plan_shards
from rgsp_jax.pipeline.hardware import DeviceKind, recognise_kind
from rgsp_jax.pipeline.placement import Placement, Wave, place_merge
from rgsp_jax.pipeline.plan import step_rows
from rgsp_jax.pipeline.prediction import Layout, predict_merge
from rgsp_jax.pipeline.preparation import Preparation


def describe_plan(
    preparation: Preparation,
    placement: Placement | None = None,
    *,
    kind: DeviceKind | None = None,
    layout: Layout | None = None,
) -> dict[str, Any]:
    """Tensors by rule, groups and how they are dealt out, bytes, FLOPs, peak memory and a predicted time.

    Args:
        preparation: models and plan.
        placement: on whose devices; None is one device that is here.
        kind: of these devices; None is what they are.
        layout: of processes that merge; None is one.
    """
    plan, config = preparation.plan, preparation.config
    placement = placement or place_merge(plan, devices=1)
    waves: defaultdict[int, list[Wave]] = defaultdict(list)
    for wave in placement.waves(plan.items):
        waves[id(wave.group)].append(wave)
    prediction = predict_here(preparation, placement, kind, layout)
    rules = Counter((t.kind, t.method) for t in plan.tasks.values())
    sizes: Counter[tuple[str, str]] = Counter()
    for task in plan.tasks.values():
        sizes[task.kind, task.method] += task.size
    groups = []
    for group in plan.groups:
        items = [item for item in plan.items if item.group is group]
        groups.append(
            {
                "method": group.method,
                "hyperparameters": dict(group.hyperparameters),
                "matrix": list(group.matrix) if group.action == "matrices" else None,
                "dtypes": f"{'+'.join(d.name for d in group.in_dtypes)} -> {group.out_dtype.name}",
                "tensors": len({p.name for item in items for p in item.pieces}),
                "items": len(items),
                **describe_waves(waves[id(group)], len(placement.devices)),
            }
        )
    return {
        "models": list(config.models),
        "base": config.base,
        "method": config.resolved_method().name,
        "rules": [
            {"rule": kind, "method": method, "tensors": count, "parameters": sizes[kind, method]}
            for (kind, method), count in rules.items()
        ],
        "groups": groups,
        "devices": len(placement.devices),
        "platform": placement.devices[0].platform,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "shards": len(plan_shards(plan.specs, config.max_shard_size).shards),
        "flops": plan.flops,
        "peak_memory": placement.peak_memory(plan),
        "peak_device_memory": placement.peak_device_memory(plan),
        "seconds": prediction["seconds"],
        "prediction": prediction,
    }


def describe_waves(waves: Sequence[Wave], devices: int) -> dict[str, Any]:
    """How a group is dealt out: what one device holds of a wave, and the share of all devices' time that is padding."""
    steps = sum(wave.steps for wave in waves)
    used = sum(wave.used * wave.divided for wave in waves)
    copied = waves[0].group.action == "copy"
    return {
        "waves": len(waves),
        "devices": max(len(waves[0].shares), waves[0].divided),
        "divided": waves[0].divided > 1,
        "slots_per_device": waves[0].steps * step_rows(waves[0].group),
        "idle_share": 0.0 if copied else round(1 - used / (steps * devices), 4),
    }


def predict_here(
    preparation: Preparation, placement: Placement, kind: DeviceKind | None = None, layout: Layout | None = None
) -> dict[str, Any]:
    """How long the merge takes on these devices, of the kind that they are where none is given."""
    device = placement.devices[0]
    plan = preparation.plan
    return predict_merge(
        lambda names: plan if names is None else preparation.plan_part(names),
        kind or recognise_kind(device.platform, device.device_kind),
        layout or Layout(1, len(placement.devices), 1),
        max_shard_size=preparation.config.max_shard_size,
        model_bytes=count_model_bytes(preparation),
        device_memory=placement.device_memory,
    )


def count_model_bytes(preparation: Preparation) -> int:
    """Of all models' files on this machine, which are hashed for the report; objects in stores are not."""
    files = [path for checkpoint in preparation.checkpoints for path in checkpoint.weight_files]
    return sum(path.stat().st_size for path in files if isinstance(path, Path))
