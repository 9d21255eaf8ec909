"""Merge BERT encoders fine-tuned on different tasks and score every merge with each task's own head.

    python experiments/text_encoders.py --bench BENCH --tasks trec subj mr

Hardware: 2 CPU cores, 4 GB. Runtime: about 10 minutes. `pip install .[experiments]` brings the tokenisers.

`BENCH/<task>/` holds `model/` (a Hugging Face BERT directory with its tokenizer.json), `head.safetensors` (`weight
[classes, width]`, `bias`) and `test.jsonl` (`{"text", "label"}`). A prediction is the head's answer to the mean of the
last hidden states over the tokens, at most 48 of them; accuracies are over the first `--rows` test rows of each task.

Expected on all-MiniLM-L6-v2 encoders of TREC, SUBJ and MR, 600 rows (mean accuracy over the tasks merged; the whole
table is experiments/results/text_encoders.md): individual .895; all three: average .840, relative .874,
relative_weighted .865 and .868 (directions 2); TREC and SUBJ: average .933, rgsp_seed .552, the other way round .671.

`--score DIR ...` scores directories that are there already; `--methods relative:rank=0.1,scale=2` merges with any
method and hyperparameters; `--backend transformers` runs the encoders in PyTorch instead of flax.
"""

import argparse
import hashlib
import itertools
import json
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from flax import nnx
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

from rgsp_jax.checkpoint import open_checkpoint
from rgsp_jax.models import Bert, BertConfig, load_weights
from rgsp_jax.pipeline import MergeConfig, merge_checkpoints
from rgsp_jax.registry import methods
from rgsp_jax.version import __version__

MAXIMUM_LENGTH = 48
BUCKET = 8
"""Sequences are padded to a multiple of this many tokens: few shapes to compile, little padding to compute."""
BATCH = 50
METHODS = ("average", "slerp", "rgsp_seed", "rgsp", "relative", "relative_weighted", "relative_weighted:directions=2")

SYMMETRIC_BY_DEFAULT = ("slerp",)
"""Methods whose order counts, but not at the hyperparameters they have by default: half-way is half-way from both."""


class Task(NamedTuple):
    """One task's expert, head and test rows."""

    name: str
    model: Path
    weight: Float[np.ndarray, "classes width"]
    bias: Float[np.ndarray, "classes"]
    texts: tuple[str, ...]
    labels: Int[np.ndarray, "rows"]


class Batch(NamedTuple):
    """Tokenised rows of similar length; `rows` says which they are."""

    rows: Int[np.ndarray, "batch"]
    ids: Int[Array, "batch time"]
    mask: Int[Array, "batch time"]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    models: tuple[str, ...]
    """Tasks whose experts were merged, in the order given to the method."""
    accuracies: dict[str, float]
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    merge_seconds: float | None = None

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.accuracies.values())))


Encode = Callable[[Path, Sequence[Batch]], Float[np.ndarray, "rows width"]]


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Return every tensor of a checkpoint, by name."""
    with open_checkpoint(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def read_task(directory: Path, rows: int) -> Task:
    """Return a task of the bench with its first `rows` test rows."""
    head = read_weights(directory / "head.safetensors")
    with (directory / "test.jsonl").open() as lines:
        examples = [json.loads(line) for line in itertools.islice(lines, rows)]
    return Task(
        name=directory.name,
        model=directory / "model",
        weight=head["weight"].astype(np.float32),
        bias=head["bias"].astype(np.float32),
        texts=tuple(example["text"] for example in examples),
        labels=np.array([example["label"] for example in examples]),
    )


@cache
def tokenise(tokenizer_json: str, texts: tuple[str, ...]) -> list[Batch]:
    """Return the rows in batches by length; cached, so that models with one tokeniser share the work."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAXIMUM_LENGTH)
    encodings = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    padded = np.array([-(-len(ids) // BUCKET) * BUCKET for ids in encodings])
    batches = []
    for length in np.unique(padded):
        members = np.flatnonzero(padded == length)
        for start in range(0, len(members), BATCH):
            rows = members[start : start + BATCH]
            # A full batch every time: its shape is compiled once, and the rows past the end are never read.
            ids, mask = np.zeros((BATCH, length), np.int32), np.zeros((BATCH, length), np.int32)
            for i, row in enumerate(rows):
                ids[i, : len(encodings[row])] = encodings[row]
                mask[i, : len(encodings[row])] = 1
            batches.append(Batch(rows, jnp.asarray(ids), jnp.asarray(mask)))
    return batches


@jax.jit
def mean_hidden(
    hidden: Float[Array, "batch time width"], mask: Int[Array, "batch time"]
) -> Float[Array, "batch width"]:
    """Return the mean of the hidden states over the tokens that the mask keeps."""
    kept = mask.astype(hidden.dtype)
    share = kept / jnp.maximum(kept.sum(axis=1, keepdims=True), 1)
    return jnp.einsum("btw,bt->bw", hidden, share, precision="highest")


@nnx.jit
def run_bert(model: Bert, ids: Int[Array, "batch time"], mask: Int[Array, "batch time"]) -> Array:
    """Return the last hidden states."""
    return model(ids, mask)


def encode_with_flax(directory: Path, batches: Sequence[Batch]) -> Float[np.ndarray, "rows width"]:
    """Return the sentence vectors of this package's BERT, in float32."""
    weights = read_weights(directory)
    pooler = any("pooler." in name for name in weights)
    config = BertConfig.from_huggingface(json.loads((directory / "config.json").read_text()), pooler=pooler)
    model = load_weights(nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0))), weights)
    return gather(batches, lambda batch: mean_hidden(run_bert(model, batch.ids, batch.mask), batch.mask))


