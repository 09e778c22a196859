"""Weightings that follow the losses: closed forms, options, and TorchJD's numbers.

`fixtures/torchjd_0_18_histories.json` holds what TorchJD's FAMO and DWA do over twelve
steps in float64.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from oracles import ORACLES
from oracles_histories import best_groups, famo, go4align, relobralo

import mtl_optax as mtl


@pytest.fixture(scope="module")
def torchjd(load_fixture):
    return load_fixture("torchjd_0_18_histories")


def follow(tx, losses, **given):
    """``(weights [steps, T], states)`` of a run; what is given has a row a step."""
    losses = jnp.asarray(losses, float)
    params = jnp.zeros(losses.shape[1:], losses.dtype)

    def step(state, now):
        losses, extra = now
        _, state = tx.update(jnp.diag(losses), state, params, losses=losses, **extra)
        return state, state

    scan = functools.partial(jax.lax.scan, step, tx.init(params))
    states = laws.quick_jit(scan)((losses, given))[1]
    return np.asarray(states.info.task_weights), states.weighting


def some_losses(steps, tasks, seed=0):
    return 10 ** np.random.default_rng([seed, tasks]).uniform(-1, 1, (steps, tasks))


# -------------------------------------------------------------------- FAMO and TorchJD


def after_each_step(losses):
    """What is passed at each step: the losses after the last one; nothing is known."""
    return np.concatenate([np.full_like(losses[:1], np.nan), losses[:-1]])


FAMO = {
    "losses_again": ({}, True),
    "next_losses": ({}, False),
    "options": ({"learning_rate": 0.1, "weight_decay": 0.05, "min_losses": None}, True),
}


@pytest.mark.parametrize("case", FAMO)
def test_famo_is_torchjds(case, torchjd, x64):
    before, after = np.array(torchjd["before"]), np.array(torchjd["after"])
    options, takes_again = FAMO[case]
    if "min_losses" in options:
        options = options | {"min_losses": np.array(torchjd["min_losses"])}
    extra = {"losses_again": after_each_step(after)} if takes_again else {}
    weights, state = follow(mtl.famo(4, **options), before, **extra)
    wanted = torchjd["famo"][case]
    # Adam divides by the root of a mean of squares; its rounding differs.
    np.testing.assert_allclose(weights, wanted["gradients"], rtol=1e-7)
    found = state.learned.learned_values[1:]  # theirs move before the next step
    np.testing.assert_allclose(found, wanted["logits"][:-1], rtol=1e-7, atol=1e-9)
    # NumPy says the same.
    oracle = famo(None, before, **options, after=after if takes_again else None)
    np.testing.assert_allclose(weights, oracle, rtol=1e-9)


def test_famo_starts_as_torchjds(load_fixture):
    fixture = load_fixture("torchjd_0_18")["scalarizers"]
    weights, _ = follow(mtl.famo(3), [fixture["losses"]])
    np.testing.assert_allclose(weights[0], fixture["out"]["FAMO"]["grad"], rtol=1e-6)


@pytest.mark.parametrize("forward_passes", [1, 2])
def test_famo_makes_all_losses_fall_alike(forward_passes):
    """``L_t = a_t x_t^2 / 2``, all 1/2 at first; under equal weights a_2 is slow."""
    curvatures = jnp.array([1.0, 0.1])

    def loss_fn(x):
        return curvatures * x**2 / 2

    def rates(tx):
        def step(carry, _):
            x, state = carry
            losses, grads = mtl.task_jacobian(loss_fn)(x)
            extra = {"losses_again": losses} if forward_passes == 2 else {}
            updates, state = tx.update(grads, state, x, **extra)
            return (x - 0.002 * updates, state), losses

        x = 1 / jnp.sqrt(curvatures)
        scan = functools.partial(jax.lax.scan, step, length=2000)
        losses = laws.quick_jit(scan)((x, tx.init(x)), None)[1]
        return np.log(losses[1000] / losses[-1])

    slow, fast = np.sort(rates(mtl.mean(2)))
    assert fast / slow > 9
    slow, fast = np.sort(rates(mtl.famo(2, weight_decay=0.0)))
    assert fast / slow < 1.05


def test_famo_takes_losses_again_in_any_form():
    tx = mtl.famo(2)
    grads, losses = jnp.eye(2), jnp.array([1.0, 2.0])
    update = functools.partial(tx.update, losses=losses)
    _, state = update(grads, tx.init(jnp.zeros(2)))
    _, wanted = update(grads, state, losses_again=jnp.array([0.5, 2.0]))
    assert wanted.info.task_weights[1] > state.info.task_weights[1]
    for form in ({"a": 0.5, "b": 2.0}, (jnp.float32(0.5), 2.0), [0.5, 2.0]):
        _, found = update(grads, state, losses_again=form)
        laws.assert_bits_equal(found, wanted)
    for wrong in (jnp.ones(3), jnp.ones((2, 1)), {"a": 1.0}, (jnp.ones(2),), ()):
        with pytest.raises(ValueError, match=r"losses_again: expected shape \(2,\)"):
            update(grads, state, losses_again=wrong)


def test_famo_learns_of_tasks_that_both_batches_know():
    """What stands for a task that the last batch lacked says nothing."""
    tx = mtl.famo(3, learning_rate=0.1)
    losses = some_losses(3, 3)
    masks = np.array([[True] * 3, [True, False, True], [True] * 3])
    again = np.stack([losses[0], losses[0] / 2, [1.0, 0.0, 3.0]])
    _, state = follow(tx, losses, task_mask=masks, losses_again=again)
    logits = np.asarray(state.learned.learned_values)
    assert np.all(logits[1:, 1] == 0)
    assert np.all(logits[2, [0, 2]] != logits[1, [0, 2]])
    # Without them, its own last loss counts, however long ago.
    _, state = follow(tx, losses, task_mask=masks)
    logits = np.asarray(state.learned.learned_values)
    assert logits[1, 1] == 0 != logits[2, 1]
    # A loss that came out as NaN is one more that is not known.
    again[1] = losses[0] / [2, 3, np.nan]
    _, state = follow(tx, losses, losses_again=again)
    logits = np.asarray(state.learned.learned_values)
    assert logits[1, 2] == 0
    assert np.all(logits[1, :2] != 0)


def test_famo_with_losses_again_and_an_absent_task():
    losses, again = some_losses(10, 3), some_losses(10, 3, seed=1)
    kept = np.array([True, False, True])
    found, _ = follow(
        mtl.famo(3),
        np.where(kept, losses, np.nan),
        losses_again=np.where(kept, again, np.inf),
        task_mask=np.broadcast_to(kept, losses.shape),
    )
    wanted, _ = follow(mtl.famo(2), losses[:, kept], losses_again=again[:, kept])
    np.testing.assert_allclose(found[:, kept], wanted, rtol=1e-5)


def test_famo_below_its_bounds():
    """A loss at its bound gets all the weight; below it, no more than that."""
    tx = mtl.famo(2, min_losses=[-21.0, 0.0])
    for lowest in (-21.0, -30.0):
        weights, state = follow(tx, [[lowest, 1.0], [lowest, 0.5]])
        assert np.all(np.isfinite(state.learned.learned_values))
        np.testing.assert_allclose(weights, [[1, 0], [1, 0]], atol=1e-6)
    weights, _ = follow(tx, [[-19.0, 1.0]])
    np.testing.assert_allclose(weights, [[1 / 3, 2 / 3]], rtol=1e-6)


def test_famo_checks_its_bounds():
    for wrong in ([1.0], [[1.0, 2.0]], 1.0):
        with pytest.raises(ValueError, match=r"min_losses: .* shape \(2,\)"):
            mtl.famo(2, min_losses=wrong)
    with pytest.raises(ValueError, match="min_losses must be finite"):
        mtl.famo(2, min_losses=[0.0, np.nan])

    @laws.quick_jit
    def step(bound):
        tx = mtl.famo(2, min_losses=[bound, 0.0])
        losses = jnp.array([3.0, 1.0])
        return tx.update(jnp.eye(2), tx.init(jnp.zeros(2)), losses=losses)[0]

    np.testing.assert_allclose(step(2.5), [2 / 3, 1 / 3], rtol=1e-6)


# ------------------------------------------------------------------------ DWA, TorchJD


DWA = {
    "window_3": {"window": 3},
    "window_2_temperature_half": {"window": 2, "temperature": 0.5},
}


@pytest.mark.parametrize("case", DWA)
def test_dwa_is_torchjds(case, torchjd, x64):
    weights, _ = follow(mtl.dwa(4, **DWA[case]), torchjd["before"])
    np.testing.assert_allclose(weights, torchjd["dwa"][case], rtol=1e-10)
    assert np.ptp(weights[-1]) > 0.1


def test_dwa_counts_windows_task_by_task():
    """A task that comes late stands still until it has two windows of its own."""
    losses = np.array([[1, 8], [1, 8], [1, 4], [1, 2], [1, 1.0]])
    masks = np.array([[True, False], *[[True, True]] * 4])
    weights, _ = follow(mtl.dwa(2, window=1, temperature=1.0), losses, task_mask=masks)
    np.testing.assert_allclose(weights[:3], [[1, 0], [1, 1], [1, 1]], rtol=1e-6)
    share = 2 / (1 + np.exp(-0.5))  # its loss halved, that of the other stands still
    np.testing.assert_allclose(weights[3:], [[share, 2 - share]] * 2, rtol=1e-6)


def test_dwa_where_ratios_have_no_meaning():
    for losses in ([[0, 1], [0, 1], [0, 1]], [[0, 1], [1, 1], [1, 1]]):
        weights, _ = follow(mtl.dwa(2, window=1), np.array(losses, float))
        np.testing.assert_allclose(weights, np.ones((3, 2)), rtol=1e-6)
    weights, _ = follow(mtl.dwa(2, window=1), [[1e-30, 1], [1e30, 1], [1, 1.0]])
    np.testing.assert_allclose(weights[2], [2, 0], atol=1e-6)


# --------------------------------------------------------------------------- SoftAdapt

# The authors' README: five losses a task, and the weights of their three variants.
AUTHORS_LOSSES = [
    [1, 2, 3, 4, 5],
    [150, 100, 50, 10, 0.1],
    [1500, 1000, 500, 100, 1],
    [10, 20, 30, 40, 50],
]
AUTHORS = [
    ("original", 3, [9.9343e-01, 6.5666e-03, 3.8908e-22]),
    ("original", 4, [2.8850e-01, 1.9070e-03, 1.1299e-22, 7.0959e-01]),
    ("loss_weighted", 3, [8.7978e-01, 1.2022e-01, 7.1234e-20]),
    ("loss_weighted", 4, [3.8861e-02, 5.3104e-03, 3.1465e-21, 9.5583e-01]),
]


@pytest.mark.parametrize(("variant", "tasks", "wanted"), AUTHORS)
def test_softadapt_is_the_authors(variant, tasks, wanted, x64):
    losses = np.array(AUTHORS_LOSSES[:tasks], float).T
    weights, _ = follow(mtl.softadapt(tasks, variant=variant), losses)
    np.testing.assert_allclose(weights[-1], wanted, rtol=1e-4)


def test_softadapt_normalized_keeps_the_order():
    """The authors' present code gives 0.3221, 0.3251, 0.3528: most to the fastest."""
    losses = np.array(AUTHORS_LOSSES[:3], float).T
    tx = mtl.softadapt(3, variant="normalized")
    weights, state = follow(tx, losses)
    slopes = np.asarray(state.info.loss_slopes, np.float64)[-1]
    raw = np.exp(0.1 * slopes / np.abs(slopes).sum())
    np.testing.assert_allclose(weights[-1], raw / raw.sum(), rtol=1e-5)
    assert weights[-1, 0] > weights[-1, 1] > weights[-1, 2]
    # Divided by their sum, which is negative, it is theirs.
    theirs = np.exp(0.1 * slopes / slopes.sum())
    theirs = theirs / theirs.sum()
    np.testing.assert_allclose(theirs, [0.3221, 0.3251, 0.3528], atol=1e-4)
    # Only ratios of slopes matter.
    again, _ = follow(tx, 1000 * losses)
    np.testing.assert_allclose(again, weights, rtol=1e-5)


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_softadapt_slopes_are_exact_for_polynomials(window, x64):
    """Of degree below the window: the derivative at the oldest point."""
    rng = np.random.default_rng(window)
    curves = [np.polynomial.Polynomial(c) for c in rng.uniform(0, 1, (3, window))]
    steps = np.arange(2 * window)
    losses = np.stack([curve(steps / 4) for curve in curves], axis=1)
    _, state = follow(mtl.softadapt(3, window=window), losses)
    slopes = np.asarray(state.info.loss_slopes)
    assert not slopes[: window - 1].any()
    oldest = steps[: window + 1] / 4
    wanted = np.stack([curve.deriv()(oldest) / 4 for curve in curves], axis=1)
    np.testing.assert_allclose(slopes[window - 1 :], wanted, rtol=1e-8)


