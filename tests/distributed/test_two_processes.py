"""Two processes on this machine write what one does, each its own share of it."""

import json
import shlex
from pathlib import Path

import pytest

from distributed.team import Special, finish, start, start_team
from pipeline.toy_models import read_model, same_bits, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import hash_file, open_checkpoint

SETTINGS = """
    -m average --override '*intermediate.dense.weight method=relative rank=3' --exclude *query*
    --max-shard-size 2kB --json
"""
"""One kernel that decomposes, for one shape, so that little is compiled."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("parents"), toy_family(3, dtypes=("float32", "bfloat16", "float32")))


def read_log(path: Path) -> dict[str, int]:
    """Tensor -> bytes read of it, over all models."""
    read: dict[str, int] = {}
    for line in path.read_text().splitlines():
        _, name, size = json.loads(line)
        read[name] = read.get(name, 0) + size
    return read


def test_two_processes_write_what_one_does(tmp_path, models):
    """Equal tensors and report; every byte of a tensor that is merged is read by one process alone, and counted."""
    settings = [*models, *shlex.split(SETTINGS)]
    alone = start([*settings, "-o", tmp_path / "alone"])
    logs = [tmp_path / f"reads{i}" for i in range(2)]
    specials = {i: Special(["--log", log]) for i, log in enumerate(logs)}
    team = start_team([*settings, "-o", tmp_path / "out"], 2, specials)
    (code, printed, errors), (other_code, other_printed, other_errors) = finish(team)
    assert (code, other_code, errors, other_errors, other_printed) == (0, 0, [], [], "")
    assert finish([alone])[0][0] == 0
    expected, found = read_model(tmp_path / "alone"), read_model(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(same_bits(expected[name], found[name]) for name in expected)
    assert (tmp_path / "out/report.jsonl").read_bytes() == (tmp_path / "alone/report.jsonl").read_bytes()

    result = json.loads(printed)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) % 2 == 0 and len(names) > 2 and sorted(result["files"]) == names
    assert result["files"] == {name: hash_file(tmp_path / "out" / name) for name in names}
    summary = json.loads((tmp_path / "out/merge_summary.json").read_text())
    assert summary["files"] == result["files"]
    parents = [dict(parent["files"])["model.safetensors"] for parent in summary["parents"]]
    assert parents == [hash_file(Path(model) / "model.safetensors") for model in models]
    for name in names:
        with open_checkpoint(tmp_path / "out" / name) as shard:
            assert shard.nbytes <= 2000 or len(shard.specs) == 1

    first, second = (read_log(log) for log in logs)
    buffers = {"embeddings.position_ids"}
    assert (first.keys() | second.keys()) - buffers == {n for n, x in found.items() if x.size} - buffers
    assert not first.keys() & second.keys()
    work = result["processes"]
    assert work == json.loads((tmp_path / "out/merge_processes.json").read_text())
    assert work["processes"] == 2 and work["parts"] == len(names)
    merged = [sum(size for name, size in log.items() if name not in buffers) for log in (first, second)]
    copied = found["embeddings.position_ids"].nbytes
    assert sorted(b - m for b, m in zip(work["bytes_read"], merged, strict=True)) == [0, copied]
    assert sum(work["bytes_read"]) == result["bytes_in"]
    assert sum(work["bytes_hashed"]) == sum((Path(model) / "model.safetensors").stat().st_size for model in models)
    assert [p.name for p in tmp_path.glob("*.incomplete")] == []
    there, usual = set(tree_bytes(tmp_path / "out")), set(tree_bytes(tmp_path / "alone"))
    assert {name for name in there ^ usual if not name.startswith("model-")} == {"merge_processes.json"}
