"""What the collection of covariances is told, what it returns, and what a backend must be able to do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rgsp_jax.activations.examples import Example
from rgsp_jax.activations.sites import InputSite, WeightMap
from rgsp_jax.errors import RefusedError

BACKENDS = ("auto", "torch", "flax")
DTYPES = ("float32", "bfloat16", "float16")


class CannotStepError(RefusedError):
    """These models or data allow no sequential graft; other grafts may do."""


@dataclass(frozen=True)
class CovarianceSettings:
    """Checked at construction; RefusedError names every field that is wrong."""

    field: str = "text"
    pair_field: str | None = None
    image_field: str = "image"
    max_rows: int | None = None
    """Examples drawn from the data at most."""
    batch_size: int = 32
    max_length: int = 512
    """Tokens of a text at most; longer ones are cut."""
    seed: int = 0
    """Of the order in which examples are drawn."""
    part: tuple[int, int] = (1, 1)
    """(i, k): take the i-th of k disjoint parts of the shuffled data, for runs that are combined later."""
    held_back: int = 256
    """Rows per site of examples that are in no sum."""
    until: float | None = None
    """Stop when no site's leading subspace moves more than this between half the data and all of it."""
    memory: int = 4_000_000_000
    """Bytes for the sums; where they do not suffice, the widest sites keep sketches."""
    sketch_size: int = 512
    backend: str = "auto"
    dtype: str = "float32"
    """In which the model computes; the sums are float32 always."""

    def __post_init__(self) -> None:
        part, parts = self.part
        checks = {
            f"max_rows is {self.max_rows}: give at least 1": self.max_rows is None or self.max_rows >= 1,
            f"batch_size is {self.batch_size}: give at least 1": self.batch_size >= 1,
            f"max_length is {self.max_length}: give at least 1": self.max_length >= 1,
            f"seed is {self.seed}: give 0 or more": self.seed >= 0,
            f"held_back is {self.held_back}: give 0 or more": self.held_back >= 0,
            f"until is {self.until}: give a number from 0 to 1": self.until is None or 0 <= self.until <= 1,
            f"memory is {self.memory}: give more than 0 bytes": self.memory > 0,
            f"sketch_size is {self.sketch_size}: give at least 1": self.sketch_size >= 1,
            f"part is {part}/{parts}: give I/K with 1 <= I <= K": 1 <= part <= parts,
            f"backend is {self.backend!r}: give {', '.join(BACKENDS)}": self.backend in BACKENDS,
            f"dtype is {self.dtype!r}: give {', '.join(DTYPES)}": self.dtype in DTYPES,
        }
        if problems := [problem for problem, fine in checks.items() if not fine]:
            raise RefusedError(problems)


@dataclass(frozen=True)
class CovarianceResult:
    """What was collected; `sites` by kind, movement over the sites where it was measured."""

    out: Path
    model: str
    backend: str
    examples: int
    held_back: int
    rows: int
    """Inputs summed, over all sites."""
    sites: Mapping[str, int]
    """Kind -> how many."""
    sketches: tuple[str, ...]
    """Sites that keep a sketch, because the memory does not hold their whole second moment."""
    not_covered: Mapping[str, str]
    movement_worst: float | None
    movement_mean: float | None
    worst_site: str | None
    stopped_early: bool
    nbytes: int
    seconds: float
    warnings: tuple[str, ...] = ()


class Prepared(NamedTuple):
    """An example as a backend wants it; `length` tells which go well into one batch, None where it is not known."""

    payload: Any
    length: int | None


Receive = Callable[[InputSite, Any], None]


class Runner(Protocol):
    """A model that can be run on batches and hands over the inputs of its weights."""

    backend: str
    weights: WeightMap
    exact_lengths: bool
    """True where padding cannot be told from inputs afterwards, so that batches must have none."""
    warnings: list[str]
    not_covered: dict[str, str]

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        """Encode examples (or put it off); RefusedError for those that cannot be."""

    def find_sites(self, batch: Sequence[Prepared]) -> list[InputSite]:
        """Run a batch of one or two to see which weights share an input; nothing is summed."""

    def run(self, batch: Sequence[Prepared], receive: Receive) -> None:
        """One forward pass: `receive(site, rows)` with float32 rows [r, width] or with row numbers.

        Raises RefusedError where an input is not finite, naming the first such layer.
        """


Progress = Callable[[int, int], None]
"""(examples done since the last call, examples in all)."""
