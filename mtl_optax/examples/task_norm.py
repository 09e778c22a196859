"""Connection-strength optimisation on the digits: networks, and a mixed epoch.

The two phases of Jeong & Yoon (CVPR 2024) from the parts of this package:
`mtl_optax.sequential_task_steps`, `mtl_optax.priority_projection` and
`mtl_optax.phase_schedule`, with one batch norm a task (`mtl_optax.layers`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

import mtl_optax as mtl
from mtl_optax.examples.digits import CANVAS, Pairs
from mtl_optax.examples.models import make_heads, task_losses, task_metrics
from mtl_optax.examples.trainer import draw_batches
from mtl_optax.layers import TaskBatchNorm


class TaskNormDigits(nnx.Module):
    """`DigitsNet` with a batch norm a task after each shared layer.

    Args:
      tasks: names of `mtl_optax.examples.digits.TASKS`; their number in the norms is
        their place in sorted order, as in a dict of losses.
      hidden: width of the encoder's first layer and of the heads' hidden layers.
      features: width of what the tasks share.
      rngs: ``nnx.Rngs(key)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.task_norm import TaskNormDigits
      >>> model = TaskNormDigits(("CL", "RR"), rngs=nnx.Rngs(jax.random.key(0)))
      >>> model(jnp.zeros((5, 10, 10)), "RR").shape
      (5, 64)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        hidden: int = 64,
        features: int = 16,
        rngs: nnx.Rngs,
    ) -> None:
        self.layers: Any = nnx.List(
            [
                nnx.Linear(CANVAS * CANVAS, hidden, use_bias=False, rngs=rngs),
                nnx.Linear(hidden, features, use_bias=False, rngs=rngs),
            ]
        )
        self._finish(tasks, (hidden, features), features, hidden, rngs)

    def _finish(
        self,
        tasks: Sequence[str],
        widths: Sequence[int],
        features: int,
        hidden: int,
        rngs: nnx.Rngs,
    ) -> None:
        self.tasks = tuple(sorted(tasks))
        self.norms = nnx.List(
            [TaskBatchNorm(width, len(tasks), rngs=rngs) for width in widths]
        )
        self.heads = make_heads(self.tasks, features, hidden, rngs)

    def __call__(
        self,
        canvas: Float[Array, "pairs 10 10"],
        task: str,
        *,
        use_running_average: bool | None = None,
    ) -> Float[Array, "pairs outputs"]:
        x = self._shape_input(canvas)
        number = self.tasks.index(task)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            y = norm(layer(x), number, use_running_average=use_running_average)
            x = nnx.relu(y)
        out: Array = self.heads[task](x.reshape(x.shape[0], -1))
        return out

    def _shape_input(self, canvas: Array) -> Array:
        return canvas.reshape(canvas.shape[0], -1)

    def strengths(self) -> dict[str, dict[int, dict[str, Array]]]:
        """Connection strengths ``[T, C]`` at each shared kernel."""
        return {
            "layers": {
                number: {
                    "kernel": mtl.connection_strength(
                        layer.kernel[...], norm.scale, norm.var, eps=norm.epsilon
                    )
                }
                for number, (layer, norm) in enumerate(
                    zip(self.layers, self.norms, strict=True)
                )
            }
        }


