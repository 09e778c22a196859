"""Every way in which optax and Flax put transforms together trains the digits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import mtl_optax as mtl
from mtl_optax.examples import digits, models, trainer

TASKS = ("CL", "RR")
INIT, LOSS_FN, _ = models.make_digits(TASKS, hidden=24, features=8)
RATE = 1e-2
EPOCHS = 3


def _labels(params):
    return jax.tree.map(
        lambda shared: "shared" if shared else "heads", models.encoder_mask(params)
    )


def _multi_steps():
    return optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation()


TRANSFORMS = {
    "chain": lambda: optax.chain(
        mtl.shared_only(mtl.task_tensioner(num_tasks=2), models.encoder_mask),
        optax.clip_by_global_norm(1.0),
        optax.adam(RATE),
    ),
    "named_chain": lambda: optax.named_chain(
        ("combine", mtl.edm(num_tasks=2)), ("adam", optax.adam(RATE))
    ),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda rate: optax.chain(mtl.mean(num_tasks=2), optax.adam(rate))
    )(rate=RATE),
    "inject_hyperparams of the method": lambda: optax.chain(
        optax.inject_hyperparams(
            mtl.task_tensioner,
            static_args=("num_tasks", "window", "tension", "scale", "axis_name"),
        )(num_tasks=2, alpha=0.3),
        optax.adam(RATE),
    ),
    "partition": lambda: optax.partition(
        {
            "shared": optax.chain(mtl.edm(num_tasks=2), optax.adam(RATE)),
            "heads": optax.chain(mtl.sum_tasks(), optax.adam(RATE)),
        },
        _labels,
    ),
    "schedule_free": lambda: contrib.schedule_free(
        # As optax advises: the interpolation takes the place of Adam's momentum.
        optax.chain(mtl.mean(num_tasks=2), optax.adam(RATE, b1=0.0)),
        learning_rate=RATE,
    ),
    "MultiSteps after the combiner": lambda: optax.chain(
        mtl.mean(num_tasks=2), _multi_steps()
    ),
    "apply_if_finite after the combiner": lambda: optax.chain(
        mtl.edm(num_tasks=2), optax.apply_if_finite(optax.adam(RATE), 3)
    ),
}


@pytest.fixture(scope="module")
def pairs():
    return digits.draw_pairs(digits.load_sources().train, jax.random.key(0), 512)


lazy_and_stacked = pytest.mark.parametrize(
    "stacked",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["lazy", "stacked"],
)


def _assert_falls(losses):
    """Both losses, from the first few steps to the last few."""
    losses = np.asarray(losses)
    assert np.all(np.isfinite(losses))
    before, after = losses[:3].mean(axis=0), losses[-8:].mean(axis=0)
    assert np.all(after < 0.92 * before), (before, after)


@lazy_and_stacked
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_trains_the_digits(pairs, name, stacked):
    tx = TRANSFORMS[name]()
    params = INIT(jax.random.key(0))
    state = trainer.init_state(params, tx, jax.random.key(1))
    epoch = trainer.make_epoch(LOSS_FN, tx, 32, stacked=stacked)
    state, record = trainer.train(epoch, state, pairs, EPOCHS)
    _assert_falls(record.losses)
    shapes = jax.tree.map(lambda p: (p.shape, p.dtype), params)
    assert jax.tree.map(lambda p: (p.shape, p.dtype), state.params) == shapes


@lazy_and_stacked
def test_nnx_optimizer_trains_the_digits(pairs, stacked):
    model = models.DigitsNet(
        TASKS, hidden=24, features=8, rngs=nnx.Rngs(jax.random.key(0))
    )
    tx = optax.chain(mtl.task_tensioner(num_tasks=2), optax.adam(RATE))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    jacobian = mtl.value_and_task_grads if stacked else mtl.task_jacobian

    @nnx.jit
    def train_step(model, optimizer, batch):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss_fn(params):
            outputs = nnx.merge(graphdef, params, rest, copy=True)(batch.canvas)
            return models.task_losses(outputs, batch.targets)

        losses, task_grads = jacobian(loss_fn)(params)
        optimizer.update(model, task_grads, losses=losses)
        return losses

    losses = []
    for number in range(48):
        rows = (32 * number + jnp.arange(32)) % 512
        batch = jax.tree.map(lambda x, rows=rows: x[rows], pairs)
        losses.append(train_step(model, optimizer, batch))
    _assert_falls(jnp.stack(losses))
    weights = optax.tree_utils.tree_get(optimizer.opt_state, "task_weights")
    np.testing.assert_allclose(jnp.sum(jnp.asarray(weights)), 1, rtol=1e-4)
