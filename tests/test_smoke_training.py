"""Every method trains: three tasks and forty, on real digits.

The forty tasks are the labels of one multi-label problem: is the digit one of five
that were drawn for the task? Whatever the method, losses stay finite and their mean
falls (of a method that serves its first task, that task's loss).
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import mtl_optax as mtl

STEPS, BATCH, WIDTH = 80, 64, 32
SERVES_THE_FIRST = {"pcd"}


@functools.cache
def problem(num_tasks):
    """Images and labels ``[n, T]``: three questions about the digit, or forty sets."""
    digits = load_digits()
    images = (digits.data / 16).astype(np.float32)
    number = digits.target
    if num_tasks == 3:
        sets = [number % 2 == 1, number >= 5, np.isin(number, (2, 3, 5, 7))]
    else:
        rng = np.random.default_rng(0)
        sets = [
            np.isin(number, rng.choice(10, 5, replace=False)) for _ in range(num_tasks)
        ]
    return images, np.stack(sets, 1).astype(np.float32)


def start(num_tasks):
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float32)

    return {
        "heads": normal(WIDTH, num_tasks),
        "trunk": {"b": jnp.zeros(WIDTH), "w": normal(64, WIDTH)},
    }


def losses_of(params, images, labels):
    hidden = jnp.tanh(images @ params["trunk"]["w"] + params["trunk"]["b"])
    logits = hidden @ params["heads"]
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean(0)


def trained(method, num_tasks):
    """The losses on all images before and after, and every step's."""
    images, labels = problem(num_tasks)
    params = start(num_tasks)
    tx = optax.chain(method.make(num_tasks), optax.adam(3e-3))
    jacobian = method.jacobian(losses_of)

    def step(carry, number):
        params, state = carry
        key = jax.random.fold_in(jax.random.key(2), number)
        drawn = jax.random.choice(key, len(images), (3, BATCH), replace=False)
        batches = [(jnp.asarray(images)[i], jnp.asarray(labels)[i]) for i in drawn]
        losses, grads = jacobian(params, *batches[0])
        extras = laws.extras_of(method, num_tasks, losses, params)
        if "key" in method.needs:
            extras["key"] = key
        if "other_task_grads" in method.needs:
            extras["other_task_grads"] = tuple(
                jacobian(params, *batch)[1] for batch in batches[1:]
            )
        updates, state = tx.update(grads, state, params, **extras)
        return (optax.apply_updates(params, updates), state), losses

    first = (params, tx.init(params))
    (after, _), during = laws.quick_jit(
        lambda first: jax.lax.scan(step, first, jnp.arange(STEPS))
    )(first)
    before, after = (np.asarray(losses_of(p, images, labels)) for p in (params, after))
    return before, after, np.asarray(during)


@pytest.mark.slow
@pytest.mark.parametrize("num_tasks", [3, 40])
@pytest.mark.parametrize("name", mtl.METHODS)
def test_every_method_trains(name, num_tasks):
    before, after, during = trained(mtl.METHODS[name], num_tasks)
    assert np.all(np.isfinite(during))
    assert np.all(np.isfinite(after))
    if name in SERVES_THE_FIRST:
        before, after = before[:1], after[:1]
    print(f"{name}, T = {num_tasks}: {before.mean():.3f} to {after.mean():.3f}")
    assert after.mean() < 0.98 * before.mean()
