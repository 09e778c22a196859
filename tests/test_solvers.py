"""The small quadratic programs against independent oracles.

The oracles are quadprog, SciPy's NNLS on the rows themselves (which never forms a
Gramian), enumeration of supports, closed forms, and optimality conditions written out
in NumPy. Errors are relative to the squared norm of the smallest present row.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import quadprog
from scipy.optimize import nnls

from mtl_optax.solvers import (
    SolverInfo,
    _sorted_rows,
    min_norm_point,
    simplex_qp,
    sorted_rows,
)

pytestmark = pytest.mark.filterwarnings("error")


def x64():
    """64-bit mode as a context."""
    try:
        from jax import enable_x64
    except ImportError:
        from jax.experimental import enable_x64
    return enable_x64(True)


@functools.cache
def batched_min_norm():
    return jax.jit(jax.vmap(lambda g, m: min_norm_point(g, task_mask=m)))


@functools.cache
def batched_qp():
    return jax.jit(jax.vmap(lambda q, c, a: simplex_qp(q, c, constraint=a)))


def in_chunks(solve, *args, chunk=40):
    """`solve` on batches of one size, so that every number of tasks compiles once."""
    number = len(args[0])
    parts = []
    for start in range(0, number, chunk):
        take = np.minimum(np.arange(start, start + chunk), number - 1)
        parts.append(solve(*(jnp.asarray(a)[take] for a in args)))
    return jax.tree.map(lambda *p: np.concatenate(p)[:number].copy(), *parts)


def min_norm_points(gramians, masks=None):
    if masks is None:
        masks = np.ones(gramians.shape[:2], bool)
    return in_chunks(batched_min_norm(), gramians, masks)


def simplex_qps(quadratics, linears, constraints=None):
    if constraints is None:
        constraints = np.ones_like(linears)
    return in_chunks(batched_qp(), quadratics, linears, constraints)


# --------------------------------------------------------------------------- problems


def rows_of(family, size, rng):
    """A `[T, P]` matrix of task gradients, in float64."""
    width = max(2 * size, 6)
    rows = rng.standard_normal((size, width))
    rank = rng.integers(1, size + 1)
    low = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, width))
    if family == "plain":
        pass
    elif family == "conflict":
        rows -= 0.9 * rows.mean(0)
    elif family == "inside":  # zero is in the hull, all weights positive
        rows -= rows.mean(0) if size > 1 else 0
    elif family == "face":  # zero is in the hull of all but the last row
        if size > 2:
            rows[:-1] -= rows[:-1].mean(0)
    elif family == "low rank":
        rows = low
    elif family == "low rank, agreeing":
        rows = low + rng.standard_normal(width)
    elif family == "near duplicates":
        base = rng.standard_normal((max(1, size // 3), width))
        noise = 10 ** rng.uniform(-7, -1)
        rows = base[rng.integers(0, len(base), size)] + noise * rows
    elif family == "agreeing":
        rows += 10 ** rng.uniform(0, 4) * rng.standard_normal(width)
    elif family == "parallel":
        rows = np.abs(rng.standard_normal((size, 1))) * rows[:1]
        rows *= 10 ** rng.uniform(0, 6, (size, 1))
    elif family == "lengths":
        rows *= 10 ** rng.uniform(0, 6, (size, 1))
    elif family == "lengths, conflict":
        rows -= 0.9 * rows.mean(0)
        rows *= 10 ** rng.uniform(0, 6, (size, 1))
    elif family == "one tiny":
        rows -= rows.mean(0) if size > 1 else 0
        rows[0] = 1e-5 * rng.standard_normal(width)
    elif family == "integers":
        rows = rng.integers(-2, 3, (size, 4)).astype(float)
        rows[np.abs(rows).sum(1) == 0] = 1
    else:
        raise ValueError(family)
    return rows * 10 ** rng.uniform(-10, 10)


FAMILIES = (
    "plain",
    "conflict",
    "inside",
    "face",
    "low rank",
    "low rank, agreeing",
    "near duplicates",
    "agreeing",
    "parallel",
    "lengths",
    "lengths, conflict",
    "one tiny",
    "integers",
)


def draws(size, number, dtype, seed=0):
    """`number` problems of every family: float64 rows and Gramians in `dtype`."""
    rng = np.random.default_rng(seed)
    rows = [rows_of(f, size, rng) for f in FAMILIES for _ in range(number)]
    rows = [r.astype(dtype) for r in rows]
    gramians = np.stack([r @ r.T for r in rows])
    return [r.astype(np.float64) for r in rows], gramians


# ---------------------------------------------------------------------------- oracles


def excess(rows, weights, best):
    """How far the squared norm is from its minimum, in units of the smallest row."""
    shortest = np.linalg.norm(rows, axis=1).min()
    return np.sum((weights @ (rows / shortest)) ** 2) - best


def least_norm(rows):
    """`(minimum, weights)` from non-negative least squares on the rows.

    For unit rows U and a = min norm / norm, argmin |U^T z|^2 + (a^T z - 1)^2 over
    z >= 0 is a positive multiple of the minimiser on a^T y = 1.
    """
    norms = np.linalg.norm(rows, axis=1)
    unit, normal = rows / norms[:, None], norms.min() / norms
    matrix = np.concatenate([unit.T, normal[None]])
    target = np.zeros(len(matrix))
    target[-1] = 1
    y, _ = nnls(matrix, target, maxiter=30 * len(rows) + 100)
    y /= normal @ y
    return np.sum((y @ unit) ** 2), y * normal


def enumerate_supports(gramian):
    """The minimum over all supports, by brute force, `gramian` of norm about one."""
    size = len(gramian)
    best = np.inf
    for count in range(1, size + 1):
        for support in map(list, itertools.combinations(range(size), count)):
            system = np.ones((count + 1, count + 1))
            system[:-1, :-1] = gramian[np.ix_(support, support)]
            system[-1, -1] = 0
            w = np.linalg.lstsq(system, np.eye(count + 1)[-1], rcond=1e-12)[0][:-1]
            if w.min() >= 0 and abs(w.sum() - 1) < 1e-9:
                best = min(best, w @ gramian[np.ix_(support, support)] @ w)
    return best


def kkt_violation(rows, weights):
    """Optimality of the point of smallest norm, on the rows and in float64.

    Wolfe's test: with x = J^T w, x^T g_t >= x^T x for all t, and equal where w_t > 0.
    Both are taken per unit of row t and of the smallest row.
    """
    norms = np.linalg.norm(rows, axis=1)
    shortest = norms.min()
    y = weights * norms / shortest
    point = weights @ (rows / shortest)
    slack = (rows / norms[:, None]) @ point - point @ point * shortest / norms
    return np.max(np.abs(np.minimum(y, slack))) / y.sum()


# ----------------------------------------------------------------------------- sweeps


def check_sweep(size, number, dtype, tolerance, kkt, seed=0):
    rows, gramians = draws(size, number, dtype, seed)
    weights, info = min_norm_points(gramians)
    assert weights.dtype == info.residual.dtype == dtype
    weights = weights.astype(np.float64)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=8 * np.finfo(dtype).eps)
    weights /= weights.sum(1, keepdims=True)
    assert np.max(info.residual) < kkt
    assert np.max(info.iterations) <= size + 20
    for k, (matrix, w) in enumerate(zip(rows, weights, strict=True)):
        family = FAMILIES[k // number]
        assert excess(matrix, w, least_norm(matrix)[0]) < tolerance, (family, k)
        # Rounding of the float32 weights themselves is in this one.
        assert kkt_violation(matrix, w) < kkt, (family, k)


@pytest.mark.parametrize(
    ("size", "number"), [(1, 2), (2, 40), (3, 80), (5, 40), (16, 12), (64, 2)]
)
def test_min_norm_point_in_float32(size, number):
    check_sweep(size, number, np.float32, 1e-5, 1e-5)


@pytest.mark.parametrize(("size", "number"), [(2, 20), (5, 40)])
def test_min_norm_point_in_float64(size, number):
    with x64():
        check_sweep(size, number, np.float64, 1e-10, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("size", "number"), [(3, 300), (5, 200), (8, 150), (40, 8), (128, 1)]
)
def test_min_norm_point_in_float32_at_length(size, number, seed):
    check_sweep(size, number, np.float32, 1e-5, 1e-5, seed + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "number"), [(5, 200), (16, 60), (40, 6), (128, 1)])
def test_min_norm_point_in_float64_at_length(size, number):
    with x64():
        check_sweep(size, number, np.float64, 1e-10, 1e-11, 1)


@pytest.mark.parametrize("spoil", ["uniform", "moved", "vertex"])
def test_the_checks_notice_wrong_weights(spoil):
    rng = np.random.default_rng(0)
    rows = rows_of("lengths", 5, rng)
    best, right = least_norm(rows)
    wrong = {
        "uniform": np.full(5, 0.2),
        "moved": right + 1e-2 * right.max() * (np.eye(5)[right.argmax()] - right),
        "vertex": np.eye(5)[np.linalg.norm(rows, axis=1).argmin()],
    }[spoil]
    assert excess(rows, right, best) < 1e-12
    assert kkt_violation(rows, right) < 1e-12
    assert excess(rows, wrong, best) > 1e-5
    assert kkt_violation(rows, wrong) > 1e-5


def test_against_every_support():
    with x64():
        rng = np.random.default_rng(5)
        for size in (2, 5):
            rows = [rows_of(f, size, rng) for f in FAMILIES[:6] for _ in range(5)]
            rows = [r / np.abs(r).max() for r in rows]
            weights, _ = min_norm_points(np.stack([r @ r.T for r in rows]))
            for matrix, w in zip(rows, weights, strict=True):
                found = np.sum((w @ matrix) ** 2)
                assert abs(found - enumerate_supports(matrix @ matrix.T)) < 1e-10


def test_cancelling_large_rows_are_as_good_as_the_rounded_gramian_allows():
    """Two large rows that nearly cancel, and a tiny one: error of `eps * mass**2`."""
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(300):
        r = rng.standard_normal((3, 6))
        noise = 10 ** rng.uniform(-8, -1)
        r[1] = -r[0] * 10 ** rng.uniform(-2, 2) + noise * r[1]
        r[2] *= 10 ** rng.uniform(-6, 0)
        rows.append(r)
    gramians = np.stack([r @ r.T for r in rows]).astype(np.float32)
    weights, info = min_norm_points(gramians)
    assert np.max(info.residual) < 1e-5
    eps = np.finfo(np.float32).eps
    for r, w in zip(rows, weights.astype(np.float64), strict=True):
        w /= w.sum()
        best, right = least_norm(r)
        norms = np.linalg.norm(r, axis=1)
        mass = max(w @ norms, right @ norms) / norms.min()
        assert excess(r, w, best) < 4 * eps * mass**2
        # Never worse than the smallest row by itself.
        assert excess(r, w, 0) < 1 + 4 * eps * mass


def random_qp(size, rng):
    factor = rng.standard_normal((size, size + 1))
    quadratic = factor @ factor.T / size + 0.01 * np.eye(size)
    return quadratic, rng.standard_normal(size), 10 ** rng.uniform(-1, 1, size)


@pytest.mark.parametrize("size", [2, 5, pytest.param(16, marks=pytest.mark.slow)])
def test_simplex_qp_against_quadprog(size):
    rng = np.random.default_rng(size)
    problems = [random_qp(size, rng) for _ in range(40)]
    inputs = [np.stack(part) for part in zip(*problems, strict=True)]
    with x64():
        weights, info = simplex_qps(*inputs)
        assert np.max(info.residual) < 1e-12
    weights32, info32 = simplex_qps(*(part.astype(np.float32) for part in inputs))
    assert weights32.dtype == jnp.float32
    assert np.max(info32.residual) < 1e-5
    for k, (quadratic, linear, normal) in enumerate(problems):
        bounds = np.concatenate([normal[:, None], np.eye(size)], axis=1)
        target = np.eye(size + 1)[0]
        right = quadprog.solve_qp(quadratic, -linear, bounds, target, meq=1)[0]
        np.testing.assert_allclose(weights[k], right, rtol=0, atol=1e-10)
        np.testing.assert_allclose(normal @ weights[k], 1, rtol=1e-13)
        np.testing.assert_allclose(weights32[k], right, rtol=0, atol=1e-3)

        def value(w, quadratic=quadratic, linear=linear):
            return w @ quadratic @ w / 2 + linear @ w

        scale = max(np.max(np.diag(quadratic) / normal**2), np.max(linear / normal))
        w32 = np.asarray(weights32[k], np.float64)
        w32 /= normal @ w32
        assert value(w32) - value(right) < 1e-6 * scale


def test_min_norm_weights_against_quadprog():
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((40, 5, 20)) * 10 ** rng.uniform(0, 2, (40, 5, 1))
    with x64():
        weights, _ = min_norm_points(rows @ rows.swapaxes(1, 2))
    for w, matrix in zip(weights, rows, strict=True):
        bounds = np.concatenate([np.ones((5, 1)), np.eye(5)], axis=1)
        gramian = matrix @ matrix.T
        right = quadprog.solve_qp(gramian, np.zeros(5), bounds, np.eye(6)[0], 1)[0]
        np.testing.assert_allclose(w, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("spread", [1.0, 1e-6, 1e-15])
@pytest.mark.parametrize("size", [2, 5, pytest.param(16, marks=pytest.mark.slow)])
def test_minimum_enclosing_ball(size, spread):
    """Centred unit gradients that are nearly equal: a tiny `K`, and a dual gap of zero.

    The dual value at w is a lower bound of the squared radius, and the largest distance
    from J^T w an upper one, so their difference bounds the error of both.
    """
    rng = np.random.default_rng(size)
    points = rng.standard_normal((40, size, size + 2))
    points[::3, size // 2] = points[::3, 0]  # duplicates
    points = spread * (points - points.mean(1, keepdims=True))
    gramians = (points @ points.swapaxes(1, 2)).astype(np.float32)
    linear = -np.diagonal(gramians, axis1=1, axis2=2) / 2
    weights, info = simplex_qps(gramians, linear)
    assert np.max(info.residual) < 1e-5
    for matrix, w in zip(points / spread, weights.astype(float), strict=True):
        w /= w.sum()
        centre = w @ matrix
        lower = w @ np.sum(matrix**2, 1) - centre @ centre
        upper = np.max(np.sum((matrix - centre) ** 2, 1))
        assert upper - lower <= 2e-6 * np.max(np.sum(matrix**2, 1))


# ------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("value", [4.0, 0.0, 1e-20, 1e20])
def test_one_task(value):
    weights, info = min_norm_point(jnp.array([[value]]))
    assert weights.tolist() == [1.0]
    assert info.residual == 0


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    ("gramian", "expected"),
    [
        ([[1, 0], [0, 4]], [0.8, 0.2]),
        ([[1, 2], [2, 4]], [1, 0]),  # parallel
        ([[4, 2], [2, 1]], [0, 1]),
        ([[1, -3], [-3, 9]], [0.75, 0.25]),  # opposite
        ([[1, 1], [1, 1]], [0.5, 0.5]),  # identical
        ([[0, 0], [0, 0]], [0.5, 0.5]),
        ([[0, 0], [0, 3]], [1, 0]),
        ([[1e-12, 0], [0, 1]], [1 / (1 + 1e-12), 1e-12 / (1 + 1e-12)]),
        ([[1e-12, -1e-6], [-1e-6, 1]], [1 / (1 + 1e-6), 1e-6 / (1 + 1e-6)]),
    ],
)
def test_two_tasks_in_closed_form(gramian, expected, scale):
    weights, info = min_norm_point(jnp.array(gramian, jnp.float32) * scale)
    np.testing.assert_allclose(weights, expected, rtol=3e-7)
    assert info.residual < 1e-6


@pytest.mark.parametrize("size", [2, 3, 5])
def test_no_gradient_at_all_gives_equal_weights(size):
    weights, info = min_norm_point(jnp.zeros((size, size)))
    np.testing.assert_allclose(weights, 1 / size, rtol=1e-6)
    assert info.residual == 0


def test_zero_rows_take_all_the_weight():
    rows = jnp.array([[1.0, 2], [0, 0], [-3, 1], [0, 0], [5, 5]])
    gramian = rows @ rows.T
    weights, info = min_norm_point(gramian)
    assert weights.tolist() == [0, 0.5, 0, 0.5, 0]
    assert info.residual == 0
    mask = jnp.array([True, True, True, False, True])
    weights, _ = min_norm_point(gramian, task_mask=mask)
    assert weights.tolist() == [0, 1, 0, 0, 0]
    # The absent zero rows don't count.
    mask = jnp.array([True, False, True, False, True])
    weights, _ = min_norm_point(gramian, task_mask=mask)
    expected, _ = min_norm_point(gramian[::2, ::2])
    np.testing.assert_allclose(weights[::2], expected, atol=1e-6)


@pytest.mark.parametrize("size", [3, 5])
def test_identical_rows_share_evenly(size):
    row = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    weights, info = min_norm_point(jnp.full((size, size), row @ row))
    np.testing.assert_allclose(weights, 1 / size, rtol=1e-5)
    assert info.residual < 1e-6


def test_duplicates_share_the_weight_of_the_original():
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((3, 7))
    copies = rows[[0, 1, 1, 2, 2]]
    weights, info = min_norm_point(jnp.asarray(copies @ copies.T, jnp.float32))
    right = least_norm(rows)[1]
    merged = [weights[0], weights[1] + weights[2], weights[3] + weights[4]]
    np.testing.assert_allclose(merged, right, atol=1e-5)
    assert info.residual < 1e-6


def test_a_linear_programme():
    weights, info = simplex_qp(jnp.zeros((5, 5)), jnp.array([3.0, 1, 2, 1, 4]))
    # Of several solutions the one between them.
    np.testing.assert_allclose(weights, [0, 0.5, 0, 0.5, 0], atol=2e-3)
    np.testing.assert_allclose(weights[np.array([0, 2, 4])], 0, atol=1e-6)
    assert info.residual < 1e-6


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 1e30, 0.0])
def test_masked_is_absent(junk):
    rng = np.random.default_rng(4)
    number, size = 20, 5
    rows = rng.standard_normal((number, size, 6)).astype(np.float32)
    rows *= 10 ** rng.uniform(0, 3, (number, size, 1)).astype(np.float32)
    masks = rng.random((number, size)) < 0.6
    gramians = rows @ rows.swapaxes(1, 2)
    dirty = np.where(masks[:, :, None] & masks[:, None, :], gramians, junk)
    weights, info = min_norm_points(dirty, masks)
    assert np.max(info.residual) < 1e-5
    for k, mask in enumerate(masks):
        assert np.all(weights[k][~mask] == 0)
        if mask.any():
            w = weights[k].astype(np.float64)[mask]
            present = rows[k][mask].astype(np.float64)
            right = least_norm(present)[1]
            assert abs(w.sum() - 1) < 1e-6
            np.testing.assert_allclose(w, right, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_masked(size):
    gramian = jnp.full((size, size), jnp.nan)
    weights, info = min_norm_point(gramian, task_mask=jnp.zeros(size, bool))
    assert weights.tolist() == [0.0] * size
    assert info.residual == 0


@pytest.mark.parametrize("size", [1, 2, 5])
def test_masked_linear_term_and_constraint(size):
    keep = np.arange(size) == 0
    junk = jnp.where(jnp.asarray(keep), 2.0, jnp.nan)
    weights, info = simplex_qp(
        jnp.eye(size), junk, constraint=junk, task_mask=jnp.asarray(keep)
    )
    np.testing.assert_allclose(weights, 0.5 * keep)
    assert info.residual < 1e-6


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_present_task_gives_nan_and_ends(size, bad):
    gramian = np.eye(size, dtype=np.float32)
    gramian[-1, 0] = gramian[0, -1] = bad
    weights, info = min_norm_point(jnp.asarray(gramian))
    assert np.all(np.isnan(weights))
    assert np.isnan(info.residual)
    assert info.iterations <= 4 * size + 32


# ----------------------------------------------------------------------- invariances


@pytest.mark.parametrize("power", [-100, -66, 66, 100])
def test_scale_changes_nothing(power):
    """Powers of two are exact, so that the weights are equal bit for bit."""
    _, gramians = draws(5, 2, np.float32)
    gramians = np.stack([g / np.abs(g).max() for g in gramians]).astype(np.float32)
    gramians = gramians[[np.diag(g).min() > 1e-7 for g in gramians]]
    scaled = gramians * np.float32(2.0**power)
    expected, info = min_norm_points(gramians)
    weights, scaled_info = min_norm_points(scaled)
    np.testing.assert_array_equal(weights, expected)
    np.testing.assert_array_equal(info.residual, scaled_info.residual)
    linear = np.random.default_rng(0).standard_normal(gramians.shape[:2])
    linear = linear.astype(np.float32)
    expected, _ = simplex_qps(gramians, linear)
    weights, _ = simplex_qps(scaled, linear * np.float32(2.0**power))
    np.testing.assert_array_equal(weights, expected)


def test_permuting_tasks_permutes_weights():
    rng = np.random.default_rng(8)
    rows = rng.standard_normal((20, 5, 8)) * 10 ** rng.uniform(0, 3, (20, 5, 1))
    gramians = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    order = rng.permutation(5)
    weights, _ = min_norm_points(gramians)
    permuted, _ = min_norm_points(gramians[:, order][:, :, order])
    np.testing.assert_allclose(permuted, weights[:, order], atol=2e-6)


def test_a_symmetric_problem_has_symmetric_weights():
    """Rows at equal angles round a cone, and rows round a circle (zero inside)."""
    angles = 2 * np.pi * np.arange(5) / 5
    circle = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    for rows in (circle, circle + np.array([0, 0, 0.3])):
        weights, _ = min_norm_point(jnp.asarray(rows @ rows.T, jnp.float32))
        np.testing.assert_allclose(weights, 0.2, atol=1e-5)


def test_shifting_the_linear_term_changes_nothing():
    rng = np.random.default_rng(9)
    quadratic, linear, normal = random_qp(5, rng)
    with x64():
        weights, _ = simplex_qps(
            np.stack([quadratic] * 2),
            np.stack([linear, linear + 7 * normal]),
            np.stack([normal] * 2),
        )
    np.testing.assert_allclose(weights[0], weights[1], atol=1e-12)


# --------------------------------------------------------------------- inside a graph


def test_vmap_jit_scan_and_eager_agree():
    _, gramians = draws(5, 3, np.float32)
    gramians = jnp.asarray(gramians)
    together, info = min_norm_points(gramians)

    @jax.jit
    def scanned(gramians):
        def body(carry, gramian):
            weights, info = min_norm_point(gramian)
            return carry + info.iterations, (weights, info)

        return jax.lax.scan(body, jnp.zeros((), jnp.int32), gramians)

    total, (one_by_one, info_one) = scanned(gramians)
    # Not unique where zero is in the hull of many supports: compare the points too.
    np.testing.assert_array_equal(info.iterations >= 1, info_one.iterations >= 1)
    assert total == np.sum(info_one.iterations)
    scale = jnp.sqrt(jnp.diagonal(gramians, axis1=1, axis2=2))
    mass = (together - one_by_one) * scale / scale.min(1, keepdims=True)
    unique = np.isin(np.arange(len(gramians)) // 3, [0, 1, 7, 8, 9, 10])
    assert np.max(np.abs(mass[unique])) < 1e-3
    assert np.max(info_one.residual) < 1e-5
    jitted = jax.jit(min_norm_point)
    for k in (0, 4, 11):
        eager, eager_info = min_norm_point(gramians[k])
        np.testing.assert_allclose(eager, one_by_one[k], atol=1e-6)
        np.testing.assert_allclose(jitted(gramians[k])[0], eager, atol=1e-6)
        assert isinstance(eager_info, SolverInfo)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_types_are_fixed(size):
    ones = jnp.ones(size)
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        for weights, info in (
            jax.eval_shape(min_norm_point, jnp.eye(size)),
            jax.eval_shape(simplex_qp, jnp.eye(size), ones),
        ):
            assert weights.dtype == info.residual.dtype == jnp.float32
            assert info.iterations.dtype == jnp.int32
            assert info.residual.shape == info.iterations.shape == ()
            assert not any(v.weak_type for v in jax.tree.leaves((weights, info)))


def test_the_graph_does_not_grow_with_the_tasks():
    counts = {}
    for size in (4, 64):
        jaxpr = jax.make_jaxpr(min_norm_point)(jnp.eye(size)).jaxpr
        counts[size] = sum(1 for _ in laws.equations(jaxpr))
    assert counts[4] == counts[64]


def test_every_product_has_full_precision():
    jaxpr = jax.make_jaxpr(min_norm_point)(jnp.eye(4)).jaxpr
    products = [e for e in laws.equations(jaxpr) if e.primitive.name == "dot_general"]
    assert products
    highest = jax.lax.Precision.HIGHEST
    for product in products:
        assert product.params["precision"] in (highest, (highest, highest))


@pytest.mark.parametrize(
    ("quadratic", "linear"),
    [((3, 2), 3), ((3,), 3), ((3, 3), 2), ((0, 0), 0)],
)
def test_wrong_shapes_are_refused(quadratic, linear):
    with pytest.raises((TypeError, ValueError)):
        simplex_qp(jnp.ones(quadratic), jnp.ones(linear))


def test_wrong_types_are_refused():
    with pytest.raises((TypeError, ValueError)):
        min_norm_point(jnp.eye(3, dtype=jnp.int32))
    with pytest.raises((TypeError, ValueError), match="float32"):
        min_norm_point(jnp.eye(3, dtype=jnp.bfloat16))
    with pytest.raises((TypeError, ValueError)):
        min_norm_point(jnp.eye(3), task_mask=jnp.ones(4, bool))


# ------------------------------------------------------------------------ sorted rows


@pytest.mark.parametrize("count", range(1, 13))
def test_the_network_sorts_all_zeros_and_ones(count):
    # By the 0-1 principle it then sorts everything.
    rows = list(np.array(list(itertools.product([0, 1], repeat=count))).T)
    for i, j in _sorted_rows._network(count):
        rows[i], rows[j] = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
    assert np.all(np.diff(rows, axis=0) >= 0)


@pytest.mark.parametrize("count", [1, 2, 13, 40])
@pytest.mark.parametrize("jit", [True, False])
def test_rows_are_sorted_with_nan_last(count, jit):
    rng = np.random.default_rng(count)
    kinds = ((5000,), "float32"), ((2, 3), "int32"), ((), "float32"), ((5000,), "int32")
    arrays = [
        rng.integers(-9, 9, (count, *shape)).astype(dtype) for shape, dtype in kinds
    ]
    for value, changed in ((3, np.nan), (4, np.inf), (5, -np.inf)):
        arrays[0][arrays[0] == value] = changed
    sort = jax.jit(sorted_rows) if jit else sorted_rows
    found = sort([jnp.asarray(x) for x in arrays])
    for x, rows in zip(arrays, found, strict=True):
        np.testing.assert_array_equal(np.stack(rows), np.sort(x, axis=0))
        assert {row.dtype for row in rows} == {x.dtype}
    narrow = jnp.asarray(arrays[0]).astype(jnp.bfloat16)
    (rows,) = sort([narrow])
    wanted = np.sort(narrow.astype(np.float32), axis=0)
    np.testing.assert_array_equal(np.stack(rows).astype(np.float32), wanted)


def test_large_arrays_are_sorted_by_comparing_rows(monkeypatch):
    sizes = [5, 9000, 5000, 6000]

    def sizes_sorted_by_jax(count):
        arrays = [jnp.zeros((count, size)) for size in sizes]

        def sort(arrays):  # anew each time, or JAX remembers what it traced
            return sorted_rows(arrays)

        traced = jax.make_jaxpr(sort)(arrays)
        sorts = [eqn for eqn in traced.eqns if "sort" in str(eqn)]
        return [eqn.invars[0].aval.size // count for eqn in sorts]

    assert sizes_sorted_by_jax(3) == [5]
    assert sizes_sorted_by_jax(40) == [5]
    assert sizes_sorted_by_jax(65) == sizes
    monkeypatch.setattr(
        _sorted_rows, "_COMPARISONS", 2 * len(_sorted_rows._network(40))
    )
    assert sizes_sorted_by_jax(40) == [5, 5000]
