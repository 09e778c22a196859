"""Sums that XLA's CPU back end may get wrong: exact all the same, on every path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mtl_optax as mtl
from mtl_optax.jacobian import _reductions

ROWS, WIDTH, TASKS = 2048, 32, 8


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


PARAMS = {
    "bias": 0.1 * numbers(WIDTH, seed=1),
    "kernel": numbers(WIDTH, WIDTH, seed=2) / 4,
    "out": numbers(WIDTH, TASKS, seed=3) / 4,
    "scale": 1 + 0.1 * numbers(WIDTH, seed=4),
}
X = numbers(ROWS, WIDTH, seed=5)


def normalise(h):
    centred = h - h.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def losses(params, x):
    z = normalise(x @ params["kernel"]) * params["scale"] + params["bias"]
    return ((z @ params["out"]) ** 2).mean(0)


def by_hand():
    """Rows of the Jacobian in float64, leaves in the order of their names."""
    h = X @ PARAMS["kernel"]
    centred = h - h.mean(-1, keepdims=True)
    r = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    n = centred * r
    z = n * PARAMS["scale"] + PARAMS["bias"]
    y = z @ PARAMS["out"]
    rows = []
    for t in range(TASKS):
        dy = 2 * y[:, t : t + 1] / ROWS
        dz = dy * PARAMS["out"][:, t]
        dout = np.zeros_like(PARAMS["out"])
        dout[:, t] = z.T @ dy[:, 0]
        dn = dz * PARAMS["scale"]
        mean = dn.mean(-1, keepdims=True)
        dh = r * (dn - mean - n * (dn * n).mean(-1, keepdims=True))
        row = [dz.sum(0), X.T @ dh, dout, (dz * n).sum(0)]
        rows.append(np.concatenate([leaf.ravel() for leaf in row]))
    return np.stack(rows)


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("mode", [None, "layerwise", "vmap", "map"])
def test_gradients_of_a_normalisation_over_many_rows(mode):
    weights = np.arange(1.0, TASKS + 1)

    @jax.jit
    def ask(params, x):
        _, lazy = mtl.task_jacobian(losses, mode=mode)(params, x)
        stacked = [g.reshape(TASKS, -1) for g in jax.tree.leaves(mtl.materialize(lazy))]
        mixed = jax.tree.leaves(mtl.weighted_sum(jnp.asarray(weights), lazy))
        return (
            mtl.gramian(lazy),
            jnp.concatenate([leaf.ravel() for leaf in mixed]),
            jnp.concatenate(stacked, 1),
        )

    gram, mixed, rows = ask(single(PARAMS), jnp.asarray(X, jnp.float32))
    wanted = by_hand()
    assert_close(gram, wanted @ wanted.T)
    assert_close(mixed, weights @ wanted)
    assert_close(rows, wanted)


@pytest.fixture
def faulty(monkeypatch):
    """As if this machine's XLA had the fault."""
    monkeypatch.setattr(_reductions, "_trial_fails", lambda: True)
    monkeypatch.setattr(_reductions.jax, "default_backend", lambda: "cpu")


def everything(params, x):
    """Losses whose equations lie in every sort of equation that holds others."""

    @jax.jit
    def layer(x, w):
        return normalise(jax.nn.relu(x @ w) + x)

    def round_(x, w):
        return jax.checkpoint(layer)(x, w), jnp.tanh(x).mean()

    x, means = lax.scan(round_, x, params["stack"])
    x = lax.cond(means[0] > 10, lambda x: -x, lambda x: x * params["scale"], x)
    y = jax.nn.logsumexp(x - x.mean(-1, keepdims=True), axis=-1)
    return {"a": (y**2).mean(), "b": means.sum(), "c": jnp.float32(2) * y.sum()}


