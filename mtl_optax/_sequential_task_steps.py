"""Phase 1 of connection-strength optimisation.

Jeong & Yoon, "Quantifying Task Priority for Multi-Task Optimization", CVPR 2024,
equation 9. Phase 2 is `mtl_optax.priority_projection`, the mixing
`mtl_optax.phase_schedule`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from mtl_optax._arguments import check_num_tasks, check_transform
from mtl_optax._touched import Flag, keep_untouched, touched_leaves
from mtl_optax._transform import Combiner
from mtl_optax._tree import flatten, same_structure
from mtl_optax._types import Params, State
from mtl_optax.jacobian._losses import (
    at_least_float32,
    check_params,
    loss_vector,
    scalar_loss,
    split_aux,
)
from mtl_optax.jacobian._task_jacobian import batches_by_task, check_options


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
    Adam and weight decay.) What in the state is not of one leaf alone:

    * ``optax.adam(1e-3)`` has one step count for all leaves. It advances T times a
      batch, also for heads that step only once, so that their bias correction fades too
      early.
    * ``optax.partition({"shared": adam, "a": adam, "b": adam}, labels)`` has a count a
      group. It advances when the task touches a leaf of the group: once a batch for a
      head, which is how PyTorch counts.
    * The count of a group that stores nothing else (SGD with a schedule) advances with
      all tasks: nothing in the state tells which leaves are its own.
    * ``optax.chain(optax.adam(1e-3), optax.clip_by_global_norm(1.0))`` takes the norm
      of all updates, also of those that are then dropped because the task does not
      touch the leaf. Clip before Adam: there, untouched leaves have zero gradients.
    * What acts at every k-th call (`optax.apply_every`, SAM) counts tasks, not batches:
      some heads may never have their turn. Give each head its own by `optax.partition`.
      `optax.MultiSteps` as a whole is refused for this reason.

    A NaN loss writes NaN into every leaf that its task touches, and so into the tasks
    that follow. ``optax.apply_if_finite(tx, n)`` leaves such a task's step out.

    Args:
      loss_fn: all losses, as for `task_jacobian`; only one at a time is differentiated.
        With `in_axes` one scalar. The first argument holds the parameters.
      tx: an optax optimiser of ordinary gradients, without a combiner; it gets no extra
        arguments. Labels of `optax.partition` and masks of `optax.masked` must be
        trees, not functions.
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
      TypeError: when `tx` is a combiner, `optax.MultiSteps` or no transform
        (``optax.adam``, not called yet), or losses or parameters are not real
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
    who = "sequential_task_steps"
    check_num_tasks(num_tasks)
    check_transform(who, "tx", tx)
    if isinstance(tx, Combiner):
        raise TypeError(
            "sequential_task_steps: tx must be an optimiser of ordinary gradients, "
            "such as optax.adam(1e-3), got a combiner; there is one task at a time "
            "and nothing to combine."
        )
    if isinstance(tx, optax.MultiSteps):
        raise TypeError(
            "sequential_task_steps: optax.MultiSteps counts the steps of all tasks "
            "together, so that some heads would never move. Accumulate outside, or "
            "give each head one of its own by optax.partition."
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
                out, aux = split_aux(loss_fn(params, *own, **kwargs), has_aux)
                if axes is not None:
                    return scalar_loss(out), aux
                return _loss_of_task(out, task, num_tasks), aux

            (loss, aux), grads = jax.value_and_grad(loss_and_aux, has_aux=True)(params)
            flags: list[Flag]
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
                flags = jax.tree.leaves(touched_leaves(grads))
            params, opt_state = keep_untouched(
                who,
                tx,
                jax.tree.unflatten(treedef, flags),
                _step(tx, grads, opt_state, params),
                (params, opt_state),
            )
            losses.append(loss)
            auxs.append(aux)
        stacked = jnp.stack(losses)
        if not has_aux:
            return params, opt_state, stacked
        aux = jax.tree.map(lambda *parts: jnp.stack(parts), *auxs)
        return params, opt_state, (stacked, aux)

    return step


def _loss_of_task(losses: Any, task: int, num_tasks: int) -> Array:
    vector, names, separable = loss_vector(losses)
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
    return at_least_float32(loss, f"the loss {names[task]!r}")


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


def _step(
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
    return optax.apply_updates(params, updates), new_state
