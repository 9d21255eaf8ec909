"""A merge over several devices of one process is the merge on one: waves, padding, resuming, memory, traces."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import Counter

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from jax.sharding import Mesh

from pipeline import toy_methods
from pipeline.test_grafting import SKETCHED, collect
from pipeline.toy_models import HIDDEN, INNER, read_model, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import TensorSpec
from rgsp_jax.cli import cli
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, Override, describe_plan, execute, merge_checkpoints, plan_merge, prepare
from rgsp_jax.pipeline.execute import compute_item
from rgsp_jax.pipeline.journal import Journal
from rgsp_jax.pipeline.kernels import LAYERS, compile_item, split_static
from rgsp_jax.pipeline.placement import COMPILER, Placement, place_merge, size_of
from rgsp_jax.pipeline.plan import CHUNK, step_rows
from rgsp_jax.registry import methods
from rgsp_jax.types import InputStatistics

pytestmark = pytest.mark.usefixtures("plain_report")

FIVE = r"re:moe\.|layer\.\d\.output\.dense"
"""Two matrices and a stack of three, all [8, 20]."""
MIXED = dict(
    method="tilt",
    overrides=(
        Override(pattern="encoder.layer.?.output.dense*", method="jitter"),
        Override(pattern="*bias", method="jitter_elements"),
    ),
    exclude=("*LayerNorm*", "*intermediate*weight", "stem*"),
    dtype="bfloat16",
)
"""Every action, with keys and a cast."""
COLLECTIVE = re.compile(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-(permute|broadcast)|ragged")


def merge_on(devices, place, models, **settings):
    """The directory of a merge on so many devices, always under one name."""
    place.mkdir(exist_ok=True)
    return merge_checkpoints(MergeConfig(models=models, **settings), place / "out", devices=devices).out


def weights_of(directory):
    return {name: bytes_ for name, bytes_ in tree_bytes(directory).items() if name.endswith(".safetensors")}


def plan_of(shapes, count=2, **settings):
    specs = {name: TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in shapes.items()}
    return plan_merge(MergeConfig(models=tuple("abcdefgh"[:count]), **settings), [specs] * count)


@pytest.mark.usefixtures("toy_methods")
@pytest.mark.parametrize("elements", [160, 1 << 22], ids=["many items", "one item a group"])
def test_every_kind_of_item_is_the_same_on_any_number_of_devices(tmp_path, monkeypatch, elements):
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", elements)
    models = write_family(tmp_path, toy_family(3, dtypes=["float32", "bfloat16"]))
    expected = tree_bytes(merge_on(None, tmp_path / "one", models, **MIXED))
    for devices in (8, 3):
        found = tree_bytes(merge_on(devices, tmp_path / str(devices), models, **MIXED))
        assert found.keys() == expected.keys()
        assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.usefixtures("toy_methods")
def test_bases_and_double_precision(tmp_path):
    *models, base = write_family(tmp_path, toy_family(4, dtypes=["float64", "float32"]))
    settings = dict(method="arithmetic_elements", base=base, overrides=(Override(pattern=FIVE, method="arithmetic"),))
    one, eight = (weights_of(merge_on(n, tmp_path / f"on{n}", models, **settings)) for n in (1, 8))
    assert one == eight


def largest_difference(one, other):
    """Of two checkpoints' tensors, relative to each tensor's largest entry."""
    left, right = read_model(one), read_model(other)
    assert left.keys() == right.keys()
    return max(
        np.abs(left[name].astype(np.float64) - right[name].astype(np.float64)).max()
        / np.abs(left[name].astype(np.float64)).max()
        for name, x in left.items()
        if x.size and x.dtype.kind in "fV"  # bfloat16 is of numpy's kind V
    )


SPECTRAL = {
    "relative": dict(hyperparameters={"rank": 2}),
    "dare": dict(base="d"),
    "graft": dict(covariances=1),
    "regmean": dict(covariances=3),
    "rgsp": dict(hyperparameters={"rank": 2}),
    "tsv_m": dict(base="d"),
    "karcher": {},
}
SLOW = ("rgsp", "tsv_m", "karcher")


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SPECTRAL]
)
def test_methods_agree_to_rounding(tmp_path, method):
    settings = dict(SPECTRAL[method])
    family = toy_family(4)
    paths = write_family(tmp_path, family)
    models = paths[: methods[method].models[1] or 3]
    if "base" in settings:
        settings["base"] = paths[3]
    if "covariances" in settings:
        settings["covariances"] = tuple(
            collect(tmp_path / f"{k}.safetensors", family[k], skip=("stem.conv.weight", SKETCHED))
            for k in range(settings["covariances"])
        )
    settings |= dict(method=method, include=(FIVE,))
    one, eight = (merge_on(n, tmp_path / f"on{n}", models, **settings) for n in (None, 8))
    assert largest_difference(one, eight) <= 4 * np.finfo(np.float32).eps
    first, second = (
        [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()] for out in (one, eight)
    )
    assert [record["name"] for record in first] == [record["name"] for record in second]
    assert [record["flags"] for record in first] == [record["flags"] for record in second]


@pytest.mark.usefixtures("toy_methods", "small_items")
@pytest.mark.parametrize(("begin", "finish"), [(8, 1), (1, 8), (8, 3)])
def test_begun_on_some_devices_and_finished_on_others(tmp_path, monkeypatch, begin, finish):
    models = write_family(tmp_path, toy_family(3))
    expected = tree_bytes(merge_on(1, tmp_path / "whole", models, **MIXED))
    place = tmp_path / "broken"
    original, calls = Journal.record, []

    def stop(self, index, records):
        calls.append(index)
        if len(calls) == 6:
            raise KeyboardInterrupt
        original(self, index, records)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", stop)
        with pytest.raises(KeyboardInterrupt):
            merge_on(begin, place, models, **MIXED)
    config = MergeConfig(models=models, **MIXED)
    result = merge_checkpoints(config, place / "out", resume=True, devices=finish)
    assert result.resumed_items == 5
    assert tree_bytes(result.out) == expected


def test_an_item_lost_from_the_middle_is_a_wave_of_its_own(tmp_path, small_items):
    models = write_family(tmp_path, toy_family(2))
    plan = plan_merge_of(models, method="average")
    pending = [item for item in plan.items if item.index not in (3, 4, 9)]
    waves = list(place_merge(plan, devices=4).waves(pending))
    assert [item.index for wave in waves for item in wave.items] == [item.index for item in pending]


def plan_merge_of(models, **settings):
    with prepare(MergeConfig(models=models, **settings)) as preparation:
        return preparation.plan


def count_real(share):
    """Matrices, or chunks, of a device."""
    if not share.pieces:
        return 0
    last = share.pieces[-1]
    rows = 1 if share.group.action == "matrices" else -(-last.size // 1024)
    return -(-(last.slot + rows) // step_rows(share.group))


@pytest.mark.parametrize("method", ["relative", "average"])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_devices_are_balanced_and_nothing_is_lost(monkeypatch, method, devices):
    for elements in (1 << 14, 1 << 16, 1 << 22):
        monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", elements)
        for count in (1, 2, 5, 9, 17, 40):
            plan = plan_of({f"l.{i}.weight": (64, 48 + i * (method == "average")) for i in range(count)}, method=method)
            placement = place_merge(plan, devices=devices)
            waves = list(placement.waves(plan.items))
            assert [item for wave in waves for item in wave.items] == list(plan.items)
            for wave in waves:
                real = [count_real(share) for share in wave.shares]
                assert sum(real) == wave.used
                assert max(real) - min(real) <= 1
                assert max(real) <= wave.steps
                assert len({share.capacity for share in wave.shares}) == 1
                assert pieces_of(wave.shares) == pieces_of(wave.items)
            # No more steps than the fullest device of the best division has, and the waves' own ends.
            total = sum(item.steps for item in plan.items)
            assert sum(wave.steps for wave in waves) == -(-total // devices)
            assert len({(len(wave.shares), wave.steps) for wave in waves}) <= 2


def pieces_of(parts):
    """Every flat element range of every tensor, joined where one follows the other."""
    found = {}
    for part in parts:
        for piece in part.pieces:
            ranges = found.setdefault(piece.name, [])
            if ranges and ranges[-1][1] == piece.start:
                ranges[-1] = (ranges[-1][0], piece.start + piece.size)
            else:
                ranges.append((piece.start, piece.start + piece.size))
    return found


@pytest.mark.parametrize("method", ["relative", "rgsp", "average"])
def test_waves_keep_to_the_memory(method):
    shapes = {f"l.{i}.weight": (512, 384) for i in range(23)} | {"emb_tokens.weight": (20_000, 64)}
    least = plan_of(shapes, method=method, memory=1).peak_memory
    seen = set()
    for factor in (1, 1.5, 2, 4, 7, 20, 300):
        plan = plan_of(shapes, method=method, memory=int(least * factor))
        assert plan.problems == ()
        placement = place_merge(plan, devices=8)
        assert placement.peak_memory(plan) <= plan.memory
        for wave in placement.waves(plan.items):
            if method == "rgsp" and wave.group.action == "matrices" and len(wave.shares) > 1:
                assert placement.count_bytes(wave.group, size_of(wave)) + COMPILER <= plan.memory
        seen.add(max(len(wave.shares) for wave in placement.waves(plan.items)))
        assert place_merge(plan, devices=1).peak_memory(plan) == plan.peak_memory
    assert min(seen) < 8 and max(seen) == 8


def test_devices_without_work_repeat_a_matrix(tmp_path, small_items):
    """The last wave keeps the others' shape where that needs no compilation, and no value in it is made up."""
    models = write_family(tmp_path, toy_family(2))
    with prepare(MergeConfig(models=models, method="relative", include=(FIVE,))) as preparation:
        plan = preparation.plan
        items = [item for item in plan.items if item.group.matrix == (HIDDEN, INNER)]
        assert [item.capacity for item in items] == [1] * 5
        *_, wave = place_merge(plan, devices=3).waves(items)
        assert [len(share.pieces) for share in wave.shares] == [1, 1, 0]
        sources = execute.read_wave(plan, wave, preparation.checkpoints)
    assert all(x is y for x, y in zip(sources[0].weights, sources[2].weights, strict=True))
    assert len({x.tobytes() for own in sources for x in own.weights}) == 4