def encode_with_transformers(directory: Path, batches: Sequence[Batch]) -> Float[np.ndarray, "rows width"]:
    """Return the sentence vectors of transformers' BertModel, in float32."""
    import torch
    from transformers import BertModel

    loaded: Any = BertModel.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    model, info = loaded
    if any(info.values()):
        raise SystemExit(f"{directory} does not load whole in transformers: {info}")
    model.eval()

    def encode(batch: Batch) -> np.ndarray:
        ids, mask = (torch.tensor(np.asarray(array), dtype=torch.long) for array in (batch.ids, batch.mask))
        with torch.no_grad():
            hidden = model(ids, mask).last_hidden_state.numpy()
        return mean_hidden(hidden, batch.mask)

    return gather(batches, encode)


BACKENDS: Mapping[str, Encode] = {"flax": encode_with_flax, "transformers": encode_with_transformers}


def gather(batches: Sequence[Batch], encode: Callable[[Batch], Any]) -> np.ndarray:
    """Return what `encode` gives for the rows of all batches, in the order of the rows."""
    parts = [np.asarray(encode(batch))[: len(batch.rows)] for batch in batches]
    order = np.concatenate([batch.rows for batch in batches])
    return np.concatenate(parts)[np.argsort(order)]


class Scorer:
    """Accuracies of models on tasks; a model with weights seen before is not run again.

    With `store`, a JSON file, what was seen is kept from run to run.
    """

    def __init__(self, tasks: Sequence[Task], encode: Encode, store: Path | None = None):
        self.tasks = {task.name: task for task in tasks}
        self.encode = encode
        self.store = store
        self.known: dict[str, float] = json.loads(store.read_text()) if store is not None and store.exists() else {}

    def score(self, directory: Path, names: Sequence[str]) -> dict[str, float]:
        """Return the share of test rows answered rightly, by task."""
        weights = hash_weights(directory)
        scores = {}
        for name in names:
            key = f"{weights} {hash_task(self.tasks[name])} {self.encode.__name__}"
            if key not in self.known:
                self.known[key] = self._run(directory, self.tasks[name])
                if self.store is not None:
                    self.store.write_text(json.dumps(self.known, indent=2))
            scores[name] = self.known[key]
        return scores

    def _run(self, directory: Path, task: Task) -> float:
        batches = tokenise((directory / "tokenizer.json").read_text(), task.texts)
        vectors = self.encode(directory, batches)
        answers = (vectors @ task.weight.T + task.bias).argmax(axis=1)
        return float((answers == task.labels).mean())


def hash_task(task: Task) -> str:
    """Return a hash of a task's head and test rows."""
    arrays = (task.weight, task.bias, task.labels)
    content = "\n".join(task.texts).encode() + b"".join(np.asarray(array, order="C").tobytes() for array in arrays)
    return hashlib.sha256(content).hexdigest()


