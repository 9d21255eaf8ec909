"""Coefficients learned by gradient: the family against the methods it generalises, gradients, losses, steps, export."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from references import directional_derivative
from rgsp_jax import learning, merge
from rgsp_jax.types import InputStatistics

RANK = 2


def make_trees(count=3, seed=0, spread=0.2):
    """Siblings with a matrix, a stack of experts, an embedding, a norm and a counter, in float64."""
    shapes = {
        "dense": {"kernel": (8, 9), "bias": (9,)},
        "experts": {"kernel": (2, 7, 6)},
        "word": {"embedding": (11, 8)},
        "norm": {"scale": (9,)},
    }
    rng = np.random.default_rng(seed)
    base = jax.tree.map(lambda shape: rng.normal(size=shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    return [
        jax.tree.map(lambda x: jnp.asarray(x + spread * rng.normal(size=x.shape)), base) | {"steps": jnp.arange(3)}
        for _ in range(count)
    ]


def random_coefficients(family, per="direction"):
    rng = np.random.default_rng(5)
    start = learning.start_coefficients(family, per)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape)), start)


def assert_trees_close(first, second, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), first, second)


def test_the_start_is_relative_and_of_two_models_their_mean():
    trees = make_trees()
    family = learning.prepare_family(trees, rank=RANK)
    for coefficients in ({}, learning.start_coefficients(family), learning.start_coefficients(family, "direction")):
        composed = learning.compose_tree(family, coefficients)
        assert_trees_close(composed, merge(trees, "relative", rank=RANK)[0], 1e-12)
    pair = learning.prepare_family(trees[:2], rank=RANK)
    composed = learning.compose_tree(pair, learning.start_coefficients(pair))
    assert_trees_close(composed, merge(trees[:2], "average")[0], 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_on_a_base_the_start_is_the_method(dtype):
    """The base is widened with the models: what is learned is what a merge with the same setting computes."""
    base, *trees = (
        jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
        for tree in make_trees(4)
    )
    learn = ("scale", "coefficients")
    family = learning.prepare_family(trees, "task_arithmetic", learn=learn, base=base, scale=0.7)
    composed = learning.compose_tree(family, learning.start_coefficients(family))
    merged, _ = merge(trees, "task_arithmetic", base=base, scale=0.7)
    eps = float(jnp.finfo(dtype).eps)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2 * eps, atol=eps), composed, merged)
    for k, tree in enumerate(trees):
        jax.tree.map(np.testing.assert_array_equal, learning.expert_tree(family, k), tree)


def test_a_family_holds_what_was_asked_for():
    family = learning.prepare_family(make_trees(), rank=RANK)
    everything = learning.start_coefficients(family, "direction")
    assert everything.keys() == {"dense/kernel", "dense/bias", "experts/kernel", "word/embedding", "norm/scale"}
    assert everything["dense/kernel"]["directions"].shape == (3, RANK)
    assert set(everything["word/embedding"]) == {"tensors"}
    some = learning.start_coefficients(family, learn=("directions",), select=lambda name: name.startswith("dense"))
    assert list(some) == ["dense/kernel"] and list(some["dense/kernel"]) == ["directions"]
    assert learning.compose_tree(family, everything)["steps"].dtype == jnp.arange(3).dtype


@pytest.mark.parametrize("per", ["model", "layer", "direction"])
def test_exported_settings_give_the_composed_model(per):
    trees = make_trees()
    family = learning.prepare_family(trees, rank=RANK)
    coefficients = random_coefficients(family, per)
    composed = learning.compose_tree(family, coefficients)
    settings = learning.export_settings(family, coefficients)
    assert settings.keys() == {name for name, _ in family.order} - {"steps"}
    for name, (method, hyperparameters) in settings.items():
        first, *others = ({"leaf": find_leaf(tree, name)} for tree in trees)
        arrays = {key: jnp.asarray(x) if isinstance(x, list) else x for key, x in hyperparameters.items()}
        if method == "average":
            found = merge([first, *others], method, **arrays)[0]["leaf"]
        else:
            whole = [nest_leaf(tree, name) for tree in trees]
            found = find_leaf(merge(whole, method, **arrays)[0], name)
        np.testing.assert_allclose(found, find_leaf(composed, name), rtol=0, atol=1e-12, err_msg=name)


def find_leaf(tree, name):
    for part in name.split("/"):
        tree = tree[part]
    return tree


def nest_leaf(tree, name):
    """A tree of that leaf alone: its name says how it is laid out."""
    leaf = find_leaf(tree, name)
    for part in reversed(name.split("/")):
        leaf = {part: leaf}
    return leaf


def test_gradients_in_every_coefficient_and_through_the_decomposition():
    trees = make_trees()
    family = learning.prepare_family(trees, rank=RANK)
    start = random_coefficients(family)

    def probe(coefficients):
        leaves = jax.tree.leaves(learning.compose_tree(family, coefficients))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))

    gradient = jax.grad(probe)(start)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), start)
    found = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))

    def along(t):
        return probe(jax.tree.map(lambda x, d: x + t * d, start, direction))

    expected = (along(1e-5) - along(-1e-5)) / 2e-5
    np.testing.assert_allclose(found, expected, rtol=1e-7)

    # Through the decompositions too, of models that are being trained.
    stack = jnp.stack([tree["dense"]["kernel"] for tree in trees])

    def of_weights(stack):
        family = learning.prepare_family([{"dense": {"kernel": x}} for x in stack], rank=RANK)
        return jnp.sum(jnp.sin(learning.compose_tree(family, start)["dense"]["kernel"]))

    direction = jnp.asarray(rng.normal(size=stack.shape))
    expected = directional_derivative(jax.jit(of_weights), stack, direction, 1e-5)
    np.testing.assert_allclose(jnp.vdot(jax.jit(jax.grad(of_weights))(stack), direction), expected, rtol=1e-5)


def make_pair(case="apart"):
    """Two models of square matrices, or a pair at which the mathematics degenerates."""
    rng = np.random.default_rng(4)
    base = rng.normal(size=(2, 6, 5))
    if case == "zero":
        base = np.zeros_like(base)
    if case == "one value":  # all singular values are equal
        base = np.stack([np.linalg.qr(x)[0] for x in base])
    if case == "rank one":
        base = base[:, :, :1] * base[:, :1, :]
    change = 0 if case in ("zero", "equal", "one value") else 0.3
    trees = [base, 1.5 * base if case == "rank one" else base + change * rng.normal(size=base.shape)]
    return [{f"layer_{i}": {"kernel": jnp.asarray(x)} for i, x in enumerate(tree)} for tree in trees]


PAIRWISE = {
    "rgsp": ("epsilon", "temperature", "fused_penalty", "w_q", "w_k"),
    "dgsm": ("w_q", "w_k"),
    "graft": ("ridge",),
    "slerp": ("t",),
}
"""Method -> what a pair of models can learn of it.

