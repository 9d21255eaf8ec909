"""What `agreement` compares: random problems, every method as a peer runs it and as we do, and mergekit YAMLs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SEED = 5


@dataclass(frozen=True)
class Problem:
    """K random models around a base; a single row is handed to the peers as a vector."""

    m: int
    n: int
    count: int
    spread: float
    """Standard deviation of the task vectors' entries where the base's is 1."""

    @property
    def name(self) -> str:
        return f"{self.count} models {self.m}x{self.n}, spread {self.spread:g}"

    def draw(self, seed: int) -> dict[str, np.ndarray]:
        """float32 base, models and input covariances; task vectors share a direction, so that signs agree and clash."""
        rng = np.random.default_rng(seed)
        base, common = rng.normal(size=(2, self.m, self.n))
        own = rng.normal(size=(self.count, self.m, self.n))
        rows = rng.normal(size=(self.count, 4 * self.n, self.n)) if self.n <= 200 else np.zeros((self.count, 1, 1))
        arrays = {
            "base": base,
            "stack": base + self.spread * (own + 0.5 * common),
            "covariances": np.einsum("kin,kim->knm", rows, rows) / rows.shape[1],
        }
        return {name: x.astype(np.float32) for name, x in arrays.items()}


PROBLEMS = (
    Problem(64, 48, 2, 0.3),
    Problem(128, 32, 2, 0.01),
    Problem(37, 120, 3, 0.3),
    Problem(96, 64, 4, 0.05),
    Problem(1, 257, 4, 0.3),
    Problem(1536, 1024, 2, 30.0),  # far from the base, so that rounding leaves few magnitudes equal
)
TINY = (Problem(4, 6, 3, 0.3), Problem(4, 6, 2, 0.3))
"""Of the goldens: the second is for methods that take two models."""


@dataclass(frozen=True)
class Row:
    """One method as a peer runs it and as we do; tuples among the settings are cut to the number of models."""

    peer: str
    function: str
    theirs: Mapping[str, Any]
    method: str
    ours: Mapping[str, Any]
    note: str = ""
    counts: tuple[int, ...] = (2, 3, 4)
    vectors: bool = True
    large: bool = False
    """Also on the large problem, where one entry kept too many is past the bound."""
    bounded: bool = True
    """False where the definitions differ, so that the difference is recorded and not judged."""
    match_l1: bool = False
    """Give every task vector the factor by which mergekit restored its L1 norm."""
    paper_rescale: bool = False
    """Divide what mergekit keeps by its probability, in place of its own rescaling."""

    def takes(self, problem: Problem) -> bool:
        fits = self.large or problem.m * problem.n < 10_000
        return fits and problem.count in self.counts and (self.vectors or problem.m > 1)


WEIGHTS = (1.0, 0.4, 1.7, 0.8)
GIVEN = {"weight": WEIGHTS, "lambda": 0.7}
OURS_GIVEN = {"coefficients": WEIGHTS, "scale": 0.7}


def mergekit_row(function: str, theirs: Mapping[str, Any], method: str, ours: Mapping[str, Any], **more: Any) -> Row:
    return Row("mergekit", function, theirs, method, ours, **more)


def fusion_bench_row(function: str, method: str, ours: Mapping[str, Any], **more: Any) -> Row:
    return Row("fusion_bench", function, more.pop("theirs", {}), method, ours, vectors=False, **more)


DROPPED, KEPT = 0.6, 0.4  # a drop rate is one minus mergekit's density
UNSCALED = {"coefficients": WEIGHTS, "scale": 0.7 * KEPT, "drop_rate": DROPPED}
"""Our division by 1 - p undone by the scale, for mergekit's `rescale: false`."""
DELLA = {"drop_rate": 0.5, "window": 0.4}

