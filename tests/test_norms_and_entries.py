"""Methods on lengths and entries: what they do beyond what the laws ask of all."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from oracles import ORACLES

import mtl_optax as mtl


@pytest.fixture(scope="module")
def torchjd(load_fixture):
    return load_fixture("torchjd_norms_and_entries")


def take(tx, rows, **extra):
    """The first update."""
    rows = jnp.asarray(rows)

    def step(rows, extra):
        return tx.update(rows, tx.init(rows[0]), **extra)[0]

    return np.asarray(laws.quick_jit(step)(rows, extra))


def follow(tx, rows, losses, masks=None, state=None):
    """States after each of the steps ``rows [K, T, P]``, ``losses [K, T]``."""
    rows, losses = jnp.asarray(rows, jnp.float32), jnp.asarray(losses, jnp.float32)
    masks = jnp.ones(losses.shape, bool) if masks is None else jnp.asarray(masks)
    state = tx.init(rows[0, 0]) if state is None else state

    def step(state, now):
        row, loss, mask = now
        state = tx.update(row, state, losses=loss, task_mask=mask)[1]
        return state, state

    return laws.quick_jit(
        lambda state: jax.lax.scan(step, state, (rows, losses, masks))[1]
    )(state)


def weights_of(states):
    return np.asarray(states.info.task_weights, np.float64)


def cosine(a, b):
    return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


# --------------------------------------------------------------- options and oracles

# Every option at another value than its default; the oracles call them the same.
OPTIONS = [
    ("gradnorm", {"alpha": 0.3}),
    ("gradnorm", {"learning_rate": 0.1}),
    ("gradnorm", {"initial_losses": [3.0, 1.0, 0.1, 20.0]}),
    ("imtl", {"learning_rate": 0.1}),
    ("config", {"preference": [4.0, 1.0, 2.0, 0.5]}),
    ("trimmed_mean", {"trim_number": 2}),
    ("graddrop", {"leak": 0.4}),
    ("graddrop", {"leak": [0.0, 1.0, 0.5, 0.1]}),
    ("graddrop", {"f": lambda share: share**4}),
]


@pytest.mark.parametrize(
    ("name", "options"), OPTIONS, ids=lambda x: x if isinstance(x, str) else ",".join(x)
)
def test_options_do_what_the_formulas_say(name, options):
    method = mtl.METHODS[name]
    num_tasks = 5 if name == "trimmed_mean" else 4
    changed = method._replace(factory=functools.partial(method.factory, **options))
    oracle = functools.partial(ORACLES[name], **options)
    laws.check_oracle(changed, oracle, num_tasks)
    with pytest.raises(AssertionError):  # and not what the defaults say
        laws.check_oracle(changed, ORACLES[name], num_tasks)


@pytest.mark.parametrize("name", ["gradnorm", "imtl"])
def test_what_is_learned_may_have_a_schedule_and_another_optimiser(name):
    factory = mtl.METHODS[name].factory
    rows, losses = laws.draws(3)
    plain = follow(factory(3, learning_rate=0.1), rows[0], losses[0])
    schedule = optax.constant_schedule(0.1)
    scheduled = follow(factory(3, learning_rate=schedule), rows[0], losses[0])
    np.testing.assert_allclose(weights_of(scheduled), weights_of(plain), rtol=1e-5)
    still = follow(
        factory(3, optimizer=lambda rate: optax.sgd(0.0)), rows[0], losses[0]
    )
    first = weights_of(still)
    learned = optax.tree_utils.tree_get(still, "learned_values")
    np.testing.assert_array_equal(learned, np.broadcast_to(learned[0], first.shape))
    assert np.abs(weights_of(plain) - first).max() > 0.1


# -------------------------------------------------------------------------- gradnorm


def rows_of_length(*lengths):
    """Orthogonal rows."""
    return np.diag(np.float32(lengths))


def steady(rows, losses, steps):
    return np.repeat(rows[None], steps, 0), np.repeat(np.float32([losses]), steps, 0)


def test_gradnorm_by_hand():
    """Two steps of Adam: 0.1 each, as long as the sign stays; the sum is kept."""
    tx = mtl.gradnorm(2, learning_rate=0.1)
    states = follow(tx, *steady(rows_of_length(3, 1), [1, 1], 3))
    wanted = [[1, 1], [0.9, 1.1], [0.8, 1.2]]
    np.testing.assert_allclose(weights_of(states), wanted, rtol=1e-5)


def test_gradnorm_favours_the_task_that_trains_slowly():
    """Ratios 1 and 0.25: r = 1.6 and 0.4; the mean length is 2."""
    rows, first = rows_of_length(2, 2), [[4, 4]]
    losses = np.float32(first + [[4, 1]] * 2)
    tx = mtl.gradnorm(2, alpha=1.0, learning_rate=0.1)
    weights = weights_of(follow(tx, np.repeat(rows[None], 3, 0), losses))
    # At the first step both are at the target: no slope, no move.
    np.testing.assert_allclose(weights[:2], 1, rtol=1e-6)
    assert weights[2, 0] > 1 > weights[2, 1]
    np.testing.assert_allclose(weights.sum(1), 2, rtol=1e-6)


def test_gradnorm_without_alpha_makes_lengths_alike():
    tx = mtl.gradnorm(3, alpha=0.0, learning_rate=0.01)
    states = follow(tx, *steady(rows_of_length(5, 2, 1), [1, 20, 0.1], 800))
    lengths = weights_of(states)[-50:].mean(0) * [5, 2, 1]
    np.testing.assert_allclose(lengths, 3 / (1 / 5 + 1 / 2 + 1), rtol=0.03)


@pytest.mark.parametrize("first", [0.0, -3.0])
def test_gradnorm_does_without_an_initial_loss(first):
    """A loss that begins at zero or below counts as not trained: ratio 1."""
    rows = rows_of_length(2, 1, 3)
    losses = 1 / (1 + np.arange(30.0)[:, None] + np.zeros((30, 3)))
    odd, even = losses.copy(), losses.copy()
    odd[:, 1] = np.linspace(first, 50, 30)
    even[:, 1] = 1
    rows = np.repeat(rows[None], 30, 0)
    found, wanted = (follow(mtl.gradnorm(3), rows, x) for x in (odd, even))
    np.testing.assert_array_equal(weights_of(found), weights_of(wanted))


def test_gradnorm_takes_a_negative_loss_for_a_trained_one():
    rows, losses = steady(rows_of_length(2, 1), [1, 1], 30)
    below, zero = losses.copy(), losses.copy()
    below[1:, 1], zero[1:, 1] = -7, 0
    found, wanted = (follow(mtl.gradnorm(2), rows, x) for x in (below, zero))
    np.testing.assert_array_equal(weights_of(found), weights_of(wanted))
    assert weights_of(found)[-1, 1] < 0.5


@pytest.mark.parametrize("learning_rate", [0.025, 3.0])
def test_gradnorm_weights_stay_positive(learning_rate):
    """Plain GradNorm's go through zero, and then the lengths grow again."""
    tx = mtl.gradnorm(3, learning_rate=learning_rate)
    weights = weights_of(follow(tx, *steady(rows_of_length(1e4, 1, 2), [1, 1, 1], 300)))
    assert weights.min() > 0
    assert weights.min() < 0.01
    np.testing.assert_allclose(weights.sum(1), 3, rtol=1e-5)


