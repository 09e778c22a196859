"""A linear term plus a norm on the simplex, against independent oracles.

The main one is weak duality: every point of the ball bounds the value from below and
every weight vector from above, so their gap bounds the error of both. It is taken on
the rows in float64, never on a Gramian. Others are quadprog inside a bisection, SciPy's
SLSQP on the primal problem, a closed form and published results of CAGrad.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import quadprog
from scipy.optimize import brentq, minimize

from mtl_optax.solvers import SolverInfo, simplex_norm

pytestmark = pytest.mark.filterwarnings("error")

CHUNK = 40
solve_one = laws.quick_jit(simplex_norm)


@functools.cache
def batched():
    return laws.quick_jit(
        jax.vmap(lambda g, q, r, m: simplex_norm(g, q, r, task_mask=m))
    )


def solved(gramians, linears, radii, masks=None):
    """Batches of one size, so that every number of tasks compiles once."""
    if masks is None:
        masks = np.ones(linears.shape, bool)
    parts = []
    for start in range(0, len(radii), CHUNK):
        take = np.minimum(np.arange(start, start + CHUNK), len(radii) - 1)
        args = (gramians, linears, radii, masks)
        parts.append(batched()(*(np.asarray(a)[take] for a in args)))
    return jax.tree.map(lambda *p: np.concatenate(p)[: len(radii)].copy(), *parts)


# --------------------------------------------------------------------------- problems


def rows_of(family, size, rng):
    width = max(2 * size, 6)
    rows = rng.standard_normal((size, width))
    if family == "conflict":
        rows -= 0.9 * rows.mean(0)
    elif family == "low rank":
        rank = rng.integers(1, size + 1)
        rows = rng.standard_normal((size, rank)) @ rng.standard_normal((rank, width))
    elif family == "near duplicates":
        base = rng.standard_normal((max(1, size // 3), width))
        rows = base[rng.integers(0, len(base), size)]
        rows = rows + 10 ** rng.uniform(-7, -1) * rng.standard_normal(rows.shape)
    elif family == "agreeing":
        rows += 10 ** rng.uniform(0, 3) * rng.standard_normal(width)
    elif family == "lengths":
        rows *= 10 ** rng.uniform(0, 4, (size, 1))
    elif family == "lengths, conflict":
        rows -= 0.9 * rows.mean(0)
        rows *= 10 ** rng.uniform(0, 6, (size, 1))
    elif family == "duplicate, opposite, zero":
        rows[size // 3] = rows[0]
        rows[2 * size // 3] = -3 * rows[0]
        rows[-1] *= rng.integers(2) if size > 1 else 1
    return rows * 10 ** rng.uniform(-8, 8)


FAMILIES = (
    "plain",
    "conflict",
    "low rank",
    "near duplicates",
    "agreeing",
    "lengths",
    "lengths, conflict",
    "duplicate, opposite, zero",
)


def draws(size, number, dtype, seed=0):
    """Rows, and what the solver sees, formed in `dtype`: the mean or any centre."""
    rng = np.random.default_rng(seed)
    rows, linears, radii = [], [], []
    for family, k in itertools.product(FAMILIES, range(number)):
        r = rows_of(family, size, rng).astype(dtype)
        mixture = np.full(size, 1 / size) if k % 2 else rng.standard_normal(size)
        centre = (mixture @ r).astype(dtype)
        rows.append(r.astype(np.float64))
        linears.append(r @ centre)
        radii.append(10 ** rng.uniform(-2, 1) * np.linalg.norm(centre))
    gramians = np.stack([r.astype(dtype) @ r.astype(dtype).T for r in rows])
    return rows, gramians, np.stack(linears), np.array(radii, dtype)


# ---------------------------------------------------------------------------- oracles


def gap_of(rows, linear, radius, weights):
    """How much the worst task falls short of the dual value.

    In shares of the most that a task can change, and times the square of
    |g_w| / sum_t w_t |g_t|, since rounding of the Gramian, that of |g_w|^2 above all,
    counts by as much more where the rows cancel.
    """
    weights = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    point = weights @ rows
    length = np.linalg.norm(point)
    gains = linear + radius * (rows @ point) / length
    scale = radius * norms + np.abs(linear)
    scale = np.where(scale > 0, scale, np.max(scale))
    gap = -np.min((gains - weights @ gains) / scale)
    return gap * (length / (weights @ norms)) ** 2


def shortest(rows, weights):
    """`|g_w|` in shares of `sum_t w_t |g_t|`."""
    norms = np.linalg.norm(rows, axis=1)
    weights = weights.astype(np.float64)
    return np.linalg.norm(weights @ rows) / max(weights @ norms, np.finfo(float).tiny)


def by_bisection(gramian, linear, radius):
    """The weights from quadprog, with `|g_w|` found by Brent's method."""
    size = len(linear)
    bounds = np.concatenate([np.ones((size, 1)), np.eye(size)], axis=1)
    target = np.eye(size + 1)[0]

    def weights(log):
        slope = linear * np.exp(log) / radius
        return quadprog.solve_qp(gramian, -slope, bounds, target, meq=1)[0]

    def excess(log):
        w = weights(log)
        return np.log(w @ gramian @ w) / 2 - log

    least = weights(-np.inf)
    least = np.log(least @ gramian @ least) / 2 - 1
    longest = np.log(np.diag(gramian).max()) / 2 + 1
    return weights(brentq(excess, least, longest, xtol=1e-14, rtol=1e-14))


