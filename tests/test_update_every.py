"""`update_every`: weights made every k steps and kept in between."""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T, K, STEPS = 3, 3, 7
PARAMS = {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}
WEIGHTINGS = [row for row in mtl.METHODS.values() if row.kind == "weighting"]
get = optax.tree_utils.tree_get


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def rows_at(step, seed=0):
    return {
        name: normal((T, *p.shape), [seed, step, len(name), p.ndim])
        for name, p in PARAMS.items()
    }


def flat(tree, *lead):
    leaves = [np.float64(x).reshape(*lead, -1) for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves, axis=-1)


def losses_at(step):
    return jnp.exp(normal((T,), [9, step]))


def by_norm(num_tasks, **options):
    """Unit gradients, summed: easy to check by hand; remembers how often it weighed."""

    def update(gramian, state, *, losses, task_mask, **extra):
        norms = jnp.where(task_mask, jnp.sqrt(jnp.diag(gramian)), 1)
        return jnp.where(task_mask, 1 / norms, 0), state + 1

    method = mtl.Weighting(
        lambda num_tasks, dtype: jnp.zeros((), jnp.int32), update, {"gramian"}
    )
    return mtl.from_weighting(method, num_tasks, **options)


def unit_sum(rows, weigh=None, present=(0, 1, 2)):
    """The sum of rows over the lengths of other rows, in float64."""
    weigh = rows if weigh is None else weigh
    own, other = flat(rows, T), flat(weigh, T)
    return sum(own[t] / np.linalg.norm(other[t]) for t in present)


def assert_close(ours, wanted, tolerance=2e-6):
    ours, wanted = np.float64(ours), np.float64(wanted)
    size = max(np.abs(wanted).max(initial=0), 1e-30)
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def assert_trees_equal(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, ours, wanted)


# ------------------------------------------------------ what it does, over every method


def stepper(method, tx):
    """A compiled ``(state, step) -> (updates, state)`` on the rows of that step."""

    @laws.quick_jit
    def step(state, rows, losses, key):
        extras = laws.extras_of(method, T, losses, PARAMS)
        if "key" in method.needs:
            extras["key"] = key
        return tx.update(rows, state, PARAMS, **extras)

    def at(state, number):
        key = jax.random.key(number)
        return step(state, rows_at(number), losses_at(number), key)

    return at


SLOW = pytest.mark.slow
QUICK = ("mean", "rlw", "imtl_g", "task_tensioner")
EACH = [
    pytest.param(m, id=m.name, marks=() if m.name in QUICK else SLOW)
    for m in WEIGHTINGS
]


@pytest.mark.parametrize("method", EACH)
def test_every_weighting_against_a_plain_loop(method):
    tx = method.make(T)
    plain, one = stepper(method, tx), mtl.update_every(tx, 1)
    every, third = stepper(method, one), mtl.update_every(tx, K)
    kept = stepper(method, third)
    follows, first, second = tx.init(PARAMS), one.init(PARAMS), third.init(PARAMS)
    remembered = tx.init(PARAMS)
    weights = None
    for s in range(STEPS):
        # k = 1 is the combiner itself, state and all.
        wanted, follows = plain(follows, s)
        ours, first = every(first, s)
        assert_close(flat(ours), flat(wanted), 1e-6)
        laws.assert_trees_close(first.inner, follows, 1e-6, f"k = 1, step {s}")
        # k = 3: weights made by hand at 0, 3 and 6.
        if s % K == 0:
            _, remembered = plain(remembered, s)
            weights = np.float64(get(remembered, "task_weights"))
        ours, second = kept(second, s)
        assert_close(flat(ours), weights @ flat(rows_at(s), T))
        assert_close(get(second, "task_weights"), weights, 1e-6)
        laws.assert_trees_close(second.inner, remembered, 1e-6, f"k = 3, step {s}")


@pytest.mark.parametrize("scale", ["paper", "mean", "sum", "norm"])
def test_scales(scale):
    tx = mtl.update_every(by_norm(T, scale=scale), 2)
    state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
    for s in range(4):
        rows = rows_at(s)
        updates, state = update(rows, state, PARAMS)
        made = 1 / np.linalg.norm(flat(rows_at(s - s % 2), T), axis=1)
        wanted = {
            "paper": 1.0,
            "mean": 1 / made.sum(),
            "sum": T / made.sum(),
            # As long as the mean gradient of *this* step.
            "norm": np.linalg.norm(flat(rows, T).mean(0))
            / np.linalg.norm(made @ flat(rows, T)),
        }[scale] * made
        assert_close(flat(updates), wanted @ flat(rows, T))
        assert_close(get(state, "task_weights"), wanted)
        assert get(state, "weighting") == s // 2 + 1


