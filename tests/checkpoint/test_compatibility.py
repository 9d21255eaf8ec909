"""Models that cannot be merged with each other, and those that can in spite of their files' differences."""

import re

import numpy as np
import pytest
import torch

from checkpoint.builders import CONFIG, make_tensor, tiny_tensors, write_model
from rgsp_jax.checkpoint import find_problems, open_checkpoint

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MATRIX = make_tensor(np.dtype(np.float32), (6, 4))
OTHER = make_tensor(np.dtype(np.float32), (6, 4), 1)


def problems_of(tmp_path, *models, skip=None, **keywords):
    opened = []
    for number, model in enumerate(models):
        tensors, config = model if isinstance(model, tuple) else (model, CONFIG)
        opened.append(open_checkpoint(write_model(tmp_path / f"m{number}", tensors, config=config, **keywords)))
    return find_problems(opened, skip=skip)


def changed(**changes):
    return {name: array for name, array in (tiny_tensors() | changes).items() if array is not None}


def test_equal_models_agree_across_sharding_format_and_float_dtype(tmp_path):
    tensors = tiny_tensors()
    models = [
        write_model(tmp_path / "a", tensors),
        write_model(
            tmp_path / "b", {name: array.astype(np.float16) for name, array in tensors.items()}, max_shard_size=1
        ),
        tmp_path / "c.pt",
    ]
    torch.save({name: torch.from_numpy(array).bfloat16() for name, array in tensors.items()}, tmp_path / "c.pt")
    assert find_problems([open_checkpoint(model) for model in models]) == []


