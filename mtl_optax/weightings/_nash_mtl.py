"""Nash-MTL: the update as the outcome of a bargain between the tasks.

Nash's bargaining solution over directions in a ball (Navon et al. 2022,
arXiv:2202.01017, claim 3.1).

    max_d sum_t log <g_t, d>  over a ball   =>   u = J^T a,   G a = 1 / a,   a > 0
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import positive_root


class NashMtlInfo(NamedTuple):
    """What to look at: how well the weights solve their equation."""

    solver_residual: Float[Array, ""]


class NashMtlState(NamedTuple):
    """Nothing is needed at the next step."""

    info: NashMtlInfo


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
      max_norm: the update's largest length, as in the authors' code; 0 for no limit.
        Their default.
      scale: see `from_weighting`; ``"paper"`` solves for the Gramian divided by its
        Frobenius norm F, as the authors' code does, so the update before the limit is
        as long as ``sqrt(F * T)``, the order of the gradients.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative residual of the
      equation. Losses are not needed. A task whose gradient is zero counts as absent
      for that step. Parallel tasks share; at a Pareto-stationary point (two opposite
      gradients) there is no bargain, and the update is zero up to rounding.

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
    check_nonnegative("max_norm", max_norm)

    def init(num_tasks: int, dtype: DType) -> NashMtlState:
        del num_tasks
        return NashMtlState(NashMtlInfo(jnp.zeros((), dtype)))

    def update(
        gramian: Gramian, state: NashMtlState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, NashMtlState]:
        del state, extra
        dtype = gramian.dtype
        bargain, solved = positive_root(gramian, 1.0, task_mask=task_mask)
        largest = jnp.max(jnp.abs(gramian))
        relative = gramian / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        frobenius = jnp.sqrt(largest) * jnp.sum(relative**2) ** 0.25
        # |J^T a|^2 = a^T G a = sum_t a_t / a_t: known without the sum's cancellation.
        length = frobenius * jnp.sqrt(jnp.sum((bargain > 0).astype(dtype)))
        limit = jnp.where(jnp.asarray(max_norm) > 0, max_norm, jnp.inf).astype(dtype)
        clip = limit / jnp.maximum(length, jnp.where(limit < jnp.inf, limit, 1))
        clip = jnp.where(limit < jnp.inf, clip, 1)
        weights = bargain * frobenius * clip
        return weights, NashMtlState(NashMtlInfo(solved.residual))

    return from_weighting(
        Weighting(init, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
