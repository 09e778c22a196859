"""CAGrad: conflict-averse gradient descent.

The direction near the mean gradient along which the worst task improves most (Liu et
al. 2021, arXiv:2110.14048, algorithm 1; sub-sampling, section 3.3).

    max_d min_t <g_t, d>   s.t.  |d - g_0| <= c |g_0|,   g_0 = mean_t g_t
    w = argmin_{w in simplex}  <g_w, g_0> + c |g_0| |g_w|
    u = g_0 + c |g_0| g_w / |g_w|
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._arguments import check_count, check_nonnegative, check_num_tasks
from mtl_optax._random import uniform_by_task
from mtl_optax._solved import SolvedState, init_solved, shares_of, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import averse_weights


def _sampled(key: jax.Array, task_mask: TaskMask, number: int) -> Array:
    """``[number, T]``: tasks drawn at random, and in the last row the rest's mean."""
    present = task_mask.astype(float)  # float64 where that is enabled
    draws = jnp.where(task_mask, uniform_by_task(key, task_mask), jnp.inf)
    places = jnp.argsort(jnp.argsort(draws))
    drawn = jax.nn.one_hot(places, number - 1, axis=0, dtype=present.dtype) * present
    rest = present - jnp.sum(drawn, axis=0)
    rest = rest / jnp.maximum(jnp.sum(rest), 1)
    return jnp.concatenate([drawn, rest[None]])


def cagrad(
    num_tasks: int,
    *,
    c: float | jax.Array = 0.4,
    num_sampled: int | None = None,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The direction near the mean gradient that helps the worst-off task most.

    .. math:: u = g_0 + c \|g_0\| \frac{g_w}{\|g_w\|}, \qquad
       w = \arg\min_{w \in \Delta_T} \langle g_w, g_0 \rangle + c \|g_0\| \|g_w\|,

    where :math:`g_w = \sum_t w_t g_t` and :math:`g_0` is the mean gradient.

    It solves ``max_d min_t <g_t, d>`` within ``c |g_0|`` of the mean. For c below 1 it
    converges to a minimum of the mean loss, as plain training does, and on the way
    spares the worst task; at 0 it is plain training, towards 1 and above it approaches
    `mgda`. Use it where the mean loss is what counts and conflicts hurt. The worst
    task is the one whose loss falls least *in its own units*, so the scale of losses
    matters. For c below 1 it may conflict.

    Args:
      num_tasks: T.
      c: the radius, not negative; may be traced. 0.4 is what the authors run on NYUv2.
      num_sampled: n; only ``n - 1`` tasks drawn at random at every step stand for
        themselves, the rest for their mean (the paper's CAGrad-Fast). A lazy tree then
        costs n backward passes for the Gramian, not T. ``update`` needs ``key=``, a
        fresh `jax.random.key` at every step. With n of T and more it is plain CAGrad.
      scale: see `from_weighting`; ``"paper"`` is the formula above. (The authors' code
        divides it by ``1 + c**2``, and multiplies by T.)
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative KKT residual.
      Losses are not needed. A task whose gradient is zero counts in the mean, but is
      not "the worst task": it does not hold the others up. Of parallel tasks the
      shortest counts as the worst. Of two opposite ones the one that the mean goes
      against is spared; where a combination of the gradients that vanishes is the best
      there is (c above 1), the update is the mean gradient.

    Raises:
      ValueError: if c is concrete and negative, or ``num_sampled`` is below 2.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.cagrad(num_tasks=2, c=0.5)
      >>> g = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(3)}))
      >>> [f"{x:.4f}" for x in updates["w"]]
      ['0.1835', '1.2041', '1.2041']

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021.

    Differs from the authors' code: the minimum is exact; sub-sampling counts every
    task (theirs leaves one out at every step); the length, see `scale`.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("c", c)
    if num_sampled is not None:
        check_count("num_sampled", num_sampled, least=2)

    def update(
        gramian: Gramian, state: SolvedState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        shares = shares_of(None, task_mask, gramian.dtype)
        radius = jnp.asarray(c, gramian.dtype)
        weights, info = averse_weights(gramian, shares, radius, task_mask)
        return weights, solved(info.residual)

    def update_sampled(
        gramian: None,
        state: SolvedState,
        *,
        gramian_in_basis: Callable[[Array], Array],
        task_mask: TaskMask,
        key: jax.Array,
        **extra: Any,
    ) -> tuple[Weights, SolvedState]:
        del gramian, state, extra
        assert num_sampled is not None
        basis = _sampled(key, task_mask, num_sampled)
        groups = gramian_in_basis(basis)
        dtype = groups.dtype
        members = jnp.sum((basis > 0).astype(dtype), axis=1)
        shares = members / jnp.maximum(jnp.sum(task_mask.astype(dtype)), 1)
        radius = jnp.asarray(c, dtype)
        weights, info = averse_weights(groups, shares, radius, members > 0)
        weights = jnp.matmul(weights, basis.astype(dtype), precision=HIGHEST)
        return weights, solved(info.residual)

    if num_sampled is None or num_sampled > num_tasks:
        weighting = Weighting(init_solved, update, frozenset({"gramian"}))
    else:
        needs = frozenset({"gramian_in_basis", "key"})
        weighting = Weighting(init_solved, update_sampled, needs)
    return from_weighting(weighting, num_tasks, scale=scale, axis_name=axis_name)
