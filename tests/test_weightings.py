"""What single Gramian weightings do beyond what the laws ask of all."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from oracles import ORACLES, simplex_weights

import mtl_optax as mtl
from mtl_optax._tree import lazy_tree


def weights_of(tx, rows, **extra):
    rows = jnp.asarray(rows)

    def step(rows, extra):
        _, state = tx.update(rows, tx.init(jnp.zeros(rows.shape[1:])), **extra)
        return state.info.task_weights

    return np.asarray(laws.quick_jit(step)(rows, extra))


ROWS = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)


# ----------------------------------------------------------------------------- mgda


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_mgda_normalizations(normalization):
    losses = np.float32([2.0, 0.5, 10.0, 1.0])
    lengths = np.linalg.norm(ROWS, axis=1)
    by = {"l2": lengths, "loss": losses, "loss+": losses * lengths}[normalization]
    wanted = simplex_weights((J := ROWS.astype(np.float64) / by[:, None]) @ J.T)
    tx = mtl.mgda(4, normalization=normalization)
    found = weights_of(tx, ROWS, losses=losses)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    # A loss below zero counts by its size; its gradient does not turn round.
    again = weights_of(tx, ROWS, losses=-losses)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_mgda_reads_losses_only_where_it_needs_them():
    assert mtl.mgda(2).weighting.needs == {"gramian"}
    assert mtl.mgda(2, normalization="l2").weighting.needs == {"gramian"}
    assert "losses" in mtl.mgda(2, normalization="loss").weighting.needs


# --------------------------------------------------------------------- constant, RLW


def test_constant_weights_take_what_they_are_given():
    tx = mtl.constant_weights(4, weights=[1, 0, 2.5, 3])
    np.testing.assert_array_equal(weights_of(tx, ROWS), [1, 0, 2.5, 3])
    mask = jnp.array([True, True, False, True])
    np.testing.assert_array_equal(weights_of(tx, ROWS, task_mask=mask), [1, 0, 0, 3])
    tx = mtl.constant_weights(4, weights=[1, 0, 2, 1], scale="mean")
    np.testing.assert_array_equal(weights_of(tx, ROWS), [0.25, 0, 0.5, 0.25])


PER_TASK = [
    (mtl.constant_weights, "weights"),
    (mtl.upgrad, "preference"),
    (mtl.dualproj, "preference"),
    (mtl.aligned_mtl, "preference"),
]


@pytest.mark.parametrize(("factory", "name"), PER_TASK)
def test_numbers_a_task_are_checked(factory, name):
    for wrong in ([1.0, 2.0], [[1.0, 2.0, 3.0]], 1.0):
        with pytest.raises(ValueError, match=r"one number a task, shape \(3,\)"):
            factory(3, **{name: wrong})
    for wrong in ([1.0, -1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.nan, 1.0]):
        with pytest.raises(ValueError, match="must be finite, not negative"):
            factory(3, **{name: wrong})


@pytest.mark.parametrize(("factory", "name"), PER_TASK)
def test_numbers_a_task_may_be_traced(factory, name):
    rows = jnp.asarray(ROWS)

    @laws.quick_jit
    def step(share):
        tx = factory(4, **{name: [share, 1 - share, 0.5, 0.25]})
        return tx.update(rows, tx.init(rows[0]))[0]

    tx = factory(4, **{name: [0.75, 0.25, 0.5, 0.25]})
    wanted = laws.quick_jit(lambda: tx.update(rows, tx.init(rows[0]))[0])()
    np.testing.assert_allclose(step(0.75), wanted, rtol=1e-5)


def test_weights_may_be_swept_under_vmap():
    sweep = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    found = jax.vmap(
        lambda w: mtl.constant_weights(2, weights=w).update(
            {"w": jnp.ones((2, 1))}, mtl.constant_weights(2).init({"w": jnp.zeros(1)})
        )[0]["w"]
    )(sweep)
    np.testing.assert_array_equal(found[:, 0], [3, 7])


def test_rlw_is_the_softmax_of_normal_numbers():
    keys = jax.random.split(jax.random.key(3), 20_000)
    tx = mtl.rlw(3)
    rows = jnp.zeros((3, 1))

    def one(key):
        return tx.update(rows, tx.init(rows[0]), key=key)[1].info.task_weights

    found = np.asarray(laws.quick_jit(jax.vmap(one))(keys), np.float64)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    rng = np.random.default_rng(0)
    raw = np.exp(rng.standard_normal((20_000, 3)))
    wanted = raw / raw.sum(1, keepdims=True)
    np.testing.assert_allclose(found.mean(0), 1 / 3, atol=0.005)
    np.testing.assert_allclose(found.std(0), wanted.std(0).mean(), atol=0.005)
    np.testing.assert_allclose(np.corrcoef(found.T)[0, 1], -0.5, atol=0.03)


@pytest.mark.parametrize("name", ["rlw", "pcgrad", "gradvac"])
def test_random_methods_need_a_key(name):
    tx = mtl.METHODS[name].make(3)
    with pytest.raises(TypeError, match="key="):
        tx.update(jnp.ones((3, 2)), tx.init(jnp.zeros(2)))


def test_pcgrad_draws_every_order():
    """Three tasks, of which the order decides: all outcomes turn up, evenly."""
    rows = jnp.array([[1.0, 0.0], [-1.0, 0.2], [-1.0, -3.0]])
    tx = mtl.pcgrad(3)

    def one(key):
        return tx.update(rows, tx.init(rows[0]), key=key)[0]

    keys = jax.random.split(jax.random.key(0), 4000)
    found = np.asarray(laws.quick_jit(jax.vmap(one))(keys)).round(3)
    outcomes, counts = np.unique(found, axis=0, return_counts=True)
    assert len(outcomes) > 1
    J = np.asarray(rows, np.float64)

    def project(i, order):
        g = J[i]
        for j in order:
            if g @ J[j] < 0:
                g = g - (g @ J[j]) / (J[j] @ J[j]) * J[j]
        return g

    orders = [[(1, 2), (2, 1)], [(0, 2), (2, 0)], [(0, 1), (1, 0)]]
    possible = [
        sum(project(i, o[b]) for i, (o, b) in enumerate(zip(orders, bits, strict=True)))
        for bits in np.ndindex(2, 2, 2)
    ]
    wanted, ways = np.unique(np.round(possible, 3), axis=0, return_counts=True)
    np.testing.assert_allclose(outcomes, wanted, atol=2e-3)
    np.testing.assert_allclose(counts / 4000, ways / 8, atol=0.04)


# --------------------------------------------------------------------------- CAGrad


def test_cagrad_at_zero_is_the_mean():
    np.testing.assert_allclose(weights_of(mtl.cagrad(4, c=0.0), ROWS), 0.25, rtol=1e-6)


def test_cagrad_of_all_groups_is_cagrad():
    """Sampling as many as there are: every group is one task."""
    tx = mtl.cagrad(4, num_sampled=4)
    found = weights_of(tx, ROWS, key=jax.random.key(0))
    np.testing.assert_allclose(found, weights_of(mtl.cagrad(4), ROWS), atol=1e-5)


def test_sampled_cagrad_counts_every_task():
    """Of two groups: one task drawn at random, and the mean of all others."""
    tx = mtl.cagrad(4, c=0.5, num_sampled=2)
    J = ROWS.astype(np.float64)
    rows = jnp.asarray(ROWS)

    @laws.quick_jit
    @jax.vmap
    def sampled(key):
        return tx.update(rows, tx.init(rows[0]), key=key)[1].info.task_weights

    drawn = set()
    keys = jax.random.split(jax.random.key(0), 24)
    for found in np.asarray(sampled(keys), np.float64):
        one = max(range(4), key=lambda t: -np.ptp(np.delete(found, t)))
        drawn.add(one)
        others = np.delete(J, one, 0).mean(0)
        pair, g0 = np.stack([J[one], others]), J.mean(0)
        shares = np.linspace(0, 1, 20001)
        mixed = np.outer(shares, pair[0]) + np.outer(1 - shares, pair[1])
        radius = 0.5 * np.linalg.norm(g0)
        values = mixed @ g0 + radius * np.linalg.norm(mixed, axis=1)
        best = mixed[np.argmin(values)]
        wanted = g0 + radius * best / np.linalg.norm(best)
        np.testing.assert_allclose(found @ J, wanted, atol=2e-3)
    assert drawn == {0, 1, 2, 3}


def test_sampled_cagrad_takes_as_many_gradients_as_it_samples():
    tx = mtl.cagrad(8, num_sampled=3)
    assert tx.weighting.needs == {"gramian_in_basis", "key"}
    shapes = []

    class Rows:
        num_tasks, task_names, isolates = 8, tuple("abcdefgh"), True
        losses = jnp.zeros(8)

        def restrict(self, leaves):
            return self

        def gramian(self, basis=None, task_mask=None):
            shapes.append(None if basis is None else basis.shape)
            return basis @ basis.T

        def combine(self, weights):
            return [weights]

        def stack(self, *, isolated=False):
            return [jnp.eye(8)]

    grads = mtl.lazy_tree(Rows(), jnp.zeros(8))
    state = tx.init(jnp.zeros(8))
    jax.eval_shape(lambda key: tx.update(grads, state, key=key), jax.random.key(0))
    assert shapes == [(3, 8)]


ABSENT = [
    (mtl.cagrad, {"num_sampled": 2}),
    (mtl.krum, {"num_byzantine": 1, "num_selected": 2}),
    (mtl.pivrg, {"bound": 3.0, "min_temperature": 1.0}),
    (mtl.mgda, {"normalization": "loss"}),
]


@pytest.mark.parametrize(("factory", "options"), ABSENT)
def test_absent_tasks_do_not_count_in_options(factory, options):
    """The laws ask this of the defaults."""
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((30, 6, 8)).astype(np.float32)
    mask = np.array([True, True, False, True, True, False])
    spoiled = np.where(mask[:, None], rows, 3 + rows)
    losses = np.float32([2, 0.5, 1e-9, 4, 1, 1e9])
    drops = np.float32([3, -1, 900, 5, 0, -900])

    def run(rows, tasks, losses, drops, **extra):
        tx = factory(tasks, **options)
        keys = jax.random.split(jax.random.key(1), len(rows))

        def one(rows, key):
            given = {"key": key, "losses": losses, "delta_m": drops, **extra}
            return tx.update(rows, tx.init(rows[0]), **given)[0]

        return np.asarray(laws.quick_jit(jax.vmap(one))(rows, keys))

    found = run(spoiled, 6, losses, drops, task_mask=jnp.asarray(mask))
    wanted = run(rows[:, mask], 4, losses[mask], drops[mask])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrong", [0, 1, -3])
def test_cagrad_samples_two_at_least(wrong):
    with pytest.raises(ValueError, match="num_sampled must be at least 2"):
        mtl.cagrad(4, num_sampled=wrong)


# ----------------------------------------------------------------------- Krum, IMTL-G


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_krum_chooses_among_honest_workers_as_if_there_were_no_others(size):
    rng = np.random.default_rng(1)
    honest = (1 + 0.01 * rng.standard_normal((20, 6, 6))).astype(np.float32)
    broken = size * rng.standard_normal((20, 1, 6)).astype(np.float32)
    tx = mtl.krum(7, num_byzantine=1)

    @laws.quick_jit
    @jax.vmap
    def weights(rows):
        return tx.update(rows, tx.init(rows[0]))[1].info.task_weights

    found = np.asarray(weights(np.concatenate([broken, honest], axis=1)))
    for w, J in zip(found, honest.astype(np.float64), strict=True):
        squares = np.sum((J[:, None] - J) ** 2, -1) + np.diag([np.inf] * 6)
        assert w.argmax() == 1 + np.argmin(np.sort(squares, 1)[:, :4].sum(1))
        assert w.max() == w.sum() == 1


def test_krum_with_distances_or_their_squares():
    """Neighbours at 3, 3 and at 1, 4.2: squares prefer the former, sums the latter."""
    points = np.array([0, 3, -3, 10, 11, 15.2, 100])[:, None].astype(np.float32)
    found = [
        weights_of(mtl.krum(7, num_byzantine=3, squared=squared), points).argmax()
        for squared in (True, False)
    ]
    gaps = np.abs(points - points.T) + np.diag([np.inf] * 7)
    wanted = [np.argmin(np.sort(gaps**p, 1)[:, :2].sum(1)) for p in (2, 1)]
    assert found == wanted
    assert wanted[0] != wanted[1]


def test_krum_sees_small_differences():
    """Gradients alike to 1e-4: their Gramian in float32 would show noise."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((5, 50))
    rows = (1 + 1e-4 * noise).astype(np.float32)
    exact = rows.astype(np.float64)
    squares = np.sum((exact[:, None] - exact) ** 2, -1) + np.diag([np.inf] * 5)
    best = np.argmin(np.sort(squares, 1)[:, :3].sum(1))
    assert weights_of(mtl.krum(5), rows).argmax() == best