def test_gradnorm_with_zero_gradients():
    rows, losses = steady(rows_of_length(0, 1, 2), [1, 1, 1], 40)
    weights = weights_of(follow(mtl.gradnorm(3), rows, losses))
    assert np.all(np.isfinite(weights))
    assert np.all(weights > 0)
    rows, losses = steady(np.zeros((3, 3), np.float32), [0, 0, 0], 40)
    np.testing.assert_array_equal(weights_of(follow(mtl.gradnorm(3), rows, losses)), 1)


def test_gradnorm_weights_of_all_tasks_keep_their_sum():
    rows, losses = laws.draws(3)
    masks = np.ones(losses[0].shape, bool)
    masks[3:9, 1] = False
    states = follow(mtl.gradnorm(3), rows[0], losses[0], masks)
    learned = np.asarray(states.weighting.balance.learned_values, np.float64)
    np.testing.assert_allclose(learned.sum(1), 3, rtol=1e-6)
    np.testing.assert_array_equal(learned[2:9, 1], learned[2, 1])
    assert learned[9, 1] != learned[8, 1]


def test_gradnorm_first_loss_is_that_of_the_tasks_first_step():
    rows, losses = laws.draws(2)
    masks = np.ones(losses[0].shape, bool)
    masks[:4, 1] = False
    broken = losses[0].copy()
    broken[:6, 0] = np.nan
    state = follow(mtl.gradnorm(2), rows[0], broken, masks).weighting
    np.testing.assert_array_equal(
        state.first_losses[-1], [losses[0, 6, 0], broken[4, 1]]
    )
    np.testing.assert_array_equal(state.has_begun[:, 0], np.arange(14) >= 6)
    np.testing.assert_array_equal(state.has_begun[:, 1], np.arange(14) >= 4)


