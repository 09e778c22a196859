"""Convex quadratic programs on the (weighted) simplex, by an active-set method."""

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
    without_multiple,
)
from mtl_optax.solvers._problem import check_problem, dot


class SolverInfo(NamedTuple):
    """What a solver reports beside its solution.

    Attributes:
      residual: scalar, the relative KKT residual. In the solver's scaled variables
        (`y >= 0`, `a^T y = 1`, rows of length one; see `simplex_qp`) the reduced
        costs are `r = R y + p - lam a`, and the residual is
        `max_t |min(y_t, r_t)| / max(sum_t y_t, 1)`. It is zero exactly at an
        optimum and counts violations of stationarity, of complementarity and of
        `r >= 0` alike (the constraints hold by construction); no rescaling of the
        problem changes it. `lam` is fitted in least squares, on the support or on
        the support and the tasks that violate `r >= 0`, whichever is better.
      iterations: int32 scalar, the number of linear systems solved; 0 where a closed
        form is used.
    """

    residual: Scalar
    iterations: Int[Array, ""]


class _State(NamedTuple):
    y: Float[Array, " tasks"]
    face: TaskMask  # where y may be positive
    refused: TaskMask  # left the face without a decrease since
    many: Bool[Array, ""]  # let all violating tasks enter at once
    damping: Scalar
    polished: Int[Array, ""]
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


def _residual(
    matrix: Array, linear: Array, normal: Array, present: Array, y: Array
) -> Array:
    slope = dot(matrix, y) + linear
    support = y > 0

    def violation(costs: Array) -> Array:
        each = jnp.where(present, jnp.abs(jnp.minimum(y, costs)), 0)
        return jnp.max(each) / jnp.maximum(jnp.sum(y), 1)

    costs = without_multiple(slope, normal, support)
    # Any multiplier is a certificate. Where the support's normal is tiny it fixes the
    # multiplier only loosely, and the violating tasks fix it better.
    again = without_multiple(slope, normal, support | (present & (costs < 0)))
    return jnp.minimum(violation(costs), violation(again))


def _active_set(
    matrix: Array, linear: Array, normal: Array, present: Array
) -> tuple[Array, Array]:
    """Minimise `y^T R y / 2 + p^T y` over `a^T y = 1, y >= 0`, `diag(R) <= 1`.

    Each round solves the problem on the current face (the tasks that may be positive)
    and walks there. A task whose weight reaches zero leaves the face; where the face is
    solved, tasks with a negative reduced cost enter. At first many leave and enter at
    once, which finds the support in a few rounds; then, if some were turned away, one
    at a time, which ends because every step decreases the objective.

    The system is `R + a a^T` on the face: the second term changes nothing on
    `a^T y = 1` and makes it definite also where zero is in the hull. A small damping
    keeps it definite for dependent rows; as the solve is for the *step* from the
    current point, damping slows that step and biases nothing.
    """
    dtype = matrix.dtype
    size = matrix.shape[0]
    eps = jnp.finfo(dtype).eps
    count = jnp.int32
    start = present.astype(dtype)
    start = start / jnp.maximum(jnp.sum(normal), 1)

    def advance(state: _State) -> _State:
        y, face = state.y, state.face
        slope = dot(matrix, y) + linear
        costs = without_multiple(slope, normal, face)
        unit = jnp.where(face, normal, 0)
        unit = unit / jnp.max(unit)
        damping = state.damping * eps * jnp.sum(face.astype(dtype))
        system = on_face(face, matrix) + unit[:, None] * unit[None, :]
        factor = factor_of(face, system, damping)
        sides = jnp.stack([unit, jnp.where(face, costs, 0)], axis=1)
        solved = solve_by(factor, sides)
        along, newton = solved[:, 0], solved[:, 1]
        step = along * (jnp.sum(unit * newton) / jnp.sum(unit * along)) - newton
        step = jnp.where(face, step, 0)
        sound = jnp.all(jnp.isfinite(step))
        # Where the start is optimal, a step would only amplify rounding into asymmetry.
        flat = jnp.all(jnp.where(face, jnp.abs(costs), 0) <= 4 * eps * jnp.sum(y))
        flat = flat & jnp.all(y == start)
        step = jnp.where(sound & ~flat, step, 0)

        points, blocked = cut_at_bounds(y, step, face)
        points = points / dot(points, normal)[:, None]
        moves = points - y[None, :]
        bends = dot(moves, matrix)
        changes = jnp.sum(moves * (costs[None, :] + bends / 2), axis=1)
        walked = walk(y, points, changes, face, blocked)
        y_new, face = walked.point, walked.face

        weight = jnp.sum(y_new)
        progress = walked.gained < -eps * weight * jnp.sum(jnp.abs(y_new - y))
        refused = jnp.where(progress, False, state.refused) | walked.left

        slope = dot(matrix, y_new) + linear
        costs = without_multiple(slope, normal, face)
        tolerance = 4 * eps * weight
        solved_face = sound & ~walked.blocked
        outside = present & ~face & ~refused & (costs < -tolerance)
        entry = admit(
            costs,
            outside,
            refused,
            state.many,
            state.iterations,
            solved=solved_face,
            may=solved_face,
        )
        polished = jnp.where(entry.idle, state.polished + 1, 0).astype(count)
        settled = (polished >= 3) | ((polished >= 2) & ~progress)
        iterations = state.iterations + count(1)
        return _State(
            y=y_new,
            face=face | entry.enter,
            refused=entry.refused,
            many=entry.many,
            damping=jnp.where(sound, state.damping, 8 * state.damping),
            polished=polished,
            iterations=iterations,
            done=settled | (iterations >= 4 * size + 32),
        )

    # Inside `jax.shard_map` what a loop carries must vary as the problem does, so all
    # of it is made from the problem.
    blank = jnp.zeros_like(matrix[0])
    none = jnp.zeros_like(blank[0], count)
    state = _State(
        y=start + blank,
        face=present | (blank > 0),
        refused=blank > 0,
        many=none == 0,
        damping=jnp.full_like(blank[0], 4),
        polished=none,
        iterations=none,
        done=~jnp.any(present) | (none > 0),
    )
    state = lax.while_loop(lambda state: ~state.done, advance, state)
    return state.y, state.iterations


