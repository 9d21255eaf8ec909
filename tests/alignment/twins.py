"""Tiny models of transformers and their twins with shuffled heads and MLP units, written out family by family."""

import numpy as np
import torch
import transformers

from rgsp_jax.checkpoint import open_checkpoint, write_safetensors

HIDDEN, MLP, HEADS, GROUPS, LAYERS, WORDS = 16, 20, 4, 2, 2, 37
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
}
TEXT = {**SIZES, "vocab_size": WORDS, "max_position_embeddings": 24}
BERT_PLACES = [
    *(
        (f"encoder.layer.{{}}.attention.self.{x}.{y}", 0, "heads")
        for x in ("query", "key", "value")
        for y in ("weight", "bias")
    ),
    ("encoder.layer.{}.attention.output.dense.weight", 1, "heads"),
    ("encoder.layer.{}.intermediate.dense.weight", 0, "mlp"),
    ("encoder.layer.{}.intermediate.dense.bias", 0, "mlp"),
    ("encoder.layer.{}.output.dense.weight", 1, "mlp"),
]
DECODER_PLACES = [
    *((f"layers.{{}}.self_attn.q_proj.{y}", 0, "heads") for y in ("weight", "bias")),
    *((f"layers.{{}}.self_attn.{x}_proj.{y}", 0, "groups") for x in "kv" for y in ("weight", "bias")),
    ("layers.{}.self_attn.o_proj.weight", 1, "heads"),
    ("layers.{}.mlp.gate_proj.weight", 0, "mlp"),
    ("layers.{}.mlp.up_proj.weight", 0, "mlp"),
    ("layers.{}.mlp.down_proj.weight", 1, "mlp"),
]
GPT2_PLACES = [
    ("h.{}.attn.c_attn.weight", 1, "three heads"),
    ("h.{}.attn.c_attn.bias", 0, "three heads"),
    ("h.{}.attn.c_proj.weight", 0, "heads"),
    ("h.{}.mlp.c_fc.weight", 1, "mlp"),
    ("h.{}.mlp.c_fc.bias", 0, "mlp"),
    ("h.{}.mlp.c_proj.weight", 0, "mlp"),
]
T5_PLACES = [
    place
    for stack, feed_forward in (("encoder", 1), ("decoder", 2))
    for place in [
        *((f"{stack}.block.{{}}.layer.0.SelfAttention.{x}.weight", 0, f"{stack} heads") for x in "qkv"),
        (f"{stack}.block.{{}}.layer.0.SelfAttention.o.weight", 1, f"{stack} heads"),
        (f"{stack}.block.{{}}.layer.0.SelfAttention.relative_attention_bias.weight", 1, f"{stack} heads"),
        *(
            (f"{stack}.block.{{}}.layer.{feed_forward}.DenseReluDense.{x}.weight", 0, f"{stack} mlp")
            for x in ("wi", "wi_0", "wi_1")
        ),
        (f"{stack}.block.{{}}.layer.{feed_forward}.DenseReluDense.wo.weight", 1, f"{stack} mlp"),
    ]
] + [
    *((f"decoder.block.{{}}.layer.1.EncDecAttention.{x}.weight", 0, "cross heads") for x in "qkv"),
    ("decoder.block.{}.layer.1.EncDecAttention.o.weight", 1, "cross heads"),
]
CLIP_PLACES = [
    place
    for tower in ("text", "vision")
    for place in [
        *(
            (f"{tower}_model.encoder.layers.{{}}.self_attn.{x}_proj.{y}", 0, f"{tower} heads")
            for x in "qkv"
            for y in ("weight", "bias")
        ),
        (f"{tower}_model.encoder.layers.{{}}.self_attn.out_proj.weight", 1, f"{tower} heads"),
        *((f"{tower}_model.encoder.layers.{{}}.mlp.fc1.{y}", 0, f"{tower} mlp") for y in ("weight", "bias")),
        (f"{tower}_model.encoder.layers.{{}}.mlp.fc2.weight", 1, f"{tower} mlp"),
    ]
]


def decoder(name, **more):
    config = getattr(transformers, f"{name}Config")(**TEXT, num_key_value_heads=GROUPS, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config), DECODER_PLACES


