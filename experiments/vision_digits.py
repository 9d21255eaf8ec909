"""Merge vision transformers fine-tuned on tasks made of scikit-learn's digits; every method, many seeds.

    python experiments/vision_digits.py --work WORK
    python experiments/vision_digits.py --regime domains --work WORK

Hardware: 2 CPU cores, 4 GB. Runtime on cores that others use too: five to nine minutes for each command; with WORK
empty half an hour for the first, most of it compilation. A seed's eight experts train in 15 seconds. A run that was
stopped goes on where it was.

Every seed deals the 1797 digits into 900 training, 300 validation and 597 test rows, trains an ancestor on the ten
digits (20 epochs at 1e-3) and fine-tunes it for each task with AdamW. Encoders are merged, heads are not: a task's head
answers on the merged encoder's class token. Regimes (digit_tasks.py): `labels`, eight questions about the same images;
`domains`, eight views of the images (rotated, inverted, shifted, noisy, ...) under the ancestor's head, which is common
to all and kept as it is; `classes`, eight subsets of three digits, seen upside down; `mixed`, three of each. A seed
takes its tasks in an order of its own, so that the standard error is over splits, trainings and choices of tasks.

Which methods, their grids, and what the columns are: harness.py. Covariances and Fisher information are of 200 training
rows of each task. `--learning-rate 1e-4`, `1e-3` and `--width 32`, `128` make experts that moved less or more.

Results go to experiments/results/vision_digits_REGIME.md, .json and .png. Expected accuracies (mean over the tasks,
three seeds, untuned; 2 / 4 / 8 experts): labels, individual .97 / .97 / .97, average .94 / .82 / .68,
relative .94 / .88 / .82, TSV-M with the base .95 / .91 / .85; domains, individual .86 / .88 / .89, average .64 / .40 /
.36, relative .64 / .43 / .39, TSV-M .73 / .52 / .44.
"""

import argparse
import ast
import functools
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Contender, Problem, PyTree, make_contenders
from digit_tasks import REGIMES, DigitTask, Regime, load_parts, view
from digit_training import Classifier, Store, Training, answer, encode, make_shape, train_ancestor, train_expert
from harness import Outcome, draw, find_headline, run, tabulate, to_record
from jaxtyping import Array, Bool, Float, Int
from model_statistics import collect_covariances, estimate_fisher
from tables import RESULTS, describe_command, write_results

import rgsp_jax
from rgsp_jax.models import VitConfig

STATISTICS_ROWS = 200
"""Training rows of each task that covariances and Fisher information are taken over."""

SCRIPTS = ("contenders", "digit_tasks", "digit_training", "harness", "model_statistics")
SHOWN = ("individual", "average", "tsv_m", "relative")


def choose_tasks(regime: Regime, seed: int, experts: int) -> list[DigitTask]:
    """Return the seed's first tasks of the regime; more experts keep those that fewer had."""
    order = np.random.default_rng((seed, len(regime.name))).permutation(len(regime.tasks))
    if experts > len(order):
        raise ValueError(f"regime {regime.name!r} has {len(order)} tasks, not {experts}")
    return [regime.tasks[i] for i in order[:experts]]


class TaskRows(NamedTuple):
    """What is asked of the rows of one part."""

    domains: Int[Array, "tasks"]
    """Which of the distinct views of the images each task has."""
    weights: Float[Array, "tasks width classes"]
    biases: Float[Array, "tasks classes"]
    answers: Bool[Array, "tasks classes"]
    labels: Int[Array, "tasks rows"]
    counts: Bool[Array, "tasks rows"]
    """Rows that belong to the task."""


@functools.partial(jax.jit, static_argnames=("config",))
def measure_accuracies(
    config: VitConfig, encoder: PyTree, views: Float[Array, "domains rows 8 8 1"], tasks: TaskRows
) -> Float[Array, "tasks"]:
    """Return the accuracy of every task: the encoder sees each domain once, then every head answers."""
    features = jax.lax.map(lambda images: encode(config, encoder, images), views)[tasks.domains]
    logits = jnp.einsum("trw,twc->trc", features, tasks.weights) + tasks.biases[:, None, :]
    answers = jnp.where(tasks.answers[:, None], logits, -jnp.inf).argmax(-1).astype(tasks.labels.dtype)
    right = (answers == tasks.labels) & tasks.counts
    return right.sum(1) / tasks.counts.sum(1)


def make_score(config: VitConfig, tasks: Sequence[DigitTask], experts: Sequence[Classifier], seed: int) -> Any:
    """Return the problem's score: the share of a task's rows that the encoder answers rightly with its head."""
    domains = list(dict.fromkeys(task.domain for task in tasks))
    which = jnp.asarray([domains.index(task.domain) for task in tasks], jnp.int32)
    weights, biases = (jnp.stack([getattr(expert, name) for expert in experts]) for name in ("weight", "bias"))
    answers = jnp.asarray(np.stack([task.answers for task in tasks]))
    parts = {}
    for part in ("validation", "test"):
        rows = load_parts(seed)[part]
        labels = jnp.asarray(np.stack([task.label(rows.digits) for task in tasks]))
        counts = jnp.asarray(np.stack([task.belongs(rows.digits) for task in tasks]))
        views = jnp.stack([jnp.asarray(view(rows, domain)) for domain in domains])
        parts[part] = views, TaskRows(which, weights, biases, answers, labels, counts)
    return lambda tree, part: np.asarray(measure_accuracies(config, tree, *parts[part]), np.float64)


