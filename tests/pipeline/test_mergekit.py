"""mergekit YAML: what has a counterpart gives the merge it describes, what has none is refused by name."""

import numpy as np
import pytest
import yaml

import references
from pipeline.toy_models import SHAPES, read_model, toy_family, write_family
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints, parse_config, read_config_file
from rgsp_jax.pipeline.config import matcher
from rgsp_jax.pipeline.plan import settings_for

LAYERS = 5
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two decoders of five layers; far apart, so that slerp is not linear."""
    rng = np.random.default_rng(0)
    family = [{name: rng.normal(size=(3, 4)).astype(np.float32) for name in NAMES} for _ in range(2)]
    return write_family(tmp_path_factory.mktemp("mergekit"), family, {"model_type": "toy", "num_hidden_layers": LAYERS})


def read(tmp_path, fields):
    """The config of a mergekit file."""
    path = tmp_path / "mergekit.yaml"
    path.write_text(yaml.safe_dump(fields))
    return parse_config(read_config_file(path), str(path))


def merged(tmp_path, fields, out="out"):
    return read_model(merge_checkpoints(read(tmp_path, fields), tmp_path / out).out)


def assert_slerped(result, models, t_of):
    """Every tensor at its own t, by hand."""
    a, b = map(read_model, models)
    for name in NAMES:
        expected = references.slerp(a[name].astype(np.float64), b[name].astype(np.float64), t_of(name))
        np.testing.assert_allclose(result[name], expected, atol=2e-6, err_msg=name)


def layer_of(name):
    return int(name.split(".")[2]) if ".layers." in name else None


def gradient(values):
    """mergekit's reading: the first value before the layers, the last one behind them, linear in between."""

    def t_of(name):
        layer = layer_of(name)
        if layer is None:
            return values[0] if "embed" in name else values[-1]
        return float(np.interp(layer / (LAYERS - 1), np.linspace(0, 1, len(values)), values))

    return t_of


def test_linear(tmp_path, models, plain_report):
    fields = {
        "merge_method": "linear",
        "models": [
            {"model": models[0], "parameters": {"weight": 3}},
            {"model": models[1], "parameters": {"weight": 1.0}},
        ],
        "dtype": "float32",
        "tokenizer_source": "base",
    }
    result, (a, b) = merged(tmp_path, fields), map(read_model, models)
    for name in NAMES:
        np.testing.assert_allclose(result[name], 0.75 * a[name].astype(np.float64) + 0.25 * b[name], atol=1e-6)


