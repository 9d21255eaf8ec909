"""Random models of transformers on disk, and what our families make of them."""

import numpy as np
import pytest

from rgsp_jax.models import FAMILIES, export_weights, load_weights

safetensors = pytest.importorskip("safetensors.numpy")
torch = pytest.importorskip("torch")

VOCABULARY, TIME = 37, 9


def save_and_read(model, directory):
    """What transformers puts on disk for a model: weights by key (disk names, not those in memory) and config."""
    model.save_pretrained(directory)
    return safetensors.load_file(directory / "model.safetensors"), model.config.to_dict()


def randomise(model):
    """Fill every parameter, norms and biases too, with values that make a wrong place visible."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def draw_tokens(seed=0, lengths=(TIME, 4, 1, -6)):
    """Token ids of texts of those lengths, and the mask of what is no padding, both int32 [texts, TIME].

    Padding is on the right, and on the left of a text of negative length.
    """
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (len(lengths), TIME))
    right = np.arange(TIME)[None] < np.abs(lengths)[:, None]
    mask = np.where(np.array(lengths)[:, None] < 0, right[:, ::-1], right)
    return ids.astype(np.int32), mask.astype(np.int32)


def as_torch(*arrays):
    return [torch.tensor(array.astype(np.int64)) for array in arrays]


def build_loaded(config, weights):
    """Our model of a config and the weights on disk; it holds just what they hold, bit for bit."""
    shapes = {key: array.shape for key, array in weights.items()}
    model = load_weights(FAMILIES[config["model_type"]].build(config, shapes), weights)
    exported = export_weights(model)
    assert exported.keys() == weights.keys()
    for key, array in weights.items():
        assert exported[key].dtype == array.dtype
        np.testing.assert_array_equal(exported[key], array, err_msg=key)
    return model