@pytest.mark.parametrize(("spread", "passes"), [(1.0, 1), (1e-2, 2)])
@pytest.mark.parametrize("far", [0.0, 1e4])
def test_krum_takes_a_second_gramian_where_gradients_nearly_agree(spread, passes, far):
    rng = np.random.default_rng(4)
    rows = (1 + spread * rng.standard_normal((6, 500))).astype(np.float32)
    rows[0] += np.float32(far)
    exact = rows.astype(np.float64)
    squares = np.sum((exact[:, None] - exact) ** 2, -1) + np.diag([np.inf] * 6)
    best = np.argmin(np.sort(squares, 1)[:, :4].sum(1))
    seen = []

    class Counted:
        num_tasks, task_names, isolates = 6, tuple("abcdef"), True
        losses = jnp.ones(6)

        def restrict(self, leaves):
            return self

        def gramian(self, basis=None, task_mask=None):
            seen.append(basis)
            return mtl.gramian(jnp.asarray(rows), basis=basis, task_mask=task_mask)

        def combine(self, weights):
            return [weights @ rows]

        def stack(self, *, isolated=False):
            return [jnp.asarray(rows)]

    lazy = lazy_tree(Counted(), jnp.zeros(500))
    tx = mtl.krum(6)
    _, state = tx.update(lazy, tx.init(jnp.zeros(500)), jnp.zeros(500))
    assert state.info.task_weights.argmax() == best
    assert len(seen) == passes


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="so it is on CPU")
def test_krum_does_not_put_convolutions_into_a_loop():
    x, kernel = jnp.ones((2, 1, 6, 6)), jnp.ones((4, 1, 3, 3))

    def loss_fn(kernel):
        y = jax.lax.conv(x, kernel, (1, 1), "SAME")
        return jnp.mean(jnp.tanh(y) * jnp.arange(1.0, 5)[:, None, None], (0, 2, 3))

    def step(kernel):
        tx = mtl.krum(4)
        _, lazy = mtl.task_jacobian(loss_fn, mode="layerwise")(kernel)
        return tx.update(lazy, tx.init(kernel), kernel)[0]

    whiles = [e for e in jax.make_jaxpr(step)(kernel).eqns if "while" in str(e)]
    assert not any("conv_general_dilated" in str(eqn) for eqn in whiles)


