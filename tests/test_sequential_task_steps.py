"""Phase 1, against an optimiser that knows each parameter by name."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T = 2
TOUCHES = {
    "shared": (True, True),
    "a": (True, False),
    "b": (False, True),
    "unused": (False, False),
}
TOUCHED = {name: np.array(tasks) for name, tasks in TOUCHES.items()}
LABELS = {name: name for name in TOUCHES}


def loss_of(params, task, x, y):
    """A linear network with one shared layer; nothing of it needs more."""
    return jnp.mean((x @ params["shared"] @ params["ab"[task]] - y) ** 2)


def loss_fn(params, x, y):
    return tuple(loss_of(params, task, x, y[task]) for task in range(T))


def loss_fn_of_three(params, x, y):
    return (*loss_fn(params, x, y), jnp.sum(params["unused"]))


FORMS = {
    "tuple": (loss_fn, None),
    "dict": (lambda p, x, y: dict(zip("ab", loss_fn(p, x, y), strict=True)), None),
    "array": (lambda p, x, y: jnp.stack(loss_fn(p, x, y)), None),
}


def gradients(params, task, x, y):
    """Of `loss_of`, by hand; None where a task touches nothing."""
    head = "ab"[task]
    hidden = x @ params["shared"]
    residual = 2 * (hidden @ params[head] - y) / len(x)
    return {
        **dict.fromkeys(params),
        "shared": np.outer(x.T @ residual, params[head]),
        head: hidden.T @ residual,
    }


def problem(seed=0, steps=4):
    rng = np.random.default_rng(seed)
    params = {
        "shared": rng.normal(size=(3, 2)),
        "a": rng.normal(size=2),
        "b": rng.normal(size=2),
        "unused": rng.normal(size=4),
    }
    return params, rng.normal(size=(steps, 8, 3)), rng.normal(size=(steps, T, 8))


def by_hand(params, xs, ys, rule):
    """Runs `rule(name, value, gradient, memory)` on what each task touches, in turn."""
    params = dict(params)
    memory = {name: {} for name in params}
    everyone = {}
    for x, y in zip(xs, ys, strict=True):
        for task in range(T):
            grads = gradients(params, task, x, y[task])
            everyone["count"] = everyone.get("count", 0) + 1
            everyone["norm"] = np.sqrt(
                sum(np.sum(g**2) for g in grads.values() if g is not None)
            )
            for name, g in grads.items():
                if g is not None:
                    params[name] = rule(params[name], g, memory[name], everyone)
    return params


def adam_rule(own_count, decay=0.0, rate=1e-2):
    def rule(value, g, memory, everyone):
        memory["count"] = memory.get("count", 0) + 1
        count = memory["count"] if own_count else everyone["count"]
        memory["m"] = 0.9 * memory.get("m", 0.0) + 0.1 * g
        memory["v"] = 0.999 * memory.get("v", 0.0) + 0.001 * g**2
        m, v = memory["m"] / (1 - 0.9**count), memory["v"] / (1 - 0.999**count)
        return value - rate * (m / (np.sqrt(v) + 1e-8) + decay * value)

    return rule


def momentum_rule(value, g, memory, everyone):
    memory["m"] = 0.9 * memory.get("m", 0.0) + g
    return value - 0.05 * memory["m"]


def clipped_rule(value, g, memory, everyone):
    g = g * min(1.0, 0.3 / everyone["norm"])
    memory["m"] = 0.9 * memory.get("m", 0.0) + g
    return value - 0.1 / everyone["count"] * memory["m"]


def clipped():
    return optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.trace(0.9),
        optax.scale_by_schedule(lambda count: -0.1 / (count + 1)),
    )


def own_counts(make):
    return optax.partition({name: make() for name in TOUCHES}, LABELS)


RUNS = {
    "sgd": (lambda: optax.sgd(0.05), lambda w, g, m, e: w - 0.05 * g),
    "momentum": (lambda: optax.sgd(0.05, momentum=0.9), momentum_rule),
    "adam": (lambda: optax.adam(1e-2), adam_rule(own_count=False)),
    "adam, own counts": (
        lambda: own_counts(lambda: optax.adam(1e-2)),
        adam_rule(own_count=True),
    ),
    "adamw": (
        lambda: optax.adamw(1e-2, weight_decay=0.1),
        adam_rule(own_count=False, decay=0.1),
    ),
    "adamw, own counts": (
        lambda: own_counts(lambda: optax.adamw(1e-2, weight_decay=0.1)),
        adam_rule(own_count=True, decay=0.1),
    ),
    "injected": (
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
        adam_rule(own_count=False),
    ),
    "clip and schedule": (clipped, clipped_rule),
}


def run(tx, params, xs, ys, form="tuple", **options):
    function, in_axes = FORMS[form] if isinstance(form, str) else form
    step = laws.quick_jit(
        mtl.sequential_task_steps(function, tx, T, in_axes=in_axes, **options)
    )
    params = jax.tree.map(jnp.asarray, params)
    opt_state = tx.init(params)
    for x, y in zip(xs, ys, strict=True):
        params, opt_state, losses = step(params, opt_state, jnp.asarray(x), y)
    return params, opt_state, losses


@pytest.mark.parametrize("touched", [None, TOUCHED], ids=["found", "given"])
@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_moves_as_if_it_had_an_optimiser_of_its_own(x64, name, touched):
    make, rule = RUNS[name]
    start = problem(steps=3)
    found, _, _ = run(make(), *start, touched=touched)
    expected = by_hand(*start, rule)
    for leaf in TOUCHES:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_losses_may_come_in_any_form(x64, form):
    start = problem()
    found, _, _ = run(optax.adam(1e-2), *start, form)
    expected = by_hand(*start, adam_rule(own_count=False))
    for leaf in TOUCHES:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=0, atol=1e-12)


def test_one_batch_a_task(x64):
    """Mapped over tasks, one scalar a task: against the same losses as a tuple."""
    params, xs, ys = problem()
    both = np.stack([xs, 2 * xs], axis=2)  # [steps, batch, T, 3]

    def trunk(params, x, y, scale=1.0):
        """Shared layer and one head for all: who touches what is not of interest."""
        return scale * jnp.mean((x @ params["shared"] @ params["a"] - y) ** 2)

    tx = optax.adam(1e-2)
    separate = mtl.sequential_task_steps(trunk, tx, T, in_axes=(None, 1, 0))
    joint = mtl.sequential_task_steps(
        lambda p, x, y: [trunk(p, x[:, t], y[t]) for t in range(T)], tx, T
    )
    params = jax.tree.map(jnp.asarray, params)
    results = [
        laws.quick_jit(step)(params, tx.init(params), both[0], ys[0])
        for step in (separate, joint)
    ]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-14)
    scaled = laws.quick_jit(separate)(
        params, tx.init(params), both[0], ys[0], scale=3.0
    )
    np.testing.assert_allclose(scaled[2][0], 3 * results[0][2][0])


def test_losses_are_those_before_each_task_s_own_step():
    params, xs, ys = problem()
    tx = optax.sgd(0.1)
    _, _, losses = run(tx, params, xs[:1], ys[:1])
    first = loss_of(params, 0, xs[0], ys[0, 0])
    grads = gradients(params, 0, xs[0], ys[0, 0])
    moved = {**params, "shared": params["shared"] - 0.1 * grads["shared"]}
    second = loss_of(moved, 1, xs[0], ys[0, 1])
    np.testing.assert_allclose(losses, [first, second], rtol=1e-5)


def test_counts_advance_with_what_is_touched():
    _, plain, _ = run(optax.adam(1e-2), *problem(steps=3))
    assert plain[0].count == 3 * T
    _, parted, _ = run(own_counts(lambda: optax.adam(1e-2)), *problem(steps=3))
    counts = {
        name: int(state.inner_state[0].count)
        for name, state in parted.inner_states.items()
    }
    assert counts == {"shared": 6, "a": 3, "b": 3, "unused": 0}
    # A schedule inside the group counts with it.
    make = lambda: optax.adam(optax.constant_schedule(1e-2))  # noqa: E731
    _, scheduled, _ = run(own_counts(make), *problem(steps=3))
    assert scheduled.inner_states["a"].inner_state[1].count == 3
    # Nothing in the state belongs to a leaf: every step counts.
    bare = lambda: optax.sgd(optax.constant_schedule(1e-2))  # noqa: E731
    _, stateless, _ = run(own_counts(bare), *problem(steps=3))
    assert stateless.inner_states["a"].inner_state[1].count == 6


@pytest.mark.parametrize(
    "tx",
    [
        optax.adafactor(1e-2),
        optax.lion(1e-3),
        optax.contrib.schedule_free_adamw(1e-2),
        optax.contrib.muon(1e-2),
        optax.apply_if_finite(optax.adam(1e-2), 3),
        optax.masked(optax.sgd(0.1), {**dict.fromkeys(TOUCHES, True), "a": False}),
    ],
    ids=["adafactor", "lion", "schedule_free", "muon", "finite", "masked"],
)
def test_other_optimisers_leave_untouched_leaves_alone(tx):
    params, xs, ys = problem()
    found, state, _ = run(tx, params, xs, ys, touched=TOUCHED)
    np.testing.assert_array_equal(found["unused"], np.float32(params["unused"]))
    assert not np.array_equal(found["shared"], np.float32(params["shared"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    before = jax.eval_shape(tx.init, jax.tree.map(jnp.asarray, params))
    assert jax.tree.structure(before) == jax.tree.structure(state)


def test_zero_by_chance_differs_only_where_tasks_are_found():
    """PyTorch would step on a zero gradient that is not None."""
    tx = optax.sgd(1.0, momentum=0.5)
    params = {"w": jnp.ones(())}
    function = lambda p, x: (p["w"] * x, p["w"])  # noqa: E731
    given = {"w": np.array([True, True])}
    found = mtl.sequential_task_steps(function, tx, T)
    told = mtl.sequential_task_steps(function, tx, T, touched=given)
    state = tx.update({"w": jnp.ones(())}, tx.init(params), params)[1]
    # Task 0: zero gradient. Skipped, or a step of 0.5 by momentum. Task 1: gradient 1.
    assert found(params, state, 0.0)[0]["w"] == 1 - 1.5
    assert told(params, state, 0.0)[0]["w"] == 1 - 0.5 - 1.25


def test_one_task_is_ordinary_training():
    params, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.adamw(1e-2, weight_decay=0.1)
    step = laws.quick_jit(mtl.sequential_task_steps(lambda *a: loss_fn(*a)[:1], tx, 1))
    state = tx.init(params)
    found, found_state, losses = step(params, state, xs[0], ys[0])
    loss, grads = jax.value_and_grad(loss_of)(params, 0, xs[0], ys[0, 0])
    updates, expected_state = tx.update(grads, state, params)
    expected = optax.apply_updates(params, updates)
    for a, b in zip(
        jax.tree.leaves((found, found_state, losses)),
        jax.tree.leaves((expected, expected_state, loss[None])),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_small_steps_are_gradient_descent_on_the_sum(x64):
    params, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, params)
    total = jax.grad(lambda p: sum(loss_fn(p, xs[0], ys[0])))(params)
    errors = []
    for rate in (1e-3, 1e-4, 1e-5):
        tx = optax.sgd(rate)
        step = mtl.sequential_task_steps(loss_fn, tx, T)
        found = step(params, tx.init(params), xs[0], ys[0])[0]
        moved = jax.tree.map(lambda a, b, r=rate: (b - a) / r, found, params)
        gaps = jax.tree.leaves(jax.tree.map(jnp.subtract, moved, total))
        errors.append(np.linalg.norm(np.concatenate([g.ravel() for g in gaps])))
    assert errors[2] < 1e-3
    np.testing.assert_allclose(errors[0] / errors[1], 10, rtol=0.02)
    np.testing.assert_allclose(errors[1] / errors[2], 10, rtol=0.02)


def test_scan_cond_and_vmap_agree_with_a_loop():
    params, xs, ys = problem()
    tx = own_counts(lambda: optax.adam(1e-2))
    step = mtl.sequential_task_steps(loss_fn, tx, T)
    expected, _, last = run(tx, params, xs, ys)

    def train(params, xs, ys):
        def body(carry, batch):
            *carry, losses = jax.lax.cond(
                batch[0][0, 0] < jnp.inf,
                lambda: step(*carry, *batch),
                lambda: (*carry, jnp.zeros(T)),
            )
            return tuple(carry), losses

        (params, _), losses = jax.lax.scan(body, (params, tx.init(params)), (xs, ys))
        return params, losses

    params = jax.tree.map(jnp.asarray, params)
    xs, ys = jnp.asarray(xs), jnp.asarray(ys)
    found, losses = laws.quick_jit(train)(params, xs, ys)
    many = jax.tree.map(lambda x: jnp.stack([2 * x, x]), params)
    batched, _ = laws.quick_jit(jax.vmap(train, in_axes=(0, None, None)))(many, xs, ys)
    np.testing.assert_allclose(losses[-1], last, rtol=1e-5)
    for leaf in TOUCHES:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-5)
        np.testing.assert_allclose(batched[leaf][1], expected[leaf], rtol=1e-5)


def test_the_second_step_compiles_nothing():
    params, xs, ys = problem()
    params = jax.tree.map(jnp.asarray, params)
    tx = optax.adam(1e-2)
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return loss_fn(*args)

    step = laws.quick_jit(mtl.sequential_task_steps(counted, tx, T))
    state = tx.init(params)
    for _ in range(3):
        params, state, _ = step(params, state, xs[0], ys[0])
    assert traces == T


def test_aux_comes_from_each_task_s_own_forward_pass():
    def with_aux(params, x):
        w = params["w"]
        return (w * x, w * x), {"seen": w, "name": jnp.arange(3)}

    tx = optax.sgd(1.0)
    step = mtl.sequential_task_steps(with_aux, tx, T, has_aux=True)
    params = {"w": jnp.ones(())}
    _, _, (losses, aux) = step(params, tx.init(params), 1.0)
    np.testing.assert_array_equal(losses, [1, 0])
    np.testing.assert_array_equal(aux["seen"], [1, 0])
    assert aux["name"].shape == (T, 3)


def test_only_one_loss_is_differentiated():
    """Zero times the other loss's infinite derivative would be NaN."""

    def poisoned(params, x):
        return params["w"] * x, jnp.sqrt(params["w"] - 1)

    tx = optax.sgd(0.0)
    params = {"w": jnp.ones(())}
    step = mtl.sequential_task_steps(
        lambda p, x: poisoned(p, x)[:2], optax.apply_if_finite(tx, 5), T
    )
    state = optax.apply_if_finite(tx, 5).init(params)
    found, state, losses = step(params, state, 1.0)
    assert found["w"] == 1
    assert state.total_notfinite == 1  # the second task's step alone
    np.testing.assert_array_equal(losses, [1, 0])


