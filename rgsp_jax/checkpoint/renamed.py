"""A model under other names: what a key map between architectures makes of it."""

from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from rgsp_jax.checkpoint.safetensors_header import cap
from rgsp_jax.checkpoint.specs import Checkpoint, TensorSpec
from rgsp_jax.errors import RefusedError

Translate = Callable[[str], str | None]
"""A name on disk -> the name it goes by, None where the tensor is left out."""


class RenamedCheckpoint(Checkpoint):
    """A checkpoint whose tensors go by other names; everything else is the inner checkpoint's.

    Attributes:
        inner: the checkpoint under its own names; closed with this one.
        on_disk: name here -> name there.

    Raises:
        RefusedError: two tensors would get one name, or none is left.
    """

    format = "renamed"

    def __init__(self, inner: Checkpoint, translate: Translate):
        self.inner = inner
        given = {name: translate(name) for name in inner.specs}
        names: dict[str, list[str]] = {}
        for name, new in given.items():
            if new is not None:
                names.setdefault(new, []).append(name)
        problems = [
            f"key map: {' and '.join(map(repr, there))} of {inner.path} would both be {new!r}"
            for new, there in names.items()
            if there[1:]
        ]
        if not names:
            problems.append(f"key map: it leaves nothing of {inner.path}")
        if problems:
            raise RefusedError(cap(problems))
        self.on_disk = {new: name for new, (name,) in names.items()}
        aliases = {alias: (given[alias], given[owner]) for alias, owner in inner.aliases.items()}
        super().__init__(
            inner.path,
            {new: replace(inner.specs[name], name=new) for new, name in self.on_disk.items()},
            inner.weight_files,
            aliases={alias: owner for alias, owner in aliases.values() if alias is not None and owner is not None},
            companions=inner.companions,
            config=inner.config,
            metadata=inner.metadata,
            root=inner.root,
        )

    def _fill(self, spec: TensorSpec, out: np.ndarray, start: int) -> None:
        self.inner.read_into(self.on_disk[spec.name], out, start)

    def read_many(self, names: Collection[str]) -> dict[str, np.ndarray]:
        arrays = self.inner.read_many({self.on_disk[name] for name in names})
        return {name: arrays[self.on_disk[name]] for name in names}

    def read_block(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        return self.inner.read_block(self.on_disk[name], index)

    def shard_of(self, name: str) -> int:
        return self.inner.shard_of(self.on_disk[name])

    def close(self) -> None:
        self.inner.close()


def as_on_disk(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint under the names that its files have."""
    return checkpoint.inner if isinstance(checkpoint, RenamedCheckpoint) else checkpoint
