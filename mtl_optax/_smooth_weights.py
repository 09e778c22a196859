"""`smooth_weights`: the running average of a combination's weights.

CR-MOGM (Zhou et al., NeurIPS 2022, "On the Convergence of Stochastic Multi-Objective
Gradient Manipulation and Beyond"). Weights made of noisy gradients follow the noise,
and the update is then biased; averaged over steps they do not.

    lambda_k = alpha lambda_{k-1} + (1 - alpha) lambda^_k,   lambda_1 = lambda^_1
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_optax._arguments import check_nonnegative
from mtl_optax._transform import Combiner, from_weighting, method_of
from mtl_optax._types import DType, Gramian, State, TaskMask, Weighting, Weights


class SmoothWeightsInfo(NamedTuple):
    """What to look at: the weights of this step alone; 0 for absent tasks."""

    raw_weights: Float[Array, " tasks"]


class SmoothWeightsState(NamedTuple):
    """State of the weighting that `smooth_weights` makes; absent tasks hold still.

    Attributes:
      inner: that of the wrapped weighting.
      smoothed_weights: the running averages, before the scale convention.
      has_average: the tasks that have one: those that were present at some step.
      info: what a person looks at.
    """

    inner: State
    smoothed_weights: Float[Array, " tasks"]
    has_average: Bool[Array, " tasks"]
    info: SmoothWeightsInfo


def smooth_weights(tx: Combiner, alpha: float | jax.Array = 0.9) -> Combiner:
    r"""Combines by the running average of a combiner's weights (CR-MOGM).

    .. math:: u_k = J_k^\top \lambda_k, \qquad
       \lambda_k = \alpha \lambda_{k-1} + (1 - \alpha) \hat\lambda_k, \qquad
       \lambda_1 = \hat\lambda_1

    where :math:`\hat\lambda_k` are the weights that `tx` makes at step k.

    Weights that a solver makes of the gradients of a small batch jump from batch to
    batch, and correlate with those gradients' noise: the update is then not even on
    average the one of the whole data set, and such methods need not converge. Averaged
    weights correlate with it less. Use it where ``task_weights`` jump (`mgda`,
    `nash_mtl`, `imtl_g` at small batches). Don't use it where a promise of the method
    (no task's loss rises) must hold at every step: averaged weights do not keep it;
    nor where weights are random on purpose (`rlw`: the average tends to the mean).

    Args:
      tx: a combiner whose method is a weighting: made by `from_weighting`, as all of
        `METHODS` that need no more than the Gramian are; or `smooth_weights` again.
      alpha: share of the past, in [0, 1]; 0 is `tx` itself, 1 keeps every task's first
        weight for good. About ``1 / (1 - alpha)`` steps count. It may be traced: the
        paper lets it rise towards 1 as the learning rate falls, which is
        ``inject_hyperparams(lambda alpha: smooth_weights(mgda(3), alpha))(alpha=
        schedule)`` with the schedule ``1 - learning_rate(k) / learning_rate(0)``.
        Default: TorchJD's.

    Returns:
      a `Combiner` that is used as `tx` is and costs the same. Its method is a weighting
      again and may be wrapped as one: ``update_every(smooth_weights(cagrad(3)), 10)``
      averages over the weights that are made. The scale convention of `tx` applies to
      the averages. ``optax.tree_utils.tree_get(state, "raw_weights")`` gives
      :math:`\hat\lambda_k`, ``"task_weights"`` the weights of the update.

      An absent task's average holds still, while the others' go on; its weight is 0. A
      task begins when it is first present. A weight that is not finite reaches the
      update, but not the average.

    Raises:
      TypeError: when `tx` has no weights (a method on whole rows, a wrapper, a chain).
      ValueError: when alpha is concrete and not in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.smooth_weights(mtl.imtl_g(num_tasks=2), alpha=0.75)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([[3.0, 0.0], [0.0, 1.0]]), state)
      >>> state.info.task_weights
      Array([0.25, 0.75], dtype=float32)
      >>> _, state = tx.update(jnp.array([[1.0, 0.0], [0.0, 1.0]]), state)
      >>> state.weighting.info.raw_weights, state.info.task_weights
      (Array([0.5, 0.5], dtype=float32), Array([0.3125, 0.6875], dtype=float32))

    References:
      Zhou et al., `On the Convergence of Stochastic Multi-Objective Gradient
      Manipulation and Beyond
      <https://proceedings.neurips.cc/paper_files/paper/2022/file/f91bd64a3620aad8e70a27ad9cb3ca57-Paper-Conference.pdf>`_,
      NeurIPS 2022.
    """
    check_nonnegative("smooth_weights: alpha", alpha, at_most=1.0)
    method = method_of(tx, "smooth_weights({})", "to average", "update_every({}, 10)")
    wrapped = method.weighting

    def init(num_tasks: int, dtype: DType) -> SmoothWeightsState:
        return SmoothWeightsState(
            wrapped.init(num_tasks, dtype),
            jnp.zeros((num_tasks,), dtype),
            jnp.zeros((num_tasks,), bool),
            SmoothWeightsInfo(jnp.zeros((num_tasks,), dtype)),
        )

    def update(
        gramian: Gramian | None,
        state: SmoothWeightsState,
        *,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, SmoothWeightsState]:
        before = state.smoothed_weights
        raw, inner = wrapped.update(gramian, state.inner, task_mask=task_mask, **extra)
        raw = jnp.where(task_mask, raw.astype(before.dtype), 0)
        past = jnp.asarray(alpha, before.dtype)
        weights = jnp.where(state.has_average, past * before + (1 - past) * raw, raw)
        moves = task_mask & jnp.isfinite(weights)
        return jnp.where(task_mask, weights, 0), SmoothWeightsState(
            inner,
            jnp.where(moves, weights, before),
            state.has_average | moves,
            SmoothWeightsInfo(raw),
        )

    return from_weighting(
        Weighting(init, update, wrapped.needs),
        method.num_tasks,
        scale=method.scale,
        axis_name=method.axis_name,
    )