def test_softadapt_without_a_rate_of_change():
    for variant in ("original", "normalized"):
        weights, _ = follow(mtl.softadapt(2, variant=variant), [[3.0, 1.0]] * 8)
        np.testing.assert_allclose(weights, np.full((8, 2), 0.5), rtol=1e-6)
    tx = mtl.softadapt(2, variant="loss_weighted")
    for losses in ([3.0, 1.0], [-3.0, 1.0]):
        weights, _ = follow(tx, [losses] * 8)
        np.testing.assert_allclose(weights, [[0.75, 0.25]] * 8, rtol=1e-6)
    weights, _ = follow(tx, [[0.0, 0.0]] * 8)
    np.testing.assert_allclose(weights, np.full((8, 2), 0.5), rtol=1e-6)


# --------------------------------------------------------------------------- ReLoBRaLo


def keys(steps, seed=0):
    return jax.random.split(jax.random.key(seed), steps)


def test_relobralo_looks_back_as_often_as_it_says():
    losses = np.broadcast_to([[2.0, 1.0], [1.0, 1.0], [1.0, 1.0]], (400, 3, 2))
    tx = mtl.relobralo(2, alpha=1.0, rho=0.7)

    def last_weight(losses, key):
        state = tx.init(jnp.zeros(2))
        for now, k in zip(losses, jax.random.split(key, 3), strict=True):
            _, state = tx.update(jnp.eye(2), state, losses=now, key=k)
        return state.info.task_weights

    found = laws.quick_jit(jax.vmap(last_weight))(losses, keys(400))
    half = 2 / (1 + np.exp(0.5))  # at step two, and whenever it looks back to the start
    np.testing.assert_allclose(found, np.array([[half, 2 - half]] * 400), rtol=1e-6)
    # After step two nothing has changed since the last step, but since the start.
    losses = np.broadcast_to([[2.0, 1.0], [2.0, 1.0], [1.0, 1.0]], (400, 3, 2))
    found = np.asarray(laws.quick_jit(jax.vmap(last_weight))(losses, keys(400)))
    kept = np.isclose(found[:, 0], 1)
    np.testing.assert_allclose(found[~kept], [[half, 2 - half]] * sum(~kept), rtol=1e-6)
    assert 0.6 < kept.mean() < 0.8


