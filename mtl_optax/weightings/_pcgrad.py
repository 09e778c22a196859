"""PCGrad: projecting conflicting gradients.

Every task's gradient gives up what points against the others, one after the other in
random order; what is left is summed (Yu et al. 2020, arXiv:2001.06782, algorithm 1).

    p_i = g_i;  for j != i in random order:  if <p_i, g_j> < 0:
        p_i <- p_i - <p_i, g_j> / |g_j|^2  g_j
    u = sum_i p_i
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from mtl_optax._random import orders_by_task
from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import UnitRows, unit_rows


def _project_in_turn(rows: UnitRows, orders: Array) -> Array:
    """``[T, T]``: row i holds the coefficients of p_i in unit task gradients.

    All tasks take their k-th turn at once; each goes by its own order.
    """
    size = rows.norms.shape[0]
    own = jnp.arange(size)

    def turn(k: Array, projected: Array) -> Array:
        other = orders[:, k]
        # <p_i, u_j> for each task's own j: one column of cosines a task.
        along = jnp.sum(projected * rows.cosines[other], axis=1)
        conflict = (along < 0) & (other != own)
        return projected.at[own, other].add(jnp.where(conflict, -along, 0))

    return lax.fori_loop(0, size, turn, jnp.diag(rows.norms))


def pcgrad(
    num_tasks: int, *, scale: Scale = "paper", axis_name: Any = None
) -> Combiner:
    r"""The sum of task gradients, each freed from its conflicts with the others.

    .. math:: p_i \leftarrow p_i - \frac{\min(\langle p_i, g_j \rangle, 0)}{\|g_j\|^2}
              g_j \quad \text{for } j \neq i \text{ in random order}, \qquad
              u = \sum_i p_i

    A cheap and well-known surgery. For two tasks the update conflicts with neither;
    for more it may, since a later projection can undo an earlier one, and the result
    depends on the order. Long gradients still dominate. Use `upgrad` for the same idea
    without conflicts or chance.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; ``"paper"`` sums the projected gradients (that is
        T times as long as what methods give that take a mean).
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``update`` needs ``key=``, a fresh `jax.random.key` at every step,
      for the orders: one a task, over the tasks that are present. Losses are not
      needed. Parallel tasks add up; exactly opposite ones project each other to zero.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.pcgrad(num_tasks=2)
      >>> g = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(2)}), key=jax.random.key(0))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['0.500', '1.500']

    References:
      Yu et al., `Gradient Surgery for Multi-Task Learning
      <https://arxiv.org/abs/2001.06782>`_, NeurIPS 2020.

    Differs from the authors' code: orders are random, as in the paper (theirs shuffles
    without effect), and zero gradients take no part (theirs gives NaN). LibMTL's adds
    1e-8 to ``|g_j|^2``.
    """

    def update(
        gramian: Gramian,
        state: tuple[()],
        *,
        task_mask: TaskMask,
        key: jax.Array,
        **extra: Any,
    ) -> tuple[Weights, tuple[()]]:
        del extra
        rows = unit_rows(gramian, task_mask)
        projected = _project_in_turn(rows, orders_by_task(key, task_mask))
        return jnp.sum(projected, axis=0) * rows.inverse, state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian", "key"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
