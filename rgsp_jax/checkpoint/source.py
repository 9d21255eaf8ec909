"""Opening a model wherever it lies: directory, lone file, Orbax checkpoint or hub; every refusal in one place."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint.companions import find_companions
from rgsp_jax.checkpoint.guards import (
    find_adapters,
    find_lfs_pointers,
    find_quantisation,
    read_config,
    resolve_inside,
)
from rgsp_jax.checkpoint.hub import HUB_PREFIX, download
from rgsp_jax.checkpoint.lora import WEIGHTS as ADAPTER_WEIGHTS
from rgsp_jax.checkpoint.lora import LoraCheckpoint, find_base, is_adapter, read_adapter_config
from rgsp_jax.checkpoint.orbax_source import OrbaxCheckpoint, is_orbax
from rgsp_jax.checkpoint.remote_source import open_remote
from rgsp_jax.checkpoint.safetensors_header import read_header
from rgsp_jax.checkpoint.safetensors_source import SafetensorsCheckpoint, open_sharded
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.checkpoint.store import RemotePath, is_remote
from rgsp_jax.checkpoint.ties import find_ties
from rgsp_jax.checkpoint.torch_source import TorchCheckpoint, open_torch_shards
from rgsp_jax.errors import RefusedError

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
SHARD_NAME = re.compile(r"-\d{5}-of-(\d{5})\.")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "adapter_", "scaler")


def open_checkpoint(location: str | Path | RemotePath) -> Checkpoint:
    """Open a model by its headers; elements are read only to see whether embeddings stored twice are tied.

    Args:
        location: a Hugging Face directory (safetensors, sharded or not, preferred to PyTorch files), a lone
            `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file, an Orbax directory, `hf://owner/name[@revision]`, or
            a LoRA adapter: its directory where its config names a base that lies here, else `BASE+ADAPTER`. In a store
            (`gs://bucket/model`, `s3://...`): a directory of safetensors, or one such file, read by byte ranges.

    Raises:
        RefusedError: no such model, or one that cannot be merged as it is; every reason is named.
    """
    if str(location).startswith(HUB_PREFIX):
        location = download(str(location))
    if isinstance(location, RemotePath) or is_remote(location):
        return _open_remote(location)
    path = Path(location).expanduser()
    if not path.exists():
        base, plus, adapter = str(location).rpartition("+")
        if plus and is_adapter(Path(adapter).expanduser()):
            return _open_adapter(Path(adapter).expanduser().resolve(), base)
        raise RefusedError(_describe_missing(path))
    if path.is_dir() and is_adapter(path) and not _has_model(path):
        path = path.resolve()
        return _open_adapter(path, find_base(path, read_adapter_config(path)))
    if path.is_file():
        checkpoint = _open_file(path)
    elif path.is_dir():
        checkpoint = _open_directory(path.resolve())
    else:
        raise RefusedError(f"{path} is neither a file nor a directory")
    return _accept(checkpoint)


def _accept(checkpoint: Checkpoint) -> Checkpoint:
    """The opened model with its ties; RefusedError where what it holds cannot be merged as it is."""
    path = checkpoint.path
    problems = find_adapters(path, checkpoint.specs) or find_quantisation(path, checkpoint.specs, checkpoint.config)
    if not checkpoint.specs:
        problems.append(f"{path} holds no tensor")
    problems += find_lfs_pointers(checkpoint.root, checkpoint.companions)
    if problems:
        checkpoint.close()
        raise RefusedError(problems)
    checkpoint.add_aliases(find_ties(checkpoint))
    return checkpoint


def _open_remote(location: str | Path | RemotePath) -> Checkpoint:
    """A model in a store, or what a local adapter makes of one."""
    if isinstance(location, RemotePath):
        return _accept(open_remote(location, _pick_remote))
    base, plus, adapter = str(location).rpartition("+")
    if plus and is_adapter(Path(adapter).expanduser()):
        return _open_adapter(Path(adapter).expanduser().resolve(), base)
    return _accept(open_remote(str(location), _pick_remote))


def _pick_remote(directory: RemotePath, names: list[str]) -> str:
    """The weights or the index to open in a store; RefusedError with what is there instead."""
    weights = sorted(name for name in names if not name.startswith((".", *NOT_WEIGHTS)))
    indices = [name for name in weights if name.endswith(".safetensors.index.json")]
    chosen = pick_weights(directory, weights, (".safetensors",), "model.safetensors", indices)
    if chosen is not None:
        return chosen
    others = [name for name in names if name.endswith((*TORCH_SUFFIXES, "_METADATA", "adapter_config.json"))]
    hint = f" (but {', '.join(others[:5])})" if others else ""
    raise RefusedError(
        f"{directory} holds no model as safetensors{hint}, and nothing else is read from stores: fetch it first"
    )


def _has_model(directory: Path) -> bool:
    """Whether weights of a whole model lie in a directory, beside those of an adapter."""
    names = (entry.name for entry in directory.iterdir())
    return any(name.endswith((".safetensors", *TORCH_SUFFIXES)) and not name.startswith(NOT_WEIGHTS) for name in names)


def _open_adapter(adapter: Path, base: str | Path) -> Checkpoint:
    """The model that an adapter makes of its base."""
    opened = open_checkpoint(base)
    try:
        return LoraCheckpoint(adapter, opened)
    except BaseException:
        opened.close()
        raise


def _describe_missing(path: Path) -> str:
    if path.is_symlink():
        return f"{path} is a symbolic link that leads nowhere"
    parent = path.parent
    if not parent.is_dir():
        return f"{path} does not exist (nor does {parent})"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    hint = f"; did you mean {parent / close[0]}?" if close else ""
    return f"{path} does not exist{hint}"


def _open_file(path: Path) -> Checkpoint:
    """A lone state dict: no config, no companions."""
    real = path.resolve()
    if path.suffix == ".safetensors":
        header = read_header(real)
        return SafetensorsCheckpoint(path.absolute(), [header], metadata=header.metadata)
    if path.suffix in TORCH_SUFFIXES:
        return TorchCheckpoint(path.absolute(), (real,))
    if path.name.endswith(".index.json"):
        raise RefusedError(f"{path} is an index: give its directory {path.parent}")
    known = ", ".join((".safetensors", *TORCH_SUFFIXES))
    raise RefusedError(f"{path} is no weight file by its name; known are {known}, Hugging Face and Orbax directories")


def _open_directory(directory: Path) -> Checkpoint:
    if is_orbax(directory):
        return OrbaxCheckpoint(directory, find_companions(directory), config=read_config(directory))
    problems: list[str] = []
    config: dict[str, Any] | None = None
    try:
        config = read_config(directory)
    except RefusedError as error:
        problems += error.problems
    companions: tuple[Path, ...] = ()
    try:
        companions = find_companions(directory)
    except RefusedError as error:
        problems += error.problems
    checkpoint: Checkpoint | None = None
    try:
        checkpoint = _open_weights(directory, {"companions": companions, "config": config})
    except RefusedError as error:
        problems += error.problems
        problems += find_quantisation(directory, {}, config)
    if problems or checkpoint is None:
        raise RefusedError(problems)
    return checkpoint


def _open_weights(directory: Path, beside: Mapping[str, Any]) -> Checkpoint:
    names = sorted(entry.name for entry in directory.iterdir() if not entry.is_dir())
    weights = [name for name in names if not name.startswith((".", *NOT_WEIGHTS))]
    indices = [name for name in weights if name.endswith(".safetensors.index.json")]
    single = pick_weights(directory, weights, (".safetensors",), "model.safetensors", indices)
    if single is not None and single in indices:
        headers, metadata = open_sharded(directory, directory / single)
        return SafetensorsCheckpoint(directory, headers, metadata=metadata, **beside)
    if single is not None:
        header = read_header(resolve_inside(directory, single))
        return SafetensorsCheckpoint(directory, [header], metadata=header.metadata, **beside)
    indices = [name for name in weights if name.endswith(".bin.index.json")]
    single = pick_weights(directory, weights, TORCH_SUFFIXES, "pytorch_model.bin", indices)
    if single is not None and single in indices:
        return open_torch_shards(directory, directory / single, **beside)
    if single is not None:
        return TorchCheckpoint(directory, (resolve_inside(directory, single),), **beside)
    raise RefusedError(_describe_no_weights(directory, names))


def pick_weights(
    directory: Path | RemotePath, names: list[str], suffixes: tuple[str, ...], standard: str, indices: list[str]
) -> str | None:
    """The weight file or index to open among a directory's files; None where there is none of this format.

    In the order of transformers: the standard name, its index, then any only index, then any only file.
    """
    files = [name for name in names if name.endswith(suffixes)]
    for choice in (standard, f"{standard}.index.json"):
        if choice in names:
            return choice
    if len(indices) == 1:
        return indices[0]
    if len(files) == 1 and not indices:
        if (shard := SHARD_NAME.search(files[0])) and int(shard[1]) > 1:
            raise RefusedError(
                f"{directory} has one shard of {int(shard[1])} ({files[0]}) and no index: it is not all there"
            )
        return files[0]
    if not files and not indices:
        return None
    candidates = ", ".join((indices or files)[:10])
    hint = "give the one file meant" if len(indices) < 2 else "keep the one index meant"
    raise RefusedError(f"{directory} has no {standard} and several other candidates ({candidates}): {hint}")


def _describe_no_weights(directory: Path, names: list[str]) -> str:
    if "adapter_config.json" in names:
        return (
            f"{directory} is a LoRA adapter without its weights: it has adapter_config.json but neither "
            f"{' nor '.join(ADAPTER_WEIGHTS)}"
        )
    inner = [
        entry.name
        for entry in sorted(directory.iterdir())
        if entry.is_dir() and (is_orbax(entry) or any(entry.glob("*.safetensors")) or any(entry.glob("*.bin")))
    ]
    hint = f"; its folder(s) {', '.join(inner[:10])} hold weights: give one of those" if inner else ""
    other = [name for name in names if name.endswith((".h5", ".msgpack", ".gguf", ".onnx"))]
    hint += f"; {', '.join(other)} is of a format not read here: save the model as safetensors" if other else ""
    return f"{directory} holds no weights (*.safetensors, *.bin, *.pt, *.pth, *.ckpt or an Orbax checkpoint){hint}"
