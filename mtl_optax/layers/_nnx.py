"""`TaskBatchNorm` for Flax NNX."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mtl_optax._types import DType
from mtl_optax.layers import _batch_norm as norm


class TaskBatchNorm(nnx.Module):
    r"""Batch norm with scale, bias and running statistics of each task's own.

    .. math::

        y = \gamma_t \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta_t, \qquad
        r_t \leftarrow m \, r_t + (1 - m) \, (\mu, \tfrac{N}{N - 1} \sigma^2)

    Put it after a layer that tasks share, and run one forward pass a task: tasks then
    show by their scales which channels they lean on, which `connection_strength`
    measures. It costs T forward passes of everything after it; where no method reads
    the scales, an ordinary batch norm does.

    In training ``mu`` and ``sigma^2`` are the batch's own mean and biased variance,
    over all axes but the last (N elements a channel), in float32 at least. Running
    statistics ``r_t`` take the *unbiased* variance and ``momentum=0.9``, as PyTorch's
    ``BatchNorm2d(momentum=0.1)`` does, which the authors use; Flax's own batch norm
    takes the biased one and 0.99. (For N = 1, where the unbiased variance does not
    exist, the biased one is taken.) Inside `shard_map` or `pmap` the statistics are
    each device's own.

    Each task's scale and bias are leaves of their own, so that a step on one task can
    leave the other tasks' alone (`sequential_task_steps`).

    Args:
      num_features: C, length of the input's last axis.
      num_tasks: T.
      momentum: m, of the old running statistics.
      epsilon: added to the variance; 1e-5 as in PyTorch and Flax.
      use_running_average: normalise by the running statistics instead of the batch's,
        and leave them alone; also what ``model.eval()`` and ``model.train()`` set.
      dtype: of the output; by default that of input and parameters together.
      param_dtype: of scale and bias.
      rngs: for the form's sake; nothing is drawn.

    Attributes:
      scales: T parameters ``[C]``, ones at first.
      biases: T parameters ``[C]``, zeros at first.
      running_mean: batch statistics ``[T, C]``, zeros at first.
      running_var: batch statistics ``[T, C]``, ones at first.
      scale: the scales as one array ``[T, C]``, for `connection_strength`.
      var: the running variances as an array ``[T, C]``, for `connection_strength`.

    Raises:
      ValueError: for sizes below 1 and a momentum outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import mtl_optax as mtl
      >>> from mtl_optax.layers import TaskBatchNorm
      >>> norm = TaskBatchNorm(2, num_tasks=3, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[1.0, 0.0], [3.0, 0.0]]), 1)
      >>> [[f"{v:.3f}" for v in row] for row in y]
      [['-1.000', '0.000'], ['1.000', '0.000']]
      >>> [[f"{v:.2f}" for v in row] for row in norm.var]  # 0.9 + 0.1 * 2 / (2 - 1)
      [['1.00', '1.00'], ['1.10', '0.90'], ['1.00', '1.00']]
      >>> mtl.connection_strength(jnp.ones((5, 2)), norm.scale, norm.var).shape
      (3, 2)

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, equation 5.
    """

    def __init__(
        self,
        num_features: int,
        num_tasks: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        use_running_average: bool = False,
        dtype: DType | None = None,
        param_dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        del rngs
        norm.check_options(num_features, num_tasks, momentum, epsilon)
        shape, stats = (num_features,), norm.stats_dtype(param_dtype)
        self.scales = nnx.List(
            [nnx.Param(jnp.ones(shape, param_dtype)) for _ in range(num_tasks)]
        )
        self.biases = nnx.List(
            [nnx.Param(jnp.zeros(shape, param_dtype)) for _ in range(num_tasks)]
        )
        self.running_mean = nnx.BatchStat(jnp.zeros((num_tasks, num_features), stats))
        self.running_var = nnx.BatchStat(jnp.ones((num_tasks, num_features), stats))
        self.num_features = num_features
        self.num_tasks = num_tasks
        self.momentum = momentum
        self.epsilon = epsilon
        self.use_running_average = use_running_average
        self.dtype = dtype

    @property
    def scale(self) -> Float[Array, "tasks channels"]:
        """All tasks' scales, for `connection_strength`."""
        # Before the last axis: a stack of layers may have axes in front.
        return jnp.stack([scale[...] for scale in self.scales], axis=-2)

    @property
    def var(self) -> Float[Array, "tasks channels"]:
        """All tasks' running variances, for `connection_strength`."""
        var: Array = self.running_var[...]
        return var

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
        task = norm.read_task(task, self.num_tasks)
        norm.check_input(x, self.num_features)
        if use_running_average is None:
            use_running_average = self.use_running_average
        y, stats = norm.apply(
            x,
            task,
            (self.running_mean[...], self.running_var[...]),
            self.scales[task][...],
            self.biases[task][...],
            use_running_average=use_running_average,
            momentum=self.momentum,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )
        if not use_running_average:
            self.running_mean[...], self.running_var[...] = stats
        return y
