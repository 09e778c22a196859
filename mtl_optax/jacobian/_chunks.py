"""Work on all tasks' rows, done for a few of them after the other."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._tree import choose_rows

# Tasks that are taken at a time, at most; of more than these, at least half as many.
TOGETHER = 8


def rounds_of(count: int) -> tuple[int, int]:
    """How many rounds of how many tasks: with the least that is done twice.

    The last of them ends with the last task. A rest after the loop would keep copies of
    all that the loop works on in place.
    """
    if count <= TOGETHER:
        return 1, count
    sizes = range(TOGETHER, TOGETHER // 2, -1)
    size = min(sizes, key=lambda size: -count % size)
    return -(-count // size), size


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
    rounds, size = rounds_of(count)
    if rounds == 1:
        return function(list(rows))
    shapes = jax.eval_shape(function, [row[:size] for row in rows])
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

    even = rounds * size == count

    def put(chunk: Array, filled: list[Array]) -> list[Array]:
        first = chunk * size if even else jnp.minimum(chunk * size, count - size)
        now = [filled[place[k]] if k in place else row for k, row in enumerate(rows)]
        some = [lax.dynamic_slice_in_dim(row, first, size) for row in now]
        if even:
            results = function(some)
        else:
            # What is met again may hold results already.
            fresh = first + jnp.arange(size) >= chunk * size
            some = [choose_rows(fresh, x, jnp.zeros((), x.dtype)) for x in some]
            old = [lax.dynamic_slice_in_dim(x, first, size) for x in filled]
            pairs = zip(function(some), old, strict=True)
            results = [choose_rows(fresh, new, old) for new, old in pairs]
        return [
            lax.dynamic_update_slice_in_dim(x, new, first, 0)
            for x, new in zip(filled, results, strict=True)
        ]

    filled: list[Array] = lax.fori_loop(0, rounds, put, room)
    return filled
