"""A `lax.cond` that stays one under `jax.vmap`."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from mtl_optax._tree import select

T = TypeVar("T")


def cond_when_any(due: Array, make: Callable[[], T], kept: T) -> T:
    """``make()`` where it is due, else what is kept.

    Under `jax.vmap` a `lax.cond` by member would become a choice that always computes
    both. This one goes by all members: if it is due for any, the arithmetic is done
    for all, and the others keep theirs.
    """

    def made() -> T:
        return select(due, make(), kept)

    return lax.cond(_any_member(due), made, lambda: kept)


@custom_vmap
def _any_member(flag: Array) -> Array:
    """The flag itself; under `jax.vmap` one for all, so that `lax.cond` stays one."""
    return flag


@_any_member.def_vmap
def _any_of_all(
    axis_size: int, in_batched: Sequence[bool], flags: Array
) -> tuple[Array, bool]:
    del axis_size
    one = jnp.any(flags, axis=0) if in_batched[0] else flags
    return _any_member(one), False
