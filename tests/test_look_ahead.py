"""Looking one step ahead, against NumPy, closed forms and the recorded procedure.

Three of the procedure's four variants (which order of the derivative, heads first or
last) are in the fixture. The fourth, first order with heads last, is not: what it is
compared with comes from `tanh_step`, an oracle in NumPy that is itself compared with
the three.
"""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl
from mtl_optax.examples import models

CASES = [
    "tanh_2tasks_second_order_heads_first",
    "tanh_2tasks_second_order_heads_last",
    "tanh_2tasks_first_order_heads_first",
]
ORDERS = [False, True]
MODES = [None, "unroll", "vmap", "map"]


def slowly(*values):
    """A case like another one, that compiles for long."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def case_of(load_fixture):
    cases = {c["name"]: c for c in load_fixture("mao_and_single_step")["single_step"]}
    return cases.__getitem__


def normal(shape, seed, scale=1.0):
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return jnp.asarray(values, jnp.result_type(float))


def assert_close(ours, wanted, tolerance):
    """Error relative to the largest entry of each leaf."""
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        size = np.abs(b).max(initial=0)
        assert size > 0, "nothing to compare"
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * size)


def with_rows(*args, **kwargs):
    """`look_ahead_jacobian` with its rows as arrays."""
    function = mtl.look_ahead_jacobian(*args, **kwargs)

    def losses_and_rows(*args, **kwargs):
        value, task_grads = function(*args, **kwargs)
        return value, mtl.materialize(task_grads)

    return losses_and_rows


def stacked(*args, **kwargs):
    """The same, compiled."""
    return laws.quick_jit(with_rows(*args, **kwargs))


# ------------------------------------------------------------------- the tanh procedure


def tanh_losses(params, x, y):
    """The recorded model: ``w_i tanh(x theta) + b_i``."""
    h = jnp.tanh(x @ params["theta"])
    w, b = params["heads"][:, 0], params["heads"][:, 1]
    return jnp.mean((w[:, None] * h + b[:, None] - y) ** 2, axis=1)


def tanh_grads(theta, head, x, y):
    """Gradients on theta and head, and the Hessian on theta, by hand in NumPy."""
    h = np.tanh(x @ theta)
    w, b = head
    r = w * h + b - y
    slope = 1 - h**2
    on_theta = 2 * np.mean((r * w * slope)[:, None] * x, axis=0)
    on_head = np.array([2 * np.mean(r * h), 2 * np.mean(r)])
    curvature = 2 * ((w * slope) ** 2 - 2 * r * w * h * slope)
    hessian = np.einsum("n,ni,nj->ij", curvature, x, x) / len(x)
    return on_theta, on_head, hessian


def tanh_step(theta, heads, x, y, *, lr_head, alpha, beta, second_order, heads_first):
    """One step of the procedure in NumPy, with everything on the way."""
    tasks = range(len(heads))

    def move(theta, heads):
        grads = [tanh_grads(theta, heads[i], x, y[i])[1] for i in tasks]
        return heads - lr_head * np.array(grads)

    if heads_first:
        heads = move(theta, heads)
    inner, outer, used = [], [], heads
    for i in tasks:
        g, _, hessian = tanh_grads(theta, heads[i], x, y[i])
        inner.append(theta - alpha * g)
        ahead = tanh_grads(inner[-1], heads[i], x, y[i])[0]
        through = np.eye(2) - alpha * hessian if second_order else np.eye(2)
        outer.append(through @ ahead)
    theta = theta - beta * np.sum(outer, axis=0)
    if not heads_first:
        heads = move(theta, heads)
    return theta, heads, np.array(inner), np.array(outer), used


def settings(case):
    return {
        "lr_head": case["lr_head"],
        "alpha": case["inner_lr_alpha"],
        "beta": case["outer_lr_beta"],
        "second_order": case["second_order"],
        "heads_first": case["heads_first"],
    }


def recorded(case_of, name):
    """A recorded case; the one variant that was not recorded is taken from NumPy."""
    if name in CASES:
        return case_of(name)
    case = dict(case_of(CASES[2]), heads_first=False)
    x, y = np.array(case["X"]), np.array(case["Y"])
    theta, heads = np.array(case["theta0"]), np.array(case["heads0"])
    steps = []
    for _ in range(4):
        theta, heads, inner, outer, _ = tanh_step(theta, heads, x, y, **settings(case))
        losses = [
            np.mean((h[0] * np.tanh(x @ theta) + h[1] - t) ** 2)
            for h, t in zip(heads, y, strict=True)
        ]
        values = (theta, heads, inner, outer, losses)
        keys = ("theta", "heads", "inner_theta", "outer_gradient_per_task", "losses")
        steps.append(dict(zip(keys, values, strict=True)))
    return dict(case, steps=steps)


ALL_FOUR = [*CASES, "tanh_2tasks_first_order_heads_last"]


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_the_recorded_procedure(case_of, name):
    case = case_of(name)
    theta, heads = np.array(case["theta0"]), np.array(case["heads0"])
    x, y = np.array(case["X"]), np.array(case["Y"])
    for wanted in case["steps"]:
        theta, heads, inner, outer, _ = tanh_step(theta, heads, x, y, **settings(case))
        assert_close(theta, np.array(wanted["theta"]), 1e-12)
        assert_close(heads, np.array(wanted["heads"]), 1e-12)
        assert_close(inner, np.array(wanted["inner_theta"]), 1e-12)
        assert_close(outer, np.array(wanted["outer_gradient_per_task"]), 1e-12)


@pytest.mark.parametrize("name", ALL_FOUR)
@pytest.mark.usefixtures("x64")
def test_steps_follow_the_recorded_procedure(case_of, name):
    case = recorded(case_of, name)
    x, y = jnp.array(case["X"]), jnp.array(case["Y"])
    params = {"theta": jnp.array(case["theta0"]), "heads": jnp.array(case["heads0"])}
    init, step = mtl.look_ahead_steps(
        tanh_losses,
        case["inner_lr_alpha"],
        optax.chain(mtl.sum_tasks(2), optax.sgd(case["outer_lr_beta"])),
        optax.sgd(case["lr_head"]),
        shared={"theta": True, "heads": False},
        heads_first=case["heads_first"],
        first_order=not case["second_order"],
    )
    state, step = init(params), laws.quick_jit(step)
    for wanted in case["steps"]:
        before = params
        params, state, losses = step(params, state, x, y)
        assert_close(params["theta"], np.array(wanted["theta"]), 1e-12)
        assert_close(params["heads"], np.array(wanted["heads"]), 1e-12)
        # The recorded losses are those after the step; ours those at the points ahead.
        assert_close(tanh_losses(params, x, y), np.array(wanted["losses"]), 1e-12)
        heads = params["heads"] if case["heads_first"] else before["heads"]
        ahead = [
            tanh_losses({"theta": jnp.array(point), "heads": heads}, x, y)[i]
            for i, point in enumerate(wanted["inner_theta"])
        ]
        assert_close(losses, jnp.stack(ahead), 1e-12)


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, None) for name in ALL_FOUR] + [(ALL_FOUR[0], mode) for mode in MODES[2:]],
)
@pytest.mark.usefixtures("x64")
def test_rows_are_the_recorded_gradients(case_of, name, mode):
    case = recorded(case_of, name)
    x, y = jnp.array(case["X"]), jnp.array(case["Y"])
    theta, heads = np.array(case["theta0"]), np.array(case["heads0"])
    look = stacked(
        tanh_losses,
        case["inner_lr_alpha"],
        shared={"theta": True, "heads": False},
        first_order=not case["second_order"],
        mode=mode,
    )
    for wanted in case["steps"]:
        # Heads as they are when the shared parameters step.
        used = np.array(wanted["heads"]) if case["heads_first"] else heads
        params = {"theta": jnp.array(theta), "heads": jnp.array(used)}
        losses, rows = look(params, x, y)
        assert_close(rows["theta"], np.array(wanted["outer_gradient_per_task"]), 1e-12)
        plain = np.zeros((2, 2, 2))
        for i in range(2):
            plain[i, i] = tanh_grads(theta, used[i], np.array(x), np.array(y)[i])[1]
            point = {"theta": jnp.array(wanted["inner_theta"][i]), "heads": used}
            assert_close(losses[i], tanh_losses(point, x, y)[i], 1e-12)
        assert_close(rows["heads"], plain, 1e-12)
        theta, heads = np.array(wanted["theta"]), np.array(wanted["heads"])


# --------------------------------------------------------------------------- quadratics


def quadratics(A, b):
    return lambda s: 0.5 * jnp.einsum("i,tij,j->t", s, A, s) - b @ s


@pytest.mark.parametrize("first_order", ORDERS)
@pytest.mark.usefixtures("x64")
def test_recorded_quadratic(case_of, first_order):
    case = case_of("quadratic_closed_form")
    A, b, s = (jnp.array(case[key]) for key in ("A", "b", "s0"))
    order = "first_order" if first_order else "second_order"
    loss_fn, alpha = quadratics(A, b), case["inner_lr_alpha"]
    _, task_grads = mtl.look_ahead_jacobian(loss_fn, alpha, first_order=first_order)(s)
    total = mtl.weighted_sum(jnp.ones(2), task_grads)
    assert_close(total, np.array(case[f"outer_gradient_{order}"]), 1e-12)
    init, step = mtl.look_ahead_steps(
        loss_fn,
        alpha,
        optax.chain(mtl.sum_tasks(2), optax.sgd(case["outer_lr_beta"])),
        optax.sgd(1.0),
        shared=True,
        first_order=first_order,
    )
    s, _, _ = laws.quick_jit(step)(s, init(s))
    assert_close(s, np.array(case[f"s1_{order}"]), 1e-12)


@pytest.mark.parametrize("first_order", ORDERS)
@pytest.mark.parametrize("num_tasks", [1, 3, 7])
@pytest.mark.usefixtures("x64")
def test_closed_form(num_tasks, first_order):
    A = normal((num_tasks, 4, 4), num_tasks)
    A = np.array(A @ A.mT)
    b, s, alpha = np.array(normal((num_tasks, 4), 1)), np.array(normal((4,), 2)), 0.07
    damp = np.eye(4) - alpha * A
    grads = A @ s - b
    power = damp if first_order else damp @ damp
    wanted = np.einsum("tij,tj->ti", power, grads)
    points = s - alpha * grads
    losses = 0.5 * np.einsum("ti,tij,tj->t", points, A, points) - (b * points).sum(1)
    ours = stacked(quadratics(A, b), alpha, first_order=first_order)(jnp.array(s))
    assert_close(ours, (losses, wanted), 1e-12)


def test_a_large_step_has_no_bound():
    """What the docstring warns of: beyond ``1 / curvature`` the factor grows again."""
    curvature = jnp.array([1.0, 10.0])
    for alpha, factors in ((0.1, (0.81, 0.0)), (0.2, (0.64, 1.0)), (0.5, (0.25, 16.0))):
        loss_fn = lambda s: 0.5 * curvature * s**2  # noqa: E731
        _, rows = stacked(loss_fn, alpha)(jnp.ones(()))
        wanted = np.array(factors) * np.array(curvature)
        np.testing.assert_allclose(rows, wanted, atol=1e-5)
    _, rows = stacked(loss_fn, 0.2, first_order=True)(jnp.ones(()))
    assert rows[0] > 0 > rows[1]


# -------------------------------------------------------------------------- a small net


def net(num_tasks=3, width=5):
    params = {
        "trunk": {"w": normal((4, width), 0, 0.6), "b": normal((width,), 1, 0.3)},
        "heads": {f"t{i}": normal((width,), 2 + i, 0.7) for i in range(num_tasks)},
    }
    x = normal((6, 4), 50)
    return params, (x, normal((num_tasks, 6), 51))


def net_losses(params, batch):
    x, y = batch
    h = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    return {
        name: jnp.mean((jnp.sin(h @ head) - y[i]) ** 2) * (1 + i)
        for i, (name, head) in enumerate(sorted(params["heads"].items()))
    }


def array_losses(params, batch):
    return jnp.stack(list(net_losses(params, batch).values()))


MASK = {"trunk": True, "heads": False}


def numpy_loss(w, b, head, x, y, scale):
    return scale * np.mean((np.sin(np.tanh(x @ w + b) @ head) - y) ** 2)


def numpy_gradient(w, b, head, x, y, scale):
    """On ``w``, ``b`` and ``head``, by hand."""
    h = np.tanh(x @ w + b)
    z = h @ head
    outer = scale * 2 * (np.sin(z) - y) * np.cos(z) / len(x)
    hidden = outer[:, None] * head * (1 - h**2)
    return x.T @ hidden, hidden.sum(0), h.T @ outer


def slope(function, at, direction, h=2e-4):
    """Central differences of fourth order."""
    near, far = (
        function(at + k * h * direction) - function(at - k * h * direction)
        for k in (1, 2)
    )
    return (8 * near - far) / (12 * h)


def numpy_look_ahead(params, batch, inner_batch, alpha, first_order):
    """Rows by hand, and by central differences through the inner step."""
    w, b = (np.array(params["trunk"][k]) for k in "wb")
    heads = {name: np.array(head) for name, head in sorted(params["heads"].items())}
    losses, on_w, on_b = [], [], []
    on_heads = {n: np.zeros((len(heads), *h.shape)) for n, h in heads.items()}
    for i, (name, head) in enumerate(heads.items()):
        x, y = np.array(batch[0]), np.array(batch[1][i])
        xi, yi = np.array(inner_batch[0]), np.array(inner_batch[1][i])

        def point(w, b, head=head, xi=xi, yi=yi, scale=1 + i):
            gw, gb, _ = numpy_gradient(w, b, head, xi, yi, scale)
            return w - alpha * gw, b - alpha * gb

        def ahead(flat, point=point, head=head, x=x, y=y, scale=1 + i):
            w2, b2 = point(flat[: w.size].reshape(w.shape), flat[w.size :])
            return numpy_loss(w2, b2, head, x, y, scale)

        flat = np.concatenate([w.ravel(), b])
        losses.append(ahead(flat))
        if first_order:
            gw, gb, _ = numpy_gradient(*point(w, b), head, x, y, 1 + i)
        else:
            row = [slope(ahead, flat, direction) for direction in np.eye(flat.size)]
            gw, gb = np.array(row[: w.size]).reshape(w.shape), np.array(row[w.size :])
        on_w.append(gw)
        on_b.append(gb)
        on_heads[name][i] = numpy_gradient(w, b, head, x, y, 1 + i)[2]
    rows = {"trunk": {"w": np.array(on_w), "b": np.array(on_b)}, "heads": on_heads}
    return np.array(losses), rows


@pytest.mark.parametrize("other_batch", [False, True])
@pytest.mark.parametrize("first_order", ORDERS)
@pytest.mark.usefixtures("x64")
def test_against_numpy(first_order, other_batch):
    params, batch = net()
    inner = (normal((9, 4), 70), normal((3, 9), 71)) if other_batch else batch
    look = stacked(
        net_losses,
        0.3,
        shared=MASK,
        first_order=first_order,
        inner_batch=inner if other_batch else None,
    )
    wanted = numpy_look_ahead(params, batch, inner, 0.3, first_order)
    assert_close(look(params, batch), wanted, 1e-13 if first_order else 1e-8)


@pytest.mark.usefixtures("x64")
def test_the_orders_and_the_plain_gradient_differ():
    params, batch = net()
    rows = [
        stacked(net_losses, 0.3, shared=MASK, first_order=order)(params, batch)[1]
        for order in ORDERS
    ]
    rows.append(mtl.value_and_task_grads(net_losses)(params, batch)[1])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        gap = np.abs(rows[a]["trunk"]["w"] - rows[b]["trunk"]["w"]).max()
        assert gap > 1e-2 * np.abs(rows[b]["trunk"]["w"]).max()


@pytest.mark.parametrize(
    ("alpha", "mode"), [(0.0, None), (0.3, "map"), (5.0, None), (5.0, "vmap")]
)
def test_head_rows_are_plain_gradients(alpha, mode):
    params, batch = net()
    _, rows = stacked(net_losses, alpha, shared=MASK, mode=mode)(params, batch)
    _, plain = mtl.value_and_task_grads(net_losses)(params, batch)
    assert_close(rows["heads"], plain["heads"], 1e-6)


@pytest.mark.parametrize("shared", [None, MASK])
@pytest.mark.parametrize("first_order", ORDERS)
def test_without_a_step_it_is_task_jacobian(first_order, shared):
    params, batch = net()
    ours = stacked(net_losses, 0.0, shared=shared, first_order=first_order)
    plain = mtl.value_and_task_grads(net_losses)
    assert_close(ours(params, batch), plain(params, batch), 1e-6)


def test_every_leaf_is_shared_by_default():
    params, batch = net()
    everything = jax.tree.map(lambda _: True, params)
    default = stacked(net_losses, 0.3)(params, batch)
    assert_close(default, stacked(net_losses, 0.3, shared=everything)(params, batch), 0)
    masked = stacked(net_losses, 0.3, shared=MASK)(params, batch)
    assert not np.allclose(default[1]["heads"]["t0"], masked[1]["heads"]["t0"])


# ---------------------------------------------------------------- forms, modes, engines

FORMS = {
    "array": array_losses,
    "tuple": lambda p, b: tuple(net_losses(p, b).values()),
    "list": lambda p, b: list(net_losses(p, b).values()),
    "dict": net_losses,
    "ordered": lambda p, b: collections.OrderedDict(net_losses(p, b)),
}


@functools.cache
def reference():
    params, batch = net()
    return stacked(net_losses, 0.3, shared=MASK, mode="unroll")(params, batch)


@pytest.mark.parametrize(
    ("form", "mode"),
    [(form, None) for form in FORMS]
    + [(form, mode) for form in ("array", "dict") for mode in ("vmap", "map")],
)
def test_forms_and_modes_agree(form, mode):
    params, batch = net()
    look = mtl.look_ahead_jacobian(FORMS[form], 0.3, shared=MASK, mode=mode)

    @laws.quick_jit
    def run(params, batch):
        losses, task_grads = look(params, batch)
        total = mtl.weighted_sum(jnp.array([1.0, -2.0, 0.5]), task_grads)
        return losses, mtl.materialize(task_grads), total

    losses, rows, total = run(params, batch)
    assert_close((losses, rows), reference(), 1e-5)
    assert_close(
        total, mtl.weighted_sum(jnp.array([1.0, -2.0, 0.5]), reference()[1]), 1e-5
    )


def one_loss(params, batch, scale):
    """Of one task, whose head its batch picks."""
    x, y, task = batch
    h = jnp.tanh(x @ params["w"])
    return scale * jnp.mean((h @ params["heads"][task] - y) ** 2)


def tasks_apart(num_tasks=3, seed=0):
    params = {"w": normal((4, 5), 0, 0.6), "heads": normal((num_tasks, 5), 1)}
    batch = (
        normal((num_tasks, 6, 4), 10 + seed),
        normal((num_tasks, 6), 11 + seed),
        jnp.arange(num_tasks),
    )
    return params, batch


@pytest.mark.parametrize(
    ("other_batch", "mode"),
    [(False, None), (True, None), (True, "unroll"), (True, "map")],
)
def test_one_batch_a_task(other_batch, mode):
    params, batch = tasks_apart()
    _, inner = tasks_apart(seed=40)
    mask = {"w": True, "heads": False}
    kwargs = {"inner_batch": (inner, 2.0)} if other_batch else {}

    def together(params, batch, scale):
        pick = lambda t: jax.tree.map(lambda b: b[t], batch)  # noqa: E731
        return tuple(one_loss(params, pick(t), scale) for t in range(3))

    wanted = stacked(together, 0.2, shared=mask, **kwargs)(params, batch, 2.0)
    look = mtl.look_ahead_jacobian(
        one_loss, 0.2, shared=mask, in_axes=(None, 0, None), mode=mode, **kwargs
    )
    weights = jnp.array([1.0, -2.0, 0.5])

    @laws.quick_jit
    def run(params, batch, scale):
        losses, task_grads = look(params, batch, scale)
        total = mtl.weighted_sum(weights, task_grads)
        return (losses, mtl.materialize(task_grads)), total

    ours, total = run(params, batch, 2.0)
    assert_close(ours, wanted, 1e-5)
    assert_close(total, mtl.weighted_sum(weights, wanted[1]), 1e-5)


@pytest.mark.parametrize("num_tasks", [2, 7])
def test_task_axis_elsewhere(num_tasks):
    params, (x, y, task) = tasks_apart(num_tasks)
    args = {"shared": {"w": True, "heads": False}}
    first = stacked(one_loss, 0.2, in_axes=(None, 0, None), **args)
    last = stacked(one_loss, 0.2, in_axes=(None, (2, 0, 0), None), **args)
    moved = (jnp.moveaxis(x, 0, 2), y, task)
    assert_close(last(params, moved, 1.0), first(params, (x, y, task), 1.0), 1e-6)


COMBINERS = {
    "mgda": lambda n: mtl.mgda(n),
    "tensioner": lambda n: mtl.task_tensioner(n),
    "sum": lambda n: mtl.sum_tasks(n),
    "shared_only": lambda n: mtl.shared_only(mtl.edm(n), MASK),
}


@pytest.mark.parametrize(
    ("name", "num_tasks"),
    [
        ("mgda", 1),
        ("mgda", 3),
        ("tensioner", 3),
        slowly("tensioner", 7),
        slowly("sum", 3),
        slowly("shared_only", 3),
    ],
)
def test_lazy_is_stacked(name, num_tasks):
    params, batch = net(num_tasks)
    tx = COMBINERS[name](num_tasks)
    look = mtl.look_ahead_jacobian(net_losses, 0.2, shared=MASK)

    @laws.quick_jit
    def both(params, batch):
        losses, lazy = look(params, batch)
        state = tx.init(params)
        out = []
        for task_grads in (lazy, mtl.materialize(lazy)):
            updates, _ = tx.update(task_grads, state, params, losses=losses)
            out.append((updates, mtl.gramian(task_grads)))
        return out

    ours, wanted = both(params, batch)
    assert_close(ours, wanted, 1e-5)


def test_gramian_in_a_basis_by_label_and_masked():
    params, batch = net()
    losses, lazy = mtl.look_ahead_jacobian(net_losses, 0.2, shared=MASK)(params, batch)
    rows = mtl.materialize(lazy)
    basis = jnp.array([[1.0, -1.0, 0.0], [1 / 3, 1 / 3, 1 / 3]])
    mask = jnp.array([True, False, True])
    labels = {
        "trunk": {"w": "t", "b": "t"},
        "heads": dict.fromkeys(params["heads"], "h"),
    }
    for kwargs in ({"basis": basis}, {"task_mask": mask}, {"labels": labels}):
        assert_close(mtl.gramian(lazy, **kwargs), mtl.gramian(rows, **kwargs), 1e-5)
    assert lazy["trunk"]["w"].shape == (3, 4, 5)
    np.testing.assert_array_equal(lazy["trunk"]["w"].operator.losses, losses)
    assert lazy["trunk"]["w"].operator.task_names == ("t0", "t1", "t2")
    assert isinstance(lazy["trunk"]["w"].operator, mtl.TaskJacobian)


@pytest.mark.parametrize("num_tasks", [3, slowly(5)])
def test_permuting_tasks_permutes_rows(num_tasks):
    params, batch = net(num_tasks)
    order = np.random.default_rng(0).permutation(num_tasks)
    loss_fn = FORMS["tuple"]
    losses, rows = stacked(loss_fn, 0.2, shared=MASK)(params, batch)
    permuted = lambda p, b: tuple(loss_fn(p, b)[i] for i in order)  # noqa: E731
    ours = stacked(permuted, 0.2, shared=MASK)(params, batch)
    wanted = (losses[order], jax.tree.map(lambda g: g[order], rows))
    assert_close(ours, wanted, 1e-5)


# ---------------------------------------------------------------- what JAX does with it


def trainer(loss_fn, num_tasks=3, **kwargs):
    tx = optax.chain(mtl.edm(num_tasks), optax.sgd(1e-2))

    def step(params, state, batch):
        look = mtl.look_ahead_jacobian(loss_fn, 0.1, shared=MASK, **kwargs)
        losses, task_grads = look(params, batch)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        return optax.apply_updates(params, updates), state, losses

    return tx, step


def test_compiles_once_and_agrees_with_scan():
    params, batch = net()
    traces = []

    def loss_fn(params, batch):
        traces.append(1)
        return net_losses(params, batch)

    tx, step = trainer(loss_fn)
    jitted, state = laws.quick_jit(step), tx.init(params)
    p, s, _ = jitted(params, state, batch)
    after_one = len(traces)
    for _ in range(3):
        p, s, losses = jitted(p, s, batch)
    assert len(traces) == after_one

    def body(carry, _):
        p, s, losses = step(*carry, batch)
        return (p, s), losses

    (ps, ss), history = jax.lax.scan(body, (params, state), None, length=4)
    assert_close((ps, history[-1]), (p, losses), 1e-5)
    assert jax.tree.structure(ss) == jax.tree.structure(s)


def test_cond_vmap_and_donation():
    params, batch = net()
    look = mtl.look_ahead_jacobian(net_losses, 0.1, shared=MASK)

    @laws.quick_jit
    def inside_cond(params, batch, pred):
        _, task_grads = look(params, batch)
        return jax.lax.cond(
            pred,
            lambda: mtl.weighted_sum(jnp.ones(3), task_grads),
            lambda: mtl.weighted_sum(jnp.diag(mtl.gramian(task_grads)), task_grads),
        )

    _, rows = stacked(net_losses, 0.1, shared=MASK)(params, batch)
    for pred, weights in ((True, jnp.ones(3)), (False, jnp.diag(mtl.gramian(rows)))):
        wanted = mtl.weighted_sum(weights, rows)
        assert_close(inside_cond(params, batch, pred), wanted, 1e-5)

    seeds = [jax.tree.map(lambda p, s=s: p * (1 + s), params) for s in (0.0, 0.1)]
    many = jax.tree.map(lambda *x: jnp.stack(x), *seeds)
    tx, step = trainer(net_losses)
    states = jax.vmap(tx.init)(many)
    jitted = laws.quick_jit(step)
    ours, _, _ = laws.quick_jit(jax.vmap(step, in_axes=(0, 0, None)))(
        many, states, batch
    )
    for i, seed in enumerate(seeds):
        wanted, _, _ = jitted(seed, tx.init(seed), batch)
        assert_close(jax.tree.map(lambda x, i=i: x[i], ours), wanted, 1e-5)

    donated = jax.tree.map(jnp.array, params)
    p, _, _ = laws.quick_jit(step, donate_argnums=(0, 1))(
        donated, tx.init(params), batch
    )
    assert_close(p, jax.tree.map(lambda x: x[0], ours), 1e-5)


def test_traced_learning_rate():
    params, batch = net()

    def with_rate(rate):
        return with_rows(net_losses, rate, shared=MASK)(params, batch)

    assert_close(laws.quick_jit(with_rate)(jnp.float32(0.3)), reference(), 1e-5)
    rates = jnp.array([0.0, 0.3])
    plain = mtl.value_and_task_grads(net_losses)(params, batch)
    both = laws.quick_jit(jax.vmap(with_rate))(rates)
    for i, wanted in enumerate((plain, reference())):
        assert_close(jax.tree.map(lambda x, i=i: x[i], both), wanted, 1e-5)


def test_inner_batch_may_be_traced():
    params, batch = net()
    other = (normal((9, 4), 70), normal((3, 9), 71))

    @laws.quick_jit
    def run(batch, inner):
        look = with_rows(net_losses, 0.3, shared=MASK, inner_batch=inner)
        return look(params, batch)

    wanted = stacked(net_losses, 0.3, shared=MASK, inner_batch=other)(params, batch)
    assert_close(run(batch, other), wanted, 1e-5)
    assert not np.allclose(run(batch, other)[0], reference()[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "rate"),
    [(jnp.bfloat16, 0.1), (jnp.bfloat16, jnp.float32(0.1)), (jnp.float16, 0.1)],
)
def test_dtypes_are_kept(dtype, rate):
    params, batch = net()
    low = jax.tree.map(lambda x: x.astype(dtype), params)
    low["trunk"]["b"] = params["trunk"]["b"]  # mixed precision
    look = mtl.look_ahead_jacobian(net_losses, rate, shared=MASK)

    @laws.quick_jit
    def run(low):
        losses, task_grads = look(low, batch)
        total = mtl.weighted_sum(jnp.ones(3), task_grads)
        return losses, mtl.materialize(task_grads), total, mtl.gramian(task_grads)

    losses, low_rows, total, gram = run(low)
    assert losses.dtype == gram.dtype == jnp.float32
    for tree in (low_rows, total):
        assert jax.tree.map(lambda x: x.dtype, tree) == jax.tree.map(
            lambda x: x.dtype, low
        )
    _, rows = stacked(net_losses, 0.1, shared=MASK)(params, batch)
    assert_close(low_rows, rows, 0.1)


# ------------------------------------------------------------------------- broken tasks


def breaking(params, batch):
    losses = net_losses(params, batch)
    # Infinite slope behind a zero cotangent: it would reach every row of a joint pass.
    shared = jnp.sum(params["trunk"]["w"])
    return {**losses, "t1": losses["t1"] + jnp.sqrt(shared - shared)}


@pytest.mark.parametrize("num_tasks", [3, slowly(5)])
def test_a_broken_task_stays_alone(num_tasks):
    params, batch = net(num_tasks)
    look = mtl.look_ahead_jacobian(breaking, 0.1, shared=MASK, mode="unroll")
    tx = mtl.skip_nonfinite_tasks(mtl.mean(num_tasks))

    @laws.quick_jit
    def run(params):
        losses, lazy = look(params, batch)
        assert lazy["trunk"]["w"].operator.isolates
        rows = mtl.materialize(lazy, isolated=True)
        return rows, *tx.update(lazy, tx.init(params), params, losses=losses)

    rows, updates, state = run(params)
    _, whole = stacked(net_losses, 0.1, shared=MASK)(params, batch)
    keep = np.array([t for t in range(num_tasks) if t != 1])
    assert not np.isfinite(rows["trunk"]["w"][1]).all()
    assert_close(rows["trunk"]["w"][keep], whole["trunk"]["w"][keep], 1e-5)
    assert state.info.skipped_tasks.tolist() == [int(t == 1) for t in range(num_tasks)]
    weights = jnp.zeros(num_tasks).at[keep].set(1 / len(keep))
    wanted = mtl.weighted_sum(weights, whole)
    assert_close(updates["trunk"], wanted["trunk"], 1e-5)


def test_isolation_is_promised_only_where_it_holds():
    params, batch = net()
    for loss_fn, mode in ((array_losses, None), (net_losses, "vmap")):
        look = mtl.look_ahead_jacobian(loss_fn, 0.1, mode=mode)

        @laws.quick_jit
        def whole_step(params, look=look):
            _, task_grads = look(params, batch)
            assert not task_grads["trunk"]["w"].operator.isolates
            return mtl.weighted_sum(jnp.ones(3), task_grads)

        assert np.isfinite(whole_step(params)["trunk"]["w"]).all()
    apart, batches = tasks_apart()
    broken = (batches[0], batches[1].at[1].set(jnp.nan), batches[2])
    for mode in MODES[:2]:
        look = mtl.look_ahead_jacobian(
            one_loss, 0.1, in_axes=(None, 0, None), mode=mode
        )

        @laws.quick_jit
        def rows_of(apart, look=look):
            _, task_grads = look(apart, broken, 1.0)
            assert task_grads["w"].operator.isolates
            return mtl.materialize(task_grads)

        finite = np.isfinite(rows_of(apart)["w"]).all((1, 2))
        assert finite.tolist() == [True, False, True]


# --------------------------------------------------------------------- aux, masks, cost


@pytest.mark.slow
def test_aux_is_that_of_the_current_parameters_and_the_outer_batch():
    params, batch = net()
    other = (normal((9, 4), 70), normal((3, 9), 71))

    def loss_fn(params, batch):
        return net_losses(params, batch), {
            "mean": jnp.mean(batch[0] @ params["trunk"]["w"])
        }

    look = mtl.look_ahead_jacobian(
        loss_fn, 0.3, shared=MASK, has_aux=True, inner_batch=other
    )
    (losses, aux), task_grads = look(params, batch)
    plain = stacked(net_losses, 0.3, shared=MASK, inner_batch=other)(params, batch)
    assert_close((losses, mtl.materialize(task_grads)), plain, 1e-6)
    assert_close(aux, loss_fn(params, batch)[1], 1e-6)

    apart, batches = tasks_apart()
    look = mtl.look_ahead_jacobian(
        lambda p, b: (one_loss(p, b, 1.0), b[1].sum()),
        0.3,
        has_aux=True,
        in_axes=(None, 0),
    )
    (losses, aux), _ = look(apart, batches)
    assert losses.shape == (3,)
    assert_close(aux, batches[1].sum(1), 1e-6)


def test_forms_of_the_mask():
    params, batch = net()
    whole = {
        "trunk": {"w": True, "b": np.True_},
        "heads": dict.fromkeys(params["heads"], False),
    }
    by_path = lambda p: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[0].key == "trunk", p
    )
    found = mtl.shared_mask(net_losses, params, batch)
    assert found == whole  # so one of them stands for both
    for mask in (found, by_path):
        ours = stacked(net_losses, 0.3, shared=mask)(params, batch)
        assert_close(ours, reference(), 1e-5)


def flops(function, *args):
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


@pytest.mark.parametrize("first_order", [False, slowly(True)])
def test_cost_grows_with_the_number_of_tasks_and_not_its_square(first_order):
    def cost(num_tasks):
        params = {
            "trunk": [normal((16, 16), i, 0.2) for i in range(6)],
            "heads": {f"{t}": normal((16,), t) for t in range(num_tasks)},
        }

        def loss_fn(params, x):
            for w in params["trunk"]:
                x = jnp.tanh(x @ w)
            return {t: jnp.mean((x @ w) ** 2) for t, w in params["heads"].items()}

        look = mtl.look_ahead_jacobian(
            loss_fn, 0.1, shared=MASK, first_order=first_order
        )
        x = normal((64, 16), 9)
        ways = {
            "rows": lambda g: mtl.materialize(g),
            "combination": lambda g: mtl.weighted_sum(jnp.ones(num_tasks), g),
        }
        plain = flops(jax.grad(lambda p: loss_fn(p, x)["0"]), params)
        return {
            name: flops(lambda p, way=way: way(look(p, x)[1]), params) / plain
            for name, way in ways.items()
        }

    two, four = cost(2), cost(4)
    bound = 2.2 if first_order else 4.0
    for way in two:
        assert four[way] < 1.2 * 2 * two[way]
        assert four[way] < bound * 4
        assert four[way] > 0.8 * 2 * two[way]  # the measure sees what it should


@pytest.mark.slow
def test_flax_nnx():
    model = models.DigitsNet(("CL", "RR"), hidden=8, features=4, rngs=nnx.Rngs(0))
    apply, params = models.functional(model)
    x = normal((3, 10, 10), 0)
    targets = {"CL": jnp.array([1, 2, 3]), "RR": jax.nn.sigmoid(normal((3, 64), 1))}

    def loss_fn(params, x):
        return models.task_losses(apply(params, x), targets)

    def mask(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "encoder" in jax.tree_util.keystr(path), params
        )

    leaves, treedef = jax.tree.flatten(params)
    marks = jax.tree.leaves(mask(params))
    assert 0 < sum(marks) < len(marks)
    losses, rows = stacked(loss_fn, 0.1, shared=mask)(params, x)
    assert jax.tree.structure(rows) == treedef

    @laws.quick_jit
    def by_hand(leaves):  # on a plain list of leaves
        def loss(leaves, task):
            return loss_fn(jax.tree.unflatten(treedef, leaves), x)[task]

        def ahead(leaves, task):
            grads = jax.grad(loss)(leaves, task)
            return loss(
                [
                    p - 0.1 * g if m else p
                    for p, g, m in zip(leaves, grads, marks, strict=True)
                ],
                task,
            )

        return [(ahead(leaves, t), jax.grad(ahead)(leaves, t)) for t in ("CL", "RR")]

    for t, (loss, grads) in enumerate(by_hand(leaves)):
        assert_close(losses[t], loss, 1e-5)
        for row, grad, mark in zip(jax.tree.leaves(rows), grads, marks, strict=True):
            if mark:
                assert_close(row[t], grad, 1e-5)

    tx = optax.chain(mtl.edm(2), optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        params = nnx.state(model, nnx.Param)
        losses, grads = mtl.look_ahead_jacobian(loss_fn, 0.1, shared=mask)(params, x)
        optimizer.update(model, grads, losses=losses)
        return losses

    first = step(model, optimizer)
    assert_close(first, losses, 1e-5)
    for _ in range(10):
        last = step(model, optimizer)
    assert last.sum() < first.sum()


# ------------------------------------------------------------------------ the procedure


def steps_of(loss_fn, *, num_tasks=3, shared=MASK, **kwargs):
    return mtl.look_ahead_steps(
        loss_fn,
        0.1,
        optax.chain(mtl.edm(num_tasks), optax.adam(1e-2)),
        optax.adam(2e-2),
        shared=shared,
        **kwargs,
    )


@pytest.mark.parametrize("heads_first", [True, slowly(False)])
def test_training_lowers_every_loss_under_scan(heads_first):
    params, batch = net()
    init, step = steps_of(net_losses, heads_first=heads_first)

    def body(carry, _):
        params, state, losses = step(*carry, batch)
        return (params, state), losses

    run = laws.quick_jit(lambda c: jax.lax.scan(body, c, None, length=150))
    (trained, state), history = run((params, init(params)))
    before, after = array_losses(params, batch), array_losses(trained, batch)
    assert np.all(after < 0.6 * before)
    assert history.shape == (150, 3)
    # Adam's moments: of the shared leaves in one state, of the heads in the other.
    shared = optax.tree_utils.tree_get(state.shared, "mu")
    heads = optax.tree_utils.tree_get(state.heads, "mu")
    assert len(jax.tree.leaves(shared)) == 2
    assert len(jax.tree.leaves(heads)) == 3
    assert jax.tree.structure(init(params)) == jax.tree.structure(state)


def test_each_transform_sees_its_own_leaves():
    params, batch = net()
    seen = {}

    def spy(name):
        def update(updates, state, params=None, **extra):
            seen[name] = (updates, params, extra)
            return updates, state

        return optax.GradientTransformationExtraArgs(lambda p: (), update)

    def heads_update(updates, state, params=None):  # takes nothing else
        return spy("heads").update(updates, state, params)

    init, step = mtl.look_ahead_steps(
        net_losses,
        0.1,
        optax.chain(mtl.sum_tasks(3), spy("shared")),
        optax.GradientTransformation(lambda p: (), heads_update),
        shared=MASK,
    )
    _, _, losses = step(params, init(params), batch, key="for the combiner")
    updates, own, extra = seen["shared"]
    assert isinstance(own["heads"]["t0"], optax.MaskedNode)
    assert isinstance(updates["heads"]["t0"], optax.MaskedNode)
    assert extra["key"] == "for the combiner"
    np.testing.assert_array_equal(extra["losses"], losses)
    updates, own, _ = seen["heads"]
    assert isinstance(own["trunk"]["w"], optax.MaskedNode)
    plain = jax.grad(lambda p: array_losses(p, batch).sum())(params)
    assert_close(updates["heads"], plain["heads"], 1e-5)


def test_all_shared_leaves_nothing_to_the_heads():
    params, batch = net()
    init, step = mtl.look_ahead_steps(
        net_losses, 0.3, mtl.sum_tasks(3), optax.adam(1.0), shared=True
    )
    new, _, losses = laws.quick_jit(step)(params, init(params), batch)
    wanted, rows = stacked(net_losses, 0.3)(params, batch)
    assert_close(losses, wanted, 1e-5)
    moved = jax.tree.map(lambda a, b: a - b, new, params)
    assert_close(moved, mtl.weighted_sum(jnp.ones(3), rows), 1e-4)


def test_inner_batch_of_a_step():
    params, batch = net()
    other = (normal((9, 4), 70), normal((3, 9), 71))
    init, step = mtl.look_ahead_steps(
        net_losses, 0.3, mtl.sum_tasks(3), optax.sgd(0.0), shared=MASK
    )
    new, _, losses = laws.quick_jit(step)(
        params, init(params), batch, inner_batch=other
    )
    wanted = stacked(net_losses, 0.3, shared=MASK, inner_batch=other)(params, batch)
    assert_close(losses, wanted[0], 1e-5)
    moved = jax.tree.map(lambda a, b: a - b, new["trunk"], params["trunk"])
    assert_close(moved, mtl.weighted_sum(jnp.ones(3), wanted[1])["trunk"], 1e-5)


@pytest.mark.parametrize("heads_first", [True, False])
def test_an_absent_task_is_as_if_it_did_not_exist(heads_first):
    params, (x, y) = net()
    present = jnp.array([True, False, True])

    def two(params, batch):
        losses = net_losses(params, batch)
        return {k: losses[k] for k in ("t0", "t2")}

    def run(loss_fn, num_tasks, batches, **kwargs):
        init, step = mtl.look_ahead_steps(
            loss_fn,
            0.1,
            optax.chain(mtl.mean(num_tasks), optax.sgd(0.1)),
            optax.sgd(0.1),
            shared=MASK,
            heads_first=heads_first,
        )
        compiled = laws.quick_jit(step)
        return [compiled(params, init(params), b, **kwargs)[0] for b in batches]

    (wanted,) = run(two, 2, [(x, y)])
    batches = [(x, y.at[1].set(row)) for row in (y[1], y[1] * jnp.nan)]
    for ours in run(net_losses, 3, batches, task_mask=present):
        # The absent task's own head has stayed where it was.
        assert_close(ours, wanted, 1e-5)


RATE = 0.1
KEPT = {
    "momentum": lambda: optax.sgd(RATE, momentum=0.9),
    "adam": lambda: optax.adam(RATE),
    "adam, own counts": lambda: optax.partition(
        {name: optax.adam(RATE) for name in ("t0", "t1", "t2")},
        {"trunk": "t0", "heads": {name: name for name in ("t0", "t1", "t2")}},
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_an_absent_task_s_head_and_its_state_stay_as_they_are(name):
    """Each head moves as if it had been trained alone, on the steps it was there."""
    params, batch = net()
    heads_tx, own_tx = KEPT[name](), KEPT["adam" if "adam" in name else name]()
    init, step = mtl.look_ahead_steps(
        net_losses,
        0.1,
        optax.chain(mtl.sum_tasks(3), optax.sgd(0.0)),  # the trunk stands still
        heads_tx,
        shared=MASK,
    )
    step = laws.quick_jit(step)
    masks = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]], bool)
    plain = laws.quick_jit(
        lambda p: jax.grad(lambda p: array_losses(p, batch).sum())(p)["heads"]
    )
    state, ours = init(params), params
    alone = dict(params["heads"])
    own = {head: own_tx.init(value) for head, value in alone.items()}
    for mask in masks:
        before, state_before = ours, state
        ours, state, _ = step(ours, state, batch, task_mask=jnp.array(mask))
        grads = plain({**params, "heads": alone})
        for i, head in enumerate(sorted(alone)):
            if mask[i]:
                updates, own[head] = own_tx.update(grads[head], own[head], alone[head])
                alone[head] = alone[head] + updates
            else:
                np.testing.assert_array_equal(
                    ours["heads"][head], before["heads"][head]
                )
        if name != "adam":  # one count for all heads corrects another bias
            assert_close(ours["heads"], alone, 1e-5)
        for old, new in zip(*map(moments_of_heads, (state_before, state)), strict=True):
            for i, head in enumerate(sorted(alone)):
                assert np.array_equal(old[head], new[head]) != mask[i]
        if not mask.any():
            chex.assert_trees_all_equal(state_before.heads, state.heads)
    if name == "adam":
        assert optax.tree_utils.tree_get(state.heads, "count") == 4


def moments_of_heads(state):
    """All that an optimiser's state holds of each head, one dict a kind."""
    kinds = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.heads):
        names = jax.tree_util.keystr(path)
        head = next((h for h in ("t0", "t1", "t2") if names.endswith(f"['{h}']")), None)
        kind = next((k for k in ("trace", "mu", "nu") if f".{k}" in names), None)
        if head and kind:
            kinds.setdefault(kind, {})[head] = leaf
    assert kinds
    return list(kinds.values())


