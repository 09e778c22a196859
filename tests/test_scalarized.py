"""Weightings that minimise one number made of the losses, and what they learn.

`fixtures/torchjd_scalarizers.json` holds TorchJD's values and gradients; how they were
made stands in it. The value is `objective` here, the gradient the task weights.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import oracles_scalarized as oracles
import pytest

import mtl_optax as mtl
from mtl_optax._learned import init_learned, learn, make_optimizer
from mtl_optax._scalarized import floored, read_point, scalarized, unit_vector

STATELESS = ("cosmos", "gls", "pbi", "scale_invariant", "stch")


@functools.lru_cache(maxsize=2)
def step_of(tx, tasks):
    """A compiled step on losses alone: ``(losses, state) -> (weights, state)``."""
    rows = jnp.ones((tasks, 1))

    @laws.quick_jit
    def step(losses, state, mask):
        _, state = tx.update(rows, state, losses=losses, task_mask=mask)
        return state.info.task_weights, state

    return lambda losses, state, mask=None: step(
        jnp.asarray(losses, float),
        state,
        jnp.ones(tasks, bool) if mask is None else jnp.asarray(mask),
    )


def fresh(tx):
    return tx.init(jnp.zeros(1, float))


def look(tx, losses, mask=None):
    """``(weights, objective)`` of a first step, in float64."""
    losses = np.asarray(losses)
    weights, state = step_of(tx, len(losses))(losses, fresh(tx), mask)
    return np.asarray(weights, np.float64), float(state.weighting.info.objective)


def run(tx, losses, masks=None):
    """``(weights [steps, T], last state)`` of a run."""
    step, state = step_of(tx, np.shape(losses)[1]), fresh(tx)
    masks = np.ones(np.shape(losses), bool) if masks is None else masks
    weights = []
    for now, mask in zip(losses, masks, strict=True):
        w, state = step(now, state, mask)
        weights.append(w)
    return np.asarray(weights, np.float64), state


def learned_values(state):
    return np.asarray(state.weighting.learned.learned_values, np.float64)


# ------------------------------------------------------------------- TorchJD's numbers

# Its preferences are a third each there, as they are here by default.
SINGLE = {
    "GeometricMean": (mtl.gls, {}),
    "STCH_mu1": (mtl.stch, {"mu": 1.0}),
    "STCH_mu0.1": (mtl.stch, {"mu": 0.1}),
    "UW": (mtl.uncertainty_weighting, {}),
    "IMTLL": (mtl.imtl_l, {}),
    "PBI_1": (mtl.pbi, {"theta": 1.0}),
    "COSMOS_1": (mtl.cosmos, {"penalty": 1.0}),
}


@pytest.mark.parametrize("name", SINGLE)
def test_value_and_gradient_of_torchjd(name, load_fixture, x64):
    given = load_fixture("torchjd_0_18")["scalarizers"]
    factory, options = SINGLE[name]
    weights, objective = look(factory(3, **options), given["losses"])
    wanted = given["out"][name]
    np.testing.assert_allclose(objective, wanted["value"], rtol=1e-10)
    np.testing.assert_allclose(weights, wanted["grad"], rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "factory"), [("Mean", mtl.mean), ("Sum", mtl.constant_weights)]
)
def test_weights_of_torchjd(name, factory, load_fixture):
    given = load_fixture("torchjd_0_18")["scalarizers"]
    tx = factory(3)
    _, state = tx.update(jnp.ones((3, 1)), fresh(tx))
    np.testing.assert_allclose(state.info.task_weights, given["out"][name]["grad"])


@pytest.mark.parametrize("name", ["cosmos", "gls", "pbi", "stch"])
def test_more_of_torchjd(name, load_fixture, x64):
    """Other settings, preferences and references; losses of both signs; T up to 7."""
    cases = load_fixture("torchjd_scalarizers")["cases"]
    cases = [c for c in cases if c["method"] == name]
    assert len(cases) >= 4
    for case in cases:
        tx = getattr(mtl, name)(len(case["losses"]), **case["options"])
        weights, objective = look(tx, case["losses"])
        size = np.abs(case["grad"]).max()
        np.testing.assert_allclose(objective, case["value"], rtol=1e-10)
        np.testing.assert_allclose(weights, case["grad"], rtol=1e-9, atol=1e-11 * size)


OPTIMIZERS = {
    "adam": optax.adam(0.025),
    "adam_fast": optax.adam(0.3),
    "sgd_momentum": optax.sgd(0.01, momentum=0.9),
    "adamw": optax.adamw(0.1, weight_decay=0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["imtl_l", "uncertainty_weighting"])
def test_learned_runs_of_torchjd(name, optimizer, load_fixture, x64):
    given = load_fixture("torchjd_scalarizers")
    (case,) = (
        r for r in given["runs"] if (r["method"], r["optimizer"]) == (name, optimizer)
    )
    tx = getattr(mtl, name)(3, optimizer=lambda rate: OPTIMIZERS[optimizer])
    step, state = step_of(tx, 3), fresh(tx)
    for losses, value, grad in zip(
        given["run_losses"], case["values"], case["grads"], strict=True
    ):
        weights, state = step(losses, state)
        np.testing.assert_allclose(weights, grad, rtol=1e-7)
        np.testing.assert_allclose(
            state.weighting.info.objective, value, rtol=1e-7, atol=1e-7
        )
    last = case["grads"][-1]
    assert np.ptp(last) > 0.1 * np.max(last)  # something was learned


# ------------------------------------------------------- the formulas at other options

PREFERENCE = [4.0, 1.0, 2.0, 0.5]
POINT = [0.02, 3.0, -1.0, 0.4]
NADIR = [0.5, 3.0, 20.0, 1.0]
OPTIONS = [
    ("scale_invariant", {"preference": PREFERENCE}, oracles.scale_invariant),
    ("stch", {"mu": 30.0}, oracles.stch),
    ("stch", {"preference": PREFERENCE}, oracles.stch),
    ("stch", {"reference": POINT}, oracles.stch),
    ("cosmos", {"penalty": 0.3}, oracles.cosmos),
    ("cosmos", {"preference": PREFERENCE}, oracles.cosmos),
    ("pbi", {"theta": 0.3}, oracles.pbi),
    ("pbi", {"preference": PREFERENCE}, oracles.pbi),
    ("pbi", {"reference": POINT}, oracles.pbi),
    ("imtl_l", {"learning_rate": 0.2}, oracles.imtl_l),
    ("uncertainty_weighting", {"learning_rate": 0.2}, oracles.uncertainty_weighting),
]


@pytest.mark.parametrize(("name", "options", "oracle"), OPTIONS)
def test_options_do_what_the_formulas_say(name, options, oracle, x64):
    method = mtl.METHODS[name]
    changed = method._replace(factory=functools.partial(method.factory, **options))
    other = functools.partial(oracle, **options)
    laws.check_oracle(changed, other, 4, np.float64, 1e-7)
    with pytest.raises(AssertionError):  # and not what the defaults say
        laws.check_oracle(changed, oracle, 4, np.float64, 1e-7)


@pytest.mark.parametrize("options", [{}, {"mu": 0.1}, {"mu": 0.5, "reference": NADIR}])
def test_stch_of_logarithms_is_the_authors_code(options, x64):
    """Theirs is T times as long, whatever mu and the nadir are."""
    tx = mtl.stch(4, form="log", preference=np.ones(4), **options)
    _, losses = laws.draws(4, dtype=np.float64)
    wanted = oracles.log_stch(None, losses[0], **options)
    found, _ = run(tx, losses[0])
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


ALL = [
    *((name, {}) for name in STATELESS),
    ("imtl_l", {}),
    ("uncertainty_weighting", {}),
    *((name, options) for name, options, _ in OPTIONS),
    ("gls", {"eps": 0.5}),
    ("scale_invariant", {"eps": 0.5}),
    ("stch", {"form": "log", "mu": 0.3}),
    ("stch", {"form": "log", "reference": NADIR, "preference": PREFERENCE}),
]


@pytest.mark.parametrize(("name", "options"), ALL)
def test_weights_are_the_slopes_of_the_objective(name, options, x64):
    """By central differences, which know nothing of how weights are made."""
    tx = getattr(mtl, name)(4, **options)
    losses = np.array([0.9, 4.0, 1.5, 2.5])
    weights, _ = look(tx, losses)
    for t, step in enumerate(1e-6 * np.eye(4)):
        slope = (look(tx, losses + step)[1] - look(tx, losses - step)[1]) / 2e-6
        np.testing.assert_allclose(weights[t], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_absent_tasks_do_not_count(name, options):
    """Nor do their options; the laws ask this of the defaults, and not of the value."""
    mask = np.array([True, True, False, True])
    kept = {
        k: np.array(v)[mask] if isinstance(v, list) else v for k, v in options.items()
    }
    losses = np.array([0.9, 4.0, np.nan, 2.5], np.float32)
    found, value = look(getattr(mtl, name)(4, **options), losses, mask)
    wanted, other = look(getattr(mtl, name)(3, **kept), losses[mask])
    np.testing.assert_allclose(found[mask], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    assert found[2] == 0
    nobody, nothing = look(getattr(mtl, name)(4, **options), losses, np.zeros(4, bool))
    assert not nobody.any()
    assert nothing == 0


SHAPED = [
    (mtl.scale_invariant, "preference"),
    (mtl.stch, "preference"),
    (mtl.cosmos, "preference"),
    (mtl.pbi, "preference"),
    (mtl.stch, "reference"),
    (mtl.pbi, "reference"),
]


@pytest.mark.parametrize(("factory", "name"), SHAPED)
def test_numbers_one_a_task(factory, name):
    wrong = [[1.0, 2.0], [[1.0], [2.0], [3.0]], 1.0, [1, np.nan, 1], [1, np.inf, 1]]
    wrong += [[1, -1, 1], [0, 0, 0]] if name == "preference" else []
    for value in wrong:
        with pytest.raises(ValueError, match=name):
            factory(3, **{name: value})
    with pytest.raises(ValueError, match=r"shape \(3,\), got shape \(2,\)"):
        jax.eval_shape(lambda v: factory(3, **{name: v}).init({}), jnp.ones(2))

    losses = np.float32([2.0, 0.5, 1.0])

    def weights(value):
        tx = factory(3, **{name: value})
        _, state = tx.update(jnp.ones((3, 1)), fresh(tx), losses=losses)
        return state.info.task_weights

    values = jnp.array([[1.0, 2.0, 3.0], [2.0, 0.5, 0.1]])
    found = jax.jit(jax.vmap(weights))(values)  # traced, as a sweep or a draw is
    for row, value in zip(found, values, strict=True):
        np.testing.assert_allclose(row, weights(value), rtol=1e-5)
        np.testing.assert_allclose(row, weights(list(value)), rtol=1e-5)


def test_the_form_of_stch_and_its_nadir():
    with pytest.raises(ValueError, match="form must be one of"):
        mtl.stch(2, form="exp")
    for wrong in ([1.0, 0.0], [1.0, -2.0]):
        mtl.stch(2, reference=wrong)
        with pytest.raises(ValueError, match="reference must be positive"):
            mtl.stch(2, reference=wrong, form="log")


@pytest.mark.parametrize("factory", [mtl.cosmos, mtl.pbi, mtl.stch])
def test_a_preference_drawn_at_every_step(factory):
    """As Pareto front learning does it: one compiled step, one state."""
    traces = []

    @jax.jit
    def step(key, state):
        traces.append(key)
        tx = factory(3, preference=jax.random.dirichlet(key, jnp.ones(3)))
        losses = jnp.array([2.0, 0.5, 1.0])
        return tx.update(jnp.ones((3, 1)), state, losses=losses)[1]

    state, found = fresh(factory(3)), []
    for key in jax.random.split(jax.random.key(0), 4):
        state = step(key, state)
        found.append(np.asarray(state.info.task_weights))
    assert len(traces) == 1
    assert len({tuple(w) for w in found}) == 4


# ------------------------------------------------------------------------------ GLS, SI


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_gls_of_a_product_that_overflows(size):
    """Forty losses: their product is 1e480 or 1e-480."""
    losses = size * np.linspace(0.5, 2, 40)
    weights, objective = look(mtl.gls(40), losses)
    wanted = np.exp(np.mean(np.log(losses)))
    np.testing.assert_allclose(objective, wanted, rtol=1e-5)
    np.testing.assert_allclose(weights, wanted / 40 / losses, rtol=1e-5)


def test_gls_does_not_overflow_however_uneven_losses_are():
    losses = np.float32([1e-30, *[3e38] * 6])
    weights, objective = look(mtl.gls(7), losses)
    assert np.all(np.isfinite(weights))
    assert np.all(weights > 0)
    assert np.isfinite(objective)


@pytest.mark.parametrize("done", [0.0, -3.0, 1e-4])
def test_a_larger_eps_keeps_a_task_that_is_done_from_stopping_the_others(done):
    weights, _ = look(mtl.gls(2, eps=0.01), [done, 1.0])
    np.testing.assert_allclose(weights, [0.1 / 2 / 0.01, 0.1 / 2], rtol=1e-5)
    weights, _ = look(mtl.scale_invariant(2, eps=0.01), [done, 1.0])
    np.testing.assert_allclose(weights, [100, 1], rtol=1e-5)


@pytest.mark.parametrize("name", ["gls", "scale_invariant"])
def test_units_do_not_matter(name):
    """The gradient is in the loss's unit, too: what each task adds is the same."""
    losses, units = np.array([2.0, 0.3, 7.0]), np.array([1e3, 1e-4, 5.0])
    plain, _ = look(getattr(mtl, name)(3), losses)
    other, _ = look(getattr(mtl, name)(3), losses * units)
    factor = other * units / plain
    np.testing.assert_allclose(factor, factor[0], rtol=1e-5)
    wanted = np.prod(units) ** (1 / 3) if name == "gls" else 1
    np.testing.assert_allclose(factor[0], wanted, rtol=1e-5)


