"""MAO (Hervella et al. 2024), and `per_task`, which it is built from."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

CASES = [
    "first_step_is_sum_of_signs",
    "opposed_tasks_cancel_at_step_1",
    "random_3tasks_8steps_mean",
    "random_3tasks_8steps_rescaled_losses",
    "third_task_has_zero_gradient",
    "one_task_is_adam",
]


def path_of(tx, grads, theta=None, **extra):
    """Parameters after every step; `grads` is ``[steps, T, n]``."""
    grads = jnp.asarray(grads)
    theta = jnp.zeros(grads.shape[2:], grads.dtype) if theta is None else theta

    def step(carry, g):
        theta, state = carry
        updates, state = tx.update(g, state, theta, **extra)
        theta = optax.apply_updates(theta, updates)
        return (theta, state), theta

    run = laws.quick_jit(lambda g: jax.lax.scan(step, (theta, tx.init(theta)), g)[1])
    return run(grads)


def draws(steps=8, tasks=3, size=5, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((steps, tasks, size)).astype(dtype)


# ----------------------------------------------------------------------- the fixture


@pytest.mark.parametrize("name", CASES)
def test_sums_of_real_adam_instances(load_fixture, name, x64):
    cases = load_fixture("mao_and_single_step")["mao"]
    assert {case["name"] for case in cases} == set(CASES)
    case = next(c for c in cases if c["name"] == name)
    grads = np.asarray(case["grads"])
    tasks = grads.shape[1]
    rate = case["lr"] / (tasks if case["combine"] == "mean" else 1)
    options = {"b1": case["beta1"], "b2": case["beta2"], "eps": case["eps"]}
    wanted = np.asarray(case["theta_after_each_step"])
    found = path_of(mtl.mao(rate, tasks, **options), grads)
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)
    chain = optax.chain(
        mtl.per_task(optax.scale_by_adam(**options), tasks),
        mtl.sum_tasks(tasks),
        optax.scale(-rate),
    )
    np.testing.assert_allclose(path_of(chain, grads), wanted, rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------ properties


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_task_is_optax_adam_exactly(dtype, x64):
    grads = draws(20, 1, dtype=dtype)
    found = path_of(mtl.mao(1e-2, 1), grads)
    adam = optax.adam(1e-2)
    wanted = path_of(
        optax.GradientTransformationExtraArgs(
            adam.init, lambda g, s, p=None, **_: adam.update(g[0], s, p)
        ),
        grads,
    )
    np.testing.assert_array_equal(found, wanted)


def test_the_scale_of_a_loss_does_not_matter(x64):
    grads = draws(50)
    plain = path_of(mtl.mao(1e-2, 3), grads)
    scaled = path_of(mtl.mao(1e-2, 3), grads * np.reshape([1, 1e3, 1e-2], (3, 1)))
    assert np.abs(plain - scaled).max() < 1e-6
    # A sum of the raw gradients cares a lot.
    adam = optax.chain(mtl.sum_tasks(3), optax.adam(1e-2))
    other = path_of(adam, grads * np.reshape([1, 1e3, 1e-2], (3, 1)))
    assert np.abs(path_of(adam, grads) - other).max() > 1e-2


def test_first_step_is_the_sum_of_signs():
    grads = draws(1, 4, dtype=np.float32)
    found = path_of(mtl.scale_by_mao(4), grads)[0]
    np.testing.assert_allclose(found, np.sign(grads[0]).sum(0), atol=1e-4)


def test_alike_tasks_are_adam_with_a_larger_step(x64):
    grads = np.repeat(draws(10, 1), 4, axis=1)
    found = path_of(mtl.mao(1e-2, 4), grads)
    wanted = path_of(mtl.mao(4e-2, 1), grads[:, :1])
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_task_that_stops_touching_a_parameter_fades(x64):
    grads = np.zeros((12, 1, 1))
    grads[0] = 1
    path = np.asarray(path_of(mtl.scale_by_mao(1), grads))[:, 0]
    steps = np.diff(path, prepend=0)
    # Without the correction of the bias the decay is (b1 / sqrt(b2))^k.
    k = np.arange(1, 13)
    raw = steps * (1 - 0.9**k) / np.sqrt(1 - 0.999**k)
    np.testing.assert_allclose(raw[1:] / raw[:-1], 0.9 / np.sqrt(0.999), rtol=1e-6)


def test_a_schedule_and_injected_rates():
    grads = draws(4, 2, dtype=np.float32)
    schedule = optax.linear_schedule(1e-2, 0.0, 4)
    found = path_of(mtl.mao(schedule, 2), grads)
    chain = optax.chain(mtl.scale_by_mao(2), optax.scale_by_learning_rate(schedule))
    np.testing.assert_array_equal(found, path_of(chain, grads))
    injected = optax.inject_hyperparams(mtl.mao, static_args="num_tasks")(
        learning_rate=1e-2, num_tasks=2
    )
    np.testing.assert_allclose(
        path_of(injected, grads), path_of(mtl.mao(1e-2, 2), grads), atol=1e-6
    )


def test_moments_and_their_dtypes():
    params = {"w": jnp.zeros((3, 2), jnp.bfloat16), "b": jnp.zeros(2)}
    state = mtl.scale_by_mao(4).init(params)
    (adam,) = state.aggregator
    assert adam.mu["w"].shape == adam.nu["w"].shape == (4, 3, 2)
    assert adam.mu["w"].dtype == adam.nu["w"].dtype == jnp.float32
    low = mtl.scale_by_mao(4, mu_dtype=jnp.bfloat16)
    state = low.init(params)
    (adam,) = state.aggregator
    assert adam.mu["b"].dtype == jnp.bfloat16
    assert adam.nu["b"].dtype == jnp.float32
    g = jax.tree.map(lambda p: jnp.ones((4, *p.shape), p.dtype), params)
    updates, after = low.update(g, state, params)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(
        jnp.result_type, params
    )
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)
    np.testing.assert_allclose(updates["b"], 4, rtol=1e-2)


def test_bfloat16_parameters_keep_moving():
    """Second moments in bfloat16 would stand still at b2 = 0.999."""
    grads = np.concatenate([np.full((200, 1, 1), 1.0), np.full((1500, 1, 1), 0.1)])
    tx = mtl.scale_by_mao(1)
    params = jnp.zeros(1, jnp.bfloat16)

    def step(state, g):
        updates, state = tx.update(g.astype(jnp.bfloat16), state, params)
        return state, updates

    steps = jax.lax.scan(step, tx.init(params), jnp.asarray(grads))[1]
    exact = path_of(mtl.scale_by_mao(1), grads.astype(np.float32))
    exact = np.diff(np.asarray(exact)[:, 0])[-1]
    np.testing.assert_allclose(float(steps[-1, 0]), exact, rtol=0.02)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_decays_below_one(name):
    for wrong in (1.0, 1.5):
        with pytest.raises(ValueError, match=f"{name} must be below 1"):
            mtl.scale_by_mao(2, **{name: wrong})


@pytest.mark.parametrize("eps", [0.0, 1e-40])
def test_an_epsilon_of_zero_is_refused(eps):
    with pytest.raises(ValueError, match="eps must be positive"):
        mtl.scale_by_mao(2, eps=eps)


def test_states_hold_no_weak_types():
    state = mtl.per_task(optax.scale_by_adam(), 2).init({"w": 1.0})
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
    assert mtl.mao(0.1, 2).init({"w": 1.0})


# ------------------------------------------------------------------------- per_task

INNERS = {
    "adam": lambda: optax.scale_by_adam(),
    "momentum": lambda: optax.trace(0.9, nesterov=True),
    "rms": lambda: optax.scale_by_rms(),
    "clip": lambda: optax.clip_by_global_norm(0.5),
    "chain": lambda: optax.chain(optax.clip(0.1), optax.scale_by_adam()),
    "decay": lambda: optax.add_decayed_weights(0.1),
    "schedule": lambda: optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 5)),
    "stateless": lambda: optax.identity(),
    "lion": lambda: optax.scale_by_lion(),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "partition": lambda: optax.partition(
        {"a": optax.scale_by_adam(), "b": optax.sgd(0.1)}, {"w": "a", "v": "b"}
    ),
    "factored": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
}


@pytest.mark.parametrize("name", INNERS)
def test_as_if_there_were_no_other_task(name):
    rng = np.random.default_rng(0)
    params = {"w": jnp.ones((3, 2)), "v": jnp.arange(4.0)}
    grads = {
        n: jnp.asarray(rng.standard_normal((5, 3, *p.shape)), jnp.float32)
        for n, p in params.items()
    }
    tx = mtl.per_task(INNERS[name](), 3)

    def run(tx, grads):
        def step(state, g):
            updates, state = tx.update(g, state, params)
            return state, updates

        return laws.quick_jit(lambda g: jax.lax.scan(step, tx.init(params), g)[1])(
            grads
        )

    found = run(tx, grads)
    for t in range(3):
        alone = run(INNERS[name](), jax.tree.map(lambda g, t=t: g[:, t], grads))
        jax.tree.map(
            lambda a, b, t=t: np.testing.assert_allclose(a[:, t], b, rtol=2e-5),
            found,
            alone,
        )


# Adam's first steps are all 1 or -1. Where they cancel, one that normalises would make
# steps of what rounding leaves; and of lengths that are all alike rounding decides
# which `gradnorm` thinks too long.
FOLLOWERS = [
    pytest.param(name, marks=[] if m in laws.one_of_each_sort() else pytest.mark.slow)
    for name, m in mtl.METHODS.items()
    if m.kind != "jacobian" and not m.normalises and name != "gradnorm"
]


@pytest.mark.parametrize("name", FOLLOWERS)
def test_any_combiner_may_follow(name):
    method = mtl.METHODS[name]
    grads = jnp.asarray(draws(3, 3, dtype=np.float32))
    params = jnp.zeros(5)
    extra = method.extras(3, params)
    combiner = method.make(3)
    tx = optax.chain(mtl.per_task(optax.scale_by_adam(), 3), combiner, optax.sgd(0.1))
    mtl.check_chain(tx, params, 3, **extra)
    found = path_of(tx, grads, **extra)
    assert np.all(np.isfinite(found))
    # The same by hand: Adam's steps first, then the combiner on them.
    adam = optax.scale_by_adam()

    @laws.quick_jit
    def by_hand(grads):
        states = [adam.init(params) for _ in range(3)]
        state, theta, path = combiner.init(params), params, []
        for g in grads:
            steps = [adam.update(row, s) for row, s in zip(g, states, strict=True)]
            states = [s for _, s in steps]
            rows = jnp.stack([u for u, _ in steps])
            update, state = combiner.update(rows, state, theta, **extra)
            theta = theta - 0.1 * update
            path.append(theta)
        return jnp.stack(path)

    np.testing.assert_allclose(found, by_hand(grads), rtol=1e-4, atol=1e-5)


def test_lazy_rows_pass_through():
    def loss_fn(w):
        return {"a": jnp.sum((w - 1) ** 2), "b": 100 * jnp.sum((w + 1) ** 2)}

    params = jnp.array([0.5, -2.0])
    tx = optax.chain(mtl.per_task(optax.scale_by_adam(), 2), mtl.mgda(2))

    @jax.jit
    def step(make_grads_from):
        losses, lazy = mtl.task_jacobian(loss_fn)(make_grads_from)
        one, _ = tx.update(lazy, tx.init(params), params, losses=losses)
        two, _ = tx.update(mtl.materialize(lazy), tx.init(params), params)
        return one, two

    one, two = step(params)
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_absent_tasks_wait():
    grads = draws(6, 2, dtype=np.float32)
    tx = mtl.per_task(optax.scale_by_adam(), 3)
    both = mtl.per_task(optax.scale_by_adam(), 2)
    mask = jnp.array([True, False, True])
    params = jnp.zeros(5)
    state, wanted_state = tx.init(params), both.init(params)
    start = state
    for g in grads:
        rows = jnp.stack([g[0], jnp.full(5, jnp.nan), g[1]])
        updates, state = tx.update(rows, state, params, task_mask=mask)
        wanted, wanted_state = both.update(jnp.asarray(g), wanted_state, params)
        np.testing.assert_allclose(updates[np.array([0, 2])], wanted, rtol=1e-6)
        np.testing.assert_array_equal(updates[1], 0)
    for now, first in zip(jax.tree.leaves(state), jax.tree.leaves(start), strict=True):
        np.testing.assert_array_equal(now[1], first[1])


def test_tree_map_params_finds_the_moments():
    tx = mtl.per_task(optax.scale_by_adam(), 2)
    params = {"w": jnp.ones(3)}
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(params))
    np.testing.assert_array_equal(doubled.per_task.mu["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(doubled.per_task.count, [0, 0])


def test_misuse_in_words():
    params = jnp.zeros(3)
    with pytest.raises(TypeError, match="optax transform"):
        mtl.per_task(optax.adam, 2)
    with pytest.raises(ValueError, match="num_tasks"):
        mtl.per_task(optax.sgd(0.1), 0)
    tx = mtl.per_task(optax.scale_by_adam(), 2)
    with pytest.raises(ValueError, match="expected shape"):
        tx.update(jnp.zeros((3, 3)), tx.init(params), params)
    with pytest.raises(ValueError, match="already reduced"):
        tx.update(jnp.zeros(3), tx.init(params), params)
    with pytest.raises(TypeError, match="got a combiner"):
        mtl.per_task(mtl.edm(2), 2)
    tx = mtl.per_task(optax.chain(mtl.sum_tasks(), optax.sgd(0.1)), 2)
    with pytest.raises(ValueError, match="already reduced"):
        tx.update(jnp.zeros((2, 3)), tx.init(params), params)
    squeezed = optax.stateless(lambda u, p: jax.tree.map(lambda x: x[:1], u))
    tx = mtl.per_task(squeezed, 2)
    with pytest.raises(ValueError, match=r"\['w'\].*\(2, 3\).*\(2, 1\)"):
        tx.update({"w": jnp.zeros((2, 3))}, tx.init(params))


def test_mao_trains_where_units_differ():
    """Two quadratics a million apart: MAO serves both, a sum serves one."""
    x = jnp.array([1.0, 2.0, 3.0])

    def loss_fn(w):
        return {
            "a": jnp.mean((w["a"] - x) ** 2),
            "b": 1e6 * jnp.mean((w["b"] + x) ** 2),
        }

    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    tx = mtl.mao(optax.cosine_decay_schedule(0.3, 200), 2)

    def step(carry, _):
        params, state = carry
        losses, grads = mtl.task_jacobian(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), losses

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    np.testing.assert_allclose(params["a"], x, atol=0.02)
    np.testing.assert_allclose(params["b"], -x, atol=0.02)
