"""A strict test process: float64 allowed, no silent dtype or rank promotion, eight simulated devices."""

import itertools
import os
import shutil
import tempfile
from pathlib import Path

# One cache for all workers of a run, gone after it: the same kernel is compiled once, not once per worker.
OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="rgsp-tests-")
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Every compiled function holds a few memory maps, and Linux ends a process that passes 65530 of them.
MAPS, MAPS_LIMIT, LOOK_EVERY = Path("/proc/self/maps"), 20_000, 20
tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def compiled_functions_stay_few():
    yield
    if next(tests_done) % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MAPS_LIMIT:
        jax.clear_caches()


def pytest_unconfigure():
    """The process that made the cache removes it; workers find its name in their environment."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