def test_gls_is_scale_invariant_at_another_length():
    losses = [2.0, 0.3, 7.0]
    one, _ = look(mtl.gls(3, scale="mean"), losses)
    other, _ = look(mtl.scale_invariant(3, scale="mean"), losses)
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_floored():
    losses = jnp.array([-1e30, -1.0, 0.0, 1e-25, 1e-20, 0.5, 1e30])
    found, slopes = jax.jvp(
        lambda x: floored(x, 1e-20), (losses,), (jnp.arange(1.0, 8),)
    )
    np.testing.assert_array_equal(found, np.maximum(losses, np.float32(1e-20)))
    np.testing.assert_array_equal(slopes, np.arange(1.0, 8))


# --------------------------------------------------------------------------------- STCH


def test_stch_between_the_maximum_and_a_constant():
    losses = [2.0, 0.3, 7.0]
    weights, objective = look(mtl.stch(3, mu=1e-4), losses)
    np.testing.assert_allclose(weights, [0, 0, 1 / 3], atol=1e-7)
    np.testing.assert_allclose(objective, 7 / 3, rtol=1e-6)
    weights, _ = look(mtl.stch(3, mu=1e6), losses)
    np.testing.assert_allclose(weights, np.full(3, 1 / 9), rtol=1e-5)
    # Among equal ones the maximum is shared.
    weights, _ = look(mtl.stch(3, mu=1e-8), [7.0, 0.3, 7.0])
    np.testing.assert_allclose(weights, [1 / 6, 0, 1 / 6], rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30, -1e30])
