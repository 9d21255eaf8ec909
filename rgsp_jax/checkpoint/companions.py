"""What belongs to a model besides its weights: found, copied, and its dtype rewritten."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint.guards import resolve_inside
from rgsp_jax.checkpoint.safetensors_header import cap, load_json
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.errors import RefusedError

WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"}
    | {".npz", ".npy", ".tflite", ".mlmodel", ".pkl", ".pickle", ".joblib", ".ot", ".pb", ".engine", ".mar"}
    | {".distcp", ".part", ".incomplete", ".lock", ".tmp", ".writing"}
)
SKIPPED_NAMES = re.compile(
    r"(?i)^(readme(\..*)?|model_?card(\..*)?|.*\.index\.json|trainer_state\.json|training_args\..*|optimizer.*|scheduler\.pt"
    r"|rng_state.*|zero_to_fp32\.py|latest|all_results\.json|train_results\.json|eval_results\.json|adapter_.*"
    r"|events\.out\.tfevents.*|mergekit_config\.ya?ml)$"
)
SKIPPED_FOLDERS = re.compile(
    r"(?i)^(checkpoint-\d+|global_step\d+|runs|logs|wandb|onnx|openvino|coreml|__pycache__|figures|assets|images)$"
)
OWN_FILES = frozenset(
    {"report.jsonl", "report.html", "merge_config.yaml", "merge_summary.json", "merge_processes.json", "alignment.json"}
)
"""Names under which merges and alignments report on themselves; never copied from a parent that is one."""
MAX_DEPTH = 4

FLOAT_NAMES = ("float32", "float16", "bfloat16", "float64")
DTYPE_NAMES = frozenset({*FLOAT_NAMES, *(f"torch.{name}" for name in FLOAT_NAMES)})
DTYPE_KEYS = ("torch_dtype", "dtype")


def find_companions(directory: Path) -> tuple[Path, ...]:
    """Relative paths, sorted, of every file that a copy of the model needs besides its weights.

    Left out: weights of every format (those of sentence-transformers modules such as `2_Dense` excepted) and folders
    that hold such weights (other models, training checkpoints), indices, optimiser and training state, logs, the model
    card, hidden files, our own reports.

    Raises:
        RefusedError: a file links out of the directory.
    """
    module_folders = find_module_folders(directory)
    found: list[Path] = []
    problems: list[str] = []
    walk = ((Path(folder).relative_to(directory), below, names) for folder, below, names in os.walk(directory))
    for path in walk_companions(walk, module_folders):
        try:
            if resolve_inside(directory, path.as_posix()).is_file():
                found.append(path)
            elif not (directory / path).exists():
                problems.append(f"{directory / path} is a symbolic link that leads nowhere")
        except RefusedError as error:
            problems += error.problems
    if problems:
        raise RefusedError(cap(problems))
    return tuple(sorted(found))


def walk_companions(
    walk: Iterable[tuple[Path, list[str], list[str]]], module_folders: Collection[str]
) -> Iterator[Path]:
    """Relative paths of companions among the (folder, subfolders, names) that a walk from the top comes by.

    The walk goes into those subfolders that are left in its list.
    """
    for relative, subfolders, names in walk:
        in_module = relative.as_posix() in module_folders
        if relative.parts and not in_module and any(Path(name).suffix.lower() in WEIGHT_SUFFIXES for name in names):
            subfolders.clear()
            continue
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and not SKIPPED_FOLDERS.match(name) and len(relative.parts) < MAX_DEPTH
        )
        yield from (relative / name for name in sorted(names) if is_companion(relative / name, in_module))


def is_companion(path: Path, in_module: bool) -> bool:
    """Whether a file of this relative path is to be copied with the model."""
    if path.name.startswith(".") or SKIPPED_NAMES.match(path.name) or path.as_posix() in OWN_FILES:
        return False
    return in_module or path.suffix.lower() not in WEIGHT_SUFFIXES


def find_module_folders(directory: Path) -> frozenset[str]:
    """Folders of the sentence-transformers modules after the transformer itself (pooling, dense, normalise)."""
    path = directory / "modules.json"
    if not path.is_file():
        return frozenset()
    try:
        modules = load_json(resolve_inside(directory, "modules.json").read_bytes(), unique=False)
    except (OSError, ValueError) as error:
        if isinstance(error, RefusedError):
            raise
        raise RefusedError(f"{path} cannot be read: {error}") from None
    if not isinstance(modules, list):
        raise RefusedError(f"{path} is not a list of modules")
    folders = (module.get("path") for module in modules if isinstance(module, dict))
    return frozenset(folder for folder in folders if isinstance(folder, str) and folder not in ("", "."))


def find_module_weights(directory: Path, companions: tuple[Path, ...]) -> tuple[Path, ...]:
    """Those companions that are weights of sentence-transformers modules: copied whole, never merged."""
    return tuple(path for path in companions if path.suffix.lower() in WEIGHT_SUFFIXES)


def copy_companions(checkpoint: Checkpoint, directory: Path, *, dtype: str | None = None) -> list[Path]:
    """Copy the checkpoint's companions into `directory`; with `dtype`, say so in every `config.json` among them.

    Args:
        checkpoint: where to copy from.
        directory: existing directory to copy into; files of these names are replaced.
        dtype: `float32`, `bfloat16`, `float16` or `float64`, the dtype of the weights beside; None copies as is.

    Returns:
        The relative paths written, sorted.

    Raises:
        RefusedError: a file vanished, or now links out of the model's directory.
    """
    for relative in checkpoint.companions:
        source = resolve_inside(checkpoint.root, relative.as_posix())
        target = directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.writing")
        try:
            if dtype is not None and relative == Path("config.json"):
                temporary.write_text(rewrite_dtype(source, dtype), encoding="utf-8")
            else:
                shutil.copyfile(source, temporary)
        except FileNotFoundError:
            raise RefusedError(f"{source} vanished while the model was being read") from None
        os.replace(temporary, target)
    return list(checkpoint.companions)


def rewrite_dtype(path: Path, dtype: str) -> str:
    """The text of a config.json whose dtype keys, at any depth, say `dtype`; one is added if the top has none."""
    config = load_json(path.read_bytes(), unique=False)
    if not isinstance(config, dict):
        raise RefusedError(f"{path} is not a JSON object")
    _replace_dtype(config, dtype)
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = dtype
    for key in DTYPE_KEYS:
        if key in config:
            config[key] = dtype
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _replace_dtype(section: Any, dtype: str) -> None:
    if isinstance(section, list):
        for item in section:
            _replace_dtype(item, dtype)
    if isinstance(section, dict):
        for key, value in section.items():
            if key in DTYPE_KEYS and isinstance(value, str) and value in DTYPE_NAMES:
                section[key] = dtype
            else:
                _replace_dtype(value, dtype)
