"""What the harness scores: methods as rows of a table, the grids that validation chooses among, how they merge."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rgsp_jax import Method, merge, methods
from rgsp_jax.merging.fisher import fisher
from rgsp_jax.rules import flatten_view
from rgsp_jax.types import InputStatistics

PyTree = Any
Part = Literal["validation", "test"]
Score = Callable[[PyTree, Part], Sequence[float]]
"""Tree of parameters -> accuracy of every task, with that task's head, on its validation or test rows."""

TENTHS = tuple(round(0.1 * i, 1) for i in range(1, 11))
SCALES = (0.3, 0.6, 0.8, 1.2, 1.5, 2.0, 3.0)
GRIDS: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "slerp": {"t": tuple(t for t in TENTHS if t < 1)},
    "rgsp": {"temperature": (0.02, 0.05, 0.2), "fused_penalty": (0.0, 0.5)},
    "relative": {"rank": (0.05, 0.2), "scale": (0.25, 0.5, 1.0, 1.5, 2.0)},
    "regmean": {"off_diagonal": (0.0, 0.2, 0.5, 0.8, 0.9, 1.0)},
    "graft": {"ridge": (0.3, 1.0, 3.0, 10.0, 30.0)},
    "fisher": {"floor": (1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4)},
    "task_arithmetic": {"scale": TENTHS},
    "ties": {"density": (0.1, 0.2, 0.5), "scale": (0.5, 1.0, 1.5, 2.0)},
    "dare": {"drop_rate": (0.2, 0.5, 0.9), "scale": (0.2, 0.4, 0.6, 0.8, 1.0)},
    "dare_ties": {"drop_rate": (0.2, 0.5, 0.9), "scale": (0.5, 1.0, 1.5, 2.0)},
    "della": {"drop_rate": (0.3, 0.5, 0.7), "scale": (0.5, 1.0, 1.5, 2.0)},
    "breadcrumbs": {"density": (0.5, 0.9), "scale": (0.2, 0.4, 0.6, 0.8, 1.0)},
    "tsv_m": {"scale": SCALES},
    "iso_c": {"scale": SCALES},
    "iso_cts": {"scale": SCALES},
    "wudi": {"learning_rate": (1e-5, 1e-4, 1e-3), "scale": (0.5, 0.8, 1.0)},
    "knots": {"density": (0.2, 0.5, 1.0), "scale": (0.5, 1.0, 1.5, 2.0)},
    "core_space": {"scale": SCALES},
    "ace_merging": {"ridge": (0.01, 0.1), "scale": (0.6, 1.0, 1.5, 2.0, 3.0)},
}
"""Method -> hyperparameter -> values that validation chooses among; a method without a row has nothing to tune."""

CHUNK = 16
"""Settings merged at once: a decomposition that they share is computed once."""


@dataclass(frozen=True)
class Problem:
    """Models to merge and how to score what comes out."""

    experts: Sequence[PyTree]
    tasks: Sequence[str]
    """One per expert, in their order."""
    score: Score
    seed: int
    group: Mapping[str, Any] = field(default_factory=dict)
    """What the seeds of one table line have in common, as {"regime": "labels", "experts": 4}."""
    base: PyTree | None = None
    inputs: Mapping[str, InputStatistics] | None = None
    """Slashed path of a matrix -> covariances of its inputs in every expert."""
    fishers: Sequence[PyTree] | None = None
    """Diagonal Fisher information of every expert."""


@dataclass(frozen=True)
class Contender:
    """A row of the table: what is merged by, and what validation may choose among."""

    name: str
    merge: Callable[..., PyTree]
    """`merge({"experts", "base", "inputs", "fishers", "seed"}, **hyperparameters)` -> merged tree; traceable."""
    needs: frozenset[str] = frozenset()
    untuned: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    static: frozenset[str] = frozenset()
    models: tuple[int, int | None] = (2, None)

    @property
    def settings(self) -> list[dict[str, Any]]:
        """What validation chooses among: the untuned setting first."""
        product = [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]
        return [dict(self.untuned), *(dict(self.untuned) | setting for setting in product if self.grid)]

    @property
    def kind(self) -> str:
        """What it asks for beside the models."""
        data = {"covariances": "data", "fishers": "labelled data"}
        return next((word for need, word in data.items() if need in self.needs), "base" if "base" in self.needs else "")

    def fits(self, problem: Problem) -> bool:
        """Whether the problem has what it needs, and a number of models that it takes."""
        has = {"base": problem.base, "covariances": problem.inputs, "fishers": problem.fishers, "key": problem.seed}
        low, high = self.models
        count = len(problem.experts)
        return all(has[need] is not None for need in self.needs) and low <= count and (high is None or count <= high)