def test_without_a_mask_a_zero_gradient_moves_a_head_by_momentum():
    params, batch = net()
    init, step = mtl.look_ahead_steps(
        lambda p, b, on: {k: v * on[k] for k, v in net_losses(p, b).items()},
        0.1,
        mtl.sum_tasks(3),
        optax.sgd(0.1, momentum=0.9),
        shared=MASK,
    )
    step = laws.quick_jit(step)
    on = dict.fromkeys(("t0", "t1", "t2"), 1.0)
    params, state, _ = step(params, init(params), batch, on)
    after, _, _ = step(params, state, batch, on | {"t1": 0.0})
    assert not np.array_equal(after["heads"]["t1"], params["heads"]["t1"])


@pytest.mark.parametrize("heads_first", [True, False])
def test_aux_of_a_step_is_that_of_the_look_ahead(heads_first):
    params, batch = net()

    def with_aux(params, batch):
        return net_losses(params, batch), {"head": params["heads"]["t1"] * 1.0}

    args = (0.1, mtl.sum_tasks(3), optax.sgd(0.1))
    (init, plain), (_, step) = (
        mtl.look_ahead_steps(f, *args, shared=MASK, heads_first=heads_first, **options)
        for f, options in ((net_losses, {}), (with_aux, {"has_aux": True}))
    )
    wanted, state, losses = laws.quick_jit(plain)(params, init(params), batch)
    ours, own, (found, aux) = laws.quick_jit(step)(params, init(params), batch)
    assert_close((ours, found), (wanted, losses), 1e-6)
    assert jax.tree.structure(own) == jax.tree.structure(state)
    seen = wanted if heads_first else params
    np.testing.assert_allclose(aux["head"], seen["heads"]["t1"], rtol=1e-5)
    assert not np.allclose(wanted["heads"]["t1"], params["heads"]["t1"])


