"""What a merge method is: a function of one stack of matrices, and everything a caller must know before calling it."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import jax.numpy as jnp
from jaxtyping import Array, Float

from rgsp_jax.types import MergeOutput

MergeFn = Callable[..., MergeOutput]
"""`fn(stack [K, m, n], **hyperparameters) -> MergeOutput(merged [m, n], stats)`, pure and differentiable."""

PER_MODEL = frozenset({"directions", "rest", "coefficients"})
"""Hyperparameters with a value, or several, for each model."""
SQUARES = frozenset({"w_q", "w_k"})
"""Hyperparameters that are square matrices [r, r], the identity where they are not given; learning finds them."""
MASKED = "active_rank"
"""The hyperparameter that is a count at run time: a mask on the directions that are kept."""


def compute_dtype(*dtypes: Any) -> Any:
    """float64 where one is float64, float32 for smaller floats; ValueError for anything else."""
    for dtype in dtypes:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"weights must be real floating point, not {jnp.dtype(dtype).name}")
    return jnp.float64 if any(jnp.dtype(dtype) == jnp.float64 for dtype in dtypes) else jnp.float32


@dataclass(frozen=True)
class Hyperparameter:
    """What a hyperparameter means and which values it takes; annotated on the method's own argument.

    `static` ones shape the computation and cost a compilation each; the others are traced and may be vmapped.
    `integer` ones are counts or, between 0 and 1, fractions; `whole` ones are counts only.
    """

    help: str
    low: float = -math.inf
    high: float = math.inf
    exclusive_low: bool = False
    choices: tuple[str, ...] = ()
    optional: bool = False
    static: bool = False
    integer: bool = False
    whole: bool = False

    def problem(self, value: Any) -> str | None:
        """Why `value` is not allowed, or None where it is. Arrays pass: they are checked by what they are used for."""
        if isinstance(value, str):
            return None if value in self.choices else self.expected()
        if value is None:
            return None if self.optional else self.expected()
        if isinstance(value, bool):
            return None if self.choices == ("true", "false") else self.expected()
        if isinstance(value, (int, float)):
            if self.choices == ("true", "false") or (self.choices and not self.numeric):
                return self.expected()
            low = value > self.low if self.exclusive_low else value >= self.low
            whole = isinstance(value, int) or (not self.whole and (not self.integer or 0 < value < 1))
            return None if low and value <= self.high and math.isfinite(value) and whole else self.expected()
        return None

    @property
    def numeric(self) -> bool:
        return math.isfinite(self.low) or math.isfinite(self.high) or not self.choices

    def expected(self) -> str:
        """The allowed values in words."""
        parts = []
        if self.integer:
            parts.append("a positive integer or a fraction between 0 and 1")
        elif self.numeric:
            low = f"{'more than' if self.exclusive_low else 'at least'} {self.low:g}" if math.isfinite(self.low) else ""
            high = f"at most {self.high:g}" if math.isfinite(self.high) else ""
            noun = "a whole number" if self.whole else "a number"
            parts.append(" ".join([noun, *filter(None, [low, "and" if low and high else "", high])]))
        parts += [repr(c) if self.choices != ("true", "false") else c for c in self.choices]
        if self.optional:
            parts.append("null")
        return " or ".join(parts)


Rank = Annotated[
    int | float,
    Hyperparameter(
        "leading singular directions kept: an integer, or a fraction of min(m, n)",
        low=0,
        exclusive_low=True,
        static=True,
        integer=True,
    ),
]
ActiveRank = Annotated[
    Any,
    Hyperparameter("run-time rank of at most `rank`: one SVD serves every smaller rank", low=1, optional=True),
]


def switch(help: str) -> Hyperparameter:
    """A static true/false hyperparameter."""
    return Hyperparameter(help, choices=("true", "false"), static=True)


def choice(help: str, *choices: str) -> Hyperparameter:
    """A static hyperparameter that takes one of a few names."""
    return Hyperparameter(help, choices=choices, static=True)


@dataclass(frozen=True)
class Stages:
    """A method in three steps, cut so that many settings share what they have in common.

    `build(stack, parts, solve(parts, ...), ...)` with `parts = prepare(stack, ...)` is `fn(stack, ...)`. Each takes
    the hyperparameters that its own signature names: settings that agree in those of `prepare` share the
    decompositions, those that agree in `solve`'s as well share the solution.
    """

    prepare: Callable[..., Any]
    """(stack [K, m, n], the static rank): decompositions, at the largest rank."""
    solve: Callable[..., Any]
    """(parts): what needs no stack any more; vmap it over settings, `active_rank` among them."""
    build: Callable[..., MergeOutput]
    """(stack, parts, solution): the merged matrix, a few products away."""

    def arguments(self, stage: Literal["prepare", "solve", "build"]) -> frozenset[str]:
        """Names of everything that a step takes."""
        return frozenset(inspect.signature(getattr(self, stage)).parameters)

    def pick(self, stage: Literal["prepare", "solve", "build"], *known: Mapping[str, Any]) -> dict[str, Any]:
        """What a step takes of what is known, the last deciding."""
        taken = self.arguments(stage)
        return {name: value for one in known for name, value in one.items() if name in taken}


class Cost(NamedTuple):
    """What a method takes for one matrix beside the decompositions of its models."""

    flops: float
    words: int
    """Numbers held at once, whole on every device that shares the matrix."""


def count_couplings(models: int, m: int, n: int, rank: int) -> Cost:
    """Of methods that work on r x r matrices between two models' directions, couplings in some hundred steps."""
    del models, m, n
    return Cost(2000.0 * rank**3, 12 * rank**2)


