"""Any Hugging Face model as a Runner: one forward pass per batch, inputs without the padding."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from rgsp_jax.activations.capture import Call, Capture, WeightIndex, iterate_patches
from rgsp_jax.activations.examples import Example
from rgsp_jax.activations.settings import CovarianceSettings, Prepared, Receive
from rgsp_jax.activations.sites import InputSite, find_mismatch, match_weights
from rgsp_jax.activations.torch_inputs import Batch, add_decoder_inputs, choose_encoder, narrow_batch, widen_batch
from rgsp_jax.activations.torch_model import load_model, view_parameters
from rgsp_jax.checkpoint import Checkpoint
from rgsp_jax.checkpoint.huggingface import load_config
from rgsp_jax.checkpoint.specs import DTYPES
from rgsp_jax.errors import RefusedError
from rgsp_jax.rules import EXPERT_NAMES

Layout = Literal["batch_time", "time_batch", "shared", "flat", "free", "irregular"]
"""Where an input's leading axes show its tokens: [batch, time], [time, batch], one row per position for all texts,
[batch * time], nowhere (no padding reaches it), or in a way that is not followed (batches then have no padding)."""

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class TorchRunner:
    """A model of transformers, capturing through the functions that it calls."""

    backend = "torch"

    def __init__(self, checkpoint: Checkpoint, examples: Sequence[Example], settings: CovarianceSettings):
        self._checkpoint = checkpoint
        self._config = load_config(checkpoint)
        self._model: Any
        self._model, missing = load_model(checkpoint, self._config, settings.dtype)
        self.encoder = choose_encoder(checkpoint, self._config, self._model, examples, settings)
        tensors, arrays = view_parameters(self._model)
        self._parameters = tensors
        self.weights = match_weights(checkpoint, arrays, DTYPES[DTYPE_NAMES[settings.dtype]])
        self._index = WeightIndex(tensors, self.weights.places)
        parameters = inspect.signature(self._model.forward).parameters
        self._accepted = set(parameters)
        self._open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._missing = missing
        self._options: dict[str, Any] = {}
        self._sites: dict[str, InputSite] = {}
        self._layouts: dict[str, Layout] = {}
        self.exact_lengths = False
        self.warnings: list[str] = []
        self.not_covered: dict[str, str] = {}
        if missing:
            self.warnings.append(
                f"{checkpoint.path} does not have {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: what "
                "depends on it is not covered"
            )

    def prepare(self, examples: Sequence[Example]) -> list[Prepared]:
        return self.encoder.prepare(examples)

    def token_table(self) -> str | None:
        """The checkpoint tensor that token ids are looked up in; None where there is none."""
        table = self._model.get_input_embeddings()
        found = self._index.find(getattr(table, "weight", None))
        return found[0] if len(found) == 1 else None

    def floating(self) -> dict[str, torch.Tensor]:
        """The model's parameters in memory by name, tied ones once."""
        return {name: tensor.data for name, tensor in self._model.named_parameters() if tensor.is_floating_point()}

    def write(self, weight: str, values: np.ndarray) -> None:
        """Put new values in the place of a checkpoint tensor."""
        place = self.weights.places[weight]
        flat = self._parameters[place.parameter].reshape(-1)[place.start : place.start + place.size]
        flat.copy_(torch.from_numpy(np.ascontiguousarray(values)).reshape(-1))

    def find_sites(self, batch: Sequence[Prepared]) -> list[InputSite]:
        inputs = self._encode(batch)
        mask = find_mask(inputs)
        if mask is not None and 1 < mask.shape[1] == getattr(self.encoder, "max_length", None):
            inputs = narrow_batch(inputs)  # one more column would have no position
            mask = find_mask(inputs)
        first = self._record(inputs)
        second = first if mask is None else self._record(widen_batch(inputs, self._pad_token()))
        calls = [call for call, _ in first]
        looked_up = {name for call in calls for name in call.weights if call.kind == "ids"}
        groups: dict[tuple[Any, ...], list[str]] = {}
        lead: dict[str, Call] = {}
        for name in dict.fromkeys(name for call in calls for name in call.weights):
            runs = [
                [(c, seen) for c, seen in run if name in c.weights and (c.kind == "ids") == (name in looked_up)]
                for run in (first, second)
            ]
            lead[name] = runs[0][0][0]
            if mask is not None:
                inputs_seen = [[c.input for c, _ in run] for run in runs]
                routed = EXPERT_NAMES.search(name) is not None  # whatever its shape looks like by chance
                self._layouts[name] = "irregular" if routed else find_layout(inputs_seen, lead[name].kind, mask.shape)
            key = tuple(tuple((seen, name if c.kind == "patches" else "") for c, seen in run) for run in runs)
            groups.setdefault(key, []).append(name)
        self.exact_lengths = "irregular" in self._layouts.values()
        for names in groups.values():
            self._add_site(tuple(names), lead[names[0]])
        self._drop_unknown(calls)
        self._limit_logits()
        return list(dict.fromkeys(self._sites.values()))

    def run(self, batch: Sequence[Prepared], receive: Receive) -> None:
        inputs = self._encode(batch)
        mask = find_mask(inputs)
        faults: list[str] = []

        def take(call: Call) -> None:
            site = self._site_of(call)
            if site is None or site.weights[0] not in call.weights or (call.kind == "ids") != (site.kind == "ids"):
                return
            for rows in self._select(call, site, mask):
                if site.kind == "rows" and not bool(torch.isfinite(rows).all()):
                    faults.append(site.name)
                    return
                receive(site, rows if site.kind == "rows" else rows.cpu().numpy())

        self._forward(inputs, take)
        if faults:
            later = f" (and of {len(faults) - 1} later ones)" if len(faults) > 1 else ""
            raise RefusedError(
                f"{self._checkpoint.path}: the inputs of {faults[0]}{later} are not finite on these data: the model "
                "overflows or its weights are damaged; compute in float32 or repair it"
            )

    def _encode(self, batch: Sequence[Prepared]) -> Batch:
        encoded = add_decoder_inputs(self.encoder.encode(batch), self._config)
        device, dtype = self._model.device, self._model.dtype
        moved = {name: tensor.to(device) for name, tensor in encoded.items()}
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in moved.items()}

    def _forward(self, inputs: Batch, receive: Any) -> None:
        accepted = {name: tensor for name, tensor in inputs.items() if self._open or name in self._accepted}
        with torch.no_grad(), Capture(self._index, receive):
            self._model(**accepted, **self._options)

    def _record(self, inputs: Batch) -> list[tuple[Call, tuple[Any, ...]]]:
        """Every call of a forward pass with its input's identity; the inputs stay alive with it."""
        calls: list[tuple[Call, tuple[Any, ...]]] = []
        self._forward(inputs, lambda call: calls.append((call, identify(call))))
        return calls

    def _pad_token(self) -> int:
        tokenizer = getattr(self.encoder, "tokenizer", None) or getattr(self.encoder, "processor", None)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        return getattr(tokenizer, "pad_token_id", None) or 0

    def _add_site(self, names: tuple[str, ...], call: Call) -> InputSite | None:
        kept = []
        for name in names:
            reason = None if call.kind == "ids" else find_mismatch(self._checkpoint, name, call.width)
            if reason is None:
                kept.append(name)
            else:
                self.not_covered[name] = reason
        if not kept:
            return None
        site = InputSite(
            kept[0].removesuffix(".weight"), tuple(kept), "ids" if call.kind == "ids" else "rows", call.width
        )
        self._sites |= dict.fromkeys(kept, site)
        return site

    def _site_of(self, call: Call) -> InputSite | None:
        """A call's site; experts that the first batch did not reach get theirs now."""
        for name in call.weights:
            if name in self._sites:
                return self._sites[name]
        if any(name in self.not_covered for name in call.weights):
            return None
        return self._add_site(call.weights, call)

    def _drop_unknown(self, calls: Sequence[Call]) -> None:
        """Leave out what depends on weights that the checkpoint does not have: they were set to NaN."""
        if not self._missing:
            return
        for call in calls:
            if call.kind != "ids" and not bool(torch.isfinite(call.input).all()):
                for name in call.weights:
                    self._sites.pop(name, None)
                    self.not_covered[name] = f"it depends on weights that are not there ({self._missing[0]} ...)"
        if not self._sites:
            raise RefusedError(
                f"{self._checkpoint.path} lacks weights that everything depends on: {', '.join(self._missing[:5])}"
            )

    def _limit_logits(self) -> None:
        """Where the head over the vocabulary is a tied table, one token's logits are enough to pay for."""
        head = self._model.get_output_embeddings() if hasattr(self._model, "get_output_embeddings") else None
        weight = getattr(head, "weight", None)
        if weight is None or "logits_to_keep" not in self._accepted:
            return
        sites = [self._sites[name] for name in self._index.find(weight) if name in self._sites]
        if all(site.kind == "ids" for site in sites):
            self._options["logits_to_keep"] = 1

    def _select(self, call: Call, site: InputSite, mask: torch.Tensor | None) -> Iterable[torch.Tensor]:
        """The inputs of one call that count: rows [r, width] in float32, copied, or row numbers."""
        if call.kind == "patches":
            return (rows.float() for rows in iterate_patches(call))
        x = kept = call.input
        layout = self._layouts.get(site.weights[0], "irregular")
        if mask is not None and not has_layout(x, layout, site.kind, mask):
            if not bool(mask.all()):
                raise RefusedError(
                    f"{self._checkpoint.path}: in the inputs of {site.name} padding cannot be told from tokens; run it "
                    "with --batch-size 1"
                )
            layout = "irregular"
        if mask is not None and layout == "shared":
            kept = x.reshape(1, -1).expand(mask.shape)[mask] if site.kind == "ids" else x.squeeze(0)[mask.any(0)]
        elif mask is not None and layout == "flat":
            kept = x[mask.reshape(-1)]
        elif mask is not None and layout in ("batch_time", "time_batch"):
            kept = x[mask if layout == "batch_time" else mask.T]
        return [kept.reshape(-1, site.width).to(torch.float32, copy=kept is x) if site.kind == "rows" else kept]


