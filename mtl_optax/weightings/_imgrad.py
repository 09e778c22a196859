"""IMGrad: imbalance-sensitive conflict aversion.

CAGrad's update, whose inner problem leans on the mean gradient the less, the more that
agrees with the common descent direction (Zhou et al. 2025, arXiv:2503.08006,
equation 11).

    cos = cosine of the mean gradient g_0 and the MGDA point
    w = argmin_{w in simplex}  (1.5 - cos) <g_w, g_0> + cos c |g_0| |g_w|
    u = g_0 + c |g_0| g_w / |g_w|
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._solved import shares_of
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType, Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import averse_weights, min_norm_point


class ImgradInfo(NamedTuple):
    """What to look at.

    Attributes:
      solver_residual: the larger relative KKT residual of the two problems.
      imbalance_cosine: the cosine between the mean gradient and the MGDA point.
    """

    solver_residual: Float[Array, ""]
    imbalance_cosine: Float[Array, ""]


class ImgradState(NamedTuple):
    """Nothing is needed at the next step."""

    info: ImgradInfo


def imgrad(
    num_tasks: int,
    *,
    c: float | jax.Array = 0.8,
    offset: float | jax.Array = 1.5,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""CAGrad, more or less averse to conflict by how unbalanced the gradients are.

    .. math:: u = g_0 + c \|g_0\| \frac{g_w}{\|g_w\|}, \qquad
       w = \arg\min_{w \in \Delta_T} (o - \cos\theta) \langle g_w, g_0 \rangle
           + \cos\theta \, c \|g_0\| \|g_w\|

    with :math:`\theta` the angle between the mean gradient and the shortest convex
    combination (`mgda`). Where one long gradient turns the mean away from the common
    descent direction, the first term wins and the update looks after the task that the
    mean serves worst. Use it in CAGrad's place where task gradients differ in length.
    As there, the scale of losses matters, and it may conflict.

    Args:
      num_tasks: T.
      c: the radius, not negative; may be traced. 0.8 is what the authors run.
      offset: o, not negative; may be traced. 1.5 in the authors' code; the paper's
        equation has 1, with which a mean gradient that points along the descent
        direction counts for nothing.
      scale: see `from_weighting`; ``"paper"`` is the formula above. (The authors' code
        divides it by ``1 + c**2``, and multiplies by T.)
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; its state shows ``solver_residual`` and ``imbalance_cosine``. Losses
      are not needed. A task whose gradient is zero counts in the mean only. Of parallel
      tasks the shortest counts as the worst. Where a convex combination of the
      gradients vanishes the update leans on the worst task alone.

    Raises:
      ValueError: if c or offset is concrete and negative.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.imgrad(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 3.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"].round(3)
      Array([2.7, 2.7], dtype=float32)

    References:
      Zhou et al., `Injecting Imbalance Sensitivity for Multi-Task Learning
      <https://arxiv.org/abs/2503.08006>`_, IJCAI 2025.

    Differs from the authors' code: both problems are solved exactly. The paper prints
    the norm of the second term squared; the code, and this, do not square it.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("c", c)
    check_nonnegative("offset", offset)

    def init(num_tasks: int, dtype: DType) -> ImgradState:
        del num_tasks
        return ImgradState(ImgradInfo(jnp.zeros((), dtype), jnp.zeros((), dtype)))

    def update(
        gramian: Gramian, state: ImgradState, *, task_mask: TaskMask, **extra: Any
    ) -> tuple[Weights, ImgradState]:
        del state, extra
        dtype = gramian.dtype
        shares = shares_of(None, task_mask, dtype)
        active = task_mask & ~(jnp.diag(gramian) == 0)
        m, nearest = min_norm_point(gramian, task_mask=active)
        towards = jnp.matmul(gramian, m, precision=HIGHEST)
        mean = jnp.matmul(gramian, shares, precision=HIGHEST)
        square = jnp.sum(m * towards)
        # Below it the shortest combination is what rounding leaves of zero.
        rows = jnp.sum(m * jnp.sqrt(jnp.maximum(jnp.diag(gramian), 0)))
        real = square > 4 * num_tasks * jnp.finfo(dtype).eps * rows**2
        square = jnp.where(real, square, 0)
        # Square roots first: a product of squares would underflow.
        size = jnp.sqrt(jnp.maximum(jnp.sum(shares * mean), 0)) * jnp.sqrt(square)
        cosine = jnp.sum(m * mean) / jnp.where(size > 0, size, 1)
        cosine = jnp.where(size > 0, jnp.clip(cosine, 0, 1), 0)
        weights, info = averse_weights(
            gramian,
            shares,
            jnp.asarray(c, dtype),
            task_mask,
            linear_factor=jnp.asarray(offset, dtype) - cosine,
            norm_factor=cosine,
        )
        residual = jnp.maximum(nearest.residual, info.residual)
        return weights, ImgradState(ImgradInfo(residual, cosine))

    return from_weighting(
        Weighting(init, update, frozenset({"gramian"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