@pytest.mark.parametrize(
    "arguments", [{"num_selected": 4}, {"num_byzantine": 1}, {"num_byzantine": -1}]
)
def test_krum_needs_enough_tasks(arguments):
    with pytest.raises(ValueError, match="num_"):
        mtl.krum(3, **arguments)


def test_imtl_g_is_never_uphill():
    """Where the closed form's weights have a negative sum, its sign would be uphill."""
    rng = np.random.default_rng(0)
    turned = 0
    for _ in range(300):
        J = rng.standard_normal((3, 4)) * 10 ** rng.uniform(0, 2, (3, 1))
        v = np.linalg.solve(J @ J.T, np.linalg.norm(J, axis=1))
        turned += v.sum() < 0
    assert turned > 5
    lengths = 10 ** rng.uniform(0, 2, (300, 3, 1))
    rows = (rng.standard_normal((300, 3, 4)) * lengths).astype(np.float32)
    tx = mtl.imtl_g(3)

    @laws.quick_jit
    @jax.vmap
    def updates(rows):
        return tx.update(rows, tx.init(rows[0]))[0]

    products = np.einsum("rtp,rp->rt", rows, np.asarray(updates(rows)))
    assert np.all(products > 0)


@pytest.mark.parametrize("length", [1.0, 3.0, 1e-3])
def test_imtl_g_makes_nothing_of_opposite_gradients(length):
    rng = np.random.default_rng(4)
    row = rng.standard_normal((50, 1, 7))
    rows = np.concatenate([row, -length * row], axis=1).astype(np.float32)
    tx = mtl.imtl_g(2)

    @laws.quick_jit
    @jax.vmap
    def update(rows):
        return tx.update(rows, tx.init(rows[0]))[0]

    assert np.abs(np.asarray(update(rows))).max() < 1e-5


