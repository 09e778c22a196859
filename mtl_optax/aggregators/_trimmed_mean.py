"""Trimmed mean: at every entry, the mean without the largest and smallest.

Made for distributed learning with broken workers; here tasks are averaged (Yin et al.
2018, ICML, arXiv:1803.01498).

    u_p = mean of what is left of {g_1p, ..., g_Tp} without the k largest and k smallest
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._arguments import check_count, check_num_tasks
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import (
    accumulator,
    choose_rows,
    flatten,
    mix_rows,
    present_rows,
    whole_task_axis,
)
from mtl_optax._types import Aggregator, Params, TaskGradients, TaskMask, Updates
from mtl_optax.solvers import sorted_rows


def _middle(task_mask: TaskMask, trim_number: int) -> tuple[TaskMask, Array]:
    """Which places of a sorted column count, absent tasks last, and how many."""
    count = jnp.sum(task_mask.astype(jnp.int32))
    # With too few tasks, as many as leave one or two: the median.
    trimmed = jnp.minimum(trim_number, (jnp.maximum(count, 1) - 1) // 2)
    places = jnp.arange(task_mask.shape[0])
    return (places >= trimmed) & (places < count - trimmed), count - 2 * trimmed


def trimmed_mean(
    num_tasks: int,
    *,
    trim_number: int = 1,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The mean of the task gradients, entry by entry without the most extreme ones.

    .. math:: u_p = \frac{1}{T - 2k} \sum_{i=k+1}^{T-k} g_{(i)p}, \qquad
              g_{(1)p} \le \dots \le g_{(T)p}

    Use it where the "tasks" are noisy copies of one (workers, ensembles, augmentations)
    of which up to k may be broken or adversarial: no k of them can move an entry beyond
    what the others say. For tasks that really differ it is a poor choice: entries that
    one task alone cares about are trimmed away. It needs every task's own gradient.

    Args:
      num_tasks: T.
      trim_number: k, how many of the largest and how many of the smallest numbers are
        left out; at least 1 (0 is `mean`). Where fewer than ``2 k + 1`` tasks are
        present, as many as leave one or two: the median.
      scale: ``"paper"`` or ``"norm"``, see `from_weighting`.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`, without state; a lazy tree is materialised, T backward passes.
      Large parameters of dozens of tasks take long to compile (T = 40: a second or two
      each), in return for steps that are a hundred times faster on CPU.
      Infinities and NaN (as the largest) are trimmed like other numbers.

    Raises:
      ValueError: when `trim_number` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.trimmed_mean(num_tasks=4)
      >>> g = {"w": jnp.array([[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(2)}))[0]["w"]
      Array([1.5, 2.5], dtype=float32)

    References:
      Yin et al., `Byzantine-Robust Distributed Learning: Towards Optimal Statistical
      Rates <https://arxiv.org/abs/1803.01498>`_, ICML 2018.
    """
    check_num_tasks(num_tasks)
    check_count("trim_number", trim_number)

    def init(params: Params, num_tasks: int) -> tuple[()]:
        del params, num_tasks
        return ()

    def update(
        rows: TaskGradients,
        state: tuple[()],
        params: Params | None,
        *,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Updates, tuple[()]]:
        del params, extra
        counted, number = _middle(task_mask, trim_number)
        share = 1 / jnp.maximum(number, 1).astype(float)  # float64 where enabled
        leaves, treedef = flatten(rows)
        # Absent tasks come after all numbers, and so do not count.
        last = [
            choose_rows(task_mask, whole_task_axis(g), jnp.array(jnp.inf, g.dtype))
            for g in leaves
        ]

        def mean(g: Array | list[Array]) -> Array:
            if not isinstance(g, list):
                weights = jnp.broadcast_to(share, (num_tasks,))
                return mix_rows(weights, present_rows(g, counted))
            dtype = accumulator(g[0])
            middle = [
                jnp.where(counts, row.astype(dtype), jnp.zeros((), dtype))
                for counts, row in zip(counted, g, strict=True)
            ]
            shares = [share.astype(dtype) * row for row in middle]
            return sum(shares[1:], shares[0]).astype(g[0].dtype)

        return jax.tree.unflatten(treedef, map(mean, sorted_rows(last))), state

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
