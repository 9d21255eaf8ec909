"""The plan: made of headers alone, true to what a merge then does."""

import itertools
import json

import jax
import numpy as np
import pytest

from pipeline.toy_models import SHAPES, toy_family, write_family
from rgsp_jax.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, Override, describe_plan, merge_checkpoints, plan_merge, prepare
from rgsp_jax.pipeline.plan import Group, matrix_workspace
from rgsp_jax.registry import methods
from rgsp_jax.rgsp.relative import REWEIGHTINGS

FLOAT32 = np.dtype(np.float32)


def specs_of(shapes, dtype=FLOAT32):
    return {name: TensorSpec(name, shape, dtype) for name, shape in shapes.items()}


def plan_of(shapes, count=2, **settings):
    return plan_merge(MergeConfig(models=tuple("abcdefgh"[:count]), **settings), [specs_of(shapes)] * count)


def test_nothing_but_headers_is_read(tmp_path, monkeypatch):
    models = write_family(tmp_path, toy_family(2))

    def forbidden(*args):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "read_into", forbidden)
    with prepare(MergeConfig(models=models, method="average"), tmp_path / "out") as preparation:
        assert json.loads(json.dumps(describe_plan(preparation)))["bytes_in"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_description(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(3, dtypes=["bfloat16", "float32"]))
    config = MergeConfig(
        models=models[:2],
        method="rgsp",
        hyperparameters={"rank": 2},
        overrides=(Override(pattern="moe.*", method="average"),),
        exclude=("stem.*",),
        dtype="float32",
        max_shard_size=100_000,
    )
    with prepare(config) as preparation:
        found = describe_plan(preparation)
    assert set(found) == {
        "models", "base", "method", "rules", "groups", "devices", "platform", "bytes_in", "bytes_out", "shards",
        "flops", "peak_memory", "peak_device_memory", "seconds", "prediction",
    }  # fmt: skip
    assert (found["models"], found["base"], found["method"]) == (models[:2], None, "rgsp")
    rules = {(row["rule"], row["method"]): (row["tensors"], row["parameters"]) for row in found["rules"]}
    count = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
    layers = [n for n, s in SHAPES.items() if "layer" in n and len(s) == 2]
    assert rules == {
        ("buffer", "copy"): (1, 12),
        ("embedding", "average"): (1, count["embeddings.word_embeddings.weight"]),
        ("matrix", "rgsp"): (len(layers), sum(count[n] for n in layers)),
        ("matrix", "average"): (1, count["moe.experts.down_proj"]),
        ("vector", "average"): (7, sum(c for n, c in count.items() if len(SHAPES[n]) < 2)),
        ("excluded", "copy"): (1, count["stem.conv.weight"]),
        ("vector", "copy"): (1, 0),
    }
    assert sum(row["tensors"] for row in found["groups"]) == len(SHAPES) + 1
    matrices = {tuple(row["matrix"]): row for row in found["groups"] if row["matrix"]}
    assert set(matrices) == {(8, 8), (20, 8), (8, 20)}
    assert matrices[8, 8]["dtypes"] == "bfloat16+float32 -> float32"
    assert (matrices[8, 8]["tensors"], matrices[8, 8]["items"]) == (4, 1)
    merged = sum(count.values()) - count["stem.conv.weight"]
    assert found["bytes_in"] == 6 * merged + 2 * count["stem.conv.weight"] + 96
    assert found["bytes_out"] == 4 * sum(count.values()) + 96
    assert found["flops"] > 0 and found["seconds"] > 0
    assert found["shards"] == 3  # the embedding has one of its own
    assert 0 < found["peak_memory"] <= config.memory
    assert (found["devices"], found["platform"]) == (1, "cpu")
    assert all((row["devices"], row["waves"]) == (1, row["items"]) for row in found["groups"])
    assert found["peak_memory"] == preparation.plan.peak_memory


def test_a_merge_does_what_was_planned(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(2))
    config = MergeConfig(models=models, method="average", max_shard_size=10_000)
    with prepare(config) as preparation:
        found = describe_plan(preparation)
    result = merge_checkpoints(config, tmp_path / "out")
    assert (result.bytes_in, result.bytes_out) == (found["bytes_in"], found["bytes_out"])
    assert len(result.files) == found["shards"]
    assert sum(row["tensors"] for row in found["rules"]) == result.tensors


@pytest.mark.parametrize("method", ["average", "slerp", "relative", "rgsp"])
@pytest.mark.parametrize("memory", [1_000_000_000, 30_000_000])
def test_items_cover_every_tensor_once_within_the_budget(method, memory):
    shapes = {
        "model.embed_tokens.weight": (50_000, 64),
        **{f"layers.{i}.mlp.up_proj.weight": (1024, 256) for i in range(40)},
        **{f"layers.{i}.mlp.norm.weight": (256,) for i in range(40)},
        "layers.0.mlp.experts.gate_up_proj": (60, 96, 64),
        "big.weight": (500, 300),
        "scalar": (),
        "empty.weight": (0, 5),
    }
    if method == "slerp":
        del shapes["model.embed_tokens.weight"], shapes["layers.0.mlp.experts.gate_up_proj"]  # whole tensors
    plan = plan_of(shapes, method=method, memory=memory)
    assert plan.problems == ()
    assert plan.peak_memory <= memory
    covered = {name: [] for name in shapes}
    for number, item in enumerate(plan.items):
        assert item.index == number
        assert item.pieces
        slots = []
        for piece in item.pieces:
            covered[piece.name].append((piece.start, piece.start + piece.size))
            width = 1 if item.group.action == "matrices" else -(-piece.size // 1024)
            slots += range(piece.slot, piece.slot + width)
        assert item.group.action == "copy" or (len(set(slots)) == len(slots) and max(slots) < item.capacity)
    for name, shape in shapes.items():
        ends = sorted(covered[name])
        assert ends[0][0] == 0 and ends[-1][1] == int(np.prod(shape)), name
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ends)), name
    assert plan.bytes_in == 2 * plan.bytes_out == 8 * sum(int(np.prod(s)) for s in shapes.values())


