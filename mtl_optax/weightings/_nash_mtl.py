"""Nash-MTL: the update as the outcome of a bargain between the tasks.

Nash's bargaining solution over directions in a ball (Navon et al. 2022,
arXiv:2202.01017, claim 3.1).

    max_d sum_t log <g_t, d>  over a ball   =>   u = J^T a,   G a = 1 / a,   a > 0
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._solved import SolvedState, init_solved, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import positive_root


def nash_mtl(
    num_tasks: int,
    *,
    max_norm: float | jax.Array = 1.0,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The bargaining solution: every task's loss falls in proportion to its stake.

    .. math:: u = \sum_t a_t g_t, \qquad J J^\top a = 1 / a, \quad a > 0

    The product of the tasks' decreases is the largest possible, so the direction does
    not depend on the scale of any loss, and no loss rises along it. One of the best
    all-round methods in published comparisons. The same direction as `fairgrad` with
    ``alpha=1``. Its length says nothing about how far training has come: it does not
    slow down near a Pareto-stationary point, where gradients almost cancel and the
    weights get large.

    Args:
      num_tasks: T.
      max_norm: the update's largest length, up to the Gramian's rounding; 0 for no
        limit. 1 in the authors' code, so that updates mostly have length 1. It acts
        under ``scale="paper"`` only: the others set a length of their own.
      scale: see `from_weighting`; ``"paper"`` solves for the Gramian divided by its
        Frobenius norm F, as the authors' code does, so the update before the limit is
        as long as ``sqrt(F * T)``, the order of the gradients.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative residual of the
      equation. Losses are not needed. A task whose gradient is zero counts as absent
      for that step. Parallel tasks share. Where gradients cancel (two opposite ones)
      there is no bargain; what cancels then adds up to zero, to rounding, and the
      update serves the tasks that are left, if any.

    Raises:
      ValueError: if max_norm is concrete and negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.nash_mtl(num_tasks=2)
      >>> g = {"w": jnp.array([[4.0, 0.0], [0.0, 0.5]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([0.7071, 0.7071], dtype=float32)

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022.

    Differs from the authors' code: the equation is solved by Newton's method to
    rounding. Theirs runs 20 rounds of a convex solver on the host and keeps the last
    weights when that fails.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("max_norm", max_norm, finite=False)

    def update(
        gramian: Gramian, state: SolvedState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        dtype = gramian.dtype
        bargain, info = positive_root(gramian, 1.0, task_mask=task_mask)
        largest = jnp.max(jnp.abs(gramian))
        relative = gramian / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        frobenius = jnp.sqrt(largest) * jnp.sum(relative**2) ** 0.25
        # |J^T a|^2 = a^T G a = sum_t a_t / a_t: known without the sum's cancellation.
        length = frobenius * jnp.sqrt(jnp.sum((bargain > 0).astype(dtype)))
        limit = jnp.where(jnp.asarray(max_norm) > 0, max_norm, jnp.inf).astype(dtype)
        clip = limit / jnp.maximum(length, jnp.where(limit < jnp.inf, limit, 1))
        clip = jnp.where(limit < jnp.inf, clip, 1)
        weights = bargain * frobenius * clip
        return weights, solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
