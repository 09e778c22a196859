"""Connection strength and the projection that it decides (Jeong & Yoon 2024)."""

import typing

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from flax import nnx

import mtl_optax as mtl


def hwio(oihw):
    return jnp.asarray(oihw, float).transpose(2, 3, 1, 0)


@pytest.fixture(scope="module")
def cases(load_fixture):
    return load_fixture("connection_strength")["cases"]


CASES = ["hand_2ch_2task", "conflict_2task_3x3", "group_not_per_channel", "degenerate"]


def case_arrays(case):
    kernel = hwio(case["conv_weight_OIHW"])
    tasks = case["tasks"]
    scale, var = (
        jnp.asarray([case[key][task] for task in tasks])
        for key in ("bn_scale", "bn_running_var")
    )
    rows = jnp.stack([hwio(case["task_grads"][task]) for task in tasks])
    return kernel, scale, var, rows


def project(rows, strengths, params=None, **options):
    tx = mtl.priority_projection(len(rows), **options)
    params = jnp.zeros(rows.shape[1:], rows.dtype) if params is None else params
    updates, _ = tx.update(rows, tx.init(params), params, strengths=strengths)
    return updates


# ------------------------------------------------------------- the authors' outputs


@pytest.mark.parametrize("name", CASES)
def test_the_authors_outputs(cases, name, x64):
    assert {case["name"] for case in cases} == set(CASES)
    case = next(c for c in cases if c["name"] == name)
    kernel, scale, var, rows = case_arrays(case)
    strengths = mtl.connection_strength(kernel, scale, var, eps=case["eps"])
    wanted = [case["strength_normalised"][task] for task in case["tasks"]]
    np.testing.assert_allclose(strengths, wanted, rtol=1e-12, atol=1e-14)
    owners = np.argmax(strengths, axis=0)
    np.testing.assert_array_equal(owners, case["top_task_index_per_channel"])
    combined = case["combined_grad"]
    if case["degenerate_all_one_task"]:
        assert combined is None
        combined = case["plain_sum"]
    updates = project(rows, strengths)
    np.testing.assert_allclose(updates, hwio(combined), rtol=1e-12, atol=1e-12)


def test_the_layout_of_a_dense_layer_is_the_1x1_case(cases, x64):
    kernel, scale, var, rows = case_arrays(cases[2])
    dense = mtl.connection_strength(kernel[0, 0], scale, var)
    conv = mtl.connection_strength(kernel, scale, var)
    np.testing.assert_allclose(dense, conv, rtol=1e-15)
    updates = project(rows[:, 0, 0], dense)
    np.testing.assert_allclose(updates, [[-1.5, 3.5, 6.0]], rtol=1e-14)


# ----------------------------------------------------------------- strengths, by paper


def test_strengths_against_the_equations(x64):
    rng = np.random.default_rng(0)
    W = rng.standard_normal((3, 3, 4, 5))
    gamma, var = rng.standard_normal((3, 5)), rng.uniform(0.1, 2, (3, 5))
    wanted = np.zeros((3, 5))
    for t in range(3):
        for p in range(5):
            s = sum(np.mean(W[:, :, q, p] ** 2) for q in range(4))
            wanted[t, p] = gamma[t, p] ** 2 / (var[t, p] + 1e-3) * s
        wanted[t] /= wanted[t].sum()
    found = mtl.connection_strength(W, gamma, var, eps=1e-3)
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


