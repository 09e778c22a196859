"""The laws every method obeys, as functions of a registry row that raise.

``check_*`` functions take a row of `mtl_optax.METHODS` (or a deliberately broken one,
see `broken`) and raise AssertionError when the method breaks the law. What a method
needs is read off its row, never off its name.

Most laws look at the same thing: what a method does over a few steps on given rows. So
there is one compiled function a method and shape (`trajectories`): many runs at once,
each a scan over `STEPS` steps, long enough to fill the default histories.
"""

import contextlib
import functools
import inspect
import itertools
import typing
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mtl_optax as mtl

SHAPES = {"b": (), "v": (5,), "w": (3, 4)}
SIZE = 18
RUNS, STEPS = 64, 14
FAMILIES = ("plain", "conflicting", "lengths", "lengths, conflicting")
TASKS = (2, 3, 7)

CLAIMS = (
    "non_conflicting",
    "permutation_equivariant",
    "scale_equivariant",
    "row_scale_invariant",
    "stops_at_pareto_stationary",
    "linear_under_scaling",
)


def one_of_each_kind() -> list[mtl.Method]:
    """The first method of every kind and set of needs."""
    rows = reversed(mtl.METHODS.values())
    return list({(m.kind, m.needs): m for m in rows}.values())


def one_of_each_sort() -> list[mtl.Method]:
    """A few: the first of every kind with a Gramian or not, more arguments or not."""

    def sort_of(method):
        plain = method.needs <= {"gramian", "gramian_in_basis"}
        return method.kind, sees_gramian(method), plain

    return list({sort_of(m): m for m in reversed(mtl.METHODS.values())}.values())


def sees_gramian(method: mtl.Method) -> bool:
    return bool(method.needs & {"gramian", "gramian_in_basis"})


@functools.cache
def _quick_options():
    """What makes XLA compile small CPU programs up to five times faster.

    The options differ from version to version. Law 2 compiles with the defaults.
    """
    if jax.default_backend() != "cpu":
        return {}
    level = {"xla_backend_optimization_level": 0}
    for options in ({"xla_cpu_use_fusion_emitters": False, **level}, level):
        try:
            jax.jit(lambda x: x + 1, compiler_options=options)(0)
        except Exception:  # an option this version does not know
            continue
        return options
    return {}


def quick_jit(function, **options):
    return jax.jit(function, compiler_options=_quick_options(), **options)


def usual_jit(function, **options):
    """``jax.jit`` whatever the flags the tests run with."""
    usual = {name: True for name in _quick_options() if name.endswith("emitters")}
    return jax.jit(function, compiler_options=usual, **options)


# ------------------------------------------------------------- trees and flat rows


def to_tree(rows):
    """``[..., SIZE]`` to a tree whose leaves are ``[..., *shape]``."""
    ends = list(itertools.accumulate(int(np.prod(s)) for s in SHAPES.values()))
    parts = np.split(np.arange(SIZE), ends[:-1])
    return {
        name: rows[..., part].reshape(rows.shape[:-1] + shape)
        for (name, shape), part in zip(SHAPES.items(), parts, strict=True)
    }


def to_flat(tree):
    """The inverse, for a tree of updates."""
    return jnp.concatenate([jnp.ravel(tree[name]) for name in SHAPES])


def params_of(dtype=jnp.float32):
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def paths_and_leaves(tree):
    return [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def history(state):
    """What a method needs at its next step: leaves that stand in no ``info``."""
    return [(p, leaf) for p, leaf in paths_and_leaves(state) if ".info" not in p]


def assert_trees_close(found, wanted, tolerance, what):
    """Equal structure, shapes, dtypes; values within `tolerance` of the leaf's size."""
    chex.assert_trees_all_equal_structs(found, wanted)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, wanted)
    for (path, a), b in zip(
        paths_and_leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        if jnp.issubdtype(b.dtype, jnp.inexact):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            # What is only looked at (residuals, shares) is of order 1.
            size = max(np.abs(b).max(initial=0), 1 if ".info" in path else 0)
            np.testing.assert_allclose(
                a, b, rtol=0, atol=tolerance * size, err_msg=f"{what}: {path}"
            )
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"{what}: {path}")


# -------------------------------------------------------------------- trajectories


class Trajectories(NamedTuple):
    """What a method did: ``[RUNS, STEPS, ...]``, in float64."""

    updates: np.ndarray
    weights: np.ndarray | None
    states: Any
    normalises: bool

    def longest(self, rows):
        """``[RUNS, STEPS]``: the longest row that went into the update.

        Of a method that takes the lengths of rows away: the run's longest update.
        """
        if self.normalises:
            lengths = np.linalg.norm(self.updates, axis=-1)
            longest = np.maximum(lengths.max(1), np.finfo(np.float32).tiny)
            return np.broadcast_to(longest[:, None], lengths.shape)
        lengths = np.linalg.norm(rows, axis=-1)
        if self.weights is not None:
            lengths = lengths * np.abs(self.weights)
        elif history(self.states):  # rows of earlier steps may have been longer
            own = np.linalg.norm(self.updates, axis=-1, keepdims=True)
            lengths = np.concatenate([lengths, own], axis=-1)
        return np.maximum(lengths.max(-1), np.finfo(np.float32).tiny)


ROUND = np.linspace(0, 0.05, SIZE)


def rows_of(method, rows):
    """Flat rows ``[T, SIZE]`` as the task gradients that `method` combines.

    A method that only combines gets them as they are. One that takes task gradients
    itself gets losses whose plain gradients they are, curved in proportion to them:
    ``L_t = |g_t| (u_t . p + p . diag(ROUND) p / 2)`` at ``p = 0``, with unit rows
    ``u_t``.
    """
    if method.kind != "jacobian":
        return to_tree(rows)
    lengths = jnp.linalg.norm(rows, axis=-1)
    units = rows / jnp.maximum(lengths, jnp.finfo(rows.dtype).tiny)[:, None]

    def losses(params):
        p = to_flat(params)
        bent = jnp.sum(jnp.asarray(ROUND, p.dtype) * p**2) / 2
        return tuple(n * (u @ p + bent) for n, u in zip(lengths, units, strict=True))

    _, grads = method.jacobian(losses)(params_of(rows.dtype))
    return mtl.materialize(grads, isolated=True)