@pytest.mark.parametrize("mode", MODES[1:])
def test_mode_of_the_steps_is_passed_on(mode):
    params, batch = net()
    modes = []

    def spy(updates, state, params=None):
        modes.append(updates["trunk"]["w"].operator.mode)
        return updates, state

    init, step = mtl.look_ahead_steps(
        net_losses,
        0.1,
        optax.chain(
            optax.GradientTransformation(lambda p: optax.EmptyState(), spy),
            mtl.sum_tasks(3),
        ),
        optax.sgd(0.1),
        shared=MASK,
        mode=mode,
    )
    ours = laws.quick_jit(step)(params, init(params), batch)
    assert modes == [mode]
    assert_close(ours[0], stepped(), 1e-5)


@functools.cache
def stepped():
    params, batch = net()
    init, step = mtl.look_ahead_steps(
        net_losses, 0.1, mtl.sum_tasks(3), optax.sgd(0.1), shared=MASK
    )
    return laws.quick_jit(step)(params, init(params), batch)[0]


def test_steps_with_one_batch_a_task():
    params, batch = tasks_apart()
    mask = {"w": True, "heads": False}
    loss_fn = lambda p, b: one_loss(p, b, 1.0)  # noqa: E731
    init, step = steps_of(loss_fn, shared=mask, in_axes=(None, 0))
    state, step = init(params), laws.quick_jit(step)
    first = last = None
    for _ in range(60):
        params, state, last = step(params, state, batch)
        first = last if first is None else first
    assert np.all(last < first)


