"""Integers and constants of the architecture: never merged, passed on or refused."""

import json

import numpy as np
import pytest

from pipeline.toy_models import read_model, same_bits, toy_family, write_family
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints

pytestmark = pytest.mark.usefixtures("plain_report")

BUFFERS = {
    "bn.num_batches_tracked": np.asarray(7, np.int64),
    "encoder.rotary_emb.inv_freq": np.linspace(0, 1, 5, dtype=np.float32),
    "attn.masked_bias": np.asarray(-1e4, np.float32),
    "vocab_map": np.arange(6, dtype=np.int32),
    "causal": np.tri(4, dtype=np.bool_),
}


def family_with(**changes):
    """Two siblings with buffers; the second with these changed."""
    first, second = toy_family(2)
    return [first | BUFFERS, second | BUFFERS | changes]


def flags_of(directory):
    return {r["name"]: r["flags"] for r in map(json.loads, (directory / "report.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_equal_buffers_pass(tmp_path, dtype):
    family = family_with()
    config = MergeConfig(models=write_family(tmp_path, family), method="average", dtype=dtype)
    result = merge_checkpoints(config, tmp_path / "out")
    merged = read_model(result.out)
    for name, buffer in BUFFERS.items():
        if buffer.dtype.kind != "f" or dtype is None:
            assert same_bits(merged[name], buffer)
        else:
            assert merged[name].dtype.name == dtype
    assert result.flag_counts == {}


def test_known_counters_and_constants_may_differ_and_are_flagged(tmp_path):
    family = family_with(
        **{"bn.num_batches_tracked": np.asarray(9, np.int64), "attn.masked_bias": np.float32(-1e9)[()].reshape(())}
    )
    config = MergeConfig(models=write_family(tmp_path, family), method="average")
    result = merge_checkpoints(config, tmp_path / "out")
    merged = read_model(result.out)
    assert merged["bn.num_batches_tracked"] == 7 and merged["attn.masked_bias"] == np.float32(-1e4)
    flagged = {name for name, flags in flags_of(result.out).items() if flags == ["buffer_differs"]}
    assert flagged == {"bn.num_batches_tracked", "attn.masked_bias"}
    assert result.flag_counts == {"buffer_differs": 2}


def test_other_integers_that_differ_are_refused_all_at_once(tmp_path):
    family = family_with(vocab_map=np.arange(6, dtype=np.int32)[::-1].copy(), causal=~BUFFERS["causal"])
    models = write_family(tmp_path, family)
    with pytest.raises(RefusedError) as refusal:
        merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert len(refusal.value.problems) == 2
    for name, dtype in (("vocab_map", "int32"), ("causal", "bool")):
        assert any(
            f"tensor {name!r} holds {dtype} values that differ" in p
            and models[0] in p
            and models[1] in p
            and "--exclude" in p
            for p in refusal.value.problems
        )
    assert not (tmp_path / "out.incomplete").exists()
    config = MergeConfig(models=models, method="average", exclude=("vocab_map", "causal"))
    merged = read_model(merge_checkpoints(config, tmp_path / "out").out)
    assert same_bits(merged["vocab_map"], BUFFERS["vocab_map"]) and same_bits(merged["causal"], BUFFERS["causal"])


def test_only_the_values_of_integers_must_agree(tmp_path):
    family = family_with(vocab_map=np.arange(6, dtype=np.int64))
    config = MergeConfig(models=write_family(tmp_path, family), method="average")
    assert read_model(merge_checkpoints(config, tmp_path / "out").out)["vocab_map"].dtype == np.int32
    family = family_with(vocab_map=np.arange(1, 7, dtype=np.int64))
    with pytest.raises(RefusedError, match="'vocab_map' holds int32 values that differ"):
        merge_checkpoints(MergeConfig(models=write_family(tmp_path / "x", family), method="average"), tmp_path / "no")


def test_integers_in_one_model_and_numbers_in_another_are_refused(tmp_path):
    family = family_with(vocab_map=np.arange(6, dtype=np.float32))
    with pytest.raises(RefusedError, match="'vocab_map' is float32"):
        merge_checkpoints(MergeConfig(models=write_family(tmp_path, family), method="average"), tmp_path / "out")
