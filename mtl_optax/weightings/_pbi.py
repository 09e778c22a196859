"""PBI: penalty-based boundary intersection.

The losses' distance along a ray is minimised, plus a penalty on their distance from it
(Zhang & Li 2007, MOEA/D).

    phi(L) = d1 + theta d2,   f = L - z,   d1 = f . r^,   d2 = |f - d1 r^|
    w = r^ + theta (f - d1 r^) / d2,   r^ = r / |r|
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._scalarized import read_point, scalarized, unit_vector
from mtl_optax._solved import read_per_task, shares_of
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask


def _distances(
    f: Float[Array, " tasks"], ray: Float[Array, " tasks"], task_mask: TaskMask
) -> tuple[Scalar, Scalar]:
    """``d1`` along the unit vector `ray` and ``d2`` from it."""
    unit, _ = unit_vector(jax.lax.stop_gradient(f), task_mask)
    across = unit - jnp.sum(unit * ray) * ray
    # On the ray itself it is rounding only, and must not become a direction.
    rounding = 64 * jnp.finfo(across.dtype).eps
    across = across / jnp.maximum(jnp.sqrt(jnp.sum(across**2)), rounding)
    d1 = jnp.sum(f * ray, where=task_mask)
    return d1, jnp.sum((f - d1 * ray) * across, where=task_mask)


def pbi(
    num_tasks: int,
    *,
    theta: float | jax.Array = 5.0,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    reference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
) -> Combiner:
    r"""The losses' distance along a ray, and from it.

    .. math:: \phi = d_1 + \theta d_2, \qquad
              d_1 = \langle L - z, \hat r \rangle, \qquad
              d_2 = \| L - z - d_1 \hat r \|

    Losses are driven towards the ray from ``z`` along ``r`` and down it: a task's loss
    ends up in proportion to its ``r_t`` (larger is worse). Use it to reach one point of
    the Pareto front, also in its hollows, with losses of one unit and large batches:
    near the ray the weights jump from one side to the other.

    Args:
      num_tasks: T.
      theta: the penalty, not negative, without unit. 5 in the paper's experiments.
      preference: r, ``[T]``, not negative, not all zero; equal by default. Its length
        does not matter. May be traced, to be drawn anew at every step.
      reference: z, ``[T]``, in the unit of the losses: the ideal point, below all of
        them; zero by default.
      scale: see `from_weighting`.

    Returns:
      a `Combiner`; ``objective`` in its state is ``phi``. **Weights may be negative,**
      and with the default often are: a task whose loss is below its share is pushed
      uphill, back to the ray. The weights' Euclidean length is ``sqrt(1 + theta^2)``,
      on the ray itself 1. One task is always on it.

    Raises:
      ValueError: when `theta` is concrete and negative or not finite; for a preference
        or reference of another shape or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.pbi(num_tasks=2, theta=2.0, preference=[0.0, 1.0])
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> updates, _ = tx.update(g, state, losses=jnp.array([3.0, 4.0]))
      >>> updates["w"]  # (0, 1) + 2 (1, 0)
      Array([2., 1.], dtype=float32)

    References:
      Zhang & Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on
      Decomposition, IEEE Transactions on Evolutionary Computation 11(6), 2007,
      doi:10.1109/TEVC.2007.892759.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("theta", theta)
    given = read_per_task("preference", preference, num_tasks)
    point = read_point("reference", reference, num_tasks)

    def penalised(losses: Losses, learned: Any, task_mask: TaskMask) -> Scalar:
        del learned
        shares = shares_of(given, task_mask, losses.dtype)
        ray, _ = unit_vector(shares, task_mask)
        f = losses if point is None else losses - jnp.asarray(point, losses.dtype)
        d1, d2 = _distances(f, ray, task_mask)
        return d1 + theta * d2

    return scalarized(penalised, num_tasks, scale=scale)
