"""Connection strength: which task leans most on which output channel.

Jeong & Yoon, "Quantifying Task Priority for Multi-Task Optimization", CVPR 2024,
equations 4, 6 and 7, with the kernel ``W``, scale ``gamma`` and variance ``Var`` of the
task-specific batch norm that follows it:

    S[t, p] = gamma[t, p]^2 / (Var[t, p] + eps) * sum_q mean_k W[k, q, p]^2
    S_hat[t, p] = S[t, p] / sum_p' S[t, p']
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._arguments import check_positive


def connection_strength(
    kernel: Float[Array, "*inputs channels"],
    scale: Float[Array, "tasks channels"],
    var: Float[Array, "tasks channels"],
    *,
    eps: float = 1e-5,
) -> Float[Array, "tasks channels"]:
    r"""Normalised connection strength of every output channel, for every task.

    .. math::

        \hat S_{t,p} = \frac{S_{t,p}}{\sum_{p'} S_{t,p'}}, \qquad
        S_{t,p} = \frac{\gamma_{t,p}^2}{\mathrm{Var}_{t,p} + \epsilon}
        \sum_q W_{q,p}^2

    A shared layer is followed by one batch norm a task. The larger the scale that a
    task's norm gives a channel, and the larger the channel's kernel, the more the task
    relies on it: the task with the largest strength has priority there. Feed the result
    to `priority_projection`. `mtl_optax.layers.TaskBatchNorm` is such a norm.

    The kernel enters only through the normalisation over channels, and scaling all of
    one task's ``scale`` changes nothing.

    Args:
      kernel: the shared layer's, output channel last: ``HWIO`` of a Flax convolution,
        or ``[in, out]`` of a dense layer (the 1 x 1 case).
      scale: ``[T, C_out]``, the factor of each task's batch norm.
      var: ``[T, C_out]``, its variance: the running one, after this step's forward
        passes, as in the authors' code.
      eps: of the batch norm, added to the variance, positive; 1e-5 as in the authors'
        code.

    Returns:
      ``[T, C_out]``, nonnegative, each row sums to 1; float32 at least. A task whose
      strengths are all zero gets ``1 / C_out`` everywhere.

    Raises:
      ValueError: when shapes do not fit together, or for an `eps` that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> kernel = jnp.array([[1.0, 2.0]])  # one input, two output channels
      >>> scale = jnp.array([[1.0, 1.0], [1.0, 2.0]])
      >>> strengths = mtl.connection_strength(kernel, scale, jnp.ones((2, 2)))
      >>> [[f"{s:.3f}" for s in row] for row in strengths]
      [['0.200', '0.800'], ['0.059', '0.941']]

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024.
    """
    check_positive("eps", eps)
    kernel, scale, var = (jnp.asarray(x) for x in (kernel, scale, var))
    if kernel.ndim < 1:
        raise ValueError(
            "connection_strength: expected a kernel [..., C_out], got a scalar."
        )
    channels = kernel.shape[-1]
    if scale.ndim != 2 or scale.shape[1] != channels or var.shape != scale.shape:
        raise ValueError(
            "connection_strength: expected scale and var of shape (T, C_out) with "
            f"C_out = {channels}, the kernel's last axis; got scale {scale.shape}, "
            f"var {var.shape} and kernel {kernel.shape}."
        )
    dtype = jnp.result_type(jnp.float32, kernel.dtype, scale.dtype, var.dtype)
    one = jnp.ones((), dtype)

    def unit(x: Array, axes: tuple[int, ...]) -> Array:
        # Constant factors cancel; without them squares stay in range.
        largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0)
        return x / jnp.where(largest > 0, largest, one)

    kernel = unit(kernel.astype(dtype), tuple(range(kernel.ndim)))
    power = jnp.mean(jnp.square(kernel), axis=tuple(range(kernel.ndim - 1)))
    gain = unit(scale.astype(dtype), (1,))
    spread = jnp.maximum(var.astype(dtype), 0)  # rounding may leave it below
    strength = jnp.square(gain) / (spread + eps) * power
    total = jnp.sum(strength, axis=1, keepdims=True)
    # A NaN stays one.
    return jnp.where(
        total == 0, one / channels, strength / jnp.where(total == 0, one, total)
    )
