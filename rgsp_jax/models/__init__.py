"""flax.nnx model families: a config and its wiring each, shared pieces, and weights mapped as data."""

from rgsp_jax.models.bert import Bert, BertClassifier, BertConfig, BertMaskedLm, BertTokenClassifier
from rgsp_jax.models.clip import (
    Clip,
    ClipConfig,
    ClipOutput,
    ClipText,
    ClipTextConfig,
    ClipTextProjection,
    ClipVision,
    ClipVisionConfig,
    ClipVisionProjection,
)
from rgsp_jax.models.decoder import Decoder, DecoderConfig, DecoderLm
from rgsp_jax.models.families import FAMILIES, HEADLESS, Family, without_pooler
from rgsp_jax.models.gpt2 import Gpt2, Gpt2Config, Gpt2Lm, Gpt2OpenAi
from rgsp_jax.models.qwen2_vl import Qwen2Vl, Qwen2VlConfig, Qwen2VlVision, Qwen2VlVisionConfig, find_positions
from rgsp_jax.models.recompute import recompute_layers
from rgsp_jax.models.roberta import (
    Roberta,
    RobertaClassifier,
    RobertaConfig,
    RobertaMaskedLm,
    RobertaTokenClassifier,
)
from rgsp_jax.models.t5 import T5, T5Config, T5Encoder, T5Lm
from rgsp_jax.models.vit import Vit, VitClassifier, VitConfig
from rgsp_jax.models.weights import (
    WeightPlace,
    WeightRule,
    WeightTable,
    export_weights,
    extract_parameters,
    load_weights,
    map_weights,
    match_names,
    place_weights,
    replace_parameters,
)

__all__ = [
    "FAMILIES",
    "HEADLESS",
    "T5",
    "Bert",
    "BertClassifier",
    "BertConfig",
    "BertMaskedLm",
    "BertTokenClassifier",
    "Clip",
    "ClipConfig",
    "ClipOutput",
    "ClipText",
    "ClipTextConfig",
    "ClipTextProjection",
    "ClipVision",
    "ClipVisionConfig",
    "ClipVisionProjection",
    "Decoder",
    "DecoderConfig",
    "DecoderLm",
    "Family",
    "Gpt2",
    "Gpt2Config",
    "Gpt2Lm",
    "Gpt2OpenAi",
    "Qwen2Vl",
    "Qwen2VlConfig",
    "Qwen2VlVision",
    "Qwen2VlVisionConfig",
    "Roberta",
    "RobertaClassifier",
    "RobertaConfig",
    "RobertaMaskedLm",
    "RobertaTokenClassifier",
    "T5Config",
    "T5Encoder",
    "T5Lm",
    "Vit",
    "VitClassifier",
    "VitConfig",
    "WeightPlace",
    "WeightRule",
    "WeightTable",
    "export_weights",
    "extract_parameters",
    "find_positions",
    "load_weights",
    "map_weights",
    "match_names",
    "place_weights",
    "recompute_layers",
    "replace_parameters",
    "without_pooler",
]