@pytest.mark.parametrize("mu", [2e-38, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("form", ["plain", "log"])
def test_stch_is_finite_however_small_mu_is(form, mu, size):
    losses = size * np.array([1.0, 0.9, 0.1])
    weights, objective = look(mtl.stch(3, mu=mu, form=form), losses)
    assert np.all(np.isfinite(weights))
    assert np.all(weights >= 0)
    assert weights.max() > 0
    assert np.isfinite(objective)


def test_the_worst_task_of_stch_is_one_that_is_present():
    """All below zero, where an absent task would stand."""
    mask = [True, True, False]
    found, value = look(mtl.stch(3, mu=1e-3), [-5.0, -4.0, np.nan], mask)
    np.testing.assert_allclose(found, [0, 0.5, 0])
    np.testing.assert_allclose(value, -2)


def test_stch_counts_from_its_reference():
    losses, point = np.array([2.0, 0.3, 7.0]), np.array([1.5, -4.0, 6.0])
    found, value = look(mtl.stch(3, reference=point), losses)
    wanted, other = look(mtl.stch(3), losses - point)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(value, other, rtol=1e-5)


def test_read_point_takes_any_finite_numbers():
    assert read_point("z", None, 2) is None
    np.testing.assert_array_equal(read_point("z", [0, -1.5], 2), [0, -1.5])
    np.testing.assert_array_equal(read_point("z", jnp.array([0, 0.0]), 2), [0, 0])


# ------------------------------------------------------------------------- COSMOS, PBI


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_losses_in_the_ratio_of_the_preference_are_left_alone(size):
    """The penalty then has no slope: what is left is the plain weighted sum."""
    preference = np.array([1.0, 2.0, 4.0])
    losses = size * preference
    weights, objective = look(
        mtl.cosmos(3, penalty=1e-6, preference=preference), losses
    )
    np.testing.assert_allclose(weights, preference, rtol=1e-4)
    np.testing.assert_allclose(objective, losses @ preference - 1e-6, rtol=1e-5)
    for tilt in (0.3, 0.7, 1.3, 1.9):
        preference = np.array([1.0, 2.1, 4.3 + tilt])
        losses = size * tilt * preference
        weights, objective = look(mtl.pbi(3, preference=preference), losses)
        unit = preference / np.linalg.norm(preference)
        np.testing.assert_allclose(weights, unit, atol=0.1)  # rounding, times theta
        np.testing.assert_allclose(objective, np.linalg.norm(losses), rtol=1e-5)


@pytest.mark.parametrize("loss", [1e-30, 1e-7, 0.37, -2.0, 3e20])
@pytest.mark.parametrize("factory", [mtl.cosmos, mtl.pbi])
def test_one_task_has_no_ratio(factory, loss):
    preference = [0.3]
    weights, _ = look(factory(1, preference=preference), [loss])
    np.testing.assert_allclose(weights, 0.3 if factory is mtl.cosmos else 1, rtol=1e-6)
    tx = factory(3, preference=[5.0, 0.3, 2.0])
    weights, _ = look(tx, [1.0, loss, 2.0], [False, True, False])
    wanted = 0.3 if factory is mtl.cosmos else 1
    np.testing.assert_allclose(weights, [0, wanted, 0], rtol=1e-6)


def test_a_loss_below_its_share_is_pushed_uphill():
    for tx in (mtl.cosmos(2, penalty=8.0), mtl.pbi(2)):
        weights, _ = look(tx, [1.0, 0.2])
        assert weights[1] < 0 < weights[0]
    weights, _ = look(mtl.pbi(2, scale="mean"), [1.0, 0.2])
    np.testing.assert_allclose(weights, [3, -2], rtol=1e-5)  # (1 + 5, 1 - 5) / 2


def test_a_weight_sum_that_is_not_positive_is_left_as_it_is():
    plain, _ = look(mtl.cosmos(2, penalty=8.0), [1.0, 0.2])
    assert plain.sum() < 0
    scaled, _ = look(mtl.cosmos(2, penalty=8.0, scale="mean"), [1.0, 0.2])
    np.testing.assert_array_equal(scaled, plain)


def test_the_length_of_the_weights_of_pbi():
    rng = np.random.default_rng(0)
    for theta in (0.0, 0.5, 5.0):
        weights, _ = look(mtl.pbi(5, theta=theta), rng.uniform(0.1, 5, 5))
        np.testing.assert_allclose(
            np.linalg.norm(weights), np.sqrt(1 + theta**2), rtol=1e-5
        )


def test_no_losses_have_no_direction():
    weights, _ = look(mtl.cosmos(2, preference=[1.0, 3.0]), [0.0, 0.0])
    np.testing.assert_allclose(weights, [1, 3])
    weights, _ = look(mtl.pbi(2, preference=[3.0, 4.0]), [0.0, 0.0])
    np.testing.assert_allclose(weights, [0.6, 0.8], rtol=1e-6)


def test_a_cosine_of_tiny_losses_is_not_turned_without_bound():
    """The slope grows like one over the losses, but stops at 1e-8."""
    for size in (1e-12, 1e-30):
        weights, _ = look(mtl.cosmos(2, penalty=1.0), size * np.array([4.0, 3.0]))
        half = np.sqrt(0.5)
        turn = half - (7 * half / 5) * np.array([0.8, 0.6])
        np.testing.assert_allclose(weights, -turn / 1e-8, rtol=1e-4)


def test_unit_vector_of_any_size():
    mask = np.array([True, True, False])
    for size in (1e-37, 1e-20, 1.0, 1e38):
        unit, length = unit_vector(size * jnp.array([0.6, -0.8, 7.0]), mask)
        np.testing.assert_allclose(unit, [0.6, -0.8, 0], rtol=1e-5)
        np.testing.assert_allclose(length / size, 1, rtol=1e-5)
    unit, length = unit_vector(jnp.array([0.0, 0.0, jnp.nan]), mask)
    assert not unit.any()
    assert length == 0


# ---------------------------------------------------------------------- what is learned


def test_imtl_l_is_uncertainty_weighting_twice_as_long():
    """With Adam, which takes the gradient's length away, but for its epsilon."""
    losses = laws.draws(3)[1][0]
    one, first = run(mtl.imtl_l(3, learning_rate=0.1), losses)
    other, second = run(mtl.uncertainty_weighting(3, learning_rate=0.1), losses)
    np.testing.assert_allclose(one, 2 * other, rtol=1e-4)
    np.testing.assert_allclose(
        learned_values(first), -learned_values(second), rtol=1e-4, atol=1e-6
    )


def test_imtl_l_brings_losses_to_one_size():
    losses = np.broadcast_to([50.0, 0.02, 1.0], (300, 3))
    weights, _ = run(mtl.imtl_l(3, optimizer=lambda rate: optax.sgd(0.1)), losses)
    np.testing.assert_allclose(weights[-1] * losses[0], 1, rtol=0.02)


def test_learned_numbers_come_back_from_their_limit():
    """Losses below zero push ``s`` to its limit; it is not stuck there."""
    tx = mtl.imtl_l(2, learning_rate=3.0)
    losses = np.full((60, 2), -1.0)
    weights, state = run(tx, losses)
    np.testing.assert_array_equal(learned_values(state), [60, 60])
    assert np.all(np.isfinite(weights))
    step = step_of(tx, 2)
    for _ in range(60):
        _, state = step([1.0, -1.0], state)
    assert learned_values(state)[0] < 20
    assert learned_values(state)[1] == 60


MASKED = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "rmsprop": optax.rmsprop(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1),
    "clipped": optax.chain(optax.clip(0.5), optax.adam(0.1)),
    "schedule": optax.adam(optax.exponential_decay(0.3, 1, 0.7)),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "injected schedule": optax.inject_hyperparams(optax.sgd)(
        optax.cosine_decay_schedule(0.3, 10)
    ),
}


@pytest.mark.parametrize("optimizer", MASKED)
@pytest.mark.parametrize("name", ["imtl_l", "uncertainty_weighting"])
def test_each_task_has_a_history_of_its_own(name, optimizer):
    """Task by task: what it learns alone from the batches that it is present in.

    With the schedule at its own step, whatever the other tasks' steps are.
    """
    tx = getattr(mtl, name)(3, optimizer=lambda rate: MASKED[optimizer])
    alone = getattr(mtl, name)(1, optimizer=lambda rate: MASKED[optimizer])
    losses = laws.draws(3)[1][0]
    masks = np.random.default_rng(3).uniform(size=losses.shape) < 0.6
    masks[4:6] = False
    assert len({*masks.sum(0)}) > 1
    weights, state = run(tx, np.where(masks, losses, np.inf), masks)
    assert not weights[~masks].any()
    for t in range(3):
        present = masks[:, t]
        wanted, last = run(alone, losses[present, t][:, None])
        np.testing.assert_allclose(weights[present, t], wanted[:, 0], rtol=1e-5)
        np.testing.assert_allclose(
            learned_values(state)[t], learned_values(last)[0], rtol=1e-5, atol=1e-7
        )
    # All leaves of the optimiser's state stand still while nobody is there.
    for leaf in jax.tree.leaves(state.weighting.learned):
        assert leaf.shape[0] == 3
        assert not leaf.weak_type


@pytest.mark.parametrize("optimizer", MASKED)
def test_a_learner_compiles_once_and_continues_from_a_checkpoint(optimizer):
    tx = mtl.imtl_l(3, optimizer=lambda rate: MASKED[optimizer])
    losses = laws.draws(3)[1][0]
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(losses, state):
        traces.append(losses)
        return tx.update(jnp.ones((3, 1)), state, losses=losses)[1]

    state = fresh(tx)
    for now in losses[:7]:
        state = step(now, state)
    # Leaves as numbers on a disk, structure from a fresh start.
    saved = [np.asarray(x).copy() for x in jax.tree.leaves(state)]
    restored = jax.tree.unflatten(
        jax.tree.structure(fresh(tx)), [jnp.asarray(x) for x in saved]
    )
    for now in losses[7:]:
        state = step(now, state)
    for now in losses[7:]:
        restored = step(now, restored)
    assert len(traces) == 1
    laws.assert_bits_equal(restored, state)


def test_a_schedule_as_the_learning_rate():
    """Halved at every step: ``s`` goes down by 0.4, 0.2, 0.1 at Adam's full length."""
    tx = mtl.imtl_l(1, learning_rate=optax.exponential_decay(0.4, 1, 0.5))
    step, state = step_of(tx, 1), fresh(tx)
    for wanted in (-0.4, -0.6, -0.7):
        _, state = step([1e6], state)
        np.testing.assert_allclose(learned_values(state), wanted, atol=2e-2)


def test_a_constant_schedule_is_a_number():
    losses = laws.draws(3)[1][0]
    one, _ = run(mtl.imtl_l(3, learning_rate=optax.constant_schedule(0.1)), losses)
    other, _ = run(mtl.imtl_l(3, learning_rate=0.1), losses)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("wrong", [-0.1, np.nan, np.inf, jnp.float32(-1)])
def test_learning_rates_are_checked(wrong):
    with pytest.raises(ValueError, match="learning_rate"):
        make_optimizer(optax.adam, wrong)
    with pytest.raises(ValueError, match="learning_rate"):
        mtl.imtl_l(2, learning_rate=wrong)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["imtl_l", "uncertainty_weighting"])