# ------------------------------------------------------------------------- wrong inputs


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"inner_learning_rate": -0.1}, ValueError, "must not be negative, got -0.1"),
        ({"inner_learning_rate": float("nan")}, ValueError, "must not be negative"),
        ({"inner_learning_rate": jnp.ones(2)}, ValueError, r"scalar, got shape \(2,\)"),
        ({"inner_learning_rate": "0.1"}, TypeError, "must be a number.*got str"),
        ({"inner_learning_rate": None}, TypeError, "must be a number.*got NoneType"),
        (
            {"inner_learning_rate": optax.constant_schedule(0.1)},
            TypeError,
            "its value at this step.*got function",
        ),
        ({"inner_learning_rate": jnp.array(1j)}, TypeError, "real number.*complex"),
        ({"inner_learning_rate": True}, TypeError, "real number.*bool"),
        ({"inner_learning_rate": jnp.inf}, ValueError, "below inf"),
        ({"mode": "loop"}, ValueError, "mode must be one of .*got 'loop'"),
        ({"in_axes": 0}, TypeError, "in_axes must be a tuple"),
        ({"in_axes": (None, 0, 0)}, ValueError, "3 entries for 2 positional"),
        ({"in_axes": (0, None)}, ValueError, r"in_axes\[0\] must be None"),
        ({"shared": {"trunk": 1, "heads": 0}}, TypeError, "must hold bools.*got 0"),
        (
            {"shared": False},
            ValueError,
            "marks no leaf as shared, so there is nothing to look ahead with: use "
            "mtl_optax.task_jacobian for plain task gradients, or check the mask",
        ),
        ({"shared": {"trunk": True}}, ValueError, "look_ahead_jacobian: the mask must"),
        ({"inner_batch": 3.0}, ValueError, "must have the structure of.*argument 1"),
        ({"loss_fn": lambda p, b: p["trunk"]["b"][0]}, ValueError, "one scalar"),
        ({"loss_fn": lambda p, b: p["trunk"]["w"]}, ValueError, "one scalar a task"),
        ({"loss_fn": lambda p, b: {"a": p["trunk"]["b"]}}, ValueError, "'a' must be a"),
        ({"loss_fn": lambda p, b: jnp.arange(2)}, TypeError, "floating-point"),
        ({"loss_fn": lambda p, b: jnp.ones(2)}, ValueError, "zero everywhere"),
        ({"has_aux": True}, TypeError, r"must return a tuple \(losses, aux\)"),
    ],
)
def test_wrong_inputs(change, error, words):
    params, batch = net()
    kwargs = {"loss_fn": net_losses, "inner_learning_rate": 0.1, **change}
    with pytest.raises(error, match=words):
        mtl.look_ahead_jacobian(**kwargs)(params, batch)