def t5(activation):
    config = transformers.T5Config(
        vocab_size=WORDS,
        d_model=HIDDEN,
        d_kv=5,
        d_ff=MLP,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj=activation,
    )
    return transformers.T5ForConditionalGeneration(config), T5_PLACES


def clip():
    text, vision = (
        {**TEXT, "eos_token_id": WORDS - 1},
        {**SIZES, "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    )
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)), CLIP_PLACES


BUILD = {
    "bert": lambda: (transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)), BERT_PLACES),
    "roberta": lambda: (transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT)), BERT_PLACES),
    "vit": lambda: (
        transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=8, patch_size=4)),
        [(name.replace("attention.self", "attention.attention"), *rest) for name, *rest in BERT_PLACES],
    ),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_embd=HIDDEN, n_inner=MLP, n_head=HEADS, n_layer=LAYERS, vocab_size=WORDS, n_positions=24
            )
        ),
        GPT2_PLACES,
    ),
    "llama": lambda: decoder("Llama"),
    "mistral": lambda: decoder("Mistral"),
    "qwen2": lambda: decoder("Qwen2"),
    "qwen3": lambda: decoder("Qwen3", head_dim=6),
    "t5": lambda: t5("relu"),
    "t5 gated": lambda: t5("gated-gelu"),
    "clip": clip,
}


def build(kind, seed=0):
    """A random model, norms and biases too, and where its units lie."""
    model, places = BUILD[kind]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), places


def save(model, directory, **settings):
    model.save_pretrained(directory, **settings)
    return directory


def read(directory):
    with open_checkpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.specs}


def draw_orders(model, rng):
    """(kind, layer) -> an order of the units; heads stay with their groups, T5's are one order for a stack."""
    orders = {}
    vision = {"vision heads": 2}
    for layer in range(LAYERS):
        groups = rng.permutation(GROUPS)
        members = HEADS // GROUPS
        grouped = np.concatenate([g * members + rng.permutation(members) for g in groups])
        orders["groups", layer] = groups
        orders["heads", layer] = grouped if "layers" in dir(getattr(model, "model", None)) else rng.permutation(HEADS)
        orders["three heads", layer] = orders["heads", layer]
        orders["mlp", layer] = rng.permutation(MLP)
        for kind in ("encoder mlp", "decoder mlp", "text mlp", "vision mlp"):
            orders[kind, layer] = rng.permutation(MLP)
        for kind in ("cross heads", "text heads", "vision heads"):
            orders[kind, layer] = rng.permutation(vision.get(kind, HEADS))
        for kind in ("encoder heads", "decoder heads"):
            orders[kind, layer] = orders.get((kind, 0), rng.permutation(HEADS))
    return orders


def shuffle(weights, places, orders):
    """The weights of the same function with its units in another order."""
    twin = dict(weights)
    for layer in range(LAYERS):
        for template, axis, kind in places:
            for name in [n for n in weights if n.endswith(template.format(layer))]:
                order, parts = orders[kind, layer], 3 if kind == "three heads" else 1
                size = weights[name].shape[axis] // (parts * len(order))
                index = [
                    (part * len(order) + unit) * size + i
                    for part in range(parts)
                    for unit in order
                    for i in range(size)
                ]
                twin[name] = weights[name].take(index, axis=axis)
    return twin


def save_twin(model, places, directory, seed=1):
    """The model's twin on disk, and the model's own weights."""
    save(model, directory)
    weights = read(directory)
    twin = shuffle(weights, places, draw_orders(model, np.random.default_rng(seed)))
    write_safetensors(directory / "model.safetensors", twin)
    return weights, twin


def outputs(model):
    """What a model makes of a few fixed inputs."""
    ids = torch.tensor(np.random.default_rng(0).integers(3, WORDS, (3, 9)))
    kind = model.config.model_type
    images = torch.tensor(np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32))
    given = {
        "vit": {"pixel_values": images},
        "clip": {"input_ids": ids, "pixel_values": images},
        "t5": {"input_ids": ids, "decoder_input_ids": ids},
    }.get(kind, {"input_ids": ids})
    with torch.no_grad():
        found = model(**given)
    return (found.logits_per_text if kind == "clip" else found.logits).numpy()


def load(model, directory):
    """The same class with the weights in a directory."""
    return type(model).from_pretrained(directory).eval()
