"""`per_task`: any optax transform, run once for each task."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtl_optax._arguments import check_num_tasks, check_transform
from mtl_optax._transform import Combiner, read_task_mask
from mtl_optax._tree import (
    check_task_axis,
    choose_rows,
    materialize,
    present_rows,
    same_structure,
    task_axis_like,
)
from mtl_optax._types import Params, State, TaskGradients


class PerTaskState(NamedTuple):
    """State of `per_task`: that of the inner transform, leaves ``[T, ...]``."""

    per_task: State


def per_task(
    inner: optax.GradientTransformation, num_tasks: int
) -> optax.GradientTransformationExtraArgs:
    r"""Runs an optax transform on every task's gradient, with a state for each.

    .. math:: \tilde g_t, s_t = \mathrm{inner}(g_t, s_t, \theta), \qquad t = 1 \dots T

    Task gradients go in and task gradients come out, so any combiner can follow:
    ``chain(per_task(scale_by_adam(), T), mgda(T), scale(-1e-3))`` combines Adam's steps
    instead of gradients, and ``per_task(clip_by_global_norm(1.0), T)`` clips each task
    by itself. Decay weights after the combiner: inside, that would happen once a task.
    A combiner cannot stand inside.

    Args:
      inner: any transform that keeps shapes. It sees one task's gradient as if there
        were no other; `params` and extra arguments reach it unchanged.
      num_tasks: T.

    Returns:
      an `optax.GradientTransformationExtraArgs`. Its updates are stacked arrays
      ``[T, *param.shape]``; a lazy tree is materialised (T backward passes), so a
      combiner that reads losses needs ``losses=`` after it. ``task_mask`` leaves absent
      tasks' states as they are and gives zeros for them. **Memory**: T times the state
      of `inner`. All tasks start from the same state, random keys included.

    Raises:
      TypeError: when `inner` is a combiner, or no transform.
      ValueError: for wrong shapes, or when `inner` changes them.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> tx = optax.chain(
      ...     mtl.per_task(optax.scale_by_adam(), 2), mtl.mean(num_tasks=2)
      ... )
      >>> params = {"w": jnp.zeros(2)}
      >>> g = {"w": jnp.array([[1000.0, 0.0], [0.1, -0.1]])}
      >>> updates, state = tx.update(g, tx.init(params), params)
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['1.000', '-0.500']
    """
    check_num_tasks(num_tasks)
    check_transform("per_task", "inner", inner)
    if isinstance(inner, Combiner):
        raise TypeError(
            "per_task: inner must be a transform of ordinary gradients, got a "
            "combiner; it sees one task at a time. Put the combiner after, as in "
            "chain(per_task(scale_by_adam(), T), combiner)."
        )
    update_one = optax.with_extra_args_support(inner).update

    def init(params: Params) -> PerTaskState:
        def copies(x: Any) -> Array:
            x = jnp.asarray(x)
            x = x.astype(x.dtype)  # no longer weakly typed: it would compile twice
            return jnp.broadcast_to(x, (num_tasks, *x.shape))

        return PerTaskState(jax.tree.map(copies, inner.init(params)))

    def update(
        task_grads: TaskGradients,
        state: PerTaskState,
        params: Params | None = None,
        *,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[TaskGradients, PerTaskState]:
        check_task_axis(task_grads, num_tasks, params)
        mask = read_task_mask(task_mask, num_tasks)
        rows = jax.tree.map(lambda g: present_rows(g, mask), materialize(task_grads))
        held = jax.tree.leaves(state)
        if held:
            rows = jax.tree.map(lambda g: task_axis_like(g, held[0]), rows)

        def one(gradient: PyTree[Array], state: State) -> tuple[PyTree[Array], State]:
            return update_one(gradient, state, params, **extra)

        updates, new = jax.vmap(one)(rows, state.per_task)
        _check_shapes(updates, rows)
        if mask is not None:
            updates = jax.tree.map(lambda u: present_rows(u, mask), updates)
            new = jax.tree.map(
                lambda a, b: choose_rows(mask, a, b), new, state.per_task
            )
        return updates, PerTaskState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_shapes(updates: Any, rows: TaskGradients) -> None:
    what = "per_task: the inner transform must keep the shapes of a gradient; "
    if not same_structure(jax.tree.structure(updates), jax.tree.structure(rows)):
        raise ValueError(
            f"{what}expected the structure {jax.tree.structure(rows)}, got "
            f"{jax.tree.structure(updates)}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(rows),
        jax.tree.leaves(updates),
        strict=True,
    )
    for (path, row), update in pairs:
        if update.shape != row.shape:
            raise ValueError(
                f"{what}leaf {jax.tree_util.keystr(path) or '(the whole tree)'}: "
                f"expected {row.shape}, the task first, got {update.shape}."
            )
