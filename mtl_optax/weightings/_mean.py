"""Mean: every task counts alike.

The baseline: equal weights, as training on the mean of the losses gives
(unitary scalarization; Kurin et al. 2022, arXiv:2201.04122).

    w_t = 1 / T
"""

from typing import Any

import jax.numpy as jnp

from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import TaskMask, Weighting, Weights


def mean(num_tasks: int, *, scale: Scale = "paper") -> Combiner:
    r"""The mean of the task gradients.

    .. math:: u = \frac{1}{T} \sum_t g_t

    The first thing to try, and the baseline to beat: it costs one backward pass, and
    carefully tuned it is often as good as anything. It serves badly where one task's
    gradients are much longer than another's, or point against them.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.

    Returns:
      a `Combiner`. Absent tasks do not count in T. Losses are not needed.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.mean(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"]
      Array([1.5, 2.5], dtype=float32)

    References:
      Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, 2022.
    """

    def update(
        gramian: None, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del gramian, extra
        present = task_mask.astype(float)  # float64 where that is enabled
        return present / jnp.maximum(jnp.sum(present), 1.0), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset()), num_tasks, scale=scale
    )
