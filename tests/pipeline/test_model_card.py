import re
from types import SimpleNamespace

import pytest
import yaml
from markdown_it import MarkdownIt

from rgsp_jax.pipeline.model_card import choose_auto_class, model_card
from rgsp_jax.pipeline.report import Parent, RunSummary

EVIL = "a|b `c` *d* _e_ <script>alert(1)</script> [f](http://x.example) # & ![i](j) ~~k~~ $l$ \\"


def make_summary(**changes):
    parents = [
        Parent(label, [("model.safetensors", digit * 64)], "BertModel", "bert", 1000, "float32")
        for label, digit in zip(("hf://owner/one@main", "models/two"), "12", strict=True)
    ]
    settings = dict(
        method="relative",
        hyperparameters={"rank": 0.05, "scale": "auto", "weights": [1, 2]},
        output_name="merged",
        parents=parents,
        versions={"rgsp_jax": "0.1", "jax": "0.10"},
        config_yaml="method: relative\n",
        parameters=22_713_216,
        dtype="bfloat16",
        shards=2,
        bytes=45_431_808,
        counts_by_rule={"matrix: relative": 4},
        architecture="BertForSequenceClassification",
        has_tokenizer=True,
    )
    return RunSummary(**(settings | changes))


def split_card(card):
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def read_tokens(body):
    parser = MarkdownIt("gfm-like", {"linkify": False})
    return [child for token in parser.parse(body) for child in (token, *(token.children or ()))]


def test_front_matter():
    matter, _ = split_card(model_card(make_summary()))
    assert matter == {
        "library_name": "transformers",
        "base_model": ["owner/one"],
        "base_model_relation": "merge",
        "tags": ["merge", "rgsp_jax"],
    }
    local = [Parent("models/one"), Parent("/srv/two")]
    matter, _ = split_card(model_card(make_summary(parents=local, architecture=None)))
    assert matter == {"tags": ["merge", "rgsp_jax"]}
    matter, _ = split_card(model_card(make_summary(base=Parent("hf://gpt2"))))
    assert matter["base_model"] == ["owner/one", "gpt2"]


def test_front_matter_survives_hostile_labels():
    labels = ["hf://a/b\n---\ntags: [x]", "hf://owner/..: [", "---", "hf://yes/no"]
    matter, body = split_card(model_card(make_summary(parents=[Parent(label) for label in labels])))
    assert matter["base_model"] == ["yes/no"]
    assert matter["tags"] == ["merge", "rgsp_jax"]
    assert body.count("\n---\n") == 0


def test_card_says_what_how_and_from_what():
    card = model_card(make_summary(base=Parent("models/base", [("b.bin", "f" * 64)])))
    for text in ("# merged", "22.7 M parameters", "45.4 MB in 2 files", "1" * 64, "2" * 64, "f" * 64, "| jax | 0.10 |"):
        assert text in card
    assert "| scale | auto |" in card
    assert "| base | models/base |" in card
    assert "rgsp merge --config merge_config.yaml" in card
    assert "None: no tensor was flagged." in card
    assert "AutoModelForSequenceClassification.from_pretrained" in card
    assert not re.search(r"\b20\d\d-\d\d-\d\d\b", card)
    assert model_card(make_summary(base=Parent("models/base", [("b.bin", "f" * 64)]))) == card


def test_warnings_are_named():
    card = model_card(make_summary(flag_counts={"gw_unconverged": 3, "odd_flag": 1}, warnings=["Tokenizers differ."]))
    assert "- Tokenizers differ." in card
    assert "**Gromov-Wasserstein coupling not converged** (3 tensors)" in card
    assert r"**odd\_flag** (1 tensor)" in card
    assert "None: no tensor was flagged." not in card


def test_without_a_config_there_is_no_transformers_call():
    card = model_card(make_summary(architecture=None))
    assert "from_pretrained" not in card
    assert "load_file" in card


def test_untrusted_text_stays_text():
    parent = Parent(EVIL, [(EVIL, EVIL)], EVIL, EVIL, 1, EVIL)
    summary = make_summary(
        method=EVIL,
        hyperparameters={EVIL: EVIL},
        output_name=EVIL,
        parents=[parent, parent],
        base=parent,
        versions={EVIL: EVIL},
        dtype=EVIL,
        counts_by_rule={EVIL: 1},
        architecture=EVIL,
        flag_counts={EVIL: 1},
        warnings=[EVIL, "+ one\n\n# two"],
    )
    _, body = split_card(model_card(summary))
    tokens = read_tokens(body)
    kinds = {token.type for token in tokens}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "s_open"}
    assert sum(token.type == "text" and EVIL in token.content for token in tokens) >= 15
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1
    rows = re.findall(r"<tr>(.*?)</tr>", MarkdownIt("gfm-like", {"linkify": False}).render(body), re.S)
    assert [row.count("<td>") for row in rows if "<td>" in row] == [2, 2, 5, 5, 5, 3, 3, 3, 2]
    code = next(token.content for token in tokens if token.type == "fence" and token.info == "python")
    compile(code, "card", "exec")


def test_code_of_the_card_compiles_and_names_the_output():
    for name in ("merged", 'quo"te', "ünïcode", "new\nline", "```"):
        tokens = read_tokens(split_card(model_card(make_summary(output_name=name)))[1])
        code = next(token.content for token in tokens if token.type == "fence" and token.info == "python")
        paths = []
        loader = SimpleNamespace(from_pretrained=paths.append)
        body = code.split("\n", 1)[1]
        exec(compile(body, "card", "exec"), {"AutoModelForSequenceClassification": loader, "AutoTokenizer": loader})
        assert paths == [name, name]


def test_paths_that_are_no_utf8_can_be_written():
    card = model_card(make_summary(parents=[Parent("models/caf\udce9")]))
    assert "| A | models/caf? |" in card.encode().decode()


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("LlamaForCausalLM", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("ViTForImageClassification", "AutoModelForImageClassification"),
        ("BertModel", "AutoModel"),
        ("import os; ForCausal", "AutoModel"),
        (None, "AutoModel"),
    ],
)
def test_auto_class(architecture, expected):
    assert choose_auto_class(architecture) == expected
