"""`run_learning`: from parents and a few inputs of each to the merge of their family that answers as they do."""

import glob
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from rgsp_jax.checkpoint import replace_file
from rgsp_jax.errors import RefusedError
from rgsp_jax.learning import (
    LearningState,
    ModelFamily,
    check_learned,
    compose_tree,
    expert_tree,
    export_settings,
    make_step,
    place_rows,
    prepare_family,
    squared_distance,
    start_coefficients,
    start_learning,
)
from rgsp_jax.pipeline import MergeConfig, MergeResult, merge_checkpoints, parse_config, prepare
from rgsp_jax.pipeline.config import Override
from rgsp_jax.pipeline.merge import check_place
from rgsp_jax.pipeline.overview import versions
from rgsp_jax.pipeline.placement import choose_devices
from rgsp_jax.pipeline.plan import is_merged
from rgsp_jax.pipeline.preparation import Preparation
from rgsp_jax.registry import methods
from rgsp_jax.training.objectives import Answer, Batch, measure_agreement, measure_spread
from rgsp_jax.training.settings import LearnSettings
from rgsp_jax.training.task import Task, choose_objective, find_twins, open_tasks
from rgsp_jax.types import InputStatistics

METHOD = "relative"
"""Whose coefficients are learned where no method is named."""
CONFIG, HISTORY, STATE, KEY = "merge.yaml", "history.jsonl", "state", "run.json"
CACHED_BYTES = 1_000_000_000
"""Parents' answers are kept up to this size; past it they are made anew for every batch."""

SHARED = "devices"
"""The mesh's one axis: each device composes matrices of its own, and answers rows of its own."""

OnStep = Callable[["Record", int], None]
"""`on_step(what just happened, steps in all)`."""


class Record(NamedTuple):
    """One step."""

    step: int
    model: int
    """Whose inputs they were, counting from 0."""
    loss: float
    agreement: float | None
    """Share of the answers that are the label, or the parent's where there are no labels; None without answers."""


@dataclass(frozen=True)
class LearnResult:
    """What was learned."""

    merge: MergeResult
    config: Path
    """The learned setting as a merge config: it gives the same checkpoint without any data."""
    history: Path
    steps: int
    resumed_steps: int
    loss_before: float
    loss_after: float
    """Means over all inputs."""
    agreement_before: float | None
    agreement_after: float | None
    by_model: tuple[dict[str, Any], ...]
    """Loss and agreement before and after, of each model's inputs."""


def run_learning(
    config: MergeConfig,
    settings: LearnSettings,
    out: Path | str,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
    devices: int | None = None,
) -> LearnResult:
    """Learn the hyperparameters of a merge by gradient, and merge with them into `out`.

    Work goes on in `OUT.learning`: the optimiser's state, saved by Orbax as it goes, and `history.jsonl`. There the
    learned setting stays as `merge.yaml`, which `rgsp merge --config` reproduces the checkpoint from.

    Args:
        config: models and method (`relative` by default), hyperparameters to start from.
        settings: data, loss, optimiser.
        out: directory to create.
        resume: go on with an `OUT.learning` that was interrupted; the steps are those of a run that was not, to the bit
            on as many devices, to rounding on others.
        on_step: called after each.
        devices: of this process that share the models' matrices and the rows of every batch; None is all its
            accelerators, or one CPU device. Coefficients and the optimiser's state are on each.

    Raises:
        RefusedError: what the user can mend, all of it at once; nothing is left behind.
    """
    out, mesh = Path(out), make_mesh(devices)
    workshop = out.with_name(out.name + ".learning")
    config = config if config.method is not None else config.model_copy(update={"method": METHOD})
    with prepare(config, out) as preparation:
        problems = check_place(preparation, out) + find_problems(config, settings, workshop, resume=resume)
        if problems:
            raise RefusedError(problems)
        merged = [name for name in preparation.plan.tasks if is_merged(config, name)]
        tasks = open_tasks(preparation.checkpoints[: len(config.models)], config.models, merged, settings)
        family = load_family(preparation, merged, settings, mesh)
    run = Run(tasks, family, settings, mesh)
    key = fingerprint(config, settings, tasks)
    with workspace(workshop, key, resume=resume):
        history, (state, resumed) = open_history(workshop), restore(workshop, run)
        del history[resumed:]
        before = read_or_make(workshop / "before.json", lambda: run.evaluate(run.start.parameters))
        state = advance(run, state, history, workshop, on_step)
        after = run.evaluate(state.parameters)
        learned = export_config(config, family, state.parameters)
        (workshop / CONFIG).write_text(learned.to_yaml(), encoding="utf-8")
        result = merge_checkpoints(learned, out, resume=resume, devices=devices)
    shutil.rmtree(workshop / STATE, ignore_errors=True)
    return summarise(result, workshop, settings, resumed, before, after, tasks)


