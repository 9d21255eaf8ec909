"""What stands against merging several opened models with each other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rgsp_jax.checkpoint.companions import find_module_weights
from rgsp_jax.checkpoint.guards import resolve_inside
from rgsp_jax.checkpoint.hashing import hash_file
from rgsp_jax.checkpoint.renamed import RenamedCheckpoint
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.checkpoint.ties import OUTPUT_EMBEDDING

HEAD_KEYS = ("num_attention_heads", "num_key_value_heads")
CONFIG_KEYS = ("model_type", "architectures", *HEAD_KEYS)
"""Fields of config.json that change what tensors of equal names and shapes compute."""
Skip = Callable[[str], bool]


def find_problems(checkpoints: Sequence[Checkpoint], *, skip: Skip | None = None) -> list[str]:
    """Every reason why these models cannot be merged with each other, all offenders at once.

    Keys, shapes and kinds of dtype (floating, integer, boolean) are compared with the first model's; so are tied
    weights and the fields of config.json that decide what equal shapes compute.

    Args:
        checkpoints: opened models; the first is the reference.
        skip: names for which this is true are not merged: their absence and shapes do not matter.

    Returns:
        One sentence per problem, at most 20 of a kind and model; empty where all is well.
    """
    problems: list[str] = []
    if not checkpoints:
        return problems
    first = checkpoints[0]
    skip = skip or _skip_none
    for other in checkpoints[1:]:
        untied = _find_untied(first, other, skip)
        problems += _compare_configs(first, other)
        problems += cap(list(dict.fromkeys(untied.values())))
        problems += _compare_keys(first, other, skip, frozenset(untied))
        problems += _compare_tensors(first, other, skip)
        problems += _compare_modules(first, other)
    return problems


def _skip_none(name: str) -> bool:
    return False


def _compare_configs(first: Checkpoint, other: Checkpoint) -> list[str]:
    problems = []
    # A key map says which tensors of another architecture are meant; how heads divide them it does not say.
    for key in HEAD_KEYS if isinstance(other, RenamedCheckpoint) else CONFIG_KEYS:
        expected, found = (first.config or {}).get(key), (other.config or {}).get(key)
        if expected is not None and found is not None and expected != found:
            problems.append(
                f"{other.path} has {key} {_show(found)} in its config.json, {first.path} has {_show(expected)}"
            )
    return problems


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _groups(aliases: Mapping[str, str]) -> list[set[str]]:
    owners: dict[str, set[str]] = {}
    for alias, owner in aliases.items():
        owners.setdefault(owner, {owner}).add(alias)
    return list(owners.values())


def _find_untied(first: Checkpoint, other: Checkpoint, skip: Skip) -> dict[str, str]:
    """Names tied in one model and separate in another, with the sentence that says so."""
    problems: dict[str, str] = {}
    for tied, separate in ((first, other), (other, first)):
        for group in _groups(tied.aliases):
            there = [name for name in sorted(group) if name in separate.specs and not skip(name)]
            if len({separate.aliases.get(name, name) for name in there}) > 1:
                sentence = (
                    f"{tied.path} ties {', '.join(map(repr, there))} to one tensor, {separate.path} has separate ones: "
                    "tie or untie both"
                )
                problems |= dict.fromkeys(there, sentence)
        for name in separate.specs:
            # Safetensors files leave tied output embeddings out, so the absence of one is what shows the tie.
            own = OUTPUT_EMBEDDING.search(name) and name not in separate.aliases
            if own and name not in tied.specs and name not in problems and not skip(name):
                problems[name] = (
                    f"{separate.path} has its own output embedding {name!r}, {tied.path} has none (it is tied to the "
                    "input embedding, or there is no head): tie, untie or drop it in both"
                )
    return problems


def _compare_keys(first: Checkpoint, other: Checkpoint, skip: Skip, known: frozenset[str]) -> list[str]:
    def held(model: Checkpoint) -> list[str]:
        return [name for name in model.specs if name not in model.aliases and name not in known and not skip(name)]

    expected, found = held(first), held(other)
    ours, others = set(expected), set(found)
    missing = [f"{other.path} lacks tensor {name!r}, which {first.path} has" for name in expected if name not in others]
    extra = [f"{other.path} has tensor {name!r}, which {first.path} lacks" for name in found if name not in ours]
    return cap(missing) + cap(extra)


def _compare_tensors(first: Checkpoint, other: Checkpoint, skip: Skip) -> list[str]:
    shapes, kinds = [], []
    for name, spec in first.specs.items():
        there = other.specs.get(name)
        if there is None or skip(name):
            continue
        if there.shape != spec.shape:
            shapes.append(
                f"tensor {name!r} has shape {list(there.shape)} in {other.path} and {list(spec.shape)} in {first.path}"
            )
        if there.kind != spec.kind:
            kinds.append(f"tensor {name!r} is {there.dtype} in {other.path} and {spec.dtype} in {first.path}")
    return cap(shapes) + cap(kinds)


def _compare_modules(first: Checkpoint, other: Checkpoint) -> list[str]:
    """Weights of sentence-transformers modules are copied from the first model, so they must agree."""
    problems = []
    theirs = set(find_module_weights(other.root, other.companions))
    for path in find_module_weights(first.root, first.companions):
        pair = [resolve_inside(model.root, path.as_posix()) for model in (first, other) if path in theirs]
        if not pair or hash_file(pair[0]) != hash_file(pair[1]):
            problems.append(
                f"{other.root / path} differs from that of {first.path}: modules beside the transformer are not merged "
                "and must be equal"
            )
    return problems