def find_mask(inputs: Batch) -> torch.Tensor | None:
    """True at tokens, [batch, time]; None where the inputs are no tokens."""
    mask = inputs.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 and "input_ids" in inputs else None


def identify(call: Call) -> tuple[Any, ...]:
    """What two calls have in common if and only if they see one input, while all inputs are kept alive."""
    x = call.input
    return (call.kind, call.width, x.data_ptr(), x.numel(), x.dtype, x._version)


def has_layout(x: torch.Tensor, layout: Layout, kind: str, mask: torch.Tensor) -> bool:
    """True where an input's shape fits its layout in a batch with this mask."""
    shape, (batch, time) = tuple(x.shape if kind == "ids" else x.shape[:-1]), mask.shape
    fits = {
        "batch_time": shape[:2] == (batch, time),
        "time_batch": shape[:2] == (time, batch),
        "shared": shape in ((1, time), (time,)),
        "flat": shape[:1] == (batch * time,),
        "free": True,
        "irregular": False,
    }
    return fits[layout]


def find_layout(runs: Sequence[Sequence[torch.Tensor]], kind: str, mask_shape: Sequence[int]) -> Layout:
    """How tokens show in an input's shape: told by two passes, the second with one more column of padding."""
    batch, time = mask_shape
    shapes = [[tuple(x.shape if kind == "ids" else x.shape[:-1]) for x in run] for run in runs]
    if len(shapes[0]) != len(shapes[1]):
        return "irregular"
    found: set[Layout] = {name_layout(a, b, batch, time, kind) for a, b in zip(*shapes, strict=True)}
    return found.pop() if len(found) == 1 else "irregular"


def name_layout(first: tuple[int, ...], second: tuple[int, ...], batch: int, time: int, kind: str) -> Layout:
    if kind == "patches":
        return "free" if first == second else "irregular"
    if first[:2] == (batch, time) and second[:2] == (batch, time + 1):
        return "batch_time"
    if first[:2] == (time, batch) and second[:2] == (time + 1, batch):
        return "time_batch"
    if (first, second) in (((1, time), (1, time + 1)), ((time,), (time + 1,))):
        return "shared"
    if first[:1] == (batch * time,) and second[:1] == (batch * (time + 1),):
        return "flat"
    return "free" if first == second else "irregular"