def test_one_compilation_for_each_shape_of_wave(tmp_path, monkeypatch):
    traced, calls = [], []

    def counted(stack, strength: toy_methods.Strength = 0.5):
        traced.append(stack.shape)
        return toy_methods.tilt(stack, strength)

    tilt = toy_methods.EXTENDED["tilt"]
    registry = {**toy_methods.EXTENDED, "tilt": type(tilt)("tilt", counted, tilt.summary, models=tilt.models)}
    for name in toy_methods.USERS:
        monkeypatch.setattr(f"rgsp_jax.pipeline.{name}.methods", registry)
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", HIDDEN * INNER)
    compile_item.cache_clear()
    models = write_family(tmp_path, toy_family(3))
    run = execute.run_item
    monkeypatch.setattr(execute, "run_item", lambda *given: calls.append(given) or run(*given))
    merge_on(4, tmp_path / "four", models, method="tilt")
    shapes = {(group.key, sources[0].shape) for group, sources, *_ in calls if group.method == "tilt"}
    assert len(traced) == len(shapes)
    assert max(Counter(key for key, _ in shapes).values()) <= 2
    # Five matrices [8, 20] on four devices take two waves; of three each, as four and one would take as long.
    five = [sources[0].shape for group, sources, *_ in calls if group.matrix == (HIDDEN, INNER)]
    assert five == [(3, HIDDEN, INNER)] * 2
    traced.clear()
    compile_item.cache_clear()
    merge_on(1, tmp_path / "one", models, method="tilt")
    assert len(traced) == len({group.key for group, *_ in calls if group.method == "tilt"})
    compile_item.cache_clear()


