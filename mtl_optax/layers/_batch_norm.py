"""The arithmetic of a task-specific batch norm, for NNX and linen alike."""

import operator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._types import DType

# Running mean and variance of all tasks.
Stats: TypeAlias = tuple[Float[Array, "tasks channels"], Float[Array, "tasks channels"]]


def read_task(task: Any, num_tasks: int) -> int:
    """The task as a Python int, or an error in words."""
    if isinstance(task, jax.core.Tracer):
        raise TypeError(
            "TaskBatchNorm: task must be a Python int, got a traced value: each task "
            "has parameters of its own, chosen when tracing. Loop over tasks in Python."
        )
    try:
        if isinstance(task, bool) or jnp.result_type(task) == jnp.bool_:
            raise TypeError
        task = operator.index(task)
    except TypeError:
        raise TypeError(f"TaskBatchNorm: task must be an int, got {task!r}.") from None
    if not 0 <= task < num_tasks:
        raise ValueError(
            f"TaskBatchNorm: task must lie between 0 and {num_tasks - 1} (num_tasks = "
            f"{num_tasks}), got {task}."
        )
    return task


def check_options(
    num_features: int, num_tasks: int, momentum: float, epsilon: float
) -> None:
    """Raises unless the options are possible ones."""
    for name, value in (("num_features", num_features), ("num_tasks", num_tasks)):
        if value < 1:
            raise ValueError(f"TaskBatchNorm: {name} must be at least 1, got {value}.")
    if not 0 <= momentum <= 1:
        raise ValueError(
            f"TaskBatchNorm: momentum must lie between 0 and 1, got {momentum}."
        )
    if not epsilon > 0:
        raise ValueError(f"TaskBatchNorm: epsilon must be positive, got {epsilon}.")


def check_input(x: Array, num_features: int) -> None:
    """Raises unless the last axis holds the features, and there is something."""
    if x.ndim < 2 or x.shape[-1] != num_features:
        raise ValueError(
            "TaskBatchNorm: expected an input of shape [..., "
            f"{num_features}] with at least one axis before the features, got "
            f"{x.shape}."
        )
    if x.size == 0:
        raise ValueError(f"TaskBatchNorm: the input is empty, of shape {x.shape}.")


def stats_dtype(param_dtype: DType) -> DType:
    """Dtype of running statistics: float32 at least."""
    return jnp.result_type(jnp.float32, param_dtype)


def apply(
    x: Float[Array, "*batch channels"],
    task: int,
    stats: Stats,
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    *,
    use_running_average: bool,
    momentum: float,
    epsilon: float,
    dtype: DType | None,
) -> tuple[Float[Array, "*batch channels"], Stats]:
    """`x` normalised for one task, and all tasks' running statistics afterwards."""
    running_mean, running_var = stats
    if use_running_average:
        mean, var = running_mean[task], running_var[task]
    else:
        mean, var = _batch_moments(x)
        stats = (
            _moved(running_mean, mean, task, momentum),
            _moved(running_var, _unbiased(var, x), task, momentum),
        )
    return _normalize(x, mean, var, scale, bias, epsilon, dtype), stats


def _batch_moments(
    x: Float[Array, "*batch channels"],
) -> tuple[Float[Array, " channels"], Float[Array, " channels"]]:
    """Mean and biased variance over all axes but the last, float32 at least."""
    wide = x.astype(jnp.result_type(jnp.float32, x.dtype))
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(wide, axis=axes)
    return mean, jnp.mean(jnp.square(wide - mean), axis=axes)


def _moved(
    running: Float[Array, "tasks channels"],
    batch: Float[Array, " channels"],
    task: int,
    momentum: float,
) -> Float[Array, "tasks channels"]:
    """Running statistics with one task's row moved towards the batch's."""
    new = momentum * running[task] + (1 - momentum) * lax.stop_gradient(batch)
    row = new.astype(running.dtype)[None]
    # Pieces and not `at[task].set`: XLA then sees that other rows do not depend on this
    # forward pass, and drops it where only they are used.
    return jnp.concatenate([running[:task], row, running[task + 1 :]])


def _unbiased(
    var: Float[Array, " channels"], x: Float[Array, "*batch channels"]
) -> Float[Array, " channels"]:
    """The unbiased variance; of a single element, the biased one."""
    count = x.size // x.shape[-1]
    return var * (count / max(count - 1, 1))


def _normalize(
    x: Float[Array, "*batch channels"],
    mean: Float[Array, " channels"],
    var: Float[Array, " channels"],
    scale: Float[Array, " channels"],
    bias: Float[Array, " channels"],
    epsilon: float,
    dtype: DType | None,
) -> Float[Array, "*batch channels"]:
    """Normalised, scaled and shifted; computed in float32 at least."""
    out = jnp.result_type(x, scale, bias) if dtype is None else dtype
    wide = jnp.result_type(jnp.float32, x.dtype, scale.dtype, bias.dtype)
    factor = lax.rsqrt(var.astype(wide) + epsilon) * scale.astype(wide)
    y = (x.astype(wide) - mean.astype(wide)) * factor + bias.astype(wide)
    return y.astype(out)
