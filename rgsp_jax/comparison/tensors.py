"""What several models have in common: which tensors, how they are read within a memory limit, how they are viewed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.rules import MatrixView, TensorRule, classify

CHUNK = (64, 4096)
"""Rows and width of what is summed at once; the rows are added up in float64."""
BLOCK = 16 * CHUNK[0] * CHUNK[1]
"""Elements of all models together read at once where a tensor is only summed."""
OVERHEAD = 350_000_000
"""Bytes for what does not grow with the matrices: compiled kernels and blocks."""
WORKING_COPIES = 8
"""Copies of one matrix that its factorisation or matching makes at most, besides one of every model."""
MOST_SLICES = 4
"""Of a stack of experts' matrices: how many are factorised and matched, evenly spread."""


@dataclass(frozen=True)
class CommonTensor:
    """A tensor that at least two of the models have in one shape."""

    name: str
    shape: tuple[int, ...]
    models: tuple[int, ...]
    rule: TensorRule
    dtypes: tuple[str, ...]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def view(self) -> MatrixView | None:
        """As a batch of matrices; embeddings too, with a row per token. None where there is no matrix in it."""
        view = self.rule.view
        if self.rule.kind == "embedding" and len(self.shape) > 1:
            axes = tuple(range(len(self.shape)))
            view = MatrixView(self.shape, (), axes[:-1], axes[-1:])
        if self.rule.kind not in ("matrix", "embedding") or view is None or min(view.matrices) < 1:
            return None
        return view if min(view.matrices[1:]) > 1 else None


@dataclass(frozen=True)
class MatrixStack:
    """One matrix of every model that has it."""

    matrices: list[np.ndarray]
    partial_axis: int | None = None
    """The axis of which only evenly spread places were read, for want of memory."""


def find_common(checkpoints: Sequence[Checkpoint]) -> list[CommonTensor]:
    """Floating-point tensors that two models or more have in one shape; tied names once, buffers not at all.

    Where models disagree on a shape, those that agree are compared.
    """
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.specs)
    found = []
    for name in names:
        shapes: dict[tuple[int, ...], list[int]] = {}
        for i, checkpoint in enumerate(checkpoints):
            spec = checkpoint.specs.get(name)
            if spec is not None and spec.kind == "float" and spec.size and name not in checkpoint.aliases:
                shapes.setdefault(spec.shape, []).append(i)
        for shape, models in shapes.items():
            specs = [checkpoints[i].specs[name] for i in models]
            model_type = (checkpoints[models[0]].config or {}).get("model_type")
            rule = classify(name, shape, specs[0].dtype, model_type=model_type)
            if len(models) > 1 and rule.kind != "buffer":
                dtypes = tuple(spec.dtype.name for spec in specs)
                found.append(CommonTensor(name, shape, tuple(models), rule, dtypes))
    return found


def spread(size: int, most: int) -> np.ndarray:
    """Indices of at most `most` evenly spread places out of `size`, the first and the last among them."""
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(np.int64))


def compute_type(tensor: CommonTensor) -> np.dtype:
    """float64 where a model has it, else float32."""
    return np.dtype(np.float64 if "float64" in tensor.dtypes else np.float32)


def read_block(checkpoints: Sequence[Checkpoint], tensor: CommonTensor, start: int, count: int) -> Iterator[np.ndarray]:
    """Flat elements [start, start + count) of every model that has the tensor, in the compute dtype."""
    for i in tensor.models:
        raw = np.empty(count, checkpoints[i].specs[tensor.name].dtype)
        checkpoints[i].read_into(tensor.name, raw, start)
        yield raw.astype(compute_type(tensor), copy=False)


def read_chunks(checkpoints: Sequence[Checkpoint], tensor: CommonTensor) -> Iterator[np.ndarray]:
    """The whole tensor of every model as [k, *CHUNK], the last padded with zeros."""
    elements = CHUNK[0] * CHUNK[1]
    step = max(1, BLOCK // len(tensor.models) // elements) * elements
    for start in range(0, tensor.size, step):
        count = min(step, tensor.size - start)
        whole = -(-count // elements) * elements
        block = np.zeros((len(tensor.models), whole), compute_type(tensor))
        for row, x in zip(block, read_block(checkpoints, tensor, start, count), strict=True):
            row[:count] = x
        for at in range(0, whole, elements):
            yield block[:, at : at + elements].reshape(-1, *CHUNK)


def read_matrices(checkpoints: Sequence[Checkpoint], tensor: CommonTensor, memory: int) -> Iterator[MatrixStack]:
    """Matrices [m, n] of every model: some slices of a batch, and of what memory cannot hold, evenly spread places."""
    view = tensor.view
    if view is None:
        return
    slices = view.matrices[0]
    one = view.slice_view
    length, inner = one.shape[0], int(np.prod(one.shape[1:], dtype=np.int64))
    per_place = compute_type(tensor).itemsize * inner * (len(tensor.models) + WORKING_COPIES)
    fitting = min(length, max(1, (memory - OVERHEAD) // per_place))
    partial_axis = None if fitting == length else int(0 not in one.outputs)
    places = spread(length, fitting)
    part = replace(one, shape=(len(places), *one.shape[1:]))
    for index in spread(slices, MOST_SLICES):
        offset = int(index) * length * inner
        if partial_axis is None:
            flat = list(read_block(checkpoints, tensor, offset, length * inner))
        else:
            rows = [list(read_block(checkpoints, tensor, offset + int(i) * inner, inner)) for i in places]
            flat = [np.concatenate(row) for row in zip(*rows, strict=True)]
        matrices = [part.to_matrices(x.reshape(part.shape))[0] for x in flat]
        yield MatrixStack(matrices, partial_axis)
