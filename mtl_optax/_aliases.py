"""Whole optimisers: a method and the learning rate that belongs to it."""

import optax

from mtl_optax._types import DType
from mtl_optax.aggregators import scale_by_mao


def mao(
    learning_rate: optax.ScalarOrSchedule,
    num_tasks: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    mu_dtype: DType | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Multi-Adaptive Optimization: Adam with moments of every task by itself.

    .. math:: \theta \leftarrow \theta - \eta \sum_n
        \frac{\hat m_n}{\sqrt{\hat v_n} + \epsilon}

    A multi-task optimiser as a whole: shared leaves and heads alike, without a mask and
    without another optimiser after it. See `scale_by_mao` for when to use it.

    Args:
      learning_rate: a number or a schedule. The sum runs over tasks: where you would
        give Adam ``lr`` for the mean loss, ``lr / num_tasks`` moves shared parameters
        as far.
      num_tasks: T.
      b1: see `scale_by_mao`.
      b2: see `scale_by_mao`.
      eps: see `scale_by_mao`.
      mu_dtype: see `scale_by_mao`.

    Returns:
      an optax transform that takes task gradients. With one task it is `optax.adam`.
      **Memory**: 2 T copies of the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.mao(0.1, num_tasks=2)
      >>> params = {"w": jnp.zeros(3)}
      >>> g = {"w": jnp.array([[3.0, -0.002, 0.0], [1000.0, 5.0, -7.0]])}
      >>> updates, state = tx.update(g, tx.init(params), params)
      >>> [f"{x:.2f}" for x in updates["w"]]
      ['-0.20', '-0.00', '0.10']

    References:
      Hervella, Rouco, Novo & Ortega, `Multi-adaptive optimization for multi-task
      learning with deep neural networks
      <https://doi.org/10.1016/j.neunet.2023.11.038>`_, Neural Networks 170, 2024.
    """
    return optax.chain(
        scale_by_mao(num_tasks, b1, b2, eps, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )
