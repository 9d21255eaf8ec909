"""Models of other architectures merged through a map of their names."""

import re

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from pipeline.test_grafting import SKETCHED, collect
from pipeline.toy_models import (
    CONFIG,
    MATRICES,
    read_model,
    same_bits,
    toy_family,
    tree_bytes,
    write_family,
    write_model,
)
from rgsp_jax.checkpoint import RenamedCheckpoint, open_checkpoint
from rgsp_jax.cli import cli
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, parse_config, prepare
from rgsp_jax.pipeline.config import KeyMap

pytestmark = pytest.mark.usefixtures("plain_report")
OWN = "stem.conv.weight"
"""Only the first model has it."""
MAP = {
    "rename": {
        r"tower\.blocks\.(\d+)\.(.*)": r"encoder.layer.\1.\2",
        r"words": r"embeddings.word_embeddings.weight",
    },
    "keep": ["stem.*"],
    "drop": ["re:^audio\\."],
}


def rename(tensors):
    """The same weights as another architecture has them, with one tensor less and one more."""
    new = {re.sub(r"^encoder\.layer", "tower.blocks", name): x for name, x in tensors.items() if name != OWN}
    new["words"] = new.pop("embeddings.word_embeddings.weight")
    return new | {"audio.weight": np.ones((3, 2), np.float32)}


@pytest.fixture
def family():
    return toy_family(4)


@pytest.fixture
def models(tmp_path, family):
    """Two with names of their own architecture, then two with another's: the last is the base."""
    first = write_family(tmp_path, family[:2])
    other = {**CONFIG, "model_type": "other", "architectures": ["OtherModel"]}
    return first + [str(write_model(tmp_path / "cd"[i], rename(family[2 + i]), other)) for i in range(2)]


def test_names_apart_the_merge_is_the_same(tmp_path, family, models):
    plain = write_family(tmp_path / "plain", family)
    settings = {"method": "task_arithmetic", "hyperparameters": {"scale": 0.5}}
    expected = merge_checkpoints(
        MergeConfig(models=plain[:3], base=plain[3], exclude=(OWN,), **settings), tmp_path / "expected"
    )
    config = parse_config({"models": models[:3], "base": models[3], "key_map": MAP, **settings}, "test")
    merged = merge_checkpoints(config, tmp_path / "out")
    result, wanted = read_model(merged.out), read_model(expected.out)
    assert result.keys() == family[0].keys() == wanted.keys()
    assert all(same_bits(result[name], wanted[name]) for name in wanted)
    assert same_bits(result[OWN], family[0][OWN]) and not same_bits(result["logit_scale"], family[0]["logit_scale"])
    again = parse_config(yaml.safe_load((merged.out / "merge_config.yaml").read_text()), "test")
    assert again.key_map == KeyMap(**MAP)
    repeated = merge_checkpoints(again, tmp_path / "again")
    files = [tree_bytes(x.out) for x in (merged, repeated)]
    assert {n: b for n, b in files[0].items() if n.endswith(".safetensors")} == {
        n: b for n, b in files[1].items() if n.endswith(".safetensors")
    }


def test_methods_with_covariances_find_them_under_the_other_names(tmp_path, family, models):
    """A site of the second model is named by its own keys."""
    plain = write_family(tmp_path / "plain", family[:3:2])
    skip = ("moe.experts.down_proj", OWN, SKETCHED, *(name for name in MATRICES if "layer.1" in name))
    files = [collect(tmp_path / f"{i}.safetensors", family[2 * i], skip) for i in range(2)]
    other = {re.sub(r"^encoder\.layer", "tower.blocks", name): name for name in MATRICES if name not in skip}
    renamed = collect(tmp_path / "renamed.safetensors", family[2], skip, names={v: k for k, v in other.items()})
    with prepare(
        MergeConfig(models=plain, method="graft", covariances=files, exclude=(OWN,), hyperparameters={"ridge": 1.0})
    ) as expected:
        wanted = {name: task.inputs for name, task in expected.plan.tasks.items()}
    config = MergeConfig(
        models=[models[0], models[2]],
        method="graft",
        covariances=[files[0], renamed],
        key_map=KeyMap(**MAP),
        hyperparameters={"ridge": 1.0},
    )
    with prepare(config) as preparation:
        assert {name: task.inputs for name, task in preparation.plan.tasks.items()} == wanted
        assert sum(x is not None for x in wanted.values()) > 2
    wrong = config.model_copy(update={"covariances": tuple(files)})
    with pytest.raises(RefusedError, match="was made with another model"), prepare(wrong):
        pass


