"""Files of layer-input covariances: one safetensors file whose header lists the sites, checked before it is believed.

A *site* is a place in a model where an input is seen: the weights that multiply it, or the table that looks it up.
Tensors by site and kind: `full` has `covariance` [n, n] = mean k k^T; `sketch` has `sketch` [l, n] with
`sketch^T sketch ~ mean k k^T` and its exact `trace` []; `spectrum` has the leading eigenvalues `values` [l] of either,
their eigenvectors `basis` [n, l], and the eigenvalue `rest` [] of every other direction. All three have `mean` [n] =
mean k and `held_back` [h, n], rows of inputs that are in no sum. `moments` are of a merged model's inputs k, weighted:
`covariance` and `drift` [n, n] = mean (k_i - k) k^T, k_i the inputs in the file's model, and `held_back`. `counts` has
`counts` and `held_back_counts` [vocabulary].
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self, get_args

import numpy as np

from rgsp_jax.checkpoint.hashing import digest
from rgsp_jax.checkpoint.safetensors_header import cap, load_json, read_header
from rgsp_jax.checkpoint.safetensors_source import SafetensorsCheckpoint
from rgsp_jax.checkpoint.shard_writer import write_safetensors
from rgsp_jax.checkpoint.specs import Checkpoint, TensorSpec
from rgsp_jax.errors import RefusedError

FORMAT, VERSION = "rgsp_jax.covariances", "1"
SiteKind = Literal["full", "sketch", "spectrum", "moments", "counts"]
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)
DIGEST = re.compile(r"[0-9a-f]{32}")

PARTS: Mapping[str, Mapping[str, tuple[np.dtype, tuple[str, ...]]]] = MappingProxyType(
    {
        "full": {"covariance": (F32, ("n", "n")), "mean": (F32, ("n",)), "held_back": (F32, ("rows", "n"))},
        "sketch": {
            "sketch": (F32, ("rows", "n")),
            "trace": (F32, ()),
            "mean": (F32, ("n",)),
            "held_back": (F32, ("rows", "n")),
        },
        "spectrum": {
            "values": (F32, ("rows",)),
            "basis": (F32, ("n", "rows")),
            "rest": (F32, ()),
            "mean": (F32, ("n",)),
            "held_back": (F32, ("rows", "n")),
        },
        "moments": {"covariance": (F32, ("n", "n")), "drift": (F32, ("n", "n")), "held_back": (F32, ("rows", "n"))},
        "counts": {"counts": (I64, ("n",)), "held_back_counts": (I64, ("n",))},
    }
)
"""Kind of site -> part -> dtype and axes; "n" is the site's width, "rows" any length."""


@dataclass(frozen=True)
class Site:
    """One place where inputs were seen."""

    name: str
    weights: Mapping[str, str]
    """Checkpoint tensor name -> digest of its bytes: everything that multiplies (or looks up) this input."""
    kind: SiteKind
    width: int
    """Entries of one input; of a table, its rows."""
    rows: int
    """Inputs that were summed; of a table, look-ups."""
    converged: float | None = None
    """Mean squared sine between the leading subspaces of half the data and of all; None where not measured."""


@dataclass(frozen=True)
class DataRecord:
    """Where the inputs came from."""

    name: str
    digest: str
    """Of the files' bytes, so that a file is known again under another name."""
    examples: int
    """Inputs in the sums; of a sequence model, texts."""
    held_back: int
    """Inputs kept out of the sums."""
    seed: int = 0
    part: str = "1/1"
    """Which part of the shuffled data this was."""


