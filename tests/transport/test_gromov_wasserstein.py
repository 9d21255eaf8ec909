"""Gromov-Wasserstein couplings against POT, the energy's definition and their own symmetries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgsp_jax.transport import gromov_wasserstein, share_by_row
from transport.problems import fixed_point_residual, load_cases, local_costs, make_problem

TIGHT = 1e-12
POT_CASES = load_cases("pot_couplings.json")
SEED_CASES = load_cases("seed_couplings.json")


def solve(cost_a, cost_b, a, b, epsilon, linear_cost, fused_penalty, solver="stabilized", tolerance=TIGHT):
    return gromov_wasserstein(
        cost_a, cost_b, a, b, epsilon, linear_cost, fused_penalty, solver=solver, tolerance=tolerance
    )


def solve_case(case, **settings):
    names = ("cost_a", "cost_b", "a", "b", "epsilon", "linear_cost", "fused_penalty")
    return solve(*(jnp.asarray(np.asarray(case[name], np.float64)) for name in names), **settings)


@pytest.mark.parametrize("solver", ["stabilized", "ott"])
@pytest.mark.parametrize("case", POT_CASES, ids=lambda c: f"{c['kind']}-{c['epsilon']}-{c['fused_penalty']}")
def test_plain_and_fused_plans_are_those_of_pot(case, solver):
    coupling = solve_case(case, solver=solver)
    assert np.abs(coupling.plan - case["plan"]).sum() < 1e-9
    assert coupling.converged
    assert coupling.marginal_error < 1e-12
    assert coupling.plan_change <= TIGHT


@pytest.mark.parametrize("solver", ["stabilized", "ott"])
@pytest.mark.parametrize("name", ["layer_tall", "layer_wide"])
def test_degenerate_costs_of_the_seed_method_stay_where_pot_stays(name, solver):
    case = SEED_CASES[name]
    coupling = gromov_wasserstein(jnp.asarray(case["cost_a"]), jnp.asarray(case["cost_b"]), solver=solver)
    np.testing.assert_allclose(coupling.plan, case["coupling"], atol=1e-9)
    np.testing.assert_allclose(coupling.cost, case["d_bar"], rtol=1e-9)
    assert coupling.converged


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", ["seed_case", "layer_square"])
def test_degenerate_costs_in_both_precisions(name, dtype):
    case = SEED_CASES[name]
    coupling = gromov_wasserstein(jnp.asarray(case["cost_a"], dtype), jnp.asarray(case["cost_b"], dtype))
    assert coupling.plan.dtype == coupling.cost.dtype == dtype
    accuracy = 1e-6 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(coupling.plan, case["coupling"], atol=accuracy)
    np.testing.assert_allclose(coupling.cost, case["d_bar"], rtol=accuracy)
    assert coupling.converged


def test_cost_is_the_energy_of_the_plan_without_the_entropy():
    for case in POT_CASES:
        coupling = solve_case(case)
        plan = np.asarray(coupling.plan)
        local = local_costs(case["cost_a"], case["cost_b"], plan)
        expected = (local * plan).sum() + case["fused_penalty"] * (case["linear_cost"] * plan).sum()
        np.testing.assert_allclose(coupling.cost, expected, rtol=1e-12)
        shares = share_by_row(jnp.asarray(case["cost_a"]), jnp.asarray(case["cost_b"]), coupling.plan)
        np.testing.assert_allclose(shares, (local * plan).sum(1), rtol=1e-11)


def test_plan_is_a_fixed_point_with_the_given_marginals():
    for case in POT_CASES:
        plan = np.asarray(solve_case(case).plan)
        linear = case["fused_penalty"] * case["linear_cost"]
        assert fixed_point_residual(case["cost_a"], case["cost_b"], plan, case["epsilon"], linear) < 1e-10
        np.testing.assert_allclose(plan.sum(1), case["a"] / case["a"].sum(), atol=1e-13)
        np.testing.assert_allclose(plan.sum(0), case["b"] / case["b"].sum(), atol=1e-13)


def test_the_residual_of_a_plan_that_is_no_fixed_point_is_seen():
    case = POT_CASES[0]
    plan = np.asarray(solve_case(case).plan)
    product = plan.sum(1)[:, None] * plan.sum(0)[None, :]
    wrong = 0.99 * plan + 0.01 * product
    assert fixed_point_residual(case["cost_a"], case["cost_b"], wrong, case["epsilon"]) > 1e-3


@pytest.mark.parametrize("solver", ["stabilized", "ott"])
def test_zero_weights_are_masks(solver):
    cost_a, cost_b, a, b, linear_cost = make_problem(3)
    a[[0, 4]], b[5] = 0, 0
    rows, columns = a > 0, b > 0
    case = dict(cost_a=cost_a, cost_b=cost_b, a=a, b=b, linear_cost=linear_cost, epsilon=0.03, fused_penalty=0.1)
    masked = solve_case(case, solver=solver)
    # What is masked out may be anything finite.
    cost_a[~rows], cost_a[:, ~rows], cost_b[~columns], cost_b[:, ~columns] = 0.9, 0.9, 3.0, 3.0
    assert np.abs(solve_case(case, solver=solver).plan - masked.plan).max() < 1e-12
    smaller = gromov_wasserstein(
        *(jnp.asarray(x) for x in (cost_a[rows][:, rows], cost_b[columns][:, columns], a[rows], b[columns])),
        0.03,
        jnp.asarray(linear_cost[rows][:, columns]),
        0.1,
        tolerance=TIGHT,
    )
    plan = np.asarray(masked.plan)
    assert (plan[~rows] == 0).all() and (plan[:, ~columns] == 0).all()
    assert np.abs(plan[rows][:, columns] - smaller.plan).sum() < 1e-10
    np.testing.assert_allclose(masked.cost, smaller.cost, rtol=1e-10)
    assert masked.converged


def test_weights_may_have_any_sum_and_default_to_uniform():
    cost_a, cost_b, *_ = (jnp.asarray(x) for x in make_problem(4))
    default = gromov_wasserstein(cost_a, cost_b, tolerance=TIGHT)
    counted = gromov_wasserstein(cost_a, cost_b, 3 * jnp.ones(9), jnp.ones(7), tolerance=TIGHT)
    assert jnp.abs(default.plan - counted.plan).max() < 1e-13
    np.testing.assert_allclose(jnp.sum(default.plan, axis=1), 1 / 9, rtol=1e-12)


def test_a_linear_cost_needs_its_penalty():
    cost_a, cost_b, _, _, linear_cost = (jnp.asarray(x) for x in make_problem(4))
    plain = gromov_wasserstein(cost_a, cost_b, tolerance=TIGHT)
    unweighted = solve(cost_a, cost_b, jnp.ones(9), jnp.ones(7), 0.05, linear_cost, 0.0)
    weighted = solve(cost_a, cost_b, jnp.ones(9), jnp.ones(7), 0.05, linear_cost, 0.5)
    assert jnp.abs(plain.plan - unweighted.plan).max() < 1e-13
    assert jnp.abs(plain.plan - weighted.plan).max() > 1e-3


def test_only_the_symmetric_part_of_a_cost_counts():
    cost_a, cost_b, a, b, linear_cost = (jnp.asarray(x) for x in make_problem(5))
    skew = jnp.asarray(np.random.default_rng(0).normal(size=(9, 9)))
    expected = solve(cost_a, cost_b, a, b, 0.05, linear_cost, 0.1)
    computed = solve(cost_a + skew - skew.T, cost_b, a, b, 0.05, linear_cost, 0.1)
    assert jnp.abs(computed.plan - expected.plan).sum() < 1e-9


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_permuting_the_points_permutes_the_plan(seed):
    rng = np.random.default_rng(seed)
    cost_a, cost_b, a, b, linear_cost = make_problem(rng.integers(20))
    i, k = rng.permutation(9), rng.permutation(7)
    original = solve(*map(jnp.asarray, (cost_a, cost_b, a, b)), 0.05, jnp.asarray(linear_cost), 0.2)
    shuffled = (cost_a[i][:, i], cost_b[k][:, k], a[i], b[k])
    permuted = solve(*map(jnp.asarray, shuffled), 0.05, jnp.asarray(linear_cost[i][:, k]), 0.2)
    assert np.abs(permuted.plan - np.asarray(original.plan)[i][:, k]).sum() < 1e-8
    np.testing.assert_allclose(permuted.cost, original.cost, rtol=1e-9)


def test_exchanging_the_sides_transposes_the_plan():
    cost_a, cost_b, a, b, linear_cost = (jnp.asarray(x) for x in make_problem(6))
    there = solve(cost_a, cost_b, a, b, 0.02, linear_cost, 0.2)
    back = solve(cost_b, cost_a, b, a, 0.02, linear_cost.T, 0.2)
    assert jnp.abs(there.plan - back.plan.T).sum() < 1e-9


def test_jit_is_eager_and_vmap_is_a_loop():
    problems = [make_problem(seed) for seed in range(4)]
    stacked = [jnp.asarray(np.stack(x)) for x in zip(*problems, strict=True)]

    def run(problem):
        cost_a, cost_b, a, b, linear_cost = problem
        return gromov_wasserstein(cost_a, cost_b, a, b, 0.02, linear_cost, 0.1, tolerance=TIGHT)

    batched = jax.jit(jax.vmap(run))(stacked)
    mapped = jax.jit(lambda problems: jax.lax.map(run, problems))(stacked)
    assert batched.converged.all()
    for index, problem in enumerate(problems):
        alone = run([jnp.asarray(x) for x in problem])
        for together in (batched, mapped):
            assert jnp.abs(together.plan[index] - alone.plan).sum() < 1e-10
            np.testing.assert_allclose(together.cost[index], alone.cost, rtol=1e-10)
    jitted = jax.jit(run)([x[0] for x in stacked])
    assert jnp.abs(jitted.plan - batched.plan[0]).sum() < 1e-10


@pytest.mark.parametrize("solver", ["stabilized", "ott"])
def test_epsilon_is_traced_once(solver):
    traces = []

    @jax.jit
    def run(cost_a, cost_b, epsilon):
        traces.append(epsilon)
        return gromov_wasserstein(cost_a, cost_b, epsilon=epsilon, solver=solver).cost

    cost_a, cost_b, *_ = (jnp.asarray(x) for x in make_problem(7))
    costs = [float(run(cost_a, cost_b, jnp.asarray(epsilon))) for epsilon in (0.02, 0.05, 0.2)]
    assert len(traces) == 1
    assert costs == sorted(costs) and costs[0] < costs[2]


@pytest.mark.parametrize("x64", [True, False])
def test_float32_agrees_with_float64(x64):
    problem = make_problem(8)
    reference = gromov_wasserstein(*map(jnp.asarray, problem[:4]), 0.02, tolerance=TIGHT)
    with jax.enable_x64(x64):
        narrow = (jnp.asarray(x, jnp.float32) for x in problem[:4])
        coupling = gromov_wasserstein(*narrow, 0.02)
        assert all(x.dtype == jnp.float32 for x in coupling[:4])
        assert coupling.converged
        assert np.abs(np.asarray(coupling.plan, np.float64) - np.asarray(reference.plan)).sum() < 1e-4
        assert abs(float(coupling.cost) - float(reference.cost)) < 1e-5


@pytest.mark.parametrize("epsilon", [1e-3, 1e-4, 1e-6])
def test_small_epsilon_in_float32_is_finite_and_honest(epsilon):
    problem = [jnp.asarray(x, jnp.float32) for x in make_problem(9)]
    coupling = solve(*problem[:4], jnp.float32(epsilon), problem[4], jnp.float32(0.1), tolerance=1e-5)
    assert all(jnp.isfinite(x).all() for x in coupling)
    thresholds = coupling.plan_change <= 1e-5 and coupling.marginal_error <= 1e-5
    assert bool(coupling.converged) == bool(thresholds)
    if epsilon >= 1e-3:
        assert coupling.converged


@pytest.mark.parametrize("epsilon", [1.0, 0.05, 1e-3, 1e-6])
@pytest.mark.parametrize("height", [0.0, 1.0])
def test_equal_off_diagonals_give_the_product_plan(epsilon, height):
    cost = height * (jnp.ones((6, 6), jnp.float32) - jnp.eye(6, dtype=jnp.float32))
    a = jnp.arange(1, 7, dtype=jnp.float32) / 21
    uniform = gromov_wasserstein(cost, cost, epsilon=epsilon)
    np.testing.assert_allclose(uniform.plan, 1 / 36, rtol=1e-5)
    assert uniform.converged
    uneven = gromov_wasserstein(cost, 0.0 * cost, a, epsilon=epsilon)
    assert jnp.isfinite(uneven.plan).all()
    np.testing.assert_allclose(jnp.sum(uneven.plan, axis=1), a, atol=1e-6)


def test_settings_that_cannot_converge_say_so():
    cost_a, cost_b, a, b, linear_cost = (jnp.asarray(x) for x in make_problem(10))
    hurried = gromov_wasserstein(cost_a, cost_b, a, b, 0.02, max_iterations=1)
    assert not hurried.converged and hurried.plan_change > 1e-3
    for bad in (
        solve(cost_a, cost_b, a, b, jnp.asarray(-1.0), linear_cost, 0.0),
        solve(cost_a, cost_b, 0 * a, b, 0.05, linear_cost, 0.0),
        solve(jnp.nan * cost_a, cost_b, a, b, 0.05, linear_cost, 0.0),
    ):
        assert not bad.converged


def test_a_broken_problem_leaves_its_neighbours_alone():
    cost_a, cost_b, *_ = (jnp.asarray(x) for x in make_problem(11))
    run = jax.jit(jax.vmap(lambda c: gromov_wasserstein(c, cost_b, tolerance=TIGHT)))
    together = run(jnp.stack([cost_a, jnp.nan * cost_a]))
    assert list(np.asarray(together.converged)) == [True, False]
    alone = run(jnp.stack([cost_a, cost_a]))
    assert jnp.abs(together.plan[0] - alone.plan[0]).max() < 1e-13


def test_all_wrong_arguments_are_named_at_once():
    cost = jnp.ones((3, 3))
    with pytest.raises(ValueError) as refused:
        gromov_wasserstein(
            cost, cost, jnp.ones(2), jnp.ones((1, 3)), 0.0, jnp.ones((3, 2)), jnp.ones(2), solver="newton"
        )
    for name in ("a wants", "b wants", "epsilon wants", "linear_cost wants", "fused_penalty wants", "solver wants"):
        assert name in str(refused.value)
    with pytest.raises(ValueError, match=r"cost_a.*\(3,\).*cost_b.*\(2, 3\).*tolerance.*max_iterations"):
        gromov_wasserstein(jnp.ones(3), jnp.ones((2, 3)), tolerance=0.0, max_iterations=0)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_both_solvers_reach_the_same_plans_at_rank_64(epsilon):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(2, 12, 16, 64))
    costs = ((points[..., :, None] - points[..., None, :]) ** 2).sum(-3)
    costs = jnp.asarray(costs / costs.max((0, 2, 3), keepdims=True), jnp.float32)

    def run(solver):
        return jax.jit(lambda c: jax.lax.map(lambda x: gromov_wasserstein(*x, epsilon=epsilon, solver=solver), c))

    fast, reference = (run(solver)((costs[0], costs[1])) for solver in ("stabilized", "ott"))
    assert fast.converged.all()
    assert jnp.abs(fast.plan - reference.plan).sum((1, 2)).max() < 1e-3
