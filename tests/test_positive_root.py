"""The positive root against closed forms, SciPy and its own equation in float64."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from scipy.optimize import brentq, minimize, root

from mtl_optax.solvers import SolverInfo, positive_root

pytestmark = pytest.mark.filterwarnings("error")

ALPHAS = (0.3, 0.5, 1.0, 2.0, 4.0)
FAMILIES = ("plain", "conflict", "lengths", "lengths, conflict")


def one(gramian, alpha, targets, mask):
    return positive_root(gramian, alpha, targets=targets, task_mask=mask)


@functools.cache
def batched():
    return laws.quick_jit(jax.vmap(one))


def roots(gramians, alphas, targets=None, masks=None, chunk=20):
    """`positive_root` of a batch; alphas are broadcast over it.

    In chunks of one shape, with absent tasks to fill up, so that little is compiled.
    """
    gramians = np.asarray(gramians)
    (number, size), dtype = gramians.shape[:2], gramians.dtype
    full = next(s for s in (5, 40, 128) if s >= size)
    alphas = np.broadcast_to(np.asarray(alphas, dtype), number)
    targets = np.broadcast_to(1.0 if targets is None else targets, (number, size))
    masks = np.broadcast_to(True if masks is None else masks, (number, size))
    more = (0, full - size)
    gramians = np.pad(gramians, ((0, 0), more, more))
    targets = np.pad(targets.astype(dtype), ((0, 0), more))
    masks = np.pad(masks, ((0, 0), more))
    parts = []
    for start in range(0, number, chunk):
        take = np.minimum(np.arange(start, start + chunk), number - 1)
        inputs = (gramians[take], alphas[take], targets[take], masks[take])
        parts.append(batched()(*inputs))
    x, info = jax.tree.map(lambda *p: np.concatenate(p)[:number], *parts)
    assert x.dtype == info.residual.dtype == dtype
    assert not np.any(x[:, size:][np.isfinite(x).all(1)])
    return x[:, :size].astype(np.float64), info


def rows_of(family, size, width, rng):
    rows = rng.standard_normal((size, width))
    if "conflict" in family:
        rows -= 0.9 * rows.mean(0)
    if "lengths" in family:
        rows *= 10 ** rng.uniform(0, 6, (size, 1))
    return rows * 10 ** rng.uniform(-6, 6)


def violation(gramian, x, alpha, targets=1.0):
    """Of the equation itself, in float64: relative to what its left side adds up."""
    gramian, x = np.asarray(gramian, np.float64), np.asarray(x, np.float64)
    gap = gramian @ x - (targets / x) ** (1 / alpha)
    return np.max(np.abs(gap) / (np.abs(gramian) @ x))


def direction(rows, x):
    """`(|d| / max_t |x_t g_t|, min_t cos(g_t, d))` for d = J^T x."""
    rows = np.asarray(rows, np.float64)
    norms = np.linalg.norm(rows, axis=1)
    update = (x * norms / np.max(x * norms)) @ (rows / norms[:, None])
    length = np.linalg.norm(update)
    return length, np.min(rows @ update / norms) / max(length, 1e-300)


def independent(gramian, alpha, targets=1.0):
    """The root from SciPy: least objective over log x, polished on the equation."""
    power = 1 / alpha

    def objective(z):
        x = np.exp(z)
        value = z if alpha == 1 else x ** (1 - power) / (1 - power)
        slope = gramian @ x - (targets / x) ** power
        return x @ gramian @ x / 2 - np.sum(targets**power * value), slope * x

    def gaps(z):
        x = np.exp(z)
        return gramian @ x - (targets / x) ** power

    near = minimize(objective, np.zeros(len(gramian)), jac=True, method="BFGS")
    found = root(gaps, near.x, tol=1e-14)
    assert np.max(np.abs(found.fun)) < 1e-9
    return np.exp(found.x)


# ----------------------------------------------------------------------------- sweeps


def check_sweep(size, number, dtype, seed=0):
    rng = np.random.default_rng([seed, size])
    rows, alphas, families = [], [], []
    for family in FAMILIES:
        for alpha in ALPHAS:
            for k in range(number):
                width = (max(10, 2 * size), 200)[k % 2]
                rows.append(rows_of(family, size, width, rng).astype(dtype))
                alphas.append(alpha)
                families.append(family)
    gramians = np.stack([r @ r.T for r in rows])
    x, info = roots(gramians, alphas)
    single = dtype == np.float32
    assert np.all(x > 0)
    assert np.max(info.residual) < (1e-5 if single else 1e-10)
    assert np.max(info.iterations) <= 100
    similar = np.isin(families, FAMILIES[:2]) | (np.asarray(alphas) == 1)
    assert np.max(info.iterations[similar]) <= 25
    for r, g, a, value in zip(rows, gramians, alphas, x, strict=True):
        assert violation(g, value, a) < (2e-5 if single else 1e-10)
        length, cosine = direction(r, value)
        if length > 1e-3:
            assert cosine > (-1e-4 if single else -1e-8)


@pytest.mark.parametrize(("size", "number"), [(2, 20), (5, 10), (40, 2)])
def test_sweep_in_float32(size, number):
    check_sweep(size, number, np.float32)


@pytest.mark.parametrize(("size", "number"), [(3, 6), (5, 6)])
def test_sweep_in_float64(size, number, x64):
    check_sweep(size, number, np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("size", "number"), [(2, 200), (8, 100), (40, 10), (128, 1)])
def test_sweep_at_length(size, number, seed):
    check_sweep(size, number, np.float32, seed)


def test_the_checks_notice_wrong_roots():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((5, 9))
    rows -= 0.9 * rows.mean(0)
    gramian = rows @ rows.T
    right = independent(gramian, 2.0)
    assert violation(gramian, right, 2.0) < 1e-10
    assert violation(gramian, right * 1.01, 2.0) > 2e-5
    assert violation(gramian, right * (1 + 1e-3 * np.eye(5)[2]), 2.0) > 2e-5
    assert violation(gramian, right, 2.1) > 2e-5
    assert direction(rows, np.eye(5)[0] + 1e-6)[1] < -1e-2


# ----------------------------------------------------------------- independent oracles


@pytest.mark.parametrize("alpha", ALPHAS)
def test_orthogonal_rows_in_closed_form(alpha):
    rng = np.random.default_rng(1)
    squares = 10 ** rng.uniform(-12, 0, 5) * 10 ** rng.uniform(-8, 20, (30, 1))
    targets = 10 ** rng.uniform(-1, 1, (30, 5))
    gramians = (squares[:, :, None] * np.eye(5)).astype(np.float32)
    x, info = roots(gramians, alpha, targets)
    expected = (targets ** (1 / alpha) / squares) ** (alpha / (1 + alpha))
    np.testing.assert_allclose(x, expected, rtol=2e-5)
    assert np.max(info.iterations) == 0


@pytest.mark.parametrize("alpha", ALPHAS)
def test_two_alike_tasks_in_closed_form(alpha):
    for cosine in (0.9, 0.0, -0.5, -0.99):
        gramian = np.array([[3, 3 * cosine], [3 * cosine, 3]], np.float32)
        x, _ = roots(gramian[None], alpha)
        expected = (3 * (1 + cosine)) ** (-alpha / (1 + alpha))
        np.testing.assert_allclose(x[0], expected, rtol=1e-5)


def test_two_tasks_by_bisection(x64):
    rng = np.random.default_rng(2)
    for alpha in ALPHAS:
        rows = rng.standard_normal((4, 2, 4)) * 10 ** rng.uniform(0, 1, (4, 2, 1))
        targets = rng.uniform(0.5, 2, (4, 2))
        gramians = rows @ rows.swapaxes(1, 2)
        x, _ = roots(gramians, alpha, targets)
        for g, w, found in zip(gramians, targets, x, strict=True):

            def gap(z, g=g, w=w, alpha=alpha):
                # Along x = c (1, e^z), with c cancelled.
                v = np.array([1, np.exp(z)])
                left = g @ v
                if min(left) <= 0:
                    return np.inf if left[0] <= 0 else -np.inf
                a, b = np.log(left) - np.log(w / v) / alpha
                return b - a

            lower, upper = -30.0, 30.0
            for _ in range(80):
                middle = (lower + upper) / 2
                lower, upper = (lower, middle) if gap(middle) > 0 else (middle, upper)
            np.testing.assert_allclose(np.log(found[1] / found[0]), lower, atol=1e-10)
            ratio = np.exp(lower)
            size = brentq(
                lambda c, g=g, w=w, r=ratio, alpha=alpha: (
                    np.log(c * (g[0, 0] + g[0, 1] * r)) - np.log(w[0] / c) / alpha
                ),
                1e-9,
                1e9,
                xtol=1e-15,
            )
            np.testing.assert_allclose(found[0], size, rtol=1e-8)


@pytest.mark.parametrize("size", [3, 6])
def test_against_scipy(size, x64):
    rng = np.random.default_rng(size)
    rows = rng.standard_normal((10, size, 12)) * rng.uniform(0.5, 2, (10, size, 1))
    rows[::2] -= 0.7 * rows[::2].mean(1, keepdims=True)
    alphas = np.resize(ALPHAS, 10)
    targets = rng.uniform(0.3, 3, (10, size))
    gramians = rows @ rows.swapaxes(1, 2)
    x, info = roots(gramians, alphas, targets)
    x32, _ = roots(gramians.astype(np.float32), alphas, targets)
    assert np.max(info.residual) < 1e-13
    for k in range(10):
        right = independent(gramians[k], alphas[k], targets[k])
        np.testing.assert_allclose(x[k], right, rtol=1e-8)
        np.testing.assert_allclose(x32[k], right, rtol=2e-4)


@pytest.mark.parametrize(
    ("rows", "alpha", "expected"),
    [
        ([[-4, 1, 1], [6, 1, 1]], 1.0, (0.0766, 0.9985, 0.9985)),
        ([[-4, 1, 1], [6, 1, 1], [1, -3, 2]], 0.5, (0.2228, 0.00117, 2.2846)),
        ([[-4, 1, 1], [6, 1, 1], [1, -3, 2]], 1.0, (0.09415, 0.13337, 1.72434)),
        ([[-4, 1, 1], [6, 1, 1], [1, -3, 2]], 2.0, (0.0383, 0.19214, 1.32124)),
    ],
)
def test_updates_known_from_other_libraries(rows, alpha, expected):
    rows = np.array(rows, np.float32)
    x, _ = roots((rows @ rows.T)[None], alpha)
    # Theirs is no better than this; `test_against_scipy` is the sharp test.
    np.testing.assert_allclose(x[0] @ rows, expected, rtol=1e-3, atol=1e-4)
    assert violation(rows @ rows.T, x[0], alpha) < 1e-6


# ------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("alpha", ALPHAS)
def test_pareto_stationary_points_end_with_a_vanishing_update(alpha):
    rng = np.random.default_rng(4)
    rows = []
    for _ in range(12):
        r = rng.standard_normal((4, 8))
        rows.append(r - r.mean(0))
        rows.append(np.stack([r[0], -r[0], r[0], -r[0]]))
        rows.append(np.stack([r[0], -2 * r[0], r[1], r[2]]))
    rows = np.stack(rows).astype(np.float32)
    x, info = roots(rows @ rows.swapaxes(1, 2), alpha)
    assert np.all(np.isfinite(x) & (x > 0))
    assert np.max(info.residual) < 1e-3
    for r, value in zip(rows, x, strict=True):
        # Tasks that take no part in it leave this much beside the growing others.
        small = 3 * np.finfo(np.float32).eps ** (alpha / (1 + alpha))
        assert direction(r, value)[0] < max(1e-3, small)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_duplicates_and_dependent_rows(alpha):
    rng = np.random.default_rng(5)
    rows = np.abs(rng.standard_normal((10, 5, 3)))
    rows[:, 3] = rows[:, 0]
    rows = rows.astype(np.float32)
    gramians = rows @ rows.swapaxes(1, 2)
    x, info = roots(gramians, alpha)
    assert np.max(info.residual) < 1e-5
    np.testing.assert_allclose(x[:, 3], x[:, 0], rtol=1e-3)
    for g, value in zip(gramians, x, strict=True):
        assert violation(g, value, alpha) < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_masked_tasks_and_zero_rows_are_absent(bad):
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((12, 5, 8)).astype(np.float32)
    gramians = rows @ rows.swapaxes(1, 2)
    alphas = np.resize(ALPHAS, 12)
    keep = np.array([True, False, True, True, False])
    pairs = keep[:, None] & keep[None, :]
    targets = np.where(keep, 2.0, bad)
    right, _ = roots(gramians[:, keep][:, :, keep], alphas, 2.0)
    for x, info in (
        roots(np.where(pairs, gramians, bad), alphas, targets, keep),
        roots(np.where(pairs, gramians, 0), alphas, 2.0),
    ):
        assert np.all(x[:, ~keep] == 0)
        np.testing.assert_allclose(x[:, keep], right, rtol=2e-4)
        assert np.max(info.residual) < 1e-5
    for x, info in (
        roots(gramians * bad, alphas, targets, False),
        roots(gramians * 0, alphas),
    ):
        assert np.all(x == 0)
        assert np.all(info.residual == 0)


def test_what_is_wrong_gives_nan_and_ends():
    rows = np.random.default_rng(7).standard_normal((6, 5, 8)).astype(np.float32)
    gramians = rows @ rows.swapaxes(1, 2)
    alphas, targets = np.ones(6), np.ones((6, 5))
    gramians[0, 1, 2] = np.nan
    gramians[1, 3, 3] = np.inf
    alphas[2], alphas[3] = np.nan, 0
    targets[4, 1] = 0
    x, info = roots(gramians, alphas, targets)
    assert np.all(np.isnan(x[:5]))
    assert np.all(np.isnan(info.residual[:5]))
    assert np.all(x[5] > 0)


def test_one_task():
    x, info = positive_root(jnp.array([[4.0]]), 2.0, targets=jnp.array([3.0]))
    np.testing.assert_allclose(x, (3**0.5 / 4) ** (2 / 3), rtol=1e-6)
    assert info.residual < 1e-6
    assert info.iterations == 0


# ----------------------------------------------------------------------- invariances


@pytest.mark.parametrize("alpha", ALPHAS)
def test_scale_only_scales(alpha):
    rows = np.random.default_rng(8).standard_normal((5, 8))
    rows[2:] *= 100
    scales = np.array([1, 1e-20, 1e-10, 1e10, 1e20])
    gramians = (rows @ rows.T * scales[:, None, None]).astype(np.float32)
    x, info = roots(gramians, alpha)
    assert np.max(info.residual) < 1e-5
    scaled = x * scales[:, None] ** (alpha / (1 + alpha))
    np.testing.assert_allclose(scaled, np.broadcast_to(scaled[0], x.shape), rtol=5e-5)


def test_lengths_do_not_matter_at_alpha_one():
    rng = np.random.default_rng(9)
    rows = rng.standard_normal((20, 5, 12))
    lengths = 10 ** rng.uniform(0, 6, (20, 5, 1))
    updates = []
    for r in (rows.astype(np.float32), (rows * lengths).astype(np.float32)):
        x, _ = roots(r @ r.swapaxes(1, 2), 1.0)
        updates.append(np.einsum("kt,ktp->kp", x, r.astype(np.float64)))
    size = np.linalg.norm(updates[0], axis=1).min()
    np.testing.assert_allclose(updates[1], updates[0], rtol=0, atol=1e-4 * size)


def test_permuting_tasks_permutes_the_root():
    rows = np.random.default_rng(10).standard_normal((10, 5, 8)).astype(np.float32)
    gramians = rows @ rows.swapaxes(1, 2)
    order = np.array([3, 0, 4, 1, 2])
    alphas = np.resize(ALPHAS, 10)
    x, _ = roots(gramians, alphas)
    permuted, _ = roots(gramians[:, order][:, :, order], alphas)
    np.testing.assert_allclose(permuted, x[:, order], rtol=2e-4)


# --------------------------------------------------------------------- inside a graph


def test_vmap_jit_scan_and_shard_map_agree():
    rows = np.random.default_rng(11).standard_normal((8, 4, 6)).astype(np.float32)
    gramians = jnp.asarray(rows @ rows.swapaxes(1, 2))
    expected, _ = roots(gramians, 2.0)

    def body(count, gramian):
        x, info = positive_root(gramian, 2.0)
        return count + info.iterations, x

    def scanned(gramians):
        return jax.lax.scan(body, 0 * gramians[0, 0, 0].astype(jnp.int32), gramians)[1]

    spec = jax.sharding.PartitionSpec("x")
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(scanned, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_allclose(laws.quick_jit(mapped)(gramians), expected, rtol=1e-4)
    x, info = positive_root(gramians[3], 2.0)
    np.testing.assert_allclose(x, expected[3], rtol=1e-4)
    assert isinstance(info, SolverInfo)


@pytest.mark.parametrize("size", [1, 3])
def test_types_are_fixed(size):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for alpha in (1, 2.0, jnp.float32(2)):
            x, info = jax.eval_shape(positive_root, jnp.eye(size), alpha)
            assert x.dtype == info.residual.dtype == jnp.float32
            assert info.iterations.dtype == jnp.int32
            assert info.residual.shape == info.iterations.shape == ()
            assert not any(v.weak_type for v in jax.tree.leaves((x, info)))


def test_the_graph_does_not_grow_and_has_full_precision():
    counts, highest = set(), jax.lax.Precision.HIGHEST
    for size in (4, 64):
        jaxpr = jax.make_jaxpr(positive_root)(jnp.eye(size), 1.0).jaxpr
        equations = list(laws.equations(jaxpr))
        counts.add(len(equations))
        products = [e for e in equations if e.primitive.name == "dot_general"]
        assert products
        for product in products:
            assert product.params["precision"] in (highest, (highest, highest))
    assert len(counts) == 1


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="shape"):
        positive_root(jnp.ones((3, 2)), 1.0)
    with pytest.raises(ValueError, match="targets"):
        positive_root(jnp.eye(3), 1.0, targets=jnp.ones(2))
    with pytest.raises(ValueError, match="alpha"):
        positive_root(jnp.eye(3), jnp.ones(3))
    with pytest.raises(TypeError, match="float32"):
        positive_root(jnp.eye(3, dtype=jnp.bfloat16), 1.0)
