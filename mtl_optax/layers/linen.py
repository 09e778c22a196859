"""Layers that know tasks, for Flax linen."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from mtl_optax._types import DType
from mtl_optax.layers import _batch_norm as norm

__all__ = ["TaskBatchNorm", "stacked_scale"]


class TaskBatchNorm(nn.Module):
    """Batch norm with scale, bias and running statistics of each task's own.

    As `mtl_optax.layers.TaskBatchNorm`, which has the formula, and says when to use it
    and how it differs from Flax's own batch norm. Parameters are ``scale_0``,
    ``bias_0``, ``scale_1`` ... of shape ``[C]``; ``mean`` and ``var`` ``[T, C]`` stand
    in the collection ``batch_stats``, which training must make mutable. `init` makes
    the parameters of all tasks, whichever it is called with.

    Args:
      num_features: C, length of the input's last axis.
      num_tasks: T.
      momentum: of the old running statistics.
      epsilon: added to the variance.
      use_running_average: normalise by the running statistics instead of the batch's,
        and leave them alone.
      dtype: of the output; by default that of input and parameters together.
      param_dtype: of scale and bias.

    Raises:
      ValueError: for sizes below 1 and a momentum outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> from mtl_optax.layers.linen import TaskBatchNorm, stacked_scale
      >>> norm = TaskBatchNorm(num_features=2, num_tasks=3)
      >>> x = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> variables = norm.init(jax.random.key(0), x, 0)
      >>> y, state = norm.apply(variables, x, 1, mutable=["batch_stats"])
      >>> var = state["batch_stats"]["var"]
      >>> [[f"{v:.2f}" for v in row] for row in var]
      [['1.00', '1.00'], ['1.10', '0.90'], ['1.00', '1.00']]
      >>> scale = stacked_scale(variables["params"])
      >>> mtl.connection_strength(jnp.ones((5, 2)), scale, var).shape
      (3, 2)

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, equation 5.
    """

    num_features: int
    num_tasks: int
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_running_average: bool = False
    dtype: DType | None = None
    param_dtype: DType = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "*batch channels"],
        task: int,
        *,
        use_running_average: bool | None = None,
    ) -> Float[Array, "*batch channels"]:
        """Normalises `x` for one task, whose running statistics it moves.

        Args:
          x: ``[..., C]`` with at least one axis before the last.
          task: 0 to T - 1, static.
          use_running_average: as of the layer, for this call.

        Raises:
          TypeError: when `task` is traced or no int.
          ValueError: when `task` is out of range or `x` has another shape.
        """
        norm.check_options(
            self.num_features, self.num_tasks, self.momentum, self.epsilon
        )
        task = norm.read_task(task, self.num_tasks)
        norm.check_input(x, self.num_features)
        shape, stats = (self.num_features,), norm.stats_dtype(self.param_dtype)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scales, biases = [], []
        for t in range(self.num_tasks):
            scales.append(self.param(f"scale_{t}", ones, shape, self.param_dtype))
            biases.append(self.param(f"bias_{t}", zeros, shape, self.param_dtype))
        rows = (self.num_tasks, self.num_features)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, rows, stats)
        running_var = self.variable("batch_stats", "var", jnp.ones, rows, stats)
        if use_running_average is None:
            use_running_average = self.use_running_average
        y, stats = norm.apply(
            x,
            task,
            (running_mean.value, running_var.value),
            scales[task],
            biases[task],
            use_running_average=use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        if not use_running_average and not self.is_initializing():
            running_mean.value, running_var.value = stats
        return y


def stacked_scale(params: Mapping[str, Any]) -> Float[Array, "tasks channels"]:
    """All tasks' scales, for `connection_strength`.

    Args:
      params: the parameters of one `TaskBatchNorm`.

    Raises:
      KeyError: when these are no parameters of a `TaskBatchNorm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_optax.layers.linen import TaskBatchNorm, stacked_scale
      >>> norm = TaskBatchNorm(num_features=4, num_tasks=2)
      >>> variables = norm.init(jax.random.key(0), jnp.ones((3, 4)), 0)
      >>> stacked_scale(variables["params"]).shape
      (2, 4)

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, equation 5.
    """
    names = [name for name in params if name.startswith("scale_")]
    if not names:
        raise KeyError(
            "stacked_scale: expected the parameters of one TaskBatchNorm (scale_0, "
            f"bias_0, ...), got the names {sorted(params)}."
        )
    scales = [params[f"scale_{t}"] for t in range(len(names))]
    return jnp.stack(scales, axis=-2)  # a stack of layers may have axes in front
