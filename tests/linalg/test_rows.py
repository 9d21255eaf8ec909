"""Matrices divided over the devices of a mesh axis: decomposed as whole ones are, without ever being whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from linalg.matrices import check_truncated_svd, slow_decay, with_singular_values
from mesh.problems import list_collectives, make_mesh
from rgsp_jax.linalg import ROWS, cholesky_qr, polar_factor, principal_angles, rows_divided, truncated_svd, tsqr
from rgsp_jax.linalg import svd_algorithms as algorithms
from rgsp_jax.linalg.dense import multiply_factors, project_out
from rgsp_jax.linalg.rows import LEAST_ENTRIES, count_parts, is_divided
from rgsp_jax.linalg.solve import solve_for_rows

RANK = 7
EPS = {name: float(np.finfo(name).eps) for name in ("float32", "float64")}
SPECTRA = {
    "slow decay": slow_decay,
    "zero": lambda n: np.zeros(0),
    "rank three": lambda n: [1.0, 0.5, 0.1],
    "equal": np.ones,
    "steep": lambda n: np.logspace(0, -12, n),
    "one giant": lambda n: [1e6, *slow_decay(n - 1)],
}
slow = pytest.mark.slow


def on_mesh(function, mesh):
    """The function, compiled and called under a mesh."""
    compiled = jax.jit(function)

    def call(*arguments):
        with jax.set_mesh(mesh):
            return compiled(*arguments)

    return call


def test_the_ambient_mesh_decides():
    assert not rows_divided() and count_parts() == 1
    with jax.set_mesh(make_mesh(layers=8)):
        assert not rows_divided()
    with jax.set_mesh(make_mesh(layers=8, rows=1)):
        assert not rows_divided()
    mesh = make_mesh(layers=2, rows=4)
    with jax.set_mesh(mesh):
        assert count_parts() == 4
        assert is_divided(LEAST_ENTRIES, 1) and not is_divided(LEAST_ENTRIES - 1, 1)
        seen = []
        for names in ({"layers"}, {"rows"}, {"layers", "rows"}):
            look = jax.shard_map(
                lambda x: seen.append(count_parts()) or x,
                in_specs=P(),
                out_specs=P(),
                axis_names=names,
                check_vma=False,
            )
            jax.jit(look)(jnp.zeros(1))
        assert seen == [4, 1, 1]  # a device inside a map over rows has what it was given


def test_one_function_has_a_trace_for_each_mesh():
    traces = []
    f = jax.jit(lambda x: traces.append(count_parts()) or x)
    for _ in range(2):
        f(jnp.zeros(1))
        with jax.set_mesh(make_mesh(rows=8)):
            f(jnp.zeros(1))
    assert traces == [1, 8]


def test_an_axis_of_the_wrong_type_is_refused():
    mesh = jax.make_mesh((8,), (ROWS,), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="must be of type Auto"):
        rows_divided()


def run_parts(kernel, x, parts, outputs):
    mesh = make_mesh(rows=parts)
    return jax.jit(jax.shard_map(kernel, mesh=mesh, in_specs=P(ROWS), out_specs=outputs, check_vma=False))(x)


@pytest.mark.parametrize("factorise", [tsqr, lambda x, axis: cholesky_qr(x, axis)], ids=["tsqr", "cholesky_qr"])
@pytest.mark.parametrize("parts, rows, columns", [(8, 64, 5), (6, 54, 7), (8, 48, 40), (5, 40, 33)])
def test_qr_of_parts(factorise, parts, rows, columns):
    """Also parts shorter than wide, and any number of them; deficient and zero matrices get orthonormal columns."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, columns))
    deficient = x.copy()
    deficient[:, 1], deficient[:, 3] = deficient[:, 0], 0
    true = rows - 3  # the last rows are padding: nothing may be completed there
    for matrix in (x, x * np.logspace(0, -11, columns), deficient, np.zeros_like(x)):
        matrix = matrix * (np.arange(rows) < true)[:, None]
        q, r = run_parts(lambda part: factorise(part, ROWS), matrix, parts, (P(ROWS), P()))
        np.testing.assert_allclose(q.T @ q, np.eye(columns), atol=1e-12)
        np.testing.assert_allclose(q @ r, matrix, atol=1e-12)
        np.testing.assert_allclose(r, np.triu(r), atol=1e-14)
        assert not np.any(q[true:])