def make_contender(
    method: str | Method, name: str | None = None, grid: Mapping[str, Sequence[Any]] | None = None, **untuned: Any
) -> Contender:
    """Return a registered method, or any Method, as a row; the grid is GRIDS' where none is given.

    `untuned` are hyperparameters of this row's untuned column that differ from the method's own defaults.
    """
    chosen = methods[method] if isinstance(method, str) else method
    found = GRIDS.get(chosen.name, {}) if grid is None else grid
    return Contender(
        name or chosen.name, bind(chosen), chosen.needs, untuned, found, chosen.static, models=chosen.models
    )


@functools.cache
def bind(method: Method) -> Callable[..., PyTree]:
    """Return the merge of a problem's arrays by one method: one function for each, so that it is compiled once."""

    def merge_problem(problem: Mapping[str, Any], **hyperparameters: Any) -> PyTree:
        key = jax.random.key(problem["seed"])
        beside = {"base": problem["base"], "inputs": problem["inputs"], "key": key}
        return merge(problem["experts"], method, **beside, **hyperparameters)[0]

    return merge_problem


def merge_by_fisher(problem: Mapping[str, Any], **hyperparameters: Any) -> PyTree:
    """Fisher-weighted average of every tensor; its kernel takes gradients, which the registry's methods do not."""
    count = len(problem["experts"])

    def merge_leaf(*columns: jax.Array) -> jax.Array:
        view = flatten_view(columns[0].shape)
        stack, fishers = (
            jnp.concatenate([view.to_matrices(x) for x in half]) for half in (columns[:count], columns[count:])
        )
        return view.from_matrices(fisher(stack, fishers, **hyperparameters).merged[None])

    return jax.tree.map(merge_leaf, *problem["experts"], *problem["fishers"])


FISHER = Contender("fisher", merge_by_fisher, frozenset({"fishers"}), grid=GRIDS["fisher"], models=(1, None))
OUT_OF_REACH = frozenset(name for name, method in methods.items() if method.in_step)
"""Methods whose statistics are collected while they merge, which a tree cannot do (see grafting.py)."""

ASIDE = ("dgsm", "gsf", "relative_weighted")
"""Scored where they are named only: the source's other two formulas, and a family whose coefficients are learned."""


def make_contenders(names: Sequence[str] | None = None) -> list[Contender]:
    """Return the named methods as rows, by default all but those ASIDE; ValueError lists names that are none."""
    known = {name: make_contender(name) for name in methods if name not in OUT_OF_REACH} | {"fisher": FISHER}
    if unknown := [name for name in names or () if name not in known]:
        raise ValueError(f"no method {', '.join(map(repr, unknown))}; there are {', '.join(known)}")
    return [known[name] for name in names or [name for name in known if name not in ASIDE]]


def is_traced(contender: Contender, name: str, value: Any) -> bool:
    """Whether a value may be an argument of the compiled merge."""
    return name not in contender.static and isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def compile_merge(merge: Callable[..., PyTree], static: tuple[tuple[str, Any], ...]) -> Callable[..., PyTree]:
    """Return the jitted merge at static hyperparameters, over a batch of settings of the traced ones."""

    def merge_all(problem: Mapping[str, Any], traced: Mapping[str, jax.Array], count: jax.Array) -> PyTree:
        return jax.vmap(lambda one, _: merge(problem, **one, **dict(static)))(traced, count)

    # Compiling is most of a short run, and what takes long when it runs are library calls that no option touches.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(merge_all, compiler_options=options)


def merge_settings(contender: Contender, problem: Problem, settings: Sequence[Mapping[str, Any]]) -> Iterator[PyTree]:
    """Yield the merged tree of every setting, in their order; those that differ in traced values alone are one call."""
    arrays = {
        "experts": list(problem.experts),
        "base": problem.base,
        "inputs": problem.inputs,
        "fishers": problem.fishers,
        "seed": jnp.asarray(problem.seed, jnp.uint32),
    }
    groups: dict[Any, list[int]] = {}
    for i, setting in enumerate(settings):
        static = tuple((name, v) for name, v in setting.items() if not is_traced(contender, name, v))
        traced = tuple(name for name, v in setting.items() if is_traced(contender, name, v))
        groups.setdefault((static, traced), []).append(i)
    merged: dict[int, PyTree] = {}
    for (static, traced), members in groups.items():
        for start in range(0, len(members), CHUNK):
            part = members[start : start + CHUNK]
            values = {name: jnp.asarray([float(settings[i][name]) for i in part]) for name in traced}
            batch = compile_merge(contender.merge, static)(arrays, values, jnp.zeros(len(part)))
            for row, i in enumerate(part):
                merged[i] = jax.tree.map(lambda x, row=row: x[row], batch)
    yield from (merged[i] for i in range(len(settings)))
