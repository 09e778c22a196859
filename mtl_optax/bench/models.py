"""Four networks with T losses, as an ordinary JAX programmer writes them.

Plain functions on dicts of arrays, seeded data, squared errors. `MODELS` names them:
a dense network, a convolutional one, a transformer and a graph network. Each has an
encoder that all tasks share and one linear head a task, so that the same network can be
handed to `mtl_optax.task_jacobian` and to `mtl_optax.feature_jacobian`.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

EPSILON = 1e-5  # of layer norms


class Problem(NamedTuple):
    """A network, its data and its T losses.

    Attributes:
      model: its name in `MODELS`.
      sizes: what it was made with.
      params: at seeded random values.
      batch: what the losses see besides; holds ``"targets" [N, T]``.
      encoder: ``(params, batch) -> features [N, F]``.
    """

    model: str
    sizes: Any
    params: PyTree[Array]
    batch: dict[str, Array]
    encoder: Callable[[PyTree[Array], Mapping[str, Array]], Float[Array, "N F"]]

    @property
    def num_tasks(self) -> int:
        return self.batch["targets"].shape[1]

    def heads(
        self,
        params: PyTree[Array],
        features: Float[Array, "N F"],
        batch: Mapping[str, Array],
    ) -> Float[Array, " T"]:
        """Mean squared errors of one linear head a task."""
        outputs = dense(params["heads"], features)
        return jnp.mean(jnp.square(outputs - batch["targets"]), axis=0)

    def loss_fn(
        self, params: PyTree[Array], batch: Mapping[str, Array]
    ) -> Float[Array, " T"]:
        """All losses, as `mtl_optax.task_jacobian` wants them."""
        return self.heads(params, self.encoder(params, batch), batch)


class Model(NamedTuple):
    """A kind of network.

    Attributes:
      make: ``(num_tasks, sizes) -> Problem``.
      full: the sizes that are measured.
      small: sizes for a first look and for tests.
    """

    make: Callable[[int, Any], Problem]
    full: Any
    small: Any


# ------------------------------------------------------------------------------- layers


def dense(p: Mapping[str, Array], x: Array) -> Array:
    """A linear layer."""
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Mapping[str, Array], x: Array) -> Array:
    """Layer normalisation over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * lax.rsqrt(variance + EPSILON) * p["scale"] + p["bias"]


def convolution(p: Mapping[str, Array], x: Float[Array, "N H W C"]) -> Array:
    """A convolution that keeps height and width."""
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "SAME", dimension_numbers=layout
    )
    return y + p["bias"]


def average_pool(x: Float[Array, "N H W C"]) -> Array:
    """Means over 2 x 2 pixels."""
    window = (1, 2, 2, 1)
    return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / 4


def attention(
    p: Mapping[str, Any], x: Float[Array, "N L D"], num_heads: int
) -> Float[Array, "N L D"]:
    """Self-attention: every token looks at all tokens of its sequence."""
    split = (*x.shape[:2], num_heads, x.shape[2] // num_heads)
    query, key, value = (
        dense(p[name], x).reshape(split) for name in ("query", "key", "value")
    )
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key) / split[-1] ** 0.5
    mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits), value)
    return dense(p["out"], mixed.reshape(x.shape))


