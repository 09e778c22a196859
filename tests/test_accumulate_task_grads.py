"""`accumulate_task_grads`: one combination of the gradients of k micro-batches."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl

T, K, ROWS = 3, 4, 6
PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
get = optax.tree_utils.tree_get


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def rows_at(step, tasks=T):
    return {
        name: normal((tasks, *p.shape), [step, p.ndim]) for name, p in PARAMS.items()
    }


def losses_at(step):
    return jnp.exp(normal((T,), [9, step]))


def mean_of(trees):
    return jax.tree.map(
        lambda *leaves: sum(map(np.float64, leaves)) / len(trees), *trees
    )


def flat(tree, *lead):
    leaves = [np.float64(x).reshape(*lead, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def assert_close(ours, wanted, tolerance=2e-6):
    size = max(np.abs(np.float64(wanted)).max(initial=0), 1e-30)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def assert_trees_equal(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


# ----------------------------------------------------------------- is one large batch

X, Y = normal((2, K * ROWS, 5), 1), normal((2, K * ROWS, T), 2)
MODEL = {"b": normal((8,), 3), "heads": normal((8, T), 4), "w": normal((5, 8), 5)}


def mean_losses(params, x, y):
    h = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean(jnp.square(h @ params["heads"] - y), axis=0)


def one_loss(params, batch):
    x, y, own = batch
    h = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean(jnp.square(h @ (params["heads"] @ own) - y))


def given(form, params, x, y):
    if form == "one batch a task":
        batch = (jnp.stack([x] * T), y.T, jnp.eye(T))
        return mtl.task_jacobian(one_loss, in_axes=(None, 0))(params, batch)
    losses, lazy = mtl.task_jacobian(mean_losses)(params, x, y)
    return losses, mtl.materialize(lazy) if form == "stacked" else lazy


SLOW = pytest.mark.slow
HOW = [
    ("uncertainty_weighting", "lazy"),
    ("task_tensioner", "stacked"),
    ("mgda", "one batch a task"),
    *[
        pytest.param(name, form, marks=SLOW)
        for name, form in (
            ("uncertainty_weighting", "stacked"),
            ("uncertainty_weighting", "one batch a task"),
            ("task_tensioner", "lazy"),
            ("task_tensioner", "one batch a task"),
            ("mgda", "lazy"),
            ("mgda", "stacked"),
        )
    ],
]


@pytest.mark.parametrize(("name", "form"), HOW)
def test_k_micro_batches_are_one_large_batch(name, form):
    """Two steps of a chain with Adam, as a scan over micro-batches."""
    chain = optax.chain(mtl.METHODS[name].make(T), optax.adam(0.1))
    tx = mtl.accumulate_task_grads(chain, K, num_tasks=T)

    def step(tx, carry, batch):
        params, state = carry
        losses, grads = given(form, params, *batch)
        updates, state = tx.update(grads, state, params, losses=losses)
        return (optax.apply_updates(params, updates), state), updates

    @laws.quick_jit
    def both(params):
        small = [v.reshape(2 * K, ROWS, -1) for v in (X, Y)]
        first = (params, tx.init(params))
        ours, updates = jax.lax.scan(functools.partial(step, tx), first, tuple(small))
        second = (params, chain.init(params))
        theirs, whole = jax.lax.scan(functools.partial(step, chain), second, (X, Y))
        return ours, updates, theirs, whole

    ours, updates, theirs, whole = both(MODEL)
    for name_, leaf in updates.items():
        by_step = leaf.reshape(2, K, *leaf.shape[1:])
        assert not np.any(by_step[:, :-1])
        assert_close(by_step[:, -1], whole[name_], 1e-4)  # Adam's first steps: signs
    laws.assert_trees_close(ours[1].inner, theirs[1], 1e-4, "state")
    assert_close(flat(ours[0]), flat(theirs[0]), 1e-5)


@pytest.mark.parametrize("name", ["uncertainty_weighting", "pcgrad", "imtl_g"])
def test_means_by_hand(name):
    """The k-th update is the method's own of the means, without an optimiser."""
    method = mtl.METHODS[name]
    tx = mtl.accumulate_task_grads(method.make(T), K)
    plain = method.make(T)
    update, state, own = laws.quick_jit(tx.update), tx.init(PARAMS), plain.init(PARAMS)
    for s in range(2 * K):
        key, before = jax.random.key(s), state.inner
        assert state.micro_batch == s % K
        updates, state = update(rows_at(s), state, PARAMS, losses=losses_at(s), key=key)
        if s % K < K - 1:
            assert not np.any(flat(updates))
            assert_trees_equal(state.inner, before)
            continue
        span = range(s - K + 1, s + 1)
        mean = jax.tree.map(jnp.float32, mean_of([rows_at(j) for j in span]))
        losses = jnp.float32(mean_of([losses_at(j) for j in span]))
        wanted, own = plain.update(mean, own, PARAMS, losses=losses, key=key)
        assert_close(flat(updates), flat(wanted))
        laws.assert_trees_close(state.inner, own, 1e-5, "inner")
        for leaf in jax.tree.leaves(state[1:]):
            assert not np.any(leaf)
    assert state.micro_batch == 0


