"""How often each of the two phases is drawn, and from what."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

import mtl_optax as mtl

EPOCHS, STEPS = 10, 2000


@pytest.fixture(scope="module")
def draws():
    key = jax.random.key(11)

    @laws.quick_jit
    def row(epoch):
        return jax.vmap(lambda step: mtl.phase_schedule(key, epoch, EPOCHS, step=step))(
            jnp.arange(STEPS)
        )

    return np.stack([row(epoch) for epoch in range(EPOCHS + 2)])


def test_shares_fall_from_one_to_none(draws):
    for epoch in range(EPOCHS + 2):
        share = max(0.0, 1 - epoch / EPOCHS)
        sigma = np.sqrt(share * (1 - share) / STEPS)
        assert abs(draws[epoch].mean() - share) <= 4 * sigma, epoch
    assert draws[0].all()
    assert not draws[EPOCHS:].any()
    shares = 1 - np.arange(EPOCHS) / EPOCHS
    sigma = np.sqrt(np.sum(shares * (1 - shares)) / STEPS) / EPOCHS
    expected = (EPOCHS + 1) / (2 * EPOCHS)
    assert abs(draws[:EPOCHS].mean() - expected) < 4 * sigma


def test_draws_are_repeatable_and_differ(draws):
    key = jax.random.key(11)
    for step in (0, 7):
        alone = mtl.phase_schedule(key, 5, EPOCHS, step=step)
        assert alone.dtype == bool
        assert alone.shape == ()
        assert alone == draws[5, step]
    # Epochs do not repeat each other's draws.
    assert 0.3 < (draws[5] == draws[4]).mean() < 0.7
    # Once an epoch: one draw for all its steps, over many runs with the right share.
    keys = jax.random.split(key, 1000)
    once = jax.vmap(lambda key: mtl.phase_schedule(key, 3, EPOCHS))(keys)
    assert abs(once.mean() - 0.7) < 4 * np.sqrt(0.21 / 1000)


def test_legacy_keys_traced_numbers_and_x64_draw_alike(x64):
    typed, legacy = jax.random.key(3), jax.random.PRNGKey(3)
    traced = laws.quick_jit(lambda *n: mtl.phase_schedule(typed, *n[:2], step=n[2]))
    for step in range(20):
        plain = mtl.phase_schedule(typed, 2, 4, step=step)
        assert plain == mtl.phase_schedule(legacy, 2, 4, step=step)
        assert plain == traced(2, 4, step)


@pytest.mark.parametrize("per_batch", [False, True])
def test_one_compiled_step_serves_both_phases(per_batch):
    key = jax.random.key(0)
    traces = 0

    @laws.quick_jit
    def phase_of(epoch, step):
        nonlocal traces
        traces += 1
        now = mtl.phase_schedule(key, epoch, 4, step=step if per_batch else None)
        return jax.lax.cond(now, lambda: 1, lambda: 2)

    phases = [[int(phase_of(e, s)) for s in range(12)] for e in range(5)]
    assert traces == 1
    assert set(phases[0]) == {1}
    assert set(phases[4]) == {2}
    mixed = [len(set(row)) > 1 for row in phases[1:4]]
    assert any(mixed) == per_batch


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, 0), ValueError, "num_epochs must be at least 1, got 0"),
        ((0, -3), ValueError, "num_epochs must be at least 1"),
        ((-1, 3), ValueError, "epoch must be at least 0"),
        ((0.5, 3), TypeError, "epoch must be an integer, got float"),
        ((jnp.zeros(2, int), 3), ValueError, r"epoch must be a scalar, got shape"),
    ],
)
def test_impossible_numbers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        mtl.phase_schedule(jax.random.key(0), *arguments)
