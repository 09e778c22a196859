"""ReLoBRaLo: relative loss balancing with random lookback.

Weights by how far each loss has come since the last step, smoothed, and now and then
since the start of training (Bischof & Kraus 2021, arXiv:2110.09813).

    lambda = alpha (rho lambda' + (1 - rho) b(0)) + (1 - alpha) b(k - 1)
    b(i) = T softmax(L / (tau L(i))),   rho ~ Bernoulli

lambda': the last step's weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from mtl_optax._arguments import check_nonnegative, check_positive
from mtl_optax._solved import ratio_or_one
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, TaskMask, Weighting, Weights


class ReLoBRaLoState(NamedTuple):
    """State of `relobralo`.

    Attributes:
      balance: lambda, the weights of each task's last step.
      first_losses: each task's loss at its first step.
      last_losses: that at its last step.
      steps_seen: how many steps each task was present.
    """

    balance: Float[Array, " tasks"]
    first_losses: Float[Array, " tasks"]
    last_losses: Float[Array, " tasks"]
    steps_seen: Int[Array, " tasks"]


def _balance_since(
    before: Losses, losses: Losses, temperature: Any, mask: TaskMask
) -> Array:
    """``T softmax(L / (tau L(before)))``; from a loss of 0 nothing has changed."""
    ratio = ratio_or_one(losses, before)
    shares = jax.nn.softmax(ratio / temperature, where=mask)
    return jnp.sum(mask.astype(losses.dtype)) * shares


def relobralo(
    num_tasks: int,
    *,
    alpha: float | jax.Array = 0.999,
    temperature: float | jax.Array = 1.0,
    rho: float | jax.Array = 0.9999,
    scale: Scale = "paper",
) -> Combiner:
    r"""More weight for losses that have fallen least, smoothed over many steps.

    .. math:: u = \sum_t \lambda_t g_t, \qquad
       \lambda = \alpha \big( \rho \lambda' + (1 - \rho) \hat\lambda(0) \big)
                 + (1 - \alpha) \hat\lambda(k - 1), \qquad
       \hat\lambda(i) = T \, \mathrm{softmax} \Big( \frac{L}{\tau L(i)} \Big)

    :math:`\rho` is 0 or 1 at random, for all tasks alike: at 0 the smoothed weights are
    forgotten, and losses are compared with those at the start. Made for
    physics-informed networks, whose few terms converge at different speed: only ratios
    matter, so weights around one don't undo a loss' unit. It costs what plain training
    costs, and knows nothing of conflict. Losses should keep one sign. With noisy
    batches the ratio to the last step is mostly noise, which the smoothing hides and a
    low temperature shows.

    Args:
      num_tasks: T.
      alpha: smoothing, from 0 to 1: the share of the past. 0.999 in the authors' code.
      temperature: tau, positive; higher is more even. 1 in the authors' code.
      rho: probability that the smoothed weights are kept, from 0 to 1; 1 never looks
        back. 0.9999, once in ten thousand steps, is usual in others' code; the authors'
        own has 1 by default.
      scale: see `from_weighting`; here ``"paper"`` and ``"sum"`` are nearly the same.

    Returns:
      a `Combiner` whose update needs ``key=``, a fresh one at every step. Weights are
      ones at a task's first step and not smoothed at its second; they sum to T while
      the same tasks are present. A step with a loss that is not finite is not
      remembered.

    Raises:
      TypeError: at trace time, if ``key`` is missing. ValueError: when `alpha`, `rho`
        or `temperature` is concrete and out of range.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.relobralo(num_tasks=2, temperature=0.5)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for step, losses in enumerate(([40.0, 0.1], [20.0, 0.1])):
      ...     key = jax.random.fold_in(jax.random.key(0), step)
      ...     _, state = tx.update(g, state, losses=jnp.array(losses), key=key)
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # 2 / (1 + e), 2 e / (1 + e)
      ['0.54', '1.46']

    References:
      Bischof & Kraus, `Multi-Objective Loss Balancing for Physics-Informed Deep
      Learning <https://arxiv.org/abs/2110.09813>`_, 2021.

    Differs from the authors' code: the start of training is a task's first loss (theirs
    is the second), and there is no epsilon below the ratio.
    """
    check_nonnegative("alpha", alpha, at_most=1.0)
    check_nonnegative("rho", rho, at_most=1.0)
    check_positive("temperature", temperature)

    def init(num_tasks: int, dtype: DType) -> ReLoBRaLoState:
        return ReLoBRaLoState(
            balance=jnp.ones((num_tasks,), dtype),
            first_losses=jnp.zeros((num_tasks,), dtype),
            last_losses=jnp.zeros((num_tasks,), dtype),
            steps_seen=jnp.zeros((num_tasks,), jnp.int32),
        )

    def update(
        gramian: None,
        state: ReLoBRaLoState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        key: PRNGKeyArray,
        **extra: Any,
    ) -> tuple[Weights, ReLoBRaLoState]:
        del gramian, extra
        seen = state.steps_seen
        first = jnp.where(seen > 0, state.first_losses, losses)
        last = jnp.where(seen > 0, state.last_losses, losses)
        recent = _balance_since(last, losses, temperature, task_mask)
        since_start = _balance_since(first, losses, temperature, task_mask)
        keeps = jax.random.uniform(key, (), jnp.float32) < rho
        past = jnp.where(keeps, state.balance, since_start)
        smoothed = alpha * past + (1 - alpha) * recent
        balance = jnp.where(seen > 1, smoothed, jnp.where(seen > 0, recent, 1))
        after = ReLoBRaLoState(balance, first, losses, seen + 1)
        # The weights are smoothed: one that is NaN would never be forgotten.
        known = task_mask & jnp.isfinite(losses) & jnp.isfinite(balance)
        return balance, jax.tree.map(
            lambda new, old: jnp.where(known, new.astype(old.dtype), old),
            after,
            state,
        )

    method = Weighting(init, update, frozenset({"losses", "key"}))
    return from_weighting(method, num_tasks, scale=scale)
