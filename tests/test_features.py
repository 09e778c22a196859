"""`feature_jacobian`: exact gradients, a Gramian at the shared features."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl

FORMS = ("tuple", "dict", "array")


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def flat(tree, rows):
    leaves = [np.float64(x).reshape(rows, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def assert_close(ours, wanted, tolerance=1e-5):
    ours, wanted = np.float64(ours), np.float64(wanted)
    size = max(np.abs(wanted).max(initial=0), 1e-30)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def assert_trees_close(ours, wanted, tolerance=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, tolerance)


# A small network: features are a tree of two arrays, and `scale` is used twice.


def net(tasks, form, dtype=jnp.float32):
    """Its parameters, encoder and heads."""
    params = {
        "heads": normal((tasks, 4), 1).astype(dtype),
        "scale": jnp.asarray(1.3, dtype),
        "trunk": {"b": normal((4,), 2).astype(dtype), "w": normal((3, 4), 3) / 2},
    }

    def encoder(params, x):
        h = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
        return {"h": h, "mean": params["scale"] * jnp.mean(h, 0)}

    def heads(params, z, x):
        out = z["h"] @ params["heads"].T + z["mean"] @ params["heads"].T
        out = jnp.mean((params["scale"] * out - x[:, :1]) ** 2, 0)
        losses = jnp.log1p(out)
        if form == "array":
            return losses
        if form == "tuple":
            return tuple(losses)
        return {f"task {t:02}": losses[t] for t in range(tasks)}

    return params, encoder, heads


X = normal((5, 3), 4)


def whole(encoder, heads):
    return lambda params, *args: heads(params, encoder(params, *args), *args)


def vector(losses):
    return losses if hasattr(losses, "ndim") else jnp.stack(jax.tree.leaves(losses))


def feature_rows(params, encoder, heads, x=X):
    """``[T, features]`` in float64, by reverse mode through all losses."""

    @laws.quick_jit
    def rows_of(params):
        z = encoder(params, x)
        return jax.jacrev(lambda z: vector(heads(params, z, x)))(z)

    rows = rows_of(params)
    return flat(rows, jax.tree.leaves(rows)[0].shape[0])


@pytest.mark.parametrize("tasks", [2, 6])
@pytest.mark.parametrize("form", FORMS)
def test_the_gramian_is_that_of_the_features(form, tasks):
    params, encoder, heads = net(tasks, form)
    rows = feature_rows(params, encoder, heads)
    basis = normal((3, tasks), 5)
    mask = np.arange(tasks) != 1

    @laws.quick_jit
    def grams(params, x):
        losses, grads = mtl.feature_jacobian(encoder, heads)(params, x)
        one = {"heads": False, "scale": False, "trunk": {"b": True, "w": True}}
        return (
            losses,
            mtl.gramian(grads),
            mtl.gramian(grads, basis=basis),
            mtl.gramian(grads, task_mask=jnp.asarray(mask)),
            mtl.gramian(grads, labels=one),
        )

    losses, gram, mixed, masked, labelled = grams(params, X)
    assert_close(losses, vector(whole(encoder, heads)(params, X)))
    assert_close(gram, rows @ rows.T)
    mix = np.float64(basis) @ rows
    assert_close(mixed, mix @ mix.T)
    there = rows * mask[:, None]
    assert_close(masked, there @ there.T)
    for part in labelled.values():  # whichever leaves are asked about
        assert_close(part, gram, 1e-6)


@pytest.mark.parametrize("tasks", [2, 6])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_exact(form, tasks):
    params, encoder, heads = net(tasks, form)
    weights = normal((tasks,), 6)

    @laws.quick_jit
    def found(params, x):
        losses, grads = mtl.feature_jacobian(encoder, heads)(params, x)
        return (
            losses,
            mtl.weighted_sum(weights, grads),
            mtl.materialize(grads),
            mtl.materialize(grads, isolated=True),
        )

    losses, combined, rows, isolated = found(params, X)
    wanted, exact = laws.quick_jit(mtl.value_and_task_grads(whole(encoder, heads)))(
        params, X
    )
    by_jax = jax.jit(jax.jacrev(lambda p: vector(whole(encoder, heads)(p, X))))(params)
    assert_close(losses, wanted)
    assert_trees_close(rows, by_jax)
    assert_trees_close(rows, exact)
    assert_trees_close(isolated, by_jax)
    sums = jax.tree.map(
        lambda g: jnp.asarray(np.tensordot(np.float64(weights), g, 1), g.dtype), by_jax
    )
    assert_trees_close(combined, sums)


@pytest.mark.parametrize("samples", [1, 3])
def test_an_encoder_that_keeps_angles_gives_the_exact_gramian(samples):
    """Orthonormal inputs through ``z = x W Q``: dz/dW has orthonormal rows."""
    inputs = jnp.linalg.qr(normal((5, samples), 7))[0].T
    turn = jnp.linalg.qr(normal((4, 4), 8))[0]
    params = {"w": normal((5, 4), 9), "heads": normal((4, 3), 10)}

    def encoder(params, x):
        return x @ params["w"] @ turn

    def heads(params, z, x):
        return jnp.mean((z @ params["heads"]) ** 2, 0)

    def both(params, x):
        only = {"w": params["w"]}

        def split(function):
            return lambda w, *args: function(params | w, *args)

        _, cheap = mtl.feature_jacobian(split(encoder), split(heads))(only, x)
        _, dear = mtl.task_jacobian(split(whole(encoder, heads)))(only, x)
        return mtl.gramian(cheap), mtl.gramian(dear)

    cheap, dear = laws.quick_jit(both)(params, inputs)
    assert_close(cheap, dear)
    # And with others it does not.
    cheap, dear = laws.quick_jit(both)(params, normal((samples, 5), 11))
    assert np.abs(cheap - dear).max() > 0.1 * np.abs(dear).max()


def test_the_features_bound_the_update():
    """``|w J| <= |dz / dtheta| |w C|``, which is what MGDA-UB makes small."""
    params, encoder, heads = net(4, "tuple")
    only = params["trunk"]
    move = jax.jacrev(lambda trunk: encoder(params | {"trunk": trunk}, X))(only)
    size = sum(np.prod(z.shape) for z in jax.tree.leaves(encoder(params, X)))
    leaves = [
        np.concatenate([np.float64(g).reshape(-1, p.size) for g in parts], 0)
        for p, parts in (
            (only[n], [move[z][n] for z in ("h", "mean")]) for n in ("b", "w")
        )
    ]
    jacobian = np.concatenate(leaves, 1)
    assert jacobian.shape[0] == size
    largest = np.linalg.norm(jacobian, 2)
    rows = feature_rows(params, encoder, heads)
    exact = jax.jacrev(
        lambda trunk: jnp.stack(whole(encoder, heads)(params | {"trunk": trunk}, X))
    )(only)
    exact = flat(exact, 4)
    assert_close(rows @ jacobian, exact)
    for weights in np.random.default_rng(12).uniform(size=(20, 4)):
        bound = largest * np.linalg.norm(weights @ rows)
        assert np.linalg.norm(weights @ exact) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_mgda_is_mgda_ub(form):
    """Two tasks: the closed form of Sener & Koltun, heads by the plain sum."""
    params, encoder, heads = net(2, form)
    one, two = feature_rows(params, encoder, heads)
    share = np.clip((two - one) @ two / ((two - one) @ (two - one)), 0, 1)
    shared = {"heads": False, "scale": False, "trunk": {"b": True, "w": True}}
    tx = optax.chain(mtl.shared_only(mtl.mgda(2), shared), optax.sgd(1.0))
    mtl.check_chain(tx, params, 2)

    @laws.quick_jit
    def step(params, state, x):
        losses, grads = mtl.feature_jacobian(encoder, heads)(params, x)
        return tx.update(grads, state, params, losses=losses)

    updates, state = step(params, tx.init(params), X)
    weights = optax.tree_utils.tree_get(state, "task_weights")
    assert_close(weights, [share, 1 - share], 1e-4)
    rows = mtl.value_and_task_grads(whole(encoder, heads))(params, X)[1]
    assert_trees_close(
        updates["trunk"],
        jax.tree.map(
            lambda g: -jnp.tensordot(weights, g, 1).astype(g.dtype), rows["trunk"]
        ),
    )
    for name in ("heads", "scale"):
        assert_close(updates[name], -rows[name].sum(0))


# ------------------------------------------------------------------ heads of all kinds


def scanned(z):
    return jax.lax.scan(lambda c, row: (jnp.tanh(c + row.sum()), None), 0.0, z)[0]


@jax.custom_vjp
def doubled(z):
    return jnp.sum(z**2)


doubled.defvjp(lambda z: (jnp.sum(z**2), z), lambda z, g: (4 * g * z,))

KINDS = {
    "plain": lambda p, z: (jnp.sum(z), jnp.sum(z**2), jnp.mean(z @ p)),
    "jitted": jax.jit(lambda p, z: (jax.nn.relu(z).sum(), jnp.sum(z**3))),
    "one inside": lambda p, z: (jax.jit(jnp.sum)(z), jax.nn.softplus(z).sum()),
    "a shared layer": lambda p, z: (lambda h: (h.sum(), jnp.sum(h**2)))(jnp.sin(z @ p)),
    "remat": lambda p, z: (jax.checkpoint(lambda z: jnp.sin(z).sum())(z), jnp.sum(z)),
    "scan": lambda p, z: (scanned(z), jnp.sum(z**2)),
    "cond": lambda p, z: (
        jax.lax.cond(z[0, 0] > 0, jnp.sum, lambda z: jnp.sum(z**2), z),
        jnp.max(z),
    ),
    "its own derivative": lambda p, z: (doubled(z), jnp.sum(z)),
    "some without features": lambda p, z: (jnp.sum(p**2), jnp.sum(z), jnp.float32(2)),
    "one loss twice": lambda p, z: (lambda s: (s, s, -s))(jnp.sum(jnp.sin(z))),
    "numbers in the graph": lambda p, z: {"b": jnp.sum(z) * 2, "a": 3.0 - z[0, 0]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_heads(kind):
    params = {"w": normal((3, 4), 13), "p": normal((4,), 14)}

    def encoder(params, x):
        return jnp.tanh(x @ params["w"])

    def heads(params, z, x):
        return KINDS[kind](params["p"], z)

    @laws.quick_jit
    def found(params):
        _, grads = mtl.feature_jacobian(encoder, heads)(params, X)
        return mtl.gramian(grads)

    rows = feature_rows(params, encoder, heads)
    assert_close(found(params), rows @ rows.T)


def test_losses_that_are_features():
    def encoder(w):
        return {"a": w[0] ** 2, "b": w[1]}

    _, grads = mtl.feature_jacobian(encoder, lambda w, z: z)(jnp.array([3.0, 5.0]))
    np.testing.assert_array_equal(mtl.gramian(grads), np.eye(2))
    np.testing.assert_array_equal(mtl.materialize(grads), [[6, 0], [0, 1]])


def test_the_gramian_asks_for_full_precision():
    for form in FORMS:
        params, encoder, heads = net(3, form)
        _, grads = mtl.feature_jacobian(encoder, heads)(params, X)
        jaxpr = jax.make_jaxpr(lambda grads=grads: mtl.gramian(grads))()
        found = [
            e for e in laws.equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"
        ]
        assert found
        highest = jax.lax.Precision.HIGHEST
        asked = {e.params["precision"] for e in found}
        assert asked <= {highest, (highest, highest)}


def test_low_precision():
    params, encoder, heads = net(3, "tuple", jnp.bfloat16)
    rows = feature_rows(params, encoder, heads)

    @laws.quick_jit
    def found(params):
        losses, grads = mtl.feature_jacobian(encoder, heads)(params, X)
        return losses, mtl.gramian(grads), mtl.weighted_sum(jnp.ones(3), grads)

    losses, gram, combined = found(params)
    assert losses.dtype == gram.dtype == jnp.float32
    assert_close(gram, rows @ rows.T, 2e-2)
    assert jax.tree.map(jnp.result_type, combined) == jax.tree.map(
        jnp.result_type, params
    )


def test_near_parallel_rows_in_a_basis():
    """Differences are formed before products: 1e-4 of the length is not lost."""

    def heads(w, z):
        small = jnp.array([0.0, 1e-4]) * z
        return {"a": jnp.sum(z), "b": jnp.sum(z) + jnp.sum(small)}

    _, grads = mtl.feature_jacobian(lambda w: w, heads)(jnp.ones(2))
    gram = mtl.gramian(grads, basis=jnp.array([[-1.0, 1.0]]))
    np.testing.assert_allclose(gram, [[1e-8]], rtol=1e-3)


# ---------------------------------------------------------------------- where it may be


def test_in_scan_and_vmap():
    params, encoder, heads = net(3, "dict")
    tx = mtl.update_every(mtl.imtl_g(3), 2)
    jacobian = mtl.feature_jacobian(encoder, heads)

    def step(carry, _):
        params, state = carry
        _, grads = jacobian(params, X)
        updates, state = tx.update(grads, state, params)
        moved = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
        return (moved, state), (mtl.gramian(grads), state.inner.info.task_weights)

    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=4)

    def around(seed):
        return jax.tree.map(lambda p: p + 0.1 * normal(p.shape, seed), params)

    starts = [around(20 + i) for i in range(3)]
    together = jax.tree.map(lambda *p: jnp.stack(p), *starts)
    (ours, _), (grams, weights) = laws.quick_jit(jax.vmap(train))(together)

    @laws.quick_jit
    def by_hand(params):
        exact = jax.jacrev(lambda p: vector(whole(encoder, heads)(p, X)))(params)
        z = encoder(params, X)
        return exact, jax.jacrev(lambda z: vector(heads(params, z, X)))(z)

    for i, start in enumerate(starts):
        now = start
        for s in range(4):
            exact, rows = by_hand(now)
            rows = flat(rows, 3)
            assert_close(grams[i, s], rows @ rows.T, 1e-4)
            if s % 2 == 1:  # those of the step before
                np.testing.assert_array_equal(weights[i, s], weights[i, s - 1])
            now = jax.tree.map(
                lambda p, g, w=weights[i, s]: p - 0.05 * jnp.tensordot(w, g, 1),
                now,
                exact,
            )
        assert_trees_close(jax.tree.map(lambda p, i=i: p[i], ours), now, 1e-4)


def test_an_nnx_model_with_batch_statistics():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(3, 4, use_bias=False, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.heads = nnx.Dict(
                {name: nnx.Linear(4, 1, rngs=rngs) for name in ("a", "b")}
            )

        def features(self, x):
            return jnp.tanh(self.norm(self.trunk(x)))

    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def encoder(params, x):
        model = nnx.merge(graph, params, rest, copy=True)
        z = model.features(x)
        return z, nnx.split(model, nnx.Param, ...)[2]

    def heads(params, z, x):
        model = nnx.merge(graph, params, rest, copy=True)
        losses = {n: jnp.mean((head(z) - 1) ** 2) for n, head in model.heads.items()}
        return losses, jnp.mean(z)

    @laws.quick_jit
    def run(params, x):
        jacobian = mtl.feature_jacobian(encoder, heads, has_aux=True)
        (losses, (stats, mean)), grads = jacobian(params, x)
        return losses, stats, mean, mtl.gramian(grads), mtl.materialize(grads)

    losses, stats, mean, gram, rows = run(params, X)
    z, wanted = encoder(params, X)
    assert_trees_close(stats, wanted)
    assert_close(mean, jnp.mean(z))

    def separate(params, x):
        return heads(params, encoder(params, x)[0], x)[0]

    exact, grads = mtl.value_and_task_grads(separate)(params, X)
    assert_close(losses, exact)
    assert_trees_close(rows, grads)
    by_jax = jax.jacrev(lambda z: jnp.stack(list(heads(params, z, X)[0].values())))(z)
    assert_close(gram, flat(by_jax, 2) @ flat(by_jax, 2).T)


def test_keywords_go_to_both():
    def encoder(w, *, shift):
        return w + shift

    def heads(w, z, *, shift):
        return jnp.sum(z**2), shift * jnp.sum(z)

    losses, grads = mtl.feature_jacobian(encoder, heads)(jnp.ones(2), shift=2.0)
    np.testing.assert_array_equal(losses, [18.0, 12.0])
    np.testing.assert_array_equal(mtl.gramian(grads), [[72.0, 24.0], [24.0, 8.0]])


def test_a_broken_task_is_left_out():
    """Each loss is swept alone, so NaN stays in its own row."""
    params, encoder, heads = net(3, "dict")

    def breaking(params, z, x):
        losses = heads(params, z, x)
        first = min(losses)
        return losses | {first: losses[first] + jnp.log(0 * jnp.sum(z["h"]) ** 2)}

    tx = mtl.skip_nonfinite_tasks(mtl.imtl_g(3))

    @laws.quick_jit
    def step(params):
        _, grads = mtl.feature_jacobian(encoder, breaking)(params, X)
        updates, state = tx.update(grads, tx.init(params), params)
        return updates, state, mtl.gramian(grads)

    updates, state, gram = step(params)
    assert np.all(np.isfinite(np.float64(gram[1:, 1:])))
    assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))
    assert any(np.any(u != 0) for u in jax.tree.leaves(updates))
    assert state.info.skipped_tasks.tolist() == [1, 0, 0]


# ------------------------------------------------------------------------ what it costs


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def deep(tasks, form, width=256, layers=12, samples=64):
    params = {
        "heads": jnp.ones((width, tasks)),
        "trunk": jnp.ones((layers, width, width)),
    }
    x, y = normal((samples, width), 1), normal((samples, tasks), 2)

    def encoder(params):
        h = x
        for layer in params["trunk"]:
            h = jnp.tanh(h @ layer)
        return h

    def heads(params, z):
        if form == "array":
            return jnp.mean((z @ params["heads"] - y) ** 2, 0)
        return tuple(
            jnp.mean((z @ params["heads"][:, t] - y[:, t]) ** 2) for t in range(tasks)
        )

    return params, encoder, heads


@pytest.mark.parametrize("form", ["array", "tuple"])
def test_forty_tasks_cost_hardly_more_than_plain_training(form):
    """Measured 1.13 and 1.02 plain steps; `task_jacobian` takes about 14."""
    tasks = 40 if form == "array" else 24
    params, encoder, heads = deep(tasks, form, width=512)

    def balance(gramian, state, *, losses, task_mask, **extra):
        return 1 / jnp.sqrt(jnp.diag(gramian)), state

    method = mtl.Weighting(lambda n, dtype: (), balance, {"gramian"})
    shared = {"heads": False, "trunk": True}
    tx = mtl.shared_only(mtl.from_weighting(method, tasks), shared)

    def step(params):
        _, grads = mtl.feature_jacobian(encoder, heads)(params)
        return tx.update(grads, tx.init(params), params)[0]

    def plain(params):
        loss = whole(encoder, heads)
        return jax.grad(lambda p: jnp.sum(jnp.stack(list(loss(p)))))(params)

    assert flops(step, params) < 1.25 * flops(plain, params)


def test_separate_heads_cost_each_once():
    """The Gramian's sweeps grow as T, not as T^2."""

    def gram(tasks):
        def encoder(params):
            return params["z"]

        def heads(params, z):
            return tuple(jnp.sum(jnp.tanh(z @ w) ** 2) for w in params["w"])

        params = {"w": jnp.ones((tasks, 64, 64)), "z": jnp.ones((8, 64))}

        def run(params):
            return mtl.gramian(mtl.feature_jacobian(encoder, heads)(params)[1])

        one = flops(
            lambda w, z: jax.grad(lambda z: jnp.tanh(z @ w).sum())(z),
            params["w"][0],
            params["z"],
        )
        return flops(run, params) / one

    # Each about its own forward and backward pass.
    assert gram(8) < 1.6 * 8