def make_mesh(devices: int | None) -> Mesh | None:
    """Of so many devices of this process, None where it is one; RefusedError where there are fewer."""
    chosen = choose_devices(devices)
    return Mesh(np.array(chosen), (SHARED,)) if chosen[1:] else None


def find_problems(config: MergeConfig, settings: LearnSettings, workshop: Path, *, resume: bool) -> list[str]:
    """What is wrong before any weight is read."""
    problems = []
    if len(config.models) < 2:
        problems.append("name two models or more")
    if config.overrides:
        problems.append("overrides: learning sets them itself; leave them out")
    if config.key_map is not None:
        problems.append("--key-map: learning runs the models, which must have one architecture; leave it out")
    method = config.resolved_method()
    try:
        check_learned(method, settings.learn, config.hyperparameters)
    except ValueError as error:
        problems.append(f"--learn: {error}")
    if "key" in method.needs:
        problems.append(f"method {method.name!r} draws random numbers: a gradient through one draw says little")
    if workshop.exists() and not resume:
        problems.append(f"{workshop} is left from an earlier run: finish it with --resume, or delete it")
    return problems


def load_family(
    preparation: Preparation, merged: Sequence[str], settings: LearnSettings, mesh: Mesh | None = None
) -> ModelFamily:
    """The models' weights, decomposed, on a mesh each matrix on a device of its own."""
    config = preparation.config
    trees: list[dict[str, Array]] = []
    problems = []
    for checkpoint, label in zip(preparation.checkpoints, preparation.labels, strict=True):
        weights = {name: checkpoint.read(name) for name in merged if name in checkpoint.specs}
        problems += [
            f"{label}: {name} holds values that are not finite"
            for name, x in weights.items()
            if jnp.issubdtype(x.dtype, jnp.inexact) and not np.isfinite(x.astype(np.float32)).all()
        ]
        trees.append({name: jnp.asarray(x) for name, x in weights.items()})
    if problems:
        raise RefusedError(problems)
    base = trees.pop() if preparation.with_base else None
    method = config.resolved_method()
    first = preparation.checkpoints[0].config or {}
    try:
        return prepare_family(
            trees,
            method,
            learn=settings.learn,
            base=base,
            inputs=read_inputs(preparation) if "covariances" in method.needs else None,
            model_type=first.get("model_type"),
            layout="pytorch",
            mesh=mesh,
            axis=SHARED,
            **config.hyperparameters,
        )
    except ValueError as error:
        raise RefusedError(str(error)) from None


def read_inputs(preparation: Preparation) -> dict[str, InputStatistics]:
    """Covariances of the inputs of every matrix that the files have."""
    found = {}
    for name, task in preparation.plan.tasks.items():
        if not task.sites:
            continue
        kinds = {file.sites[site].kind for file, site in zip(preparation.covariances, task.sites, strict=True)}
        if kinds != {"full"}:
            raise RefusedError(
                f"{preparation.covariances[0].path}: {name} has no whole covariance; collect it with more --memory"
            )
        arrays = [f.read(s, "covariance") for f, s in zip(preparation.covariances, task.sites, strict=True)]
        found[name] = InputStatistics(covariance=jnp.stack([jnp.asarray(x) for x in arrays]))
    return found


