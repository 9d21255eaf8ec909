"""Grafts through the pipeline: every matrix by its own inputs, the recipient for the rest, proof in the report."""

import json
from collections.abc import Mapping

import numpy as np
import pytest

from pipeline.toy_models import MATRICES, read_model, same_bits, toy_family, tree_bytes, write_family
from rgsp_jax.checkpoint import digest, write_covariances
from rgsp_jax.checkpoint.covariance_file import DataRecord, Site
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, Override, describe_plan, merge_checkpoints, prepare
from rgsp_jax.pipeline.merge import Journal

DATA = (DataRecord("rows", "0" * 64, 30, 10),)
UNCOVERED = ("stem.conv.weight", "moe.experts.down_proj", "encoder.layer.1.output.dense.weight")
SKETCHED = "encoder.layer.0.output.dense.weight"
QUERY, OUTPUT = (f"encoder.layer.0.attention.{name}.weight" for name in ("self.query", "output.dense"))


def inputs_of(name: str, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of inputs that made the covariance, and rows held back."""
    rng = np.random.default_rng(len(name))
    rows = (rng.normal(size=(50, width)) * np.geomspace(3, 0.1, width)).astype(np.float32)
    return rows[:40], rows[40:]


def collect(path, model: Mapping[str, np.ndarray], skip=UNCOVERED, names: Mapping[str, str] | None = None):
    """A covariance file of the matrices: the query shares its site with another weight, one site is a sketch.

    `names` are those of the model's own, where it has others than the toy model.
    """
    sites, tensors = [], {}
    weights = {name: shape for name, shape in MATRICES.items() if name not in skip}
    for number, (name, (_, width)) in enumerate(weights.items()):
        if name == OUTPUT:
            continue  # shares the query's
        shared = [QUERY, OUTPUT] if name == QUERY else [name]
        kind = "sketch" if name == SKETCHED else "full"
        site = Site(name, {(names or {}).get(n, n): digest(model[n]) for n in shared}, kind, width, 40)
        seen, held_back = inputs_of(name, width)
        parts = {"mean": seen.mean(0), "held_back": held_back[: 10 - number % 3]}
        covariance = seen.T @ seen / len(seen)
        if kind == "full":
            parts["covariance"] = covariance
        else:
            values, basis = np.linalg.eigh(covariance.astype(np.float64))
            leading = (np.sqrt(values[-6:]) * basis[:, -6:]).T
            parts |= {"sketch": leading.astype(np.float32), "trace": np.float32(np.trace(covariance))}
        sites.append(site)
        tensors |= {f"{name}.{part}": np.asarray(array, np.float32) for part, array in parts.items()}
    write_covariances(path, "a", DATA, sites, tensors)
    return str(path)


@pytest.fixture
def family():
    return toy_family(2)


@pytest.fixture
def config(tmp_path, family):
    paths = write_family(tmp_path, family)
    covariances = collect(tmp_path / "cov.safetensors", family[0])
    return MergeConfig(models=paths, method="graft", covariances=(covariances,))


def soft(a, b, c, ridge):
    shift = ridge * np.trace(c) / len(c)
    return a + shift * (b - a) @ np.linalg.inv(c + shift * np.eye(len(c)))


def records_of(out):
    return {r["name"]: r for r in map(json.loads, (out / "report.jsonl").read_text().splitlines())}


def test_every_matrix_is_grafted_through_its_own_inputs(tmp_path, family, config):
    rules = (
        Override(pattern="encoder.layer.1.*query*", hyperparameters={"energy": 0.9}),
        Override(pattern="encoder.layer.1.intermediate*", hyperparameters={"ridge": 0.5}),
    )
    config = config.model_copy(update={"hyperparameters": {"ridge": 2.0}, "overrides": rules})
    result = merge_checkpoints(config, tmp_path / "out")
    merged, records = read_model(result.out), records_of(result.out)
    a, b = ({name: x.astype(np.float64) for name, x in model.items()} for model in family)
    for name in merged:
        if name not in MATRICES or name in UNCOVERED:
            assert same_bits(merged[name], family[0][name]), name
            continue
        seen, held_back = inputs_of(QUERY if name == OUTPUT else name, a[name].shape[1])
        c = seen.astype(np.float64).T @ seen / len(seen)
        if name == SKETCHED:
            values, basis = np.linalg.eigh(c)
            values[:-6] = values[:-6].mean()  # all that a sketch knows of them is their sum
            c = basis * values @ basis.T
        expected = soft(a[name], b[name], c, 0.5 if "1.intermediate" in name else 2.0)
        if "1.attention.self.query" in name:
            values, basis = np.linalg.eigh(c)
            shares = np.cumsum(values[::-1]) / values.sum()
            basis = basis[:, ::-1][:, : np.searchsorted(shares, 0.9) + 1]
            expected = b[name] - (b[name] - a[name]) @ basis @ basis.T
        np.testing.assert_allclose(merged[name], expected, atol=2e-5, err_msg=name)
        stats = records[name]["stats"]
        rows = held_back[: np.flatnonzero(np.abs(held_back).sum(1))[-1] + 1]
        assert stats["donor_share"] == pytest.approx(
            np.linalg.norm(expected - a[name]) / np.linalg.norm(b[name] - a[name]), rel=1e-3
        )
        number = [n for n in MATRICES if n not in UNCOVERED].index(QUERY if name == OUTPUT else name)
        rows = held_back[: 10 - number % 3].astype(np.float64)
        ratio = np.linalg.norm((expected - a[name]) @ rows.T) / np.linalg.norm((b[name] - a[name]) @ rows.T)
        assert stats["output_change"] == pytest.approx(ratio, rel=1e-3)
    assert result.flag_counts["no_covariance"] == len(UNCOVERED)
    assert all(records[name]["rule"] == "uncovered" for name in UNCOVERED)
    page = (result.out / "report.html").read_text()
    assert "disturbance left, held back" in page and "No covariance" in page
    card = (result.out / "README.md").read_text()
    for text in (page, card):
        assert "30 inputs of rows, 10 more held back" in text.replace("<wbr>", "")
    assert "| ridge | 2 |" in card and "energy" not in card.split("## Parents")[0]


def test_an_interrupted_graft_ends_as_if_nothing_had_happened(tmp_path, config, small_items, plain_report, monkeypatch):
    expected = tree_bytes(merge_checkpoints(config, tmp_path / "out").out)
    (tmp_path / "out").rename(tmp_path / "whole")
    record, done = Journal.record, []

    def stop(self, index, records):
        record(self, index, records)
        done.append(index)
        if len(done) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        merge_checkpoints(config, tmp_path / "out")
    result = merge_checkpoints(config, tmp_path / "out", resume=True)
    assert result.resumed_items == 3
    assert tree_bytes(result.out) == expected


def test_the_plan_counts_covariances(config):
    with prepare(config) as preparation:
        described = describe_plan(preparation)
        with_inputs = preparation.plan
    rules = {(rule["rule"], rule["method"]): rule["tensors"] for rule in described["rules"]}
    assert rules["uncovered", "copy"] == len(UNCOVERED) and ("vector", "average") not in rules
    assert rules["matrix", "graft"] == len(MATRICES) - len(UNCOVERED)
    graft = [task for task in with_inputs.tasks.values() if task.method == "graft"]
    weights = sum(task.size * 8 if task.action != "copy" else task.size * 4 for task in graft)
    assert with_inputs.bytes_in > weights
    assert {task.inputs.held_back for task in graft} <= {8, 9, 10}


def refused(config, out):
    with pytest.raises(RefusedError) as caught:
        merge_checkpoints(config, out)
    assert not out.exists() and not out.with_name(out.name + ".incomplete").exists()
    return caught.value.problems


def test_covariances_of_another_model_are_refused(tmp_path, family, config):
    other = collect(tmp_path / "other.safetensors", family[1])
    problems = refused(config.model_copy(update={"covariances": (other,)}), tmp_path / "out")
    assert len(problems) == len(MATRICES) - len(UNCOVERED)
    assert all("was made with another model" in problem for problem in problems)


def test_covariances_of_other_names_and_shapes_are_refused(tmp_path, family, config):
    renamed = {f"x.{name}" if name == QUERY else name: x for name, x in family[0].items()}
    site = Site("x", {f"x.{QUERY}": digest(renamed[f"x.{QUERY}"])}, "full", 8, 40)
    arrays = {"covariance": np.eye(8), "mean": np.zeros(8), "held_back": np.zeros((2, 8))}
    write_covariances(
        tmp_path / "names.safetensors", "x", DATA, [site], {f"x.{k}": v.astype("f4") for k, v in arrays.items()}
    )
    (problem,) = refused(
        config.model_copy(update={"covariances": (str(tmp_path / "names.safetensors"),)}), tmp_path / "out"
    )
    assert "has no 'x.encoder.layer.0.attention.self.query.weight'" in problem
    site = Site("y", {QUERY: digest(family[0][QUERY])}, "full", 5, 40)
    arrays = {"covariance": np.eye(5), "mean": np.zeros(5), "held_back": np.zeros((2, 5))}
    write_covariances(
        tmp_path / "shapes.safetensors", "y", DATA, [site], {f"y.{k}": v.astype("f4") for k, v in arrays.items()}
    )
    (problem,) = refused(
        config.model_copy(update={"covariances": (str(tmp_path / "shapes.safetensors"),)}), tmp_path / "out"
    )
    assert problem.startswith(f"{QUERY} [8, 8] takes inputs of 8, its covariance is 5")


def test_settings_that_cannot_be_are_named(tmp_path, config):
    bad = {"hyperparameters": {"ridge": 1.0, "energy": 0.5}, "covariances": ()}
    problems = refused(config.model_copy(update=bad), tmp_path / "out")
    assert any("takes one of energy, ridge, not several" in problem for problem in problems)
    assert any(
        "needs 1 or 2 --covariances (of the models in their order, see `rgsp covariances`), not 0" in p
        for p in problems
    )
    (problem,) = refused(config.model_copy(update={"method": "average"}), tmp_path / "out")
    assert problem == "--covariances: method average uses none; leave them out"
    (problem,) = refused(config.model_copy(update={"covariances": ("nowhere",)}), tmp_path / "out")
    assert problem.startswith("nowhere does not exist")
