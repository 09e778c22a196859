"""RLW: random loss weighting.

Fresh random weights at every step (Lin et al. 2022, arXiv:2111.10603, section 3).

    w = softmax(z),   z_t ~ N(0, 1)
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._random import normal_by_task
from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import TaskMask, Weighting, Weights


def rlw(num_tasks: int, *, scale: Scale = "paper") -> Combiner:
    r"""Random weights, drawn anew at every step.

    .. math:: u = \sum_t w_t g_t, \qquad w = \mathrm{softmax}(z), \quad
              z_t \sim \mathcal{N}(0, 1)

    A baseline that a balancing method should beat: in expectation it is the mean, with
    noise that may help to leave bad minima. It costs one backward pass and sees
    neither conflicts nor scales, so it does not cure them.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.

    Returns:
      a `Combiner`; ``update`` needs ``key=``, a fresh `jax.random.key` at every step. A
      task's draw depends on its rank among the present tasks only. Losses are not
      needed; parallel tasks are weighted apart, as any others.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.rlw(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> _, state = tx.update(g, state, key=jax.random.key(0))
      >>> round(float(state.info.task_weights.sum()), 4)
      1.0

    References:
      Lin et al., `Reasonable Effectiveness of Random Weighting: A Litmus Test for
      Multi-Task Learning <https://arxiv.org/abs/2111.10603>`_, TMLR 2022.
    """

    def update(
        gramian: None,
        state: tuple[()],
        *,
        task_mask: TaskMask,
        key: jax.Array,
        **extra: Any,
    ) -> tuple[Weights, tuple[()]]:
        del gramian, extra
        draws = normal_by_task(key, task_mask, jnp.result_type(float))
        return jax.nn.softmax(draws, where=task_mask), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"key"})), num_tasks, scale=scale
    )
