"""A linear term plus a norm on the simplex: the dual of a search within a ball."""

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
from mtl_optax.solvers._simplex_qp import SolverInfo


class _State(NamedTuple):
    y: Float[Array, " tasks"]
    face: TaskMask  # where y may be positive
    refused: TaskMask  # left the face without a decrease since
    many: Bool[Array, ""]  # let all violating tasks enter at once
    least: Scalar  # of mu
    damping: Scalar
    polished: Int[Array, ""]
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


def _length(matrix: Array, y: Array, least: Array) -> tuple[Array, Array]:
    """`R y`, and `mu = max(|y|_R, least)`."""
    bent = dot(matrix, y)
    return bent, jnp.sqrt(jnp.maximum(jnp.sum(bent * y), least * least))


def _residual(
    matrix: Array, linear: Array, normal: Array, least: Array, present: Array, y: Array
) -> Array:
    mass = jnp.sum(y)
    bent, mu = _length(matrix, y, least)
    slope = bent + mu * linear
    scale = mass + mu * jnp.abs(linear)

    def violation(costs: Array) -> Array:
        each = jnp.abs(jnp.minimum(y / mass, costs / scale))
        return jnp.max(jnp.where(present, each, 0))

    support = y > 0
    costs = without_multiple(slope, normal, support)
    # Any multiplier is a certificate. Where the support's normal is tiny it fixes the
    # multiplier only loosely, and the violating tasks fix it better.
    wider = support | (present & (costs < 0))
    again = without_multiple(slope, normal, wider)
    return jnp.minimum(violation(costs), violation(again))


def _active_set(
    matrix: Array, linear: Array, normal: Array, floor: Array, present: Array
) -> tuple[Array, Array, Array]:
    """Minimise `p^T y + |y|_R` over `a^T y = 1, y >= 0`, `diag(R) <= 1`.

    The norm is `min_mu (|y|_R^2 / mu + mu) / 2`, here with `mu >= floor * sum_t y_t`,
    which makes it smooth where its value is rounding. Faces are walked as in
    `simplex_qp`. On one, the minimiser at a fixed mu is `z0` at the present one and
    moves along a line, `z(mu) = z0 + (mu - mu_0) b`. As its point at `mu = 0`, of
    smallest norm, is conjugate to `b`, `|z(mu)|_R = mu` is solved in closed form:
    `mu^2 = (|z0|_R^2 - mu_0^2 |b|_R^2) / (1 - |b|_R^2)`. If `|b|_R >= 1`, the objective
    falls along `b` without end, that is, to where a task leaves the face.
    """
    dtype = matrix.dtype
    size = matrix.shape[0]
    eps = jnp.finfo(dtype).eps
    count = jnp.int32
    start = present.astype(dtype)
    start = start / jnp.maximum(jnp.sum(normal), 1)

    def advance(state: _State) -> _State:
        y, face = state.y, state.face
        mass = jnp.sum(y)
        least = state.least
        bent, mu = _length(matrix, y, least)
        costs = without_multiple(bent + mu * linear, normal, face)
        unit = jnp.where(face, normal, 0)
        unit = unit / jnp.max(unit)
        damping = state.damping * eps * jnp.sum(face.astype(dtype))
        # The term in the normal changes nothing on a^T y = 1 and makes the system
        # definite where zero is in the hull; the damping does for dependent rows.
        system = on_face(face, matrix) + unit[:, None] * unit[None, :]
        factor = factor_of(face, system, damping)
        tilt = without_multiple(linear, normal, face)
        sides = jnp.where(face[None, :], jnp.stack([unit, costs, tilt]), 0)
        solved = solve_by(factor, sides.T).T
        along, others = solved[0], solved[1:]
        shifts = dot(others, unit) / jnp.sum(unit * along)
        newton, line = shifts[:, None] * along[None, :] - others
        newton, line = jnp.where(face, newton, 0), jnp.where(face, line, 0)

        # Damping makes -p^T b the larger one of two measures of |b|_R^2.
        bend = jnp.maximum(jnp.sum(line * dot(matrix, line)), -jnp.sum(line * sides[2]))
        shortfall = mu * mu - jnp.sum((y + newton) * dot(matrix, y + newton))
        square = mu * mu - shortfall / jnp.where(bend < 1, 1 - bend, 1)
        most = 16 * mu
        square = jnp.where(bend < 1, square, jnp.inf)
        target = jnp.sqrt(jnp.clip(square, least * least, most * most))
        step = newton + (target - mu) * line
        sound = jnp.all(jnp.isfinite(step))
        # Where the start is optimal, a step would only amplify rounding into asymmetry.
        tolerance = 4 * eps * (mass + mu * jnp.abs(linear))
        flat = jnp.all(~face | (jnp.abs(costs) <= tolerance)) & jnp.all(y == start)
        step = jnp.where(sound & ~flat, step, 0)

        points, blocked = cut_at_bounds(y, step, face)
        points = points / dot(points, normal)[:, None]
        moves = points - y[None, :]
        # Changes of mu times the objective; the second line is for the change of mu.
        bends = dot(moves, matrix)
        squares = jnp.sum((2 * bent[None, :] + bends) * moves, axis=1)
        squares = squares + jnp.sum(bent * y)
        mus = jnp.sqrt(jnp.maximum(squares, least * least))
        changes = jnp.sum(moves * (costs[None, :] + bends / 2), axis=1)
        changes = changes - (mus - mu) * (squares / mus - mu) / 2
        walked = walk(y, points, changes, face, blocked)
        y_new, face = walked.point, walked.face

        progress = walked.gained < -jnp.sum(tolerance * jnp.abs(y_new - y)) / 4
        refused = jnp.where(progress, False, state.refused) | walked.left

        mass = jnp.sum(y_new)
        # Fixed while the last digits are found, which may shift mass along directions
        # that change nothing else.
        least = jnp.where(state.polished > 0, least, floor * mass)
        bent, mu = _length(matrix, y_new, least)
        costs = without_multiple(bent + mu * linear, normal, face)
        tolerance = 4 * eps * (mass + mu * jnp.abs(linear))
        solved_face = sound & ~walked.blocked & ((target < most) | ~progress)
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
        settled = (polished >= 4) | ((polished >= 2) & ~progress)
        iterations = state.iterations + count(1)
        return _State(
            y=y_new,
            face=face | entry.enter,
            refused=entry.refused,
            many=entry.many,
            least=least,
            damping=jnp.where(sound, state.damping, 8 * state.damping),
            polished=polished,
            iterations=iterations,
            done=settled | (iterations >= 4 * size + 32),
        )

    # Inside `jax.shard_map` what a loop carries must vary as the problem does, so all
    # of it is made from the problem.
    blank = jnp.zeros_like(linear)
    none = jnp.zeros_like(blank[0], count)
    state = _State(
        y=start + blank,
        face=present | (blank > 0),
        refused=blank > 0,
        many=none == 0,
        least=floor * jnp.sum(start) + blank[0],
        damping=jnp.full_like(blank[0], 4),
        polished=none,
        iterations=none,
        done=~jnp.any(present) | (none > 0),
    )
    state = lax.while_loop(lambda state: ~state.done, advance, state)
    return state.y, state.least, state.iterations


