"""Settings: what is accepted, what is refused by name, and which tensor gets which."""

import datetime

import numpy as np
import pytest

from pipeline.toy_models import SHAPES, read_model, same_bits, toy_family, write_family, write_model
from rgsp_jax.checkpoint import TensorSpec
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline import MergeConfig, Override, merge_checkpoints, parse_config, plan_merge, read_config_file
from rgsp_jax.pipeline.config import parse_size, parse_yaml

TWO = {"models": ["a", "b"]}
SPECS = {name: TensorSpec(name, shape, np.dtype(np.float32)) for name, shape in SHAPES.items()}


def problems_of(fields, source="merge.yaml"):
    with pytest.raises(RefusedError) as refusal:
        parse_config(fields, source)
    return list(refusal.value.problems)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5000, 5000),
        ("5000", 5000),
        ("5kB", 5000),
        ("5 KB", 5000),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2_000_000_000),
        ("7m", 7_000_000),
        ("7Mi", 7 * 2**20),
        ("1T", 10**12),
        (" 12b ", 12),
        (".5kB", 500),
        (2.5e9, 2_500_000_000),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        0,
        -5,
        "0",
        "0.4",
        "",
        "many",
        ".",
        "1.2.3GB",
        "5XB",
        "5 GB GB",
        "-1GB",
        "nan",
        "inf",
        True,
        None,
        "9" * 400,
        "5PB",
        [5],
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match=r"must be a size such as 500MB, 5GB or 1\.5GiB"):
        parse_size(text)


BAD_FIELDS = {
    "seed": (-1, "seed:"),
    "memory": ("lots", "memory: must be a size such as"),
    "max_shard_size": (0, "max_shard_size: must be a size such as"),
    "dtype": ("int8", "dtype must be one of float32, float16, bfloat16, float64, not 'int8'"),
    "method": ("tied", "no method 'tied'; there are average, slerp"),
    "include": (["re:(", "*"], "pattern 're:(' is no regular expression"),
    "models": ([], "name at least one model"),
    "hyperparameters": ({"rank": -1}, "rank of method 'rgsp' must be"),
    "overrides": ([{"pattern": "*", "method": "none"}], "no method 'none'"),
    "base": ("c", "--base: method rgsp uses no base model"),
    "surplus": (1, "surplus: no such setting; there are models, method, base"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_bad_field_is_named_with_its_source(field):
    value, expected = BAD_FIELDS[field]
    found = problems_of({**TWO, field: value})
    assert len(found) == 1
    assert found[0].startswith("merge.yaml: ") and expected in found[0]
    assert problems_of({**TWO, field: value}, "command line") == [found[0].removeprefix("merge.yaml: ")]


def test_all_bad_fields_are_named_at_once():
    found = problems_of(
        {
            **TWO,
            "memory": "x",
            "seed": 2**32,
            "surplus": 1,
            3: "no name",
            "dtype": "int8",
            "exclude": ["re:["],
            "hyperparameters": {"rank": 0, "colour": "red"},
            "overrides": [{"pattern": "*bias", "method": "average", "hyperparameters": {"t": 1}}],
        }
    )
    text = "\n".join(found)
    for expected in (
        "memory: must be a size",
        "seed: Input should be less than 4294967296",
        "surplus: no such setting",
        "3: ",
        "dtype must be one of",
        "pattern 're:['",
        "rank of method 'rgsp' must be",
        "method 'rgsp' has no hyperparameter 'colour'",
        "override '*bias': method 'average' has no hyperparameter 't'",
    ):
        assert expected in text
    assert len(found) == 9


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ({"method": "average"}, "overrides.0.pattern: Field required"),
        ({"pattern": "*", "metod": "average"}, "overrides.0.metod: no such setting; there are pattern, method"),
        ({"pattern": "*", "method": "slerp", "hyperparameters": {"t": 2}}, "override '*': t of method 'slerp' must be"),
        ("*", "overrides.0: "),
        ({"pattern": "re:+"}, "pattern 're:+' is no regular expression"),
    ],
)
def test_bad_overrides_are_named(override, expected):
    found = problems_of({**TWO, "overrides": [override]})
    assert len(found) == 1 and expected in found[0]