@pytest.mark.slow
def test_multi_steps_after_a_combiner_is_something_else():
    """It averages combinations: the docstring says so."""
    tx = optax.chain(mtl.imtl_g(T), optax.MultiSteps(optax.sgd(-1.0), K))
    ours = mtl.accumulate_task_grads(mtl.imtl_g(T), K)
    state, own = tx.init(PARAMS), ours.init(PARAMS)
    one, two = laws.quick_jit(tx.update), laws.quick_jit(ours.update)
    for s in range(K):
        theirs, state = one(rows_at(s), state, PARAMS)
        updates, own = two(rows_at(s), own, PARAMS)
    assert np.linalg.norm(flat(theirs) - flat(updates)) > 0.1 * np.linalg.norm(
        flat(updates)
    )


def test_one_micro_batch_is_the_combiner_itself():
    tx, plain = (
        mtl.accumulate_task_grads(mtl.task_tensioner(T), 1),
        mtl.task_tensioner(T),
    )
    state, own = tx.init(PARAMS), plain.init(PARAMS)
    first, second = laws.quick_jit(tx.update), laws.quick_jit(plain.update)
    for s in range(3):
        updates, state = first(rows_at(s), state, PARAMS, losses=losses_at(s))
        wanted, own = second(rows_at(s), own, PARAMS, losses=losses_at(s))
        assert_close(flat(updates), flat(wanted), 1e-6)
        laws.assert_trees_close(state.inner, own, 1e-6, "inner")


def test_adam_inside_waits_and_outside_does_not():
    """Why the optimiser goes inside: zero updates move Adam's momentum."""
    inside = mtl.accumulate_task_grads(
        optax.chain(mtl.mean(T), optax.adam(0.1)), K, num_tasks=T
    )
    outside = optax.chain(mtl.accumulate_task_grads(mtl.mean(T), K), optax.adam(0.1))
    moved = {}
    for name, tx in {"inside": inside, "outside": outside}.items():
        state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
        moved[name] = []
        for s in range(2 * K):
            updates, state = update(rows_at(s), state, PARAMS)
            moved[name].append(bool(np.any(flat(updates))))
        assert get(state, "count") == (2 if name == "inside" else 2 * K)
    assert moved["inside"] == 2 * ([False] * (K - 1) + [True])
    assert moved["outside"] == [False] * (K - 1) + [True] * (K + 1)


# ------------------------------------------------------------- absent tasks, arguments


def weigh_by(what, needs=frozenset()):
    """A weighting that shows an argument as its weights, and counts its calls."""

    def update(gramian, state, *, task_mask, **extra):
        return what(task_mask=task_mask, **extra), state + 1

    method = mtl.Weighting(lambda n, dtype: jnp.zeros((), jnp.int32), update, needs)
    return mtl.from_weighting(method, T)


MASKS = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0]], bool)


