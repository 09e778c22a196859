"""Gramians, weighted sums and the two forms of task gradients, against NumPy."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax import _tree

BLOCK = _tree._block_of(3)
HIGHEST = jax.lax.Precision.HIGHEST


def rows(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def exact(tree, tasks=None):
    """``[T, P]`` in float64."""
    leaves = [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(tree)]
    matrix = np.concatenate([x.reshape(x.shape[0], -1) for x in leaves], 1)
    return matrix if tasks is None else matrix[tasks]


def assert_close(ours, wanted, tolerance):
    """Error relative to the largest entry."""
    ours, wanted = np.asarray(ours, np.float64), np.asarray(wanted, np.float64)
    assert ours.shape == wanted.shape
    assert np.all(np.isfinite(ours))
    size = np.abs(wanted).max(initial=0) or 1
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=tolerance * size)


def equations(jaxpr):
    """Every equation, those of inner jaxprs included."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(getattr(value, "jaxpr", value), "eqns"):
                yield from equations(value)


def dots(fn, *args):
    found = [
        e
        for e in equations(jax.make_jaxpr(fn)(*args))
        if e.primitive.name == "dot_general"
    ]
    assert found
    return found


def quadratic(offset=0.0):
    """Three losses of a small tree, and its parameters."""

    def loss_fn(p):
        h = jnp.tanh(p["a"] @ p["w"])
        return jnp.stack(
            [jnp.sum(h), jnp.sum((h - 1 + offset) ** 2), jnp.sum(p["a"] * p["s"])]
        )

    params = {"a": rows((4,), 1), "s": jnp.float32(0.5), "w": rows((4, 3), 2)}
    return loss_fn, params


# ------------------------------------------------------------------------------ gramian


@pytest.mark.parametrize(
    "size", [1, 7, BLOCK - 1, BLOCK, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 5 * BLOCK]
)
def test_gramian_blocked_and_direct_are_exact(size):
    x = rows((3, size), seed=size)
    wanted = exact(x) @ exact(x).T
    direct = _tree._leaf_gramian(x, None)
    blocked = _tree._leaf_gramian_blocked(x, None)
    assert direct.dtype == blocked.dtype == jnp.float32
    assert_close(direct, wanted, 1e-5)
    assert_close(blocked, wanted, 1e-5)
    assert_close(mtl.gramian({"w": x}), wanted, 1e-5)


@pytest.mark.parametrize("count", [2, 12, 100, 300])
@pytest.mark.parametrize("more", [0, 17])
def test_every_column_is_counted_once_in_blocks(count, more):
    # Ones are summed exactly: a column lost or counted twice shows as an integer.
    size = 2 * _tree._block_of(count) + more
    gram = mtl.gramian([jnp.ones((count, size))])
    np.testing.assert_array_equal(gram, np.full((count, count), size))


def test_gramian_in_blocks_takes_any_shape_and_a_basis():
    x = rows((3, 5, 40, 60), 3)
    basis = rows((4, 3), 4)
    J = exact(x)
    C = np.asarray(basis, np.float64)
    assert_close(mtl.gramian({"w": x}), J @ J.T, 1e-5)
    assert_close(mtl.gramian({"w": x}, basis=basis), C @ J @ J.T @ C.T, 1e-5)


def test_gramian_of_a_mixed_tree():
    tree = {
        "scalar": rows((3,), 1),
        "empty": jnp.zeros((3, 0)),
        "matrix": rows((3, 4, 5), 2),
        "none": None,
        "deep": [rows((3, 2), 3), (rows((3, 1, 1, 2), 4),)],
    }
    J = exact(tree)
    assert_close(mtl.gramian(tree), J @ J.T, 1e-6)
    assert_close(jax.jit(mtl.gramian)(tree), J @ J.T, 1e-6)