def make_problem(store: Store, training: Training, regime: Regime, seed: int, count: int) -> Problem:
    """Return experts, base, scores and statistics of one seed."""
    tasks, config = choose_tasks(regime, seed, count), training.configure()
    experts = [train_expert(store, training, regime, task, seed) for task in tasks]
    train = load_parts(seed)["train"]
    images = []
    for task in tasks:
        members = np.flatnonzero(task.belongs(train.digits))
        images.append(view(train, task.domain)[np.resize(members, STATISTICS_ROWS)])
    keys = jax.random.split(jax.random.key(seed), count)
    encoders = [expert.encoder for expert in experts]
    return Problem(
        experts=encoders,
        tasks=[task.name for task in tasks],
        score=make_score(config, tasks, experts, seed),
        seed=seed,
        group={"regime": regime.name, "experts": count},
        base=train_ancestor(store, training, regime, seed).encoder,
        inputs=collect_covariances(make_shape(config), encoders, images),
        fishers=[
            find_fisher(config, expert, jnp.asarray(task.answers), jnp.asarray(batch), key)
            for expert, task, batch, key in zip(experts, tasks, images, keys, strict=True)
        ],
    )


@functools.partial(jax.jit, static_argnames=("config",))
def find_fisher(config: VitConfig, expert: Classifier, answers: Array, images: Array, key: Array) -> PyTree:
    """Return the encoder's Fisher information under its own task's head."""
    return estimate_fisher(
        lambda tree, x: answer(config, expert._replace(encoder=tree), answers, x), expert.encoder, images, key
    )


@contextmanager
def open_work(work: Path | None) -> Iterator[Path]:
    """Give `work`, where compiled functions are kept too, or a directory that is deleted afterwards."""
    if work is None:
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory)
        return
    jax.config.update("jax_compilation_cache_dir", str(work / "compiled"))
    yield work


def run_all(options: argparse.Namespace, contenders: Sequence[Contender], work: Path) -> Iterator[Outcome]:
    """Yield the outcomes of every regime, number of experts and seed, and print what they come to.

    Outcomes of the same code and settings that are in `work` are not run again.
    """
    store = Store(work / "experts")
    for name, count, seed in itertools.product(options.regime, options.experts, options.seeds):
        started = time.monotonic()
        training = Training(options.width, options.learning_rate, options.epochs)
        rows = [(c.name, c.settings) for c in contenders]
        what = repr((hash_sources(), asdict(training), asdict(REGIMES[name]), seed, count, rows))
        kept = work / "outcomes" / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.json"
        if not kept.exists():
            outcomes = run(make_problem(store, training, REGIMES[name], seed, count), contenders)
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(".partial")
            partial.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
            partial.replace(kept)
        outcomes = [Outcome(**fields) for fields in json.loads(kept.read_text())]
        found = {o.method: o.mean for o in outcomes if o.column == "untuned"}
        shown = "  ".join(f"{m} {found[m]:.3f}" for m in SHOWN if m in found)
        print(f"{name} K={count} seed {seed}: {shown}  ({time.monotonic() - started:.0f} s)", flush=True)
        yield from outcomes


@functools.cache
def hash_sources() -> str:
    """Return a hash of the code that outcomes depend on, comments and layout apart."""
    package = Path(rgsp_jax.__file__).parent
    folders = [package / name for name in ("grafting", "linalg", "merging", "models", "rgsp", "transport")]
    names = ("batching.py", "method.py", "registry.py", "rules.py", "trees.py")
    files = [*(file for folder in folders for file in folder.rglob("*.py")), *(package / name for name in names)]
    files += [Path(__file__).with_name(f"{name}.py") for name in (*SCRIPTS, Path(__file__).stem)]
    digest = hashlib.sha256()
    for file in sorted(files):
        tree = ast.parse(file.read_text())
        if ast.get_docstring(tree) is not None:
            del tree.body[0]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regime", nargs="+", choices=sorted(REGIMES), default=["labels"], help="default: labels")
    parser.add_argument("--experts", nargs="+", type=int, default=[2, 4, 8], help="models merged (default: 2 4 8)")
    parser.add_argument("--width", type=int, default=64, help="of the encoder, a multiple of 4 (default: 64)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="of the fine-tuning (default: 3e-4)")
    parser.add_argument("--epochs", type=int, default=10, help="of the fine-tuning (default: 10)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", help="default: every one that a tree can be merged by")
    parser.add_argument("--work", type=Path, help="keep experts, outcomes and compiled code here, and use them")
    parser.add_argument("--out", type=Path, help="default: experiments/results/vision_digits_REGIME")
    options = parser.parse_args(arguments)
    options.out = options.out or RESULTS / "_".join(["vision_digits", *options.regime])
    if wrong := [count for count in options.experts if not 2 <= count <= 8]:
        parser.error(f"--experts {wrong[0]}: 2 to 8 experts are merged")
    return options


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Run the experiment and return its outcomes."""
    options = parse_arguments(arguments)
    contenders = make_contenders(options.methods)
    with open_work(options.work) as work:
        outcomes = list(run_all(options, contenders, work))
    settings = {
        name: getattr(options, name) for name in ("regime", "experts", "width", "learning_rate", "epochs", "seeds")
    }
    settings |= {"methods": options.methods} if options.methods else {}
    command, rows = describe_command("vision_digits", settings), {k: len(v.digits) for k, v in load_parts(0).items()}
    record = {"settings": settings, "rows": rows, **to_record(outcomes)}
    write_results(options.out, command, find_headline(outcomes), record, tabulate(outcomes))
    draw(outcomes, options.out.with_suffix(".png"))
    return outcomes


if __name__ == "__main__":
    main()
