"""Checks of what factories are given, made when the transform is built."""

from typing import Any

import jax
import jax.numpy as jnp


def check_num_tasks(num_tasks: Any) -> None:
    """Raises unless `num_tasks` is a positive Python int."""
    check_count("num_tasks", num_tasks)


def check_count(name: str, value: Any) -> None:
    """Raises unless `value` is a positive Python int."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python int, got an array: it sets shapes. With "
            "optax.inject_hyperparams name every such argument, as in "
            "static_args=('num_tasks', 'window')."
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_nonnegative(
    name: str, value: Any, *, below: float | None = None, above_zero: bool = False
) -> None:
    """Raises if `value` is concrete and negative or NaN; a traced value passes.

    With `below`, also if it is not below that; with `above_zero`, also if it is zero.
    """
    if isinstance(value, jax.core.Tracer):
        return
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}.")
    if above_zero and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")
    if not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")
    if below is not None and not value < below:
        raise ValueError(f"{name} must be below {below}, got {value}.")
