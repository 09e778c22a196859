"""The mixing of the two phases of connection-strength optimisation.

Jeong & Yoon, "Quantifying Task Priority for Multi-Task Optimization", CVPR 2024,
Algorithm 1. Phase 1 is `mtl_optax.sequential_task_steps`, Phase 2
`mtl_optax.priority_projection`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt32


def phase_schedule(
    key: Key[Array, ""] | UInt32[Array, "..."],
    epoch: int | Int[Array, ""],
    num_epochs: int | Int[Array, ""],
    *,
    step: int | Int[Array, ""] | None = None,
) -> Bool[Array, ""]:
    r"""Draws the phase: True for Phase 1, ever less often as training goes on.

    .. math:: \text{Phase 1} \iff P \ge e / E, \qquad P \sim U(0, 1)

    Phase 1 has the probability ``1 - e / E``: always at epoch 0, never from epoch E on,
    and ``(E + 1) / (2 E)`` of a whole run. Give the same key all run long: `epoch` and
    `step` are folded into it, so the draw can be repeated without any state.

    For one compiled step without retracing, pass `epoch` and `step` as arrays and
    branch by ``jax.lax.cond(mtl.phase_schedule(key, epoch, num_epochs, step=step),
    phase_1, phase_2, state)``. Under `vmap` over seeds keep `key`, `epoch` and `step`
    unbatched: a batched draw turns `cond` into a selection, which pays for both.

    Args:
      key: random key of the run, typed or legacy.
      epoch: e, counted from 0; may be traced.
      num_epochs: E; may be traced.
      step: number of the batch; may be traced. Given, the phase is drawn once a batch;
        left out, once an epoch.

    Returns:
      a scalar array of bool.

    Raises:
      ValueError: if a number is concrete and out of range.
      TypeError: if a number is not an integer.

    Example:
      >>> import jax
      >>> import mtl_optax as mtl
      >>> key = jax.random.key(0)
      >>> [bool(mtl.phase_schedule(key, epoch, 4)) for epoch in (0, 4)]
      [True, False]
      >>> steps = jax.numpy.arange(1000)
      >>> draw = jax.vmap(lambda step: mtl.phase_schedule(key, 1, 4, step=step))
      >>> round(float(draw(steps).mean()), 1)  # 1 - 1/4, within sampling error
      0.8

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, Algorithm 1. The paper's text
      draws once an epoch, the authors' code once a batch; epochs count from 0 in the
      code.
    """
    _check_integer("num_epochs", num_epochs, at_least=1)
    _check_integer("epoch", epoch, at_least=0)
    key = jax.random.fold_in(key, epoch)
    if step is not None:
        _check_integer("step", step, at_least=0)
        key = jax.random.fold_in(key, step)
    # In float32 whatever the mode, so that x64 does not change the draws.
    share = jnp.asarray(epoch, jnp.float32) / jnp.asarray(num_epochs, jnp.float32)
    return jax.random.uniform(key, (), jnp.float32) >= share


def _check_integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not jnp.issubdtype(
        jnp.result_type(value), jnp.integer
    ):
        raise TypeError(
            f"phase_schedule: {name} must be an integer, got {type(value).__name__} "
            f"of dtype {jnp.result_type(value)}."
        )
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"phase_schedule: {name} must be a scalar, got shape {jnp.shape(value)}."
        )
    if not isinstance(value, jax.core.Tracer) and value < at_least:
        raise ValueError(
            f"phase_schedule: {name} must be at least {at_least}, got {value}."
        )
