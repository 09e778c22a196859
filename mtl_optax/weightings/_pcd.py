"""PCD: priority-constrained descent.

The first task's gradient, changed as little as keeps every other task improving (Varam
& AlHajri 2026, arXiv:2606.29521).

    g~_t = g_t / sqrt(v_t + eps),   v_t: bias-corrected running mean of |g_t|^2
    d = argmin_d |d - g~_1|^2   s.t.  <g~_t, d> >= tau |g~_t|^2   for t = 2, ..., T
    u = |g_1| d / |d|
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType, Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import dual_cone_projection

# A constraint missed by more than this share of the lengths cannot be met at all.
_INFEASIBLE = 1e-3


class PcdInfo(NamedTuple):
    """What to look at.

    Attributes:
      solver_residual: relative KKT residual of the projection.
      feasible: 1 where some direction improves all other tasks enough, else 0 (and the
        update is the first task's gradient).
    """

    solver_residual: Float[Array, ""]
    feasible: Float[Array, ""]


class PcdState(NamedTuple):
    """Running means, and what to look at.

    Attributes:
      squares: ``[T]``, running means of the squared lengths, before bias correction.
      remaining: ``[T]``, ``beta`` to the number of steps a task was present.
      info: a `PcdInfo`.
    """

    squares: Float[Array, " tasks"]
    remaining: Float[Array, " tasks"]
    info: PcdInfo


def pcd(
    num_tasks: int,
    *,
    tau: float | jax.Array = 0.02,
    beta: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The first task's gradient, as far as all other tasks keep improving.

    .. math:: u = \|g_1\| \frac{d}{\|d\|}, \qquad
       d = \arg\min_d \|d - \tilde g_1\|^2 \;\; \text{s.t.} \;\;
       \langle \tilde g_t, d \rangle \ge \tau \|\tilde g_t\|^2, \quad t = 2 \dots T

    with :math:`\tilde g_t` the gradients at about length one. For problems with one
    main task and auxiliary ones that must not suffer. **The order of tasks matters: the
    first one leads** (the first that is present; in a dict of losses that is the first
    key in sorted order: return a tuple of losses to choose). It does not balance: while
    the others agree, it is plain training on the first task.

    Args:
      num_tasks: T.
      tau: how much the others have to improve, in [0, 1]; may be traced. 0.02 in the
        authors' code; 0: they must not get worse.
      beta: of the running mean of squared lengths, in [0, 1); may be traced. 0.999 in
        the authors' code; 0 gives every gradient length one.
      eps: added to squared lengths, positive or zero; may be traced. 1e-8 in the
        authors' code, absolute: gradients shorter than 1e-4 count as shorter than one.
      scale: see `from_weighting`; under ``"paper"`` the update is as long as the first
        task's gradient.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; its state shows ``solver_residual`` and ``feasible``. Losses are not
      needed. If the first gradient is zero, so is the update; another zero gradient is
      no constraint. Parallel tasks are one constraint. Where no direction serves all
      others (T > 2), ``feasible`` is 0 and the update is the first task's gradient. The
      constraints come first: where another gradient is nearly opposite to the first
      (cosine below -0.99 at tau = 0.02, sooner for larger tau), the update *raises the
      first loss*, at full length; with tau = 0 it does not.

    Raises:
      ValueError: for concrete hyper-parameters out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.pcd(num_tasks=2, tau=0.0)
      >>> g = {"w": jnp.array([[1.0, 1.0], [-3.0, 0.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(2)}))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['-0.000', '1.414']

    References:
      Varam & AlHajri, `Not All Objectives Are Born Equal: Priority-Constrained Descent
      for Hierarchical Multi-Objective Optimization
      <https://arxiv.org/abs/2606.29521>`_, TMLR 2026.

    Differs from the authors' code: in nothing known but rounding (TorchJD's is followed
    in taking eps inside the root).
    """
    check_num_tasks(num_tasks)
    check_nonnegative("tau", tau, at_most=1)
    check_nonnegative("beta", beta, below=1)
    check_nonnegative("eps", eps)

    def init(num_tasks: int, dtype: DType) -> PcdState:
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        return PcdState(
            jnp.zeros((num_tasks,), dtype),
            jnp.ones((num_tasks,), dtype),
            PcdInfo(zero, one),
        )

    def update(
        gramian: Gramian, state: PcdState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, PcdState]:
        del extra
        dtype = gramian.dtype
        decay = jnp.asarray(beta, dtype)
        own = jnp.where(task_mask, jnp.diag(gramian), 0)
        # A step that is not finite leaves no trace in the running means.
        seen = task_mask & jnp.all(jnp.isfinite(own))
        squares = decay * state.squares + (1 - decay) * own
        squares = jnp.where(seen, squares, state.squares)
        remaining = jnp.where(seen, decay * state.remaining, state.remaining)
        usual = squares / jnp.maximum(1 - remaining, jnp.finfo(dtype).tiny)
        usual = jnp.sqrt(usual + jnp.asarray(eps, dtype))
        factors = jnp.where(
            task_mask & (usual > 0), 1 / jnp.where(usual > 0, usual, 1), 0
        )

        first = jnp.arange(num_tasks) == jnp.argmax(task_mask)
        scaled = gramian * factors[:, None] * factors[None, :]
        scaled = jnp.where(task_mask[:, None] & task_mask[None, :], scaled, 0)
        asked = jnp.asarray(tau, dtype) * jnp.diag(scaled)
        v, solved = dual_cone_projection(
            scaled,
            first.astype(dtype),
            margins=jnp.where(first, -jnp.inf, asked),
            task_mask=task_mask,
        )
        reached = jnp.matmul(scaled, v, precision=HIGHEST)
        length = jnp.sqrt(jnp.maximum(jnp.sum(v * reached), 0))
        lengths = jnp.sqrt(jnp.maximum(jnp.diag(scaled), 0))
        lead = jnp.sum(jnp.where(first, lengths, 0))
        slack = _INFEASIBLE * lengths * lead
        met = first | (reached >= asked - slack) | ~task_mask
        feasible = jnp.all(met) & (length > _INFEASIBLE * jnp.max(jnp.abs(v) * lengths))
        v = jnp.where(feasible, v, first.astype(dtype))
        length = jnp.where(feasible, length, lead)
        target = jnp.sqrt(jnp.sum(jnp.where(first, own, 0)))
        weights = v * factors * target / jnp.where(length > 0, length, 1)
        info = PcdInfo(solved.residual, feasible.astype(dtype))
        return weights, PcdState(squares, remaining, info)

    return from_weighting(
        Weighting(init, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
