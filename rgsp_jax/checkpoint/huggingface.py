"""transformers as a source of facts about a checkpoint's model. Nothing of the checkpoint's own code is run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.checkpoint.specs import Checkpoint
from rgsp_jax.checkpoint.store import RemotePath
from rgsp_jax.errors import RefusedError

LOCAL: Mapping[str, Any] = MappingProxyType({"local_files_only": True, "trust_remote_code": False})
"""Options of every call to transformers."""


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and remarks of its own."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def require_directory(checkpoint: Checkpoint) -> Path:
    """The model's directory; RefusedError where no config.json says what its weights are."""
    if isinstance(checkpoint.path, RemotePath):
        raise RefusedError(
            f"{checkpoint.path} lies in a store, from which models are merged and compared, not run: fetch it"
        )
    if checkpoint.config is None:
        raise RefusedError(
            f"{checkpoint.path} has no config.json beside its weights that says what they are: give its whole directory"
        )
    return checkpoint.root


def load_config(checkpoint: Checkpoint) -> Any:
    """The model's config; RefusedError where transformers has no such family."""
    import transformers

    directory = require_directory(checkpoint)
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(directory, **LOCAL)
    except Exception as error:
        raise explain_unknown(checkpoint, "run", error) from None


def explain_unknown(checkpoint: Checkpoint, verb: str, error: Exception) -> RefusedError:
    """The refusal of a model that transformers does not have."""
    import transformers

    kind = (checkpoint.config or {}).get("model_type")
    return RefusedError(
        f"{checkpoint.path}: transformers {transformers.__version__} cannot {verb} a model of type {kind!r} (code that "
        f"lies in a checkpoint is never run): {describe_failure(error)}"
    )


def choose_architecture(config: Any) -> Any:
    """The first of a config's architectures that transformers has itself, otherwise AutoModel."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    return transformers.AutoModel
