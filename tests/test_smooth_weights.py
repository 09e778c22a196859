"""`smooth_weights`: combinations by running averages of their weights."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T, STEPS = 3, 8
PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
get = optax.tree_utils.tree_get


def told(num_tasks=T, needs=frozenset({"losses"}), **options):
    """Weights are the losses: what is averaged can be given. Counts its steps."""

    def update(gramian, state, *, losses, task_mask, **extra):
        return losses, state + 1

    method = mtl.Weighting(lambda n, dtype: jnp.zeros((), jnp.int32), update, needs)
    return mtl.from_weighting(method, num_tasks, **options)


def draws(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rows_at(step):
    return {
        name: jnp.asarray(draws([step, p.ndim], T, *p.shape))
        for name, p in PARAMS.items()
    }


def flat(tree, *lead):
    leaves = [np.float64(x).reshape(*lead, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def run(tx, raw, masks=None, **extra):
    """Weights of every step, and the last state, for given raw weights ``[K, T]``."""
    state, update, out = tx.init(PARAMS), laws.quick_jit(tx.update), []
    for s, now in enumerate(raw):
        given = {} if masks is None else {"task_mask": jnp.asarray(masks[s])}
        losses = jnp.asarray(now, jnp.float32)
        updates, state = update(
            rows_at(s), state, PARAMS, losses=losses, **given, **extra
        )
        weights = np.float64(get(state, "task_weights"))
        np.testing.assert_allclose(
            flat(updates), weights @ flat(rows_at(s), T), rtol=1e-4, atol=1e-5
        )
        out.append(weights)
    return np.array(out), state


def averaged(raw, alpha):
    """The recurrence, in float64."""
    out = [np.float64(raw[0])]
    for now in raw[1:]:
        out.append(alpha * out[-1] + (1 - alpha) * np.float64(now))
    return np.array(out)


# ------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_the_recurrence(alpha):
    raw = np.exp(draws(0, STEPS, T))
    found, state = run(mtl.smooth_weights(told(), alpha), raw)
    np.testing.assert_allclose(found, averaged(raw, alpha), rtol=3e-6)
    np.testing.assert_array_equal(get(state, "raw_weights"), raw[-1])
    assert get(state, "inner") == STEPS


def test_by_hand():
    """0.9 of the past by default; the first step is the first weights."""
    found, _ = run(mtl.smooth_weights(told()), [[1, 2, 0], [2, 2, -1], [0, 2, 0]])
    wanted = [[1, 2, 0], [1.1, 2, -0.1], [0.99, 2, -0.09]]
    np.testing.assert_allclose(found, wanted, atol=1e-6)


PEERS = ("0.9", "0.5", "0.0", "1.0", "0.9 of 0.5", "alone")


@pytest.mark.parametrize("how", PEERS)
@pytest.mark.parametrize("name", ["imtl_g", "aligned_mtl"])
def test_numbers_of_torchjd(name, how, load_fixture, x64):
    peer = load_fixture("crmogm")
    tx = mtl.METHODS[name].make(3)
    for alpha in [] if how == "alone" else reversed(how.split(" of ")):
        tx = mtl.smooth_weights(tx, float(alpha))
    state, update = tx.init(jnp.zeros(5)), laws.quick_jit(tx.update)
    for rows, wanted in zip(
        peer["rows"], peer["weights"][f"{name}, {how}"], strict=True
    ):
        _, state = update(jnp.asarray(rows), state)
        np.testing.assert_allclose(get(state, "task_weights"), wanted, rtol=1e-9)


@pytest.mark.parametrize("scale", ["paper", "mean", "sum", "norm"])
def test_the_scale_convention_comes_after(scale):
    raw = np.exp(draws(1, STEPS, T))
    tx = mtl.smooth_weights(told(scale=scale), 0.5)
    assert tx.scale == scale
    found, state = run(tx, raw)
    wanted = averaged(raw, 0.5)
    np.testing.assert_allclose(get(state, "smoothed_weights"), wanted[-1], rtol=1e-6)
    total = wanted.sum(1, keepdims=True)
    if scale == "norm":
        rows = [flat(rows_at(s), T) for s in range(STEPS)]
        factor = [
            np.linalg.norm(r.mean(0)) / np.linalg.norm(w @ r)
            for r, w in zip(rows, wanted, strict=True)
        ]
    else:
        factor = {"paper": 1 + 0 * total, "mean": 1 / total, "sum": T / total}[scale]
    wanted = wanted * np.reshape(factor, (-1, 1))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_axis_name_carries_over():
    tx = mtl.mgda(2, axis_name="x")
    assert mtl.smooth_weights(tx).axis_name == "x"


# ------------------------------------------------------------------------ absent tasks


def test_absent_tasks_hold_still_and_begin_late():
    raw = np.exp(draws(2, STEPS, T))
    masks = np.ones((STEPS, T), bool)
    masks[:3, 0] = False  # begins at the fourth step
    masks[2:5, 1] = False  # holds still for three
    masks[5] = False  # nobody
    spoiled = np.where(masks, raw, np.nan)
    found, state = run(mtl.smooth_weights(told(), 0.75), spoiled, masks)
    for t in range(T):
        there = masks[:, t]
        own = averaged(raw[there, t], 0.75)
        np.testing.assert_allclose(found[there, t], own, rtol=3e-6)
        assert np.all(found[~there, t] == 0)
        np.testing.assert_allclose(get(state, "smoothed_weights")[t], own[-1], 1e-6)


def test_a_weight_that_is_not_finite_is_not_remembered():
    raw = np.ones((4, T))
    raw[0, 0] = raw[2, 1] = np.nan
    tx = mtl.smooth_weights(told(), 0.5)
    state, weights = tx.init(PARAMS), []
    for s, now in enumerate(raw + np.arange(4.0)[:, None]):
        _, state = tx.update(rows_at(s), state, PARAMS, losses=jnp.asarray(now))
        weights.append(np.asarray(get(state, "task_weights")))
    wanted = averaged(np.arange(1.0, 5), 0.5)
    np.testing.assert_allclose(np.array(weights)[:, 2], wanted)
    # The first task begins at the second step, the second jumps over the third one.
    np.testing.assert_allclose(np.array(weights)[:, 0], [np.nan, 2, 2.5, 3.25])
    np.testing.assert_allclose(np.array(weights)[:, 1], [1, 1.5, np.nan, 2.75])


# ------------------------------------------------------------ nesting, hyper-parameters


def test_smoothed_twice():
    raw = np.exp(draws(3, STEPS, T))
    tx = mtl.smooth_weights(mtl.smooth_weights(told(), 0.5), 0.8)
    found, _ = run(tx, raw)
    np.testing.assert_allclose(found, averaged(averaged(raw, 0.5), 0.8), rtol=3e-6)


def test_inside_update_every():
    raw = np.exp(draws(4, STEPS, T))
    found, state = run(mtl.update_every(mtl.smooth_weights(told(), 0.5), 3), raw)
    made = averaged(raw[::3], 0.5)
    np.testing.assert_allclose(found, made[np.arange(STEPS) // 3], rtol=3e-6)
    assert optax.tree_utils.tree_get_all_with_path(state, "inner")[-1][1] == 3


def test_needs_are_those_of_the_method():
    for name in ("mean", "rlw", "imtl_g", "task_tensioner", "uncertainty_weighting"):
        tx = mtl.METHODS[name].make(3)
        smooth = mtl.smooth_weights(tx)
        assert smooth.weighting.needs == tx.weighting.needs
        assert smooth.num_tasks == 3


def test_a_scheduled_alpha():
    """The paper's: it rises as the learning rate falls."""
    raw = np.exp(draws(5, STEPS, T))

    def schedule(count):
        return 1 - 1 / (1 + count)

    tx = optax.inject_hyperparams(lambda alpha: mtl.smooth_weights(told(), alpha))(
        alpha=schedule
    )
    found, _ = run(tx, raw)
    # With these numbers every step counts alike.
    wanted = np.cumsum(np.float64(raw), 0) / np.arange(1, STEPS + 1)[:, None]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_many_alphas_at_once():
    raw = jnp.exp(draws(6, STEPS, T))

    def last(alpha):
        tx = mtl.smooth_weights(told(), alpha)
        state = tx.init(PARAMS)
        for s in range(STEPS):
            _, state = tx.update(rows_at(s), state, PARAMS, losses=raw[s])
        return get(state, "task_weights")

    found = laws.quick_jit(jax.vmap(last))(jnp.array([0.1, 0.7]))
    for one, alpha in zip(found, (0.1, 0.7), strict=True):
        np.testing.assert_allclose(one, averaged(raw, alpha)[-1], rtol=1e-5)