@pytest.mark.parametrize("rho", [0.0, 1.0])
def test_relobralo_with_other_keys(rho, x64):
    """At the ends of its range, rho leaves nothing to chance."""
    losses = some_losses(12, 4)
    options = {"alpha": 0.8, "temperature": 0.3, "rho": rho}
    weights, _ = follow(mtl.relobralo(4, **options), losses, key=keys(12, seed=3))
    wanted = relobralo(None, losses, **options)
    np.testing.assert_allclose(weights, wanted, rtol=1e-9)
    np.testing.assert_allclose(weights.sum(1), 4)


def test_relobralo_counts_steps_task_by_task():
    losses = np.array([[1, 9.0], [1, 4], [1, 2], [1, 2]])
    masks = np.array([[True, False], *[[True, True]] * 3])
    tx = mtl.relobralo(2, alpha=0.5, rho=1.0)
    weights, _ = follow(tx, losses, task_mask=masks, key=keys(4))
    one = 2 / (1 + np.exp(-0.5))  # the weight of the other while its loss halves
    half = 0.5 * 1 + 0.5 * one  # the first is at its third step there
    wanted = [[1, 0], [1, 1], [half, 2 - one], [(half + 1) / 2, (3 - one) / 2]]
    np.testing.assert_allclose(weights, wanted, rtol=1e-6)


