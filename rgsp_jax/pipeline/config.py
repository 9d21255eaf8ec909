"""The merge config: one frozen record, read from YAML or built by the command line, validated once here."""

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rgsp_jax.errors import RefusedError
from rgsp_jax.method import PER_MODEL, SQUARES, Method
from rgsp_jax.pipeline.mergekit_config import is_mergekit, translate
from rgsp_jax.registry import methods

SIZE = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(?:([kmgt])(i?))?b?\s*", re.IGNORECASE | re.ASCII)
LARGEST_SIZE = 2**63 - 1
DTYPES = ("float32", "float16", "bfloat16", "float64")


def parse_size(value: Any) -> int:
    """Bytes of 5000000, "5GB" (10^9) or "1.5GiB" (2^30)."""
    match = SIZE.fullmatch(str(value))
    if match and not isinstance(value, bool):
        number, unit, binary = match.groups()
        factor = (1024 if binary else 1000) ** " kmgt".index((unit or " ").lower())
        size = float(number) * factor
        if 1 <= size <= LARGEST_SIZE:
            return int(number) * factor if number.isdecimal() else int(size)
    raise ValueError(f"must be a size such as 500MB, 5GB or 1.5GiB, not {value!r}")


Size = Annotated[int, BeforeValidator(parse_size)]


class Override(BaseModel):
    """Another method or other hyperparameters for the tensors that match a pattern; the last match decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    method: str | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)


class KeyMap(BaseModel):
    """Names of another architecture in terms of the first model's, as data.

    `rename` pairs regular expressions of whole names with templates (`\\1`, `\\g<layer>`); the first that matches
    decides, and a name that none matches stays. `keep` and `drop` are patterns as elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rename: dict[str, str] = Field(default_factory=dict)
    """Name in the other model -> name in the first model."""
    keep: tuple[str, ...] = ()
    """Names that only the first model has: these tensors stay as they are there."""
    drop: tuple[str, ...] = ()
    """Names that only the other model has, as they are there."""

    def problems(self) -> list[str]:
        """One sentence for each pattern or template that is none."""
        problems = find_bad_patterns((*self.keep, *self.drop))
        for pattern, template in self.rename.items():
            try:
                re.compile(pattern).sub(template, "")
            except (re.error, IndexError) as error:
                problems.append(f"key map: {pattern!r}: {template!r} is no regular expression and template: {error}")
        return problems

    def translate(self, name: str) -> str | None:
        """The first model's name of another's tensor, None for what is dropped."""
        if any(matcher(pattern).search(name) for pattern in self.drop):
            return None
        for pattern, template in self.rename.items():
            if match := re.fullmatch(pattern, name):
                return match.expand(template)
        return name


