"""`subsample_tasks`: m tasks a step, drawn at random."""

import functools
import itertools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax._some_tasks import some_tasks
from mtl_optax._tree import hold

T, M = 5, 2
PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
SUBSETS = list(itertools.combinations(range(T), M))
get = optax.tree_utils.tree_get


def rows_of(seed=0, tasks=T):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.standard_normal((tasks, *p.shape)), jnp.float32)
        for name, p in PARAMS.items()
    }


def flat(tree, *lead):
    leaves = [np.float64(x).reshape(*lead, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def assert_close(ours, wanted, tolerance=3e-6):
    size = max(np.abs(np.float64(wanted)).max(initial=0), 1e-30)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def draw(tx, keys, masks=None):
    """``[N, T]``: who took part, for every key."""

    def one(key, mask):
        state = tx.init(PARAMS)
        _, state = tx.update(rows_of(), state, PARAMS, key=key, task_mask=mask)
        return get(state, "drawn_tasks")

    masks = jnp.ones((len(keys), T), bool) if masks is None else masks
    return np.asarray(laws.quick_jit(jax.vmap(one))(keys, masks))


def keys(number, seed=0):
    return jax.random.split(jax.random.key(seed), number)


# ---------------------------------------------------------------------------- the draw


def test_m_tasks_uniformly_and_without_replacement():
    number = 4000
    drawn = draw(mtl.subsample_tasks(mtl.mean(T), M), keys(number))
    assert np.all(drawn.sum(1) == M)
    found = [np.all(drawn[:, list(each)], axis=1).sum() for each in SUBSETS]
    assert sum(found) == number
    expected = number / len(SUBSETS)
    # Nine degrees of freedom: beyond 33.7 in one case of ten thousand.
    assert np.sum((np.array(found) - expected) ** 2) / expected < 33.7


def test_the_same_key_draws_the_same_tasks():
    tx = mtl.subsample_tasks(mtl.mean(T), M)
    first = draw(tx, keys(50))
    np.testing.assert_array_equal(first, draw(tx, keys(50)))
    other = mtl.subsample_tasks(mtl.imtl_g(T, scale="sum"), M, rescale=True)
    np.testing.assert_array_equal(first, draw(other, keys(50)))
    assert len(np.unique(first, axis=0)) > 5


def test_absent_tasks_are_not_drawn():
    rng = np.random.default_rng(1)
    masks = rng.uniform(size=(300, T)) < 0.5
    masks[:3] = False
    drawn = draw(mtl.subsample_tasks(mtl.mean(T), M), keys(300), jnp.asarray(masks))
    assert not np.any(drawn & ~masks)
    np.testing.assert_array_equal(drawn.sum(1), np.minimum(masks.sum(1), M))


def test_an_absent_task_might_as_well_not_exist():
    """The draw depends on ranks among the present ones; so does what a method draws."""
    place = np.array([0, 2, 3])
    mask = jnp.zeros(T, bool).at[place].set(True)
    rows = rows_of(3)
    few = jax.tree.map(lambda g: g[place], rows)
    spoiled = jax.tree.map(lambda g: g.at[jnp.array([1, 4])].set(jnp.nan), rows)
    for name in ("rlw", "imtl_g"):
        made = [mtl.subsample_tasks(mtl.METHODS[name].make(n), M) for n in (T, 3)]
        long, short = (laws.quick_jit(tx.update) for tx in made)
        first, second = (tx.init(PARAMS) for tx in made)
        for key in keys(8):
            ours, first = long(spoiled, first, PARAMS, key=key, task_mask=mask)
            wanted, second = short(few, second, PARAMS, key=key)
            assert_close(flat(ours), flat(wanted))
            np.testing.assert_array_equal(
                get(first, "drawn_tasks")[place], get(second, "drawn_tasks")
            )


# ------------------------------------------------- the others are absent in that step


METHODS = ["uncertainty_weighting", "task_tensioner", "imtl_g", "scale_by_mao", "rlw"]


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_method_with_the_mask_of_the_drawn(name):
    """A plain loop over ten steps, histories and all."""
    method = mtl.METHODS[name]
    tx = method.make(T)
    some = mtl.subsample_tasks(tx, M)
    ours, theirs = laws.quick_jit(some.update), laws.quick_jit(tx.update)
    state, plain = some.init(PARAMS), tx.init(PARAMS)
    for s, key in enumerate(keys(10)):
        losses = jnp.exp(jax.random.normal(jax.random.key(s), (T,)))
        rows = rows_of(s)
        extras = laws.extras_of(method, T, losses, PARAMS)
        extras["key"] = key
        updates, state = ours(rows, state, PARAMS, **extras)
        mask = get(state, "drawn_tasks")
        if name == "rlw":
            extras["key"] = jax.random.fold_in(key, 1)
        wanted, plain = theirs(rows, plain, PARAMS, task_mask=mask, **extras)
        assert_close(flat(updates), flat(wanted))
        laws.assert_trees_close(state.inner, plain, 1e-6, f"step {s}")


def test_what_stands_in_rows_that_are_not_drawn_does_not_matter():
    tx = mtl.subsample_tasks(mtl.imtl_g(T), M)
    update, key = laws.quick_jit(tx.update), jax.random.key(4)
    updates, state = update(rows_of(), tx.init(PARAMS), PARAMS, key=key)
    bad = ~get(state, "drawn_tasks")
    spoiled = jax.tree.map(lambda g: g.at[bad].set(jnp.nan), rows_of())
    again, _ = update(spoiled, tx.init(PARAMS), PARAMS, key=key)
    assert_close(flat(again), flat(updates), 0)


def test_m_of_all_tasks_and_more_is_the_combiner_itself():
    wanted = of_all(mtl.imtl_g(T), rows_of())
    for m in (T, T + 3):
        tx = mtl.subsample_tasks(mtl.imtl_g(T), m, rescale=True)
        found, state = laws.quick_jit(tx.update)(
            rows_of(), tx.init(PARAMS), key=jax.random.key(0)
        )
        assert_close(flat(found), flat(wanted), 1e-6)
        assert np.all(get(state, "drawn_tasks"))


def test_a_random_method_draws_apart_from_the_tasks():
    """Its key is not the one that draws tasks: equal draws, then other weights."""
    tx = mtl.subsample_tasks(mtl.rlw(T), M)
    weights = []
    for key in keys(30):
        _, state = tx.update(rows_of(), tx.init(PARAMS), PARAMS, key=key)
        own = np.asarray(get(state, "task_weights"))
        drawn = np.asarray(get(state, "drawn_tasks"))
        assert_close(own.sum(), 1)
        assert np.all((own > 0) == drawn)
        weights.append(own.max())
    assert len(np.unique(weights)) == 30


# --------------------------------------------------------------- what is unbiased


def over_all_draws(tx, rows, number=20_000, **extra):
    """Mean update of many keys, exactly: every subset's own, weighted alike.

    Many keys, since no argument chooses the subset; a random method is averaged over
    its own keys as well.
    """

    def one(key):
        updates, state = tx.update(rows, tx.init(PARAMS), PARAMS, key=key, **extra)
        leaves = [jnp.ravel(x) for x in jax.tree.leaves(updates)]
        return jnp.concatenate(leaves), get(state, "drawn_tasks")

    updates, drawn = laws.quick_jit(jax.vmap(one))(keys(number))
    updates, drawn = np.float64(updates), np.asarray(drawn)
    own = [updates[np.all(drawn[:, list(each)], axis=1)] for each in SUBSETS]
    assert all(len(each) > 100 for each in own)
    return np.mean([each.mean(0) for each in own], axis=0)


WEIGHTS = (1.0, 2.0, 0.5, 3.0, 1.5)
SUMS = {
    "sum_tasks": lambda: mtl.sum_tasks(T),
    "constant_weights": lambda: mtl.constant_weights(T, weights=WEIGHTS),
    "uncertainty_weighting": lambda: mtl.uncertainty_weighting(T),
}


def of_all(tx, rows, **extra):
    update = laws.quick_jit(tx.update)
    return flat(update(rows, tx.init(PARAMS), PARAMS, **extra)[0])


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_is_unbiased_if_rescaled(name):
    rows, losses = rows_of(5), jnp.arange(1.0, T + 1)
    tx = SUMS[name]()
    wanted = of_all(tx, rows, losses=losses)
    some = functools.partial(mtl.subsample_tasks, tx, M)
    found = over_all_draws(some(rescale=True), rows, 2000, losses=losses)
    assert_close(found, wanted, 1e-5)
    found = over_all_draws(some(), rows, 2000, losses=losses)
    assert_close(found, wanted * M / T, 1e-5)


def test_a_mean_is_unbiased_as_it_is():
    rows = rows_of(6)
    wanted = flat(rows, T).mean(0)
    found = over_all_draws(mtl.subsample_tasks(mtl.mean(T), M), rows, 2000)
    assert_close(found, wanted, 1e-5)
    found = over_all_draws(mtl.subsample_tasks(mtl.rlw(T), M), rows)
    assert_close(found, wanted, 0.03)  # of 2000 random weights a subset


@pytest.mark.parametrize(
    ("name", "rescale"), [("imtl_g", False), ("mgda", False), ("pcgrad", True)]
)
def test_methods_that_weigh_tasks_against_each_other_are_biased(name, rescale):
    rows = rows_of(7)
    tx = mtl.METHODS[name].make(T)
    extra = {"key": jax.random.key(0)} if name == "pcgrad" else {}
    wanted = of_all(tx, rows, **extra)
    found = over_all_draws(mtl.subsample_tasks(tx, M, rescale=rescale), rows, 2000)
    assert np.linalg.norm(found - wanted) > 0.05 * np.linalg.norm(wanted)


def test_rescale_counts_those_who_are_present():
    tx = mtl.subsample_tasks(mtl.sum_tasks(T), M, rescale=True)
    rows = jax.tree.map(jnp.ones_like, rows_of())
    for present in range(T + 1):
        mask = jnp.arange(T) < present
        updates, _ = tx.update(
            rows, tx.init(PARAMS), PARAMS, key=jax.random.key(1), task_mask=mask
        )
        assert_close(flat(updates), np.full(8, float(present)))


def test_rescale_keeps_the_dtypes():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    rows = jax.tree.map(lambda g: g.astype(jnp.bfloat16), rows_of())
    tx = mtl.subsample_tasks(mtl.mean(T), M, rescale=True)
    updates, _ = tx.update(rows, tx.init(params), params, key=jax.random.key(0))
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.bfloat16)}