# ----------------------------------------------------------------------------- PIVRG


def test_pivrg_with_equal_drops_is_fairgrad():
    found = weights_of(mtl.pivrg(4), ROWS, delta_m=np.full(4, 3.0, np.float32))
    wanted = weights_of(mtl.fairgrad(4, alpha=2.0), ROWS)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_pivrg_bounds_its_preference():
    """Far apart in delta_m: orthogonal tasks differ by bound^(1/3) at most."""
    rows = np.eye(3, dtype=np.float32)
    for worst in (40.0, 4000.0):
        drops = np.float32([worst, 0.0, -worst])
        found = weights_of(mtl.pivrg(3, bound=3.0), rows, delta_m=drops)
        np.testing.assert_allclose(found[0] / found[2], 3 ** (1 / 3), rtol=1e-4)
    for wrong in (1.0, 0.5, -1.0):
        with pytest.raises(ValueError, match="bound"):
            mtl.pivrg(3, bound=wrong)


# ------------------------------------------------------------------------------- PCD


def pcd_update(rows, **options):
    rows = jnp.asarray(rows, jnp.float32)
    tx = mtl.pcd(len(rows), **options)
    update, state = laws.quick_jit(tx.update)(rows, tx.init(rows[0]))
    return np.asarray(update), state.weighting


