"""The central direction: equally far, in angle, from the task gradients it leans on.

Equiangular Direction Method (Katrutsa et al. 2020, arXiv:2007.06937), with n_t the
length and u_t = g_t / n_t the direction of a task gradient:

    w = argmin_{w in simplex} || sum_t w_t u_t ||^2
    d = gamma * sum_t w_t u_t,   gamma = 1 / sum_t (w_t / n_t)
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_optax._cond import anew_if
from mtl_optax._tree import HIGHEST
from mtl_optax._types import Gramian, TaskMask, Weights
from mtl_optax.solvers._simplex_qp import simplex_qp
from mtl_optax.solvers._unit_rows import unit_rows

# Above this cosine between all pairs, a Gramian of the raw gradients has lost two of
# float32's seven digits in the differences, and they are taken anew.
_NEARLY_PARALLEL = 0.99


class CentralDirection(NamedTuple):
    """The central direction, as coefficients of the raw task gradients.

    Attributes:
      weights: ``d = sum_t weights[t] * g_t``; they sum to 1 over the active tasks.
      active: tasks that are present and have a nonzero gradient.
      norms: lengths of the task gradients, 0 where not active.
      distances: ``|g_t - d|``; exactly 0 where it is not above rounding.
      length: ``|d|``.
      residual: relative KKT residual of the minimum-norm problem.
    """

    weights: Weights
    active: TaskMask
    norms: Float[Array, " tasks"]
    distances: Float[Array, " tasks"]
    length: Float[Array, ""]
    residual: Float[Array, ""]


def central_direction(
    gramian: Gramian,
    gramian_in_basis: Callable[[Array], Array],
    task_mask: Bool[Array, " tasks"],
) -> CentralDirection:
    r"""Solves for the central direction without losing small differences.

    For unit vectors the shortest convex combination is the centre of the smallest ball
    around them, which depends on their differences alone. So everything is written in
    the basis {mean of the u_t, u_t - mean}. Where all gradients are nearly parallel,
    its Gramian is taken from the gradients themselves, and only then, since
    `gramian_in_basis` may cost as much as the first Gramian; elsewhere it follows from
    `gramian`.

    Args:
      gramian: ``[T, T]`` of the raw task gradients.
      gramian_in_basis: ``basis [K, T] -> [K, K]``, exact for differences.
      task_mask: ``[T]``; absent tasks and zero gradients do not take part.

    Returns:
      a `CentralDirection`; all zeros where no task is active.

    Example:
      >>> import jax.numpy as jnp
      >>> J = jnp.array([[3.0, 4.0], [0.0, 1.0]])
      >>> gram = lambda basis: basis @ J @ J.T @ basis.T
      >>> found = central_direction(gram(jnp.eye(2)), gram, jnp.ones(2, bool))
      >>> found.weights @ J
      Array([0.5, 1.5], dtype=float32)
    """
    num_tasks, dtype = gramian.shape[0], gramian.dtype
    zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
    cosines, norms, inverse, active = unit_rows(gramian, task_mask)
    count = jnp.maximum(jnp.sum(active.astype(dtype)), one)
    pairs = active[:, None] & active[None, :]

    share = active.astype(dtype) / count
    centred = jnp.where(pairs, jnp.eye(num_tasks, dtype=dtype) - share, zero)
    basis = jnp.concatenate([share[None], centred])
    near = jnp.all(jnp.where(pairs, cosines, one) > _NEARLY_PARALLEL)

    extended = anew_if(
        near & (count > 1),
        gramian_in_basis,
        basis * inverse,
        _quadratic(basis, cosines),
    )
    spread = extended[1:, 1:]
    solution, solved = simplex_qp(spread, -jnp.diag(spread) / 2, task_mask=active)
    raw = solution * inverse
    total = jnp.sum(raw)
    weights = jnp.where(total > 0, raw / jnp.where(total > 0, total, one), zero)
    # A norm that overflowed has an inverse of zero and would drop out unseen.
    weights = jnp.where(jnp.all(jnp.isfinite(norms)), weights, jnp.nan)

    largest = jnp.max(norms)
    relative = norms / jnp.where(largest > 0, largest, one)
    offsets = centred_rows(active, weights) * relative
    coefficients = jnp.concatenate([jnp.sum(offsets, 1, keepdims=True), offsets], 1)
    distances = jnp.sqrt(_own_square(coefficients, extended))
    along = (weights * relative)[None]
    central = jnp.concatenate([jnp.sum(along, 1, keepdims=True), along], 1)
    length = jnp.sqrt(_own_square(central, extended))[0]
    rounding = 32 * jnp.finfo(dtype).eps * jnp.maximum(relative, length)
    distances = jnp.where(active & (distances > rounding), distances, zero)
    return CentralDirection(
        weights, active, norms, largest * distances, largest * length, solved.residual
    )


def centred_rows(active: TaskMask, weights: Weights) -> Float[Array, "tasks tasks"]:
    """Coefficients of the differences ``g_t - d`` from a combination ``d``.

    Args:
      active: ``[T]``; rows of other tasks are zero.
      weights: ``[T]``, the coefficients of d.

    Returns:
      ``[T, T]``; row t holds the coefficients of ``g_t - d``.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import centred_rows
      >>> centred_rows(jnp.ones(2, bool), jnp.array([0.25, 0.75]))
      Array([[ 0.75, -0.75],
             [-0.25,  0.25]], dtype=float32)
    """
    rows = jnp.eye(weights.shape[0], dtype=weights.dtype) - weights
    return jnp.where(active[:, None], rows, jnp.zeros((), weights.dtype))


def _quadratic(rows: Array, gram: Array) -> Array:
    return jnp.matmul(
        jnp.matmul(rows, gram, precision=HIGHEST), rows.T, precision=HIGHEST
    )


def _own_square(rows: Array, gram: Array) -> Array:
    """``rows[i] @ gram @ rows[i]``, not below zero."""
    squares = jnp.sum(jnp.matmul(rows, gram, precision=HIGHEST) * rows, axis=1)
    return jnp.maximum(squares, jnp.zeros((), gram.dtype))
