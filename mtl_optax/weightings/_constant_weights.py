"""Constant weights: linear scalarization.

The weights are chosen once and for all (the sum of the losses, if all are one).

    w_t = c_t
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_num_tasks
from mtl_optax._solved import init_stateless, read_per_task
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import TaskMask, Weighting, Weights


def constant_weights(
    num_tasks: int,
    *,
    weights: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
) -> Combiner:
    r"""A fixed weight for every task.

    .. math:: u = \sum_t c_t g_t

    Linear scalarization, and with the default, ones, plain training on the sum of the
    losses. Good weights found by search are hard to beat; the search is what costs. It
    knows nothing of conflicts or of how long gradients are.

    Args:
      num_tasks: T.
      weights: ``[T]``, not negative, not all zero; ones by default. An array may be
        traced, so that a sweep over weights runs under `jax.vmap`.
      scale: see `from_weighting`; ``"paper"`` takes the weights as they are.

    Returns:
      a `Combiner`. One backward pass; losses are not needed, and their signs do not
      matter. Parallel tasks simply add up.

    Raises:
      ValueError: for weights of another shape, or that are negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.constant_weights(num_tasks=2, weights=[0.5, 2.0])
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"]
      Array([1.5, 4. ], dtype=float32)

    References:
      Kurin et al., `In Defense of the Unitary Scalarization for Deep Multi-Task
      Learning <https://arxiv.org/abs/2201.04122>`_, 2022.
    """
    check_num_tasks(num_tasks)
    given = read_per_task("weights", weights, num_tasks)

    def update(
        gramian: None, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del gramian, extra
        present = task_mask.astype(float)  # float64 where that is enabled
        return present if given is None else present * jnp.asarray(given), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset()), num_tasks, scale=scale
    )