@pytest.mark.parametrize(("method", "shape"), [("relative", (8, 24, 16)), ("average", (8 * CHUNK, 1024))])
def test_devices_exchange_nothing(method, shape):
    mesh = Mesh(np.array(jax.devices()[:8]), (LAYERS,))
    static, traced = split_static(methods[method], {"rank": 3} if method == "relative" else {})
    action = "matrices" if method == "relative" else "elements"
    kernel = compile_item(action, method, static, np.dtype(np.float32), False, mesh)
    stack = tuple(jax.ShapeDtypeStruct(shape, np.float32) for _ in range(3))
    salts = jax.ShapeDtypeStruct((shape[0], 2), np.uint32)
    text = kernel.lower(stack, traced, salts, np.uint32(0), InputStatistics()).compile().as_text()
    assert "num_partitions=8" in text
    assert COLLECTIVE.findall(text) == []


def test_reading_ahead_and_writing_behind(tmp_path, monkeypatch):
    """Every wave is computed while the next is read and the last is written: each waits for the others here."""
    monkeypatch.setattr("rgsp_jax.pipeline.plan.ITEM_ELEMENTS", CHUNK * 1024)
    tensors = {"w.weight": np.ones((200, 1024), np.float32)}
    models = write_family(tmp_path, [tensors, tensors])
    plan = plan_merge_of(models, method="average")
    waves = len(list(place_merge(plan, devices=2).waves(plan.items)))
    assert waves == 7
    ahead, behind = (threading.Barrier(2, timeout=60) for _ in range(2))

    def meet(owner, name, meetings):
        """Make the call with number i wait at the barriers that are given for it."""
        original, calls = getattr(owner, name), []

        def patient(*given):
            calls.append(name)
            for barrier in meetings(len(calls)):
                barrier.wait()
            return original(*given)

        monkeypatch.setattr(owner, name, patient)

    meet(execute, "read_wave", lambda i: [ahead] if i > 1 else [])
    meet(execute, "compute_wave", lambda i: [ahead] * (i < waves) + [behind] * (i > 1))
    meet(execute, "write_items", lambda i: [behind] if i < waves else [])
    out = merge_on(2, tmp_path / "out", models, method="average")
    assert (read_model(out)["w.weight"] == 1).all()


