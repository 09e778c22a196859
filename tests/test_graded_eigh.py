"""`graded_eigh`: small eigenvalues beside large ones, against the SVD in float64."""

import jax.numpy as jnp
import laws
import numpy as np
import pytest

from mtl_optax.solvers import graded_eigh

solve = laws.quick_jit(graded_eigh)


def rows_of(tasks, size, spread, seed=0):
    rng = np.random.default_rng([tasks, size, seed])
    rows = rng.standard_normal((tasks, size))
    return rows * 10 ** np.linspace(0, spread, tasks)[rng.permutation(tasks), None]


def decompose(rows, dtype=np.float32):
    gram = (rows @ rows.T).astype(dtype)
    return [np.asarray(x) for x in solve(gram)]


@pytest.mark.parametrize("spread", [0, 4, 6])
@pytest.mark.parametrize(("tasks", "size"), [(1, 4), (2, 4), (5, 9), (8, 20), (5, 3)])
def test_against_singular_values(tasks, size, spread):
    rows = rows_of(tasks, size, spread)
    values, vectors, kept = decompose(rows)
    singular = np.linalg.svd(rows, compute_uv=False)
    assert kept.sum() == len(singular)
    found = np.sort(values[kept])[::-1]
    # Rows of rank below their number: a rounded Gramian fixes small values less well.
    rtol = 2e-5 if tasks <= size else 1e-2
    np.testing.assert_allclose(found, singular**2, rtol=rtol)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(tasks), atol=1e-5)


def test_lapack_loses_what_this_keeps():
    """Rows turned by the eigenvectors and brought to length one are orthonormal."""

    def off(values, vectors, rows):
        turned = vectors.T.astype(np.float64) @ rows / np.sqrt(np.abs(values))[:, None]
        return np.abs(turned @ turned.T - np.eye(len(rows))).max()

    lapack, here = [], []
    for seed in range(10):
        rows = rows_of(5, 9, 5, seed)
        gram = (rows @ rows.T).astype(np.float32)
        lapack.append(off(*map(np.asarray, jnp.linalg.eigh(gram)), rows))
        here.append(off(*decompose(rows)[:2], rows))
    assert np.median(lapack) > 1e-3
    assert max(here) < 1e-4


def test_in_float64(x64):
    rows = rows_of(7, 12, 8)
    values, vectors, kept = [np.asarray(x) for x in solve(rows @ rows.T)]
    singular = np.linalg.svd(rows, compute_uv=False)
    assert kept.all()
    # NumPy's own SVD loses the short rows; products in the eigenvectors do not.
    np.testing.assert_allclose(
        np.sort(values)[-3:], singular[:3][::-1] ** 2, rtol=1e-12
    )
    own = np.linalg.norm(vectors.T @ rows, axis=1) ** 2
    np.testing.assert_allclose(own, values, rtol=1e-9)


def test_duplicates_zeros_and_nothing():
    row = np.float32([1, 2, 2])
    values, _, kept = decompose(np.stack([row, row, 0 * row]))
    assert kept.sum() == 1
    np.testing.assert_allclose(values.max(), 18, rtol=1e-6)
    values, _, kept = decompose(np.zeros((3, 2)))
    assert not kept.any()
    assert not values.any()


def test_what_is_not_finite_stays_so():
    values, vectors, _ = decompose(np.array([[np.nan, 1], [1, 1]]))
    assert np.isnan(values).all()
    assert np.isnan(vectors).all()


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "size"), [(40, 100), (127, 200), (128, 300)])
def test_many_tasks(tasks, size):
    rows = rows_of(tasks, size, 4)
    values, vectors, kept = decompose(rows)
    assert kept.all()
    lengths = np.sort(np.linalg.norm(vectors.T.astype(np.float64) @ rows, axis=1))
    np.testing.assert_allclose(np.sqrt(np.sort(values)), lengths, rtol=1e-3)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(tasks), atol=3e-5)
