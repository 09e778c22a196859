"""Task gradients against `jax.jacrev`, on the kinds of models that people train."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax import _tree


def normal(shape, seed, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(values, jnp.result_type(float))


def flat(tree):
    """``[T, P]`` in float64."""
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], 1)


def assert_close(ours, wanted, tolerance):
    """Error relative to the largest entry."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    assert np.all(np.isfinite(ours))
    size = np.abs(wanted).max(initial=0)
    assert size > 0, "nothing to compare"
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def assert_trees_close(ours, wanted, tolerance):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert_close(a, b, tolerance)


def three(y):
    """Three losses of outputs ``[N, 3]``."""
    return (
        jnp.mean((y[:, 0] - 1) ** 2),
        jnp.mean(jnp.cos(y[:, 1])),
        jnp.mean(y[:, 2] * jnp.tanh(y[:, 0])),
    )


# ------------------------------------------------------------------------------- models

# Each builds (loss_fn, params, batch) in the default precision of the moment.
MODELS = {}


def model(build):
    MODELS[build.__name__] = build
    return build


def dense(seed=0, width=5):
    return {
        "w": normal((4, width), seed, 0.5),
        "b": normal((width,), seed + 1),
        "out": normal((width, 3), seed + 2),
    }


@model
def mlp():
    def loss_fn(p, x):
        return three(jnp.tanh(x @ p["w"] + p["b"]) @ p["out"])

    return loss_fn, dense(), normal((6, 4), 9)


@model
def conv():
    def loss_fn(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return three(jax.nn.silu(y + p["b"]).mean((1, 2)) @ p["out"])

    params = {
        "k": normal((3, 3, 2, 4), 1, 0.3),
        "b": normal((4,), 2),
        "out": normal((4, 3), 3),
    }
    return loss_fn, params, normal((3, 5, 5, 2), 9)


@model
def scanned_layers():
    def loss_fn(p, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) + h, None), x, p["layers"])
        return jnp.stack(three(h @ p["out"]))

    params = {"layers": normal((3, 4, 4), 1, 0.5), "out": normal((4, 3), 2)}
    return loss_fn, params, normal((5, 4), 9)


@model
def remat():
    def loss_fn(p, x):
        layer = jax.checkpoint(lambda x: jnp.sin(x @ p["w"] + p["b"]))
        return three(layer(x) @ p["out"])

    return loss_fn, dense(), normal((5, 4), 9)


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvp(
    lambda primals, tangents: (cubed(*primals), 3 * primals[0] ** 2 * tangents[0])
)


@model
def custom_jvp():
    def loss_fn(p, x):
        return three(cubed(x @ p["w"] + p["b"]) @ p["out"])

    return loss_fn, dense(), normal((5, 4), 9)


# The gradient of something else, so that forward mode can't be right by chance.
@jax.custom_vjp
def scaled_backward(x):
    return jnp.sin(x)


scaled_backward.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (-0.5 * g * x,))


@model
def custom_vjp():
    def loss_fn(p, x):
        return three(scaled_backward(x @ p["w"] + p["b"]) @ p["out"])

    return loss_fn, dense(), normal((5, 4), 9)


@model
def weights_used_twice():
    def loss_fn(p, x):
        h = jnp.tanh(x @ p["w"])
        y = jnp.tanh(h @ p["w"].T) @ p["out"]
        decay = jnp.sum(p["w"] ** 2)
        return {"a": three(y)[0] + decay, "b": three(y)[1], "c": decay}

    return (
        loss_fn,
        {"w": normal((4, 5), 1), "out": normal((4, 3), 2)},
        normal((6, 4), 9),
    )


@model
def embedding():
    def loss_fn(p, tokens):
        h = jnp.take(p["table"], tokens, axis=0).sum(1)
        return three(jnp.tanh(h) @ p["out"])

    params = {"table": normal((7, 4), 1), "out": normal((4, 3), 2)}
    return loss_fn, params, jnp.array([[0, 1, 1], [2, 6, 0], [3, 3, 3]])


@model
def layer_norm():
    def loss_fn(p, x):
        h = x @ p["w"]
        h = (h - h.mean(-1, keepdims=True)) * jax.lax.rsqrt(
            h.var(-1, keepdims=True) + 1e-3
        )
        return three(jax.nn.gelu(h * p["scale"] + p["b"]) @ p["out"])

    return loss_fn, dense() | {"scale": normal((5,), 5)}, normal((6, 4), 9)


@model
def batch_norm():
    def loss_fn(p, x):
        h = x @ p["w"]
        h = (h - h.mean(0)) * jax.lax.rsqrt(h.var(0) + 1e-3) * p["scale"] + p["b"]
        return three(jax.nn.relu(h) @ p["out"])

    return loss_fn, dense() | {"scale": normal((5,), 5)}, normal((6, 4), 9)


@model
def attention():
    def loss_fn(p, x):
        q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(5, 3, 2, 2), 1, 0)
        a = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", q, k))
        return three(jnp.einsum("hnm,mhd->nhd", a, v).reshape(5, 4) @ p["out"])

    return (
        loss_fn,
        {"qkv": normal((4, 12), 1), "out": normal((4, 3), 2)},
        normal((5, 4), 9),
    )


@model
def conditional():
    def loss_fn(p, x):
        h = x @ p["w"] + p["b"]
        h = jax.lax.cond(h.sum() > 0, jnp.sin, lambda h: h**2, h)
        h = jax.lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h + i), h)
        return three(h @ p["out"])

    return loss_fn, dense(), normal((5, 4), 9)