def test_a_nan_loss_spreads_unless_it_is_skipped():
    params, xs, ys = problem()
    ys[0, 0, 0] = np.nan
    found, _, losses = run(optax.adam(1e-2), params, xs[:1], ys[:1])
    assert np.isnan(losses).all()
    assert np.isnan(found["shared"]).all()
    guarded, _, losses = run(
        optax.apply_if_finite(optax.adam(1e-2), 5), params, xs[:1], ys[:1]
    )
    assert np.isnan(losses).tolist() == [True, False]
    np.testing.assert_array_equal(guarded["a"], np.float32(params["a"]))
    assert np.isfinite(guarded["shared"]).all()
    assert not np.array_equal(guarded["b"], np.float32(params["b"]))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: run(optax.sgd(1.0), *problem(), form=(loss_fn_of_three, None)),
            ValueError,
            "num_tasks = 2 losses, loss_fn returned 3",
        ),
        (
            lambda: mtl.sequential_task_steps(loss_fn, optax.adam, T),
            TypeError,
            "tx must be an optax transform, got <function adam.*must be called",
        ),
        (
            lambda: mtl.sequential_task_steps(loss_fn, mtl.mean(T), T),
            TypeError,
            "got a combiner",
        ),
        (
            lambda: run(optax.chain(mtl.mean(T), optax.sgd(1.0)), *problem()),
            ValueError,
            "already reduced",
        ),
        (
            lambda: run(
                optax.sgd(1.0), *problem(), form=(lambda p, x, y: (x, y), None)
            ),
            ValueError,
            "must be a scalar",
        ),
        (
            lambda: run(optax.sgd(1.0), *problem(), touched={"a": np.ones(T, bool)}),
            ValueError,
            "structure of the parameters",
        ),
        (
            lambda: run(
                optax.sgd(1.0), *problem(), touched={**TOUCHED, "a": np.ones(3, bool)}
            ),
            ValueError,
            r"touched\['a'\]: expected bools of shape \(2,\)",
        ),
        (
            lambda: mtl.sequential_task_steps(loss_fn, optax.sgd(1.0), T, in_axes=0),
            TypeError,
            "in_axes must be a tuple",
        ),
        (
            lambda: run(optax.sgd(1.0), *problem(), form=(loss_of, (0, None, 0))),
            ValueError,
            r"in_axes\[0\] must be None",
        ),
        (
            lambda: run(optax.sgd(1.0), *problem(), form=(loss_of, (None, 0, None))),
            ValueError,
            "expected length 2 = num_tasks",
        ),
        (
            lambda: mtl.sequential_task_steps(
                loss_fn, optax.MultiSteps(optax.sgd(1.0), 2), T
            ),
            TypeError,
            "MultiSteps counts the steps of all tasks",
        ),
        (
            lambda: mtl.sequential_task_steps(loss_fn, optax.sgd(1.0), 0),
            ValueError,
            "num_tasks must be at least 1",
        ),
    ],
)
def test_misuse_is_refused_in_words(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_combiner_deep_in_the_chain_is_named():
    tx = optax.chain(optax.chain(mtl.mgda(T)), optax.sgd(1.0))
    with pytest.raises(ValueError, match="expected shape") as caught:
        run(tx, *problem())
    assert "ordinary gradient of one task" in caught.value.__notes__[0]


def test_labels_that_optax_cannot_follow_are_explained():
    groups = {name: optax.adam(1e-2) for name in TOUCHES}
    tx = optax.partition(groups, lambda params: {name: name for name in params})
    with pytest.raises(Exception, match="not iterable") as caught:
        run(tx, *problem())
    assert "as trees, not as functions" in caught.value.__notes__[0]


def test_which_tasks_touch_what():
    params, xs, ys = problem()
    touched = mtl.task_touches(loss_fn, params, xs[0], ys[0])
    for name, tasks in TOUCHES.items():
        assert isinstance(touched[name], np.ndarray)
        assert touched[name].tolist() == list(tasks)
    shared = mtl.shared_mask(loss_fn, params, xs[0], ys[0])
    assert shared == {name: all(tasks) for name, tasks in TOUCHES.items()}
    with pytest.raises(TypeError, match="task_touches needs concrete"):
        laws.quick_jit(lambda p: mtl.task_touches(loss_fn, p, xs[0], ys[0]))(params)
    with pytest.raises(ValueError, match="task_touches: the Jacobian is zero"):
        mtl.task_touches(lambda p: (jnp.sum(0 * p), jnp.sum(0 * p)), jnp.ones(2))