# ---------------------------------------------------------------------------- wrong use


def linear(params, x):
    return x @ params


def two(params, z, x):
    return jnp.sum(z), jnp.sum(z**2)


@pytest.mark.parametrize(
    ("encoder", "heads", "error", "words"),
    [
        (lambda p, x: {}, two, ValueError, "encoder returned no features.*{}"),
        (lambda p, x: None, two, ValueError, "encoder returned no features.*None"),
        (lambda p, x: 1.0, two, TypeError, "is a float, expected an array"),
        (
            lambda p, x: {"z": x @ p, "count": jnp.arange(3)},
            lambda p, z, x: two(p, z["z"], x),
            TypeError,
            r"feature \['count'\] has dtype int32.*real floating",
        ),
        (
            lambda p, x: (x @ p).astype(jnp.complex64),
            lambda p, z, x: two(p, z.real, x),
            TypeError,
            "the feature has dtype complex64",
        ),
        (
            linear,
            lambda p, z, x: two(p, linear(p, x), x),
            ValueError,
            "no loss depends on the features.*from outside",
        ),
        (linear, lambda p, z, x: jnp.sum(z), ValueError, "heads returned one scalar"),
        (linear, lambda p, z, x: z, ValueError, r"one scalar a task.*\(5, 2\)"),
        (
            linear,
            lambda p, z, x: {"a": jnp.sum(z), "b": z},
            ValueError,
            "task 'b' must be a scalar",
        ),
        (linear, lambda p, z, x: (), ValueError, "got tuple"),
        (
            linear,
            lambda p, z, x: (jnp.sum(z).astype(int), jnp.sum(z)),
            TypeError,
            "real floating-point",
        ),
        (
            lambda p, x: x,
            two,
            ValueError,
            "no loss depends on the differentiated",
        ),
    ],
)
def test_refused_in_words(encoder, heads, error, words):
    jacobian = mtl.feature_jacobian(encoder, heads)
    with pytest.raises(error, match=f"(?s){words}"):
        jax.eval_shape(lambda p: jacobian(p, X)[0], normal((3, 2), 1))


