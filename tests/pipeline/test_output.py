"""The directory a merge leaves: complete, described, reproducible, and nothing beside it."""

import json
import math

import numpy as np
import pytest
import yaml

from pipeline.toy_models import COMPANIONS, CONFIG, read_model, same_bits, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import digest, hash_file, open_checkpoint
from rgsp_jax.pipeline import MergeConfig, Override, merge_checkpoints, parse_config, read_config_file

OWN = {"README.md", "merge_config.yaml", "merge_summary.json", "report.html", "report.jsonl"}
RECORD_KEYS = {
    "name", "shape", "dtype", "rule", "method", "hyperparameters", "stats", "flags", "relative_change", "digest",
}  # fmt: skip


def read_lines(directory):
    return [json.loads(line) for line in (directory / "report.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def average(tmp_path_factory):
    """One plain merge of three models: parents, their tensors, the result."""
    place = tmp_path_factory.mktemp("average")
    family = toy_family(3)
    config = MergeConfig(models=write_family(place, family), method="average", dtype="bfloat16")
    return place, family, merge_checkpoints(config, place / "out")


def test_everything_a_model_needs_is_there_and_nothing_else(average):
    place, family, result = average
    assert result.out == place / "out"
    assert set(tree_bytes(result.out)) == {"model.safetensors", "config.json", *COMPANIONS, *OWN}
    assert all((result.out / name).read_text() == text for name, text in COMPANIONS.items())
    assert sorted(p.name for p in place.iterdir()) == ["a", "b", "c", "out"]
    with open_checkpoint(result.out) as model:
        assert list(model.specs) == list(open_checkpoint(place / "a").specs)
        assert model.metadata["format"] == "pt"
    assert read_model(result.out).keys() == family[0].keys()


def test_config_says_the_dtype_of_the_weights_and_keeps_the_rest(average):
    config = json.loads((average[2].out / "config.json").read_text())
    expected = {**CONFIG, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "hidden_size": 8}}
    assert config == expected


def test_config_is_copied_byte_for_byte_where_it_is_right(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(2))
    out = merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out").out
    assert (out / "config.json").read_bytes() == (tmp_path / "a/config.json").read_bytes()


def test_result_counts_what_was_done(average):
    _, family, result = average
    floats = sum(x.nbytes for x in family[0].values() if x.dtype.kind == "f")
    integers = family[0]["embeddings.position_ids"].nbytes
    assert (result.method, result.tensors, result.resumed_items) == ("average", len(family[0]), 0)
    assert sum(result.counts_by_rule.values()) == result.tensors
    assert result.counts_by_rule["embedding: average"] == 1
    assert result.bytes_in == 3 * floats + integers
    assert result.bytes_out == floats // 2 + integers
    assert result.files == {"model.safetensors": hash_file(result.out / "model.safetensors")}
    assert result.seconds > 0


def test_report_lines_say_what_numpy_says(average):
    _, family, result = average
    merged = read_model(result.out)
    lines = read_lines(result.out)
    assert [line["name"] for line in lines] == list(open_checkpoint(result.out).specs)
    for line in lines:
        assert set(line) == RECORD_KEYS
        tensor = merged[line["name"]]
        assert (line["shape"], line["dtype"]) == (list(tensor.shape), tensor.dtype.name)
        assert line["digest"] == digest(tensor)
        if line["method"] == "copy":
            assert line["relative_change"] == []
            continue
        parents = [model[line["name"]].astype(np.float64) for model in family]
        expected = [
            np.linalg.norm((tensor.astype(np.float64) - p).ravel()) / np.linalg.norm(p.ravel()) for p in parents
        ]
        np.testing.assert_allclose(line["relative_change"], expected, rtol=1e-5)
    assert {line["rule"] for line in lines} == {"matrix", "vector", "embedding", "buffer"}


def test_report_lines_hold_stats_flags_and_settings_of_every_matrix(tmp_path, toy_methods, plain_report):
    family = toy_family(2)
    names = ["stem.conv.weight", "moe.experts.down_proj"]
    override = Override(pattern="moe.*", hyperparameters={"strength": 2.0})
    config = MergeConfig(models=write_family(tmp_path, family), method="tilt", include=names, overrides=(override,))
    result = merge_checkpoints(config, tmp_path / "out")
    merged, lines = read_model(result.out), {line["name"]: line for line in read_lines(result.out)}
    conv, experts = (lines[name] for name in names)
    assert (conv["hyperparameters"], experts["hyperparameters"]) == ({}, {"strength": 2.0})
    assert conv["stats"]["corner"] == pytest.approx(float(merged[names[0]].flat[0]), rel=1e-6)
    assert len(conv["stats"]["slope"]) == 2
    assert experts["stats"]["corner"] == pytest.approx(merged[names[1]][:, 0, 0].tolist(), rel=1e-6)
    assert np.shape(experts["stats"]["slope"]) == (3, 2)
    assert "falling" not in {**conv["stats"], **experts["stats"]}
    slopes = [
        np.reshape(merged[n] - family[0][n], (-1, 6 if n == names[0] else 8, 18 if n == names[0] else 20))
        for n in names
    ]
    expected = {n: ["falling"] if (s[:, 0, -1] < 0).any() else [] for n, s in zip(names, slopes, strict=True)}
    assert {n: lines[n]["flags"] for n in names} == expected
    assert result.flag_counts == {"falling": sum(map(len, expected.values()))}
    assert all(line["rule"] == "excluded" for name, line in lines.items() if name not in names)


def test_change_against_a_model_of_zeros_has_no_number(tmp_path, plain_report):
    models = write_family(tmp_path, [{"w.bias": np.full(3, x, np.float32)} for x in (0.0, 1.0)], config=None)
    out = merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out").out
    assert read_lines(out)[0]["relative_change"] == [None, 0.5]


def test_summary_names_parents_files_and_versions(average):
    place, _, result = average
    summary = json.loads((result.out / "merge_summary.json").read_text())
    assert [parent["label"] for parent in summary["parents"]] == [str(place / k) for k in "abc"]
    assert summary["parents"][1]["files"] == [["model.safetensors", hash_file(place / "b/model.safetensors")]]
    assert summary["files"] == result.files
    assert (summary["method"], summary["dtype"], summary["output_name"]) == ("average", "bfloat16", "out")
    assert {"rgsp_jax", "jax", "numpy"} <= set(summary["versions"])
    assert summary["parameters"] == sum(t.size for t in read_model(result.out).values())
    card = (result.out / "README.md").read_text()
    assert "average" in card and summary["parents"][0]["files"][0][1] in card


def test_page_stands_alone(average):
    page = (average[2].out / "report.html").read_text()
    assert "encoder.layer.0" in page.replace("<wbr>", "") and "<svg" in page
    assert "src=" not in page.replace('src="data:', "") and "<link" not in page


def test_the_config_written_reproduces_the_same_bytes(average, tmp_path):
    result = average[2]
    path = result.out / "merge_config.yaml"
    config = parse_config(read_config_file(path), str(path))
    again = merge_checkpoints(config, tmp_path / "out")
    assert tree_bytes(again.out) == tree_bytes(result.out)


def test_the_config_written_keeps_every_setting_that_matters(tmp_path, toy_methods, plain_report):
    models = write_family(tmp_path, toy_family(2))
    config = MergeConfig(
        models=models,
        method="tilt",
        base=None,
        hyperparameters={"strength": 0.125},
        include=("encoder.*",),
        exclude=("*bias", "re:layer\\.1"),
        overrides=(
            Override(pattern="*query*", method="jitter"),
            Override(pattern="*dense*", hyperparameters={"strength": 3}),
        ),
        dtype="float16",
        max_shard_size=1000,
        memory=123_456_789,
        seed=11,
    )
    out = merge_checkpoints(config, tmp_path / "out").out
    written = yaml.safe_load((out / "merge_config.yaml").read_text())
    assert "memory" not in written  # it decides no byte
    assert parse_config(written, "file") == config.model_copy(update={"memory": MergeConfig(models=()).memory})


def test_shards_follow_the_limit_and_the_index_names_them(tmp_path, plain_report):
    family = toy_family(2)
    models = write_family(tmp_path, family)
    limit = 3000
    result = merge_checkpoints(MergeConfig(models=models, method="average", max_shard_size=limit), tmp_path / "out")
    index = json.loads((result.out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(result.files) == files == sorted(p.name for p in result.out.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in family[0].values())
    for file in files:
        tensors = read_model(result.out / file)
        assert set(tensors) == {name for name, where in index["weight_map"].items() if where == file}
        assert sum(x.nbytes for x in tensors.values()) <= limit or len(tensors) == 1
    whole = merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "whole").out
    sharded = read_model(result.out)
    assert all(same_bits(tensor, sharded[name]) for name, tensor in read_model(whole).items())


def test_sharded_parents_merge_like_whole_ones(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(2))
    cut = MergeConfig(models=[models[0]], method="average", max_shard_size=3000)
    shards = str(merge_checkpoints(cut, tmp_path / "shards").out)
    out = [
        merge_checkpoints(MergeConfig(models=pair, method="average"), tmp_path / f"out{i}").out
        for i, pair in enumerate((models, [shards, models[1]]))
    ]
    whole, other = map(read_model, out)
    assert all(same_bits(whole[name], other[name]) for name in whole)


def test_a_merge_can_be_merged_again(average, tmp_path, plain_report):
    place, _, result = average
    models = [str(result.out), str(place / "a")]
    again = merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out")
    summary = json.loads((again.out / "merge_summary.json").read_text())
    assert summary["parents"][0]["label"] == str(result.out)
    assert set(tree_bytes(again.out)) == set(tree_bytes(result.out))


def test_an_empty_directory_may_be_there(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(2))
    (tmp_path / "out").mkdir()
    merge_checkpoints(MergeConfig(models=models, method="average"), str(tmp_path / "out"))
    assert (tmp_path / "out/config.json").exists()


def test_progress_counts_every_byte_once(tmp_path, plain_report, small_items):
    models = write_family(tmp_path, toy_family(2))
    seen = []
    result = merge_checkpoints(
        MergeConfig(models=models, method="average"), tmp_path / "out", progress=lambda *event: seen.append(event)
    )
    assert [e[0] for e in seen] == sorted((e[0] for e in seen), reverse=True)  # merge, then audit
    for stage, total in (("merge", result.bytes_in + result.bytes_out), ("audit", result.bytes_out)):
        events = [event for event in seen if event[0] == stage]
        assert math.fsum(event[1] for event in events) == total
        assert {event[2] for event in events} == {total}
        assert {name for event in events for name in event[3]} == set(read_model(result.out))


def test_different_tokenizers_are_warned_of(tmp_path, plain_report):
    models = write_family(tmp_path, toy_family(2))
    (tmp_path / "b/tokenizer.json").write_text('{"version": "2.0"}')
    result = merge_checkpoints(MergeConfig(models=models, method="average"), tmp_path / "out")
    assert len(result.warnings) == 1
    assert "tokenizer.json" in result.warnings[0] and models[1] in result.warnings[0]
