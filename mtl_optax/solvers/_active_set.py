"""What the active-set solvers have in common: one walk over faces.

A face is the set of tasks whose variable may be positive. A solver finds a step on its
face; these functions cut it at the bounds, decide who leaves and who enters. At first
many do so at once; then, if some were turned away, one at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtl_optax._types import Scalar, TaskMask


class Walked(NamedTuple):
    """Where a step has led.

    Attributes:
      point: the new point.
      face: the old face without those who left it.
      left: who left it.
      gained: the change of the objective.
      blocked: whether a bound cut the step.
    """

    point: Float[Array, " tasks"]
    face: TaskMask
    left: TaskMask
    gained: Scalar
    blocked: Bool[Array, ""]


class Admitted(NamedTuple):
    """Who enters a face, and what that says of the next round.

    Attributes:
      enter: who enters.
      refused: who left the face without a decrease since.
      many: whether all violating tasks may enter at once.
      idle: whether the face is solved and nobody may enter it.
    """

    enter: TaskMask
    refused: TaskMask
    many: Bool[Array, ""]
    idle: Bool[Array, ""]


def without_multiple(slope: Array, normal: Array, support: Array) -> Array:
    """`slope - lam * normal`, with `lam` fitted on the support in least squares."""
    # Scaled to a largest entry of 1, because the square of a tiny one underflows.
    unit = normal / jnp.max(jnp.where(support, normal, 0))
    fitted = jnp.where(support, unit, 0)
    return slope - unit * (jnp.sum(fitted * slope) / jnp.sum(fitted * fitted))


def on_face(face: Array, matrix: Array) -> Array:
    """The matrix with zeros outside the face."""
    return jnp.where(face[:, None] & face[None, :], matrix, 0)


def factor_of(face: Array, system: Array, damping: Array) -> Array:
    """Cholesky factor of a system on the face, with ones on the rest's diagonal.

    A small damping keeps it definite for dependent rows. As solves are for the *step*
    from the current point, it slows that step and biases nothing.
    """
    damped = system + jnp.diag(jnp.where(face, damping, 1))
    return lax.linalg.cholesky(damped, symmetrize_input=False)


def solve_by(factor: Array, right: Array) -> Array:
    """The solution of the system that was factored."""
    return jax.scipy.linalg.cho_solve((factor, True), right)


def cut_at_bounds(point: Array, step: Array, face: Array) -> tuple[Array, Array]:
    """Two ends of a step, not below zero, and who stops it short of its length.

    The first is at the first bound, the second all the way with what falls below zero
    cut off.
    """
    ratios = jnp.where(step < 0, point / jnp.where(step < 0, -step, 1), jnp.inf)
    length = jnp.minimum(jnp.min(ratios), 1)
    blocked = face & (ratios <= length) & (length < 1)
    ends = jnp.stack([jnp.where(blocked, 0, point + length * step), point + step])
    return jnp.maximum(ends, 0), blocked


def walk(
    point: Array, ends: Array, changes: Array, face: Array, blocked: Array
) -> Walked:
    """Goes to the better one of two ends, and off the face where that is a bound."""
    any_blocked = jnp.any(blocked)
    clip = any_blocked & (changes[1] < changes[0])
    gained = jnp.where(clip, changes[1], changes[0])
    moved = any_blocked | (gained < 0)
    new = jnp.where(moved, jnp.where(clip, ends[1], ends[0]), point)
    left = jnp.where(clip, face & (ends[1] <= 0), blocked)
    return Walked(new, face & ~left, left, gained, any_blocked)


def admit(
    costs: Array,
    outside: Array,
    refused: Array,
    many: Array,
    iterations: Int[Array, ""],
    *,
    solved: Array,
    may: Array,
) -> Admitted:
    """Lets violating tasks enter, all at once or the worst one.

    Args:
      costs: reduced costs; the lowest one enters first.
      outside: who stands outside and would lower the objective.
      refused: who left the face without a decrease since.
      many: whether all may enter at once.
      iterations: rounds so far; past `T + 16` one enters at a time.
      solved: whether the face is solved.
      may: whether anybody may enter.
    """
    size = costs.shape[0]
    first = jnp.arange(size) == jnp.argmin(jnp.where(outside, costs, jnp.inf))
    enter = may & outside & (many | first)
    idle = solved & ~jnp.any(enter)
    # What was refused while many entered at once may well enter alone.
    switch = idle & many & jnp.any(refused)
    many = many & ~switch & (iterations < size + 16)
    return Admitted(enter, refused & ~switch, many, idle & ~switch)
