"""One parent's side of learning: the model around its weights, its inputs in batches, and its answers to them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from rgsp_jax.activations.examples import Dataset, Example, read_examples
from rgsp_jax.activations.flax_runner import RUNNABLE, find_family, load_fast_tokenizer, prepare_image
from rgsp_jax.checkpoint import Checkpoint, open_checkpoint
from rgsp_jax.errors import RefusedError
from rgsp_jax.layouts import to_torch_shape
from rgsp_jax.models import (
    HEADLESS,
    Family,
    match_names,
    place_weights,
    recompute_layers,
    without_pooler,
)
from rgsp_jax.models.families import Shapes
from rgsp_jax.models.weights import WeightPlace
from rgsp_jax.training.objectives import OBJECTIVES, Answer, Batch, Objective
from rgsp_jax.training.settings import LearnSettings

SHORTEST = 16
"""Texts are padded to this many tokens times a power of two: few shapes to compile."""
COMPUTE_DTYPE = np.float32
"""What models answer in, whatever their weights are on disk."""
NEVER = -1e9
"""Logit of a class that a task does not have."""

Head = dict[str, Array] | None


@dataclass(frozen=True)
class Task:
    """A parent: how a tree of its weights answers, and the batches it teaches on."""

    label: str
    """The model as the user named it."""
    model: nnx.Module
    """Abstract."""
    family: Family
    places: Mapping[str, WeightPlace]
    """Name of a weight -> where it lives in the model."""
    own: Mapping[str, Array]
    """Weights that are not merged, a classifier say: the parent's, which hold for its inputs."""
    head: Head
    batches: tuple[Batch, ...]
    dataset: Dataset
    pooling: str
    recompute: bool

    def answer(self, weights: Mapping[str, Array], own: Mapping[str, Array], head: Head, batch: Batch) -> Answer:
        """What the model says with these weights; traceable. They compute in float32."""
        model = place_weights(self.model, self.places, {**own, **weights})
        if self.recompute:
            model = recompute_layers(model)
        output = self.family.run(model, {name: batch.inputs[name] for name in self.family.inputs})
        if not isinstance(self.model, HEADLESS):
            return Answer(None, None, output)
        pooled = pool(output, batch, self.pooling)
        logits = None if head is None else pooled @ head["weight"].T + head["bias"][None]
        return Answer(pooled, output, logits)


def pool(hidden: Array, batch: Batch, pooling: str) -> Array:
    """One vector of each input's hidden states [batch, time, width]."""
    mask = batch.inputs.get("attention_mask")
    kept = jnp.ones(hidden.shape[:2], hidden.dtype) if mask is None else mask.astype(hidden.dtype)
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        last = jnp.maximum(kept.sum(1).astype(jnp.int32) - 1, 0)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    share = kept / jnp.maximum(kept.sum(1, keepdims=True), 1)
    return jnp.einsum("btw,bt->bw", hidden, share)


def open_tasks(
    checkpoints: Sequence[Checkpoint], labels: Sequence[str], merged: Sequence[str], settings: LearnSettings
) -> list[Task]:
    """The tasks of all models; RefusedError with everything that is wrong with any of them."""
    problems: list[str] = []
    if len(settings.data) != len(checkpoints):
        problems.append(f"{len(settings.data)} data for {len(checkpoints)} models: give one --data for each, in order")
    tasks = []
    for k, (checkpoint, label) in enumerate(zip(checkpoints, labels, strict=True)):
        if k >= len(settings.data):
            break
        try:
            tasks.append(open_task(checkpoint, label, merged, settings, k))
        except RefusedError as error:
            problems += error.problems
    if not problems:
        problems += [p for task in tasks for p in find_lacking(task, choose_objective(tasks, settings))]
    if problems:
        raise RefusedError(dict.fromkeys(problems))
    return pad_heads(tasks)


