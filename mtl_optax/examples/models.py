"""A small Flax NNX network with one shared encoder and one head a task.

The encoder is dense: XLA runs convolutions very slowly on CPU under `lax.scan` and
`vmap`, and everything here trains under both. Its last layer is narrow on purpose. What
one task writes into it, the others have to do without, and so they conflict.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, PyTree

from mtl_optax.examples.digits import CANVAS, SIDE, Pairs

LossFn = Callable[[PyTree[Array], Pairs], dict[str, Array]]

_CLASSES = 10


def classifies(task: str) -> bool:
    """Whether the task is a classification (accuracy) or a reconstruction (error)."""
    return task.startswith("C")


def make_heads(tasks: Sequence[str], features: int, hidden: int, rngs: nnx.Rngs) -> Any:
    """One head of two layers a task: classes, or the pixels of a digit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.models import make_heads
      >>> heads = make_heads(("CL", "RR"), 16, 32, nnx.Rngs(jax.random.key(0)))
      >>> heads["RR"](jnp.zeros((5, 16))).shape
      (5, 64)
    """

    def head(outputs: int) -> nnx.Sequential:
        return nnx.Sequential(
            nnx.Linear(features, hidden, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden, outputs, rngs=rngs),
        )

    return nnx.Dict(
        {task: head(_CLASSES if classifies(task) else SIDE * SIDE) for task in tasks}
    )


class DigitsNet(nnx.Module):
    """Shared dense encoder, one head of two layers a task.

    Args:
      tasks: names of `mtl_optax.examples.digits.TASKS`.
      hidden: width of the encoder's first layer and of the heads' hidden layers.
      features: width of what the tasks share.
      rngs: ``nnx.Rngs(key)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.models import DigitsNet
      >>> model = DigitsNet(("CL", "RR"), rngs=nnx.Rngs(jax.random.key(0)))
      >>> outputs = model(jnp.zeros((5, 10, 10)))
      >>> {task: out.shape for task, out in outputs.items()}
      {'CL': (5, 10), 'RR': (5, 64)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        hidden: int = 64,
        features: int = 16,
        rngs: nnx.Rngs,
    ) -> None:
        self.encoder = nnx.Sequential(
            nnx.Linear(CANVAS * CANVAS, hidden, rngs=rngs),
            nnx.relu,
            nnx.Linear(hidden, features, rngs=rngs),
            nnx.relu,
        )
        self.heads = make_heads(tasks, features, hidden, rngs)

    def __call__(
        self, canvas: Float[Array, "pairs 10 10"]
    ) -> dict[str, Float[Array, "pairs outputs"]]:
        shared = self.encoder(canvas.reshape(canvas.shape[0], -1))
        return {task: head(shared) for task, head in self.heads.items()}


def functional(
    model: nnx.Module,
) -> tuple[Callable[..., dict[str, Array]], PyTree[Array]]:
    """A model as ``apply(params, *inputs)`` and its parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.models import DigitsNet, functional
      >>> model = DigitsNet(("CL",), rngs=nnx.Rngs(jax.random.key(0)))
      >>> apply, params = functional(model)
      >>> apply(params, jnp.zeros((5, 10, 10)))["CL"].shape
      (5, 10)
    """
    graphdef, params, *rest = nnx.split(model, nnx.Param, ...)

    def apply(params: PyTree[Array], *inputs: Any) -> dict[str, Array]:
        # Without copy=True the model would hold arrays of the outer trace, which
        # Flax refuses as soon as a layer writes to them (BatchNorm).
        return nnx.merge(graphdef, params, *rest, copy=True)(*inputs)

    return apply, params