def test_what_is_not_mapped_is_refused_all_at_once(models):
    config = MergeConfig(models=[models[0], models[2]], key_map=KeyMap(rename=MAP["rename"]))
    with pytest.raises(RefusedError) as caught, prepare(config):
        pass
    assert [p for p in caught.value.problems if OWN in p and "lacks" in p]
    assert [p for p in caught.value.problems if "audio.weight" in p and "lacks" in p]
    assert len(caught.value.problems) == 2  # and nothing of the architecture's name, which the map answers for
    with pytest.raises(RefusedError, match="model_type other"), prepare(MergeConfig(models=[models[0], models[2]])):
        pass


def test_heads_are_compared_all_the_same(tmp_path, family, models):
    tensors = rename(family[2])
    other = write_model(tmp_path / "heads", tensors, {**CONFIG, "model_type": "other", "num_attention_heads": 4})
    first = write_model(tmp_path / "first", family[0], {**CONFIG, "num_attention_heads": 2})
    config = MergeConfig(models=[str(first), str(other)], key_map=KeyMap(**MAP))
    with pytest.raises(RefusedError, match="num_attention_heads"), prepare(config):
        pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rename": {"tower.(": "x"}}, r"'tower\.\('.*no regular expression"),
        ({"rename": {"tower": r"\1"}}, "no regular expression and template"),
        ({"keep": ["re:("]}, "no regular expression"),
        ({"rnames": {}}, "key_map.rnames: no such setting; there are rename, keep, drop"),
        ({"rename": {r"tower\.blocks\.\d+\.(.*)": r"encoder.layer.0.\1"}}, "would both be 'encoder.layer.0"),
        ({"drop": ["*"]}, "leaves nothing of"),
    ],
)
def test_maps_that_cannot_be(models, fields, message):
    with (
        pytest.raises(RefusedError, match=message),
        prepare(parse_config({"models": [models[0], models[2]], "key_map": fields}, "test")),
    ):
        pass


def test_the_command_reads_the_map_from_a_file(tmp_path, models):
    path = tmp_path / "map.yaml"
    path.write_text(yaml.safe_dump(MAP))
    found = CliRunner().invoke(
        cli, ["merge", *models[:3], "-m", "average", "--key-map", str(path), "--plan", "--json"], standalone_mode=False
    )
    assert found.exception is None and yaml.safe_load(found.output)["method"] == "average"


def test_a_renamed_checkpoint_reads_as_its_inner_one(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    torch.save({"a.in": shared, "a.out": shared, "a.rest": torch.ones(2, 2), "gone": shared}, tmp_path / "m.pt")
    with RenamedCheckpoint(
        open_checkpoint(tmp_path / "m.pt"), lambda n: None if n == "gone" else n.replace("a.", "b.")
    ) as renamed:
        assert list(renamed.specs) == ["b.in", "b.out", "b.rest"] and renamed.specs["b.in"].name == "b.in"
        assert dict(renamed.aliases) == {"b.out": "b.in"}
        np.testing.assert_array_equal(renamed.read("b.out"), shared.numpy())
        np.testing.assert_array_equal(renamed.read_block("b.in", (slice(1, 2), slice(0, 2))), [[3.0, 4.0]])
        assert renamed.read_many(["b.rest"])["b.rest"].shape == (2, 2)
