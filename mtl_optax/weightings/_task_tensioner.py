"""Task Tensioner: tension from convergence behaviour moves the central direction.

Nakamura, Grassi & Wolf 2022 (arXiv:2204.06698); equations as restated by Gama & Grassi
2025 (arXiv:2505.10347, Proposition 5). With d the central direction of `edm`, L_t the
loss and S_t the sum of the last `window` gradient norms of task t:

    p_t = S_t(k) / S_t(k-1) + log10(L_t)
    c_t = alpha / (1 + exp(-e p_t + e)) + 1 - alpha
    v   = d + sum_t c_t (g_t - d) / |g_t - d|
    for t = 1..T, if g_t . v < 0:   v <- |g_t|^2 / (|g_t|^2 - g_t . v)
                                         * (v - (g_t . v / |g_t|^2) g_t)
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_choice, check_count, check_nonnegative
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType, Gramian, Losses, TaskMask, Weighting, Weights
from mtl_optax.solvers import central_direction, centred_rows

Tension: TypeAlias = Literal["absolute", "relative"]


class TaskTensionerInfo(NamedTuple):
    """What to look at after a step.

    Attributes:
      tension: c_t, the factor of each task's tension; 0 where none acted.
      solver_residual: relative KKT residual of the central direction.
    """

    tension: Float[Array, " tasks"]
    solver_residual: Float[Array, ""]


class TaskTensionerState(NamedTuple):
    """Convergence history, counted per task: absent tasks do not advance.

    Attributes:
      gradient_norms: ring of the last gradient norms; the entry of a task's k-th step
        stands at ``(k - 1) % window``.
      previous_sum: sum of the ring after a task's previous step.
      steps_seen: number of steps in which the task took part.
      info: what a person looks at.
    """

    gradient_norms: Float[Array, "tasks window"]
    previous_sum: Float[Array, " tasks"]
    steps_seen: Int[Array, " tasks"]
    info: TaskTensionerInfo


def _remember(
    state: TaskTensionerState, norms: Array, active: TaskMask
) -> tuple[Array, Array, Array]:
    """Pushes this step's norms; returns the ring, its sums and the step counts."""
    window = state.gradient_norms.shape[1]
    slot = jnp.arange(window) == (state.steps_seen % window)[:, None]
    ring = jnp.where(active[:, None] & slot, norms[:, None], state.gradient_norms)
    return ring, jnp.sum(ring, axis=1), state.steps_seen + active.astype(jnp.int32)


def _tension_factor(ratio: Array, losses: Losses, alpha: Array) -> Array:
    progress = ratio + jnp.log10(losses)
    factor = alpha * jax.nn.sigmoid(math.e * (progress - 1)) + (1 - alpha)
    # log10 of a negative loss is NaN, and so is the factor: no tension.
    return jnp.where(factor > 0, factor, jnp.zeros((), factor.dtype))


def _check_directions(coefficients: Array, gramian: Gramian, active: TaskMask) -> Array:
    """Moves v, task by task, to where the segment from g_t to v stops conflicting.

    With ``f = |g|^2 / (|g|^2 - g.v)`` the moved v is ``f v + (1 - f) g``, so the
    coefficients keep their sum of 1.
    """
    own = jnp.eye(coefficients.shape[0], dtype=coefficients.dtype)

    def check(q: Array, task: Array) -> tuple[Array, None]:
        along = jnp.dot(gramian[task], q, precision=HIGHEST)
        conflicts = active[task] & (along < 0)
        square = gramian[task, task]
        shrink = square / jnp.where(conflicts, square - along, jnp.ones((), q.dtype))
        moved = shrink * q + (1 - shrink) * own[task]
        return jnp.where(conflicts, moved, q), None

    return lax.scan(check, coefficients, jnp.arange(coefficients.shape[0]))[0]


