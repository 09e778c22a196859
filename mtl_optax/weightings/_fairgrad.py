"""FairGrad: alpha-fair resource allocation among tasks.

Maximises the alpha-fair utility of the tasks' decreases (Ban & Ji 2024,
arXiv:2402.15638, equations 5-7).

    max_d sum_t <g_t, d>^(1 - alpha) / (1 - alpha)  over a ball   =>
    u = J^T x,   G x = x^(-1 / alpha),   x > 0
"""

from typing import Any

import jax

from mtl_optax._arguments import check_num_tasks, check_positive
from mtl_optax._solved import SolvedState, init_solved, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import positive_root


def fairgrad(
    num_tasks: int,
    *,
    alpha: float | jax.Array = 1.0,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The direction of an alpha-fair share of progress for every task.

    .. math:: u = \sum_t x_t g_t, \qquad J J^\top x = x^{-1/\alpha}, \quad x > 0

    Every task's loss falls along it: by ``x_t^(-1/alpha)``, to first order. ``alpha``
    goes from the plain mean (towards 0) over proportional fairness (1: the bargaining
    solution of `nash_mtl`, which does not depend on the scale of single losses) to
    attention for the worst-off task alone (infinity). The solver is made for 0.2 to 10.
    Use it for tasks of different scale. It does not slow down near a Pareto-stationary
    point: for alpha = 1 the update is as long as the square root of T everywhere, so
    let an optimiser that takes the length away follow, or use ``scale="norm"``.

    Args:
      num_tasks: T.
      alpha: fairness, between 0.02 and 100; may be traced. 1 is LibMTL's default.
      scale: see `from_weighting`; ``"paper"`` takes x as it is, as TorchJD and LibMTL
        do. (The authors' code multiplies by T and clips the update to length 1.)
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative residual of the
      equation. Losses are not needed. A task whose gradient is zero counts as absent
      for that step. Parallel tasks share. Where gradients cancel (two opposite ones)
      there is no root; what cancels then adds up to zero, to rounding, and the update
      serves the tasks that are left, if any.

    Raises:
      ValueError: if alpha is concrete and out of range: beyond it the equation cannot
        be solved in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.fairgrad(num_tasks=2)
      >>> g = {"w": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([1., 1.], dtype=float32)

    References:
      Ban & Ji, `Fair Resource Allocation in Multi-Task Learning
      <https://arxiv.org/abs/2402.15638>`_, ICML 2024.

    Differs from the authors' code: the equation is solved by Newton's method to
    rounding; theirs calls a least-squares solver on the host, which gives up on small
    gradients.
    """
    check_num_tasks(num_tasks)
    check_positive("alpha", alpha)
    if not isinstance(alpha, jax.core.Tracer) and not 0.02 <= alpha <= 100:
        raise ValueError(f"alpha must lie between 0.02 and 100, got {alpha}.")

    def update(
        gramian: Gramian, state: SolvedState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        weights, info = positive_root(gramian, alpha, task_mask=task_mask)
        return weights, solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