def test_relobralo_from_a_loss_of_zero():
    losses = np.array([[0, 1], [1, 1], [0, 1], [0, 1.0]])
    tx = mtl.relobralo(2, rho=0.0)
    weights, _ = follow(tx, losses, key=keys(4))
    np.testing.assert_allclose(weights[1], [1, 1], rtol=1e-6)
    assert np.all(np.isfinite(weights))


# ----------------------------------------------------------------------------- LDC-MTL


def test_ldc_mtl_may_turn_a_weight_round():
    """Where the penalty says that a small loss should grow."""
    losses = [[1.0, 0.1, 1.0]]
    sigma = 1 / (1 + np.exp(-1))
    weights, _ = follow(mtl.ldc_mtl(3, penalty=1.0), losses)
    pushed = np.array([1, -2, 1]) * sigma
    np.testing.assert_allclose(weights[0], 1 / 3 + pushed, rtol=1e-6)
    weights, _ = follow(mtl.ldc_mtl(3), losses)
    assert weights.min() > 0


def test_ldc_mtl_looks_past_absent_tasks():
    losses = np.array([[4.0, np.nan, 2.0, np.inf, 1.0]])
    mask = np.isfinite(losses)
    weights, _ = follow(mtl.ldc_mtl(5, penalty=0.1), losses, task_mask=mask)
    wanted, _ = follow(mtl.ldc_mtl(3, penalty=0.1), losses[:, mask[0]])
    np.testing.assert_allclose(weights[mask], wanted[0], rtol=1e-6)
    middle = 1 / 3 + 0.1 * np.array([1, 0, -1]) / (1 + np.exp(-1))
    np.testing.assert_allclose(wanted[0], middle, rtol=1e-6)


