"""What data-needing merges take of a model in memory: covariances of its matrices' inputs, Fisher information."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from rgsp_jax.models import replace_parameters
from rgsp_jax.types import InputStatistics

PyTree = Any
ROWS_AT_ONCE = 25


class Watched(nnx.Module):
    """A linear layer or a patch embedding that shows what it multiplies before it does."""

    def __init__(self, inner: Any, show: Callable[[Array], None]):
        self.inner, self.show = inner, show

    def __call__(self, x: Array) -> Array:
        self.show(x)
        return self.inner(x)


def unfold_patches(x: Float[Array, "batch height width channels"], window: tuple[int, int]) -> Float[Array, "rows n"]:
    """What a convolution that steps by its window multiplies, as its kernel [*window, channels, out] is flattened."""
    (h, w), (batch, height, width, channels) = window, x.shape
    blocks = x.reshape(batch, height // h, h, width // w, w, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(-1, h * w * channels)


def capture_inputs(model: nnx.Module, run: Callable[[Any], Any]) -> dict[str, Float[Array, "rows n"]]:
    """Return slashed path of every linear and patch kernel -> the rows it multiplies in `run(model)`.

    Raises ValueError for a convolution whose windows overlap or are padded.
    """
    seen: dict[str, Array] = {}
    graph, state = nnx.split(model)
    copy: Any = nnx.merge(graph, state)
    for path, layer in list(nnx.iter_graph(copy)):
        if not isinstance(layer, (nnx.Linear, nnx.Conv)):
            continue
        name = "/".join(map(str, (*path, "kernel")))
        window = None
        if isinstance(layer, nnx.Conv):
            window = tuple(layer.kernel.shape[:2])
            if layer.kernel.ndim != 4 or layer.strides != window or layer.padding != "VALID":
                raise ValueError(f"{name} is no patch embedding: its windows overlap or are padded")

        def show(x: Array, name: str = name, window: Any = window) -> None:
            seen[name] = x.reshape(-1, x.shape[-1]) if window is None else unfold_patches(x, window)

        parent: Any = copy
        for part in path[:-1]:
            parent = parent[part] if isinstance(part, int) else getattr(parent, part)
        setattr(parent, str(path[-1]), Watched(layer, show))
    run(copy)
    return seen


def collect_covariances(
    model: nnx.Module, trees: Sequence[PyTree], images: Sequence[Float[np.ndarray, "rows ..."]]
) -> dict[str, InputStatistics]:
    """Return slashed path -> uncentred covariances [K, n, n] of the inputs of every model on its own rows.

    Args:
        model: of the trees' structure.
        trees: K parameter trees.
        images: K batches of one shape, what `model` takes.
    """

    @jax.jit
    def covary(tree: PyTree, batch: Array) -> dict[str, Array]:
        inputs = capture_inputs(replace_parameters(model, tree), lambda m: m(batch))
        return {name: jnp.matmul(x.T, x, precision="highest") / x.shape[0] for name, x in inputs.items()}

    found = [covary(tree, jnp.asarray(batch)) for tree, batch in zip(trees, images, strict=True)]
    return {name: InputStatistics(covariance=jnp.stack([one[name] for one in found])) for name in found[0]}


def estimate_fisher(
    logits: Callable[[PyTree, Array], Array], tree: PyTree, images: Float[Array, "rows ..."], key: Key[Array, ""]
) -> PyTree:
    """Return the diagonal of a classifier's Fisher information: mean squared gradient of log p(y | x), y drawn from it.

    Matena & Raffel 2022, arXiv 2111.09832, with one draw of y for every row.

    Args:
        logits: `logits(tree, images) -> [rows, classes]`.
        tree: the parameters that the gradient is of.
    """

    def square(x: Array, key: Array) -> PyTree:
        def log_likelihood(tree: PyTree) -> Array:
            scores = jax.nn.log_softmax(logits(tree, x[None])[0])
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            return scores[drawn]

        return jax.tree.map(jnp.square, jax.grad(log_likelihood)(tree))

    keys = jax.random.split(key, images.shape[0])
    squares = jax.lax.map(lambda row: square(*row), (images, keys), batch_size=ROWS_AT_ONCE)
    return jax.tree.map(lambda x: x.mean(0), squares)


def find_uncovered(tree: PyTree, inputs: Mapping[str, InputStatistics]) -> set[str]:
    """Return slashed paths of the tree's kernels that have no statistics."""
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)}
    return {name for name in names if name.endswith("/kernel")} - set(inputs)
