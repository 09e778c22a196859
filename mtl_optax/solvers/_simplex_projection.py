"""The point of the simplex that is closest to a given one."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._types import TaskMask, Weights


def simplex_projection(point: Float[Array, " tasks"], task_mask: TaskMask) -> Weights:
    r"""Euclidean projection on the simplex of the tasks that are present.

    .. math:: \arg\min_w \|w - v\|^2, \qquad w \ge 0, \quad \sum_t w_t = 1

    The answer is ``max(v - tau, 0)`` with one threshold for all. It is found by sorting
    (Held, Wolfe & Crowder 1974), exact up to rounding however long `point` is: what
    lies more than one below the largest entry gets nothing and is cut off first.

    Args:
      point: ``[T]``, finite where present.
      task_mask: ``[T]``; absent tasks get zero, whatever stands in `point`.

    Returns:
      weights ``[T]`` that sum to one; zeros if nobody is present.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import simplex_projection
      >>> print(simplex_projection(jnp.array([0.5, 1.0, -3.0]), jnp.ones(3, bool)))
      [0.25 0.75 0.  ]
    """
    dtype = point.dtype
    largest = jnp.max(point, where=task_mask, initial=-jnp.inf)
    # A shift changes nothing, and entries below -1 are zero: sums stay of order T.
    v = jnp.where(task_mask, jnp.maximum(point - largest, -2), -jnp.inf)
    descending = -jnp.sort(-v)
    present = jnp.isfinite(descending)
    rank = jnp.arange(1, v.shape[0] + 1, dtype=dtype)
    excess = jnp.cumsum(jnp.where(present, descending, 0)) - 1
    # Of the entries that stay positive the mean excess is largest.
    threshold = jnp.max(jnp.where(present, excess / rank, -jnp.inf))
    return jnp.where(task_mask, jnp.maximum(v - threshold, 0), jnp.zeros((), dtype))
