"""PIVRG: performance-informed variance reduction.

FairGrad with ``alpha = 2``, whose right-hand side favours the tasks that lag behind
their single-task baselines (Qin et al. 2025, CVPR; formula from the authors' code).

    omega = T softmax(Delta / tau),   tau = max((max Delta - min Delta) / ln b, tau_min)
    u = J^T x,   G x = (omega / x)^(1/2),   x > 0
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mtl_optax._arguments import check_num_tasks, check_positive
from mtl_optax._solved import SolvedState, init_solved, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import positive_root


def _emphasis(delta_m: Array, mask: TaskMask, bound: Array, floor: Array) -> Array:
    """``omega [T]``: sums to the number of present tasks; no ratio exceeds `bound`."""
    spread = jnp.max(delta_m, where=mask, initial=-jnp.inf)
    spread = spread - jnp.min(delta_m, where=mask, initial=jnp.inf)
    spread = jnp.where(jnp.any(mask), spread, 0)
    temperature = jnp.maximum(spread / jnp.log(bound), floor)
    count = jnp.sum(mask.astype(delta_m.dtype))
    shares = jax.nn.softmax(delta_m / temperature, where=mask)
    return jnp.where(mask, count * shares, 1)


def pivrg(
    num_tasks: int,
    *,
    bound: float | jax.Array = 2.0,
    min_temperature: float | jax.Array = 10.0,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""A fair share of progress, larger for tasks that lag behind their baselines.

    .. math:: u = \sum_t x_t g_t, \qquad J J^\top x = (\omega / x)^{1/2}, \quad x > 0,
       \qquad \omega = T \, \mathrm{softmax}(\Delta / \tau)

    ``update`` takes ``delta_m=``, one number a task: how much worse than its
    single-task baseline it now is, in percent. That is `metrics.delta_m` of the task's
    own metrics with ``convention="loss"`` (its default, gain, has the opposite sign,
    and would favour the tasks that need it least). Use it where such baselines are
    known and a validation set is evaluated now and then; with equal ``delta_m`` it is
    ``fairgrad(alpha=2)``. Every task's loss falls along the update, which gets
    *shorter* as gradients get longer (by the power -1/3): let an optimiser that takes
    the length away follow, or use ``scale="norm"``.

    Args:
      num_tasks: T.
      bound: the largest ratio between two emphases, above 1. 2 in the authors' code.
      min_temperature: of the softmax, in percent, positive: it is never sharper than
        that. 10 in the authors' code (20 and 100 for some of their problems).
      scale: see `from_weighting`; ``"paper"`` takes x as it is. (The authors' code
        multiplies by T and clips the update to length 1.)
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``update`` needs ``delta_m=`` of shape ``[T]``: zeros until there is
      a first evaluation, then the latest. Its sign matters (positive is worse), that of
      losses does not. ``solver_residual`` in its state is the relative residual of the
      equation. Zero gradients, parallel tasks and stationary points: as `fairgrad`.

    Raises:
      TypeError, ValueError: at trace time, if ``delta_m`` is missing or no ``[T]``; if
        `bound` or `min_temperature` is concrete and out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.pivrg(num_tasks=2)
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> updates, _ = tx.update(g, state, delta_m=jnp.array([5.0, -2.0]))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['1.101', '0.874']

    References:
      Qin, Wang & Yan, Revisiting Fairness in Multitask Learning: A Performance-Driven
      Approach for Variance Reduction, CVPR 2025.
    """
    check_num_tasks(num_tasks)
    check_positive("min_temperature", min_temperature)
    check_positive("bound", bound)
    if not isinstance(bound, jax.core.Tracer) and not np.float32(bound) > 1:
        raise ValueError(f"bound must be above 1, got {bound}.")

    def update(
        gramian: Gramian,
        state: SolvedState,
        *,
        task_mask: TaskMask,
        delta_m: Any = None,
        **extra: Any,
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        if delta_m is None:
            raise TypeError(
                "pivrg needs each task's delta_m (percent behind its baseline): call "
                "tx.update(task_grads, state, params, delta_m=delta_m) with shape "
                f"({num_tasks},), zeros before the first evaluation."
            )
        if jnp.shape(delta_m) != (num_tasks,):
            raise ValueError(
                f"delta_m: expected shape ({num_tasks},), one number a task, got "
                f"{jnp.shape(delta_m)}."
            )
        behind = jnp.where(task_mask, jnp.asarray(delta_m, gramian.dtype), 0)
        omega = _emphasis(
            behind, task_mask, jnp.asarray(bound), jnp.asarray(min_temperature)
        )
        weights, info = positive_root(gramian, 2.0, targets=omega, task_mask=task_mask)
        return weights, solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