def test_constants_that_cancel():
    rng = np.random.default_rng(1)
    W, gamma = rng.standard_normal((2, 4)), rng.standard_normal((2, 4))
    var = np.full((2, 4), 1.0)
    plain = mtl.connection_strength(W, gamma, var)
    for factor in (1e-30, 1e15, -1.0):
        np.testing.assert_allclose(
            mtl.connection_strength(W, gamma * [[factor], [1]], var), plain, rtol=1e-5
        )
        np.testing.assert_allclose(
            mtl.connection_strength(W * factor, gamma, var), plain, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_strengths_are_shares(dtype):
    rng = np.random.default_rng(2)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 2, 6)), dtype)
    scale = jnp.asarray(rng.standard_normal((3, 6)), dtype)
    found = mtl.connection_strength(kernel, scale, jnp.ones((3, 6), dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    assert np.all(found >= 0)


def test_what_is_broken_stays_visible():
    scale, var = jnp.ones((2, 4)), jnp.ones((2, 4)).at[0, 1].set(jnp.nan)
    found = mtl.connection_strength(jnp.ones((2, 4)), scale, var)
    assert np.all(np.isnan(found[0]))
    np.testing.assert_allclose(found[1], 0.25)
    below = jnp.ones((2, 4)).at[0, 1].set(-1e-9)  # rounding
    assert np.all(mtl.connection_strength(jnp.ones((2, 4)), scale, below) >= 0)


@pytest.mark.parametrize("what", ["kernel", "scale", "both", "var"])
def test_nothing_to_go_by(what):
    kernel, scale, var = np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 4))
    if what in ("kernel", "both"):
        kernel = 0 * kernel
    if what in ("scale", "both"):
        scale = 0 * scale
    if what == "var":
        var = 0 * var  # a channel that never varies: eps keeps it finite
    found = mtl.connection_strength(kernel, scale, var)
    np.testing.assert_allclose(found, np.full((2, 4), 0.25))


def test_wrong_shapes_are_refused_in_words():
    one = np.ones
    for kernel, scale, var in (
        (one((2, 4)), one((2, 3)), one((2, 3))),
        (one((2, 4)), one((2, 4)), one((3, 4))),
        (one((2, 4)), one(4), one(4)),
        (one(()), one((2, 1)), one((2, 1))),
    ):
        with pytest.raises(ValueError, match="C_out"):
            mtl.connection_strength(kernel, scale, var)
    for eps in (-1e-5, 0.0, float("nan")):
        with pytest.raises(ValueError, match="eps"):
            mtl.connection_strength(one((2, 4)), one((2, 4)), one((2, 4)), eps=eps)


def test_strengths_under_jit_vmap_and_grad():
    kernel, scale = jnp.ones((2, 3)), jnp.arange(1.0, 7.0).reshape(2, 3)
    var = jnp.ones((2, 3))
    plain = mtl.connection_strength(kernel, scale, var)
    np.testing.assert_allclose(
        jax.jit(mtl.connection_strength)(kernel, scale, var), plain, rtol=1e-6
    )
    many = jax.vmap(mtl.connection_strength, in_axes=(None, 0, None))(
        kernel, jnp.stack([scale, 2 * scale]), var
    )
    np.testing.assert_allclose(many, jnp.stack([plain, plain]), rtol=1e-6)


# ------------------------------------------------------------------- the projection


def groups_of(rows, owner):
    """``{i: [T, size]}``: the gradients on the channels of each group."""
    return {
        i: rows[..., owner == i].reshape(len(rows), -1)
        for i in range(len(rows))
        if np.any(owner == i)
    }


@pytest.mark.parametrize("shape", [(2, 1, 2), (2, 4, 9), (3, 2, 5), (5, 3, 7)])
def test_properties_of_the_projection(shape):
    rng = np.random.default_rng(shape)
    many = rng.standard_normal((50, *shape)).astype(np.float32)
    many[:, 1:] -= rng.uniform(0, 1.5, (50, 1, 1, 1)) * many[:, :1]
    strengths = rng.uniform(size=(50, shape[0], shape[2])).astype(np.float32)
    found = laws.quick_jit(jax.vmap(project))(many, strengths)
    untouched = moved = 0
    for rows, owner, updates in zip(
        many, strengths.argmax(1), np.asarray(found), strict=True
    ):
        total = rows.sum(0)
        size = np.abs(rows).sum()
        groups = groups_of(rows, owner)
        if len(groups) == 1:
            np.testing.assert_allclose(updates, total, atol=1e-5 * size)
            continue
        for i, group in groups.items():
            own = group[i]
            products = group @ own
            kept = updates[..., owner == i].ravel()
            # Nobody's part conflicts with the owner's any more ...
            bound = own @ own + np.maximum(np.delete(products, i), 0).sum()
            np.testing.assert_allclose(kept @ own, bound, rtol=1e-3, atol=1e-4 * size)
            # ... and where nobody's did, nothing changes.
            plain = total[..., owner == i].ravel()
            if np.all(products >= 0):
                np.testing.assert_allclose(kept, plain, atol=1e-5 * size)
                untouched += 1
            else:
                assert not np.allclose(kept, plain, atol=1e-5 * size)
                moved += 1
    assert untouched > 0
    assert moved > 5