class Run:
    """Everything that a step takes, compiled once."""

    def __init__(self, tasks: Sequence[Task], family: ModelFamily, settings: LearnSettings, mesh: Mesh | None = None):
        self.family, self.settings, self.mesh = family, settings, mesh
        self.tasks = [replace(task, own=self.spread(task.own), head=self.spread(task.head)) for task in tasks]
        self.objective = choose_objective(tasks, settings)
        self.optimiser = settings.make_optimiser()
        self.start = self.spread(start_learning(start_coefficients(family, settings.per), self.optimiser))
        self.batches = [(k, batch) for k, task in enumerate(tasks) for batch in task.batches]
        twins = find_twins(tasks)
        teach = {k: jax.jit(tasks[k].answer) for k in set(twins)}
        losses = {k: self._make_loss(k) for k in set(twins)}
        steps = {k: make_step(loss, self.optimiser, has_aux=True) for k, loss in losses.items()}
        measures = {k: jax.jit(loss) for k, loss in losses.items()}
        self._teach = [teach[k] for k in twins]
        self._steps = [steps[k] for k in twins]
        self._measures = [measures[k] for k in twins]
        self._answers: dict[int, Answer] = {}
        self._cached = 0
        self.spreads = [self._measure_spread(k) for k in range(len(tasks))]

    def spread(self, tree: Any) -> Any:
        """The same on every device."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def place(self, batch: Batch) -> Batch:
        """A batch with its rows divided over the devices."""
        return batch if self.mesh is None else place_rows(batch, self.mesh, SHARED)

    def _make_loss(self, k: int) -> Callable[..., Any]:
        """Loss on one model's inputs, with (answers right, answers) beside it."""
        task, settings, labelled = self.tasks[k], self.settings, self.settings.label_field is not None
        temperature, objective, pull, start = settings.temperature, self.objective, settings.pull, self.start.parameters

        def loss(
            parameters: Any,
            family: ModelFamily,
            own: Mapping[str, Array],
            head: Any,
            batch: Batch,
            teacher: Answer,
            spread: Mapping[str, Array],
        ) -> Any:
            merged = task.answer(compose_tree(family, parameters), own, head, batch)
            value = objective.loss(merged, teacher, batch, temperature, spread)
            if pull:
                value = value + pull * squared_distance(parameters, start).astype(value.dtype)
            return value, measure_agreement(merged, teacher, batch, labelled)

        return loss

    def teach(self, index: int) -> Answer:
        """The parent's own answers to a batch, kept while there is room."""
        if index in self._answers:
            return self._answers[index]
        k, batch = self.batches[index]
        task = self.tasks[k]
        answer = self._teach[k](expert_tree(self.family, k), task.own, task.head, self.place(batch))
        kept = self.objective.reads | {"logits"}  # by which agreement is measured, whatever the loss
        answer = answer._replace(**dict.fromkeys(set(Answer._fields) - kept))
        size = sum(x.nbytes for x in jax.tree.leaves(answer))
        if self._cached + size <= CACHED_BYTES:
            self._cached += size
            self._answers[index] = answer
        return answer

    def _measure_spread(self, k: int) -> dict[str, Array]:
        """Mean over a model's batches."""
        own = [i for i, (j, _) in enumerate(self.batches) if j == k]
        found = [measure_spread(self.teach(i), self.place(self.batches[i][1]), self.objective.reads) for i in own]
        return jax.tree.map(lambda *xs: jnp.mean(jnp.stack(xs)), *found)

    def arguments(self, index: int) -> tuple[Any, ...]:
        """What the loss takes beside the parameters."""
        k, batch = self.batches[index]
        task = self.tasks[k]
        return self.family, task.own, task.head, self.place(batch), self.teach(index), self.spreads[k]

    def order(self, epoch: int) -> np.ndarray:
        """In which the batches of an epoch come: a function of the seed alone, so that a run can be resumed."""
        return np.random.default_rng([self.settings.seed, epoch]).permutation(len(self.batches))

    def step(self, state: LearningState, number: int) -> tuple[LearningState, Record]:
        """Take step `number`, counting from 0."""
        epoch, place = divmod(number, len(self.batches))
        index = int(self.order(epoch)[place])
        k = self.batches[index][0]
        state, (loss, (right, total)) = self._steps[k](state, *self.arguments(index))
        share = float(right) / float(total) if total else None
        return state, Record(number + 1, k, float(loss), share)

    def evaluate(self, parameters: Any) -> list[dict[str, Any]]:
        """Mean loss and agreement of every model's inputs."""
        found = []
        for k in range(len(self.tasks)):
            sums, rows = np.zeros(3), 0
            for index, (j, batch) in enumerate(self.batches):
                if j == k:
                    count = int(batch.rows.sum())
                    loss, (right, total) = self._measures[k](parameters, *self.arguments(index))
                    sums += float(loss) * count, float(right), float(total)
                    rows += count
            found.append({"loss": sums[0] / rows, "agreement": sums[1] / sums[2] if sums[2] else None})
        return found