# ---------------------------------------------------------------------------- the count


def run(tx, numbers, state=None, **extra):
    """Updates of the steps on the rows of these numbers, and the last state."""
    state = tx.init(PARAMS) if state is None else state
    update, out = laws.quick_jit(tx.update), []
    for n in numbers:
        given = {name: value(n) for name, value in extra.items()}
        updates, state = update(rows_at(n), state, PARAMS, **given)
        out.append(flat(updates))
    return out, state


@pytest.mark.parametrize("kind", ["static", int, jnp.uint32, jnp.int8])
def test_step_replaces_the_count(kind):
    tx = mtl.update_every(by_norm(T), K)
    update = laws.quick_jit(tx.update)
    if kind == "static":
        update, kind = tx.update, int
    state = tx.init(PARAMS)
    made = None
    for s in (4, 5, 6, 7, 9, 9, 11):  # begins and jumps anywhere
        updates, state = update(rows_at(s), state, PARAMS, step=kind(s))
        made = s if made is None or s % K == 0 else made
        assert_close(flat(updates), unit_sum(rows_at(s), rows_at(made)))
    # Its own count went along: 12 is due, 13 is not.
    (first, second), _ = run(tx, (12, 13), state)
    assert_close(first, unit_sum(rows_at(12)))
    assert_close(second, unit_sum(rows_at(13), rows_at(12)))


def test_a_step_larger_than_k_holds_in_few_bits():
    tx = mtl.update_every(by_norm(T), 300)  # no int8
    out, _ = run(tx, (0, 1), step=jnp.int8)
    assert_close(out[1], unit_sum(rows_at(1), rows_at(0)))


def test_the_count_never_runs_over():
    tx = mtl.update_every(by_norm(T), K)
    _, state = run(tx, (0,), step=lambda _: np.int32(2**31 - 1))
    assert 0 <= state.phase < K
    assert state.phase == 2**31 % K


def test_members_share_the_method_s_own_arguments():
    """`step`, as everything else, reaches the weighting."""

    def update(gramian, state, *, losses, task_mask, step, delta_m, **extra):
        return step * delta_m, state

    method = mtl.Weighting(lambda n, dtype: (), update, frozenset())
    tx = mtl.update_every(mtl.from_weighting(method, T), 2)
    given = jnp.arange(3.0)
    _, state = tx.update(
        rows_at(0), tx.init(PARAMS), PARAMS, step=jnp.int32(4), delta_m=given
    )
    np.testing.assert_array_equal(get(state, "task_weights"), 4 * given)


# ------------------------------------------------------------- masks and broken weights


def test_another_mask_makes_weights_anew():
    tx = mtl.update_every(by_norm(T), 4)
    whole, two, last = (True,) * 3, (True, False, True), (False, False, True)
    masks = [whole, whole, two, two, two, None, whole, two, last]
    made = 0
    state, update = tx.init(PARAMS), laws.quick_jit(tx.update)
    for s, mask in enumerate(masks):
        rows = rows_at(s)
        present = [t for t in range(T) if mask is None or mask[t]]
        if mask is not None:  # whatever stands in an absent row
            bad = ~np.array(mask)
            rows = jax.tree.map(lambda g, bad=bad: g.at[bad].set(jnp.nan), rows)
        extra = {} if mask is None else {"task_mask": jnp.array(mask)}
        updates, state = update(rows, state, PARAMS, **extra)
        before = masks[s - 1] or whole
        if s % 4 == 0 or (mask or whole) != before:
            made = s
        wanted = unit_sum(rows_at(s), rows_at(made), present)
        assert_close(flat(updates), wanted)
        weights = np.array(get(state, "task_weights"))
        assert np.all(weights[[t for t in range(T) if t not in present]] == 0)
    assert get(state, "weighting") == 6  # of nine: at 0, 2, 4, 5, 7 and 8


def test_nobody_present():
    tx = mtl.update_every(by_norm(T), 3)
    nobody = jnp.zeros(T, bool)
    state = tx.init(PARAMS)
    for step in (4, 5):
        updates, state = tx.update(
            rows_at(0), state, PARAMS, task_mask=nobody, step=step
        )
        assert not np.any(flat(updates))
    updates, _ = tx.update(rows_at(1), state, PARAMS, step=7)
    assert_close(flat(updates), unit_sum(rows_at(1)))


