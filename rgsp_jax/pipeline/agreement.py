"""What all processes of a merge must have in common, and what a resumed merge must have in common with its begin."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from rgsp_jax.checkpoint.store import identify_file, sample_place
from rgsp_jax.errors import RefusedError
from rgsp_jax.pipeline.overview import versions
from rgsp_jax.pipeline.preparation import Preparation

Facts = Mapping[str, str]


def fingerprint(preparation: Preparation) -> str:
    """Hash of everything that decides the output's bytes: settings, files as they lie on disk, versions, platform."""
    files = [
        identify_file(path)
        for path in [
            *(path for checkpoint in preparation.checkpoints for path in checkpoint.weight_files),
            *(file.path for file in preparation.covariances),
        ]
    ]
    items = [
        [item.group.key, item.capacity, [[p.name, p.start, p.size] for p in item.pieces]]
        for item in preparation.plan.items
    ]
    facts = [preparation.config.to_yaml(), files, items, versions(), jax.default_backend()]
    return hash_json(facts)


def hash_json(facts: Any) -> str:
    """SHA-256 (hexadecimal) of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def gather_facts(preparation: Preparation) -> dict[str, str]:
    """What a process works by. Files may lie elsewhere on every machine, and be copied at other times."""
    facts = {"other settings": hash_json([preparation.config.to_yaml(), preparation.config.memory])}
    facts |= {f"another version of {name}": version for name, version in versions().items()}
    for label, checkpoint in zip(preparation.labels, preparation.checkpoints, strict=True):
        facts[f"other files of {label}"] = hash_json(
            [[path.name, sample_place(path)] for path in checkpoint.weight_files]
        )
    for file in preparation.covariances:
        facts[f"another file {file.path}"] = sample_place(file.path)
    return facts


def require_agreement(facts: Sequence[Facts]) -> None:
    """RefusedError naming the processes that work by other facts than process 0, and which facts these are."""
    problems = []
    for what in dict.fromkeys(name for found in facts for name in found):
        others = [i for i, found in enumerate(facts) if found.get(what) != facts[0].get(what)]
        if others:
            who = f"process {others[0]} has" if len(others) == 1 else f"processes {join_numbers(others)} have"
            problems.append(f"{who} {what} than process 0: start all alike")
    if problems:
        raise RefusedError(problems)


def ask_platform() -> str:
    """The kind of device that this process computes on; RefusedError where JAX gets none."""
    try:
        return jax.default_backend()
    except RuntimeError as error:
        raise RefusedError(f"JAX gets no devices: {(str(error).splitlines() or [''])[0]}") from None


def require_one_platform(platforms: Sequence[str]) -> None:
    """RefusedError where processes compute on different kinds of device."""
    found = {p: [i for i, other in enumerate(platforms) if other == p] for p in dict.fromkeys(platforms)}
    if len(found) > 1:
        parts = [f"{platform} in process {join_numbers(who)}" for platform, who in found.items()]
        raise RefusedError(f"the processes compute on different platforms ({'; '.join(parts)}): set JAX_PLATFORMS")


def join_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