def task_losses(
    outputs: dict[str, Array], targets: dict[str, Array]
) -> dict[str, Array]:
    """One loss a task: mean negative log likelihood, or mean squared error.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.models import task_losses
      >>> outputs = {"CL": jnp.zeros((1, 10)), "RR": jnp.zeros((1, 64))}
      >>> losses = task_losses(
      ...     outputs, {"CL": jnp.array([3]), "RR": jnp.full((1, 64), 0.5)}
      ... )
      >>> {task: round(float(loss), 3) for task, loss in losses.items()}
      {'CL': 2.303, 'RR': 0.25}
    """

    def loss(task: str, output: Array) -> Array:
        target = targets[task]
        if classifies(task):
            nll = optax.softmax_cross_entropy_with_integer_labels(output, target)
            return jnp.mean(nll)
        return jnp.mean(jnp.square(output - target))

    return {task: loss(task, output) for task, output in outputs.items()}


def task_metrics(
    outputs: dict[str, Array], targets: dict[str, Array]
) -> dict[str, Array]:
    """What a person looks at: accuracy in percent, or root mean squared error.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.models import task_metrics
      >>> outputs = {"CL": jnp.eye(10)[:2], "RR": jnp.zeros((2, 64))}
      >>> measured = task_metrics(
      ...     outputs, {"CL": jnp.array([0, 7]), "RR": jnp.full((2, 64), 0.5)}
      ... )
      >>> {task: float(value) for task, value in measured.items()}
      {'CL': 50.0, 'RR': 0.5}
    """

    def metric(task: str, output: Array) -> Array:
        target = targets[task]
        if classifies(task):
            return 100 * jnp.mean(jnp.argmax(output, -1) == target)
        return jnp.sqrt(jnp.mean(jnp.square(output - target)))

    return {task: metric(task, output) for task, output in outputs.items()}


def make_digits(
    tasks: Sequence[str], *, hidden: int = 64, features: int = 16
) -> tuple[
    Callable[[Key[Array, ""]], PyTree[Array]],
    LossFn,
    Callable[[PyTree[Array], Pairs], dict[str, Array]],
]:
    """The digits problem as three pure functions.

    Args:
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      hidden: see `DigitsNet`.
      features: see `DigitsNet`.

    Returns:
      ``init(key) -> params``, ``loss_fn(params, pairs) -> {task: scalar}`` and
      ``metric_fn(params, pairs) -> {task: scalar}``. All three work under `jit` and
      `vmap`.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.digits import draw_pairs, load_sources
      >>> from mtl_optax.examples.models import make_digits
      >>> init, loss_fn, metric_fn = make_digits(("CL", "RR"))
      >>> pairs = draw_pairs(load_sources().test, jax.random.key(0), 8)
      >>> sorted(loss_fn(init(jax.random.key(1)), pairs))
      ['CL', 'RR']
    """

    def build(key: Key[Array, ""]) -> DigitsNet:
        return DigitsNet(tasks, hidden=hidden, features=features, rngs=nnx.Rngs(key))

    apply, _ = functional(build(jax.random.key(0)))

    def init(key: Key[Array, ""]) -> PyTree[Array]:
        return nnx.split(build(key), nnx.Param, ...)[1]

    def loss_fn(params: PyTree[Array], pairs: Pairs) -> dict[str, Array]:
        return task_losses(apply(params, pairs.canvas), pairs.targets)

    def metric_fn(params: PyTree[Array], pairs: Pairs) -> dict[str, Array]:
        return task_metrics(apply(params, pairs.canvas), pairs.targets)

    return init, loss_fn, metric_fn


def encoder_mask(params: PyTree[Array]) -> PyTree[Bool]:
    """True for the leaves of the shared encoder, for `mtl_optax.shared_only`.

    `mtl_optax.shared_mask` finds the same without knowing the network.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.models import encoder_mask, make_digits
      >>> params = make_digits(("CL", "RR"))[0](jax.random.key(0))
      >>> sum(jax.tree.leaves(encoder_mask(params))), len(jax.tree.leaves(params))
      (4, 12)
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "encoder" in jax.tree_util.keystr(path[:1]), params
    )