def hash_weights(directory: Path) -> str:
    """Return a hash of all weights in a checkpoint, with their names, shapes and dtypes."""
    digest = hashlib.sha256()
    for name, array in sorted(read_weights(directory).items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Return `name:key=value,key=value` as a name and hyperparameters; exits where there is no such method."""
    name, _, settings = text.partition(":")
    if name not in methods:
        raise SystemExit(f"no method {name!r}; there are {', '.join(methods)}")
    pairs = (setting.split("=", 1) for setting in settings.split(",") if setting)
    return name, {key: yaml.safe_load(value) for key, value in pairs}


def choose_groups(name: str, hyperparameters: Mapping[str, Any], tasks: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Yield what a method is run on: every pair, both ways round where its order counts, then all tasks at once."""
    method = methods[name]
    least, most = method.models
    symmetric = method.order_invariant or (name in SYMMETRIC_BY_DEFAULT and not hyperparameters)
    if least <= 2 <= len(tasks):
        yield from (itertools.combinations if symmetric else itertools.permutations)(tasks, 2)
    if len(tasks) > 2 and (most is None or most >= len(tasks)):
        yield tuple(tasks)


@contextmanager
def working_directory(keep: Path | None) -> Iterator[Path]:
    """Give `keep`, or a directory that is deleted afterwards."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory)


def run_merges(scorer: Scorer, choices: Sequence[str], work: Path) -> Iterator[Row]:
    """Merge by every method on every group it takes; yield a scored row each. Merges found in `work` are kept."""
    for text in choices:
        name, hyperparameters = parse_method(text)
        for group in choose_groups(name, hyperparameters, list(scorer.tasks)):
            out = work / f"{text.replace(':', '-')}-{'+'.join(group)}"
            seconds = None
            if not out.exists():
                models = tuple(str(scorer.tasks[task].model) for task in group)
                started = time.monotonic()
                merge_checkpoints(
                    MergeConfig(models=models, method=name, hyperparameters=hyperparameters), out, resume=True
                )
                seconds = time.monotonic() - started
            yield Row(name, group, scorer.score(out, group), hyperparameters, seconds)


def write_results(rows: Sequence[Row], scorer: Scorer, settings: dict[str, Any], out: Path) -> None:
    """Write the table as Markdown and, with settings and versions, as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    counts = {name: len(task.labels) for name, task in scorer.tasks.items()}
    record = {
        "settings": settings,
        "test_rows": counts,
        "versions": {"rgsp_jax": __version__, "jax": jax.__version__, "python": platform.python_version()},
        "rows": [
            {
                "method": row.method,
                "hyperparameters": row.hyperparameters,
                "models": list(row.models),
                "accuracies": row.accuracies,
                "mean": row.mean,
                "merge_seconds": row.merge_seconds,
            }
            for row in rows
        ],
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    head = ["models", "method", *(f"{name} ({count})" for name, count in counts.items()), "mean"]
    lines = [f"# {out.name}", "", f"    {settings['command']}", ""]
    lines += [
        f"Accuracy on the first {settings['rows']} test rows at most (number of rows in brackets); encoders run in "
    ]
    lines[-1] += f"{settings['backend']}, {MAXIMUM_LENGTH} tokens at most. The mean is over the tasks that were merged."
    lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [", ".join(row.models), describe(row)]
        cells += [f"{row.accuracies[name]:.3f}" if name in row.accuracies else "" for name in counts]
        lines.append(f"| {' | '.join([*cells, f'{row.mean:.4f}'])} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")


def describe(row: Row) -> str:
    """Return the method with the hyperparameters that were set."""
    return row.method + "".join(f", {key} {value}" for key, value in row.hyperparameters.items())


def describe_command(options: argparse.Namespace, tasks: Sequence[str]) -> str:
    """Return the command that repeats the run, without the paths of the machine it was run on."""
    parts = ["python", "experiments/text_encoders.py", "--bench", "BENCH", "--tasks", *tasks]
    parts += ["--rows", str(options.rows), "--backend", options.backend]
    if tuple(options.methods) != METHODS:
        parts += ["--methods", *options.methods]
    return shlex.join(parts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="directory of task directories")
    parser.add_argument("--tasks", nargs="+", help="tasks, in the order methods get them (default: all, by name)")
    parser.add_argument("--rows", type=int, default=600, help="test rows of each task (default: 600)")
    parser.add_argument("--methods", nargs="*", default=METHODS, help=f"default: {' '.join(METHODS)}")
    parser.add_argument(
        "--score", nargs="+", type=Path, default=[], help="score these directories on all tasks, no more"
    )
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="flax")
    parser.add_argument(
        "--work", type=Path, help="keep merged models and scores here, and use those found (default: deleted)"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "text_encoders")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the experiment and return its rows."""
    options = parse_arguments(arguments)
    names = options.tasks or sorted(path.parent.name for path in options.bench.glob("*/head.safetensors"))
    tasks = [read_task(options.bench / name, options.rows) for name in names]
    rows = []
    with working_directory(options.work) as work:
        scorer = Scorer(tasks, BACKENDS[options.backend], work / "scores.json")
        for row in itertools.chain(score_given(scorer, options.score), run_all(scorer, options, work)):
            rows.append(row)
            cells = "  ".join(f"{name} {accuracy:.3f}" for name, accuracy in row.accuracies.items())
            print(f"{'+'.join(row.models):20s} {describe(row):24s} {cells}  mean {row.mean:.4f}", flush=True)
    if not options.score:
        settings = {"command": describe_command(options, names), "rows": options.rows, "backend": options.backend}
        write_results(rows, scorer, settings | {"maximum_length": MAXIMUM_LENGTH}, options.out)
    return rows


def score_given(scorer: Scorer, directories: Sequence[Path]) -> Iterator[Row]:
    """Yield a row for each directory, scored on all tasks."""
    for directory in directories:
        yield Row("as given", (directory.name,), scorer.score(directory, list(scorer.tasks)))


def run_all(scorer: Scorer, options: argparse.Namespace, work: Path) -> Iterator[Row]:
    """Yield the experts' own row and one for every merge, unless only given directories are to be scored."""
    if options.score:
        return
    own = {name: scorer.score(task.model, [name])[name] for name, task in scorer.tasks.items()}
    yield Row("individual", tuple(scorer.tasks), own)
    yield from run_merges(scorer, options.methods, work)


if __name__ == "__main__":
    main()
