"""What a tensor is, by name and shape; and the views that make matrices of kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rgsp_jax.rules import MatrixView, classify, flatten_view

F32, I64 = np.float32, np.int64

KINDS = [
    ("encoder.layer.0.attention.self.query.weight", (8, 8), F32, "matrix"),
    ("encoder.layer.0.attention.self.query.bias", (8,), F32, "vector"),
    ("embeddings.word_embeddings.weight", (30, 8), F32, "embedding"),
    ("embeddings.LayerNorm.weight", (8,), F32, "vector"),
    ("vit.embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4), F32, "matrix"),
    ("vit.embeddings.cls_token", (1, 1, 8), F32, "embedding"),
    ("vit.embeddings.position_embeddings", (1, 5, 8), F32, "embedding"),
    ("model.embed_tokens.weight", (30, 8), F32, "embedding"),
    ("lm_head.weight", (30, 8), F32, "embedding"),
    ("model.layers.0.mlp.gate_proj.weight", (16, 8), F32, "matrix"),
    ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), F32, "buffer"),
    ("transformer.h.0.attn.bias", (1, 1, 16, 16), F32, "buffer"),
    ("transformer.h.0.attn.c_attn.bias", (24,), F32, "vector"),
    ("transformer.wte.weight", (30, 8), F32, "embedding"),
    ("shared.weight", (30, 8), F32, "embedding"),
    ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4), F32, "embedding"),
    ("bn1.num_batches_tracked", (), I64, "buffer"),
    ("bn1.running_mean", (8,), F32, "vector"),
    ("embeddings.position_ids", (1, 16), I64, "buffer"),
    ("score.weight", (1, 8), F32, "vector"),
    ("logit_scale", (), F32, "vector"),
    ("encoder/layers/0/mlp/kernel", (8, 16), F32, "matrix"),
    ("token/embedding", (30, 8), F32, "embedding"),
    ("norm/scale", (8,), F32, "vector"),
    ("attention/query/bias", (2, 4), F32, "vector"),
    ("mlp.experts.gate_up_proj_bias", (4, 16), F32, "vector"),
]


@pytest.mark.parametrize(("name", "shape", "dtype", "kind"), KINDS, ids=lambda x: x if isinstance(x, str) else "")
def test_kind(name, shape, dtype, kind):
    assert classify(name, shape, dtype).kind == kind


VIEWS = [
    ("layer.weight", (6, 4), {}, (1, 6, 4)),
    ("conv.weight", (6, 3, 2, 2), {}, (1, 6, 12)),
    ("mlp.experts.gate_up_proj", (5, 6, 4), {}, (5, 6, 4)),
    ("conv1d.weight", (6, 4, 3), {}, (1, 6, 12)),
    ("h.0.attn.c_attn.weight", (4, 12), {"model_type": "gpt2"}, (1, 12, 4)),
    ("h.0.attn.c_attn.weight", (12, 4), {"model_type": "gpt_bigcode"}, (1, 12, 4)),
    ("dense/kernel", (4, 6), {}, (1, 6, 4)),
    ("conv/kernel", (2, 2, 3, 6), {}, (1, 6, 12)),
    ("experts/kernel", (5, 4, 6), {}, (5, 6, 4)),
    ("attention/query/kernel", (8, 2, 3), {}, (1, 6, 8)),
    ("attention/out/kernel", (2, 3, 8), {}, (1, 8, 6)),
    ("w", (4, 6), {"layout": "flax"}, (1, 6, 4)),
]


@pytest.mark.parametrize(("name", "shape", "options", "matrices"), VIEWS)
def test_view_and_back(name, shape, options, matrices):
    view = classify(name, shape, F32, **options).view
    assert view.matrices == matrices
    x = np.arange(np.prod(shape), dtype=F32).reshape(shape)
    np.testing.assert_array_equal(view.from_matrices(view.to_matrices(x)), x)
    np.testing.assert_array_equal(view.from_matrices(view.to_matrices(jnp.asarray(x))), x)
    slices = view.to_matrices(x)
    for i, part in enumerate(x.reshape(-1, *view.slice_shape) if view.batch else [x]):
        np.testing.assert_array_equal(view.slice_view.to_matrices(part)[0], slices[i])
        np.testing.assert_array_equal(view.slice_view.from_matrices(slices[i][None]), part)


def test_a_dense_kernel_and_its_transpose_are_one_matrix():
    x = np.arange(24.0).reshape(4, 6)
    flax, torch = classify("a/kernel", (4, 6), F32).view, classify("a.weight", (6, 4), F32).view
    np.testing.assert_array_equal(flax.to_matrices(x), torch.to_matrices(x.T))


@given(st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple))
def test_any_tensor_is_one_matrix(shape):
    view = flatten_view(shape)
    x = np.arange(np.prod(shape, dtype=int), dtype=F32).reshape(shape)
    assert view.matrices[0] == 1 and view.contiguous
    np.testing.assert_array_equal(view.from_matrices(view.to_matrices(x)), x)


def test_contiguous_is_told_from_transposed():
    assert MatrixView((2, 3, 4), (), (0,), (1, 2)).contiguous
    assert not MatrixView((2, 3), (), (1,), (0,)).contiguous
