"""`from_weighting` and `from_aggregator`: scales and extra arguments."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl

ROWS = np.array([[3.0, 4.0, 0.0], [0.0, 1.0, 2.0], [1.0, -1.0, 1.0]], np.float32)
PARAMS = {"w": jnp.zeros(3)}
MASK = jnp.array([True, False, True])


def grads(rows=ROWS):
    return {"w": jnp.asarray(rows)}


def constant(weights, scale="paper"):
    """A method whose weights are given: what is left is the plumbing."""

    def update(gramian, state, *, losses, task_mask, **extra):
        return jnp.asarray(weights, jnp.float32), state

    method = mtl.Weighting(lambda num_tasks, dtype: (), update, frozenset())
    return mtl.from_weighting(method, len(weights), scale=scale)


def run(tx, rows=ROWS, **extra):
    updates, state = tx.update(grads(rows), tx.init(PARAMS), PARAMS, **extra)
    return np.asarray(updates["w"]), np.asarray(state.info.task_weights)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("paper", [2.0, 4.0, 2.0]),
        ("mean", [0.25, 0.5, 0.25]),
        ("sum", [0.75, 1.5, 0.75]),
    ],
)
def test_weight_sums(scale, expected):
    updates, weights = run(constant([2.0, 4.0, 2.0], scale))
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(updates, np.asarray(expected) @ ROWS, rtol=1e-6)


def test_sum_counts_present_tasks():
    _, weights = run(constant([2.0, 4.0, 2.0], "sum"), task_mask=MASK)
    np.testing.assert_allclose(weights, [1.0, 0.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("scale", ["mean", "sum"])
def test_a_weight_sum_that_is_not_positive_is_left(scale):
    _, weights = run(constant([1.0, -3.0, 1.0], scale))
    np.testing.assert_allclose(weights, [1.0, -3.0, 1.0])


@pytest.mark.parametrize("mask", [None, MASK])
def test_norm_is_as_long_as_the_mean_gradient(mask):
    updates, weights = run(constant([1.0, 5.0, 2.0], "norm"), task_mask=mask)
    present = ROWS if mask is None else ROWS[np.asarray(mask)]
    wanted = np.linalg.norm(present.mean(0))
    np.testing.assert_allclose(np.linalg.norm(updates), wanted, rtol=1e-6)
    np.testing.assert_allclose(weights @ ROWS, updates, rtol=1e-5)


def test_norm_survives_cancellation_and_zero():
    # The combination almost cancels: its length can't come from a Gramian.
    rows = np.array([[1.0, 0.0, 0.0], [-1.0, 1e-5, 0.0], [0.0, 0.0, 0.0]], np.float32)
    updates, _ = run(constant([1.0, 1.0, 0.0], "norm"), rows)
    wanted = np.linalg.norm(rows.mean(0))
    np.testing.assert_allclose(np.linalg.norm(updates), wanted, rtol=1e-5)
    updates, _ = run(constant([1.0, 1.0, 1.0], "norm"), np.zeros_like(rows))
    np.testing.assert_array_equal(updates, 0)


def test_aggregators_know_paper_and_norm_only():
    def update(task_grads, state, params, *, losses, task_mask, **extra):
        assert params is PARAMS
        return jax.tree.map(lambda g: 7 * jnp.median(g, 0), task_grads), state

    method = mtl.Aggregator(lambda params, num_tasks: (), update)
    tx = mtl.from_aggregator(method, 3, scale="norm")
    updates, _ = tx.update(grads(), tx.init(PARAMS), PARAMS)
    direction = np.median(ROWS, 0)
    wanted = direction / np.linalg.norm(direction) * np.linalg.norm(ROWS.mean(0))
    np.testing.assert_allclose(updates["w"], wanted, rtol=1e-6)
    for scale in ("mean", "sum", "wrong"):
        with pytest.raises(ValueError, match="'paper' or 'norm'"):
            mtl.from_aggregator(method, 3, scale=scale)
    with pytest.raises(ValueError, match=r"scale must be one of .* got 'wrong'"):
        mtl.mean(3, scale="wrong")


def test_aggregators_see_zeros_where_a_task_is_absent():
    def update(task_grads, state, params, *, losses, task_mask, **extra):
        total = jax.tree.map(lambda g: g.sum(0), task_grads)
        return total, (losses, task_mask)

    def init(params, num_tasks):
        return jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool)

    tx = mtl.from_aggregator(mtl.Aggregator(init, update), 3)
    rows = np.array(ROWS)
    rows[1] = np.nan
    losses = jnp.array([1.0, jnp.nan, 3.0])
    updates, state = tx.update(
        grads(rows), tx.init(PARAMS), PARAMS, losses=losses, task_mask=MASK
    )
    np.testing.assert_allclose(updates["w"], ROWS[0] + ROWS[2])
    np.testing.assert_array_equal(state.aggregator[0], [1.0, 1.0, 3.0])
    np.testing.assert_array_equal(state.aggregator[1], MASK)


@pytest.mark.parametrize(
    "losses",
    [
        jnp.array([1.0, 2.0, 3.0]),
        {"c": 3.0, "a": 1.0, "b": jnp.array(2.0)},
        (1.0, 2.0, 3.0),
        [jnp.array(1.0), 2, 3.0],
        collections.OrderedDict(z=1.0, y=2.0, x=3.0),
        np.array([1.0, 2.0, 3.0]),
    ],
)
def test_losses_may_come_as_loss_fn_gave_them(losses):
    seen = {}

    def update(gramian, state, *, losses, task_mask, **extra):
        seen["losses"], seen["extra"] = losses, extra
        return losses, state

    method = mtl.Weighting(lambda t, dtype: (), update, frozenset({"losses"}))
    tx = mtl.from_weighting(method, 3)
    tx.update(grads(), tx.init(PARAMS), losses=losses, unheard_of=1)
    np.testing.assert_array_equal(seen["losses"], [1.0, 2.0, 3.0])
    assert seen["extra"] == {"unheard_of": 1}


def test_what_is_not_needed_is_not_computed():
    def update(gramian, state, *, losses, task_mask, **extra):
        assert gramian is None
        assert losses is None
        assert "gramian_in_basis" not in extra
        return jnp.ones(3), state

    tx = mtl.from_weighting(mtl.Weighting(lambda t, d: (), update, frozenset()), 3)
    tx.update(grads(), tx.init(PARAMS), losses=jnp.ones(3))
    jaxpr = str(jax.make_jaxpr(tx.update)(grads(), tx.init(PARAMS)))
    assert jaxpr.count("dot_general") == 1  # the weighted sum


def test_a_combiner_carries_what_wrappers_need():
    tx = mtl.edm(3, scale="norm")
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert (tx.num_tasks, tx.scale) == (3, "norm")
    assert tx.weighting.needs >= {"gramian"}
    init, update = tx
    assert init is tx.init
    assert update is tx.update


def test_the_info_says_how_many_pairs_conflict():
    rows = np.array([[1.0, 0, 0], [-1.0, 0.5, 0], [-1.0, 1.0, 0]], np.float32)
    tx = mtl.mgda(3)
    _, state = tx.update(grads(rows), tx.init(PARAMS))
    np.testing.assert_allclose(state.info.task_conflict, 2 / 3, rtol=1e-6)
    _, state = tx.update(grads(rows), state, task_mask=MASK)
    np.testing.assert_allclose(state.info.task_conflict, 1.0)


def test_the_states_dtype_follows_the_parameters(x64):
    tx = mtl.task_tensioner(2)
    params = {"a": jnp.zeros(2, jnp.bfloat16), "n": jnp.zeros((), jnp.int32)}
    assert tx.init(params).weighting.previous_sum.dtype == jnp.float32
    params["b"] = jnp.zeros(1, jnp.float64)
    assert tx.init(params).weighting.previous_sum.dtype == jnp.float64
    assert tx.init(params).weighting.steps_seen.dtype == jnp.int32


def test_tree_map_params_passes():
    tx = optax.chain(mtl.task_tensioner(2), optax.adam(0.1))
    state = tx.init(PARAMS)
    doubled = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    np.testing.assert_array_equal(doubled[1][0].mu["w"], 1)
    np.testing.assert_array_equal(doubled[0].weighting.previous_sum, 0)


class ArrayLike:
    """What JAX takes as an array, and is none."""

    def __init__(self, array):
        self.array = jnp.asarray(array)
        self.shape, self.ndim = self.array.shape, self.array.ndim
        self.dtype = self.array.dtype

    def __jax_array__(self):
        return self.array


@pytest.mark.parametrize("name", ["mean", "edm"])
@pytest.mark.parametrize("kind", [np.asfortranarray, ArrayLike])
def test_leaves_that_are_array_like(kind, name):
    tx = getattr(mtl, name)(3)
    state = tx.init(PARAMS)
    wanted = tx.update(grads(), state, PARAMS)[0]["w"]
    found = tx.update({"w": kind(ROWS)}, state, PARAMS)[0]["w"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