class Combination(NamedTuple):
    """A method that sees of whole tensors only how they lie to each other, and then works entry by entry.

    `build(stack, state)` with `state, stats = solve(products, ...)` is `fn(stack, ...)`, where `products` are the
    models' inner products, each tensor taken as one vector: any part of a tensor may be built apart from the rest.
    """

    solve: Callable[..., tuple[Any, dict[str, Array]]]
    """(products [K, K], hyperparameters): what `build` needs, and the stats."""
    build: Callable[[Array, Any], Array]
    """(stack [K, ...], state) -> merged [...]."""


@dataclass(frozen=True)
class Method:
    """A merge method by name, with what it needs and what it promises.

    Call it as `method(stack [K, m, n], **hyperparameters) -> MergeOutput`: computed in float32 (float64 for float64
    input), returned in the stack's dtype. `fn` is the bare function, which computes in the dtype it is given.
    """

    name: str
    fn: MergeFn
    summary: str
    models: tuple[int, int | None] = (2, None)
    """Least and most models it takes; None is no limit."""
    needs: frozenset[str] = frozenset()
    """Of "base", "covariances", "key": what must be passed beside the stack, as `base` [m, n], `inputs` and `key`."""
    scope: Literal["matrices", "tensors"] = "matrices"
    """"matrices" merges 2-D views and leaves vectors and embeddings to `rest`; "tensors" takes everything."""
    rest: Literal["average", "first"] = "average"
    """What becomes of the tensors out of scope: the models' average, or what they are in the first model."""
    weigh_rest: Callable[[Mapping[str, Any], int], list[float]] | None = None
    """(hyperparameters, models) -> coefficients of that average; None is uniform."""
    covariances: tuple[int, ...] = ()
    """How many models' covariances it takes, where it needs them; empty is every one's."""
    in_step: bool = False
    """Its covariances are those of the merged model's inputs, with drifts, collected in step with the merge."""
    elementwise: bool = False
    """Each merged entry depends on that entry alone, so any slice may be merged apart from the rest."""
    exclusive: frozenset[str] = frozenset()
    """Hyperparameters of which at most one is given."""
    order_invariant: bool = False
    keeps_copies: bool = True
    """K equal copies return the copy."""
    scale_equivariant: bool = False
    """Scaling every model by c scales the merge by c; the base, where it needs one, with them."""
    rotation_equivariant: bool = False
    """Turning the outputs (rows) of every model and of the base by one rotation turns the merge."""
    row_divisible: bool = True
    """A mesh may divide the rows of its matrices (`rgsp_jax.linalg.rows`): what devices pass on then, and hold whole,
    is r columns, or square in the shorter side or in what the method is given whole (covariances)."""
    stages: Stages | None = None
    """Where its cost is in decompositions that many settings can share."""
    combination: Combination | None = None
    """Where it is one, so that no tensor need be held whole in the precision that is computed in."""
    cost: Callable[[int, int, int, int], Cost] = count_couplings
    """(models, m, n, rank) -> what comes after the decompositions."""
    spared: Callable[[int, Mapping[str, Any]], bool] | None = None
    """(models, hyperparameters) -> True where it takes no matrix apart."""
    limit_rank: Callable[[int, int, int], int] | None = None
    """(models, m, n) -> most directions that it keeps of each model; None is min(m, n)."""

    def __call__(self, stack: Float[Array, "k m n"], **hyperparameters: Any) -> MergeOutput:
        self.check_count(stack.shape[0])
        dtype = compute_dtype(stack.dtype)
        if "base" in self.needs and "base" in hyperparameters:
            hyperparameters["base"] = hyperparameters["base"].astype(dtype)
        output = self.fn(stack.astype(dtype), **hyperparameters)
        return output._replace(merged=output.merged.astype(stack.dtype))

    @cached_property
    def hyperparameters(self) -> Mapping[str, Hyperparameter]:
        """Name -> description, read from the function's own annotations."""
        hints = get_type_hints(self.fn, include_extras=True)
        notes = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
        return {name: note[0] for name, note in notes.items() if note and isinstance(note[0], Hyperparameter)}

    @cached_property
    def defaults(self) -> Mapping[str, Any]:
        """Name -> default, read from the function's own signature."""
        parameters = inspect.signature(self.fn).parameters
        return {name: parameters[name].default for name in self.hyperparameters}

    @property
    def static(self) -> frozenset[str]:
        return frozenset(name for name, h in self.hyperparameters.items() if h.static)

    def check_count(self, count: int) -> None:
        """Raise ValueError where the method does not take `count` models."""
        if problem := self.count_problem(count):
            raise ValueError(problem)

    def count_problem(self, count: int) -> str | None:
        low, high = self.models
        if low <= count and (high is None or count <= high):
            return None
        wanted = f"{low}" if low == high else f"{low} or more" if high is None else f"{low} to {high}"
        return f"method {self.name!r} takes {wanted} models, not {count}"

    def problems(self, hyperparameters: Mapping[str, Any]) -> list[str]:
        """One sentence for each unknown hyperparameter and each value out of range."""
        known = self.hyperparameters
        unknown = [
            f"method {self.name!r} has no hyperparameter {name!r}; it takes {', '.join(known) or 'none'}"
            for name in hyperparameters
            if name not in known
        ]
        wrong = [
            f"{name} of method {self.name!r} must be {expected}, not {value!r}"
            for name, value in hyperparameters.items()
            if name in known and (expected := known[name].problem(value))
        ]
        given = sorted(name for name in self.exclusive if hyperparameters.get(name) is not None)
        several = [f"method {self.name!r} takes one of {', '.join(given)}, not several"] if given[1:] else []
        return unknown + wrong + several

    def covariance_counts(self, models: int) -> tuple[int, ...]:
        """How many covariance files it takes for so many models."""
        return () if "covariances" not in self.needs else self.covariances or (models,)

    def rest_settings(self, hyperparameters: Mapping[str, Any], models: int) -> dict[str, Any]:
        """Hyperparameters of the average of the tensors out of scope."""
        if self.weigh_rest is None:
            return {}
        return {"coefficients": self.weigh_rest({**self.defaults, **hyperparameters}, models)}

    def override(self, hyperparameters: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Hyperparameters with changes in their place; one that excludes another displaces it."""
        displaced = self.exclusive if self.exclusive & changes.keys() else frozenset()
        return {name: v for name, v in hyperparameters.items() if name not in displaced} | dict(changes)
