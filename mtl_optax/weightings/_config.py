"""ConFIG: conflict-free inverse gradients.

A direction with equal (or preferred) projections on all task directions, as long as the
gradients' projections on it add up to (Liu, Chu & Thuerey 2025, ICLR, arXiv:2408.11104,
equation 2).

    d = [g_1 / |g_1|, ..., g_T / |g_T|]^{-T} p,   u = (sum_t <g_t, d>) d / |d|^2
    with d = sum_t y_t g_t / |g_t|:   C y = p for the cosines C
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_num_tasks
from mtl_optax._solved import init_stateless, read_per_task
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import conflict_free_weights, unit_rows


def config(
    num_tasks: int,
    *,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Equal projections on all task directions, as long as the gradients agree.

    .. math:: u = \Big( \sum_t \langle g_t, \hat d \rangle \Big) \hat d, \qquad
       \Big\langle \hat d, \frac{g_t}{\|g_t\|} \Big\rangle \propto p_t \text{ for all }
       t

    The direction is that of `imtl_g`: no task is preferred, whatever its scale, and as
    long as gradients do not depend on each other none is hurt. The length is that of
    the sum of the gradients, seen along that direction: long where tasks agree, short
    where they conflict. Use it for a few losses of different scale that share one
    solution, as the residuals and boundary conditions of physics-informed networks.
    It is ill-conditioned where tasks are nearly parallel or opposite; where there are
    more tasks than directions (three on one line) some may be hurt.

    Args:
      num_tasks: T.
      preference: ``[T]``, p, in the order of the losses (a dict's keys are sorted); not
        negative, not all zero; only ratios count. Default: all alike. A task with a
        preference of zero keeps its loss, to first order.
      scale: see `from_weighting`.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Losses are not needed. A task whose gradient is zero counts as
      absent for that step. Parallel gradients are added; of two opposite ones nothing
      is left.

    Raises:
      ValueError: for a preference that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.config(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([2., 2.], dtype=float32)

    References:
      Liu, Chu & Thuerey, `ConFIG: Towards Conflict-free Training of Physics Informed
      Neural Networks <https://arxiv.org/abs/2408.11104>`_, ICLR 2025.

    Differs from the authors' code: it works on the Gramian, so rows are never stored,
    and tasks at an angle below about the root of the precision (1e-3 in float32) count
    as parallel.
    """
    check_num_tasks(num_tasks)
    preferred = read_per_task("preference", preference, num_tasks)

    def update(
        gramian: Gramian, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del extra
        rows = unit_rows(gramian, task_mask)
        wanted = jnp.ones((num_tasks,), gramian.dtype)
        if preferred is not None:
            wanted = jnp.asarray(preferred, gramian.dtype)
        wanted = jnp.where(rows.active, wanted, 0)
        largest = jnp.max(wanted)  # only ratios count
        wanted = wanted / jnp.where(largest > 0, largest, 1)
        return conflict_free_weights(rows, wanted), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