@pytest.mark.usefixtures("faulty")
@pytest.mark.slow
def test_what_keeps_sums_apart_changes_no_result():
    params = single({"scale": numbers(6), "stack": numbers(3, 6, 6)})
    x = single(numbers(5, 6))

    def with_aux(params, x):
        return everything(params, x), {"name": "aux", "x": x.sum(0), "none": None}

    (found, aux), lazy = mtl.task_jacobian(with_aux, has_aux=True)(params, x)
    wanted = jax.jacrev(everything)(params, x)
    values = list(everything(params, x).values())
    np.testing.assert_allclose(found, values, 1e-6)
    assert aux["name"] == "aux"
    assert aux["none"] is None
    np.testing.assert_array_equal(aux["x"], x.sum(0))
    wanted = jax.tree.map(lambda *rows: jnp.stack(rows), *wanted.values())
    for rows in (mtl.materialize(lazy), mtl.materialize(lazy, isolated=True)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-5), rows, wanted
        )
    assert_close(mtl.gramian(lazy), mtl.gramian(wanted))
    assert "direct" not in {leaf.way for leaf in mtl.explain(lazy).leaves[1:]}


@pytest.mark.usefixtures("faulty")
def test_one_batch_a_task_keeps_sums_apart():
    params, x = single(numbers(6, 6)), single(numbers(3, 5, 6))

    def loss(w, x):
        return (normalise(x @ w) ** 3).sum()

    found, stacked = mtl.value_and_task_grads(loss, in_axes=(None, 0))(params, x)
    traced = jax.make_jaxpr(mtl.value_and_task_grads(loss, in_axes=(None, 0)))(
        params, x
    )
    assert "clamp" in str(traced)
    for t in range(3):
        value, gradient = jax.value_and_grad(loss)(params, x[t])
        np.testing.assert_allclose(found[t], value, 1e-5, 1e-5)
        np.testing.assert_allclose(stacked[t], gradient, 1e-4, 1e-5)


def test_what_is_only_rearranged_is_left_alone(faulty):
    def dense(p, x):
        y = jnp.tanh(x @ p["kernel"] * p["scale"] + p["bias"].reshape(1, -1))
        return ((y @ p["out"]) ** 2).mean(0)

    traced = jax.make_jaxpr(dense)(single(PARAMS), single(X))
    assert not _reductions.sums_go_wrong(traced)
    traced = jax.make_jaxpr(losses)(single(PARAMS), single(X))
    assert _reductions.sums_go_wrong(traced)
    assert "clamp" in str(
        jax.make_jaxpr(_reductions.with_right_sums(losses))(PARAMS, X)
    )


# The number of tasks, or of members, makes sums long that are short in the losses.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "rows", "width"),
    [(4, 4000, 4), (8, 512, 16), (8, 2000, 8), (16, 512, 8), (64, 128, 64)],
)
def test_sums_are_right_whatever_makes_them_long(tasks, rows, width):
    kernel = numbers(width, width, seed=1) / width**0.5
    params = single({"kernel": kernel, "out": numbers(width, tasks, seed=2) / 4})
    x = single(numbers(rows, width, seed=3))

    def of_features(params, h, x):
        return ((normalise(h) @ params["out"]) ** 2).mean(0)

    def encode(params, x):
        return x @ params["kernel"]

    def loss_fn(params, x):
        return of_features(params, encode(params, x), x)

    # Outside `jit` nothing is fused.
    h = encode(params, x)
    features = jax.jacrev(lambda h: of_features(params, h, x))(h).reshape(tasks, -1)
    features = np.asarray(features, np.float64)
    wanted = jax.tree.leaves(jax.jacrev(loss_fn)(params, x))
    wanted = np.concatenate([g.reshape(tasks, -1) for g in wanted], 1, dtype=np.float64)
    for mode in (None, "layerwise", "vmap"):

        @jax.jit
        def gramian(params, mode=mode):
            return mtl.gramian(mtl.task_jacobian(loss_fn, mode=mode)(params, x)[1])

        assert_close(gramian(params), wanted @ wanted.T)

    @jax.jit
    def at_the_features(params):
        return mtl.gramian(mtl.feature_jacobian(encode, of_features)(params, x)[1])

    assert_close(at_the_features(params), features @ features.T)


def test_the_trial_compiles_even_where_nothing_else_does():
    with jax.disable_jit():
        without = _reductions._trial_fails.__wrapped__()
    assert without == _reductions._trial_fails.__wrapped__()