@pytest.mark.parametrize("name", ["gradnorm", "imtl"])
def test_a_broken_loss_is_forgotten(name):
    rows, losses = laws.draws(3)
    broken = losses[0].copy()
    broken[4, 1], broken[5, 2] = np.nan, np.inf
    states = follow(mtl.METHODS[name].make(3), rows[0], broken)
    learned = np.asarray(optax.tree_utils.tree_get(states, "learned_values"))
    assert np.all(np.isfinite(learned))
    assert np.all(np.isfinite(weights_of(states)))
    assert learned[4, 0] != learned[3, 0]


@pytest.mark.parametrize(
    "wrong", [[1.0, 2.0], 3.0, [1.0, 0.0, 1.0], [1.0, -1.0, 1.0], [1.0, np.inf, 1.0]]
)
def test_gradnorm_checks_initial_losses(wrong):
    with pytest.raises(ValueError, match="initial_losses"):
        mtl.gradnorm(3, initial_losses=wrong)


# ------------------------------------------------------------------------------ imtl


def test_imtl_begins_as_imtl_g():
    for num_tasks in (1, 2, 3):
        _, rows, losses = laws.degenerate(num_tasks)
        extras = {"rows": rows, "losses": losses}
        one = laws.trajectories(mtl.METHODS["imtl"], **extras)
        other = laws.trajectories(mtl.METHODS["imtl_g"], **extras)
        np.testing.assert_array_equal(one.weights[:, 0], other.weights[:, 0])
        np.testing.assert_array_equal(one.updates[:, 0], other.updates[:, 0])


def test_imtl_has_the_scales_of_imtl_l_and_the_direction_of_imtl_g():
    rows, losses = laws.draws(3)
    found = laws.trajectories(mtl.METHODS["imtl"], rows, losses)
    by_losses = laws.trajectories(mtl.METHODS["imtl_l"], rows, losses)
    by_gradients = laws.trajectories(mtl.METHODS["imtl_g"], rows, losses)
    scales = found.states.weighting.scales.learned_values
    np.testing.assert_array_equal(
        scales, by_losses.states.weighting.learned.learned_values
    )
    plain = slice(None, None, 4)
    a, b = found.updates[plain], by_gradients.updates[plain]
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    assert np.all(np.sum(a * b, -1) > (1 - 1e-5) * lengths)
    # The shares of the scaled losses sum to one (or minus one).
    before = np.concatenate([0 * scales[:, :1], scales[:, :-1]], axis=1)
    shares = found.weights[plain] / np.exp(before[plain])
    bounded = np.abs(shares).sum(-1) > 99
    sums = np.where(bounded, 1, np.abs(shares.sum(-1)))
    np.testing.assert_allclose(sums, 1, atol=1e-3)


@pytest.mark.parametrize("scales", [[60, -60, 0], [-60, -60, 60], [60, 60, 60]])
@pytest.mark.slow
def test_imtl_with_scales_far_apart(scales):
    rows = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    tx, plain = mtl.imtl(3), mtl.imtl_g(3)
    state = tx.init(jnp.zeros(8))
    learned = jnp.float32(scales)
    inner = state.weighting.scales._replace(learned_values=learned)
    state = state._replace(weighting=state.weighting._replace(scales=inner))
    update, after = tx.update(jnp.asarray(rows), state, losses=jnp.ones(3))
    assert np.all(np.isfinite(update))
    wanted = take(plain, rows).astype(float)
    assert cosine(np.asarray(update, float), wanted) > 1 - 1e-5
    assert np.all(np.abs(after.weighting.scales.learned_values) <= 60)


