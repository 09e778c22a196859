"""Many training runs at once: one `vmap` over seeds and over hyper-parameters.

A whole run is a `lax.scan` over steps. Under two `vmap`s it gives what a plain loop
over steps gives for one seed and one set of hyper-parameters after the other, and
compiles once.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

# As many steps as fill the default histories.
TASKS, STEPS, SEEDS = 3, laws.STEPS, 3
SHARED = {"heads": [False] * TASKS, "trunk": {"b": True, "w": True}}
TOLERANCE = 1e-4


class Sweep(NamedTuple):
    """Hyper-parameters of all runs: leading axis, one entry a setting."""

    learning_rate: Any
    options: dict[str, Any]


def sweep_of(method):
    """Two settings: the defaults, and every number changed."""
    factors = np.array([1.0, 0.8], np.float32)
    options = {
        name: np.float32(default) * factors
        for name, default in laws.hyper_parameters(method).items()
        if isinstance(default, float)
    }
    names = inspect.signature(method.factory).parameters
    for name in ("weights", "preference"):  # one number a task
        if name in names:
            options[name] = np.array([[1, 1, 1], [2, 0.5, 1]], np.float32)
    if method.kind == "jacobian":
        options["inner_learning_rate"] = np.array([0.01, 0.03], np.float32)
    return Sweep(np.array([0.1, 0.03], np.float32), options)


def losses_of(params, batch):
    """An MLP with a head a task, and losses of three sizes."""
    found = laws.mlp_array(params, *batch)
    return found * jnp.array([1.0, 3.0, 0.3])


def start(key):
    """Parameters of a seed."""
    params = laws.mlp_params(tasks=TASKS)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noise = [
        0.3 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(jnp.add, params, treedef.unflatten(noise))


def transform(method, hyper):
    own = {k: v for k, v in hyper.options.items() if k != "inner_learning_rate"}
    combiner = mtl.shared_only(method.make(TASKS, **own), SHARED)
    return optax.chain(combiner, optax.sgd(hyper.learning_rate))


def train_step(method, key, hyper, params, state, number):
    """One step on a batch of the run's own, with a key of the run's own."""
    batch_key, own_key = jax.random.split(jax.random.fold_in(key, number))
    x, y = laws.mlp_batch(TASKS, rows=8)
    batch = (x + 0.3 * jax.random.normal(batch_key, x.shape), y)
    inner = {k: v for k, v in hyper.options.items() if k == "inner_learning_rate"}
    losses, grads = method.jacobian(losses_of, **inner)(params, batch)
    shared = {"trunk": params["trunk"]}
    extras = laws.extras_of(method, TASKS, losses, shared, grads)
    if "key" in method.needs:
        extras["key"] = own_key
    updates, state = transform(method, hyper).update(grads, state, params, **extras)
    return optax.apply_updates(params, updates), state, losses


def train(method, key, hyper):
    """A whole run: the last parameters and state, and every step's losses."""
    params = start(key)

    def body(carry, number):
        *carry, losses = train_step(method, key, hyper, *carry, number)
        return tuple(carry), losses

    first = (params, transform(method, hyper).init(params))
    return jax.lax.scan(body, first, jnp.arange(STEPS))


def difference(found, wanted):
    """The largest, relative to the largest entry of the leaf over all runs."""
    worst = {}
    for (path, a), b in zip(
        laws.paths_and_leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        if "solver_residual" in path:  # rounding and nothing else
            continue
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        size = max(np.abs(b).max(initial=0), np.finfo(np.float32).tiny)
        worst[path] = np.abs(a - b).max(initial=0) / size
    return worst


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(
            m,
            id=m.name,
            marks=() if m in laws.one_of_each_sort() else pytest.mark.slow,
        )
        for m in mtl.METHODS.values()
    ],
)
def test_runs_at_once_are_runs_one_by_one(method):
    keys = jax.random.split(jax.random.key(7), SEEDS)
    sweep = sweep_of(method)
    traces = []

    def run(key, hyper):
        traces.append(method.name)
        return train(method, key, hyper)

    over_seeds = jax.vmap(run, in_axes=(0, None))
    at_once = laws.quick_jit(jax.vmap(over_seeds, in_axes=(None, 0)))
    found = at_once(keys, sweep)
    # Other seeds and other hyper-parameters: nothing is traced or compiled anew.
    at_once(keys[::-1], jax.tree.map(lambda x: x[::-1], sweep))
    assert len(traces) == 1
    assert at_once._cache_size() == 1

    step = laws.quick_jit(functools.partial(train_step, method))
    runs = []
    for setting in range(len(sweep.learning_rate)):
        hyper = jax.tree.map(lambda x, s=setting: x[s], sweep)
        for key in keys:
            params, losses = start(key), []
            state = transform(method, hyper).init(params)
            for number in range(STEPS):
                params, state, now = step(key, hyper, params, state, number)
                losses.append(now)
            runs.append(((params, state), jnp.stack(losses)))
    shape = (len(sweep.learning_rate), SEEDS)
    wanted = jax.tree.map(
        lambda *x: np.stack(x).reshape(*shape, *np.shape(x[0])), *runs
    )
    gaps = difference(found, wanted)
    assert max(gaps.values()) < TOLERANCE, gaps

    # Runs differ by seed and by setting.
    last = np.asarray(found[1][:, :, -1]).reshape(-1, TASKS)
    assert len(np.unique(last, axis=0)) == len(last)
