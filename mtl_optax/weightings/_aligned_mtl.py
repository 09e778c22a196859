"""Aligned-MTL: the linear system of task gradients, made perfectly conditioned.

The gradient matrix is replaced by the nearest one with equal singular values
(Senushkin et al. 2023, CVPR, arXiv:2305.19000, equations 7-9).

    G = V diag(lambda) V^T
    w = sqrt(s) V diag(lambda)^(-1/2) V^T p,   s = min (median, rmse) of the lambda > 0
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_choice, check_num_tasks
from mtl_optax._solved import init_stateless, read_per_task, shares_of
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import graded_eigh

Singular: TypeAlias = Literal["min", "median", "rmse"]


def _common_value(values: Array, kept: Array, singular: Singular) -> Array:
    """``s``: what all eigenvalues become."""
    if singular == "min":
        return jnp.min(jnp.where(kept, values, jnp.inf))
    if singular == "rmse":
        count = jnp.maximum(jnp.sum(kept.astype(values.dtype)), 1)
        return jnp.sum(jnp.where(kept, values, 0)) / count
    # Of an even number the lower one, as `torch.median` gives it.
    ordered = jnp.sort(jnp.where(kept, values, jnp.inf))
    return ordered[jnp.maximum(jnp.sum(kept.astype(jnp.int32)) - 1, 0) // 2]


def aligned_mtl(
    num_tasks: int,
    *,
    preference: Sequence[float] | Float[Array, " tasks"] | None = None,
    singular: Singular = "min",
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The preferred combination of task gradients that have been made orthogonal.

    .. math:: u = J^\top B p, \qquad B = \sqrt{s} \, V \Lambda^{-1/2} V^\top, \qquad
              J J^\top = V \Lambda V^\top

    The matrix of task gradients is replaced by the nearest one whose singular values
    are all the same, :math:`\sqrt{s}`: tasks that agree no longer add up, tasks that
    conflict no longer cancel, and none dominates. Use it where tasks are correlated or
    of different scale. With ``"min"``, the authors' choice, an update is as short as
    the weakest principal component, so it slows down where tasks are nearly parallel
    or one gradient is tiny. It is not free of conflicts.

    Args:
      num_tasks: T.
      preference: ``[T]``, p, in the order of the losses (a dict's keys are sorted); not
        negative, not all zero, and taken as it is: ones step T times as far as the
        default, one over the number of present tasks.
      singular: what the squared singular values become: the smallest, the (lower)
        median, or the mean of those that are not zero (``"rmse"``).
      scale: see `from_weighting`; ``"paper"`` with the default preference is the mean
        of the aligned gradients. The authors' code sums them, T times that.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Losses are not needed. Singular values below rounding count as
      zero: of tasks on one line, parallel or opposite, the preferred combination itself
      is left.

    Raises:
      ValueError: for an unknown `singular` or a preference that does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.aligned_mtl(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(4)
      Array([0.5, 0.5], dtype=float32)

    References:
      Senushkin et al., `Independent Component Alignment for Multi-Task Learning
      <https://arxiv.org/abs/2305.19000>`_, CVPR 2023.

    Differs from the authors' code: the eigenvalues are found by a method that keeps
    short gradients apart from rounding (theirs loses, in float32, a task whose gradient
    is some thousand times shorter than another's); theirs sums, see `scale`.
    """
    check_num_tasks(num_tasks)
    check_choice("singular", singular, get_args(Singular))
    preferred = read_per_task("preference", preference, num_tasks)

    def update(
        gramian: Gramian, state: tuple[()], *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, tuple[()]]:
        del extra
        dtype = gramian.dtype
        largest = jnp.max(jnp.diag(gramian))  # only ratios count
        relative = gramian / jnp.where(largest > 0, largest, jnp.ones_like(largest))
        values, vectors, kept = graded_eigh(relative)
        common = _common_value(values, kept, singular)
        factors = jnp.where(kept, jnp.sqrt(common / jnp.where(kept, values, 1)), 0)
        wanted = shares_of(preferred, task_mask, dtype)
        along = factors * jnp.matmul(wanted, vectors, precision=HIGHEST)
        return jnp.matmul(vectors, along, precision=HIGHEST), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
