"""What one checkpoint may not be: escaping paths, Git LFS pointers, quantised weights, unresolved adapters."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rgsp_jax.checkpoint.safetensors_header import LFS_POINTER, cap, load_json
from rgsp_jax.checkpoint.specs import TensorSpec
from rgsp_jax.errors import RefusedError

QUANTISED_NAME = re.compile(
    r"(^|[./])(qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state(\..*)?|SCB|weight_format"
    r"|weight_scales?(_inv|_2)?|weight_packed|weight_zero_point|weight_shape|\w+_scale_inv|weight\._(data|scale|shift))$"
)
PACKED_NAME = re.compile(r"(^|[./])(weight|W_q|(\w+_)?(blocks|scales|packed))$")
ADAPTER_NAME = re.compile(r"(^|[./])(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_w[12]_[ab])([./]|$)")
QUANTISATION_KEYS = ("quantization_config", "compression_config")
MAX_LFS_POINTER_BYTES = 1024


def resolve_inside(directory: Path, relative: str) -> Path:
    """The real path of a file that an index or a listing names, which must not leave the directory.

    The snapshots of the Hugging Face cache link from `snapshots/REVISION/` to `blobs/` beside it: that one way out
    is allowed.

    Raises:
        RefusedError: the name climbs out, is absolute, or links elsewhere.
    """
    check_relative(directory, relative)
    root = directory.resolve()
    try:
        real = (root / relative).resolve()
    except (OSError, RuntimeError):
        raise RefusedError(f"{directory / relative} is a symbolic link that leads nowhere") from None
    if real.is_relative_to(root) or _is_cache_blob(root, real):
        return real
    raise RefusedError(f"{directory / relative} is a symbolic link out of its directory; copy the file there")


def check_relative(directory: object, relative: str) -> None:
    """RefusedError where the name of a file climbs out of its directory or is absolute."""
    pure = PurePosixPath(relative)
    if not relative or pure.is_absolute() or ".." in pure.parts or "\\" in relative or "\0" in relative:
        raise RefusedError(f"{directory} names the file {relative!r}, which is not inside the directory")


def _is_cache_blob(root: Path, real: Path) -> bool:
    """True for `.../REPO/snapshots/REVISION[/...]` linking to a file directly in `.../REPO/blobs`."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return real.parent == folder.parent.parent / "blobs"
    return False


def is_lfs_pointer(path: Path) -> bool:
    """True if the file is a Git LFS pointer instead of what it stands for."""
    try:
        if path.stat().st_size > MAX_LFS_POINTER_BYTES:
            return False
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


def find_lfs_pointers(directory: Path, relative_paths: Iterable[Path]) -> list[str]:
    """One sentence per Git LFS pointer among the files."""
    return [
        f"{directory / path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository"
        for path in relative_paths
        if is_lfs_pointer(directory / path)
    ]


def read_config(directory: Path) -> dict[str, Any] | None:
    """The parsed config.json of a directory, None where there is none.

    Raises:
        RefusedError: it leads out of the directory, is a Git LFS pointer or not a JSON object.
    """
    if not (directory / "config.json").exists():
        return None
    path = resolve_inside(directory, "config.json")
    if is_lfs_pointer(path):
        raise RefusedError(find_lfs_pointers(directory, [Path("config.json")]))
    try:
        config = load_json(path.read_bytes(), unique=False)
    except (OSError, ValueError) as error:
        raise RefusedError(f"{directory / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise RefusedError(f"{directory / 'config.json'} is not a JSON object")
    return config


def find_quantisation(path: object, specs: Mapping[str, TensorSpec], config: Mapping[str, Any] | None) -> list[str]:
    """One sentence per sign of quantised weights: config keys, tensor names, integer matrices named weight."""
    problems = []
    sections = [("", config or {})]
    sections += [(f"{key}.", value) for key, value in (config or {}).items() if isinstance(value, dict)]
    for prefix, section in sections:
        for key in QUANTISATION_KEYS:
            if section.get(key):
                problems.append(
                    f"{path} is quantised: its config.json has {prefix}{key}; dequantise it to bfloat16 first, or "
                    "remove the key where the weights are not quantised"
                )
    packed = [
        f"{path} is quantised: tensor {name!r} holds quantised weights or their scales; dequantise it first"
        for name, spec in specs.items()
        if QUANTISED_NAME.search(name) or _is_packed(spec)
    ]
    return problems + cap(packed)


def _is_packed(spec: TensorSpec) -> bool:
    """Integer matrices under such names are packed low-bit values or their scales; no layer has its own as integers."""
    return spec.kind == "integer" and len(spec.shape) >= 2 and PACKED_NAME.search(spec.name) is not None


def find_adapters(path: object, specs: Mapping[str, TensorSpec]) -> list[str]:
    """One sentence if tensors are those of an unresolved LoRA (or LoHa) adapter."""
    names = [name for name in specs if ADAPTER_NAME.search(name)]
    if not names:
        return []
    return [
        f"{path} is an adapter, not a model ({names[0]!r} and {len(names) - 1} more): "
        "merge it into its base model first (peft's merge_and_unload)"
    ]