def test_one_broken_loss_leaves_no_trace(name, broken):
    tx = getattr(mtl, name)(2)
    step, state = step_of(tx, 2), fresh(tx)
    for losses in ([2.0, 3.0], [1.0, 4.0]):
        _, state = step(losses, state)
    _, after = step([broken, 3.0], state)
    _, without = step([7.0, 3.0], state, [False, True])
    laws.assert_bits_equal(after.weighting.learned, without.weighting.learned)


def test_a_huge_gradient_is_a_step_of_the_usual_length():
    """Squares of 1e30 would be infinite in Adam, and stay so."""
    optimizer = optax.adam(0.1)
    learned = init_learned(optimizer, jnp.zeros(3))
    gradient = jnp.array([1e30, -jnp.inf, 1.0])
    for k in (1, 2, 3):
        learned = learn(optimizer, gradient, learned, jnp.ones(3, bool))
        np.testing.assert_allclose(
            learned.learned_values, k * np.array([-0.1, 0.1, -0.1]), rtol=1e-3
        )
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(learned))


def test_a_gradient_that_is_nan_is_no_step():
    optimizer = optax.adam(0.1)
    learned = init_learned(optimizer, jnp.zeros(2))
    after = learn(optimizer, jnp.array([jnp.nan, 1.0]), learned, jnp.ones(2, bool))
    np.testing.assert_allclose(after.learned_values, [0, -0.1], rtol=1e-5)
    np.testing.assert_array_equal(after.learner[0].count, [0, 1])


