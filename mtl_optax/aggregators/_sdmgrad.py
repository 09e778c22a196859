"""SDMGrad: near a preferred direction, the best for all, from independent samples.

Xiao, Ban & Ji 2023, NeurIPS, "Direction-oriented Multi-objective Learning: Simple and
Provable Stochastic Algorithms", arXiv:2305.18409. With the task gradients J, J_1 and
J_2 of three batches, the projection P on the simplex and a preference w0:

    A = J_1 J_2^T / s^2,     s = mean_t sqrt(max((J_1 J_2^T)_tt, 0))
    S times:   z <- mu z + A (w + lam w0),     w <- P(w - eta z)
    u = J^T (w + lam w0) / (1 + lam)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_count, check_nonnegative, check_num_tasks
from mtl_optax._moments import count_present, keep_shares, present_shares
from mtl_optax._other_batches import read_cross_gramian
from mtl_optax._solved import read_per_task, shares_of
from mtl_optax._transform import Combiner, LengthScale, LossInfo, from_aggregator
from mtl_optax._tree import HIGHEST, state_dtype, weighted_sum
from mtl_optax._types import (
    Aggregator,
    Params,
    TaskGradients,
    TaskMask,
    Updates,
    Weights,
)
from mtl_optax.solvers import simplex_projection

# Where samples nearly oppose each other on the diagonal, the rest of A has no bound.
_LARGEST = 1e15


class SdmgradState(NamedTuple):
    """State of `sdmgrad`.

    Attributes:
      shares: w, in units of an equal share.
      info: what a person looks at; its weights are ``(w + lam w0) / (1 + lam)``.
    """

    shares: Float[Array, " tasks"]
    info: LossInfo


def _free_of_scale(
    cross: Float[Array, "tasks tasks"], task_mask: TaskMask
) -> Float[Array, "tasks tasks"]:
    """``A``: lengths of gradients are around one."""
    lengths = jnp.sqrt(jnp.maximum(jnp.diag(cross), 0))
    mean = jnp.sum(lengths) / count_present(task_mask, cross.dtype)
    safe = jnp.where(mean > 0, mean, 1)
    scaled = jnp.clip(cross / safe / safe, -_LARGEST, _LARGEST)
    return jnp.where(mean > 0, scaled, 0)


def sdmgrad(
    num_tasks: int,
    *,
    lam: float | jax.Array = 0.3,
    preference: Sequence[float] | Array | None = None,
    step_size: float | jax.Array = 1.0,
    momentum: float | jax.Array = 0.5,
    num_steps: int = 20,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Between a preferred direction and the shortest convex combination.

    .. math:: u = \frac{1}{1 + \lambda} \sum_t (w_t + \lambda \tilde w_t) g_t, \qquad
       w \approx \arg\min_{w \in \Delta} (w + \lambda \tilde w)^\top J_1 J_2^\top
       (w + \lambda \tilde w)

    At ``lam=0`` it is `mgda`, for large ones the preferred combination, by default the
    mean; so it lies where `cagrad` does. The inner product is taken of two
    *independent* samples, since that of one batch with itself adds the noise. (The
    division by ``s^2``, of the same samples, leaves a bias where noise is large; `modo`
    has none.) Use it where batches are small; it costs three batches a step, and two T
    backward passes more. The weights do not see a scale that all gradients share.

    Args:
      num_tasks: T.
      lam: lambda, not negative; 0.3 in the authors' experiments.
      preference: w0, one number a task, by default all equal; present tasks' are made
        to sum to 1.
      step_size: eta of the steps on w, not negative. 1 here; see below.
      momentum: mu of these steps, in [0, 1); 0.5 as the authors'.
      num_steps: S, their number each time, from the w of the time before; 20 as the
        authors'.
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
      >>> tx = mtl.sdmgrad(num_tasks=2, lam=1.0)
      >>> g = {"w": jnp.array([[1.0, 0.0], [0.0, 3.0]])}
      >>> updates, state = tx.update(
      ...     g, tx.init({"w": jnp.zeros(2)}), other_task_grads=(g, g)
      ... )
      >>> state.aggregator.info.task_weights  # w = (1, 0): the short gradient's
      Array([0.75, 0.25], dtype=float32)
      >>> updates["w"]
      Array([0.75, 0.75], dtype=float32)

    References:
      Xiao, Ban & Ji, `Direction-oriented Multi-objective Learning: Simple and Provable
      Stochastic Algorithms <https://arxiv.org/abs/2305.18409>`_, NeurIPS 2023.

    Differs from the authors' code: with their step size, 10 (5 in LibMTL), w jumps from
    corner to corner and ends where rounding takes it. With 1 the steps settle for a few
    tasks of like length; in general ``eta`` times the largest eigenvalue of A should be
    below ``2 (1 + momentum)``: for dozens of tasks, or lengths far apart, take a
    smaller `step_size` and more `num_steps`. And no 1e-8 is added to ``s^2``: gradients
    may be short. Where no task's two samples agree (s = 0), w stays.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("lam", lam)
    check_nonnegative("step_size", step_size)
    check_nonnegative("momentum", momentum, below=1)
    check_count("num_steps", num_steps)
    preferred = read_per_task("preference", preference, num_tasks)

    def init(params: Params, num_tasks: int) -> SdmgradState:
        dtype = state_dtype(params)
        return SdmgradState(
            jnp.ones((num_tasks,), dtype), LossInfo(jnp.zeros((num_tasks,), dtype))
        )

    def solve(
        matrix: Float[Array, "tasks tasks"], w: Weights, w0: Weights, mask: TaskMask
    ) -> Weights:
        dtype = matrix.dtype
        pull = jnp.asarray(lam, dtype) * w0
        rate, inertia = jnp.asarray(step_size, dtype), jnp.asarray(momentum, dtype)

        def step(_: Any, at: tuple[Weights, Array]) -> tuple[Weights, Array]:
            w, z = at
            z = inertia * z + jnp.matmul(matrix, w + pull, precision=HIGHEST)
            return simplex_projection(w - rate * z, mask), z

        return lax.fori_loop(0, num_steps, step, (w, jnp.zeros_like(w)))[0]

    def update(
        rows: TaskGradients,
        state: SdmgradState,
        params: Params | None,
        *,
        task_mask: TaskMask,
        other_task_grads: Any = None,
        **extra: Any,
    ) -> tuple[Updates, SdmgradState]:
        del params, extra
        dtype = state.shares.dtype
        cross = read_cross_gramian(
            "sdmgrad", other_task_grads, rows, task_mask, dtype, axis_name
        )
        w0 = present_shares(shares_of(preferred, task_mask, dtype), task_mask)
        w = present_shares(state.shares, task_mask)
        w = solve(_free_of_scale(cross, task_mask), w, w0, task_mask)
        pull = jnp.asarray(lam, dtype)
        weights = (w + pull * w0) / (1 + pull)
        kept = keep_shares(state.shares, w, task_mask)
        return weighted_sum(weights, rows), SdmgradState(kept, LossInfo(weights))

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
