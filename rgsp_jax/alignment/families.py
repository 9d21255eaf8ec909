"""Which weights a layer's hidden units live in, as data: the permutation specs of known architectures.

Only what lies inside a layer is named here: hidden units of the MLP, attention heads. The residual stream between the
layers keeps its order. Every tensor of a layer is either a place of its units or known to see none of them, so that a
layer with anything else in it is refused and the function of a permuted model is the old one.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple


class Place(NamedTuple):
    """One axis of a tensor along which units lie in blocks of equal length, one block per unit."""

    name: str
    """After the layer's root."""
    axis: int
    parts: int = 1
    """Equal parts into which the axis is divided before the units: projections fused into one tensor."""
    of: Literal["unit", "group"] = "unit"
    """Whose blocks these are: every unit's own, or one that the units of a group share (keys and values)."""
    side: Literal["incoming", "outgoing"] = "incoming"
    """Whether the unit computes by it, or is read through it."""
    optional: bool = False


class Units(NamedTuple):
    """Interchangeable units of a layer."""

    name: str
    places: tuple[Place, ...]
    number: tuple[str, ...] = ()
    """Where config.json has how many there are, dotted; the first found. Empty: every entry of an axis is one."""
    groups: tuple[str, ...] = ()
    """The same of the groups that they form; where there is none, every unit is its own group."""
    across_layers: bool = False
    """True where one order holds for all layers of the stack, because they share a tensor."""


class Stack(NamedTuple):
    """Layers of one kind, one behind the other."""

    root: str
    """What the names of a layer's tensors begin with, behind any prefix; `{layer}` is its number."""
    units: tuple[Units, ...]
    untouched: tuple[str, ...]
    """Regular expressions of the names in a layer that no unit lies in."""


def linear(name: str, of: Literal["unit", "group"] = "unit") -> tuple[Place, Place]:
    """A PyTorch Linear whose outputs are the units."""
    return Place(f"{name}.weight", 0, of=of), Place(f"{name}.bias", 0, of=of, optional=True)


def reader(name: str) -> tuple[Place]:
    """A PyTorch Linear whose inputs are the units."""
    return (Place(f"{name}.weight", 1, side="outgoing"),)


HEADS, GROUPS = ("num_attention_heads",), ("num_key_value_heads",)


def bert_layers(root: str, attention: str, norms: str) -> Stack:
    """Layers with BERT's names."""
    heads = (
        *linear(f"{attention}.query"),
        *linear(f"{attention}.key"),
        *linear(f"{attention}.value"),
        *reader("attention.output.dense"),
    )
    mlp = (*linear("intermediate.dense"), *reader("output.dense"))
    relative = rf"{attention}\.distance_embedding\.weight"  # of what all heads have alike
    return Stack(
        root,
        (Units("heads", heads, HEADS), Units("mlp", mlp)),
        (norms, r"(attention\.)?output\.dense\.bias", relative),
    )


def clip_layers(root: str, part: str) -> Stack:
    """Layers of one of CLIP's towers, whose config is a part of the whole's or stands alone."""
    heads = (*linear("self_attn.q_proj"), *linear("self_attn.k_proj"), *linear("self_attn.v_proj"))
    mlp = (*linear("mlp.fc1"), *reader("mlp.fc2"))
    return Stack(
        root,
        (
            Units("heads", (*heads, *reader("self_attn.out_proj")), (f"{part}.num_attention_heads", *HEADS)),
            Units("mlp", mlp),
        ),
        (r"layer_norm[12]\.(weight|bias)", r"self_attn\.out_proj\.bias", r"mlp\.fc2\.bias"),
    )


def t5_layers(stack: str, feed_forward: int) -> Stack:
    """Blocks of T5's encoder or decoder: the first one's table of relative positions serves the heads of all."""
    units = [
        Units(
            "heads",
            (
                *(Place(f"layer.0.SelfAttention.{x}.weight", 0) for x in "qkv"),
                Place("layer.0.SelfAttention.relative_attention_bias.weight", 1, optional=True),
                *reader("layer.0.SelfAttention.o"),
            ),
            ("num_heads",),
            across_layers=True,
        )
    ]
    if feed_forward == 2:
        cross = (
            *(Place(f"layer.1.EncDecAttention.{x}.weight", 0) for x in "qkv"),
            *reader("layer.1.EncDecAttention.o"),
        )
        units.append(Units("cross heads", cross, ("num_heads",)))
    mlp = f"layer.{feed_forward}.DenseReluDense"
    up = (Place(f"{mlp}.{x}.weight", 0, optional=True) for x in ("wi", "wi_0", "wi_1"))
    units.append(Units("mlp", (*up, *reader(f"{mlp}.wo"))))
    unread = r"layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # left in old files, read by nothing
    return Stack(f"{stack}.block.{{layer}}.", tuple(units), (r"layer\.\d\.layer_norm\.weight", unread))


BERT = bert_layers(
    "encoder.layer.{layer}.", "attention.self", r"(attention\.)?output\.LayerNorm\.(weight|bias|gamma|beta)"
)
VIT = bert_layers("encoder.layer.{layer}.", "attention.attention", r"layernorm_(before|after)\.(weight|bias)")
DECODER = Stack(
    "layers.{layer}.",
    (
        Units(
            "heads",
            (
                *linear("self_attn.q_proj"),
                *linear("self_attn.k_proj", of="group"),
                *linear("self_attn.v_proj", of="group"),
                *reader("self_attn.o_proj"),
            ),
            HEADS,
            GROUPS,
        ),
        Units("mlp", (*linear("mlp.gate_proj"), *linear("mlp.up_proj"), *reader("mlp.down_proj"))),
    ),
    (
        r"(input|post_attention)_layernorm\.weight",
        r"self_attn\.[qk]_norm\.weight",  # as long as one head, for all alike
        r"self_attn\.o_proj\.bias",
        r"mlp\.down_proj\.bias",
        r"self_attn\.rotary_emb\.inv_freq",
    ),
)
GPT2 = Stack(
    "h.{layer}.",
    (
        Units(
            "heads",
            (
                Place("attn.c_attn.weight", 1, parts=3),  # queries, keys and values side by side, stored transposed
                Place("attn.c_attn.bias", 0, parts=3),
                Place("attn.c_proj.weight", 0, side="outgoing"),
            ),
            ("n_head", *HEADS),
        ),
        Units(
            "mlp",
            (
                Place("mlp.c_fc.weight", 1),
                Place("mlp.c_fc.bias", 0),
                Place("mlp.c_proj.weight", 0, side="outgoing"),
            ),
        ),
    ),
    (r"ln_[12]\.(weight|bias)", r"(attn|mlp)\.c_proj\.bias", r"attn\.(bias|masked_bias)"),
)
CLIP_TEXT = clip_layers("text_model.encoder.layers.{layer}.", "text_config")
CLIP_VISION = clip_layers("vision_model.encoder.layers.{layer}.", "vision_config")

FAMILIES: Mapping[str, tuple[Stack, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("bert", "roberta", "xlm-roberta"), (BERT,)),
        "vit": (VIT,),
        **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), (DECODER,)),
        "gpt2": (GPT2,),
        "t5": (t5_layers("encoder", 1), t5_layers("decoder", 2)),
        "clip": (CLIP_TEXT, CLIP_VISION),
        "clip_text_model": (CLIP_TEXT,),
        "clip_vision_model": (CLIP_VISION,),
    }
)
"""`model_type` of a config.json -> its stacks of layers."""