def _pair(quadratic: Array, linear: Array, present: Array) -> Array:
    """The optimal shares of two tasks, in closed form."""
    # How much the objective falls, at first, on leaving the other task's vertex.
    pull = jnp.diagonal(quadratic)[::-1] - quadratic[0, 1] + linear[::-1] - linear
    pull = jnp.maximum(pull, 0)
    total = jnp.sum(pull)
    shares = jnp.where(total > 0, pull / jnp.where(total > 0, total, 1), 0.5)
    return jnp.where(jnp.all(present), shares, present.astype(shares.dtype))


@jax.jit
def _solve(
    quadratic: Array, linear: Array, constraint: Array, present: Array
) -> tuple[Array, SolverInfo]:
    """`simplex_qp` with every argument an array."""
    dtype = quadratic.dtype
    size = quadratic.shape[0]
    quadratic = jnp.where(present[:, None] & present[None, :], quadratic, 0)
    linear = jnp.where(present, linear, 0)
    constraint = jnp.where(present, constraint, 1)
    sound = (
        jnp.all(jnp.isfinite(quadratic))
        & jnp.all(jnp.isfinite(linear))
        & jnp.all(jnp.isfinite(constraint) & (constraint > 0))
    )
    quadratic = jnp.where(sound, quadratic, 0)
    linear = jnp.where(sound, linear, 0)
    constraint = jnp.where(sound, constraint, 1)

    # In shares v = a * w, which sum to one, a constant linear term changes nothing.
    linear = linear / constraint
    lowest = jnp.min(jnp.where(present, linear, jnp.inf))
    linear = jnp.where(present, linear - lowest, 0)
    quadratic = quadratic / constraint[:, None] / constraint[None, :]
    squares = jnp.maximum(jnp.diagonal(quadratic), jnp.max(linear))
    largest = jnp.max(squares)
    largest = jnp.where(largest > 0, largest, 1)
    quadratic, linear, squares = (
        quadratic / largest,
        linear / largest,
        squares / largest,
    )

    # Then rows of unit length: v_t = y_t * normal_t.
    lengths = jnp.sqrt(jnp.where(present & (squares > 0), squares, 1))
    shortest = jnp.min(lengths)
    normal = jnp.where(present, shortest / lengths, 0)
    matrix = quadratic / lengths[:, None] / lengths[None, :]
    offset = linear / lengths / shortest

    iterations = jnp.zeros((), jnp.int32)
    if size == 1:
        shares = present.astype(dtype)
    elif size == 2:
        shares = _pair(quadratic, linear, present)
    else:
        y, iterations = _active_set(matrix, offset, normal, present)
        shares = y * normal
    # A zero row attains the lower bound zero, so it beats all others; several share.
    zero = present & (squares <= 0)
    shares = jnp.where(jnp.any(zero), zero.astype(dtype), shares)
    shares = shares / jnp.where(jnp.any(present), jnp.sum(shares), 1)

    y = jnp.where(present, shares / jnp.where(present, normal, 1), 0)
    residual = _residual(matrix, offset, normal, present, y)
    residual = jnp.where(jnp.any(present), residual, 0)
    weights = shares / constraint
    return (
        jnp.where(sound, weights, jnp.nan),
        SolverInfo(jnp.where(sound, residual, jnp.nan), iterations),
    )