@pytest.mark.parametrize("normalization", ["rescaled", "log"])
def test_ldc_mtl_normalised_knows_no_units(normalization):
    losses = some_losses(8, 3)
    units = np.array([1e-3, 1.0, 1e4])
    tx = mtl.ldc_mtl(3, normalization=normalization, learning_rate=0.1)
    weights, state = follow(tx, losses)
    others, other_state = follow(tx, losses * units)
    if normalization == "rescaled":
        # The objective is measured in the unit of the least first loss.
        assert losses[0].min() * 1e-3 < losses[0, 0] * 1e-3 * 2
        factor = (losses[0] * units).min() / losses[0].min()
        others = others / factor
    np.testing.assert_allclose(others * units, weights, rtol=1e-3)
    found, wanted = (s.learned.learned_values for s in (other_state, state))
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_ldc_mtl_moves_weights_against_the_discrepancy():
    """With a large penalty the weighted losses of two tasks draw together."""
    tx = mtl.ldc_mtl(2, penalty=1.0, learning_rate=0.05)
    _, state = follow(tx, [[2.0, 1.0]] * 60)
    sigma = 1 / (1 + np.exp(-np.asarray(state.learned.learned_values)))
    apart = sigma @ np.array([2.0, -1.0])
    assert apart[0] > 0.7
    assert abs(apart[-1]) < 0.1


# ---------------------------------------------------------------------------- GO4Align


@pytest.mark.parametrize("tasks", [1, 2, 5, 9])
def test_go4align_groups_as_well_as_can_be(tasks, x64):
    """Against all divisions into intervals; the authors' k-means finds some of them."""
    losses = some_losses(40, tasks, seed=2)
    for groups in range(1, tasks + 2):
        tx = mtl.go4align(tasks, num_groups=groups, step_size=0.0)
        weights, _ = follow(tx, losses)
        values = losses.sum(1, keepdims=True) / losses / tasks
        wanted = [best_groups(v, min(groups, tasks)) for v in values]
        np.testing.assert_allclose(weights, wanted, rtol=1e-10)
        sizes = {len(np.unique(np.round(w, 9))) for w in weights}
        assert sizes == {min(groups, tasks)}


def test_go4align_follows_the_losses():
    """Tasks with large losses lose weight beyond the inverse of their loss."""
    losses = np.array([[1.0, 3.0]] * 200)
    tx = mtl.go4align(2, step_size=1e-2)
    weights, state = follow(tx, losses)
    p = 1 / (1 + np.exp(-0.01 * 2 * np.arange(1, 201)))
    np.testing.assert_allclose(
        weights, np.stack([4 * p, 4 / 3 * (1 - p)], 1), rtol=1e-3
    )
    np.testing.assert_allclose(np.diff(state.log_indicators[-1]), [-4], rtol=1e-4)


