"""The projection on the dual cone against quadprog, closed forms and optimality."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
import quadprog

from mtl_optax.solvers import dual_cone_projection

pytestmark = pytest.mark.filterwarnings("error")
FAMILIES = ("plain", "conflict", "lengths", "lengths, conflict", "few dimensions")


@functools.cache
def batched(x64=False):
    """`[N, T, T]` Gramians, `[N, K, T]` references, `[N, T]` masks; one jit a dtype."""
    del x64  # a jitted function of its own

    def solve(gramian, references, mask):
        return dual_cone_projection(gramian, references, task_mask=mask)

    return laws.quick_jit(jax.vmap(solve))


def solutions(gramians, references, masks=None):
    if masks is None:
        masks = np.ones(gramians.shape[:2], bool)
    references = np.broadcast_to(references, (len(gramians), *references.shape[-2:]))
    args = (gramians, references.astype(gramians.dtype), masks)
    solve = batched(gramians.dtype == np.float64)
    weights, info = solve(*map(jnp.asarray, args))
    assert weights.dtype == info.residual.dtype == gramians.dtype
    return np.asarray(weights), info


def rows_of(family, size, width, rng):
    if family == "few dimensions":
        width = max(1, size // 2)
    rows = rng.standard_normal((size, width))
    if "conflict" in family:
        rows -= rng.choice([0.9, 0.95, 0.99]) * rows.mean(0)
    if "lengths" in family:
        rows *= 10 ** rng.uniform(-6, 0, (size, 1))
    return rows


def draws(size, number, dtype, seed=0):
    rng = np.random.default_rng(seed)
    widths = [10, max(size, 10), 200]
    rows = [
        rows_of(f, size, widths[k % 3], rng) for f in FAMILIES for k in range(number)
    ]
    rows = [r.astype(dtype) for r in rows]
    gramians = np.stack([r @ r.T for r in rows])
    return [r.astype(np.float64) for r in rows], gramians


def references_of(size):
    """UPGrad's, and DualProj's as the last one."""
    return np.concatenate([np.eye(size), np.ones((1, size))]) / size


def kkt_violation(rows, reference, weights):
    """Written out on unit rows in float64, relative to the largest `|v_t g_t|`."""
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / lengths[:, None]
    z, v = (weights - reference) * lengths, weights * lengths
    slack = unit @ (v @ unit)
    return np.max(np.abs(np.minimum(z, slack))) / np.max(np.abs(v))


def lowest_cosine(rows, weights):
    """The lowest cosine of `d` with a row; 1 where `d` is next to nothing."""
    parts = weights[:, None] * rows
    d = parts.sum(0)
    if np.linalg.norm(d) <= 1e-3 * np.linalg.norm(parts, axis=1).max():
        return 1.0
    return np.min(rows @ d / np.linalg.norm(rows, axis=1)) / np.linalg.norm(d)


def projected(rows, reference):
    """The projection of `J^T u` by quadprog, on unit rows; full rank only."""
    lengths = np.linalg.norm(rows, axis=1)
    unit = rows / lengths[:, None]
    size = len(rows)
    v = quadprog.solve_qp(
        unit @ unit.T, np.zeros(size), np.eye(size), reference * lengths
    )[0]
    return v / lengths


# ----------------------------------------------------------------------------- sweeps


def check_sweep(size, number, dtype, kkt, cosine, seed=0):
    rows, gramians = draws(size, number, dtype, seed)
    references = references_of(size)
    weights, info = solutions(gramians, references)
    assert np.max(info.residual) < kkt
    assert np.max(info.iterations) <= 4 * size + 32
    for k, matrix in enumerate(rows):
        family = FAMILIES[k // number]
        found = weights[k].astype(np.float64)
        assert np.all(weights[k] >= references.astype(dtype))
        for reference, w in zip(references.astype(dtype), found, strict=True):
            assert kkt_violation(matrix, reference, w) < kkt, (family, k)
            assert lowest_cosine(matrix, w) >= -cosine, (family, k)
        assert lowest_cosine(matrix, found[:-1].sum(0)) >= -cosine, (family, k)


# The cosines: 1e-4 wherever d is longer than about 5e-3 of the longest v_t g_t. The
# rounding of a float32 Gramian allows more between there and 1e-3.
@pytest.mark.parametrize(("size", "number"), [(1, 2), (2, 40), (5, 30), (16, 9)])
def test_float32(size, number):
    check_sweep(size, number, np.float32, 1e-5, 1e-3)


@pytest.mark.parametrize(("size", "number"), [(2, 20), (5, 20)])
def test_float64(size, number, x64):
    check_sweep(size, number, np.float64, 1e-10, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("size", "number"), [(2, 300), (3, 300), (10, 100), (40, 12), (128, 1)]
)
def test_float32_at_length(size, number, seed):
    check_sweep(size, number, np.float32, 1e-5, 1e-3, seed + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "number"), [(10, 60), (40, 6)])
def test_float64_at_length(size, number, x64):
    check_sweep(size, number, np.float64, 1e-10, 1e-10, 1)


@pytest.mark.parametrize("size", [2, 5])
def test_against_quadprog(size, x64):
    rng = np.random.default_rng(size)
    rows = np.stack([rows_of(f, size, 20, rng) for f in FAMILIES[:4] for _ in range(9)])
    references = references_of(size)
    gramians = rows @ rows.swapaxes(1, 2)
    weights, _ = solutions(gramians, references)
    weights32, _ = solutions(gramians.astype(np.float32), references)
    for matrix, w, w32 in zip(rows, weights, weights32, strict=True):
        scale = np.linalg.norm(references @ matrix, axis=1)
        for k, reference in enumerate(references):
            right = projected(matrix, reference) @ matrix
            assert np.linalg.norm(w[k] @ matrix - right) < 1e-10 * scale[k]
            assert np.linalg.norm(w32[k] @ matrix - right) < 2e-3 * scale[k]


@pytest.mark.parametrize("spoil", ["reference", "moved", "negative"])
def test_the_checks_notice_wrong_weights(spoil):
    rng = np.random.default_rng(0)
    rows = rows_of("conflict", 5, 20, rng)
    reference = np.eye(5)[0] / 5
    right = projected(rows, reference)
    wrong = {
        "reference": reference,
        "moved": right + 1e-3 * np.eye(5)[1],
        "negative": right - 1e-3 * np.eye(5)[right.argmax()],
    }[spoil]
    assert kkt_violation(rows, reference, right) < 1e-12
    assert lowest_cosine(rows, right) > -1e-10
    assert kkt_violation(rows, reference, wrong) > 1e-5
    assert spoil != "reference" or lowest_cosine(rows, wrong) < -1e-3


# ---------------------------------------------------------------------- known answers


def test_known_answers():
    project = laws.quick_jit(dual_cone_projection)
    two = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
    three = jnp.array([[-4.0, 1, 1], [6, 1, 1], [1, -3, 2]])
    weights, info = project(two @ two.T, jnp.full(2, 0.5))
    np.testing.assert_allclose(weights @ two, [5 / 9, 10 / 9, 10 / 9], atol=1e-5)
    assert info.residual < 1e-6
    weights, _ = project(three @ three.T, jnp.full(3, 1 / 3))
    np.testing.assert_allclose(weights @ three, [1 / 3, -1 / 6, 3 / 2], atol=1e-5)
    weights, _ = project(three @ three.T, jnp.eye(3) / 3)
    assert weights.shape == (3, 3)
    expected = [0.20274, 0.18906, 2.26556]
    np.testing.assert_allclose(weights.sum(0) @ three, expected, atol=2e-5)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_without_a_conflict_nothing_changes(size):
    rows = np.abs(np.random.default_rng(0).standard_normal((size, 8)))
    references = references_of(size)[None].astype(np.float32)
    for gramian in (rows @ rows.T, np.eye(size), np.zeros((size, size))):
        weights, info = solutions(gramian[None].astype(np.float32), references)
        np.testing.assert_array_equal(weights, references)
        assert info.residual[0] == 0
        assert info.iterations[0] == 0


def test_opposite_duplicate_and_zero_rows():
    row = np.array([3.0, 4.0])
    rows = np.stack([row, -2 * row, row, 0 * row])
    references = np.array([[1.0, 0, 0, 5], [0, 1, 0, -5], [1, 1, 1, 0]])
    weights, info = solutions((rows @ rows.T)[None].astype(np.float32), references)
    np.testing.assert_allclose(weights[0] @ rows, 0, atol=1e-4)
    np.testing.assert_array_equal(weights[0, :, 3], references[:, 3])
    assert np.all(weights[0] >= references)
    assert info.residual[0] < 1e-5
    one, _ = dual_cone_projection(jnp.array([[4.0]]), jnp.array([-2.0]))
    np.testing.assert_allclose(one, 0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_scale_changes_nothing(scale):
    rng = np.random.default_rng(1)
    rows = np.stack([rows_of("lengths, conflict", 5, 20, rng) for _ in range(40)])
    gramians = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    factor = np.float32(2.0 ** np.round(2 * np.log2(scale)))  # exact
    expected, info = solutions(gramians, references_of(5))
    weights, scaled_info = solutions(gramians * factor, references_of(5))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_array_equal(info.iterations, scaled_info.iterations)
    big, _ = solutions(gramians, references_of(5) * 2.0**20)
    np.testing.assert_allclose(big, expected * 2.0**20, rtol=1e-6)


# ------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30, 0.0])
def test_masked_is_absent(junk):
    rng = np.random.default_rng(4)
    rows = np.stack([rows_of("conflict", 5, 20, rng) for _ in range(40)])
    gramians = (rows @ rows.swapaxes(1, 2)).astype(np.float32)
    masks = rng.random((40, 5)) < 0.6
    masks[0] = False
    dirty = np.where(masks[:, :, None] & masks[:, None, :], gramians, junk)
    references = np.where(masks[:, None], references_of(5), junk)
    weights, info = solutions(dirty, references, masks)
    assert np.max(info.residual) < 1e-5
    for matrix, mask, w in zip(rows, masks, weights, strict=True):
        assert np.all(w[:, ~mask] == 0)
        for reference, found in zip(references_of(5)[:, mask], w, strict=True):
            if mask.any() and reference.any():
                present = matrix[mask]
                right = projected(present, reference)
                np.testing.assert_allclose(found[mask], right, atol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_present_entry_gives_nan_and_ends(bad):
    gramians = np.stack([np.eye(5)] * 3).astype(np.float32)
    references = np.stack([references_of(5)] * 3)
    gramians[0, 4, 0] = gramians[0, 0, 4] = bad
    references[1, 2, 3] = bad
    weights, info = solutions(gramians, references)
    assert np.all(np.isnan(weights[:2]))
    assert np.all(np.isnan(info.residual[:2]))
    assert np.all(np.isfinite(weights[2]))


# --------------------------------------------------------------------- inside a graph


def test_scan_vmap_and_shard_map_agree():
    rng = np.random.default_rng(2)
    rows = np.stack([rows_of("conflict", 5, 20, rng) for _ in range(8)])
    gramians = jnp.asarray(rows @ rows.swapaxes(1, 2), jnp.float32)
    expected, info = solutions(np.asarray(gramians), references_of(5))
    references = jnp.asarray(references_of(5), jnp.float32)

    def one(gramian):
        return dual_cone_projection(gramian, references)

    scanned, scanned_info = laws.quick_jit(lambda g: jax.lax.map(one, g))(gramians)
    np.testing.assert_allclose(scanned, expected, atol=2e-3)
    np.testing.assert_array_equal(scanned_info.iterations, info.iterations)
    mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")

    @laws.quick_jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def sharded(gramian):
        return one(gramian[0])[0][None]

    np.testing.assert_allclose(sharded(gramians[:1])[0], expected[0], atol=2e-3)


@pytest.mark.parametrize("lengths", [1.0, 1e4])
def test_margins_against_quadprog(lengths):
    """The shifted cone ``J d >= m``, with one task that is no constraint."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((40, 4, 9)) * lengths ** rng.uniform(0, 1, (40, 4, 1))
    rows = rows.astype(np.float32).astype(np.float64)
    own = np.linalg.norm(rows, axis=2)
    margins = rng.uniform(-1, 1, (40, 4)) * own * own[:, :1]
    margins[:, 0] = -np.inf
    reference = np.array([1.0, 0, 0, 0])

    @laws.quick_jit
    @jax.vmap
    def solve(gramian, margin):
        return dual_cone_projection(gramian, jnp.asarray(reference), margins=margin)

    gramians = np.einsum("nsp,ntp->nst", rows, rows)
    weights, info = solve(jnp.float32(gramians), jnp.float32(margins))
    assert np.max(info.residual) < 1e-5
    for J, m, w in zip(rows, margins, np.asarray(weights, np.float64), strict=True):
        lead, others = J[0], J[1:]
        size = np.linalg.norm(lead)
        unit = others / np.linalg.norm(others, axis=1)[:, None]
        bounds = m[1:] / np.linalg.norm(others, axis=1) / size
        d = quadprog.solve_qp(np.eye(9), lead / size, unit.T, bounds)[0] * size
        np.testing.assert_allclose(w @ J, d, atol=1e-4 * np.linalg.norm(d))
        assert w[0] == 1


