"""COSMOS: a weighted sum that keeps the losses in the ratio of the preference.

The cosine between losses and preference is rewarded (Ruchte & Grabocka 2021,
arXiv:2103.13392).

    phi(L) = r . L - lambda cos(r, L)
    w = r - lambda (r^ - cos(r, L) L^) / |L|,   hats are unit vectors
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._scalarized import scalarized, unit_vector
from mtl_optax._solved import read_per_task, shares_of
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask

# What the length of the losses counts as at least where it is divided by: the one that
# cosines have in the authors' code.
_LEAST_LENGTH = 1e-8


def _cosine(
    losses: Losses, preference: Float[Array, " tasks"], task_mask: TaskMask
) -> Scalar:
    """Of losses and preference, with its gradient by the losses."""
    wanted, _ = unit_vector(preference, task_mask)
    found, length = unit_vector(jax.lax.stop_gradient(losses), task_mask)
    cosine = jnp.sum(wanted * found)
    turn = (wanted - cosine * found) / jnp.maximum(length, _LEAST_LENGTH)
    turn = jnp.where(length > 0, turn, 0)  # nothing to turn
    # Across the losses, so that the sum is zero; it only carries the gradient.
    return cosine + jnp.sum(turn * losses, where=task_mask)


def cosmos(
    num_tasks: int,
    *,
    penalty: float | jax.Array = 2.0,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
) -> Combiner:
    r"""A weighted sum of the losses, held to the ratio that the preference asks for.

    .. math:: \phi = \sum_t r_t L_t - \lambda \frac{\langle r, L \rangle}{|r| |L|},
              \qquad u = \sum_t \frac{\partial \phi}{\partial L_t} g_t

    Losses are driven towards the ray along ``r``: the larger ``r_t``, the *larger* the
    loss of task t in the end, as far as the cosine says, although its weight in the sum
    is larger too. It is made for networks that take the preference as an input and
    learn the whole Pareto front: draw ``r`` from a Dirichlet distribution at every
    step, and build the combiner inside the step with it (its state does not depend on
    ``r``). With the fixed default it evens out losses. It suits losses of one unit.

    Args:
      num_tasks: T.
      penalty: lambda, not negative, in the unit of the losses. 2 in the authors' code
        for Multi-MNIST, from 0.01 to 8 for other data.
      preference: r, ``[T]``, not negative, not all zero; ``1 / T`` each by default. May
        be traced.
      scale: see `from_weighting`.

    Returns:
      a `Combiner`; ``objective`` in its state is ``phi``. **Weights may be negative:**
      a task whose loss is below its share is pushed uphill as soon as the penalty,
      whose part grows like ``1 / |L|``, outweighs the sum. With one task the cosine is
      constant. Losses that are all zero have no direction: they are summed up. Weights
      may add up to about nothing: take ``scale="paper"`` or ``"norm"``.

    Raises:
      ValueError: when `penalty` is concrete and negative or not finite; for a
        preference of another shape, or that is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.cosmos(num_tasks=2, penalty=25.0, preference=[1.0, 0.0])
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> updates, _ = tx.update(g, state, losses=jnp.array([3.0, 4.0]))
      >>> [f"{x:.1f}" for x in updates["w"]]  # (1, 0) - 25 / 5 * (0.64, -0.48)
      ['-2.2', '2.4']

    References:
      Ruchte & Grabocka, `Scalable Pareto Front Approximation for Deep Multi-Objective
      Learning <https://arxiv.org/abs/2103.13392>`_, ICDM 2021.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("penalty", penalty)
    given = read_per_task("preference", preference, num_tasks)

    def penalised(losses: Losses, learned: Any, task_mask: TaskMask) -> Scalar:
        del learned
        r = shares_of(given, task_mask, losses.dtype)
        linear = jnp.sum(r * losses, where=task_mask)
        return linear - penalty * _cosine(losses, r, task_mask)

    return scalarized(penalised, num_tasks, scale=scale)
