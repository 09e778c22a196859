"""Both phases on the digits: one compiled epoch, statistics by task, who owns what."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax.examples import digits, task_norm

TASKS = ("CL", "RR")
PHASE_KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def pairs():
    return digits.draw_pairs(digits.load_sources().train, jax.random.key(0), 256)


@pytest.fixture(scope="module")
def dense():
    problem = task_norm.make_task_norm_digits(TASKS, hidden=12, features=6)
    return problem._replace(
        init=jax.jit(problem.init),
        loss_fn=jax.jit(problem.loss_fn),
        metric_fn=jax.jit(problem.metric_fn),
        strengths_of=jax.jit(problem.strengths_of),
    )


TX = optax.sgd(0.1, momentum=0.9)
EPOCHS = 8


@pytest.fixture(scope="module")
def start(dense):
    return laws.quick_jit(lambda key: task_norm.init_mixed_state(dense, TX, key))


@pytest.fixture(scope="module")
def epoch(dense):
    return laws.quick_jit(task_norm.make_mixed_epoch(dense, TX, 16, EPOCHS))


def few(pairs, count):
    return jax.tree.map(lambda x: np.asarray(x)[:count], pairs)


def test_the_convolutional_network_learns_both_tasks_in_one_compilation(pairs):
    problem = task_norm.make_task_norm_digits(
        TASKS, convolutional=True, channels=(4, 8), hidden=16
    )
    traces = 0

    def counted(*args):
        nonlocal traces
        traces += 1
        return problem.loss_fn(*args)

    start = laws.quick_jit(lambda key: task_norm.init_mixed_state(problem, TX, key))
    state = start(jax.random.key(1))
    epoch = laws.quick_jit(
        task_norm.make_mixed_epoch(problem._replace(loss_fn=counted), TX, 32, EPOCHS)
    )
    metric_fn = laws.quick_jit(problem.metric_fn)
    before = metric_fn(state.params, state.stats, pairs)
    records, seen = [], []
    for number in range(EPOCHS):
        state, record = epoch(state, pairs, number, PHASE_KEY)
        records.append(record)
        seen.append(traces)
    assert seen[0] == seen[-1]
    losses = np.concatenate([record.losses for record in records])
    phases = np.stack([record.phase_1 for record in records])
    assert phases[0].all()
    shares = 1 - np.arange(EPOCHS) / EPOCHS
    sigma = np.sqrt(np.mean(shares * (1 - shares)) / phases.size)
    assert abs(phases.mean() - (EPOCHS + 1) / (2 * EPOCHS)) < 4 * sigma
    assert (losses[-8:].mean(0) < [0.8, 0.8] * losses[:8].mean(0)).all()
    after = metric_fn(state.params, state.stats, pairs)
    assert after["CL"] > before["CL"] + 20
    assert after["RR"] < 0.9 * before["RR"]
    # Tasks have come to lean on different channels.
    owners = record.owners["layers"]
    assert [owners[i]["kernel"].shape for i in (0, 1)] == [(4,), (8,)]
    assert all(set(np.unique(layer["kernel"])) == {0, 1} for layer in owners.values())


def toy():
    """Next to nothing to compute, and nothing to project."""

    def loss_fn(params, stats, batch):
        losses = {"a": params["w"] * batch.sum(), "b": params["w"] ** 2}
        return losses, jax.tree.map(lambda s: s + 1, stats)

    return task_norm.Problem(
        ("a", "b"),
        lambda key: ({"w": jax.random.normal(key)}, {"mean": jnp.zeros((2, 1))}),
        loss_fn,
        lambda *_: {},
        lambda params, stats: {},
    )


def test_phases_are_shared_out_as_scheduled():
    """Many steps of next to nothing: the whole run's share of Phase 1."""
    problem = toy()
    epochs, steps = 6, 400
    tx = optax.sgd(1e-6)
    state = task_norm.init_mixed_state(problem, tx, jax.random.key(0))
    epoch = laws.quick_jit(task_norm.make_mixed_epoch(problem, tx, 1, epochs))
    firsts = []
    for number in range(epochs):
        state, record = epoch(state, jnp.ones(steps), number, PHASE_KEY)
        firsts.append(np.array(record.phase_1))
    shares = 1 - np.arange(epochs) / epochs
    sigma = np.sqrt(shares * (1 - shares) / steps)
    assert (np.abs(np.mean(firsts, axis=1) - shares) <= 4 * sigma).all()
    expected = (epochs + 1) / (2 * epochs)
    assert abs(np.mean(firsts) - expected) < 4 * np.sqrt((sigma**2).sum()) / epochs
    np.testing.assert_array_equal(state.stats["mean"], epochs * steps)
    whole = laws.quick_jit(task_norm.make_mixed_epoch(problem, tx, 1, 2, draw="epoch"))
    for number in range(3):
        phase = whole(state, jnp.ones(50), number, PHASE_KEY)[1].phase_1
        assert phase.all() or not phase.any()