def test_margins_have_a_shape_and_are_finite():
    gramian = jnp.eye(3)
    with pytest.raises(ValueError, match=r"margins has shape \(2,\)"):
        dual_cone_projection(gramian, jnp.ones(3), margins=jnp.ones(2))
    margins = jnp.array([0.0, jnp.nan, 0.0])
    assert np.isnan(
        dual_cone_projection(gramian, jnp.ones(3), margins=margins)[0]
    ).all()


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_types_and_shapes(shape):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        weights, info = jax.eval_shape(
            dual_cone_projection, jnp.eye(3), jnp.ones(shape)
        )
    assert weights.shape == shape
    assert info.residual.shape == info.iterations.shape == ()
    assert weights.dtype == info.residual.dtype == jnp.float32
    assert info.iterations.dtype == jnp.int32
    assert not any(v.weak_type for v in jax.tree.leaves((weights, info)))


def test_the_graph():
    """It does not grow with the tasks, and every product has full precision."""
    counts = set()
    highest = jax.lax.Precision.HIGHEST
    for size in (4, 64):
        jaxpr = jax.make_jaxpr(dual_cone_projection)(jnp.eye(size), jnp.eye(size)).jaxpr
        equations = list(laws.equations(jaxpr))
        counts.add(len(equations))
        products = [e for e in equations if e.primitive.name == "dot_general"]
        assert products
        assert all(e.params["precision"] == (highest, highest) for e in products)
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("gramian", "references"),
    [((3, 2), (3,)), ((3,), (3,)), ((3, 3), (2,)), ((3, 3), (0, 3)), ((0, 0), (0,))],
)
def test_wrong_shapes_are_refused(gramian, references):
    with pytest.raises(ValueError, match="expected"):
        dual_cone_projection(jnp.ones(gramian), jnp.ones(references))


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="float32"):
        dual_cone_projection(jnp.eye(3, dtype=jnp.bfloat16), jnp.ones(3))
    with pytest.raises(ValueError, match="task_mask"):
        dual_cone_projection(jnp.eye(3), jnp.ones(3), task_mask=jnp.ones(4, bool))
