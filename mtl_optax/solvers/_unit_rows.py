"""Task gradients brought to length one: what makes a solver blind to scale."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._types import Gramian, TaskMask


class UnitRows(NamedTuple):
    """A Gramian, split into lengths and cosines.

    Attributes:
      cosines: ``[T, T]``, the Gramian of ``g_t / |g_t|``; zero where not active.
      norms: ``[T]``, ``|g_t|``; zero where not active.
      inverse: ``[T]``, ``1 / |g_t|``; zero where not active.
      active: ``[T]``, tasks that are present and have a nonzero gradient.
    """

    cosines: Gramian
    norms: Float[Array, " tasks"]
    inverse: Float[Array, " tasks"]
    active: TaskMask


def unit_rows(gramian: Gramian, task_mask: TaskMask) -> UnitRows:
    """Splits a Gramian into the lengths of its rows and their cosines.

    Args:
      gramian: ``[T, T]``.
      task_mask: ``[T]``; absent tasks take no part, whatever stands in their rows.

    Returns:
      a `UnitRows`. A present row that is not finite, or whose length overflows, leaves
      NaN in its own cosines and so in whatever is computed of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import unit_rows
      >>> J = jnp.array([[3.0, 4.0], [0.0, 2.0], [0.0, 0.0]])
      >>> rows = unit_rows(J @ J.T, jnp.ones(3, bool))
      >>> print(rows.norms, rows.cosines[0], rows.active)
      [5. 2. 0.] [1.  0.8 0. ] [ True  True False]
    """
    zero, one = jnp.zeros((), gramian.dtype), jnp.ones((), gramian.dtype)
    norms = jnp.sqrt(jnp.where(task_mask, jnp.maximum(jnp.diag(gramian), 0), zero))
    active = task_mask & ~(norms == 0)
    inverse = jnp.where(active, one / jnp.where(active, norms, one), zero)
    pairs = active[:, None] & active[None, :]
    cosines = jnp.where(pairs, gramian * inverse[:, None] * inverse[None, :], zero)
    return UnitRows(cosines, norms, inverse, active)