def test_it_costs_what_the_method_costs():
    def losses(params, x):
        h = jnp.tanh(x @ params["w"])
        return jnp.mean(h**2, axis=0)

    params, x = {"w": jnp.ones((64, 4))}, jnp.ones((32, 64))

    def flops(tx):
        def step(params, state):
            _, lazy = mtl.task_jacobian(losses)(params, x)
            return tx.update(lazy, state, params)

        compiled = jax.jit(step).lower(params, tx.init(params)).compile()
        cost = compiled.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    for name in ("mean", "imtl_g"):
        tx = mtl.METHODS[name].make(4)
        assert flops(mtl.smooth_weights(tx)) < 1.01 * flops(tx) + 100


# ---------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (mtl.scale_by_mao(T), "no weights to average"),
        (mtl.sum_tasks(T), "sum_tasks"),
        (mtl.shared_only(mtl.edm(T), True), "of a wrapper put it inside"),
        (mtl.update_every(mtl.edm(T), 2), r"update_every\(smooth_weights"),
        (optax.chain(mtl.edm(T), optax.sgd(1.0)), r"chain\(smooth_weights\(edm"),
        (mtl.edm, "must be a combiner"),
    ],
)
def test_what_cannot_be_wrapped(tx, words):
    with pytest.raises(TypeError, match=words):
        mtl.smooth_weights(tx)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), float("inf"), jnp.ones(2)])
def test_alpha_is_a_share(alpha):
    with pytest.raises(ValueError, match="smooth_weights: alpha must"):
        mtl.smooth_weights(mtl.edm(T), alpha)
