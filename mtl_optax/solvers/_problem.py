"""What every solver does with its problem first."""

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType

# Float32 products would otherwise run in TF32 or bf16 on accelerators.
dot = partial(jnp.matmul, precision=HIGHEST)


def check_problem(matrix: Array, **vectors: Array | None) -> tuple[int, DType]:
    """Size and dtype of a problem; raises unless its parts fit.

    Args:
      matrix: has to be ``[T, T]``, in float32 or float64.
      **vectors: have to be ``[T]``, or None.
    """
    size = matrix.shape[0] if matrix.ndim else 0
    if matrix.shape != (size, size) or not size:
        raise ValueError(f"expected a [T, T] matrix, got shape {matrix.shape}")
    for name, value in vectors.items():
        if value is not None and value.shape != (size,):
            raise ValueError(
                f"{name} has shape {value.shape}, expected {(size,)} "
                f"beside a matrix of shape {matrix.shape}"
            )
    if matrix.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"expected a float32 or float64 matrix, got {matrix.dtype}")
    return size, matrix.dtype