def by_primal(rows, centre, radius):
    """`max_d min_t g_t^T d` over the ball, by SLSQP."""
    width = len(centre)
    found = minimize(
        lambda x: -x[-1],
        np.append(centre, np.min(rows @ centre)),
        jac=lambda x: -np.eye(width + 1)[-1],
        constraints=[
            {"type": "ineq", "fun": lambda x: rows @ x[:-1] - x[-1]},
            {
                "type": "ineq",
                "fun": lambda x: radius**2 - np.sum((x[:-1] - centre) ** 2),
            },
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return found.x[-1]


# ----------------------------------------------------------------------------- sweeps


def check_sweep(size, number, dtype, tolerance, seed=0):
    rows, gramians, linears, radii = draws(size, number, dtype, seed)
    weights, lengths, info = solved(gramians, linears, radii)
    assert weights.dtype == lengths.dtype == info.residual.dtype == dtype
    assert np.all(weights >= 0)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(weights.sum(1), 1, rtol=8 * eps)
    assert np.max(info.residual) < tolerance
    assert np.max(info.iterations) <= size + 24
    known = lengths > 0
    assert np.mean(known) > 0.5
    for k, (matrix, w) in enumerate(zip(rows, weights, strict=True)):
        case = FAMILIES[k // number], k
        cancelled = shortest(matrix, w)
        if not known[k]:
            # Zero, or not to be told from it (or the rest beside a zero row).
            beside_zero = np.any((w > 0.5) & ~np.any(matrix, axis=1))
            assert cancelled < 2 * np.sqrt(4 * size * eps) or beside_zero, case
            continue
        assert gap_of(matrix, linears[k], radii[k], w) < tolerance, case
        exact = np.linalg.norm(w.astype(float) @ matrix)
        error = abs(lengths[k] - exact) / exact
        assert error < 4 * size * eps / cancelled**2 + 20 * eps, case


@pytest.mark.parametrize(("size", "number"), [(1, 2), (2, 20), (3, 60), (16, 20)])
def test_in_float32(size, number):
    check_sweep(size, number, np.float32, 1e-5)


@pytest.mark.parametrize(("size", "number"), [(2, 20), (5, 60)])
def test_in_float64(size, number, x64):
    check_sweep(size, number, np.float64, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("size", "number"), [(3, 300), (8, 150), (40, 8), (128, 1)])
def test_in_float32_at_length(size, number, seed):
    check_sweep(size, number, np.float32, 1e-5, seed + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "number"), [(3, 300), (16, 60), (40, 8), (128, 1)])
def test_in_float64_at_length(size, number, x64):
    check_sweep(size, number, np.float64, 1e-10, 1)


def some_rows(number, size, seed, spread=2.0):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((number, size, size + 3)) - 0.2
    rows *= 10 ** rng.uniform(0, spread, (number, size, 1))
    centres = rows.mean(1)
    radii = 10 ** rng.uniform(-1, 1, number) * np.linalg.norm(centres, axis=1)
    return rows, centres, radii


def as_problem(rows, centres, radii):
    return rows @ rows.swapaxes(1, 2), (rows @ centres[..., None])[..., 0], radii


def test_against_quadprog_in_a_bisection(x64):
    rows, centres, radii = some_rows(40, 5, 1)
    gramians, linears, _ = problem = as_problem(rows, centres, radii)
    weights, lengths, _ = solved(*problem)
    for k in range(40):
        right = by_bisection(gramians[k], linears[k], radii[k])
        np.testing.assert_allclose(weights[k], right, rtol=0, atol=1e-7)
        exact = np.sqrt(right @ gramians[k] @ right)
        np.testing.assert_allclose(lengths[k], exact, rtol=1e-6)


def test_the_update_attains_the_dual_value(x64):
    """Strong duality, and SLSQP finds nothing better in the ball."""
    rows, centres, radii = some_rows(40, 5, 2, spread=1.0)
    weights, lengths, _ = solved(*as_problem(rows, centres, radii))
    assert np.all(lengths > 0)
    for k, (matrix, w) in enumerate(zip(rows, weights, strict=True)):
        update = centres[k] + radii[k] * (w @ matrix) / lengths[k]
        dual = w @ matrix @ centres[k] + radii[k] * lengths[k]
        scale = np.linalg.norm(matrix, axis=1).max() * radii[k]
        assert abs(np.min(matrix @ update) - dual) < 1e-6 * scale
        if k < 8:
            best = by_primal(matrix / 10, centres[k] / 10, radii[k] / 10) * 100
            assert abs(best - dual) < 1e-6 * scale


@pytest.mark.parametrize("radius", [0.01, 0.3, 3.0, 300.0])
def test_orthonormal_rows_in_closed_form(radius):
    """`w` is the positive part of `lam - q`, whose length is the radius."""
    linears = np.random.default_rng(3).standard_normal((10, 5))
    weights, lengths, _ = solved(
        np.broadcast_to(np.eye(5, dtype=np.float32), (10, 5, 5)),
        linears.astype(np.float32),
        np.full(10, radius, np.float32),
    )
    for q, w, length in zip(linears, weights, lengths, strict=True):

        def above(lam, q=q):
            return np.maximum(lam - q, 0)

        lam = brentq(
            lambda x: np.linalg.norm(above(x)) - radius, q.min(), q.max() + 400
        )
        right = above(lam) / np.sum(above(lam))
        np.testing.assert_allclose(w, right, atol=2e-6)
        np.testing.assert_allclose(length, np.linalg.norm(right), rtol=2e-6)


TWO = [[-4, 1, 1], [6, 1, 1]]
THREE = [*TWO, [1, -3, 2]]


@pytest.mark.parametrize(
    ("rows", "c", "expected"),
    [
        (TWO, 0.1, [0.83670, 1.04082, 1.04082]),
        (TWO, 0.4, [0.34680, 1.16330, 1.16330]),
        (TWO, 0.5, [0.18350, 1.20412, 1.20412]),
        (TWO, 1.0, [0, 2, 2]),
        (THREE, 0.4, [0.35901, -0.17309, 1.49358]),
        (THREE, 0.5, [0.19877, -0.13302, 1.53364]),
        (THREE, 1.0, [0, 0.58824, 2.35294]),
    ],
)
def test_published_updates_of_cagrad(rows, c, expected):
    rows = jnp.array(rows, jnp.float32)
    mean = rows.mean(0)
    radius = c * jnp.linalg.norm(mean)
    weights, length, info = solve_one(rows @ rows.T, rows @ mean, radius)
    update = mean + radius * weights @ rows / length
    np.testing.assert_allclose(update, expected, atol=2e-5)
    assert info.residual < 1e-6


@pytest.mark.parametrize("spoil", ["uniform", "moved", "vertex"])
def test_the_checks_notice_wrong_weights(spoil):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 8)) * 10 ** np.array([[2.0], [0], [1], [2], [1]])
    centre = rows.mean(0)
    linear, radius = rows @ centre, 3 * np.linalg.norm(centre)
    right = by_bisection(rows @ rows.T, linear, radius)
    wrong = {
        "uniform": np.full(5, 0.2),
        "moved": right + 1e-3 * (np.eye(5)[right.argmax()] - right),
        "vertex": np.eye(5)[np.linalg.norm(rows, axis=1).argmin()],
    }[spoil]
    assert gap_of(rows, linear, radius, right) < 1e-7
    assert gap_of(rows, linear, radius, wrong) > 1e-5


