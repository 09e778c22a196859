"""EDM: the equiangular direction method (central direction).

A convex combination of the task gradients that makes the same angle with all of those
it leans on (Katrutsa et al. 2020, arXiv:2007.06937).

    u_t = g_t / |g_t|
    w   = argmin_{w in simplex} || sum_t w_t u_t ||^2
    d   = gamma * sum_t w_t u_t,   gamma = 1 / sum_t (w_t / |g_t|)
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array

from mtl_optax._solved import SolvedState, init_solved, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import central_direction


def edm(num_tasks: int, *, scale: Scale = "paper", axis_name: Any = None) -> Combiner:
    r"""The central direction: equal angles with the task gradients.

    .. math:: d = \gamma \sum_t w_t \frac{g_t}{\|g_t\|}, \qquad
       w = \arg\min_{w \in \Delta_T} \Big\| \sum_t w_t \frac{g_t}{\|g_t\|} \Big\|^2,
       \qquad \gamma = \Big( \sum_t \frac{w_t}{\|g_t\|} \Big)^{-1}

    Its direction does not depend on how long the gradients are, so no task dominates
    by the unit of its loss; no task's loss rises along it, to first order. Use it for
    tasks of different scale. It slows down where gradients oppose each other, and it
    knows nothing of how far each task has converged: `task_tensioner` adds that. For
    two tasks ``d = (|g_b| g_a + |g_a| g_b) / (|g_a| + |g_b|)``.

    Args:
      num_tasks: T.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same, since
        d is a convex combination of the raw gradients.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Losses are not needed. A task whose gradient is exactly zero (in
      float32: shorter than about 1e-17) counts as absent for that step. Parallel
      gradients give the mean of theirs (harmonic in length), exactly opposite ones
      zero.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.edm(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"]
      Array([0.5, 1.5], dtype=float32)

    References:
      Katrutsa et al., `Follow the bisector: a simple method for multi-objective
      optimization <https://arxiv.org/abs/2007.06937>`_, 2020.

    Differs from the authors' code: the minimum is exact (theirs stops Frank-Wolfe
    early), a zero gradient does not crash, and two parallel gradients count alike.
    """

    def update(
        gramian: Gramian,
        state: SolvedState,
        *,
        gramian_in_basis: Callable[[Array], Array],
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        found = central_direction(gramian, gramian_in_basis, task_mask)
        return found.weights, solved(found.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset({"gramian", "gramian_in_basis"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