@pytest.mark.parametrize(
    ("method", "count", "fields", "expected"),
    [
        ("slerp", 3, {}, "method 'slerp' takes 2 models, not 3"),
        ("relative", 1, {}, "method 'relative' takes 2 or more models, not 1"),
        ("average", 2, {"coefficients": [1]}, "coefficients: 1 numbers for 2 models"),
        ("average", 2, {"coefficients": [1, -1.0]}, "sum to zero"),
        ("average", 2, {"coefficients": [1, "two"]}, "must be a list of numbers"),
        ("average", 2, {"coefficients": 3}, "must be a list of numbers"),
        ("average", 2, {"coefficients": "even"}, "must be a list of numbers"),
        ("average", 2, {"coefficients": [1, float("nan")]}, "must be a list of numbers"),
        ("average", 2, {"rank": 3}, "method 'average' has no hyperparameter 'rank'; it takes coefficients"),
        ("slerp", 2, {"t": [0.1, 0.2]}, "t must be one number or word"),
        ("slerp", 2, {"t": datetime.date(2024, 1, 1)}, "t must be one number or word"),
        ("slerp", 2, {"t": "half"}, "t of method 'slerp' must be a number at least 0 and at most 1"),
        ("slerp", 2, {"t": float("nan")}, "t of method 'slerp'"),
        ("rgsp", 2, {"rank": 2.5}, "rank of method 'rgsp' must be a positive integer or a fraction"),
        ("rgsp", 2, {"rank": [1, 2]}, "rank must be one number or word"),
        ("rgsp", 2, {"projection": "none"}, "projection of method 'rgsp' must be 'one_sided' or 'two_sided'"),
        ("rgsp", 2, {"symmetric": 1}, "symmetric of method 'rgsp' must be true or false"),
        ("rgsp", 2, {"epsilon": 0}, "epsilon of method 'rgsp' must be a number more than 0"),
        ("rgsp", 2, {"w_q": [[1, 0], [1]]}, "w_q must be a square list of lists of numbers"),
        ("relative", 3, {"scale": "big"}, "scale of method 'relative' must be a number at least 0"),
    ],
)
def test_impossible_hyperparameters_are_named(method, count, fields, expected):
    found = problems_of({"models": ["a", "b", "c"][:count], "method": method, "hyperparameters": fields})
    assert len(found) == 1 and expected in found[0]


def test_a_base_is_asked_for_and_not_ignored(toy_methods):
    assert problems_of({**TWO, "method": "arithmetic"}) == [
        "merge.yaml: method 'arithmetic' needs --base, the common ancestor of the models"
    ]
    override = {"overrides": [{"pattern": "*dense*", "method": "arithmetic"}]}
    assert "override '*dense*': method 'arithmetic' needs --base" in problems_of({**TWO, **override})[0]
    assert parse_config({**TWO, **override, "base": "c"}, "merge.yaml").base == "c"


