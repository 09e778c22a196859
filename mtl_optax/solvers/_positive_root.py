"""The positive root of `G x = (omega / x)^(1 / alpha)`, by an interior-point method."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtl_optax._types import Gramian, Scalar, TaskMask, Weights
from mtl_optax.solvers._problem import check_problem, dot
from mtl_optax.solvers._simplex_qp import SolverInfo

_LIMIT = 100


class _State(NamedTuple):
    y: Float[Array, " tasks"]
    s: Float[Array, " tasks"]  # becomes both C y and the right-hand side
    best: Float[Array, " tasks"]  # the y of the smallest residual so far
    residual: Scalar
    stale: Int[Array, ""]  # iterations since
    damping: Scalar
    iterations: Int[Array, ""]
    done: Bool[Array, ""]


def _follow(
    cosines: Array, base: Array, power: Array, present: Array
) -> tuple[Array, Array, Array]:
    """Solve `C y = y0 (y / y0)^-p` for unit rows, where `C = 1` has the root `y0`.

    A primal-dual method with `s` beside `y`: Newton on `s = C y` and
    `log s + p log y = log(y0^(1 + p))`. It starts where all tasks are alike, which is
    well centred; the second equation is then approached by a bounded factor a step,
    because a weighted centre far from the current one draws short steps.
    """
    dtype = cosines.dtype
    eps = jnp.finfo(dtype).eps
    big = jnp.finfo(dtype).max ** 0.75
    one = present.astype(dtype)
    count = jnp.sum(one)
    sizes = jnp.abs(cosines)

    def log_root(y: Array) -> Array:
        # From a quotient: a difference of logarithms would lose digits.
        return power * jnp.log(jnp.where(present, y / base, 1))

    def residual(y: Array) -> Array:
        wanted = base * jnp.exp(jnp.clip(-log_root(y), -60, 60))
        gaps = jnp.abs(dot(cosines, y) - wanted)
        scale = jnp.where(present, dot(sizes, y), 1)
        return jnp.max(jnp.where(present, gaps / scale, 0))

    def advance(state: _State) -> _State:
        y, s = jnp.where(present, state.y, 1), jnp.where(present, state.s, 1)
        behind = -log_root(y) - jnp.log(jnp.where(present, s / base, 1))
        # The logarithm for what must fall, where the quotient would reach below zero.
        pull = jnp.where(behind < 0, behind, jnp.expm1(jnp.minimum(behind, 10)))
        pull = jnp.clip(pull, -1, 10)
        side = jnp.where(present, s * pull + s - dot(cosines, state.y), 0)

        # The diagonal of C is 1, so this scaling makes the system's diagonal 1 too.
        bend = jnp.minimum(power * s / y, big)
        scale = lax.rsqrt(1 + bend)
        # Damping only the step biases nothing, and keeps it finite where zero is in
        # the hull.
        ridge = state.damping * eps * jnp.sqrt(count)
        system = scale[:, None] * cosines * scale[None, :]
        system = system + jnp.diag(jnp.where(present, (bend + ridge) * scale**2, 1))
        factor = lax.linalg.cholesky(system, symmetrize_input=False)
        step = jax.scipy.linalg.cho_solve((factor, True), side * scale) * scale / y
        sound = jnp.all(jnp.isfinite(step))
        step = jnp.where(sound & present, step, 0)
        other = jnp.where(present, pull - power * step, 0)

        # A y that falls by 1 / 20 at p > 1 would throw y^-p further off than that.
        keep = 1 - 0.05 ** (1 / jnp.maximum(power, 1))
        length = jnp.minimum(
            keep / jnp.maximum(-jnp.min(step), eps),
            0.95 / jnp.maximum(-jnp.min(other), eps),
        )
        length = jnp.minimum(length, 1)
        y_new = jnp.where(present, y * (1 + length * step), 0)
        s_new = jnp.where(present, s * (1 + length * other), 0)

        found = residual(y_new)
        better = found < state.residual
        lowest = jnp.minimum(found, state.residual)
        stale = jnp.where(better | ~sound, 0, state.stale + 1).astype(jnp.int32)
        most = jnp.maximum(jnp.max(jnp.abs(step)), jnp.max(jnp.abs(other)))
        iterations = state.iterations + jnp.int32(1)
        solved = (most < jnp.sqrt(eps)) | (lowest <= 2 * eps)
        # Rounding may keep the residual just above that, mostly for dependent rows.
        stuck = (stale >= 4) & (lowest <= 100 * eps * jnp.sqrt(count))
        return _State(
            y=y_new,
            s=s_new,
            best=jnp.where(better, y_new, state.best),
            residual=lowest,
            stale=stale,
            damping=jnp.where(sound, state.damping, 8 * state.damping),
            iterations=iterations,
            done=(sound & (solved | stuck)) | (iterations >= _LIMIT),
        )

    # Inside `jax.shard_map` what a loop carries must vary as the problem does, so all
    # of it is made from the problem.
    blank = jnp.zeros_like(cosines[0]) + 0 * power
    none = jnp.zeros_like(blank[0], jnp.int32)
    # The best multiple of equal y, unless y0 itself is a root (a diagonal Gramian).
    square = jnp.maximum(jnp.sum(dot(cosines, one)), eps * count**2)
    equal = (count / jnp.where(count > 0, square, 1)) ** (1 / (1 + power))
    start = jnp.where(residual(base * one) <= 8 * eps, base, equal) * one + blank
    first = residual(start)
    state = _State(
        y=start,
        s=jnp.where(present, equal**-power, 0) + blank,
        best=start,
        residual=first,
        stale=none,
        damping=jnp.full_like(blank[0], 2),
        iterations=none,
        done=first <= 8 * eps,
    )
    state = lax.while_loop(lambda state: ~state.done, advance, state)
    return state.best, state.residual, state.iterations


@jax.jit
def _solve(
    gramian: Array, alpha: Array, targets: Array, mask: Array
) -> tuple[Array, SolverInfo]:
    """`positive_root` with every argument an array."""
    dtype = gramian.dtype
    gramian = jnp.where(mask[:, None] & mask[None, :], gramian, 0)
    targets = jnp.where(mask, targets, 1)
    sound = (
        jnp.all(jnp.isfinite(gramian))
        & jnp.all(jnp.isfinite(targets) & (targets > 0))
        & jnp.isfinite(alpha)
        & (alpha > 0)
    )
    gramian = jnp.where(sound, gramian, 0)
    targets = jnp.where(sound, targets, 1)
    alpha = jnp.where(sound, alpha, 1)

    squares = jnp.diagonal(gramian)
    present = squares > 0
    largest = jnp.max(squares)
    largest = jnp.where(largest > 0, largest, 1)
    highest = jnp.max(jnp.where(present, targets, 0))
    highest = jnp.where(highest > 0, highest, 1)
    # Roots first: a ratio of squares may vanish where that of lengths does not.
    lengths = jnp.sqrt(jnp.where(present, squares, largest))
    norms = lengths / jnp.sqrt(largest)
    pairs = present[:, None] & present[None, :]
    cosines = gramian / lengths[:, None] / lengths[None, :]
    cosines = jnp.where(pairs, cosines, 0)

    # The root for orthogonal rows, in units of its largest entry. Few digits are lost
    # in logarithms of numbers near 1, and at alpha = 1 and equal targets none.
    relative = jnp.where(present, targets / highest, 1)
    logs = (jnp.log(relative) + (1 - alpha) * jnp.log(norms)) / (1 + alpha)
    top = jnp.max(jnp.where(present, logs, -jnp.inf))
    top = jnp.where(jnp.any(present), top, 0)
    base = jnp.exp(jnp.where(present, logs - top, 0))
    y, residual, iterations = _follow(cosines, base, 1 / alpha, present)

    # An error here is common to all tasks. Halves, as the whole could overflow.
    common = top + (jnp.log(highest) - alpha * jnp.log(largest)) / (1 + alpha)
    half = jnp.exp(common / 2)
    x = jnp.minimum(y * half / norms * half, jnp.finfo(dtype).max)
    x = jnp.where(sound, x, jnp.nan)
    return x, SolverInfo(jnp.where(sound, residual, jnp.nan), iterations)


def positive_root(
    gramian: Gramian,
    alpha: Scalar | float,
    *,
    targets: Float[Array, " tasks"] | None = None,
    task_mask: TaskMask | None = None,
) -> tuple[Weights, SolverInfo]:
    r"""Find the positive `x` with `G x = (omega / x)^(1 / alpha)`, inside the graph.

    .. math::
        \min_{x > 0} \; \tfrac12 x^\top G x - \sum_t \Phi_t(x_t), \qquad
        \Phi_t'(x) = (\omega_t / x)^{1 / \alpha}, \qquad G = J J^\top

    The combination `d = J^T x` has `g_t^T d = (omega_t / x_t)^(1 / alpha) > 0`, so it
    is a descent direction for every task. With `alpha = 1` and equal targets it is the
    Nash bargaining solution and its direction does not depend on the lengths of the
    rows; a larger alpha is fairer. The root is unique unless a convex combination of
    the rows vanishes (a Pareto-stationary point). There none exists: x grows until the
    equation holds up to rounding, and `J^T x` is small beside `max_t x_t |g_t|`, of the
    order `eps` if all tasks take part and else `eps^(alpha / (1 + alpha))`.

    Rows are divided by their lengths `n_t` and `y_t = n_t x_t` is found by a
    primal-dual interior-point method: 3 to 15 linear systems where the rows are of
    similar length or alpha is near 1, some 30 where they differ by 1e6 and alpha is
    0.3 or 4, never more than 100. Nothing depends on the scale: `c G` has the root
    `c^(-alpha / (1 + alpha)) x`. It has no derivative: treat x as constant.

    Args:
      gramian: `[T, T]`, inner products of the task gradients; float32 or float64,
        which is also the dtype of the computation.
      alpha: positive scalar, may be traced; meant for about 0.2 to 5.
      targets: `[T]`, `omega`, positive; ones by default.
      task_mask: `[T]`, true where a task is present; all by default. An absent
        task's entries are ignored, whatever they hold, and its x is zero.

    Returns:
      `(x, info)`: x `[T]` and a `SolverInfo`. A task whose row is zero counts as
      absent. x is zero if no task is left, NaN if a present entry is not finite or a
      target or alpha is not positive, and the largest float where it would overflow.
      `info.residual` is `max_t |(G x)_t - (omega_t / x_t)^(1 / alpha)| / (|G| x)_t`,
      which no rescaling changes, as computed in the scaled variables; `iterations`
      counts linear systems, 0 where the rows are orthogonal.

    Raises:
      TypeError: at trace time, if the matrix is neither float32 nor float64.
      ValueError: at trace time, if the shapes do not agree.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import positive_root
      >>> jacobian = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> x, info = positive_root(jacobian @ jacobian.T, 1.0)
      >>> print(x.round(3), (x @ jacobian).round(3))
      [1.  0.5] [1. 1.]

    References:
      Navon et al., Multi-task learning as a bargaining game, ICML 2022
      (arXiv:2202.01017); Ban and Ji, Fair resource allocation in multi-task
      learning, ICML 2024 (arXiv:2402.15638); Jansen, Roos, Terlaky and Vial,
      Primal-dual target-following algorithms for linear programming, Annals of
      Operations Research 62, 1996.
    """
    size, dtype = check_problem(gramian, targets=targets, task_mask=task_mask)
    exponent = jnp.asarray(alpha)
    if exponent.shape:
        raise ValueError(f"alpha has shape {exponent.shape}, expected a scalar")
    if targets is None:
        targets = jnp.ones(size, dtype)
    if task_mask is None:
        task_mask = jnp.ones(size, bool)
    targets = targets.astype(dtype)
    return _solve(gramian, exponent.astype(dtype), targets, task_mask)