# --------------------------------------------------------------------- lazy, and cheap

TASKS, FEW, WIDTH = 16, 4, 64
RNG = np.random.default_rng(9)
X = jnp.asarray(RNG.standard_normal((24, WIDTH)), jnp.float32)
Y = jnp.asarray(RNG.standard_normal((24, TASKS)), jnp.float32)
MLP = {
    "heads": jnp.asarray(RNG.standard_normal((WIDTH, TASKS)) / 8, jnp.float32),
    "trunk": jnp.asarray(RNG.standard_normal((2, WIDTH, WIDTH)) / 8, jnp.float32),
}


def hidden(params, x):
    for layer in params["trunk"]:
        x = jnp.tanh(x @ layer)
    return x


def joint(params, tasks=TASKS):
    heads = params["heads"][:, :tasks]
    return jnp.mean(jnp.square(hidden(params, X) @ heads - Y[:, :tasks]), axis=0)


def by_name(params):
    return {f"t{t:02d}": loss for t, loss in enumerate(joint(params))}


def single(params, batch):
    x, y, own = batch
    return jnp.mean(jnp.square(hidden(params, x) @ (params["heads"] @ own) - y))


def jacobian(form, mode=None, tasks=TASKS):
    if form == "one batch a task":
        x = jnp.stack([jnp.roll(X, t, axis=1) for t in range(tasks)])
        batch = (x, Y.T[:tasks], jnp.eye(TASKS)[:tasks])
        whole = mtl.task_jacobian(single, in_axes=(None, 0), mode=mode)
        return lambda params: whole(params, batch)
    if form == "dict":
        return mtl.task_jacobian(by_name, mode=mode)
    return mtl.task_jacobian(functools.partial(joint, tasks=tasks), mode=mode)


