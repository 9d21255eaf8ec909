"""Two covariance files of one model as one: what was summed apart is added up."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rgsp_jax.activations.collect import find_output_problems
from rgsp_jax.checkpoint import CovarianceFile, DataRecord, Site, open_covariances, write_covariances
from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.errors import RefusedError
from rgsp_jax.grafting.convergence import leading_rows, leading_subspace, subspace_movement
from rgsp_jax.grafting.sketch import compress_factor


def combine_covariance_files(first: Path | str, second: Path | str, out: Path | str) -> list[Site]:
    """Add up two covariance files of one model over disjoint data.

    Means are weighted by the inputs behind them; held-back inputs of both are kept. Sketches are stacked and cut to the
    larger size. A site that only one file has is taken over.

    Raises:
        RefusedError: files of different models, the same data in both, sites kept in different ways, a file in the way.
    """
    out = Path(out)
    problems = find_output_problems(out)
    opened: list[CovarianceFile] = []
    for path in (first, second):
        try:
            opened.append(open_covariances(path))
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise RefusedError(problems)
    a, b = opened
    with a, b:
        problems = [*find_differences(a, b), *find_common_data(a, b)]
        if problems:
            raise RefusedError(cap(problems))
        sites: list[Site] = []
        tensors: dict[str, np.ndarray] = {}
        for name in dict.fromkeys([*a.sites, *b.sites]):
            site, parts = add_sites(a, b, name)
            sites.append(site)
            tensors |= {f"{name}.{part}": array for part, array in parts.items()}
        covered = {weight for site in sites for weight in site.weights}
        reasons = {name: why for name, why in {**a.not_covered, **b.not_covered}.items() if name not in covered}
        write_covariances(out, a.model, a.data + b.data, sites, tensors, reasons)
    return sites


def find_differences(a: CovarianceFile, b: CovarianceFile) -> list[str]:
    """Why two files cannot be of one model, or are not kept alike."""
    common = [name for name in a.site_of if name in b.site_of]
    if not common:
        return [f"{a.path} and {b.path} are of different models: they have no weight in common"]
    problems = []
    for name in common:
        left, right = a.site_of[name], b.site_of[name]
        if left.weights[name] != right.weights[name]:
            problems.append(f"{a.path} and {b.path} are of different models: {name!r} had other values")
        elif (left.name, set(left.weights), left.width) != (right.name, set(right.weights), right.width):
            problems.append(f"{name!r} belongs to different sites in {a.path} and {b.path}: collect them alike")
        elif left.kind != right.kind:
            problems.append(
                f"{left.name} is kept as {left.kind} in {a.path} and as {right.kind} in {b.path}: collect both with "
                "the same --memory"
            )
    return list(dict.fromkeys(problems))


def find_common_data(a: CovarianceFile, b: CovarianceFile) -> list[str]:
    """Data that would be counted twice."""
    return [
        f"{a.path} and {b.path} both have inputs from {left.name}: use --part 1/2 and --part 2/2 with one seed, or "
        "other data"
        for left in a.data
        for right in b.data
        if left.digest == right.digest and not are_disjoint(left, right)
    ]


def are_disjoint(left: DataRecord, right: DataRecord) -> bool:
    """True for different parts of one division of the same data."""
    (i, k), (j, m) = (record.part.split("/") for record in (left, right))
    return left.seed == right.seed and k == m and i != j


def add_sites(a: CovarianceFile, b: CovarianceFile, name: str) -> tuple[Site, dict[str, np.ndarray]]:
    """One site of both files."""
    if name not in a.sites or name not in b.sites:
        only = a if name in a.sites else b
        site = only.sites[name]
        return site, {part: only.read(name, part) for part in ADDITIONS[site.kind]}
    left, right = a.sites[name], b.sites[name]
    rows = left.rows + right.rows
    share = left.rows / rows
    parts = {part: add(a.read(name, part), b.read(name, part), share) for part, add in ADDITIONS[left.kind].items()}
    larger = a if left.rows >= right.rows else b
    site = Site(name, left.weights, left.kind, left.width, rows, measure(larger, name, parts))
    return site, parts


def measure(larger: CovarianceFile, name: str, parts: Mapping[str, np.ndarray]) -> float | None:
    """How far the leading subspace moved from the larger file's to that of both."""
    for part, lead in (("covariance", leading_subspace), ("sketch", leading_rows)):
        if part in parts:
            before, after = (lead(jnp.asarray(x)) for x in (larger.read(name, part), parts[part]))
            return float(subspace_movement(before, after))
    return None


def add_means(left: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    """Weighted mean, in float64 on the way."""
    return (share * left.astype(np.float64) + (1 - share) * right.astype(np.float64)).astype(np.float32)


def add_sketches(left: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    """The best sketch of both, as large as the larger."""
    stacked = np.concatenate([share**0.5 * left, (1 - share) ** 0.5 * right])
    return np.asarray(compress_factor(jnp.asarray(stacked, jnp.float32), size=max(len(left), len(right))))


def add_counts(left: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    return left + right


def join(left: np.ndarray, right: np.ndarray, share: float) -> np.ndarray:
    return np.concatenate([left, right])


ADDITIONS: Mapping[str, Mapping[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]]] = {
    "full": {"covariance": add_means, "mean": add_means, "held_back": join},
    "sketch": {"sketch": add_sketches, "trace": add_means, "mean": add_means, "held_back": join},
    "counts": {"counts": add_counts, "held_back_counts": add_counts},
}
"""Kind -> part -> how it is added up."""