@model
def many_tasks():
    def loss_fn(p, x):
        y = jnp.tanh(x @ p["w"] + p["b"]) @ jnp.tile(p["out"], (1, 2))
        return jnp.mean((y - jnp.arange(6)) ** 2, 0)

    return loss_fn, dense(), normal((6, 4), 9)


@model
def a_bare_array_and_a_scalar():
    def loss_fn(p, x):
        return three(x @ p[0] * p[1])

    return loss_fn, (normal((4, 3), 1), jnp.asarray(0.7)), normal((6, 4), 9)


def as_vector(losses):
    return jnp.stack(jax.tree.leaves(losses)) if not hasattr(losses, "ndim") else losses


def check_against_jacrev(loss_fn, params, batch, tolerance):
    """Losses, rows, Gramian and combination of a model, compiled once."""

    @jax.jit
    def everything(params, batch):
        losses, lazy = mtl.task_jacobian(loss_fn)(params, batch)
        assert _tree.is_lazy(lazy)
        weights = jnp.cos(jnp.arange(losses.shape[0], dtype=losses.dtype))
        return (
            losses,
            mtl.materialize(lazy),
            mtl.gramian(lazy),
            mtl.gramian(mtl.task_jacobian(loss_fn, mode="map")(params, batch)[1]),
            mtl.weighted_sum(weights, lazy),
            weights,
            jax.jacrev(lambda p: as_vector(loss_fn(p, batch)))(params),
            as_vector(loss_fn(params, batch)),
        )

    losses, rows, gram, by_column, combined, weights, wanted, values = everything(
        params, batch
    )
    assert_close(losses, values, tolerance)
    assert_trees_close(rows, wanted, tolerance)
    J = flat(wanted)
    for found in (gram, by_column):
        assert found.dtype == jnp.result_type(float)
        assert_close(found, J @ J.T, tolerance)
        np.testing.assert_array_equal(found, found.T)
    assert jax.tree.map(jnp.shape, combined) == jax.tree.map(jnp.shape, params)
    combined = flat(jax.tree.map(lambda x: x[None], combined))[0]
    assert_close(combined, np.asarray(weights, np.float64) @ J, tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float32(name):
    check_against_jacrev(*MODELS[name](), 1e-5)


EXACT = ["mlp", "scanned_layers", "custom_vjp", "a_bare_array_and_a_scalar"]


@pytest.mark.parametrize(
    "name",
    [n if n in EXACT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_models_in_float64(name, x64):
    check_against_jacrev(*MODELS[name](), 1e-12)


def low_precision(kind):
    loss_fn, params, x = mlp()
    if kind == "bfloat16 parameters":
        return loss_fn, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x
    if kind == "float16 throughout":
        half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
        return loss_fn, half, x.astype(jnp.float16)
    if kind == "one bfloat16 leaf":
        return loss_fn, params | {"w": params["w"].astype(jnp.bfloat16)}, x

    def mixed(p, x):  # float32 parameters, bfloat16 arithmetic
        p = jax.tree.map(lambda q: q.astype(jnp.bfloat16), p)
        return loss_fn(p, x.astype(jnp.bfloat16))

    return mixed, params, x


@pytest.mark.parametrize(
    "kind",
    [
        "bfloat16 parameters",
        pytest.param("float16 throughout", marks=pytest.mark.slow),
        pytest.param("one bfloat16 leaf", marks=pytest.mark.slow),
        "bfloat16 arithmetic",
    ],
)
def test_low_precision_models(kind):
    loss_fn, params, x = low_precision(kind)

    @jax.jit
    def everything(params):
        losses, lazy = mtl.task_jacobian(loss_fn)(params, x)
        return losses, mtl.materialize(lazy), mtl.gramian(lazy)

    losses, rows, gram = everything(params)
    assert losses.dtype == gram.dtype == jnp.float32
    assert [r.dtype for r in jax.tree.leaves(rows)] == [
        p.dtype for p in jax.tree.leaves(params)
    ]
    J = flat(rows)
    # Layer by layer no row is formed, and so none is rounded as those here are.
    assert_close(gram, J @ J.T, 1e-2)
    wanted = flat(jax.jacrev(lambda p: jnp.stack(loss_fn(p, x)))(params))
    assert_close(J, wanted, 3e-2)


@pytest.mark.parametrize("mode", ["vmap", "unroll", "map", None])
def test_modes_agree_with_jacrev(mode):
    loss_fn, params, x = many_tasks()

    @jax.jit
    def everything(params):
        _, lazy = mtl.task_jacobian(loss_fn, mode=mode)(params, x)
        return mtl.materialize(lazy), mtl.gramian(lazy)

    rows, gram = everything(params)
    wanted = jax.jacrev(loss_fn)(params, x)
    assert_trees_close(rows, wanted, 1e-5)
    assert_close(gram, flat(wanted) @ flat(wanted).T, 1e-5)


def test_modes_compile_to_what_they_say():
    def loops(mode, loss_fn):
        def gram(p):
            return mtl.gramian(mtl.task_jacobian(loss_fn, mode=mode)(p, x)[1])

        jaxpr = str(jax.make_jaxpr(gram)(params))
        return jaxpr.count(" scan["), jaxpr.count("cos")

    loss_fn, params, x = many_tasks()
    sine = lambda p, x: jnp.sin(loss_fn(p, x))  # noqa: E731
    assert loops("map", sine)[0] == 1
    assert loops("vmap", sine)[0] == 0
    assert loops("unroll", sine)[0] == 0
    assert loops(None, sine)[0] == 0  # layer by layer, in one sweep


# ---------------------------------------------------------------- the forms of the call


def two_losses(w, x):
    return jnp.sum((w * x) ** 2), jnp.sum(w - x)


W, X = jnp.array([1.0, -2.0, 3.0]), jnp.array([0.5, 2.0, 1.0])
ROWS = np.stack([2 * W * X**2, jnp.ones(3)])
Named = collections.namedtuple("Named", ["b", "a"])

FORMS = {
    "tuple": tuple,
    "list": list,
    "array": jnp.stack,
    "dict": lambda t: {"a": t[0], "b": t[1]},
    "OrderedDict": lambda t: collections.OrderedDict(z=t[0], a=t[1]),
    "namedtuple": lambda t: Named(*t),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_aux", [False, True])
def test_forms_of_the_losses(form, has_aux):
    aux = {"y": jnp.ones(2)}

    def loss_fn(w, x):
        losses = FORMS[form](two_losses(w, x))
        return (losses, aux) if has_aux else losses

    value, task_grads = mtl.value_and_task_grads(loss_fn, has_aux=has_aux)(W, X)
    if has_aux:
        value, back = value
        np.testing.assert_array_equal(back["y"], aux["y"])
    assert isinstance(value, jax.Array)
    np.testing.assert_allclose(value, jnp.stack(two_losses(W, X)))
    np.testing.assert_allclose(task_grads, ROWS)


def test_a_dict_is_sorted_and_an_ordered_dict_is_not():
    def losses(w):
        return {"t2": 2 * w, "t10": 10 * w}

    value, task_grads = mtl.task_jacobian(losses)(jnp.float32(3.0))
    assert value.tolist() == [30, 6]
    assert task_grads.operator.task_names == ("t10", "t2")
    ordered = lambda w: collections.OrderedDict(losses(w))  # noqa: E731
    value, task_grads = mtl.task_jacobian(ordered)(jnp.float32(3.0))
    assert value.tolist() == [6, 30]
    assert task_grads.operator.task_names == ("t2", "t10")


def test_one_task_alone():
    for loss_fn in (lambda w: [jnp.sum(w**2)], lambda w: jnp.sum(w**2)[None]):
        value, task_grads = mtl.value_and_task_grads(loss_fn)(W)
        assert value.shape == (1,)
        np.testing.assert_allclose(task_grads, 2 * W[None])


@pytest.mark.parametrize(
    "argnums", [0, 1, -1, -2, (0,), (0, 1), (1, 0), (-1, 0), [0, 1]]
)
def test_argnums(argnums):
    value, found = mtl.value_and_task_grads(two_losses, argnums=argnums)(W, X)
    np.testing.assert_allclose(value, jnp.stack(two_losses(W, X)))
    where = argnums if isinstance(argnums, int) else tuple(a % 2 for a in argnums)
    where = where % 2 if isinstance(where, int) else where
    wanted = jax.jacrev(lambda w, x: jnp.stack(two_losses(w, x)), where)(W, X)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_keyword_arguments_reach_the_loss():
    def loss_fn(w, *, x, sign="plus"):
        a, b = two_losses(w, x)
        return a, b if sign == "plus" else -b

    _, rows = mtl.value_and_task_grads(loss_fn)(W, x=X, sign="minus")
    np.testing.assert_allclose(rows, ROWS * [[1], [-1]])


def test_parameters_may_be_any_tree():
    def loss_fn(p):
        return jnp.sum(p["a"][0] ** 2) * p["s"], jnp.sum(p["a"][1]) + p["s"]

    params = {"a": [jnp.ones(2), np.ones(3, np.float32)], "s": 0.5, "none": None}
    _, rows = mtl.value_and_task_grads(loss_fn)(params)
    np.testing.assert_array_equal(rows["a"][0], [[1, 1], [0, 0]])
    np.testing.assert_array_equal(rows["a"][1], [[0, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(rows["s"], [2, 1])


# --------------------------------------------------------------------- one batch a task


def regression(w, x, y):
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def regression_problem(tasks=3):
    return normal((4,), 1), normal((tasks, 6, 4), 2), normal((tasks, 6), 3)


def rows_one_by_one(w, xs, ys):
    found = [
        jax.value_and_grad(regression)(w, x, y) for x, y in zip(xs, ys, strict=True)
    ]
    return np.stack([v for v, _ in found]), np.stack([g for _, g in found])


def test_one_batch_a_task():
    w, xs, ys = regression_problem()
    losses, rows = rows_one_by_one(w, xs, ys)
    forms = {
        "args": (regression, (None, 0, 0), (xs, ys)),
        "one batch": (lambda w, b: regression(w, *b), (None, 0), ((xs, ys),)),
        "axis 1": (regression, (None, 1, 1), (xs.swapaxes(0, 1), ys.T)),
        "axis -1": (regression, [None, -1, -1], (jnp.moveaxis(xs, 0, -1), ys.T)),
        "numpy": (regression, (None, 0, 0), (np.asarray(xs), np.asarray(ys))),
    }
    for name, (loss_fn, in_axes, args) in forms.items():
        value, found = mtl.value_and_task_grads(loss_fn, in_axes=in_axes)(w, *args)
        np.testing.assert_allclose(value, losses, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(found, rows, rtol=1e-4, atol=1e-6, err_msg=name)


def test_in_axes_go_into_containers():
    w, xs, ys = regression_problem()
    _, rows = rows_one_by_one(w, xs, jnp.stack([ys[0]] * 3))
    _, lazy = mtl.task_jacobian(
        lambda w, b: regression(w, b["x"], b["y"]), in_axes=(None, {"x": 0, "y": None})
    )(w, {"x": xs, "y": ys[0]})
    assert_close(mtl.materialize(lazy), rows, 1e-5)
    assert_close(mtl.gramian(lazy), rows @ rows.T, 1e-5)


@pytest.mark.parametrize("mode", ["vmap", "unroll", "map", None])
def test_modes_with_one_batch_a_task(mode):
    w, xs, ys = regression_problem()
    _, rows = rows_one_by_one(w, xs, ys)

    @jax.jit
    def everything(w):
        _, lazy = mtl.task_jacobian(regression, in_axes=(None, 0, 0), mode=mode)(
            w, xs, ys
        )
        weights = jnp.array([1.0, -2.0, 0.5])
        isolated = mtl.materialize(lazy, isolated=True)
        return isolated, mtl.gramian(lazy), mtl.weighted_sum(weights, lazy)

    found, gram, combined = everything(w)
    assert_close(found, rows, 1e-5)
    assert_close(gram, rows.astype(float) @ rows.T.astype(float), 1e-5)
    assert_close(combined, np.array([1.0, -2.0, 0.5]) @ rows, 1e-5)


def test_aux_keywords_and_random_keys_with_one_batch_a_task():
    keys = jax.random.split(jax.random.key(0), 3)

    def loss_fn(w, key, *, scale):
        noise = jax.random.normal(key, w.shape)
        return scale * jnp.sum(w * noise), {"noise": noise}

    (losses, aux), rows = mtl.value_and_task_grads(
        loss_fn, in_axes=(None, 0), has_aux=True
    )(W, keys, scale=2.0)
    noise = jnp.stack([jax.random.normal(k, W.shape) for k in keys])
    np.testing.assert_allclose(aux["noise"], noise, rtol=1e-6)
    np.testing.assert_allclose(rows, 2 * noise, rtol=1e-6)
    np.testing.assert_allclose(losses, 2 * noise @ W, rtol=1e-5)


def test_argnums_with_one_batch_a_task():
    w, xs, ys = regression_problem()
    _, rows = rows_one_by_one(w, xs, ys)
    _, found = mtl.value_and_task_grads(
        lambda x, w, y: regression(w, x, y), argnums=1, in_axes=(0, None, 0)
    )(xs, w, ys)
    assert_close(found, rows, 1e-5)


def flops(fn, *args):
    cost = jax.jit(fn).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@functools.cache
def wide():
    params = {"w1": normal((64, 128), 1), "w2": normal((128, 128), 2)}
    heads = {"a": normal((128, 4), 3), "b": normal((128, 4), 4)}

    def loss_fn(p, x):
        h = jnp.tanh(jnp.tanh(x @ p["w1"]) @ p["w2"])
        return {"a": jnp.mean((h @ p["a"]) ** 2), "b": jnp.mean(h @ p["b"])}

    return loss_fn, params | heads, normal((32, 64), 5)


def test_a_loss_only_method_costs_one_backward_pass():
    loss_fn, params, x = wide()
    mask = {"w1": True, "w2": True, "a": False, "b": False}

    def plain(params):
        return jax.grad(lambda p: sum(loss_fn(p, x).values()))(params)

    def step(tx):
        def run(params):
            _, lazy = mtl.task_jacobian(loss_fn)(params, x)
            return tx.update(lazy, tx.init(params), params)[0]

        return run

    one = flops(plain, params)
    assert flops(step(mtl.mean(2)), params) <= 1.02 * one
    assert flops(step(mtl.sum_tasks()), params) <= 1.02 * one
    assert flops(step(mtl.shared_only(mtl.mean(2), mask)), params) <= 1.02 * one
    # The test can fail: materialising costs another backward pass.
    stacked = flops(
        lambda p: mtl.weighted_sum(
            jnp.ones(2), mtl.value_and_task_grads(loss_fn, mode="unroll")(p, x)[1]
        ),
        params,
    )
    assert stacked > 1.3 * one


def test_one_batch_a_task_costs_what_all_batches_together_cost():
    w = normal((64, 64), 1)
    xs = normal((4, 16, 64), 2)
    loss_fn = lambda w, x: jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w))  # noqa: E731

    def plain(w):
        return jax.grad(lambda w: jax.vmap(loss_fn, (None, 0))(w, xs).sum())(w)

    def combined(w):
        _, lazy = mtl.task_jacobian(loss_fn, in_axes=(None, 0))(w, xs)
        return mtl.weighted_sum(jnp.ones(4), lazy)

    assert flops(combined, w) <= 1.02 * flops(plain, w)


# ---------------------------------------------------------------- under transformations


def test_under_vmap_over_seeds():
    loss_fn, params, x = mlp()
    seeds = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p, -p]), params)

    def gram_and_sum(params):
        _, lazy = mtl.task_jacobian(loss_fn)(params, x)
        return mtl.gramian(lazy), mtl.weighted_sum(jnp.array([1.0, 2.0, -1.0]), lazy)

    grams, sums = jax.jit(jax.vmap(gram_and_sum))(seeds)
    for i in range(3):
        one = jax.tree.map(lambda p, i=i: p[i], seeds)
        J = flat(jax.jacrev(lambda p: jnp.stack(loss_fn(p, x)))(one))
        assert_close(grams[i], J @ J.T, 1e-5)
        ours = flat(jax.tree.map(lambda s, i=i: s[i][None], sums))[0]
        assert_close(ours, np.array([1.0, 2.0, -1.0]) @ J, 1e-5)


@pytest.mark.parametrize("in_axes", [None, (None, 0, 0)])
def test_closed_over_in_cond_and_scan(in_axes):
    w, xs, ys = regression_problem()
    _, rows = rows_one_by_one(w, xs, ys)
    loss_fn = regression
    if in_axes is None:

        def loss_fn(w, xs, ys):
            return [regression(w, x, y) for x, y in zip(xs, ys, strict=True)]

    @jax.jit
    def everything(w, pred):
        _, lazy = mtl.task_jacobian(loss_fn, in_axes=in_axes)(w, xs, ys)
        gram = jax.lax.cond(
            pred, lambda: mtl.gramian(lazy), lambda: jnp.zeros((3, 3), w.dtype)
        )

        def step(total, weights):
            return total + mtl.weighted_sum(weights, lazy), mtl.gramian(lazy)

        total, grams = jax.lax.scan(step, jnp.zeros_like(w), jnp.eye(3))
        looped = jax.lax.fori_loop(
            0, 2, lambda i, t: t + mtl.materialize(lazy), jnp.zeros((3, 4))
        )
        return gram, total, grams, looped

    wanted = rows.astype(float) @ rows.T.astype(float)
    gram, total, grams, looped = everything(w, True)
    assert_close(gram, wanted, 1e-5)
    assert_close(total, rows.sum(0), 1e-5)
    assert_close(grams, np.stack([wanted] * 3), 1e-5)
    assert_close(looped, 2 * rows, 1e-5)
    assert not np.any(everything(w, False)[0])


def test_made_inside_scan():
    loss_fn, params, x = mlp()

    def step(params, _):
        _, lazy = mtl.task_jacobian(loss_fn)(params, x)
        updates = mtl.weighted_sum(jnp.ones(3) / 3, lazy)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), mtl.gramian(
            lazy
        )

    after, grams = jax.jit(lambda p: jax.lax.scan(step, p, None, length=3))(params)
    wanted = params
    for gram in grams:
        rows = jax.jacrev(lambda p: jnp.stack(loss_fn(p, x)))(wanted)
        assert_close(gram, flat(rows) @ flat(rows).T, 1e-5)
        wanted = jax.tree.map(lambda p, r: p - 0.1 * r.mean(0), wanted, rows)
    assert_trees_close(after, wanted, 1e-5)


def test_the_whole_step_differentiates():
    # Hyper-gradients: the Gramian and the combination are differentiable themselves.
    def hyper(s):
        _, lazy = mtl.task_jacobian(lambda w: (s * jnp.sum(w**2), jnp.sum(w)))(W)
        return mtl.gramian(lazy)[0, 0]

    # |2 s w|^2 = 4 s^2 |w|^2
    np.testing.assert_allclose(jax.grad(hyper)(3.0), 8 * 3 * (W @ W), rtol=1e-5)


@pytest.mark.parametrize("scale", [3e5, 1e-9])
def test_float16_weights_far_from_one(scale):
    # A cotangent of this size is not a float16 number, but the product is.
    params = {"w": jnp.array([1.0, 2.0], jnp.float16)}
    loss_scale = jnp.float16(1e-4 if scale > 1 else 1e3)

    def loss_fn(p):
        y = p["w"] * loss_scale
        return jnp.sum(y), jnp.sum(y * jnp.array([1, -1], jnp.float16))

    _, lazy = mtl.task_jacobian(loss_fn)(params)
    weights = jnp.array([1.0, 0.5], jnp.float32) * scale
    out = mtl.weighted_sum(weights, lazy)["w"]
    assert out.dtype == jnp.float16
    wanted = scale * float(loss_scale) * np.array([1.5, 0.5])
    assert_close(out, wanted, 5e-2 if scale < 1 else 2e-3)


def test_zero_and_nan_weights():
    _, lazy = mtl.task_jacobian(two_losses)(W, X)
    np.testing.assert_array_equal(mtl.weighted_sum(jnp.zeros(2), lazy), jnp.zeros(3))
    assert np.all(np.isnan(mtl.weighted_sum(jnp.array([jnp.nan, 0.0]), lazy)))


# -------------------------------------------------------------------------- Flax models


def test_an_nnx_model_with_batch_statistics():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(4, 5, rngs=rngs)
            self.norm = nnx.BatchNorm(5, rngs=rngs)
            self.out = nnx.Linear(5, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.norm(self.dense(x))))

    graph, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)
    x = normal((6, 4), 9)

    def loss_fn(params, x):
        net = nnx.merge(graph, params, rest, copy=True)
        losses = three(net(x))
        return losses, nnx.state(net, nnx.BatchStat)

    @jax.jit
    def everything(params):
        (losses, stats), lazy = mtl.task_jacobian(loss_fn, has_aux=True)(params, x)
        rows = mtl.materialize(lazy)
        wanted, _ = jax.jacrev(
            lambda p: (jnp.stack(loss_fn(p, x)[0]), None), has_aux=True
        )(params)
        return losses, stats, mtl.gramian(lazy), rows, wanted

    losses, stats, gram, rows, wanted = everything(params)
    assert losses.shape == (3,)
    assert jax.tree.structure(rows) == jax.tree.structure(params)
    # The bias before a batch norm has no effect, so leaf by leaf there is a zero.
    assert_close(flat(rows), flat(wanted), 1e-5)
    assert_close(gram, flat(wanted) @ flat(wanted).T, 1e-5)
    assert np.any(np.asarray(jax.tree.leaves(stats)[0]) != 0)


