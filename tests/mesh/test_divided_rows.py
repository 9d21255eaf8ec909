"""Every method with the rows of its matrices divided over eight devices: one device's result, and no matrix travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mesh.problems import (
    RANK,
    count_models,
    list_collectives,
    make_arguments,
    make_case,
    make_mesh,
    settings_of,
)
from rgsp_jax import methods

WHOLE = {
    "wudi": "multiplies all rows with all rows of a model",
    "knots": "has one basis of all models, as large as they are together",
    "ace_merging": "estimates a covariance of every model's columns and solves for all rows with it",
}
"""Methods that cannot be divided by rows, and why."""

SMALL_PARTS = {"average", "slerp", "karcher", "task_arithmetic", "ties", "dare", "dare_ties", "della", "breadcrumbs"}
SMALL_PARTS |= {"model_stock", "regmean", "graft", "sequential_graft"}
"""No decomposition of a long matrix, and no sum that grows with the matrix."""

CASES = ("plain", "equal", "zero", "one direction", "repeated")
BY_ROW = {"regmean", "graft", "sequential_graft", "della"}
"""Treat every row as a problem of its own: where columns are divided they exchange them for rows."""

ARBITRARY = {"rgsp", "rgsp_seed", "dgsm", "gsf"}
"""Carry singular values onto vectors that a matrix of fewer directions leaves open."""

BOUND = {"float64": 1e-11, "float32": 1e-4}
"""Of the largest difference over the largest weight: what the tolerance of the SVD leaves."""
WIDE, TALL, SQUARE, UNEVEN = (64, 96), (96, 64), (72, 72), (100, 61)

slow = pytest.mark.slow
DIVISIBLE = [name for name in methods if name not in WHOLE]


@functools.cache
def compile_both(name, m, n, dtype, side=0):
    """(one device's function, the mesh's function, its program) of a method; rows (0) or columns (1) are divided."""
    mesh = make_mesh(rows=8)
    sides = P("rows") if side == 0 else P(None, "rows")
    divided = NamedSharding(mesh, sides)
    missing = [(0, -length % 8 if i == side else 0) for i, length in enumerate((m, n))]

    def merge(stack, given):
        return methods[name](stack, **given, **settings_of(name)).merged

    def merge_true_entries(stack, given):
        given = {key: x[:m, :n] if key == "base" else x for key, x in given.items()}
        return jnp.pad(merge(stack[:, :m, :n], given), missing)

    def place(stack, given):
        stack = jax.device_put(jnp.pad(stack, [(0, 0), *missing]), NamedSharding(mesh, P(None, *sides)))
        if "base" in given:
            given = given | {"base": jax.device_put(jnp.pad(given["base"], missing), divided)}
        return stack, given

    arguments = make_arguments(name, *make_case("plain", count_models(name), m, n), dtype)
    with jax.set_mesh(mesh):
        compiled = jax.jit(merge_true_entries, out_shardings=divided).lower(*place(*arguments)).compile()

    def on_mesh(stack, given):
        merged = compiled(*place(stack, given))
        assert len(merged.sharding.device_set) == 8
        return np.asarray(merged)[:m, :n]

    return jax.jit(merge), on_mesh, compiled.as_text()


def check_method(name, shape, dtype, side=0):
    one_device, on_mesh, text = compile_both(name, *shape, dtype, side)
    for case in CASES:
        if case == "one direction" and name in ARBITRARY:
            continue
        stack, given = make_arguments(name, *make_case(case, count_models(name), *shape), dtype)
        expected = np.asarray(one_device(stack, given))
        found = on_mesh(stack, given)
        assert np.isfinite(expected).all()
        size = max(float(np.abs(np.asarray(stack)).max()), 1e-30)
        assert np.abs(found - expected).max() <= BOUND[dtype] * size, case
    check_collectives(name, *shape, side, text)


def check_collectives(name, m, n, side, text):
    """None carries more than a square of the short side or r columns a model; exchanges, a device's part of models."""
    short, long = sorted((m, n))
    models = count_models(name)
    columns = (models + 1) * (2 * RANK + 8)
    found = list_collectives(text)
    largest = max([size for operation, size in found if operation != "all-to-all"], default=0)
    exchanged = max([size for operation, size in found if operation == "all-to-all"], default=0)
    padded = -(-m // 8) * 8 * -(-n // 8)
    if name in SMALL_PARTS:
        assert largest <= models**2
        assert exchanged <= (models * padded if side == 1 and name in BY_ROW else 0)
    else:
        assert found
        assert largest <= max(short**2, long * columns)
        assert exchanged <= models * padded
        if short < long:
            assert largest < m * n


QUICK = {("relative", WIDE, "float32", 1)}
QUICK |= {(name, WIDE, "float64", 1) for name in ("average", "karcher", "ties", "della", "model_stock", "regmean")}
EVERY = [
    (name, shape, dtype, side)
    for name in DIVISIBLE
    for shape, side in ((WIDE, 0), (WIDE, 1), (TALL, 0), (SQUARE, 0), (UNEVEN, 0), (UNEVEN[::-1], 1))
    for dtype in BOUND
]


def name_test(name, shape, dtype, side):
    return "-".join([name, "x".join(map(str, shape)), dtype, ("rows", "columns")[side]])


@pytest.mark.parametrize(
    "name, shape, dtype, side",
    [pytest.param(*each, marks=() if each in QUICK else slow, id=name_test(*each)) for each in EVERY],
)
def test_divided_is_one_device(name, shape, dtype, side):
    check_method(name, shape, dtype, side)


def test_the_table_is_what_methods_say():
    assert {name for name, method in methods.items() if not method.row_divisible} == set(WHOLE)


@pytest.mark.parametrize("name", ["wudi", pytest.param("ace_merging", marks=slow), pytest.param("knots", marks=slow)])
def test_methods_that_need_whole_matrices_pass_them_on(name):
    """And are right nonetheless. Should one of these stop to, the table is out of date."""
    one_device, on_mesh, text = compile_both(name, *TALL, "float64")
    arguments = make_arguments(name, *make_case("plain", count_models(name), *TALL), "float64")
    np.testing.assert_allclose(on_mesh(*arguments), one_device(*arguments), atol=1e-11)
    assert max(size for operation, size in list_collectives(text) if operation != "all-to-all") >= TALL[0] * TALL[1]


@pytest.mark.parametrize(
    "name, m, n",
    [
        ("relative", 4096, 16384),
        *(
            pytest.param(name, m, n, marks=slow)
            for name in ("relative", "relative_weighted", "rgsp", "core_space")
            for m, n in ((4096, 4096), (32768, 4096), (4096, 32768))
        ),
    ],
)
def test_large_matrices_are_never_whole(name, m, n):
    """Compiled for sizes that Gram matrices are too large for: vectors travel, and no device holds a matrix."""
    mesh, rank, models = make_mesh(rows=8), 64, count_models(name)
    stack = jax.ShapeDtypeStruct((models, m, n), jnp.float32, sharding=NamedSharding(mesh, P(None, "rows")))
    base = jax.ShapeDtypeStruct((m, n), jnp.float32, sharding=NamedSharding(mesh, P("rows")))
    given = {"base": base} if "base" in methods[name].needs else {}
    merge = jax.jit(
        lambda stack, given: methods[name](stack, rank=rank, **given).merged,
        out_shardings=NamedSharding(mesh, P("rows")),
    )
    with jax.set_mesh(mesh):
        compiled = merge.lower(stack, given).compile()
    found = list_collectives(compiled.as_text())
    columns = max(models * rank, 2 * rank + 8)  # of the models together, or iterated for one
    assert max(size for operation, size in found if operation != "all-to-all") <= max(m, n) * columns
    assert max([size for operation, size in found if operation == "all-to-all"], default=0) <= models * m * n / 8
    # Each model's part, its exchanged part and a copy of both, and vectors: less than one matrix.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.1 * 4 * m * n * (models + 1) / 4


def test_layers_over_one_axis_and_rows_over_another():
    mesh = make_mesh(layers=2, rows=4)
    batch = jnp.asarray(
        np.stack([make_case("plain", 3, *TALL)[0] for _ in range(2)]) * np.array([1, 3])[:, None, None, None]
    )

    def merge(stacks):
        return jax.lax.map(lambda stack: methods["relative"](stack, rank=RANK).merged, stacks)

    over_layers = jax.shard_map(
        merge, mesh=mesh, in_specs=P("layers"), out_specs=P("layers"), axis_names={"layers"}, check_vma=False
    )
    placed = jax.device_put(batch, NamedSharding(mesh, P("layers", None, "rows")))
    with jax.set_mesh(mesh):
        compiled = jax.jit(over_layers, out_shardings=NamedSharding(mesh, P("layers", "rows"))).lower(placed).compile()
    found = compiled(placed)
    assert found.sharding.spec == P("layers", "rows")
    np.testing.assert_allclose(found, jax.jit(merge)(batch), atol=1e-11)
    assert max(size for _, size in list_collectives(compiled.as_text())) < TALL[0] * TALL[1]