def test_over_the_group_not_a_channel_at_a_time():
    rows = jnp.array([[[1.0, 1.0, 1.0]], [[-3.0, 2.0, 5.0]]])
    strengths = np.array([[0.5, 0.5, 0.2], [0.1, 0.1, 0.8]])
    np.testing.assert_allclose(project(rows, strengths), [[-1.5, 3.5, 6.0]], rtol=1e-6)


def test_one_owner_of_everything_is_the_plain_sum():
    rows = jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]])
    for strengths in ([[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.2], [0.3, 0.4]]):
        np.testing.assert_allclose(project(rows, jnp.array(strengths)), [[-1.0, -2.0]])


def test_equal_strengths_go_to_the_first_task():
    rows = jnp.array([[[1.0, 2.0]], [[-2.0, 3.0]]])
    strengths = jnp.array([[0.5, 0.4], [0.5, 0.6]])
    np.testing.assert_allclose(project(rows, strengths), [[1.0, 5.0]], rtol=1e-6)


def test_an_owner_without_a_gradient_takes_nothing_away():
    rows = jnp.array([[[0.0, 2.0]], [[-2.0, 3.0]]])
    strengths = jnp.array([[0.9, 0.1], [0.1, 0.9]])
    np.testing.assert_allclose(project(rows, strengths), [[-2.0, 5.0]])


@pytest.mark.parametrize("lengths", [(1e-18, 1e18), (1e-30, 1.0), (1e15, 1e18)])
def test_long_and_short_rows(lengths):
    base = np.array([[[1.0, 1.0, 1.0]], [[-3.0, 2.0, 5.0]]])
    strengths = np.array([[0.5, 0.5, 0.2], [0.1, 0.1, 0.8]])
    rows = base * np.reshape(lengths, (2, 1, 1))
    # On group 0, task 1 loses half its length along (1, 1), whatever the units.
    long = lengths[1] * np.array([[-2.5, 2.5, 5.0]])
    wanted = long + lengths[0] * np.ones((1, 3))
    found = project(jnp.asarray(rows, jnp.float32), strengths)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_group_that_is_tiny_beside_the_rest_of_its_row():
    rows = jnp.array([[[1e-10, 1e10, 1e10]], [[-1.0, 1.0, 1.0]]])
    strengths = jnp.array([[0.9, 0.1, 0.1], [0.1, 0.9, 0.9]])
    found = project(rows, strengths)
    np.testing.assert_allclose(found[0, 0], 1e-10, atol=1e-6)  # not -1


@pytest.mark.parametrize("dtype", [bool, jnp.uint8, jnp.int32, jnp.complex64])
def test_strengths_are_floating_point_numbers(dtype):
    rows = jnp.ones((2, 1, 2))
    with pytest.raises(TypeError, match="floating-point"):
        project(rows, jnp.ones((2, 2), dtype))


def test_a_strength_that_is_not_a_number_owns_nothing():
    rows = jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]])
    strengths = jnp.array([[0.9, jnp.nan], [jnp.nan, 0.9]])
    np.testing.assert_allclose(project(rows, strengths), [[1.0, 1.0]], rtol=1e-6)
    nobody = jnp.full((2, 2), jnp.nan)
    np.testing.assert_allclose(project(rows, nobody), [[-1.0, -2.0]])


class Attention(typing.NamedTuple):
    query: typing.Any
    value: typing.Any