def test_linear_with_one_weight_for_all_in_float16(tmp_path, plain_report):
    family = toy_family(3)
    paths = write_family(tmp_path, family)
    fields = {
        "merge_method": "linear",
        "models": [{"model": path} for path in paths],
        "parameters": {"weight": 0.4, "normalize": True},
        "base_model": paths[1],
        "dtype": "float32",
        "out_dtype": "float16",
    }
    result = merged(tmp_path, fields)
    for name in SHAPES:
        expected = np.mean([model[name].astype(np.float64) for model in family], axis=0)
        assert result[name].dtype == np.float16
        np.testing.assert_allclose(result[name], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("base", [0, 1])
def test_slerp_starts_at_the_base(tmp_path, models, plain_report, base):
    fields = {
        "merge_method": "slerp",
        "models": [{"model": models[0]}, {"model": models[1]}],
        "base_model": models[base],
        "parameters": {"t": 0.2},
    }
    assert_slerped(merged(tmp_path, fields), [models[base], models[1 - base]], lambda name: 0.2)


def test_a_base_that_is_no_model_of_the_list_is_the_first(tmp_path, models):
    fields = {
        "merge_method": "slerp",
        "models": [{"model": models[1]}],
        "base_model": models[0],
        "parameters": {"t": [{"value": 0.5}]},
    }
    assert read(tmp_path, fields).models == tuple(models)


def test_gradients_behind_filters_over_one_whole_slice(tmp_path, models, plain_report):
    """The example that everyone starts from."""
    fields = {
        "slices": [{"sources": [{"model": path, "layer_range": [0, LAYERS]} for path in models]}],
        "merge_method": "slerp",
        "base_model": models[0],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
        "dtype": "float32",
    }

    def t_of(name):
        if "self_attn" in name:
            return gradient([0, 0.5, 0.3, 0.7, 1])(name)
        return gradient([1, 0.5, 0.7, 0.3, 0])(name) if "mlp" in name else 0.5

    assert_slerped(merged(tmp_path, fields), models, t_of)


@pytest.mark.parametrize("values", [[0.1, 0.9], [0.0, 0.4, 0.2], [0.6]])
def test_gradients_over_all_tensors(tmp_path, models, values):
    config = read(
        tmp_path,
        {
            "merge_method": "slerp",
            "models": [{"model": path} for path in models],
            "base_model": models[0],
            "parameters": {"t": [{"filter": "*", "value": values}]},
        },
    )
    for name in NAMES:
        assert settings_for(config, name)[1]["t"] == pytest.approx(gradient(values)(name)), name


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("transformer.wte.weight", 0.0),
        ("transformer.h.2.attn.c_attn.weight", 0.5),
        ("transformer.ln_f.weight", 1.0),
        ("bert.embeddings.LayerNorm.weight", 0.0),
        ("bert.encoder.layer.4.output.dense.weight", 1.0),
        ("bert.encoder.layer.1.output.LayerNorm.bias", 0.25),
        ("bert.pooler.dense.weight", 1.0),
        ("classifier.bias", 1.0),
        ("cls.predictions.transform.dense.weight", 1.0),
        ("embeddings.norm.weight", 0.0),
        ("embed_out.weight", 1.0),
        ("blocks.3.mlp.branch.0.weight", 0.75),
        ("branch.1.weight", 0.0),
        ("norm.weight", 1.0),
    ],
)
def test_gradients_know_what_stands_before_and_behind_the_layers(tmp_path, models, name, position):
    fields = {"merge_method": "slerp", "models": [{"model": m} for m in models], "parameters": {"t": [0, 1]}}
    assert settings_for(read(tmp_path, fields), name)[1]["t"] == pytest.approx(position)


def test_filters_are_text_and_no_pattern(tmp_path, models):
    conditions = [{"filter": "q.proj", "value": 0.1}, {"filter": "*", "value": 0.9}]
    fields = {"merge_method": "slerp", "models": [{"model": m} for m in models], "parameters": {"t": conditions}}
    config = read(tmp_path, fields)
    assert settings_for(config, "model.layers.0.q_proj.weight")[1] == {"t": 0.9}
    assert settings_for(config, "model.layers.0.q.proj.weight")[1] == {"t": 0.1}
    assert all(matcher(override.pattern) for override in config.overrides)


def test_names_of_the_hub(tmp_path, models):
    fields = {"merge_method": "linear", "models": [{"model": "some-owner/some.model"}, {"model": models[0]}]}
    assert read(tmp_path, fields).models == ("hf://some-owner/some.model", models[0])


def linear(paths, **changes):
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in paths]} | changes


def slerp(paths, **changes):
    return {"merge_method": "slerp", "models": [{"model": m} for m in paths], "parameters": {"t": 0.5}} | changes


def sliced(models, *ranges):
    return [{"sources": [{"model": m, "layer_range": r} for m in models]} for r in ranges]


