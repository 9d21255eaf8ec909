"""What a finished merge says of itself: records, report, model card, config and summary beside the weights."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint import Checkpoint, CovarianceFile, ShardPlan, hash_file
from rgsp_jax.pipeline.config import DTYPES
from rgsp_jax.pipeline.model_card import model_card
from rgsp_jax.pipeline.plan import MergePlan
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.pipeline.report import Parent, RunSummary, count_flags, render_report

TOKENIZER_FILES = frozenset(
    {"tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model"}
)


def versions() -> dict[str, str]:
    """Of what computes."""
    return {name: version(name) for name in ("rgsp_jax", "jax", "jaxlib", "ott-jax", "numpy")}


def summarise(
    preparation: Preparation,
    name: str,
    records: Sequence[Mapping[str, Any]],
    hashes: Sequence[Sequence[str]],
    shards: ShardPlan,
) -> RunSummary:
    """The merge as a whole.

    Args:
        preparation: models and plan.
        name: of the output directory.
        records: one per tensor.
        hashes: SHA-256 of every weight file of every model read.
        shards: the files of the output.
    """
    plan, config, first = preparation.plan, preparation.config, preparation.checkpoints[0]
    method = config.resolved_method()
    models = zip(preparation.labels, preparation.checkpoints, hashes, strict=True)
    parents = [describe_parent(*facts) for facts in models]
    return RunSummary(
        method=method.name,
        hyperparameters=method.override(method.defaults, config.hyperparameters),
        output_name=name,
        parents=parents[: len(config.models)],
        base=parents[-1] if preparation.with_base else None,
        versions=versions(),
        config_yaml=config.to_yaml(),
        parameters=sum(task.size for task in plan.tasks.values()),
        dtype=dominant_dtype(plan),
        shards=len(shards.shards),
        bytes=shards.file_bytes,
        counts_by_rule=dict(Counter(f"{task.kind}: {task.method}" for task in plan.tasks.values())),
        architecture=next(iter((first.config or {}).get("architectures") or []), None),
        has_tokenizer=any(path.name in TOKENIZER_FILES for path in first.companions),
        flag_counts=count_flags(records),
        calibration=[describe_calibration(file) for file in preparation.covariances],
        warnings=find_warnings(preparation),
    )


def write_overview(
    directory: Path, summary: RunSummary, records: Sequence[Mapping[str, Any]], files: Mapping[str, str]
) -> None:
    """Put the report, the model card and the reproducing config beside the weights; no times, so equal runs agree.

    Args:
        directory: of the output.
        summary, records: what to say.
        files: SHA-256 of the output's weight files by name.
    """
    lines = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    overview = asdict(summary) | {"files": files}
    texts = {
        "report.jsonl": lines,
        "report.html": render_report(summary, records),
        "README.md": model_card(summary),
        "merge_config.yaml": summary.config_yaml,
        "merge_summary.json": json.dumps(overview, indent=2, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")


def dominant_dtype(plan: MergePlan) -> str:
    """The floating dtype that most of the output's bytes have."""
    sizes: Counter[str] = Counter()
    for task in plan.tasks.values():
        if task.out_dtype.name in DTYPES:
            sizes[task.out_dtype.name] += task.size
    return sizes.most_common(1)[0][0] if sizes else next(iter(plan.tasks.values())).out_dtype.name


def needs_dtype(config: dict[str, Any] | None, dtype: str) -> bool:
    """True where config.json says another dtype than the output has."""
    return config is not None and (config.get("dtype") or config.get("torch_dtype")) != dtype


def describe_parent(label: str, checkpoint: Checkpoint, hashes: Sequence[str]) -> Parent:
    """What the report says of a model."""
    config = checkpoint.config or {}
    floats = [spec for spec in checkpoint.specs.values() if spec.kind == "float"]
    return Parent(
        label=label,
        files=[(path.name, digest) for path, digest in zip(checkpoint.weight_files, hashes, strict=True)],
        architecture=next(iter(config.get("architectures") or []), None),
        model_type=config.get("model_type"),
        parameters=sum(spec.size for name, spec in checkpoint.specs.items() if name not in checkpoint.aliases),
        dtype=max(floats, key=lambda spec: spec.size).dtype.name if floats else None,
    )


def describe_calibration(file: CovarianceFile) -> str:
    """Where a covariance file's inputs came from, and which file it is."""
    sources = "; ".join(
        f"{record.examples} inputs of {record.name}"
        + (f", {record.held_back} more held back" if record.held_back else "")
        for record in file.data
    )
    return f"{file.path.name}: covariances of {file.model} on {sources}; sha256 {hash_file(file.path)}"


def find_warnings(preparation: Preparation) -> list[str]:
    """Sentences on what does not stand against a merge but deserves a look."""
    first, *others = preparation.checkpoints[: len(preparation.config.models)]
    warnings = []
    for label, other in zip(preparation.labels[1:], others, strict=False):
        for path in first.companions:
            if path.name not in TOKENIZER_FILES or path not in other.companions:
                continue
            if hash_file(first.root / path) != hash_file(other.root / path):
                warnings.append(f"{path} of {label} differs from the first model's, which was copied")
    return warnings