def test_a_computation_of_ones_own_gets_items_one_by_one(tmp_path, small_items):
    models = write_family(tmp_path, toy_family(2))
    seen = []

    def compute(plan, item, sources, seed, with_base):
        seen.append(item.index)
        return compute_item(plan, item, sources, seed, with_base)

    config = MergeConfig(models=models, method="average")
    (tmp_path / "own").mkdir()
    found = merge_checkpoints(config, tmp_path / "own/out", compute=compute, devices=8).out
    assert seen == [item.index for item in plan_merge_of(models, method="average").items]
    assert tree_bytes(found) == tree_bytes(merge_on(None, tmp_path / "plain", models, method="average"))


def test_devices_that_are_not_there_are_refused(tmp_path):
    models = write_family(tmp_path, toy_family(2))
    for count, words in ((9, "this process has 8 cpu devices"), (0, "give 1 or more"), (-2, "give 1 or more")):
        with pytest.raises(RefusedError) as refusal:
            merge_on(count, tmp_path / "refused", models, method="average")
        (problem,) = refusal.value.problems
        assert problem.startswith(f"--devices {count}: ") and words in problem
        assert count < 1 or f"XLA_FLAGS=--xla_force_host_platform_device_count={count}" in problem
    assert list((tmp_path / "refused").iterdir()) == []


def test_the_command_takes_devices(tmp_path):
    models = write_family(tmp_path, toy_family(2))
    options = ["merge", *models, "--method", "average", "--devices"]
    done = CliRunner().invoke(cli, [*options, "8", "--plan", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert (found["devices"], found["platform"]) == (8, "cpu")
    (elements,) = (row for row in found["groups"] if row["method"] == "average")
    assert elements["devices"] == min(8, -(-sum_of_blocks() // CHUNK))
    assert elements["slots_per_device"] % CHUNK == 0 and 0 <= elements["idle_share"] < 1
    assert "idle" in CliRunner().invoke(cli, [*options, "8", "--plan"]).output
    (tmp_path / "x").mkdir()
    done = CliRunner().invoke(cli, [*options, "3", "--out", str(tmp_path / "x/out")])
    assert done.exit_code == 0, done.output
    assert tree_bytes(tmp_path / "x/out") == tree_bytes(merge_on(1, tmp_path / "y", models, method="average"))


def sum_of_blocks():
    """Of the toy model's floating-point tensors."""
    return sum(-(-x.size // 1024) for x in toy_family(1)[0].values() if x.dtype.kind == "f" and x.size)


def test_the_plan_says_what_devices_hold(tmp_path):
    models = write_family(tmp_path, toy_family(2))
    with prepare(MergeConfig(models=models, method="relative", include=(FIVE,), exclude=("*bias",))) as preparation:
        plan = preparation.plan
        found = describe_plan(preparation, place_merge(plan, devices=4))
        assert found["peak_memory"] == place_merge(plan, devices=4).peak_memory(plan)
        assert place_merge(plan, devices=1).peak_memory(plan) == plan.peak_memory
    (row,) = (row for row in found["groups"] if row["matrix"] == [HIDDEN, INNER])
    assert (row["items"], row["waves"], row["devices"], row["slots_per_device"]) == (
        1,
        1,
        3,
        2,
    )  # of five: two, two, one
    assert row["idle_share"] == pytest.approx(3 / 8)


def test_accelerators_keep_what_they_work_on_themselves():
    """Their memory is not the host's: waves of more matrices fit."""
    plan = plan_of({f"l.{i}.weight": (512, 384) for i in range(16)}, method="relative", memory=40_000_000)

    class Device:
        platform = "tpu"

    there, here = (Placement((kind,) * 8, plan.memory) for kind in (Device(), jax.devices()[0]))
    most = [max(len(wave.shares) for wave in placement.waves(plan.items)) for placement in (there, here)]
    assert most[0] > most[1]
    assert there.peak_memory(plan) <= plan.memory


@pytest.mark.slow
@pytest.mark.parametrize("options", [("average",), ("slerp", "--device-memory", "1MB")], ids=["waves", "divided"])
def test_processes_of_several_devices_each(tmp_path, options):
    """Every process uses its own devices alone, also where JAX knows those of all."""
    models = write_family(tmp_path, toy_family(2))
    with socket.socket() as probe:
        probe.bind(("", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    simulated = "--xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": simulated, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "from rgsp_jax.cli import main; main()", "merge", *models, "--method", *options]
    command += ["--out", str(tmp_path / "both"), "--devices", "2", "--distributed", "--coordinator", meeting]
    command += ["--processes", "2", "--process"]
    team = [
        subprocess.Popen([*command, number], env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]
    for process in team:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    alone = merge_on(None, tmp_path / "alone", models, method=options[0])
    assert largest_difference(alone, tmp_path / "both") <= 4 * np.finfo(np.float32).eps