def test_memory_does_not_grow_with_the_layers():
    def peak(layers):
        return plan_of(
            {f"layers.{i}.w.weight": (512, 512) for i in range(layers)}, method="relative", count=3
        ).peak_memory

    assert peak(200) == peak(2000)


@pytest.mark.parametrize(
    ("models", "m", "n", "rank"),
    [
        (16, 256, 256, 32),
        (2, 1024, 768, 32),
        pytest.param(30, 600, 600, 20, marks=pytest.mark.slow),
        pytest.param(3, 1024, 768, 32, marks=pytest.mark.slow),
        pytest.param(4, 64, 4096, 16, marks=pytest.mark.slow),
    ],
)
def test_the_room_for_relative_covers_what_the_compiler_sets_aside(models, m, n, rank):
    """Many models are where its cores, as large as all their directions together, outweigh the matrices."""
    with jax.enable_x64(False):
        stack = jax.ShapeDtypeStruct((models, m, n), np.float32)
        found = jax.jit(lambda x: methods["relative"](x, rank=rank)).lower(stack).compile().memory_analysis()
    group = Group("matrices", "relative", {"rank": rank}, (m, n), (FLOAT32,) * models, FLOAT32)
    assert found.temp_size_in_bytes <= matrix_workspace(group)


def test_the_median_is_in_the_estimate():
    """Twice K + 1 eigendecompositions in each of its steps, of as many directions as all models have together."""

    def flops(method, count, rank, matrix=(512, 512), **own):
        settings = {"rank": rank, **own}
        return plan_of({"layers.0.w.weight": matrix}, method=method, count=count, hyperparameters=settings).flops

    for count, rank in ((3, 32), (8, 32), (8, 64)):
        least = REWEIGHTINGS * 2 * (count + 1) * 9 * (count * rank) ** 3
        assert flops("relative", count, rank) - flops("relative_weighted", count, rank) > least
    assert flops("relative", 8, 64) == flops("relative", 8, 200)  # of 512, no more than 64 for each of 8
    assert flops("relative", 2, 32) == flops("average", 2, 32)  # their mean
    learned = flops("relative", 2, 32, directions=[1.0, 0.5])
    assert 10 * flops("relative", 2, 32) < learned <= flops("relative_weighted", 2, 32)


def test_too_little_memory_is_refused_with_what_is_needed(tmp_path):
    models = write_family(tmp_path, toy_family(2))
    config = MergeConfig(models=models, method="average", memory=10_000)
    with pytest.raises(RefusedError) as refusal, prepare(config):
        pass
    problems = refusal.value.problems
    assert all(problem.startswith("--memory 10 kB is too little: ") for problem in problems)
    assert any("embeddings.word_embeddings.weight [4331, 8] by average needs 590 kB" in problem for problem in problems)
    needed = plan_merge(config, [open_checkpoint(m).specs for m in models]).peak_memory
    with prepare(config.model_copy(update={"memory": needed})) as preparation:
        assert preparation.plan.problems == ()
    with pytest.raises(RefusedError), prepare(config.model_copy(update={"memory": needed - 1})):
        pass


def test_gpt2_layers_are_turned(tmp_path):
    shapes = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_proj.weight": (32, 8)}
    config = MergeConfig(models=("a", "b"), method="relative")
    turned = plan_merge(config, [specs_of(shapes)] * 2, model_type="gpt2")
    plain = plan_merge(config, [specs_of(shapes)] * 2, model_type="llama")
    assert [g.matrix for g in turned.groups] == [(24, 8), (8, 32)]
    assert [g.matrix for g in plain.groups] == [(8, 24), (32, 8)]


def test_groups_take_one_shape_one_setting_and_one_set_of_dtypes():
    config = MergeConfig(
        models=("a", "b"),
        method="rgsp",
        overrides=(Override(pattern="b.*", hyperparameters={"rank": 3}), Override(pattern="c.*", method="slerp")),
    )
    first = specs_of({f"{x}.weight": (8, 4) for x in "abcde"}) | {
        "f.weight": TensorSpec("f.weight", (8, 4), np.dtype("f2"))
    }
    second = specs_of({f"{x}.weight": (8, 4) for x in "abcdef"})
    plan = plan_merge(config, [first, second])
    members = [sorted({p.name[0] for item in plan.items if item.group is g for p in item.pieces}) for g in plan.groups]
    assert sorted(members) == [["a", "d", "e"], ["b"], ["c"], ["f"]]
    assert members[-1] == ["c"]  # the cheapest method last, so that progress and time left mean something