def test_wrong_inner_batch():
    params, (x, y) = net()
    loss_fn = lambda p, x, y: net_losses(p, (x, y))  # noqa: E731
    for inner, words in (
        (x, "tuple with one entry for each of the 2 .*got ArrayImpl"),
        ((x, y, y), "got tuple of 3"),
        ((x, (y, y)), "argument 2"),
    ):
        with pytest.raises(ValueError, match=words):
            mtl.look_ahead_jacobian(loss_fn, 0.1, inner_batch=inner)(params, x, y)
    with pytest.raises(ValueError, match="called without any"):
        mtl.look_ahead_jacobian(lambda p: net_losses(p, (x, y)), 0.1, inner_batch=x)(
            params
        )
    square = lambda p, x: jnp.sum(p * x, axis=1)  # noqa: E731
    with pytest.raises(ValueError, match=r"\('0', '1', '2'\) on inner_batch"):
        mtl.look_ahead_jacobian(square, 0.1, inner_batch=jnp.ones((3, 2)))(
            jnp.ones(2), jnp.ones((4, 2))
        )
    apart, batches = tasks_apart(3)
    _, fewer = tasks_apart(2)
    with pytest.raises(ValueError, match="inner_batch holds 2 tasks, the batch 3"):
        mtl.look_ahead_jacobian(
            lambda p, b: one_loss(p, b, 1.0), 0.1, in_axes=(None, 0), inner_batch=fewer
        )(apart, batches)