def test_pcd_follows_the_first_task_where_nothing_serves_all():
    update, state = pcd_update([[2, 0], [0, 1], [0, -1]])
    assert state.info.feasible == 0
    np.testing.assert_allclose(update, [2, 0], rtol=1e-6)
    update, state = pcd_update([[2, 0], [0, 1], [1, -1]])
    assert state.info.feasible == 1


def test_pcd_asks_of_the_others_what_tau_says():
    rows = np.array([[3.0, 0.0], [-1.0, 0.5]])
    for tau in (0.0, 0.02, 0.5, 1.0):
        update, _ = pcd_update(rows, tau=tau)
        np.testing.assert_allclose(np.linalg.norm(update), 3, rtol=1e-5)
        # The direction before its length is set: from unit gradients.
        lead, other = rows / np.linalg.norm(rows, axis=1)[:, None]
        d = lead + max(0, tau - lead @ other) * other
        np.testing.assert_allclose(update, 3 * d / np.linalg.norm(d), atol=1e-5)


def test_pcd_without_its_lead():
    update, state = pcd_update([[0, 0], [0, 1]])
    assert not update.any()
    np.testing.assert_allclose(state.squares, [0, 0.001], rtol=1e-4)
    rows = jnp.array([[jnp.nan, 0.0], [0.0, 3.0], [1.0, -1.0]])
    tx = mtl.pcd(3)
    mask = jnp.array([False, True, True])
    update, _ = tx.update(rows, tx.init(rows[0]), task_mask=mask)
    assert update[1] > 2  # the first task that is present leads


@pytest.mark.parametrize("factory", [mtl.pcd, mtl.gradvac])
def test_one_broken_step_leaves_no_trace(factory):
    rows = jnp.asarray(ROWS)
    tx = factory(4)

    @laws.quick_jit
    def history(state, rows):
        state = tx.update(rows, state, key=jax.random.key(0))[1]
        return [x for path, x in laws.history(state)]

    state = tx.init(rows[0])
    before = [x for _, x in laws.history(state)]
    for now, old in zip(
        history(state, rows.at[1, 2].set(jnp.nan)), before, strict=True
    ):
        assert jnp.all(jnp.isfinite(now))
        if factory is mtl.pcd:
            np.testing.assert_array_equal(now, old)


# ---------------------------------------------------------------------------- BibTeX


def test_citations():
    for name in mtl.METHODS:
        text = mtl.citation(name)
        assert text.count("@") == text.count("\n}") >= 1
        assert repr(text) == str(text)
        assert "title = {" in text
        assert "author = {" in text
    with pytest.raises(KeyError, match="did you mean 'nash_mtl'"):
        mtl.citation("NashMTL")


# --------------------------------------------------------------- options and oracles

# Every option at another value than its default: factory's, and the oracle's.
OPTIONS = [
    ("cagrad", {"c": 0.9}, {"c": 0.9}),
    ("dualproj", {"preference": [4.0, 1, 2, 0.5]}, {"preference": [4.0, 1, 2, 0.5]}),
    ("fairgrad", {"alpha": 3.0}, {"alpha": 3.0}),
    ("gradvac", {"beta": 0.1}, {"beta": 0.1}),
    ("imgrad", {"c": 0.3, "offset": 1.0}, {"c": 0.3, "offset": 1.0}),
    ("krum", {"num_byzantine": 1}, {"broken": 1}),
    ("nash_mtl", {"max_norm": 7.0}, {"max_norm": 7.0}),
    ("nash_mtl", {"max_norm": 0.0}, {"max_norm": np.inf}),
    ("pcd", {"tau": 0.3, "beta": 0.5}, {"tau": 0.3, "beta": 0.5}),
    ("pcd", {"tau": 1.0, "eps": 9.0}, {"tau": 1.0, "eps": 9.0}),
    ("pivrg", {"bound": 4.0}, {"bound": 4.0}),
    ("pivrg", {"min_temperature": 90.0}, {"floor": 90.0}),
    ("upgrad", {"preference": [4.0, 1, 2, 0.5]}, {"preference": [4.0, 1, 2, 0.5]}),
]


