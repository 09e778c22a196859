"""SoftAdapt: weights by the losses' rates of change.

A softmax of each loss' slope over its last few values (Heydari, Thompson & Mehmood
2019, arXiv:1912.12355, section 3.1), in the paper's three variants.

    original:       w_t ~ exp(beta s_t)
    normalized:     w_t ~ exp(beta s_t / sum_r |s_r|)
    loss_weighted:  w_t ~ m_t exp(beta s_t)

s_t, m_t: finite difference and mean of task t's last n losses; weights sum to one.
"""

import math
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_choice, check_count, check_nonnegative
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, TaskMask, Weighting, Weights

Variant: TypeAlias = Literal["original", "normalized", "loss_weighted"]

# Of losses: what float32 can take differences of; what has a logarithm.
_LARGEST, _SMALLEST = 1e30, 1e-30
_LONGEST = 10


class SoftAdaptInfo(NamedTuple):
    """What to look at: the rates of change; zero until a task's history is full."""

    loss_slopes: Float[Array, " tasks"]


class SoftAdaptState(NamedTuple):
    """State of `softadapt`.

    Attributes:
      recent_losses: each task's last losses, the newest last; zeros at first.
      losses_seen: how many there were.
      info: what a person looks at.
    """

    recent_losses: Float[Array, "tasks window"]
    losses_seen: Int[Array, " tasks"]
    info: SoftAdaptInfo


def _coefficients(window: int) -> np.ndarray:
    """Of all losses but the oldest, whose own is minus their sum.

    The slope at the oldest of the polynomial through them all: the forward difference
    of order ``window - 1``.
    """
    order = window - 1
    signed = [(-1) ** (k + 1) * math.comb(order, k) for k in range(1, window)]
    return np.array(signed) / np.arange(1, window)


def _slopes(recent: Array, seen: Array) -> Array:
    window = recent.shape[1]
    coefficients = jnp.asarray(_coefficients(window), recent.dtype)
    # They sum to zero: so a loss that stands still has exactly no slope.
    rises = recent[:, 1:] - recent[:, :1]
    return jnp.where(seen >= window, jnp.sum(rises * coefficients, axis=1), 0)


def _means(recent: Array, seen: Array) -> Array:
    filled = jnp.clip(seen, 1, recent.shape[1])
    return jnp.abs(jnp.sum(recent, axis=1)) / filled


def softadapt(
    num_tasks: int,
    *,
    beta: float | jax.Array = 0.1,
    window: int = 5,
    variant: Variant = "original",
    scale: Scale = "paper",
) -> Combiner:
    r"""More weight for losses that rise, or fall slowly.

    .. math:: u = \sum_t w_t g_t, \qquad w = \mathrm{softmax}(\beta s), \qquad
       s_t = \sum_{k=0}^{n-1} c_k L_t(i - n + 1 + k)

    :math:`c` are the coefficients of the finite difference through the last n losses.
    As in the authors' code it is the slope at the *oldest* of them: with ``window=5``
    the newest loss counts -1/4, so a task whose loss rises just now loses weight for
    the moment; ``window=2`` is the slope now.
    The slope has the loss' unit: where losses have different ones, take
    ``variant="normalized"`` (slopes divided by the sum of their sizes, so that `beta`
    means the same in every problem) or `dwa`, which looks at ratios. The authors
    recommend ``"loss_weighted"``, which also multiplies by the mean of the last losses.
    Use it for a few losses of like size at the cost of plain training. High orders
    amplify noise: with noisy batches take ``window=2``, or smooth the weights.

    Args:
      num_tasks: T.
      beta: sharpness, not negative; 0 gives equal weights. 0.1 in the authors' code.
        (The paper's negative values, which favour the best task, are refused.)
      window: how many losses the slope is taken of, 2 to 10, and the steps before
        which all slopes count as zero. 5 in the authors' examples.
      variant: ``"original"``, ``"normalized"`` or ``"loss_weighted"``.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.

    Returns:
      a `Combiner`. ``loss_slopes`` in its state are s. With the variant
      ``"loss_weighted"`` a mean loss below zero counts by its size. Losses that are not
      finite are not remembered.

    Raises:
      ValueError, TypeError: for a window out of range or an unknown variant; when
        `beta` is concrete and negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.softadapt(num_tasks=2, beta=1.0, window=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for losses in ([3.0, 2.0], [2.0, 2.0]):
      ...     _, state = tx.update(g, state, losses=jnp.array(losses))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # 1 / (1 + e), e / (1 + e)
      ['0.27', '0.73']

    References:
      Heydari, Thompson & Mehmood, `SoftAdapt: Techniques for Adaptive Loss Weighting of
      Neural Networks with Multi-Part Loss Functions
      <https://arxiv.org/abs/1912.12355>`_, 2019.

    Differs from the authors' code: weights follow at every step (theirs are taken anew
    every n epochs), sum to one from the start (theirs are ones until then), and have no
    epsilon. ``"normalized"`` divides by the sum of the slopes' sizes; their present
    code divides by the sum of the slopes, which turns the order round where that is
    negative, as it is in training.
    """
    check_nonnegative("beta", beta)
    check_count("window", window, least=2)
    if window > _LONGEST:
        raise ValueError(
            f"window must be at most {_LONGEST}, got {window}: the coefficients of the "
            "finite difference double with every loss, and float32 has 7 digits. Give "
            "averages of losses instead."
        )
    check_choice("variant", variant, get_args(Variant))

    def init(num_tasks: int, dtype: DType) -> SoftAdaptState:
        return SoftAdaptState(
            recent_losses=jnp.zeros((num_tasks, window), dtype),
            losses_seen=jnp.zeros((num_tasks,), jnp.int32),
            info=SoftAdaptInfo(jnp.zeros((num_tasks,), dtype)),
        )

    def update(
        gramian: None,
        state: SoftAdaptState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, SoftAdaptState]:
        del gramian, extra
        newest = jnp.clip(losses, -_LARGEST, _LARGEST)[:, None]
        pushed = jnp.concatenate([state.recent_losses[:, 1:], newest], axis=1)
        known = task_mask & jnp.isfinite(losses)
        recent = jnp.where(known[:, None], pushed, state.recent_losses)
        seen = state.losses_seen + known.astype(jnp.int32)
        slopes = jnp.where(task_mask, _slopes(recent, seen), 0)

        exponents = slopes
        if variant == "normalized":
            # Sizes are divided first, so that their sum stays within float32.
            largest = jnp.max(jnp.abs(slopes))
            sized = slopes / jnp.where(largest > 0, largest, 1)
            total = jnp.sum(jnp.abs(sized))
            exponents = sized / jnp.where(total > 0, total, 1)
        # Taken off before the product, which XLA may fuse into a difference.
        top = jnp.max(exponents, where=task_mask, initial=-jnp.inf)
        exponents = beta * jnp.where(task_mask, exponents - top, 0)
        if variant == "loss_weighted":
            means = jnp.maximum(_means(recent, seen), _SMALLEST)
            exponents = exponents + jnp.log(means)
        weights = jax.nn.softmax(exponents, where=task_mask)
        return weights, SoftAdaptState(recent, seen, SoftAdaptInfo(slopes))

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
