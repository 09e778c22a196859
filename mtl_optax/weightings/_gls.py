"""GLS: geometric loss strategy.

The geometric mean of the losses is minimised (Chennupati et al. 2019,
arXiv:1904.08492).

    phi(L) = (prod_t L_t)^(1/T)
    w_t = phi / (T L_t)
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._arguments import check_positive
from mtl_optax._scalarized import LEAST_LOSS, floored, scalarized
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask

# Of the largest loss: the least that another counts as, or weights leave float32.
_LEAST_RATIO = 1e-25


def gls(
    num_tasks: int,
    *,
    eps: float | jax.Array = LEAST_LOSS,
    scale: Scale = "paper",
) -> Combiner:
    r"""The geometric mean of the losses.

    .. math:: u = \sum_t \frac{\phi}{T L_t} g_t, \qquad
              \phi = \Big( \prod_t L_t \Big)^{1/T}

    Losses count by their ratios, so units do not matter and nothing is tuned: scaling
    one loss scales the whole update, not its direction, which is that of
    `scale_invariant`; the update gets shorter as the losses fall. Use it for few tasks
    with positive losses, at the cost of plain training. It is no choice where one loss
    may reach zero: that one then takes all the weight, and the others stop.

    Args:
      num_tasks: T.
      eps: what a loss counts as at least, positive, in the unit of the losses. A larger
        one, such as 1e-3, keeps a task that is done from stopping the others.
      scale: see `from_weighting`.

    Returns:
      a `Combiner`; ``objective`` in its state is the geometric mean. Losses must be
      positive: one that is not counts as `eps`. It is computed from logarithms, so the
      product cannot overflow. A loss below 1e-25 of the largest counts as that much.

    Raises:
      ValueError: when `eps` is concrete and not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.gls(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> _, state = tx.update(g, state, losses=jnp.array([8.0, 2.0]))
      >>> [f"{w:.3f}" for w in state.info.task_weights]  # 4 / (2 * 8), 4 / (2 * 2)
      ['0.250', '1.000']

    References:
      Chennupati et al., `MultiNet++: Multi-Stream Feature Aggregation and Geometric
      Loss Strategy for Multi-Task Learning <https://arxiv.org/abs/1904.08492>`_, CVPR
      Workshops 2019.
    """
    check_positive("eps", eps)

    def geometric_mean(losses: Losses, learned: Any, task_mask: TaskMask) -> Scalar:
        del learned
        largest = jnp.max(losses, where=task_mask, initial=0)
        least = jnp.maximum(jax.lax.stop_gradient(_LEAST_RATIO * largest), eps)
        logs = jnp.sum(jnp.log(floored(losses, least)), where=task_mask)
        return jnp.exp(logs / jnp.maximum(jnp.sum(task_mask), 1))

    return scalarized(geometric_mean, num_tasks, scale=scale)
