"""A plan in plain data, for `--plan`: what would be done, and about how long it would take here."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from rgsp_jax.checkpoint import plan_shards
from rgsp_jax.pipeline.placement import Placement, Wave, place_merge
from rgsp_jax.pipeline.plan import step_rows
from rgsp_jax.pipeline.preparation import Preparation

DISK_RATE = 0.8e9
"""Bytes read or written a second where the page cache helps: an order of magnitude, no promise."""
FACTOR_RATE = 0.15
"""Share of the matrix-product rate that factorisations reach."""
COMPILE_SECONDS = 3.0
"""Of one group with a factorisation."""


def describe_plan(preparation: Preparation, placement: Placement | None = None) -> dict[str, Any]:
    """Tensors by rule, groups and how they are dealt out, bytes, FLOPs, peak memory and a rough time.

    Without a placement it is that of one device.
    """
    plan, config = preparation.plan, preparation.config
    placement = placement or place_merge(plan, devices=1)
    waves: defaultdict[int, list[Wave]] = defaultdict(list)
    for wave in placement.waves(plan.items):
        waves[id(wave.group)].append(wave)
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
        "seconds": estimate_seconds(preparation),
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


def estimate_seconds(preparation: Preparation) -> float:
    """Bytes at a disk's rate, or FLOPs at a share of this machine's measured matrix-product rate, and compilation."""
    plan = preparation.plan
    compiled = sum(group.action == "matrices" for group in plan.groups)
    moving = (plan.bytes_in + 2 * plan.bytes_out) / DISK_RATE
    return max(moving, plan.flops / (FACTOR_RATE * measure_flops())) + COMPILE_SECONDS * compiled


def measure_flops(size: int = 768) -> float:
    """Floating-point operations a second of a float32 matrix product here; takes some milliseconds."""
    a = np.ones((size, size), np.float32)
    a @ a
    start = time.perf_counter()
    a @ a
    return 2 * size**3 / (time.perf_counter() - start)