def test_wrong_parameters():
    _, batch = net()
    look = mtl.look_ahead_jacobian(net_losses, 0.1)
    with pytest.raises(TypeError, match="dtype int32"):
        look({"w": jnp.arange(3)}, batch)
    with pytest.raises(ValueError, match="no leaves"):
        look({}, batch)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"shared": None}, TypeError, "look_ahead_steps: shared must say"),
        (
            {"shared": False},
            ValueError,
            "look_ahead_steps: the mask marks no leaf as shared, so nothing looks",
        ),
        ({"shared": {"trunk": "yes"}}, TypeError, "look_ahead_steps: .*bools"),
        ({"shared_tx": 0.1}, TypeError, "shared_tx must be an optax transform"),
        ({"heads_tx": None}, TypeError, "heads_tx must be an optax transform"),
        ({"heads_tx": optax.adam}, TypeError, "heads_tx .*must be called first"),
        ({"mode": "loop"}, ValueError, "mode must be one of .*got 'loop'"),
        ({"inner_learning_rate": -1}, ValueError, "look_ahead_steps: inner_learning"),
        ({"shared_tx": optax.adam(0.1)}, TypeError, "lazy task gradient"),
        ({"shared_tx": mtl.mgda(2)}, ValueError, r"expected shape \(2, .*3 tasks"),
        ({"task_mask": jnp.ones(3)}, ValueError, "task_mask: expected bools.*float32"),
        ({"task_mask": np.array([True])}, ValueError, r"\(3,\).*got bool of shape \(1"),
    ],
)
def test_wrong_inputs_of_the_steps(change, error, words):
    params, batch = net()
    change = dict(change)
    extra = {"task_mask": change.pop("task_mask")} if "task_mask" in change else {}
    kwargs = {
        "loss_fn": net_losses,
        "inner_learning_rate": 0.1,
        "shared_tx": mtl.sum_tasks(3),
        "heads_tx": optax.sgd(0.1),
        "shared": MASK,
        **change,
    }

    def run():
        init, step = mtl.look_ahead_steps(**kwargs)
        step(params, init(params), batch, **extra)

    with pytest.raises(error, match=words):
        run()
