"""MGDA: the multiple-gradient descent algorithm.

The shortest vector in the convex hull of the task gradients
(Désidéri 2012, equation 13; Sener & Koltun 2018, arXiv:1810.04650, equation 3).

    w = argmin_{w in simplex} || sum_t w_t g_t / n_t ||^2
    n_t = 1, |g_t|, L_t or L_t |g_t|
"""

from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp

from mtl_optax._arguments import check_choice
from mtl_optax._solved import SolvedState, init_solved, solved
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, Losses, TaskMask, Weighting, Weights
from mtl_optax.solvers import min_norm_point, unit_rows

Normalization: TypeAlias = Literal["none", "l2", "loss", "loss+"]


# Of two losses: beyond it they count as this far apart.
_LEAST_RATIO = 1e-7


def _normalized(
    gramian: Gramian, losses: Losses, mask: TaskMask, normalization: Normalization
) -> Gramian:
    """The Gramian of ``g_t / n_t``, up to a factor; a zero row stays one."""
    by_length = normalization in ("l2", "loss+")
    products = unit_rows(gramian, mask).cosines if by_length else gramian
    if normalization == "l2":
        return products
    sizes = jnp.abs(losses)
    # A loss of zero counts as the smallest that is not; a NaN stays one.
    zero = sizes == 0
    smallest = jnp.min(sizes, where=mask & ~zero, initial=jnp.inf)
    inverse = jnp.where(zero, 1, smallest / jnp.where(zero, 1, sizes))
    inverse = jnp.clip(inverse, _LEAST_RATIO, 1)  # its square must not vanish
    return products * inverse[:, None] * inverse[None, :]


def mgda(
    num_tasks: int,
    *,
    normalization: Normalization = "none",
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The shortest convex combination of the task gradients.

    .. math:: u = \sum_t w_t g_t, \qquad
              w = \arg\min_{w \in \Delta_T} \Big\| \sum_t w_t g_t \Big\|^2

    No task's loss rises along it, to first order, and it is zero exactly where no
    direction helps all tasks. It follows the *shortest* gradients: a task that has
    nearly converged slows all others, and one with a zero gradient stops them. Use it
    to find out whether tasks conflict; prefer `edm` or `task_tensioner` to train tasks
    whose gradients differ in length, or a normalization.

    Args:
      num_tasks: T.
      normalization: what gradients are divided by before the shortest combination is
        sought; its weights then apply to the raw gradients. ``"none"``; ``"l2"``, their
        lengths; ``"loss"``, their losses (in size); ``"loss+"``, the product of both,
        as in the authors' experiments. With any of these the update no longer follows
        the shortest gradients, but may conflict.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``solver_residual`` in its state is the relative KKT residual.
      Losses are needed by ``"loss"`` and ``"loss+"`` only. Of two parallel gradients it
      takes the shorter (after normalization); a task with a zero gradient takes all
      weight.

    Raises:
      ValueError: for an unknown normalization.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.mgda(num_tasks=2)
      >>> g = {"w": jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(3)}))[0]["w"].round(4)
      Array([0., 1., 1.], dtype=float32)

    References:
      Désidéri, Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization, 2012; Sener & Koltun, `Multi-Task Learning as Multi-Objective
      Optimization <https://arxiv.org/abs/1810.04650>`_, 2018.

    Differs from the authors' code: the minimum is exact; theirs stops Frank-Wolfe
    early and keeps pair weights within 0.001 and 0.999.
    """
    check_choice("normalization", normalization, get_args(Normalization))
    needs = {"gramian", "losses"} if "loss" in normalization else {"gramian"}

    def update(
        gramian: Gramian,
        state: SolvedState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, SolvedState]:
        del state, extra
        if normalization != "none":
            gramian = _normalized(gramian, losses, task_mask, normalization)
        weights, info = min_norm_point(gramian, task_mask=task_mask)
        return weights, solved(info.residual)

    return from_weighting(
        Weighting(init_solved, update, frozenset(needs)),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