def test_a_linen_model():
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(5)(x))))

    x = normal((6, 4), 9)
    variables = Model().init(jax.random.key(0), x)

    def loss_fn(params, x):
        return three(Model().apply(params, x))

    check_against_jacrev(loss_fn, variables, x, 1e-5)


# -------------------------------------------------------------------------- shared_mask


def heads(h, p):
    return {"a": jnp.mean((h @ p["a"] - 1) ** 2), "b": jnp.mean(jnp.sin(h @ p["b"]))}


def parts(seed=0, width=5):
    return {
        "trunk": {"w": normal((4, width), seed, 0.5), "b": normal((width,), seed + 1)},
        "a": normal((width, 2), seed + 2),
        "b": normal((width, 2), seed + 3),
    }


USUAL = {"trunk": {"w": True, "b": True}, "a": False, "b": False}


def features(p, x):
    return jnp.tanh(x @ p["trunk"]["w"] + p["trunk"]["b"])


def shared_plain():
    return lambda p, x: heads(features(p, x), p), parts(), USUAL, {}


def shared_scan():
    def loss_fn(p, x):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
        return heads(h, p)

    params = {"layers": normal((3, 4, 4), 1), "a": normal((4, 2), 2)}
    params["b"] = normal((4, 2), 3)
    return loss_fn, params, {"layers": True, "a": False, "b": False}, {}


