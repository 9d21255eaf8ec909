import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest

from rgsp_jax.pipeline.plots import Line, draw_heat_map, draw_lines, find_limits, format_tick, tick_positions
from rgsp_jax.pipeline.report import (
    Parent,
    RunSummary,
    count_flags,
    explain_flag,
    format_bytes,
    format_count,
    format_percent,
    join_words,
    judge,
    name_parents,
    render_report,
)
from rgsp_jax.pipeline.tensor_rows import LayerAxis, Location, TensorRow, load_glossary, locate, name_module_kind
from rgsp_jax.registry import methods
from rgsp_jax.types import InputStatistics

EVIL = "<script>alert(1)</script>\"'&"


def make_summary(models=2, **changes):
    parents = [
        Parent(f"models/{i}", [("model.safetensors", f"{i}" * 64)], "BertModel", "bert", 1234, "float32")
        for i in range(models)
    ]
    settings = dict(
        method="rgsp",
        hyperparameters={"rank": 0.05, "geometry": "spectral"},
        output_name="merged",
        parents=parents,
        versions={"rgsp_jax": "0.1", "jax": "0.10"},
        config_yaml="method: rgsp\n",
        parameters=22_713_216,
        dtype="bfloat16",
        shards=1,
        bytes=45_431_808,
        counts_by_rule={"matrix: rgsp": 4, "vector: average": 2},
    )
    return RunSummary(**(settings | changes))


def make_record(name, models=2, change=0.01, **changes):
    overlap = [[1.0 if i == j else 0.125 for j in range(models)] for i in range(models)]
    stats = {
        "gw_cost": 0.1,
        "lam": 0.25,
        "psi": [0.5, 2.0, 0.1],
        "residual": [1e-6] * models,
        "subspace_overlap": overlap,
    }
    record = {
        "name": name,
        "shape": [8, 4],
        "dtype": "bfloat16",
        "rule": "matrix",
        "method": "rgsp",
        "hyperparameters": {"rank": 0.05},
        "stats": stats,
        "flags": [],
        "relative_change": [change * (i + 1) for i in range(models)],
        "digest": "abc123",
    }
    return record | changes


def make_records(layers=3, models=2):
    modules = ("attention.self.query", "attention.output.dense", "output.dense")
    records = [make_record(f"encoder.layer.{i}.{m}.weight", models) for i in range(layers) for m in modules]
    return [*records, make_record("embeddings.word_embeddings.weight", models, rule="embedding", stats={})]