def test_go4align_with_ties():
    """Equal losses have equal weights, wherever they stand."""
    losses = np.array([[2, 1, 2, 1, 4, 2, 4], [1, 1, 1, 1, 1, 1, 1]], np.float32)
    for groups in (1, 2, 3, 4, 7):
        tx = mtl.go4align(7, num_groups=groups, step_size=0.0)
        weights, _ = follow(tx, losses)
        for row, loss in zip(weights, losses, strict=True):
            for value in np.unique(loss):
                assert np.ptp(row[loss == value]) <= 1e-6 * row.max()
        np.testing.assert_allclose(weights[1], np.ones(7), rtol=1e-3)


def test_go4align_with_absent_tasks_and_more_groups_than_tasks():
    losses = some_losses(12, 5, seed=4)
    kept = np.array([True, False, True, True, False])
    masks = np.broadcast_to(kept, losses.shape)
    for groups in (2, 3, 4, 5):
        tx = mtl.go4align(5, num_groups=groups, step_size=0.01)
        found, _ = follow(tx, np.where(kept, losses, np.nan), task_mask=masks)
        oracle = go4align(None, losses[:, kept], groups, 0.01)
        np.testing.assert_allclose(found[:, kept], oracle, rtol=1e-4)
        assert not found[:, ~kept].any()


def test_go4align_bounds_what_division_by_zero_gives():
    weights, _ = follow(mtl.go4align(3, num_groups=3), [[0.0, 1.0, 1.0]] * 3)
    np.testing.assert_allclose(weights[0], [1e8 / 3, 2 / 3, 2 / 3], rtol=1e-3)
    weights, _ = follow(mtl.go4align(3), [[0.0, 0.0, 0.0]] * 3)
    np.testing.assert_allclose(weights, np.ones((3, 3)), rtol=1e-6)


# -------------------------------------------------------- options, and filled histories

OPTIONS = [
    ("dwa", {"window": 3}),
    ("dwa", {"window": 2, "temperature": 0.5}),
    ("softadapt", {"beta": 0.7}),
    ("softadapt", {"window": 2}),
    ("softadapt", {"window": 6}),
    ("softadapt", {"variant": "normalized"}),
    ("softadapt", {"variant": "loss_weighted", "window": 4}),
    ("relobralo", {"alpha": 0.5}),
    ("relobralo", {"temperature": 0.3}),
    ("relobralo", {"rho": 0.0}),
    ("famo", {"learning_rate": 0.3}),
    ("famo", {"weight_decay": 0.3, "learning_rate": 0.1}),
    ("famo", {"min_losses": [0.001, 0.0, 0.005, 0.002]}),
    ("ldc_mtl", {"penalty": 0.2}),
    ("ldc_mtl", {"learning_rate": 0.1}),
    ("ldc_mtl", {"normalization": "rescaled", "learning_rate": 0.1}),
    ("ldc_mtl", {"normalization": "log", "learning_rate": 0.1}),
    ("ldc_mtl", {"discrepancy": "plain", "learning_rate": 0.1}),
    ("go4align", {"num_groups": 1}),
    ("go4align", {"num_groups": 3}),
    ("go4align", {"step_size": 0.01, "num_groups": 4}),
]


def with_options(name, options):
    method = mtl.METHODS[name]
    return method._replace(factory=functools.partial(method.factory, **options))


def option_name(x):
    return x if isinstance(x, str) else " ".join(f"{k}={v}" for k, v in x.items())


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=option_name)
def test_options_do_what_the_formulas_say(name, options, x64):
    changed = with_options(name, options)
    given = {k: np.array(v) if isinstance(v, list) else v for k, v in options.items()}
    oracle = functools.partial(ORACLES[name], **given)
    laws.check_oracle(changed, oracle, 4, np.float64, 1e-7)
    with pytest.raises(AssertionError):  # and not what the defaults say
        laws.check_oracle(changed, ORACLES[name], 4, np.float64, 1e-7)


# The laws' runs are too short for DWA's default window, and the laws' key never makes
# ReLoBRaLo look back.
FILLED = [
    ("dwa", {"window": 2}),
    ("relobralo", {"rho": 0.0}),
    ("go4align", {"num_groups": 3}),
]


@pytest.mark.parametrize(("name", "options"), FILLED, ids=option_name)
def test_laws_hold_once_histories_are_full(name, options):
    method = with_options(name, options)
    laws.check_finite(method, 3)
    laws.check_absent(method)
    laws.check_absent_for_a_while(method)
    laws.check_claim(method, "permutation_equivariant", 3)
    laws.check_lazy(method, laws.Forms("dict"))
    oracle = functools.partial(ORACLES[name], **options)
    laws.check_oracle(method, oracle, 3)


