"""Steps of an optimiser that leave untouched leaves, and their state, as they were."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from mtl_optax._masks import is_masked
from mtl_optax._tree import flatten, same_structure
from mtl_optax._types import Params, State, Updates

# Of one leaf: known when tracing, or computed in the step.
Flag: TypeAlias = bool | Array

_NO_PARAMETER: Any = object()


def touched_leaves(grads: Updates) -> PyTree[Array]:
    """For each leaf, whether its gradient holds anything but zeros."""
    return jax.tree.map(lambda g: jnp.any(g != 0), grads)


def keep_untouched(
    who: str,
    tx: optax.GradientTransformation,
    touched: PyTree[Flag],
    new: tuple[Params, State],
    old: tuple[Params, State],
) -> tuple[Params, State]:
    """The new parameters and state of what was touched, the old ones of the rest.

    State that belongs to no single leaf is new if any leaf is touched that shares the
    smallest part of the state with it.

    Args:
      who: for messages.
      tx: whose state it is.
      touched: a flag for each leaf of the parameters.
      new: parameters and state after the step.
      old: and before.
    """
    (params, state), (old_params, old_state) = new, old
    before, after = jax.tree.structure(old_state), jax.tree.structure(state)
    if not same_structure(before, after):
        raise ValueError(
            f"{who}: the optimiser must keep its state's structure; expected {before}, "
            f"got {after}."
        )
    merged = jax.tree.map(_choose, touched, params, old_params)
    return merged, _merge_states(who, tx, touched, state, old_state)


def _merge_states(
    who: str,
    tx: optax.GradientTransformation,
    touched: PyTree[Flag],
    new: State,
    old: State,
) -> State:
    try:
        marks = optax.tree_utils.tree_map_params(
            tx,
            lambda value, flag: value if is_masked(value) else flag,
            old,
            touched,
            transform_non_params=lambda _: _NO_PARAMETER,
            is_leaf=is_masked,
        )
    except Exception as error:
        error.add_note(
            f"{who} asks optax which state belongs to which leaf, by "
            "optax.tree_utils.tree_map_params. It needs the labels of optax.partition "
            "and the mask of optax.masked as trees, not as functions."
        )
        raise
    places = jax.tree_util.tree_leaves_with_path(marks)
    known = [(path, flag) for path, flag in places if flag is not _NO_PARAMETER]

    def around(path: tuple[Any, ...]) -> Flag:
        for depth in reversed(range(len(path))):
            near = [f for other, f in known if other[:depth] == path[:depth]]
            if near:
                return _any(near)
        return _any(jax.tree.leaves(touched))

    chosen = [around(path) if f is _NO_PARAMETER else f for path, f in places]
    old_leaves, treedef = flatten(old)
    merged = [
        _choose(flag, a, b)
        for flag, a, b in zip(chosen, jax.tree.leaves(new), old_leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, merged)


def _any(flags: Sequence[Flag]) -> Flag:
    if all(isinstance(flag, bool) for flag in flags):
        return any(flags)
    return jnp.any(jnp.stack([jnp.asarray(flag) for flag in flags]))


def _choose(flag: Flag, new: Any, old: Any) -> Any:
    if isinstance(flag, bool):
        return new if flag else old
    return jnp.where(flag, new, old)