def task_tensioner(
    num_tasks: int,
    alpha: float | Array = 0.3,
    window: int = 10,
    *,
    tension: Tension = "absolute",
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Moves the central direction towards tasks that converge slowly.

    .. math:: v = d + \sum_t c_t \frac{g_t - d}{\|g_t - d\|}, \qquad
       c_t = \frac{\alpha}{1 + e^{-e (p_t - 1)}} + 1 - \alpha, \qquad
       p_t = \frac{S_t(k)}{S_t(k-1)} + \log_{10} L_t

    d is the central direction of `edm`, :math:`S_t` the sum of the last `window`
    gradient norms of task t. A task whose loss is large, or whose gradients grow, pulls
    with a tension up to 1; one that has converged with :math:`1 - \alpha`. Afterwards v
    is moved, task by task, so that it does not point against that task's gradient.

    Use it for a few tasks that converge at different speeds, with losses of order 1:
    it reads the decimal logarithm of each loss. The first `window` steps give d, since
    there is no history. For three or more tasks one pass of the check does not rule out
    conflict, so non-conflicting is *not* promised (`edm` and `mgda` promise it).

    The published tension has an absolute length (at most T, whatever the gradients), so
    it vanishes beside gradients much longer than 1 and dominates much shorter ones;
    ``tension="relative"`` multiplies it by the length of d.

    Args:
      num_tasks: T.
      alpha: sensitivity of the tension, meant to be in [0, 1]; 0 gives every task the
        same tension (for two tasks: exactly `edm`). Above 1 the factor is cut off at 0,
        as in the authors' code. Default: the authors' code.
      window: length of the history, in steps. Default: the authors' code.
      tension: ``"absolute"`` (published) or ``"relative"``.
      scale: see `from_weighting`. The weights sum to 1, and may be negative.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner` whose update needs the losses: a lazy tree brings them along, beside
      stacked gradients pass ``losses=``. The state holds ``T * (window + 4)`` numbers;
      ``optax.tree_utils.tree_get(state, "tension")`` gives :math:`c_t`.

    Raises:
      TypeError: without losses. ValueError: for a negative alpha or an empty window.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.task_tensioner(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for _ in range(11):
      ...     updates, state = tx.update(g, state, losses=jnp.array([10.0, 1.0]))
      >>> [f"{x:.4f}" for x in updates["w"]]  # d = (0.5, 1.5) for the first ten steps
      ['0.5929', '1.5929']

    References:
      Nakamura, Grassi & Wolf, `Leveraging convergence behavior to balance conflicting
      tasks in multi-task learning <https://arxiv.org/abs/2204.06698>`_, 2022; Gama &
      Grassi, `Uniform Loss vs. Specialized Optimization
      <https://arxiv.org/abs/2505.10347>`_, 2025.

    Differs from the authors' code: the central direction is exact (theirs stops
    Frank-Wolfe early: up to 10 % off for five tasks); the direction check is in closed
    form, so it cannot give NaN from an arc cosine beyond 1; a task with an exactly zero
    gradient counts as absent for that step and its history does not move (theirs
    crashes); ``g_t = d`` gives no tension (theirs divides 0 by 0). As in theirs, a loss
    of zero gives ``c = 1 - alpha`` and a negative one ``c = 0``.
    """
    check_nonnegative("alpha", alpha)
    check_count("window", window)
    check_choice("tension", tension, get_args(Tension))

    def init(num_tasks: int, dtype: DType) -> TaskTensionerState:
        return TaskTensionerState(
            gradient_norms=jnp.zeros((num_tasks, window), dtype),
            previous_sum=jnp.zeros((num_tasks,), dtype),
            steps_seen=jnp.zeros((num_tasks,), jnp.int32),
            info=TaskTensionerInfo(
                jnp.zeros((num_tasks,), dtype), jnp.zeros((), dtype)
            ),
        )

    def update(
        gramian: Gramian,
        state: TaskTensionerState,
        *,
        gramian_in_basis: Callable[[Array], Array],
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, TaskTensionerState]:
        del extra
        dtype = gramian.dtype
        one = jnp.ones((), dtype)
        found = central_direction(gramian, gramian_in_basis, task_mask)
        ring, sums, steps = _remember(state, found.norms, found.active)

        known = state.previous_sum > 0
        ratio = jnp.where(known, sums / jnp.where(known, state.previous_sum, one), one)
        pulls = found.active & jnp.all(~found.active | (steps > window))
        factor = _tension_factor(ratio, losses, jnp.asarray(alpha, dtype))
        factor = jnp.where(pulls, factor, jnp.zeros((), dtype))

        apart = found.distances > 0
        strength = jnp.where(apart, factor / jnp.where(apart, found.distances, one), 0)
        if tension == "relative":
            strength = strength * found.length
        rows = centred_rows(found.active, found.weights)
        moved = found.weights + jnp.dot(strength, rows, precision=HIGHEST)
        moved = _check_directions(moved, gramian, pulls)
        return moved, TaskTensionerState(
            ring,
            jnp.where(found.active, sums, state.previous_sum),
            steps,
            TaskTensionerInfo(factor, found.residual),
        )

    return from_weighting(
        Weighting(init, update, frozenset({"gramian", "gramian_in_basis", "losses"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