class ConvTaskNormDigits(TaskNormDigits):
    """The same with a small convolutional encoder, as in the paper.

    Two 3 x 3 convolutions of stride 2. XLA's CPU back end runs convolutions slowly
    inside `lax.scan`, and more so under `vmap` over seeds.

    Args:
      tasks: as of `TaskNormDigits`.
      channels: output channels of the two convolutions.
      hidden: width of the heads' hidden layers.
      rngs: ``nnx.Rngs(key)``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.task_norm import ConvTaskNormDigits
      >>> def outputs():
      ...     model = ConvTaskNormDigits(("CL", "RR"), rngs=nnx.Rngs(0))
      ...     return model(jnp.zeros((5, 10, 10)), "CL")
      >>> jax.eval_shape(outputs).shape
      (5, 10)
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        channels: tuple[int, int] = (8, 16),
        hidden: int = 64,
        rngs: nnx.Rngs,
    ) -> None:
        sizes = zip((1, *channels[:-1]), channels, strict=True)
        self.layers = nnx.List(
            [
                nnx.Conv(a, b, (3, 3), strides=2, use_bias=False, rngs=rngs)
                for a, b in sizes
            ]
        )
        side = CANVAS
        for _ in channels:
            side = -(-side // 2)
        self._finish(tasks, channels, side * side * channels[-1], hidden, rngs)

    def _shape_input(self, canvas: Array) -> Array:
        return canvas[..., None]


class Problem(NamedTuple):
    """The digits with task-specific norms, as pure functions.

    Attributes:
      tasks: their names, in the order of losses and of rows of statistics.
      init: ``key -> (params, stats)``.
      loss_fn: ``(params, stats, pairs) -> ({task: scalar}, new stats)``; a forward pass
        a task, in training mode, each moving its own running statistics only.
      metric_fn: ``(params, stats, pairs) -> {task: scalar}``, by running statistics.
      strengths_of: ``(params, stats) -> strengths``, a nested dict with ``[T, C]`` at
        each shared kernel, for `mtl_optax.priority_projection`.
    """

    tasks: tuple[str, ...]
    init: Callable[[Key[Array, ""]], tuple[PyTree[Array], PyTree[Array]]]
    loss_fn: Callable[..., tuple[dict[str, Array], PyTree[Array]]]
    metric_fn: Callable[..., dict[str, Array]]
    strengths_of: Callable[..., dict[str, Any]]


def make_task_norm_digits(
    tasks: Sequence[str], *, convolutional: bool = False, **sizes: Any
) -> Problem:
    """The digits problem for `make_mixed_epoch`.

    Args:
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      convolutional: `ConvTaskNormDigits` instead of `TaskNormDigits`.
      **sizes: widths, as that network takes them.

    Returns:
      a `Problem`.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.digits import draw_pairs, load_sources
      >>> from mtl_optax.examples.task_norm import make_task_norm_digits
      >>> problem = make_task_norm_digits(("CL", "RR"))
      >>> params, stats = problem.init(jax.random.key(0))
      >>> pairs = draw_pairs(load_sources().test, jax.random.key(1), 8)
      >>> losses, stats = problem.loss_fn(params, stats, pairs)
      >>> sorted(losses)
      ['CL', 'RR']
      >>> jax.tree.map(lambda s: s.shape, problem.strengths_of(params, stats))
      {'layers': {0: {'kernel': (2, 64)}, 1: {'kernel': (2, 16)}}}
    """
    network = ConvTaskNormDigits if convolutional else TaskNormDigits

    def split(model: TaskNormDigits) -> tuple[Any, Any, Any]:
        found: Any = nnx.split(model, nnx.Param, nnx.BatchStat)
        graph, params, stats = found
        return graph, params, stats

    def build(key: Key[Array, ""]) -> TaskNormDigits:
        return network(tasks, **sizes, rngs=nnx.Rngs(key))

    graph, _, _ = split(nnx.eval_shape(lambda: build(jax.random.key(0))))

    def model_of(params: PyTree[Array], stats: PyTree[Array]) -> TaskNormDigits:
        model: TaskNormDigits = nnx.merge(graph, params, stats, copy=True)
        return model

    names = tuple(sorted(tasks))

    def init(key: Key[Array, ""]) -> tuple[PyTree[Array], PyTree[Array]]:
        _, params, stats = split(build(key))
        return params, stats

    def loss_fn(
        params: PyTree[Array], stats: PyTree[Array], pairs: Pairs
    ) -> tuple[dict[str, Array], PyTree[Array]]:
        model = model_of(params, stats)
        outputs = {task: model(pairs.canvas, task) for task in names}
        return task_losses(outputs, pairs.targets), split(model)[2]

    def metric_fn(
        params: PyTree[Array], stats: PyTree[Array], pairs: Pairs
    ) -> dict[str, Array]:
        model = model_of(params, stats)
        outputs = {
            task: model(pairs.canvas, task, use_running_average=True) for task in names
        }
        return task_metrics(outputs, pairs.targets)

    def strengths_of(params: PyTree[Array], stats: PyTree[Array]) -> dict[str, Any]:
        return dict(model_of(params, stats).strengths())

    return Problem(names, init, loss_fn, metric_fn, strengths_of)


def merge_stats(stacked: PyTree[Array]) -> PyTree[Array]:
    """Each task's own row of its own statistics, after `sequential_task_steps`.

    Args:
      stacked: statistics ``[T, T, C]``: one ``[T, C]`` from each task's forward pass.

    Returns:
      statistics ``[T, C]``, row t from the forward pass of task t.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.task_norm import merge_stats
      >>> merge_stats({"mean": jnp.arange(4.0).reshape(2, 2, 1)})
      {'mean': Array([[0.],
             [3.]], dtype=float32)}
    """
    # One index after the other: from `s[t, t]` XLA does not see that the other rows,
    # and with them whole forward passes, are not needed.
    return jax.tree.map(
        lambda s: jnp.stack([s[t][t] for t in range(s.shape[0])]), stacked
    )


class MixedState(NamedTuple):
    """All that training carries from step to step; arrays only."""

    params: PyTree[Array]
    stats: PyTree[Array]
    opt_state: Any
    key: Key[Array, ""]


class MixedRecord(NamedTuple):
    """What happened in an epoch.

    Attributes:
      losses: of each minibatch; in Phase 1 each task's before its own step.
      phase_1: whether the step was one of Phase 1.
      owners: of each output channel of each shared kernel, the task with the largest
        connection strength, at the end of the epoch; a tree like ``strengths_of``'s.
    """

    losses: Float[Array, "steps tasks"]
    phase_1: Bool[Array, " steps"]
    owners: PyTree[Int[Array, " channels"]]


def init_mixed_state(
    problem: Problem, tx: optax.GradientTransformation, key: Key[Array, ""]
) -> MixedState:
    """The state before the first step, under `vmap` for many seeds.

    Args:
      problem: what `make_task_norm_digits` returned.
      tx: the optimiser of both phases.
      key: decides the initial parameters and how minibatches are drawn.

    Example:
      >>> import jax, optax
      >>> from mtl_optax.examples.task_norm import init_mixed_state
      >>> from mtl_optax.examples.task_norm import make_task_norm_digits
      >>> problem, tx = make_task_norm_digits(("CL", "RR")), optax.adam(1e-3)
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> states = jax.vmap(lambda key: init_mixed_state(problem, tx, key))(keys)
      >>> states.opt_state[0].count.shape
      (3,)
    """
    init_key, order_key = jax.random.split(key)
    params, stats = problem.init(init_key)
    return MixedState(params, stats, tx.init(params), order_key)


def make_mixed_epoch(
    problem: Problem,
    tx: optax.GradientTransformation,
    batch_size: int,
    num_epochs: int,
    *,
    phase_1: bool = True,
    draw: str = "batch",
    touched: PyTree[Bool[np.ndarray, " tasks"]] | None = None,
) -> Callable[..., tuple[MixedState, MixedRecord]]:
    """One pass over the data, each step in one phase or the other.

    Phase 1 is `mtl_optax.sequential_task_steps`. Phase 2 takes all task gradients,
    `mtl_optax.priority_projection` by strengths from the running variances after the
    step's own forward passes, and one step. Both use `tx` and its one state.

    For many seeds at once: ``jax.vmap(epoch, in_axes=(0, None, None, None))``. All
    seeds then go through the same phases, and only one phase is paid for.

    Args:
      problem: what `make_task_norm_digits` returned, or another with these functions.
      tx: an optimiser of ordinary gradients, such as ``optax.adam(1e-3)``.
      batch_size: examples a step.
      num_epochs: E, over which Phase 1 fades.
      phase_1: whether there is a Phase 1; if not, every step is one of Phase 2.
      draw: the phase is drawn anew for each ``"batch"`` (the authors' code) or for each
        ``"epoch"`` (the paper's text).
      touched: see `mtl_optax.sequential_task_steps`.

    Returns:
      ``epoch(state, data, number, phase_key) -> (state, MixedRecord)``; `number` counts
      epochs from 0 and `phase_key` is the same at every epoch.

    Raises:
      ValueError: when the data hold less than one minibatch, or an argument is none of
        the possible ones.

    Example:
      >>> import jax, optax
      >>> from mtl_optax.examples.digits import draw_pairs, load_sources
      >>> from mtl_optax.examples import task_norm
      >>> problem = task_norm.make_task_norm_digits(("CL", "RR"))
      >>> pairs = draw_pairs(load_sources().train, jax.random.key(0), 64)
      >>> tx = optax.adam(1e-3)
      >>> state = task_norm.init_mixed_state(problem, tx, jax.random.key(1))
      >>> epoch = jax.jit(task_norm.make_mixed_epoch(problem, tx, 16, num_epochs=8))
      >>> for number in range(2):
      ...     state, record = epoch(state, pairs, number, jax.random.key(2))
      >>> record.losses.shape, record.phase_1.shape
      ((4, 2), (4,))
      >>> jax.tree.map(lambda owners: owners.shape, record.owners)
      {'layers': {0: {'kernel': (64,)}, 1: {'kernel': (16,)}}}
    """
    if draw not in ("batch", "epoch"):
        raise ValueError(f"draw must be 'batch' or 'epoch', got {draw!r}.")
    num_tasks = len(problem.tasks)
    sequential = mtl.sequential_task_steps(
        problem.loss_fn, tx, num_tasks, has_aux=True, touched=touched
    )
    task_grads_of = mtl.value_and_task_grads(problem.loss_fn, has_aux=True)
    combine = mtl.priority_projection(num_tasks)

    def step_alone(
        params: PyTree[Array], stats: PyTree[Array], opt_state: Any, batch: Any
    ) -> tuple[Any, ...]:
        params, opt_state, (losses, each) = sequential(params, opt_state, stats, batch)
        return params, merge_stats(each), opt_state, losses

    def step_together(
        params: PyTree[Array], stats: PyTree[Array], opt_state: Any, batch: Any
    ) -> tuple[Any, ...]:
        (losses, stats), task_grads = task_grads_of(params, stats, batch)
        # The combiner carries nothing from step to step, unlike `tx`, whose one state
        # serves both phases.
        grads, _ = combine.update(
            task_grads,
            combine.init(params),
            params,
            strengths=problem.strengths_of(params, stats),
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, losses

    def epoch(
        state: MixedState,
        data: PyTree[Array],
        number: int | Int[Array, ""],
        phase_key: Key[Array, ""],
    ) -> tuple[MixedState, MixedRecord]:
        order_key, next_key = jax.random.split(state.key)
        batches = draw_batches(order_key, data, batch_size)

        def step(
            carry: tuple[Any, ...], now: tuple[Array, Array]
        ) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
            at, chosen = now
            batch = jax.tree.map(lambda x: x[chosen], data)
            params, stats, opt_state = carry
            first = jnp.zeros((), bool)
            if phase_1:
                first = mtl.phase_schedule(
                    phase_key, number, num_epochs, step=at if draw == "batch" else None
                )
                *carried, losses = lax.cond(
                    first, step_alone, step_together, params, stats, opt_state, batch
                )
            else:
                *carried, losses = step_together(params, stats, opt_state, batch)
            return tuple(carried), (losses, first)

        (params, stats, opt_state), (losses, firsts) = lax.scan(
            step,
            (state.params, state.stats, state.opt_state),
            (jnp.arange(len(batches)), batches),
        )
        owners = jax.tree.map(
            lambda strengths: jnp.argmax(strengths, axis=0),
            problem.strengths_of(params, stats),
        )
        record = MixedRecord(losses, firsts, owners)
        return MixedState(params, stats, opt_state, next_key), record

    return epoch
