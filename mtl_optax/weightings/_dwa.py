"""DWA: dynamic weight averaging.

Losses weighed by how slowly they fell of late (Liu, Johns & Davison 2019,
arXiv:1803.10704), with windows of steps in place of epochs.

    w_t = T exp(r_t / tau) / sum_s exp(r_s / tau),   r_t = A_t(k - 1) / A_t(k - 2)

A_t(k): the mean of task t's losses over its k-th window.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_count, check_positive
from mtl_optax._solved import ratio_or_one
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, TaskMask, Weighting, Weights

# Losses beyond would leave float32; the softmax is one-sided long before.
_LARGEST = 1e30


class DWAState(NamedTuple):
    """State of `dwa`; windows are counted task by task.

    Attributes:
      window_part: of the mean of the window that is under way: what there is of it.
      window_steps: their number.
      latest_average: the mean loss of the last complete window.
      older_average: that of the one before; both are 0 until there are such windows.
    """

    window_part: Float[Array, " tasks"]
    window_steps: Int[Array, " tasks"]
    latest_average: Float[Array, " tasks"]
    older_average: Float[Array, " tasks"]


def _rates(state: DWAState) -> Array:
    """``r [T]``; 1, no change, for a task without two windows or from a loss of 0."""
    return ratio_or_one(state.latest_average, state.older_average)


def _remember(state: DWAState, losses: Losses, window: int) -> DWAState:
    """The state after one more step of every task."""
    losses = jnp.clip(losses, -_LARGEST, _LARGEST)
    total, steps = state.window_part + losses / window, state.window_steps + 1
    full = steps == window
    return DWAState(
        window_part=jnp.where(full, 0, total),
        window_steps=jnp.where(full, 0, steps),
        latest_average=jnp.where(full, total, state.latest_average),
        older_average=jnp.where(full, state.latest_average, state.older_average),
    )


def dwa(
    num_tasks: int,
    *,
    window: int = 25,
    temperature: float | jax.Array = 2.0,
    scale: Scale = "paper",
) -> Combiner:
    r"""More weight for tasks whose losses fall slowly.

    .. math:: u = \sum_t w_t g_t, \qquad w = T \, \mathrm{softmax}(r / \tau), \qquad
              r_t = \frac{A_t(k-1)}{A_t(k-2)}

    :math:`A_t` are a task's average losses over its last two windows of steps. Ratios
    have no units, but weights around one don't undo a loss' unit either: one in large
    numbers dominates as in plain training. Losses should keep one sign and stay away
    from zero. A mild method: at the default temperature a task that stands still has
    1.3 times the weight of one whose loss halves. Use it where plain training nearly
    works. It knows nothing of conflict or of gradients' lengths.

    Args:
      num_tasks: T.
      window: steps over which losses are averaged. The paper's unit is the epoch: with
        the number of steps of your epoch this is the paper's method. 25 in the code of
        Navon et al. 2022.
      temperature: of the softmax, positive; higher is more even. 2 in the paper.
      scale: see `from_weighting`; here ``"paper"`` and ``"sum"`` are the same.

    Returns:
      a `Combiner`. Weights are ones for the first two windows, and change only at the
      end of a window. A task without two windows behind it counts as standing still.
      Losses that are not finite are not remembered.

    Raises:
      ValueError, TypeError: for an empty window; when `temperature` is concrete and
        not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.dwa(num_tasks=2, window=1, temperature=0.5)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for losses in ([4.0, 1.0], [2.0, 1.0], [1.0, 1.0]):
      ...     _, state = tx.update(g, state, losses=jnp.array(losses))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # 2 / (1 + e), 2 e / (1 + e)
      ['0.54', '1.46']

    References:
      Liu, Johns & Davison, `End-to-End Multi-Task Learning with Attention
      <https://arxiv.org/abs/1803.10704>`_, CVPR 2019.

    Differs from the code of Navon et al. 2022: windows follow one another, as epochs
    do (theirs slide, and start out filled with ones).
    """
    check_count("window", window)
    check_positive("temperature", temperature)

    def init(num_tasks: int, dtype: DType) -> DWAState:
        def zeros(kind: DType) -> Array:
            return jnp.zeros((num_tasks,), kind)

        return DWAState(
            window_part=zeros(dtype),
            window_steps=zeros(jnp.int32),
            latest_average=zeros(dtype),
            older_average=zeros(dtype),
        )

    def update(
        gramian: None,
        state: DWAState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, DWAState]:
        del gramian, extra
        shares = jax.nn.softmax(_rates(state) / temperature, where=task_mask)
        weights = jnp.sum(task_mask.astype(losses.dtype)) * shares
        after = _remember(state, losses, window)
        known = task_mask & jnp.isfinite(losses)
        return weights, jax.tree.map(
            lambda new, old: jnp.where(known, new, old), after, state
        )

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