def test_gramian_of_empty_leaves_is_zero():
    np.testing.assert_array_equal(mtl.gramian([jnp.zeros((2, 0))]), np.zeros((2, 2)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_rows_are_accumulated_in_float32(dtype):
    tree = {"big": rows((3, 2 * BLOCK + 5), 5, dtype), "small": rows((3, 9), 6, dtype)}
    J = exact(tree)
    gram = mtl.gramian(tree)
    assert gram.dtype == jnp.float32
    # Accumulating in bfloat16 errs by 2e-3 here.
    assert_close(gram, J @ J.T, 1e-5)
    weights = jnp.array([0.3, -1.0, 2.0])
    combined = mtl.weighted_sum(weights, tree)
    assert all(x.dtype == dtype for x in jax.tree.leaves(combined))
    flat = np.concatenate(
        [np.asarray(x).astype(np.float64) for x in jax.tree.leaves(combined)]
    )
    # One rounding to the leaf's own dtype, and no other.
    assert_close(flat, np.asarray(weights, np.float64) @ J, float(jnp.finfo(dtype).eps))


def test_a_tree_of_several_dtypes(x64):
    tree = {
        "half": rows((2, 8), 1, jnp.bfloat16),
        "single": rows((2, 8), 2, jnp.float32),
        "double": rows((2, 8), 3, jnp.float64),
    }
    J = exact(tree)
    gram = mtl.gramian(tree)
    assert gram.dtype == jnp.float64
    assert_close(gram, J @ J.T, 1e-6)
    combined = mtl.weighted_sum(jnp.array([1.0, 0.25]), tree)
    assert {k: x.dtype for k, x in combined.items()} == {
        k: x.dtype for k, x in tree.items()
    }


def test_gramian_in_float64(x64):
    tree = {"w": rows((4, 2 * BLOCK + 3), 1, jnp.float64), "b": rows((4,), 2)}
    tree["b"] = tree["b"].astype(jnp.float64)
    J = exact(tree)
    gram = mtl.gramian(tree)
    assert gram.dtype == jnp.float64
    assert_close(gram, J @ J.T, 1e-14)
    weights = jnp.array([1.0, -2.0, 0.5, 1e-3])
    wanted = np.asarray(weights) @ J
    assert_close(
        exact(jax.tree.map(lambda x: x[None], mtl.weighted_sum(weights, tree)))[0],
        wanted,
        1e-14,
    )


def test_weakly_typed_float64_rows_stay_float64(x64):
    row = jnp.stack([jnp.asarray(1 / 3), jnp.asarray(1.0)])
    assert row.weak_type
    gram = mtl.gramian([row])
    assert gram.dtype == jnp.float64
    assert_close(gram, np.outer(row, row), 1e-15)
    summed = mtl.weighted_sum(jnp.array([1.0, 0.1]), [row])[0]
    np.testing.assert_allclose(summed, 1 / 3 + 0.1, rtol=1e-15)


@pytest.mark.parametrize("size", [64, 2 * BLOCK])
def test_a_basis_keeps_differences_that_the_gramian_loses(size):
    base, step = rows((size,), 1), 1e-4 * rows((size,), 2)
    x = jnp.stack([base, base + step])
    difference = exact(x)[1] - exact(x)[0]
    wanted = difference @ difference
    with_basis = mtl.gramian([x], basis=jnp.array([[-1.0, 1.0]]))
    assert with_basis.shape == (1, 1)
    assert_close(with_basis[0, 0], wanted, 1e-3)
    gram = np.asarray(mtl.gramian([x]))
    lost = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]
    assert abs(lost - wanted) > 0.1 * wanted, "the case is no test of cancellation"


def test_labels_give_one_gramian_each():
    loss_fn, params = quadratic()
    _, lazy = mtl.task_jacobian(loss_fn)(params)
    stacked = mtl.materialize(lazy)
    labels = {"a": "in", "s": "scale", "w": "in"}
    wanted = {
        "in": exact([stacked["a"], stacked["w"]]),
        "scale": exact([stacked["s"]]),
    }
    for tree in (lazy, stacked):
        found = mtl.gramian(tree, labels=labels)
        assert set(found) == {"in", "scale"}
        for label, J in wanted.items():
            assert_close(found[label], J @ J.T, 1e-6)
    C = jnp.array([[1.0, -1.0, 0.0]])
    found = mtl.gramian(stacked, labels=labels, basis=C)["in"]
    assert_close(found, C @ wanted["in"] @ wanted["in"].T @ C.T, 1e-5)


def test_labels_of_another_structure_are_refused():
    with pytest.raises(ValueError, match="labels must have the structure"):
        mtl.gramian({"a": jnp.ones((2, 1))}, labels={"b": 0})


def test_a_tree_without_leaves_is_refused():
    for fn in (mtl.gramian, mtl.unstack_tasks):
        with pytest.raises(ValueError, match="no leaves"):
            fn({})


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("size", [6, 2 * BLOCK])
def test_masked_rows_count_as_zeros_whatever_they_hold(bad, size):
    x = rows((3, size), 1).at[1].set(bad)
    mask = jnp.array([True, False, True])
    J = exact(jnp.where(mask[:, None], x, 0))
    assert_close(mtl.gramian({"w": x}, task_mask=mask), J @ J.T, 1e-5)
    C = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, -1.0]])
    ours = mtl.gramian({"w": x}, task_mask=mask, basis=jnp.asarray(C))
    assert_close(ours, C @ J @ J.T @ C.T, 1e-5)
    weights = jnp.array([0.5, 3.0, -1.0])
    ours = mtl.weighted_sum(weights, {"w": x}, task_mask=mask)["w"]
    assert_close(ours, np.asarray(weights, np.float64) @ J, 1e-6)
    # Without the mask nothing hides the break.
    assert not np.all(np.isfinite(mtl.gramian({"w": x})))


