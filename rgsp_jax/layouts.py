"""Axes of a PyTorch array in the order that Flax stores them, by operation: data, and its own inverse."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

OPERATIONS: Mapping[str, tuple[int, ...] | None] = MappingProxyType(
    {
        "identity": None,
        "embedding": None,
        "norm": None,
        "linear": (1, 0),
        "conv1d": (2, 1, 0),
        "conv2d": (2, 3, 1, 0),
        "conv3d": (2, 3, 4, 1, 0),
    }
)
"""Operation -> axes of the PyTorch array in the order flax stores them; None leaves the array as it is.

The operation follows the module's type, never the shape: a square Linear is transposed like any other. Transposed
convolutions, [in, out, *window], become what flax's ConvTranspose takes with `transpose_kernel=True` by the same axes.
"""

STRIP = 16
"""Rows transposed at a time: as many as share the cache lines of the columns being written."""


def to_flax_layout(array: np.ndarray, operation: str) -> np.ndarray:
    """Return a PyTorch array in flax's layout, as a view; see OPERATIONS."""
    axes = OPERATIONS[operation]
    return array if axes is None else array.transpose(axes)


def to_torch_layout(array: np.ndarray, operation: str) -> np.ndarray:
    """Return a flax array in PyTorch's layout, as a view; the inverse of `to_flax_layout`."""
    axes = OPERATIONS[operation]
    return array if axes is None else array.transpose(np.argsort(axes))


def to_flax_shape(shape: Sequence[int], operation: str) -> tuple[int, ...]:
    """Shape in flax's layout of a PyTorch array of this shape."""
    axes = OPERATIONS[operation]
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in axes)


def to_torch_shape(shape: Sequence[int], operation: str) -> tuple[int, ...]:
    """Shape in PyTorch's layout of a flax array of this shape."""
    axes = OPERATIONS[operation]
    return tuple(shape) if axes is None else tuple(shape[axis] for axis in np.argsort(axes))


def pack(view: np.ndarray) -> np.ndarray:
    """A C-contiguous array of a (transposed) view, itself where it is one; 0-d stays 0-d.

    NumPy copies a transposed matrix element by element of the result, a cache line each; strips of rows are several
    times faster. Convolutions have no such trouble.
    """
    if view.ndim != 2 or not view.T.flags.c_contiguous or view.flags.c_contiguous:
        return np.asarray(view, order="C")
    rows, packed = view.T, np.empty(view.shape, view.dtype)
    for start in range(0, rows.shape[0], STRIP):
        packed[:, start : start + STRIP] = rows[start : start + STRIP].T
    return packed