beta's derivative is zero, it cancels; so is that of dgsm's epsilon, where the uniform coupling is stationary.
"""


def prepare_pairwise(method, trees):
    settings = {"rank": 3, "fused_penalty": 0.2, "temperature": 0.3} if method == "rgsp" else {}
    settings = {"rank": 3} if method == "dgsm" else settings
    inputs = None
    if method == "graft":
        moments = jnp.asarray(np.cov(np.random.default_rng(6).normal(size=(6, 40))))
        inputs = {f"layer_{i}/kernel": InputStatistics(covariance=moments[None]) for i in range(2)}
    return learning.prepare_family(trees, method, learn=PAIRWISE[method], inputs=inputs, **settings)


def total(family, coefficients):
    leaves = jax.tree.leaves(learning.compose_tree(family, coefficients))
    return sum(jnp.sum(jnp.sin(3 * leaf)) for leaf in leaves)


@pytest.mark.parametrize(
    ("method", "per"),
    [("rgsp", "layer"), ("graft", "model"), pytest.param("dgsm", "model", marks=pytest.mark.slow), ("slerp", "model")],
)
def test_gradients_of_what_a_pair_learns(method, per):
    """Through the map, the Gromov-Wasserstein plan and the fusion of whole models, against finite differences."""
    family = prepare_pairwise(method, make_pair())
    rng = np.random.default_rng(1)
    start = jax.tree.map(
        lambda x: x + jnp.asarray(0.05 * rng.normal(size=x.shape)), learning.start_coefficients(family, per)
    )
    assert {key for own in start.values() for key in own} == set(PAIRWISE[method])
    value = jax.jit(lambda coefficients: total(family, coefficients))
    gradient = jax.jit(jax.grad(lambda coefficients: total(family, coefficients)))(start)
    for leaf, own in start.items():
        for key in own:
            direction = jnp.asarray(rng.normal(size=own[key].shape))

            def along(x, leaf=leaf, key=key):
                return value(start | {leaf: start[leaf] | {key: x}})

            expected = directional_derivative(along, own[key], direction, 1e-4)
            assert abs(expected) > 1e-9, (leaf, key)
            np.testing.assert_allclose(jnp.vdot(gradient[leaf][key], direction), expected, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("case", ["equal", "zero", "rank one", "one value"])
def test_what_a_pair_learns_has_finite_gradients_where_models_degenerate(case):
    family = prepare_pairwise("rgsp", make_pair(case))
    start = learning.start_coefficients(family)
    found = jax.jit(jax.value_and_grad(lambda coefficients: total(family, coefficients)))(start)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


def test_what_cannot_be_learned_is_named():
    with pytest.raises(ValueError, match=r"'rank', 'geometry' of 'rgsp' cannot be learned; there is beta, epsilon"):
        learning.prepare_family(make_pair(), "rgsp", learn=("rank", "geometry"))
    with pytest.raises(ValueError, match="temperature of 'rgsp' is None and no number"):
        learning.prepare_family(make_pair(), "rgsp", learn=("temperature",), rank=2, temperature=None)


def test_an_expert_of_the_family_is_the_model_itself():
    trees = make_trees()
    family = learning.prepare_family(trees, rank=RANK)
    for k, tree in enumerate(trees):
        jax.tree.map(np.testing.assert_array_equal, learning.expert_tree(family, k), tree)


@pytest.mark.parametrize("case", ["equal", "zero", "rank one"])
def test_degenerate_families_are_finite(case):
    tree = {"dense": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))}}
    if case == "zero":
        trees = [jax.tree.map(jnp.zeros_like, tree)] * 3
    elif case == "equal":
        trees = [tree] * 3
    else:
        outer = jnp.outer(jnp.arange(6.0), jnp.ones(5))
        trees = [{"dense": {"kernel": i * outer}} for i in range(3)]

    def total(coefficients, trees):
        family = learning.prepare_family(trees, rank=2)
        return jnp.sum(learning.compose_tree(family, coefficients)["dense"]["kernel"] ** 2)

    start = learning.start_coefficients(learning.prepare_family(trees, rank=2), "direction")
    value, gradients = jax.value_and_grad(total, argnums=(0, 1))(start, trees)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))


def test_trees_that_do_not_match_are_refused():
    first, second = make_trees(2)
    second["dense"]["bias"] = jnp.zeros(4)
    with pytest.raises(ValueError, match=r"dense/bias is \(9,\) in tree 1 and \(4,\) in tree 2"):
        learning.prepare_family([first, second])
    with pytest.raises(ValueError, match="two models or more"):
        learning.prepare_family([first])


def test_rows_that_do_not_count_do_not():
    rng = np.random.default_rng(2)
    logits, teacher = (jnp.asarray(x) for x in rng.normal(size=(2, 5, 4)))
    labels, where = jnp.asarray([0, 1, 2, 3, 0]), jnp.asarray([True, True, False, True, False])
    kept = np.flatnonzero(np.asarray(where))
    pairs = [
        (learning.cross_entropy(logits, labels, where), learning.cross_entropy(logits[kept], labels[kept])),
        (learning.entropy(logits, where), learning.entropy(logits[kept])),
        (learning.weighted_entropy(logits, where), learning.weighted_entropy(logits[kept])),
        (learning.distillation(logits, teacher, 2.0, where), learning.distillation(logits[kept], teacher[kept], 2.0)),
        (learning.feature_distance(logits, teacher, where), learning.feature_distance(logits[kept], teacher[kept])),
    ]
    for found, right in pairs:
        np.testing.assert_allclose(found, right, rtol=1e-12)
    assert learning.entropy(logits, jnp.zeros(5, bool)) == 0


def test_losses_against_numpy():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 4, 5))
    labels = rng.integers(0, 5, 4)

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(teacher), softmax(logits)
    each = -(q * np.log(q)).sum(-1)
    confidence = 1 - each / np.log(5)
    rows, taught = jnp.asarray(logits), jnp.asarray(teacher)
    spread = ((teacher - teacher.mean(0)) ** 2).sum()
    pairs = [
        (learning.cross_entropy(rows, jnp.asarray(labels)), -np.log(q[np.arange(4), labels]).mean()),
        (learning.entropy(rows), each.mean()),
        (learning.weighted_entropy(rows), (confidence * each).sum() / confidence.sum()),
        (learning.distillation(rows, taught), (p * np.log(p / q)).sum(-1).mean()),
        (learning.feature_distance(rows, taught), ((logits - teacher) ** 2).sum() / spread),
    ]
    for found, right in pairs:
        np.testing.assert_allclose(found, right, rtol=1e-12)
    hot = softmax(teacher / 2), softmax(logits / 2)
    found = learning.distillation(rows, taught, 2.0)
    np.testing.assert_allclose(found, 4 * (hot[0] * np.log(hot[0] / hot[1])).sum(-1).mean(), rtol=1e-12)
    uniform = jnp.zeros((3, 5))
    gradient = jax.grad(learning.weighted_entropy)(uniform)
    assert learning.weighted_entropy(uniform) == 0 and jnp.isfinite(gradient).all()
    tree = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array(3.0)}}
    assert learning.squared_distance(tree, jax.tree.map(jnp.zeros_like, tree)) == 14


@pytest.fixture
def problem():
    """Experts of a linear map, each right on its own inputs: learning is to answer as they do."""
    trees = [{"dense": {"kernel": tree["dense"]["kernel"]}} for tree in make_trees(3, spread=1.0)]
    family = learning.prepare_family(trees, rank=RANK, reach=1e9)  # however far apart they are
    rng = np.random.default_rng(3)
    inputs = [jnp.asarray(rng.normal(size=(20, 8)) * (np.arange(8) % 3 == k)) for k in range(3)]
    answers = [x @ tree["dense"]["kernel"] for x, tree in zip(inputs, trees, strict=True)]

    def loss(coefficients, x, y):
        return learning.feature_distance(x @ learning.compose_tree(family, coefficients)["dense"]["kernel"], y)

    batches = [(x, y) for _ in range(40) for x, y in zip(inputs, answers, strict=True)]
    return family, loss, batches


def test_learning_lowers_the_loss_and_resumes_exactly(problem):
    family, loss, batches = problem
    optimiser = optax.sgd(0.2)
    step = learning.make_step(loss, optimiser)
    start = learning.start_learning(learning.start_coefficients(family, "direction"), optimiser)
    states, losses = zip(*learning.learn(start, step, batches), strict=True)
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert int(states[-1].step) == len(batches)
    halfway = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), states[59])  # as if saved and loaded
    *_, (resumed, _) = learning.learn(halfway, step, batches[60:])
    jax.tree.map(np.testing.assert_array_equal, resumed, states[-1])


def test_a_step_that_is_not_finite_changes_nothing(problem):
    family, loss, batches = problem
    optimiser = optax.sgd(0.05)
    step = learning.make_step(loss, optimiser)
    start = learning.start_learning(learning.start_coefficients(family), optimiser)
    x, y = batches[0]
    after, value = step(start, x * jnp.nan, y)
    assert jnp.isnan(value) and int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.parameters, start.parameters)
