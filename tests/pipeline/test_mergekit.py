"""mergekit YAML: what has a counterpart gives the merge it describes, what has none is refused by name."""

import numpy as np
import pytest
import yaml

import references
from merging import oracles
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


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base and two of its children."""
    rng = np.random.default_rng(1)
    base = {name: rng.normal(size=(3, 4)) for name in NAMES}
    children = [{name: x + 0.3 * rng.normal(size=x.shape) for name, x in base.items()} for _ in range(2)]
    models = [{name: x.astype(np.float32) for name, x in model.items()} for model in (base, *children)]
    return write_family(tmp_path_factory.mktemp("family"), models, {"model_type": "toy", "num_hidden_layers": LAYERS})


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
    """mergekit's reading: linear over the layers, the first value outside them."""

    def t_of(name):
        layer = layer_of(name)
        if layer is None:
            return values[0]
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
        ("transformer.ln_f.weight", 0.0),
        ("bert.embeddings.LayerNorm.weight", 0.0),
        ("bert.encoder.layer.4.output.dense.weight", 1.0),
        ("bert.encoder.layer.1.output.LayerNorm.bias", 0.25),
        ("bert.pooler.dense.weight", 0.0),
        ("classifier.bias", 0.0),
        ("embed_out.weight", 0.0),
        ("blocks.3.mlp.branch.0.weight", 0.75),
        ("norm.weight", 0.0),
    ],
)
def test_gradients_know_the_layers(tmp_path, models, name, position):
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


def on_base(method, family, **changes):
    """A merge of the two children, the second at 0.4."""
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(family[1:], C, strict=True)]
    return {"merge_method": method, "base_model": family[0], "models": models, "dtype": "float32"} | changes


C = [1.0, 0.4]
TRANSLATED = {
    "task_arithmetic": ({}, {"coefficients": C, "scale": 1.0}),
    "task_arithmetic with a density, which mergekit does not use": (
        {"parameters": {"lambda": 0.7, "density": 0.2, "rescale": True, "int8_mask": True}},
        {"coefficients": C, "scale": 0.7},
    ),
    "task_arithmetic, normalised": (
        {"parameters": {"lambda": 0.7, "normalize": True}},
        {"coefficients": C, "scale": 0.5},
    ),
    "ties": ({}, {"coefficients": C, "scale": 1.0, "density": 1.0, "normalize": True}),
    "ties, summed": (
        {"parameters": {"density": 0.3, "normalize": False, "lambda": 1.5}},
        {"coefficients": C, "scale": 1.5, "density": 0.3, "normalize": False},
    ),
    "dare_linear": ({"parameters": {"density": 0.53}}, {"coefficients": C, "scale": 1.0, "drop_rate": 0.47}),
    "dare_linear that keeps everything": ({}, {"coefficients": C, "scale": 1.0, "drop_rate": 0.0}),
    "dare_linear, not rescaled": (
        {"parameters": {"density": 0.5, "rescale": False, "normalize": True, "lambda": 0.7}},
        {"coefficients": C, "scale": 0.25, "drop_rate": 0.5},
    ),
    "dare_ties": (
        {"parameters": {"density": 0.25}},
        {"coefficients": C, "scale": 1.0, "drop_rate": 0.75, "normalize": False},
    ),
    "dare_ties, normalised, not rescaled": (
        {"parameters": {"density": 0.25, "normalize": True, "rescale": False}},
        {"coefficients": C, "scale": 0.25, "drop_rate": 0.75, "normalize": True},
    ),
    "breadcrumbs": ({}, {"coefficients": C, "scale": 1.0, "density": 1.0, "gamma": 0.01}),
    "breadcrumbs of a density past 1": (
        {"parameters": {"density": 2, "gamma": 0.1, "normalize": True}},
        {"coefficients": C, "scale": 1 / 1.4, "density": 1.0, "gamma": 0.1},
    ),
    "model_stock": ({"parameters": {"filter_wise": False}}, {}),
}


@pytest.mark.parametrize("case", TRANSLATED)
def test_methods_on_a_base(tmp_path, family, case):
    changes, expected = TRANSLATED[case]
    fields = on_base(case.replace(",", " ").split()[0], family, **changes)
    if fields["merge_method"] == "model_stock":
        fields["models"] = [{"model": m} for m in family[1:]]
    config = read(tmp_path, fields)
    ours = {"dare_linear": "dare"}.get(fields["merge_method"], fields["merge_method"])
    assert (config.method, config.base, config.models) == (ours, family[0], tuple(family[1:]))
    assert config.hyperparameters.keys() == expected.keys() and config.dtype == "float32"
    for name, value in expected.items():
        assert config.hyperparameters[name] == pytest.approx(value), name