@jax.jit
def _solve(
    gramian: Array, linear: Array, radius: Array, present: Array
) -> tuple[Array, Array, SolverInfo]:
    """`simplex_norm` with every argument an array."""
    dtype = gramian.dtype
    eps = jnp.finfo(dtype).eps
    gramian = jnp.where(present[:, None] & present[None, :], gramian, 0)
    linear = jnp.where(present, linear, 0)
    sound = (
        jnp.all(jnp.isfinite(gramian))
        & jnp.all(jnp.isfinite(linear))
        & (jnp.isfinite(radius) & (radius >= 0))
    )
    gramian = jnp.where(sound, gramian, 0)
    linear = jnp.where(sound, linear, 0)
    radius = jnp.where(sound, radius, 0)

    norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gramian), 0))
    inverse = 1 / jnp.where(norms > 0, norms, 1)
    inverse = jnp.where(norms > 0, inverse, 0)
    cosines = gramian * inverse[:, None] * inverse[None, :]

    # What a task's full weight may cost. The linear term counts as far as needed to
    # keep it below 1 / eps beside a tiny radius or a zero row.
    sizes = jnp.maximum(radius * norms, eps * jnp.abs(linear))
    some = present & (sizes > 0)
    smallest = jnp.min(jnp.where(some, sizes, jnp.inf))
    smallest = jnp.where(jnp.any(some), smallest, 1)
    sizes = jnp.where(some, sizes, smallest)
    normal = jnp.where(present, smallest / sizes, 0)
    shape = radius * norms / sizes
    matrix = cosines * shape[:, None] * shape[None, :]
    offset = linear / sizes
    tasks = jnp.sum(present.astype(dtype))
    floor = jnp.sqrt(4 * eps * jnp.maximum(tasks, 1))

    y, least, iterations = _active_set(matrix, offset, normal, floor, present)
    anyone = jnp.any(present)
    weights = y * normal
    weights = weights / jnp.where(anyone, jnp.sum(weights), 1)
    y = jnp.where(present, weights / jnp.where(present, normal, 1), 0)
    residual = _residual(matrix, offset, normal, least, present, y)

    # Shares of the summed lengths, whose squares would leave float32's range.
    shortest = jnp.min(jnp.where(norms > 0, norms, jnp.inf))
    # A zero row is rounding beside the shortest other one.
    mass = jnp.sum(weights * jnp.where(norms > 0, norms, shortest))
    mass = jnp.where(jnp.any(norms > 0), mass, 0)
    parts = weights * norms / jnp.where(mass > 0, mass, 1)
    square = jnp.sum(parts * dot(cosines, parts))
    length = mass * jnp.sqrt(jnp.where(square > floor * floor, square, 0))
    return (
        jnp.where(sound, weights, jnp.nan),
        jnp.where(sound, length, jnp.nan),
        SolverInfo(
            jnp.where(sound, jnp.where(anyone, residual, 0), jnp.nan), iterations
        ),
    )