def three_lazy_tasks():
    def loss_fn(p):
        return [jnp.sum(jnp.sin(k * p["w"])) for k in range(1, 4)]

    return mtl.task_jacobian(loss_fn)({"w": jnp.arange(2.0)})[1]


WRONG_SHAPES = {
    "one weight": (lambda g: mtl.weighted_sum(jnp.ones(1), g), "must be 3 real"),
    "a scalar weight": (lambda g: mtl.weighted_sum(1.0, g), r"shape \(\)"),
    "complex weights": (lambda g: mtl.weighted_sum(1j * jnp.ones(3), g), "complex64"),
    "turned round": (lambda g: mtl.weighted_sum(g, jnp.ones(3)), "weights .3. first"),
    "a narrow basis": (lambda g: mtl.gramian(g, basis=jnp.ones((2, 1))), r"\[K, 3\]"),
    "a vector as basis": (lambda g: mtl.gramian(g, basis=jnp.ones(3)), "one row a"),
    "one bool": (lambda g: mtl.gramian(g, task_mask=[True]), "3 bools"),
    "a mask of numbers": (
        lambda g: mtl.weighted_sum(jnp.ones(3), g, task_mask=jnp.ones(3)),
        "3 bools, one a task; got float32",
    ),
    "two numbers of tasks": (
        lambda g: mtl.gramian({"a": g["w"], "b": jnp.ones((1, 2))}),
        r"3 in leaf \['a'\], 1 in leaf \['b'\]",
    ),
    "a scalar": (lambda g: mtl.gramian({"a": jnp.ones(())}), "leaf .'a'. is a scalar"),
}


@pytest.mark.parametrize("kind", ["lazy", "held", "stacked"])
@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_what_does_not_fit_is_refused_in_words(name, kind):
    call, words = WRONG_SHAPES[name]
    task_grads = three_lazy_tasks()
    if kind == "held":
        task_grads = _tree.hold(task_grads)
    if kind == "stacked":
        task_grads = mtl.materialize(task_grads)
    with pytest.raises((TypeError, ValueError), match=words):
        call(task_grads)


def test_the_pair_of_losses_and_task_gradients_is_refused():
    with pytest.raises(ValueError, match="Pass its second member"):
        mtl.gramian((jnp.ones(3), three_lazy_tasks()))


def test_the_mask_works_on_a_lazy_tree():
    loss_fn, params = quadratic()
    _, lazy = mtl.task_jacobian(loss_fn)(params)
    J = exact(mtl.materialize(lazy))
    J[1] = 0
    mask = jnp.array([True, False, True])
    assert_close(mtl.gramian(lazy, task_mask=mask), J @ J.T, 1e-6)
    weights = jnp.array([2.0, 7.0, -1.0])
    ours = mtl.weighted_sum(weights, lazy, task_mask=mask)
    ours = exact(jax.tree.map(lambda x: x[None], ours))[0]
    assert_close(ours, np.asarray(weights) @ J, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [5, 2 * BLOCK + 1])
def test_products_ask_for_full_precision(dtype, size):
    tree = {"w": rows((3, size), 1, dtype), "b": rows((3,), 2, dtype)}
    basis, weights = jnp.eye(3), jnp.ones(3)
    for fn in (
        mtl.gramian,
        lambda t: mtl.gramian(t, basis=basis),
        lambda t: mtl.weighted_sum(weights, t),
    ):
        for eqn in dots(fn, tree):
            assert eqn.params["precision"] == (HIGHEST, HIGHEST)
            assert eqn.params["preferred_element_type"] == jnp.float32


