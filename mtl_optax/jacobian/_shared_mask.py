"""`task_touches` and `shared_mask`: which parameters belong to which tasks?"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from mtl_optax._tree import isolates, materialize
from mtl_optax.jacobian._losses import check_params
from mtl_optax.jacobian._task_jacobian import task_jacobian


def shared_mask(
    loss_fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    has_aux: bool = False,
    in_axes: Any = None,
    key: Array | None = None,
    **kwargs: Any,
) -> PyTree[bool]:
    r"""Finds the leaves that more than one task's loss depends on.

    .. math:: shared(leaf) = \#\{t : \partial L_t / \partial leaf \ne 0\} > 1

    The Jacobian is taken twice, at random parameters: once around the given ones, once
    anywhere (parameters as initialised are often zero somewhere, or leave units dead,
    and hide a dependence). Call it once, before training, with
    real arguments and outside `jit`; give the result to `shared_only` or use it as
    labels of `optax.partition`. Weight decay inside every task's loss makes everything
    shared: decay with optax instead.

    Args:
      loss_fn: as for `task_jacobian`; the first argument holds the parameters.
      params: the parameters; the first draw is made around them.
      *args: the further arguments of `loss_fn`, e.g. one batch.
      has_aux: as for `task_jacobian`.
      in_axes: as for `task_jacobian`.
      key: random key of the two draws. Default: ``jax.random.key(0)``.
      **kwargs: keyword arguments of `loss_fn`.

    Returns:
      a tree of Python bools like `params`.

    Raises:
      TypeError: under `jit`: the result must be known before tracing.
      ValueError: when no leaf at all has a gradient, or as `task_jacobian` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> params = {"trunk": jnp.ones(2), "a": jnp.ones(1), "b": jnp.ones(1)}
      >>> def loss_fn(p, x):
      ...     h = jnp.tanh(x @ p["trunk"])
      ...     return {"a": jnp.sum((p["a"] * h) ** 2), "b": jnp.sum((p["b"] - h) ** 2)}
      >>> mtl.shared_mask(loss_fn, params, jnp.eye(2))
      {'a': False, 'b': False, 'trunk': True}
    """
    touched = _find("shared_mask", loss_fn, params, args, kwargs, has_aux, in_axes, key)
    return jax.tree.map(lambda tasks: int(tasks.sum()) > 1, touched)


def task_touches(
    loss_fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    has_aux: bool = False,
    in_axes: Any = None,
    key: Array | None = None,
    **kwargs: Any,
) -> PyTree[Bool[np.ndarray, " tasks"]]:
    r"""Finds the tasks whose loss depends on a leaf, for every leaf.

    .. math:: touches(leaf)_t = [\partial L_t / \partial leaf \ne 0]

    What `shared_mask` counts, before it counts; for `sequential_task_steps`, and to see
    whose a head is. Like `shared_mask` it takes the Jacobian at two draws of random
    parameters; call it once, before training, with real arguments and outside `jit`.

    Args:
      loss_fn: as for `task_jacobian`; the first argument holds the parameters.
      params: the parameters; the first draw is made around them.
      *args: the further arguments of `loss_fn`, e.g. one batch.
      has_aux: as for `task_jacobian`.
      in_axes: as for `task_jacobian`.
      key: random key of the two draws. Default: ``jax.random.key(0)``.
      **kwargs: keyword arguments of `loss_fn`.

    Returns:
      a tree like `params` with a NumPy array ``[T]`` of bools at every leaf.

    Raises:
      TypeError: under `jit`: the result must be known before tracing.
      ValueError: when no leaf at all has a gradient, or as `task_jacobian` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> params = {"trunk": jnp.ones(2), "a": jnp.ones(1), "b": jnp.ones(1)}
      >>> def loss_fn(p, x):
      ...     h = jnp.tanh(x @ p["trunk"])
      ...     return {"a": jnp.sum((p["a"] * h) ** 2), "b": jnp.sum((p["b"] - h) ** 2)}
      >>> touched = mtl.task_touches(loss_fn, params, jnp.eye(2))
      >>> {name: tasks.tolist() for name, tasks in touched.items()}
      {'a': [True, False], 'b': [False, True], 'trunk': [True, True]}
    """
    return _find("task_touches", loss_fn, params, args, kwargs, has_aux, in_axes, key)


def _find(
    caller: str,
    loss_fn: Callable[..., Any],
    params: PyTree[Array],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    has_aux: bool,
    in_axes: Any,
    key: Array | None,
) -> PyTree[Bool[np.ndarray, " tasks"]]:
    """The tasks that touch each leaf, at either of two draws."""
    if any(
        isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, args, kwargs))
    ):
        raise TypeError(
            f"{caller} needs concrete arrays: call it once before training, outside "
            "jax.jit, and close over the result."
        )
    check_params(params)
    key = jax.random.key(0) if key is None else key
    leaves, treedef = jax.tree.flatten(params)

    @jax.jit
    def touched(params: PyTree[Array]) -> list[Array]:
        jacobian = task_jacobian(loss_fn, has_aux=has_aux, in_axes=in_axes)
        _, task_grads = jacobian(params, *args, **kwargs)
        rows = jax.tree.leaves(materialize(task_grads, isolated=True))
        # A NaN at random parameters stays in its own task's row, and says that the task
        # depends on the leaf, only where rows come from separate losses.
        counts_nan = isolates(task_grads)
        return [
            jnp.any(
                (g != 0) & (counts_nan | jnp.isfinite(g)), axis=tuple(range(1, g.ndim))
            )
            for g in rows
        ]

    draws = []
    for around, draw in zip((1, 0), jax.random.split(key, 2), strict=True):
        keys = jax.random.split(draw, len(leaves))
        random = [
            around * jnp.asarray(x) + _noise_like(k, x)
            for k, x in zip(keys, leaves, strict=True)
        ]
        draws.append(touched(jax.tree.unflatten(treedef, random)))
    found = [np.asarray(a) | np.asarray(b) for a, b in zip(*draws, strict=True)]
    if not any(tasks.any() for tasks in found):
        raise ValueError(
            f"{caller}: the Jacobian is zero everywhere. Does loss_fn stop the "
            "gradient, or use other parameters than its first argument?"
        )
    return jax.tree.unflatten(treedef, found)


def _noise_like(key: Array, leaf: Array) -> Array:
    """Gaussian, scaled as an initialiser would."""
    leaf = jnp.asarray(leaf)
    fan_in = max(1, leaf.size // leaf.shape[-1]) if leaf.ndim > 1 and leaf.size else 1
    noise = jax.random.normal(key, leaf.shape, leaf.dtype)
    return noise / jnp.sqrt(jnp.asarray(fan_in, leaf.dtype))
