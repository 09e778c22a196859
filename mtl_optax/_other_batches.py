"""Task gradients of other batches, for methods that need independent samples."""

from typing import Any

import jax
import optax
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._masks import is_masked
from mtl_optax._tree import (
    check_task_axis,
    cross_gramian,
    materialize,
    present_rows,
    same_structure,
)
from mtl_optax._types import DType, TaskGradients, TaskMask

NEEDS_OTHER_BATCHES = frozenset({"other_task_grads"})


def read_cross_gramian(
    caller: str,
    other_task_grads: Any,
    rows: TaskGradients,
    task_mask: TaskMask,
    dtype: DType,
    axis_name: Any = None,
) -> Float[Array, "tasks tasks"]:
    """``J_1 J_2^T`` of two other batches; zero where a task is absent.

    Args:
      caller: the method, for messages.
      other_task_grads: what ``update`` was given: a pair of trees like `rows`, stacked
        or lazy.
      rows: the stacked task gradients of the batch that is combined.
      task_mask: ``[T]``.
      dtype: of the result.
      axis_name: see `cross_gramian`.
    """
    if not isinstance(other_task_grads, tuple | list) or len(other_task_grads) != 2:
        got = type(other_task_grads).__name__
        if isinstance(other_task_grads, tuple | list):
            got = f"a {got} of {len(other_task_grads)}"
        raise TypeError(
            f"{caller} needs the task gradients of two more batches, independent of "
            "this one and taken at the same parameters: call tx.update(task_grads, "
            f"state, params, other_task_grads=(first, second)); got {got}."
        )
    first, second = (_read(tree, rows, task_mask) for tree in other_task_grads)
    return lax.stop_gradient(cross_gramian(first, second, axis_name)).astype(dtype)


def _read(tree: Any, rows: TaskGradients, task_mask: TaskMask) -> TaskGradients:
    """One of the two trees, checked, stacked, and without absent tasks."""
    tree = materialize(fitted(tree, rows, len(task_mask)))
    return jax.tree.map(lambda g: present_rows(g, task_mask), tree)


def fitted(tree: Any, rows: TaskGradients, num_tasks: int) -> TaskGradients:
    """Task gradients of another batch, checked to be like `rows`."""
    ours, wanted = jax.tree.flatten(rows, is_leaf=is_masked)
    theirs, found = jax.tree.flatten(tree, is_leaf=is_masked)
    if same_structure(found, wanted):
        # Leaves that another transform takes care of (`shared_only`) are passed over.
        chosen = [
            optax.MaskedNode() if is_masked(row) else leaf
            for row, leaf in zip(ours, theirs, strict=True)
        ]
        tree = jax.tree.unflatten(wanted, chosen)
    params = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), rows)
    try:
        check_task_axis(tree, num_tasks, params)
    except (TypeError, ValueError) as error:
        raise type(error)(f"other_task_grads: {error}") from error
    return tree
