"""UPGrad: unconflicting projection of gradients.

Every task's gradient is projected on the cone of directions along which no loss rises,
and the projections are averaged (Quinton & Rey 2024, arXiv:2406.16232, section 3).

    C = {d : J d >= 0}
    u = sum_i pi_C(p_i g_i),   pi_C(J^T r) = J^T argmin_{v >= r} v^T G v
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_num_tasks
from mtl_optax._solved import (
    SolvedState,
    init_solved,
    read_per_task,
    shares_of,
    solved,
)
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import dual_cone_projection


def upgrad(
    num_tasks: int,
    *,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The mean of the task gradients, each projected so that it harms no task.

    .. math:: u = \sum_i \pi_C(p_i g_i), \qquad C = \{d : J d \ge 0\}, \qquad
       \pi_C(J^\top r) = J^\top \arg\min_{v \ge r} v^\top J J^\top v

    No task's loss rises along it, to first order; each task's share grows in
    proportion to its gradient (linear under scaling), so that well-scaled losses keep
    their meaning; and it is the plain mean where nothing conflicts. A good first
    choice among the Gramian methods when losses are on comparable scales. Where one
    gradient is much longer than the others, its projection is most of the update:
    `edm` or `nash_mtl` don't see lengths.

    Args:
      num_tasks: T.
      preference: ``[T]``, p, in the order of the losses (a dict's keys are sorted); not
        negative, not all zero, and taken as it is: ones step T times as far as the
        default, one over the number of present tasks.
      scale: see `from_weighting`; ``"paper"`` is the mean of the projections.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative KKT residual.
      Losses are not needed, T projections are solved at once. Parallel gradients are
      averaged; two exactly opposite ones give zero.

    Raises:
      ValueError: for a preference that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.upgrad(num_tasks=2)
      >>> g = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(3)}))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['0.292', '1.901', '1.901']

    References:
      Quinton & Rey, `Jacobian Descent for Multi-Objective Optimization
      <https://arxiv.org/abs/2406.16232>`_, 2024.

    Differs from the authors' code: the projections are exact. Theirs adds 1e-4 of the
    Gramian's trace to its diagonal, which lets the update conflict with tasks whose
    gradients are some thirty times shorter than another's.
    """
    check_num_tasks(num_tasks)
    preferred = read_per_task("preference", preference, num_tasks)

    def update(
        gramian: Gramian, state: SolvedState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        wanted = shares_of(preferred, task_mask, gramian.dtype)
        projected, info = dual_cone_projection(
            gramian, jnp.diag(wanted), task_mask=task_mask
        )
        return jnp.sum(projected, axis=0), solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
