"""What is kept of a site's inputs: jitted sums in JAX, counts, and a fair draw of held-back rows."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgsp_jax.grafting.convergence import leading_rows, leading_subspace, subspace_movement
from rgsp_jax.grafting.covariance import finish_covariance, initial_covariance, update_covariance
from rgsp_jax.grafting.sketch import finish_sketch, initial_sketch, update_sketch

MIN_CHUNK, MAX_CHUNK = 256, 2048


def chunk_rows(width: int) -> int:
    """Rows that are summed at a time: enough to fill a matrix product, not more than the sums themselves take."""
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << (width - 1).bit_length()))


def full_bytes(width: int) -> int:
    """Memory of a site with all of its second moment: sum, compensation, rows waiting."""
    return 4 * width * (2 * width + chunk_rows(width))


def sketch_bytes(width: int, size: int) -> int:
    """Memory of a site with a sketch: test matrix, sum, compensation, rows waiting."""
    return 4 * width * (3 * size + chunk_rows(width))


_update_covariance = jax.jit(update_covariance, donate_argnums=0)
_finish_covariance = jax.jit(finish_covariance)
_update_sketch = jax.jit(update_sketch)
_finish_sketch = jax.jit(finish_sketch)
_leading_subspace = jax.jit(leading_subspace)
_leading_rows = jax.jit(leading_rows)
_subspace_movement = jax.jit(subspace_movement)
_initial_sketch = jax.jit(initial_sketch, static_argnums=(0, 1))


def join_rows(pieces: Sequence[Any], rows: int) -> jax.Array:
    """Pieces [r, n] of NumPy or torch as one float32 JAX array, filled up with zeros to `rows`."""
    filling: list[Any]
    missing = rows - sum(piece.shape[0] for piece in pieces)
    width = pieces[0].shape[1]
    if isinstance(pieces[0], np.ndarray):
        filling = [np.zeros((missing, width), np.float32)] if missing else []
        return jnp.asarray(np.concatenate([*pieces, *filling]), jnp.float32)
    import torch

    filling = [pieces[0].new_zeros((missing, width))] if missing else []
    joined = torch.cat([*pieces, *filling]).contiguous()
    if joined.device.type != "cpu" and jax.default_backend() == "cpu":
        joined = joined.cpu()
    return jax.dlpack.from_dlpack(joined)


class RowAccumulator:
    """The second moment of one site's inputs, `full` or as a `sketch`; rows wait until a chunk is full."""

    def __init__(self, width: int, sketch_size: int | None = None):
        self.width = width
        self.kind = "full" if sketch_size is None else "sketch"
        self.rows = 0
        self._chunk = chunk_rows(width)
        self._waiting: list[Any] = []
        self._count = 0
        self._state: Any = initial_covariance(width) if sketch_size is None else _initial_sketch(width, sketch_size)
        self._update = _update_covariance if sketch_size is None else _update_sketch
        self._leading: jax.Array | None = None

    def add(self, rows: Any) -> None:
        """Take rows [r, width], NumPy or torch, float32, that nobody else writes to."""
        self.rows += rows.shape[0]
        start = 0
        while rows.shape[0] - start >= self._chunk - self._count:
            taken = self._chunk - self._count
            self._waiting.append(rows[start : start + taken])
            self._count += taken
            start += taken
            self._flush()
        if start < rows.shape[0]:
            rest = rows[start:]
            if start:  # a view would keep all the rows that are done with
                rest = rest.copy() if isinstance(rest, np.ndarray) else rest.clone()
            self._waiting.append(rest)
            self._count += rest.shape[0]

    def _flush(self) -> None:
        if self._count:
            mask = np.arange(self._chunk) < self._count
            jax.block_until_ready(self._state.rows)  # one sum under way per site: the model must not run far ahead
            self._state = self._update(self._state, join_rows(self._waiting, self._chunk), jnp.asarray(mask))
            self._waiting, self._count = [], 0

    def measure_movement(self) -> float | None:
        """How far the leading subspace is from where it was at the last call; None at the first."""
        if not self.rows:
            return None
        self._flush()
        if self.kind == "full":
            leading = _leading_subspace(_finish_covariance(self._state).second)
        else:
            leading = _leading_rows(_finish_sketch(self._state).factor)
        before, self._leading = self._leading, leading
        return None if before is None else float(_subspace_movement(before, leading))

    def finish(self) -> dict[str, np.ndarray]:
        """The site's arrays by part, as the covariance file names them; the sums are let go."""
        self._flush()
        state, self._state = self._state, None
        if self.kind == "full":
            result = _finish_covariance(state)
            return {"covariance": np.asarray(result.second), "mean": np.asarray(result.mean)}
        sketch = _finish_sketch(state)
        return {"sketch": np.asarray(sketch.factor), "trace": np.asarray(sketch.trace), "mean": np.asarray(sketch.mean)}


class HeldBackRows:
    """An equal draw of at most `size` rows of all that pass: every row gets a random number, the lowest stay."""

    def __init__(self, width: int, size: int, generator: np.random.Generator):
        self.size = size
        self._generator = generator
        self._keys = np.zeros(0)
        self._rows = np.zeros((0, width), np.float32)

    def add(self, rows: Any) -> None:
        """Take rows [r, width], NumPy or torch."""
        keys = self._generator.random(rows.shape[0])
        limit = self._keys[-1] if len(self._keys) == self.size else np.inf
        chosen = np.flatnonzero(keys < limit)
        if not self.size or not chosen.size:
            return
        new = rows[chosen]
        new = new if isinstance(new, np.ndarray) else new.cpu().numpy()
        keys = np.concatenate([self._keys, keys[chosen]])
        order = np.argsort(keys)[: self.size]
        self._keys, self._rows = keys[order], np.concatenate([self._rows, new])[order]

    def finish(self) -> np.ndarray:
        """The rows [h, width], float32."""
        return self._rows


class IdAccumulator:
    """How often each row of a table was looked up."""

    def __init__(self, width: int):
        self.counts = np.zeros(width, np.int64)

    @property
    def rows(self) -> int:
        return int(self.counts.sum())

    def add(self, ids: np.ndarray) -> None:
        """Take row numbers, any shape."""
        self.counts += np.bincount(ids.reshape(-1), minlength=self.counts.size)