SLOW = pytest.mark.slow
FORMS = [
    ("array", None),
    ("one batch a task", None),
    pytest.param("array", "layerwise", marks=SLOW),
    pytest.param("array", "vmap", marks=SLOW),
    pytest.param("array", "map", marks=SLOW),
    pytest.param("dict", None, marks=SLOW),
    pytest.param("one batch a task", "map", marks=SLOW),
]
LAZY = [
    ("imtl_g", "mean", "scale_by_mao"),
    pytest.param(("task_tensioner", "pcgrad"), marks=SLOW, id="bases and keys"),
]


@pytest.mark.parametrize(("form", "mode"), FORMS)
@pytest.mark.parametrize("names", LAZY)
def test_lazy_is_stacked(form, mode, names):
    """Over several methods in one program; a basis of its own has `task_tensioner`."""
    every = {
        name: mtl.subsample_tasks(mtl.METHODS[name].make(TASKS), FEW, rescale=True)
        for name in names
    }

    def step(params, key, mask):
        losses, lazy = jacobian(form, mode)(params)
        rows = mtl.materialize(lazy)
        out = {}
        for name, tx in every.items():
            state = tx.init(params)
            extra = {"key": key, "task_mask": mask}
            one, first = tx.update(rows, state, params, losses=losses, **extra)
            two, second = tx.update(lazy, state, params, **extra)
            out[name] = (one, first), (two, second)
        return out

    compiled = laws.quick_jit(step)
    for key, present in zip(keys(3), (TASKS, TASKS - 5, 2), strict=True):
        mask = jnp.arange(TASKS) >= TASKS - present
        for name, (wanted, ours) in compiled(MLP, key, mask).items():
            size = np.abs(flat(wanted[0])).max()
            np.testing.assert_allclose(
                flat(ours[0]), flat(wanted[0]), rtol=0, atol=2e-5 * size, err_msg=name
            )
            laws.assert_trees_close(ours[1], wanted[1], 1e-4, name)


