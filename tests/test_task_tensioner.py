"""The Task Tensioner and the central direction against the authors' own outputs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import mtl_optax as mtl
from mtl_optax.weightings import _task_tensioner as module

TABLE = json.loads(
    (pathlib.Path(__file__).parent / "fixtures" / "tensioner.json").read_text()
)
CASES = {case["name"]: case for case in TABLE["cases"]}

# Two tasks: the closed form is exact in both. Three and more: the authors' Frank-Wolfe
# stops early, and so differs from the exact minimum by up to 7e-5.
EXACT, INEXACT = 1e-12, 1e-4

# Parallel gradients: their pair solver puts 0.999 on the first task, by rounding; the
# limit from gradients that are not parallel puts one half on each.
PARALLEL = {"dir2_parallel", "dir2_parallel_swapped"}


# Every case is laid out as two leaves of these sizes, padded with zeros, so that one
# compilation a number of tasks and dtype serves all.
SIZES = (48, 8)


def tree_of(case, flat_by_task, dtype):
    rows = np.zeros((len(case["tasks"]), sum(SIZES)))
    for row, task in zip(rows, case["tasks"], strict=True):
        entries = np.concatenate([np.ravel(leaf) for leaf in flat_by_task[task]])
        row[: len(entries)] = entries
    head, tail = rows[:, : SIZES[0]], rows[:, SIZES[0] :]
    return {
        "matrix": jnp.asarray(head.reshape(-1, 6, 8), dtype),
        "vector": jnp.asarray(tail, dtype),
    }


def flat(tree, case):
    entries = np.concatenate([np.ravel(tree["matrix"]), tree["vector"]])
    size = sum(int(np.prod(shape)) for shape in case["shapes"])
    assert not np.any(entries[size:])
    return entries[:size]


def params(dtype):
    return {"matrix": jnp.zeros((6, 8), dtype), "vector": jnp.zeros(8, dtype)}


@functools.partial(jax.jit, static_argnums=0)
def central_step(num_tasks, grads):
    tx = mtl.edm(num_tasks)
    one = jax.tree.map(lambda g: g[0], grads)
    return tx.update(grads, tx.init(one))[0]


@functools.partial(jax.jit, static_argnums=0)
def tensioned_step(num_tasks, alpha, grads, losses, state):
    tx = mtl.task_tensioner(num_tasks, alpha=alpha)
    return tx.update(grads, state, losses=losses)


def tolerance(case):
    if case["dtype"] == "torch.float32":
        return 2e-4
    return EXACT if len(case["tasks"]) == 2 else INEXACT


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c["kind"] == "Directions"]
)
def test_central_direction_is_the_authors(name, x64):
    case = CASES[name]
    grads = tree_of(case, case["grads"], jnp.float64)
    ours = flat(central_step(len(case["tasks"]), grads), case)
    assert np.all(np.isfinite(ours))
    if case["error"] is None and name not in PARALLEL:
        wanted = np.asarray(case["output"])
        # Where 0 lies in the hull the reference stops at a small vector.
        size = max(1, *(np.abs(g).max() for g in jax.tree.leaves(grads)))
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance(case) * size)


@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c["kind"] == "GradHistory"]
)
def test_every_step_is_the_authors(name, x64):
    case = CASES[name]
    assert case["window"] == 10
    dtype = jnp.float32 if case["dtype"] == "torch.float32" else jnp.float64
    num_tasks = len(case["tasks"])
    state = mtl.task_tensioner(num_tasks).init(params(dtype))
    alpha = jnp.asarray(case["alpha"], dtype)
    compared = 0
    for step in case["steps"]:
        grads = tree_of(case, step["grads"], dtype)
        losses = jnp.asarray([step["losses"][t] for t in case["tasks"]], dtype)
        updates, state = tensioned_step(num_tasks, alpha, grads, losses, state)
        ours = flat(updates, case)
        assert np.all(np.isfinite(ours)), (name, step["step"])
        if step["error"] is not None or step["output"] is None:
            continue
        wanted = np.asarray(step["output"], float)
        if not np.all(np.isfinite(wanted)):
            continue
        size = np.abs(wanted).max()
        np.testing.assert_allclose(
            ours,
            wanted,
            rtol=0,
            atol=tolerance(case) * size,
            err_msg=f"{name}, step {step['step']}",
        )
        compared += 1
    assert compared >= 10, "the reference has too few finite steps to compare"


def test_tension_factor_is_the_authors(x64):
    for row in TABLE["tension_factor"]:
        p = float(row["p"])
        # Steady norms give a ratio of 1, so log10 of this loss is p - 1.
        loss = jnp.nan if np.isnan(p) else np.float64(10.0) ** (p - 1)
        ours = module._tension_factor(
            jnp.asarray(1.0, jnp.float64), jnp.asarray(loss, jnp.float64), row["alpha"]
        )
        np.testing.assert_allclose(ours, float(row["c"]), rtol=1e-9, atol=1e-12)


def unit_rows(key, num_tasks, size):
    rows = jax.random.normal(jax.random.key(key), (num_tasks, size))
    return np.asarray(rows / jnp.linalg.norm(rows, axis=1, keepdims=True))


STEPS = 12


@functools.partial(jax.jit, static_argnums=(0, 1))
def twelve_steps(tension, lazy, rows, losses):
    """Twelve steps at the same gradients; the last update."""
    tx = mtl.task_tensioner(len(rows), tension=tension)

    def linear(params):  # losses whose gradients are these rows
        return rows @ params - jax.lax.stop_gradient(rows @ params) + losses

    def step(state, _):
        jacobian = mtl.task_jacobian if lazy else mtl.value_and_task_grads
        # A mode, or so few rows would be stored.
        values, grads = jacobian(linear, mode="map")(rows[0])
        updates, state = tx.update(grads, state, losses=values)
        return state, updates

    return jax.lax.scan(step, tx.init(rows[0]), None, STEPS)[1][-1]


def tensioned(rows, dtype, tension="absolute", lazy=False):
    losses = jnp.asarray(10.0 ** -np.arange(len(rows)), dtype)
    rows = jnp.asarray(rows, dtype)
    return np.asarray(twelve_steps(tension, lazy, rows, losses), float)


@pytest.mark.parametrize("lazy", [False, True], ids=["stacked", "lazy"])
@pytest.mark.parametrize("num_tasks", [2, 3, 5])
def test_nearly_equal_gradients_keep_their_direction(num_tasks, lazy, x64):
    common = unit_rows(0, 1, 200)
    rows = np.float32(common + 1e-3 * unit_rows(1, num_tasks, 200))
    exact = np.tile(rows.astype(np.float64), (STEPS, 1, 1))
    losses = np.tile(10.0 ** -np.arange(num_tasks), (STEPS, 1))
    wanted = oracles.task_tensioner(exact, losses)[-1] @ exact[-1]
    ours = tensioned(rows, jnp.float32, lazy=lazy)
    # The tension is what differs from the common direction; a float32 Gramian of the
    # rows themselves gets it wrong by a quarter.
    tension, wanted = ours - rows.mean(0), wanted - rows.mean(0)
    assert np.linalg.norm(wanted) > 0.01
    error = np.linalg.norm(tension - wanted) / np.linalg.norm(wanted)
    assert error < 5e-3


def test_relative_tension_follows_the_length_of_the_gradients(x64):
    rows = unit_rows(3, 3, 20)
    small = tensioned(rows, jnp.float64, tension="relative")
    large = tensioned(1e6 * rows, jnp.float64, tension="relative")
    np.testing.assert_allclose(large, 1e6 * small, rtol=1e-9)
    # Absolute tension is the same where d has length 1, and vanishes for long rows.
    central = np.asarray(central_step(3, {"w": jnp.asarray(rows)})["w"])
    rows = rows / np.linalg.norm(central)
    absolute = tensioned(rows, jnp.float64)
    relative = tensioned(rows, jnp.float64, tension="relative")
    np.testing.assert_allclose(absolute, relative, rtol=1e-9)
    absolute = tensioned(1e6 * rows, jnp.float64)
    plain = np.asarray(central_step(3, {"w": jnp.asarray(1e6 * rows)})["w"])
    assert np.linalg.norm(absolute - plain) < 4
    relative = tensioned(1e6 * rows, jnp.float64, tension="relative")
    assert np.linalg.norm(relative - plain) > 1e4


def test_a_history_counts_per_task():
    tx = mtl.task_tensioner(2, window=3)
    state = tx.init({"w": jnp.zeros(2)})
    g = {"w": jnp.array([[3.0, 4.0], [0.0, 2.0]])}
    absent = jnp.array([True, False])
    losses = jnp.array([1.0, 1.0])
    for mask in [None, absent, None, absent, None]:
        _, state = tx.update(g, state, losses=losses, task_mask=mask)
    history = state.weighting
    np.testing.assert_array_equal(history.steps_seen, [5, 3])
    np.testing.assert_allclose(history.gradient_norms, [[5, 5, 5], [2, 2, 2]])
    np.testing.assert_array_equal(history.info.tension, 0)  # one window is not full
    _, state = tx.update(g, state, losses=losses, task_mask=absent)
    assert state.weighting.info.tension[0] > 0  # the absent task does not hold it up
    np.testing.assert_allclose(
        state.weighting.info.tension, [0.85, 0.0], rtol=1e-6
    )  # p = 1


def test_a_zero_gradient_counts_as_absent():
    tx = mtl.task_tensioner(2, window=2)
    state = tx.init({"w": jnp.zeros(2)})
    losses = jnp.array([1.0, 1.0])
    g = {"w": jnp.array([[3.0, 4.0], [0.0, 2.0]])}
    for _ in range(3):
        _, state = tx.update(g, state, losses=losses)
    solved = {"w": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
    updates, after = tx.update(solved, state, losses=losses)
    np.testing.assert_allclose(updates["w"], [3.0, 4.0], rtol=1e-6)
    for old, new in zip(state.weighting[:3], after.weighting[:3], strict=True):
        np.testing.assert_array_equal(old[1], new[1])


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_negative_alpha_is_refused(bad):
    with pytest.raises(ValueError, match="alpha must not be negative, got"):
        mtl.task_tensioner(2, alpha=bad)
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        mtl.task_tensioner(2, window=0)
    with pytest.raises(ValueError, match="tension must be one of"):
        mtl.task_tensioner(2, tension="strong")
