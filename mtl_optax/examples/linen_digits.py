"""The digits pair ``CL_RR`` with Flax *linen* and its `TrainState`.

`flax.training.train_state.TrainState.apply_gradients` passes nothing on to the
optimiser, so a combiner that reads the losses would not get them. The subclass below
does; calling ``tx.update`` yourself is as good. A *lazy* tree of task gradients brings
its losses along, and needs neither.

Run it with ``python -m mtl_optax.examples.linen_digits``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state
from jaxtyping import Array, Float, Key, PyTree
from tqdm import trange

import mtl_optax as mtl
from mtl_optax.examples.digits import Pairs, draw_pairs, load_sources


class TrainState(train_state.TrainState):
    """A linen `TrainState` whose gradients may be task gradients."""

    def apply_gradients(self, *, grads: PyTree[Any], **extra: Any) -> "TrainState":
        """Applies task gradients; ``losses=`` and the like go to the optimiser."""
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, **extra)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state)


class TwoTasks(nn.Module):
    """One shared layer; a head that classifies and a head that reconstructs."""

    @nn.compact
    def __call__(self, canvas: Float[Array, "pairs 10 10"]) -> tuple[Array, Array]:
        shared = nn.relu(nn.Dense(32, name="shared")(canvas.reshape(len(canvas), -1)))
        hidden = nn.relu(nn.Dense(64, name="hidden_rr")(shared))
        return nn.Dense(10, name="cl")(shared), nn.Dense(64, name="rr")(hidden)


MODEL = TwoTasks()
# The Task Tensioner on the shared layer, each head's own gradient on the heads; Adam.
TX = optax.chain(
    mtl.shared_only(
        mtl.task_tensioner(num_tasks=2),
        lambda params: {name: name == "shared" for name in params},
    ),
    optax.adam(3e-3),
)


def forward(params: PyTree[Array], canvas: Array) -> tuple[Array, Array]:
    """Logits of the left digit, pixels of the right one."""
    outputs: Any = MODEL.apply({"params": params}, canvas)
    return outputs


def loss_fn(params: PyTree[Array], pairs: Pairs) -> dict[str, Array]:
    """Cross entropy of the left digit, squared error of the right one's pixels."""
    logits, pixels = forward(params, pairs.canvas)
    labels, right = pairs.targets["CL"], pairs.targets["RR"]
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"CL": jnp.mean(nll), "RR": jnp.mean(jnp.square(pixels - right))}


@jax.jit
def create_state(key: Key[Array, ""]) -> TrainState:
    """The state before the first step."""
    params = MODEL.init(key, jnp.zeros((1, 10, 10)))["params"]
    return TrainState.create(apply_fn=MODEL.apply, params=params, tx=TX)


@jax.jit
def train_step(state: TrainState, pairs: Pairs) -> tuple[TrainState, Array]:
    """One step; the lazy task gradients are made and used in the same `jit`."""
    losses, task_grads = mtl.task_jacobian(loss_fn)(state.params, pairs)
    return state.apply_gradients(grads=task_grads, losses=losses), losses


def measure(params: PyTree[Array], pairs: Pairs) -> dict[str, float]:
    """Accuracy of the left digit in percent, root mean squared error of the right."""
    logits, pixels = forward(params, pairs.canvas)
    accuracy = jnp.mean(jnp.argmax(logits, -1) == pairs.targets["CL"])
    error = jnp.sqrt(jnp.mean(jnp.square(pixels - pairs.targets["RR"])))
    return {"CL accuracy %": 100 * float(accuracy), "RR rmse": float(error)}


def main(num_epochs: int = 60, batch_size: int = 128) -> dict[str, float]:
    """Trains on new pairs of training digits every epoch; prints metrics of others."""
    sources = load_sources()
    size = len(sources.train.labels)
    draw = jax.jit(draw_pairs, static_argnums=2)
    init_key, data_key, test_key = jax.random.split(jax.random.key(0), 3)
    state, losses = create_state(init_key), jnp.zeros(2)
    for epoch in (bar := trange(num_epochs, unit="epoch", leave=False)):
        pair_key, order_key = jax.random.split(jax.random.fold_in(data_key, epoch))
        pairs = draw(sources.train, pair_key, 4 * size)
        order = jax.random.permutation(order_key, 4 * size)
        for start in range(0, 4 * size - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            batch = jax.tree.map(lambda x, at=chosen: x[at], pairs)
            state, losses = train_step(state, batch)
        bar.set_postfix(CL=f"{losses[0]:.3f}", RR=f"{losses[1]:.4f}")
    metrics = measure(state.params, draw(sources.test, test_key, 2000))
    print("test:", ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    return metrics


if __name__ == "__main__":
    main()