def test_each_task_s_mean_is_over_where_it_was_present():
    tx = mtl.accumulate_task_grads(mtl.uncertainty_weighting(T), K)
    plain = mtl.uncertainty_weighting(T)
    state, own = tx.init(PARAMS), plain.init(PARAMS)
    update = laws.quick_jit(tx.update)
    for turn in range(2):
        for s, mask in enumerate(MASKS):
            rows = jax.tree.map(
                lambda g, m=mask: g.at[~m].set(jnp.nan), rows_at(10 * turn + s)
            )
            losses = jnp.where(mask, losses_at(10 * turn + s), jnp.inf)
            updates, state = update(
                rows, state, PARAMS, losses=losses, task_mask=jnp.asarray(mask)
            )
        mean, losses = rows_at(0), np.zeros(T)
        for t in range(2):
            there = [10 * turn + s for s in range(K) if MASKS[s, t]]
            own_rows = mean_of([rows_at(s) for s in there])
            mean = jax.tree.map(lambda g, o, t=t: g.at[t].set(o[t]), mean, own_rows)
            losses[t] = np.mean([losses_at(s)[t] for s in there])
        wanted, own = plain.update(
            mean,
            own,
            PARAMS,
            losses=jnp.float32(losses),
            task_mask=jnp.array([True, True, False]),
        )
        assert_close(flat(updates), flat(wanted))
        laws.assert_trees_close(state.inner, own, 1e-6, "inner")


def test_a_task_that_never_was_is_absent():
    tx = mtl.accumulate_task_grads(weigh_by(lambda task_mask, **_: task_mask + 1.0), K)
    state = tx.init(PARAMS)
    for mask in MASKS:
        _, state = tx.update(rows_at(0), state, PARAMS, task_mask=jnp.asarray(mask))
    np.testing.assert_array_equal(get(state, "task_weights"), [2, 2, 0])
    # Nobody at all: the method is told so, and the count goes on.
    for s in range(K):
        updates, state = tx.update(
            rows_at(s), state, PARAMS, task_mask=jnp.zeros(T, bool)
        )
    assert not np.any(flat(updates))
    np.testing.assert_array_equal(get(state, "task_weights"), np.zeros(T))
    assert get(state, "weighting") == 2


def test_other_arguments_are_those_of_the_last_micro_batch():
    def what(task_mask, key, delta_m, **extra):
        return jax.random.uniform(key, (T,)) + delta_m

    tx = mtl.accumulate_task_grads(weigh_by(what, frozenset({"key"})), 2)
    state = tx.init(PARAMS)
    for s in range(4):
        key, delta = jax.random.key(s), jnp.full(T, 1.0 * s)
        _, state = tx.update(rows_at(s), state, PARAMS, key=key, delta_m=delta)
        last = s - (s + 1) % 2
        if s:
            wanted = jax.random.uniform(jax.random.key(last), (T,)) + last
            assert_close(get(state, "task_weights"), wanted)


# ----------------------------------------------------------------- types and structure


@pytest.mark.parametrize("kind", ["bfloat16", "mixed"])
def test_sums_are_taken_in_float32(kind):
    params = laws.small_params(kind)
    tx = mtl.accumulate_task_grads(mtl.sum_tasks(2), 300)
    rows = jax.tree.map(lambda p: jnp.ones((2, *p.shape), p.dtype), params)
    state = tx.init(params)
    assert {x.dtype for x in jax.tree.leaves(state.summed_grads)} == {
        jnp.dtype(jnp.float32)
    }

    def run(state):
        return jax.lax.scan(
            lambda s, _: tx.update(rows, s, params)[::-1], state, None, 300
        )

    _, updates = laws.quick_jit(run)(state)
    for leaf, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == p.dtype
        assert np.all(np.float64(leaf[-1]) == 2)  # in bfloat16 a sum stops at 256