def test_weights_that_are_not_finite_are_not_kept():
    tx = mtl.update_every(by_norm(T), 5)
    state = tx.init(PARAMS)
    broken = jax.tree.map(lambda g: g.at[0].set(jnp.nan), rows_at(0))
    updates, state = tx.update(broken, state, PARAMS)
    assert np.isnan(flat(updates)).any()
    (first, second), _ = run(tx, (1, 2), state)
    assert_close(first, unit_sum(rows_at(1)))
    assert_close(second, unit_sum(rows_at(2), rows_at(1)))


# ---------------------------------------------------------------- what a step may be in


def lazy_losses(params, x):
    h = jnp.tanh(x @ params["w"].T + params["b"])
    return jnp.mean(h), 3 * jnp.mean(h[:, 0] ** 2), jnp.mean((h[:, 1] - 1) ** 2)


X = normal((8, 5, 3), 3)
MOVED = jax.tree.map(lambda p: p + 0.3 * normal(p.shape, p.ndim), PARAMS)


@pytest.mark.parametrize("losses", ["tuple", "array", "one batch a task"])
def test_lazy_in_scan_against_a_loop(losses):
    """Descent over 7 steps: rows by `jacrev`, weights by hand in float64."""
    tx = mtl.update_every(by_norm(T), K)
    jacobian = mtl.task_jacobian(lazy_losses)
    if losses == "array":
        jacobian = mtl.task_jacobian(lambda p, x: jnp.stack(lazy_losses(p, x)))

    def batch(x):
        if losses != "one batch a task":
            return x
        return jnp.broadcast_to(x, (T, *x.shape)), jnp.eye(T)

    if losses == "one batch a task":

        def one(params, each):
            return jnp.stack(lazy_losses(params, each[0])) @ each[1]

        jacobian = mtl.task_jacobian(one, in_axes=(None, 0))

    def step(carry, x):
        params, state = carry
        _, lazy = jacobian(params, batch(x))
        updates, state = tx.update(lazy, state, params)
        return (jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state), updates

    @laws.quick_jit
    def scanned(params):
        return jax.lax.scan(step, (params, tx.init(params)), X[:STEPS])

    (ours, state), _ = scanned(MOVED)
    params, weights = MOVED, None
    rows_of = jax.jit(jax.jacrev(lambda p, x: jnp.stack(lazy_losses(p, x))))
    for s in range(STEPS):
        rows = rows_of(params, X[s])
        if s % K == 0:
            weights = 1 / np.linalg.norm(flat(rows, T), axis=1)
        params = jax.tree.map(
            lambda p, g, w=weights: p - 0.1 * np.tensordot(w, np.float64(g), 1),
            params,
            rows,
        )
    assert_close(flat(ours), flat(params), 1e-5)
    assert get(state, "weighting") == 3


def products(jaxpr):
    """The number of matrix products, those of inner programs included."""
    return sum(e.primitive.name == "dot_general" for e in laws.equations(jaxpr))


