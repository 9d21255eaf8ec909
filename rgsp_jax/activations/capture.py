"""Every multiplication by a weight while a torch model runs, seen at the function that does it.

One forward pass under a TorchFunctionMode: a linear, convolution or embedding function whose weight is made of
checkpoint tensors hands over its input first. That sees what forward pre-hooks on modules see, and the experts, routers
and stacked weights that are no modules of their own too.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from rgsp_jax.activations.sites import Place

MAX_PATCH_BYTES = 1 << 28


class Call(NamedTuple):
    """One use of a weight."""

    weights: tuple[str, ...]
    """Checkpoint tensors that make up the weight."""
    kind: Literal["rows", "ids", "patches"]
    input: torch.Tensor
    """Rows [..., width]; row numbers of a table, any shape; what a convolution slides over [batch, in, *positions]."""
    width: int
    """Entries of a row (of a patch); rows of a table."""
    patches: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Of a convolution: input -> rows [r, width], entries in the order [in, *window]."""


class WeightIndex:
    """Checkpoint tensors by the memory that they lie in."""

    def __init__(self, parameters: Mapping[str, torch.Tensor], places: Mapping[str, Place]):
        self._by_storage: dict[int, list[tuple[int, int, str]]] = {}
        for name, place in places.items():
            tensor = parameters[place.parameter]
            begin = int(tensor.storage_offset()) + place.start
            entries = self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), [])
            entries.append((begin, begin + place.size, name))
        for entries in self._by_storage.values():
            entries.sort()

    def find(self, weight: Any) -> tuple[str, ...]:
        """The checkpoint tensors that make up all of this weight (or its transpose), in the order of their elements."""
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            return ()
        entries = self._by_storage.get(weight.untyped_storage().data_ptr())
        if entries is None or not (weight.is_contiguous() or weight.mT.is_contiguous()):
            return ()
        begin = int(weight.storage_offset())
        end = begin + weight.numel()
        inside = [entry for entry in entries if begin <= entry[0] and entry[1] <= end]
        whole = sum(stop - start for start, stop, _ in inside) == end - begin
        return tuple(name for _, _, name in inside) if whole else ()


class Capture(TorchFunctionMode):
    """While active, hands every Call to `receive` before it happens."""

    def __init__(self, index: WeightIndex, receive: Callable[[Call], None]):
        super().__init__()
        self._index = index
        self._receive = receive

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        read = READERS.get(func)
        if read is not None:
            call = read(self._index, *args, **kwargs)
            if call is not None:
                self._receive(call)
        return func(*args, **kwargs)


def read_linear(index: WeightIndex, input: Any, weight: Any, bias: Any = None) -> Call | None:
    weights = index.find(weight)
    return Call(weights, "rows", input, weight.shape[-1]) if weights else None


def read_product(index: WeightIndex, input: Any, mat2: Any, **_: Any) -> Call | None:
    """`input @ weight`, the weight [inputs, outputs]."""
    weights = index.find(mat2) if isinstance(mat2, torch.Tensor) and mat2.ndim == 2 else ()
    return Call(weights, "rows", input, mat2.shape[0]) if weights else None


def read_sum_and_product(index: WeightIndex, input: Any, mat1: Any, mat2: Any, **_: Any) -> Call | None:
    return read_product(index, mat1, mat2)


def read_embedding(index: WeightIndex, input: Any, weight: Any, *_: Any, **__: Any) -> Call | None:
    weights = index.find(weight)
    return Call(weights, "ids", input, weight.shape[0]) if weights else None


def read_convolution(
    index: WeightIndex,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Call | None:
    weights = index.find(weight)
    if not weights or groups != 1:  # the inputs of every group are others
        return None
    window = tuple(weight.shape[2:])
    steps, gaps = spread(stride, len(window)), spread(dilation, len(window))
    margins = find_margins(padding, window, gaps)
    unbatched = input.ndim == len(window) + 1

    def patches(x: torch.Tensor) -> torch.Tensor:
        return unfold(x[None] if unbatched else x, window, steps, margins, gaps)

    return Call(weights, "patches", input, weight.shape[1] * math.prod(window), patches)


READERS: Mapping[Any, Callable[..., Call | None]] = {
    F.linear: read_linear,
    torch.addmm: read_sum_and_product,
    torch.matmul: read_product,
    torch.mm: read_product,
    torch.Tensor.matmul: read_product,
    torch.Tensor.__matmul__: read_product,
    torch.Tensor.mm: read_product,
    F.embedding: read_embedding,
    torch.embedding: lambda index, weight, input, *_, **__: read_embedding(index, input, weight),
    F.conv1d: read_convolution,
    F.conv2d: read_convolution,
    F.conv3d: read_convolution,
}
"""Function -> how its arguments are read."""


def spread(value: Any, count: int) -> tuple[int, ...]:
    """One number per axis."""
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * count if len(value) == 1 else tuple(value)


def find_margins(padding: Any, window: tuple[int, ...], gaps: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis."""
    if padding == "valid":
        return ((0, 0),) * len(window)
    if padding == "same":
        totals = [gap * (size - 1) for size, gap in zip(window, gaps, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((margin, margin) for margin in spread(padding, len(window)))


def unfold(
    x: torch.Tensor,
    window: tuple[int, ...],
    steps: tuple[int, ...],
    margins: tuple[tuple[int, int], ...],
    gaps: tuple[int, ...],
) -> torch.Tensor:
    """What a convolution multiplies: [batch, in, *positions] -> rows [batch * places, in * window], the window last."""
    x = F.pad(x, [margin for pair in reversed(margins) for margin in pair])
    for axis, (size, step, gap) in enumerate(zip(window, steps, gaps, strict=True), 2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    rank = len(window)
    places, windows = range(2, 2 + rank), range(2 + rank, 2 + 2 * rank)
    return x.permute(0, *places, 1, *windows).reshape(-1, x.shape[1] * math.prod(window))


def iterate_patches(call: Call) -> Iterator[torch.Tensor]:
    """A convolution's rows, few enough at a time for the memory."""
    assert call.patches is not None
    x = call.input
    per_example = x[:1].numel() * 4 * max(1, call.width // max(1, x.shape[1]))
    step = max(1, MAX_PATCH_BYTES // max(1, per_example))
    for start in range(0, x.shape[0], step):
        yield call.patches(x[start : start + step])
