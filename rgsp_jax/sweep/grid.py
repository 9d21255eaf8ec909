"""The sweep config: which settings are merged, as a grid, a list, or ranges for a study; validated once here."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rgsp_jax.errors import RefusedError
from rgsp_jax.method import MASKED, Method
from rgsp_jax.pipeline.config import Dumper, KeyMap, MergeConfig, Override, Size, read_yaml
from rgsp_jax.registry import methods

MOST_POINTS = 20_000
"""More than this is no grid that anyone waits for."""


class Range(BaseModel):
    """Values from `low` to `high`: `count` of them in a grid, evenly spaced, in the logarithm where `log`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | float
    high: int | float
    count: int | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        """True where both ends are integers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    def values(self, whole: bool) -> tuple[int | float, ...]:
        """The grid's values; rounded, and each once, where they are whole."""
        if self.count is None:
            return ()
        low, high = (math.log(x) if self.log else float(x) for x in (self.low, self.high))
        steps = [i / (self.count - 1) for i in range(self.count)] if self.count > 1 else [0.0]
        found = [math.exp(low + t * (high - low)) if self.log else low + t * (high - low) for t in steps]
        found[0], found[-1] = (self.low, self.high) if self.count > 1 else (self.low, self.low)
        if whole:
            return tuple(dict.fromkeys(round(x) for x in found))
        return tuple(float(f"{x:.6g}") if 0 < i < len(found) - 1 else float(x) for i, x in enumerate(found))

    def problems(self, name: str) -> list[str]:
        """One sentence for each end that cannot be."""
        found = []
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            found.append(f"axes.{name}: low must be less than high, not {self.low:g} and {self.high:g}")
        if self.log and not self.low > 0:
            found.append(f"axes.{name}: a logarithmic range starts above 0, not at {self.low:g}")
        if self.count is not None and self.count < 2:
            found.append(f"axes.{name}: count must be at least 2, not {self.count}")
        return found


Axis = Range | tuple[Any, ...]


@dataclass(frozen=True)
class Point:
    """One setting of a sweep."""

    index: int
    """In the config's order."""
    method: str
    hyperparameters: Mapping[str, Any]
    """All that the config names for the method; the others have their defaults."""

    @property
    def key(self) -> str:
        """Text that tells settings apart."""
        return json.dumps([self.method, dict(self.hyperparameters)], sort_keys=True)