def test_defaults():
    assert parse_config({"models": ["a", "b"]}, "x").resolved_method().name == "rgsp"
    assert parse_config({"models": ["a", "b", "c"]}, "x").resolved_method().name == "relative"
    assert parse_config({"models": ["a"], "method": "average"}, "x").memory == 1_000_000_000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n- b\n", "the config must be a mapping"),
        ("", "the config must be a mapping"),
        ("models: [a\n", "not valid YAML"),
        ("models: !!python/object:os.system {}\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, expected):
    path = tmp_path / "merge.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RefusedError, match=expected) as refusal:
        read_config_file(path)
    assert all(problem.startswith(f"{path}: ") and "\n" not in problem for problem in refusal.value.problems)


def test_numbers_may_be_written_with_an_exponent(tmp_path):
    path = tmp_path / "merge.yaml"
    text = "models: [a, b]\nhyperparameters: {epsilon: 1e-3, beta: 2E+0, rank: 1e-1}\nmemory: 3e9\nbase: 1e\n"
    path.write_text(text)
    fields = read_config_file(path)
    assert fields["hyperparameters"] == {"epsilon": 0.001, "beta": 2.0, "rank": 0.1}
    assert fields["base"] == "1e" and parse_size(fields["memory"]) == 3_000_000_000


@pytest.mark.parametrize(
    "name", ["1e5", "12", "true", "null", "~", "a: b", "- x", "Ünï/mödel", "2024-01-01", "'q'", " s ", "re:^a#b"]
)
def test_any_name_survives_the_written_config(name):
    config = MergeConfig(models=(name, "b"), method="average", include=(name,))
    assert parse_config(parse_yaml(config.to_yaml()), "written") == config


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(RefusedError, match="cannot read the config: No such file"):
        read_config_file(tmp_path / "none.yaml")
    with pytest.raises(RefusedError, match="cannot read the config: Is a directory"):
        read_config_file(tmp_path)


def planned(**fields):
    """Name -> (kind, method, hyperparameters) of the toy model under these settings."""
    plan = plan_merge(parse_config({**TWO, **fields}, "test"), [SPECS, SPECS])
    return {task.name: (task.kind, task.method, dict(task.hyperparameters)) for task in plan.tasks.values()}


def test_include_and_exclude():
    found = planned(method="average", include=["encoder.*", "logit_scale"], exclude=["*bias", "re:layer\\.1\\..*dense"])
    merged = {name for name, (kind, _, _) in found.items() if kind != "excluded"}
    inside = {n for n in SHAPES if n.startswith("encoder.") or n == "logit_scale"}
    assert merged == {n for n in inside if not n.endswith("bias") and not ("layer.1" in n and "dense" in n)}
    assert all(method == "copy" for kind, method, _ in found.values() if kind == "excluded")


def test_globs_take_the_whole_name_and_expressions_any_part():
    query = "encoder.layer.0.attention.self.query.weight"
    for pattern, taken in {
        "query": False,
        "*query*": True,
        "encoder.layer.?.attention.self.query.weight": True,
        "encoder.layer.[1-9].*": False,
        "ENCODER.*": False,
        "re:query": True,
        "re:^query": False,
        r"re:layer\.0\.a": True,
        "re:(?i)QUERY": True,
    }.items():
        assert (planned(method="average", include=[pattern])[query][0] != "excluded") == taken, pattern


def test_the_last_override_that_matches_decides(toy_methods):
    found = planned(
        method="tilt",
        hyperparameters={"strength": 1.0},
        overrides=[
            {"pattern": "encoder.*", "hyperparameters": {"strength": 2.0}},
            {"pattern": "*query*", "method": "average"},
            {"pattern": "*layer.1.*weight", "hyperparameters": {"strength": 3.0}},
            {"pattern": "*intermediate*", "method": "rgsp", "hyperparameters": {"rank": 2}},
            {"pattern": "re:1.intermediate.*weight", "method": "rgsp"},
        ],
    )
    expected = {
        "stem.conv.weight": ("matrix", "tilt", {"strength": 1.0}),
        "encoder.layer.0.output.dense.weight": ("matrix", "tilt", {"strength": 2.0}),
        "encoder.layer.0.attention.self.query.weight": ("matrix", "average", {}),
        "encoder.layer.1.attention.self.query.weight": ("matrix", "tilt", {"strength": 3.0}),
        "encoder.layer.0.intermediate.dense.weight": ("matrix", "rgsp", {"rank": 2}),
        "encoder.layer.0.intermediate.dense.bias": ("vector", "average", {}),
        "encoder.layer.1.intermediate.dense.weight": ("matrix", "rgsp", {}),
        "embeddings.word_embeddings.weight": ("embedding", "average", {}),
    }
    assert {name: found[name] for name in expected} == expected


def test_an_override_by_name_of_the_same_method_keeps_the_other_settings(toy_methods):
    found = planned(
        method="tilt", hyperparameters={"strength": 4.0}, overrides=[{"pattern": "stem*", "method": "tilt"}]
    )
    assert found["stem.conv.weight"][2] == {"strength": 4.0}


def test_excluded_tensors_may_be_missing_or_of_other_shapes(tmp_path, plain_report):
    """Heads of different tasks: the first model's stays."""
    family = toy_family(3)
    for k, model in enumerate(family):
        model["classifier.weight"] = np.full((2 + k, 8), k, np.float32)
        model["classifier.bias"] = np.full(2 + k, k, np.float32)
    del family[2]["classifier.weight"], family[2]["classifier.bias"]
    family[2]["qa_outputs.weight"] = np.zeros((3, 8), np.float32)
    models = write_family(tmp_path, family)
    config = MergeConfig(models=models, method="average", exclude=("classifier.*", "qa_outputs.*"))
    result = read_model(merge_checkpoints(config, tmp_path / "out").out)
    assert result.keys() == family[0].keys()
    assert all(same_bits(result[n], family[0][n]) for n in ("classifier.weight", "classifier.bias"))
    with pytest.raises(RefusedError, match=r"'classifier\.weight' has shape"):
        merge_checkpoints(MergeConfig(models=models, method="average", exclude=("*.bias", "qa*")), tmp_path / "no")


def test_include_leaves_the_rest_as_in_the_first_model(tmp_path, plain_report):
    family = toy_family(2)
    config = MergeConfig(models=write_family(tmp_path, family), method="average", include=("*layer.0.*",))
    result = read_model(merge_checkpoints(config, tmp_path / "out").out)
    for name in SHAPES:
        assert same_bits(result[name], family[0][name]) == ("layer.0" not in name)


def test_one_tensor_by_another_method(tmp_path, toy_methods, plain_report):
    family = [{"w.weight": np.eye(4, dtype=np.float32) * k, "v.weight": np.full((4, 4), k, np.float32)} for k in (1, 3)]
    models = [str(write_model(tmp_path / "ab"[k], model)) for k, model in enumerate(family)]
    override = Override(pattern="v.*", method="average", hyperparameters={"coefficients": [3, 1]})
    result = read_model(
        merge_checkpoints(
            MergeConfig(models=models, method="tilt", hyperparameters={"strength": 0}, overrides=(override,)),
            tmp_path / "out",
        ).out
    )
    np.testing.assert_array_equal(result["w.weight"], np.eye(4))
    np.testing.assert_array_equal(result["v.weight"], np.full((4, 4), 1.5))