def pad_heads(tasks: Sequence[Task]) -> list[Task]:
    """The same with heads of equally many classes, for one compiled step; those added are never said."""
    classes = max((task.head["bias"].shape[0] for task in tasks if task.head is not None), default=0)

    def pad(head: dict[str, Array]) -> dict[str, Array]:
        more = classes - head["bias"].shape[0]
        return {
            "weight": jnp.pad(head["weight"], ((0, more), (0, 0))),
            "bias": jnp.pad(head["bias"], (0, more), constant_values=NEVER),
        }

    return [task if task.head is None else replace(task, head=pad(task.head)) for task in tasks]


def find_twins(tasks: Sequence[Task]) -> list[int]:
    """For every task the first whose functions are the same, so that they are compiled once."""

    def describe(task: Task) -> Any:
        return nnx.split(task.model)[0], shape_weights(task), jax.tree.map(jnp.shape, (task.own, task.head))

    described = [describe(task) for task in tasks]
    return [next(j for j, other in enumerate(described) if other == own) for own in described]


def open_task(checkpoint: Checkpoint, label: str, merged: Sequence[str], settings: LearnSettings, k: int) -> Task:
    """One model with its data and head."""
    family = find_family(checkpoint)
    if family is None:
        kind = (checkpoint.config or {}).get("model_type")
        known = ", ".join(RUNNABLE)
        raise RefusedError(f"{label} is a model of type {kind!r}, which cannot be run here; the families are {known}")
    dataset = read_examples(
        settings.data[k],
        field=settings.field,
        pair_field=settings.pair_field,
        label_field=settings.label_field,
    )
    shapes: Shapes = {n: spec.shape for n, spec in checkpoint.specs.items() if n not in checkpoint.aliases}
    model = family.build(checkpoint.config or {}, shapes)
    if isinstance(model, HEADLESS):
        shapes = without_pooler(shapes)
        model = family.build(checkpoint.config or {}, shapes)
    places = match_names(model, shapes)
    own = {n: jnp.asarray(checkpoint.read(n)) for n in places if n not in set(merged)}
    head = read_head(settings.heads[k], model, label) if settings.heads else None
    order = np.random.default_rng([settings.seed, k]).permutation(len(dataset.examples))
    examples = [dataset.examples[i] for i in order[: settings.max_rows]]
    return Task(
        label=label,
        model=model,
        family=family,
        places=places,
        own=own,
        head=head,
        batches=tuple(make_batches(checkpoint, family, examples, settings)),
        dataset=dataset,
        pooling=settings.pooling,
        recompute=settings.recompute,
    )


def read_head(path: str, model: nnx.Module, label: str) -> Head:
    """`weight` [classes, width] and `bias` of a file; RefusedError where it is no head of this model."""
    if not isinstance(model, HEADLESS):
        raise RefusedError(f"{label} has a head of its own: leave --head out")
    with open_checkpoint(path) as file:
        if set(file.specs) != {"weight", "bias"}:
            there = ", ".join(file.specs) or "nothing"
            raise RefusedError(f"the head {path} holds {there}; weight [classes, width] and bias [classes] are needed")
        weight, bias = (jnp.asarray(file.read(name), COMPUTE_DTYPE) for name in ("weight", "bias"))
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise RefusedError(
            f"the head {path} has weight {list(weight.shape)} and bias {list(bias.shape)}; [classes, width] and "
            "[classes] are needed"
        )
    return {"weight": weight, "bias": bias}


