"""Matrices too large for one device: their rows over all devices, or a refusal that says what they need."""

import itertools
import json
import re
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import Mesh

from pipeline.test_devices import largest_difference, weights_of
from pipeline.test_grafting import SKETCHED, collect
from pipeline.toy_models import HIDDEN, INNER, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import TensorSpec
from rgsp_jax.cli import cli
from rgsp_jax.errors import RefusedError
from rgsp_jax.linalg import ROWS
from rgsp_jax.pipeline import MergeConfig, Override, describe_plan, execute, merge_checkpoints, plan_merge, prepare
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.kernels import NOTHING, compile_divided, split_static
from rgsp_jax.pipeline.placement import Devices, Placement, Size, place_merge, read_limit
from rgsp_jax.pipeline.plan import Group
from rgsp_jax.registry import methods

pytestmark = pytest.mark.usefixtures("plain_report")

HEAD, WIDTH = 1501, 24
"""Rows that eight devices do not divide."""
SMALL, BIG = "layer.weight", "score.weight"


def head_family(count, *, wide=False, seed=0):
    """Siblings with a head far larger than their other matrix."""
    rng = np.random.default_rng(seed)
    spectrum = np.geomspace(1, 0.1, WIDTH)
    ancestor = rng.normal(size=(HEAD, WIDTH)) * spectrum
    small = rng.normal(size=(WIDTH, WIDTH))

    def sibling():
        head = (ancestor + 0.1 * rng.normal(size=ancestor.shape) * spectrum).astype(np.float32)
        layer = (small + 0.1 * rng.normal(size=small.shape)).astype(np.float32)
        return {BIG: np.ascontiguousarray(head.T) if wide else head, SMALL: layer}

    return [sibling() for _ in range(count)]


def least_memory(config):
    """Of one device, in bytes: enough for the head divided by eight, not for the whole, and for what else there is."""
    with prepare(config) as preparation:
        plan = preparation.plan
    group = next(item.group for item in plan.items if item.pieces[0].name == BIG)
    placement = place_merge(plan, devices=8)
    divided, whole = (placement.count_device_bytes(group, size) for size in (Size(1, 8, 1, True), Size(1, 1, 1)))
    assert 3 * divided < whole
    return divided


def merge_both(tmp_path, config, monkeypatch, memory=None):
    """The same merge with room for everything and with little; and what was divided for it."""
    for name in ("roomy", "tight"):
        (tmp_path / name).mkdir()
    roomy = merge_checkpoints(config, tmp_path / "roomy/out").out
    divided = []
    original = execute.run_divided
    with monkeypatch.context() as patch:
        patch.setattr(execute, "run_divided", lambda *given: divided.append(given[0].matrix) or original(*given))
        few = Devices(8, memory or least_memory(config))
        tight = merge_checkpoints(config, tmp_path / "tight/out", devices=few).out
    return roomy, tight, divided


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("method", ["tilt", "jitter", "arithmetic"])
def test_a_head_is_divided_and_the_rest_is_not(tmp_path, monkeypatch, method, wide):
    *models, base = write_family(tmp_path, head_family(3, wide=wide))
    config = MergeConfig(models=models, method=method, base=base if method == "arithmetic" else None)
    roomy, tight, divided = merge_both(tmp_path, config, monkeypatch)
    assert divided == [(WIDTH, HEAD) if wide else (HEAD, WIDTH)]
    assert largest_difference(roomy, tight) <= 8 * np.finfo(np.float32).eps
    if method == "jitter":  # numbers drawn on one device are those drawn on eight
        assert weights_of(roomy) == weights_of(tight)
    records = [
        {r["name"]: r for r in map(json.loads, (out / "report.jsonl").read_text().splitlines())}
        for out in (roomy, tight)
    ]
    for name in (BIG, SMALL):
        one, other = (of[name] for of in records)
        assert one["flags"] == other["flags"]
        assert one["relative_change"] == pytest.approx(other["relative_change"], rel=1e-5)


SPECTRAL = {
    "relative": dict(models=3, hyperparameters={"rank": 0.2}),
    "rgsp": dict(models=2, hyperparameters={"rank": 4}),
    "tsv_m": dict(models=2, base=True),
    "slerp": dict(models=2),
    "ties": dict(models=2, base=True, hyperparameters={"density": 0.3}),
}
QUICK = ("relative", "slerp")


@pytest.mark.parametrize(
    "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECTRAL]
)
def test_methods_agree_to_rounding(tmp_path, monkeypatch, method):
    settings = SPECTRAL[method]
    *models, base = write_family(tmp_path, head_family(settings["models"] + 1))
    config = MergeConfig(
        models=models,
        method=method,
        base=base if "base" in settings else None,
        hyperparameters=settings.get("hyperparameters", {}),
        include=(BIG,),
    )
    roomy, tight, divided = merge_both(tmp_path, config, monkeypatch)
    assert divided == [(HEAD, WIDTH)]
    assert largest_difference(roomy, tight) <= 1e-5