# ----------------------------------------------------------------- any other objective


def test_scalarized_takes_any_objective():
    """Half the squares: the weights are the losses, and ``objective`` the value."""

    def squares(losses, learned, task_mask):
        assert learned is None
        return jnp.sum(losses**2, where=task_mask) / 2

    tx = scalarized(squares, 2)
    assert tx.weighting.needs == {"losses"}
    weights, objective = look(tx, [3.0, 4.0])
    np.testing.assert_allclose(weights, [3, 4])
    assert objective == 12.5
    assert jax.tree.leaves(fresh(tx).weighting.learned) == []


def test_scalarized_starts_where_it_is_told():
    """Descends on ``(s - L)^2 / 2`` by hand: from 1 towards 3 by halves."""

    def toward(losses, s, task_mask):
        return jnp.sum((s - losses) ** 2, where=task_mask) / 2

    tx = scalarized(toward, 1, optimizer=optax.sgd(0.5), start=1.0, limit=2.2)
    _, state = run(tx, [[3.0]])
    np.testing.assert_allclose(learned_values(state), 2)
    _, state = run(tx, [[3.0]] * 2)
    np.testing.assert_allclose(learned_values(state), 2.2)


@pytest.mark.parametrize("name", [*STATELESS, "imtl_l"])
def test_scales(name):
    losses = np.array([0.9, 4.0, 1.5])
    plain, _ = look(getattr(mtl, name)(3), losses)
    for scale, total in (("mean", 1), ("sum", 3)):
        scaled, _ = look(getattr(mtl, name)(3, scale=scale), losses)
        np.testing.assert_allclose(scaled.sum(), total, rtol=1e-5)
        np.testing.assert_allclose(
            scaled / scaled.sum(), plain / plain.sum(), rtol=1e-4
        )