@pytest.mark.parametrize(("given", "depth"), [("count", 2), ("step", 1)])
def test_vmap_over_seeds_keeps_the_cond(given, depth):
    """Members in one rhythm: a real `cond`, with one predicate for all."""
    tx = mtl.update_every(by_norm(T), K)

    def step(params, state, x, number):
        extra = {"step": number} if given == "step" else {}
        _, lazy = mtl.task_jacobian(lazy_losses)(params, x)
        updates, state = tx.update(lazy, state, params, **extra)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    many, members = step, (4, 2)[:depth]
    starts = jax.tree.map(
        lambda p: p + 0.3 * normal((*members, *p.shape), p.ndim), PARAMS
    )
    init = tx.init
    for _ in members:
        many = jax.vmap(many, in_axes=(0, 0, None, None))
        init = jax.vmap(init)
    args = (starts, init(starts), X[0], jnp.int32(0))
    jaxpr = jax.make_jaxpr(many)(*args).jaxpr
    (cond,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert cond.invars[0].aval.shape == ()
    # The Gramian's backward passes stand in one branch, and nowhere else.
    keep, make = (products(branch.jaxpr) for branch in cond.params["branches"])
    assert keep == 0
    assert make > 0
    outside = products(jaxpr) - make

    def plain(params):
        return jax.grad(lambda p: sum(lazy_losses(p, X[0])))(params)

    wanted = jax.make_jaxpr(functools.reduce(lambda f, _: jax.vmap(f), members, plain))
    assert outside == products(wanted(starts).jaxpr)
    assert " conditional(" in jax.jit(many).lower(*args).compile().as_text()

    # And the result is that of a run by itself.
    compiled, alone = laws.quick_jit(many), laws.quick_jit(step)
    place = (1,) * depth
    own, mine = jax.tree.map(lambda p: p[place], starts), tx.init(PARAMS)
    params, state = args[:2]
    for s in range(5):
        params, state = compiled(params, state, X[s], s)
        own, mine = alone(own, mine, X[s], s)
        assert_close(flat(jax.tree.map(lambda p: p[place], params)), flat(own), 1e-6)
        weights = get(state, "task_weights")[place]
        assert_close(weights, get(mine, "task_weights"), 1e-5)


def test_members_out_of_rhythm():
    """Masks of their own: who needs no new weights keeps the old ones."""
    tx = mtl.update_every(by_norm(T), K)
    rng = np.random.default_rng(4)
    masks = jnp.asarray(rng.uniform(size=(STEPS, 4, T)) < 0.8)
    masks = masks.at[:, 0].set(True)

    def step(state, rows, mask):
        return tx.update(rows, state, PARAMS, task_mask=mask)

    many = laws.quick_jit(jax.vmap(step, in_axes=(0, None, 0)))
    alone = laws.quick_jit(step)
    together = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(4))
    single = [tx.init(PARAMS)] * 4
    for s in range(STEPS):
        ours, together = many(together, rows_at(s), masks[s])
        for i in range(4):
            wanted, single[i] = alone(single[i], rows_at(s), masks[s, i])
            assert_close(flat(jax.tree.map(lambda u, i=i: u[i], ours)), flat(wanted))
    assert get(single[0], "weighting") == 3
    np.testing.assert_array_equal(
        get(together, "weighting"), [get(one, "weighting") for one in single]
    )


def test_weights_are_constants_to_whoever_differentiates():
    tx = mtl.update_every(by_norm(T), 2)

    def second_update(scale):
        state = tx.init(PARAMS)
        for s in range(2):
            rows = jax.tree.map(lambda g: scale * g, rows_at(s))
            updates, state = tx.update(rows, state, PARAMS)
        return updates

    slopes = laws.quick_jit(jax.jacfwd(second_update))(2.0)
    assert_close(flat(slopes), unit_sum(rows_at(1), rows_at(0)) / 2)
    total = laws.quick_jit(
        jax.grad(lambda s: sum(jnp.sum(u) for u in second_update(s).values()))
    )(2.0)
    assert_close(total, flat(slopes).sum(), 1e-5)


# ------------------------------------------------------------------------ what it costs


def flops(function, *args):
    cost = jax.jit(function).lower(*args).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_skipped_step_costs_what_plain_training_costs(shared):
    tasks, width = 6, 96
    params = {"heads": jnp.ones((width, tasks)), "trunk": jnp.ones((2, width, width))}
    x, y = normal((32, width), 1), normal((32, tasks), 2)

    def losses(params):
        h = x
        for layer in params["trunk"]:
            h = jnp.tanh(h @ layer)
        return jnp.mean((h @ params["heads"] - y) ** 2, axis=0)

    tx = mtl.update_every(by_norm(tasks), 5)
    if shared:
        tx = mtl.shared_only(tx, {"heads": False, "trunk": True})

    def step(phase, params):
        # A state known to the compiler: it leaves the branch away that is not taken.
        state = tx.init(params)
        own = getattr(state, "shared", state)
        own = own._replace(phase=jnp.int32(phase), made_for=jnp.ones(tasks, bool))
        state = state._replace(shared=own) if shared else own
        _, lazy = mtl.task_jacobian(losses)(params)
        return tx.update(lazy, state, params)[0]

    plain = flops(jax.grad(lambda p: jnp.sum(losses(p))), params)
    assert flops(functools.partial(step, 1), params) < 1.02 * plain
    assert flops(functools.partial(step, 0), params) > 1.5 * plain


# ---------------------------------------------------------------------- wrappers around


