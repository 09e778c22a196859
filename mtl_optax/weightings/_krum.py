"""Krum: the gradients closest to their neighbours.

Made for distributed learning with broken workers; here tasks vote (Blanchard et al.
2017, NeurIPS, section 4; multi-Krum, section 5).

    score_i = sum of |g_i - g_j|^2 over the  T - f - 2  closest j != i
    w = 1 / m  for the m tasks of lowest score, else 0
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._arguments import check_count, check_num_tasks
from mtl_optax._cond import anew_if
from mtl_optax._solved import init_stateless
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import Gramian, TaskMask, Weighting, Weights


def _square_distances(gramian: Array) -> Array:
    """``|g_i - g_j|^2``, of the Gramian of rows or of their differences from one."""
    squares = jnp.diag(gramian)
    between = (gramian + gramian.T) / 2
    return jnp.maximum(squares[:, None] + squares[None, :] - 2 * between, 0)


def _nearly_equal(gramian: Array, distances: Array) -> Array:
    """Pairs of rows whose distance has lost a digit beside their lengths, or all."""
    tenth = 0.1 * jnp.diag(gramian)
    far = distances >= tenth[:, None] + tenth[None, :]
    return ~(far & jnp.isfinite(distances))


def _most_central(distances: Array, others: Array) -> Array:
    """The task whose middle neighbour is nearest: no outlier, if they are the fewer."""
    near = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
    count = jnp.sum(others.astype(jnp.int32), axis=1)
    middle = jnp.take_along_axis(
        near, (jnp.maximum(count - 1, 0) // 2)[:, None], axis=1
    )
    return jnp.argmin(jnp.where(count > 0, middle[:, 0], jnp.inf))


def krum(
    num_tasks: int,
    *,
    num_selected: int = 1,
    num_byzantine: int = 0,
    squared: bool = True,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The mean of the few task gradients that lie closest to the others.

    .. math:: u = \frac{1}{m} \sum_{t \in S} g_t, \qquad S: \text{ the } m \text{ lowest
       of } \sum_{j \in N(t)} \|g_t - g_j\|^2

    with N(t) the ``T - num_byzantine - 2`` nearest neighbours of t. Use it where the
    "tasks" are noisy copies of one (workers, ensembles, augmentations) and some may be
    broken or adversarial. For tasks that really differ it drops most of them.

    Args:
      num_tasks: T.
      num_selected: m; 1 is Krum, more is multi-Krum.
      num_byzantine: how many tasks may be broken; needs ``T >= num_byzantine + 3``
        (the paper's guarantee: ``T >= 2 num_byzantine + 3``).
      squared: sum squared distances, as in the paper; False sums distances, as TorchJD
        does.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. Losses are not needed. Ties go to the first task; with fewer than
      four present tasks a lone neighbour is counted. Parallel tasks are as any others.
      Where some gradients nearly agree it takes a second Gramian, of differences from
      the most central task. A worker that sends NaN or infinity: wrap it in
      `skip_nonfinite_tasks`.

    Raises:
      ValueError: if ``num_selected`` exceeds T, or T is too small.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.krum(num_tasks=4, num_selected=2, num_byzantine=1)
      >>> g = {"w": jnp.array([[1.0, 1.0], [1.0, 2.2], [1.0, 1.5], [75.0, -666.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"]
      Array([1.  , 1.25], dtype=float32)

    References:
      Blanchard et al., `Machine Learning with Adversaries: Byzantine Tolerant Gradient
      Descent <https://arxiv.org/abs/1703.02757>`_, NeurIPS 2017.
    """
    check_num_tasks(num_tasks)
    check_count("num_selected", num_selected)
    if num_selected > num_tasks:
        raise ValueError(f"num_selected={num_selected} exceeds num_tasks={num_tasks}.")
    check_count("num_byzantine", num_byzantine, least=0)
    if num_byzantine and num_tasks < num_byzantine + 3:
        raise ValueError(
            f"num_byzantine={num_byzantine} needs at least {num_byzantine + 3} tasks, "
            f"got num_tasks={num_tasks}."
        )

    def update(
        gramian: Gramian,
        state: tuple[()],
        *,
        gramian_in_basis: Callable[[Array], Array],
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, tuple[()]]:
        del extra
        dtype = gramian.dtype
        diagonal = jnp.eye(num_tasks, dtype=bool)
        others = task_mask[:, None] & task_mask & ~diagonal
        # In float32 a Gramian of the rows has lost the distances of nearly equal ones,
        # and one of differences from the mean loses them where one row is far away.
        distances = _square_distances(gramian)
        origin = _most_central(distances, others)
        basis = diagonal.astype(dtype) - jax.nn.one_hot(origin, num_tasks, dtype=dtype)
        basis = jnp.where(task_mask[:, None], basis, jnp.zeros((), dtype))
        distances = anew_if(
            jnp.any(others & _nearly_equal(gramian, distances)),
            lambda basis: _square_distances(gramian_in_basis(basis).astype(dtype)),
            basis,
            distances,
            often=True,
        )
        largest = jnp.max(jnp.where(others, distances, jnp.zeros((), dtype)))
        distances = distances / jnp.where(largest > 0, largest, jnp.ones((), dtype))
        distances = distances if squared else jnp.sqrt(distances)
        nearest = jnp.sort(jnp.where(others, distances, jnp.inf), axis=1)
        count = jnp.sum(task_mask.astype(jnp.int32))
        least = jnp.minimum(count - 1, 1)
        neighbours = jnp.clip(count - num_byzantine - 2, least, num_tasks)
        counted = jnp.arange(num_tasks) < neighbours
        scores = jnp.sum(jnp.where(counted, nearest, jnp.zeros((), dtype)), axis=1)
        places = jnp.argsort(jnp.argsort(jnp.where(task_mask, scores, jnp.inf)))
        chosen = jnp.clip(count, 1, num_selected)
        weights = (places < chosen).astype(dtype) / chosen.astype(dtype)
        sound = jnp.all(
            jnp.isfinite(jnp.where(others, distances, jnp.zeros((), dtype)))
        )
        return jnp.where(sound, weights, jnp.nan), state

    return from_weighting(
        Weighting(init_stateless, update, frozenset({"gramian", "gramian_in_basis"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
