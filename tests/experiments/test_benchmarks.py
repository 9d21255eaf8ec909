"""What the benchmarks do with what they measure."""

import json
import os
import sys

import numpy as np
import pytest

from experiments.benchmarks import __main__ as everything
from experiments.benchmarks import growth, svd, whole_merge
from experiments.benchmarks.decoders import DEPARTURE, Decoder, draw_family, make_decoders
from experiments.benchmarks.processes import Measured, measure
from rgsp_jax.checkpoint import open_checkpoint


def test_the_decoder_has_as_many_parameters_as_it_says(tmp_path):
    assert round(Decoder().parameters / 1e9, 2) == 0.39
    small = Decoder(layers=2, width=28, hidden=40, vocabulary=50)
    directories = make_decoders(tmp_path, small, 2)
    with open_checkpoint(directories[1]) as checkpoint:
        assert sum(spec.size for spec in checkpoint.specs.values()) == small.parameters
        assert {spec.dtype.name for spec in checkpoint.specs.values()} == {"bfloat16"}
        found = checkpoint.read("model.layers.1.mlp.up_proj.weight").astype(np.float32)
    number = list(small.shapes).index("model.layers.1.mlp.up_proj.weight")
    family = [x.astype(np.float32) for x in draw_family((40, 28), number, 2)]
    np.testing.assert_array_equal(found, family[1])
    apart = np.linalg.norm(family[0] - family[1]) / np.linalg.norm(family[0])
    assert 0.5 < apart / (np.sqrt(2) * DEPARTURE) < 2
    before = os.stat(directories[0] / "model.safetensors").st_mtime_ns
    make_decoders(tmp_path, small, 2)
    assert os.stat(directories[0] / "model.safetensors").st_mtime_ns == before


def test_a_command_is_measured_with_what_it_starts(tmp_path):
    child = "x = bytearray(60_000_000); import time; time.sleep(0.5)"
    parent = f"import subprocess, sys; x = bytearray(60_000_000); subprocess.run([sys.executable, '-c', {child!r}])"
    found = measure([sys.executable, "-c", parent], dict(os.environ), tmp_path / "log")
    assert found.peak > 120_000_000 and found.wall > 0.5 and found.cpu > 0
    with pytest.raises(SystemExit, match="out of order"):
        measure([sys.executable, "-c", "raise SystemExit('out of order')"], dict(os.environ), tmp_path / "log")


def test_ratios_are_taken_within_a_round_and_without_the_first():
    above = [Measured(99, 9, 1), Measured(4, 3, 10), Measured(12, 6, 10), Measured(5, 5, 30)]
    below = [Measured(1, 1, 1), Measured(1, 1, 5), Measured(2, 1, 5), Measured(5, 5, 5)]
    assert whole_merge.compare(above, below)["wall"] == 4.0
    less = [Measured(9, 9, 9), Measured(1, 1, 1), Measured(2, 1, 1), Measured(1, 1, 1)]
    assert whole_merge.compare(above, below, less)["wall"] == 3.0
    assert whole_merge.compare(above, below, less)["peak"] == 2.0


def test_targets_are_judged():
    report = {"ratios": {"a / b": {"wall": 3.5}}, "contenders": {"a": {"wall": 61.0}}}
    least = whole_merge.Target("a over b", whole_merge.read_ratio("a", "b"), least=4)
    most = whole_merge.Target("seconds of a", whole_merge.read_median("a", "wall"), most=61)
    assert least.judge(report) == {"target": "a over b", "bound": "at least 4", "found": 3.5, "met": False}
    assert most.judge(report)["met"]
    assert whole_merge.Target("absent", whole_merge.read_ratio("c", "b"), least=4).judge(report) is None


def test_exponents_are_slopes_of_logarithms():
    x = [1.0, 2.0, 5.0, 9.0]
    assert growth.fit_exponent(x, [3 * value**1.7 for value in x]) == pytest.approx(1.7)
    points = growth.list_points(["rank"], 2e9)
    assert [p.rank for p in points if p.method == "rgsp"] == list(growth.RANKS)
    assert [p.rank for p in growth.keep_ends(points) if p.method == "rgsp"] == [growth.RANKS[0], growth.RANKS[-1]]


def test_an_equal_excess_is_what_torch_is_compared_at():
    case = svd.Case(8, 8, 2, "task_vector", 5.0, 15.0)
    rows = {
        "auto": {"ratio_to_full": 6.0, "sigma_error": 1e-7, "excess": 0.0},
        "auto tolerance 1e-2": {"ratio_to_full": 16.0, "sigma_error": 1e-3, "excess": 1e-4},
        "torch svd_lowrank 2": {"ratio_to_full": 40.0, "sigma_error": 1e-2, "excess": 1e-2},
        "torch svd_lowrank 8": {"ratio_to_full": 10.0, "sigma_error": 1e-3, "excess": 1e-4},
    }
    assert svd.find_misses(case, rows) == []
    rows["torch svd_lowrank 8"]["ratio_to_full"] = 17.0
    assert svd.find_misses(case, rows) == [f"{case.name} at excess 0.0003, torch"]
    rows["auto"]["sigma_error"] = 1e-5
    assert svd.find_misses(case, rows)[0] == case.name


def test_all_benchmarks_are_modules_with_their_flags(tmp_path, monkeypatch, capsys):
    for one in everything.BENCHMARKS:
        command = one.command(tmp_path, tmp_path, check=True)
        module = everything.Path(everything.__file__).with_name(f"{one.name}.py")
        text = module.read_text()
        assert all(f'"{flag}"' in text for flag in command[3:] if flag.startswith("--"))
    with pytest.raises(SystemExit, match="needs --work"):
        next(one for one in everything.BENCHMARKS if one.work).command(None, tmp_path, check=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--list"])
    assert everything.main() == 0
    assert all(one.name in capsys.readouterr().out for one in everything.BENCHMARKS[:1])


def test_records_are_of_these_scripts():
    """Every target of the record is judged by the numbers that are in it."""
    report = json.loads(whole_merge.RESULTS.read_text())
    judged = [row for target in whole_merge.TARGETS if (row := target.judge(report)) is not None]
    assert judged == report["targets"]
    assert whole_merge.RESULTS.with_suffix(".md").read_text() == whole_merge.render(report)