REFUSED = {
    "method": (
        lambda m: linear(m, merge_method="ties"),
        "merge_method 'ties' has no counterpart here; there are linear, slerp",
    ),
    "no method": (lambda m: linear(m, merge_method=["ties"]), "merge_method ['ties'] has no counterpart"),
    "setting": (lambda m: linear(m, allow_crimes=True), "mergekit setting 'allow_crimes' has no counterpart here"),
    "parameter": (lambda m: slerp(m, parameters={"t": 0.5, "embed_slerp": True}), "parameters: 'embed_slerp' of slerp"),
    "source parameter": (
        lambda m: slerp(m, models=[{"model": x, "parameters": {"weight": 1}} for x in m]),
        "'weight' of slerp has no counterpart",
    ),
    "density": (
        lambda m: linear(m, models=[{"model": x, "parameters": {"weight": 1, "density": 0.5}} for x in m]),
        "'density' of linear has no counterpart",
    ),
    "normalize": (lambda m: linear(m, parameters={"normalize": False}), "only normalize: true"),
    "weights by layer": (
        lambda m: linear(m, models=[{"model": x, "parameters": {"weight": [0, 1]}} for x in m]),
        "gradients over layers have no counterpart",
    ),
    "base of linear": (lambda m: linear(m[:1], base_model=m[1]), "is not among the models of a linear merge"),
    "lora": (lambda m: linear(m, models=[{"model": {"path": x}} for x in m]), "`models` must be a list of entries"),
    "entry": (lambda m: linear(m, models=[{"model": x, "scale": 2} for x in m]), "settings scale of a model"),
    "two slices": (lambda m: slerp(m, models=None, slices=sliced(m, [0, 2], [2, 5])), "only whole models"),
    "both": (lambda m: slerp(m, slices=sliced(m, [0, 5])), "only whole models"),
    "slice settings": (
        lambda m: slerp(m, models=None, slices=[{**sliced(m, [0, 5])[0], "parameters": {"t": 1}}]),
        "only whole models",
    ),
    "part": (
        lambda m: slerp(m, models=None, slices=sliced(m, [0, 4])),
        "layer_range [0, 4] of {} does not span the whole model, which has 5 layers",
    ),
    "odd slices": (lambda m: slerp(m, models=None, slices="all"), "only whole models"),
    "no models": (lambda m: slerp(m, models=None), "`models` must be a list"),
    "odd models": (lambda m: slerp(m, models=m), "`models` must be a list"),
    "three": (lambda m: slerp(m, base_model="/elsewhere"), "slerp takes 2 models, not 3"),
    "odd base": (lambda m: slerp(m, base_model=[1]), "base_model must be one path or name"),
    "no t": (lambda m: slerp(m, parameters=None), "slerp needs parameters: t"),
    "odd t": (lambda m: slerp(m, parameters={"t": "half"}), "t must be a number or a list of numbers, not 'half'"),
    "mixed t": (
        lambda m: slerp(m, parameters={"t": [{"value": 1}, 0.5]}),
        "a list of entries with `filter` and `value`",
    ),
    "t past 1": (
        lambda m: slerp(m, parameters={"t": 1.5}),
        "t of method 'slerp' must be a number at least 0 and at most 1",
    ),
    "filters only": (
        lambda m: slerp(m, parameters={"t": [{"filter": "mlp", "value": 1}]}),
        "t has no value for tensors that no filter matches",
    ),
    "parameters": (lambda m: slerp(m, parameters=[1]), "parameters must be a mapping"),
    "dtype": (lambda m: linear(m, dtype="int8"), "dtype must be one of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_counterpart_is_refused_by_name(tmp_path, models, case):
    make, expected = REFUSED[case]
    with pytest.raises(RefusedError) as refusal:
        read(tmp_path, make(models))
    assert any(expected.format(models[0]) in problem for problem in refusal.value.problems), refusal.value.problems
    assert all(problem.startswith(f"{tmp_path / 'mergekit.yaml'}: ") for problem in refusal.value.problems)


def test_everything_without_counterpart_is_named_at_once(tmp_path, models):
    fields = slerp(models, parameters={"t": 0.5, "lambda": 1}, modules={}, dtype_in="x")
    fields["models"] = [{"model": m, "parameters": {"density": 1}} for m in models]
    with pytest.raises(RefusedError) as refusal:
        read(tmp_path, fields)
    for expected in ("'modules'", "'dtype_in'", "'lambda'", f"parameters of {models[1]}: 'density'"):
        assert expected in str(refusal.value)


def test_a_gradient_needs_the_number_of_layers(tmp_path):
    paths = write_family(tmp_path, toy_family(2), config=None)
    fields = {"merge_method": "slerp", "models": [{"model": p} for p in paths], "parameters": {"t": [0, 1]}}
    with pytest.raises(RefusedError, match=r"needs a config\.json that says how many"):
        read(tmp_path, fields)


def test_the_written_config_repeats_a_mergekit_merge(tmp_path, models, plain_report):
    fields = {"merge_method": "slerp", "models": [{"model": m} for m in models], "parameters": {"t": [0.1, 0.9]}}
    config = read(tmp_path, fields)
    out = merge_checkpoints(config, tmp_path / "out").out
    path = out / "merge_config.yaml"
    assert parse_config(read_config_file(path), "written") == config
    assert isinstance(config, MergeConfig)