def shared_remat():
    def loss_fn(p, x):
        return jax.checkpoint(lambda p, x: heads(features(p, x), p))(p, x)

    return loss_fn, parts(), USUAL, {}


def shared_custom_vjp():
    def loss_fn(p, x):
        return heads(scaled_backward(x @ p["trunk"]["w"] + p["trunk"]["b"]), p)

    return loss_fn, parts(), USUAL, {}


def shared_stop_gradient():
    def loss_fn(p, x):
        h = features(p, x)
        return {"a": heads(h, p)["a"], "b": heads(jax.lax.stop_gradient(h), p)["b"]}

    # Task b does not reach the trunk, so it belongs to a alone.
    return loss_fn, parts() | {"both": jnp.ones(1)}, None, {}


def shared_dead_relu():
    params = parts()
    params["trunk"] = jax.tree.map(jnp.zeros_like, params["trunk"])

    def loss_fn(p, x):
        return heads(jax.nn.relu(x @ p["trunk"]["w"] + p["trunk"]["b"]), p)

    return loss_fn, params, USUAL, {}


def shared_zero_heads():
    params = parts()
    params |= {"a": jnp.zeros_like(params["a"]), "b": jnp.zeros_like(params["b"])}
    return lambda p, x: heads(features(p, x), p), params, USUAL, {}