def test_tsqr_wants_a_long_matrix():
    with pytest.raises(ValueError, match="8 parts of 2 x 17"):
        run_parts(lambda part: tsqr(part, ROWS)[1], np.zeros((16, 17)), 8, P())


def test_tsqr_passes_on_triangles_only():
    mesh = make_mesh(rows=8)
    mapped = jax.jit(
        jax.shard_map(lambda x: tsqr(x, ROWS), mesh=mesh, in_specs=P(ROWS), out_specs=(P(ROWS), P()), check_vma=False)
    )
    found = list_collectives(mapped.lower(jnp.zeros((800, 10))).compile().as_text())
    assert found == [("collective-permute", 100)] * 3


@functools.cache
def solve_on_mesh(algorithm, parts):
    return on_mesh(lambda w: truncated_svd(w, RANK, algorithm=algorithm), make_mesh(rows=parts))


@pytest.mark.parametrize(
    "m, n, algorithm, dtype",
    [
        (97, 61, "gram", "float32"),
        (61, 97, "subspace", "float32"),
        *(
            pytest.param(m, n, algorithm, dtype, marks=slow)
            for m, n in ((96, 64), (64, 96), (72, 72), (97, 61), (61, 97))
            for algorithm in ("full", "gram", "subspace", "auto")
            for dtype in ("float32", "float64")
            if (m, n, algorithm, dtype) not in {(97, 61, "gram", "float32"), (61, 97, "subspace", "float32")}
        ),
    ],
)
def test_svd_of_any_spectrum(m, n, algorithm, dtype):
    """Gram matrices that lose directions, blocks that break down: what holds for one device holds for eight."""
    for spectrum in SPECTRA.values():
        w = with_singular_values(m, n, spectrum(min(m, n)), seed=4).astype(dtype)
        result = solve_on_mesh(algorithm, 8)(w)
        check_truncated_svd(w, result, EPS[dtype], {"float32": 1e-5, "float64": 1e-12}[dtype])


def test_an_svd_is_divided_along_the_longer_side():
    tall = with_singular_values(96, 64, slow_decay(64))
    mesh = make_mesh(rows=8)
    for w, sides in ((tall, (P(ROWS), P())), (tall.T, (P(), P(ROWS)))):
        result = solve_on_mesh("gram", 8)(jax.device_put(w, NamedSharding(mesh, P(ROWS))))
        assert (result.u.sharding.spec, result.v.sharding.spec) == sides


def test_signs_are_the_same_on_every_mesh():
    w = with_singular_values(96, 64, slow_decay(64))
    ties = np.tile(w[:12], (8, 1))  # the largest entry of a column is there eight times
    for matrix in (w, w.T, ties):
        one, many = truncated_svd(matrix, RANK), solve_on_mesh("gram", 8)(matrix)
        for x, y in zip(one[:3], many[:3], strict=True):
            np.testing.assert_allclose(x, y, atol=1e-11)


def test_weights_that_are_not_finite_give_nan_on_all_devices():
    for bad in (np.nan, np.inf):
        w = with_singular_values(96, 64, slow_decay(64))
        w[80, 3] = bad
        assert all(np.isnan(x).all() for x in solve_on_mesh("gram", 8)(w))
        assert np.isnan(on_mesh(polar_factor, make_mesh(rows=8))(w)).all()


def test_lanczos_is_refused():
    with jax.set_mesh(make_mesh(rows=8)), pytest.raises(ValueError, match="takes whole matrices"):
        truncated_svd(jnp.ones((96, 64)), RANK, algorithm="lanczos")


def test_choice_over_parts():
    mesh = make_mesh(rows=8)

    def choice(m, n, rank, dtype=jnp.float32, tolerance=1e-5):
        chosen = {}

        def look(w):
            matrix = algorithms.TallMatrix(w, ROWS, m < n)
            chosen.update(algorithms.choose_algorithms(algorithms.Problem(matrix, rank, tolerance)))
            assert matrix.shape == (max(m, n), min(m, n))
            return w

        side = P(None, ROWS) if m < n else P(ROWS)
        mapped = jax.shard_map(look, mesh=mesh, in_specs=side, out_specs=side, check_vma=False)
        jax.eval_shape(mapped, jax.ShapeDtypeStruct((m, n), dtype))
        return set(chosen.values())

    assert choice(32768, 512, 64) == choice(512, 32768, 64) == {"gram"}
    assert choice(32768, 4096, 64) == choice(4096, 32768, 64) == {"subspace"}
    assert choice(4096, 4096, 2048) == {"gram"}
    assert choice(4096, 2048, 64, jnp.float64, 1e-12) == {"gram"}


