"""Misuse of an optax chain is explained; good chains pass in silence."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

T = 2
PARAMS = {"head": jnp.zeros(3), "trunk": {"b": jnp.zeros(4), "w": jnp.zeros((5, 4))}}
LABELS = {"head": "heads", "trunk": {"b": "shared", "w": "shared"}}
GRADS = jax.tree.map(lambda p: jnp.ones((T, *p.shape)), PARAMS)


def combiner():
    return mtl.mgda(num_tasks=T)


def steps(tx, count=2, **extra):
    """Really runs the chain, compiled once."""
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    state = tx.init(PARAMS)
    for _ in range(count):
        updates, state = update(GRADS, state, PARAMS)
    return updates, state


# -------------------------------------------------------------------------- good chains

GOOD = {
    "combiner": combiner,
    "sum_tasks": mtl.sum_tasks,
    "adam after": lambda: optax.chain(combiner(), optax.adam(1e-3)),
    "clip and schedule after": lambda: optax.chain(
        combiner(),
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.cosine_decay_schedule(1e-3, 10)),
    ),
    "named_chain": lambda: optax.named_chain(
        ("combine", combiner()), ("adam", optax.adam(1e-3))
    ),
    "nested chain": lambda: optax.chain(
        optax.chain(optax.identity(), combiner()), optax.sgd(1e-3, momentum=0.9)
    ),
    "inject_hyperparams around": lambda: optax.inject_hyperparams(
        lambda learning_rate: optax.chain(combiner(), optax.adam(learning_rate))
    )(learning_rate=1e-3),
    "inject_hyperparams inside": lambda: optax.chain(
        optax.inject_hyperparams(
            mtl.task_tensioner, static_args=("num_tasks", "window")
        )(num_tasks=T, alpha=0.3),
        optax.sgd(1e-3),
    ),
    "partition": lambda: optax.partition(
        {
            "shared": optax.chain(combiner(), optax.adam(1e-3)),
            "heads": optax.chain(mtl.sum_tasks(), optax.sgd(1e-2)),
        },
        LABELS,
    ),
    "shared_only": lambda: optax.chain(
        mtl.shared_only(combiner(), {"head": False, "trunk": True}), optax.adam(1e-3)
    ),
    "skip_nonfinite_tasks": lambda: mtl.skip_nonfinite_tasks(
        optax.chain(combiner(), optax.adam(1e-3)), num_tasks=T
    ),
    "schedule_free": lambda: optax.contrib.schedule_free(
        optax.chain(combiner(), optax.sgd(1e-3)), learning_rate=1e-3
    ),
    "MultiSteps after": lambda: optax.chain(
        combiner(), optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()
    ),
    "apply_if_finite after": lambda: optax.chain(
        combiner(), optax.apply_if_finite(optax.adam(1e-3), 3)
    ),
    "muon after": lambda: optax.chain(combiner(), optax.contrib.muon(1e-3)),
    "masked decay after": lambda: optax.chain(
        combiner(), optax.masked(optax.add_decayed_weights(1e-2), LABELS_MASK)
    ),
    "lookahead-free ema after": lambda: optax.chain(combiner(), optax.ema(0.9)),
}
LABELS_MASK = jax.tree.map(lambda label: label == "shared", LABELS)


@pytest.mark.parametrize("name", GOOD)
def test_good_chains_pass_in_silence(name):
    tx = GOOD[name]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mtl.check_chain(tx, PARAMS, T) is None


@pytest.mark.parametrize("name", ["partition", "MultiSteps after"])
def test_and_they_run(name):
    updates, _ = steps(GOOD[name](), losses=jnp.ones(T))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_lbfgs_after_the_combiner():
    tx = optax.chain(mtl.mean(T), optax.lbfgs(linesearch=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtl.check_chain(tx, PARAMS, T)


def test_reduce_on_plateau_takes_its_own_argument():
    tx = optax.chain(combiner(), optax.contrib.reduce_on_plateau(patience=2))
    value = jax.ShapeDtypeStruct((), jnp.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtl.check_chain(tx, PARAMS, T, value=value)


def test_parameters_may_be_shapes_and_any_dtype():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), PARAMS)
    mtl.check_chain(optax.chain(combiner(), optax.sgd(1e-3)), shapes, T)
    mtl.check_chain(mtl.task_tensioner(3), [np.zeros(2, np.float32), jnp.zeros(())], 3)


def test_flax_parameters():
    nnx = pytest.importorskip("flax.nnx")
    linen = pytest.importorskip("flax.linen")
    tx = optax.chain(combiner(), optax.adam(1e-3))
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    variables = jax.eval_shape(
        linen.Dense(3).init,
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, 2), jnp.float32),
    )
    for params in (nnx.state(model, nnx.Param), variables):
        mtl.check_chain(tx, params, T)
        with pytest.raises(ValueError, match=r"\['bias'\].*nothing combines its tasks"):
            mtl.check_chain(optax.adam(1e-3), params, T)


def test_sam_after_the_combiner():
    # optax's `sam` takes no further arguments, so it wants a lazy tree (which brings
    # its losses along) and an update without `losses=`.
    inner = optax.contrib.sam(optax.sgd(1e-3), optax.sgd(1e-2), sync_period=2)
    tx = optax.chain(mtl.mean(T), inner)
    mtl.check_chain(tx, PARAMS, T)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    tx.update(GRADS, state, PARAMS)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


def test_nothing_is_computed():
    def explode(*_):
        raise AssertionError("computed")

    def update(updates, state, params=None):
        jax.debug.callback(explode)
        return updates, state

    watcher = optax.GradientTransformation(lambda p: optax.EmptyState(), update)
    mtl.check_chain(optax.chain(combiner(), watcher), PARAMS, T)


# ---------------------------------------------------------------- misuses of the shapes

FORGOTTEN = (
    r"leaf \['head'\] has shape \(2, 3\), the parameter \(3,\): nothing combines"
)
AFTER = r"(?s)must stand after.*chain\(combiner, MultiSteps\(adam, k\)\)"
MEMORY = "transform with memory"

BAD = {
    "forgotten, sgd": (lambda: optax.sgd(1e-3), FORGOTTEN),
    "forgotten, adam": (lambda: optax.adam(1e-3), FORGOTTEN),
    "forgotten, lion": (lambda: optax.lion(1e-3), FORGOTTEN),
    "forgotten, identity": (optax.identity, FORGOTTEN),
    "head group without a reducer": (
        lambda: optax.partition(
            {"shared": combiner(), "heads": optax.sgd(1e-2)}, LABELS
        ),
        FORGOTTEN + r".*sum_tasks",
    ),
    "masked": (
        lambda: optax.masked(combiner(), LABELS_MASK),
        FORGOTTEN + r".*shared_only",
    ),
    "trace before": (lambda: optax.chain(optax.trace(0.9), combiner()), MEMORY),
    "ema before": (lambda: optax.chain(optax.ema(0.9), combiner()), MEMORY),
    "adam before": (lambda: optax.chain(optax.adam(1e-3), combiner()), MEMORY),
    "MultiSteps around": (
        lambda: optax.MultiSteps(
            optax.chain(combiner(), optax.adam(1e-3)), 2
        ).gradient_transformation(),
        AFTER,
    ),
    "apply_if_finite around": (
        lambda: optax.apply_if_finite(optax.chain(combiner(), optax.adam(1e-3)), 3),
        AFTER,
    ),
    "conditionally_transform around": (
        lambda: optax.conditionally_transform(
            optax.chain(combiner(), optax.sgd(1e-3)), lambda step: step > 1
        ),
        AFTER,
    ),
    "conditionally_mask around": (
        lambda: optax.conditionally_mask(
            optax.chain(combiner(), optax.sgd(1e-3)), lambda step: step > 1
        ),
        AFTER,
    ),
    "flatten around": (
        lambda: optax.flatten(optax.chain(combiner(), optax.adam(1e-3))),
        "the chain fails on task gradients|has shape",
    ),
    "mechanize around": (
        lambda: optax.contrib.mechanize(optax.chain(combiner(), optax.adam(1e-3))),
        "the chain fails on task gradients",
    ),
    "adaptive_grad_clip before": (
        lambda: optax.chain(optax.adaptive_grad_clip(0.1), combiner()),
        "the chain fails on task gradients",
    ),
    "combined twice": (
        lambda: optax.chain(combiner(), mtl.edm(T)),
        r"(?s)the chain fails on task gradients.*already reduced",
    ),
    "another number of tasks": (
        lambda: optax.chain(mtl.mgda(3), optax.adam(1e-3)),
        r"(?s)expected shape \(3, 3\).*It holds 2 tasks",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_misuse_of_shapes_is_explained(name):
    make, words = BAD[name]
    tx = make()
    with pytest.raises(ValueError, match=words):
        mtl.check_chain(tx, PARAMS, T)


def test_a_forgotten_combiner_is_silent_without_the_check():
    updates, _ = steps(optax.sgd(1e-3), count=1)
    assert optax.apply_updates(PARAMS, updates)["head"].shape == (T, 3)


@pytest.mark.parametrize("num_tasks", [0, -1, 2.0, None, "2"])
def test_the_number_of_tasks_is_checked(num_tasks):
    with pytest.raises((TypeError, ValueError), match="num_tasks must be"):
        mtl.check_chain(combiner(), PARAMS, num_tasks)


# ----------------------------------------------------------------- misuses of the order

ORDER = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "clip": lambda: optax.clip(1.0),
    "normalize_by_update_norm": optax.normalize_by_update_norm,
    "add_decayed_weights": lambda: optax.add_decayed_weights(1e-2),
    "scale": lambda: optax.scale(0.5),
    "zero_nans": optax.zero_nans,
    "centralize": optax.centralize,
}


@pytest.mark.parametrize("name", ORDER)
def test_what_computes_before_the_combiner_is_warned_of(name):
    params = {"w": jnp.zeros((3, 2))}
    tx = optax.chain(ORDER[name](), mtl.mean(T), optax.sgd(1e-3))
    with pytest.warns(UserWarning, match="before the combiner computes") as caught:
        mtl.check_chain(tx, params, T)
    assert caught[0].filename == __file__


def test_clipping_before_and_after_differ():
    # What the warning is about: the norm runs over all tasks.
    before = optax.chain(optax.clip_by_global_norm(1.0), mtl.sum_tasks())
    after = optax.chain(mtl.sum_tasks(), optax.clip_by_global_norm(1.0))
    g = {"w": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
    params = {"w": jnp.zeros(2)}
    one, two = (tx.update(g, tx.init(params), params)[0]["w"] for tx in (before, after))
    np.testing.assert_allclose(one, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(two, [0.6, 0.8], rtol=1e-6)
    g = {"w": jnp.array([[3.0, 0.0], [4.0, 0.0]])}
    one, two = (tx.update(g, tx.init(params), params)[0]["w"] for tx in (before, after))
    np.testing.assert_allclose(one, [1.4, 0.0], rtol=1e-6)
    np.testing.assert_allclose(two, [1.0, 0.0], rtol=1e-6)


# ------------------------------------------------------- what a combiner sees by itself


@pytest.mark.parametrize("make", [combiner, mtl.sum_tasks], ids=["mgda", "sum_tasks"])
@pytest.mark.parametrize(
    ("grads", "words"),
    [
        (PARAMS, r"\['head'\].*expected shape .*, got \(3,\).*already reduced"),
        ({}, "structure of the parameters|without leaves"),
        ({"head": GRADS["head"]}, "structure of the parameters"),
        (
            GRADS | {"head": jnp.ones((T, 3), int)},
            r"\['head'\] has dtype int32.*floating",
        ),
        (GRADS | {"head": jnp.ones((3, T))}, r"\['head'\].*got \(3, 2\)"),
    ],
    ids=["reduced", "empty", "part", "integers", "transposed"],
)
def test_wrong_gradients_are_refused_at_trace_time(make, grads, words):
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises((ValueError, TypeError), match=words):
        jax.eval_shape(tx.update, grads, state, PARAMS)


def test_wrong_gradients_without_parameters():
    tx = combiner()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"\['head'\].*expected shape \(2, \*param"):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match="without leaves"):
        tx.update({}, state)


def test_missing_and_wrong_losses():
    tx = mtl.task_tensioner(T)
    state = tx.init(PARAMS)
    with pytest.raises(
        TypeError, match=r"needs the task losses.*losses=losses.*\(2,\)"
    ):
        tx.update(GRADS, state, PARAMS)
    for losses in (jnp.ones(3), jnp.ones(()), {"a": 1.0}, [jnp.ones(2), jnp.ones(2)]):
        with pytest.raises(ValueError, match="losses: expected"):
            tx.update(GRADS, state, PARAMS, losses=losses)
    for losses in (jnp.ones(T), {"a": 1.0, "b": 2.0}, (1.0, jnp.float32(2.0))):
        jax.eval_shape(lambda x: tx.update(GRADS, state, PARAMS, losses=x), losses)


@pytest.mark.parametrize(
    "mask", [jnp.ones(T), jnp.ones(3, bool), jnp.ones((), bool), jnp.array([0, 1])]
)
def test_a_wrong_task_mask(mask):
    tx = combiner()
    with pytest.raises(ValueError, match=r"task_mask: expected bools of shape \(2,\)"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, task_mask=mask)


def test_unknown_arguments_are_swallowed():
    for tx in (combiner(), mtl.sum_tasks(), mtl.shared_only(mtl.mean(T), True)):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, unexpected=1, value=0.5)


def test_losses_may_not_stand_in_for_a_value():
    # `value=losses` breaks optax's own transforms; `losses=` does not.
    tx = optax.chain(mtl.mean(T), optax.contrib.reduce_on_plateau(patience=2))
    state = tx.init(PARAMS)
    tx.update(GRADS, state, PARAMS, losses=jnp.ones(T), value=jnp.float32(2.0))