class CovarianceFile:
    """An opened file: sites from its header, arrays on demand.

    Attributes:
        path: the file, absolute.
        model: what the model was called.
        data: where the inputs came from, a record per run that was added up.
        sites: name -> Site.
        site_of: checkpoint tensor name -> its Site.
        not_covered: checkpoint tensor name -> why it has no site.
    """

    def __init__(self, source: SafetensorsCheckpoint, model: str, data: tuple[DataRecord, ...], sites: list[Site]):
        self._source = source
        assert isinstance(source.path, Path)
        self.path = source.path
        self.model = model
        self.data = data
        self.sites: Mapping[str, Site] = MappingProxyType({site.name: site for site in sites})
        self.site_of: Mapping[str, Site] = MappingProxyType({name: site for site in sites for name in site.weights})
        self.not_covered: Mapping[str, str] = MappingProxyType(read_reasons(source.metadata))

    def read(self, site: str, part: str) -> np.ndarray:
        """One array of a site, `part` as PARTS lists them for its kind.

        Raises:
            KeyError: no such site, or a part that its kind does not have.
            RefusedError: the file was changed since it was opened, or holds values that are not finite.
        """
        if part not in PARTS[self.sites[site].kind]:
            raise KeyError(f"site {site!r} is kept as {self.sites[site].kind} and has no {part!r}")
        array = self._source.read(f"{site}.{part}")
        if array.dtype == F32 and not np.isfinite(array).all():
            raise RefusedError(f"{self.path}: {site}.{part} holds values that are not finite; collect them again")
        return array

    def shape(self, site: str, part: str) -> tuple[int, ...]:
        """Shape of one array, from the header."""
        return self._source.specs[f"{site}.{part}"].shape

    def close(self) -> None:
        """Let go of the file; sites stay readable."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<covariances of {self.model} in {self.path}: {len(self.sites)} sites>"


def open_covariances(path: Path | str) -> CovarianceFile:
    """Open a covariance file by its header.

    Raises:
        RefusedError: no such file, not a file of this format, or a header whose claims do not fit each other; every
            reason is named.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RefusedError(f"{path} does not exist or is no file: make it with `rgsp covariances`")
    header = read_header(path.resolve())
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise RefusedError(f"{path} is not a file of `rgsp covariances` (its header does not say format {FORMAT!r})")
    if metadata.get("version") != VERSION:
        raise RefusedError(
            f"{path} has version {metadata.get('version')!r} of the covariance format, this program reads {VERSION!r}: "
            "collect the covariances again"
        )
    problems: list[str] = []
    sites = _read_sites(metadata, problems)
    data = _read_data(metadata, problems)
    if not problems:
        problems = _check_specs(header.specs, sites)
    if problems:
        raise RefusedError(cap([f"{path}: {problem}" for problem in problems]))
    source = SafetensorsCheckpoint(path.absolute(), [header], metadata=metadata)
    return CovarianceFile(source, metadata.get("model", ""), data, sites)


def write_covariances(
    path: Path | str,
    model: str,
    data: tuple[DataRecord, ...],
    sites: list[Site],
    tensors: Mapping[str, np.ndarray],
    not_covered: Mapping[str, str] | None = None,
) -> None:
    """Write a covariance file, whole or not at all; `tensors` maps `<site>.<part>` to its array.

    Raises:
        ValueError: sites and tensors do not fit each other.
        OSError: the disk is full or fails; nothing is left of the attempt.
    """
    specs = {name: TensorSpec(name, array.shape, array.dtype) for name, array in tensors.items()}
    if problems := _check_specs(specs, sites):
        raise ValueError("; ".join(problems))
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "model": model,
        "data": json.dumps([asdict(record) for record in data], ensure_ascii=False),
        "sites": json.dumps([vars(site) | {"weights": dict(site.weights)} for site in sites], ensure_ascii=False),
        "not_covered": json.dumps(dict(not_covered or {}), ensure_ascii=False),
    }
    write_safetensors(path, tensors, metadata)


def find_foreign(
    covariances: CovarianceFile, checkpoint: Checkpoint, names: Collection[str | None] | None = None
) -> list[str]:
    """One sentence per weight that the sites name and the model has not, or has with other values.

    Every tensor of the model that the sites name, and `names` where they are given, is read and hashed.
    """
    problems = []
    for name, site in covariances.site_of.items():
        if names is not None and name not in names:
            continue
        if name not in checkpoint.specs:
            problems.append(f"{covariances.path} has covariances of {name!r}, which {checkpoint.path} does not have")
        elif digest(checkpoint.read(name)) != site.weights[name]:
            problems.append(
                f"{covariances.path} was made with another model: {name!r} of {checkpoint.path} has other values; "
                "collect covariances of this one"
            )
    return cap(problems)


