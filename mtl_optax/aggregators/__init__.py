"""Methods that look at whole task gradients."""

from mtl_optax.aggregators._priority_projection import priority_projection
from mtl_optax.aggregators._scale_by_mao import scale_by_mao

__all__ = ["priority_projection", "scale_by_mao"]
