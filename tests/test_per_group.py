"""`per_group`: one combination a group of parameters."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from flax import nnx

import mtl_optax as mtl

PARAMS = {"a": {"b": jnp.zeros(2), "w": jnp.zeros((2, 3))}, "z": jnp.zeros(4)}


def task_grads(seed=0, tasks=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal((tasks, *p.shape)), p.dtype), PARAMS
    )


def updated(tx, grads, **extra):
    def step(grads):
        return tx.update(grads, tx.init(PARAMS), PARAMS, **extra)

    return laws.quick_jit(step)(grads)


def test_each_group_is_combined_by_itself():
    grads = task_grads()
    labels = {"a": {"b": 1, "w": 2}, "z": 1}
    found, state = updated(mtl.per_group(mtl.mgda(3), labels), grads)
    one = {"b": grads["a"]["b"], "z": grads["z"]}
    tx = mtl.mgda(3)
    wanted, _ = tx.update(one, tx.init({"b": jnp.zeros(2), "z": jnp.zeros(4)}))
    np.testing.assert_allclose(found["a"]["b"], wanted["b"], rtol=1e-5)
    np.testing.assert_allclose(found["z"], wanted["z"], rtol=1e-5)
    alone, _ = tx.update(grads["a"]["w"], tx.init(jnp.zeros((2, 3))))
    np.testing.assert_allclose(found["a"]["w"], alone, rtol=1e-5)
    assert len(state.groups) == 2


def test_one_group_is_the_combiner_itself():
    grads = task_grads()
    labels = jax.tree.map(lambda _: "all", PARAMS)
    found, _ = updated(mtl.per_group(mtl.edm(3), labels), grads)
    wanted, _ = updated(mtl.edm(3), grads)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_lazy_is_stacked():
    def losses(params, x):
        total = sum(jnp.sum(jnp.sin(p + 0.3)) for p in jax.tree.leaves(params))
        square = sum(jnp.sum(p * x) for p in jax.tree.leaves(params))
        return total, square, total * square

    tx = mtl.per_group(mtl.upgrad(3), lambda params: jax.tree.map(jnp.shape, params))

    def step(params):
        found, lazy = mtl.task_jacobian(losses)(params, 2.0)
        one, _ = tx.update(lazy, tx.init(params), params, losses=found)
        two, _ = tx.update(mtl.materialize(lazy), tx.init(params), params)
        return one, two

    one, two = laws.quick_jit(step)(jax.tree.map(lambda p: p + 0.1, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize("given", [True, False])
def test_labels_are_made_of_the_parameters(given):
    """Not of the task gradients, which have one more axis."""

    def by_size(params):
        return jax.tree.map(lambda p: "large" if p.size > 4 else "small", params)

    grads = task_grads()
    tx = mtl.per_group(mtl.mgda(3), by_size)
    state = tx.init(PARAMS)
    assert set(state.groups) == {"large", "small"}
    found, _ = tx.update(grads, state, PARAMS if given else None)
    wanted, _ = updated(mtl.per_group(mtl.mgda(3), by_size(PARAMS)), grads)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted
    )


@pytest.mark.parametrize("group", ["layer", "leaf"])
def test_parameters_in_tuples(group):
    params = [(jnp.zeros((2, 3)), jnp.zeros(3)), (jnp.zeros((3, 1)), jnp.zeros(1))]
    tx = mtl.gradvac(2, group=group)
    grads = jax.tree.map(lambda p: jnp.ones((2, *p.shape)), params)
    state = tx.init(params)
    assert len(state.groups) == {"layer": 2, "leaf": 4}[group]
    tx.update(grads, state, params, key=jax.random.key(0))
    labels = [("a", "a"), ("b", ("b", 1))]
    state = mtl.per_group(mtl.mgda(2), labels).init(params)
    assert set(state.groups) == {"a", "b", "b/1"}


def test_groups_draw_apart():
    grads = jax.tree.map(jnp.ones_like, task_grads())
    _found, state = updated(
        mtl.per_group(mtl.rlw(3), {"a": {"b": 1, "w": 2}, "z": 3}),
        grads,
        key=jax.random.key(0),
    )
    weights = [group.info.task_weights for group in state.groups.values()]
    assert len({tuple(np.asarray(w).tolist()) for w in weights}) == 3


def test_what_stands_inside_is_known_outside():
    assert mtl.per_group(mtl.edm(3, axis_name="x"), PARAMS).axis_name == "x"
    guarded = mtl.skip_nonfinite_tasks(mtl.edm(3, scale="norm"))
    assert mtl.per_group(guarded, PARAMS).skips_nonfinite


def test_wrong_use():
    with pytest.raises(TypeError, match="combiner of mtl_optax"):
        mtl.per_group(mtl.mgda, PARAMS)
    tx = mtl.per_group(mtl.mgda(3), {"a": 1, "z": 2})
    with pytest.raises(ValueError, match="structure of the parameters"):
        tx.init(PARAMS)
    tx = mtl.per_group(mtl.mgda(3), jax.tree.map(jnp.shape, PARAMS))
    with pytest.raises(ValueError, match=r"'z'.*already reduced"):
        tx.update(task_grads() | {"z": jnp.zeros(4)}, tx.init(PARAMS), PARAMS)


# ------------------------------------------------------------------ GradVac's groups


def vaccinated(rows, targets, beta=0.5):
    """Two tasks: one pair, so no order matters. Float64, from the formula."""
    updates = 0
    for i, j in ((0, 1), (1, 0)):
        g, other = rows[i], rows[j]
        size, length = np.linalg.norm(g), np.linalg.norm(other)
        phi, goal = g @ other / size / length, targets[i, j]
        if phi < goal:
            lift = goal * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - goal**2)
            g = g + size * lift / length / np.sqrt(1 - goal**2) * other
        targets[i, j] += beta * (phi - goal)
        updates = updates + g
    return updates


@pytest.mark.parametrize("group", ["whole", "layer", "leaf"])
def test_gradvac_by_group(group):
    groups = {
        "whole": [("a", "b"), ("a", "w"), ("z",)],
        "layer": [("a", "b"), ("a", "w")],
        "leaf": [("a", "w")],
    }[group]

    def flat(tree, at):
        for name in at:
            tree = tree[name]
        return np.asarray(tree, np.float64).reshape(np.shape(tree)[0], -1)

    tx = mtl.gradvac(2, group=group)
    step = laws.quick_jit(lambda g, s: tx.update(g, s, PARAMS, key=jax.random.key(1)))
    state, targets = tx.init(PARAMS), np.zeros((2, 2))
    for turn in range(4):
        grads = task_grads(turn, tasks=2)
        updates, state = step(grads, state)
        rows = np.concatenate([flat(grads, at) for at in groups], axis=1)
        wanted = vaccinated(rows, targets)
        tree = jax.tree.map(lambda u: u[None], updates)
        found = np.concatenate([flat(tree, at)[0] for at in groups])
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("group", "number"), [("layer", 2), ("leaf", 4)])
def test_groups_of_an_nnx_network(group, number):
    """Flax's optimiser starts from a tree with `Param`s and updates one without."""
    model = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    )
    optimizer = nnx.Optimizer(model, mtl.gradvac(2, group=group), wrt=nnx.Param)
    graph, params = nnx.split(model, nnx.Param)
    assert len(mtl.gradvac(2, group=group).init(params).groups) == number

    def losses(params):
        out = nnx.merge(graph, params)(jnp.ones((1, 2)))
        return jnp.sum(out), jnp.sum(out**2)

    found, task_grads = mtl.value_and_task_grads(losses)(params)
    optimizer.update(model, task_grads, losses=found, key=jax.random.key(0))
    labels = jax.tree.map(lambda p: p.ndim, params)
    optimizer = nnx.Optimizer(model, mtl.per_group(mtl.edm(2), labels), wrt=nnx.Param)
    optimizer.update(model, task_grads)


