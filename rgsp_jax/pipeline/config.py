"""The merge config: one frozen record, read from YAML or built by the command line, validated once here."""

import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from rgsp_jax.errors import RefusedError
from rgsp_jax.method import Method
from rgsp_jax.pipeline.mergekit_config import is_mergekit, translate
from rgsp_jax.registry import methods

SIZE = re.compile(r"^\s*([0-9.]+)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
DTYPES = ("float32", "float16", "bfloat16", "float64")


def parse_size(value: Any) -> int:
    """Bytes of 5000000, "5GB" (10^9) or "1.5GiB" (2^30)."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = SIZE.match(str(value))
    if not match or float(match[1]) <= 0:
        raise ValueError(f"must be a size such as 500MB, 5GB or 1.5GiB, not {value!r}")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


Size = Annotated[int, BeforeValidator(parse_size)]


class Override(BaseModel):
    """Another method or other hyperparameters for the tensors that match a pattern; the last match decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pattern: str
    method: str | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)


class MergeConfig(BaseModel):
    """Everything that decides a merge's bytes, and the limits it runs under.

    Patterns are globs over tensor names (`*.attention.*`), or regular expressions behind `re:`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: tuple[str, ...]
    method: str | None = None
    """None: `rgsp` for two models, `relative` for more."""
    base: str | None = None
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
    seed: int = 0
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
        for pattern in (*self.include, *self.exclude, *(o.pattern for o in self.overrides)):
            try:
                matcher(pattern)
            except re.error as error:
                problems.append(f"pattern {pattern!r} is no regular expression: {error}")
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
        return problems

    def method_problems(self, method: Method, hyperparameters: Mapping[str, Any]) -> list[str]:
        problems = method.problems(hyperparameters)
        if problem := method.count_problem(len(self.models)):
            problems.append(problem)
        if "base" in method.needs and self.base is None:
            problems.append(f"method {method.name!r} needs --base, the common ancestor of the models")
        coefficients = hyperparameters.get("coefficients")
        if isinstance(coefficients, (list, tuple)) and len(coefficients) != len(self.models):
            problems.append(f"coefficients: {len(coefficients)} numbers for {len(self.models)} models")
        return problems

    def to_yaml(self) -> str:
        """The config that reproduces the merge; defaults that play no part are left out."""
        full = self.model_dump(mode="json", exclude_defaults=True)
        full = {"models": list(self.models), "method": self.resolved_method().name, **full}
        full.pop("memory", None)
        return yaml.safe_dump(full, sort_keys=False, allow_unicode=True)


def matcher(pattern: str) -> re.Pattern[str]:
    """A compiled glob, or the regular expression behind `re:` (searched anywhere in the name)."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile("^" + fnmatch.translate(pattern))


def parse_config(fields: Mapping[str, Any], source: str) -> MergeConfig:
    """A validated config from plain data; RefusedError names the source and every bad field."""
    try:
        config = MergeConfig(**fields)
    except ValidationError as error:
        allowed = ", ".join(MergeConfig.model_fields)
        raise RefusedError(
            f"{source}: {'.'.join(map(str, e['loc']))}: "
            + (
                f"no such setting; there are {allowed}"
                if e["type"] == "extra_forbidden"
                else e["msg"].removeprefix("Value error, ")
            )
            for e in error.errors()
        ) from None
    if problems := config.problems():
        raise RefusedError(f"{source}: {problem}" if source != "command line" else problem for problem in problems)
    return config


def read_config_file(path: Path) -> dict[str, Any]:
    """Fields of a MergeConfig from our YAML or from mergekit's."""
    fields = read_yaml(path)
    return translate(fields, str(path)) if is_mergekit(fields) else fields


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; RefusedError where there is none."""
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RefusedError(f"{path}: cannot read the config: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise RefusedError(f"{path}: the config must be a mapping of settings, see `rgsp merge --help`")
    return fields
