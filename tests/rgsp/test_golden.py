"""The golden numbers of the specification's independent oracle, layer by layer."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rgsp_jax import methods
from rgsp_jax.rgsp import LITERAL, prepare_pair, relative_task_vector, solve_literal

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text())
LAYERS = ("seed_case", "layer_square", "layer_tall", "layer_wide")
TIGHT, SOLVER = 1e-10, 1e-6


def case(name):
    golden = {key: np.asarray(value) if isinstance(value, list) else value for key, value in GOLDEN[name].items()}
    return golden, jnp.stack([jnp.asarray(golden["a"]), jnp.asarray(golden["b"])])


def assert_close(actual, expected, bound, what):
    error = np.abs(np.asarray(actual) - expected).max()
    assert error <= bound, f"{what}: {error}"


@pytest.mark.parametrize("projection", ["one_sided", "two_sided"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_intermediate_with_the_coupling_given(name, projection):
    golden, stack = case(name)
    parts = prepare_pair(stack, golden["rank"])
    trace = solve_literal(parts, beta=golden["beta"], epsilon=golden["epsilon"], plan=jnp.asarray(golden["coupling"]))
    assert_close(parts.a.s, golden["s_a"], TIGHT, "s_a")
    assert_close(parts.b.s, golden["s_b"], TIGHT, "s_b")
    for field in ("m", "cost_a", "cost_b", "delta_s_raw", "tfi", "tos", "adjusted_coupling", "delta_s", "lam"):
        assert_close(getattr(trace, field), golden[field], TIGHT, field)
    for field in ("p", "s_bar", "h_bar", "psi"):
        assert_close(getattr(trace.code, field), golden[field], TIGHT, field)
    assert_close(trace.code.d_bar, golden["d_bar"], TIGHT, "d_bar")
    assert_close(trace.code.psi[:, 2], golden["d_local"], TIGHT, "d_local")
    literal = golden[f"tau_{projection}"]
    tau = relative_task_vector(parts, trace, projection)
    assert_close(tau, golden["tau_two_sided"] if literal is None else literal, TIGHT, "tau")


@pytest.mark.parametrize("projection", ["one_sided", "two_sided"])
@pytest.mark.parametrize("name", LAYERS)
def test_rgsp_seed_with_its_own_coupling(name, projection):
    golden, stack = case(name)
    output = methods["rgsp_seed"](
        stack, rank=golden["rank"], beta=golden["beta"], epsilon=golden["epsilon"], projection=projection
    )
    expected = golden[f"merged_{projection}"]
    assert_close(output.merged, golden["merged_two_sided"] if expected is None else expected, SOLVER, "merged")
    assert_close(output.stats["gw_cost"], golden["d_bar"], SOLVER, "gw_cost")
    assert_close(output.stats["lam"], golden["lam"], SOLVER, "lam")
    assert not output.stats["gw_unconverged"]


@pytest.mark.parametrize("name", LAYERS)
def test_the_solver_finds_the_golden_coupling(name):
    golden, stack = case(name)
    trace = solve_literal(prepare_pair(stack, golden["rank"]), beta=golden["beta"], epsilon=golden["epsilon"])
    assert_close(trace.coupling.plan, golden["coupling"], SOLVER, "coupling")


@pytest.mark.parametrize("name", LAYERS)
def test_rgsp_with_every_keyword_literal_is_rgsp_seed(name):
    golden, stack = case(name)
    literal = methods["rgsp"](stack, rank=golden["rank"], symmetric=False, rest_term=True, **LITERAL)
    assert_close(literal.merged, methods["rgsp_seed"](stack, rank=golden["rank"]).merged, 1e-13, "merged")


@pytest.mark.parametrize(("scale", "field"), [(2.0, "merged"), (None, "merged_auto")])
def test_relative_weighted(scale, field):
    golden = GOLDEN["relative"]
    output = methods["relative_weighted"](jnp.asarray(golden["stack"]), rank=golden["rank"], directions=scale)
    assert_close(output.merged, np.asarray(golden[field]), TIGHT, field)


@pytest.mark.parametrize("settings", [{"rank": 1}, {"rank": 3, "active_rank": 1}])
def test_a_single_direction_has_no_importance_and_leaves_the_mean(settings):
    """Its entropy is zero; TFI divides by it."""
    stack = case("layer_tall")[1]
    output = methods["rgsp"](stack, **settings)
    assert_close(output.merged, np.asarray(stack.mean(0)), 1e-12, "merged")
    assert output.stats["lam"] == 0