@pytest.mark.parametrize("form", ["array", "one batch a task"])
def test_rows_of_all_others_are_zero(form):
    """By itself, whatever mask and weights it is asked with; and so, held."""
    drawn = jnp.zeros(TASKS, bool).at[jnp.array([2, 9, 10])].set(True)
    mask = jnp.ones(TASKS, bool).at[9].set(False)
    rng = np.random.default_rng(12)
    weights = jnp.asarray(rng.standard_normal(TASKS), jnp.float32)
    basis = jnp.asarray(rng.standard_normal((3, TASKS)), jnp.float32)

    @laws.quick_jit
    def look(params):
        _, lazy = jacobian(form)(params)
        some = some_tasks(lazy, drawn, FEW)
        zero = jax.tree.map(
            lambda g: jnp.where(drawn.reshape(-1, *[1] * (g.ndim - 1)), g, 0),
            mtl.materialize(lazy),
        )
        return [
            [
                mtl.materialize(grads),
                mtl.weighted_sum(weights, grads),
                mtl.gramian(grads),
                mtl.gramian(grads, task_mask=mask),
                mtl.gramian(grads, basis=basis),
                mtl.gramian(grads, basis=basis, task_mask=mask),
            ]
            for grads in (zero, some, hold(some), hold(some, mask))
        ]

    wanted, *found = look(MLP)
    for grads in found[:2]:
        for ours, own in zip(grads, wanted, strict=True):
            laws.assert_trees_close(ours, own, 1e-5, form)
    # Held with a mask, it is asked with that mask.
    for number in (0, 3, 5):
        laws.assert_trees_close(found[2][number], wanted[number], 1e-5, form)


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


def cost(tx, take):
    """Of one step, beside that of the losses' forward and backward pass."""

    def step(params, state, key):
        _, lazy = take(params)
        return tx.update(lazy, state, params, key=key)[0]

    return flops(step, MLP, tx.init(MLP), jax.random.key(0))


