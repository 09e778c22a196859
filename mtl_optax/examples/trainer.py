"""A small trainer: one epoch is one compiled call, for any optax transform.

The transform is anything whose input is task gradients, such as
``optax.chain(mtl.task_tensioner(num_tasks=2), optax.adam(1e-3))``. Nothing here knows
about digits, or about Flax.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mtl_optax import gramian, task_jacobian, value_and_task_grads


class TrainState(NamedTuple):
    """All that training carries from step to step; arrays only."""

    params: PyTree[Array]
    opt_state: Any
    key: Key[Array, ""]


class Record(NamedTuple):
    """What happened, step by step.

    Attributes:
      losses: of each minibatch, before its update; tasks in the order of the Jacobian.
      task_weights: weights of the combination; None if the transform keeps none.
      gramians: inner products of the task gradients, at every n-th step; None if they
        were not asked for.
    """

    losses: Float[Array, "steps tasks"]
    task_weights: Float[Array, "steps tasks"] | None
    gramians: Float[Array, "looks tasks tasks"] | None


def init_state(
    params: PyTree[Array], tx: optax.GradientTransformation, key: Key[Array, ""]
) -> TrainState:
    """The state before the first step; `key` decides how minibatches are drawn.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from mtl_optax.examples.trainer import init_state
      >>> state = init_state({"w": jnp.zeros(2)}, optax.sgd(0.1), jax.random.key(0))
      >>> state.params
      {'w': Array([0., 0.], dtype=float32)}
    """
    return TrainState(params, tx.init(params), key)


def make_epoch(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    batch_size: int,
    *,
    stacked: bool = False,
    look_at: Callable[[PyTree[Array]], PyTree[Bool]] | None = None,
    look_every: int = 1,
    extras: Callable[[Key[Array, ""]], Mapping[str, Any]] | None = None,
) -> Callable[[TrainState, PyTree[Array]], tuple[TrainState, Record]]:
    """One pass over the data as one pure function: `jit` it, `vmap` it over seeds.

    Minibatches are drawn without replacement, in an order that the state's key decides;
    what does not fill a last minibatch is left out of this epoch.

    Args:
      loss_fn: ``(params, batch) -> losses``, as `mtl_optax.task_jacobian` takes it.
      tx: any optax transform that takes task gradients; ``losses=`` is passed on.
      batch_size: examples a step.
      stacked: gives `tx` stacked arrays ``[T, *param.shape]`` instead of lazy leaves.
        The updates are the same; stacked costs more memory, and T backward passes.
      look_at: a mask of the parameters (True: count this leaf) over which Gramians are
        recorded; None records none. It costs a Gramian a look.
      look_every: records the Gramian at the first of every so many steps.
      extras: makes the keyword arguments that a method needs besides ``losses``, from a
        fresh key at every step.

    Returns:
      ``epoch(state, data) -> (state, Record)``; `data` is a tree of arrays that share
      their first axis.

    Raises:
      ValueError: when the data hold less than one minibatch, or a size is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> from mtl_optax.examples.trainer import init_state, make_epoch
      >>> def loss_fn(params, batch):
      ...     return (jnp.mean((params["w"] - batch) ** 2), jnp.sum(params["w"] ** 2))
      >>> tx = optax.chain(mtl.mgda(num_tasks=2), optax.sgd(0.1))
      >>> state = init_state({"w": jnp.zeros(3)}, tx, jax.random.key(0))
      >>> epoch = jax.jit(make_epoch(loss_fn, tx, batch_size=4))
      >>> state, record = epoch(state, jnp.ones((20, 3)))
      >>> record.losses.shape, record.task_weights.shape
      ((5, 2), (5, 2))
    """
    if batch_size < 1 or look_every < 1:
        raise ValueError(
            "batch_size and look_every must be at least 1, got "
            f"{batch_size} and {look_every}."
        )
    update = optax.with_extra_args_support(tx).update
    jacobian = (value_and_task_grads if stacked else task_jacobian)(loss_fn)

    def epoch(state: TrainState, data: PyTree[Array]) -> tuple[TrainState, Record]:
        order_key, extras_key, next_key = jax.random.split(state.key, 3)
        batches = draw_batches(order_key, data, batch_size)

        def step(
            carry: tuple[PyTree[Array], Any], now: tuple[Array, Array]
        ) -> tuple[tuple[PyTree[Array], Any], Record]:
            params, opt_state = carry
            number, chosen = now
            batch = jax.tree.map(lambda x: x[chosen], data)
            losses, task_grads = jacobian(params, batch)
            more: Mapping[str, Any] = {}
            if extras is not None:
                more = extras(jax.random.fold_in(extras_key, number))
            updates, opt_state = update(
                task_grads, opt_state, params, losses=losses, **more
            )
            look = None
            if look_at is not None:
                watched = _marked(task_grads, look_at(params))
                tasks = losses.shape[0]
                # The step number is the same for all runs under `vmap`, so this stays
                # a branch and unwatched steps pay nothing.
                look = lax.cond(
                    number % look_every == 0,
                    lambda: gramian(watched),
                    lambda: jnp.zeros((tasks, tasks), jnp.float32),
                )
            record = Record(losses, _task_weights(opt_state), look)
            return (optax.apply_updates(params, updates), opt_state), record

        (params, opt_state), record = lax.scan(
            step, (state.params, state.opt_state), (jnp.arange(len(batches)), batches)
        )
        if record.gramians is not None:
            record = record._replace(gramians=record.gramians[::look_every])
        return TrainState(params, opt_state, next_key), record

    return epoch


def make_step_epoch(
    step: Callable[..., tuple[PyTree[Array], Any, Array]], batch_size: int
) -> Callable[[TrainState, PyTree[Array]], tuple[TrainState, Record]]:
    """One pass over the data by a step that does everything itself.

    For `mtl_optax.look_ahead_steps` and `mtl_optax.sequential_task_steps`, whose steps
    are more than one update.

    Args:
      step: ``(params, opt_state, batch) -> (params, opt_state, losses)``.
      batch_size: examples a step.

    Returns:
      ``epoch(state, data) -> (state, Record)``, as `make_epoch` does.

    Raises:
      ValueError: when the data hold less than one minibatch, or a size is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> from mtl_optax.examples.trainer import init_state, make_step_epoch
      >>> def loss_fn(params, batch):
      ...     return (jnp.mean((params - batch) ** 2), params**2)
      >>> tx = optax.sgd(0.1)
      >>> step = mtl.sequential_task_steps(loss_fn, tx, num_tasks=2)
      >>> state = init_state(jnp.array(0.0), tx, jax.random.key(0))
      >>> state, record = jax.jit(make_step_epoch(step, 4))(state, jnp.ones(20))
      >>> record.losses.shape
      (5, 2)
    """

    def epoch(state: TrainState, data: PyTree[Array]) -> tuple[TrainState, Record]:
        order_key, next_key = jax.random.split(state.key)
        batches = draw_batches(order_key, data, batch_size)

        def body(carry: tuple[Any, Any], chosen: Array) -> tuple[Any, Array]:
            batch = jax.tree.map(lambda x: x[chosen], data)
            params, opt_state, losses = step(*carry, batch)
            return (params, opt_state), losses

        carry = (state.params, state.opt_state)
        (params, opt_state), losses = lax.scan(body, carry, batches)
        return TrainState(params, opt_state, next_key), Record(losses, None, None)

    return epoch


def draw_batches(
    key: Key[Array, ""], data: PyTree[Array], batch_size: int
) -> Int[Array, "steps batch"]:
    """Places of the examples of every minibatch, drawn without replacement.

    Raises:
      ValueError: when the data hold less than one minibatch, or a size is not positive.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mtl_optax.examples.trainer import draw_batches
      >>> draw_batches(jax.random.key(0), jnp.zeros((10, 3)), 4).shape
      (2, 4)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    size = jax.tree.leaves(data)[0].shape[0]
    steps = size // batch_size
    if steps == 0:
        raise ValueError(
            f"the data hold {size} examples, less than one minibatch of {batch_size}."
        )
    order = jax.random.permutation(key, size)[: steps * batch_size]
    return order.reshape(steps, batch_size)


