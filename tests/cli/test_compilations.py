"""What is compiled, how often, and never twice on one machine."""

import json
import os
import subprocess
import sys
from collections import Counter

import jax
import jax.monitoring
import numpy as np
import pytest

from pipeline.toy_models import write_family
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.pipeline.kernels import compile_item
from rgsp_jax.pipeline.preparation import prepare

COMPILED = "/jax/core/compile/backend_compile_duration"
KERNELS = ("merge_matrices", "merge_elements")
COUNT = """
import json, sys
import jax.monitoring
from rgsp_jax import cli

place, asked = sys.argv.pop(), []
jax.monitoring.register_event_listener(lambda event, **_: asked.append(event.rsplit("/", 1)[-1]))
try:
    cli.main()
finally:
    with open(place, "w") as file:
        json.dump([asked.count("compile_requests_use_cache"), asked.count("cache_hits")], file)
"""


def draw_decoder(layers, seed):
    """Four shapes of matrices, two of vectors, an embedding."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj.weight": (16, 16) for x in "qo"}
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj.weight": (8, 16) for x in "kv"}
        shapes |= {f"model.layers.{i}.self_attn.{x}_proj.bias": (8,) for x in "kv"}
        shapes |= {f"model.layers.{i}.mlp.{x}_proj.weight": (24, 16) for x in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj.weight": (16, 24)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture
def compiled():
    """Names of the functions compiled since, with how often."""
    found = Counter()

    def note(event, _, fun_name=None, **__):
        if event == COMPILED:
            found[str(fun_name).removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("method", ["relative", "slerp"])
def test_one_compilation_for_each_group(tmp_path, monkeypatch, compiled, method):
    """However many layers there are, and into however many items they are cut."""
    models = write_family(tmp_path, [draw_decoder(6, seed) for seed in range(2)])
    config = MergeConfig(models=models, method=method)
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", 4 * 16 * 24)
    with prepare(config, tmp_path / "out") as preparation:
        groups, items = preparation.plan.groups, preparation.plan.items
    assert len(items) > len(groups) + 3
    compile_item.cache_clear()
    merge_checkpoints(config, tmp_path / "out", overview=False)
    assert sum(compiled[name] for name in KERNELS) == len(groups)
    assert compiled["merge_matrices"] == len({group.matrix for group in groups if group.action == "matrices"})
    compiled.clear()
    merge_checkpoints(config, tmp_path / "again", overview=False)
    assert not any(compiled[name] for name in KERNELS)


def count_compilations(tmp_path, *arguments):
    """(programs that JAX asked its persistent cache for, those that were there) in a process that runs `rgsp`."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_", "XDG_"))}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    counts = tmp_path / "counts.json"
    command = [sys.executable, "-c", COUNT, *map(str, arguments), counts]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    return json.loads(counts.read_text())


def test_a_second_merge_compiles_nothing(tmp_path):
    models = write_family(tmp_path, [draw_decoder(2, seed) for seed in range(2)])
    asked, found = count_compilations(tmp_path, "merge", *models, "--method", "rgsp", "-o", tmp_path / "out")
    assert asked > 3 and found < asked
    assert count_compilations(tmp_path, "merge", *models, "--method", "rgsp", "-o", tmp_path / "again") == [asked] * 2


@pytest.mark.slow
def test_a_second_demo_compiles_nothing(tmp_path):
    asked, found = count_compilations(tmp_path, "demo", "-o", tmp_path / "demo")
    assert asked > 40 and found < asked / 2
    assert count_compilations(tmp_path, "demo", "-o", tmp_path / "again") == [asked] * 2
