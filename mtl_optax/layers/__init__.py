"""Layers that know tasks, for Flax NNX; `mtl_optax.layers.linen` has them for linen.

Flax is no dependency of `mtl_optax`; this package is imported by those who use it.
"""

from mtl_optax.layers._nnx import TaskBatchNorm

__all__ = ["TaskBatchNorm"]
