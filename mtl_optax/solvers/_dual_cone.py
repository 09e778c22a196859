"""Projection on the dual cone of the task gradients, by an active-set method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtl_optax._types import Gramian, Scalar, TaskMask, Weights
from mtl_optax.solvers._active_set import (
    admit,
    cut_at_bounds,
    factor_of,
    on_face,
    solve_by,
    walk,
)
from mtl_optax.solvers._problem import check_problem, dot
from mtl_optax.solvers._simplex_qp import SolverInfo

# In units of the rounding `eps * max |v|`: what counts as a violation, and the least
# inner product with a task on its bound that the last correction asks for.
_TOLERANCE = 2
_MARGIN = 4


class _State(NamedTuple):
    z: Float[Array, " tasks"]
    face: TaskMask  # where z may be positive
    refused: TaskMask  # left the face without a decrease since
    many: Bool[Array, ""]  # let all violating tasks enter at once
    stuck: Bool[Array, ""]  # a bound cut the last step
    damping: Scalar
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


def _violation(z: Array, slope: Array, present: Array) -> Array:
    return jnp.max(jnp.where(present, jnp.abs(jnp.minimum(z, slope)), 0), axis=-1)


def _start(
    matrix: Array, reference: Array, margin: Array, free: Array, blank: Array
) -> Array:
    """A few accelerated projected gradient steps: most of the support, cheaply."""
    bound = jnp.maximum(jnp.max(jnp.sum(jnp.abs(matrix), axis=1)), 1)

    def descend(k: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        z, ahead = carry
        slope = dot(matrix, reference + ahead) - margin
        z_new = jnp.where(free, jnp.maximum(ahead - slope / bound, 0), 0)
        momentum = jnp.asarray(k, z.dtype) / jnp.asarray(k + 3, z.dtype)
        return z_new, z_new + momentum * (z_new - z)

    return lax.fori_loop(0, 40, descend, (blank, blank))[0]


def _active_set(
    matrix: Array, reference: Array, margin: Array, free: Array
) -> tuple[Array, Array]:
    """Minimise `z^T C z / 2 + (C u - m)^T z` over `z >= 0`, where `diag(C) = 1`.

    Each round solves the problem on the current face (the tasks whose z may be
    positive) and walks there. A task whose z reaches zero leaves the face; tasks with
    a negative slope `C (u + z) - m` enter. At first many leave and enter at once; then,
    if some were turned away, one at a time, which ends because every step decreases
    the objective.

    A small damping keeps the system definite for dependent rows. As the solve is for
    the *step* from the current point, damping slows that step and biases nothing.
    """
    dtype = matrix.dtype
    size = matrix.shape[0]
    eps = jnp.finfo(dtype).eps
    count = jnp.int32
    # Sums of many terms round more.
    tolerance = max(_TOLERANCE, size**0.5 / 2)

    def advance(state: _State) -> _State:
        z, face = state.z, state.face
        slope = dot(matrix, reference + z) - margin
        # Dependent rows leave the step some freedom. Where it has just run into a
        # bound, let those tasks move that are far from theirs.
        room = jnp.max(z) / jnp.where(z > 0, z, jnp.inf)
        room = jnp.where(state.stuck, jnp.clip(room, 1, 1e4), 1)
        damping = state.damping * eps * jnp.sum(face.astype(dtype))
        system = on_face(face, matrix)
        factor = factor_of(face, system, damping * room)

        def refine(_: int, step: Array) -> Array:
            right = jnp.where(face, slope + dot(system, step), 0)
            return step - solve_by(factor, right)

        step = lax.fori_loop(0, 3, refine, blank)
        # Rounding may leave the system indefinite, and then the step explodes.
        limit = jnp.max(jnp.abs(reference + z)) / eps
        sound = jnp.all(jnp.isfinite(step)) & (jnp.max(jnp.abs(step)) <= limit)
        step = jnp.where(sound & face, step, 0)

        points, blocked = cut_at_bounds(z, step, face)
        moves = points - z[None, :]
        bends = dot(moves, matrix)
        changes = jnp.sum(moves * (slope[None, :] + bends / 2), axis=1)
        walked = walk(z, points, changes, face, blocked)
        z_new, face = walked.point, walked.face

        rounding = eps * jnp.max(jnp.abs(reference + z_new))
        progress = walked.gained < -rounding * jnp.sum(jnp.abs(z_new - z))
        refused = jnp.where(progress, False, state.refused) | walked.left

        slope = dot(matrix, reference + z_new) - margin
        outside = free & ~face & ~refused & (slope < -tolerance * rounding)
        solved = sound & ~walked.blocked
        entry = admit(
            slope,
            outside,
            refused,
            state.many,
            state.iterations,
            solved=solved,
            may=solved | (state.many & progress),
        )
        iterations = state.iterations + count(1)
        optimal = _violation(z_new, slope, free) <= tolerance * rounding
        return _State(
            z=z_new,
            face=face | entry.enter,
            refused=entry.refused,
            many=entry.many,
            stuck=walked.blocked,
            damping=jnp.where(sound, 4, 8 * state.damping),
            iterations=iterations,
            # After a cut step the damping was uneven, and the face is not yet solved.
            done=optimal
            | (entry.idle & ~state.stuck & ~progress)
            | (iterations >= 4 * size + 32),
        )

    # Inside `jax.shard_map` what a loop carries must vary as the problem does, so all
    # of it is made from the problem.
    blank = jnp.zeros_like(matrix[0]) + jnp.zeros_like(reference)
    none = jnp.zeros_like(blank[0], count)
    z = _start(matrix, reference, margin, free, blank)
    slope = dot(matrix, reference + z) - margin
    rounding = eps * jnp.max(jnp.abs(reference + z))
    face = free & ((z > 0) | (slope < -tolerance * rounding))
    state = _State(
        z=z,
        face=face,
        refused=blank > 0,
        many=none == 0,
        stuck=none > 0,
        damping=jnp.full_like(blank[0], 4),
        iterations=none,
        done=~jnp.any(face),
    )
    state = lax.while_loop(lambda state: ~state.done, advance, state)
    return _lift(matrix, reference, margin, free, state.z), state.iterations


def _lift(
    matrix: Array, reference: Array, margin: Array, free: Array, z: Array
) -> Array:
    """Lift the slopes that ought to be zero just above what rounding can hide.

    Where `d` is short beside the rows it is made of, the rounding of the Gramian alone
    would let it conflict visibly. Not where no such point is near.
    """
    eps = jnp.finfo(matrix.dtype).eps
    weight = jnp.max(jnp.abs(reference + z))
    height = _MARGIN * eps * weight

    def slope(z: Array) -> Array:
        return dot(matrix, reference + z) - margin

    def lowest(z: Array) -> Array:
        return jnp.min(jnp.where(free, slope(z), jnp.inf))

    def correct(_: int, z: Array) -> Array:
        now = slope(z)
        face = free & ((z > 0) | (now < 0))
        damping = eps * jnp.sum(face.astype(z.dtype))
        factor = factor_of(face, on_face(face, matrix), damping)
        step = solve_by(factor, jnp.where(face, height - now, 0))
        z_new = jnp.maximum(z + step, 0)
        tame = jnp.max(jnp.abs(reference + z_new)) <= 2 * weight
        return jnp.where(tame, z_new, z)

    lifted = lax.fori_loop(0, 3, correct, z)
    near = _violation(lifted, slope(lifted), free) <= 4 * height
    return jnp.where(near & (lowest(lifted) >= lowest(z)), lifted, z)


@jax.jit
def _solve(
    gramian: Array, references: Array, margins: Array, present: Array
) -> tuple[Array, SolverInfo]:
    """`dual_cone_projection` with every argument an array, references `[K, T]`."""
    pairs = present[:, None] & present[None, :]
    gramian = jnp.where(pairs, gramian, 0)
    references = jnp.where(present[None, :], references, 0)
    margins = jnp.where(present, margins, 0)
    free = present & (margins > -jnp.inf)
    sound = jnp.all(jnp.isfinite(gramian)) & jnp.all(jnp.isfinite(references))
    sound = sound & jnp.all(margins < jnp.inf)
    gramian = jnp.where(sound, gramian, 0)
    references = jnp.where(sound, references, 0)

    # Rows of length one, z' = length * z, and references of largest entry one. A zero
    # row neither conflicts nor helps.
    squares = jnp.diagonal(gramian)
    present = present & (squares > 0)
    free = free & present
    lengths = jnp.sqrt(jnp.where(present, squares, 1))
    matrix = gramian / lengths[:, None] / lengths[None, :]
    matrix = on_face(present, jnp.clip((matrix + matrix.T) / 2, -1, 1))
    longest = jnp.max(jnp.where(present, lengths, 0))
    lengths = jnp.where(present, lengths / jnp.where(longest > 0, longest, 1), 0)
    scaled = references * lengths[None, :]
    away = margins / jnp.where(present, jnp.sqrt(squares), 1) / longest
    away = jnp.where(free & (longest > 0), away, 0)[None, :]
    heights = jnp.max(jnp.abs(scaled), axis=1, keepdims=True)
    heights = jnp.maximum(heights, jnp.max(jnp.abs(away)))
    heights = jnp.where(heights > 0, heights, 1)
    scaled, away = scaled / heights, away / heights

    solve = jax.vmap(_active_set, (None, 0, 0, None))
    z, iterations = solve(matrix, scaled, away, free)
    v = scaled + z
    violations = _violation(z, dot(v, matrix) - away, free[None, :])
    largest = jnp.max(jnp.abs(v), axis=1)
    residual = jnp.max(violations / jnp.where(largest > 0, largest, 1))
    lengths = jnp.where(present, lengths, 1)
    weights = references + z * heights / lengths[None, :]
    return (
        jnp.where(sound, weights, jnp.nan),
        SolverInfo(jnp.where(sound, residual, jnp.nan), jnp.max(iterations)),
    )


def dual_cone_projection(
    gramian: Gramian,
    references: Weights | Float[Array, "references tasks"],
    *,
    margins: Float[Array, " tasks"] | None = None,
    task_mask: TaskMask | None = None,
) -> tuple[Weights | Float[Array, "references tasks"], SolverInfo]:
    r"""Project combinations of the task gradients on their dual cone.

    .. math::
        \arg\min_v \; v^\top G v \quad \text{s.t.} \quad v \ge u,
        \qquad G = J J^\top

    `J^T v` is the point closest to `J^T u` of `{d : J d >= 0}`, the directions that
    conflict with no task. With `v = u + z` it is a quadratic program in `z >= 0`, of
    the same matrix for every reference `u`.

    An active-set method with a first-order start: it ends after finitely many linear
    systems a reference (about 1 to 10 for most problems, more where many rows are
    dependent; at most `4 T + 32`). The
    scale of the problem, the references' sizes and the ratios of the rows' norms
    change nothing but rounding. At the end, inner products that ought to be zero are
    lifted by about four roundings, because the rounding of `G` could otherwise turn
    into a conflict where `J^T v` is far shorter than the rows it is made of.

    Args:
      gramian: `[T, T]`, inner products of the task gradients; float32 or float64,
        which is also the dtype of the computation.
      references: `[T]` or `[K, T]`, one `u` or several. `diag(preference)` and the sum
        of the results is UPGrad; the preference itself is DualProj.
      margins: `[T]`, `m`: projects on `{d : J d >= m}` instead, where task t is not a
        constraint if `m_t` is `-inf`; zeros by default. If no direction satisfies all
        of them the weights are finite and mean nothing: check `G v >= m`.
      task_mask: `[T]`, true where a task is present; all by default. An absent
        task's entries are ignored, whatever they hold, and its weight is zero.

    Returns:
      `(weights, info)`: weights of the shape of `references`, and a `SolverInfo`. A
      zero row keeps its reference. Where the optimum is not unique (dependent rows)
      any optimal point may be returned; `J^T v` is unique. All weights are NaN if a
      present entry is not finite.

      `info.residual` is the largest, over the references, of
      `max_t |min(z'_t, (C v' - m')_t)| / max_t |v'_t|`, for `z' = D z`, `v' = D v` and
      `C = D^-1 G D^-1`, with `D` the row norms: zero exactly at an optimum, and of
      the order of rounding otherwise. `info.iterations` is the largest number of
      rounds, zero where no task conflicts.

    Raises:
      TypeError: at trace time, if the matrix is neither float32 nor float64.
      ValueError: at trace time, if the shapes do not agree.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import dual_cone_projection
      >>> jacobian = jnp.array([[-1.0, 1.0], [1.0, 0.0]])
      >>> gramian = jacobian @ jacobian.T
      >>> weights, info = dual_cone_projection(gramian, jnp.array([1.0, 0.0]))
      >>> print(weights.round(3), (weights @ jacobian).round(3))
      [1. 1.] [0. 1.]

    References:
      Quinton and Rey, Jacobian descent for multi-objective optimization, 2024
      (https://arxiv.org/abs/2406.16232); Lopez-Paz and Ranzato, Gradient episodic
      memory for continual learning, NeurIPS 2017; Nocedal and Wright, Numerical
      Optimization, 2nd ed., 2006, sections 16.5 and 16.7.
    """
    size, dtype = check_problem(gramian, margins=margins, task_mask=task_mask)
    if references.ndim not in (1, 2) or references.shape[-1] != size:
        raise ValueError(
            f"references has shape {references.shape}, expected {(size,)} or "
            f"(K, {size}) beside a matrix of shape {gramian.shape}"
        )
    if not references.shape[0]:
        raise ValueError("expected at least one reference")
    if margins is None:
        margins = jnp.zeros(size, dtype)
    if task_mask is None:
        task_mask = jnp.ones(size, bool)
    rows = references.reshape(-1, size).astype(dtype)
    weights, info = _solve(gramian, rows, margins.astype(dtype), task_mask)
    return weights.reshape(references.shape), info
