"""Work on all tasks' rows, done for a few of them after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# Tasks that are taken at a time.
TOGETHER = 8


def late_zero(x: Array) -> Float[Array, ""]:
    """A zero that XLA can't know before `x`, to order what would not wait for it."""
    if x.size == 0:
        return jnp.zeros((), x.dtype)
    first = x[(0,) * x.ndim]
    never = first < -jnp.finfo(first.dtype).max / 2
    return jnp.where(never, first, jnp.zeros((), first.dtype))


def delayed(x: Array, zero: Array) -> Array:
    """`x`, as soon as a `late_zero` is known; integers as they are."""
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return x + zero.astype(x.dtype) if floating else x


def a_few_at_a_time(
    function: Callable[[list[Array]], list[Array]],
    rows: Sequence[Array],
    free: Sequence[int] = (),
) -> list[Array]:
    """``function(rows)``; results may take the room of the rows numbered in `free`."""
    count = rows[0].shape[0]
    if count <= TOGETHER:
        return function(list(rows))
    whole = count // TOGETHER * TOGETHER
    shapes = jax.eval_shape(function, [row[:TOGETHER] for row in rows])
    # Without a late zero XLA makes room for the results of all layers at once.
    zero = late_zero(rows[0])
    room: list[Array] = []
    place: dict[int, int] = {}  # of rows among the results
    for number, x in enumerate(shapes):
        shape = (count, *x.shape[1:])
        like = [k for k in free if k not in place and rows[k].shape == shape]
        like = [k for k in like if rows[k].dtype == x.dtype]
        if like:
            place[like[0]] = number
            room.append(rows[like[0]])
        else:
            room.append(jnp.broadcast_to(zero.astype(x.dtype), shape))

    def put(filled: list[Array], first: Any, size: int) -> list[Array]:
        now = [filled[place[k]] if k in place else row for k, row in enumerate(rows)]
        some = [lax.dynamic_slice_in_dim(row, first, size) for row in now]
        return [
            lax.dynamic_update_slice_in_dim(x, new, first, 0)
            for x, new in zip(filled, function(some), strict=True)
        ]

    filled: list[Array] = lax.fori_loop(
        0,
        whole // TOGETHER,
        lambda chunk, filled: put(filled, chunk * TOGETHER, TOGETHER),
        room,
    )
    return filled if whole == count else put(filled, whole, count - whole)