def shared_stacked_losses():
    # Once stacked, the losses' dependence can't be read off the program any more.
    def loss_fn(p, x):
        losses = heads(features(p, x), p)
        return jnp.stack([losses["a"], losses["b"]])

    return loss_fn, parts(), USUAL, {}


def shared_has_aux():
    def loss_fn(p, x):
        h = features(p, x)
        return heads(h, p), {"features": h}

    return loss_fn, parts(), USUAL, {"has_aux": True}


def shared_three_tasks_two_groups():
    def loss_fn(p, x):
        low = features(p, x)
        high = jnp.tanh(low @ p["ab_only"])
        return heads(high, p) | {"c": jnp.mean(low @ p["c"])}

    params = parts() | {"ab_only": normal((5, 5), 7), "c": normal((5, 1), 8)}
    return loss_fn, params, USUAL | {"ab_only": True, "c": False}, {}


def shared_decay_inside():
    def loss_fn(p, x):
        decay = sum(jnp.sum(q**2) for q in jax.tree.leaves(p))
        return {k: v + 1e-3 * decay for k, v in heads(features(p, x), p).items()}

    return loss_fn, parts(), jax.tree.map(lambda _: True, USUAL), {}


SHARED = {
    name: build
    for name, build in list(globals().items())
    if name.startswith("shared_") and callable(build)
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_mask(name):
    loss_fn, params, wanted, options = SHARED[name]()
    if name == "shared_stop_gradient":
        inner = loss_fn

        def loss_fn(p, x):
            return {k: v * p["both"][0] for k, v in inner(p, x).items()}

        wanted = {
            "trunk": {"w": False, "b": False},
            "a": False,
            "b": False,
            "both": True,
        }
    found = mtl.shared_mask(loss_fn, params, normal((3, 4), 9), **options)
    assert found == wanted
    assert all(type(m) is bool for m in jax.tree.leaves(found))


def test_shared_mask_with_one_batch_a_task():
    def loss_fn(p, batch):
        x, task = batch
        h = features(p, x)
        return jnp.sum(heads(h, p)["a"] * (task == 0) + heads(h, p)["b"] * (task == 1))

    batch = (normal((2, 3, 4), 9), jnp.arange(2))
    found = mtl.shared_mask(loss_fn, parts(), batch, in_axes=(None, 0))
    assert found == USUAL


def test_shared_mask_survives_nan_in_one_task():
    def loss_fn(p, x):
        losses = heads(features(p, x), p)
        return losses | {"b": losses["b"] + jnp.log(-jnp.sum(p["b"] ** 2))}

    assert mtl.shared_mask(loss_fn, parts(), normal((3, 4), 9)) == USUAL


def test_shared_mask_takes_static_keyword_arguments():
    def loss_fn(p, x, train):
        h = features(p, x)
        return heads(h if train else 2 * h, p)

    assert mtl.shared_mask(loss_fn, parts(), normal((3, 4), 9), train=True) == USUAL


def test_shared_mask_refuses_a_traced_call_and_a_zero_jacobian():
    loss_fn, params, *_ = shared_plain()
    x = normal((3, 4), 9)
    with pytest.raises(TypeError, match=r"concrete arrays.*outside"):
        jax.jit(lambda p: mtl.shared_mask(loss_fn, p, x))(params)
    with pytest.raises(ValueError, match="Jacobian is zero everywhere"):
        mtl.shared_mask(
            lambda p, x: jax.tree.map(jax.lax.stop_gradient, loss_fn(p, x)), params, x
        )


def test_shared_mask_of_an_nnx_model():
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(4, 5, rngs=rngs)
            self.a = nnx.Linear(5, 2, rngs=rngs)
            zero = nnx.initializers.zeros_init()
            self.b = nnx.Linear(5, 2, kernel_init=zero, rngs=rngs)

    graph, params = nnx.split(Model(nnx.Rngs(0)))

    def loss_fn(params, x):
        net = nnx.merge(graph, params, copy=True)
        h = nnx.relu(net.trunk(x))
        return {"a": jnp.mean(net.a(h) ** 2), "b": jnp.mean((net.b(h) - 1) ** 2)}

    found = mtl.shared_mask(loss_fn, params, normal((3, 4), 9))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    named = {
        jax.tree_util.keystr(path): mark
        for path, mark in jax.tree_util.tree_leaves_with_path(found)
    }
    assert {name: "trunk" in name for name in named} == named


# ------------------------------------------------------------------------------- errors


def refused(loss_fn, *args, words, error=ValueError, **options):
    with pytest.raises(error, match=words):
        mtl.task_jacobian(loss_fn, **options)(*args)


def test_a_single_scalar_is_refused():
    words = r"one scalar, so there is nothing to balance.*in_axes=\(None, 0\)"
    refused(lambda w: jnp.sum(w**2), W, words=words)


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        (lambda w: w[None] * w[:, None], r"array of shape \(3, 3\)"),
        (lambda w: w[:0], r"array of shape \(0,\)"),
        (lambda w: {"a": w.sum(), "b": w}, r"task 'b' must be a scalar.*\(3,\).*mean"),
        (lambda w: {"a": w.sum(), "b": w[:1]}, r"task 'b' must be a scalar.*\(1,\)"),
        (lambda w: (w.sum(), w), r"task '1' must be a scalar.*\(3,\)"),
        (lambda w: {"a": {"x": w.sum()}, "b": w.sum()}, r"task 'a' must be a scalar"),
        (lambda w: {"a": w.sum(), "b": None}, r"task 'b' must be a scalar"),
        (lambda w: {}, r"tuple, list or dict of scalars, got dict"),
        (lambda w: None, r"tuple, list or dict of scalars, got NoneType"),
        (lambda w: 1.5, r"tuple, list or dict of scalars, got float"),
    ],
)
def test_losses_that_are_not_scalars_are_refused(losses, words):
    refused(losses, W, words=words)


