"""Random numbers for tasks, that an absent task does not move.

A draw belongs to a task's rank among the tasks that are present, not to its place in an
array: so the draws of present tasks are the same whether others are absent or were
never there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mtl_optax._types import TaskMask


def _ranks(task_mask: TaskMask) -> Int[Array, " tasks"]:
    return jnp.cumsum(task_mask.astype(jnp.int32)) - 1


def _keys(key: PRNGKeyArray, task_mask: TaskMask) -> PRNGKeyArray:
    """One key a task; absent tasks repeat their neighbour's."""
    return jax.vmap(lambda rank: jax.random.fold_in(key, rank))(_ranks(task_mask))


def normal_by_task(
    key: PRNGKeyArray, task_mask: TaskMask, dtype: jnp.dtype
) -> Float[Array, " tasks"]:
    """A standard normal number a task."""
    return jax.vmap(lambda k: jax.random.normal(k, (), dtype))(_keys(key, task_mask))


def uniform_by_task(key: PRNGKeyArray, task_mask: TaskMask) -> Float[Array, " tasks"]:
    """A uniform number a task."""
    return jax.vmap(lambda k: jax.random.uniform(k, ()))(_keys(key, task_mask))


def orders_by_task(key: PRNGKeyArray, task_mask: TaskMask) -> Int[Array, "tasks tasks"]:
    """For every task a random order of the tasks; absent tasks come last."""
    keys = _keys(key, task_mask)
    draws = jax.vmap(lambda k: uniform_by_task(k, task_mask))(keys)
    return jnp.argsort(jnp.where(task_mask, draws, jnp.inf), axis=1)
