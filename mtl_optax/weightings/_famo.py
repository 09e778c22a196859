"""FAMO: fast adaptive multitask optimisation.

Weights under which all losses fall at the same rate, learned from how far each fell
(Liu, Feng, Stone & Liu 2023, arXiv:2306.03792).

    w_t = z_t / D_t / sum_s (z_s / D_s),   z = softmax(s),   D = L - b + eps
    s <- s - Adam(J_softmax(s)^T (log D - log D_after))

D_after: of the same batch, after the step.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_nonnegative, check_num_tasks
from mtl_optax._learned import (
    Learned,
    LearningRate,
    init_learned,
    learn,
    make_optimizer,
)
from mtl_optax._scalarized import read_point
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, TaskMask, Weighting, Weights

_EPSILON = 1e-8  # the authors'


class FAMOState(NamedTuple):
    """State of `famo`.

    Attributes:
      learned: the logits s and their optimiser.
      last_losses: each task's loss at its last step.
      last_step: the number of that step, from 1 on; 0 for a task not seen yet.
      steps_taken: the number of steps with any task.
    """

    learned: Learned
    last_losses: Float[Array, " tasks"]
    last_step: Int[Array, " tasks"]
    steps_taken: Int[Array, ""]


def _read_again(losses_again: Any, num_tasks: int, dtype: DType) -> Losses:
    if not hasattr(losses_again, "ndim"):  # by task, in pytree order, as losses may be
        leaves = [jnp.asarray(x) for x in jax.tree.leaves(losses_again)]
        shapes = {x.shape for x in leaves}
        losses_again = jnp.stack(leaves) if shapes == {()} else jnp.zeros(())
    if losses_again.shape != (num_tasks,):
        raise ValueError(
            f"losses_again: expected shape ({num_tasks},) or as many scalars, the last "
            "batch's losses at the present parameters."
        )
    return lax.stop_gradient(jnp.asarray(losses_again, dtype))


def _uphill(logits: Array, falls: Array, known: TaskMask) -> Array:
    """``J_softmax(s)^T falls``: a task that fell further than most loses weight."""
    z = jax.nn.softmax(logits, where=known)
    return z * (falls - jnp.sum(z * falls, where=known))


def famo(
    num_tasks: int,
    *,
    learning_rate: LearningRate = 0.025,
    weight_decay: float | jax.Array = 1e-3,
    min_losses: Sequence[Any] | Array | None = None,
    scale: Scale = "paper",
) -> Combiner:
    r"""All losses fall at the same rate, by weights learned from the losses alone.

    .. math:: u = \sum_t w_t g_t, \qquad
       w = \mathrm{softmax}(s - \log (L - b + \epsilon)), \qquad
       s \leftarrow s - \mathrm{Adam} \big( \nabla_s \mathrm{softmax}(s)^\top
       (\log D - \log D_{after}) \big), \quad D = L - b + \epsilon

    It follows the direction in which the logarithms of all losses fall alike, which
    gradient methods solve for, by learning: a task whose loss fell by a smaller factor
    than the others' gains weight. Losses may have any units. It costs what plain
    training costs; use it for many tasks. It needs losses above zero (or above
    `min_losses`), and takes tens of steps to react.

    How far losses fell is told by the same batch's losses after the step, one more
    forward pass: hand them to the next update, as ``losses_again=``::

        losses, grads = mtl.task_jacobian(loss_fn)(params, batch)
        again = loss_fn(params, last_batch)  # at the present parameters
        updates, state = tx.update(grads, state, losses_again=again)

    (At the first step they are not looked at; inside `update_every` and
    `accumulate_task_grads` leave them out.) Without them the next batch's own
    losses are taken, which needs no other pass: right for full batches, as good as the
    batches are large otherwise.

    Args:
      num_tasks: T.
      learning_rate: of s, not negative; or an optax schedule of a task's own number
        of steps. 0.025 in the paper.
      weight_decay: added to the gradient of s, times s; not negative. 0.001 in most of
        the paper's runs, 0.01 for Cityscapes; 0.00001 is the code's default. Where
        steps are so small that losses fall by less than that, it keeps s near 0.
      min_losses: b, the least each loss can be, one number a task; zeros by default.
      scale: see `from_weighting`; here ``"paper"`` and ``"mean"`` are the same.

    Returns:
      a `Combiner`; ``update`` takes ``losses_again=``, in the form of ``losses``.
      ``learned_values`` in its state are s, 0 at first. A loss below its bound counts
      as being there. A task that was absent is compared with its own last loss, or,
      with ``losses_again``, only if it was present at the last step. Losses that are
      not finite are not learned from.

    Raises:
      ValueError: when a hyper-parameter is concrete and negative or not finite; when
        `min_losses` or ``losses_again`` is not of shape ``[T]``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.famo(num_tasks=2, learning_rate=0.5)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> _, state = tx.update(g, state, losses=jnp.array([1.0, 2.0]))
      >>> [f"{w:.2f}" for w in state.info.task_weights]  # 1 / L, to sum to one
      ['0.67', '0.33']
      >>> _, state = tx.update(g, state, losses=jnp.array([0.5, 2.0]))  # the first fell
      >>> [f"{s:.2f}" for s in state.weighting.learned.learned_values]
      ['-0.50', '0.50']

    References:
      Liu, Feng, Stone & Liu, `FAMO: Fast Adaptive Multitask Optimization
      <https://arxiv.org/abs/2306.03792>`_, NeurIPS 2023.

    Differs from the authors' code: s moves at the beginning of the next step, which
    comes to the same, and the gradient is not clipped (chain
    ``optax.clip_by_global_norm(1.0)`` behind it).
    """
    check_num_tasks(num_tasks)
    check_nonnegative("weight_decay", weight_decay)
    bounds = read_point("min_losses", min_losses, num_tasks)
    optimizer = optax.chain(
        optax.add_decayed_weights(weight_decay),
        make_optimizer(optax.adam, learning_rate),
    )

    def log_above(losses: Losses) -> Array:
        if bounds is not None:
            losses = losses - jnp.asarray(bounds, losses.dtype)
        return jnp.log(jnp.maximum(losses, 0) + _EPSILON)

    def init(num_tasks: int, dtype: DType) -> FAMOState:
        return FAMOState(
            learned=init_learned(optimizer, jnp.zeros((num_tasks,), dtype)),
            last_losses=jnp.zeros((num_tasks,), dtype),
            last_step=jnp.zeros((num_tasks,), jnp.int32),
            steps_taken=jnp.zeros((), jnp.int32),
        )

    def update(
        gramian: None,
        state: FAMOState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        losses_again: Any = None,
        **extra: Any,
    ) -> tuple[Weights, FAMOState]:
        del gramian, extra
        known, after = task_mask & (state.last_step > 0), losses
        if losses_again is not None:
            after = _read_again(losses_again, num_tasks, losses.dtype)
            # The last batch knows nothing of tasks that it lacked.
            known = known & (state.last_step == state.steps_taken)
        known = known & jnp.isfinite(after)
        falls = log_above(state.last_losses) - log_above(after)
        falls = jnp.where(known, falls, 0)
        gradient = _uphill(state.learned.learned_values, falls, known)
        learned = learn(optimizer, gradient, state.learned, known)

        logits = learned.learned_values - log_above(losses)
        weights = jax.nn.softmax(logits, where=task_mask)
        step = state.steps_taken + jnp.any(task_mask).astype(jnp.int32)
        present = task_mask & jnp.isfinite(losses)
        return weights, FAMOState(
            learned,
            jnp.where(present, losses, state.last_losses),
            jnp.where(present, step, state.last_step),
            step,
        )

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