def test_a_base_among_the_models_is_not_merged_and_models_have_parameters_of_their_own(tmp_path, family):
    models = [{"model": m, "parameters": {"weight": w, "density": 0.6}} for m, w in zip(family[1:], C, strict=True)]
    config = read(
        tmp_path, on_base("ties", family, models=[{"model": family[0]}, *models], parameters={"density": 0.1})
    )
    assert config.models == tuple(family[1:])
    assert (config.hyperparameters["density"], config.hyperparameters["coefficients"]) == (0.6, C)
    common = on_base("task_arithmetic", family, models=[{"model": m} for m in family], parameters={"weight": 0.5})
    assert read(tmp_path, common).hyperparameters["coefficients"] == [0.5, 0.5]


def test_weights_that_cancel_are_not_divided_by(tmp_path, family):
    models = [{"model": m, "parameters": {"weight": w}} for m, w in zip(family[1:], (1, -1), strict=True)]
    config = read(tmp_path, on_base("task_arithmetic", family, models=models, parameters={"normalize": True}))
    assert config.hyperparameters == {"coefficients": [1.0, -1.0], "scale": 1.0}


def test_karcher_takes_the_base_as_one_model_more(tmp_path, family, plain_report):
    fields = on_base("karcher", family, models=[{"model": m} for m in family[1:]], parameters={"max_iter": 60})
    config = read(tmp_path, fields)
    assert config.models == (*family[1:], family[0]) and config.base is None
    result, models = merged(tmp_path, fields), [read_model(m) for m in family]
    for name in NAMES:
        expected = oracles.karcher(np.stack([m[name].astype(np.float64) for m in models]))
        np.testing.assert_allclose(result[name], expected, atol=2e-6, err_msg=name)
    listed = read(tmp_path, fields | {"models": [{"model": m} for m in family], "parameters": {"tol": 1e-6}})
    assert (listed.models, listed.hyperparameters["iterations"]) == (tuple(family), 10)


MERGED = {
    "task_arithmetic": (
        {"lambda": 0.7, "normalize": True},
        lambda vectors: 0.7 / 1.4 * (vectors[0] + 0.4 * vectors[1]),
    ),
    "ties": (
        {"lambda": 0.7, "density": 0.5},
        lambda vectors: 0.7 * oracles.merge_by_sign(oracles.trim(vectors, 0.5), C),
    ),
    "breadcrumbs": (
        {"lambda": 0.7, "density": 0.5, "gamma": 0.1, "normalize": True},
        lambda vectors: oracles.breadcrumbs(np.reshape(C, (2, 1, 1)) * vectors, 0 * vectors[0], 0.5, 0.1, 0.7 / 1.4),
    ),
    "model_stock": ({}, lambda vectors: oracles.model_stock(vectors, 0 * vectors[0])),
}


@pytest.mark.parametrize("method", MERGED)
def test_merges_on_a_base(tmp_path, family, plain_report, method):
    parameters, expect = MERGED[method]
    fields = on_base(method, family, parameters=parameters)
    if method == "model_stock":
        fields["models"] = [{"model": m} for m in family[1:]]
    result, (base, *children) = merged(tmp_path, fields), [read_model(m) for m in family]
    for name in NAMES:
        origin = base[name].astype(np.float64)
        expected = origin + expect(np.stack([child[name] - origin for child in children]))
        np.testing.assert_allclose(result[name], expected, atol=2e-6, err_msg=name)