@pytest.mark.parametrize("scales", [[20, -15, 0], [-50, -30, -20]])
def test_imtl_shares_of_the_scaled_gradients(scales):
    """``sum_t a_t = 1`` where ``w = a exp(s)``, also for scales that are far apart."""
    rows = np.random.default_rng(0).standard_normal((3, 8))
    tx = mtl.imtl(3)
    state = tx.init(jnp.zeros(8))
    inner = state.weighting.scales._replace(learned_values=jnp.float32(scales))
    state = state._replace(weighting=state.weighting._replace(scales=inner))
    state = tx.update(jnp.float32(rows), state, losses=jnp.ones(3))[1]
    v = np.linalg.solve(rows @ rows.T, np.linalg.norm(rows, axis=1))
    wanted = v / np.sum(v * np.exp(-np.array(scales)))
    np.testing.assert_allclose(state.info.task_weights, wanted, rtol=1e-4)


def test_imtl_scales_come_back_from_their_bound():
    rows, losses = steady(np.eye(2, dtype=np.float32), [-1, 1], 200)
    losses[100:, 0] = 1
    states = follow(mtl.imtl(2, learning_rate=1.0), rows, losses)
    scales = np.asarray(states.weighting.scales.learned_values)[:, 0]
    assert scales[:100].max() == 60
    assert scales[-1] < 50


# ---------------------------------------------------------------------------- config


def test_config_agrees_with_torchjd(torchjd, x64):
    for case in torchjd["config"]:
        J, wanted = np.array(case["J"]), np.array(case["out"])
        tx = mtl.config(len(J), preference=case["preference"])
        size = np.abs(wanted).max()
        np.testing.assert_allclose(take(tx, J), wanted, atol=1e-8 * size)


def test_config_of_two_tasks_is_the_bisector_of_what_is_left_of_each():
    """The authors' closed form: each gradient without its part along the other."""
    rng = np.random.default_rng(1)
    for J in rng.standard_normal((10, 2, 6)) * [[[1.0], [30.0]]]:
        units = J / np.linalg.norm(J, axis=1)[:, None]
        left = J - np.sum(J * units[::-1], 1)[:, None] * units[::-1]
        d = np.sum(left / np.linalg.norm(left, axis=1)[:, None], axis=0)
        d = d / np.linalg.norm(d)
        found = take(mtl.config(2), J.astype(np.float32))
        np.testing.assert_allclose(found, np.sum(J @ d) * d, atol=1e-4)


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("preference", [None, [1.0, 4.0, 2.0, 0.0]])
def test_config_projections_are_as_preferred(preference, ratio):
    rng = np.random.default_rng(2)
    wanted = np.ones(4) if preference is None else np.array(preference)
    tx = mtl.config(4, preference=preference)
    for J in rng.standard_normal((5, 4, 9)):
        J = J * np.array([[ratio], [1], [1], [1 / ratio]])
        u = take(tx, J.astype(np.float32)).astype(float)
        along = J @ u / np.linalg.norm(J, axis=1) / np.linalg.norm(u)
        np.testing.assert_allclose(
            along / along.max(), wanted / wanted.max(), atol=1e-4
        )
        # Its length: that of the gradients' sum, seen along it.
        length = np.sum(J @ u) / np.linalg.norm(u)
        np.testing.assert_allclose(np.linalg.norm(u), length, rtol=1e-3)


def test_config_only_ratios_of_preferences_count():
    rows = np.random.default_rng(3).standard_normal((3, 5)).astype(np.float32)
    wanted = take(mtl.config(3, preference=[1, 2, 3]), rows)
    for size in (1e-30, 7.0, 1e30):
        given = [size, 2 * size, 3 * size]
        found = take(mtl.config(3, preference=given), rows)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_config_where_the_preferred_cannot_be_had():
    row = np.random.default_rng(4).standard_normal(7).astype(np.float32)
    for shares in ([1, -1], [1, -3], [1e-3, -1e3]):  # opposite: nothing is left
        found = take(mtl.config(2), np.outer(shares, row).astype(np.float32))
        assert np.abs(found).max() < 1e-5
    for shares in ([1, 2], [1, 1, 5], [1, -2, 3], [1, -4, 1]):  # on a line: the sum
        found = take(mtl.config(len(shares)), np.outer(shares, row).astype(np.float32))
        np.testing.assert_allclose(found, sum(shares) * row, rtol=1e-4)
    rows = np.stack([0 * row, row])
    np.testing.assert_allclose(take(mtl.config(2), rows), row, rtol=1e-5)
    lone = mtl.config(2, preference=[1.0, 0.0])  # who is preferred has arrived
    np.testing.assert_array_equal(take(lone, rows), 0 * row)


# ---------------------------------------------------------------------- trimmed_mean


