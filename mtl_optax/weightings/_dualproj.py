"""DualProj: the preferred combination, projected so that it harms no task.

The projection of gradient episodic memory, with every task in the memory (Lopez-Paz &
Ranzato 2017, arXiv:1706.08840, equations 7-11; named so by Quinton & Rey 2024).

    u = pi_C(J^T p),   C = {d : J d >= 0},   pi_C(J^T p) = J^T argmin_{v >= p} v^T G v
"""

from collections.abc import Sequence
from typing import Any

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


def dualproj(
    num_tasks: int,
    *,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The nearest direction to the mean gradient that harms no task.

    .. math:: u = \arg\min_d \|d - J^\top p\|^2 \quad \text{s.t.} \quad J d \ge 0

    The least change of plain training that makes it free of conflicts: it *is* the
    mean while no task objects. One small problem a step, against T of `upgrad`. A long
    gradient still dominates the mean that is projected, and a task that objects is
    only just not harmed: its loss stands still. `upgrad` lets it fall.

    Args:
      num_tasks: T.
      preference: ``[T]``, p, in the order of the losses (a dict's keys are sorted); not
        negative, not all zero, and taken as it is: ones step T times as far as the
        default, one over the number of present tasks.
      scale: see `from_weighting`; ``"paper"`` is the projected mean.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative KKT residual.
      Losses are not needed. Parallel gradients are averaged; opposite ones give zero.

    Raises:
      ValueError: for a preference that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.dualproj(num_tasks=2)
      >>> g = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(3)}))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['0.556', '1.111', '1.111']

    References:
      Lopez-Paz & Ranzato, `Gradient Episodic Memory for Continual Learning
      <https://arxiv.org/abs/1706.08840>`_, NeurIPS 2017.

    Differs from the authors' code: the constraints hold exactly (theirs asks for a
    margin and regularises the Gramian).
    """
    check_num_tasks(num_tasks)
    preferred = read_per_task("preference", preference, num_tasks)

    def update(
        gramian: Gramian, state: SolvedState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        wanted = shares_of(preferred, task_mask, gramian.dtype)
        weights, info = dual_cone_projection(gramian, wanted, task_mask=task_mask)
        return weights, solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
