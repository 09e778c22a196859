"""MoDo: the shortest convex combination, from two independent samples.

Chen et al. 2023, NeurIPS, "Three-Way Trade-Off in Multi-Objective Learning:
Optimization, Generalization and Conflict-Avoidance", arXiv:2305.20057. With the task
gradients J, J_1 and J_2 of three batches, and the projection P on the simplex:

    lambda <- P(lambda - gamma (J_1 J_2^T + rho I) lambda),     u = J^T lambda
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._moments import keep_shares, present_shares
from mtl_optax._other_batches import read_cross_gramian
from mtl_optax._transform import Combiner, LengthScale, LossInfo, from_aggregator
from mtl_optax._tree import HIGHEST, state_dtype, weighted_sum
from mtl_optax._types import Aggregator, Params, TaskGradients, TaskMask, Updates
from mtl_optax.solvers import simplex_projection


class ModoState(NamedTuple):
    """State of `modo`.

    Attributes:
      shares: lambda, in units of an equal share.
      info: what a person looks at.
    """

    shares: Float[Array, " tasks"]
    info: LossInfo


def modo(
    num_tasks: int,
    *,
    gamma: float | jax.Array = 0.1,
    rho: float | jax.Array = 0.1,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The shortest convex combination, with weights learned from two other batches.

    .. math:: u = \sum_t \lambda_t g_t, \qquad \lambda \leftarrow \Pi_\Delta\big(\lambda
       - \gamma (J_1 J_2^\top + \rho I) \lambda\big)

    The weights of `mgda` follow the noise of the batch that they are computed on. The
    product of two *independent* samples is right on average, and one small step a batch
    averages it. Use it where batches are small and the theory's guarantee matters; it
    costs three batches a step, and two T backward passes more. It is not free of scale:
    ``gamma`` times the squared length of a gradient should be around 0.1 or less.

    Args:
      num_tasks: T.
      gamma: rate of the weights, not negative. 0.1 in the authors' code.
      rho: pull towards equal weights, not negative. 0.1 there.
      scale: ``"paper"`` (weights sum to 1) or ``"norm"``; see `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which inner products are summed.

    Returns:
      a `Combiner`; its ``update`` needs ``other_task_grads=(first, second)``: the task
      gradients, stacked or lazy, of two other batches at the same parameters. (One tree
      twice is allowed, and gives the biased weights of one batch.) Lazy trees are
      materialised. **Memory**: three times T gradients in a step; the state is small,
      and ``task_weights`` are in it. A task is absent in all three batches or in none;
      `skip_nonfinite_tasks` looks at the first alone.

    Raises:
      TypeError: at trace time, when ``other_task_grads`` is missing or no pair.
      ValueError: when one of its trees does not fit the parameters, or an argument is
        concrete and out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.modo(num_tasks=2, rho=0.0)
      >>> one = {"w": jnp.array([[4.0, 0.0], [0.0, 1.0]])}
      >>> two = {"w": jnp.array([[1.0, 0.0], [0.0, 2.0]])}
      >>> updates, state = tx.update(
      ...     one, tx.init({"w": jnp.zeros(2)}), other_task_grads=(one, two)
      ... )
      >>> [f"{x:.2f}" for x in updates["w"]]  # 1/2 - (0.2, 0.1), projected: 0.45, 0.55
      ['1.80', '0.55']

    References:
      Chen, Fernando, Ying & Chen, `Three-Way Trade-Off in Multi-Objective Learning:
      Optimization, Generalization and Conflict-Avoidance
      <https://arxiv.org/abs/2305.20057>`_, NeurIPS 2023.

    Differs from the authors' experiments, which combine the sum of the two batches:
    here a third is combined, as in LibMTL.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("gamma", gamma)
    check_nonnegative("rho", rho)

    def init(params: Params, num_tasks: int) -> ModoState:
        dtype = state_dtype(params)
        return ModoState(
            jnp.ones((num_tasks,), dtype), LossInfo(jnp.zeros((num_tasks,), dtype))
        )

    def update(
        rows: TaskGradients,
        state: ModoState,
        params: Params | None,
        *,
        task_mask: TaskMask,
        other_task_grads: Any = None,
        **extra: Any,
    ) -> tuple[Updates, ModoState]:
        del params, extra
        dtype = state.shares.dtype
        cross = read_cross_gramian(
            "modo", other_task_grads, rows, task_mask, dtype, axis_name
        )
        shares = present_shares(state.shares, task_mask)
        slope = jnp.matmul(cross, shares, precision=HIGHEST)
        slope = slope + jnp.asarray(rho, dtype) * shares
        point = shares - jnp.asarray(gamma, dtype) * slope
        shares = simplex_projection(point, task_mask)
        kept = keep_shares(state.shares, shares, task_mask)
        return weighted_sum(shares, rows), ModoState(kept, LossInfo(shares))

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