def test_inside_shared_only_and_a_chain():
    mask = {"b": False, "w": True}
    tx = optax.chain(
        mtl.shared_only(mtl.update_every(by_norm(T), 2), mask), optax.adam(0.1)
    )
    mtl.check_chain(tx, PARAMS, T)
    adam = optax.adam(0.1)
    state, own = tx.init(PARAMS), adam.init(PARAMS)
    update = laws.quick_jit(tx.update)
    for s in range(4):
        rows, made = rows_at(s), rows_at(s - s % 2)
        weights = 1 / np.linalg.norm(flat(made["w"], T), axis=1)
        combined = {
            "b": rows["b"].sum(0),
            "w": jnp.asarray(np.tensordot(weights, rows["w"], 1), jnp.float32),
        }
        wanted, own = adam.update(combined, own, PARAMS)
        ours, state = update(rows, state, PARAMS, losses=losses_at(s))
        assert_close(flat(ours), flat(wanted), 1e-4)
    assert get(state, "count") == 4
    for name in ("task_weights", "kept_weights", "phase", "made_for"):
        assert len(optax.tree_utils.tree_get_all_with_path(state, name)) == 1


def test_inside_per_group():
    tx = mtl.per_group(mtl.update_every(by_norm(T), 2), {"b": 1, "w": 2})
    state = tx.init(PARAMS)
    update = laws.quick_jit(tx.update)
    for s in range(3):
        updates, state = update(rows_at(s), state, PARAMS)
        for name in PARAMS:
            own, made = (rows_at(n)[name] for n in (s, s - s % 2))
            assert_close(flat(updates[name]), unit_sum(own, made))


@pytest.mark.parametrize("form", ["stacked", "lazy"])
def test_inside_skip_nonfinite_tasks(form):
    """A task that breaks between two turns is left out at once, and taken in again."""
    tx = mtl.skip_nonfinite_tasks(mtl.update_every(by_norm(T), 4))

    def losses(params, rows, broken):
        inner = jax.tree.map(lambda p, g: jnp.tensordot(g, p, p.ndim), params, rows)
        each = list(inner["b"] + inner["w"])
        each[1] = each[1] * jnp.where(broken, jnp.inf, 1)
        return tuple(each)

    def given(rows, broken):
        if form == "lazy":
            return mtl.task_jacobian(losses)(MOVED, rows, broken)[1]
        bad = jnp.where(broken, jnp.nan, 0)
        return rows | {"w": rows["w"].at[1].add(bad)}

    @laws.quick_jit
    def step(state, rows, broken):
        return tx.update(given(rows, broken), state, PARAMS)

    state = tx.init(PARAMS)
    made, before = 0, False
    for s, broken in enumerate((False, True, True, False, False, False, True)):
        updates, state = step(state, rows_at(s), broken)
        if s % 4 == 0 or broken != before:
            made = s
        before = broken
        present = (0, 2) if broken else (0, 1, 2)
        assert_close(flat(updates), unit_sum(rows_at(s), rows_at(made), present))
    assert state.info.skipped_tasks.tolist() == [0, 3, 0]


def test_a_broken_first_step_is_no_step():
    tx = mtl.skip_nonfinite_tasks(mtl.update_every(by_norm(T), 4))
    broken = jax.tree.map(lambda g: g * jnp.nan, rows_at(0))
    updates, state = laws.quick_jit(tx.update)(broken, tx.init(PARAMS), PARAMS)
    assert not np.any(flat(updates))
    (first, second), state = run(tx, (1, 2), state)
    assert_close(first, unit_sum(rows_at(1)))
    assert_close(second, unit_sum(rows_at(2), rows_at(1)))
    assert state.info.skipped_steps == 1


def test_hyper_parameters_may_follow_a_schedule():
    """Scheduled outside; new values count when weights are made."""

    def times(c):
        def update(gramian, state, *, losses, task_mask, **extra):
            return jnp.full(T, c), state

        method = mtl.Weighting(lambda n, dtype: (), update, frozenset())
        return mtl.update_every(mtl.from_weighting(method, T), 2)

    tx = optax.inject_hyperparams(times)(c=lambda count: 1.0 + count)
    out, _ = run(tx, range(4))
    for s, c in enumerate((1, 1, 3, 3)):
        assert_close(out[s], c * flat(rows_at(s), T).sum(0))


# --------------------------------------------------------------------------------- laws


@functools.cache
def kept(name, k=3):
    """The row of a method whose combiner is wrapped."""
    row = mtl.METHODS[name]

    @functools.wraps(row.factory)
    def factory(num_tasks, **options):
        return mtl.update_every(row.factory(num_tasks=num_tasks, **options), k)

    return row._replace(factory=factory)


four = pytest.mark.parametrize("name", ["imtl_g", "rlw", "mgda", "task_tensioner"])


