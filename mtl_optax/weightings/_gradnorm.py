"""GradNorm: gradient normalisation for adaptive loss balancing.

Learned weights that bring the lengths of the weighted gradients to one mean, more for
tasks that train slowly (Chen et al. 2018, ICML, arXiv:1711.02257).

    G_t = w_t |g_t|,   r_t = (L_t / L_t(0)) / mean_j (L_j / L_j(0))
    w <- w - Adam(d / dw sum_t |G_t - mean(G) r_t^alpha|), the target held constant;
    then w is rescaled so that sum_t w_t = T
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._learned import (
    Learned,
    LearningRate,
    OptimizerOf,
    init_learned,
    learn,
    make_optimizer,
)
from mtl_optax._moments import count_present
from mtl_optax._scalarized import read_point
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Gramian, Losses, TaskMask, Weighting, Weights

# A weight never falls below this, before all are rescaled to a mean of one.
_SMALLEST_WEIGHT = 1e-3
# Ratios of losses and of lengths beyond it are as good as it.
_LARGEST_RATIO = 1e15


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      balance: what each task has learned; ``learned_values`` are the weights w.
      first_losses: ``[T]``, ``L_t(0)``; one before a task's first step.
      has_begun: ``[T]``, whether ``first_losses`` is known.
    """

    balance: Learned
    first_losses: Float[Array, " tasks"]
    has_begun: Bool[Array, " tasks"]


def _mean(values: Array, mask: TaskMask) -> Array:
    return jnp.sum(values, where=mask) / count_present(mask, values.dtype)


def _slowness(losses: Losses, first: Losses, mask: TaskMask) -> Array:
    """``r [T]``, the relative inverse training rates, from 0 to T; of mean one."""
    # Of a loss that began at zero or below there is no rate: it counts as not trained.
    defined = first > 0
    ratios = jnp.maximum(losses, 0) / jnp.where(defined, first, 1)
    ratios = jnp.where(defined, jnp.minimum(ratios, _LARGEST_RATIO), 1)
    mean = _mean(ratios, mask)
    return jnp.where(mean > 0, ratios / jnp.where(mean > 0, mean, 1), 1)


def _normalised(weights: Weights, mask: TaskMask) -> Weights:
    """All weights sum to T again; those of absent tasks stay as they are."""
    weights = jnp.where(mask, jnp.maximum(weights, _SMALLEST_WEIGHT), weights)
    target = mask.shape[0] - jnp.sum(weights, where=~mask)
    total = jnp.sum(weights, where=mask)
    return jnp.where(mask, weights * (target / jnp.where(total > 0, total, 1)), weights)


def gradnorm(
    num_tasks: int,
    *,
    alpha: float | jax.Array = 1.5,
    learning_rate: LearningRate = 0.025,
    optimizer: OptimizerOf = optax.adam,
    initial_losses: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Weights learned so that weighted gradients are alike, longer for slow tasks.

    .. math:: u = \sum_t w_t g_t, \qquad w \leftarrow w - \mathrm{Adam} \Big( \nabla_w
       \sum_t \big| w_t \|g_t\| - \bar G r_t^\alpha \big| \Big), \qquad \sum_t w_t = T

    with the mean length ``G`` of the weighted gradients, held constant, and the
    relative inverse training rates ``r``: what is left of each loss, by what is left on
    average. Weights move by about the learning rate a step, so they follow trends and
    not batches. Use it where tasks differ in scale by up to a hundred times or so and
    shall learn at one pace; where they differ by more it needs long to settle. It knows
    nothing of conflict, and expects positive losses that can fall to about zero.

    Args:
      num_tasks: T.
      alpha: how strongly slow tasks are favoured, not negative; 0: all gradients are
        brought to one length. 1.5 is LibMTL's default.
      learning_rate: of w, not negative; or an optax schedule of a task's own number of
        steps. 0.025 in the paper.
      optimizer: of w: a function of the learning rate.
      initial_losses: ``[T]``, ``L(0)``; by default each task's loss at its first step.
        Give an average where single batches are noisy.
      scale: see `from_weighting`; ``"paper"`` and ``"sum"`` differ where tasks are
        absent: weights of all T tasks go on summing to T.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. ``learned_values`` in its state are w, 1 at first. A zero gradient
      gives its weight no push (momentum and the sum still move it). A loss that began
      at zero or below counts as not trained, one that is negative as fully trained; no
      weight falls below about 1e-3. Batches whose loss is not finite do not move w.

    Raises:
      ValueError: when `alpha` or `learning_rate` is concrete and negative or not
        finite, or `initial_losses` do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.gradnorm(num_tasks=2, learning_rate=0.5)
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for _ in range(2):
      ...     _, state = tx.update(g, state, losses=jnp.array([1.0, 1.0]))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # the longer gradient lost half
      ['0.50', '1.50']

    References:
      Chen et al., `GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep
      Multitask Networks <https://arxiv.org/abs/1711.02257>`_, ICML 2018.

    Differs from the paper: lengths are those over all parameters it is given, not over
    the last shared layer (`shared_only` chooses that); weights stay positive. LibMTL
    learns the logarithms of the weights, from the second epoch on.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("alpha", alpha)
    given = read_point("initial_losses", initial_losses, num_tasks, positive=True)
    learner = make_optimizer(optimizer, learning_rate)

    def init(num_tasks: int, dtype: DType) -> GradNormState:
        ones = jnp.ones((num_tasks,), dtype)
        first = ones if given is None else jnp.asarray(given, dtype)
        begun = jnp.full((num_tasks,), given is not None)
        return GradNormState(init_learned(learner, ones), jnp.copy(first), begun)

    def update(
        gramian: Gramian,
        state: GradNormState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, GradNormState]:
        del extra
        weights = state.balance.learned_values
        sound = task_mask & jnp.isfinite(losses)
        new = sound & ~state.has_begun
        first = jnp.where(new, losses, state.first_losses)

        squares = jnp.where(task_mask, jnp.maximum(jnp.diag(gramian), 0), 0)
        lengths = jnp.sqrt(squares)
        favour = _slowness(losses, first, sound) ** jnp.asarray(alpha, losses.dtype)
        weighted = weights * lengths
        target = _mean(weighted, task_mask) * jnp.minimum(favour, _LARGEST_RATIO)
        slope = jnp.sign(weighted - target) * lengths

        moved = learn(learner, slope, state.balance, sound)
        normalised = _normalised(moved.learned_values, task_mask)
        balance = moved._replace(learned_values=normalised)
        return weights, GradNormState(balance, first, state.has_begun | sound)

    return from_weighting(
        Weighting(init, update, frozenset({"gramian", "losses"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