class SweepConfig(BaseModel):
    """What is merged, and with which settings: `axes` for every combination, or `points` one by one.

    `method` is one name or several; an axis, or a fixed hyperparameter, goes to the methods that have it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...]
    method: str | tuple[str, ...] | None = None
    """None: `rgsp` for two models, `relative` for more."""
    base: str | None = None
    key_map: KeyMap | None = None
    covariances: tuple[str, ...] = ()
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    """The same at every point."""
    axes: dict[str, Range | tuple[Any, ...]] = Field(default_factory=dict)
    """Hyperparameter -> a list of values, or a range."""
    points: tuple[dict[str, Any], ...] = ()
    """Hyperparameters of every point, `method` among them where it differs."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    dtype: str | None = None
    max_shard_size: Size = 5_000_000_000
    memory: Size = 1_000_000_000
    """Bytes of every merge, and as many again for what is kept between points."""
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods swept."""
        if self.method is None:
            return ("rgsp" if len(self.models) == 2 else "relative",)
        return (self.method,) if isinstance(self.method, str) else self.method

    def merge_config(self, method: str, hyperparameters: Mapping[str, Any]) -> MergeConfig:
        """The merge of one setting."""
        shared = set(MergeConfig.model_fields) - {"method", "hyperparameters", "base", "covariances"}
        fields = {name: getattr(self, name) for name in shared}
        used = {method, *(o.method for o in self.overrides if o.method)}
        for name, need in (("base", "base"), ("covariances", "covariances")):
            if any(need in methods[one].needs for one in used if one in methods):  # refused where it is of no use
                fields[name] = getattr(self, name)
        return MergeConfig(method=method, hyperparameters=dict(hyperparameters), **fields)

    def fixed_for(self, method: Method) -> dict[str, Any]:
        """The fixed hyperparameters that a method has and no axis sweeps."""
        return {name: v for name, v in self.hyperparameters.items() if name in method.hyperparameters}

    def axes_of(self, method: Method) -> dict[str, Axis]:
        """The axes that a method has."""
        return {name: axis for name, axis in self.axes.items() if name in method.hyperparameters}

    def plan_points(self) -> list[Point]:
        """Every setting once, in the config's order; call it on a config without `problems`."""
        found: dict[str, Point] = {}
        for method, settings in self.list_settings():
            point = Point(len(found), method, settings)
            found.setdefault(point.key, point)
        return list(found.values())

    def list_settings(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """(method, hyperparameters) of every point, equal ones among them."""
        for given in self.points:
            names = (given["method"],) if "method" in given else self.method_names
            own = {name: value for name, value in given.items() if name != "method"}
            for name in names:
                yield name, self.fixed_for(methods[name]) | own
        for name in self.method_names if not self.points else ():
            axes = {axis: list_values(methods[name], axis, v) for axis, v in self.axes_of(methods[name]).items()}
            for values in itertools.product(*axes.values()):
                yield name, self.fixed_for(methods[name]) | dict(zip(axes, values, strict=True))

    def problems(self, *, study: bool = False) -> list[str]:
        """One sentence for each setting that cannot be, whether for a grid or for a study."""
        problems = self.space_problems(study)
        if problems:
            return list(dict.fromkeys(problems))
        if study:
            settings: Iterable[tuple[str, dict[str, Any]]] = (
                (name, self.fixed_for(methods[name]) | dict(corner))
                for name in self.method_names
                for corner in list_corners(self.axes_of(methods[name]), methods[name])
            )
        else:
            settings = self.list_settings()
        for name, hyperparameters in settings:
            problems += self.merge_config(name, hyperparameters).problems()
        return list(dict.fromkeys(problems))

    def space_problems(self, study: bool) -> list[str]:
        """What is wrong before single settings are looked at."""
        problems = []
        named = [*self.method_names, *(p["method"] for p in self.points if "method" in p)]
        problems += [
            f"no method {n!r}; there are {', '.join(methods)}"
            for n in named
            if not isinstance(n, str) or n not in methods
        ]
        if not self.method_names:
            problems.append("method: name at least one method")
        if self.axes and self.points:
            problems.append("give axes or points, not both")
        if not self.axes and not self.points:
            problems.append("axes: name at least one hyperparameter and its values, or give points")
        if study and self.points:
            problems.append("points: a study chooses its own points; give axes")
        if problems:
            return problems
        chosen = [methods[name] for name in dict.fromkeys(named)]
        swept = set(self.axes) | {name for point in self.points for name in point}
        for name in dict.fromkeys([*self.axes, *self.hyperparameters]):
            if not any(name in method.hyperparameters for method in chosen):
                known = dict.fromkeys(n for method in chosen for n in method.hyperparameters if n != MASKED)
                where = "axes" if name in self.axes else "hyperparameters"
                problems.append(
                    f"{where}.{name}: method {', '.join(m.name for m in chosen)} has no such hyperparameter;"
                    f" there are {', '.join(known) or 'none'}"
                )
        if MASKED in swept or MASKED in self.hyperparameters:
            problems.append(f"{MASKED}: sweep rank, whose smaller values are masks of the largest")
        problems += [
            f"{name}: fixed and swept at once; leave it out of hyperparameters"
            for name in self.hyperparameters
            if name in self.axes
        ]
        for name, axis in self.axes.items():
            problems += axis_problems(name, axis, chosen, study)
        if not problems and not study and (count := self.count_settings()) > MOST_POINTS:
            problems.append(f"axes: {count} points are too many for a grid; let a study choose (--study TRIALS)")
        return problems

    def count_settings(self) -> int:
        """Points of the grid, without making them."""
        if self.points:
            return len(self.points)
        return sum(
            math.prod(len(list_values(methods[n], axis, v)) for axis, v in self.axes_of(methods[n]).items())
            for n in self.method_names
        )

    def to_yaml(self) -> str:
        """The config as plain data; what plays no part is left out."""
        full = self.model_dump(mode="json", exclude_defaults=True)
        full.pop("memory", None)
        return yaml.dump(full, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def axis_problems(name: str, axis: Axis, chosen: Sequence[Method], study: bool) -> list[str]:
    """What is wrong with one axis."""
    if not isinstance(axis, Range):
        return [] if axis else [f"axes.{name}: give at least one value"]
    problems = axis.problems(name)
    notes = [method.hyperparameters[name] for method in chosen if name in method.hyperparameters]
    if notes and not all(note.numeric for note in notes):
        problems.append(f"axes.{name}: no range of numbers; list some of {notes[0].expected()}")
    if axis.count is None and not study:
        problems.append(f"axes.{name}: give count, how many values of the range, or let a study choose")
    return problems


def is_whole(method: Method, name: str, axis: Range) -> bool:
    """True where a range stands for integers: counts, as ranks, between integers."""
    note = method.hyperparameters[name]
    return axis.whole and (note.integer or note.whole)


def list_values(method: Method, name: str, axis: Axis) -> tuple[Any, ...]:
    """Values of an axis in a grid."""
    return axis.values(is_whole(method, name, axis)) if isinstance(axis, Range) else axis


def list_corners(axes: Mapping[str, Axis], method: Method) -> list[dict[str, Any]]:
    """Settings that between them have every listed value, and both ends of every range."""
    ends: dict[str, list[Any]] = {}
    for name, axis in axes.items():
        if isinstance(axis, Range):
            convert = int if is_whole(method, name, axis) else float
            ends[name] = [convert(axis.low), convert(axis.high)]
        else:
            ends[name] = list(axis)
    longest = max(map(len, ends.values()), default=1)
    return [{name: values[min(i, len(values) - 1)] for name, values in ends.items()} for i in range(longest)]


def parse_sweep(fields: Mapping[str, Any], source: str = "sweep", *, study: bool = False) -> SweepConfig:
    """A validated config from plain data; RefusedError names the source and everything that is wrong."""
    try:
        config = SweepConfig.model_validate(fields)
        problems = config.problems(study=study)
    except ValidationError as error:
        problems = list(dict.fromkeys(describe_field(e["loc"], e["type"], e["msg"]) for e in error.errors()))
    if problems:
        raise RefusedError(f"{source}: {problem}" for problem in problems)
    return config


def describe_field(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One sentence on a field that pydantic does not take; the alternatives of an axis are one field."""
    if location[0] == "axes" and len(location) > 1:
        return f"axes.{location[1]}: give a list of values, or low and high with count and log"
    if kind == "extra_forbidden" and len(location) == 1:
        message = f"no such setting; there are {', '.join(SweepConfig.model_fields)}"
    if location[0] == "method":
        return "method: give a name or a list of names"
    return f"{'.'.join(map(str, location))}: {message.removeprefix('Value error, ')}"


def read_sweep(path: Path, *, study: bool = False) -> SweepConfig:
    """The config in a YAML file."""
    return parse_sweep(read_yaml(path), str(path), study=study)