def simplex_norm(
    gramian: Gramian,
    linear: Float[Array, " tasks"],
    radius: Scalar | float,
    *,
    task_mask: TaskMask | None = None,
) -> tuple[Weights, Scalar, SolverInfo]:
    r"""Minimise a linear term plus a multiple of a norm over the simplex.

    .. math::
        \min_w \; q^\top w + r \, |J^\top w|
        \quad \text{s.t.} \quad \sum_t w_t = 1, \; w \ge 0, \qquad G = J J^\top

    This is the dual of `max_d min_t g_t^T d` over the ball `|d - g_0| <= r`, with
    `q_t = g_t^T g_0`. The values are equal, and the best direction is
    `d = g_0 + r * (J^T w) / length` where `length` is positive. CAGrad takes for `g_0`
    the mean gradient and `r = c |g_0|`.

    An active-set method: about 3 to 10 linear systems for most problems, whatever T, at
    most `4 T + 32`; the error is of the order of the rounding of `G` and `q`. Nothing
    depends on the scale of the problem, that is on multiplying `G` by c^2, `q` by c^2
    and `r` by c, nor do rows of very different lengths spoil each other.

    With `cancellation = sum_t w_t |g_t| / length`, rounding of the Gramian alone moves
    the length by about `eps * cancellation**2` of itself, and the best `d` likewise.
    A square of the length below `4 T eps (sum_t w_t |g_t|)**2` is rounding of the
    Gramian. There the norm is replaced by a parabola that touches it at that length
    (so the weights are optimal up to that length, not to the last digit), and `length`
    is zero. Then zero is, up to rounding, in the hull of the gradients, and the
    direction of `J^T w` says nothing: leave the second term of `d` out.

    The residual is the relative KKT residual in scaled variables
    `y_t = w_t s_t / min_t s_t`, with sizes `s_t = r |g_t|` (`eps |q_t|` where that is
    larger, the least one where both are zero). With `R = r^2 G / (s s^T)`,
    `p = q / s`, `a = min_t s_t / s`, `mu = max(|y|_R, sqrt(4 T eps) sum_t y_t)` and the
    reduced costs `k = R y + mu p - lam a`, it is
    `max_t |min(y_t / sum y, k_t / (sum y + mu |p_t|))|`, where `lam` is fitted as in
    `SolverInfo`, and `sum y` in `mu` is taken before the last digits of y are found.
    A negative `k_t / mu` is how far task t falls short, `g_t^T d - value`, in units of
    `s_t`; `k_t / sum y` is that over the cancellation. Both do not depend on the scale,
    and a residual of a few eps says that `w` solves a problem which differs from this
    one by rounding of its entries.

    It has no derivative: treat the weights as constants (`jax.lax.stop_gradient`).

    Args:
      gramian: `[T, T]`, `G`; float32 or float64, which is also the dtype of the
        computation.
      linear: `[T]`, `q`.
      radius: scalar, `r`, not negative; may be traced.
      task_mask: `[T]`, true where a task is present; all by default. An absent
        task's entries are ignored, whatever they hold, and its weight is zero.

    Returns:
      `(weights, length, info)`: weights `[T]`, the scalar `|J^T w|` or zero where it is
      not above rounding, and a `SolverInfo`. Where the optimum is not unique any
      optimal point may be returned. Weights and length are zero if no task is present,
      and NaN if a present entry or the radius is not finite, or the radius negative.

    Raises:
      TypeError: at trace time, if the matrix is neither float32 nor float64.
      ValueError: at trace time, if the shapes do not agree.

    Example:
      CAGrad with c = 1/2 for two gradients of which one is longer:

      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import simplex_norm
      >>> jacobian = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
      >>> mean = jacobian.mean(0)
      >>> radius = 0.5 * jnp.linalg.norm(mean)
      >>> gramian = jacobian @ jacobian.T
      >>> weights, length, info = simplex_norm(gramian, jacobian @ mean, radius)
      >>> update = mean + radius * weights @ jacobian / length
      >>> [f"{entry:.3f}" for entry in update]
      ['0.184', '1.204', '1.204']

    References:
      Liu, Liu, Jin, Stone and Liu, Conflict-averse gradient descent for multi-task
      learning, 2021 (https://arxiv.org/abs/2110.14048); Nocedal and Wright, Numerical
      Optimization, 2nd ed., 2006, section 16.5 (primal active-set methods).
    """
    size, dtype = check_problem(gramian, linear=linear, task_mask=task_mask)
    if jnp.shape(radius):
        raise ValueError(f"radius has shape {jnp.shape(radius)}, expected a scalar")
    if task_mask is None:
        task_mask = jnp.ones(size, bool)
    return _solve(gramian, linear.astype(dtype), jnp.asarray(radius, dtype), task_mask)