@pytest.mark.parametrize(
    ("encoder", "heads", "words"),
    [
        (linear, two, r"has_aux=True encoder must return a tuple \(features, aux\)"),
        (lambda p, x: (x @ p, 0), lambda p, z, x: z.sum(0), r"heads must .*got .*Tr"),
    ],
)
def test_aux_that_is_missing(encoder, heads, words):
    jacobian = mtl.feature_jacobian(encoder, heads, has_aux=True)
    with pytest.raises(TypeError, match=words):
        jax.jit(lambda p: jacobian(p, X)[0])(normal((3, 2), 1))


def test_aux_that_was_not_announced():
    jacobian = mtl.feature_jacobian(lambda p, x: (x @ p, "stats"), two)
    with pytest.raises(TypeError, match=r"feature \[1\] is a str.*has_aux=True"):
        jacobian(normal((3, 2), 1), X)


def test_parameters_that_are_no_numbers():
    with pytest.raises(TypeError, match=r"\['n'\] has dtype int32"):
        mtl.feature_jacobian(lambda p, x: x @ p["w"], two)(
            {"n": jnp.arange(2), "w": normal((3, 2), 1)}, X
        )


def test_a_loss_that_is_a_number():
    jacobian = mtl.feature_jacobian(lambda p: 2 * p, lambda p, z: (z.mean(), 0.0))
    losses, lazy = jacobian(jnp.ones(3))
    np.testing.assert_array_equal(losses, [2, 0])
    np.testing.assert_allclose(mtl.gramian(lazy), [[1 / 3, 0], [0, 0]], 1e-6)
