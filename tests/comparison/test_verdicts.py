"""What `compare_checkpoints` says of models whose history is known."""

import json

import ml_dtypes
import numpy as np
import pytest

from comparison.toy_transformer import CONFIG, ancestor, answer, as_float32, fine_tune, permute_neurons
from pipeline.toy_models import write_model
from rgsp_jax import RefusedError
from rgsp_jax.comparison import compare_checkpoints, write_comparison

BASE = ancestor(0)
MATRICES = [name for name, x in BASE.items() if x.ndim == 2]


@pytest.fixture
def compare(tmp_path):
    """Models as dictionaries -> their comparison."""

    def run(*models, memory=10**9, configs=None):
        paths = []
        for i, model in enumerate(models):
            config = configs[i] if configs else CONFIG
            paths.append(write_model(tmp_path / "abcdefgh"[i], model, config))
        return compare_checkpoints(paths, memory=memory)

    return run


def relations(comparison):
    return [pair.relation for pair in comparison.verdict.pairs]


def states(comparison, pair=0):
    found = {}
    for tensor in comparison.tensors:
        coordinates = tensor.pairs[pair].coordinates
        found[tensor.name] = coordinates and coordinates.state
    return found


def test_twins_compute_the_same():
    words = np.arange(20)
    for stream in (False, True):
        twin = permute_neurons(BASE, 1, stream=stream)
        assert not np.allclose(twin["layers.0.mlp.up.weight"], BASE["layers.0.mlp.up.weight"])
        np.testing.assert_allclose(answer(twin, words), answer(BASE, words), atol=1e-9)


def test_a_model_and_itself(compare):
    model = as_float32(BASE)
    comparison = compare(model, model)
    assert relations(comparison) == ["same"] and comparison.verdict.level == "good"
    assert "nothing to merge" in comparison.verdict.headline and comparison.verdict.rho == 0
    assert all(pair.equal and pair.relative_distance == 0 for t in comparison.tensors for pair in t.pairs)


def test_a_model_in_another_precision(compare):
    coarse = {name: x.astype(ml_dtypes.bfloat16) for name, x in BASE.items()}
    assert relations(compare(as_float32(BASE), coarse)) == ["rounded"]
    # The same distance without another dtype to explain it is a difference.
    assert relations(compare(as_float32(BASE), {n: x.astype(np.float32) for n, x in coarse.items()})) == ["siblings"]


@pytest.mark.parametrize("step", [0.01, 0.3])
def test_siblings(compare, step):
    models = [as_float32(fine_tune(BASE, seed, step)) for seed in range(3)]
    comparison = compare(*models)
    verdict = comparison.verdict
    assert relations(comparison) == ["siblings"] * 3
    assert verdict.families == ((0, 1, 2),) and verdict.odd == () and verdict.level == "good"
    stack = np.stack([np.concatenate([m[n].ravel() for n in MATRICES[1:]]) for m in models]).astype(np.float64)
    mean = stack.mean(0)
    rho = np.mean(np.linalg.norm(stack - mean, axis=1)) / np.linalg.norm(mean)
    assert verdict.rho == pytest.approx(rho, rel=1e-5)
    assert "relative" in verdict.advice[0]
    assert ("farther apart" in " ".join(verdict.advice)) == (rho > 0.097)
    pair = np.linalg.norm(stack[0] - stack[1]) / np.linalg.norm(stack[0] + stack[1])
    assert verdict.pairs[0].rho == pytest.approx(pair, rel=1e-5)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("step", [0.0, 0.05])
def test_a_permuted_twin(compare, stream, step):
    twin = permute_neurons(fine_tune(BASE, 7, step), 3, stream=stream)
    comparison = compare(as_float32(BASE), as_float32(twin))
    assert relations(comparison) == ["permuted"] and comparison.verdict.level == "serious"
    assert "order of their neurons" in comparison.verdict.headline and "match_weights" in comparison.verdict.advice[0]
    found = states(comparison)
    assert all(found[name] == "permuted" for name in MATRICES[1:])
    assert found["embed_tokens.weight"] == ("permuted" if stream else None if step == 0 else "shared")
    for tensor in comparison.tensors:
        coordinates = tensor.pairs[0].coordinates
        if coordinates and coordinates.state == "permuted":
            assert coordinates.matched > 0.9 > 0.5 > abs(coordinates.agreement)
            assert coordinates.through == (stream and tensor.name != "embed_tokens.weight")


def test_unrelated_models(compare):
    for seed in range(1, 4):
        comparison = compare(as_float32(BASE), as_float32(ancestor(seed)))
        assert relations(comparison) == ["unrelated"] and comparison.verdict.level == "serious"
        assert comparison.verdict.rho is None and comparison.verdict.pairs[0].rho == pytest.approx(1, abs=0.1)
        assert set(states(comparison).values()) == {"unlike", None}


def test_layers_decide_where_embeddings_are_shared(compare):
    stranger = ancestor(5) | {"embed_tokens.weight": BASE["embed_tokens.weight"]}
    assert relations(compare(as_float32(BASE), as_float32(stranger))) == ["unrelated"]