@pytest.mark.usefixtures("toy_methods")
def test_several_matrices_of_one_item_are_divided_one_after_the_other(tmp_path, monkeypatch):
    models = write_family(tmp_path, toy_family(2, dtypes=["bfloat16", "float64"]))
    config = MergeConfig(models=models, method="tilt", include=(r"re:moe\.|layer\.\d\.output\.dense",))
    with prepare(config) as preparation:
        (group,) = {id(i.group): i.group for i in preparation.plan.items if i.group.matrix == (HIDDEN, INNER)}.values()
        whole = place_merge(preparation.plan).count_device_bytes(group, Size(1, 1, 1))
    roomy, tight, divided = merge_both(tmp_path, config, monkeypatch, memory=whole - 1)
    assert divided == [(HIDDEN, INNER)] * 5
    assert largest_difference(roomy, tight) <= 2.0**-8  # of bfloat16 output


def test_covariances_are_whole_on_every_device(tmp_path, monkeypatch):
    family = toy_family(2)
    covariances = collect(tmp_path / "cov.safetensors", family[0], skip=("stem.conv.weight", SKETCHED))
    config = MergeConfig(
        models=write_family(tmp_path, family),
        method="graft",
        covariances=(covariances,),
        include=("encoder.layer.1.output.dense.weight",),
    )
    with prepare(config) as preparation:
        group = next(item.group for item in preparation.plan.items if item.group.inputs)
        whole = place_merge(preparation.plan).count_device_bytes(group, Size(1, 1, 1))
    roomy, tight, divided = merge_both(tmp_path, config, monkeypatch, memory=whole - 1)
    assert divided == [(HIDDEN, INNER)]
    assert largest_difference(roomy, tight) <= 1e-5


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.parametrize(("begin", "finish"), [("tight", "roomy"), ("roomy", "tight")])
def test_begun_divided_and_finished_whole(tmp_path, monkeypatch, begin, finish):
    models = write_family(tmp_path, head_family(2))
    config = MergeConfig(models=models, method="jitter")
    devices = {"tight": Devices(8, least_memory(config)), "roomy": None}
    (tmp_path / "whole").mkdir()
    expected = tree_bytes(merge_checkpoints(config, tmp_path / "whole/out").out)
    original, calls = Journal.record, []

    def stop(self, index, records):
        calls.append(index)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(self, index, records)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(config, tmp_path / "out", devices=devices[begin])
    result = merge_checkpoints(config, tmp_path / "out", resume=True, devices=devices[finish])
    assert result.resumed_items == 1
    assert tree_bytes(result.out) == expected


@pytest.mark.parametrize("rows", [8192, 8195])
def test_no_device_holds_the_whole(rows):
    """What XLA sets aside on a device is within the estimate; no array of even parts is as large as the matrix."""
    width, bfloat16 = 96, np.dtype(ml_dtypes.bfloat16)
    group = Group("matrices", "slerp", {}, (rows, width), (bfloat16,) * 2, bfloat16)
    mesh = Mesh(np.array(jax.devices()[:8]), (ROWS,))
    static, traced = split_static(methods["slerp"], {})
    check_room(group, mesh, static, traced)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "models", "rows"),
    [
        *itertools.product(("relative", "tsv_m", "ties", "della", "breadcrumbs", "core_space"), (3,), (40_000, 40_003)),
        *itertools.product(("rgsp", "slerp"), (2,), (40_000, 40_003)),
        ("karcher", 3, 40_000),
    ],
)
def test_no_device_holds_the_whole_by_other_methods(method, models, rows):
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    hyperparameters = {"rank": 64} if method in ("relative", "rgsp") else {}
    group = Group("matrices", method, hyperparameters, (rows, 256), (bfloat16,) * models, bfloat16)
    mesh = Mesh(np.array(jax.devices()[:8]), (ROWS,))
    static, traced = split_static(methods[method], hyperparameters)
    check_room(group, mesh, static, traced)