def test_the_lazy_gramian_asks_for_full_precision():
    loss_fn, params = quadratic()

    def gram(params):
        return mtl.gramian(mtl.task_jacobian(loss_fn, mode="map")(params)[1])

    # The losses' own forward pass runs as the user wrote it; what the Gramian adds
    # does not.
    own = len(dots(lambda p: jax.vjp(loss_fn, p)[0], params))
    found = dots(gram, params)
    full = [e for e in found if e.params["precision"] == (HIGHEST, HIGHEST)]
    assert len(full) >= len(found) - own > 0


def test_float64_products_accumulate_in_float64(x64):
    tree = {"w": rows((3, 5), 1, jnp.float64)}
    for eqn in dots(mtl.gramian, tree):
        assert eqn.params["preferred_element_type"] == jnp.float64


# ------------------------------------------------------------------ two forms, one tree


def test_a_tree_of_lazy_and_stacked_leaves():
    loss_fn, params = quadratic()
    _, lazy = mtl.task_jacobian(loss_fn)(params)
    stacked = mtl.materialize(lazy)
    mixed = {"a": lazy["a"], "s": stacked["s"], "w": lazy["w"]}
    J = exact(stacked)
    assert _tree.is_lazy(mixed)
    assert not _tree.is_lazy(stacked)
    assert_close(mtl.gramian(mixed), J @ J.T, 1e-6)
    weights = jnp.array([1.0, -0.5, 2.0])
    for tree in (mixed, lazy, stacked):
        ours = mtl.weighted_sum(weights, tree)
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, params)
        ours = exact(jax.tree.map(lambda x: x[None], ours))[0]
        assert_close(ours, np.asarray(weights) @ J, 1e-6)
    assert mtl.materialize(mixed)["s"] is stacked["s"]


def test_two_operators_in_one_tree():
    loss_fn, params = quadratic()
    other_fn, _ = quadratic(offset=3.0)
    _, one = mtl.task_jacobian(loss_fn)(params)
    _, two = mtl.task_jacobian(other_fn)(params)
    # Interleaved, and in another order than the operators' own leaves.
    tree = [two["w"], one["a"], two["a"], one["s"]]
    plain = [mtl.materialize(t) for t in (one, two)]
    wanted = [plain[1]["w"], plain[0]["a"], plain[1]["a"], plain[0]["s"]]
    J = exact(wanted)
    assert_close(mtl.gramian(tree), J @ J.T, 1e-6)
    weights = jnp.array([1.0, 2.0, 3.0])
    ours = mtl.weighted_sum(weights, tree)
    assert [x.shape for x in ours] == [(4, 3), (4,), (4,), ()]
    ours = exact([x[None] for x in ours])[0]
    assert_close(ours, np.asarray(weights) @ J, 1e-6)
    for a, b in zip(mtl.materialize(tree), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_some_leaves_of_a_lazy_tree():
    loss_fn, params = quadratic()
    _, lazy = mtl.task_jacobian(loss_fn)(params)
    stacked = mtl.materialize(lazy)
    for names in (["w"], ["s"], ["w", "a"]):
        J = exact([stacked[n] for n in names])
        assert_close(mtl.gramian([lazy[n] for n in names]), J @ J.T, 1e-6)


def test_weighted_sum_follows_no_dtype_but_the_leaf(x64):
    g = {"w": rows((2, 3), 1, jnp.float32)}
    for weights in (
        np.array([1, 2]),
        [0.5, 0.25],
        jnp.array([1.0, 2.0], jnp.float64),
        jnp.array([1.0, 2.0], jnp.bfloat16),
    ):
        out = mtl.weighted_sum(weights, g)["w"]
        assert out.dtype == jnp.float32
        wanted = np.asarray(weights).astype(np.float64) @ exact(g)
        assert_close(out, wanted, 1e-6)


def test_weighted_sum_differentiates():
    g = rows((3, 4), 1)
    grad = jax.grad(lambda w: jnp.sum(mtl.weighted_sum(w, g)))(jnp.ones(3))
    np.testing.assert_allclose(grad, g.sum(1), rtol=1e-5)


def test_state_dtype_is_the_parameters_float32_at_least(x64):
    half, double = jnp.zeros(1, jnp.bfloat16), jnp.zeros(1, jnp.float64)
    assert _tree.state_dtype({"w": half}) == jnp.float32
    assert _tree.state_dtype({"w": half, "v": double}) == jnp.float64
    assert _tree.state_dtype({"w": object(), "n": jnp.zeros(1, int)}) == jnp.float32


# --------------------------------------------------------------------------------- norm


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e30])
def test_norm_at_any_scale(scale):
    tree = {"w": scale * rows((5, 3), 1), "b": jnp.zeros(0), "s": jnp.float32(scale)}
    wanted = np.linalg.norm(
        np.concatenate([np.ravel(x) for x in tree.values()]).astype(np.float64)
    )
    np.testing.assert_allclose(_tree.norm(tree), wanted, rtol=1e-6)