ROWS = (
    mergekit_row("linear", {"weight": WEIGHTS}, "average", {"coefficients": WEIGHTS}),
    mergekit_row("linear", {"weight": (1.0,) * 4}, "average", {}),
    mergekit_row("slerp", {"t": 0.3}, "slerp", {"t": 0.3}, counts=(2,), note="both regimes of the 0.9995 threshold"),
    mergekit_row("karcher", {}, "karcher", {}, note="max_iter is iterations; mergekit has no weights"),
    mergekit_row("task_arithmetic", GIVEN, "task_arithmetic", OURS_GIVEN, note="lambda is scale"),
    mergekit_row(
        "task_arithmetic",
        {"weight": (1.0,) * 4, "normalize": True},
        "average",
        {},
        note="normalize: true divides by the sum of the weights",
    ),
    mergekit_row("ties", {**GIVEN, "density": 0.4}, "ties", {**OURS_GIVEN, "density": 0.4}, large=True),
    mergekit_row(
        "ties",
        {**GIVEN, "density": 0.4, "normalize": False},
        "ties",
        {**OURS_GIVEN, "density": 0.4, "normalize": False},
    ),
    mergekit_row("ties", GIVEN, "ties", {**OURS_GIVEN, "density": 1.0}, note="mergekit's default density is 1"),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT, "rescale": False},
        "dare",
        UNSCALED,
        note="drop_rate = 1 - density; rescale: false is our scale times density",
    ),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT},
        "dare",
        {**OURS_GIVEN, "drop_rate": DROPPED},
        match_l1=True,
        note="rescale: true restores the L1 norm: the same with that factor over 1 / density in the coefficients",
    ),
    mergekit_row(
        "dare_linear",
        {**GIVEN, "density": KEPT},
        "dare",
        {**OURS_GIVEN, "drop_rate": DROPPED},
        bounded=False,
        note="differs: ours divides by the density, as the paper; mergekit restores the drawn tensor's L1 norm",
    ),
    mergekit_row(
        "dare_ties",
        {**GIVEN, "density": KEPT, "rescale": False, "normalize": True},
        "dare_ties",
        UNSCALED,
    ),
    mergekit_row(
        "dare_ties",
        {**GIVEN, "density": KEPT},
        "dare_ties",
        {**OURS_GIVEN, "drop_rate": DROPPED, "normalize": False},
        match_l1=True,
        note="as dare_linear; normalize is false by default there",
    ),
    mergekit_row(
        "della",
        {**GIVEN, "density": 0.5, "epsilon": 0.2, "rescale": False},
        "della",
        {**OURS_GIVEN, **DELLA},
        paper_rescale=True,
        note="window = 2 epsilon; mergekit's mask and merge with every kept entry divided by mergekit's probability",
    ),
    mergekit_row(
        "della",
        {**GIVEN, "density": 0.5, "epsilon": 0.2},
        "della",
        {**OURS_GIVEN, **DELLA},
        bounded=False,
        note="differs: mergekit restores the L1 norm with one factor, which favours large entries; ours is the paper's",
    ),
    mergekit_row(
        "breadcrumbs",
        {**GIVEN, "density": 0.7, "gamma": 0.05},
        "breadcrumbs",
        {**OURS_GIVEN, "density": 0.7, "gamma": 0.05},
        large=True,
    ),
    mergekit_row("model_stock", {}, "model_stock", {}),
    fusion_bench_row("tsv_m", "tsv_m", {}),
    fusion_bench_row("iso_c", "iso_c", {}),
    fusion_bench_row("iso_cts", "iso_cts", {"common_share": 0.8}, theirs={"common_space_fraction": 0.8}),
    fusion_bench_row(
        "regmean", "regmean", {"off_diagonal": 0.9}, theirs={"reduce_non_diagonal_ratio": 0.9}, note="inputs given"
    ),
    fusion_bench_row("regmean", "regmean", {"off_diagonal": 1.0}, theirs={"reduce_non_diagonal_ratio": 1.0}),
    fusion_bench_row("wudi", "wudi", {}, note="300 steps of Adam at 1e-5 from the sum of the task vectors"),
)


def cut(settings: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {name: list(x[:count]) if isinstance(x, tuple) else x for name, x in settings.items()}


LAYER = {
    **{f"self_attn.{name}_proj.weight": (16, 16) for name in "qkvo"},
    **{f"mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")},
    "mlp.down_proj.weight": (16, 24),
    **{f"{name}_layernorm.weight": (16,) for name in ("input", "post_attention")},
}
TENSORS = {
    "model.embed_tokens.weight": (40, 16),
    **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()},
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
YAMLS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "linear": ("linear", {}),
    "slerp": ("slerp", {"t": 0.3}),
    "slerp_gradient": ("slerp", {"t": [0.2, 0.9, 0.4]}),
    "slerp_filters": ("slerp", {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.3}]}),
    "karcher": ("karcher", {"max_iter": 10}),
    "task_arithmetic": ("task_arithmetic", {"lambda": 0.7}),
    "task_arithmetic_normalized": ("task_arithmetic", {"lambda": 0.7, "normalize": True}),
    "ties": ("ties", {"density": 0.4, "lambda": 0.7}),
    "ties_sparse": ("ties", {"density": 0.05, "normalize": False}),
    "dare_linear": ("dare_linear", {"density": 0.4, "rescale": False}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.7, "gamma": 0.05, "normalize": True}),
    "model_stock": ("model_stock", {}),
}
"""File name -> merge_method and common parameters; every model but the base has a weight, where there are weights."""

DIFFERENCES = (
    "DARE, DELLA: `rescale: true` of mergekit multiplies what a draw leaves of a task vector by one factor that"
    " restores its L1 norm. Ours divides every entry kept by its own probability, as the papers. For DARE both tend"
    " to the same as tensors grow; for DELLA they do not, so that its YAMLs are refused.",
    "TIES: where the weighted task vectors cancel exactly, mergekit elects plus; ours elects nothing, as the paper's"
    " formula.",
    "TIES, breadcrumbs: mergekit takes the integer part of density times size as the binary product has it (28 of 100"
    " at 0.29); ours forgives that rounding (29).",
    "TIES, breadcrumbs: of equal magnitudes at the threshold ours keeps the first in row-major order, mergekit the ones"
    " that its sort leaves there.",
    "TIES, DARE, breadcrumbs: mergekit can give every model a density of its own; ours is one for all.",
    "Karcher: mergekit stops at its tolerance, ours after all iterations.",
    "Model stock: mergekit bounds the product of two task vectors' norms by 1e-6 from below, ours only keeps off zero.",
    "DELLA: mergekit ranks tensors of more than two axes along the second, ours all inputs of an output.",
    "Any: mergekit computes in the config's dtype, ours in float32 and rounds once.",
    "WUDI: fusion_bench has its learning rate of 1e-5 fixed; it is our default.",
)
"""Beside what the table's rows say, by the peers' code."""
