"""The linen example: a `TrainState` trains on stacked and on lazy task gradients."""

import functools

import jax
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax.examples import linen_digits
from mtl_optax.examples.digits import draw_pairs, load_sources


@jax.jit
def stacked_step(state, pairs):
    losses, task_grads = mtl.value_and_task_grads(linen_digits.loss_fn)(
        state.params, pairs
    )
    return state.apply_gradients(grads=task_grads, losses=losses), losses


@functools.cache
def trained(step, num_steps=60):
    pairs = draw_pairs(load_sources().train, jax.random.key(1), 256)
    state = linen_digits.create_state(jax.random.key(0))
    losses = []
    for _ in range(num_steps):
        state, now = step(state, pairs)
        losses.append(now)
    return state, np.stack(losses)


@pytest.mark.parametrize("step", [linen_digits.train_step, stacked_step])
def test_both_losses_fall(step):
    state, losses = trained(step)
    assert np.all(losses[-1] < 0.6 * losses[0])
    assert int(state.step) == 60


def test_stacked_and_lazy_gradients_agree():
    (_, lazy), (_, stacked) = trained(linen_digits.train_step), trained(stacked_step)
    # Equal up to rounding, which Adam magnifies where a gradient is all but zero.
    np.testing.assert_allclose(lazy[:12], stacked[:12], rtol=1e-4)
    np.testing.assert_allclose(lazy, stacked, rtol=2e-2)


def test_losses_reach_the_combiner():
    # `apply_gradients` passes them on; without, stacked gradients raise.
    state, _ = trained(stacked_step)
    tension = np.asarray(state.opt_state[0].shared.weighting.info.tension)
    assert np.all((tension > 0.7) & (tension < 1))
    zeros = jax.tree.map(lambda p: np.zeros((2, *p.shape), p.dtype), state.params)
    with pytest.raises(TypeError, match="losses"):
        state.apply_gradients(grads=zeros)


def test_main_prints_metrics_of_unseen_digits(capsys):
    metrics = linen_digits.main(num_epochs=3, batch_size=256)
    assert "test: CL accuracy %" in capsys.readouterr().out
    assert metrics["CL accuracy %"] > 20
    assert metrics["RR rmse"] < 0.4