def test_inside_shared_only():
    labels = {"a": {"b": 1, "w": 2}, "z": 3}
    tx = mtl.shared_only(
        mtl.per_group(mtl.mgda(3), labels), {"a": {"b": True, "w": False}, "z": True}
    )
    grads = task_grads()
    found, _ = updated(tx, grads)
    np.testing.assert_allclose(found["a"]["w"], grads["a"]["w"].sum(0), rtol=1e-5)
    alone, _ = mtl.mgda(3).update(grads["z"], mtl.mgda(3).init(jnp.zeros(4)))
    np.testing.assert_allclose(found["z"], alone, rtol=1e-5)


def test_other_batches_are_cut_into_the_same_groups():
    rng = np.random.default_rng(5)
    shapes = {"a": (4,), "b": (2, 2)}
    grads, *others = (
        {n: jnp.asarray(rng.standard_normal((3, *s)), float) for n, s in shapes.items()}
        for _ in range(3)
    )
    params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    tx = mtl.per_group(mtl.modo(3), {"a": "one", "b": "other"})
    updates, _ = tx.update(grads, tx.init(params), params, other_task_grads=others)
    for name, param in params.items():
        alone = mtl.modo(3)
        own = tuple(tree[name] for tree in others)
        wanted, _ = alone.update(
            grads[name], alone.init(param), param, other_task_grads=own
        )
        np.testing.assert_array_equal(updates[name], wanted)
    with pytest.raises(TypeError, match="other_task_grads"):
        tx.update(grads, tx.init(params), params, other_task_grads=3)


def test_other_batches_are_told_apart_inside_shared_only():
    """The head comes first, and its gradients would fit as well."""
    leaf = jnp.array([[4.0, 0.0], [0.0, 1.0]])
    grads = {"a_head": leaf, "b": leaf, "c": leaf}
    other = {"a_head": leaf * jnp.array([25.0, 1.0]), "b": leaf, "c": leaf[::-1, ::-1]}
    params = jax.tree.map(lambda g: g[0], grads)
    groups = mtl.per_group(mtl.modo(2), {"a_head": "H", "b": "B", "c": "C"})
    tx = mtl.shared_only(groups, {"a_head": False, "b": True, "c": True})
    given = {"other_task_grads": (other, other)}
    updates, _ = tx.update(grads, tx.init(params), params, **given)
    wanted, _ = groups.update(grads, groups.init(params), params, **given)
    for name in "bc":
        np.testing.assert_array_equal(updates[name], wanted[name])
    renamed = {"z": leaf, "b": leaf, "c": leaf}
    with pytest.raises(ValueError, match="other_task_grads"):
        groups.update(
            grads, groups.init(params), params, other_task_grads=(other, renamed)
        )
