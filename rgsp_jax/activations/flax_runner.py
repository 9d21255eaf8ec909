"""Our own Flax families as a Runner: the same model with a tap before every linear, convolution and table."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from rgsp_jax.activations.examples import Example
from rgsp_jax.activations.settings import CovarianceSettings, Prepared, Receive
from rgsp_jax.activations.sites import InputSite, find_mismatch, match_weights
from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.checkpoint.safetensors_header import describe_failure
from rgsp_jax.checkpoint.specs import DTYPES
from rgsp_jax.errors import RefusedError
from rgsp_jax.models import FAMILIES, Family, export_weights, load_weights, map_weights

LENGTH_STEP = 16
TEXTS, IMAGES = frozenset({"input_ids", "attention_mask", "token_type_ids"}), frozenset({"pixel_values"})
RUNNABLE = {name: family for name, family in FAMILIES.items() if family.inputs <= TEXTS or family.inputs == IMAGES}
"""The families that take texts alone or images alone, by model type."""


def find_family(checkpoint: Checkpoint) -> Family | None:
    """The Flax family of a checkpoint's model type, if there is one that takes texts alone or images alone."""
    return RUNNABLE.get((checkpoint.config or {}).get("model_type", ""))


class Tap(nnx.Module):
    """A layer that shows its input before it uses it."""

    def __init__(self, inner: nnx.Module, show: Callable[[Any], None]):
        self.inner = inner
        self.show = show

    def __call__(self, x: Any) -> Any:
        self.show(x)
        return self.inner(x)  # type: ignore[operator]

    def attend(self, x: Any) -> Any:
        """What a tied output head asks of an embedding; the tap shows what is looked up, not what is multiplied."""
        return self.inner.attend(x)  # type: ignore[attr-defined]