def check_room(group, mesh, static, traced):
    rows, width = group.matrix
    with_base = "base" in methods[group.method].needs
    with jax.enable_x64(False):
        kernel = compile_divided(group.method, static, group.out_dtype, with_base, group.matrix, mesh)
        stack = tuple(jax.ShapeDtypeStruct((-(-rows // 8) * 8, width), dtype) for dtype in group.in_dtypes)
        salt = jax.ShapeDtypeStruct((2,), np.uint32)
        with jax.set_mesh(mesh):
            compiled = kernel.lower(stack, salt, traced, np.uint32(0), NOTHING).compile()
    found = compiled.memory_analysis()
    taken = found.temp_size_in_bytes + found.argument_size_in_bytes + found.output_size_in_bytes
    placement = Placement(tuple(jax.devices()[:8]), 10**12)
    assert taken <= placement.count_device_bytes(group, Size(1, 8, 1, True))
    if rows % 8:
        return  # factors as large as the matrix may be gathered; the estimate counts them
    shapes = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text())
    assert max(np.prod([int(d) for d in shape.split(",")]) for shape in shapes) < rows * width


def plan_of(matrix, method, count, **settings):
    specs = {BIG: TensorSpec(BIG, matrix, np.dtype(np.float32))}
    with_base = {"base": "base"} if "base" in methods[method].needs else {}
    config = MergeConfig(models=tuple("abcdefgh"[:count]), method=method, **with_base, **settings)
    return plan_merge(config, [specs] * (count + len(with_base)))


def refused(plan, devices):
    with pytest.raises(RefusedError) as refusal:
        place_merge(plan, devices=devices)
    (problem,) = refusal.value.problems
    return problem


def test_what_has_no_room_is_refused_by_name():
    plan = plan_of((150_000, 900), "relative", 2, memory=100 * 10**9)
    alone = refused(plan, Devices(1, 2 * 10**9))
    assert alone.startswith(f"{BIG} (150000 x 900) by relative needs 5.4 GB")
    assert "on a device, and 2 GB are to be had: divide it over several --devices, or merge it" in alone
    assert place_merge(plan, devices=Devices(8, 2 * 10**9)).size_waves(plan.items) == Size(1, 8, 1, True)
    still = refused(plan, Devices(8, 300 * 10**6))
    assert "on each of 8 that share it, and 300 MB are to be had: use more devices" in still
    assert f"--override '{BIG} method=average'" in still
    cannot = refused(plan_of((150_000, 900), "wudi", 2, memory=100 * 10**9), Devices(8, 2 * 10**9))
    assert (
        "are to be had: wudi cannot be divided over several; " in cannot
        and f"--override '{BIG} method=average'" in cannot
    )


def test_the_override_that_is_proposed_helps():
    plan = plan_of(
        (150_000, 900),
        "wudi",
        2,
        memory=10**9,
        overrides=(Override(pattern=BIG, method="average"),),
    )
    assert plan.problems == ()
    assert place_merge(plan, devices=Devices(8, 50 * 10**6)).peak_memory(plan) <= 10**9


def test_shared_memory_counts_every_device():
    """Simulated devices hold their parts in the host's memory: what fits each of them may not fit there together."""
    matrix = (20_000, 1024)
    whole = plan_of(matrix, "relative", 2, hyperparameters={"rank": 8}, memory=10**12)
    divided = Size(1, 8, 1, True)
    placement = place_merge(whole, devices=8)
    group = whole.groups[0]
    needed, device = placement.count_bytes(group, divided), placement.count_device_bytes(group, divided)
    plan = plan_of(matrix, "relative", 2, hyperparameters={"rank": 8}, memory=needed)
    if plan.peak_memory <= needed:
        assert place_merge(plan, devices=Devices(8, device)).size_waves(plan.items) == divided
        assert refused(
            plan_of(matrix, "relative", 2, hyperparameters={"rank": 8}, memory=needed - 1), Devices(8, device)
        ).endswith("of this machine")


def test_devices_say_what_they_have():
    def device(**stats):
        return SimpleNamespace(platform="gpu", memory_stats=lambda: stats or None)

    assert read_limit([device(bytes_limit=1000), device(bytes_limit=500)]) == 450
    assert read_limit([device()]) is None
    assert read_limit(jax.devices()) is None


def test_the_plan_and_the_command(tmp_path):
    models = write_family(tmp_path, head_family(2))
    config = MergeConfig(models=models, method="slerp")
    memory = least_memory(config)
    with prepare(config) as preparation:
        found = describe_plan(preparation, place_merge(preparation.plan, devices=Devices(8, memory)))
    assert found["peak_device_memory"] == memory
    (row,) = (row for row in found["groups"] if row["matrix"] == [HEAD, WIDTH])
    assert (row["divided"], row["devices"], row["waves"], row["idle_share"]) == (True, 8, 1, 0)
    options = ["merge", *models, "--method", "slerp", "--devices", "8", "--plan", "--device-memory"]
    done = CliRunner().invoke(cli, [*options, str(memory), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["groups"] == found["groups"]
    assert "together" in CliRunner().invoke(cli, [*options, str(memory)], env={"COLUMNS": "160"}).output
    refusal = CliRunner().invoke(cli, [*options, "much"]).exception
    assert isinstance(refusal, RefusedError) and refusal.problems[0].startswith("--device-memory must be a size")
