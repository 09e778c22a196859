"""UW: uncertainty weighting.

Losses weighed by learned noise levels (Kendall, Gal & Cipolla 2018, arXiv:1705.07115,
section 3.2), with ``s_t = log sigma_t^2``.

    phi(L, s) = sum_t (exp(-s_t) L_t + s_t) / 2
    w_t = exp(-s_t) / 2,   s <- s - Adam(d phi / d s)
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


def _likelihood(
    losses: Losses, log_variances: Float[Array, " tasks"], task_mask: TaskMask
) -> Scalar:
    s = log_variances
    return jnp.sum((jnp.exp(-s) * losses + s) / 2, where=task_mask)


def uncertainty_weighting(
    num_tasks: int,
    *,
    learning_rate: LearningRate = 0.025,
    optimizer: OptimizerOf = optax.adam,
    scale: Scale = "paper",
) -> Combiner:
    r"""Losses divided by a noise level that each task learns.

    .. math:: u = \sum_t \tfrac12 e^{-s_t} g_t, \qquad
              s \leftarrow s - \mathrm{Adam}\big(\tfrac12 (1 - e^{-s} L)\big)

    At rest ``exp(s_t)`` is the task's loss, so every loss is divided by its own size:
    units do not matter, and a task whose loss falls gains weight. Use it for losses of
    different units (regression beside classification) at the cost of plain training.
    It knows nothing of conflict, and a task that overfits gets ever more weight.

    Args:
      num_tasks: T.
      learning_rate: of ``s``, not negative; or an optax schedule of a task's own number
        of steps. 0.025 in the code of Navon et al. 2022; LibMTL trains ``s`` as if it
        were part of the network.
      optimizer: of ``s``: a function of the learning rate.
      scale: see `from_weighting`.

    Returns:
      a `Combiner`. ``learned_values`` in its state are ``s``, 0 at first (weights 1/2),
      kept between -60 and 60; ``objective`` is the number it minimises. Losses must be
      positive: below zero no noise level is best, and ``s`` falls until the loss is
      positive again. Batches whose loss is not finite do not move ``s``.

    Raises:
      ValueError: when `learning_rate` is concrete and negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.uncertainty_weighting(num_tasks=2, learning_rate=0.5)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for _ in range(2):
      ...     _, state = tx.update(g, state, losses=jnp.array([5.0, 0.1]))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # exp(-0.5) / 2, exp(0.5) / 2
      ['0.30', '0.82']

    References:
      Kendall, Gal & Cipolla, `Multi-Task Learning Using Uncertainty to Weigh Losses for
      Scene Geometry and Semantics <https://arxiv.org/abs/1705.07115>`_, CVPR 2018.
    """
    return scalarized(
        _likelihood,
        num_tasks,
        optimizer=make_optimizer(optimizer, learning_rate),
        limit=LARGEST_LOG,
        scale=scale,
    )
