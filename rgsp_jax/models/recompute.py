"""Layers whose forward pass is made again in the backward pass: deep models learn in the memory of one layer."""

from typing import Any

import jax
from flax import nnx


class Recomputed(nnx.Module):
    """A layer of which only the inputs are kept for its gradient (`jax.checkpoint`)."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        graph, state = nnx.split(self.inner)

        def run(state: Any, arguments: Any, options: Any) -> Any:
            return nnx.merge(graph, state)(*arguments, **options)

        return jax.checkpoint(run)(state, arguments, options)


def recompute_layers(model: nnx.Module) -> nnx.Module:
    """The model with every member of its lists of layers recomputed; the model itself is changed."""
    for _, node in list(nnx.iter_graph(model)):
        if isinstance(node, nnx.List):
            for i, layer in enumerate(node):
                if isinstance(layer, nnx.Module) and not isinstance(layer, Recomputed):
                    node[i] = Recomputed(layer)
    return model
