"""IMTL-L: impartial multi-task learning, the losses' half.

Losses multiplied by learned factors that bring them all to the same size (Liu et al.
2021, ICLR).

    phi(L, s) = sum_t (exp(s_t) L_t - s_t)
    w_t = exp(s_t),   s <- s - Adam(d phi / d s)
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_optax._learned import (
    LARGEST_LOG,
    LearningRate,
    OptimizerOf,
    make_optimizer,
)
from mtl_optax._scalarized import scalarized
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask


def _scaled_losses(
    losses: Losses, log_scales: Float[Array, " tasks"], task_mask: TaskMask
) -> Scalar:
    return jnp.sum(jnp.exp(log_scales) * losses - log_scales, where=task_mask)


def imtl_l(
    num_tasks: int,
    *,
    learning_rate: LearningRate = 0.025,
    optimizer: OptimizerOf = optax.adam,
    scale: Scale = "paper",
) -> Combiner:
    r"""Losses brought to one size by a factor that each task learns.

    .. math:: u = \sum_t e^{s_t} g_t, \qquad
              s \leftarrow s - \mathrm{Adam}\big(e^{s} L - 1\big)

    At rest every scaled loss ``exp(s_t) L_t`` is 1, whatever its unit, and the weights
    are those of `scale_invariant`, smoothed over time. With an optimiser that takes the
    gradient's length away, as Adam, it is `uncertainty_weighting` twice as long. Use it
    for losses of different units at the cost of plain training; the paper pairs it with
    `imtl_g` on the shared parameters. It knows nothing of conflict; a task that
    overfits gets ever more weight.

    Args:
      num_tasks: T.
      learning_rate: of ``s``, not negative; or an optax schedule of a task's own number
        of steps. The paper, TorchJD and LibMTL train ``s`` as if it were part of the
        network; 0.025 is what Navon et al. 2022 take for `uncertainty_weighting`.
      optimizer: of ``s``: a function of the learning rate.
      scale: see `from_weighting`.

    Returns:
      a `Combiner`. ``learned_values`` in its state are ``s``, 0 at first (weights 1),
      kept between -60 and 60; ``objective`` is the number it minimises. Losses must be
      positive: below zero no factor is best, and ``s`` climbs until the loss is
      positive again. Batches whose loss is not finite do not move ``s``.

    Raises:
      ValueError: when `learning_rate` is concrete and negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.imtl_l(num_tasks=2, learning_rate=0.5)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for _ in range(2):
      ...     _, state = tx.update(g, state, losses=jnp.array([5.0, 0.1]))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # exp(-0.5), exp(0.5)
      ['0.61', '1.65']

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.
    """
    return scalarized(
        _scaled_losses,
        num_tasks,
        optimizer=make_optimizer(optimizer, learning_rate),
        limit=LARGEST_LOG,
        scale=scale,
    )
