"""Edges of single methods: what only a mutated method would get wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
from test_per_group import vaccinated
from test_weightings import ROWS, weights_of

import mtl_optax as mtl

pytestmark = pytest.mark.slow

HULL = np.float32(
    [[1, 0], [-1, 0], [0, 1]]
)  # zero is in the hull, the mean is not zero


def info_of(tx, rows, name, **extra):
    rows = jnp.asarray(rows)
    _, state = tx.update(rows, tx.init(rows[0]), **extra)
    return np.asarray(optax.tree_utils.tree_get(state, name))


def test_cagrad_is_the_mean_where_no_direction_helps():
    for size in (1, 1e4):
        np.testing.assert_allclose(
            weights_of(mtl.cagrad(3), HULL * np.float32(size)), 1 / 3, rtol=1e-6
        )


@pytest.mark.parametrize("number", [2, 3, 4])
def test_sampled_cagrad_does_not_see_absent_tasks(number):
    rows = np.random.default_rng(1).standard_normal((7, 9)).astype(np.float32)
    mask = np.array([0, 1, 0, 1, 1, 0, 1], bool)
    spoiled = np.where(mask[:, None], rows, np.nan).astype(np.float32)
    for k in range(2):
        key = jax.random.key(k)
        found = weights_of(
            mtl.cagrad(7, num_sampled=number),
            spoiled,
            key=key,
            task_mask=jnp.asarray(mask),
        )
        wanted = weights_of(mtl.cagrad(4, num_sampled=number), rows[mask], key=key)
        np.testing.assert_allclose(found[mask], wanted, atol=1e-5)
        assert not found[~mask].any()


@pytest.mark.parametrize(("c", "offset"), [(0.5, 1.0), (0.8, 3.0)])
def test_imgrad_by_its_options(c, offset):
    wanted = oracles.imgrad(
        ROWS[None].astype(float), np.ones((1, 4)), c=c, offset=offset
    )[0]
    np.testing.assert_allclose(
        weights_of(mtl.imgrad(4, c=c, offset=offset), ROWS), wanted, atol=1e-4
    )


def test_imgrad_shows_its_cosine_and_a_zero_row_only_moves_the_mean():
    J = ROWS.astype(float)
    point = oracles.simplex_weights(J @ J.T) @ J
    g0 = J.mean(0)
    wanted = g0 @ point / np.linalg.norm(g0) / np.linalg.norm(point)
    found = info_of(mtl.imgrad(4), ROWS, "imbalance_cosine")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    found = info_of(mtl.imgrad(5), np.pad(ROWS, ((0, 1), (0, 0))), "imbalance_cosine")
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_imgrad_leans_on_the_worst_task_at_a_stationary_point():
    rows = np.float32([[2, 0], [-1, 0]])
    np.testing.assert_allclose(weights_of(mtl.imgrad(2), rows), [0.5, 0.9], rtol=1e-5)


def test_imgrad_shows_the_worse_residual(monkeypatch):
    from mtl_optax.weightings import _imgrad

    solve = _imgrad.min_norm_point

    def worse(*args, **kwargs):
        w, info = solve(*args, **kwargs)
        return w, info._replace(residual=info.residual + 1)

    monkeypatch.setattr(_imgrad, "min_norm_point", worse)
    assert info_of(mtl.imgrad(4), ROWS, "solver_residual") >= 1


@pytest.mark.parametrize("size", [1e-2, 1, 1e2])
@pytest.mark.parametrize("limit", [0.0, 0.5, 1.0, 7.0])
def test_nash_length(size, limit):
    J = ROWS * np.float32(size)
    free = np.sqrt(np.linalg.norm(J.astype(float) @ J.T.astype(float)) * 4)
    u = weights_of(mtl.nash_mtl(4, max_norm=limit), J) @ J
    np.testing.assert_allclose(np.linalg.norm(u), min(free, limit or np.inf), rtol=1e-4)


@pytest.mark.parametrize("floor", [1.0, 20.0])
def test_pivrg_starts_from_its_softest_temperature(floor):
    tx = mtl.pivrg(2, bound=1e9, min_temperature=floor)
    found = weights_of(tx, np.eye(2, dtype=np.float32), delta_m=np.float32([5, -2]))
    np.testing.assert_allclose(found[0] / found[1], np.exp(7 / floor / 3), rtol=1e-4)


def test_pivrg_spread_is_that_of_present_tasks():
    rows, mask = np.eye(3, dtype=np.float32), jnp.array([True, True, False])
    for drops in ([-40, -10, np.nan], [40, 10, 0]):
        found = weights_of(
            mtl.pivrg(3), rows, delta_m=np.float32(drops), task_mask=mask
        )
        ratio = max(found[:2]) / min(found[:2])
        np.testing.assert_allclose(ratio, 2 ** (1 / 3), rtol=1e-4)


def test_imtl_g_sum():
    rng = np.random.default_rng(0)
    turned = 0
    for _ in range(60):
        J = rng.standard_normal((3, 4)) * 10 ** rng.uniform(0, 2, (3, 1))
        v = np.linalg.solve(J @ J.T, np.linalg.norm(J, axis=1))
        if abs(v.sum()) < 0.05 * abs(v).sum() or np.linalg.cond(J @ J.T) > 1e5:
            continue
        turned += v.sum() < 0
        found = weights_of(mtl.imtl_g(3), J.astype(np.float32))
        np.testing.assert_allclose(found, v / abs(v.sum()), rtol=2e-2, atol=1e-2)
    assert turned


def test_imtl_g_does_not_grow_without_bound():
    U = np.array([[1, 0.5, 0], [1, -0.5, 0], [1, 0, 0.2]])
    U = U / np.linalg.norm(U, axis=1)[:, None]
    y = np.linalg.solve(U @ U.T, np.ones(3))
    assert (y < 0).sum() == 1, y
    n = np.where(y < 0, -y / y[y > 0].sum(), 1.0)  # the weights' sum vanishes
    found = weights_of(mtl.imtl_g(3), (U * n[:, None]).astype(np.float32))
    np.testing.assert_allclose(np.abs(found).sum(), 1e2, rtol=1e-3)


def test_imtl_g_chooses_among_long_rows():
    rows = np.float32([[1, 0, 0], [0, 3e5, 0], [0, 1e5, 0], [1e4, 0, 1e4]])
    exact = rows.astype(float)
    u = weights_of(mtl.imtl_g(4), rows) @ exact
    along = exact @ u / np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(along, along.mean(), rtol=1e-3)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_gradvac_beta(beta):
    tx, targets = mtl.gradvac(2, beta=beta), np.zeros((2, 2))
    state = tx.init(jnp.zeros(9))
    for turn in range(3):
        J = np.random.default_rng(turn).standard_normal((2, 9)).astype(np.float32)
        u, state = tx.update(jnp.asarray(J), state, key=jax.random.key(turn))
        np.testing.assert_allclose(
            u, vaccinated(J.astype(float), targets, beta), atol=1e-4
        )


def krum_weights(J, selected, broken, squared):
    d = np.sum((J[:, None] - J) ** 2, -1)
    d = np.sort((d if squared else np.sqrt(d)) + np.diag(np.full(len(J), np.inf)), 1)
    scores = d[:, : max(len(J) - broken - 2, 1)].sum(1)
    return np.isin(np.arange(len(J)), np.argsort(scores)[:selected]) / selected


@pytest.mark.parametrize(
    ("selected", "broken", "squared"),
    [(1, 0, False), (1, 2, True), (3, 1, False), (3, 3, True)],
)
def test_krum_by_hand(selected, broken, squared):
    rng = np.random.default_rng(3)
    tx = mtl.krum(9, num_selected=selected, num_byzantine=broken, squared=squared)
    for _ in range(12):
        rows = (rng.standard_normal((9, 2)) * 10 ** rng.uniform(0, 1, (9, 1))).astype(
            np.float32
        )
        wanted = krum_weights(rows.astype(float), selected, broken, squared)
        np.testing.assert_allclose(weights_of(tx, rows), wanted, rtol=1e-6)
        mask = np.arange(9) != rng.integers(9)
        found = weights_of(tx, rows, task_mask=jnp.asarray(mask))
        wanted = krum_weights(rows[mask].astype(float), selected, broken, squared)
        np.testing.assert_allclose(found[mask], wanted, rtol=1e-6)


def test_krum_selects_no_more_than_are_present():
    mask = jnp.array([True, False, True, False])
    found = weights_of(mtl.krum(4, num_selected=3), ROWS, task_mask=mask)
    np.testing.assert_allclose(found, [0.5, 0, 0.5, 0])


def test_ntkmtl_counts_a_zero_gradient_as_absent():
    found = weights_of(mtl.ntkmtl_sr(5), np.pad(ROWS, ((0, 1), (0, 0))))
    np.testing.assert_allclose(
        found, [*weights_of(mtl.ntkmtl_sr(4), ROWS), 0], rtol=1e-5
    )


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_at_the_edges_of_losses(normalization):
    tx = mtl.mgda(4, normalization=normalization)

    def found(losses, **extra):
        return weights_of(tx, ROWS, losses=np.float32(losses), **extra)

    # A loss of zero counts as the smallest that is not.
    np.testing.assert_allclose(
        found([2, 0.5, 0, 1]), found([2, 0.5, 0.5, 1]), atol=1e-6
    )
    # Further apart than 1e7 counts as that.
    np.testing.assert_allclose(
        found([1, 1e25, 1e30, 1e20]), found([1, 1e7, 1e7, 1e7]), atol=1e-5
    )
    # The smallest loss is one of those present.
    mask = jnp.array([True, True, True, False])
    a = found([1e10, 2e10, 1e11, np.nan], task_mask=mask)
    b = found([1, 2, 10, np.nan], task_mask=mask)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_group_draws_by_itself():
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    rows = jax.tree.map(
        lambda p: jnp.ones((3, 2)) * jnp.arange(1.0, 4)[:, None], params
    )
    tx = mtl.per_group(mtl.rlw(3), {"a": 0, "b": 1})
    found, _ = tx.update(rows, tx.init(params), key=jax.random.key(0))
    assert abs(found["a"] - found["b"]).max() > 1e-3


def test_each_group_sees_its_own_params():
    def update(grads, state, params, **extra):
        return jax.tree.map(lambda g, p: g.sum(0) + p, grads, params), state

    tx = mtl.from_aggregator(mtl.Aggregator(lambda params, tasks: (), update), 2)
    params = {"a": jnp.full(1, 10.0), "b": jnp.full(1, 20.0)}
    rows = {"a": jnp.ones((2, 1)), "b": jnp.ones((2, 1))}
    tx = mtl.per_group(tx, {"a": 0, "b": 1})
    found, _ = tx.update(rows, tx.init(params), params)
    assert (float(found["a"][0]), float(found["b"][0])) == (12, 22)


def test_cosine_statistics_where_all_pairs_conflict():
    from mtl_optax import metrics

    found = metrics.cosine_statistics(
        [[1.0, -0.5, -0.25], [-0.5, 1.0, -0.5], [-0.25, -0.5, 1.0]]
    )
    np.testing.assert_allclose(found, [-5 / 12, -0.5, -0.25, 1])


def test_hypervolume_of_an_endless_point_on_the_edge():
    from mtl_optax import metrics

    assert metrics.hypervolume([[-np.inf, 1.0]], [2.0, 1.0]) == 0


def test_imtl_g_chooses_steadily_among_long_parallel_rows():
    rng = np.random.default_rng(0)
    tx = mtl.imtl_g(4)
    step = jax.jit(lambda r: tx.update(r, tx.init(r[0]))[1].info.task_weights)
    for _ in range(60):
        rows = rng.standard_normal((4, 6))
        rows[3] = rows[0]
        lengths = 10 ** rng.uniform(0, 8, 4)
        rows *= (lengths / np.linalg.norm(rows, axis=1))[:, None]
        w = np.asarray(step(jnp.asarray(rows, jnp.float32)), float) * lengths
        # Two that cancel each other to rounding would be far longer than what is left.
        assert abs(w[[0, 3]]).sum() < 10 * abs(w[0] + w[3]) + 10 * abs(w[1:3]).sum()
