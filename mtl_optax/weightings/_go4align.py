"""GO4Align: group optimisation for multi-task alignment.

Weights of groups of tasks that learn alike, found anew at every step (Shen et al. 2024,
arXiv:2404.06486; formula from the authors' code).

    p_t ~ p_t exp(-eta L_t),   sum p = 1
    v_t = p_t sum_s L_s / L_t
    w_t = mean of v over the group of task t, for the K groups that k-means makes of v
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_count, check_nonnegative
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType, Losses, TaskMask, Weighting, Weights

# Of the sum of losses: what a single one counts at least.
_SMALLEST_SHARE = 1e-8


class GO4AlignState(NamedTuple):
    """State of `go4align`: logarithms of p, up to a constant."""

    log_indicators: Float[Array, " tasks"]


def _log_values(losses: Losses, log_p: Array, mask: TaskMask) -> Array:
    """``log v [T]``; a negative loss counts by its size, and -inf is an absent task."""
    sizes = jnp.where(mask, jnp.abs(losses), 0)
    total = jnp.sum(sizes)
    shares = jnp.where(total > 0, sizes / jnp.where(total > 0, total, 1), 1)
    shares = shares / jnp.maximum(jnp.sum(shares, where=mask), _SMALLEST_SHARE)
    p = jax.nn.log_softmax(log_p, where=mask)
    return jnp.where(mask, p - jnp.log(jnp.maximum(shares, _SMALLEST_SHARE)), -jnp.inf)


def _spreads(points: Array, mask: TaskMask) -> Array:
    """``[T, T]``: squares about their mean of the points from i to j, j included."""
    places = jnp.arange(points.shape[0])

    def join(seen: tuple[Array, Array, Array], place: Array) -> Any:
        count, mean, spread = seen  # of the points from each i on
        joins = (places <= place) & mask[place]
        count = count + joins.astype(points.dtype)
        apart = points[place] - mean
        mean = mean + jnp.where(joins, apart / jnp.maximum(count, 1), 0)
        spread = spread + jnp.where(joins, apart * (points[place] - mean), 0)
        return (count, mean, spread), spread

    nothing = jnp.zeros_like(points)
    return lax.scan(join, (nothing, nothing, nothing), places)[1].T


def _group(points: Array, mask: TaskMask, num_groups: int) -> Array:
    """Labels of sorted points by exact k-means: on a line groups are intervals.

    The best division of the points up to j into k groups has a last group from some i
    to j, and before it the best division into k - 1.
    """
    places = jnp.arange(points.shape[0])
    spreads = _spreads(points, mask)
    spreads = jnp.where(places[:, None] <= places, spreads, jnp.inf)

    def one_more(best: Array, _: None) -> tuple[Array, Array]:
        before = jnp.concatenate([jnp.zeros_like(best[:1]), best[:-1]])
        totals = before[:, None] + spreads
        return jnp.min(totals, axis=0), jnp.argmin(totals, axis=0)

    _, first = lax.scan(one_more, spreads[0], length=num_groups - 1)

    def cut(last: Array, firsts: Array) -> tuple[Array, Array]:
        start = firsts[last]
        return jnp.maximum(start - 1, 0), (places >= start).astype(jnp.int32)

    _, begun = lax.scan(cut, places[-1], first, reverse=True)
    return jnp.sum(begun, axis=0)


def _group_means(values: Array, mask: TaskMask, num_groups: int) -> Array:
    """Each point's group's mean."""
    order = jnp.argsort(jnp.where(mask, values, jnp.inf))
    points, here = values[order], mask[order]
    labels = _group(points, here, num_groups)
    same = ((labels[:, None] == labels) & here).astype(values.dtype)
    sums = jnp.matmul(same, points, precision=HIGHEST)
    means = sums / jnp.maximum(jnp.sum(same, axis=1), 1)
    return jnp.zeros_like(values).at[order].set(means)


def go4align(
    num_tasks: int,
    *,
    num_groups: int = 2,
    step_size: float | jax.Array = 1e-4,
    scale: Scale = "paper",
) -> Combiner:
    r"""Inverse losses as weights, shared by groups of tasks that learn alike.

    .. math:: u = \sum_t w_t g_t, \qquad w_t = \mathrm{mean}_{s \in G(t)} v_s, \qquad
       v_t = p_t \frac{\sum_s L_s}{L_t}, \qquad p_t \propto p_t e^{-\eta L_t}

    :math:`G(t)` is the group of task t when k-means divides :math:`v` into K groups.
    Division by the loss takes units away; p, which remembers all losses so far, favours
    tasks that have had small ones, very slowly; the groups keep the weights of similar
    tasks from drifting apart. Use it for many tasks of like kind in positive units. It
    knows nothing of conflict, and a task's weight jumps when it changes its group.

    Args:
      num_tasks: T.
      num_groups: K. 1 gives all tasks the mean weight, T gives each its own. Not more
        than the tasks that are there is used. 2 is our choice; the authors' script for
        NYUv2 leaves it to the user, with 1 by default.
      step_size: eta, per unit of loss and step, not negative. 0.0001 in the authors'
        code.
      scale: see `from_weighting`. ``"paper"``: about one a task, for equal losses.

    Returns:
      a `Combiner`. A loss below zero counts by its size; none counts for less than
      1e-8 of their sum. Losses that are not finite are not remembered.

    Raises:
      ValueError, TypeError: for no groups; when `step_size` is concrete and negative or
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.go4align(num_tasks=3, step_size=0.0)
      >>> g = {"w": jnp.eye(3)}
      >>> losses = jnp.array([4.0, 2.0, 2.0])  # v = 8/12, 8/6, 8/6
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(3)}), losses=losses)
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['0.667', '1.333', '1.333']

    References:
      Shen et al., `GO4Align: Group Optimization for Multi-Task Alignment
      <https://arxiv.org/abs/2404.06486>`_, NeurIPS 2024.

    Differs from the authors' code: k-means is exact (theirs starts at random points and
    stops at a local minimum, so two runs may differ). A task that is absent keeps its p
    relative to the best task present.
    """
    check_count("num_groups", num_groups)
    check_nonnegative("step_size", step_size)

    def init(num_tasks: int, dtype: DType) -> GO4AlignState:
        return GO4AlignState(jnp.zeros((num_tasks,), dtype))

    def update(
        gramian: None,
        state: GO4AlignState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, GO4AlignState]:
        del gramian, extra
        least = jnp.min(losses, where=task_mask, initial=jnp.inf)
        moved = state.log_indicators - step_size * (losses - least)
        # One that is NaN would never be forgotten.
        known = task_mask & jnp.isfinite(moved)
        log_p = jnp.where(known, moved, state.log_indicators).astype(losses.dtype)
        logs = _log_values(losses, log_p, task_mask)
        # Relative to the largest, whose own size float32 may square safely.
        top = jnp.max(logs, initial=-jnp.inf, where=task_mask)
        relative = jnp.where(task_mask, jnp.exp(logs - top), 0)
        means = _group_means(relative, task_mask, min(num_groups, losses.shape[0]))
        return jnp.exp(top) * means, GO4AlignState(log_p)

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