def test_norm_of_zero_and_of_half_precision():
    assert _tree.norm([jnp.zeros(3), jnp.zeros(0)]) == 0
    large = jnp.full((1000,), 200.0, jnp.float16)  # its square overflows float16
    found = _tree.norm(large)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 200 * np.sqrt(1000), rtol=1e-6)


def test_finite_rows():
    g = {
        "w": jnp.ones((3, 2)).at[0, 1].set(jnp.nan),
        "s": jnp.ones(3).at[2].set(jnp.inf),
    }
    np.testing.assert_array_equal(_tree.finite_rows(g), [False, True, False])
    assert not _tree.all_finite(g)
    assert _tree.all_finite({"n": jnp.ones(2, int), "w": jnp.ones(2)})


# -------------------------------------------------------------------------- stack_tasks


def test_task_order_is_sorted_as_jax_sorts_keys():
    grads = {f"t{i}": {"w": jnp.full(2, i)} for i in (2, 10, 1)}
    stacked = mtl.stack_tasks(grads)
    assert stacked["w"][:, 0].tolist() == [1, 10, 2]  # "t10" before "t2"
    back = mtl.unstack_tasks(stacked, like=grads)
    assert set(back) == set(grads)
    for name, tree in grads.items():
        np.testing.assert_array_equal(back[name]["w"], tree["w"])
    by_name = mtl.unstack_tasks(stacked, like=["t2", "t1", "t10"])
    assert {k: int(v["w"][0]) for k, v in by_name.items()} == {
        "t1": 1,
        "t10": 10,
        "t2": 2,
    }


def test_the_task_order_is_that_of_task_jacobian():
    losses = {"t10": 10.0, "t2": 2.0, "b": 5.0}
    fn = lambda w: {k: c * w for k, c in losses.items()}  # noqa: E731
    values, task_grads = mtl.value_and_task_grads(fn)(jnp.float32(1.0))
    grads = {k: jnp.float32(c) for k, c in losses.items()}
    np.testing.assert_array_equal(task_grads, mtl.stack_tasks(grads))
    np.testing.assert_array_equal(values, mtl.stack_tasks(grads))
    ordered = collections.OrderedDict(grads)
    _, task_grads = mtl.value_and_task_grads(
        lambda w: collections.OrderedDict((k, c * w) for k, c in losses.items())
    )(jnp.float32(1.0))
    np.testing.assert_array_equal(task_grads, [10.0, 2.0, 5.0])
    np.testing.assert_array_equal(mtl.stack_tasks(ordered), [10.0, 2.0, 5.0])
    back = mtl.unstack_tasks(task_grads, like=ordered)
    assert isinstance(back, collections.OrderedDict)
    assert list(back.items()) == list(ordered.items())


@pytest.mark.parametrize("kind", [list, tuple])
def test_sequences_keep_their_order(kind):
    trees = kind({"w": jnp.full(2, float(i)), "n": None} for i in (3, 1, 2))
    stacked = mtl.stack_tasks(trees)
    assert stacked["w"][:, 0].tolist() == [3, 1, 2]
    back = mtl.unstack_tasks(stacked)
    assert isinstance(back, list)
    for one, other in zip(back, trees, strict=True):
        np.testing.assert_array_equal(one["w"], other["w"])
    like = mtl.unstack_tasks(stacked, like=kind([0.0, 1.0, 2.0]))
    assert isinstance(like, kind)


