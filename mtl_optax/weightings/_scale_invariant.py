"""SI: scale-invariant linear scalarization.

The sum of the logarithms of the losses is minimised (a baseline of Navon et al. 2022,
arXiv:2202.01017).

    phi(L) = sum_t c_t log L_t
    w_t = c_t / L_t
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_num_tasks, check_positive
from mtl_optax._scalarized import LEAST_LOSS, floored, scalarized
from mtl_optax._solved import read_per_task
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask


def scale_invariant(
    num_tasks: int,
    *,
    eps: float | jax.Array = LEAST_LOSS,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
) -> Combiner:
    r"""The sum of the logarithms of the losses.

    .. math:: u = \sum_t \frac{c_t}{L_t} g_t

    The update does not change when a loss is multiplied by a constant: the cheapest
    cure for losses of different units. A task that is nearly done gets ever more
    weight, so learning rates want to be small or the optimiser one that takes the
    length away; `uncertainty_weighting` and `imtl_l` do the same smoothed over time,
    `gls` with an update that shrinks with the losses. It knows nothing of conflict.

    Args:
      num_tasks: T.
      eps: what a loss counts as at least, positive, in the unit of the losses: no
        weight exceeds ``c_t / eps``. The authors' code has no such floor.
      preference: c, ``[T]``, not negative, not all zero; ones by default. An array may
        be traced.
      scale: see `from_weighting`. With ``"mean"`` and ``"sum"``, a loss near zero
        leaves nothing to the others.

    Returns:
      a `Combiner`; ``objective`` in its state is the sum of the logarithms. Losses must
      be positive: one that is not counts as `eps`, which is a very large weight. Say by
      ``task_mask`` which tasks a batch has no labels of, rather than by a loss of zero.

    Raises:
      ValueError: when `eps` is concrete and not positive; for a preference of another
        shape, or that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_invariant(num_tasks=2)
      >>> g = {"w": jnp.array([[4.0, 8.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> tx.update(g, state, losses=jnp.array([8.0, 0.5]))[0]["w"]
      Array([0.5, 3. ], dtype=float32)

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022.
    """
    check_num_tasks(num_tasks)
    check_positive("eps", eps)
    given = read_per_task("preference", preference, num_tasks)

    def sum_of_logs(losses: Losses, learned: Any, task_mask: TaskMask) -> Scalar:
        del learned
        logs = jnp.log(floored(losses, jnp.asarray(eps)))
        if given is not None:
            logs = logs * jnp.asarray(given, losses.dtype)
        return jnp.sum(logs, where=task_mask)

    return scalarized(sum_of_logs, num_tasks, scale=scale)
