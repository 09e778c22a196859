"""`shared_only`, `skip_nonfinite_tasks`, and hyper-parameters as state."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl


def normal(shape, seed):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, jnp.float32)


def assert_trees_close(ours, wanted, tolerance=1e-5):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def assert_trees_equal(ours, wanted):
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


def zeros_like(tree):
    return jax.tree.map(jnp.zeros_like, tree)


class History(NamedTuple):
    seen: jax.Array
    norms: jax.Array


def by_norm(num_tasks):
    """Unit gradients, summed: a method that compiles fast and is easy to check."""

    def init(num_tasks, dtype):
        return History(jnp.zeros(num_tasks, jnp.int32), jnp.zeros(num_tasks, dtype))

    def update(gramian, state, *, losses, task_mask, **extra):
        norms = jnp.where(task_mask, jnp.sqrt(jnp.diag(gramian)), state.norms)
        weights = jnp.where(task_mask, 1 / norms, 0)
        return weights, History(state.seen + task_mask.astype(jnp.int32), norms)

    return mtl.from_weighting(
        mtl.Weighting(init, update, frozenset({"gramian"})), num_tasks
    )


PARAMS = {
    "a": normal((3,), 1),
    "b": normal((3,), 2),
    "trunk": {"b": normal((3,), 3), "w": normal((4, 3), 4)},
}
X = normal((5, 4), 5)
MASK = {"a": False, "b": False, "trunk": {"b": True, "w": True}}


def loss_fn(p, x=X):
    h = jnp.tanh(x @ p["trunk"]["w"] + p["trunk"]["b"])
    return {"a": jnp.mean((h @ p["a"] - 1) ** 2), "b": 9 * jnp.mean(h @ p["b"])}


@functools.cache
def stacked_grads():
    rows = jax.jacrev(loss_fn)(PARAMS)
    return jax.tree.map(lambda a, b: jnp.stack([a, b]), rows["a"], rows["b"])


def update(tx, form, state=None, **extra):
    """One step of `tx` at PARAMS, on either form of task gradients."""
    state = tx.init(PARAMS) if state is None else state
    if form == "stacked":
        extra["losses"] = jnp.stack(jax.tree.leaves(loss_fn(PARAMS)))
        return laws.quick_jit(tx.update)(stacked_grads(), state, PARAMS, **extra)

    def step(state, extra):
        _, lazy = mtl.task_jacobian(loss_fn)(PARAMS)
        return tx.update(lazy, state, PARAMS, **extra)

    return laws.quick_jit(step)(state, extra)


FORMS = pytest.mark.parametrize("form", ["stacked", "lazy"])


# -------------------------------------------------------------------------- shared_only


MASKS = {
    "tree": MASK,
    "prefix": {"a": False, "b": False, "trunk": True},
    "function": lambda params: {k: k == "trunk" for k in params},
    "numpy bools": jax.tree.map(np.bool_, MASK),
}


@FORMS
@pytest.mark.parametrize("name", MASKS)
def test_shared_only_balances_the_trunk_and_sums_the_heads(form, name):
    ours, _ = update(mtl.shared_only(by_norm(2), MASKS[name]), form)
    # Heads as in plain training, ...
    plain = jax.tree.map(lambda g: g.sum(0), stacked_grads())
    assert_trees_close([ours["a"], ours["b"]], [plain["a"], plain["b"]])
    # ... and the trunk over the trunk alone.
    g = {k: np.float64(v) for k, v in stacked_grads()["trunk"].items()}
    na, nb = np.sqrt(sum((v.reshape(2, -1) ** 2).sum(1) for v in g.values()))
    trunk = {k: v[0] / na + v[1] / nb for k, v in g.items()}
    assert_trees_close(ours["trunk"], trunk)


@FORMS
def test_shared_only_is_partition_with_sum_tasks(form):
    labels = jax.tree.map(lambda m: "shared" if m else "heads", MASK)
    by_partition = optax.partition(
        {"shared": mtl.edm(2), "heads": mtl.sum_tasks()}, labels
    )
    ours, _ = update(mtl.shared_only(mtl.edm(2), MASK), form)
    wanted, _ = update(by_partition, form)
    assert_trees_close(ours, wanted)


@FORMS
def test_all_shared_is_the_combiner_itself(form):
    everything = jax.tree.map(lambda _: True, MASK)
    ours, state = update(mtl.shared_only(by_norm(2), everything), form)
    wanted, inner = update(by_norm(2), form)
    assert_trees_close(ours, wanted)
    assert_trees_close(state.shared, inner)


@pytest.mark.parametrize("mask", [False, lambda p: jax.tree.map(lambda _: False, p)])
def test_a_mask_that_marks_nothing_is_refused(mask):
    tx = mtl.shared_only(by_norm(2), mask)
    with pytest.raises(ValueError, match=r"marks no leaf as shared.*sum_tasks"):
        tx.init(PARAMS)
    good = mtl.shared_only(by_norm(2), True).init(PARAMS)
    with pytest.raises(ValueError, match="marks no leaf as shared"):
        tx.update(stacked_grads(), good, PARAMS)


@FORMS
def test_shared_only_around_a_chain(form):
    with pytest.warns(UserWarning, match=r"put it after, as in chain\(shared_only"):
        tx = mtl.shared_only(optax.chain(by_norm(2), optax.scale(-2.0)), MASK)
    ours, _ = update(tx, form)
    plain, _ = update(mtl.shared_only(by_norm(2), MASK), form)
    assert_trees_close(ours["trunk"], jax.tree.map(lambda u: -2 * u, plain["trunk"]))
    assert_trees_equal(ours["a"], plain["a"])


@pytest.mark.parametrize(
    ("tx", "mask", "error", "words"),
    [
        (mtl.mean(2), {"trunk": "shared", "a": "head"}, TypeError, "bools.*'head'"),
        (mtl.mean(2), {"trunk": 1, "a": 0}, TypeError, "must hold bools"),
        (mtl.mean(2), {"trunk": True, "wrong": False}, ValueError, "like the param"),
        (MASK, mtl.mean(2), TypeError, "must be an optax transform"),
        (
            mtl.skip_nonfinite_tasks(mtl.mean(2)),
            MASK,
            ValueError,
            r"write skip_nonfinite_tasks\(shared_only\(combiner, mask\)\)",
        ),
    ],
)
def test_shared_only_refuses_in_words(tx, mask, error, words):
    with pytest.raises(error, match=words):
        mtl.shared_only(tx, mask).init(PARAMS)


def test_a_mask_of_an_nnx_state_serves_its_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.trunk = nnx.Linear(2, 3, rngs=rngs)
            self.heads = nnx.Dict(
                {name: nnx.Linear(3, 1, rngs=rngs) for name in ("a", "b")}
            )

    model = Net(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)

    def losses(params, x):
        net = nnx.merge(graph, params, copy=True)
        h = jnp.tanh(net.trunk(x))
        return {name: jnp.mean((head(h) - 1) ** 2) for name, head in net.heads.items()}

    x = jnp.arange(8.0).reshape(4, 2) / 8
    mask = mtl.shared_mask(losses, params, x)
    tx = optax.chain(mtl.shared_only(mtl.edm(2), mask), optax.sgd(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        values, task_grads = mtl.task_jacobian(losses)(nnx.state(model, nnx.Param), x)
        optimizer.update(model, task_grads, losses=values)
        return values

    plain = jax.grad(lambda p: sum(losses(p, x).values()))(params)
    params = jax.tree.map(jnp.array, params)  # the model shares its arrays' holders
    step(model, optimizer, x)
    moved = nnx.state(model, nnx.Param)
    for name in ("a", "b"):  # a head takes a plain gradient step
        for leaf in ("kernel", "bias"):
            old, grad = (tree["heads"][name][leaf][...] for tree in (params, plain))
            new = moved["heads"][name][leaf][...]
            np.testing.assert_allclose(new, old - 0.1 * grad, rtol=1e-5, atol=1e-7)


def test_shared_only_without_params():
    tx = mtl.shared_only(by_norm(2), MASK)
    ours, _ = tx.update(stacked_grads(), tx.init(PARAMS))
    wanted, _ = update(tx, "stacked")
    assert_trees_close(ours, wanted)


@FORMS
def test_shared_only_passes_the_task_mask_on(form):
    only_b = jnp.array([False, True])
    ours, _ = update(mtl.shared_only(mtl.mean(2), MASK), form, task_mask=only_b)
    wanted = jax.grad(lambda p: loss_fn(p)["b"])(PARAMS)
    assert_trees_close(ours, wanted)


def test_the_history_inside_shared_only_is_of_the_shared_leaves():
    _, state = update(mtl.shared_only(by_norm(2), MASK), "stacked")
    g = stacked_grads()["trunk"]
    squares = sum(np.sum(np.float64(v).reshape(2, -1) ** 2, 1) for v in g.values())
    norms = optax.tree_utils.tree_get(state, "norms")
    np.testing.assert_allclose(norms, np.sqrt(squares), rtol=1e-5)


def test_shared_only_explains_wrong_structure_and_shape():
    tx = mtl.shared_only(by_norm(2), MASK)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="structure of the parameters"):
        tx.update({"trunk": stacked_grads()["trunk"]}, state, PARAMS)
    reduced = jax.grad(lambda p: sum(loss_fn(p).values()))(PARAMS)
    with pytest.raises(ValueError, match=r"\['trunk'\].*already reduced"):
        tx.update(reduced, state, PARAMS)
    head_reduced = stacked_grads() | {"a": reduced["a"]}
    with pytest.raises(ValueError, match=r"\['a'\].*already reduced|expected shape"):
        tx.update(head_reduced, state, PARAMS)


# ----------------------------------------------------------------- skip_nonfinite_tasks


METHODS = {
    "by_norm": by_norm,
    "mean": mtl.mean,
    "mgda": mtl.mgda,
    "edm": mtl.edm,
    "task_tensioner": mtl.task_tensioner,
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("by_norm", np.nan),
        ("by_norm", np.inf),
        ("by_norm", -np.inf),
        ("mean", np.nan),
        ("mgda", np.nan),
        pytest.param("edm", np.inf, marks=SLOW),
        pytest.param("task_tensioner", np.nan, marks=SLOW),
    ],
)
def test_a_broken_stacked_row_is_left_out(name, bad):
    tx = mtl.skip_nonfinite_tasks(METHODS[name](num_tasks=3))
    params = {"w": jnp.zeros(4), "s": jnp.zeros(())}
    good = {"w": normal((3, 4), 1), "s": normal((3,), 2)}
    broken = {"w": good["w"].at[1, 2].set(bad), "s": good["s"]}
    losses = jnp.array([1.0, 2.0, 3.0])
    step = laws.quick_jit(tx.update)
    ours, state = step(broken, tx.init(params), params, losses=losses)
    # As if the task did not exist.
    two = METHODS[name](num_tasks=2)
    rest = jax.tree.map(lambda g: g[jnp.array([0, 2])], good)
    wanted, _ = two.update(rest, two.init(params), params, losses=losses[::2])
    assert_trees_close(ours, wanted)
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    assert state.info.skipped_steps == 0
    # Whole steps are left alone.
    plain = METHODS[name](num_tasks=3)
    ours, state = step(good, state, params, losses=losses)
    if name != "task_tensioner":  # its history already differs
        wanted, _ = plain.update(good, plain.init(params), params, losses=losses)
        assert_trees_close(ours, wanted)
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]


def test_a_loss_that_is_not_finite_breaks_its_task():
    tx = mtl.skip_nonfinite_tasks(mtl.mean(2))
    g = {"w": jnp.array([[2.0], [4.0]])}
    state = tx.init({"w": jnp.zeros(1)})
    updates, state = tx.update(g, state, losses=jnp.array([jnp.inf, 1.0]))
    np.testing.assert_array_equal(updates["w"], [4.0])
    updates, state = tx.update(g, state, losses={"a": 1.0, "b": jnp.nan})
    np.testing.assert_array_equal(updates["w"], [2.0])
    assert state.info.skipped_tasks.tolist() == [1, 1]


# How one task breaks: (its loss of the features h [5, 3], the data that breaks it, data
# that does not). All of these poison a joint backward pass.
BREAKS = {
    "log of zero": (lambda h, x: jnp.log(x * h.sum() ** 2), 0.0, 1.0),
    "square root of zero": (lambda h, x: jnp.sqrt(jnp.sum((h * x) ** 2)), 0.0, 1.0),
    "a label that is NaN": (lambda h, x: jnp.mean((h[:, 0] - x) ** 2), np.nan, 1.0),
    "a mean over nothing": (lambda h, x: jnp.sum(h * x) / jnp.sum(x), 0.0, 1.0),
    "overflow": (lambda h, x: jnp.sum(h * x) ** 2, 3e38, 1.0),
}
SHARED = {"unused": jnp.zeros(2), "w": normal((4, 3), 6)}


def with_break(name, form):
    breaks = BREAKS[name][0]

    def loss_fn(p, x):
        h = jnp.tanh(X @ p["w"])
        losses = {
            "a": jnp.mean(h[:, 0] ** 2),
            "broken": breaks(h, x),
            "c": jnp.mean(jnp.cos(h[:, 1])),
        }
        return losses if form == "dict" else jnp.stack(list(losses.values()))

    return loss_fn


def stepper(tx, loss_fn, compiled=True):
    def step(params, state, x, task_mask=None):
        _, lazy = mtl.task_jacobian(loss_fn)(params, x)
        extra = {} if task_mask is None else {"task_mask": task_mask}
        return tx.update(lazy, state, params, **extra)

    return laws.quick_jit(step) if compiled else step


def unit_gradients(loss_fn, x, names=("a", "c")):
    """The sum of unit gradients, each from its own loss alone."""
    total = 0
    for name in names:
        grad = jax.grad(lambda p, name=name: loss_fn(p, x)[name])(SHARED)
        flat = np.concatenate([np.ravel(g).astype(np.float64) for g in grad.values()])
        total = total + flat / np.linalg.norm(flat)
    return total


def assert_is(updates, flat):
    """Equal to one long vector, in the order of the leaves."""
    ours = np.concatenate([np.ravel(u) for u in jax.tree.leaves(updates)])
    order = np.concatenate([np.full(v.size, k) for k, v in SHARED.items()])
    sorted_keys = np.concatenate([flat[order == k] for k in sorted(SHARED)])
    np.testing.assert_allclose(ours, sorted_keys, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_loss_of_a_dict_is_left_out(name):
    loss_fn, bad, good = with_break(name, "dict"), *BREAKS[name][1:]
    _, lazy = jax.vjp(lambda p: jnp.stack(list(loss_fn(p, bad).values())), SHARED)
    poisoned = lazy(jnp.array([1.0, 0.0, 1.0]))[0]["w"]
    assert not np.all(np.isfinite(poisoned)), "the case is no test"

    tx = mtl.skip_nonfinite_tasks(by_norm(num_tasks=3))
    step = stepper(tx, loss_fn)
    updates, state = step(SHARED, tx.init(SHARED), bad)
    assert_is(updates, unit_gradients(loss_fn, bad))
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    assert state.info.skipped_steps == 0
    # Nothing is left out once the task is whole again.
    updates, state = step(SHARED, state, good)
    assert_is(updates, unit_gradients(loss_fn, good, ("a", "broken", "c")))
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    assert state.inner.weighting.seen.tolist() == [2, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "mean",
        pytest.param("mgda", marks=SLOW),
        pytest.param("edm", marks=SLOW),
        pytest.param("task_tensioner", marks=SLOW),
    ],
)
def test_every_method_survives_a_poisoned_backward_pass(name):
    loss_fn, bad, _ = with_break("log of zero", "dict"), *BREAKS["log of zero"][1:]
    tx = mtl.skip_nonfinite_tasks(METHODS[name](num_tasks=3))
    updates, state = stepper(tx, loss_fn)(SHARED, tx.init(SHARED), bad)
    rows = [jax.grad(lambda p, n=n: loss_fn(p, bad)[n])(SHARED) for n in ("a", "c")]
    losses = jnp.stack([loss_fn(SHARED, bad)[n] for n in ("a", "c")])
    two = METHODS[name](num_tasks=2)
    wanted, _ = two.update(mtl.stack_tasks(rows), two.init(SHARED), losses=losses)
    assert_trees_close(updates, wanted)
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]


def test_an_array_of_losses_that_is_where_safe_is_masked():
    def loss_fn(p, x):
        h = jnp.tanh(X @ p["w"])
        safe = jnp.where(x > 0, x, 1.0)  # guards the argument, not the result
        b = jnp.where(x > 0, jnp.log(safe * jnp.sum(h**2)), jnp.nan)
        return jnp.stack([jnp.mean(h[:, 0] ** 2), b, jnp.mean(jnp.cos(h[:, 1]))])

    tx = mtl.skip_nonfinite_tasks(by_norm(3))
    updates, state = stepper(tx, loss_fn)(SHARED, tx.init(SHARED), 0.0)
    as_dict = lambda p, x: dict(zip("abc", loss_fn(p, x), strict=True))  # noqa: E731
    assert_is(updates, unit_gradients(as_dict, 0.0))
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    assert state.info.skipped_steps == 0


@pytest.mark.parametrize("name", ["log of zero", "square root of zero"])
def test_an_array_of_losses_that_is_poisoned_skips_the_step(name):
    loss_fn, bad, good = with_break(name, "array"), *BREAKS[name][1:]
    tx = mtl.skip_nonfinite_tasks(by_norm(3))
    step = stepper(tx, loss_fn)
    _, before = step(SHARED, tx.init(SHARED), good)
    updates, after = step(SHARED, before, bad)
    assert_trees_equal(updates, zeros_like(SHARED))
    assert_trees_equal(after.inner, before.inner)
    assert before.info.skipped_steps == 0
    assert after.info.skipped_steps == 1


@pytest.mark.parametrize("form", ["dict", "array"])
def test_all_tasks_broken(form):
    def loss_fn(p, x):
        a, b = jnp.sum(p["w"] * x), jnp.sum(p["w"] ** 2 * x)
        return {"a": a, "b": b} if form == "dict" else jnp.stack([a, b])

    tx = mtl.skip_nonfinite_tasks(by_norm(2))
    step = stepper(tx, loss_fn)
    _, before = step(SHARED, tx.init(SHARED), 1.0)
    updates, after = step(SHARED, before, jnp.nan)
    assert_trees_equal(updates, zeros_like(SHARED))
    assert_trees_equal(after.inner, before.inner)
    assert after.info.skipped_tasks.tolist() == [1, 1]
    assert after.info.skipped_steps == 1


def test_one_batch_a_task_isolates_by_itself():
    def loss_fn(w, x):
        return jnp.log(jnp.sum((w * x) ** 2))

    xs = jnp.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    w = jnp.array([1.0, -1.0])
    tx = mtl.skip_nonfinite_tasks(mtl.mean(3))

    @laws.quick_jit
    def step(w, state):
        _, lazy = mtl.task_jacobian(loss_fn, in_axes=(None, 0))(w, xs)
        return tx.update(lazy, state, w)

    updates, state = step(w, tx.init(w))
    wanted = (jax.grad(loss_fn)(w, xs[0]) + jax.grad(loss_fn)(w, xs[2])) / 2
    np.testing.assert_allclose(updates, wanted, rtol=1e-5)
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]


def test_inside_scan_and_vmap():
    name = "log of zero"
    loss_fn = with_break(name, "dict")
    tx = optax.chain(mtl.skip_nonfinite_tasks(by_norm(3)), optax.sgd(0.1))
    step = stepper(tx, loss_fn)
    inner = stepper(tx, loss_fn, compiled=False)

    def train(xs):
        def body(carry, x):
            params, state = carry
            updates, state = inner(params, state, x)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (SHARED, tx.init(SHARED)), xs)[0]

    xs = jnp.array([[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    params, state = laws.quick_jit(jax.vmap(train))(xs)
    assert np.all(np.isfinite(params["w"]))
    skipped = optax.tree_utils.tree_get(state, "skipped_tasks")
    np.testing.assert_array_equal(skipped, [[0, 2, 0], [0, 0, 0]])
    # Histories count per task: an absent one does not move.
    seen = optax.tree_utils.tree_get(state, "seen")
    np.testing.assert_array_equal(seen, [[4, 2, 4], [4, 4, 4]])
    # The same, step by step.
    for i in range(2):
        one = SHARED, tx.init(SHARED)
        for x in xs[i]:
            updates, new = step(*one, x)
            one = optax.apply_updates(one[0], updates), new
        np.testing.assert_allclose(params["w"][i], one[0]["w"], rtol=1e-4, atol=1e-6)


def test_wrapped_around_a_whole_chain():
    loss_fn = with_break("log of zero", "array")
    tx = mtl.skip_nonfinite_tasks(optax.chain(by_norm(3), optax.adam(0.1)), num_tasks=3)
    outside = optax.chain(mtl.skip_nonfinite_tasks(by_norm(3)), optax.adam(0.1))
    step, other = stepper(tx, loss_fn), stepper(outside, loss_fn)
    _, state = step(SHARED, tx.init(SHARED), 1.0)
    updates, after = step(SHARED, state, 0.0)
    assert_trees_equal(updates, zeros_like(SHARED))
    assert optax.tree_utils.tree_get(after, "count") == 1
    assert optax.tree_utils.tree_get(after, "skipped_steps") == 1
    # Adam outside moves the parameters by its momentum, as documented.
    _, state = other(SHARED, outside.init(SHARED), 1.0)
    updates, state = other(SHARED, state, 0.0)
    assert np.any(updates["w"] != 0)
    assert optax.tree_utils.tree_get(state, "count") == 2
    assert optax.tree_utils.tree_get(state, "skipped_steps") == 1


def test_an_absent_task_is_not_counted_as_skipped():
    tx = mtl.skip_nonfinite_tasks(mtl.mean(3))
    g = {"w": jnp.array([[2.0], [jnp.nan], [4.0]])}
    params = {"w": jnp.zeros(1)}
    without = jnp.array([True, False, True])
    updates, state = tx.update(g, tx.init(params), params, task_mask=without)
    np.testing.assert_array_equal(updates["w"], [3.0])
    assert state.info.skipped_tasks.tolist() == [0, 0, 0]
    without = jnp.array([False, True, True])
    updates, state = tx.update(g, state, params, task_mask=without)
    np.testing.assert_array_equal(updates["w"], [4.0])
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    updates, state = tx.update(g, state, params, task_mask=jnp.zeros(3, bool))
    np.testing.assert_array_equal(updates["w"], [0.0])
    assert state.info.skipped_steps == 1


def test_a_mask_and_a_poisoned_backward_pass():
    loss_fn = with_break("log of zero", "dict")
    tx = mtl.skip_nonfinite_tasks(mtl.mean(3))
    step = stepper(tx, loss_fn)
    only_a = jnp.array([True, True, False])
    updates, state = step(SHARED, tx.init(SHARED), 0.0, only_a)
    wanted = jax.grad(lambda p: loss_fn(p, 0.0)["a"])(SHARED)
    assert_trees_close(updates, wanted)
    assert state.info.skipped_tasks.tolist() == [0, 1, 0]
    # Absent and broken: not counted, and still not let in.
    updates, state = step(SHARED, tx.init(SHARED), 0.0, jnp.array([True, False, False]))
    assert_trees_close(updates, wanted)
    assert state.info.skipped_tasks.tolist() == [0, 0, 0]


def test_with_shared_only():
    tx = mtl.skip_nonfinite_tasks(mtl.shared_only(mtl.mean(2), MASK))
    g = stacked_grads()
    g = g | {"trunk": g["trunk"] | {"b": g["trunk"]["b"].at[0, 0].set(jnp.nan)}}
    updates, state = tx.update(g, tx.init(PARAMS), PARAMS)
    wanted = jax.grad(lambda p: loss_fn(p)["b"])(PARAMS)
    assert_trees_close(updates, wanted)
    assert state.info.skipped_tasks.tolist() == [1, 0]


def test_the_number_of_tasks_must_be_known():
    chain = optax.chain(mtl.edm(2), optax.sgd(0.1))
    with pytest.raises(TypeError, match="num_tasks must be given"):
        mtl.skip_nonfinite_tasks(chain)
    tx = mtl.skip_nonfinite_tasks(chain, num_tasks=3)
    with pytest.raises(ValueError, match=r"expected shape \(3, 1\)"):
        tx.update(
            {"w": jnp.ones((2, 1))}, tx.init({"w": jnp.ones(1)}), {"w": jnp.ones(1)}
        )


def test_a_skipping_step_costs_little_while_all_is_well():
    # The fallback stands inside a `cond`: once traced, not run.
    loss_fn = with_break("log of zero", "dict")
    tx = mtl.skip_nonfinite_tasks(mtl.mean(3))
    step = stepper(tx, loss_fn, compiled=False)
    jaxpr = jax.make_jaxpr(step)(SHARED, tx.init(SHARED), 1.0)
    assert " cond[" in str(jaxpr)


# ------------------------------------------------------------ hyper-parameters as state


def test_alpha_as_an_injected_hyper_parameter():
    make = optax.inject_hyperparams(
        mtl.task_tensioner, static_args=("num_tasks", "window")
    )
    tx = make(num_tasks=2, alpha=0.3, window=1)
    g, losses = {"w": normal((2, 4), 1)}, np.array([3.0, 0.2], np.float32)
    params = {"w": jnp.zeros(4)}
    step = laws.quick_jit(tx.update)
    for alpha in (0.3, 0.9):
        state = tx.init(params)
        state.hyperparams["alpha"] = jnp.asarray(alpha)
        for _ in range(3):
            _, state = step(g, state, params, losses=losses)
        # The norms do not change, so p = 1 + log10(L).
        tension = alpha / (1 + np.exp(-np.e * np.log10(losses))) + 1 - alpha
        found = optax.tree_utils.tree_get(state, "tension")
        np.testing.assert_allclose(found, tension, rtol=1e-5)


def test_alpha_by_a_schedule():
    make = optax.inject_hyperparams(
        mtl.task_tensioner, static_args=("num_tasks", "window")
    )
    tx = make(num_tasks=2, alpha=lambda count: 0.1 * count)
    params, g = {"w": jnp.zeros(2)}, {"w": jnp.eye(2)}
    state = tx.init(params)
    step = laws.quick_jit(tx.update)
    for _ in range(3):
        _, state = step(g, state, params, losses=jnp.ones(2))
    np.testing.assert_allclose(state.hyperparams["alpha"], 0.2, rtol=1e-6)


@pytest.mark.parametrize(
    ("static", "words"),
    [
        ((), r"must be a Python int.*static_args=\('num_tasks', 'window'\)"),
        (("num_tasks",), r"window must be a Python int.*static_args=\(.*'window'"),
    ],
)
def test_ints_that_set_shapes_must_be_static(static, words):
    make = optax.inject_hyperparams(mtl.task_tensioner, static_args=static)
    with pytest.raises(TypeError, match=words):
        make(num_tasks=2, alpha=0.3).init({"w": jnp.zeros(2)})


def test_a_learning_rate_injected_around_the_chain():
    make = optax.inject_hyperparams(
        lambda learning_rate: optax.chain(by_norm(2), optax.sgd(learning_rate))
    )
    tx = make(learning_rate=0.5)
    ours, _ = update(tx, "lazy")
    wanted, _ = update(by_norm(2), "lazy")
    assert_trees_close(ours, jax.tree.map(lambda u: -0.5 * u, wanted))