def test_a_bare_array_a_task():
    stacked = mtl.stack_tasks({"b": jnp.ones(3), "a": jnp.zeros(3)})
    np.testing.assert_array_equal(stacked, [[0, 0, 0], [1, 1, 1]])


def test_unstacking_a_lazy_tree():
    loss_fn, params = quadratic()
    _, lazy = mtl.task_jacobian(loss_fn)(params)
    wanted = jax.jacrev(loss_fn)(params)
    trees = mtl.unstack_tasks(lazy)
    for t, tree in enumerate(trees):
        for name in params:
            np.testing.assert_allclose(
                tree[name], wanted[name][t], rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("grads", [{}, [], (), jnp.ones((2, 3)), None])
def test_stacking_nothing_is_refused(grads):
    with pytest.raises(ValueError, match=r"dict, list or tuple .* without tasks"):
        mtl.stack_tasks(grads)


def test_trees_that_differ_are_refused_by_name():
    good = {"w": {"k": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"task 'b' have the structure .*'z'.* 'a'"):
        mtl.stack_tasks({"a": good, "b": {"w": {"z": jnp.ones(2)}}})
    with pytest.raises(
        ValueError, match=r"leaf \['w'\]\['k'\] of task 'b' has shape \(3,\).*\(2,\)"
    ):
        mtl.stack_tasks({"a": good, "b": {"w": {"k": jnp.ones(3)}}})
    with pytest.raises(ValueError, match="task '1'"):
        mtl.stack_tasks([good, {"w": {"k": jnp.ones(3)}}])


@pytest.mark.parametrize("like", [["a"], {"a": 0, "b": 0, "c": 0}, []])
def test_a_wrong_number_of_names_is_refused(like):
    with pytest.raises(ValueError, match="hold 2 tasks"):
        mtl.unstack_tasks({"w": jnp.ones((2, 1))}, like=like)


# ---------------------------------------------------------- lazy leaves refuse in words


def lazy_tree():
    return mtl.task_jacobian(lambda p: (jnp.sum(p["w"] ** 2), jnp.sum(p["w"])))(
        {"w": jnp.ones(3)}
    )[1]


def refused(*errors):
    return pytest.raises(
        errors or TypeError, match=r"(?s)lazy task gradient.*materialize"
    )


ARITHMETIC = {
    "g + 1": lambda g: g + 1,
    "1 + g": lambda g: 1 + g,
    "array + g": lambda g: jnp.ones(3) + g,
    "g + array": lambda g: g + jnp.ones(3),
    "numpy * g": lambda g: np.ones(3) * g,
    "g - 1": lambda g: g - 1,
    "1 - g": lambda g: 1 - g,
    "2 * g": lambda g: 2 * g,
    "g * 2": lambda g: g * 2,
    "array * g": lambda g: jnp.float32(2) * g,
    "g / 2": lambda g: g / 2,
    "1 / g": lambda g: 1 / g,
    "g @ w": lambda g: g @ jnp.ones(3),
    "w @ g": lambda g: jnp.ones(2) @ g,
    "g ** 2": lambda g: g**2,
    "g // 2": lambda g: g // 2,
    "g % 2": lambda g: g % 2,
    "-g": lambda g: -g,
    "+g": lambda g: +g,
    "int": int,
    "abs": abs,
    "g[0]": lambda g: g[0],
    "for": list,
    "len": len,
    "bool": bool,
    "float": float,
    "g < 1": lambda g: g < 1,
    "g >= 1": lambda g: g >= 1,
    "g + g": lambda g: g + g,
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_refused(name):
    with refused():
        ARITHMETIC[name](lazy_tree()["w"])


ATTRIBUTES = {
    "mean": lambda g: g.mean(0),
    "astype": lambda g: g.astype(jnp.float32),
    "real": lambda g: g.real,
    "T": lambda g: g.T,
    "at": lambda g: g.at[0].set(1.0),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_what_only_arrays_have_is_refused(name):
    leaf = lazy_tree()["w"]
    assert not hasattr(leaf, name)
    with refused():
        ATTRIBUTES[name](leaf)


FUNCTIONS = {
    "sum": jnp.sum,
    "mean": lambda g: jnp.mean(g, 0),
    "asarray": jnp.asarray,
    "where": lambda g: jnp.where(True, g, 0.0),
    "stack": lambda g: jnp.stack([g, g]),
    "vdot": lambda g: jnp.vdot(g, g),
    "linalg.norm": jnp.linalg.norm,
    "isfinite": jnp.isfinite,
    "square": jnp.square,
    "einsum": lambda g: jnp.einsum("tp,sp->ts", g, g),
    "lax.add": lambda g: jax.lax.add(g, g),
    "np.asarray": np.asarray,
    "np.sum": np.sum,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_array_functions_refuse(name):
    with refused():
        FUNCTIONS[name](lazy_tree()["w"])


BORDERS = {
    "out of jit": lambda: jax.jit(lazy_tree)(),
    "into jit": lambda: jax.jit(lambda t: mtl.gramian(t))(lazy_tree()),
    "out of eval_shape": lambda: jax.eval_shape(lazy_tree),
    "into scan": lambda: jax.lax.scan(
        lambda c, _: (c, None), lazy_tree(), None, length=2
    ),
    "carry of scan": lambda: jax.lax.scan(
        lambda c, _: (lazy_tree(), None), {"w": jnp.ones((2, 3))}, None, length=2
    ),
    "outputs of scan": lambda: jax.lax.scan(
        lambda c, _: (c, lazy_tree()), 0.0, None, length=2
    ),
    "out of cond": lambda: jax.lax.cond(True, lazy_tree, lazy_tree),
    "into cond": lambda: jax.lax.cond(
        True, mtl.gramian, lambda t: jnp.zeros((2, 2)), lazy_tree()
    ),
    "out of vmap": lambda: jax.vmap(lambda _: lazy_tree())(jnp.ones(2)),
    "into vmap": lambda: jax.vmap(mtl.gramian)(lazy_tree()),
    "out of grad": lambda: jax.grad(lambda w: lazy_tree()["w"])(jnp.ones(3)),
    "apply_updates": lambda: optax.apply_updates({"w": jnp.ones(3)}, lazy_tree()),
}


@pytest.mark.parametrize("name", BORDERS)
def test_a_lazy_tree_does_not_leave_its_trace(name):
    with refused():
        BORDERS[name]()


BEFORE = {
    "clip_by_global_norm": lambda: optax.clip_by_global_norm(1.0),
    "clip": lambda: optax.clip(1.0),
    "clip_by_block_rms": lambda: optax.clip_by_block_rms(1.0),
    "adaptive_grad_clip": lambda: optax.adaptive_grad_clip(1.0),
    "scale": lambda: optax.scale(0.1),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(0.1),
    "add_decayed_weights": lambda: optax.add_decayed_weights(1e-2),
    "trace": lambda: optax.trace(0.9),
    "ema": lambda: optax.ema(0.9),
    "adam": lambda: optax.adam(1e-3),
    "sgd": lambda: optax.sgd(1e-3),
    "zero_nans": optax.zero_nans,
    "centralize": optax.centralize,
    "normalize_by_update_norm": optax.normalize_by_update_norm,
    "add_noise": lambda: optax.add_noise(0.1, 0.5, 0),
}


@pytest.mark.parametrize("name", BEFORE)
def test_optax_before_the_combiner_is_refused(name):
    params = {"w": jnp.ones(3)}
    tx = optax.chain(BEFORE[name](), mtl.edm(num_tasks=2))
    # Some of optax checks types by itself, and quotes the value in a ValueError.
    with refused(TypeError, ValueError):
        tx.update(lazy_tree(), tx.init(params), params)


def test_what_only_moves_leaves_passes():
    lazy = lazy_tree()
    leaf = lazy["w"]
    assert (leaf.shape, leaf.ndim, leaf.size) == ((2, 3), 2, 6)
    assert leaf.dtype == jnp.float32
    assert repr(leaf) == "LazyTaskGradient(['w'], shape=(2, 3), dtype=float32)"
    assert jnp.zeros_like(leaf).shape == (2, 3)
    again = jax.tree.map(lambda g: g, lazy)
    assert again["w"] is leaf
    params = {"w": jnp.ones(3)}
    for tx in (
        optax.chain(optax.identity(), mtl.edm(2)),
        optax.named_chain(("a", optax.identity()), ("b", mtl.edm(2))),
        optax.masked(mtl.edm(2), {"w": True}),
    ):
        updates, _ = tx.update(lazy, tx.init(params), params)
        assert updates["w"].shape == (3,)