def advance(
    run: Run, state: LearningState, history: list[Record], workshop: Path, on_step: OnStep | None
) -> LearningState:
    """Take the steps that are left, saving as it goes."""
    total, every = run.settings.steps, run.settings.save_every
    with checkpoints(workshop) as manager:
        for number in range(int(state.step), total):
            state, record = run.step(state, number)
            history.append(record)
            if on_step:
                on_step(record, total)
            if (number + 1) % every == 0 or number + 1 == total:
                write_lines(workshop / HISTORY, [r._asdict() for r in history])
                manager.save(number + 1, args=ocp.args.StandardSave(jax.tree.map(np.asarray, state)))
                manager.wait_until_finished()
    return state


@contextmanager
def checkpoints(workshop: Path) -> Iterator[ocp.CheckpointManager]:
    """Orbax' states of a run, the last two of them."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager((workshop / STATE).absolute(), options=options) as manager:
        yield manager


def restore(workshop: Path, run: Run) -> tuple[LearningState, int]:
    """The state that was saved last and its step, or the start."""
    with checkpoints(workshop) as manager:
        latest = manager.latest_step()
        if latest is None:
            return run.start, 0
        like = jax.tree.map(np.asarray, run.start)
        state = manager.restore(latest, args=ocp.args.StandardRestore(like))
    return run.spread(jax.tree.map(lambda x, s: jnp.asarray(x, s.dtype), state, run.start)), latest


def export_config(config: MergeConfig, family: ModelFamily, parameters: Any) -> MergeConfig:
    """The merge of these parameters: every tensor's setting as an override."""
    fixed = dict(family.settings)
    settings = export_settings(family, parameters)
    overrides = []
    for name, (method, hyperparameters) in settings.items():
        changed = {key: value for key, value in hyperparameters.items() if key not in fixed}
        same = method == family.method
        if method == "average" and len(set(changed["coefficients"])) == 1:
            continue  # what the method does with this tensor anyway
        if methods[family.method].rest == "first" and not same:
            continue
        pattern = glob.escape(name)
        overrides.append(Override(pattern=pattern, method=None if same else method, hyperparameters=changed))
    fields = config.model_dump(exclude_defaults=True) | {
        "models": config.models,
        "method": family.method,
        "hyperparameters": fixed,
        "overrides": [override.model_dump() for override in overrides],
    }
    return parse_config(fields, "learned setting")


def fingerprint(config: MergeConfig, settings: LearnSettings, tasks: Sequence[Task]) -> str:
    """Hash of everything that decides what is learned."""
    facts = [
        config.to_yaml(),
        asdict(settings) | {"save_every": None},
        [task.dataset.digest for task in tasks],
        versions(),
        jax.default_backend(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def workspace(workshop: Path, key: str, *, resume: bool) -> Iterator[None]:
    """The directory of an unfinished run; RefusedError where another run's lies there."""
    note = workshop / KEY
    if workshop.exists() and resume:
        known = json.loads(note.read_text())["run"] if note.exists() else None
        if known not in (None, key):
            raise RefusedError(
                f"{workshop} is of another run (other models, data, settings or versions): repeat its command, or "
                "delete it"
            )
    workshop.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps({"run": key}) + "\n")
    yield


def open_history(workshop: Path) -> list[Record]:
    """Steps taken before."""
    path = workshop / HISTORY
    lines = path.read_text().splitlines() if path.exists() else []
    return [Record(**json.loads(line)) for line in lines]


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or as they were."""
    replace_file(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())


def read_or_make(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, made and kept there the first time."""
    if path.exists():
        return json.loads(path.read_text())
    found = make()
    replace_file(path, json.dumps(found).encode())
    return found


def summarise(
    merge: MergeResult,
    workshop: Path,
    settings: LearnSettings,
    resumed: int,
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    tasks: Sequence[Task],
) -> LearnResult:
    """Means over the models."""

    def mean(found: Sequence[Mapping[str, Any]], name: str) -> Any:
        values = [one[name] for one in found]
        return None if None in values else float(np.mean(values))

    each = tuple(
        {"model": task.label, "before": dict(b), "after": dict(a)}
        for task, b, a in zip(tasks, before, after, strict=True)
    )
    return LearnResult(
        merge=merge,
        config=workshop / CONFIG,
        history=workshop / HISTORY,
        steps=settings.steps,
        resumed_steps=resumed,
        loss_before=mean(before, "loss"),
        loss_after=mean(after, "loss"),
        agreement_before=mean(before, "agreement"),
        agreement_after=mean(after, "agreement"),
        by_model=each,
    )
