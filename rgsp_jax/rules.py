"""What a tensor is, from its name and shape: a matrix to merge, or something an average or a copy serves better.

The tables below are data; the first matching row decides. Names are dotted (PyTorch) or slashed (Flax).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

Kind = Literal["matrix", "vector", "embedding", "buffer"]
Layout = Literal["auto", "pytorch", "flax"]

EMBEDDING_NAMES = re.compile(
    r"(^|[./]|(?<!patch)_)(word_embeddings|position_embeddings?|token_type_embeddings|embed_tokens|embed_positions|embed_in"
    r"|embedding|tok_embeddings|wte|wpe|shared|lm_head(?![./](dense|layer_norm|transform|bias))|relative_attention_bias|cls_token|mask_token|dist_token"
    r"|distillation_token|pos_embed(ding)?|positional_embedding|class_embedding|register_tokens|query_tokens"
    r"|latents|rel_embeddings|relative_position_bias_table)([./]|$)"
)
"""Tables with a row per token or position: rows are looked up, not multiplied, so a subspace of them means little."""

VECTOR_NAMES = re.compile(r"(^|[./_])(bias|scale)$")
"""Added or multiplied entry by entry, whatever their rank: Flax keeps attention biases as [heads, head size]."""

BUFFER_NAMES = re.compile(
    r"(^|[./])(inv_freq|rotary_emb[./].*|position_ids|token_type_ids|masked_bias|attn[./]bias|num_batches_tracked"
    r"|relative_position_index|relative_coords_table|freqs_cis)$"
)
"""Constants and counters of the architecture: never merged."""

EXPERT_NAMES = re.compile(r"(^|[./_])experts([./_]|$)")
"""Weights of rank 3 with a leading axis over stacked experts."""

CONV1D_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Families whose linear layers are stored as [inputs, outputs]."""

CONV1D_NAMES = re.compile(r"(^|[./])(c_attn|c_proj|c_fc|q_attn)[./]weight$")

FLAX_NAMES = re.compile(r"(^|[./])(kernel|embedding|scale)$")

FLAX_HEADS_OUT = re.compile(r"(^|[./])(query|key|value|q_proj|k_proj|v_proj|q|k|v)[./]kernel$")
"""Attention kernels [features, heads, head size]: one input axis, two output axes."""


@dataclass(frozen=True)
class MatrixView:
    """An any-rank kernel as a batch of matrices [b, m, n] (outputs x inputs), and back: a transpose and a reshape.

    `batch`, `outputs` and `inputs` are the tensor's axes in the order they are flattened; batch axes come first in
    the tensor too.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    outputs: tuple[int, ...]
    inputs: tuple[int, ...]

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(b, m, n)."""
        b, m, n = (math.prod(self.shape[i] for i in axes) for axes in (self.batch, self.outputs, self.inputs))
        return b, m, n

    @property
    def axes(self) -> tuple[int, ...]:
        return self.batch + self.outputs + self.inputs

    @property
    def contiguous(self) -> bool:
        """True where the view is a mere reshape."""
        return self.axes == tuple(range(len(self.shape)))

    @property
    def slice_shape(self) -> tuple[int, ...]:
        """The tensor's shape without its batch axes, which lead."""
        return self.shape[len(self.batch) :]

    @property
    def slice_view(self) -> "MatrixView":
        """The view of one slice along the batch axes, as a batch of one."""
        drop = len(self.batch)
        outputs, inputs = (tuple(i - drop for i in axes) for axes in (self.outputs, self.inputs))
        return MatrixView(self.slice_shape, (), outputs, inputs)

    def to_matrices(self, x: Any) -> Any:
        """[shape] -> [b, m, n]; NumPy and JAX arrays alike."""
        return x.transpose(self.axes).reshape(self.matrices)

    def from_matrices(self, x: Any) -> Any:
        """[b, m, n] -> [shape], the inverse of `to_matrices`."""
        inverse = tuple(self.axes.index(i) for i in range(len(self.axes)))
        return x.reshape(tuple(self.shape[i] for i in self.axes)).transpose(inverse)


@dataclass(frozen=True)
class TensorRule:
    """What a tensor is and, for a matrix, how it is viewed as one."""

    kind: Kind
    view: MatrixView | None = None


def classify(
    name: str, shape: Sequence[int], dtype: Any, layout: Layout = "auto", model_type: str | None = None
) -> TensorRule:
    """The rule of one tensor.

    Args:
        name: its path in the checkpoint or tree.
        shape, dtype: of the tensor.
        layout: "pytorch" weights are [outputs, inputs, ...], "flax" kernels [..., inputs, outputs]; "auto" tells by
            the name's last part.
        model_type: the config's `model_type`, where there is one; it tells which families store linear layers as
            [inputs, outputs].
    """
    shape = tuple(shape)
    if not jnp.issubdtype(dtype, jnp.floating) or BUFFER_NAMES.search(name):
        return TensorRule("buffer")
    if EMBEDDING_NAMES.search(name):
        return TensorRule("embedding")
    if len(shape) < 2 or VECTOR_NAMES.search(name):
        return TensorRule("vector")
    flax = layout == "flax" or (layout == "auto" and FLAX_NAMES.search(name) is not None)
    view = view_flax_kernel(name, shape) if flax else view_pytorch_weight(name, shape, model_type)
    return TensorRule("matrix" if min(view.matrices[1:]) > 1 and view.matrices[0] > 0 else "vector", view)


def view_pytorch_weight(name: str, shape: tuple[int, ...], model_type: str | None) -> MatrixView:
    """[outputs, inputs, *window], experts leading where the name says so."""
    axes = tuple(range(len(shape)))
    if len(shape) == 3 and EXPERT_NAMES.search(name):
        return MatrixView(shape, axes[:1], axes[1:2], axes[2:])
    if len(shape) == 2 and model_type in CONV1D_MODEL_TYPES and CONV1D_NAMES.search(name):
        return MatrixView(shape, (), (1,), (0,))
    return MatrixView(shape, (), axes[:1], axes[1:])


def view_flax_kernel(name: str, shape: tuple[int, ...]) -> MatrixView:
    """[*window, inputs, outputs], experts leading and attention heads among the outputs where the name says so."""
    axes = tuple(range(len(shape)))
    if len(shape) == 3 and EXPERT_NAMES.search(name):
        return MatrixView(shape, axes[:1], axes[2:], axes[1:2])
    if len(shape) == 3 and FLAX_HEADS_OUT.search(name):
        return MatrixView(shape, (), axes[1:], axes[:1])
    return MatrixView(shape, (), axes[-1:], axes[:-1])


def flatten_view(shape: Sequence[int]) -> MatrixView:
    """Any tensor as one matrix, for methods that take whole tensors: [first axis, the rest], a vector as one row."""
    shape = tuple(shape)
    axes = tuple(range(len(shape)))
    return MatrixView(shape, (), axes[:1], axes[1:]) if len(shape) > 1 else MatrixView(shape, (), (), axes)
