"""Numbers a task that a weighting learns, with an optimiser of their own."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_nonnegative
from mtl_optax._tree import choose_rows
from mtl_optax._types import TaskMask

# `optax.adam`, or whatever else makes an optimiser of a learning rate.
OptimizerOf: TypeAlias = Callable[[Any], optax.GradientTransformation]
# A number, or an optax schedule; each task counts its own steps.
LearningRate: TypeAlias = float | jax.Array | optax.Schedule


# Optimisers square gradients, and float32 ends at 3e38.
LARGEST_GRADIENT = 1e18
# Of learned logarithms: beyond, weights would leave float32.
LARGEST_LOG = 60.0


class Learned(NamedTuple):
    """What a weighting has learned about each task.

    Attributes:
      learned_values: one number a task.
      learner: each task's own state of the optimiser, stacked.
    """

    learned_values: Float[Array, " tasks"]
    learner: Any


def make_optimizer(
    optimizer: OptimizerOf, learning_rate: LearningRate
) -> optax.GradientTransformation:
    """The optimiser of what is learned, with its learning rate checked.

    Raises ValueError for a concrete number that is negative or not finite.
    """
    if not callable(learning_rate):
        check_nonnegative("learning_rate", learning_rate)
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be a function of the learning rate, as optax.adam is, not "
            f"what it makes; got {optimizer!r}. With optax.inject_hyperparams name it "
            "in static_args=('num_tasks', 'optimizer')."
        )
    made = optimizer(learning_rate)
    if not (hasattr(made, "init") and hasattr(made, "update")):
        raise TypeError(
            f"optimizer: {optimizer!r} made {made!r} of the learning rate, which is no "
            "optax transform."
        )
    return made


def init_learned(
    optimizer: optax.GradientTransformation, values: Float[Array, " tasks"]
) -> Learned:
    """The state before the first step, at `values`."""
    # Tasks are apart, so that the history of an absent one can hold still.
    learner = jax.vmap(optimizer.init)(values)
    return Learned(values, jax.tree.map(_strong, learner))


def learn(
    optimizer: optax.GradientTransformation,
    gradient: Float[Array, " tasks"],
    learned: Learned,
    task_mask: TaskMask,
    *,
    limit: float | None = None,
) -> Learned:
    """The state after a step down `gradient`; absent tasks' numbers do not move.

    Nor do those of a task whose gradient is NaN: one broken batch would never be
    forgotten. With `limit` numbers stop at that size, from where they can come back.
    """
    values = learned.learned_values
    task_mask = task_mask & ~jnp.isnan(gradient)
    gradient = jnp.clip(gradient, -LARGEST_GRADIENT, LARGEST_GRADIENT)
    gradient = jnp.where(task_mask, gradient, 0).astype(values.dtype)
    steps, learner = jax.vmap(optimizer.update)(gradient, learned.learner, values)
    moved = optax.apply_updates(values, steps)
    if limit is not None:
        moved = jnp.clip(moved, -limit, limit)
    return jax.tree.map(
        lambda new, old: choose_rows(task_mask, new.astype(old.dtype), old),
        Learned(moved, learner),
        learned,
    )


def _strong(leaf: Any) -> Array:
    return jnp.asarray(leaf, jnp.result_type(leaf))