def test_the_odd_one_out(compare):
    siblings = [as_float32(fine_tune(BASE, seed, 0.02)) for seed in range(2)]
    comparison = compare(siblings[0], as_float32(ancestor(9)), siblings[1])
    assert relations(comparison) == ["unrelated", "siblings", "unrelated"]
    assert comparison.verdict.odd == (1,) and comparison.verdict.families == ((0, 2), (1,))
    assert comparison.verdict.level == "check"
    assert "A and C can be merged" in comparison.verdict.headline and "B belongs to none" in comparison.verdict.headline
    twin = as_float32(permute_neurons(fine_tune(BASE, 4, 0.02), 4))
    comparison = compare(siblings[0], siblings[1], twin)
    assert relations(comparison) == ["siblings", "permuted", "permuted"] and comparison.verdict.odd == (2,)
    far = as_float32(fine_tune(BASE, 5, 0.3))
    comparison = compare(siblings[0], siblings[1], far)
    assert set(relations(comparison)) == {"siblings"} and comparison.verdict.odd == (2,)
    assert "C is the odd one out" in " ".join(comparison.verdict.sentences)


def test_another_head_is_an_exception_and_a_missing_one_a_difference(compare):
    rng = np.random.default_rng(0)
    heads = [{"classifier.weight": rng.normal(size=(40, 32)).astype(np.float32)} for _ in range(2)]
    models = [as_float32(fine_tune(BASE, seed, 0.02)) for seed in range(2)]
    comparison = compare(models[0] | heads[0], models[1] | heads[1])
    assert relations(comparison) == ["siblings"] and comparison.verdict.level == "check"
    assert comparison.verdict.pairs[0].exceptions == ("classifier.weight",)
    comparison = compare(models[0] | heads[0], models[1])
    assert relations(comparison) == ["siblings"] and comparison.verdict.level == "check"
    assert len(comparison.differences) == 1 and "classifier.weight" in comparison.differences[0][2]
    assert "--exclude" in comparison.verdict.advice[-1] and "in common can be" in comparison.verdict.headline


def test_another_architecture(compare):
    other = {f"block.{name}": x for name, x in as_float32(ancestor(1)).items()}
    comparison = compare(as_float32(BASE), other, configs=[CONFIG, CONFIG | {"model_type": "other"}])
    assert relations(comparison) == ["architectures"] and comparison.verdict.level == "serious"
    assert any("model_type other" in text for _, _, text in comparison.differences)
    assert comparison.tensors == ()


def test_numbers_that_are_none(compare):
    models = [as_float32(fine_tune(BASE, seed, 0.02)) for seed in range(2)]
    models[1]["layers.1.mlp.up.weight"][3, 4] = np.nan
    comparison = compare(*models)
    assert relations(comparison) == ["siblings"] and comparison.verdict.level == "check"
    assert "NaN in layers.1.mlp.up.weight" in " ".join(comparison.verdict.sentences)


def test_little_memory_compares_part_of_the_rows(tmp_path, monkeypatch):
    from rgsp_jax.comparison import compare, tensors

    monkeypatch.setattr(compare, "LEAST_MEMORY", 0)  # far below what compiled kernels take
    monkeypatch.setattr(tensors, "OVERHEAD", 0)
    models = [as_float32(fine_tune(BASE, seed, 0.02)) for seed in range(2)] + [as_float32(ancestor(3))]
    paths = [write_model(tmp_path / "abc"[i], model) for i, model in enumerate(models)]
    few = compare.compare_checkpoints(paths, memory=45_000)
    assert {t.name for t in few.tensors if t.partial} == {n for n in MATRICES if np.prod(BASE[n].shape) * 44 > 45_000}
    assert relations(few) == ["siblings", "unrelated", "unrelated"]
    whole = compare.compare_checkpoints(paths)
    assert not any(t.partial for t in whole.tensors)
    assert [t.pairs[0].rho for t in few.tensors] == [t.pairs[0].rho for t in whole.tensors]


def test_refusals(tmp_path):
    model = write_model(tmp_path / "a", as_float32(BASE))
    with pytest.raises(RefusedError) as error:
        compare_checkpoints([tmp_path / "absent", tmp_path / "missing"], out=model / "inside", memory=1000)
    problems = error.value.problems
    assert len(problems) == 3 and "--memory" in problems[0]
    assert "absent" in problems[1] and "missing" in problems[2]
    with pytest.raises(RefusedError, match="two to 8 models"):
        compare_checkpoints([model])
    with pytest.raises(RefusedError, match="at most 8"):
        compare_checkpoints([model] * 9)
    with pytest.raises(RefusedError, match="inside the input"):
        compare_checkpoints([model, model], out=model / "inside")


def test_equal_runs_write_equal_files(compare, tmp_path):
    models = [as_float32(fine_tune(BASE, seed, 0.02)) for seed in range(2)] + [as_float32(ancestor(1))]
    written = []
    for name in ("one", "two"):
        write_comparison(compare(*models), tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"compare.html", "compare.jsonl", "compare.json"}
    records = [json.loads(line) for line in written[0]["compare.jsonl"].splitlines()]
    assert [record["name"] for record in records] == [t.name for t in compare(*models).tensors]
    up = next(record for record in records if record["name"] == "layers.1.mlp.up.weight")
    assert up["rule"] == "matrix" and up["shape"] == [64, 32] and len(up["pairs"]) == 3
    assert up["pairs"][0]["coordinates"]["state"] == "shared"
    page = written[0]["compare.html"].decode()
    assert page.count("<svg") >= 10 and "A and B can be merged" in page
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_the_page_of_models_that_differ_lists_how(compare, tmp_path):
    other = {f"block.{name}": x for name, x in as_float32(ancestor(1)).items()}
    comparison = compare(as_float32(BASE), other)
    write_comparison(comparison, tmp_path / "out")
    page = (tmp_path / "out/compare.html").read_text()
    assert len(comparison.differences) > 10 and f"{len(comparison.differences) - 10} more</summary>" in page
    assert page.count("lacks tensor") + page.count("has tensor") >= len(comparison.differences)
    assert "none of the parameters" in page and (tmp_path / "out/compare.jsonl").read_text() == ""
