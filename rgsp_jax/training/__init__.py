"""Learning on real checkpoints: parents, a few inputs of each, and the merge that answers as they do."""

from rgsp_jax.training.learn import LearnResult, Record, run_learning
from rgsp_jax.training.objectives import OBJECTIVES
from rgsp_jax.training.settings import LearnSettings

__all__ = ["OBJECTIVES", "LearnResult", "LearnSettings", "Record", "run_learning"]
