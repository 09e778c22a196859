"""Arithmetic that is done only where it is due, also under `jax.vmap`."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
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


def anew_if(
    due: Array,
    make: Callable[[Array], Array],
    basis: Array,
    kept: Array,
    *,
    often: bool = False,
) -> Array:
    """``make(basis)`` where it is due, else what is kept.

    A loop of zero or one turns: a `lax.cond` would copy what `make` closes over, such
    as stacked gradients, into its branch.

    Args:
      due: a bool.
      make: for instance of a Gramian in a basis.
      basis: what it is made of.
      kept: of its result's shape and dtype.
      often: it will be due often. Convolutions, which XLA runs tens of times slower in
        loops on CPU, are then run in any case.
    """

    def anew(turn: Array, _: Array) -> Array:
        # Depends on the turn, or XLA would hoist it out of the loop and always run it.
        return make(jnp.where(turn == 0, basis, jnp.zeros((), basis.dtype)))

    if not isinstance(due, jax.core.Tracer):
        # A loop would compile anew at every call.
        return make(basis) if due else kept
    if often and jax.default_backend() == "cpu":
        convolves = "conv_general_dilated" in str(jax.make_jaxpr(make)(basis))
        if convolves:
            return jnp.where(due, make(basis), kept)
    return lax.fori_loop(0, due.astype(jnp.int32), anew, kept)


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