def test_dropping_without_rescaling_keeps_entries_as_they_are(tmp_path, family, plain_report):
    fields = on_base("dare_linear", family, parameters={"density": 0.4, "rescale": False})
    result, (base, *children) = merged(tmp_path, fields), [read_model(m) for m in family]
    kept = []
    for name in NAMES:
        first, second = (c * (x[name].astype(np.float64) - base[name]) for c, x in zip(C, children, strict=True))
        sums = np.stack([base[name] + i * first + j * second for i in (0, 1) for j in (0, 1)])
        distances = np.abs(sums - result[name])
        np.testing.assert_allclose(distances.min(0), 0, atol=2e-6)
        choice = distances.argmin(0)
        kept += [*(choice // 2).ravel(), *(choice % 2).ravel()]
    assert abs(np.mean(kept) - 0.4) < 4 * np.sqrt(0.24 / len(kept))


def linear(paths, **changes):
    return {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in paths]} | changes


def slerp(paths, **changes):
    return {"merge_method": "slerp", "models": [{"model": m} for m in paths], "parameters": {"t": 0.5}} | changes


def tasks(method, paths, **changes):
    models = [{"model": paths[1], "parameters": {"weight": 1}}]
    return {"merge_method": method, "base_model": paths[0], "models": models} | changes


def sliced(models, *ranges):
    return [{"sources": [{"model": m, "layer_range": r} for m in models]} for r in ranges]


REFUSED = {
    "method": (
        lambda m: linear(m, merge_method="nuslerp"),
        "merge_method 'nuslerp' has no counterpart here; there are linear, slerp, karcher, task_arithmetic, ties",
    ),
    "della": (
        lambda m: tasks("della", m),
        "merge_method 'della' has no counterpart here: mergekit restores each task vector's L1 norm",
    ),
    "della_linear": (lambda m: tasks("della_linear", m), "there is no `della` here that elects no signs"),
    "breadcrumbs_ties": (lambda m: tasks("breadcrumbs_ties", m), "`breadcrumbs` here elects no signs"),
    "no base": (lambda m: tasks("ties", m, base_model=None), "ties needs base_model, the common ancestor"),
    "stock without base": (lambda m: tasks("model_stock", m, base_model=None, models=[{"model": m[1]}]), "needs base_"),
    "base alone": (lambda m: tasks("ties", m, models=[{"model": m[0]}]), "models: name at least one model to merge"),
    "no weight": (lambda m: tasks("ties", m, models=[{"model": m[1]}]), "ties: `weight` must be one number a model"),
    "weight by layer": (
        lambda m: tasks("breadcrumbs", m, parameters={"weight": [0, 1]}, models=[{"model": m[1]}]),
        "breadcrumbs: `weight` must be one number a model; gradients and filters have no counterpart",
    ),
    "lambda by layer": (lambda m: tasks("ties", m, parameters={"lambda": [0, 1]}), "ties: `lambda` must be one number"),
    "density behind filters": (
        lambda m: tasks("ties", m, parameters={"density": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}),
        "ties: `density` must be one number; gradients and filters",
    ),
    "density by model": (
        lambda m: tasks(
            "dare_ties",
            m,
            models=[
                {"model": x, "parameters": {"weight": 1, "density": d}} for x, d in ((m[1], 0.5), ("/elsewhere", 0.3))
            ],
        ),
        "dare_ties: `density` must be the same for every model here, not 0.5, 0.3",
    ),
    "gamma of ties": (lambda m: tasks("ties", m, parameters={"gamma": 0.1}), "parameters: 'gamma' of ties has no"),
    "epsilon of dare": (lambda m: tasks("dare_ties", m, parameters={"epsilon": 0.1}), "'epsilon' of dare_ties has no"),
    "rescaled ties": (lambda m: tasks("ties", m, parameters={"rescale": True}), "ties: only rescale: false has a"),
    "rescaled breadcrumbs": (
        lambda m: tasks("breadcrumbs", m, parameters={"rescale": True}),
        "breadcrumbs: only rescale: false has a counterpart",
    ),
    "odd flag": (
        lambda m: tasks("ties", m, parameters={"normalize": "yes"}),
        "ties: `normalize` must be true or false, not 'yes'",
    ),
    "flag of a model": (
        lambda m: tasks("ties", m, models=[{"model": m[1], "parameters": {"weight": 1, "normalize": True}}]),
        "'normalize' of ties has no counterpart",
    ),
    "negative density": (lambda m: tasks("ties", m, parameters={"density": -1}), "density of method 'ties' must be"),
    "filter-wise": (
        lambda m: tasks("model_stock", m, parameters={"filter_wise": True}, models=[{"model": m[1]}]),
        "model_stock: only filter_wise: false has a counterpart here",
    ),
    "stock of one": (
        lambda m: tasks("model_stock", m, models=[{"model": m[1]}]),
        "method 'model_stock' takes 2 or more models, not 1",
    ),
    "karcher weights": (lambda m: linear(m, merge_method="karcher"), "'weight' of karcher has no counterpart"),
    "karcher tolerance": (
        lambda m: slerp(m, merge_method="karcher", parameters={"tol": 0.1}),
        "karcher: tol must be at most 1e-5 here, where no step is left out, not 0.1",
    ),
    "karcher steps": (
        lambda m: slerp(m, merge_method="karcher", parameters={"max_iter": 0}),
        "iterations of method 'karcher' must be a whole number at least 1",
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


def test_all_that_is_wrong_with_task_vectors_is_named_at_once(tmp_path, models):
    wrong = {"lambda": [1], "density": "half", "rescale": True, "normalize": 1}
    with pytest.raises(RefusedError) as refusal:
        read(tmp_path, tasks("ties", models, parameters=wrong, models=[{"model": models[1]}]))
    assert len(refusal.value.problems) == 5
    for expected in ("`weight`", "`lambda`", "`density`", "rescale: false", "`normalize`"):
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
