"""`check_chain`: what an optax chain does to task gradients, before training."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtl_optax._arguments import check_num_tasks
from mtl_optax._tree import lazy_tree, same_structure
from mtl_optax._types import Params


def check_chain(
    tx: optax.GradientTransformation, params: Params, num_tasks: int, **extra: Any
) -> None:
    """Runs an optax chain on shapes alone and explains what is wrong with it.

    A transform sees only what reaches it, so a combiner cannot notice that it was
    forgotten, or that something before it mixed the tasks. This runs ``init`` and two
    updates by `jax.eval_shape` (nothing is computed) with task gradients of the right
    shapes, and checks what comes out. Call it once, before training.

    Args:
      tx: the whole chain.
      params: the parameters, or their `jax.ShapeDtypeStruct`.
      num_tasks: T.
      **extra: further arguments of ``tx.update`` (arrays or shapes), e.g. ``value=``.
        ``losses`` of shape ``[T]`` are given anyway.

    Raises:
      ValueError: with an explanation, if the chain fails on task gradients, if an
        update does not have its parameter's shape (combiner forgotten, or some leaves
        not combined), or if the state changes shape from step to step.

    Warns:
      UserWarning: if something before the combiner computes with task gradients. That
        may be meant (clipping each entry), but most such transforms take the task axis
        for part of the parameters: `optax.clip_by_global_norm` then clips the norm
        over all tasks, `optax.add_decayed_weights` decays once a task.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> params = {"w": jnp.zeros(3)}
      >>> mtl.check_chain(optax.chain(mtl.edm(2), optax.adam(1e-3)), params, 2)
      >>> mtl.check_chain(optax.adam(1e-3), params, 2)
      Traceback (most recent call last):
      ...
      ValueError: the update of leaf ['w'] has shape (2, 3), the parameter (3,): ...
    """
    check_num_tasks(num_tasks)
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(
            f"check_chain: expected an optax transform, got {tx!r}. A factory must be "
            "called first, as in mtl_optax.edm(num_tasks=2)."
        )
    tx = optax.with_extra_args_support(tx)
    params = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params
    )
    stacked = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct((num_tasks, *p.shape), p.dtype), params
    )
    extra.setdefault("losses", jax.ShapeDtypeStruct((num_tasks,), jnp.float32))

    def step(grads: Any, state: Any, params: Any, extra: Any) -> Any:
        return tx.update(grads, state, params, **extra)

    state = jax.eval_shape(tx.init, params)
    try:
        try:
            updates, after = jax.eval_shape(step, stacked, state, params, extra)
        except TypeError as error:
            # Some wrappers (optax.contrib.sam) hand no extra arguments on; lazy task
            # gradients bring their losses along.
            if "unexpected keyword argument 'losses'" not in str(error):
                raise
            del extra["losses"]
            updates, after = jax.eval_shape(step, stacked, state, params, extra)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"the chain fails on task gradients of shape ({num_tasks}, *param.shape): "
            f"{error}\nTransforms that choose between their input and their output "
            "(MultiSteps, apply_if_finite, conditionally_transform) must stand after "
            "the combiner, as in chain(combiner, MultiSteps(adam, k)); for "
            "masked(combiner, mask), which leaves the rest uncombined, use "
            "mtl_optax.shared_only. A missing argument may be given here too, as in "
            "check_chain(tx, params, num_tasks, value=0.0)."
        ) from error
    _check_updates(updates, params, num_tasks)
    _check_state(state, after)
    _warn_of_order(step, params, state, num_tasks, extra)


def _check_updates(updates: Any, params: Any, num_tasks: int) -> None:
    if not same_structure(jax.tree.structure(updates), jax.tree.structure(params)):
        raise ValueError(
            "the updates do not have the structure of the parameters: expected "
            f"{jax.tree.structure(params)}, got {jax.tree.structure(updates)}."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(updates),
        jax.tree.leaves(params),
        strict=True,
    )
    for (path, update), param in pairs:
        if update.shape == param.shape:
            continue
        where = f"the update of leaf {jax.tree_util.keystr(path)} has shape"
        hint = "the chain reshapes it."
        if update.shape == (num_tasks, *param.shape):
            hint = (
                "nothing combines its tasks, and optax.apply_updates would give the "
                "parameter a task axis. Put a combiner first in the chain; leaves "
                "outside a mask or in another partition need mtl_optax.sum_tasks() "
                "(mtl_optax.shared_only does so)."
            )
        raise ValueError(f"{where} {update.shape}, the parameter {param.shape}: {hint}")


def _check_state(before: Any, after: Any) -> None:
    advice = (
        "A transform with memory (trace, ema, adam) stands before the combiner; put it "
        "after. It would compile anew at the second step and fail in lax.scan."
    )
    if not same_structure(jax.tree.structure(before), jax.tree.structure(after)):
        raise ValueError(
            f"the state's structure changes from step to step: "
            f"{jax.tree.structure(before)} became {jax.tree.structure(after)}. {advice}"
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    )
    for (path, old), new in pairs:
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ValueError(
                f"state leaf {jax.tree_util.keystr(path)} changes from "
                f"{old.dtype}{list(old.shape)} to {new.dtype}{list(new.shape)} in one "
                f"step. {advice}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _ZeroJacobian:
    """An operator of zeros: only what touches its leaves matters."""

    params: PyTree[Any]
    num_tasks: int
    leaves: tuple[int, ...]
    isolates = True

    @property
    def losses(self) -> Array:
        return jnp.zeros((self.num_tasks,))

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(str(t) for t in range(self.num_tasks))

    def restrict(self, leaves: Sequence[int]) -> "_ZeroJacobian":
        return dataclasses.replace(self, leaves=tuple(leaves))

    def gramian(self, basis: Any = None, task_mask: Any = None) -> Array:
        del task_mask
        rows = self.num_tasks if basis is None else basis.shape[0]
        return jnp.zeros((rows, rows))

    def combine(self, weights: Array) -> list[Array]:
        del weights
        return [jnp.zeros(p.shape, p.dtype) for p in self._leaves()]

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated
        shape = (self.num_tasks,)
        return [jnp.zeros(shape + p.shape, p.dtype) for p in self._leaves()]

    def _leaves(self) -> list[Any]:
        leaves = jax.tree.leaves(self.params)
        return [leaves[i] for i in self.leaves]


def _warn_of_order(
    step: Any, params: Any, state: Any, num_tasks: int, extra: Any
) -> None:
    """Lazy leaves refuse arithmetic, so they show who computes before the combiner."""
    everything = tuple(range(len(jax.tree.leaves(params))))
    lazy = lazy_tree(_ZeroJacobian(params, num_tasks, everything), params)
    try:
        jax.eval_shape(lambda s, p, e: step(lazy, s, p, e), state, params, extra)
    except (TypeError, ValueError) as error:
        if "lazy task gradient" not in str(error):
            raise
        warnings.warn(
            "a transform before the combiner computes with the task gradients and "
            "takes the task axis for part of the parameters (a global norm then runs "
            "over all tasks, weight decay is added to every task). Put it after the "
            "combiner unless this is meant; lazy task gradients will refuse it.",
            UserWarning,
            stacklevel=3,
        )
