"""`rgsp convert` as a shell sees it."""

import json

import pytest

from checkpoint.builders import write_model
from checkpoint.zoo import make_model, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(make_model("gpt2"), tmp_path_factory.mktemp("cli") / "gpt2")


def test_help(rgsp):
    assert "convert" in rgsp("--help").out
    outcome = rgsp("convert", "--help")
    assert outcome.code == 0 and all(flag in outcome.out for flag in ("--to", "--style", "--dtype", "--allow-unmapped"))


def test_there_and_back(rgsp, model, tmp_path):
    outcome = rgsp("convert", model, tmp_path / "flax", "--to", "flax")
    assert outcome.code == 0 and "28 tensors" in outcome.out and "nnx" in outcome.out
    outcome = rgsp("convert", tmp_path / "flax", tmp_path / "back", "--to", "huggingface", "--json")
    assert outcome.code == 0 and json.loads(outcome.out)["tensors"] == 28
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    outcome = rgsp("convert", model, tmp_path / "half", "--to", "huggingface", "--dtype", "bfloat16")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert outcome.code == 0 and config["dtype"] == "bfloat16"
    outcome = rgsp("convert", model, tmp_path / "many", "--to", "huggingface", "--max-shard-size", "4kB")
    assert outcome.code == 0 and len(list((tmp_path / "many").glob("*.safetensors"))) > 1


def test_refusals_come_all_at_once_and_leave_nothing(rgsp, model, tmp_path):
    toy = write_model(tmp_path / "toy")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    options = ("--to", "huggingface", "--style", "linen", "--allow-unmapped", "--max-shard-size", "many")
    outcome = rgsp("convert", model, tmp_path / "out", *options)
    assert outcome.code == 2 and len(outcome.problems) == 3
    outcome = rgsp("convert", toy, tmp_path / "full", "--to", "flax")
    assert outcome.code == 2 and len(outcome.problems) == 2
    assert "not empty" in outcome.problems[0] and "'toy'" in outcome.problems[1]
    outcome = rgsp("convert", model, tmp_path / "out", "--to", "flax", "--max-shard-size", "1GB")
    assert outcome.code == 2 and "--max-shard-size is for --to huggingface" in outcome.err
    outcome = rgsp("convert", tmp_path / "gone", tmp_path / "out", "--to", "flax")
    assert outcome.code == 2 and "does not exist" in outcome.err
    assert sorted(tmp_path.iterdir()) == before


def test_unmapped_keys_are_listed(rgsp, tmp_path):
    import numpy as np

    gpt2 = make_model("gpt2")
    weights = {name: tensor.numpy() for name, tensor in gpt2.state_dict().items() if name != "lm_head.weight"}
    source = write_model(tmp_path / "model", weights | {"probe": np.ones(3)}, config=gpt2.config.to_dict())
    outcome = rgsp("convert", source, tmp_path / "flax", "--to", "flax")
    assert outcome.code == 2 and "'probe'" in outcome.err and "--allow-unmapped" in outcome.err
    outcome = rgsp("convert", source, tmp_path / "flax", "--to", "flax", "--allow-unmapped")
    assert outcome.code == 0 and "unmapped: probe" in outcome.out