@pytest.mark.parametrize(("name", "options"), ALL)
def test_differentiating_through_an_update_sees_constant_weights(name, options):
    tx = getattr(mtl, name)(4, **options)
    losses = jnp.array([0.9, 4.0, 1.5, 2.5])

    def update(losses):
        return tx.update(jnp.ones((4, 1)), fresh(tx), losses=losses)[0].sum()

    np.testing.assert_array_equal(laws.quick_jit(jax.grad(update))(losses), 0)


def test_a_noise_level_comes_back_from_its_bound():
    tx = mtl.uncertainty_weighting(1, learning_rate=1.0)
    step = jax.jit(lambda state, loss: tx.update(jnp.ones((1, 1)), state, losses=loss))
    state = tx.init(jnp.zeros(1))
    for _ in range(100):  # no noise level is best
        _, state = step(state, jnp.array([-1.0]))
    assert state.weighting.learned.learned_values == -60
    for _ in range(100):
        _, state = step(state, jnp.array([1.0]))
    assert state.weighting.learned.learned_values > -58


def test_what_is_no_optimiser_is_refused_in_words():
    for wrong in (optax.adam(1e-3), "adam"):
        with pytest.raises(TypeError, match="optimizer must be a function"):
            mtl.imtl_l(2, optimizer=wrong)
    with pytest.raises(TypeError, match="no optax transform"):
        mtl.imtl_l(2, optimizer=float)
    with pytest.raises(TypeError, match="learning_rate must be a number, got str"):
        mtl.imtl_l(2, learning_rate="fast")
    with pytest.raises(TypeError, match="preference: expected a sequence"):
        mtl.stch(2, preference={"a": 1.0, "b": 2.0})