PAIRS = {
    "missing": (changed(), changed(**{"encoder.bias": None}), ["m1 lacks tensor 'encoder.bias'"]),
    "extra": (changed(), changed(extra=MATRIX), ["m1 has tensor 'extra', which .*m0 lacks"]),
    "shape": (
        changed(),
        changed(**{"encoder.bias": MATRIX, "norm.weight": OTHER}),
        [r"'encoder.bias' has shape \[6, 4\] in .*m1 and \[4\] in .*m0", r"'norm.weight' has shape \[6, 4\]"],
    ),
    "transposed": (changed(a=MATRIX), changed(a=MATRIX.T), [r"'a' has shape \[4, 6\]"]),
    "rank": (changed(a=MATRIX), changed(a=MATRIX.reshape(-1)), [r"'a' has shape \[24\]"]),
    "kind": (changed(a=MATRIX), changed(a=MATRIX.astype(np.int64)), ["'a' is int64 in .*m1 and float32 in .*m0"]),
    "bool": (changed(a=MATRIX.astype(np.int64)), changed(a=MATRIX > 0), ["'a' is bool in .*m1 and int64"]),
    "model_type": (
        changed(),
        (changed(), CONFIG | {"model_type": "gpt"}),
        ["m1 has model_type gpt in its config.json, .*m0 has toy"],
    ),
    "architectures": (
        changed(),
        (changed(), CONFIG | {"architectures": ["Other"]}),
        ["m1 has architectures Other in its config.json, .*m0 has ToyModel"],
    ),
    "heads": (
        (changed(), CONFIG | {"num_attention_heads": 4}),
        (changed(), CONFIG | {"num_attention_heads": 8}),
        ["m1 has num_attention_heads 8 in its config.json, .*m0 has 4"],
    ),
    "untied": (
        {EMBED: MATRIX},
        {EMBED: MATRIX, HEAD: OTHER},
        ["m1 has its own output embedding 'lm_head.weight', .*m0 has none"],
    ),
    "untied in the first": (
        {EMBED: MATRIX, HEAD: OTHER},
        {EMBED: MATRIX},
        ["m0 has its own output embedding 'lm_head.weight', .*m1 has none"],
    ),
    "tied by bytes": (
        {EMBED: MATRIX, HEAD: MATRIX},
        {EMBED: MATRIX, HEAD: OTHER},
        ["m0 ties 'lm_head.weight', 'model.embed_tokens.weight' to one tensor, .*m1 has separate ones"],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_differences_are_named(tmp_path, name):
    first, second, expected = PAIRS[name]
    problems = problems_of(tmp_path, first, second)
    assert len(problems) == len(expected)
    assert all(re.search(pattern, problem) for pattern, problem in zip(expected, problems, strict=True))


def test_all_kinds_and_all_models_are_named_at_once(tmp_path):
    broken = changed(**{"encoder.bias": None, "norm.weight": MATRIX, "extra": OTHER})
    problems = problems_of(tmp_path, changed(), broken, changed(), (changed(more=OTHER), CONFIG | {"model_type": "x"}))
    assert len(problems) == 5
    assert [sum(f"m{i} " in problem or problem.endswith(f"m{i}") for problem in problems) for i in (1, 2, 3)] == [
        3,
        0,
        2,
    ]


def test_lists_are_cut_per_kind(tmp_path):
    first = {f"t{i:02d}": np.zeros(2, np.float32) for i in range(60)} | {"same": MATRIX}
    second = {f"t{i:02d}": np.zeros(3, np.float32) for i in range(30)} | {"same": MATRIX}
    problems = problems_of(tmp_path, first, second)
    assert len(problems) == 42
    assert problems[20] == "... and 10 more of this kind" == problems[41]


def test_skipped_names_do_not_matter(tmp_path):
    first = changed(**{"head.weight": MATRIX, "head.bias": np.zeros(3)})
    second = changed(**{"head.weight": MATRIX.T, "head.extra": MATRIX})
    assert len(problems_of(tmp_path, first, second)) == 3
    opened = [open_checkpoint(tmp_path / "m0"), open_checkpoint(tmp_path / "m1")]
    assert find_problems(opened, skip=lambda name: name.startswith("head.")) == []


def test_missing_configs_are_no_problem(tmp_path):
    assert problems_of(tmp_path, changed(), (changed(), None)) == []


def save_torch(path, *, tied):
    matrix = torch.from_numpy(MATRIX)
    torch.save({EMBED: matrix, HEAD: matrix if tied else torch.from_numpy(OTHER)}, path)
    return open_checkpoint(path)


def test_ties_agree_however_they_are_stored(tmp_path):
    tied = [
        open_checkpoint(write_model(tmp_path / "omitted", {EMBED: MATRIX})),
        open_checkpoint(write_model(tmp_path / "twice", {HEAD: MATRIX, EMBED: MATRIX})),
        save_torch(tmp_path / "storage.pt", tied=True),
    ]
    assert [dict(model.aliases) for model in tied] == [{}, {HEAD: EMBED}, {HEAD: EMBED}]
    for model in tied:
        assert find_problems([model, *tied]) == []


def test_ties_and_separate_storages_disagree(tmp_path):
    tied, untied = save_torch(tmp_path / "a.pt", tied=True), save_torch(tmp_path / "b.pt", tied=False)
    for pair in ([tied, untied], [untied, tied]):
        (problem,) = find_problems(pair)
        assert "a.pt ties 'lm_head.weight', 'model.embed_tokens.weight' to one tensor" in problem
    assert find_problems([untied, untied]) == []


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        ({EMBED: MATRIX, HEAD: MATRIX}, CONFIG, {HEAD: EMBED}),
        ({EMBED: MATRIX, HEAD: MATRIX}, CONFIG | {"tie_word_embeddings": False}, {}),
        ({EMBED: MATRIX, HEAD: MATRIX}, CONFIG | {"text_config": {"tie_word_embeddings": False}}, {}),
        ({EMBED: MATRIX, HEAD: MATRIX}, None, {}),
        ({EMBED: MATRIX, HEAD: OTHER}, CONFIG, {}),
        ({EMBED: MATRIX, HEAD: MATRIX.astype(np.float16)}, CONFIG, {}),
        ({EMBED: MATRIX, "other.weight": MATRIX}, CONFIG, {}),
        (
            dict.fromkeys(
                ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD], MATRIX
            ),
            CONFIG,
            {
                "encoder.embed_tokens.weight": "shared.weight",
                "decoder.embed_tokens.weight": "shared.weight",
                HEAD: "shared.weight",
            },
        ),
    ],
)
def test_embeddings_stored_twice_are_aliases(tmp_path, tensors, config, expected):
    assert dict(open_checkpoint(write_model(tmp_path / "m", tensors, config=config)).aliases) == expected


def test_large_embeddings_are_compared_to_the_end(tmp_path):
    matrix = make_tensor(np.dtype(np.float32), (700, 1000))
    other = matrix.copy()
    other[-1, -1] += 1
    assert dict(open_checkpoint(write_model(tmp_path / "a", {EMBED: matrix, HEAD: matrix})).aliases) == {HEAD: EMBED}
    assert dict(open_checkpoint(write_model(tmp_path / "b", {EMBED: matrix, HEAD: other})).aliases) == {}