# ------------------------------------------------------------------------- edge cases


def found(rows, linear, radius, mask=None):
    rows = jnp.asarray(rows, jnp.float32)
    linear = jnp.asarray(linear, jnp.float32)
    mask = jnp.ones(len(rows), bool) if mask is None else jnp.asarray(mask)
    return solve_one(rows @ rows.T, linear, jnp.float32(radius), task_mask=mask)


@pytest.mark.parametrize("radius", [0.0, 1e-12, 1e-6])
def test_without_a_radius_it_is_a_linear_programme(radius):
    weights, length, info = found(np.eye(3), [3, 1, 2], radius)
    assert weights.tolist() == [0, 1, 0]
    assert length == 1
    weights, length, _ = found(np.eye(3), [1, 1, 2], radius)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=1e-6)
    np.testing.assert_allclose(length, np.sqrt(0.5), rtol=1e-6)
    assert info.residual < 1e-6


@pytest.mark.parametrize("radius", [1e-10, 1.0, 1e10])
def test_without_a_linear_term_it_is_the_point_of_smallest_norm(radius):
    weights, length, info = found([[1, 0], [0, 2], [3, 3]], [0, 0, 0], radius)
    np.testing.assert_allclose(weights, [0.8, 0.2, 0], atol=1e-6)
    np.testing.assert_allclose(length, np.sqrt(0.8), rtol=1e-6)
    assert info.residual < 1e-6


