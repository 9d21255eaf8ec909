"""Merge methods other than RGSP-TEFM, one file per family."""

from rgsp_jax.merging.ace import ace_merging
from rgsp_jax.merging.adamms import ResponseSearch, search_alpha
from rgsp_jax.merging.average import average
from rgsp_jax.merging.breadcrumbs import breadcrumbs
from rgsp_jax.merging.core_space import core_space
from rgsp_jax.merging.dare import dare, dare_ties
from rgsp_jax.merging.della import della
from rgsp_jax.merging.fisher import fisher
from rgsp_jax.merging.isotropic import ISO_C_STAGES, ISO_CTS_STAGES, iso_c, iso_cts
from rgsp_jax.merging.karcher import karcher
from rgsp_jax.merging.knots import knots
from rgsp_jax.merging.model_stock import model_stock
from rgsp_jax.merging.neuron_geometry import carry_neurons, couple_neurons, round_coupling
from rgsp_jax.merging.otfusion import transport_neurons
from rgsp_jax.merging.permutation import match_weights, permute
from rgsp_jax.merging.regmean import regmean
from rgsp_jax.merging.slerp import SLERP, slerp
from rgsp_jax.merging.task_arithmetic import task_arithmetic
from rgsp_jax.merging.ties import ties
from rgsp_jax.merging.tsv import TSV_STAGES, tsv_m
from rgsp_jax.merging.wudi import wudi

__all__ = [
    "ISO_CTS_STAGES",
    "ISO_C_STAGES",
    "SLERP",
    "TSV_STAGES",
    "ResponseSearch",
    "ace_merging",
    "average",
    "breadcrumbs",
    "carry_neurons",
    "core_space",
    "couple_neurons",
    "dare",
    "dare_ties",
    "della",
    "fisher",
    "iso_c",
    "iso_cts",
    "karcher",
    "knots",
    "match_weights",
    "model_stock",
    "permute",
    "regmean",
    "round_coupling",
    "search_alpha",
    "slerp",
    "task_arithmetic",
    "ties",
    "transport_neurons",
    "tsv_m",
    "wudi",
]
