"""LDC-MTL: loss discrepancy control.

Learned weights that keep neighbouring weighted losses alike, in one loop (Xiao, Dong,
Zou & Ji 2025, arXiv:2502.08585; the form of the authors' CelebA code).

    phi(L, s) = sum_t sigma_t l_t / S + lambda sum_t |tau_t l_t - tau_(t+1) l_(t+1)|
    w_t = d phi / d L_t,   s <- s - Adam(d phi / d s)

sigma = sigmoid(s), S = sum sigma held fixed; l: the losses, or normalised by the first.
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_choice, check_nonnegative
from mtl_optax._learned import (
    Learned,
    LearningRate,
    OptimizerOf,
    init_learned,
    learn,
    make_optimizer,
)
from mtl_optax._scalarized import ScalarizedInfo
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import (
    DType,
    Losses,
    Scalar,
    TaskMask,
    Weighting,
    Weights,
)

Normalization: TypeAlias = Literal["none", "rescaled", "log"]
Discrepancy: TypeAlias = Literal["weighted", "plain"]

_START = 1.0  # of s
# Of losses, where they are divided by or have a logarithm; of normalised ones.
_SMALLEST, _LARGEST = 1e-30, 1e30
# Of two weighted losses: what tells them apart, in units of their rounding.
_APART = 8


class LDCState(NamedTuple):
    """State of `ldc_mtl`.

    Attributes:
      learned: the router's logits s and their optimiser.
      first_losses: each task's loss at its first step.
      steps_seen: how many steps each task was present.
      info: what a person looks at.
    """

    learned: Learned
    first_losses: Float[Array, " tasks"]
    steps_seen: Int[Array, " tasks"]
    info: ScalarizedInfo


def _normalised(
    losses: Losses, state: LDCState, mask: TaskMask, normalization: Normalization
) -> tuple[Array, Array]:
    """``l [T]`` and ``dl / dL``."""
    if normalization == "none":
        return losses, jnp.ones_like(losses)
    old = state.steps_seen > 0
    first = jnp.where(old, state.first_losses, losses)
    start = jnp.maximum(jnp.abs(first), _SMALLEST)
    # A task's first loss is exactly its own start, or rounding would set the signs.
    if normalization == "log":
        positive = jnp.maximum(losses, _SMALLEST)
        return jnp.where(old, jnp.log(positive) - jnp.log(start), 0), 1 / positive
    least = jnp.min(start, where=mask, initial=jnp.inf)
    values = jnp.where(old, losses / start, jnp.sign(losses)) * least
    return jnp.clip(values, -_LARGEST, _LARGEST), least / start


def _discrepancy(values: Array, mask: TaskMask) -> Scalar:
    """``sum |v_t - v_(t+1)|`` of the present tasks, in their order."""
    in_row = values[jnp.argsort(~mask, stable=True)]
    pairs = jnp.arange(1, values.shape[0]) < jnp.sum(mask)
    apart = jnp.abs(in_row[:-1] - in_row[1:])
    sizes = jnp.maximum(jnp.abs(in_row[:-1]), jnp.abs(in_row[1:]))
    rounding = _APART * jnp.finfo(values.dtype).eps * lax.stop_gradient(sizes)
    return jnp.sum(apart, where=pairs & (apart > rounding))


def ldc_mtl(
    num_tasks: int,
    *,
    penalty: float | jax.Array = 0.01,
    learning_rate: LearningRate = 1e-3,
    normalization: Normalization = "none",
    discrepancy: Discrepancy = "weighted",
    optimizer: OptimizerOf = optax.adam,
    scale: Scale = "paper",
) -> Combiner:
    r"""Learned weights that keep the weighted losses of neighbouring tasks alike.

    .. math:: u = \sum_t \frac{\partial \phi}{\partial L_t} g_t, \qquad
       \phi = \frac{\sum_t \sigma_t \ell_t}{\sum_t \sigma_t}
              + \lambda \sum_{t=1}^{T-1} |\tau_t \ell_t - \tau_{t+1} \ell_{t+1}|, \qquad
       s \leftarrow s - \mathrm{Adam}(\partial \phi / \partial s)

    with :math:`\sigma = \mathrm{sigmoid}(s)`. A problem on two levels (the network
    minimises the weighted loss, the weights minimise the discrepancy) made one by a
    penalty. At the cost of plain training a task with a large loss is pushed by the
    penalty, and its weight falls. Use it where tasks should end at like losses. The
    discrepancy runs over neighbours, so **the order of tasks matters** from three
    tasks on, and where :math:`2 \lambda \sum \sigma > 1` a weight may be negative: a
    loss far below both neighbours' is then raised. So keep `penalty` well below 1 / T.

    Args:
      num_tasks: T.
      penalty: lambda, not negative. 0.01 in the authors' CelebA runs (T = 40), 0.05
        for NYUv2 and QM9, 0.1 for Cityscapes.
      learning_rate: of s, not negative; or an optax schedule of a task's own number
        of steps. 0.001 in the authors' CelebA and QM9 runs, where s is trained along
        with the network.
      normalization: of losses. ``"none"`` (CelebA, Cityscapes); ``"rescaled"``: divided
        by the first loss, times the least of these (NYUv2), so that units do not
        matter; ``"log"``: the logarithm of the loss over the first one (QM9; positive
        losses only).
      discrepancy: ``"weighted"``: tau is sigma; ``"plain"``: tau is 1 (Cityscapes).
      optimizer: of s: a function of the learning rate.
      scale: see `from_weighting`. Here ``"paper"`` sums to about 1.

    Returns:
      a `Combiner`. ``learned_values`` in its state are s, 1 at first; ``objective`` is
      phi before the step. A loss that is not finite does not move its task.

    Raises:
      ValueError: for an unknown choice; when `penalty` or `learning_rate` is concrete
        and negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.ldc_mtl(num_tasks=2, penalty=0.1, discrepancy="plain")
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> updates, state = tx.update(
      ...     g, tx.init({"w": jnp.zeros(2)}), losses=jnp.array([2.0, 1.0])
      ... )
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # a half each, and the penalty
      ['0.60', '0.40']
      >>> f"{state.weighting.info.objective:.2f}"  # 1.5 + 0.1 * (2 - 1)
      '1.60'

    References:
      Xiao, Dong, Zou & Ji, `LDC-MTL: Balancing Multi-Task Learning through Scalable
      Loss Discrepancy Control <https://arxiv.org/abs/2502.08585>`_, 2025.

    Differs from the authors' code: one number a task in place of their router networks
    for NYUv2 and Cityscapes (softmax of features, clipped to 0.2 ... 0.8); for QM9 they
    start s at random, cut it off at 0, and take the first losses anew at every epoch.
    """
    check_nonnegative("penalty", penalty)
    check_choice("normalization", normalization, get_args(Normalization))
    check_choice("discrepancy", discrepancy, get_args(Discrepancy))
    tx = make_optimizer(optimizer, learning_rate)

    def objective(values: Array, s: Array, mask: TaskMask) -> Scalar:
        sigma = jax.nn.sigmoid(s)
        total = lax.stop_gradient(jnp.sum(sigma, where=mask))
        weighted = jnp.sum(sigma * values, where=mask) / jnp.where(total > 0, total, 1)
        compared = sigma * values if discrepancy == "weighted" else values
        return weighted + penalty * _discrepancy(compared, mask)

    def init(num_tasks: int, dtype: DType) -> LDCState:
        return LDCState(
            learned=init_learned(tx, jnp.full((num_tasks,), _START, dtype)),
            first_losses=jnp.zeros((num_tasks,), dtype),
            steps_seen=jnp.zeros((num_tasks,), jnp.int32),
            info=ScalarizedInfo(jnp.zeros((), dtype)),
        )

    def update(
        gramian: None,
        state: LDCState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, LDCState]:
        del gramian, extra
        values, by_loss = _normalised(losses, state, task_mask, normalization)
        slopes = jax.value_and_grad(objective, argnums=(0, 1))
        value, (downhill, uphill) = slopes(
            values, state.learned.learned_values, task_mask
        )
        known = task_mask & jnp.isfinite(losses)
        starts = known & (state.steps_seen == 0)
        return downhill * by_loss, LDCState(
            learn(tx, uphill, state.learned, task_mask),
            jnp.where(starts, losses, state.first_losses),
            state.steps_seen + known.astype(jnp.int32),
            ScalarizedInfo(value.astype(losses.dtype)),
        )

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