@pytest.mark.parametrize("form", ["array", "one batch a task"])
@pytest.mark.parametrize(
    "name",
    [
        "imtl_g",
        pytest.param("task_tensioner", marks=SLOW),
        pytest.param("scale_by_mao", marks=SLOW),
    ],
)
def test_it_costs_what_so_few_tasks_cost(form, name):
    make = mtl.METHODS[name].make
    whole = cost(make(TASKS), jacobian(form))
    ours = cost(mtl.subsample_tasks(make(TASKS), FEW), jacobian(form))
    few = cost(make(FEW), jacobian(form, tasks=FEW))
    # The tensioner's basis has a row a task, and MAO works on rows of zeros too.
    slack = 1.3 if name == "imtl_g" else 3.5
    assert few < 0.45 * whole
    assert ours < slack * few
    assert ours < 0.65 * whole


def test_so_many_sweeps_and_one_backward_pass():
    """By the layers alone: one forward pass, m sweeps, and one pass to combine."""

    def plain(params):
        return jax.grad(lambda p: jnp.sum(joint(p)))(params)

    take = jacobian("array", "layerwise")
    each = flops(plain, MLP)
    ours = cost(mtl.subsample_tasks(mtl.imtl_g(TASKS), FEW), take)
    whole = cost(mtl.imtl_g(TASKS), take)
    sweeps = cost(mtl.cagrad(TASKS, num_sampled=FEW), take)
    # As many as CAGrad's own sampling takes.
    assert abs(ours - sweeps) < 0.1 * each
    assert ours < 0.45 * whole
    assert cost(mtl.subsample_tasks(mtl.mean(TASKS), FEW), take) < 1.1 * each


def test_a_loss_only_method_runs_drawn_batches_only():
    whole = cost(mtl.mean(TASKS), jacobian("one batch a task"))
    ours = cost(mtl.subsample_tasks(mtl.mean(TASKS), FEW), jacobian("one batch a task"))
    assert ours < 1.1 * FEW / TASKS * whole


@pytest.mark.parametrize(
    "name",
    [
        "imtl_g",
        pytest.param("task_tensioner", marks=SLOW),
        pytest.param("scale_by_mao", marks=SLOW),
    ],
)
@pytest.mark.slow
def test_an_operator_of_one_s_own(name):
    """One with the members of the protocol alone: by its combinations."""
    rows = flat(rows_of(11), T)

    class Given:
        num_tasks, task_names, isolates = T, tuple("abcde"), False
        losses = jnp.arange(1.0, T + 1)
        asked: list[int] = []  # noqa: RUF012

        def restrict(self, leaves):
            return self

        def gramian(self, basis=None, task_mask=None):
            Given.asked.append(T if basis is None else len(basis))
            own = jnp.asarray(rows, jnp.float32)
            own = own if task_mask is None else jnp.where(task_mask[:, None], own, 0)
            own = own if basis is None else basis @ own
            return own @ own.T

        def combine(self, weights):
            return [weights @ jnp.asarray(rows, jnp.float32)]

        def stack(self, *, isolated=False):
            return [jnp.asarray(rows, jnp.float32)]

    params = jnp.zeros(rows.shape[1])
    tx = mtl.subsample_tasks(mtl.METHODS[name].make(T), M)

    @laws.quick_jit
    def step(grads, key):
        grads = mtl.lazy_tree(Given(), params) if grads is None else grads
        return tx.update(grads, tx.init(params), losses=Given.losses, key=key)[0]

    key = jax.random.key(2)
    wanted = step(jnp.asarray(rows, jnp.float32), key)
    assert_close(step(None, key), wanted, 1e-5)
    if mtl.METHODS[name].kind == "weighting":
        assert Given.asked[0] == M


# ------------------------------------------------------------------- inside and around


@pytest.mark.slow
def test_heads_outside_and_inside():
    mask = {"heads": False, "trunk": True}
    key, (_, lazy) = jax.random.key(3), jacobian("array")(MLP)
    rows = mtl.materialize(lazy)
    outside = mtl.shared_only(mtl.subsample_tasks(mtl.mean(TASKS), FEW), mask)
    inside = mtl.subsample_tasks(mtl.shared_only(mtl.mean(TASKS), mask), FEW)
    for tx, grads in itertools.product((outside, inside), (lazy, rows)):
        updates, state = tx.update(grads, tx.init(MLP), MLP, key=key)
        drawn = np.asarray(get(state, "drawn_tasks"))
        trunk = np.float64(rows["trunk"])[drawn].mean(0)
        assert_close(updates["trunk"], trunk, 1e-5)
        heads = np.float64(rows["heads"])
        chosen = heads if tx is outside else heads[drawn]
        assert_close(updates["heads"], chosen.sum(0), 1e-5)