def extras_of(method, num_tasks, losses, params=None, grads=None):
    """What `update` needs; strengths and delta_m follow each task's own loss.

    So they change from step to step, and go along when tasks are permuted or absent.
    Task gradients of other batches follow `grads` in the same way.
    """
    params = params_of() if params is None else params
    extras = {**method.extras(num_tasks, params), "losses": losses}
    if "delta_m" in method.needs:
        extras["delta_m"] = 30 * losses / (1 + jnp.abs(losses))
    if "strengths" in method.needs:
        extras["strengths"] = jax.tree.map(
            lambda p: strengths_by_loss(losses, p.shape[-1]) if p.ndim > 1 else None,
            params,
        )
    if "other_task_grads" in method.needs and grads is not None:
        extras["other_task_grads"] = other_batches(mtl.materialize(grads))
    return extras


def other_batches(rows):
    """Task gradients of two more batches: every row bent, each as far as its length."""

    def bent(leaf, phase):
        places = jnp.arange(leaf[0].size).reshape(leaf.shape[1:])
        return leaf * (1 + 0.2 * jnp.sin(places + phase)).astype(leaf.dtype)

    return tuple(
        jax.tree.map(lambda leaf, p=phase: bent(leaf, p), rows) for phase in (1.0, 2.0)
    )


def strengths_by_loss(losses, channels):
    """``[T, C]``, from `oracles.strengths_by_loss`' formula."""
    x = losses / (1 + jnp.abs(losses))
    return 2 + jnp.sin(5 * (jnp.arange(channels) + 1) * x[:, None])


@functools.cache
def _trajectories(method, num_tasks, masked):
    tx = method.make(num_tasks)

    def one(rows, losses, masks):
        params = params_of(rows.dtype)

        def step(state, now):
            row, loss, mask = now
            grads = rows_of(method, row)
            extras = extras_of(method, num_tasks, loss, grads=grads)
            if masked:
                extras["task_mask"] = mask
            updates, state = tx.update(grads, state, params, **extras)
            return state, (to_flat(updates), state)

        return jax.lax.scan(step, tx.init(params), (rows, losses, masks))[1]

    return quick_jit(jax.vmap(one))


def trajectories(method, rows, losses, masks=None) -> Trajectories:
    """Runs `method` on rows ``[RUNS, STEPS, T, SIZE]`` and losses ``[..., T]``."""
    num_tasks = rows.shape[2]
    masked = masks is not None
    masks = np.ones(rows.shape[:-1], bool) if masks is None else masks
    run = _trajectories(method, num_tasks, masked)
    updates, states = run(rows, losses, masks)
    weights = weights_of(states)
    weights = None if weights is None else np.asarray(weights, np.float64)
    updates = np.asarray(updates, np.float64)
    return Trajectories(updates, weights, states, method.normalises)


def weights_of(state):
    """The weights, or None where there are none or several (one a group)."""
    found = optax.tree_utils.tree_get_all_with_path(state, "task_weights")
    return found[0][1] if len(found) == 1 else None


def fill(runs):
    """Repeats runs ``[n, ...]`` to the number that is compiled for."""
    runs = np.asarray(runs)
    return runs[np.arange(RUNS) % len(runs)]


@functools.cache
def draws(num_tasks, seed=0, dtype=np.float32):
    """Random rows ``[RUNS, STEPS, T, SIZE]``, losses ``[RUNS, STEPS, T]``.

    A run belongs to one of `FAMILIES`, by its number.
    """
    rng = np.random.default_rng([seed, num_tasks])
    rows = rng.standard_normal((RUNS, STEPS, num_tasks, SIZE))
    family = np.arange(RUNS) % 4
    opposed = np.isin(family, (1, 3))[:, None, None, None]
    rows = np.where(opposed, rows - 0.9 * rows.mean(2, keepdims=True), rows)
    uneven = np.isin(family, (2, 3))[:, None, None, None]
    lengths = 10 ** rng.uniform(0, 4, (RUNS, STEPS, num_tasks, 1))
    rows = np.where(uneven, rows * lengths, rows)
    losses = 10 ** rng.uniform(-2, 2, (RUNS, STEPS, num_tasks))
    return rows.astype(dtype), losses.astype(dtype)


# ----------------------------------------------------- 1. structure, shapes, dtypes


def small_params(kind):
    dtypes = {
        "float32": (jnp.float32, jnp.float32),
        "bfloat16": (jnp.bfloat16, jnp.bfloat16),
        "float64": (jnp.float64, jnp.float64),
        "mixed": (jnp.bfloat16, jnp.float32),
    }[kind]
    return {
        "head": (jnp.zeros((2, 3), dtypes[0]), jnp.zeros((), dtypes[1])),
        "trunk": jnp.zeros((4,), dtypes[1]),
    }


def quadratic_losses(params, targets):
    """``[T]`` losses that touch every leaf."""
    total = sum(jnp.sum(p.astype(targets.dtype)) for p in jax.tree.leaves(params))
    square = sum(jnp.sum(p.astype(targets.dtype) ** 2) for p in jax.tree.leaves(params))
    return targets * total + square


