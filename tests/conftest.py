"""A strict test process: float64 allowed, no silent dtype or rank promotion, eight simulated devices."""

import itertools
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Scripts are not installed; at the end of the path, so that the tests are of the installed package.
sys.path.append(str(Path(__file__).parents[1]))

# One cache for all workers of a run, gone after it: the same kernel is compiled once, not once per worker.
OWN_CACHE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="rgsp-tests-")
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
# Most of the time goes into compiling, which LLVM's optimisation makes longer; XLA's own passes are all there.
# XLA_FLAGS=--xla_backend_optimization_level=3 tests what users run, as `pytest -m slow` is meant to be.
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"--xla_backend_optimization_level=0 {given} --xla_force_host_platform_device_count=8"

# LAPACK's own threads wait for each other by spinning, on cores that the other workers want.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

from experiments.compilations import drop_compilations

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# Minutes of compilation between them, of code that quicker tests run too: `pytest -m slow` runs these as well.
SLOW = (
    "test_trees.py::test_jit_equals_eager_and_hyperparameters_trace",
    "test_frontier.py::test_points_are_the_merges_they_say",
    "test_frontier.py::test_a_run_goes_on_behind_what_is_scored",
    "test_learning.py::test_exported_settings_give_the_composed_model[model]",
    "test_clip.py::test_weights_of_older_versions_load",
    "test_vision_digits.py::test_a_small_run",
    "test_vision_digits.py::test_a_common_head_is_kept_and_the_encoder_is_not",
    "test_permuted_twins.py::test_a_small_run",
    "test_learned_fusion.py::test_a_small_run",
    "test_methods.py::test_a_masked_rank_is_the_smaller_rank[relative_weighted]",
    "test_methods.py::test_a_masked_rank_is_the_smaller_rank[rgsp_seed]",
    "test_methods.py::test_a_masked_rank_is_the_smaller_rank[dgsm]",
    "test_methods.py::test_a_masked_rank_is_the_smaller_rank[gsf]",
    "test_methods.py::test_jit_equals_eager_and_vmap_equals_loop[gsf]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[dgsm-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[gsf-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[core_space-float16]",
    "test_gradients.py::test_beta_cancels_and_epsilon_where_the_uniform_coupling_is_stationary[dgsm]",
    "test_gradients.py::test_beta_cancels_and_epsilon_where_the_uniform_coupling_is_stationary[gsf]",
    "test_pipeline.py::test_a_seed_is_a_merge_whatever_the_items[della]",
    "test_relative_weighted.py::test_against_the_oracle[model]",
    "test_sequential.py::test_the_pipeline_writes_the_model_that_was_refitted_in_memory[make_gpt2-bfloat16]",
    "test_graft_commands.py::test_a_frontier_is_a_table_and_a_picture",
    "test_svd_derivative.py::test_batched_gradients_are_the_looped_ones",
    "test_derivatives.py::test_vmapped_gradients_are_those_of_a_loop",
    "test_learning.py::test_what_a_pair_learns_has_finite_gradients_where_models_degenerate[rank one]",
    "test_learn_command.py::test_a_summary_is_printed",
    "test_trees.py::test_dtypes_are_the_first_trees[float16]",
    "test_methods.py::test_jit_equals_eager_and_vmap_equals_loop[dgsm]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[core_space-bfloat16]",
    "test_pipeline.py::test_a_method_for_whole_tensors_with_a_base",
    "test_pipeline.py::test_a_seed_is_a_merge_whatever_the_items[dare]",
    "test_core_space.py::test_updates_rounded_with_their_base",
    "test_learning.py::test_what_a_pair_learns_has_finite_gradients_where_models_degenerate[zero]",
    "test_learn.py::test_losses_go_down[entropy]",
    "test_permuted_models.py::test_transport_carries_the_twin_back[gromov_wasserstein-0.01]",
    "test_finetune_text.py::test_runs_repeat_by_seed_and_classes_are_numbered_anew",
    "test_notebooks.py::test_a_notebook_gives_what_it_shows[03_graft_and_frontier]",
    "test_notebooks.py::test_a_notebook_gives_what_it_shows[04_sweep_rank_and_beta]",
    "test_notebooks.py::test_a_notebook_gives_what_it_shows[05_learn_fusion_weights]",
    "test_notebooks.py::test_a_notebook_gives_what_it_shows[06_mesh_of_devices]",
    "test_gradients.py::test_beta_cancels_and_epsilon_where_the_uniform_coupling_is_stationary[rgsp_seed]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[gsf-rank one]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[gsf-orthogonal]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[dgsm-rank one]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[dgsm-orthogonal]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[rgsp_seed-rank one]",
    "test_gradients.py::test_degenerate_layers_are_finite_in_value_and_gradient[rgsp_seed-orthogonal]",
    "test_methods.py::test_the_stages_compose_to_the_method[gsf]",
    "test_methods.py::test_the_stages_compose_to_the_method[dgsm]",
    "test_methods.py::test_the_stages_compose_to_the_method[iso_cts]",
    "test_methods.py::test_jit_equals_eager_and_vmap_equals_loop[iso_cts]",
    "test_methods.py::test_jit_equals_eager_and_vmap_equals_loop[knots]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[relative-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[relative_weighted-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[rgsp-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[rgsp_seed-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[tsv_m-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[iso_c-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[iso_cts-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[knots-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[wudi-float16]",
    "test_methods.py::test_dtype_is_kept_and_small_floats_compute_in_float32[ace_merging-float16]",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.endswith(SLOW):
            item.add_marker(pytest.mark.slow)


LOOK_EVERY = 20
tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def compiled_functions_stay_few(request):
    yield
    if next(tests_done) % LOOK_EVERY == 0 or request.node.get_closest_marker("slow"):
        drop_compilations()


def pytest_unconfigure():
    """The process that made the cache removes it; workers find its name in their environment."""
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)