@pytest.mark.parametrize(
    ("name", "options", "oracles"),
    OPTIONS,
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_do_what_the_formulas_say(name, options, oracles):
    method = mtl.METHODS[name]
    changed = method._replace(factory=functools.partial(method.factory, **options))
    oracle = functools.partial(ORACLES[name], **oracles)
    laws.check_oracle(changed, oracle, 4)
    with pytest.raises(AssertionError):  # and not what the defaults say
        laws.check_oracle(changed, ORACLES[name], 4)


def test_mgda_spreads_a_loss_that_is_nan():
    losses = jnp.array([jnp.nan, 1.0, 1.0, 1.0])
    for normalization in ("loss", "loss+"):
        tx = mtl.mgda(4, normalization=normalization)
        assert np.isnan(weights_of(tx, ROWS, losses=losses)).any()


@pytest.mark.parametrize("name", ["nash_mtl", "fairgrad", "pivrg"])
def test_lengths_may_be_twenty_orders_apart(name):
    rows = jnp.array([[1e-10, 1e-10], [-1e10, 0.0]])
    method = mtl.METHODS[name].make(2)
    update, _ = laws.quick_jit(method.update)(
        rows, method.init(rows[0]), delta_m=jnp.zeros(2)
    )
    unit = np.asarray(update / jnp.linalg.norm(update), np.float64)
    assert unit @ [1, 1] > 0 > unit[0]


def test_imgrad_is_steady_where_gradients_cancel():
    direction = np.random.default_rng(5).standard_normal(8)
    found = [
        weights_of(mtl.imgrad(3), np.outer([s, -s, s], direction).astype(np.float32))
        for s in (0.3, 1.0, 1.7, 1e3)
    ]
    for weights in found[1:]:
        np.testing.assert_allclose(weights, found[0], atol=1e-4)


def test_many_huge_rows():
    """Sums of squares would overflow although each is within bounds."""
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((40, 30)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    for tx in (mtl.krum(40), mtl.cagrad(40), mtl.aligned_mtl(40)):
        near = weights_of(tx, rows)
        far = weights_of(tx, rows * np.float32(2.9e18))
        np.testing.assert_allclose(far, near, atol=1e-3)
    alike = np.repeat(rows[:1], 40, 0) * np.float32(2.9e18)
    assert np.all(np.isfinite(weights_of(mtl.aligned_mtl(40), alike)))


def test_gradvac_does_not_explode_after_parallel_gradients():
    tx = mtl.gradvac(2)
    key = jax.random.key(0)
    step = laws.quick_jit(lambda g, s: tx.update(g, s, key=key))
    state = tx.init(jnp.zeros(2))
    for _ in range(30):
        _, state = step(jnp.array([[1.0, 0.0], [1.0, 0.0]]), state)
    for angle in (1, 25, 90):
        turned = [np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))]
        update, _ = step(jnp.array([[1.0, 0.0], turned]), state)
        assert np.linalg.norm(update) < 20


# ------------------------------------------------------------- broken and low precision


@pytest.mark.slow
@pytest.mark.parametrize("method", mtl.METHODS.values(), ids=lambda m: m.name)
def test_a_broken_task_counts_as_absent(method):
    rows, losses = (x[0] for x in laws.draws(3))
    spoiled = rows.copy()
    spoiled[:, 1, 4] = np.nan
    mask = np.array([True, False, True])
    tx = method.make(3)
    guarded = mtl.skip_nonfinite_tasks(tx)

    def run(tx, extra):
        def step(state, now):
            row, loss = now
            grads = laws.to_tree(row)
            extras = laws.extras_of(method, 3, loss, grads=grads) | extra
            updates, state = tx.update(grads, state, laws.params_of(), **extras)
            return state, laws.to_flat(updates)

        scan = functools.partial(jax.lax.scan, step, tx.init(laws.params_of()))
        return np.asarray(laws.quick_jit(scan)((spoiled, losses))[1])

    found, wanted = run(guarded, {}), run(tx, {"task_mask": mask})
    assert np.all(np.isfinite(wanted))
    assert np.abs(wanted).max() > 0
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