def test_losses_of_integers_are_refused():
    words = "the losses must be real floating-point numbers, got dtype int32"
    refused(lambda w: jnp.arange(2), W, words=words, error=TypeError)
    words = "the loss 'b' must be real floating-point numbers, got dtype complex64"
    loss_fn = lambda w: {"a": w.sum(), "b": w.sum() * 1j}  # noqa: E731
    refused(loss_fn, W, words=words, error=TypeError)


def test_integer_parameters_are_refused_by_path():
    params = {"net": {"w": W, "steps": jnp.zeros((), jnp.int32)}}
    loss_fn = lambda p: (p["net"]["w"].sum(), p["net"]["w"].sum())  # noqa: E731
    words = r"\['net'\]\['steps'\] has dtype int32.*another argument"
    refused(loss_fn, params, words=words, error=TypeError)
    params["net"]["steps"] = "three"
    words = r"\['net'\]\['steps'\] is a str"
    refused(loss_fn, params, words=words, error=TypeError)
    params["net"]["steps"] = jax.random.key(0)
    refused(loss_fn, params, words=r"\['steps'\] has dtype key", error=TypeError)
    refused(loss_fn, {}, words="no leaves")


def test_a_jacobian_that_is_zero_by_construction_is_refused():
    outside = jnp.ones(3)
    words = "Jacobian is zero everywhere.*outside"
    refused(lambda w: two_losses(outside, X), W, words=words)
    refused(jax.jit(lambda w: two_losses(outside, X)), W, words=words)
    inner = jax.jit(lambda w, x: two_losses(x, x))
    refused(lambda w: inner(w, X), W, words=words)
    refused(jax.checkpoint(lambda w: two_losses(outside, X)), W, words=words)
    refused(lambda w, b: jnp.sum(b), W, X, words=words, in_axes=(None, 0))
    refused(two_losses, W, X, jnp.ones(1), words="TypeError|takes 2", error=TypeError)
    with pytest.raises(ValueError, match=words):
        jax.jit(mtl.task_jacobian(lambda w: two_losses(outside, X)))(W)
    # One task that depends is enough.
    loss_fn = lambda w: (w.sum(), outside.sum())  # noqa: E731
    _, rows = mtl.value_and_task_grads(loss_fn)(W)
    np.testing.assert_array_equal(rows, [[1, 1, 1], [0, 0, 0]])


