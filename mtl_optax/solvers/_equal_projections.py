"""Directions with given projections on the task directions, by least squares."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._tree import HIGHEST
from mtl_optax._types import Scalar, Weights
from mtl_optax.solvers._graded_eigh import graded_eigh
from mtl_optax.solvers._unit_rows import UnitRows

# Of the sum of the weights' sizes: what the weights are divided by at least.
_SMALLEST_SUM = 1e-2
# Of two rows' lengths, where a choice among dependent rows depends on them.
_LEAST_RATIO = 1e-3


class Projections(NamedTuple):
    """A direction ``d = sum_t y_t g_t / |g_t|``, made for its projections.

    Attributes:
      coefficients: ``[T]``, y; the shortest there is.
      reached: ``[T]``, ``C y``: the projections of d on the task directions.
      square: ``y^T C y``, the squared length of d.
      free: ``[T, T]``, an orthonormal basis of what may be added to y without moving
        d, among zeros.
    """

    coefficients: Float[Array, " tasks"]
    reached: Float[Array, " tasks"]
    square: Scalar
    free: Float[Array, "tasks tasks"]


def equal_projections(rows: UnitRows, wanted: Float[Array, " tasks"]) -> Projections:
    """The direction whose projections on the task directions are as wanted.

    Args:
      rows: unit rows, of which the cosines C count: ``C y = wanted`` is solved, whose
        rank does not depend on the rows' lengths.
      wanted: ``[T]``, the projections; of tasks that are not active, they do not count.

    Returns:
      a `Projections`. Where rows depend on each other and the wanted cannot be had, it
      is met in least squares; what is left of opposite rows is rounding, and zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import equal_projections, unit_rows
      >>> J = jnp.array([[3.0, 0.0], [0.0, 2.0]])
      >>> found = equal_projections(unit_rows(J @ J.T, jnp.ones(2, bool)), jnp.ones(2))
      >>> print(found.coefficients, found.reached, found.square)
      [1. 1.] [1. 1.] 2.0
    """
    size, dtype = rows.cosines.shape[0], rows.cosines.dtype
    active = rows.active.astype(dtype)
    wanted = jnp.where(rows.active, wanted.astype(dtype), 0)
    values, vectors = jnp.linalg.eigh(rows.cosines + jnp.diag(1 - active))
    cutoff = 4 * size * jnp.finfo(dtype).eps
    kept = values > cutoff * jnp.max(values)
    along = jnp.matmul(wanted, vectors, precision=HIGHEST)
    # Of opposite rows it is rounding only, and must not become a direction.
    least = 4 * cutoff * jnp.sqrt(jnp.sum(jnp.square(wanted)))
    kept_along = kept & (jnp.abs(along) > least)
    part = jnp.where(kept_along, along / jnp.where(kept, values, 1), 0)
    met = jnp.where(kept_along, along, 0)
    return Projections(
        coefficients=jnp.matmul(vectors, part, precision=HIGHEST),
        reached=jnp.matmul(vectors, met, precision=HIGHEST),
        square=jnp.sum(part * met),
        free=jnp.where(kept, 0, vectors) * active[:, None],
    )


def impartial_weights(rows: UnitRows) -> Weights:
    """Weights of IMTL-G: equal projections on all task directions, the sum one.

    Args:
      rows: unit rows; of the lengths only the ratios count.

    Returns:
      ``[T]``: ``v / |sum_t v_t|`` where ``G v = n`` in least squares, ``n_t = |g_t|``.
      Where rows depend on each other, v is the shortest. The sum is minus one where it
      would be uphill otherwise; the sum of the sizes is at most a hundred.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import impartial_weights, unit_rows
      >>> J = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> impartial_weights(unit_rows(J @ J.T, jnp.ones(2, bool)))
      Array([0.25, 0.75], dtype=float32)
    """
    found = equal_projections(rows, rows.active)
    y, free = found.coefficients, found.free
    shortest = jnp.min(rows.norms, where=rows.active, initial=jnp.inf)
    relative = jnp.where(rows.active, shortest * rows.inverse, 0)
    # Among long rows a choice would drown in the rounding of the short ones'.
    steady = jnp.maximum(relative, _LEAST_RATIO)
    scaled = free * steady[:, None]
    squares, turned, known = graded_eigh(
        jnp.matmul(scaled, scaled.T, precision=HIGHEST)
    )
    part = jnp.matmul(y * steady, turned, precision=HIGHEST)
    part = jnp.where(known, part / jnp.where(known, squares, 1), 0)
    chosen = jnp.matmul(turned, part, precision=HIGHEST)
    chosen = jnp.matmul(chosen, scaled, precision=HIGHEST)
    v = (y - jnp.matmul(free, chosen, precision=HIGHEST)) * relative
    total = jnp.maximum(jnp.abs(jnp.sum(v)), _SMALLEST_SUM * jnp.sum(jnp.abs(v)))
    return v / jnp.where(total > 0, total, jnp.ones_like(total))


def conflict_free_weights(rows: UnitRows, wanted: Float[Array, " tasks"]) -> Weights:
    """Weights of ConFIG: the wanted projections, as long as the rows agree on them.

    Args:
      rows: unit rows and their lengths.
      wanted: ``[T]``, the projections on the task directions, up to a factor.

    Returns:
      ``[T]``: of ``(sum_t g_t . d) d``, d the unit direction of `equal_projections`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import conflict_free_weights, unit_rows
      >>> J = jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> rows = unit_rows(J @ J.T, jnp.ones(2, bool))
      >>> weights = conflict_free_weights(rows, jnp.ones(2))
      >>> [f"{u:.2f}" for u in weights @ J]  # (3 + 1) / sqrt(2), along (1, 1) / sqrt(2)
      ['2.00', '2.00']
    """
    found = equal_projections(rows, wanted)
    length = jnp.sum(rows.norms * found.reached)
    square = jnp.where(found.square > 0, found.square, 1)
    return found.coefficients * (length / square) * rows.inverse
