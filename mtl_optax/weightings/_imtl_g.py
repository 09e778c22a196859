"""IMTL-G: impartial multi-task learning, the gradients' half.

Weights that sum to one, such that the update has the same projection on every task's
gradient direction (Liu et al. 2021, ICLR, section 3.1).

    <u, g_t / |g_t|> equal for all t,   sum_t w_t = 1
    w = v / sum_t v_t,   v = G^+ n,   n_t = |g_t|
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import UnitRows, graded_eigh, unit_rows

# Of the sum of the weights' sizes: what the weights are divided by at least.
_SMALLEST_SUM = 1e-2
# Of two rows' lengths, where a choice among dependent rows depends on them.
_LEAST_RATIO = 1e-3


def _equal_projections(rows: UnitRows) -> Array:
    """``v [T]``, up to a positive factor: ``G v = n`` in least squares.

    With ``v_t = y_t / n_t`` that is ``C y = 1`` for the cosines C, whose rank does not
    depend on the rows' lengths. Where rows depend on each other, v is the shortest.
    """
    size, dtype = rows.cosines.shape[0], rows.cosines.dtype
    active = rows.active.astype(dtype)
    values, vectors = jnp.linalg.eigh(rows.cosines + jnp.diag(1 - active))
    cutoff = 4 * size * jnp.finfo(dtype).eps
    kept = values > cutoff * jnp.max(values)
    along = jnp.matmul(active, vectors, precision=HIGHEST)
    # Of opposite rows it is rounding only, and must not become a direction.
    kept_along = kept & (jnp.abs(along) > 4 * cutoff * jnp.sqrt(jnp.sum(active)))
    along = jnp.where(kept_along, along / jnp.where(kept, values, 1), 0)
    y = jnp.matmul(vectors, along, precision=HIGHEST)

    shortest = jnp.min(rows.norms, where=rows.active, initial=jnp.inf)
    relative = jnp.where(rows.active, shortest * rows.inverse, 0)
    free = jnp.where(kept, 0, vectors) * active[:, None]
    # Among long rows a choice would drown in the rounding of the short ones'.
    steady = jnp.maximum(relative, _LEAST_RATIO)
    scaled = free * steady[:, None]
    squares, turned, known = graded_eigh(
        jnp.matmul(scaled, scaled.T, precision=HIGHEST)
    )
    part = jnp.matmul(y * steady, turned, precision=HIGHEST)
    part = jnp.where(known, part / jnp.where(known, squares, 1), 0)
    chosen = jnp.matmul(turned, part, precision=HIGHEST)
    chosen = jnp.matmul(chosen, scaled, precision=HIGHEST)
    return (y - jnp.matmul(free, chosen, precision=HIGHEST)) * relative


def imtl_g(
    num_tasks: int, *, scale: Scale = "paper", axis_name: Any = None
) -> Combiner:
    r"""The update with equal projections on all task directions.

    .. math:: u = \sum_t w_t g_t, \qquad
       \Big\langle u, \frac{g_t}{\|g_t\|} \Big\rangle \text{ equal for all } t, \qquad
       \sum_t w_t = 1

    Every task's loss falls by the same share of its gradient's length, so none is
    preferred, whatever its scale; the direction is that of `edm` as long as that leans
    on all tasks. Here weights may be negative: a task that all others conflict with is
    still served, at a price to the update's length. Use it for few tasks of different
    scale. It is ill-conditioned where tasks are nearly parallel or nearly opposite;
    `edm` and `fairgrad` are steadier there.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same, but for
        what is said below.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Losses are not needed. A task whose gradient is zero counts as
      absent for that step. Parallel gradients share the weight in proportion to their
      lengths; of two opposite ones nothing is left (three on one line may conflict).

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.imtl_g(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([0.5, 1.5], dtype=float32)

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.

    Differs from the authors' code: dependent rows do not crash. Where the closed form's
    weights, which sum to one, point uphill for *every* task, their sign is turned: they
    then sum to minus one, and ``scale="mean"`` and ``"sum"`` leave them so. And they
    are kept from growing without bound where they nearly cancel: the sum of their sizes
    is at most a hundred.
    """

    def update(
        gramian: Gramian, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del extra
        v = _equal_projections(unit_rows(gramian, task_mask))
        total = jnp.maximum(jnp.abs(jnp.sum(v)), _SMALLEST_SUM * jnp.sum(jnp.abs(v)))
        return v / jnp.where(total > 0, total, jnp.ones_like(total)), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
