"""What whole-row methods keep: a row a task, and the tasks' shares."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from mtl_optax._tree import choose_rows, norm, task_axis_like
from mtl_optax._types import DType, Params, TaskGradients, TaskMask, Updates, Weights


def zero_rows(params: Params, num_tasks: int) -> TaskGradients:
    """Zeros ``[T, *param.shape]``, float32 at least."""
    return jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_tasks, *x.shape)), zero_row(params)
    )


def zero_row(params: Params) -> Updates:
    """Zeros like the parameters, float32 at least."""

    def zeros(x: Any) -> Array:
        x = jnp.asarray(x)
        return jnp.zeros_like(x, dtype=jnp.result_type(jnp.float32, x.dtype))

    return jax.tree.map(zeros, params)


def wide_rows(rows: TaskGradients, kept: TaskGradients) -> TaskGradients:
    """Rows in the dtype that their moments are kept in, and sharded as those."""
    return jax.tree.map(lambda g, m: task_axis_like(g.astype(m.dtype), m), rows, kept)


def keep_absent(task_mask: TaskMask, new: PyTree[Any], old: PyTree[Any]) -> Any:
    """Leaves ``[T, ...]``: the new ones of present tasks, the old ones of absent."""
    return jax.tree.map(lambda a, b: choose_rows(task_mask, a, b), new, old)


def column(x: Array, leaf: Array) -> Array:
    """``x [T]`` in the dtype and the form that multiplies the rows of a leaf."""
    return x.astype(leaf.dtype).reshape((-1,) + (1,) * (leaf.ndim - 1))


def row_norms(rows: TaskGradients, axis_name: Any = None) -> Float[Array, " tasks"]:
    """Length of every task's row."""
    return jax.vmap(lambda row: norm(row, axis_name))(rows)


def sound_rows(
    rows: TaskGradients,
    task_mask: TaskMask,
    axis_name: Any = None,
    *,
    below: float = jnp.inf,
) -> TaskMask:
    """The present tasks whose rows are finite: others would never be forgotten."""
    return task_mask & (row_norms(rows, axis_name) < below)


def inverse_or_zero(x: Array) -> Array:
    """``1 / x``, and zero where x is."""
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def like(updates: Updates, rows: TaskGradients) -> Updates:
    """Updates in the dtype of the task gradients."""
    return jax.tree.map(lambda u, g: u.astype(g.dtype), updates, rows)


def count_present(task_mask: TaskMask, dtype: DType) -> Float[Array, ""]:
    """The number of present tasks, at least one."""
    return jnp.maximum(jnp.sum(task_mask.astype(dtype)), jnp.ones((), dtype))


# Shares are kept in units of an equal share, so ones at first. What present tasks hold
# together they share out among themselves; absent tasks keep theirs.

# Of an equal share: what tasks that hold nothing are given when they are by themselves.
_LEAST_HELD = 1e-3


def present_shares(kept: Float[Array, " tasks"], task_mask: TaskMask) -> Weights:
    """The shares of present tasks, which sum to one; of none, equal shares."""
    held = jnp.where(task_mask, kept, 0)
    total = jnp.sum(held)
    equal = task_mask.astype(kept.dtype) / count_present(task_mask, kept.dtype)
    return jnp.where(total > 0, held / jnp.where(total > 0, total, 1), equal)


def keep_shares(
    kept: Float[Array, " tasks"], shares: Weights, task_mask: TaskMask
) -> Float[Array, " tasks"]:
    """What is kept once present tasks have new shares, if these are finite."""
    least = _LEAST_HELD * count_present(task_mask, kept.dtype)
    held = jnp.maximum(jnp.sum(kept, where=task_mask), least)
    sound = jnp.all(jnp.isfinite(shares), where=task_mask)
    return jnp.where(task_mask & sound, held * shares, kept)
