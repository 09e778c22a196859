"""IMTL-G: impartial multi-task learning, the gradients' half.

Weights that sum to one, such that the update has the same projection on every task's
gradient direction (Liu et al. 2021, ICLR, section 3.1).

    <u, g_t / |g_t|> equal for all t,   sum_t w_t = 1
    w = v / sum_t v_t,   v = G^+ n,   n_t = |g_t|
"""

from typing import Any

from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import impartial_weights, unit_rows


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
        return impartial_weights(unit_rows(gramian, task_mask)), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
