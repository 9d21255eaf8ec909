"""What the planner predicts for devices that need not be here: bounds, monotony, refusals; no weights, no kernels."""

import itertools
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from experiments.benchmarks import plan_70b
from rgsp_jax.checkpoint import TensorSpec
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, plan_merge
from rgsp_jax.pipeline import hardware as hardware_module
from rgsp_jax.pipeline.hardware import KINDS, Figure, find_kind, measure_host, recognise_kind
from rgsp_jax.pipeline.placement import Devices, place_planned
from rgsp_jax.pipeline.prediction import Layout, Times, lay_out_devices, predict_merge, run_waves

TPU = KINDS["tpu-v5e"]
SHARD = 10_000_000
HOST = replace(TPU, name="cpu", platform="cpu", memory=None, host_memory=None, transfer=None, shared=True)
"""A host whose rates are known, so that nothing is measured here."""


def make_planner(method="rgsp", layers=16, width=512, inner=1024, models=2, memory=4 * 10**9, shared=False, words=4096):
    shapes = {"model.embed_tokens.weight": (words, width)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.self_attn.q_proj.weight": (width, width)}
        shapes |= {f"model.layers.{i}.mlp.up_proj.weight": (inner, width)}
    specs = {name: TensorSpec(name, shape, np.dtype(ml_dtypes.bfloat16)) for name, shape in shapes.items()}
    config = MergeConfig(models=tuple("abcdefgh"[:models]), method=method, memory=memory)
    return lambda names: plan_merge(config, [specs] * models, names=names, shared_memory=shared)


def predict(planner, kind, layout, **settings):
    return predict_merge(planner, kind, layout, **{"max_shard_size": SHARD, "model_bytes": 0, **settings})


def test_no_device_has_to_be_here(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("JAX was asked for its devices")

    for name in ("devices", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, forbidden)
    found = predict(make_planner(), TPU, lay_out_devices(TPU, 16, None))
    assert (found["processes"], found["devices_per_process"], found["devices"]) == (4, 4, 16)


def test_unknown_kinds_are_refused_with_the_known_ones():
    with pytest.raises(RefusedError, match="tpu-v9: not known; there are cpu, h100, h200, tpu-v5e, tpu-v5p"):
        find_kind("tpu-v9")


@pytest.mark.parametrize(
    ("platform", "name", "expected"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "h100"),
        ("gpu", "NVIDIA H200", "h200"),
        ("tpu", "TPU v5 lite", "tpu-v5e"),
        ("tpu", "TPU v5", "tpu-v5p"),
    ],
)
def test_devices_are_recognised_by_their_names(platform, name, expected):
    assert recognise_kind(platform, name) is KINDS[expected]


def test_what_is_not_known_is_measured_here(monkeypatch):
    for name in ("measure_flops", "measure_bandwidth", "measure_hashing"):
        monkeypatch.setattr(hardware_module, name, lambda: 7.0)
    kind = recognise_kind("cpu", "cpu")
    assert (kind.name, kind.matmul.value, kind.hash.origin) == ("cpu", 7.0, "measured")


def test_rates_of_this_host_are_those_of_a_machine():
    figures = measure_host().figures
    assert all(1e6 < figures[name].value < 1e15 for name in ("matmul", "bandwidth", "hash"))


def test_every_figure_says_where_it_comes_from_and_none_of_a_kind_elsewhere_is_measured():
    for kind in KINDS.values():
        assert all(figure.value > 0 and figure.source for figure in kind.figures.values())
        assert {figure.origin for figure in kind.figures.values()} <= {"published", "derived", "assumed"}
        assert kind.share.origin == kind.compilation.origin == kind.read.origin == "assumed"
    assert KINDS["tpu-v5e"].matmul.value == pytest.approx(197e12 / 6)


@pytest.mark.parametrize("method", ["average", "rgsp", "relative"])
def test_more_devices_never_take_longer_to_compute(method):
    stages = [predict(make_planner(method), TPU, Layout(1, n, 1))["stages"] for n in (1, 2, 3, 4, 8)]
    assert all(b["compute"] <= a["compute"] for a, b in itertools.pairwise(stages))
    assert all(b["move"] <= a["move"] for a, b in itertools.pairwise(stages))
    assert stages[-1]["compute"] <= stages[0]["compute"] / 4
    assert len({s["read"] for s in stages}) == 1  # one thread reads for all of them


def test_more_hosts_divide_what_is_read():
    found = {n: predict(make_planner("average"), TPU, Layout(n, 1, n)) for n in (1, 2, 4)}
    assert found[1]["seconds"] > found[2]["seconds"] > found[4]["seconds"]
    for n in (2, 4):
        assert found[n]["stages"]["read"] == pytest.approx(found[1]["stages"]["read"] / n, rel=0.2)


def test_processes_of_one_host_share_its_disk():
    apart, together = (predict(make_planner("average"), TPU, Layout(4, 1, hosts))["stages"] for hosts in (4, 1))
    assert together["read"] == pytest.approx(4 * apart["read"], rel=1e-4)


def test_simulated_devices_share_the_arithmetic_of_their_host():
    planner = make_planner(shared=True)
    one, eight = (predict(planner, HOST, Layout(1, n, 1))["stages"]["compute"] for n in (1, 8))
    assert eight == pytest.approx(one, rel=1e-4)
    crowd = predict(planner, HOST, Layout(2, 1, 1))["stages"]["compute"]
    assert crowd == pytest.approx(one, rel=0.3)  # half the work, at half the rate; items are cut anew


@pytest.mark.parametrize("method", ["average", "rgsp"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_never_below_amounts_over_rates(method, kind):
    planner = make_planner(method)
    plan = planner(None)
    for layout in (Layout(1, 1, 1), Layout(1, 8, 1), Layout(4, 2, 4)):
        found = predict(planner, kind, layout, model_bytes=10**12)
        assert found["seconds"] >= plan.bytes_in / kind.read.value / layout.hosts
        assert found["seconds"] >= plan.bytes_out / kind.write.value / layout.hosts
        assert found["seconds"] >= 10**12 / kind.hash.value / layout.processes
        flops = plan.flops if method == "rgsp" else 0.0
        assert found["seconds"] >= flops / kind.matmul.value / (layout.processes * layout.devices)
        assert found["seconds"] >= max(found["stages"].values()) * (1 - 1e-6)
        assert sum(row["bytes_read"] for row in found["by_process"]) == plan.bytes_in
        assert sum(row["bytes_written"] for row in found["by_process"]) == plan.bytes_out


def test_the_bottleneck_is_what_a_faster_one_would_help():
    slow = replace(TPU, read=Figure(1e6, "B/s", "assumed", "a slow disk"))
    found = predict(make_planner("average"), slow, Layout(1, 4, 1))
    assert found["bottleneck"] == "read"
    faster = predict(make_planner("average"), replace(slow, matmul=TPU.matmul), Layout(1, 8, 1))
    assert faster["seconds"] == pytest.approx(found["seconds"], rel=0.01)
    slow = replace(TPU, share=Figure(1e-9, "", "assumed", "hardly any"))
    assert predict(make_planner("rgsp"), slow, Layout(1, 4, 1))["bottleneck"] == "compute"


def test_eight_devices_with_work_for_five():
    """Five matrices of one shape on eight devices: three devices have nothing, as everywhere else padding says."""
    planner = make_planner("rgsp", layers=5, inner=512, words=0)
    five = planner([f"model.layers.{i}.self_attn.q_proj.weight" for i in range(5)])
    slow = replace(TPU, share=Figure(1e-9, "", "assumed", "so that nothing else counts"))
    found = predict(lambda names: five, slow, Layout(1, 8, 1))
    assert found["padding_share"] == pytest.approx(3 / 8)
    assert found["idle_share"] == pytest.approx(3 / 8, abs=0.01)
    even = predict(lambda names: five, slow, Layout(1, 5, 1))
    assert even["padding_share"] == 0 and even["idle_share"] < 0.01
    assert predict(lambda names: five, TPU, Layout(1, 5, 1))["idle_share"] > 0.9  # there, the disk is waited for


def test_matrices_too_large_for_a_device_are_named_and_divided():
    planner = make_planner("rgsp", layers=2, width=2048, inner=8192)
    small = replace(TPU, memory=Figure(300e6, "B", "assumed", "a small device"))
    found = predict(planner, small, Layout(1, 4, 1))
    assert found["divided"] == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    assert found["memory_per_device"] <= 300e6
    assert predict(planner, TPU, Layout(1, 4, 1))["divided"] == []
    with pytest.raises(RefusedError, match="divide it over several --devices"):
        predict(planner, small, Layout(1, 1, 1))
    assert place_planned(planner(None), Devices(4, 10**9), small).device_memory == 10**9


def test_waves_overlap_as_they_are_executed():
    """Reading is a wave ahead, writing a wave behind."""
    waves = [Times(2.0, 0.0, 3.0, 1.0, 0.0)] * 4
    assert run_waves(waves) == 2 + 4 * 3 + 1
    assert run_waves([Times(3.0, 1.0, 1.0, 1.0, 0.0)] * 4) == 4 * 3 + 2 + 1
    assert run_waves([Times(1.0, 0.5, 0.5, 4.0, 0.0)] * 4) == 1 + 1 + 4 * 4
    assert run_waves([]) == 0
    assert run_waves([Times(1.0, 2.0, 3.0, 4.0, 0.0)]) == 10


def test_layouts():
    assert lay_out_devices(TPU, None, None) == Layout(1, 1, 1)
    assert lay_out_devices(TPU, 4, None) == Layout(1, 4, 1)
    assert lay_out_devices(TPU, 16, None) == Layout(4, 4, 4)
    assert lay_out_devices(TPU, 8, 2) == Layout(2, 8, 2)
    assert lay_out_devices(TPU, None, 2) == Layout(2, 4, 2)
    assert lay_out_devices(HOST, 6, None) == Layout(1, 6, 1)
    with pytest.raises(RefusedError, match="--devices 10: hosts of tpu-v5e have 4 devices each"):
        lay_out_devices(TPU, 10, None)
    for devices, processes in ((0, None), (0, 2)):
        with pytest.raises(RefusedError, match="--devices 0: give 1 or more"):
            lay_out_devices(TPU, devices, processes)


def test_memory_that_no_host_has_is_refused():
    with pytest.raises(RefusedError, match="--memory"):
        predict(make_planner(memory=200 * 10**9), TPU, Layout(1, 4, 1))


def test_models_of_seventy_billion_on_sixteen_chips():
    """The figure of the README is made: four hosts of four, whole matrices on a chip, even work."""
    specs = plan_70b.list_specs()
    assert sum(int(np.prod(spec.shape)) for spec in specs.values()) == 68_976_648_192
    found = plan_70b.predict("rgsp", 2, TPU, 16, 100 * 10**9)
    assert (found["processes"], found["devices_per_process"], found["divided"]) == (4, 4, [])
    assert found["memory_per_device"] <= 0.9 * 16e9 and found["memory_per_process"] <= 100e9
    assert found["imbalance"] < 1.1
    assert {"share", "read", "write", "transfer", "compilation"} <= set(found["assumed"])