def make_batches(
    checkpoint: Checkpoint, family: Family, examples: Sequence[Example], settings: LearnSettings
) -> Iterator[Batch]:
    """Inputs of like lengths together, every batch filled up."""
    size = min(settings.batch_size, len(examples))
    if "input_ids" not in family.inputs:
        if examples[0].image is None:
            raise RefusedError(f"{checkpoint.path} takes images, and the data hold texts")
        rows = [{"pixel_values": prepare_image(checkpoint, example.image)} for example in examples]
        lengths = [0] * len(rows)
    else:
        if examples[0].text is None:
            raise RefusedError(f"{checkpoint.path} takes texts, and the data hold images")
        rows = tokenise(checkpoint, family, examples, settings)
        lengths = [len(row["input_ids"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: lengths[i])
    for start in range(0, len(order), size):
        members = order[start : start + size]
        yield stack_rows([rows[i] for i in members], [examples[i].label or 0 for i in members], size)


def tokenise(
    checkpoint: Checkpoint, family: Family, examples: Sequence[Example], settings: LearnSettings
) -> list[dict[str, np.ndarray]]:
    """Token numbers of every text."""
    tokenizer = load_fast_tokenizer(checkpoint.root)
    tokenizer.enable_truncation(min(settings.max_length, family.max_tokens(checkpoint.config or {})))
    texts: Any = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
    return [
        {
            "input_ids": np.array(item.ids, np.int32),
            "token_type_ids": np.array(item.type_ids, np.int32),
            "attention_mask": np.ones(len(item.ids), np.int32),
        }
        for item in tokenizer.encode_batch(texts)
    ]


def stack_rows(rows: Sequence[dict[str, np.ndarray]], labels: Sequence[int], size: int) -> Batch:
    """A batch of `size`; sequences are padded with zeros, missing rows are zeros."""
    inputs = {}
    for name, first in rows[0].items():
        shape = first.shape
        if name != "pixel_values":
            longest, length = max(len(row[name]) for row in rows), SHORTEST
            while length < longest:
                length *= 2
            shape = (length,)
        inputs[name] = np.zeros((size, *shape), first.dtype)
        for i, row in enumerate(rows):
            inputs[name][i, : len(row[name])] = row[name]
    present = np.arange(size) < len(rows)
    return Batch(inputs, present, np.array([*labels, *[0] * (size - len(rows))], np.int32))


def choose_objective(tasks: Sequence[Task], settings: LearnSettings) -> Objective:
    """The loss named, else distillation of what the models answer, or of their features."""
    if settings.loss is not None:
        return OBJECTIVES[settings.loss]
    answering = all(task.head is not None or not isinstance(task.model, HEADLESS) for task in tasks)
    return OBJECTIVES["distillation" if answering else "features"]


def find_lacking(task: Task, objective: Objective) -> Iterator[str]:
    """Why a model cannot be asked that."""
    names = [name for name, own in OBJECTIVES.items() if own is objective]
    headless = isinstance(task.model, HEADLESS)
    answer = jax.eval_shape(task.answer, shape_weights(task), task.own, task.head, task.batches[0])
    logits = answer.logits
    if objective.needs in ("hidden", "both") and not headless:
        yield f"loss {names[0]}: {task.label} shows logits and no hidden states; use distillation"
    if objective.needs != "hidden" and logits is None:
        yield f"loss {names[0]}: {task.label} has no head: give one --head for each model, or use the loss features"
        return
    if logits is not None and not isinstance(logits, jax.ShapeDtypeStruct):
        yield f"{task.label} gives several outputs: it cannot be learned with here"
    elif objective.needs == "classes" and logits is not None and logits.ndim != 2:
        yield f"loss {names[0]}: {task.label} answers token by token; use next-token or distillation"
    elif objective.needs == "next tokens" and (logits is None or logits.ndim != 3 or task.head is not None):
        yield f"loss {names[0]}: {task.label} does not tell next tokens"
    elif objective.needs == "classes" and logits is not None:
        highest = max(int(batch.labels.max()) for batch in task.batches)
        if highest >= logits.shape[-1]:
            yield f"{task.dataset.name} has the label {highest}, and {task.label} has {logits.shape[-1]} classes"


def shape_weights(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the weights that are merged."""
    leaves = dict(nnx.to_flat_state(nnx.state(task.model)))
    return {
        name: jax.ShapeDtypeStruct(to_torch_shape(leaves[place.path].shape, place.operation), COMPUTE_DTYPE)
        for name, place in task.places.items()
        if name not in task.own
    }