@pytest.mark.parametrize("argnums", [2, -3, (0, 5)])
def test_argnums_out_of_range(argnums):
    words = r"argnums=.*called with 2 positional arguments"
    refused(two_losses, W, X, words=words, argnums=argnums)


def test_parameters_given_by_keyword_are_refused():
    with pytest.raises(ValueError, match="called with 0 positional arguments"):
        mtl.task_jacobian(two_losses)(w=W, x=X)


@pytest.mark.parametrize(
    ("in_axes", "words"),
    [
        ((None,), "in_axes has 1 entries for 2 positional arguments"),
        ((None, 0, 0), "in_axes has 3 entries for 2 positional arguments"),
        ((0, 0), r"in_axes\[0\] must be None.*parameters"),
        ((None, None), r"in_axes maps no argument over tasks.*\(None, 0\)"),
    ],
)
def test_wrong_in_axes(in_axes, words):
    loss_fn = lambda w, b: jnp.sum(w * b)  # noqa: E731
    refused(loss_fn, W, jnp.ones((2, 3)), words=words, in_axes=in_axes)


def test_with_in_axes_the_loss_is_one_scalar():
    words = "one task and must return one scalar, got shape"
    batch = jnp.ones((2, 3))
    refused(lambda w, b: w * b, W, batch, words=words, in_axes=(None, 0))
    refused(two_losses, W, batch, words=words, in_axes=(None, 0))


