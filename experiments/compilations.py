"""Compiled functions are forgotten before they are too many for one process."""

from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
LIMIT = 20_000
"""Every compiled function holds a few memory maps, and Linux ends a process that passes 65530 of them."""


def drop_compilations(limit: int = LIMIT) -> None:
    """Forget all compiled functions of this process if it holds more memory maps than that."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > limit:
        jax.clear_caches()
