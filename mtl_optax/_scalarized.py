"""Losses made into one number; the weights are its derivatives by the losses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from mtl_optax._arguments import read_one_a_task
from mtl_optax._learned import Learned, init_learned, learn
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Losses, Scalar, TaskMask, Weighting, Weights

# What a loss under a logarithm counts as at least (as in the code of Lin et al. 2024).
LEAST_LOSS = 1e-20


class ScalarizedInfo(NamedTuple):
    """What to look at: the number that is being minimised, before the step."""

    objective: Float[Array, ""]


class ScalarizedState(NamedTuple):
    """State of a combiner made by `scalarized`; nothing is learned without numbers."""

    learned: Learned | tuple[()]
    info: ScalarizedInfo


def floored(losses: Losses, least: float | jax.Array) -> Losses:
    """The losses, but at least `least`; to whoever differentiates, the losses."""
    floor = jax.lax.stop_gradient(jnp.maximum(losses, least))
    # The difference is zero, exactly, and carries the gradient. (Not `floor - losses`:
    # a small floor is lost in that.)
    return floor + (losses - jax.lax.stop_gradient(losses))


def unit_vector(
    vector: Float[Array, " tasks"], task_mask: TaskMask
) -> tuple[Float[Array, " tasks"], Float[Array, ""]]:
    """The direction of what present tasks hold, and its length; zero stays zero."""
    vector = jnp.where(task_mask, vector, 0)
    largest = jnp.max(jnp.abs(vector))
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    vector = vector / largest  # squares neither overflow nor vanish
    length = jnp.sqrt(jnp.sum(vector**2))
    return vector / jnp.maximum(length, 1), largest * length


def read_point(
    name: str,
    value: Sequence[Any] | Array | None,
    num_tasks: int,
    *,
    positive: bool = False,
) -> Array | np.ndarray | None:
    """A point among the losses as an array, checked where concrete; None stays None.

    Raises ValueError for another shape than ``[T]``, and for concrete numbers that are
    not finite (if `positive`: not positive).
    """
    if value is None:
        return None
    numbers, traced = read_one_a_task(name, value, num_tasks)
    if not traced:
        good = np.isfinite(numbers) & ((numbers > 0) | (not positive))
        if not np.all(good):
            what = "positive and finite" if positive else "finite"
            raise ValueError(f"{name} must be {what}, got {value}.")
    return numbers


def scalarized(
    objective: Callable[[Losses, Any, TaskMask], Scalar],
    num_tasks: int,
    *,
    optimizer: optax.GradientTransformation | None = None,
    start: float = 0.0,
    limit: float | None = None,
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
      limit: learned numbers are kept between ``-limit`` and ``limit``. (Cut off inside
        `objective` only, they would have no gradient there, and never come back.)
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
            sound = task_mask & jnp.isfinite(losses)
            learned = learn(optimizer, uphill, learned, sound, limit=limit)
        value = jnp.where(jnp.any(task_mask), value, 0)
        info = ScalarizedInfo(value.astype(state.info.objective.dtype))
        return weights, ScalarizedState(learned, info)

    method = Weighting(init, update, frozenset({"losses"}))
    return from_weighting(method, num_tasks, scale=scale)
