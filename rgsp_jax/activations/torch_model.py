"""A Hugging Face model in memory for one purpose: its forward pass. Nothing of the checkpoint's own code is run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.checkpoint.huggingface import LOCAL, choose_architecture, quiet
from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.checkpoint.specs import BFLOAT16
from rgsp_jax.errors import RefusedError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(checkpoint: Checkpoint, config: Any, dtype: str) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model, ready to run, and its parameters that the checkpoint has not.

    Those are filled with NaN, so that every input that depends on them shows.

    Raises:
        RefusedError: the model cannot be built from its files.
    """
    if checkpoint.format == "lora":
        raise RefusedError(
            f"{checkpoint.path} is an adapter, which torch is not given here: write the whole model out first with "
            "rgsp convert BASE+ADAPTER DIRECTORY --to huggingface"
        )
    config.use_cache = False
    options: dict[str, Any] = {**LOCAL, "config": config, "dtype": DTYPES[dtype], "output_loading_info": True}
    if checkpoint.format == "torch":
        options["use_safetensors"] = False
    try:
        with quiet():
            loaded, info = choose_architecture(config).from_pretrained(checkpoint.path, **options)
            if hasattr(loaded, "set_experts_implementation"):
                loaded.set_experts_implementation("eager")  # one expert at a time: its inputs are seen alone
    except Exception as error:
        raise RefusedError(
            f"{checkpoint.path}: transformers cannot load the model ({describe_failure(error)})"
        ) from None
    if info["mismatched_keys"]:
        raise RefusedError(
            f"{checkpoint.path}: weights of other shapes than the config says: {info['mismatched_keys']}"
        )
    missing = tuple(sorted(info["missing_keys"]))
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name in missing:
            if name in parameters:
                parameters[name].fill_(torch.nan)
    model = loaded.eval().requires_grad_(False)
    return (model.cuda() if torch.cuda.is_available() else model), missing


def view_parameters(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Parameters of rank 2 and more, tied ones once: as they are, and as NumPy arrays."""
    tensors = {name: tensor.data for name, tensor in model.named_parameters() if tensor.ndim >= 2}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.is_contiguous()}
    arrays = {}
    for name, tensor in tensors.items():
        local = tensor.cpu()
        bits = local.view(torch.int16).numpy().view(BFLOAT16) if local.dtype == torch.bfloat16 else local.numpy()
        arrays[name] = bits
    return tensors, arrays


def load_tokenizer(directory: Path) -> Any:
    """The model's tokenizer, padding on the right; RefusedError where there is none."""
    fault = "it knows no words"
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory, **LOCAL)
    except Exception as error:
        tokenizer, fault = None, describe_failure(error)
    if tokenizer is None or is_empty(tokenizer, directory):
        raise RefusedError(
            f"{directory} has no tokenizer that transformers can load, and the data are texts: copy the tokenizer's "
            f"files there ({fault})"
        )
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def is_empty(tokenizer: Any, directory: Path) -> bool:
    """True where transformers made a tokenizer of nothing, as it does without a word where the files are missing."""
    needed = set(getattr(tokenizer, "vocab_files_names", {}).values())
    return bool(needed) and not any((directory / name).exists() for name in needed | {"tokenizer.json"})


def load_image_processor(directory: Path) -> Any:
    """The model's image processor, None where it has none."""
    if not (directory / "preprocessor_config.json").exists() and not (directory / "processor_config.json").exists():
        return None
    try:
        with quiet():
            return transformers.AutoImageProcessor.from_pretrained(directory, **LOCAL)
    except Exception as error:
        raise RefusedError(f"{directory}: its image processor cannot be loaded ({describe_failure(error)})") from None


def load_processor(directory: Path, model_type: str) -> Any:
    """The model's processor of texts with images, without its video part where torchvision is missing.

    Raises:
        RefusedError: there is none, or it cannot be loaded.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = find_processor_name(directory) or PROCESSOR_MAPPING_NAMES.get(model_type)
    found = getattr(transformers, name or "", None)
    if found is None:
        raise RefusedError(f"{directory} has no processor of texts with images that transformers knows ({name})")
    if not transformers.utils.is_torchvision_available():
        found = drop_video(found)
    try:
        with quiet():
            processor = found.from_pretrained(directory, **LOCAL)
    except Exception as error:
        raise RefusedError(f"{directory}: its {name} cannot be loaded ({describe_failure(error)})") from None
    processor.tokenizer.padding_side = "right"
    return processor


def find_processor_name(directory: Path) -> str | None:
    """The class that a model's files name."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        try:
            name = json.loads((directory / file).read_text()).get("processor_class")
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(name, str):
            return name
    return None


def drop_video(processor: Any) -> Any:
    """The same processor class without a video processor, which transformers cannot make without torchvision."""
    kept = [name for name in processor.get_attributes() if "video" not in name]
    return type(processor.__name__, (processor,), {"get_attributes": classmethod(lambda _: kept)})