@pytest.mark.parametrize("jit", [True, False])
def test_an_aux_of_anything(jit):
    key = jax.random.key(3)
    large = np.array([1e300, -1.0])
    words = {"name": "digits", "count": 3, "none": None, "flag": True, "numpy": large}
    found = {}

    def loss_fn(w, x):
        y = jnp.tanh(x @ w)
        numbers = {"y": y, "norm": jnp.sum(w**2), "key": key, "constant": jnp.ones(2)}
        return [jnp.sum(y**2), jnp.sum(y)], {"words": words, "numbers": numbers}

    def everything(w, x):
        (losses, aux), lazy = mtl.task_jacobian(loss_fn, has_aux=True)(w, x)
        found["words"] = aux["words"]
        assert {leaf.way for leaf in mtl.explain(lazy).leaves} <= {"kernel", "rows"}
        assert aux["numbers"]["constant"].at[0].set(2.0).dtype == jnp.float32
        return losses, aux["numbers"], mtl.gramian(lazy)

    everything = jax.jit(everything) if jit else everything
    losses, numbers, gram = everything(W, X)
    wanted, aux = loss_fn(W, X)
    assert found["words"].pop("numpy") is large
    assert found["words"] == {k: v for k, v in words.items() if k != "numpy"}
    np.testing.assert_allclose(losses, wanted, 1e-6)
    for name in ("y", "constant", "norm"):
        np.testing.assert_allclose(numbers[name], aux["numbers"][name], 1e-6)
    assert numbers["key"] == key
    rows = jax.jacrev(lambda w: jnp.stack(loss_fn(w, X)[0]))(W).reshape(2, -1)
    np.testing.assert_allclose(gram, rows @ rows.T, 1e-5)


def test_a_missing_aux_is_refused():
    words = r"has_aux=True.*\(losses, aux\)"
    refused(lambda w: [w.sum()] * 3, W, words=words, has_aux=True, error=TypeError)


@pytest.mark.parametrize("fn", [mtl.task_jacobian, mtl.value_and_task_grads])
def test_a_wrong_mode_is_refused_at_once(fn):
    with pytest.raises(ValueError, match=r"mode must be one of .*'vmap'.*'fast'"):
        fn(two_losses, mode="fast")


@pytest.mark.parametrize("argnums", ["0", 1.0, True, (), (0, "1"), None])
def test_argnums_that_are_no_numbers(argnums):
    with pytest.raises(TypeError, match="number of a positional argument"):
        mtl.task_jacobian(two_losses, argnums=argnums)


def test_what_is_no_function_is_refused_at_once():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        mtl.task_jacobian({"a": jnp.ones(())})


def test_a_python_loop_takes_no_batch_size():
    with pytest.raises(ValueError, match="takes no batch_size"):
        mtl.task_jacobian(two_losses, mode="unroll", batch_size=1)
    traced = jax.make_jaxpr(lambda w: mtl.materialize(lazy_rows(w)))(W)
    assert "scan" in str(traced)
    assert "scan" not in str(jax.make_jaxpr(mtl.value_and_task_grads(two_losses))(W, X))


def lazy_rows(w):
    return mtl.task_jacobian(two_losses, batch_size=1)(w, X)[1]
