"""Which leaves are shared: reading masks, and taking trees apart by them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

from mtl_optax._tree import flatten
from mtl_optax._types import Mask


def read_mask(
    caller: str, mask: Mask, tree: PyTree[Any], *, if_none: str
) -> list[bool]:
    """The marks of a mask, one for each leaf of the tree.

    Args:
      caller: the function that was given the mask, for messages.
      mask: a tree of bools or a function that returns one.
      tree: what it marks leaves of.
      if_none: what to say when no leaf is marked: the consequence and a way out.
    """
    marks = mask(tree) if callable(mask) else mask
    flags = jax.tree.leaves(marks)
    for flag in flags:
        if not isinstance(flag, bool | np.bool_ | jax.Array | np.ndarray) or (
            jnp.shape(flag) != () or jnp.result_type(flag) != jnp.bool_
        ):
            raise TypeError(
                f"{caller}: the mask must hold bools, True where a leaf is "
                f"shared, got {flag!r}."
            )
    # Leaf by leaf: Flax's optimiser takes the `Param`s off the tree it updates, but
    # not off the one that it starts from, where the mask may come from.
    if len(flags) != len(jax.tree.leaves(tree)):
        try:  # a prefix is spread over the leaves below it
            spread = jax.tree.map(
                lambda m, sub: jax.tree.map(lambda _: m, sub), marks, tree
            )
        except ValueError as error:
            raise ValueError(
                f"{caller}: the mask must be a tree of bools like the "
                f"parameters, or a prefix of it: {error}"
            ) from error
        flags = jax.tree.leaves(spread)
    if flags and not any(flags):
        raise ValueError(
            f"{caller}: the mask marks no leaf as shared, so {if_none}, or check the "
            "mask (mtl_optax.shared_mask finds it)."
        )
    return [bool(flag) for flag in flags]


def is_masked(node: Any) -> bool:
    """Whether the node stands for a leaf that another transform takes care of."""
    return isinstance(node, optax.MaskedNode)


def part_of(tree: PyTree[Any], marks: Sequence[bool], wanted: bool) -> PyTree[Any]:
    """The tree with `optax.MaskedNode` for every leaf that is not marked as wanted."""
    leaves, treedef = flatten(tree)
    kept = [
        leaf if mark == wanted else optax.MaskedNode()
        for leaf, mark in zip(leaves, marks, strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)


def merge_parts(
    shared: PyTree[Any], others: PyTree[Any], marks: Sequence[bool]
) -> PyTree[Any]:
    """One tree again of the two that `part_of` gives."""
    ours, treedef = jax.tree.flatten(shared, is_leaf=is_masked)
    theirs = jax.tree.leaves(others, is_leaf=is_masked)
    merged = [a if mark else b for a, b, mark in zip(ours, theirs, marks, strict=True)]
    return jax.tree.unflatten(treedef, merged)