class MergeConfig(BaseModel):
    """Everything that decides a merge's bytes, and the limits it runs under.

    Patterns are globs over tensor names (`*.attention.*`), or regular expressions behind `re:`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...]
    method: str | None = None
    """None: `rgsp` for two models, `relative` for more."""
    base: str | None = None
    key_map: KeyMap | None = None
    """For every other model, and the base, whose names are not the first model's already."""
    covariances: tuple[str, ...] = ()
    """Files of `rgsp covariances`, for methods that need them: of the first model, or of every model in order."""
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    include: tuple[str, ...] = ()
    """Tensors to merge; the others are the first model's. Empty is all."""
    exclude: tuple[str, ...] = ()
    """Tensors to leave as in the first model, whether or not the other models have them."""
    overrides: tuple[Override, ...] = ()
    dtype: str | None = None
    """Of floating-point tensors in the output; None keeps the first model's."""
    max_shard_size: Size = 5_000_000_000
    memory: Size = 1_000_000_000
    """Bytes the merge may take above the process's size after import."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of the random key that methods which declare the need get."""

    def resolved_method(self) -> Method:
        """The method named, or the default for this many models."""
        return methods[self.method or ("rgsp" if len(self.models) == 2 else "relative")]

    def problems(self) -> list[str]:
        """One sentence for each setting that cannot be."""
        problems = []
        if len(self.models) < 1:
            problems.append("models: name at least one model to merge")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        problems += find_bad_patterns((*self.include, *self.exclude, *(o.pattern for o in self.overrides)))
        if self.key_map is not None:
            problems += self.key_map.problems()
        names = [self.method, *(o.method for o in self.overrides)]
        unknown = [n for n in names if n is not None and n not in methods]
        problems += [f"no method {n!r}; there are {', '.join(methods)}" for n in unknown]
        if unknown or not self.models:
            return problems
        used = {self.resolved_method().name: dict(self.hyperparameters)}
        problems += self.method_problems(self.resolved_method(), self.hyperparameters)
        for override in self.overrides:
            method = methods[override.method] if override.method else self.resolved_method()
            used[method.name] = {}
            problems += [
                f"override {override.pattern!r}: {problem}"
                for problem in self.method_problems(method, override.hyperparameters)
            ]
        if self.base is not None and not any("base" in methods[name].needs for name in used):
            problems.append(f"--base: method {', '.join(used)} uses no base model; leave it out")
        if self.covariances and not any("covariances" in methods[name].needs for name in used):
            problems.append(f"--covariances: method {', '.join(used)} uses none; leave them out")
        return problems

    def method_problems(self, method: Method, hyperparameters: Mapping[str, Any]) -> list[str]:
        unusable = {
            name: problem
            for name, value in hyperparameters.items()
            if name in method.hyperparameters
            and (problem := value_problem(name, value, len(self.models), "base" in method.needs))
        }
        problems = list(unusable.values())
        problems += method.problems({name: v for name, v in hyperparameters.items() if name not in unusable})
        if problem := method.count_problem(len(self.models)):
            problems.append(problem)
        if "base" in method.needs and self.base is None:
            problems.append(f"method {method.name!r} needs --base, the common ancestor of the models")
        if "covariances" in method.needs:
            wanted = method.covariance_counts(len(self.models))
            if len(self.covariances) not in wanted:
                problems.append(
                    f"method {method.name!r} needs {' or '.join(map(str, wanted))} --covariances (of the models in"
                    f" their order, see `rgsp covariances`), not {len(self.covariances)}"
                )
            hard = [name for name in ("energy", "threshold") if hyperparameters.get(name) is not None]
            if hard and len(self.covariances) > 1:
                problems.append(
                    f"{hard[0]} takes the recipient's covariances alone: leave the donor's out, or use ridge"
                )
        return problems

    def to_yaml(self) -> str:
        """The config that reproduces the merge; defaults that play no part are left out."""
        full = self.model_dump(mode="json", exclude_defaults=True)
        full = {"models": list(self.models), "method": self.resolved_method().name, **full}
        full.pop("memory", None)
        return yaml.dump(full, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def value_problem(name: str, value: Any, count: int, with_base: bool) -> str | None:
    """Why a file or a command line cannot give a hyperparameter this value: it must be plain data of the right size."""
    if name == "coefficients" and value is not None:
        if not isinstance(value, (list, tuple)) or not all(map(is_number, value)):
            return f"coefficients must be a list of numbers, one for each model, not {value!r}"
        if len(value) != count:
            return f"coefficients: {len(value)} numbers for {count} models"
        if with_base or math.fsum(value):  # on a base they weigh task vectors, which may cancel
            return None
        return f"coefficients {list(value)} sum to zero: there is no such average"
    if name in PER_MODEL and isinstance(value, (list, tuple)):
        return find_shape_problem(name, value, count)
    if name in SQUARES and value is not None:
        rows = value if isinstance(value, (list, tuple)) else ()
        square = rows and all(isinstance(row, (list, tuple)) and len(row) == len(rows) for row in rows)
        if square and all(is_number(x) for row in rows for x in row):
            return None
        return f"{name} must be a square list of lists of numbers, rank by rank"
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    return f"{name} must be one number or word, not {value!r}"


def find_shape_problem(name: str, value: Sequence[Any], count: int) -> str | None:
    """Why a list is not a number for each model, or for each model a list of as many."""
    rows = [row if isinstance(row, (list, tuple)) else [row] for row in value]
    if len(rows) != count or len({len(row) for row in rows}) != 1 or not all(is_number(x) for row in rows for x in row):
        return f"{name} must be a number, or a list with a number (or an equally long list of them) per model"
    return None


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def find_bad_patterns(patterns: Iterable[str]) -> list[str]:
    """One sentence for each pattern that cannot be read."""
    problems = []
    for pattern in patterns:
        try:
            matcher(pattern)
        except re.error as error:
            problems.append(f"pattern {pattern!r} is no regular expression: {error}")
    return problems


def matcher(pattern: str) -> re.Pattern[str]:
    """A compiled glob, or the regular expression behind `re:` (searched anywhere in the name)."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile("^" + fnmatch.translate(pattern))


def parse_config(fields: Mapping[str, Any], source: str) -> MergeConfig:
    """A validated config from plain data; RefusedError names the source and every bad field."""
    try:
        config = MergeConfig.model_validate(fields)
        problems = config.problems()
    except ValidationError as error:
        problems = [describe_field(e["loc"], e["type"], e["msg"]) for e in error.errors()]
        wrong = {e["loc"][0] for e in error.errors()}
        if not wrong & {"models", "method", "base"}:  # the other settings are judged by these
            problems += MergeConfig.model_validate({k: v for k, v in fields.items() if k not in wrong}).problems()
    if problems:
        raise RefusedError(f"{source}: {problem}" if source != "command line" else problem for problem in problems)
    return config


def describe_field(location: tuple[int | str, ...], kind: str, message: str) -> str:
    """One sentence on a field that pydantic does not take."""
    if kind == "extra_forbidden":
        inner = KeyMap if location[0] == "key_map" else Override
        known = inner.model_fields if len(location) > 1 else MergeConfig.model_fields
        message = f"no such setting; there are {', '.join(known)}"
    return f"{'.'.join(map(str, location))}: {message.removeprefix('Value error, ')}"


def read_config_file(path: Path) -> dict[str, Any]:
    """Fields of a MergeConfig from our YAML or from mergekit's."""
    fields = read_yaml(path)
    return translate(fields, str(path)) if is_mergekit(fields) else fields


class Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and everything else does; PyYAML follows 1.1, where it is text."""


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads: text that looks like a number in quotes."""


for side in (Loader, Dumper):
    side.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), [*"-+0123456789"])


def parse_yaml(text: str) -> Any:
    """Plain data from YAML text; yaml.YAMLError where it is none."""
    return yaml.load(text, Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RefusedError where there is none."""
    try:
        fields = parse_yaml(path.read_text())
    except OSError as error:
        raise RefusedError(f"{path}: cannot read the config: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise RefusedError(f"{path}: the config must be a mapping of settings, see `rgsp merge --help`")
    return fields
