"""Covariance files taken apart once, so that every point of a sweep is spared the eigendecompositions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from rgsp_jax.checkpoint import Site, open_covariances, write_covariances
from rgsp_jax.grafting import decompose_covariance, decompose_sketch

OnSite = Callable[[str], None]


def write_spectra(covariances: Path | str, out: Path | str, on_site: OnSite | None = None) -> None:
    """Write a file of the same sites with spectra in place of covariances and sketches; one decomposition a site.

    Raises:
        RefusedError: see `open_covariances`.
    """
    whole, part = jax.jit(decompose_covariance), jax.jit(decompose_sketch)
    sites: list[Site] = []
    tensors: dict[str, np.ndarray] = {}
    with open_covariances(covariances) as file:
        for site in file.sites.values():
            if site.kind not in ("full", "sketch"):
                continue
            if site.kind == "full":
                spectrum = whole(file.read(site.name, "covariance"))
            else:
                spectrum = part(file.read(site.name, "sketch"), file.read(site.name, "trace"))
            arrays = spectrum._asdict() | {name: file.read(site.name, name) for name in ("mean", "held_back")}
            tensors |= {f"{site.name}.{name}": np.asarray(x, np.float32) for name, x in arrays.items()}
            sites.append(replace(site, kind="spectrum"))
            if on_site:
                on_site(site.name)
        write_covariances(out, file.model, file.data, sites, tensors, file.not_covered)
