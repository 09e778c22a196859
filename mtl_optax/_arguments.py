"""Checks of what factories are given, made when the transform is built."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def check_num_tasks(num_tasks: Any) -> None:
    """Raises unless `num_tasks` is a positive Python int."""
    check_count("num_tasks", num_tasks)


def check_count(name: str, value: Any, *, least: int = 1) -> None:
    """Raises unless `value` is a Python int of at least `least`."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} must be a Python int, got an array: it sets shapes. With "
            "optax.inject_hyperparams name every such argument, as in "
            "static_args=('num_tasks', 'window')."
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31, got {value}.")


def unknown_method(name: str, names: Iterable[str]) -> str:
    """What to say about a name that is no method's."""
    known = {re.sub("[^a-z]", "", each.lower()): each for each in names}
    wanted = re.sub("[^a-z]", "", name.lower())
    near = difflib.get_close_matches(wanted, known, n=1)
    if near:
        return f"unknown method {name!r}; did you mean {known[near[0]]!r}?"
    return f"unknown method {name!r}; there are {', '.join(known.values())}"


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def check_nonnegative(
    name: str,
    value: Any,
    *,
    below: float | None = None,
    at_most: float | None = None,
    finite: bool = True,
) -> None:
    """Raises if `value` is concrete and negative or NaN; a traced value passes.

    With `below`, also if it is not below that; with `at_most`, if it is above that; if
    `finite`, also if it is infinite.
    """
    if _is_concrete_scalar(name, value):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}.")
        if finite and below is None and value == float("inf"):
            raise ValueError(f"{name} must be finite, got {value}.")
        if below is not None and not value < below:
            raise ValueError(f"{name} must be below {below}, got {value}.")
        if at_most is not None and value > at_most:
            raise ValueError(f"{name} must be at most {at_most}, got {value}.")


def check_positive(name: str, value: Any) -> None:
    """Raises if `value` is concrete and not positive and finite in float32."""
    if _is_concrete_scalar(name, value):
        numbers = jnp.finfo(jnp.float32)
        if not value >= numbers.tiny:
            raise ValueError(f"{name} must be positive (in float32), got {value}.")
        if value > numbers.max:
            raise ValueError(f"{name} must be finite (in float32), got {value}.")


def read_numbers(value: Any) -> tuple[Array | np.ndarray, bool]:
    """Numbers as an array, and whether they are traced; where not, they are NumPy's."""
    parts = value if isinstance(value, Sequence) else [value]
    traced = any(isinstance(x, jax.core.Tracer) for x in parts)
    return jnp.asarray(value) if traced else np.asarray(value, float), traced


def read_one_a_task(
    name: str, value: Any, num_tasks: int
) -> tuple[Array | np.ndarray, bool]:
    """As `read_numbers`; raises ValueError for another shape than ``[T]``."""
    numbers, traced = read_numbers(value)
    if numbers.shape != (num_tasks,):
        raise ValueError(
            f"{name}: expected one number a task, shape ({num_tasks},), got shape "
            f"{numbers.shape}."
        )
    return numbers, traced


def read_num_tasks(who: str, num_tasks: int | None, tx: Any) -> int:
    """T as given, or as `tx` carries it.

    Raises TypeError where neither knows it, and as `check_num_tasks`.
    """
    tasks = num_tasks if num_tasks is not None else getattr(tx, "num_tasks", None)
    if tasks is None:
        raise TypeError(
            f"{who}: num_tasks must be given for a transform that does not carry it, "
            "such as an optax.chain."
        )
    check_num_tasks(tasks)
    return tasks


def _is_concrete_scalar(name: str, value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    if not (isinstance(value, int | float) or hasattr(value, "dtype")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}.")
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got shape {jnp.shape(value)}.")
    return True


def check_transform(who: str, name: str, tx: Any) -> None:
    """Raises unless `tx` is an optax transform (and not a factory of one)."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"{who}: {name} must be an optax transform, got {tx!r}. A factory must be "
            "called first, as in optax.adam(1e-3)."
        )
