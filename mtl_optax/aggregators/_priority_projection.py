"""Priority projection: a channel's gradient may not hurt the task that owns it.

Phase 2 of connection-strength optimisation (Jeong & Yoon, "Quantifying Task Priority
for Multi-Task Optimization", CVPR 2024, Algorithm 1). Output channels of a shared layer
fall into groups by the task with the largest connection strength there; within group i

    G_ij <- G_ij - min(0, <G_ii, G_ij>) / |G_ii|^2 * G_ii,     u = sum_j G_ij

where ``G_ij`` is task j's gradient on the channels of group i, as one vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import simple_path, weighted_sum
from mtl_optax._types import Aggregator, Params, TaskGradients, TaskMask, Updates

_MISSING: Any = object()


def _strengths_by_path(
    strengths: PyTree[Any], rows: TaskGradients
) -> dict[tuple[str, ...], Array]:
    """The arrays of a tree that may lack leaves, by their place; checked."""
    leaves = jax.tree_util.tree_leaves_with_path(strengths)
    found = {simple_path(path): jnp.asarray(leaf) for path, leaf in leaves}
    shapes = {
        simple_path(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(rows)
    }
    for place, strength in found.items():
        where = f"strengths of leaf {'.'.join(place) or '(the whole tree)'}"
        if place not in shapes:
            known = ", ".join(".".join(path) for path in shapes)
            raise ValueError(
                f"{where}: the parameters have no such leaf. There are: {known}."
            )
        shape = shapes[place]
        if len(shape) < 2 or strength.shape != (shape[0], shape[-1]):
            wanted = (
                f"(T, C_out) = ({shape[0]}, {shape[-1]})"
                if len(shape) > 1
                else "None, since a scalar has no channels"
            )
            raise ValueError(f"{where}: expected {wanted}, got {strength.shape}.")
    return found


def _owners(
    strengths: Float[Array, "tasks channels"], task_mask: TaskMask
) -> Float[Array, "tasks channels"]:
    """1 where the task has priority (the first of equals), else 0."""
    lowest = jnp.full((), -jnp.inf, strengths.dtype)
    present = jnp.where(task_mask[:, None], strengths, lowest)
    owner = jnp.argmax(present, axis=0)
    return (jnp.arange(strengths.shape[0])[:, None] == owner).astype(strengths.dtype)


def _project(
    rows: Float[Array, "tasks *inputs channels"],
    owned: Float[Array, "tasks channels"],
    axis_name: Any,
) -> Float[Array, "*inputs channels"]:
    """The sum over tasks of the projected gradients of one leaf."""
    wide = rows.astype(jnp.result_type(jnp.float32, rows.dtype))
    owned = owned.astype(wide.dtype)
    one = jnp.ones((), wide.dtype)
    inputs = tuple(range(1, wide.ndim - 1))

    def over_devices(reduce: Any, x: Array) -> Array:
        return x if axis_name is None else reduce(x, axis_name)

    # Lengths are taken out, so that squares of long and short rows stay in range.
    unit = jnp.max(jnp.abs(wide), axis=(*inputs, wide.ndim - 1), initial=0)
    unit = over_devices(lax.pmax, unit)
    unit = jnp.where(unit > 0, unit, one)
    scaled = wide / jnp.expand_dims(unit, (*inputs, wide.ndim - 1))

    # <G_ii, G_ij>, channel by channel and then over the whole of each group. Products
    # and sums, no `dot`: they run at full precision and for any sharding.
    mine = jnp.expand_dims(owned, inputs)
    own = jnp.sum(scaled * mine, axis=0)
    products = jnp.sum(own * scaled, axis=inputs)
    groups = jnp.sum(products[None, :, :] * owned[:, None, :], axis=2)
    groups = over_devices(lax.psum, groups)
    squares = jnp.sum(groups * jnp.eye(len(unit), dtype=one.dtype), axis=1)

    # A layer that belongs to one task alone has nothing to disentangle.
    channels = over_devices(lax.psum, jnp.sum(owned, axis=1))
    several = jnp.sum((channels > 0).astype(one.dtype)) > 1
    hurt = several & (groups < 0) & (squares > 0)[:, None]
    share = groups / jnp.where(squares > 0, squares, one)[:, None]
    taken = jnp.sum(jnp.where(hurt, share * unit, 0 * one), axis=1)
    removed = own * jnp.expand_dims(taken @ owned, tuple(range(len(inputs))))
    total = weighted_sum(jnp.ones(len(unit), wide.dtype), wide)
    return (total - removed).astype(rows.dtype)


def priority_projection(
    num_tasks: int, *, scale: LengthScale = "paper", axis_name: Any = None
) -> Combiner:
    r"""Sums task gradients after taking out what hurts a channel's own task.

    .. math::

        u = \sum_j \Bigl( G_{ij} - \frac{\min(0, \langle G_{ii}, G_{ij} \rangle)}
        {\|G_{ii}\|^2} G_{ii} \Bigr) \quad \text{on the channels of group } i

    The output channels of a shared layer are grouped by the task that leans most on
    them (`connection_strength`); a channel's owner keeps its gradient, and the others
    lose what points against it. The projection is over each group as a whole, not a
    channel at a time: channels of one task may still see conflict among themselves.
    Use it late in training, mixed with `sequential_task_steps` by `phase_schedule`, as
    the authors do; it needs a network with task-specific batch norms
    (`mtl_optax.layers.TaskBatchNorm`). It does nothing where no strengths are given.

    Args:
      num_tasks: T.
      scale: ``"paper"`` (the sum) or ``"norm"``; see `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which inner products are summed; strengths are sharded as their channels.

    Returns:
      a `Combiner`. Its ``update`` takes ``strengths=``: a tree like the parameters with
      a ``[T, C_out]`` array for each kernel that has priorities, and None, or no key at
      all, elsewhere (None alone: nowhere). Leaves without strengths, and layers that
      belong to one task altogether (as at initialisation, when all strengths are
      equal), get the plain sum. Of equal strengths the first task's counts. Absent
      tasks own nothing. A lazy tree is materialised: T backward passes.

    Raises:
      TypeError: when ``strengths`` is missing.
      ValueError: when an array of strengths has another shape than ``(T, C_out)``, or
        stands where the parameters have no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.priority_projection(num_tasks=2)
      >>> params = {"kernel": jnp.zeros((1, 3)), "bias": jnp.zeros(3)}
      >>> g = {
      ...     "kernel": jnp.array([[[1.0, 1.0, 1.0]], [[-3.0, 2.0, 5.0]]]),
      ...     "bias": jnp.ones((2, 3)),
      ... }
      >>> strengths = {"kernel": jnp.array([[0.3, 0.3, 0.4], [0.1, 0.1, 0.8]])}
      >>> updates, _ = tx.update(g, tx.init(params), params, strengths=strengths)
      >>> updates["kernel"], updates["bias"]
      (Array([[-1.5,  3.5,  6. ]], dtype=float32), Array([2., 2., 2.], dtype=float32))

    Differs from the authors' code: strengths are an argument, so a dense layer (the
    1 x 1 case) has priorities too where they are given.

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024.
    """

    def init(params: Params, num_tasks: int) -> tuple[()]:
        del params, num_tasks
        return ()

    def update(
        rows: TaskGradients,
        state: tuple[()],
        params: Params | None,
        *,
        task_mask: TaskMask,
        strengths: PyTree[Any] = _MISSING,
        **extra: Any,
    ) -> tuple[Updates, tuple[()]]:
        del params, extra
        if strengths is _MISSING:
            raise TypeError(
                "priority_projection needs connection strengths: call tx.update(..., "
                "strengths=tree) with an array (T, C_out) at each kernel that has "
                "priorities (mtl_optax.connection_strength gives it), and None or "
                "nothing elsewhere."
            )
        found = _strengths_by_path(strengths, rows)
        ones = jnp.ones(num_tasks)

        def one(path: Any, g: Array) -> Array:
            strength = found.get(simple_path(path))
            if strength is None:
                return weighted_sum(ones, g)
            return _project(g, _owners(jnp.asarray(strength), task_mask), axis_name)

        return jax.tree_util.tree_map_with_path(one, rows), state

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