@pytest.mark.parametrize("form", ["stacked", "lazy"])
@pytest.mark.slow
def test_inside_skip_nonfinite_tasks(form):
    tx = mtl.skip_nonfinite_tasks(mtl.subsample_tasks(mtl.mean(TASKS), FEW))

    def losses(params, broken):
        each = by_name(params)
        return each | {"t03": each["t03"] * jnp.where(broken, jnp.inf, 1)}

    @laws.quick_jit
    def step(key, broken):
        _, lazy = mtl.task_jacobian(losses)(MLP, broken)
        rows = mtl.materialize(lazy, isolated=True)
        grads = rows if form == "stacked" else lazy
        return *tx.update(grads, tx.init(MLP), MLP, key=key), rows

    for key in keys(4, 5):
        updates, state, rows = step(key, True)
        drawn = np.asarray(get(state, "drawn_tasks"))
        assert drawn.sum() == FEW
        assert not drawn[3]
        assert_close(flat(updates), flat(rows, TASKS)[drawn].mean(0), 1e-5)
        assert get(state, "skipped_tasks")[3] == 1


def test_scan_of_a_training_run():
    tx = optax.chain(mtl.subsample_tasks(mtl.imtl_g(TASKS), FEW), optax.sgd(0.3))

    def step(carry, key):
        params, state = carry
        losses, lazy = jacobian("array")(params)
        updates, state = tx.update(lazy, state, params, key=key)
        params = optax.apply_updates(params, updates)
        return (params, state), (jnp.sum(losses), get(state, "drawn_tasks"))

    run = laws.quick_jit(lambda c, k: jax.lax.scan(step, c, k))
    _, (totals, drawn) = run((MLP, tx.init(MLP)), keys(40))
    assert totals[-1] < 0.8 * totals[0]
    assert np.all(drawn.sum(1) == FEW)
    assert np.all(drawn.any(0))


def test_the_whole_chain_is_checked():
    tx = optax.chain(mtl.subsample_tasks(mtl.mean(T), M), optax.adam(0.1))
    mtl.check_chain(tx, PARAMS, T, key=jax.random.key(0))


# ---------------------------------------------------------------------------- wrong use


def test_it_asks_for_a_key():
    tx = mtl.subsample_tasks(mtl.mean(T), M)
    with pytest.raises(TypeError, match=r"at random.*fresh jax\.random\.key"):
        tx.update(rows_of(), tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (optax.chain(mtl.edm(T), optax.sgd(1.0)), r"chain\(subsample_tasks\(edm"),
        (mtl.edm, "must be a combiner"),
        (mtl.sum_tasks(), r"sum_tasks\(9\)"),
    ],
)
def test_what_cannot_be_wrapped(tx, words):
    with pytest.raises(TypeError, match=words):
        mtl.subsample_tasks(tx, 2)


@pytest.mark.parametrize(
    ("m", "error", "words"),
    [
        (0, ValueError, "m must be at least 1, got 0"),
        (True, TypeError, "m must be an int, got bool"),
        (2.0, TypeError, "m must be an int, got float"),
        (jnp.array(2), TypeError, "m must be a Python int, got an array"),
    ],
)
def test_m_must_be_a_positive_int(m, error, words):
    with pytest.raises(error, match=words):
        mtl.subsample_tasks(mtl.edm(T), m)


def test_what_it_tells_of_itself():
    tx = mtl.subsample_tasks(mtl.skip_nonfinite_tasks(mtl.edm(T)), 2)
    assert (tx.num_tasks, tx.weighting, tx.skips_nonfinite) == (T, None, True)
    tx = mtl.subsample_tasks(mtl.edm(T, scale="sum", axis_name="x"), 2)
    assert (tx.scale, tx.axis_name, tx.skips_nonfinite) == ("sum", "x", False)
