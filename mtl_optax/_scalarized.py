"""Losses made into one number; the weights are its derivatives by the losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_optax._learned import Learned, init_learned, learn
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, Scalar, TaskMask, Weighting, Weights


class ScalarizedInfo(NamedTuple):
    """What to look at: the number that is being minimised, before the step."""

    objective: Float[Array, ""]


class ScalarizedState(NamedTuple):
    """State of a combiner made by `scalarized`; nothing is learned without numbers."""

    learned: Learned | tuple[()]
    info: ScalarizedInfo


def floored(losses: Losses, least: float | jax.Array) -> Losses:
    """The losses, but at least `least`; to whoever differentiates, the losses."""
    return losses + jax.lax.stop_gradient(jnp.maximum(losses, least) - losses)


def scalarized(
    objective: Callable[[Losses, Any, TaskMask], Scalar],
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    start: float = 0.0,
    scale: Scale = "paper",
) -> Combiner:
    r"""A combiner that minimises one number made of the losses.

    .. math:: u = \sum_t \frac{\partial \phi(L, s)}{\partial L_t} g_t, \qquad
              s \leftarrow s - \mathrm{optimizer}(\partial \phi / \partial s)

    Args:
      objective: ``(losses [T], s [T], task_mask) -> phi``. It must leave absent tasks
        out itself; what it gets for them is 1.
      num_tasks: T.
      optimizer: of the learned numbers s; without one there are none, and `objective`
        gets None.
      start: where each learned number starts.
      scale: see `from_weighting`.
    """

    def init(num_tasks: int, dtype: DType) -> ScalarizedState:
        learned: Learned | tuple[()] = ()
        if optimizer is not None:
            learned = init_learned(optimizer, jnp.full((num_tasks,), start, dtype))
        return ScalarizedState(learned, ScalarizedInfo(jnp.zeros((), dtype)))

    def update(
        gramian: None,
        state: ScalarizedState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, ScalarizedState]:
        del gramian, extra
        learned = state.learned
        values = learned.learned_values if isinstance(learned, Learned) else None
        ascent = jax.value_and_grad(objective, argnums=(0, 1))
        value, (weights, uphill) = ascent(losses, values, task_mask)
        if optimizer is not None and isinstance(learned, Learned):
            learned = learn(optimizer, uphill, learned, task_mask)
        info = ScalarizedInfo(value.astype(state.info.objective.dtype))
        return weights, ScalarizedState(learned, info)

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