def check_types(method, kind, num_tasks=3):
    """Law 1: updates are like the parameters, the state like its first value."""
    params = small_params(kind)
    wide = jnp.float64 if kind == "float64" else jnp.float32
    tx = method.make(num_tasks)
    targets = jax.ShapeDtypeStruct((num_tasks,), wide)

    def stacked(params, state, targets):
        grads = jax.tree.map(lambda p: jnp.ones((num_tasks, *p.shape), p.dtype), params)
        extras = extras_of(method, num_tasks, targets, params, grads)
        return tx.update(grads, state, params, unknown_extra=1, **extras)

    def lazy(params, state, targets):
        losses, grads = method.jacobian(quadratic_losses)(params, targets)
        extras = extras_of(method, num_tasks, losses, params, grads)
        return tx.update(grads, state, params, **extras)

    first = jax.eval_shape(tx.init, params)
    for leaf in jax.tree.leaves(first):
        assert not leaf.weak_type, f"init holds a weakly typed value: {leaf}"
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            assert leaf.dtype == wide, f"state in {leaf.dtype} for {kind} parameters"
    for step in (stacked, lazy):
        updates, state = jax.eval_shape(step, params, first, targets)
        chex.assert_trees_all_equal_structs(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        for now in (state, jax.eval_shape(step, params, state, targets)[1]):
            chex.assert_trees_all_equal_structs(now, first)
            for (path, a), b in zip(
                paths_and_leaves(now), jax.tree.leaves(first), strict=True
            ):
                same = (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False)
                assert same, f"state{path}: {b} at init, {a} after a step"


# --------------------------------------------------------------- 2. the compiled step


class Step(NamedTuple):
    """One step ``(rows, losses, state) -> (updates, state)``, eager and compiled."""

    init: Any
    eager: Any
    compiled: Any
    traces: list


@functools.cache
def step_of(method, num_tasks):
    """A step as users compile it: default options, the state donated."""
    tx = method.make(num_tasks)
    traces = []

    def eager(rows, losses, state):
        grads = rows_of(method, rows)
        extras = extras_of(method, num_tasks, losses, grads=grads)
        updates, state = tx.update(grads, state, params_of(), **extras)
        return to_flat(updates), state

    def traced(rows, losses, state):
        traces.append(rows)
        return eager(rows, losses, state)

    return Step(
        lambda: tx.init(params_of()), eager, jax.jit(traced, donate_argnums=2), traces
    )


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def check_compiles_once(method, num_tasks=3):
    """Law 2: one trace; donation, ``vmap`` of ``scan`` and eager agree."""
    rows, losses = draws(num_tasks)
    step = step_of(method, num_tasks)
    state = step.init()
    filled = [leaf for leaf in jax.tree.leaves(state) if leaf.size]
    buffers = {leaf.unsafe_buffer_pointer() for leaf in filled}
    assert len(buffers) == len(filled), "init returns one array twice"
    run = trajectories(method, rows, losses)

    def agrees(updates, state, at, what):
        size = run.longest(rows)[0, at]
        np.testing.assert_allclose(
            updates, run.updates[0, at], rtol=0, atol=2e-5 * size, err_msg=what
        )
        wanted = jax.tree.map(lambda leaf: leaf[0, at], run.states)
        assert_trees_close(state, wanted, 1e-4, what)

    traces = len(step.traces)
    for k in range(STEPS):
        last = copied(state)
        updates, state = step.compiled(rows[0, k], losses[0, k], state)
        agrees(updates, state, k, f"jit with donation, step {k}")
    assert len(step.traces) - traces <= 1, "a later step is compiled anew"
    assert step.compiled._cache_size() == 1, "a later step is compiled anew"
    agrees(*step.eager(rows[0, k], losses[0, k], last), k, "eager")


def check_precision(method, num_tasks=3):
    """Every product of matrices asks for full precision: others lose digits on GPUs."""
    tx = method.make(num_tasks)

    def step(rows, losses):
        grads = to_tree(rows)
        extras = extras_of(method, num_tasks, losses, grads=grads)
        return tx.update(grads, tx.init(params_of()), params_of(), **extras)

    rows, losses = draws(num_tasks)
    highest = jax.lax.Precision.HIGHEST
    for equation in equations(jax.make_jaxpr(step)(rows[0, 0], losses[0, 0]).jaxpr):
        if equation.primitive.name == "dot_general":
            asked = equation.params["precision"]
            assert asked in (highest, (highest, highest)), f"{asked}: {equation}"


def equations(jaxpr):
    """All equations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# ------------------------------------------------------------------ 3. stacked = lazy


def mlp_params(dtype=jnp.float32, width=8, inputs=6, tasks=3):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), dtype)

    return {
        "heads": [normal(width, 1) for _ in range(tasks)],
        "trunk": {"b": jnp.zeros((width,), dtype), "w": normal(inputs, width)},
    }


def mlp_batch(tasks=3, rows=16, inputs=6, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, inputs))
    y = rng.standard_normal((rows, tasks))
    return jnp.asarray(x, dtype), jnp.asarray(y, dtype)


def mlp_dict(params, x, y):
    h = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    errors = [(h @ v)[:, 0] - y[:, t] for t, v in enumerate(params["heads"])]
    return {f"task{t}": jnp.mean(jnp.square(e)) for t, e in enumerate(errors)}


def mlp_array(params, x, y):
    h = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    heads = jnp.concatenate(params["heads"], axis=1)
    return jnp.mean(jnp.square(h @ heads - y), axis=0)


def mlp_one(params, batch):
    x, y, own = batch
    h = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    heads = jnp.concatenate(params["heads"], axis=1)
    return jnp.mean(jnp.square(h @ (heads @ own) - y))


def _jacobian(method, form):
    """Joint losses as a dict or an array, or one batch a task."""
    if form == "one batch a task":

        def arguments(x, y):
            tasks = y.shape[1]
            turned = jnp.stack([jnp.roll(x, t, axis=1) for t in range(tasks)])
            return (turned, y.T, jnp.eye(tasks, dtype=x.dtype))

        jacobian = method.jacobian(mlp_one, in_axes=(None, 0))
        return lambda params, x, y: jacobian(params, arguments(x, y))
    loss_fn = {"dict": mlp_dict, "array": mlp_array}[form]
    return method.jacobian(loss_fn)


FORMS = ("dict", "array", "one batch a task")


class Forms(NamedTuple):
    """A way to write the losses, with or without a mask, in one dtype."""

    losses: str
    dtype: Any = jnp.float32
    masked: bool = False


def check_lazy(method, form, num_tasks=3):
    """Law 3: lazy and stacked task gradients give the same updates and states.

    Parameters jump about from step to step, the same for both. With a mask this is
    law 12 for lazy task gradients.
    """
    # A bfloat16 backward pass itself is wrong by about 1 eps (lazy and stacked are each
    # 5e-3 to 7e-3 away from float32 gradients here, and so are they from each other).
    low = form.dtype == jnp.bfloat16
    tolerance = 2 * float(jnp.finfo(jnp.bfloat16).eps) if low else 1e-5
    tx = method.make(num_tasks)
    params = mlp_params(form.dtype, tasks=num_tasks)
    x, y = mlp_batch(num_tasks, dtype=form.dtype)
    jacobian = _jacobian(method, form.losses)
    rng = np.random.default_rng(2)
    moves = jax.tree.map(
        lambda p: jnp.asarray(0.3 * rng.standard_normal((STEPS, *p.shape)), p.dtype),
        params,
    )
    masks = np.ones((STEPS, num_tasks), bool)
    if form.masked:
        masks[:, 1] = np.arange(STEPS) % 3 == 0

    @quick_jit
    def both(moves, masks):
        def body(states, now):
            move, mask = now
            at = jax.tree.map(jnp.add, params, move)
            losses, lazy = jacobian(at, x, y)
            stacked = mtl.materialize(lazy)
            extras = extras_of(method, num_tasks, losses, at, stacked)
            if form.masked:
                extras["task_mask"] = mask
            one, first = tx.update(stacked, states[0], at, **extras)
            del extras["losses"]  # a lazy tree knows them
            two, second = tx.update(lazy, states[1], at, **extras)
            return (first, second), (one, two, first, second, stacked)

        states = (tx.init(params), tx.init(params))
        return jax.lax.scan(body, states, (moves, masks))[1]

    one, two, first, second, stacked = both(moves, masks)
    chex.assert_trees_all_equal_shapes_and_dtypes(one, two)

    def flat(tree, *lead):
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        return np.concatenate([x.reshape(*lead, -1) for x in leaves], axis=-1)

    lengths = np.linalg.norm(flat(stacked, STEPS, num_tasks), axis=-1)
    weights = weights_of(first)
    if weights is not None:
        lengths = lengths * np.abs(np.asarray(weights, np.float64))
    error = np.linalg.norm(flat(one, STEPS) - flat(two, STEPS), axis=1)
    error = np.max(error / lengths.max(1))
    assert error < tolerance, f"updates differ by {error:.1e} of the longest row"
    assert_trees_close(second, first, tolerance, "state")
    return error


# ---------------------------------------------------------- 4. one task is training


def check_one_task(method):
    """Law 4: with one task, the update is the gradient up to a positive factor."""
    rows, losses = draws(1)
    run = trajectories(method, rows, losses)
    rows = rows[:, :, 0].astype(np.float64)
    along = np.sum(run.updates * rows, -1)
    lengths = np.linalg.norm(run.updates, axis=-1) * np.linalg.norm(rows, axis=-1)
    assert np.all(lengths > 0), "a zero update for a nonzero gradient"
    cosine = along / lengths
    assert np.all(cosine > 1 - 1e-5), f"cosine {cosine.min():.6f} with the gradient"


# -------------------------------------------------------------------- 6. finite output


@functools.cache
def degenerate(num_tasks):
    """Named rows ``[RUNS, STEPS, T, SIZE]`` and losses that break careless methods."""
    rng = np.random.default_rng([6, num_tasks])
    base = rng.standard_normal((STEPS, num_tasks, SIZE))
    still = np.broadcast_to(base[:1], base.shape)
    signs = np.where(np.arange(num_tasks) % 2, -1.0, 1.0)[:, None]
    first = base[:, :1]
    one = np.arange(num_tasks)[:, None] == 1 % num_tasks
    low = rng.standard_normal((STEPS, num_tasks, 2)) @ base[:, :2][:, [0, -1]]
    narrow = base * (np.arange(SIZE) < 2)  # more tasks than parameters that matter
    turn = np.arange(STEPS)[:, None, None]
    cases = {
        "zero": 0 * base,
        "one zero": np.where(one, 0, base),
        "all but one zero": np.where(one, base, 0),
        "zero at times": np.where((turn % 4 == 1) & one, 0, base),
        "all zero at times": np.where(turn % 4 == 1, 0, base),
        "from zero": np.where(turn < 3, 0, base),
        "to zero": np.where(turn > 11, 0, base),
        "constant": still,
        "duplicate": np.broadcast_to(first, base.shape),
        "constant duplicate": np.broadcast_to(still[:, :1], base.shape),
        "two alike": np.where(one, first, base),
        "parallel": first * np.exp(rng.standard_normal((num_tasks, 1))),
        "opposite": signs * first,
        "opposite, uneven": signs * first * np.exp(base[:, :, :1]),
        "nearly opposite": signs * first + 1e-7 * base,
        "nearly alike": first + 1e-4 * base,
        "within rounding": first * (1 + 1e-7 * base),
        "one entry": base * (np.arange(SIZE) == 3),
        "rank two": low,
        "more tasks than parameters": narrow,
        "stationary": base - base.mean(1, keepdims=True),
    }
    for power in (-10, -5, 5, 10):
        cases[f"scale 1e{power}"] = 10.0**power * base
        cases[f"scale 1e{power}, opposite"] = 10.0**power * signs * first
        cases[f"scale 1e{power}, one zero"] = 10.0**power * np.where(one, 0, base)
    cases["scales in turn"] = 10.0 ** (10 * np.sin(turn)) * base
    for power in (2, 4, 6):
        spread = 10.0 ** np.linspace(0, power, num_tasks)[:, None]
        cases[f"lengths up to 1e{power}"] = spread * base
        cases[f"lengths down to 1e-{power}"] = base / spread
        cases[f"lengths up to 1e{power}, opposite"] = spread * signs * first
    losses = {
        "around 1": 1 + np.arange(num_tasks) / 8,
        "loss 1": np.ones(num_tasks),
        "loss 0": np.zeros(num_tasks),
        "one loss 0": np.arange(num_tasks) * 1.0,
        "negative": -np.arange(1.0, num_tasks + 1),
        "huge": np.full(num_tasks, 1e30),
        "tiny": np.full(num_tasks, 1e-30),
        "huge and tiny": 10.0 ** np.linspace(-30, 30, num_tasks),
    }
    names = list(cases)
    rows = [cases[n] for n in names]
    given = [np.broadcast_to(losses["around 1"], (STEPS, num_tasks))] * len(rows)
    for name, values in losses.items():
        names.append(name)
        rows.append(base)
        given.append(np.broadcast_to(values, (STEPS, num_tasks)))
    assert len(names) <= RUNS
    return names, fill(rows).astype(np.float32), fill(given).astype(np.float32)


def check_finite(method, num_tasks):
    """Law 6: finite updates and states, whatever the gradients and losses."""
    names, rows, losses = degenerate(num_tasks)
    run = trajectories(method, rows, losses)
    leaves = [("updates", run.updates), *paths_and_leaves(run.states)]
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        finite = np.isfinite(leaf).reshape(RUNS, STEPS, -1).all(-1)
        for run_at, step in np.argwhere(~finite):
            name = names[run_at % len(names)]
            raise AssertionError(f"{path} not finite: {name!r}, step {step}")


# --------------------------------------------------------- 5 and 7. what is claimed


def violation(claim, method, rows, losses):
    """``[RUNS, STEPS]``: how much the claim is broken; 0 where it holds exactly."""
    return _VIOLATIONS[claim](method, rows, losses)


def _conflicts(method, rows, losses):
    run = trajectories(method, rows, losses)
    long_rows = rows.astype(np.float64)
    length = np.linalg.norm(run.updates, axis=-1)
    products = np.einsum("rktp,rkp->rkt", long_rows, run.updates)
    lengths = np.linalg.norm(long_rows, axis=-1) * length[..., None]
    cosines = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1), 0)
    # A shorter update is rounding of rows that cancel.
    real = length > 1e-3 * run.longest(rows)
    return np.where(real, np.maximum(-cosines.min(-1), 0), 0)


def _differs(run, other, rows, other_rows=None):
    size = np.maximum(run.longest(rows), other.longest(rows))
    return np.linalg.norm(run.updates - other.updates, axis=-1) / size


def _depends_on_order(method, rows, losses):
    run = trajectories(method, rows, losses)
    worst = np.zeros(rows.shape[:2])
    orders = [np.arange(rows.shape[2])[::-1], np.roll(np.arange(rows.shape[2]), 1)]
    for order in orders:
        other = trajectories(method, rows[:, :, order], losses[:, :, order])
        worst = np.maximum(worst, _differs(run, other, rows))
        if run.weights is not None:
            moved = run.weights[..., order] - other.weights
            lengths = np.linalg.norm(rows.astype(np.float64), axis=-1)[..., order]
            gap = np.abs(moved) * lengths
            size = np.maximum(run.longest(rows), np.finfo(np.float32).tiny)
            worst = np.maximum(worst, gap.max(-1) / size)
    return worst


def _depends_on_scale(method, rows, losses):
    run = trajectories(method, rows, losses)
    worst = np.zeros(rows.shape[:2])
    for factor in (1e-3, 1e3):
        other = trajectories(method, rows * np.float32(factor), losses)
        other = other._replace(updates=other.updates / factor)
        worst = np.maximum(worst, _differs(run, other, rows))
    return worst


def _not_linear(method, rows, losses):
    """``A(diag(c) J) + A(diag(d) J)`` against ``A(diag(c + d) J)``."""
    rng = np.random.default_rng(9)
    shape = (RUNS, 1, rows.shape[2], 1)
    first, second = (10 ** rng.uniform(-1, 1, shape) for _ in range(2))
    runs = [
        trajectories(method, (rows * c).astype(np.float32), losses)
        for c in (first, second, first + second)
    ]
    apart = runs[0].updates + runs[1].updates - runs[2].updates
    return np.linalg.norm(apart, axis=-1) / runs[2].longest(rows * (first + second))


def _depends_on_lengths(method, rows, losses):
    rng = np.random.default_rng(7)
    factors = 10 ** rng.uniform(-2, 2, (RUNS, 1, rows.shape[2], 1))
    scaled = (rows * factors).astype(np.float32)
    run, other = (trajectories(method, r, losses) for r in (rows, scaled))
    a, b = (np.linalg.norm(t.updates, axis=-1) for t in (run, other))
    product = np.sum(run.updates * other.updates, -1)
    cosine = product / np.maximum(a * b, np.finfo(np.float32).tiny)
    real = (a > 1e-2 * run.longest(rows)) & (b > 1e-2 * other.longest(scaled))
    # An angle: the sine is not squared away as 1 - cosine is.
    return np.where(real, np.sqrt(np.maximum(1 - cosine, 0)), 0)


def least_norm(rows):
    """Length of the shortest convex combination, relative to the shortest row."""
    from oracles import simplex_weights

    lengths = np.linalg.norm(rows, axis=-1)
    if lengths.min() == 0:
        return 0.0
    point = simplex_weights(rows @ rows.T) @ rows
    return np.linalg.norm(point) / lengths.min()


def _misses_stationary(method, rows, losses):
    """Not zero where some convex combination is, or zero where none is.

    In float32 a sum of rows that cancel is zero up to ``sqrt(eps)`` of their length.
    """
    run = trajectories(method, rows, losses)
    length = np.linalg.norm(run.updates, axis=-1) / run.longest(rows)
    shortest = np.array(
        [[least_norm(r) for r in steps] for steps in rows.astype(np.float64)]
    )
    stationary, plain = shortest < 1e-5, shortest > 1e-1
    stops_early = np.where(length > 1e-6, 0, 1)
    return np.where(stationary, length, np.where(plain, stops_early, 0))


_VIOLATIONS = {
    "non_conflicting": _conflicts,
    "permutation_equivariant": _depends_on_order,
    "scale_equivariant": _depends_on_scale,
    "row_scale_invariant": _depends_on_lengths,
    "stops_at_pareto_stationary": _misses_stationary,
    "linear_under_scaling": _not_linear,
}

# Rounding of float32 on the draws below.
TOLERANCES = {
    "non_conflicting": 1e-4,
    "permutation_equivariant": 1e-3,
    "scale_equivariant": 1e-3,
    "row_scale_invariant": 1e-2,
    "stops_at_pareto_stationary": 3e-3,
    "linear_under_scaling": 1e-3,
}


def stationary_draws(num_tasks):
    """Draws of which every second step is Pareto stationary."""
    rows, losses = draws(num_tasks)
    rng = np.random.default_rng([8, num_tasks])
    rows = rows.copy()
    some = rows[:, ::2]
    shares = rng.dirichlet(np.ones(num_tasks - 1), some.shape[:2])
    some[:, :, -1] = -np.einsum("rkt,rktp->rkp", shares, some[:, :, :-1])
    some[:4, :, 0] = 0
    rows[:, ::2] = some
    return rows, losses


def check_claim(method, claim, num_tasks):
    """Law 7 (and 5): a claim holds on hundreds of draws."""
    make = stationary_draws if claim == "stops_at_pareto_stationary" else draws
    broken = violation(claim, method, *make(num_tasks))
    run, step = np.unravel_index(np.argmax(broken), broken.shape)
    assert np.all(broken <= TOLERANCES[claim]), (
        f"{claim} broken by {broken.max():.1e} at T = {num_tasks}: "
        f"{FAMILIES[run % 4]!r}, run {run}, step {step}"
    )


def check_refuted(method, claim, examples):
    """Law 7: a recorded input breaks a claim that is not made, and clearly.

    `examples` is a list of `(rows [T, at most SIZE], losses [T])`, repeated over time.
    """
    worst = {}
    for num_tasks in sorted({len(rows) for rows, _ in examples}):
        chosen = [(r, x) for r, x in examples if len(r) == num_tasks]
        rows = np.zeros((len(chosen), STEPS, num_tasks, SIZE), np.float32)
        losses = np.zeros((len(chosen), STEPS, num_tasks), np.float32)
        for i, (r, x) in enumerate(chosen):
            rows[i, :, :, : np.shape(r)[1]] = r
            losses[i] = x
        found = violation(claim, method, fill(rows), fill(losses))
        worst[num_tasks] = found.max()
    assert max(worst.values()) > 10 * TOLERANCES[claim], (
        f"{method.name} does not claim {claim}, but no recorded example breaks it "
        f"({worst}): claim it, or add an example."
    )


# -------------------------------------------------------------- 8. solvers and oracles


def check_solver(method, num_tasks):
    """Law 8: residuals are visible and small."""
    run = trajectories(method, *draws(num_tasks))
    found = optax.tree_utils.tree_get_all_with_path(run.states, "solver_residual")
    for path, residual in found:
        assert residual.shape == (RUNS, STEPS), f"{path}: {residual.shape}"
        worst = np.max(residual)
        assert worst < 1e-5, f"{path}: residual {worst:.1e} at T = {num_tasks}"
    return len(found)


def check_oracle(method, oracle, num_tasks, dtype=np.float32, tolerance=1e-3):
    """Law 8: weights (updates, of an aggregator) are those of a float64 oracle.

    `oracle(rows [STEPS, T, SIZE], losses [STEPS, T])` gives them for every step of a
    run, in NumPy.
    """
    rows, losses = draws(num_tasks, dtype=dtype)
    if dtype == np.float32:  # plain families only: the others lose digits in float32
        rows, losses = fill(rows[::4]), fill(losses[::4])
    run = trajectories(method, rows, losses)
    number = RUNS // 4 if dtype == np.float32 else RUNS // 2
    for k in range(number):
        exact = rows[k].astype(np.float64)
        wanted = oracle(exact, losses[k].astype(np.float64))
        lengths = np.linalg.norm(exact, axis=-1)
        if run.weights is None:
            updates, size = wanted, lengths.max(1)
        else:
            updates = np.einsum("kt,ktp->kp", wanted, exact)
            size = (np.abs(wanted) * lengths).max(1)
            gap = np.abs(run.weights[k] - wanted) * lengths / size[:, None]
            assert gap.max() < tolerance, (
                f"weights of run {k} differ by {gap.max():.1e}"
            )
        error = np.linalg.norm(run.updates[k] - updates, axis=-1) / size
        assert error.max() < tolerance, (
            f"updates of run {k} differ by {error.max():.1e}"
        )


# ----------------------------------------------------------------- 9. memory and flops


def big_params(num_tasks, width=1024):
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.float32)

    return {"heads": shape(width, num_tasks), "trunk": shape(width, width)}


def big_losses(params, x, y):
    h = jnp.tanh(x @ params["trunk"])
    return jnp.mean(jnp.square(h @ params["heads"] - y), axis=0)


def _compiled(function, num_tasks, *more, width=1024, rows=4):
    batch = (
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, num_tasks), jnp.float32),
    )
    params = big_params(num_tasks, width)
    return quick_jit(function).lower(params, *more, *batch).compile()


@functools.cache
def temporary_bytes(method, num_tasks, lazy):
    tx = method.make(num_tasks)
    state = jax.eval_shape(tx.init, big_params(num_tasks))

    def step(params, state, x, y):
        losses, grads = method.jacobian(big_losses)(params, x, y)
        if not lazy:
            grads = mtl.materialize(grads)
        extras = extras_of(method, num_tasks, losses, params, grads)
        return tx.update(grads, state, params, **extras)

    compiled = _compiled(step, num_tasks, state)
    return compiled.memory_analysis().temp_size_in_bytes


def check_memory(method):
    """Law 9: the lazy path never stores the ``[T, P]`` Jacobian."""
    row = 4 * 1024 * 1024
    few, many = (temporary_bytes(method, t, lazy=True) for t in (8, 32))
    assert many - few < 0.05 * 24 * row, f"{few} bytes at T = 8, {many} at T = 32"
    assert many < 6 * row, f"{many} bytes at T = 32, one gradient is {row}"


def check_memory_beside_stacked(method):
    """Law 9: at four times the tasks, lazy still needs less than stacked."""
    lazy = temporary_bytes(method, 32, lazy=True)
    stacked = temporary_bytes(method, 8, lazy=False)
    assert lazy < stacked, f"{lazy} bytes lazy at T = 32, {stacked} stacked at T = 8"


PLACES = ("plain", "cond", "scan", "shared_only")


def _in_place(step, place):
    """Where a step may stand; `step` returns a tree like the parameters."""
    if place == "cond":
        return lambda params, x, y: jax.lax.cond(
            jnp.sum(y) > 0,
            lambda: step(params, x, y),
            lambda: jax.tree.map(jnp.zeros_like, params),
        )
    if place == "scan":

        def scanned(params, x, y):
            def body(params, _):
                updates = step(params, x, y)
                return jax.tree.map(jnp.subtract, params, updates), None

            return jax.lax.scan(body, params, length=3)[0]

        return scanned
    return step


def check_one_backward_pass(method, place, num_tasks=8):
    """Law 9: a loss-only method on a lazy tree costs what plain training costs."""
    tx = method.make(num_tasks)
    if place == "shared_only":
        tx = mtl.shared_only(tx, {"heads": False, "trunk": True})

    def ours(params, x, y):
        losses, grads = method.jacobian(big_losses)(params, x, y)
        extras = extras_of(method, num_tasks, losses)
        return tx.update(grads, tx.init(params), params, **extras)[0]

    def plain(params, x, y):
        return jax.grad(lambda p: jnp.sum(big_losses(p, x, y)))(params)

    flops = []
    for step in (ours, plain):
        # Weights are applied after the backward pass: one flop a parameter, which
        # counts only beside a tiny batch.
        compiled = _compiled(_in_place(step, place), num_tasks, width=256, rows=64)
        cost = compiled.cost_analysis()
        cost = cost[0] if isinstance(cost, list) else cost
        flops.append(cost["flops"])
    assert flops[0] < 1.01 * flops[1], f"{place}: {flops[0]} flops, plain {flops[1]}"


# ------------------------------------------------------------------- 10. checkpointing


def check_restored(method, save_and_restore, num_tasks=3):
    """Law 10: a restored state continues bit for bit."""
    rows, losses = draws(num_tasks)
    step = step_of(method, num_tasks)
    state = step.init()
    for k in range(STEPS):
        if k == STEPS - 3:
            restored = save_and_restore(copied(state))
            chex.assert_trees_all_equal_structs(restored, state)
            assert_bits_equal(restored, state)
        updates, state = step.compiled(rows[0, k], losses[0, k], state)
        if k >= STEPS - 3:
            again, restored = step.compiled(rows[0, k], losses[0, k], restored)
            assert_bits_equal((again, restored), (updates, state))


def assert_bits_equal(found, wanted):
    for (path, a), b in zip(
        paths_and_leaves(found), jax.tree.leaves(wanted), strict=True
    ):
        assert a.dtype == b.dtype, f"{path}: {a.dtype} became {b.dtype}"
        same = np.asarray(a).tobytes() == np.asarray(b).tobytes()
        assert same, f"{path}: {b} became {a}"


# --------------------------------------------------------------------- 11. wrong input


@contextlib.contextmanager
def refuses(what, kinds, *words):
    """Raises AssertionError unless an error of one of `kinds` says all `words`."""
    raised = None
    try:
        yield
    except Exception as error:
        raised = error
    assert raised is not None, f"{what}: accepted"
    assert isinstance(raised, kinds), f"{what}: raised {raised!r}"
    missing = [word for word in words if word not in str(raised)]
    assert not missing, f"{what}: the message lacks {missing}: {raised}"


def check_wrong_input(method, num_tasks=3):
    """Law 11: what the combiner can see is refused in words at trace time."""
    tx = method.make(num_tasks)
    f32 = jnp.float32
    params = {"trunk": {"w": jnp.zeros((4,))}, "z": jnp.zeros((2, 5))}
    state = jax.eval_shape(tx.init, params)

    def rows(shape, other=(num_tasks, 2, 5), dtype=f32):
        return {
            "trunk": {"w": jax.ShapeDtypeStruct(shape, dtype)},
            "z": jax.ShapeDtypeStruct(other, f32),
        }

    good = rows((num_tasks, 4))
    ones = jax.tree.map(lambda g: jnp.ones(g.shape, g.dtype), good)
    extras = extras_of(method, num_tasks, jnp.ones(num_tasks), params, ones)

    def update(grads, params=params, **changed):
        given = {k: v for k, v in (extras | changed).items() if v is not None}
        return jax.eval_shape(
            lambda g, s, p, e: tx.update(g, s, p, **e), grads, state, params, given
        )

    update(good)
    update(good, params=None)
    shape, kind = ValueError, TypeError
    path = "['trunk']['w']"
    with refuses("wrong T", shape, path, "(3, 4)", "(2, 4)", "2 tasks"):
        update(rows((2, 4)))
    with refuses(
        "wrong T in the second leaf", shape, "['z']", "(3, 2, 5)", "(2, 2, 5)"
    ):
        update(rows((3, 4), (2, 2, 5)))
    with refuses("wrong T, no params", shape, path, "(3,", "(2, 4)"):
        update(rows((2, 4)), params=None)
    with refuses("already reduced", shape, path, "(3, 4)", "(4,)", "already reduced"):
        update(rows((4,), (2, 5)))
    with refuses("task axis missing, no params", shape, path, "(3,", "(4,)"):
        update(rows((4,), (2, 5)), params=None)
    with refuses("task axis last", shape, path, "(3, 4)", "(4, 3)"):
        update(rows((4, 3)))
    with refuses("one leaf missing", shape, "structure", "'z'"):
        update({"trunk": good["trunk"]})
    with refuses("no leaves", shape, "without leaves"):
        update({}, params=None)
    with refuses("integer gradients", kind, path, "int32", "floating"):
        update(rows((3, 4), dtype=jnp.int32))
    with refuses("complex gradients", kind, path, "complex64", "floating"):
        update(rows((3, 4), dtype=jnp.complex64))

    if "losses" in method.needs:
        with refuses("missing losses", kind, "losses", "(3,)"):
            update(good, losses=None)
    if "delta_m" in method.needs:
        with refuses("missing delta_m", kind, "delta_m", "(3,)"):
            update(good, delta_m=None)
        with refuses("delta_m of two tasks", shape, "delta_m", "(3,)", "(2,)"):
            update(good, delta_m=jnp.ones(2))
    if "strengths" in method.needs:
        with refuses("missing strengths", kind, "strengths", "(T, C_out)"):
            update(good, strengths=None)
        for wrong in ((2, 5), (3, 2), (3,), (3, 1, 5)):
            with refuses("strengths", shape, "leaf z", "(3, 5)", str(wrong)):
                update(good, strengths={"z": jnp.ones(wrong)})
        with refuses("strengths of a vector", shape, "leaf trunk.w", "(3, 4)"):
            update(good, strengths={"trunk": {"w": jnp.ones(3)}})
        with refuses("strengths elsewhere", shape, "leaf y", "no such leaf", "trunk.w"):
            update(good, strengths={"y": jnp.ones((3, 5))})
    if "other_task_grads" in method.needs:
        with refuses("missing batches", kind, "other_task_grads", "two"):
            update(good, other_task_grads=None)
        with refuses("one more batch", kind, "other_task_grads", "two"):
            update(good, other_task_grads=(ones,))
        short = jax.tree.map(lambda g: g[:2], ones)
        with refuses("batches of two tasks", shape, "other_task_grads", path, "(3, 4)"):
            update(good, other_task_grads=(ones, short))
    for wrong in ((2,), (3, 1), ()):
        with refuses(f"losses of shape {wrong}", shape, "losses", "(3,)", str(wrong)):
            update(good, losses=jnp.ones(wrong))
    with refuses("losses as two scalars", shape, "losses", "(3,)", "(2,)"):
        update(good, losses={"a": jnp.ones(()), "b": jnp.ones(())})
    with refuses("losses that are no scalars", shape, "losses", "scalars"):
        update(good, losses={t: jnp.ones(2) for t in "abc"})

    for wrong in (jnp.ones(2, bool), jnp.ones((3, 1), bool), jnp.ones((), bool)):
        with refuses("mask shape", shape, "task_mask", "(3,)", str(wrong.shape)):
            update(good, task_mask=wrong)
    for wrong in (jnp.ones(3), jnp.ones(3, jnp.int32)):
        with refuses("mask dtype", shape, "task_mask", "bool", str(wrong.dtype)):
            update(good, task_mask=wrong)


def hyper_parameters(method):
    """Keyword defaults of the factory: ``{name: default}``."""
    signature = inspect.signature(method.factory)
    return {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if name != "num_tasks" and parameter.default is not parameter.empty
    }


def variants(method):
    """Rows of the method with every other choice of its named options."""
    rows = []
    for name, parameter in inspect.signature(method.factory).parameters.items():
        for choice in typing.get_args(parameter.annotation):
            if isinstance(choice, str) and choice != parameter.default:
                factory = functools.partial(method.factory, **{name: choice})
                label = f"{method.name}, {name}={choice!r}"
                rows.append(method._replace(name=label, factory=factory))
    return rows


def check_wrong_arguments(method):
    """Law 11: the factory refuses wrong numbers of tasks and hyper-parameters."""
    for wrong in (0, -1):
        with refuses(f"num_tasks={wrong}", ValueError, "num_tasks", str(wrong)):
            method.make(wrong)
    for wrong in (2.0, "2", True, None):
        with refuses(f"num_tasks={wrong!r}", TypeError, "num_tasks", "int"):
            method.make(wrong)
    with refuses("traced num_tasks", TypeError, "num_tasks", "static_args"):
        jax.eval_shape(lambda n: method.make(n).init(params_of()), 2)
    method.make(np.int64(2)).init(params_of())

    for name, default in hyper_parameters(method).items():
        if isinstance(default, bool):
            continue
        if isinstance(default, str):
            with refuses(name, ValueError, name, "'nonsense'"):
                method.make(2, **{name: "nonsense"})
        elif isinstance(default, int):
            for wrong in {-1, min(default, 1) - 1}:
                with refuses(name, ValueError, name, str(wrong)):
                    method.make(2, **{name: wrong})
            with refuses(name, TypeError, name, "static_args"):
                jax.eval_shape(lambda v, n=name: method.make(2, **{n: v}).init({}), 2)
        elif isinstance(default, float):
            for wrong in (-1.0, float("nan"), jnp.float32(-1), np.float64(-1)):
                with refuses(f"{name}={wrong!r}", ValueError, name):
                    method.make(2, **{name: wrong})
            _check_traced_hyper_parameter(method, name, default)


def _check_traced_hyper_parameter(method, name, default, num_tasks=2):
    """`optax.inject_hyperparams` and `vmap` may trace it."""

    def step(value):
        tx = method.make(num_tasks, **{name: value})
        params = params_of()
        grads = to_tree(jnp.ones((num_tasks, SIZE)))
        extras = extras_of(method, num_tasks, jnp.ones(num_tasks), grads=grads)
        first = tx.init(params)
        updates, state = tx.update(grads, first, params, **extras)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
        return updates

    value = jnp.full((2,), default, jnp.float32)
    for trace in (step, jax.vmap(step)):
        try:
            jax.eval_shape(trace, value if trace is not step else value[0])
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{name} cannot be traced: {error}") from error


# ------------------------------------------------------------------ 12. masked = absent


ABSENT = 1  # of three tasks
PLACE = np.array([0, 2])


def check_absent(method):
    """Law 12: an absent task might as well not exist, NaN and all."""
    rows, losses = draws(2)
    spoiled = np.full((RUNS, STEPS, 3, SIZE), np.nan, np.float32)
    spoiled[:, :, PLACE] = rows
    spoiled[1::3, :, ABSENT] = np.inf
    spoiled[2::3, :, ABSENT] = 3 * rows[2::3, :, 0]
    spoiled_losses = np.full((RUNS, STEPS, 3), np.nan, np.float32)
    spoiled_losses[:, :, PLACE] = losses
    masks = np.zeros((RUNS, STEPS, 3), bool)
    masks[:, :, PLACE] = True
    found = trajectories(method, spoiled, spoiled_losses, masks)
    wanted = trajectories(method, rows, losses)
    size = wanted.longest(rows)
    if wanted.weights is not None:
        assert np.all(found.weights[:, :, ABSENT] == 0), "an absent task has a weight"
        lengths = np.linalg.norm(rows.astype(np.float64), axis=-1)
        gap = np.abs(found.weights[:, :, PLACE] - wanted.weights) * lengths
        gap = gap.max(-1) / size
        assert np.all(gap < 1e-3), f"weights differ by {gap.max():.1e}"
    error = np.linalg.norm(found.updates - wanted.updates, axis=-1) / size
    assert np.all(error < 1e-3), f"updates differ by {error.max():.1e}"
    for (path, a), (_, b) in zip(
        history(found.states), history(wanted.states), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        for axis in range(2, a.ndim):
            if (a.shape[axis], b.shape[axis]) == (3, 2):
                a = np.take(a, PLACE, axis)
        atol = 1e-4 * np.abs(b).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=path)


def _is_one_row(path, shape):
    """Whether a leaf is shaped like a parameter, which no task owns."""
    return any(path.endswith(f"['{n}']") and shape == s for n, s in SHAPES.items())


def check_absent_for_a_while(method, num_tasks=3):
    """Law 12: masks may change; absent tasks hold still, whatever they hold."""
    rows, losses = draws(num_tasks)
    rng = np.random.default_rng(12)
    masks = rng.uniform(size=losses.shape) < 0.7
    masks[:, 5:8] = False
    clean = trajectories(method, rows, losses, masks)
    spoiled = np.where(masks[..., None], rows, np.nan)
    run = trajectories(method, spoiled, np.where(masks, losses, np.inf), masks)
    np.testing.assert_array_equal(run.updates, clean.updates, "updates")
    assert_bits_equal(run.states, clean.states)
    nobody = ~masks.any(-1)
    assert np.all(run.updates[nobody] == 0), "an update without any task"
    for path, leaf in history(run.states):
        leaf = np.asarray(leaf)
        moved = leaf[:, 1:] != leaf[:, :-1]
        anything = moved.reshape(*moved.shape[:2], -1).any(-1)
        assert not np.any(anything & nobody[:, 1:]), f"{path} moved without any task"
        if _is_one_row(path, leaf.shape[2:]):
            continue
        for axis in range(2, leaf.ndim):
            if leaf.shape[axis] == num_tasks:
                own = np.moveaxis(moved, axis, 2)
                own = own.reshape(*own.shape[:3], -1).any(-1)
                assert not np.any(own & ~masks[:, 1:]), f"{path}: an absent task moved"
                break  # a parameter may be as long
