"""Rows sorted entry by entry, by comparing two rows at a time.

Odd-even merge sort (Batcher 1968, AFIPS): a fixed list of pairs (i, j), i < j, after
which, each time the smaller entry is put first, every column is sorted.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mtl_optax._tree import accumulator

# XLA sorts a column at a time, on CPU 100 to 300 times slower than comparing rows, but
# compiles only some hundred such comparisons a second. They pay within a hundred steps
# for arrays of so many numbers a comparison; of more than about 600 for one array XLA
# makes a program that computes them again and again.
_NUMBERS = 600
_MOST_ROWS = 64
_COMPARISONS = 10_000


@functools.cache
def _network(number: int) -> tuple[tuple[int, int], ...]:
    pairs = []
    width = 1
    while width < number:
        step = width
        while step:
            for start in range(step % width, number - step, 2 * step):
                for i in range(start, min(start + step, number - step)):
                    if i // (2 * width) == (i + step) // (2 * width):
                        pairs.append((i, i + step))
            step //= 2
        width *= 2
    return tuple(pairs)


def sorted_rows(stacked: Sequence[Array]) -> list[Array | list[Array]]:
    """Sorts each array ``[T, *shape]`` over its first axis, NaN last.

    Args:
      stacked: arrays of any dtypes with an order, of one T. With up to 64 rows large
        ones are sorted by comparing rows; the others, and all outside of `jit`, by
        `jax.numpy.sort`.

    Returns:
      for each array its T sorted rows, the smallest entries first: a list of them where
      rows were compared, else one array.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import sorted_rows
      >>> x = jnp.array([[3.0, 1.0], [jnp.nan, 0.0], [2.0, 5.0]])
      >>> [row.tolist() for row in sorted_rows([x])[0]]
      [[2.0, 0.0], [3.0, 1.0], [nan, 5.0]]
    """
    if not stacked:
        return []
    count = stacked[0].shape[0]
    pairs = _network(count) if count <= _MOST_ROWS else ()
    largest = sorted(range(len(stacked)), key=lambda at: -stacked[at].size)
    compared = set(largest[: _COMPARISONS // max(len(pairs), 1)])
    found: list[Array | list[Array]] = []
    for at, x in enumerate(stacked):
        # Not traced, every comparison would be a program of its own.
        traced = isinstance(x, jax.core.Tracer)
        pays = x.size >= _NUMBERS * len(pairs)
        if pairs and traced and pays and at in compared:
            found.append(_compared(x, pairs))
        else:
            found.append(jnp.sort(x, axis=0))
    return found


def _compared(x: Array, pairs: Sequence[tuple[int, int]]) -> list[Array]:
    dtype = x.dtype
    if jnp.issubdtype(dtype, jnp.floating):
        # Narrow numbers would be widened and narrowed at every comparison.
        x = x.astype(accumulator(x))
    rows = list(x)
    for i, j in pairs:
        a, b = rows[i], rows[j]
        swap = (b < a) | (a != a)
        rows[i], rows[j] = jnp.where(swap, b, a), jnp.where(swap, a, b)
    return [row.astype(dtype) for row in rows]
