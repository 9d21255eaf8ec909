"""A ResNet of basic blocks in linen, its modules named as PyTorch names them."""

import jax.numpy as jnp
from flax import linen


class Convolution(linen.Module):
    """Convolution and batch norm in evaluation mode."""

    width: int
    window: int
    stride: int

    @linen.compact
    def __call__(self, x):
        around = [(self.window // 2, self.window // 2)] * 2
        x = linen.Conv(self.width, (self.window,) * 2, (self.stride,) * 2, around, use_bias=False, name="convolution")(
            x
        )
        return linen.BatchNorm(use_running_average=True, epsilon=1e-5, name="normalization")(x)


class Pair(linen.Module):
    """The two convolutions of a basic block."""

    width: int
    stride: int

    @linen.compact
    def __call__(self, x):
        x = linen.relu(Convolution(self.width, 3, self.stride, name="0")(x))
        return Convolution(self.width, 3, 1, name="1")(x)


class Block(linen.Module):
    """A residual block, with a projection where the width or the size changes."""

    width: int
    stride: int

    @linen.compact
    def __call__(self, x):
        changes = x.shape[-1] != self.width or self.stride != 1
        kept = Convolution(self.width, 1, self.stride, name="shortcut")(x) if changes else x
        return linen.relu(Pair(self.width, self.stride, name="layer")(x) + kept)


class Named(linen.Module):
    """A module that does nothing but name its parts: `parts` are (name, module) pairs, applied in turn."""

    parts: tuple

    @linen.compact
    def __call__(self, x):
        for name, (kind, *arguments) in self.parts:
            x = kind(*arguments, name=name)(x)
        return x


class Embedder(linen.Module):
    """Stem: a strided convolution and a maximum over windows of 3."""

    width: int

    @linen.compact
    def __call__(self, x):
        x = linen.relu(Convolution(self.width, 7, 2, name="embedder")(x))
        return linen.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])


class Head(linen.Module):
    """The mean over positions, and a linear map of it."""

    classes: int

    @linen.compact
    def __call__(self, x):
        return linen.Dense(self.classes, name="1")(jnp.mean(x, axis=(1, 2)))


class ResNet(linen.Module):
    """Logits of images [batch, height, width, channels]; one block per stage."""

    embedding: int
    widths: tuple[int, ...]
    classes: int

    @linen.compact
    def __call__(self, x):
        stages = tuple(
            (str(i), (Named, (("layers", (Named, (("0", (Block, width, 1 if i == 0 else 2)),))),)))
            for i, width in enumerate(self.widths)
        )
        encoder = ("encoder", (Named, (("stages", (Named, stages)),)))
        x = Named((("embedder", (Embedder, self.embedding)), encoder), name="resnet")(x)
        return Head(self.classes, name="classifier")(x)
