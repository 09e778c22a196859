"""DB-MTL: dual balancing, of losses by their logarithm and of gradients by length.

Lin et al. 2023, "Dual-Balancing for Multi-Task Learning", arXiv:2308.12029 (as in the
authors' code). For every task t at its step k, with beta_k = beta / k^sigma:

    m_t <- beta_k m_t + (1 - beta_k) g_t / (L_t + 1e-8)
    u = max_s |m_s| * sum_t m_t / |m_t|,     of m_t / (1 - prod_j beta_j)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._moments import (
    column,
    inverse_or_zero,
    keep_absent,
    like,
    row_norms,
    sound_rows,
    wide_rows,
    zero_rows,
)
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import scale_tree, state_dtype, weighted_sum
from mtl_optax._types import (
    Aggregator,
    Losses,
    Params,
    TaskGradients,
    TaskMask,
    Updates,
)

_EPS = 1e-8


class DbState(NamedTuple):
    """State of `db_mtl`.

    Attributes:
      log_moments: m, a running mean a task of the gradient of its log loss.
      unfilled: the part of each running mean that is still its start, zero.
      steps_seen: the number of steps each task was present.
    """

    log_moments: TaskGradients
    unfilled: Float[Array, " tasks"]
    steps_seen: Int[Array, " tasks"]


def _at_largest_length(moments: TaskGradients, axis_name: Any) -> Updates:
    """The sum of rows, each as long as the longest; a row of zeros stays one."""
    lengths = row_norms(moments, axis_name)
    inverse = inverse_or_zero(lengths)
    # In two steps: their product may leave float32.
    directions = jax.tree.map(lambda m: m * column(inverse, m), moments)
    summed = weighted_sum(jnp.ones_like(inverse), directions)
    return scale_tree(jnp.max(lengths), summed)


def db_mtl(
    num_tasks: int,
    *,
    beta: float | jax.Array = 0.9,
    beta_sigma: float | jax.Array = 0.0,
    bias_correction: bool = True,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The sum of all directions, of smoothed gradients of the logarithms of losses.

    .. math:: u = \max_s \|\hat m_s\| \sum_t \frac{\hat m_t}{\|\hat m_t\|}, \qquad
       m_t \leftarrow \beta m_t + (1 - \beta) \nabla \log L_t

    The logarithm takes the unit of a loss away, the rescaling what is left of
    differences in length: all tasks count alike at every step. Use it for positive
    losses of different units. It does not look at conflict. As the mean of gradients is
    a momentum already, an optimiser behind it needs none. A loss near zero makes a long
    gradient, and with it a long update.

    Args:
      num_tasks: T.
      beta: share that the running mean keeps, below 1; 0 for none. 0.9 is the default
        of the authors' code.
      beta_sigma: at a task's step k, its beta is divided by ``k ** beta_sigma``. 0 is
        the default of the authors' code.
      bias_correction: divide by the part of the running mean that is filled. False is
        the authors' code: the first update is shorter, at ``beta=0.9`` ten times.
      scale: ``"paper"`` (T times the longest) or ``"norm"``; see `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which lengths are summed.

    Returns:
      a `Combiner`; ``update`` needs losses (a lazy tree knows its own). **Memory**: T
      copies of the parameters, in float32 at least, and T gradients a step: a lazy tree
      is materialised, T backward passes. Absent tasks' means wait. A loss below zero,
      which has no logarithm, counts by its size; a loss or gradient that is not finite
      is not remembered.

    Raises:
      TypeError: at trace time, when losses are missing.
      ValueError: for ``beta`` outside [0, 1), or a negative ``beta_sigma``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.db_mtl(num_tasks=2)
      >>> g = {"w": jnp.array([[6.0, 8.0], [0.0, 50.0]])}
      >>> losses = jnp.array([0.1, 10.0])  # lengths 100 and 5
      >>> updates, state = tx.update(g, tx.init({"w": jnp.zeros(2)}), losses=losses)
      >>> [f"{x:.1f}" for x in updates["w"]]
      ['60.0', '180.0']

    References:
      Lin et al., `Dual-Balancing for Multi-Task Learning
      <https://arxiv.org/abs/2308.12029>`_, 2023.

    Differs from the authors' code: the correction above, and no 1e-8 is added to the
    length of a running mean. There heads are trained on the log losses too; under
    `shared_only` they get the gradients of the losses themselves.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("beta", beta, below=1)
    check_nonnegative("beta_sigma", beta_sigma)

    def init(params: Params, num_tasks: int) -> DbState:
        return DbState(
            zero_rows(params, num_tasks),
            jnp.ones((num_tasks,), state_dtype(params)),
            jnp.zeros((num_tasks,), jnp.int32),
        )

    def update(
        rows: TaskGradients,
        state: DbState,
        params: Params | None,
        *,
        losses: Losses | None,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Updates, DbState]:
        del params, extra
        if losses is None:
            raise TypeError(
                "db_mtl needs the task losses: call tx.update(task_grads, state, "
                f"params, losses=losses) with losses of shape ({num_tasks},), or pass "
                "the lazy tree of task_jacobian, which knows them."
            )
        dtype = state.unfilled.dtype
        sizes = jnp.abs(jax.lax.stop_gradient(losses).astype(dtype)) + _EPS
        seen = state.steps_seen + 1
        decay = seen.astype(dtype) ** -jnp.asarray(beta_sigma, dtype)
        kept = jnp.asarray(beta, dtype) * decay

        def average(m: Array, g: Array) -> Array:
            log_gradient = g / column(sizes, m)
            return log_gradient + column(kept, m) * (m - log_gradient)

        wide = wide_rows(rows, state.log_moments)
        moments = jax.tree.map(average, state.log_moments, wide)
        unfilled = state.unfilled * kept
        filled = 1 - unfilled if bias_correction else jnp.ones_like(unfilled)
        present = keep_absent(task_mask, moments, jax.tree.map(jnp.zeros_like, moments))
        corrected = jax.tree.map(lambda m: m / column(filled, m), present)
        updates = like(_at_largest_length(corrected, axis_name), rows)
        known = sound_rows(wide, task_mask, axis_name) & jnp.isfinite(sizes)
        new = keep_absent(known, DbState(moments, unfilled, seen), state)
        return updates, new

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