def test_trimmed_mean_agrees_with_torchjd(torchjd, x64):
    for case in torchjd["trimmed_mean"]:
        J = np.array(case["J"])
        found = take(mtl.trimmed_mean(len(J), trim_number=case["trim_number"]), J)
        np.testing.assert_allclose(found, case["out"], rtol=1e-12)


def test_trimmed_mean_without_enough_tasks_is_the_median():
    rng = np.random.default_rng(5)
    for size in range(1, 8):
        J = rng.standard_normal((size, 6)).astype(np.float32)
        for trim_number in (3, 4, 100):
            found = take(mtl.trimmed_mean(size, trim_number=trim_number), J)
            np.testing.assert_allclose(found, np.median(J, axis=0), rtol=1e-6)


@pytest.mark.parametrize("trim_number", [1, 2])
def test_trimmed_mean_counts_present_tasks(trim_number):
    rng = np.random.default_rng(6)
    J = rng.standard_normal((7, 6)).astype(np.float32)
    tx = mtl.trimmed_mean(7, trim_number=trim_number)
    for absent in range(8):
        mask = np.ones(7, bool)
        mask[rng.permutation(7)[:absent]] = False
        rows = np.where(
            mask[:, None], J, rng.choice([np.nan, np.inf, -np.inf], J.shape)
        )
        found = take(tx, rows.astype(np.float32), task_mask=jnp.asarray(mask))
        if absent == 7:
            np.testing.assert_array_equal(found, 0)
            continue
        alone = mtl.trimmed_mean(7 - absent, trim_number=trim_number)
        np.testing.assert_allclose(found, take(alone, J[mask]), rtol=1e-5, atol=1e-6)


def test_trimmed_mean_trims_what_is_not_finite():
    J = np.random.default_rng(7).standard_normal((6, 5)).astype(np.float32)
    good = np.sort(J[2:], axis=0)  # four that are sound
    for low, high in ((-np.inf, np.inf), (-np.inf, np.nan), (-1e38, 1e38)):
        J[0], J[1] = low, high
        found = take(mtl.trimmed_mean(6), J)
        np.testing.assert_allclose(found, good.mean(0), rtol=1e-5)
    J[:2] = np.nan  # two, but one alone is trimmed
    assert not np.any(np.isfinite(take(mtl.trimmed_mean(6), J)))
    mask = jnp.array([True] * 5 + [False])
    assert not np.any(np.isfinite(take(mtl.trimmed_mean(6), J, task_mask=mask)))
    assert np.all(np.isfinite(take(mtl.trimmed_mean(6, trim_number=2), J)))


def test_trimmed_mean_of_the_largest_numbers():
    J = np.full((4, 3), 2e38, np.float32)
    np.testing.assert_allclose(take(mtl.trimmed_mean(4), J), 2e38, rtol=1e-6)


def test_trimmed_mean_adds_up_in_float32():
    """In bfloat16 the sum of 300 would stand still at 256."""
    J = jnp.ones((302, 2), jnp.bfloat16)
    np.testing.assert_array_equal(take(mtl.trimmed_mean(302), J).astype(float), 1)


# -------------------------------------------------------------------------- graddrop

FUNCTIONS = {
    "identity": None,
    "square": jnp.square,
    "smoothstep": lambda p: p * p * (3 - 2 * p),
}


def test_graddrop_agrees_with_torchjd(torchjd, x64, monkeypatch):
    for case in torchjd["graddrop"]:
        draws = jnp.asarray(case["U"])
        monkeypatch.setattr(jax.random, "uniform", lambda *args, u=draws: u)
        J = np.array(case["J"])
        leak = 0.0 if case["leak"] is None else case["leak"]
        tx = mtl.graddrop(len(J), leak=leak, f=FUNCTIONS[case["f"]])
        found = tx.update(jnp.asarray(J), tx.init(J[0]), key=jax.random.key(0))[0]
        np.testing.assert_allclose(found, case["out"], rtol=1e-6, atol=1e-7)


def many(tx, tree, number=20_000, **extra):
    """Updates for as many keys."""
    state = tx.init(jax.tree.map(lambda g: g[0], tree))

    def one(key):
        return tx.update(tree, state, key=key, **extra)[0]

    keys = jax.random.split(jax.random.key(1), number)
    return jax.device_get(laws.quick_jit(jax.vmap(one))(keys))


