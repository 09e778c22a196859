"""What weightings have in common: states of those without a history, arguments."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mtl_optax._arguments import read_one_a_task
from mtl_optax._types import DType, TaskMask


def init_stateless(num_tasks: int, dtype: DType) -> tuple[()]:
    """The state of a weighting that needs nothing at its next step."""
    del num_tasks, dtype
    return ()


class SolvedInfo(NamedTuple):
    """What to look at: how well the weights solve their problem."""

    solver_residual: Float[Array, ""]


class SolvedState(NamedTuple):
    """State of a weighting that needs nothing at its next step."""

    info: SolvedInfo


def init_solved(num_tasks: int, dtype: DType) -> SolvedState:
    """The state before the first step."""
    del num_tasks
    return SolvedState(SolvedInfo(jnp.zeros((), dtype)))


def solved(residual: Float[Array, ""]) -> SolvedState:
    """The state after a step."""
    return SolvedState(SolvedInfo(residual))


def read_per_task(
    name: str, value: Sequence[Any] | Array | None, num_tasks: int
) -> Array | np.ndarray | None:
    """One number a task as an array, checked where it is concrete; None stays None.

    Raises ValueError for another shape, and for concrete numbers that are negative, not
    finite or all zero.
    """
    if value is None:
        return None
    if isinstance(value, Mapping | str):
        raise TypeError(
            f"{name}: expected a sequence or an array of {num_tasks} numbers, in the "
            f"order of the losses (a dict's keys are sorted), got {value!r}."
        )
    numbers, traced = read_one_a_task(name, value, num_tasks)
    if not traced:
        good = np.all(np.isfinite(numbers) & (numbers >= 0)) and np.any(numbers > 0)
        if not good:
            raise ValueError(
                f"{name} must be finite, not negative and not all zero, got {value}."
            )
    return numbers


# Beyond, softmaxes and weights would leave float32; they are one-sided long before.
_LARGEST_RATIO = 1e18


def ratio_or_one(new: Array, old: Array) -> Array:
    """``new / old``; from 0 nothing has changed."""
    ratio = new / jnp.where(old == 0, 1, old)
    return jnp.where(old == 0, 1, jnp.clip(ratio, -_LARGEST_RATIO, _LARGEST_RATIO))


def shares_of(
    preference: Any, task_mask: TaskMask, dtype: DType
) -> Float[Array, "..."]:
    """The preference of present tasks; without one, equal shares that sum to one."""
    present = task_mask.astype(dtype)
    if preference is None:
        return present / jnp.maximum(jnp.sum(present), jnp.ones((), dtype))
    return present * jnp.asarray(preference, dtype)