def simplex_qp(
    quadratic: Gramian,
    linear: Float[Array, " tasks"],
    *,
    constraint: Float[Array, " tasks"] | None = None,
    task_mask: TaskMask | None = None,
) -> tuple[Weights, SolverInfo]:
    r"""Minimise a convex quadratic over the simplex, exactly and inside the graph.

    .. math::
        \min_w \; \tfrac12 w^\top Q w + q^\top w
        \quad \text{s.t.} \quad a^\top w = 1, \; w \ge 0

    An active-set method: it ends after finitely many linear systems (about 3 to 10 for
    most problems, whatever T; at most `4 T + 32`) with an error of the order of the
    rounding of `Q`. Nothing depends on the scale of the problem: multiplying `Q` and
    `q` by one positive number changes nothing but rounding.

    Internally, `v = a * w` are shares that sum to one, `q / a` is shifted to a minimum
    of zero, and task t is divided by its length
    `n_t = sqrt(max(Q_tt / a_t**2, max(q / a)))`. With `q` zero these are the row norms,
    so that rows of very different lengths do not spoil each other.

    Use it for a dual that fits this form, such as the minimum enclosing ball
    (`Q = K`, `q = -diag(K) / 2`). For the point of smallest norm use `min_norm_point`.
    It has no derivative: treat the weights as constants (`jax.lax.stop_gradient`).

    Args:
      quadratic: `[T, T]`, `Q`, symmetric and positive semidefinite up to rounding;
        float32 or float64, which is also the dtype of the computation.
      linear: `[T]`, `q`.
      constraint: `[T]`, `a`, positive; ones by default.
      task_mask: `[T]`, true where a task is present; all by default. An absent
        task's entries are ignored, whatever they hold, and its weight is zero.

    Returns:
      `(weights, info)`: weights `[T]`, and a `SolverInfo`. Where the optimum is not
      unique any optimal point may be returned; exact ties that a closed form or the
      symmetric start sees are shared evenly. All weights are zero if no task is
      present, and NaN if a present entry is not finite or an `a_t` not positive.

    Raises:
      TypeError: at trace time, if `quadratic` is neither float32 nor float64.
      ValueError: at trace time, if the shapes do not agree.

    Example:
      The centre of the smallest disc around three points of a plane:

      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import simplex_qp
      >>> points = jnp.array([[0.0, 0.0], [4.0, 0.0], [1.0, 1.0]])
      >>> gramian = points @ points.T
      >>> weights, info = simplex_qp(gramian, -jnp.diag(gramian) / 2)
      >>> print(weights.round(3), (weights @ points).round(3))
      [0.5 0.5 0. ] [2. 0.]

    References:
      Nocedal and Wright, Numerical Optimization, 2nd ed., 2006, section 16.5
      (primal active-set methods); Wolfe, Finding the nearest point in a polytope,
      Mathematical Programming 11, 1976; Gärtner and Schönherr, An efficient, exact,
      and generic quadratic programming solver for geometric optimization, 2000.
    """
    size, dtype = check_problem(
        quadratic, linear=linear, constraint=constraint, task_mask=task_mask
    )
    if constraint is None:
        constraint = jnp.ones(size, dtype)
    if task_mask is None:
        task_mask = jnp.ones(size, bool)
    return _solve(quadratic, linear.astype(dtype), constraint.astype(dtype), task_mask)
