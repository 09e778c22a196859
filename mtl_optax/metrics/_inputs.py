"""What the measures accept: arrays or lists of real numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Num

# Inputs keep loose shapes on purpose: our own errors explain a wrong one better than
# a runtime type checker does.
Numbers = Num[ArrayLike, "..."] | Sequence[Any]


def as_float(name: str, values: Numbers) -> Float[Array, "..."]:
    array = jnp.asarray(values)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if jnp.issubdtype(array.dtype, jnp.integer):
        return array.astype(float)
    raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")


def is_concrete(*trees: object) -> bool:
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(trees))


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype to compute in where half precision loses too much."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