def _normal(random: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return jnp.asarray(scale * random.standard_normal(shape, np.float32), jnp.float32)


def _init_dense(
    random: np.random.Generator, inputs: int, outputs: int
) -> dict[str, Array]:
    kernel = _normal(random, inputs, outputs, scale=inputs**-0.5)
    return {"bias": jnp.zeros(outputs), "kernel": kernel}


def _init_norm(width: int) -> dict[str, Array]:
    return {"bias": jnp.zeros(width), "scale": jnp.ones(width)}


# ------------------------------------------------------------------------ dense network


class MlpSizes(NamedTuple):
    """`depth` tanh layers of `width`; `batch` examples."""

    width: int = 1024
    depth: int = 12
    batch: int = 64


def make_mlp(num_tasks: int, sizes: MlpSizes) -> Problem:
    """Tanh layers of one width.

    Example:
      >>> problem = make_mlp(3, MlpSizes(width=8, depth=2, batch=4))
      >>> problem.loss_fn(problem.params, problem.batch).shape
      (3,)
    """
    random = np.random.default_rng(0)
    width = sizes.width
    params = {
        "heads": _init_dense(random, width, num_tasks),
        "layers": [_init_dense(random, width, width) for _ in range(sizes.depth)],
    }
    batch = {
        "targets": _normal(random, sizes.batch, num_tasks),
        "x": _normal(random, sizes.batch, width),
    }

    def encoder(params: PyTree[Array], batch: Mapping[str, Array]) -> Array:
        x = batch["x"]
        for layer in params["layers"]:
            x = jnp.tanh(dense(layer, x))
        return x

    return Problem("mlp", sizes, params, batch, encoder)


# ---------------------------------------------------------------- convolutional network


class CnnSizes(NamedTuple):
    """Blocks of `channels` on images of `side` x `side` x 3; a dense layer of `width`.

    Every block halves the side.
    """

    side: int = 32
    channels: tuple[int, ...] = (32, 64, 128)
    width: int = 256
    batch: int = 32


def make_cnn(num_tasks: int, sizes: CnnSizes) -> Problem:
    """Blocks of 3 x 3 convolution, ReLU and average pooling; then a dense layer.

    Example:
      >>> problem = make_cnn(3, MODELS["cnn"].small)
      >>> problem.loss_fn(problem.params, problem.batch).shape
      (3,)
    """
    random = np.random.default_rng(1)
    convs = []
    for inputs, outputs in itertools.pairwise((3, *sizes.channels)):
        kernel = _normal(random, 3, 3, inputs, outputs, scale=(2 / (9 * inputs)) ** 0.5)
        convs.append({"bias": jnp.zeros(outputs), "kernel": kernel})
    flat = (sizes.side // 2 ** len(convs)) ** 2 * sizes.channels[-1]
    params = {
        "convs": convs,
        "dense": _init_dense(random, flat, sizes.width),
        "heads": _init_dense(random, sizes.width, num_tasks),
    }
    batch = {
        "images": _normal(random, sizes.batch, sizes.side, sizes.side, 3),
        "targets": _normal(random, sizes.batch, num_tasks),
    }

    def encoder(params: PyTree[Array], batch: Mapping[str, Array]) -> Array:
        x = batch["images"]
        for layer in params["convs"]:
            x = average_pool(jax.nn.relu(convolution(layer, x)))
        return jax.nn.relu(dense(params["dense"], x.reshape(x.shape[0], -1)))

    return Problem("cnn", sizes, params, batch, encoder)


# -------------------------------------------------------------------------- transformer


class TransformerSizes(NamedTuple):
    """`layers` of `width` on `batch` sequences of `length` tokens."""

    width: int = 256
    layers: int = 4
    num_heads: int = 8
    length: int = 64
    vocabulary: int = 1000
    batch: int = 16


def make_transformer(num_tasks: int, sizes: TransformerSizes) -> Problem:
    """Layers of attention and GELU, each behind a layer norm; tokens are averaged.

    Example:
      >>> problem = make_transformer(3, MODELS["transformer"].small)
      >>> problem.loss_fn(problem.params, problem.batch).shape
      (3,)
    """
    random = np.random.default_rng(2)
    width, num_heads = sizes.width, sizes.num_heads

    def layer() -> dict[str, Any]:
        names = ("key", "out", "query", "value")
        return {
            "attention": {name: _init_dense(random, width, width) for name in names},
            "down": _init_dense(random, 4 * width, width),
            "norm_1": _init_norm(width),
            "norm_2": _init_norm(width),
            "up": _init_dense(random, width, 4 * width),
        }

    params = {
        "heads": _init_dense(random, width, num_tasks),
        "layers": [layer() for _ in range(sizes.layers)],
        "norm": _init_norm(width),
        "places": _normal(random, sizes.length, width, scale=0.02),
        "tokens": _normal(random, sizes.vocabulary, width),
    }
    tokens = random.integers(sizes.vocabulary, size=(sizes.batch, sizes.length))
    batch = {
        "targets": _normal(random, sizes.batch, num_tasks),
        "tokens": jnp.asarray(tokens, jnp.int32),
    }

    def encoder(params: PyTree[Array], batch: Mapping[str, Array]) -> Array:
        x = params["tokens"][batch["tokens"]] + params["places"]
        for p in params["layers"]:
            x = x + attention(p["attention"], layer_norm(p["norm_1"], x), num_heads)
            hidden = jax.nn.gelu(dense(p["up"], layer_norm(p["norm_2"], x)))
            x = x + dense(p["down"], hidden)
        return jnp.mean(layer_norm(params["norm"], x), axis=1)

    return Problem("transformer", sizes, params, batch, encoder)


# ------------------------------------------------------------------------ graph network


class GnnSizes(NamedTuple):
    """`rounds` of messages of `width` between the `nodes` of each of `batch` graphs.

    A graph is a fixed random one with `degree` edges into every node.
    """

    width: int = 128
    rounds: int = 4
    nodes: int = 64
    degree: int = 8
    inputs: int = 16
    batch: int = 16


def make_gnn(num_tasks: int, sizes: GnnSizes) -> Problem:
    """Rounds of messages along edges, summed at each node; nodes are averaged.

    Example:
      >>> problem = make_gnn(3, MODELS["gnn"].small)
      >>> problem.loss_fn(problem.params, problem.batch).shape
      (3,)
    """
    random = np.random.default_rng(3)
    width, every, degree = sizes.width, sizes.batch * sizes.nodes, sizes.degree
    names = ("from_edges", "from_node", "message")
    params = {
        "embed": _init_dense(random, sizes.inputs, width),
        "heads": _init_dense(random, width, num_tasks),
        "rounds": [
            {name: _init_dense(random, width, width) for name in names}
            for _ in range(sizes.rounds)
        ],
    }
    # Edges stay within their graph: a graph's nodes stand one after the other.
    receivers = np.repeat(np.arange(every), degree)
    senders = random.integers(sizes.nodes, size=receivers.shape)
    senders += receivers // sizes.nodes * sizes.nodes
    batch = {
        "nodes": _normal(random, every, sizes.inputs),
        "receivers": jnp.asarray(receivers, jnp.int32),
        "senders": jnp.asarray(senders, jnp.int32),
        "targets": _normal(random, sizes.batch, num_tasks),
    }

    def encoder(params: PyTree[Array], batch: Mapping[str, Array]) -> Array:
        x = jax.nn.relu(dense(params["embed"], batch["nodes"]))
        for p in params["rounds"]:
            messages = jax.nn.relu(dense(p["message"], x))[batch["senders"]]
            received = jax.ops.segment_sum(messages, batch["receivers"], x.shape[0])
            x = jax.nn.relu(
                dense(p["from_node"], x) + dense(p["from_edges"], received / degree)
            )
        return jnp.mean(x.reshape(sizes.batch, sizes.nodes, width), axis=1)

    return Problem("gnn", sizes, params, batch, encoder)


MODELS = {
    "mlp": Model(
        make_mlp,
        MlpSizes(),
        MlpSizes(width=32, depth=3, batch=8),
    ),
    "cnn": Model(
        make_cnn,
        CnnSizes(),
        CnnSizes(side=8, channels=(4, 8), width=16, batch=4),
    ),
    "transformer": Model(
        make_transformer,
        TransformerSizes(),
        TransformerSizes(
            width=16, layers=1, num_heads=2, length=8, vocabulary=20, batch=4
        ),
    ),
    "gnn": Model(
        make_gnn,
        GnnSizes(),
        GnnSizes(width=16, rounds=2, nodes=6, degree=2, inputs=4, batch=4),
    ),
}