def test_an_optimiser_of_another_dtype():
    """What the chain returns is what comes out, in between too."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)

    def widen(updates, state, params=None):
        return jax.tree.map(lambda u: u.astype(jnp.float32), updates), state

    wide = optax.GradientTransformation(lambda p: (), widen)
    tx = mtl.accumulate_task_grads(optax.chain(mtl.mean(T), wide), 2, num_tasks=T)
    rows = jax.tree.map(lambda g: g.astype(jnp.bfloat16), rows_at(0))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(rows, state, params)
        assert updates["w"].dtype == jnp.float32


def test_without_params():
    tx = mtl.accumulate_task_grads(mtl.mean(T), 2)
    state = tx.init(PARAMS)
    for s in range(2):
        updates, state = tx.update(rows_at(s), state)
    assert_close(flat(updates), flat(mean_of([rows_at(0), rows_at(1)]), T).mean(0))


def test_in_an_nnx_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(5, 8, rngs=rngs)
            self.last = nnx.Linear(8, T, rngs=rngs)

    def losses(model, x, y):
        return jnp.mean(jnp.square(model.last(jnp.tanh(model.first(x))) - y), axis=0)

    def trained(tx, batches):
        model = Net(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        graph, _ = nnx.split(model)

        @nnx.jit
        def step(model, optimizer, x, y):
            params = nnx.state(model, nnx.Param)
            _, lazy = mtl.task_jacobian(lambda p: losses(nnx.merge(graph, p), x, y))(
                params
            )
            optimizer.update(model, lazy)

        for x, y in batches:
            step(model, optimizer, x, y)
        return flat(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    chain = optax.chain(mtl.imtl_g(T), optax.sgd(0.1))
    halves = [(X[s, i::2], Y[s, i::2]) for s in range(2) for i in range(2)]
    ours = trained(mtl.accumulate_task_grads(chain, 2, num_tasks=T), halves)
    wanted = trained(chain, [(X[s], Y[s]) for s in range(2)])
    assert_close(ours, wanted, 1e-5)


def test_states_by_parameter():
    """`tree_map_params` finds the sums, as it finds Adam's moments."""
    tx = mtl.accumulate_task_grads(
        optax.chain(mtl.mean(T), optax.adam(0.1)), 2, num_tasks=T
    )
    found = optax.tree_utils.tree_map_params(tx, lambda leaf: leaf + 1, tx.init(PARAMS))
    assert np.all(flat(found.summed_grads) == 1)
    assert np.all(flat(get(found, "mu")) == 1)
    assert not np.any(found.times_present)


# ------------------------------------------------------------------ the cond, and vmap


def products(jaxpr):
    return sum(e.primitive.name == "dot_general" for e in laws.equations(jaxpr))


@pytest.mark.parametrize("members", [(4,), pytest.param((2, 3), marks=SLOW)])
def test_the_method_runs_inside_a_cond_under_vmap_too(members):
    tx = mtl.accumulate_task_grads(mtl.imtl_g(T), 2)
    many, init = tx.update, tx.init
    for _ in members:
        many, init = jax.vmap(many), jax.vmap(init)
    params = jax.tree.map(lambda p: jnp.zeros((*members, *p.shape)), PARAMS)
    state = init(params)
    rows = [
        {n: normal((*members, T, *p.shape), [s, p.ndim]) for n, p in PARAMS.items()}
        for s in range(4)
    ]
    jaxpr = jax.make_jaxpr(many)(rows[0], state, params).jaxpr
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert cond.invars[0].aval.shape == ()
    keep, make = (products(branch.jaxpr) for branch in cond.params["branches"])
    assert (keep, products(jaxpr) - make) == (0, 0)
    assert make > 0

    alone, compiled = laws.quick_jit(tx.update), laws.quick_jit(many)
    place = (1,) * len(members)
    own = tx.init(PARAMS)
    for now in rows:
        updates, state = compiled(now, state, params)
        mine = jax.tree.map(lambda g: g[place], now)
        wanted, own = alone(mine, own, PARAMS)
        assert_close(flat(jax.tree.map(lambda u: u[place], updates)), flat(wanted))