OWN = ("dwa", "softadapt", "relobralo", "famo", "ldc_mtl", "go4align")


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("at", [0, 5])
def test_one_broken_loss_is_forgotten(name, broken, at):
    """Its own step is lost; later weights are not NaN."""
    losses = some_losses(12, 3)
    losses[at, 1] = broken
    options = {"dwa": {"window": 2}, "ldc_mtl": {"normalization": "rescaled"}}
    tx = mtl.METHODS[name].make(3, **options.get(name, {}))
    extra = {"key": keys(12)} if name == "relobralo" else {}
    weights, state = follow(tx, losses, **extra)
    assert np.all(np.isfinite(weights[at + 1 :]))
    assert np.ptp(weights[-1]) > 1e-3
    for path, leaf in laws.history(state):
        assert np.all(np.isfinite(leaf)), path


@pytest.mark.parametrize("name", ["famo", "ldc_mtl"])
def test_learning_rates_may_be_schedules(name):
    losses = some_losses(6, 3)
    tx = mtl.METHODS[name].make(
        3, learning_rate=lambda count: jnp.where(count < 2, 1, 0)
    )
    _, state = follow(tx, losses)
    moved = np.diff(np.asarray(state.learned.learned_values), axis=0).any(1)
    # FAMO learns from its second step on; the first difference is that step's.
    wanted = [True, True, False, False, False][0 if name == "famo" else 1 :]
    assert moved[: len(wanted)].tolist() == wanted


@pytest.mark.parametrize("name", ["famo", "ldc_mtl"])
def test_the_learned_numbers_can_be_read(name):
    tx = mtl.METHODS[name].make(2)
    _, state = tx.update(
        jnp.eye(2), tx.init(jnp.zeros(2)), losses=jnp.array([1.0, 2.0])
    )
    assert optax.tree_utils.tree_get(state, "learned_values").shape == (2,)


def test_dwa_remembers_huge_losses():
    tx = mtl.dwa(2, window=4)
    state = tx.init(jnp.zeros(2))
    step = jax.jit(lambda state, x: tx.update(jnp.eye(2), state, losses=x))
    for _ in range(20):
        updates, state = step(state, jnp.array([1e38, 1.0]))
        assert np.all(np.isfinite(updates))


@pytest.mark.parametrize("variant", ["original", "normalized", "loss_weighted"])
def test_softadapt_on_steep_slopes_under_jit(variant):
    tx = mtl.softadapt(3, window=2, variant=variant)
    step = jax.jit(lambda state, x: tx.update(jnp.eye(3), state, losses=x))
    for size in np.logspace(9, 13, 40):
        state = tx.init(jnp.zeros(3))
        for losses in ([1.0, 1.0, 1.0], [1.0, size, 1.0]):
            updates, state = step(state, jnp.array(losses, jnp.float32))
        assert np.all(np.isfinite(updates)), size


def test_softadapt_looks_back_as_the_authors_do():
    """At the oldest of five losses the slope falls as the newest rises."""
    for window, sign in ((5, -1), (2, 1)):
        tx = mtl.softadapt(2, window=window)
        state = tx.init(jnp.zeros(2))
        for loss in (1.0, 1.0, 1.0, 1.0, 2.0):
            _, state = tx.update(jnp.eye(2), state, losses=jnp.array([loss, 3.0]))
        assert np.sign(state.weighting.info.loss_slopes[0]) == sign


def test_softadapt_refuses_windows_that_float32_cannot_bear():
    with pytest.raises(ValueError, match="window must be at most 10"):
        mtl.softadapt(2, window=11)


def test_losses_again_belong_to_one_step():
    losses, g = jnp.ones(2), jnp.eye(2)
    for tx in (
        mtl.update_every(mtl.famo(2), 2),
        mtl.accumulate_task_grads(mtl.famo(2), 2),
    ):
        with pytest.raises(TypeError, match="losses_again"):
            tx.update(g, tx.init(g[0]), losses=losses, losses_again=losses)
    tx = mtl.accumulate_task_grads(mtl.m_config(2), 2)
    with pytest.raises(TypeError, match="task_mask says who is absent"):
        tx.update(g, tx.init(g[0]), fresh=jnp.array([True, False]))
