"""NTKMTL(-SR): tasks at the same speed of convergence.

Weights from the largest eigenvalue of each task's neural tangent kernel, with one row a
task (Qin et al. 2025, arXiv:2510.18258, equation 15; 18 if the rows are taken at the
shared representation).

    w_t = sqrt(mean_s |g_s|^2) / |g_t|
"""

from typing import Any

import jax.numpy as jnp

from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import unit_rows


def ntkmtl_sr(
    num_tasks: int, *, scale: Scale = "paper", axis_name: Any = None
) -> Combiner:
    r"""Every task's gradient at the same length, the root mean square of all.

    .. math:: u = \sum_t w_t g_t, \qquad
              w_t = \sqrt{\frac{1}{T} \sum_s \|g_s\|^2} \; \Big/ \; \|g_t\|

    The largest eigenvalue of a task's neural tangent kernel bounds how fast it
    converges; with one row a task that is the squared length of its gradient, and the
    weights make all alike. On the gradients of shared parameters, which is what
    `task_jacobian` gives, this is the paper's NTKMTL for one batch (n = 1); on
    gradients with respect to the shared representation it is its NTKMTL-SR. Cheap,
    robust against losses of different scale, blind to conflicts. Its lengths are noisy
    where batches are small.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; ``"paper"`` is the formula above, a sum over tasks.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Only the Gramian's diagonal is looked at; losses are not needed. A
      task whose gradient is zero counts as absent for that step. Parallel tasks add up,
      opposite ones cancel.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.ntkmtl_sr(num_tasks=2)
      >>> g = {"w": jnp.array([[7.0, 0.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([5., 5.], dtype=float32)

    References:
      Qin et al., `NTKMTL: Mitigating Task Imbalance in Multi-Task Learning from Neural
      Tangent Kernel Perspective <https://arxiv.org/abs/2510.18258>`_, NeurIPS 2025.

    Differs from the authors' code: one row a task (theirs takes four parts of the batch
    for SR); it writes a sum for the paper's mean, which makes the update ``sqrt(T)``
    times as long, multiplies by T and clips to length 1.
    """

    def update(
        gramian: Gramian, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del extra
        rows = unit_rows(gramian, task_mask)
        count = jnp.maximum(jnp.sum(rows.active.astype(gramian.dtype)), 1)
        largest = jnp.max(rows.norms)
        relative = rows.norms / jnp.where(largest == 0, 1, largest)
        length = largest * jnp.sqrt(jnp.sum(relative**2) / count)
        return length * rows.inverse, state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
