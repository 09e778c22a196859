"""The demo's ways of training: each learns, alone and among other runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax.examples import costs, systems, trainer
from mtl_optax.examples.comparison import compare
from mtl_optax.examples.digits import draw_pairs, load_sources

TASKS = ("CL", "RR")
# The digits have no single-task baselines to lag behind, the trainer one batch a step.
NOT_GIVEN = {"delta_m", "other_task_grads"}
REFUSED = [name for name, m in mtl.METHODS.items() if m.needs & NOT_GIVEN]
TRAINED = [name for name in mtl.METHODS if name not in REFUSED]
NAMES = (*TRAINED, systems.PLAIN, systems.CONTROL)


@pytest.fixture(scope="module")
def pairs():
    return draw_pairs(load_sources().train, jax.random.key(0), 1024)


def test_every_method_of_the_registry_has_a_system():
    for name in TRAINED:
        assert systems.make_system(name, TASKS, 2).network
    for name in REFUSED:
        with pytest.raises(
            ValueError, match=f"{name} needs (delta_m|other_task_grads)"
        ):
            systems.make_system(name, TASKS, 2)


def test_what_the_digits_cannot_give_is_refused(monkeypatch):
    row = mtl.METHODS["priority_projection"]
    monkeypatch.setitem(mtl.METHODS, "other", row._replace(name="other"))
    with pytest.raises(ValueError, match="other needs strengths"):
        systems.make_system("other", TASKS, 2)


def test_controls_follow_what_they_control():
    assert systems.with_controls(["mgda"]) == ("mgda",)
    found = systems.with_controls(["priority_projection", "mean"])
    assert found == ("priority_projection", systems.CONTROL, "mean")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_system_learns_alone_and_among_others(name, pairs):
    epochs = 3
    system = systems.make_system(name, TASKS, epochs)
    keys = jax.random.split(jax.random.key(1), 2)
    rates = jnp.array([1e-3, 1e-2])

    def state_of(i):
        return system.init(system.start(keys[i]), rates[i], keys[i])

    alone, record = trainer.train(
        system.epoch, state_of(1), pairs, epochs, numbered=True
    )
    first, last = record.losses[0], record.losses[-4:].mean(0)
    if name == "pbi":  # it holds the losses alike, so the smaller may rise
        first, last = first.sum(), last.sum()
    # These follow the smaller loss, a tenth of the other: in so short a run the other
    # only begins to fall.
    late = name in {"scale_invariant", "gls", "famo", "go4align"}
    assert np.all(last < (0.995 if late else 0.98) * first)
    both = jax.tree.map(lambda *x: jnp.stack(x), state_of(0), state_of(1))
    states, records = trainer.train(
        system.epoch, both, pairs, epochs, numbered=True, over_seeds=True, donate=True
    )
    np.testing.assert_allclose(records.losses[1], record.losses, rtol=1e-2)
    assert not np.allclose(records.losses[0], record.losses, rtol=1e-2)
    measured = jax.vmap(system.measure, in_axes=(0, None))(states, pairs)
    assert {task: v.shape for task, v in measured.items()} == dict.fromkeys(TASKS, (2,))
    for task, value in system.measure(alone, pairs).items():
        np.testing.assert_allclose(measured[task][1], value, rtol=0.03)


@pytest.mark.slow
def test_the_unit_of_costs_and_what_costs_more():
    names = ["mean", "scale_by_mao", "priority_projection", systems.PLAIN]
    found = costs.measure_costs(names, TASKS, rounds=3, key=jax.random.key(0))
    assert list(found) == names
    assert found[systems.PLAIN].ratio == 1
    assert all(c.spread[0] <= c.ratio <= c.spread[1] for c in found.values())
    # Its state alone is 2 T copies of the parameters, against two.
    assert found["scale_by_mao"].megabytes > found["mean"].megabytes
    assert found["priority_projection"].ratio > 1.2


@pytest.mark.slow
def test_a_comparison_of_systems():
    found = compare(
        TASKS,
        ["scale_by_mao", "look_ahead_jacobian", "priority_projection"],
        num_seeds=2,
        num_epochs=2,
        learning_rates=(1e-3, 3e-3),
        train_pairs=256,
        with_costs=True,
        key=jax.random.key(0),
    )
    assert list(found.methods) == [
        "scale_by_mao",
        "look_ahead_jacobian",
        "priority_projection",
        systems.CONTROL,
    ]
    assert list(found.costs) == list(found.methods)
    for outcome in found.methods.values():
        assert outcome.test.shape == (2, 2)
        assert outcome.record.losses.shape == (2, 4, 2)
    # Both look at the same parameters first; the look-ahead reports its losses ahead.
    first = {n: o.record.losses[:, 0] for n, o in found.methods.items()}
    assert np.all(first["look_ahead_jacobian"] < first["scale_by_mao"])
