"""`explain`: what it says against XLA's count, and for operators of all kinds."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import mtl_optax as mtl

WIDTH = 128
X = jnp.ones((32, WIDTH)) / 7


def layers(*names):
    return {name: jnp.eye(WIDTH) / 2 for name in names} | {
        "out": jnp.ones((WIDTH, 6)) / 9
    }


def dense(p):
    h = jnp.tanh(jnp.tanh(X @ p["a"]) @ p["b"])
    return list(((h @ p["out"] - 1) ** 2).mean(0))


def penalised(p):
    return [*dense(p), 1e-4 * (jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2))]


def scanned(p):
    h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), X, jnp.stack([p["a"]] * 3))[0]
    return list(((h @ p["out"] - 1) ** 2).mean(0))


def attention(p):
    h = jnp.tanh(X @ p["a"])
    h = jax.nn.softmax(h @ p["b"] @ h.T) @ h
    return list(((h @ p["out"] - 1) ** 2).mean(0))


def flops(function, params):
    return jax.jit(function).lower(params).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("mode", [None, "layerwise"])
@pytest.mark.parametrize("loss_fn", [dense, penalised, attention])
def test_the_total_is_what_xla_counts(loss_fn, mode):
    params = layers("a", "b")
    num_tasks = len(loss_fn(params))
    tx = mtl.mgda(num_tasks=num_tasks)

    def balanced(params):
        _, lazy = mtl.task_jacobian(loss_fn, mode=mode)(params)
        return tx.update(lazy, tx.init(params), params)[0]

    counted = flops(balanced, params) / flops(
        jax.grad(lambda p: sum(loss_fn(p))), params
    )
    _, lazy = mtl.task_jacobian(loss_fn, mode=mode)(params)
    said = mtl.explain(lazy).plain_steps
    assert 0.7 * counted < said < 1.4 * counted


def test_rounds_of_a_loop_count():
    _, lazy = mtl.task_jacobian(scanned)(layers("a"))
    _, once = mtl.task_jacobian(lambda p: dense({**p, "b": p["a"]}))(layers("a"))
    assert mtl.explain(lazy).plain_steps > 1
    assert mtl.explain(once).plain_steps > 1


def test_products_are_counted_where_no_parameter_is_a_layers():
    def loss_fn(p):  # two forms of use: none is taken for a layer
        h = jnp.tanh(X @ p["a"])
        return [jnp.sum(h @ p["a"].T), jnp.sum((p["a"] @ h.T) ** 2)]

    _, lazy = mtl.task_jacobian(loss_fn)({"a": jnp.eye(WIDTH)})
    found = mtl.explain(lazy)
    assert found.leaves[0].way == "direct"
    assert 1 < found.plain_steps < 3


def test_at_the_features():
    def encode(p):
        return jnp.tanh(X @ p["a"])

    def heads(p, h):
        return list(((h @ p["out"] - 1) ** 2).mean(0))

    _, lazy = mtl.feature_jacobian(encode, heads)(layers("a"))
    found = mtl.explain(lazy)
    assert found.gramian.startswith(f"at the features, {32 * WIDTH} numbers a task")
    assert {(leaf.way, leaf.bytes) for leaf in found.leaves} == {("features", 0)}
    assert found.leaves[0].path in str(found)


def test_an_operator_of_ones_own():
    class Ones:
        num_tasks, task_names, isolates = 2, ("a", "b"), True
        losses = jnp.zeros(2)

        def restrict(self, leaves):
            return self

        def gramian(self, basis=None, task_mask=None):
            return jnp.ones((2, 2))

        def combine(self, weights):
            return [jnp.ones(3)]

        def stack(self, *, isolated=False):
            return [jnp.ones((2, 3))]

    found = mtl.explain(mtl.lazy_tree(Ones(), jnp.zeros(3)))
    assert found.gramian == "Ones takes it in its own way"
    assert found.leaves[0].way == "own"
    assert found.plain_steps is None


def test_a_way_that_stores_rows_and_one_of_columns():
    params = layers("a", "b")
    _, lazy = mtl.task_jacobian(dense, mode="vmap", batch_size=2)(params)
    found = mtl.explain(lazy)
    assert found.gramian == "all rows are stored (mode='vmap', swept 2 at a time)"
    assert found.leaves[0].bytes == 6 * 4 * WIDTH**2
    _, lazy = mtl.task_jacobian(dense, mode="map")(params)
    assert mtl.explain(lazy).leaves[0].bytes == 4 * WIDTH**2
