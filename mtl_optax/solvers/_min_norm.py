"""The point of smallest norm in the convex hull of the task gradients."""

import jax.numpy as jnp

from mtl_optax._types import Gramian, TaskMask, Weights
from mtl_optax.solvers._simplex_qp import SolverInfo, simplex_qp


def min_norm_point(
    gramian: Gramian,
    *,
    task_mask: TaskMask | None = None,
) -> tuple[Weights, SolverInfo]:
    r"""Find the point of smallest norm in the convex hull of the task gradients.

    .. math::
        \min_w \; w^\top G w \quad \text{s.t.} \quad \sum_t w_t = 1, \; w \ge 0,
        \qquad G = J J^\top

    The combination `J^T w` is zero where a convex combination of the gradients vanishes
    (a Pareto-stationary point), and otherwise a direction along which every loss falls
    at the same rate or faster.

    The excess of `w^T G w` over its minimum, relative to the squared norm of the
    smallest row, is of the order `eps * mass**2`, where `eps` is the rounding of the
    Gramian's dtype and `mass = sum_t w_t norm_t / min_t norm_t`. `mass` is near 1
    unless large rows cancel each other while another row is tiny; how well they cancel
    is then not to be read from a rounded Gramian, by any solver.

    Args:
      gramian: `[T, T]`, inner products of the task gradients; float32 or float64,
        which is also the dtype of the computation.
      task_mask: `[T]`, true where a task is present; all by default. An absent
        task's row and column are ignored, whatever they hold, and its weight is
        zero.

    Returns:
      `(weights, info)`: weights `[T]` and a `SolverInfo`. A zero row gets all the
      weight (several share it evenly). All weights are zero if no task is present,
      and NaN if a present entry is not finite.

    Raises:
      TypeError: at trace time, if the matrix is neither float32 nor float64.
      ValueError: at trace time, if the shapes do not agree.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import min_norm_point
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> weights, info = min_norm_point(jacobian @ jacobian.T)
      >>> print(weights, weights @ jacobian)
      [0.8 0.2] [0.8 0.4]

    References:
      Wolfe, Finding the nearest point in a polytope, Mathematical Programming 11,
      1976; Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization, C. R. Acad. Sci. Paris 350, 2012
      (https://doi.org/10.1016/j.crma.2012.03.014).
    """
    linear = jnp.zeros(gramian.shape[:1], gramian.dtype)
    return simplex_qp(gramian, linear, task_mask=task_mask)
