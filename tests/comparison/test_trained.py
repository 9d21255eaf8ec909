"""Trained models: vision transformers fine-tuned from one ancestor, and from another trained from another start."""

import pytest

from rgsp_jax.comparison import compare_checkpoints
from rgsp_jax.demo.experts import DemoSettings, make_experts
from rgsp_jax.demo.tasks import TASKS
from rgsp_jax.demo.training import Schedule


@pytest.mark.slow
def test_trained_models_are_told_apart(tmp_path):
    models = []
    for seed in (0, 1):
        settings = DemoSettings(seed, Schedule(20, 1e-3), Schedule(8, 1e-3), tasks=TASKS[:2])
        models += [expert.model for expert in make_experts(tmp_path / str(seed), settings)]
    verdict = compare_checkpoints(models).verdict
    relations = {pair.models: pair.relation for pair in verdict.pairs}
    assert relations.pop((0, 1)) == relations.pop((2, 3)) == "siblings"
    assert set(relations.values()) == {"unrelated"}
    assert verdict.families == ((0, 1), (2, 3)) and verdict.odd == ()
    assert verdict.headline == "A and B can be merged with each other, and so can C and D."
    assert 0.02 < verdict.pairs[0].rho < 0.3
