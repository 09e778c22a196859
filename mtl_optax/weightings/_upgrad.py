"""UPGrad: unconflicting projection of gradients.

Every task's gradient is projected on the cone of directions along which no loss rises,
and the projections are averaged (Quinton & Rey 2024, arXiv:2406.16232, section 3).

    C = {d : J d >= 0}
    u = sum_i pi_C(p_i g_i),   pi_C(J^T r) = J^T argmin_{v >= r} v^T G v
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_num_tasks, check_per_task
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import dual_cone_projection


class UpgradInfo(NamedTuple):
    """What to look at: how well the worst projection solves its problem."""

    solver_residual: Float[Array, ""]


class UpgradState(NamedTuple):
    """Nothing is needed at the next step."""

    info: UpgradInfo


def upgrad(
    num_tasks: int,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    *,
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
      preference: ``[T]``, p, not negative, not all zero, taken as it is; one over the
        number of present tasks by default.
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
    if preference is not None:
        check_per_task("preference", preference, num_tasks)

    def init(num_tasks: int, dtype: DType) -> UpgradState:
        del num_tasks
        return UpgradState(UpgradInfo(jnp.zeros((), dtype)))

    def update(
        gramian: Gramian, state: UpgradState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, UpgradState]:
        del state, extra
        present = task_mask.astype(gramian.dtype)
        if preference is None:
            wanted = present / jnp.maximum(jnp.sum(present), 1)
        else:
            wanted = present * jnp.asarray(preference, gramian.dtype)
        projected, solved = dual_cone_projection(
            gramian, jnp.diag(wanted), task_mask=task_mask
        )
        return jnp.sum(projected, axis=0), UpgradState(UpgradInfo(solved.residual))

    return from_weighting(
        Weighting(init, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