def test_a_subspace_too_large_for_a_gram_matrix_has_no_other_way(monkeypatch):
    """Its residual says how near it came."""
    monkeypatch.setattr(algorithms, "_SMALL_SIDE", 8)
    monkeypatch.setattr(algorithms, "_AFFORDABLE_SIDE", 16)
    w = with_singular_values(120, 56, np.linspace(1, 0.6, 56)).astype(np.float32)
    mesh = make_mesh(rows=8)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda w: truncated_svd(w, 4, tolerance=1e-1)).lower(w).compile()
    result = compiled(w)
    check_truncated_svd(w, result, EPS["float32"], 1e-1)
    assert result.residual > 1e-3
    assert max(size for _, size in list_collectives(compiled.as_text())) <= 56 * 16


@pytest.mark.parametrize(
    "m, n, dtype",
    [(97, 61, "float32"), *(pytest.param(m, n, d, marks=slow) for m, n in ((61, 97), (72, 72)) for d in EPS)],
)
def test_polar_factor(m, n, dtype):
    factor = on_mesh(polar_factor, make_mesh(rows=8))
    for name, spectrum in SPECTRA.items():
        w = with_singular_values(m, n, spectrum(min(m, n)), seed=4).astype(dtype)
        one, many = polar_factor(w), factor(w)
        if name == "steep":  # the factor is as uncertain as the smallest singular value: a partial isometry either way
            projector = np.asarray(many, np.float64) @ np.asarray(many, np.float64).T
            np.testing.assert_allclose(projector @ projector, projector, atol=100 * EPS[dtype])
            continue
        condition = 1e6 if name == "one giant" else 10
        np.testing.assert_allclose(one, many, atol=(20 + condition) * EPS[dtype])


def test_batches_and_layers():
    ws = np.stack([with_singular_values(96, 64, f(64), seed=i) for i, f in enumerate(SPECTRA.values())])
    one = solve_on_mesh("gram", 8)
    looped = [one(w) for w in ws]
    batched = on_mesh(jax.vmap(lambda w: truncated_svd(w, RANK, algorithm="gram")), make_mesh(rows=8))(ws)
    for i, alone in enumerate(looped):
        np.testing.assert_allclose(batched.s[i], alone.s, atol=1e-12 * max(float(alone.s[0]), 1e-30))
        check_truncated_svd(ws[i], jax.tree.map(lambda x, i=i: x[i], batched), EPS["float64"], 1e-12)


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=slow)])
def test_gradients(order):
    """Through the SVD, what it discards included, and the polar factor; of second order forward over reverse."""
    w = jnp.asarray(with_singular_values(96, 64, 0.8 ** np.arange(64)))
    weight = jnp.asarray(np.random.default_rng(1).standard_normal((96, 64)))

    def loss(w):
        svd = truncated_svd(w, 3)
        low = jnp.matmul(svd.u * jnp.sqrt(svd.s)[None, :], svd.v.T)
        return jnp.sum(weight * low) + jnp.sum(weight[:, :5] * polar_factor(w[:, :5] + low[:, :5]))

    def along(w):
        return jax.jvp(jax.grad(loss), (w,), (weight,))[1]

    derivative = jax.grad(loss) if order == 1 else along
    one = jax.jit(derivative)(w)
    many = on_mesh(derivative, make_mesh(rows=8))(w)
    np.testing.assert_allclose(many, one, atol=1e-9 * float(jnp.max(jnp.abs(one))))


def test_pieces_on_a_mesh():
    """Angles, systems and products that treat divided matrices otherwise than whole ones."""
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((1001, 6)))[0] for _ in range(2))
    x, a = rng.standard_normal((40, 200)), rng.standard_normal((200, 200))
    left, right = rng.standard_normal((40, 30)), rng.standard_normal((200, 30))
    basis = np.linalg.qr(rng.standard_normal((40, 30)))[0]
    for function, *arguments in (
        (principal_angles, u, v),
        (solve_for_rows, a @ a.T + np.eye(200), x),
        (multiply_factors, left, right),
        (multiply_factors, left[:, :2], right[:, :2]),
        (project_out, basis, x),
    ):
        many = on_mesh(function, make_mesh(rows=8))(*arguments)
        np.testing.assert_allclose(many, function(*map(jnp.asarray, arguments)), atol=1e-10)
    np.testing.assert_allclose(multiply_factors(left, right), left @ right.T, atol=1e-12)
