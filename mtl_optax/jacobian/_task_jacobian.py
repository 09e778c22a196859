"""`task_jacobian`: from a function of several losses to lazy task gradients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtl_optax._arguments import check_count
from mtl_optax._tree import lazy_tree, materialize
from mtl_optax.jacobian._losses import (
    check_dependence,
    check_params,
    loss_vector,
    scalar_loss,
    split_aux,
)
from mtl_optax.jacobian._operators import JointJacobian, Mode, SeparateJacobian
from mtl_optax.jacobian._probes import Products, run_keeping
from mtl_optax.jacobian._reductions import sums_go_wrong, with_right_sums
from mtl_optax.jacobian._trace import first_output, read_traits
from mtl_optax.jacobian._uses import find_uses


def task_jacobian(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    in_axes: Sequence[Any] | None = None,
    mode: Mode | None = None,
    batch_size: int | None = None,
) -> Callable[..., Any]:
    r"""Task losses and their Jacobian, as `jax.value_and_grad` gives value and grad.

    .. math:: J_{t} = \nabla_\theta L_t(\theta), \qquad J \in R^{T \times P}

    The Jacobian is not formed. What comes back is a tree shaped like the parameters
    whose leaves are lazy: a combiner that needs the Gramian or one combination takes
    just that. The tree lives inside one trace, so call ``tx.update`` in the same
    `jit`-compiled function (closing over it in `lax.cond` or `lax.scan` is fine). Use
    `value_and_task_grads` where you want arrays.

    Args:
      loss_fn: returns all losses, as an array ``[T]`` or a tuple, list or dict of
        scalars (the task order is pytree order: a dict's **sorted** keys). With
        `in_axes`, it returns one scalar.
      has_aux: `loss_fn` returns ``(losses, aux)``.
      argnums: which positional argument(s) to differentiate.
      in_axes: for *one batch a task*: as in `jax.vmap`, which axis of each positional
        argument runs over tasks, e.g. ``(None, 0)``; the differentiated argument is
        shared (None), keyword arguments are too. `loss_fn` then sees one task, and
        each task runs forward and backward on its own batch only; aux is stacked.
      mode: how the Gramian and rows are taken; `mtl_optax.explain` says what the
        default does with your network. ``"layerwise"``: the Gramian from each layer's
        inputs and task cotangents, which forms no gradients where that is cheaper and
        stores none; one more backward pass combines. ``"vmap"``, ``"unroll"``: all
        rows are stored, from one batched pass or a Python loop (compiles longer), and
        serve both. ``"map"``: one row at a time, a backward and a forward pass for
        each: least memory, most time. The default is ``"layerwise"``, but keeps the
        cotangents for the combination where tasks are few; rows that are asked for
        (`materialize`) are unrolled up to 4 tasks and vmapped beyond.
        With `in_axes`, and for ``"map"`` where the losses hold a `custom_vjp` or
        arithmetic in less than 32 bits, all rows are stored.
      batch_size: how many tasks are swept at once, as in `jax.lax.map`. Rows cost the
        same time; a layer-wise Gramian of T tasks in n sweeps costs (n + 1) / 2 times
        the time, since every pair of sweeps must meet (where hardly any parameter is a
        layer's, the default stores rows instead). Default: all tasks.

    Returns:
      a function of `loss_fn`'s arguments that gives ``(losses [T], task_grads)``, with
      aux ``((losses, aux), task_grads)``.

    Raises:
      ValueError: when called, if a loss is not a scalar, if there is one scalar only
        (gradients of a summed loss cannot be balanced), or if no loss depends on the
        argument.
      TypeError: if losses or parameters are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> def loss_fn(params, x):
      ...     y = x @ params["w"]
      ...     return {"a": jnp.mean((y - 1) ** 2), "b": jnp.mean((y + 1) ** 2)}
      >>> params, x = {"w": jnp.array([1.0, 0.0])}, jnp.eye(2)
      >>> losses, task_grads = mtl.task_jacobian(loss_fn)(params, x)
      >>> losses
      Array([0.5, 2.5], dtype=float32)
      >>> task_grads["w"]
      LazyTaskGradient(['w'], shape=(2, 2), dtype=float32)
      >>> tx = mtl.mgda(num_tasks=2)
      >>> updates, state = tx.update(task_grads, tx.init(params), params)
    """
    if not callable(loss_fn):
        raise TypeError(
            "task_jacobian: loss_fn must be a function that returns the losses, got a "
            f"{type(loss_fn).__name__}. Pass the function, not its value."
        )
    check_options(mode, in_axes)
    if batch_size is not None:
        check_count("batch_size", batch_size)
        if mode == "unroll":
            raise ValueError(
                'mode="unroll" sweeps tasks one by one and takes no batch_size; got '
                f'batch_size={batch_size}. mode="vmap" does.'
            )
    chosen = _positions(argnums)

    def losses_and_task_grads(*args: Any, **kwargs: Any) -> Any:
        for position in chosen:
            if not -len(args) <= position < len(args):
                raise ValueError(
                    f"argnums={argnums} names positional argument {position}, but the "
                    f"function was called with {len(args)} positional arguments."
                )
        at = [position % len(args) for position in chosen]
        if len(set(at)) < len(at):
            raise ValueError(f"argnums={argnums} names an argument twice.")
        params = args[at[0]] if isinstance(argnums, int) else tuple(args[i] for i in at)
        check_params(params)

        def call(params: PyTree[Array], args: Sequence[Any]) -> Any:
            merged = list(args)
            new = (params,) if isinstance(argnums, int) else params
            for position, value in zip(at, new, strict=True):
                merged[position] = value
            return loss_fn(*merged, **kwargs)

        operator: JointJacobian | SeparateJacobian
        if in_axes is None:
            losses, aux, operator = _joint(call, args, params, has_aux)
        else:
            losses, aux, operator = _separate(
                call, args, params, has_aux, tuple(in_axes), at
            )
        operator = dataclasses.replace(operator, mode=mode, batch_size=batch_size)
        task_grads = lazy_tree(operator, params)
        return ((losses, aux) if has_aux else losses), task_grads

    return losses_and_task_grads


def value_and_task_grads(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    argnums: int | Sequence[int] = 0,
    in_axes: Sequence[Any] | None = None,
    mode: Mode | None = None,
    batch_size: int | None = None,
) -> Callable[..., Any]:
    """As `task_jacobian`, but with task gradients as arrays ``[T, *param.shape]``.

    Use it to look at task gradients, to take them out of a `jit`-compiled function, or
    where the Jacobian is small; it stores T copies of the parameters. Arguments,
    returns and errors are those of `task_jacobian`.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> loss_fn = lambda w: jnp.stack([w @ w, w.sum()])
      >>> losses, task_grads = mtl.value_and_task_grads(loss_fn)(jnp.array([1.0, 2.0]))
      >>> task_grads
      Array([[2., 4.],
             [1., 1.]], dtype=float32)
    """
    lazy = task_jacobian(
        loss_fn,
        has_aux=has_aux,
        argnums=argnums,
        in_axes=in_axes,
        mode=mode,
        batch_size=batch_size,
    )

    def losses_and_stacked_grads(*args: Any, **kwargs: Any) -> Any:
        value, task_grads = lazy(*args, **kwargs)
        return value, materialize(task_grads)

    return losses_and_stacked_grads


def _positions(argnums: Any) -> tuple[int, ...]:
    given = (argnums,) if isinstance(argnums, int) else argnums
    good = isinstance(given, tuple | list) and given
    if not good or any(isinstance(k, bool) or not isinstance(k, int) for k in given):
        raise TypeError(
            "argnums must be the number of a positional argument, or several; got "
            f"{argnums!r}."
        )
    return tuple(given)


def _joint(
    call: Callable[..., Any],
    args: Sequence[Any],
    params: PyTree[Array],
    has_aux: bool,
    *,
    kept_apart: bool = False,
) -> tuple[Array, Any, JointJacobian]:
    found: dict[str, Any] = {}

    def vector_and_aux(params: PyTree[Array]) -> tuple[Array, Any]:
        out = call(params, args)
        losses, aux = split_aux(out, has_aux)
        vector, names, separable = loss_vector(losses)
        found["names"], found["separable"] = names, separable
        return vector, aux

    def vector_and_arrays(params: PyTree[Array]) -> tuple[Array, list[Array]]:
        vector, aux = vector_and_aux(params)
        leaves, found["aux"] = jax.tree.flatten(aux)
        # Whatever else an aux holds is none of JAX's business.
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
        found["others"] = [
            None if isinstance(leaf, jax.Array) else leaf for leaf in leaves
        ]
        return vector, arrays

    def single(params: PyTree[Array], task: int) -> Array:
        losses, _ = split_aux(call(params, args), has_aux)
        return jax.tree.leaves(losses)[task]

    everything = jax.make_jaxpr(vector_and_arrays)(params)
    traced = first_output(everything)
    traits = read_traits(traced)
    check_dependence(traits.depends)
    if sums_go_wrong(traced) and not kept_apart:
        apart = with_right_sums(call)
        return _joint(apart, args, params, has_aux, kept_apart=True)
    uses = find_uses(traced)
    leaves = jax.tree.leaves(params)
    products: Products = {}
    if any(uses.uses) and any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):

        def run(params: PyTree[Array]) -> tuple[Array, Any]:
            outputs, products = run_keeping(everything, jax.tree.leaves(params))
            # Constants of a trace are no arrays of JAX's own.
            arrays = [
                x if isinstance(x, jax.Array) else jnp.asarray(x) for x in outputs[1:]
            ]
            return outputs[0], (arrays, products)

        losses, vjp, (arrays, products) = jax.vjp(run, params, has_aux=True)
        rest = iter(arrays)
        aux = jax.tree.unflatten(
            found["aux"], [next(rest) if x is None else x for x in found["others"]]
        )
    else:
        losses, vjp, aux = jax.vjp(vector_and_aux, params, has_aux=True)
    operator = JointJacobian(
        function=lambda params: vector_and_aux(params)[0],
        single=single if found["separable"] else None,
        params=params,
        losses=losses,
        pullback=lambda cotangent: vjp(cotangent)[0],
        task_names=found["names"],
        traced=traced,
        traits=traits,
        found=uses,
        products=products,
        leaves=tuple(range(len(leaves))),
    )
    return losses, aux, operator


def _separate(
    call: Callable[..., Any],
    args: Sequence[Any],
    params: PyTree[Array],
    has_aux: bool,
    in_axes: tuple[Any, ...],
    at: Sequence[int],
    *,
    kept_apart: bool = False,
) -> tuple[Array, Any, SeparateJacobian]:
    mapped, batches = batches_by_task(args, in_axes, at)

    def loss_and_aux(params: PyTree[Array], batch: Any) -> tuple[Array, Any]:
        merged = list(args)
        for position, value in zip(mapped, batch, strict=True):
            merged[position] = value
        loss, aux = split_aux(call(params, merged), has_aux)
        return scalar_loss(loss), aux

    def all_losses(params: PyTree[Array]) -> tuple[Array, Any]:
        return jax.vmap(loss_and_aux, in_axes=(None, 0))(params, batches)

    traced = jax.make_jaxpr(lambda p: all_losses(p)[0])(params)
    check_dependence(read_traits(traced).depends)
    if sums_go_wrong(traced) and not kept_apart:
        apart = with_right_sums(call)
        return _separate(apart, args, params, has_aux, in_axes, at, kept_apart=True)
    losses, vjp, aux = jax.vjp(all_losses, params, has_aux=True)
    operator = SeparateJacobian(
        function=lambda params, batch: loss_and_aux(params, batch)[0],
        params=params,
        batches=batches,
        losses=losses,
        pullback=lambda cotangent: vjp(cotangent)[0],
        task_names=tuple(str(t) for t in range(losses.shape[0])),
        leaves=tuple(range(len(jax.tree.leaves(params)))),
    )
    return losses, aux, operator


def check_options(
    mode: Any, in_axes: Any, *, modes: tuple[str, ...] = get_args(Mode)
) -> None:
    """Raises unless `mode` and `in_axes` are what every entry point takes."""
    if mode is not None and mode not in modes:
        raise ValueError(f"mode must be one of {modes} or None, got {mode!r}.")
    if in_axes is not None and not isinstance(in_axes, (tuple, list)):
        raise TypeError(
            "in_axes must be a tuple with one entry a positional argument, such as "
            f"(None, 0): the parameters are shared; got {in_axes!r}."
        )


def batches_by_task(
    args: Sequence[Any], in_axes: tuple[Any, ...], at: Sequence[int]
) -> tuple[list[int], list[Any]]:
    """Which arguments are mapped, and those arguments with the task axis first."""
    if len(in_axes) != len(args):
        raise ValueError(
            f"in_axes has {len(in_axes)} entries for {len(args)} positional arguments."
        )
    for position in at:
        if in_axes[position] is not None:
            raise ValueError(
                f"in_axes[{position}] must be None: argument {position} holds the "
                f"parameters, which all tasks share; got {in_axes[position]!r}."
            )
    mapped = [i for i, axis in enumerate(in_axes) if axis is not None]
    if not mapped:
        raise ValueError(
            "in_axes maps no argument over tasks; expected e.g. (None, 0), got "
            f"{in_axes}."
        )
    # Moves every mapped axis to the front once, so that all modes index alike.
    batches = [
        jax.vmap(lambda x: x, in_axes=(in_axes[i],))(jax.tree.map(jnp.asarray, args[i]))
        for i in mapped
    ]
    return mapped, batches
