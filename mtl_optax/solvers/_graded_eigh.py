"""Eigenvalues of a Gramian whose rows differ widely in length, by Jacobi's method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from mtl_optax._types import Gramian

_MAX_SWEEPS = 16


def _next_round(size: int) -> np.ndarray:
    """Where players of a round robin sit next; pairs are (0, 1), (2, 3), ..."""
    seats = np.arange(size)
    top, bottom = list(seats[::2]), list(seats[1::2])
    top, bottom = [top[0], bottom[0], *top[1:-1]], [*bottom[1:], top[-1]]
    if size == 2:
        return seats
    return np.array([top, bottom]).T.ravel()


@partial(jax.jit, static_argnames="size")
def _rotate_until_diagonal(matrix: Array, size: int) -> tuple[Array, Array]:
    """``(A, V)`` with A diagonal to rounding; even `size`."""
    dtype = matrix.dtype
    eps = jnp.finfo(dtype).eps
    seats = jnp.asarray(_next_round(size))
    vectors = jnp.eye(size, dtype=dtype) + jnp.zeros_like(matrix)

    def mix(x: Array, c: Array, s: Array) -> Array:
        """Rotates pairs of rows."""
        even, odd = x[0::2], x[1::2]
        pairs = [
            c[:, None] * even - s[:, None] * odd,
            s[:, None] * even + c[:, None] * odd,
        ]
        return jnp.stack(pairs, axis=1).reshape(x.shape)

    def one_round(
        _: Array, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        a, v, worst = carry
        diagonal = jnp.diagonal(a)
        first, second = diagonal[0::2], diagonal[1::2]
        between = jnp.diagonal(a[0::2, 1::2])
        mean = jnp.sqrt(jnp.maximum(first, 0)) * jnp.sqrt(jnp.maximum(second, 0))
        cosine = jnp.abs(between) / jnp.where(mean > 0, mean, 1)
        cosine = jnp.where(mean > 0, cosine, 0)
        turn = cosine > eps / 2
        angle = (second - first) / jnp.where(turn, 2 * between, 1)
        sign = jnp.where(angle < 0, -1, 1).astype(dtype)
        t = sign / (jnp.abs(angle) + jnp.hypot(jnp.ones_like(angle), angle))
        t = jnp.where(turn, t, 0)
        c = lax.rsqrt(1 + t * t)
        s = t * c
        a = mix(mix(a, c, s).T, c, s)
        # What a rotation makes of its own pair is known better than by rotating.
        own = jnp.stack([first - t * between, second + t * between], axis=1).ravel()
        left = jnp.where(turn, 0, between)
        pair = jnp.arange(0, size, 2)
        a = a.at[pair, pair + 1].set(left).at[pair + 1, pair].set(left)
        a = a.at[jnp.arange(size), jnp.arange(size)].set(own)
        a = a[seats][:, seats]
        v = mix(v, c, s)[seats]
        return a, v, jnp.maximum(worst, jnp.max(cosine))

    def sweep(
        carry: tuple[Array, Array, Array, Array],
    ) -> tuple[Array, Array, Array, Array]:
        a, v, _, turns = carry
        zero = jnp.zeros_like(a[0, 0])
        a, v, worst = lax.fori_loop(0, size - 1, one_round, (a, v, zero))
        return a, v, worst, turns + 1

    start = (matrix, vectors, jnp.full_like(matrix[0, 0], jnp.inf), 0 * matrix[0, 0])
    a, v, _, _ = lax.while_loop(
        lambda carry: (carry[2] > 4 * eps) & (carry[3] < _MAX_SWEEPS), sweep, start
    )
    return a, v


def graded_eigh(
    gramian: Gramian,
) -> tuple[Float[Array, " tasks"], Gramian, Bool[Array, " tasks"]]:
    r"""Eigenvalues and eigenvectors, small ones as exact as large ones.

    .. math:: G = V \Lambda V^\top

    The eigenvectors of `jax.numpy.linalg.eigh` err by the rounding of the *largest*
    eigenvalue, so that in float32 a gradient a few hundred times shorter than another
    is lost in them. Jacobi's method errs by that of the matrix of cosines, whatever the
    lengths of the rows (Demmel and Veselić). All disjoint pairs are turned at once.

    Args:
      gramian: ``[T, T]``, symmetric and positive semidefinite up to rounding.

    Returns:
      ``(values, vectors, kept)``: eigenvalues ``[T]`` in no particular order, not below
      zero; eigenvectors in the columns of ``[T, T]``; and which eigenvalues stand above
      rounding, compared with the rows that their vectors combine. NaN if an entry is
      not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.solvers import graded_eigh
      >>> values, _, kept = graded_eigh(jnp.array([[1e8, 0.0], [0.0, 1e-8]]))
      >>> print(values, kept)
      [1.e+08 1.e-08] [ True  True]

    References:
      Demmel and Veselić, Jacobi's method is more accurate than QR, SIAM J. Matrix Anal.
      Appl. 13, 1992.
    """
    size, dtype = gramian.shape[0], gramian.dtype
    squares = jnp.maximum(jnp.diagonal(gramian), 0)
    largest = jnp.max(squares)
    scale = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    sound = jnp.all(jnp.isfinite(gramian))
    even = size + size % 2
    padded = jnp.where(sound, gramian / scale, 0)
    padded = jnp.pad((padded + padded.T) / 2, (0, even - size))
    diagonal, rows = _rotate_until_diagonal(padded, even)
    # The padding's eigenvector has been led about; it is the one that lies outside.
    values = jnp.maximum(jnp.diagonal(diagonal), 0)
    if even > size:
        outside = jnp.abs(rows[:, -1])
        order = jnp.argsort(outside)[:size]
        values, rows = values[order], rows[order, :size]
    combined = jnp.matmul(rows**2, squares / scale, precision=lax.Precision.HIGHEST)
    kept = values > 4 * size * jnp.finfo(dtype).eps * combined
    return (
        jnp.where(sound, values * scale, jnp.nan),
        jnp.where(sound, rows.T, jnp.nan),
        kept,
    )
