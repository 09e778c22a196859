"""STCH: smooth Tchebycheff scalarization.

A smooth maximum of the preferred losses is minimised (Lin et al. 2024,
arXiv:2402.19078).

    phi(L) = mu log sum_t exp(lambda_t (L_t - z_t) / mu)
    w_t = lambda_t softmax(lambda (L - z) / mu)_t
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_choice, check_num_tasks, check_positive
from mtl_optax._scalarized import LEAST_LOSS, floored, read_point, scalarized
from mtl_optax._solved import read_per_task, shares_of
from mtl_optax._transform import Combiner, Scale
from mtl_optax._types import Losses, Scalar, TaskMask

LossForm: TypeAlias = Literal["plain", "log"]


def _smooth_max(
    heights: Float[Array, " tasks"], mu: float | jax.Array, task_mask: TaskMask
) -> Scalar:
    """``mu log sum exp(heights / mu)``, about the highest: nothing overflows."""
    still = jax.lax.stop_gradient(heights)
    top = jnp.max(still, where=task_mask, initial=-jnp.inf)
    top = jnp.where(jnp.any(task_mask), top, 0)
    below = still - top
    # Products are rounded anew when a compiler fuses them into a difference; divided
    # by mu, that of the highest from itself may be huge.
    same = below >= -jnp.finfo(below.dtype).eps * jnp.abs(top)
    powers = jnp.where(task_mask, jnp.exp(jnp.where(same, 0, below) / mu), 0)
    total = jnp.where(jnp.any(task_mask), jnp.sum(powers), 1)
    # The last sum is zero; it only carries the gradient, which is the softmax.
    shift = jnp.sum(powers / total * (heights - still))
    return mu * jnp.log(total) + top + shift


def stch(
    num_tasks: int,
    *,
    mu: float | jax.Array = 1.0,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    reference: Sequence[float] | Float[Array, " tasks"] | None = None,
    form: LossForm = "plain",
    scale: Scale = "paper",
) -> Combiner:
    r"""A smooth maximum of the losses: the worst task counts most.

    .. math:: u = \sum_t \lambda_t \, \mathrm{softmax}
              \Big( \frac{\lambda (f - z)}{\mu} \Big)_t \nabla f_t, \qquad
              f = L \text{ or } \log L

    With `mu` small enough and the preference varied, it reaches every point of the
    Pareto front, those in hollows too, which no constant weights do; at the cost of
    plain training. Use it to choose a trade-off, or to hold the worst task down. As
    `mu` falls it turns into the maximum, which trains one task at a time; as it rises,
    into constant weights.
    Losses of different units need ``form="log"`` with a `reference` (a typical loss of
    each task), or a preference that undoes them; in the log form without a reference,
    equal preferences of 1 at ``mu=1`` give the plain sum, shortened.

    Args:
      num_tasks: T.
      mu: how smooth, positive, in the unit of ``lambda * f``. 1 in LibMTL; the paper
        looks at 0.01, 0.1, 0.5 and 1.
      preference: lambda, ``[T]``, not negative, not all zero; ``1 / T`` each by
        default. May be traced, to be drawn anew at every step.
      reference: z, ``[T]``, in the unit of the losses: the ideal point, which is
        subtracted. With ``form="log"`` the nadir, positive, by which losses are
        divided. Nothing by default.
      form: ``"log"`` takes logarithms of the losses, as the authors' code for
        multi-task learning does; losses must then be positive (one that is not counts
        as 1e-20 of its reference).
      scale: see `from_weighting`.

    Returns:
      a `Combiner`; ``objective`` in its state is the smooth maximum. The weights of
      ``form="plain"`` add up to ``1 / T`` without a preference; losses may then be
      negative.

    Raises:
      ValueError: when `mu` is concrete and not positive; for a preference or reference
        of another shape or out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.stch(num_tasks=2, preference=[1.0, 1.0])
      >>> g = {"w": jnp.array([[4.0, 8.0], [0.0, 4.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> losses = jnp.log(jnp.array([3.0, 1.0]))
      >>> updates, _ = tx.update(g, state, losses=losses)
      >>> [f"{u:.3f}" for u in updates["w"]]  # weights 3/4 and 1/4
      ['3.000', '7.000']

    References:
      Lin et al., `Smooth Tchebycheff Scalarization for Multi-Objective Optimization
      <https://arxiv.org/abs/2402.19078>`_, ICML 2024.

    Differs from the authors' code for multi-task learning (and LibMTL's): that is
    ``form="log"`` with ``preference=[1] * T``, T times as long, and with a nadir that
    is the mean loss of each task over one epoch after a warm-up on `scale_invariant`.
    Here the nadir is given; run `scale_invariant` first to find one.
    """
    check_num_tasks(num_tasks)
    check_positive("mu", mu)
    check_choice("form", form, get_args(LossForm))
    given = read_per_task("preference", preference, num_tasks)
    point = read_point("reference", reference, num_tasks, positive=form == "log")

    def worst(losses: Losses, learned: Any, task_mask: TaskMask) -> Scalar:
        del learned
        zero = 0 if point is None else jnp.asarray(point, losses.dtype)
        if form == "plain":
            f = losses - zero
        else:
            one = 1 if point is None else zero
            f = jnp.log(floored(losses / one, LEAST_LOSS))
        return _smooth_max(shares_of(given, task_mask, losses.dtype) * f, mu, task_mask)

    return scalarized(worst, num_tasks, scale=scale)
