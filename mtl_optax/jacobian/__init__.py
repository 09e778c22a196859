"""Where task gradients come from."""

from mtl_optax.jacobian._shared_mask import shared_mask
from mtl_optax.jacobian._task_jacobian import task_jacobian, value_and_task_grads

__all__ = ["shared_mask", "task_jacobian", "value_and_task_grads"]
