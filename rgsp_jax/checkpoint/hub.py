"""Models named `hf://owner/name[@revision]`, fetched into the Hugging Face cache."""

import re
from pathlib import Path
from typing import Any

from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.errors import RefusedError

HUB_PREFIX = "hf://"
LOCATION = re.compile(r"^hf://([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w./-]+))?$")
COMPANIONS = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.vocab",
    "*.spm",
    "LICENSE*",
    "[0-9]_*/*",
]
SAFETENSORS = ["*.safetensors"]
TORCH = ["*.bin"]
NEVER = ["onnx/*", "openvino/*", "coreml/*", "checkpoint-*/*", "optimizer*", "*.onnx", "*.h5", "*.msgpack", "*.gguf"]


def download(location: str) -> Path:
    """The local directory of a hub model: safetensors where it has them, PyTorch files otherwise, and companions.

    Raises:
        RefusedError: huggingface_hub is not installed, the name is malformed, or the model cannot be had.
    """
    match = LOCATION.match(location)
    if match is None:
        raise RefusedError(f"{location} is no hub location; write hf://owner/name or hf://owner/name@revision")
    try:
        import huggingface_hub
    except ImportError:
        raise RefusedError(
            f"{location} needs huggingface_hub, which is not installed: pip install 'rgsp_jax[hub]'"
        ) from None
    directory = _fetch(huggingface_hub, location, match, SAFETENSORS)
    if not any(directory.glob("*.safetensors")):
        directory = _fetch(huggingface_hub, location, match, TORCH)
    return directory


def _fetch(hub: Any, location: str, match: re.Match[str], weights: list[str]) -> Path:
    repository, revision = match.groups()
    try:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=[*COMPANIONS, *weights], ignore_patterns=NEVER
            )
        )
    except Exception as error:
        raise RefusedError(
            f"{location} could not be fetched: check the name, the network and, for a gated model, your login "
            f"({describe_failure(error)})"
        ) from None
