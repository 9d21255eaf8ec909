"""Cutting and dealing: every tensor in one part, no file too large, the work even."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.toy_models import SHAPES
from rgsp_jax.checkpoint import TensorSpec
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, plan_merge
from rgsp_jax.pipeline.parts import (
    Cut,
    Load,
    cut_parts,
    deal,
    describe_parts,
    imbalance,
    pack,
    predict,
    read_cut,
    to_json,
    weigh,
)

LOADS = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 100)), min_size=1, max_size=60).map(
    lambda pairs: [Load(f"t{i}", size, seconds) for i, (size, seconds) in enumerate(pairs)]
)


@given(LOADS, st.integers(1, 1500), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_every_tensor_is_in_one_part_of_allowed_size(loads, max_bytes, processes):
    cut = cut_parts(loads, max_bytes, processes)
    assert sorted(name for names in cut.parts for name in names) == sorted(load.name for load in loads)
    position = {load.name: i for i, load in enumerate(loads)}
    size = {load.name: load.bytes_out for load in loads}
    for names in cut.parts:
        assert names and list(names) == sorted(names, key=position.get)
        assert sum(size[name] for name in names) <= max_bytes or len(names) == 1
    assert len(cut.parts) % processes == 0 or len(cut.parts) == len(loads) or len(cut.parts) < len(loads)
    assert cut == cut_parts(loads, max_bytes, processes)
    assert cut.numbers == {name: i for i, names in enumerate(cut.parts) for name in names}


@given(LOADS, st.integers(1, 9))
@settings(max_examples=100, deadline=None)
def test_as_many_parts_as_processes_where_size_is_no_matter(loads, processes):
    loads = [Load(load.name, load.bytes_out, load.seconds + 1) for load in loads]
    cut = cut_parts(loads, 10**9, processes)
    assert len(cut.parts) == min(processes, len(loads))


@given(st.lists(st.floats(0, 100), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_dealing_is_even(seconds, processes):
    """Whoever ends last had least when it took its last part."""
    dealt = deal(seconds, processes)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(len(seconds)))
    busy = [math.fsum(seconds[number] for number in numbers) for numbers in dealt]
    mean, longest = math.fsum(seconds) / processes, max(seconds)
    assert max(busy) <= mean + longest * (1 - 1 / processes) + 1e-9
    assert all(numbers == sorted(numbers) for numbers in dealt)


def test_dealing_by_hand():
    """Longest first: 7 | 6 | 5, then 4 joins 5, 3 joins 6, 2 joins 7, and 1 whoever is first at 9."""
    assert deal([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 3) == [[0, 1, 6], [2, 5], [3, 4]]
    assert deal([1.0], 3) == [[0], [], []]
    assert deal([0.0, 0.0], 2) == [[0], [1]]


def test_a_part_takes_no_tensor_that_passes_its_limit():
    loads = [Load("a", 9, 3.0), Load("b", 9, 2.0), Load("c", 2, 1.0)]
    assert pack(loads, 10, 2) is None
    assert pack(loads, 11, 2) == [["a"], ["b", "c"]]
    assert cut_parts(loads, 10, 2) == Cut((("a",), ("b",), ("c",)))
    assert cut_parts(loads, 5, 1) == Cut((("a",), ("b",), ("c",)))  # two that are larger, and the rest


def test_imbalance_is_the_largest_over_the_mean():
    assert imbalance([1.0, 1.0, 4.0]) == 2
    assert imbalance([0.0, 5.0]) == 2
    assert imbalance([3.0, 3.0]) == imbalance([0.0, 0.0]) == 1


@pytest.fixture
def plan():
    specs = {name: TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in SHAPES.items()}
    config = MergeConfig(models=("a", "b"), method="rgsp", hyperparameters={"rank": 3}, exclude=("stem.*",))
    return plan_merge(config, [specs, specs])


def test_a_tensor_weighs_its_bytes_and_its_arithmetic(plan):
    word, excluded = plan.tasks["embeddings.word_embeddings.weight"], plan.tasks["stem.conv.weight"]
    matrix = plan.tasks["encoder.layer.0.intermediate.dense.weight"]
    assert weigh(word).bytes_out == 4 * word.size and weigh(excluded).bytes_out == 4 * excluded.size
    assert weigh(excluded).seconds == pytest.approx(8 * excluded.size / 0.8e9)  # read from one model and written
    assert weigh(matrix).seconds > 3 * 4 * matrix.size / 0.8e9
    assert weigh(matrix).seconds == weigh(plan.tasks["encoder.layer.1.intermediate.dense.weight"]).seconds


def test_equal_layers_are_dealt_over_all_parts(plan):
    loads = {name: weigh(task) for name, task in plan.tasks.items()}
    cut = cut_parts([load for name, load in loads.items() if "layer" in name], 10**9, 2)
    first, second = (sorted(loads[name].seconds for name in names) for names in cut.parts)
    assert first == second
    assert imbalance(predict(cut, loads)) < 1.01


def test_what_every_process_would_do_is_described(plan):
    rows = describe_parts(plan, 10**9, 3)
    assert [row["process"] for row in rows] == [0, 1, 2]
    assert sorted(number for row in rows for number in row["parts"]) == [1, 2, 3]
    assert sum(row["tensors"] for row in rows) == len(plan.tasks)
    assert sum(row["bytes_in"] for row in rows) == plan.bytes_in
    assert sum(row["bytes_out"] for row in rows) == plan.bytes_out
    assert sum(row["load"] for row in rows) == pytest.approx(3, abs=1e-3)
    idle = describe_parts(plan, 10**9, 50)
    assert sum(not row["parts"] for row in idle) == 50 - len(plan.tasks)


def test_a_cut_is_read_as_it_was_noted(tmp_path):
    cut = Cut((("ä", "b"), ("c",)))
    (tmp_path / "parts.json").write_text(to_json(cut, "mark"))
    assert read_cut(tmp_path / "parts.json") == ("mark", cut)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"parts": []}', json.dumps({"fingerprint": "x", "parts": 3})])
def test_a_damaged_cut_is_refused(tmp_path, text):
    (tmp_path / "parts.json").write_text(text)
    with pytest.raises(RefusedError, match="cannot be read"):
        read_cut(tmp_path / "parts.json")