def test_zero_rows_take_part():
    rows = np.array([[1.0, 2], [0, 0], [3, 1]])
    mean = rows.mean(0)
    radius = 0.4 * np.linalg.norm(mean)
    # No task can do worse than one that nothing helps.
    weights, length, _ = found(rows, rows @ mean, radius)
    np.testing.assert_allclose(weights, [0, 1, 0], atol=1e-3)
    assert length == 0
    # Where another task loses all the same, that one counts.
    weights, length, _ = found(rows, [-9, 0, 9], 1)
    np.testing.assert_allclose(weights, [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(length, np.sqrt(5), rtol=1e-6)
    # All zero: the least of the linear term; and nothing at all.
    weights, length, _ = found(0 * rows, [3, 1, 2], 1)
    assert weights.tolist() == [0, 1, 0]
    assert length == 0
    for radius in (0, 1):
        weights, length, _ = found(0 * rows, [0, 0, 0], radius)
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
        assert length == 0


def test_opposite_rows_have_no_length():
    weights, length, info = found([[1, 2], [-1, -2], [9, 9]], [0.3, 0, 5], 1)
    np.testing.assert_allclose(weights, [0.5, 0.5, 0], atol=2e-3)
    assert length == 0
    assert info.residual < 1e-6


def test_identical_rows():
    weights, length, info = found([[1, 2]] * 3, [1, 1, 1], 1)
    np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(length, np.sqrt(5), rtol=1e-6)
    weights, _, info = found([[1, 2]] * 3, [1, 1.5, 2], 1)
    assert weights.tolist() == [1, 0, 0]
    assert info.residual < 1e-6


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30, 0.0])
def test_masked_is_absent(junk):
    masks = np.random.default_rng(4).random((40, 5)) < 0.6
    masks[0] = False
    rows, centres, radii = some_rows(40, 5, 4)
    gramians, linears, radii = as_problem(rows, centres, radii)
    dirty = np.where(masks[:, :, None] & masks[:, None, :], gramians, junk)
    dirty_linears = np.where(masks, linears, junk)
    weights, lengths, info = solved(
        *(np.asarray(a, np.float32) for a in (dirty, dirty_linears, radii)), masks
    )
    assert np.max(info.residual) < 1e-5
    assert np.all(weights[~masks] == 0)
    assert np.all(weights[0] == 0)
    assert lengths[0] == info.residual[0] == 0
    for k, mask in enumerate(masks):
        if mask.any():
            w = weights[k][mask]
            assert abs(w.sum() - 1) < 1e-6
            if lengths[k] > 0:
                assert gap_of(rows[k][mask], linears[k][mask], radii[k], w) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["gramian", "linear", "radius"])
def test_a_broken_problem_gives_nan_and_ends(place, bad):
    problem = {"gramian": np.eye(3), "linear": np.ones(3), "radius": np.ones(())}
    problem[place].flat[0] = bad
    weights, length, info = solve_one(
        *(jnp.asarray(p, jnp.float32) for p in problem.values())
    )
    assert np.all(np.isnan(weights))
    assert np.isnan(length)
    assert np.isnan(info.residual)
    assert info.iterations <= 4 * 3 + 32


