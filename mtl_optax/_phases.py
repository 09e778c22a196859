"""Phase 1 of connection-strength optimisation, and the mixing of its two phases.

Jeong & Yoon, "Quantifying Task Priority for Multi-Task Optimization", CVPR 2024,
equation 9 and Algorithm 1. Phase 2 is `mtl_optax.priority_projection`.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, Key, PyTree, UInt32

from mtl_optax._arguments import check_num_tasks
from mtl_optax._transform import Combiner
from mtl_optax._tree import flatten, same_structure
from mtl_optax._types import Params, State
from mtl_optax.jacobian._task_jacobian import (
    _loss_vector,
    _scalar_loss,
    _split_aux,
    batches_by_task,
    check_options,
    check_params,
)

# Of one leaf: known when tracing, or computed in the step.
_Flag: TypeAlias = bool | Array

_NO_PARAMETER: Any = object()


def sequential_task_steps(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    num_tasks: int,
    *,
    has_aux: bool = False,
    in_axes: Sequence[Any] | None = None,
    touched: PyTree[Bool[np.ndarray, " tasks"]] | None = None,
) -> Callable[..., Any]:
    r"""One ordinary optimiser step a task, one task after the other, on one batch.

    .. math::

        \theta \leftarrow \theta - \eta \, \nabla_\theta L_t(\theta),
        \qquad t = 1, \dots, T \text{ in this order}

    Phase 1 of connection-strength optimisation: each task sees the shared parameters as
    the task before it left them, and no gradients are combined. It costs T forward and
    backward passes and T optimiser steps a batch, and compiles `loss_fn` T times. Use
    it early in training, so that channels specialise (see `phase_schedule`); where a
    step must not favour the last task, use a combiner. With one task it is ordinary
    training; for small learning rates it is gradient descent on the sum of the losses.

    A leaf that a task does not touch keeps its value *and* its optimiser state, as in
    PyTorch, where its gradient is None. (In optax a zero gradient still moves momentum,
    Adam and weight decay.) What belongs to no single leaf, such as Adam's step count,
    advances if any leaf that shares the smallest part of the state with it is touched.
    The one count of a plain `optax.adam` thus advances T times a batch, and the bias
    correction of heads ends early; ``optax.partition({"shared": adam, "a": adam, "b":
    adam}, labels)`` counts each head's own steps, as PyTorch does. (A group whose state
    holds nothing but a count, as SGD with a schedule, advances at every step. What
    mixes leaves after the optimiser sees updates of untouched leaves too.)

    A NaN loss writes NaN into every leaf that its task touches, and so into the tasks
    that follow. ``optax.apply_if_finite(tx, n)`` leaves such a task's step out.

    Args:
      loss_fn: all losses, as for `task_jacobian`; only one at a time is differentiated.
        With `in_axes` one scalar. The first argument holds the parameters.
      tx: an optax optimiser of ordinary gradients, without a combiner.
      num_tasks: T, static.
      has_aux: `loss_fn` returns ``(losses, aux)``.
      in_axes: for *one batch a task*, as for `task_jacobian`, e.g. ``(None, 0)``.
      touched: which tasks touch which leaf, a tree like the parameters with a NumPy
        array ``[T]`` of bools at every leaf: what `task_touches` returns. Default: a
        leaf is untouched when its gradient is zero everywhere (never, for one task),
        which differs only when a gradient is zero by chance. Gradients at leaves marked
        as untouched are not computed.

    Returns:
      ``step(params, opt_state, *args, **kwargs) -> (params, opt_state, losses)``, with
      aux ``(params, opt_state, (losses, aux))``. ``losses [T]`` are each task's, just
      before its own step; aux is stacked, ``[T, ...]``, one from each task's own
      forward pass. Of task-specific statistics ``[T, C]`` (`mtl_optax.layers`) only row
      t of aux t counts: ``jnp.stack([s[t][t] for t in range(num_tasks)])``.

    Raises:
      ValueError: at trace time, for a number of losses other than `num_tasks`, losses
        that are not scalars, or a `touched` of another structure.
      TypeError: when `tx` is a combiner, or losses or parameters are not real
        floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def loss_fn(params, x):
      ...     y = x * params["shared"]
      ...     return (y * params["a"], y * params["b"])
      >>> params = {name: jnp.ones(()) for name in ("shared", "a", "b")}
      >>> tx = optax.sgd(0.5)
      >>> step = mtl.sequential_task_steps(loss_fn, tx, num_tasks=2)
      >>> params, opt_state, losses = step(params, tx.init(params), 1.0)
      >>> losses  # the second task sees what the first one left: 1 - 0.5
      Array([1. , 0.5], dtype=float32)
      >>> {name: float(value) for name, value in params.items()}
      {'a': 0.5, 'b': 0.75, 'shared': 0.0}

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, equation 9.
    """
    check_num_tasks(num_tasks)
    if isinstance(tx, Combiner):
        raise TypeError(
            "sequential_task_steps: tx must be an optimiser of ordinary gradients, "
            "such as optax.adam(1e-3), got a combiner; there is one task at a time "
            "and nothing to combine."
        )
    check_options(None, in_axes)
    axes = None if in_axes is None else tuple(in_axes)

    def step(params: Params, opt_state: State, *args: Any, **kwargs: Any) -> Any:
        check_params(params)
        static = None if touched is None else _read_touched(touched, params, num_tasks)
        select = _args_of_task(axes, params, args, num_tasks)
        losses, auxs = [], []
        for task in range(num_tasks):
            own = select(task)

            def loss_and_aux(
                params: Params, task: int = task, own: tuple[Any, ...] = own
            ) -> tuple[Array, Any]:
                out, aux = _split_aux(loss_fn(params, *own, **kwargs), has_aux)
                if axes is not None:
                    return _scalar_loss(out), aux
                return _loss_of_task(out, task, num_tasks), aux

            (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params)
            flags: list[_Flag]
            grad_leaves, treedef = flatten(grads)
            if static is not None:
                flags = [tasks[task] for tasks in static]
                grad_leaves = [
                    g if flag else jnp.zeros_like(g)
                    for g, flag in zip(grad_leaves, flags, strict=True)
                ]
                grads = jax.tree.unflatten(treedef, grad_leaves)
            elif num_tasks == 1:
                flags = [True] * len(grad_leaves)
            else:
                flags = [jnp.any(g != 0) for g in grad_leaves]
            flag_tree = jax.tree.unflatten(treedef, flags)
            updates, new_state = _update(tx, grads, opt_state, params)
            params = jax.tree.map(
                _choose, flag_tree, optax.apply_updates(params, updates), params
            )
            opt_state = _merge_states(tx, flag_tree, new_state, opt_state)
            losses.append(loss)
            auxs.append(aux)
        stacked = jnp.stack(losses)
        if not has_aux:
            return params, opt_state, stacked
        aux = jax.tree.map(lambda *parts: jnp.stack(parts), *auxs)
        return params, opt_state, (stacked, aux)

    return step


def _loss_of_task(losses: Any, task: int, num_tasks: int) -> Array:
    vector, names, separable = _loss_vector(losses)
    if len(names) != num_tasks:
        raise ValueError(
            f"sequential_task_steps: expected num_tasks = {num_tasks} losses, loss_fn "
            f"returned {len(names)}: {', '.join(names)}."
        )
    if not separable:
        return vector[task]
    # Not through the vector: the other losses must not be part of what is
    # differentiated, for their cost and their NaNs.
    loss = jnp.asarray(jax.tree.leaves(losses)[task])
    return loss.astype(jnp.result_type(jnp.float32, loss.dtype))


def _args_of_task(
    in_axes: tuple[Any, ...] | None,
    params: Params,
    args: tuple[Any, ...],
    num_tasks: int,
) -> Callable[[int], tuple[Any, ...]]:
    """The arguments after the parameters, as each task sees them."""
    if in_axes is None:
        return lambda task: args
    mapped, batches = batches_by_task((params, *args), in_axes, [0])
    for position, batch in zip(mapped, batches, strict=True):
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if leaf.shape[0] != num_tasks:
                raise ValueError(
                    f"argument {position}{jax.tree_util.keystr(path)}: expected length "
                    f"{num_tasks} = num_tasks on the axis that in_axes maps over "
                    f"tasks, got {leaf.shape[0]}."
                )

    def select(task: int) -> tuple[Any, ...]:
        own = list(args)
        for position, batch in zip(mapped, batches, strict=True):
            own[position - 1] = jax.tree.map(lambda x: x[task], batch)
        return tuple(own)

    return select


def _read_touched(
    touched: PyTree[Any], params: Params, num_tasks: int
) -> list[list[bool]]:
    leaves, treedef = flatten(touched)
    expected = jax.tree.structure(params)
    if not same_structure(treedef, expected):
        raise ValueError(
            "touched must have the structure of the parameters with a NumPy array "
            f"[{num_tasks}] of bools at every leaf; expected {expected}, got {treedef}."
        )
    read = []
    for (path, _), leaf in zip(
        jax.tree_util.tree_leaves_with_path(params), leaves, strict=True
    ):
        where = f"touched{jax.tree_util.keystr(path)}"
        if isinstance(leaf, jax.core.Tracer):
            raise TypeError(
                f"{where} is traced; it decides what is compiled and must be a NumPy "
                "array: close over it."
            )
        tasks = np.asarray(leaf)
        if tasks.shape != (num_tasks,) or tasks.dtype != np.bool_:
            raise ValueError(
                f"{where}: expected bools of shape ({num_tasks},), True where the task "
                f"touches the leaf, got {tasks.dtype} of shape {tasks.shape}."
            )
        read.append([bool(flag) for flag in tasks])
    return read


def _update(
    tx: optax.GradientTransformation, grads: Params, opt_state: State, params: Params
) -> tuple[Params, State]:
    try:
        updates, new_state = tx.update(grads, opt_state, params)
    except (TypeError, ValueError) as error:
        error.add_note(
            "sequential_task_steps gives tx the ordinary gradient of one task: tx must "
            "be an optax optimiser without a combiner of task gradients in it."
        )
        raise
    before, after = jax.tree.structure(opt_state), jax.tree.structure(new_state)
    if not same_structure(before, after):
        raise ValueError(
            "sequential_task_steps: tx must keep its state's structure; expected "
            f"{before}, got {after}."
        )
    return updates, new_state


def _merge_states(
    tx: optax.GradientTransformation, flags: Params, new: State, old: State
) -> State:
    """The new state of what was touched, the old state of the rest."""

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    marks = optax.tree_utils.tree_map_params(
        tx,
        lambda value, flag: value if is_masked(value) else flag,
        old,
        flags,
        transform_non_params=lambda _: _NO_PARAMETER,
        is_leaf=is_masked,
    )
    places = jax.tree_util.tree_leaves_with_path(marks)
    known = [(path, flag) for path, flag in places if flag is not _NO_PARAMETER]

    def around(path: tuple[Any, ...]) -> _Flag:
        for depth in reversed(range(len(path))):
            near = [f for other, f in known if other[:depth] == path[:depth]]
            if near:
                return _any(near)
        return _any(jax.tree.leaves(flags))

    chosen = [around(path) if f is _NO_PARAMETER else f for path, f in places]
    old_leaves, treedef = flatten(old)
    merged = [
        _choose(flag, a, b)
        for flag, a, b in zip(chosen, jax.tree.leaves(new), old_leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, merged)


def _any(flags: Sequence[_Flag]) -> _Flag:
    if all(isinstance(flag, bool) for flag in flags):
        return any(flags)
    return jnp.any(jnp.stack([jnp.asarray(flag) for flag in flags]))


def _choose(flag: _Flag, new: Any, old: Any) -> Any:
    if isinstance(flag, bool):
        return new if flag else old
    return jnp.where(flag, new, old)


def phase_schedule(
    key: Key[Array, ""] | UInt32[Array, "..."],
    epoch: int | Int[Array, ""],
    num_epochs: int | Int[Array, ""],
    *,
    step: int | Int[Array, ""] | None = None,
) -> Bool[Array, ""]:
    r"""Draws the phase: True for Phase 1, ever less often as training goes on.

    .. math:: \text{Phase 1} \iff P \ge e / E, \qquad P \sim U(0, 1)

    Phase 1 has the probability ``1 - e / E``: always at epoch 0, never from epoch E on,
    and ``(E + 1) / (2 E)`` of a whole run. Give the same key all run long: `epoch` and
    `step` are folded into it, so the draw can be repeated without any state.

    For one compiled step without retracing, pass `epoch` and `step` as arrays and
    branch by ``jax.lax.cond(mtl.phase_schedule(key, epoch, num_epochs, step=step),
    phase_1, phase_2, state)``. Under `vmap` over seeds keep `key`, `epoch` and `step`
    unbatched: a batched draw turns `cond` into a selection, which pays for both.

    Args:
      key: random key of the run, typed or legacy.
      epoch: e, counted from 0; may be traced.
      num_epochs: E; may be traced.
      step: number of the batch; may be traced. Given, the phase is drawn once a batch;
        left out, once an epoch.

    Returns:
      a scalar array of bool.

    Raises:
      ValueError: if a number is concrete and out of range.
      TypeError: if a number is not an integer.

    Example:
      >>> import jax
      >>> import mtl_optax as mtl
      >>> key = jax.random.key(0)
      >>> [bool(mtl.phase_schedule(key, epoch, 4)) for epoch in (0, 4)]
      [True, False]
      >>> steps = jax.numpy.arange(1000)
      >>> draw = jax.vmap(lambda step: mtl.phase_schedule(key, 1, 4, step=step))
      >>> round(float(draw(steps).mean()), 1)  # 1 - 1/4, within sampling error
      0.8

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024, Algorithm 1. The paper's text
      draws once an epoch, the authors' code once a batch; epochs count from 0 in the
      code.
    """
    _check_integer("num_epochs", num_epochs, at_least=1)
    _check_integer("epoch", epoch, at_least=0)
    key = jax.random.fold_in(key, epoch)
    if step is not None:
        _check_integer("step", step, at_least=0)
        key = jax.random.fold_in(key, step)
    # In float32 whatever the mode, so that x64 does not change the draws.
    share = jnp.asarray(epoch, jnp.float32) / jnp.asarray(num_epochs, jnp.float32)
    return jax.random.uniform(key, (), jnp.float32) >= share


def _check_integer(name: str, value: Any, *, at_least: int) -> None:
    if isinstance(value, bool) or not jnp.issubdtype(
        jnp.result_type(value), jnp.integer
    ):
        raise TypeError(
            f"phase_schedule: {name} must be an integer, got {type(value).__name__} "
            f"of dtype {jnp.result_type(value)}."
        )
    if jnp.ndim(value) != 0:
        raise ValueError(
            f"phase_schedule: {name} must be a scalar, got shape {jnp.shape(value)}."
        )
    if not isinstance(value, jax.core.Tracer) and value < at_least:
        raise ValueError(
            f"phase_schedule: {name} must be at least {at_least}, got {value}."
        )