def train(
    epoch: Callable[..., tuple[Any, Record]],
    state: Any,
    data: PyTree[Array],
    num_epochs: int,
    *,
    over_seeds: bool = False,
    donate: bool = False,
    on_epoch: Callable[[int, Record], None] | None = None,
    numbered: bool = False,
) -> tuple[Any, Record]:
    """Runs a function of `make_epoch` over and over, compiled once.

    Args:
      epoch: what `make_epoch` returned, or another of its form.
      state: what `init_state` returned; with `over_seeds`, made under `vmap`.
      data: see `make_epoch`.
      num_epochs: at least 1.
      over_seeds: the state holds many runs, on its first axis; all train at once.
      donate: gives the memory of `state` away: it cannot be used afterwards.
      on_epoch: called on the host with the epoch's number (from 1) and its record,
        between compiled calls.
      numbered: `epoch` takes the epoch's number, from 0, as a third argument; it is the
        same for all runs.

    Returns:
      the last state and the record of all steps, steps on axis 0 (1 with `over_seeds`).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> from mtl_optax.examples.trainer import init_state, make_epoch, train
      >>> def loss_fn(params, batch):
      ...     return {"fit": jnp.mean((params - batch) ** 2), "small": params**2}
      >>> tx = optax.chain(mtl.edm(num_tasks=2), optax.sgd(0.1))
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> def start(key):
      ...     return init_state(jax.random.normal(key), tx, key)
      >>> states = jax.vmap(start)(keys)
      >>> epoch = make_epoch(loss_fn, tx, batch_size=2)
      >>> states, record = train(epoch, states, jnp.ones(8), 5, over_seeds=True)
      >>> states.params.shape, record.losses.shape
      ((3,), (3, 20, 2))
    """
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}.")
    if over_seeds:
        epoch = jax.vmap(epoch, in_axes=(0, None, None) if numbered else (0, None))
    compiled = jax.jit(epoch, donate_argnums=(0,) if donate else ())
    records = []
    for number in range(1, num_epochs + 1):
        more = (jnp.asarray(number - 1, jnp.int32),) if numbered else ()
        state, record = compiled(state, data, *more)
        records.append(record)
        if on_epoch is not None:
            on_epoch(number, jax.block_until_ready(record))
    axis = 1 if over_seeds else 0
    return state, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis), *records)


def _marked(task_grads: PyTree[Any], mask: PyTree[Bool]) -> list[Any]:
    marks = jax.tree.leaves(mask)
    leaves = jax.tree.leaves(task_grads)
    return [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]


def _task_weights(opt_state: Any) -> Array | None:
    found = optax.tree_utils.tree_get_all_with_path(opt_state, "task_weights")
    return found[0][1] if len(found) == 1 else None