class FlaxRunner:
    """A model of `rgsp_jax.models`, capturing inside the trace."""

    backend = "flax"
    exact_lengths = False

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], settings: CovarianceSettings):
        family = find_family(checkpoint)
        if family is None:
            model_type = (checkpoint.config or {}).get("model_type")
            raise RefusedError(
                f"{checkpoint.path} is a model of type {model_type!r}; the Flax families here are "
                f"{', '.join(RUNNABLE)}: use --backend torch"
            )
        if settings.dtype != "float32":
            raise RefusedError("the Flax families compute in float32: leave --dtype out or use --backend torch")
        self._checkpoint = checkpoint
        self._settings = settings
        self._family = family
        self._reads_text = "input_ids" in family.inputs
        self._check_data(examples)
        weights = {name: checkpoint.read(name) for name in checkpoint.specs if name not in checkpoint.aliases}
        model = load_weights(family.build(checkpoint.config or {}, {n: w.shape for n, w in weights.items()}), weights)
        self.weights = match_weights(checkpoint, export_weights(model), DTYPES["F32"])
        by_place = {place.parameter: name for name, place in self.weights.places.items()}
        self._names = {
            tuple(map(str, place.path[:-1])): by_place[key]
            for key, place in map_weights(model).items()
            if key in by_place
        }
        self._graph, self._state = nnx.split(model)
        self._model_type = type(model)
        self._run = jax.jit(self._trace)
        self._sites: dict[str, InputSite] = {}  # by the name under which the trace returns its input
        self.warnings: list[str] = []
        self.not_covered: dict[str, str] = {}
        self._tokenize = load_fast_tokenizer(checkpoint.root) if self._reads_text else None

    def _check_data(self, examples: Sequence[Example]) -> None:
        with_text, with_image = examples[0].text is not None, examples[0].image is not None
        if self._reads_text and (with_image or not with_text):
            raise RefusedError(f"{self._checkpoint.path} takes texts alone, and the data hold images")
        if not self._reads_text and (with_text or not with_image):
            raise RefusedError(f"{self._checkpoint.path} takes images alone, and the data hold texts")

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        if self._tokenize is None:
            return [Prepared(prepare_image(self._checkpoint, example.image), None) for example in examples]
        limit = min(self._settings.max_length, self._family.max_tokens(self._checkpoint.config or {}))
        self._tokenize.enable_truncation(limit)
        texts = [e.text if e.pair is None else (e.text, e.pair) for e in examples]
        encoded = self._tokenize.encode_batch(texts)
        return [Prepared((item.ids, item.type_ids), len(item.ids)) for item in encoded if item.ids]

    def find_sites(self, batch: Sequence[Prepared]) -> list[InputSite]:
        arguments = self._stack(batch)
        shapes: list[tuple[tuple[str, ...], Any, int]] = []
        jax.eval_shape(lambda *a: self._trace(*a, record=shapes), *arguments)
        for weights, kind, width in shapes:
            kept = []
            for name in weights:
                reason = find_mismatch(self._checkpoint, name, width) if kind == "rows" else None
                if reason is None:
                    kept.append(name)
                else:
                    self.not_covered[name] = reason
            if kept:
                self._sites[weights[0]] = InputSite(kept[0].removesuffix(".weight"), tuple(kept), kind, width)
        return list(self._sites.values())

    def run(self, batch: Sequence[Prepared], receive: Receive) -> None:
        arguments = self._stack(batch)
        taps = self._run(*arguments)
        mask = np.asarray(arguments[-1])
        faults = []
        for name, site in self._sites.items():
            kept = select(np.asarray(taps[name]), site, mask)
            if site.kind == "rows" and not np.isfinite(kept).all():
                faults.append(site.name)
                continue
            receive(site, kept)
        if faults:
            later = f" (and of {len(faults) - 1} later ones)" if len(faults) > 1 else ""
            raise RefusedError(
                f"{self._checkpoint.path}: the inputs of {faults[0]}{later} are not finite on these data: its weights "
                "are damaged; repair it"
            )

    def _stack(self, batch: Sequence[Prepared]) -> tuple[np.ndarray, ...]:
        """Model arguments of a fixed number of examples, and the mask [batch, time] ([batch, 1] for images)."""
        size = max(self._settings.batch_size, len(batch))
        if self._tokenize is None:
            images = np.zeros((size, *batch[0].payload.shape), np.float32)
            images[: len(batch)] = np.stack([item.payload for item in batch])
            return images, np.arange(size)[:, None] < len(batch)
        limit = self._family.max_tokens(self._checkpoint.config or {})
        longest = max(len(item.payload[0]) for item in batch)
        time = min(limit, -(-longest // LENGTH_STEP) * LENGTH_STEP)
        ids, types = np.zeros((2, size, time), np.int32)
        mask = np.zeros((size, time), bool)
        for row, item in enumerate(batch):
            length = len(item.payload[0])
            ids[row, :length], types[row, :length] = item.payload[0], item.payload[1]
            mask[row, :length] = True
        return ids, types, mask

    def _trace(self, *arguments: Any, record: list[Any] | None = None) -> dict[str, Any]:
        """One forward pass: leading weight of a site -> its input. Layers that are given one array share a site."""
        model = nnx.merge(self._graph, self._state)
        seen: dict[tuple[int, str], tuple[Any, list[str], int]] = {}

        def tap(name: str, kind: str, width: int, unfold: Callable[[Any], Any] | None) -> Callable[[Any], None]:
            def show(x: Any) -> None:
                key = (id(x), f"{kind} {name}" if kind == "ids" or unfold else kind)
                seen.setdefault(key, (x if unfold is None else unfold(x), [], width))[1].append(name)

            return show

        for path, layer in list(nnx.iter_graph(model)):
            name = self._names.get(tuple(map(str, path)))
            described = describe_layer(layer)
            if name is not None and described is not None:
                put(model, path, Tap(layer, tap(name, *described)))
        names = ("input_ids", "token_type_ids", "attention_mask") if self._reads_text else ("pixel_values",)
        batch = dict(zip(names, arguments, strict=False))  # the mask of examples that images bring is not the model's
        self._family.run(model, {name: x for name, x in batch.items() if name in self._family.inputs})
        if record is not None:
            record += [
                (tuple(names), "ids" if key[1].startswith("ids") else "rows", width)
                for key, (_, names, width) in seen.items()
            ]
        return {names[0]: x for x, names, _ in seen.values()}


def describe_layer(layer: Any) -> tuple[str, int, Callable[[Any], Any] | None] | None:
    """Kind and width of a layer's inputs, and how a convolution's are unfolded; None for layers without a matrix."""
    if isinstance(layer, nnx.Linear):
        return "rows", layer.in_features, None
    if isinstance(layer, nnx.Embed):
        return "ids", layer.num_embeddings, None
    if isinstance(layer, nnx.Conv) and layer.feature_group_count == 1:
        window = layer.kernel.shape[:-2]
        return "rows", layer.in_features * int(np.prod(window)), lambda x: unfold(x, layer, window)
    return None


def unfold(x: Any, layer: nnx.Conv, window: tuple[int, ...]) -> Any:
    """What a convolution multiplies: [batch, *positions, in] -> [batch, *places, in * window], [in, *window] flat."""
    given: Any = layer.strides
    strides = (given or 1,) * len(window) if given is None or isinstance(given, int) else tuple(given)
    axes = "xyz"[: len(window)]
    padding: Any = layer.padding
    return jax.lax.conv_general_dilated_patches(
        x,
        window,
        strides,
        padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        precision=jax.lax.Precision.HIGHEST,
    )


def put(model: nnx.Module, path: tuple[Any, ...], layer: nnx.Module) -> None:
    """Replace the layer at a path."""
    parent: Any = model
    for part in path[:-1]:
        parent = parent[part] if isinstance(part, int) else getattr(parent, part)
    if isinstance(path[-1], int):
        parent[path[-1]] = layer
    else:
        setattr(parent, path[-1], layer)


def select(x: np.ndarray, site: InputSite, mask: np.ndarray) -> np.ndarray:
    """The inputs that count: without padding, and without the examples that fill up the batch."""
    if site.kind == "ids":
        per_token = x.shape[-1] == mask.shape[1]  # else the same rows for every example: the places of an image
        return np.broadcast_to(x, mask.shape)[mask] if per_token else x.reshape(-1)
    if x.shape[:2] == mask.shape and x.ndim == 3:
        return x[mask]
    return x[mask.any(1)].reshape(-1, site.width)


def prepare_image(checkpoint: Checkpoint, image: Any) -> np.ndarray:
    """[height, width, channels] floats, of pixel values as Hugging Face models take them."""
    if not isinstance(image, np.ndarray) or image.dtype == np.uint8:
        raise RefusedError(
            f"{checkpoint.path}: the Flax families take an .npz with pixel_values as floats [examples, channels, "
            "height, width]; `rgsp covariances --backend torch` prepares other images"
        )
    config = checkpoint.config or {}
    size, channels = config.get("image_size", 224), config.get("num_channels", 3)
    if image.shape != (channels, size, size):
        raise RefusedError(
            f"{checkpoint.path} takes pixel_values {[channels, size, size]}, the data are {list(image.shape)}"
        )
    return image.transpose(1, 2, 0)


def load_fast_tokenizer(directory: Path) -> Any:
    """The tokenizer of tokenizer.json, padding and truncation off; RefusedError where there is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RefusedError(
            "texts are tokenised by tokenizers, which is not installed: pip install tokenizers"
        ) from None
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise RefusedError(f"{directory} has no tokenizer.json, and the data are texts: copy it there")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:
        raise RefusedError(f"{file} cannot be read ({describe_failure(error)})") from None
    tokenizer.no_padding()
    return tokenizer
