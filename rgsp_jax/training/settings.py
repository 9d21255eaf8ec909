"""What `rgsp learn` is told, checked at once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import optax

from rgsp_jax.errors import RefusedError
from rgsp_jax.learning import Granularity
from rgsp_jax.training.objectives import OBJECTIVES

OPTIMISERS: Mapping[str, Any] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "sgd": optax.sgd,
    "lion": optax.lion,
    "adafactor": optax.adafactor,
}
SCHEDULES: Mapping[str, Any] = {
    "cosine": lambda rate, steps: optax.schedules.cosine_decay_schedule(rate, steps),
    "linear": lambda rate, steps: optax.schedules.linear_schedule(rate, 0.0, steps),
    "constant": lambda rate, steps: optax.schedules.constant_schedule(rate),
}
POOLINGS = ("mean", "first", "last")


@dataclass(frozen=True)
class LearnSettings:
    """Checked at construction; RefusedError names every field that is wrong."""

    data: tuple[str, ...]
    """Inputs of every model, in their order."""
    heads: tuple[str, ...] = ()
    """Of every model: `weight` [classes, width] and `bias`, that answer from the pooled last hidden states."""
    pooling: str = "mean"
    """How a head, or the distance of features, takes one vector of a sequence of hidden states."""
    field: str = "text"
    pair_field: str | None = None
    label_field: str | None = None
    """Of classes, for accuracies and for the loss that needs them."""
    max_rows: int | None = None
    """Inputs drawn from each model's data at most."""
    max_length: int = 128
    """Tokens of a text at most; longer ones are cut."""
    loss: str | None = None
    """None: distillation where the models answer with logits, else the distance of features."""
    temperature: float = 1.0
    """Of a distillation."""
    pull: float = 0.0
    """Weight of the squared distance from the start."""
    per: Granularity = "direction"
    learn: tuple[str, ...] | None = None
    optimiser: str = "adam"
    schedule: str = "cosine"
    learning_rate: float = 0.05
    steps: int = 200
    batch_size: int = 16
    seed: int = 0
    """Of the draw of the inputs and of their order."""
    recompute: bool = False
    """Make the layers' forward pass again in the backward pass: less memory, a third more time."""
    save_every: int = 25
    """Steps after which the state is saved."""

    def __post_init__(self) -> None:
        known = ", ".join
        checks = {
            "data: give the inputs of every model, one --data each, in their order": bool(self.data),
            f"{len(self.heads)} heads for {len(self.data)} data: give one for each": (
                len(self.heads) in (0, len(self.data))
            ),
            f"pooling is {self.pooling!r}: give {known(POOLINGS)}": self.pooling in POOLINGS,
            f"loss is {self.loss!r}: give {known(OBJECTIVES)}": self.loss is None or self.loss in OBJECTIVES,
            f"per is {self.per!r}: give {known(get_args(Granularity))}": self.per in get_args(Granularity),
            f"optimiser is {self.optimiser!r}: give {known(OPTIMISERS)}": self.optimiser in OPTIMISERS,
            f"schedule is {self.schedule!r}: give {known(SCHEDULES)}": self.schedule in SCHEDULES,
            f"learning_rate is {self.learning_rate}: give more than 0": self.learning_rate > 0,
            f"temperature is {self.temperature}: give more than 0": self.temperature > 0,
            f"pull is {self.pull}: give 0 or more": self.pull >= 0,
            f"steps is {self.steps}: give 0 or more": self.steps >= 0,
            f"batch_size is {self.batch_size}: give at least 1": self.batch_size >= 1,
            f"max_rows is {self.max_rows}: give at least 1": self.max_rows is None or self.max_rows >= 1,
            f"max_length is {self.max_length}: give at least 1": self.max_length >= 1,
            f"save_every is {self.save_every}: give at least 1": self.save_every >= 1,
            f"seed is {self.seed}: give 0 or more": self.seed >= 0,
            "loss cross-entropy needs labels (--label-field), or next tokens (next-token)": (
                self.loss != "cross-entropy" or self.label_field is not None
            ),
        }
        if problems := [problem for problem, holds in checks.items() if not holds]:
            raise RefusedError(problems)

    def make_optimiser(self) -> optax.GradientTransformation:
        """The optimiser with its schedule."""
        return OPTIMISERS[self.optimiser](SCHEDULES[self.schedule](self.learning_rate, max(1, self.steps)))
