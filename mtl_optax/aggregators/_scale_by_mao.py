"""MAO: Adam's moments for every task by itself, and the sum of the steps.

Multi-Adaptive Optimization (Hervella, Rouco, Novo & Ortega, "Multi-adaptive
optimization for multi-task learning with deep neural networks", Neural Networks 170,
2024, 254-265). For every task n and every parameter:

    m_n <- b1 m_n + (1 - b1) g_n,      v_n <- b2 v_n + (1 - b2) g_n^2
    u = sum_n m_n / (1 - b1^k) / (sqrt(v_n / (1 - b2^k)) + eps)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from mtl_optax._arguments import check_nonnegative, check_positive
from mtl_optax._per_task import PerTaskState, per_task
from mtl_optax._transform import Combiner, from_aggregator
from mtl_optax._tree import weighted_sum
from mtl_optax._types import Aggregator, DType, Params, TaskGradients, TaskMask, Updates


def scale_by_mao(
    num_tasks: int,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    mu_dtype: DType | None = None,
) -> Combiner:
    r"""Sums Adam's steps of every task, each with moments of its own.

    .. math::

        u = \sum_n \frac{\hat m_n}{\sqrt{\hat v_n} + \epsilon}, \qquad
        m_n \leftarrow \beta_1 m_n + (1 - \beta_1) g_n, \quad
        v_n \leftarrow \beta_2 v_n + (1 - \beta_2) g_n^2

    Every task moves every parameter by about the same step, whatever the scale of its
    gradient there: the contributions are balanced parameter by parameter, and units of
    losses do not matter. Use it where tasks differ in scale from layer to layer. It
    does not look at conflict: opposed tasks cancel. It replaces Adam, so do not put
    another adaptive optimiser after it; `mao` is the whole optimiser. On a head, which
    one task moves, it is that task's Adam.

    Built as ``chain(per_task(optax.scale_by_adam(b1, b2, eps), T), sum_tasks())``;
    write that with another transform, or another combiner, for methods between.

    Args:
      num_tasks: T.
      b1: decay of the first moments; 0.9 as in Adam.
      b2: decay of the second moments; 0.999 as in Adam.
      eps: added outside the root; 1e-8 as in Adam. Gradients below it are not lifted.
      mu_dtype: dtype of the first moments, as in `optax.adam`; default: as the second.
        (Second moments need float32: at ``b2 = 0.999`` a bfloat16 would never change.)

    Returns:
      a `Combiner`. **Memory**: 2 T copies of the parameters, in float32 at least (with
      ``mu_dtype=jnp.bfloat16`` 1.5 T), and T gradients a step: a lazy tree is
      materialised, T backward passes. Absent tasks' moments wait.

    Raises:
      ValueError: for ``b1`` or ``b2`` outside [0, 1), or ``eps`` not positive (a task
        that does not touch a parameter would give 0 / 0).

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.scale_by_mao(num_tasks=2)
      >>> g = {"w": jnp.array([[3.0, -0.002, 0.0], [1000.0, 5.0, -7.0]])}
      >>> updates, state = tx.update(g, tx.init({"w": jnp.zeros(3)}))
      >>> [f"{x:.2f}" for x in updates["w"]]
      ['2.00', '0.00', '-1.00']

    Not checked against the paper, whose text was not available. The rule is the one
    that two independent implementations agree on, but for the sum over tasks, where one
    has the mean: the learning rate absorbs the factor T.

    References:
      Hervella, Rouco, Novo & Ortega, `Multi-adaptive optimization for multi-task
      learning with deep neural networks
      <https://doi.org/10.1016/j.neunet.2023.11.038>`_, Neural Networks 170, 2024.
    """
    check_nonnegative("b1", b1, below=1)
    check_nonnegative("b2", b2, below=1)
    check_positive("eps", eps)
    moments = per_task(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype), num_tasks)

    def init(params: Params, num_tasks: int) -> PerTaskState:
        del num_tasks
        return moments.init(_wide(params))

    def update(
        rows: TaskGradients,
        state: PerTaskState,
        params: Params | None,
        *,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Updates, PerTaskState]:
        del params, extra
        steps, state = moments.update(_wide(rows), state, task_mask=task_mask)
        total = weighted_sum(jnp.ones(num_tasks), steps)
        return jax.tree.map(lambda u, g: u.astype(g.dtype), total, rows), state

    # No `scale="norm"`: it would bring back the gradients' lengths, and blow up
    # rounding where the steps of opposed tasks cancel.
    return from_aggregator(Aggregator(init, update), num_tasks)


def _wide(tree: PyTree[Any]) -> PyTree[Any]:
    """Moments of low-precision gradients are kept in float32."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.result_type(jnp.float32, jnp.asarray(x).dtype)),
        tree,
    )
