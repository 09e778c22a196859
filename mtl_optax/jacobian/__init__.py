"""Where task gradients come from."""

from mtl_optax.jacobian._explain import Explanation, explain
from mtl_optax.jacobian._features import feature_jacobian
from mtl_optax.jacobian._look_ahead import look_ahead_jacobian
from mtl_optax.jacobian._shared_mask import shared_mask, task_touches
from mtl_optax.jacobian._task_jacobian import task_jacobian, value_and_task_grads

__all__ = [
    "Explanation",
    "explain",
    "feature_jacobian",
    "look_ahead_jacobian",
    "shared_mask",
    "task_jacobian",
    "task_touches",
    "value_and_task_grads",
]