@pytest.mark.parametrize("leak", [0.0, 0.3, [1.0, 0.5, 0.0]])
@pytest.mark.parametrize("f", ["identity", "square"])
def test_graddrop_expectation(leak, f):
    """``E u = sum_t (l_t + (1 - l_t) p_t) g_t``, p_t the probability of its sign."""
    J = np.random.default_rng(8).standard_normal((3, 10))
    tx = mtl.graddrop(3, leak=leak, f=FUNCTIONS[f])
    found = many(tx, jnp.asarray(J, jnp.float32)).astype(np.float64)
    share = (1 + J.sum(0) / np.abs(J).sum(0)) / 2
    up = share if f == "identity" else share**2
    leaks = np.broadcast_to(leak, 3)[:, None]
    wanted = np.sum((leaks + (1 - leaks) * np.where(J > 0, up, 1 - up)) * J, axis=0)
    error = 5 * found.std(0) / np.sqrt(len(found)) + 1e-5
    assert np.all(np.abs(found.mean(0) - wanted) < error)
    # Entries are drawn by themselves.
    mixed = found.std(0) > 0.1
    correlations = np.corrcoef(found[:, mixed].T)
    assert mixed.sum() > 3
    assert np.abs(correlations - np.eye(len(correlations))).max() < 0.04


def test_graddrop_leaves_are_drawn_by_themselves():
    row = jnp.array([[1.0] * 8, [-1.0] * 8])
    found = many(mtl.graddrop(2), {"a": row, "b": row}, 4000)
    assert set(np.unique(found["a"])) == {-1.0, 1.0}
    signs = np.concatenate([found["a"], found["b"]], axis=1)
    assert np.abs(np.corrcoef(signs.T) - np.eye(16)).max() < 0.1
    assert np.abs(signs.mean(0)).max() < 0.1


def test_graddrop_where_tasks_agree_or_have_nothing_to_say():
    J = jnp.float32([[1, -1, 0, 3e-20], [2, -5, 0, 0], [4, 0, 0, 1e-20]])
    found = many(mtl.graddrop(3), J, 5000)
    np.testing.assert_allclose(found, np.broadcast_to(J.sum(0), found.shape), rtol=1e-6)


def test_graddrop_with_a_full_leak_is_the_sum():
    J = jnp.asarray(np.random.default_rng(9).standard_normal((3, 10)), jnp.float32)
    found = many(mtl.graddrop(3, leak=1.0), J, 50)
    np.testing.assert_allclose(found, np.broadcast_to(J.sum(0), found.shape), atol=1e-5)


def test_graddrop_draws_do_not_depend_on_absent_tasks():
    J = np.random.default_rng(10).standard_normal((4, 30)).astype(np.float32)
    spoiled = J.copy()
    spoiled[[0, 2]] = np.nan
    mask = jnp.array([False, True, False, True])
    leak = np.float32([0.9, 0.2, 0.9, 0.6])
    key = jax.random.key(5)
    found = take(mtl.graddrop(4, leak=leak), spoiled, task_mask=mask, key=key)
    alone = take(mtl.graddrop(2, leak=leak[[1, 3]]), J[[1, 3]], key=key)
    np.testing.assert_allclose(found, alone, rtol=1e-6)


def test_graddrop_leaks_are_checked_and_may_be_traced():
    for wrong in ([0.5], [[0.5, 0.5]], [0.1] * 3):
        with pytest.raises(ValueError, match="leak"):
            mtl.graddrop(2, leak=wrong)
    for wrong in (-0.1, 1.1, [0.5, 1.1], [-0.1, 0.5], [np.nan, 0.5], np.inf):
        with pytest.raises(ValueError, match="leak"):
            mtl.graddrop(2, leak=wrong)
    J, key = jnp.float32([[1, -3, 2], [-4, 1, -2]]), jax.random.key(0)

    def step(leak):
        tx = mtl.graddrop(2, leak=leak)
        return tx.update(J, tx.init(J[0]), key=key)[0]

    given = jnp.float32([0.5, 0.25])
    np.testing.assert_allclose(laws.quick_jit(step)(given), step([0.5, 0.25]))
    sweep = jax.vmap(step)(jnp.float32([0.0, 1.0]))
    np.testing.assert_allclose(sweep[1], J.sum(0))
    assert np.abs(np.asarray(sweep[0] - sweep[1])).max() > 0.5


def test_graddrop_needs_a_key():
    tx = mtl.graddrop(2)
    with pytest.raises(TypeError, match="key="):
        tx.update(jnp.ones((2, 3)), tx.init(jnp.zeros(3)))