class Page(HTMLParser):
    """Elements, attributes and text of a page; a `<script>`'s text as it stands."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.text += [" "] if tag != "wbr" else []

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def read_table(html):
    data = re.search(r'<script type="application/json" id="tensors-data">(.*?)</script>', html, re.S)[1]
    table = json.loads(data)
    return [{column[0]: cell for column, cell in zip(table["columns"], row, strict=True)} for row in table["rows"]]


def figures(html, prefix):
    return sorted(set(re.findall(rf'<g id="({prefix}\w*)-figure_1"', html)))


LAYERS = [
    ("model.layers.12.self_attn.q_proj.weight", ("model.layers", 12)),
    ("bert.encoder.layer.3.output.dense.bias", ("bert.encoder.layer", 3)),
    ("transformer.h.7.attn.c_attn.weight", ("transformer.h", 7)),
    ("h.0.mlp.c_fc.weight", ("h", 0)),
    ("blocks/4/attn/qkv/kernel", ("blocks", 4)),
    ("visual.blocks.11.attn.qkv.weight", ("visual.blocks", 11)),
    ("encoder.block.2.layer.1.DenseReluDense.wo.weight", ("encoder.block", 2)),
    ("model.layers.3.mlp.experts.17.up_proj.weight", ("model.layers", 3)),
    ("swin.encoder.layers.1.blocks.5.attention.self.query.weight", ("swin.encoder.layers.1.blocks", 5)),
    ("resnet.encoder.stages.2.layers.1.layer.0.convolution.weight", ("resnet.encoder.stages.2.layers", 1)),
    ("layer1.0.conv1.weight", ("layer", 1)),
    ("params/layers_6/mlp/kernel", ("params.layers", 6)),
    ("params/TransformerBlock_10/Dense_0/kernel", ("params.TransformerBlock", 10)),
    ("albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", ("albert.encoder.albert_layer_groups", 0)),
    ("vision.transformer.resblocks.9.ln_1.weight", ("vision.transformer.resblocks", 9)),
    ("features.28.weight", ("features", 28)),
    ("embeddings.LayerNorm.weight", None),
    ("lm_head.weight", None),
    ("layer_norm.weight", None),
    ("classifier.0.weight", None),
    ("weight", None),
    ("", None),
    (f"layers.{'9' * 5000}.weight", None),
]


@pytest.mark.parametrize(("name", "expected"), LAYERS)
def test_layers_are_read_from_names(name, expected):
    assert locate(name) == (expected and Location(*expected))


KINDS = [
    ("model.layers.0.self_attn.q_proj.weight", "Query"),
    ("bert.encoder.layer.0.attention.self.key.weight", "Key"),
    ("distilbert.transformer.layer.0.attention.v_lin.weight", "Value"),
    ("decoder.block.0.layer.1.EncDecAttention.q.weight", "Query"),
    ("decoder.block.0.layer.1.EncDecAttention.o.weight", "Attention output"),
    ("bert.encoder.layer.0.attention.output.dense.weight", "Attention output"),
    ("text_model.encoder.layers.0.self_attn.out_proj.weight", "Attention output"),
    ("h.0.attn.c_proj.weight", "Attention output"),
    ("h.0.attn.c_attn.weight", "Query, key, value fused"),
    ("h.0.mlp.c_fc.weight", "MLP up"),
    ("h.0.mlp.c_proj.weight", "MLP down"),
    ("bert.encoder.layer.0.intermediate.dense.weight", "MLP up"),
    ("bert.encoder.layer.0.output.dense.weight", "MLP down"),
    ("model.layers.0.mlp.gate_proj.weight", "MLP gate"),
    ("model.layers.0.mlp.gate.weight", "Router"),
    ("model.layers.0.block_sparse_moe.experts.3.w2.weight", "MLP down"),
    ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "MLP gate"),
    ("resnet.encoder.stages.0.layers.0.layer.0.convolution.weight", "Convolution"),
    ("model.embed_tokens.weight", "Embedding"),
    ("transformer.wte.weight", "Embedding"),
    ("lm_head.weight", "Head"),
    ("backbone.layers.0.mixer.in_proj.weight", "Other"),
]


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_kinds_of_matrices(name, kind):
    assert name_module_kind(name, (4, 4)) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "Norm"),
        ("model.layers.0.self_attn.q_norm.weight", "Norm"),
        ("h.0.ln_1.bias", "Norm"),
        ("layer1.0.bn1.running_mean", "Norm"),
        ("bert.encoder.layer.0.attention.self.query.bias", "Bias"),
        ("classifier.bias", "Bias"),
    ],
)
def test_kinds_of_vectors(name, kind):
    assert name_module_kind(name, (4,)) == kind


def test_layers_are_ordered_by_depth_and_the_decoder_is_last():
    names = ["decoder.block.0.w", "encoder.block.10.w", "encoder.block.9.w", "decoder.block.1.w", "shared.weight"]
    axis = LayerAxis.of(locate(name) for name in names)
    assert [(p.stack[:7], p.layer) for p in axis.locations] == [
        ("encoder", 9),
        ("encoder", 10),
        ("decoder", 0),
        ("decoder", 1),
    ]
    assert axis.breaks == (2,)
    assert axis.stacks == ("encoder.block", "decoder.block")


def test_render_is_the_same_in_two_processes_and_any_order(tmp_path):
    records = make_records()
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: path\naxes.grid: True\n")
    (tmp_path / "records.json").write_text(json.dumps(records))
    (tmp_path / "summary.json").write_text(json.dumps(asdict(make_summary())))
    code = (
        "import json, sys\n"
        "from rgsp_jax.pipeline.report import Parent, RunSummary, render_report\n"
        "summary = json.load(open('summary.json'))\n"
        "summary['parents'] = [Parent(**p) for p in summary['parents']]\n"
        "html = render_report(RunSummary(**summary), json.load(open('records.json')))\n"
        "open(sys.argv[1], 'w', encoding='utf-8').write(html)\n"
    )
    environments = (
        {"PYTHONHASHSEED": "1"},
        {
            "PYTHONHASHSEED": "2",
            "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
            "MPLBACKEND": "pdf",
            "TZ": "Asia/Tokyo",
        },
    )
    for i, extra in enumerate(environments):
        subprocess.run([sys.executable, "-c", code, f"{i}.html"], cwd=tmp_path, env=os.environ | extra, check=True)
    first = (tmp_path / "0.html").read_bytes()
    assert (tmp_path / "1.html").read_bytes() == first
    assert render_report(make_summary(), records[::-1]).encode() == first
    assert b"<svg" in first


def test_nothing_is_loaded_and_every_reference_resolves():
    html = render_report(make_summary(3), make_records(models=3))
    page = Page(html)
    loading = [
        value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")
    ]
    assert loading and all(value.startswith("#") for value in loading)
    styles = re.findall(r"url\(([^)]*)\)", html)
    assert all(value.startswith("#") for value in styles)
    assert "@import" not in html and "fetch(" not in html
    assert not {"img", "link", "iframe", "object", "embed"} & set(page.tags)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'")
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in loading + styles} <= set(ids)


def test_untrusted_text_is_escaped_wherever_it_stands():
    records = make_records()
    bad = {"rule": EVIL, "method": EVIL, "dtype": EVIL, "digest": EVIL, "flags": [EVIL, "gw_unconverged"]}
    stats = {EVIL: 1.0, "word": EVIL}
    records += [
        make_record(f"encoder.layer.{i}.{EVIL}", stats=stats, hyperparameters={EVIL: EVIL}, **bad) for i in range(2)
    ]
    records += [make_record(EVIL, change=5.0, **bad), make_record(f"{EVIL}.layer.0.w"), make_record("a.layer.1.$x_{$")]
    parent = Parent(EVIL, [(EVIL, EVIL)], EVIL, EVIL, 1, EVIL)
    texts = dict.fromkeys(("method", "output_name", "config_yaml", "dtype"), EVIL)
    summary = make_summary(
        parents=[parent, parent],
        base=parent,
        hyperparameters={EVIL: EVIL},
        versions={EVIL: EVIL},
        counts_by_rule={EVIL: 1},
        warnings=[EVIL],
        **texts,
    )
    html = render_report(summary, records)
    page = Page(html)
    assert page.tags.count("script") == 2
    assert "<script>alert" not in html
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("html") == page.tags.count("main") == 1
    assert EVIL in page.words
    assert EVIL in [row["Tensor"] for row in read_table(html)]
    assert [row["Warnings"] for row in read_table(html) if row["Tensor"] == EVIL] == [f"{EVIL}, gw_unconverged"]


def test_paths_that_are_no_utf8_can_be_written():
    summary = make_summary(parents=[Parent("models/caf\udce9"), Parent("models/b")])
    assert "models/caf?" in render_report(summary, [make_record("w\ud800")]).replace("<wbr>", "").encode().decode()


def test_table_holds_the_numbers():
    stacked = {
        "gw_cost": [0.1, 0.3],
        "psi": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]],
        "residual": [[1e-6, 2e-6], [3e-6, None]],
        "subspace_overlap": [[[1.0, 0.2], [0.2, 1.0]], [[1.0, 0.4], [0.4, 1.0]]],
        "novelty": 7.0,
        "ready": True,
        "solver": "gram",
    }
    record = make_record("h.3.mlp.experts.w1", stats=stacked, shape=[2, 8, 4], relative_change=[0.0123456, None])
    row = read_table(render_report(make_summary(), [record, make_record("h.2.mlp.experts.w1")]))[1]
    assert row["Tensor"] == "h.3.mlp.experts.w1"
    assert (row["Kind"], row["Layer"], row["Shape"]) == ("MLP gate", 3, "2 × 8 × 4")
    assert (row["vs A"], row["vs B"]) == (0.01235, None)
    assert row["GW cost"] == 0.2
    assert [row[f"ψ: {part}"] for part in ("signed shift s", "entropy h", "distance d")] == [2.0, 3.0, 4.0]
    assert row["SVD residual"] == 3e-6
    assert row["Overlap"] == 0.3
    assert (row["novelty"], row["solver"]) == (7.0, "gram")
    assert row["Settings"] == "rank 0.05"
    assert "ready" not in row


def test_panels_for_every_kind_and_statistic():
    records = make_records()
    html = render_report(make_summary(), records)
    assert len(figures(html, "change")) == 3
    assert len(figures(html, "stat")) == 5  # GW cost, lambda, two parts of psi (the third is the cost), residual
    assert figures(html, "mean") and figures(html, "pair") and figures(html, "kind")
    for record in records:
        record["stats"] = dict(record["stats"], oddity=0.5) if record["stats"] else {}
    richer = render_report(make_summary(), records)
    assert len(figures(richer, "stat")) == 6
    assert "<h4>oddity</h4>" in richer


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"name": "x"}],
        [{"name": "layers.0.w", "stats": None, "relative_change": None, "flags": None, "shape": None}],
        [make_record("weight")],
        [
            make_record(f"layers.{i}.w", relative_change=[None, None], stats={"gw_cost": None, "psi": [None] * 3})
            for i in range(3)
        ],
        [
            make_record(f"layers.{i}.w", stats={"subspace_overlap": [[1.0, None], [None, 1.0]], "residual": [0.0, 0.0]})
            for i in range(3)
        ],
        [make_record(f"layers.{i}.w", models=1) for i in range(3)],
        [make_record(f"layers.{i}.w", relative_change=[0.0, 0.0], stats={"lam": 0.0}) for i in range(2)],
        [
            make_record(f"layers.{i}.w", stats={"a": [], "b": {}, "c": [[None]]}, relative_change=[0.1])
            for i in range(2)
        ],
    ],
)
def test_holes_in_the_records_leave_holes_in_the_page(records):
    html = render_report(make_summary(), records)
    assert [row["Tensor"] for row in read_table(html)] == sorted(record["name"] for record in records)
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", Page(html).words)
    assert "No warnings." in html


def test_empty_run_says_so():
    html = render_report(make_summary(0, counts_by_rule={}, hyperparameters={}), [])
    assert "No tensors were recorded." in html
    assert "fewer than two layers" in html


def test_every_warning_is_there_in_plain_words():
    records = make_records(layers=12)
    flags = [*load_glossary()["flags"], "something_new", "karcher_unconverged", "nonfinite"]
    for i, flag in enumerate(flags):
        records[i]["flags"] = [flag]
        records[i + 1]["flags"] = [flag]
    html = render_report(make_summary(warnings=["The tokenizers differ."]), records)
    section = Page(html[html.index('id="warnings"') : html.index('id="change"')]).words
    for flag in flags:
        note = explain_flag(flag)
        assert note["title"] in section
        assert " ".join(note["text"].split()) in section
        assert f"( {flag})" in section
    for record in records[: len(flags) + 1]:
        assert record["name"] in section
    assert "The tokenizers differ." in section
    assert "No warnings" not in section
    assert section.index("nonfinite") < section.index(load_glossary()["flags"]["svd_inexact"]["title"])
    assert section.count("What to do:") == len(flags)


def test_many_flagged_tensors_are_listed_in_part():
    records = [make_record(f"layers.{i}.w", stats={}, flags=["gw_unconverged", "gw_unconverged"]) for i in range(250)]
    html = render_report(make_summary(), records)
    assert "250 of 250 tensors" in html
    assert "and 50 more" in html
    assert count_flags(records) == {"gw_unconverged": 250}


def test_verdicts():
    codes, summary = ["A", "B"], make_summary()

    def verdict(summary=summary, **changes):
        verdict = judge(summary, [TensorRow.of(make_record(f"layers.{i}.w", **changes)) for i in range(4)], codes)
        return verdict["level"], verdict["headline"], " ".join(verdict["sentences"])

    level, headline, text = verdict()
    assert (level, headline) == ("good", "Merged without a warning.")
    assert text == "The typical merged tensor differs by 1 % from A and 2 % from B."
    assert verdict(flags=["nonfinite"])[:2] == ("serious", "Do not use this as it is: 4 of 4 tensors are unsound.")
    assert verdict(flags=["gw_unconverged"])[:2] == ("check", "Merged; 4 of 4 tensors are worth a look.")
    assert verdict(flags=["buffer_differs"])[:2] == ("good", "Merged; nothing but harmless notes.")
    assert verdict(summary=replace(summary, warnings=["x"]))[1] == "Merged; a note on the run is worth a look."
    assert "It lies much closer to A than to B." in verdict(relative_change=[0.01, 0.05])[2]
    assert "The result equals A: nothing of the others went in." in verdict(relative_change=[0.0, 0.05])[2]
    assert "The parents are equal" in verdict(relative_change=[0.0, 0.0])[2]
    assert verdict(relative_change=[None, 0.1])[2] == ""


def test_reproduction_is_complete():
    base = Parent("models/base", [("pytorch_model.bin", "f" * 64)])
    html = render_report(make_summary(base=base), make_records())
    words = Page(html).words
    for text in (
        "0" * 64,
        "1" * 64,
        "f" * 64,
        "models/base",
        "method: rgsp",
        "jax 0.10",
        "spectral",
        "bfloat16",
        "22.7 M",
    ):
        assert text in words
    assert "on a base model" in words


def test_page_grows_by_the_table_only():
    small, large = ([make_record(f"layers.{i % 4}.experts.{i}.w1", flags=[]) for i in range(n)] for n in (40, 4000))
    sizes = []
    for records in (small, large):
        html = render_report(make_summary(), records)
        sizes.append(len(html) - len(re.search(r'id="tensors-data">(.*?)</script>', html, re.S)[1]))
    assert sizes[1] < 1.2 * sizes[0]


def path_points(svg, color):
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none[^"]*stroke: var\({color}\)', svg)
    return [[tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path)] for path in paths]


def test_lines_lie_where_the_values_say():
    axis = LayerAxis.of(Location("layers", i) for i in range(3))
    svg = draw_lines("x", [Line(0, {0: [0.0], 1: [1.0], 2: [1.0, 3.0, 2.0]})], axis, label="l", limits=(0.0, 2.0))
    (points,) = path_points(svg, "--s0")
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.05)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.05)  # 0, 1 and the median 2
    assert y0 > y1
    assert len(re.findall(r'id="x-\w*PolyCollection', svg)) == 1  # the range at the last layer


def test_lines_break_at_holes_and_between_stacks():
    axis = LayerAxis.of([Location("a", 0), Location("a", 1), Location("b", 0), Location("b", 1), Location("b", 2)])
    svg = draw_lines("x", [Line(1, {0: [1.0], 1: [2.0], 2: [3.0], 4: [1.0]})], axis, label="l")
    assert [len(points) for points in path_points(svg, "--s1")] == [2, 2]
    first, second = path_points(svg, "--s1")
    assert first[1][0] < second[0][0]
    assert svg.count("stroke: var(--muted)") == 1  # the line between the stacks


def test_logarithmic_axis_puts_zeros_on_the_floor():
    axis = LayerAxis.of(Location("layers", i) for i in range(3))
    svg = draw_lines("x", [Line(0, {0: [0.0], 1: [1e-6], 2: [1e-5]})], axis, label="l", log=True)
    (((_, y0), (_, y1), (_, y2)),) = path_points(svg, "--s0")
    assert y0 == pytest.approx(y1, abs=0.05)
    assert y2 < y1
    assert ">1e-6<" in svg and ">1e-5<" in svg


def test_limits_and_ticks():
    assert find_limits([]) == (0.0, 1e-3)
    assert find_limits([0.0, 0.0], log=True) == (0.0, 1e-3)
    assert find_limits([2e-6, 5e-4], log=True) == (1e-6, pytest.approx(1e-3))
    low, high = find_limits([-1.0, 1.0])
    assert low < -1 and high > 1
    assert [format_tick(v) for v in (0.0, 0.025, 1e-6, 2.5e6, 1.5)] == ["0", "0.025", "1e-6", "2.5e6", "1.5"]
    axis = LayerAxis.of([Location(s, i) for s in "ab" for i in range(21)])
    labelled = [axis.locations[i] for i in tick_positions(axis)]
    assert labelled == [Location(s, i) for s in "ab" for i in (0, 5, 10, 15, 20) if (s, i) != ("a", 20)]


def test_heat_map_shades_by_value():
    svg = draw_heat_map("h", [[0.0, 0.1], [0.2, None]], ["0", "1"], ["A", "B"], label="<h>", highest=0.2)
    opacity = re.findall(r"fill: var\(--heat\)(?:; opacity: ([\d.]+))?", svg)
    assert opacity == ["0.5", ""]  # nothing at 0, half at .1, the full colour at .2
    assert re.findall(r">([^<>]+)</text>", svg) == [".00", ".10", ".20", "·", "0", "1", "A", "B"]
    assert 'aria-label="&lt;h&gt;"' in svg


def test_formats():
    assert [format_count(v) for v in (7, 999, 22_713_216, 999_900, 7.1e9, None)] == [
        "7",
        "999",
        "22.7 M",
        "1 M",
        "7.1 B",
        "unknown",
    ]
    assert [format_bytes(v) for v in (12, 45_431_808)] == ["12 bytes", "45.4 MB"]
    assert [format_percent(v) for v in (0.0, 0.012345, None, 1.5)] == ["0 %", "1.23 %", "–", "150 %"]
    assert [join_words(w) for w in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert name_parents(28)[::9] == ["A", "J", "S", "P28"]


def test_glossary_knows_what_the_methods_say():
    glossary = load_glossary()
    stack = jax.ShapeDtypeStruct((2, 8, 6), jnp.float32)
    assert set(methods) <= set(glossary["methods"])
    for method in methods.values():
        drift = jnp.ones((2, 6, 6)) if method.in_step else None
        inputs = InputStatistics(jnp.ones((2, 6, 6)), drift, held_back=jnp.ones((2, 3, 6)))
        beside = {"base": jnp.ones((8, 6)), "inputs": inputs, "key": jax.random.key(0)}
        needs = {"inputs" if need == "covariances" else need for need in method.needs}
        given = {name: value for name, value in beside.items() if name in needs}
        stats = jax.eval_shape(lambda s, method=method, given=given: method(s, **given), stack).stats
        flags = {name for name, value in stats.items() if value.dtype == jnp.bool_}
        assert flags <= set(glossary["flags"])
        assert set(stats) - flags - {"psi", "subspace_overlap"} <= set(glossary["stats"])
    assert all(math.isfinite(len(note["text"])) and note["action"] for note in glossary["flags"].values())
