"""A step from the mean gradient towards what the worst-off task needs."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._types import Gramian, Scalar, TaskMask, Weights
from mtl_optax.solvers._simplex_norm import simplex_norm
from mtl_optax.solvers._simplex_qp import SolverInfo


def averse_weights(
    gramian: Gramian,
    shares: Float[Array, " tasks"],
    c: Scalar,
    task_mask: TaskMask,
    *,
    linear_factor: Scalar | float = 1.0,
    norm_factor: Scalar | float = 1.0,
) -> tuple[Weights, SolverInfo]:
    r"""Weights of the conflict-averse direction around a reference combination.

    .. math::
        u = g_0 + c \|g_0\| \frac{g_w}{\|g_w\|}, \qquad
        \arg\min_{w \in \Delta} \; a \langle g_w, g_0 \rangle + b \, c \|g_0\| \|g_w\|

    Args:
      gramian: `[T, T]`.
      shares: `[T]`, the weights of the reference `g_0`.
      c: the radius, relative to `|g_0|`.
      task_mask: `[T]`; absent tasks, and those whose gradient is zero, take no part in
        the minimum (a zero gradient is nobody's worst).
      linear_factor: a.
      norm_factor: b.

    Returns:
      `(weights, info)`; where `g_w` cannot be told from zero, the shares themselves.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import averse_weights
      >>> rows = jnp.array([[2.0, 0.0], [0.0, 2.0]])
      >>> weights, _ = averse_weights(
      ...     rows @ rows.T, jnp.full(2, 0.5), jnp.float32(1.0), jnp.ones(2, bool)
      ... )
      >>> [f"{x:.3f}" for x in weights]
      ['1.000', '1.000']

    References:
      Liu et al., Conflict-averse gradient descent for multi-task learning, 2021
      (https://arxiv.org/abs/2110.14048).
    """
    # Only ratios count, and squares of sums would under- or overflow sooner.
    largest = jnp.max(jnp.where(task_mask, jnp.diag(gramian), 0))
    gramian = gramian / jnp.where(largest > 0, largest, 1)
    along = jnp.matmul(gramian, shares, precision=lax.Precision.HIGHEST)
    radius = c * jnp.sqrt(jnp.maximum(jnp.sum(shares * along), 0))
    active = task_mask & ~(jnp.diag(gramian) == 0)
    w, length, info = simplex_norm(
        gramian, linear_factor * along, norm_factor * radius, task_mask=active
    )
    step = jnp.where(length > 0, radius / jnp.where(length > 0, length, 1), 0)
    return shares + step * w, info
