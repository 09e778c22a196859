"""The trainer: whole epochs compiled, any transform, many seeds, honest records."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax.examples import digits, models, trainer
from mtl_optax.examples.comparison import compare

TASKS = ("CL", "RR")
INIT, LOSS_FN, METRIC_FN = models.make_digits(TASKS, hidden=24, features=8)


@pytest.fixture(scope="module")
def pairs():
    return digits.draw_pairs(digits.load_sources().train, jax.random.key(0), 256)


def _tx(combiner, rate=3e-3):
    return optax.chain(mtl.shared_only(combiner, models.encoder_mask), optax.adam(rate))


def _run(tx, pairs, epochs=1, seed=0, **options):
    state = trainer.init_state(INIT(jax.random.key(seed)), tx, jax.random.key(7))
    epoch = trainer.make_epoch(LOSS_FN, tx, 32, **options)
    return trainer.train(epoch, state, pairs, epochs)


def _assert_close(one, other, tolerance):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "factory", [mtl.edm, pytest.param(mtl.task_tensioner, marks=pytest.mark.slow)]
)
def test_lazy_and_stacked_train_alike(pairs, factory):
    lazy, lazy_record = _run(_tx(factory(num_tasks=2)), pairs, 2)
    stacked, record = _run(_tx(factory(num_tasks=2)), pairs, 2, stacked=True)
    _assert_close(lazy.params, stacked.params, 1e-4)
    _assert_close(lazy_record, record, 1e-3)


def test_mean_of_two_tasks_is_training_on_half_the_sum(pairs):
    """Against a plain loop that knows nothing of task gradients."""
    tx = optax.chain(mtl.mean(num_tasks=2), optax.adam(1e-2))
    state, record = _run(tx, pairs)
    plain = optax.adam(1e-2)
    params = INIT(jax.random.key(0))
    opt_state = plain.init(params)
    order_key = jax.random.split(jax.random.key(7), 3)[0]
    order = jax.random.permutation(order_key, 256)

    @jax.jit
    def step(params, opt_state, batch):
        def half(p):
            return sum(LOSS_FN(p, batch).values()) / 2

        loss, grads = jax.value_and_grad(half)(params)
        updates, opt_state = plain.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    losses = []
    for number in range(8):
        chosen = order[32 * number : 32 * (number + 1)]
        batch = jax.tree.map(lambda x, rows=chosen: x[rows], pairs)
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(loss)
    _assert_close(state.params, params, 1e-4)
    np.testing.assert_allclose(record.losses.mean(axis=1), losses, rtol=1e-4)


def test_an_epoch_visits_every_example_once():
    seen_sum = jnp.arange(12.0)

    def loss_fn(params, batch):
        return (jnp.sum(params * batch), jnp.sum(params * batch))

    tx = optax.chain(mtl.mean(num_tasks=2), optax.sgd(1.0))
    state = trainer.init_state(jnp.zeros(()), tx, jax.random.key(0))
    epoch = jax.jit(trainer.make_epoch(loss_fn, tx, 3))
    after, record = epoch(state, seen_sum)
    assert after.params == -seen_sum.sum()
    assert record.losses.shape == (4, 2)
    assert (
        jax.random.key_data(after.key).tolist()
        != jax.random.key_data(state.key).tolist()
    )


@pytest.mark.slow
def test_many_seeds_at_once_equal_one_at_a_time(pairs):
    tx = _tx(mtl.mgda(num_tasks=2))
    keys = jax.random.split(jax.random.key(3), 3)

    def start(key):
        return trainer.init_state(INIT(key), tx, key)

    epoch = trainer.make_epoch(LOSS_FN, tx, 64, look_at=models.encoder_mask)
    together, record = trainer.train(
        epoch, jax.vmap(start)(keys), pairs, 2, over_seeds=True
    )
    assert record.losses.shape == (3, 8, 2)
    assert record.task_weights.shape == (3, 8, 2)
    assert record.gramians.shape == (3, 8, 2, 2)
    alone, own = trainer.train(epoch, start(keys[1]), pairs, 2)
    _assert_close(jax.tree.map(lambda x: x[1], together.params), alone.params, 1e-3)
    np.testing.assert_allclose(record.losses[1], own.losses, rtol=1e-3, atol=1e-4)


def test_recorded_gramians_are_those_of_the_encoder(pairs):
    tx = _tx(mtl.mean(num_tasks=2))
    _, record = _run(tx, pairs, look_at=models.encoder_mask, look_every=3)
    assert record.gramians.shape == (3, 2, 2)  # steps 0, 3 and 6 of 8
    params = INIT(jax.random.key(0))
    order_key = jax.random.split(jax.random.key(7), 3)[0]
    first = jax.random.permutation(order_key, 256)[:32]
    batch = jax.tree.map(lambda x: x[first], pairs)
    rows = []
    for task in TASKS:
        grads = jax.grad(lambda p, t=task: LOSS_FN(p, batch)[t])(params)
        marked = zip(
            jax.tree.leaves(grads),
            jax.tree.leaves(models.encoder_mask(params)),
            strict=True,
        )
        rows.append(np.concatenate([np.ravel(g) for g, mark in marked if mark]))
    expected = np.array(rows, np.float64) @ np.array(rows, np.float64).T
    np.testing.assert_allclose(record.gramians[0], expected, rtol=1e-4, atol=1e-7)


def test_a_transform_without_weights_records_none(pairs):
    tx = optax.chain(mtl.sum_tasks(), optax.sgd(1e-2))
    _, record = _run(tx, pairs)
    assert record.task_weights is None
    assert record.gramians is None


def test_one_compiled_call_an_epoch_and_a_tick_after_each(pairs):
    traces = 0

    def counted(params, batch):
        nonlocal traces
        traces += 1
        return LOSS_FN(params, batch)

    tx = _tx(mtl.mean(num_tasks=2))
    state = trainer.init_state(INIT(jax.random.key(0)), tx, jax.random.key(7))
    ticks, after_first = [], []

    def tick(number, record):
        ticks.append((number, record.losses.shape))
        after_first.append(traces)

    trainer.train(
        trainer.make_epoch(counted, tx, 32), state, pairs, 4, on_epoch=tick, donate=True
    )
    assert ticks == [(n, (8, 2)) for n in (1, 2, 3, 4)]
    assert after_first[0] == after_first[-1] > 0


def test_extra_arguments_reach_the_method_fresh_at_every_step(pairs):
    def with_noise(num_tasks):
        def update(gramian, state, *, task_mask, key, **extra):
            return jax.random.uniform(key, (num_tasks,)), state

        return mtl.from_weighting(
            mtl.Weighting(lambda t, dtype: (), update, frozenset({"key"})), num_tasks
        )

    _, record = _run(_tx(with_noise(2)), pairs, 2, extras=lambda key: {"key": key})
    assert len(np.unique(record.task_weights)) == 32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trainer.make_epoch(LOSS_FN, optax.sgd(1.0), 0), "at least 1"),
        (lambda: trainer.train(lambda s, d: (s, d), None, None, 0), "num_epochs"),
    ],
)
def test_wrong_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_too_little_data_is_refused(pairs):
    few = jax.tree.map(lambda x: x[:8], pairs)
    with pytest.raises(ValueError, match="8 examples, less than one minibatch of 32"):
        _run(_tx(mtl.mean(num_tasks=2)), few)


@pytest.mark.slow
def test_a_comparison_has_every_run_and_starts_them_alike():
    found = compare(
        TASKS,
        ["mean", "mgda"],
        num_seeds=2,
        num_epochs=1,
        learning_rates=(1e-4, 1e-2),
        train_pairs=256,
        key=jax.random.key(0),
    )
    assert found.higher_is_better == (True, False)
    assert list(found.single) == ["CL", "RR"]
    assert list(found.methods) == ["mean", "mgda"]
    for outcome in found.methods.values():
        assert outcome.test.shape == (2, 2)
        assert outcome.record.losses.shape == (2, 2, 2)
        assert outcome.learning_rate in (1e-4, 1e-2)
    # Two steps at 1e-4 go nowhere, which validation must have seen.
    assert found.single["RR"].learning_rate == 1e-2
    first = [outcome.record.losses[:, 0] for outcome in found.methods.values()]
    np.testing.assert_allclose(first[0], first[1], rtol=1e-5)
    assert first[0][0, 0] != first[0][1, 0]
