"""The digits: a split that does not leak, pairs that are what they say, the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import mtl_optax as mtl
from mtl_optax.examples import digits, models


@pytest.fixture(scope="module")
def sources():
    return digits.load_sources()


def test_no_source_image_stands_in_two_splits(sources):
    parts = [set(part.rows.tolist()) for part in sources]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797


def test_no_image_of_one_split_equals_one_of_another(sources):
    seen = [{image.tobytes() for image in np.asarray(part.images)} for part in sources]
    for i in range(3):
        for j in range(i):
            assert not seen[i] & seen[j]


def test_splits_hold_the_images_they_name_in_unit_range(sources):
    raw = load_digits()
    for part in sources:
        np.testing.assert_array_equal(part.images * 16, raw.images[part.rows])
        np.testing.assert_array_equal(part.labels, raw.target[part.rows])
        assert part.images.min() == 0
        assert part.images.max() == 1


def test_every_split_has_every_digit_alike(sources):
    for part, share in zip(sources, (0.6, 0.2, 0.2), strict=True):
        counts = np.bincount(part.labels, minlength=10)
        whole = np.bincount(load_digits().target)
        assert np.all(np.abs(counts - share * whole) < 1.5)


def test_the_split_is_the_same_every_time(sources):
    again = jax.tree.leaves(digits.load_sources())
    for one, other in zip(jax.tree.leaves(sources), again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pairs_come_from_their_own_split_only(sources):
    for part in sources:
        pairs = digits.draw_pairs(part, jax.random.key(0), 700)
        assert set(np.unique(pairs.rows)) <= set(part.rows.tolist())


def test_pairs_depend_on_the_key_and_on_nothing_else(sources):
    def rows(seed):
        pairs = digits.draw_pairs(sources.test, jax.random.key(seed), 500)
        return np.asarray(pairs.rows)

    np.testing.assert_array_equal(rows(0), rows(0))
    assert np.any(rows(0) != rows(1))


def test_a_pair_shows_its_two_digits_and_their_targets(sources):
    raw = load_digits()
    pairs = digits.draw_pairs(sources.validation, jax.random.key(3), 400)
    left, right = np.asarray(pairs.rows).T
    assert np.all(left != right)
    np.testing.assert_array_equal(pairs.targets["CL"], raw.target[left])
    np.testing.assert_array_equal(pairs.targets["CR"], raw.target[right])
    np.testing.assert_array_equal(
        pairs.targets["RR"], raw.images[right].reshape(-1, 64) / 16
    )
    canvas = np.asarray(pairs.canvas)
    np.testing.assert_array_equal(canvas[:, :2, :8], raw.images[left][:, :2] / 16)
    np.testing.assert_array_equal(canvas[:, 8:, 2:], raw.images[right][:, 6:] / 16)
    np.testing.assert_array_equal(
        canvas[:, 2:8, 2:8],
        np.maximum(raw.images[left][:, 2:, 2:], raw.images[right][:, :6, :6]) / 16,
    )
    assert np.all(canvas[:, :2, 8:] == 0)
    assert np.all(canvas[:, 8:, :2] == 0)


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("CL", ("CL",)),
        ("cl_rr", ("CL", "RR")),
        ("RR_CR_CL", ("CL", "CR", "RR")),
    ],
)
def test_names_of_tasks(name, tasks):
    assert digits.parse_tasks(name) == tasks


@pytest.mark.parametrize("name", ["", "CL_XX", "CL_CL", "CL-RR"])
def test_wrong_names_of_tasks_are_refused(name):
    with pytest.raises(ValueError, match="join any of CL, CR, RR"):
        digits.parse_tasks(name)


@pytest.mark.parametrize("name", ["CL", "CL_RR", "CL_CR_RR"])
def test_losses_are_one_scalar_a_task_in_the_order_of_the_jacobian(sources, name):
    tasks = digits.parse_tasks(name)
    init, loss_fn, metric_fn = models.make_digits(tasks)
    params = init(jax.random.key(0))
    pairs = digits.draw_pairs(sources.train, jax.random.key(1), 32)
    losses, _ = mtl.task_jacobian(loss_fn)(params, pairs)
    by_name = loss_fn(params, pairs)
    assert tuple(by_name) == tasks
    np.testing.assert_allclose(losses, [by_name[t] for t in tasks], rtol=1e-6)
    assert tuple(metric_fn(params, pairs)) == tasks


def test_losses_agree_with_numpy(sources):
    pairs = digits.draw_pairs(sources.test, jax.random.key(2), 16)
    keys = jax.random.split(jax.random.key(5))
    outputs = {
        "CL": jax.random.normal(keys[0], (16, 10)),
        "RR": jax.random.normal(keys[1], (16, 64)),
    }
    losses = models.task_losses(outputs, pairs.targets)
    logits = np.asarray(outputs["CL"], np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    nll = -log_probs[np.arange(16), np.asarray(pairs.targets["CL"])].mean()
    mse = ((np.asarray(outputs["RR"]) - np.asarray(pairs.targets["RR"])) ** 2).mean()
    np.testing.assert_allclose(losses["CL"], nll, rtol=1e-5)
    np.testing.assert_allclose(losses["RR"], mse, rtol=1e-5)
    measured = models.task_metrics(outputs, pairs.targets)
    np.testing.assert_allclose(measured["RR"], np.sqrt(mse), rtol=1e-5)
    hits = logits.argmax(1) == np.asarray(pairs.targets["CL"])
    np.testing.assert_allclose(measured["CL"], 100 * hits.mean(), rtol=1e-6)


def test_the_mask_found_from_the_losses_is_the_encoder(sources):
    init, loss_fn, _ = models.make_digits(("CL", "RR"))
    params = init(jax.random.key(0))
    pairs = digits.draw_pairs(sources.train, jax.random.key(1), 32)
    found = mtl.shared_mask(loss_fn, params, pairs)
    assert jax.tree.leaves(found) == jax.tree.leaves(models.encoder_mask(params))


def test_functional_form_equals_the_model():
    model = models.DigitsNet(("CL", "RR"), rngs=nnx.Rngs(jax.random.key(0)))
    apply, params = models.functional(model)
    canvas = jnp.linspace(0, 1, 300).reshape(3, 10, 10)
    for task, output in model(canvas).items():
        np.testing.assert_allclose(apply(params, canvas)[task], output, rtol=1e-6)