def by_hand(problem):
    """One step of either phase, spelled out with momentum."""

    def grad_of(params, stats, batch, task):
        def loss(params):
            losses, new = problem.loss_fn(params, stats, batch)
            return losses[task], new

        return jax.grad(loss, has_aux=True)(params)

    def phase_1(params, stats, opt_state, batch):
        rows = []
        for t, task in enumerate(TASKS):
            grads, new = grad_of(params, stats, batch, task)
            rows.append(jax.tree.map(lambda s, t=t: s[t], new))
            updates, (moved, rest) = TX.update(grads, opt_state, params)

            def keep(new, old, grads=grads):
                return jax.tree.map(
                    lambda g, a, b: jnp.where((g != 0).any(), a, b), grads, new, old
                )

            trace = keep(moved.trace, opt_state[0].trace)
            opt_state = (moved._replace(trace=trace), rest)
            params = keep(optax.apply_updates(params, updates), params)
        return params, jax.tree.map(lambda *s: jnp.stack(s), *rows), opt_state, None

    def phase_2(params, stats, opt_state, batch):
        grads = [grad_of(params, stats, batch, task) for task in TASKS]
        stats = grads[0][1]
        stacked = mtl.stack_tasks([g for g, _ in grads])
        combine = mtl.priority_projection(2)
        strengths = problem.strengths_of(params, stats)
        combined, _ = combine.update(
            stacked, combine.init(params), params, strengths=strengths
        )
        differs = jax.tree.map(
            lambda a, b: ~jnp.isclose(a, b.sum(0), atol=1e-6).all(), combined, stacked
        )
        updates, opt_state = TX.update(combined, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, differs

    return laws.quick_jit(phase_1), laws.quick_jit(phase_2)


@pytest.mark.slow
def test_an_epoch_is_what_its_parts_do_step_by_step(pairs, dense, start, epoch):
    """Epoch 0 is all Phase 1, epoch E all Phase 2."""
    data = few(pairs, 32)
    state = start(jax.random.key(1))
    # At first all norms are equal and nobody owns anything; so Phase 1 comes first.
    for number, step in zip((0, EPOCHS), by_hand(dense), strict=True):
        found, record = epoch(state, data, number, PHASE_KEY)
        assert (record.phase_1 == (number == 0)).all()
        order = np.asarray(jax.random.permutation(jax.random.split(state.key)[0], 32))
        params, stats, opt_state = state[:3]
        for first in (0, 16):
            chosen = order[first : first + 16]
            batch = jax.tree.map(lambda x, rows=chosen: x[rows], data)
            params, stats, opt_state, differs = step(params, stats, opt_state, batch)
        for a, b in zip(
            jax.tree.leaves(found[:3]),
            jax.tree.leaves((params, stats, opt_state)),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
        state = found
    # Shared kernels alone were projected, and at least one of them.
    projected = [
        jax.tree_util.keystr(path)
        for path, flag in jax.tree_util.tree_leaves_with_path(differs)
        if flag
    ]
    assert projected
    assert all("layers" in p and "heads" not in p for p in projected)
    strengths = dense.strengths_of(found.params, found.stats)
    for layer, widths in ((0, 12), (1, 6)):
        rows = strengths["layers"][layer]["kernel"]
        assert rows.shape == (2, widths)
        np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
        np.testing.assert_array_equal(
            record.owners["layers"][layer]["kernel"], rows.argmax(0)
        )


def flops(compiled):
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


def test_without_phase_1_every_step_is_one_of_phase_2():
    problem = toy()
    state = task_norm.init_mixed_state(problem, TX, jax.random.key(0))
    runs = [
        laws.quick_jit(
            task_norm.make_mixed_epoch(problem, TX, 2, EPOCHS, phase_1=phase_1)
        )(state, jnp.ones(8), number, PHASE_KEY)
        for phase_1, number in ((False, 0), (True, EPOCHS))
    ]
    assert not runs[0][1].phase_1.any()
    np.testing.assert_allclose(runs[0][1].losses, runs[1][1].losses, rtol=1e-6)


def test_seeds_share_their_phases_and_pay_for_one():
    problem = toy()
    keys = jax.random.split(jax.random.key(2), 2)
    states = jax.vmap(lambda k: task_norm.init_mixed_state(problem, TX, k))(keys)
    epoch = task_norm.make_mixed_epoch(problem, TX, 2, EPOCHS)
    together = laws.quick_jit(jax.vmap(epoch, in_axes=(0, None, None, None)))
    traced = together.trace(states, jnp.ones(40), 4, PHASE_KEY)
    assert " cond[" in str(traced.jaxpr)  # a branch still, not a selection
    found, record = together(states, jnp.ones(40), 4, PHASE_KEY)
    assert record.losses.shape == (2, 20, 2)
    assert 0 < record.phase_1[0].mean() < 1
    np.testing.assert_array_equal(record.phase_1[0], record.phase_1[1])
    own = jax.tree.map(lambda x: x[1], states)
    alone, _ = laws.quick_jit(epoch)(own, jnp.ones(40), 4, PHASE_KEY)
    np.testing.assert_allclose(found.params["w"][1], alone.params["w"], rtol=1e-5)


def test_phase_1_by_its_statistics_and_its_cost(pairs):
    """Each task's statistics are of its own forward pass; no other one is run."""
    # Wide where tasks' forward passes differ first: behind the first norm.
    problem = task_norm.make_task_norm_digits(TASKS, hidden=16, features=64)
    batch = few(pairs, 32)
    params, stats = laws.quick_jit(problem.init)(jax.random.key(0))
    tx = optax.sgd(0.5)
    sequential = mtl.sequential_task_steps(problem.loss_fn, tx, 2, has_aux=True)

    def both(params, stats, merge=task_norm.merge_stats):
        new, _, (losses, each) = sequential(params, tx.init(params), stats, batch)
        return new, losses, merge(each)

    def wasteful(params, stats):
        return both(params, stats, merge=lambda each: each)

    def alone(task):
        def loss(params, stats):
            return problem.loss_fn(params, stats, batch)[0][task]

        return jax.value_and_grad(loss)

    compiled = [
        laws.quick_jit(function).lower(params, stats).compile()
        for function in (both, wasteful, *map(alone, TASKS))
    ]
    ours, more, *each = map(flops, compiled)
    assert sum(each) < ours < 1.05 * sum(each)
    assert more > 1.1 * sum(each)  # the measure sees what it should

    _, losses, found = compiled[0](params, stats)
    first, grads = compiled[2](params, stats)
    moved = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    loss_fn = laws.quick_jit(problem.loss_fn)
    _, at_start = loss_fn(params, stats, batch)
    second, afterwards = loss_fn(moved, stats, batch)
    np.testing.assert_allclose(losses, [first, second["RR"]], rtol=1e-5)
    for f, a, b in zip(
        *map(jax.tree.leaves, (found, at_start, afterwards)), strict=True
    ):
        np.testing.assert_allclose(f[0], a[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(f[1], b[1], rtol=1e-4, atol=1e-5)
        assert not np.allclose(f[1], a[1], rtol=1e-3)


def test_evaluation_reads_running_statistics(pairs, dense):
    params, stats = dense.init(jax.random.key(0))
    for _ in range(3):
        _, stats = dense.loss_fn(params, stats, few(pairs, 64))
    whole = dense.metric_fn(params, stats, few(pairs, 8))
    halves = [
        dense.metric_fn(params, stats, jax.tree.map(lambda x, s=s: x[s : s + 4], pairs))
        for s in (0, 4)
    ]
    # An example's output does not depend on the others of its batch.
    mean = np.sqrt(np.mean([half["RR"] ** 2 for half in halves]))
    np.testing.assert_allclose(whole["RR"], mean, rtol=1e-5)
    reset = jax.tree.map(jnp.ones_like, stats)
    assert not np.allclose(dense.metric_fn(params, reset, pairs)["RR"], whole["RR"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 64}, "8 examples, less than one minibatch of 64"),
        ({"draw": "step"}, "draw must be"),
    ],
)
def test_wrong_options_are_refused(pairs, dense, start, options, message):
    state = start(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        task_norm.make_mixed_epoch(
            dense, TX, **{"batch_size": 4, "num_epochs": 2, **options}
        )(state, few(pairs, 8), 0, PHASE_KEY)
