"""README.md of a merged checkpoint: what it is made of, how to make it again, how to load it."""

import json
import re
from typing import Any

import yaml
from markupsafe import Markup

from rgsp_jax.checkpoint.hub import LOCATION
from rgsp_jax.pipeline.report import RunSummary, explain_flag, load_templates, make_encodable, name_parents
from rgsp_jax.pipeline.tensor_rows import load_glossary

AUTO_CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForSpeechSeq2Seq": "AutoModelForSpeechSeq2Seq",
}
"""The class of transformers that loads an architecture, by the end of the architecture's name; AutoModel otherwise."""

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~&!$@]|(?<=:)/|(?<=www)\.|^[-+])")


def model_card(summary: RunSummary) -> str:
    """README.md with YAML front matter; without a date, so that equal merges have equal cards."""
    method = load_glossary()["methods"].get(summary.method, {})
    models = [*zip(name_parents(len(summary.parents)), summary.parents, strict=True)]
    models += [("base", summary.base)] if summary.base is not None else []
    view = {
        "summary": summary,
        "front_matter": Markup(yaml.safe_dump(front_matter(summary), sort_keys=False, allow_unicode=True)),
        "method": method,
        "models": models,
        "flags": [(explain_flag(flag), count) for flag, count in summary.flag_counts.items()],
        "auto_class": Markup(choose_auto_class(summary.architecture)),
        "directory": Markup(json.dumps(summary.output_name, ensure_ascii=True)),
    }
    return make_encodable(load_templates(escape_markdown).get_template("model_card.md.j2").render(view))


def front_matter(summary: RunSummary) -> dict[str, Any]:
    """Metadata the Hub reads: library, tags, and the parents that are models of the Hub."""
    models = [*summary.parents, *([summary.base] if summary.base is not None else [])]
    names = [found[1] for model in models if (found := LOCATION.match(model.label))]
    data: dict[str, Any] = {"library_name": "transformers"} if summary.architecture else {}
    data |= {"base_model": list(dict.fromkeys(names)), "base_model_relation": "merge"} if names else {}
    return data | {"tags": ["merge", "rgsp_jax"]}


def choose_auto_class(architecture: str | None) -> str:
    """Name of the class of transformers to load an architecture with."""
    return next((c for end, c in AUTO_CLASSES.items() if (architecture or "").endswith(end)), "AutoModel")


def escape_markdown(value: Any) -> str:
    """Text that Markdown shows as it is, on one line, in a table too; what is Markup already is left alone."""
    if isinstance(value, Markup):
        return str(value)
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))
