"""The Task Tensioner and the central direction against the authors' own outputs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
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