@pytest.mark.parametrize("power", [-33, -20, 20, 33])
def test_scale_changes_nothing(power):
    """Powers of two are exact, so that the weights are equal bit for bit."""
    problem = as_problem(*some_rows(40, 5, 5, spread=6.0))
    gramians, linears, radii = (np.asarray(p, np.float32) for p in problem)
    # The longest row is of the order of one.
    gramians, linears, radii = gramians * 2.0**-40, linears * 2.0**-40, radii * 2.0**-20
    scale = 2.0**power
    weights, lengths, _ = solved(gramians, linears, radii)
    again, scaled, _ = solved(gramians * scale**2, linears * scale**2, radii * scale)
    np.testing.assert_array_equal(again, weights)
    np.testing.assert_array_equal(scaled, lengths * np.float32(scale))


def test_permuting_tasks_permutes_weights():
    gramians, linears, radii = (
        np.asarray(p, np.float32) for p in as_problem(*some_rows(40, 5, 6))
    )
    order = np.random.default_rng(6).permutation(5)
    weights, _, _ = solved(gramians, linears, radii)
    permuted, _, _ = solved(gramians[:, order][:, :, order], linears[:, order], radii)
    np.testing.assert_allclose(permuted, weights[:, order], atol=1e-5)


# --------------------------------------------------------------------- inside a graph


def test_scan_shard_map_and_vmap_agree():
    problem = tuple(
        jnp.asarray(p, jnp.float32) for p in as_problem(*some_rows(CHUNK, 5, 7))
    )
    weights, lengths, info = solved(*problem)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("runs",))
    spec = jax.sharding.PartitionSpec("runs")

    @laws.quick_jit
    def scanned(problem):
        return jax.lax.scan(lambda c, p: (c, simplex_norm(*p)), 0, problem)[1]

    @laws.quick_jit
    def sharded(problem):
        solve = jax.vmap(simplex_norm)
        return jax.shard_map(solve, mesh=mesh, in_specs=spec, out_specs=spec)(*problem)

    for way in (scanned, sharded):
        found_weights, found_lengths, found_info = way(problem)
        np.testing.assert_allclose(found_weights, weights, atol=2e-6)
        np.testing.assert_allclose(found_lengths, lengths, rtol=1e-4)
        assert np.max(found_info.residual) < 1e-5
        assert isinstance(found_info, SolverInfo)
    assert info.iterations.dtype == np.int32


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("radius", [1, 1.0, jnp.float32(1)])
def test_types_are_fixed(size, radius):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        weights, length, info = jax.eval_shape(
            simplex_norm, jnp.eye(size), jnp.ones(size), radius
        )
    assert weights.dtype == length.dtype == info.residual.dtype == jnp.float32
    assert info.iterations.dtype == jnp.int32
    assert length.shape == info.residual.shape == info.iterations.shape == ()
    assert not any(v.weak_type for v in jax.tree.leaves((weights, length, info)))


def test_the_graph_does_not_grow_and_every_product_has_full_precision():
    counts = {}
    for size in (4, 64):
        graph = jax.make_jaxpr(simplex_norm)(jnp.eye(size), jnp.ones(size), 1.0)
        equations = list(laws.equations(graph.jaxpr))
        counts[size] = len(equations)
    assert counts[4] == counts[64]
    products = [e for e in equations if e.primitive.name == "dot_general"]
    assert products
    highest = jax.lax.Precision.HIGHEST
    for product in products:
        assert product.params["precision"] in (highest, (highest, highest))


def test_wrong_input_is_refused():
    ones = jnp.ones(3)
    for gramian, linear in [((3, 2), 3), ((3,), 3), ((3, 3), 2), ((0, 0), 0)]:
        with pytest.raises(ValueError, match="shape"):
            simplex_norm(jnp.ones(gramian), jnp.ones(linear), 1.0)
    with pytest.raises(ValueError, match="task_mask"):
        simplex_norm(jnp.eye(3), ones, 1.0, task_mask=jnp.ones(4, bool))
    with pytest.raises(ValueError, match="radius"):
        simplex_norm(jnp.eye(3), ones, ones)
    for dtype in (jnp.int32, jnp.bfloat16):
        with pytest.raises(TypeError, match="float32"):
            simplex_norm(jnp.eye(3, dtype=dtype), ones, 1.0)