def test_members_out_of_rhythm():
    tx = mtl.accumulate_task_grads(mtl.imtl_g(T), 3)
    first, second = tx.init(PARAMS), tx.init(PARAMS)
    alone = laws.quick_jit(tx.update)
    _, second = alone(rows_at(50), second, PARAMS)
    state = jax.tree.map(lambda *x: jnp.stack(x), first, second)
    many = laws.quick_jit(jax.vmap(tx.update, in_axes=(None, 0, None)))
    for s in range(5):
        updates, state = many(rows_at(s), state, PARAMS)
        one, first = alone(rows_at(s), first, PARAMS)
        two, second = alone(rows_at(s), second, PARAMS)
        for i, wanted in enumerate((one, two)):
            assert_close(flat(jax.tree.map(lambda u, i=i: u[i], updates)), flat(wanted))
    np.testing.assert_array_equal(state.micro_batch, [2, 0])


# ------------------------------------------------------------------- inside and around


def test_a_broken_micro_batch_is_left_out_alone():
    tx = mtl.skip_nonfinite_tasks(mtl.accumulate_task_grads(mtl.mean(T), K))
    state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
    for s in range(K):
        rows = rows_at(s)
        if s == 1:
            rows = rows | {"w": rows["w"].at[2, 0, 0].set(jnp.inf)}
        updates, state = update(rows, state, PARAMS)
    rows = [flat(rows_at(s), T) for s in range(K)]
    means = np.mean(rows, axis=0)
    means[2] = np.mean([rows[s][2] for s in (0, 2, 3)], axis=0)
    assert_close(flat(updates), means.mean(0))
    assert state.info.skipped_tasks.tolist() == [0, 0, 1]
    # Inside, the broken one costs the task the whole step.
    tx = mtl.accumulate_task_grads(mtl.skip_nonfinite_tasks(mtl.mean(T)), K)
    assert tx.skips_nonfinite
    state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
    for s in range(K):
        rows = rows_at(s)
        if s == 1:
            rows = rows | {"w": rows["w"].at[2, 0, 0].set(jnp.inf)}
        updates, state = update(rows, state, PARAMS)
    rows = np.mean([flat(rows_at(s), T) for s in range(K)], axis=0)
    assert_close(flat(updates), rows[:2].mean(0))


def test_drawn_anew_at_every_micro_batch():
    tx = mtl.subsample_tasks(mtl.accumulate_task_grads(mtl.mean(T), K), 2)
    state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
    total, times = np.zeros((T, 8)), np.zeros(T)
    for s in range(K):
        updates, state = update(rows_at(s), state, PARAMS, key=jax.random.key(s))
        drawn = np.asarray(state.info.drawn_tasks)
        total, times = total + drawn[:, None] * flat(rows_at(s), T), times + drawn
    assert times.sum() == 2 * K
    assert times.min() > 0
    assert_close(flat(updates), (total / times[:, None]).mean(0))


def test_the_whole_chain_is_checked():
    chain = optax.chain(mtl.edm(T), optax.adam(0.1))
    mtl.check_chain(mtl.accumulate_task_grads(chain, 2, num_tasks=T), PARAMS, T)


# ---------------------------------------------------------------------------- wrong use


def test_what_cannot_be_wrapped():
    with pytest.raises(TypeError, match="num_tasks must be given"):
        mtl.accumulate_task_grads(optax.chain(mtl.edm(T), optax.sgd(1.0)), 2)
    with pytest.raises(TypeError, match="num_tasks must be given"):
        mtl.accumulate_task_grads(mtl.sum_tasks(), 2)
    with pytest.raises(TypeError, match="must be called first"):
        mtl.accumulate_task_grads(mtl.edm, 2)
    with pytest.raises(ValueError, match="num_tasks must be at least 1"):
        mtl.accumulate_task_grads(mtl.edm(T), 2, num_tasks=0)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (True, TypeError, "k must be an int, got bool"),
        (2.0, TypeError, "k must be an int, got float"),
        (jnp.array(2), TypeError, "k must be a Python int, got an array"),
    ],
)
def test_k_must_be_a_positive_int(k, error, words):
    with pytest.raises(error, match=words):
        mtl.accumulate_task_grads(mtl.edm(T), k)