def test_a_field_called_value_is_a_leaf_like_others():
    rows = jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]])
    strengths = jnp.array([[0.9, 0.1], [0.1, 0.9]])
    params = Attention(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
    tx = mtl.priority_projection(2)
    for given in ({"value": strengths}, Attention(None, strengths)):
        updates, _ = tx.update(
            Attention(rows, rows), tx.init(params), params, strengths=given
        )
        np.testing.assert_allclose(updates.value, [[1.0, 1.0]], rtol=1e-6)
        np.testing.assert_allclose(updates.query, [[-1.0, -2.0]])


def test_strengths_of_leaves_that_others_take_care_of():
    rows = {"k": jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]]), "h": jnp.ones((2, 1, 2))}
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), rows)
    strengths = {
        "k": jnp.array([[0.9, 0.1], [0.1, 0.9]]),
        "h": jnp.array([[0.9, 0.1], [0.1, 0.9]]),
    }
    tx = mtl.shared_only(mtl.priority_projection(2), {"k": True, "h": False})
    updates, _ = tx.update(rows, tx.init(params), params, strengths=strengths)
    np.testing.assert_allclose(updates["k"], [[1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(updates["h"], [[2.0, 2.0]])


def test_which_leaves_are_projected():
    rows = jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]])
    strengths = jnp.array([[0.9, 0.1], [0.1, 0.9]])
    params = {"a": [jnp.zeros((1, 2)), jnp.zeros((1, 2))], "b": jnp.zeros((1, 2))}
    g = jax.tree.map(lambda _: rows, params)
    tx = mtl.priority_projection(2)
    plain, projected = [[-1.0, -2.0]], [[1.0, 1.0]]

    def check(strengths, first, second, b):
        updates, _ = tx.update(g, tx.init(params), params, strengths=strengths)
        np.testing.assert_allclose(updates["a"][0], first, rtol=1e-6)
        np.testing.assert_allclose(updates["a"][1], second, rtol=1e-6)
        np.testing.assert_allclose(updates["b"], b, rtol=1e-6)

    check({"a": [None, strengths], "b": None}, plain, projected, plain)
    check({"a": {0: strengths}}, projected, plain, plain)
    check({"b": strengths}, plain, plain, projected)
    check({}, plain, plain, plain)
    check(None, plain, plain, plain)
    check(jax.tree.map(lambda _: strengths, params), projected, projected, projected)


def test_a_flax_state_takes_a_plain_dict_of_strengths():
    layer = nnx.Linear(1, 2, rngs=nnx.Rngs(0))
    params = nnx.split(layer, nnx.Param, ...)[1]
    g = jax.tree.map(lambda p: jnp.stack([p, -2 * p]), params)
    g["kernel"] = g["kernel"].replace(jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]]))
    tx = mtl.priority_projection(2)
    strengths = {"kernel": jnp.array([[0.9, 0.1], [0.1, 0.9]])}
    updates, _ = tx.update(g, tx.init(params), params, strengths=strengths)
    np.testing.assert_allclose(updates["kernel"][...], [[1.0, 1.0]], rtol=1e-6)


def test_an_absent_task_owns_nothing():
    rows = jnp.array([[[1.0, -3.0, 1.0]], [[-2.0, 1.0, 1.0]], [[jnp.nan] * 3]])
    strengths = jnp.array([[0.1, 0.05, 0.2], [0.05, 0.1, 0.1], [0.9, 0.9, jnp.nan]])
    tx = mtl.priority_projection(3)
    params = jnp.zeros((1, 3))
    updates, _ = tx.update(
        rows,
        tx.init(params),
        params,
        strengths=strengths,
        task_mask=jnp.array([True, True, False]),
    )
    two = project(rows[:2], strengths[:2])
    np.testing.assert_allclose(updates, two, rtol=1e-6)


def test_inside_the_wrappers_and_a_chain():
    rows = {"k": jnp.array([[[1.0, -3.0]], [[-2.0, 1.0]]]), "h": jnp.ones((2, 3))}
    params = jax.tree.map(lambda g: jnp.zeros(g.shape[1:]), rows)
    strengths = {"k": jnp.array([[0.9, 0.1], [0.1, 0.9]])}
    inner = mtl.shared_only(mtl.priority_projection(2), {"k": True, "h": False})
    for combine in (inner, mtl.skip_nonfinite_tasks(inner)):
        tx = optax.chain(combine, optax.sgd(1.0))
        mtl.check_chain(tx, params, 2, strengths=strengths)
        updates, _ = tx.update(rows, tx.init(params), params, strengths=strengths)
        np.testing.assert_allclose(updates["k"], [[-1.0, -1.0]], rtol=1e-6)
        np.testing.assert_allclose(updates["h"], -2 * np.ones(3))