def read_reasons(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The `not_covered` map of a header, empty where there is none."""
    try:
        reasons = load_json(metadata.get("not_covered", "{}").encode())
    except ValueError:
        return {}
    return {str(name): str(reason) for name, reason in reasons.items()} if isinstance(reasons, dict) else {}


def _load_list(metadata: Mapping[str, str], key: str, problems: list[str]) -> list[Any]:
    try:
        entries = load_json(metadata[key].encode())
    except (KeyError, ValueError):
        problems.append(f"its header has no valid {key!r}")
        return []
    if not isinstance(entries, list) or not entries:
        problems.append(f"its header's {key!r} is not a list, or an empty one")
        return []
    return entries


def _read_sites(metadata: Mapping[str, str], problems: list[str]) -> list[Site]:
    sites: list[Site] = []
    for number, entry in enumerate(_load_list(metadata, "sites", problems)):
        wrong = _find_wrong_fields(entry)
        if wrong:
            problems.append(f"site {number} of its header has no valid {', '.join(wrong)}")
        else:
            sites.append(Site(**{**entry, "weights": MappingProxyType(entry["weights"])}))
    for kind, names in (
        ("site", [site.name for site in sites]),
        ("weight", [name for site in sites for name in site.weights]),
    ):
        seen: set[str] = set()
        twice = sorted({name for name in names if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        problems += [f"the {kind} {name!r} is listed twice" for name in twice]
    return sites


def _find_wrong_fields(entry: object) -> list[str]:
    if not isinstance(entry, dict) or set(entry) != {field.name for field in fields(Site)}:
        return ["set of fields"]
    weights, converged = entry["weights"], entry["converged"]
    well_formed = {
        "name": isinstance(entry["name"], str) and bool(entry["name"]),
        "weights": isinstance(weights, dict)
        and bool(weights)
        and all(isinstance(value, str) and DIGEST.fullmatch(value) for value in weights.values()),
        "kind": entry["kind"] in get_args(SiteKind),
        "width": type(entry["width"]) is int and entry["width"] > 0,
        "rows": type(entry["rows"]) is int and entry["rows"] > 0,
        "converged": converged is None or (isinstance(converged, (int, float)) and math.isfinite(converged)),
    }
    return [name for name, good in well_formed.items() if not good]


def _read_data(metadata: Mapping[str, str], problems: list[str]) -> tuple[DataRecord, ...]:
    records = []
    for entry in _load_list(metadata, "data", problems):
        types = {field.name: field.type for field in fields(DataRecord)}
        if isinstance(entry, dict) and {name: type(value) for name, value in entry.items()} == types:
            records.append(DataRecord(**entry))
        else:
            problems.append("its header's 'data' is not as `rgsp covariances` writes it")
    return tuple(records)


def _check_specs(specs: Mapping[str, TensorSpec], sites: list[Site]) -> list[str]:
    """One sentence per tensor that is absent, of another shape or dtype than its site says, or of no site."""
    problems = []
    expected: set[str] = set()
    for site in sites:
        for part, (dtype, axes) in PARTS[site.kind].items():
            name = f"{site.name}.{part}"
            expected.add(name)
            if name not in specs:
                problems.append(f"tensor {name!r} of a {site.kind} site is absent")
                continue
            spec = specs[name]
            fits = len(spec.shape) == len(axes) and all(
                length == site.width for length, axis in zip(spec.shape, axes, strict=True) if axis == "n"
            )
            if spec.dtype != dtype or not fits:
                wanted = ", ".join(str(site.width) if axis == "n" else "any" for axis in axes)
                problems.append(f"tensor {name!r} is {spec.dtype} {list(spec.shape)}; its site says {dtype} [{wanted}]")
    problems += [f"tensor {name!r} belongs to no site" for name in specs if name not in expected]
    return problems