@four
def test_types(name):
    for kind in ("float32", "bfloat16", "mixed"):
        laws.check_types(kept(name), kind)


@four
def test_types_in_float64(name, x64):
    laws.check_types(kept(name), "float64")


@four
def test_refuses_wrong_input(name):
    laws.check_wrong_input(kept(name))


@pytest.mark.parametrize("name", ["imtl_g", pytest.param("task_tensioner", marks=SLOW)])
def test_compiles_once_with_donation_and_continues_from_a_checkpoint(name):
    laws.check_compiles_once(kept(name))
    laws.check_restored(
        kept(name), lambda state: jax.tree.map(lambda x: jnp.array(np.array(x)), state)
    )


@pytest.mark.parametrize("form", [laws.Forms("dict"), laws.Forms("array", masked=True)])
@pytest.mark.parametrize("name", ["imtl_g", pytest.param("mgda", marks=SLOW)])
def test_stacked_is_lazy(name, form):
    laws.check_lazy(kept(name), form)


@pytest.mark.parametrize(
    "name", ["imtl_g", "rlw", pytest.param("task_tensioner", marks=SLOW)]
)
def test_finite_and_absent(name):
    laws.check_finite(kept(name), 3)
    if "key" not in mtl.METHODS[name].needs:
        laws.check_absent(kept(name))


@pytest.mark.parametrize("name", ["imtl_g", pytest.param("upgrad", marks=SLOW)])
def test_claims_that_kept_weights_keep(name):
    laws.check_claim(kept(name), "permutation_equivariant", 3)


def test_one_task():
    laws.check_one_task(kept("imtl_g"))


# ---------------------------------------------------------------------------- wrong use


@pytest.mark.parametrize(
    ("tx", "words"),
    [
        (mtl.scale_by_mao(T), r"no weights to keep.*shared_only\(update_every"),
        (mtl.priority_projection(T), "A method on whole rows"),
        (mtl.sum_tasks(T), "sum_tasks"),
        (mtl.shared_only(mtl.edm(T), True), "of a wrapper put it inside"),
        (mtl.skip_nonfinite_tasks(mtl.edm(T)), "of a wrapper put it inside"),
        (mtl.gradvac(T, group="layer"), "no weights to keep"),
        (mtl.update_every(mtl.edm(T), 2), "and once"),
        (optax.chain(mtl.edm(T), optax.sgd(1.0)), r"chain\(update_every\(edm"),
        (mtl.edm, "must be a combiner"),
    ],
)
def test_what_cannot_be_wrapped(tx, words):
    with pytest.raises(TypeError, match=words):
        mtl.update_every(tx, 3)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (0, ValueError, "k must be at least 1, got 0"),
        (-3, ValueError, "k must be at least 1, got -3"),
        (True, TypeError, "k must be an int, got bool"),
        (2.0, TypeError, "k must be an int, got float"),
        (None, TypeError, "k must be an int, got NoneType"),
        (jnp.array(2), TypeError, "k must be a Python int, got an array"),
    ],
)
def test_k_must_be_a_positive_int(k, error, words):
    with pytest.raises(error, match=words):
        mtl.update_every(mtl.edm(T), k)


@pytest.mark.parametrize("step", [1.0, True, jnp.ones(1, jnp.int32), jnp.bool_(0)])
def test_step_must_be_an_integer(step):
    tx = mtl.update_every(mtl.mean(T), 2)
    with pytest.raises(TypeError, match="step must be an integer scalar"):
        tx.update(rows_at(0), tx.init(PARAMS), PARAMS, step=step)


def test_it_cannot_be_taken_to_pieces_again():
    tx = mtl.update_every(mtl.edm(T, scale="sum"), 2)
    assert isinstance(tx, mtl.Combiner)
    assert (tx.num_tasks, tx.weighting, tx.scale) == (T, None, "sum")


def test_a_random_method_asks_for_its_key_at_every_step():
    tx = mtl.update_every(mtl.rlw(T), 3)
    _, state = tx.update(rows_at(0), tx.init(PARAMS), PARAMS, key=jax.random.key(0))
    with pytest.raises(TypeError, match="random"):
        tx.update(rows_at(1), state, PARAMS)


def test_a_state_made_before_wrapping_is_refused():
    tx = mtl.edm(num_tasks=2)
    grads = jnp.eye(2)
    with pytest.raises(TypeError, match=r"expected an UpdateEveryState.*wrapped"):
        mtl.update_every(tx, 3).update(grads, tx.init(jnp.zeros(2)))
