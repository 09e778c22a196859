"""`per_group`: one combination a layer, a leaf or any other group of parameters."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from mtl_optax._masks import is_masked
from mtl_optax._other_batches import fitted
from mtl_optax._transform import Combiner, read_losses
from mtl_optax._tree import (
    check_task_axis,
    flatten,
    lazy_losses,
    materialize,
    path_names,
)
from mtl_optax._types import Params, State, TaskGradients, Updates


class PerGroupState(NamedTuple):
    """State of `per_group`: that of the combiner, once a group, by the label's name."""

    groups: dict[str, State]


def _bare(label: Any) -> Hashable:
    """The label itself, out of the `Param` that Flax may have put around it."""
    inside = jax.tree.leaves(label)
    wrapped = not isinstance(label, tuple) and len(inside) == 1
    return inside[0] if wrapped else label


def leaf_labels(params: PyTree[Any]) -> PyTree[Hashable]:
    """Every leaf is a group of its own."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_names(path, variables=True), params
    )


def module_labels(params: PyTree[Any]) -> PyTree[Hashable]:
    """Leaves of one module (that differ in the last name of their path) are a group."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_names(path, variables=True)[:-1], params
    )


def per_group(
    tx: Combiner, labels: PyTree[Hashable] | Callable[[Params], PyTree[Hashable]]
) -> Combiner:
    r"""Combines the task gradients of every group of parameters by itself.

    .. math:: u_l = \mathrm{combine}(g_{1,l}, \dots, g_{T,l}, s_l)
              \qquad \text{for every group } l

    Tasks may agree in one layer and conflict in the next; each group then has weights
    of its own. The promises of a method (no conflict, a Pareto-stationary stop) hold a
    group, which is more than asked for the whole, and what `scale="norm"` keeps is
    each group's length.

    Args:
      tx: any combiner of `mtl_optax`, with a state a group.
      labels: a tree like the parameters with one hashable label a leaf, or a function
        that makes one of the parameters; leaves of one label are one group.

    Returns:
      a `Combiner`. With more than one group a lazy tree is materialised (T backward
      passes, and the whole Jacobian in memory). A random method draws anew in every
      group from the one ``key=``. Its state holds a `CombinerState` a group, so look at
      ``state.groups["trunk"].info.task_weights``, or at all of them by
      `optax.tree_utils.tree_get_all_with_path`.

    Raises:
      TypeError: when `tx` is no combiner.
      ValueError: at trace time, when labels do not fit the parameters.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.per_group(mtl.edm(num_tasks=2), {"a": "trunk", "b": "neck"})
      >>> g = {"a": jnp.array([[3.0], [1.0]]), "b": jnp.array([[1.0], [1.0]])}
      >>> tx.update(g, tx.init({"a": jnp.zeros(1), "b": jnp.zeros(1)}))[0]["a"]
      Array([1.5], dtype=float32)
    """
    if not isinstance(tx, Combiner):
        raise TypeError(f"per_group: tx must be a combiner of mtl_optax, got {tx!r}.")

    def groups_of(params: PyTree[Any]) -> dict[str, list[int]]:
        """Positions of every group's leaves, by the label's name."""
        tree = labels(params) if callable(labels) else labels
        # `shared_only` puts placeholders where leaves are not its own.
        places, structure = jax.tree.flatten(params, is_leaf=is_masked)
        treedef: Any = structure
        try:
            found = treedef.flatten_up_to(tree)
        except (ValueError, TypeError) as error:
            # Flax's optimiser takes `Param`s off the tree it updates, but not off the
            # one that it starts from.
            found = jax.tree.leaves(tree)
            if len(found) != len(places):
                raise ValueError(
                    "per_group: labels must have the structure of the parameters, with "
                    f"one hashable label a leaf; expected {treedef}, got {tree}."
                ) from error
        found = [
            _bare(label)
            for at, label in zip(places, found, strict=True)
            if not is_masked(at)
        ]
        known: dict[Hashable, None] = dict.fromkeys(found)
        names: dict[str, Hashable] = {}
        for label in known:
            name = "/".join(map(str, label)) if isinstance(label, tuple) else str(label)
            while name in names:
                name += "'"
            names[name] = label
        return {
            name: [at for at, label in enumerate(found) if label == own]
            for name, own in names.items()
        }

    def init(params: Params) -> PerGroupState:
        leaves, groups = jax.tree.leaves(params), groups_of(params)
        return PerGroupState(
            {name: tx.init([leaves[i] for i in at]) for name, at in groups.items()}
        )

    def update(
        task_grads: TaskGradients,
        state: PerGroupState,
        params: Params | None = None,
        *,
        losses: Any = None,
        key: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Updates, PerGroupState]:
        if tx.num_tasks is not None:
            check_task_axis(task_grads, tx.num_tasks, params)
            losses = read_losses(losses, task_grads, tx.num_tasks)
        elif losses is None:
            losses = lazy_losses(task_grads)
        if losses is not None:  # rows do not know them
            extra = {**extra, "losses": losses}
        leaves, treedef = flatten(task_grads)
        like = jax.tree.map(
            lambda g: jax.ShapeDtypeStruct(g.shape[1:], g.dtype), task_grads
        )
        groups = groups_of(like if params is None else params)
        if len(groups) > 1:
            leaves = jax.tree.leaves(materialize(task_grads))
        own = None if params is None else jax.tree.leaves(params)
        # Of other batches, each like task_grads; what is no tuple the method refuses.
        others = extra.get("other_task_grads")
        batches = others if isinstance(others, tuple | list) else ()
        tasks = leaves[0].shape[0] if leaves else 0
        others = [flatten(fitted(tree, task_grads, tasks))[0] for tree in batches]
        out: list[Any] = [None] * len(leaves)
        new = {}
        for number, (name, at) in enumerate(groups.items()):
            given = extra
            if key is not None:
                given = extra | {"key": jax.random.fold_in(key, number)}
            if others:
                parts = tuple([tree[i] for i in at] for tree in others)
                given = {**given, "other_task_grads": parts}
            updates, new[name] = tx.update(
                [leaves[i] for i in at],
                state.groups[name],
                None if own is None else [own[i] for i in at],
                **given,
            )
            for i, updated in zip(at, updates, strict=True):
                out[i] = updated
        return jax.tree.unflatten(treedef, out), PerGroupState(new)

    return Combiner(
        init,
        update,
        tx.num_tasks,
        scale=tx.scale,
        axis_name=tx.axis_name,
        skips_nonfinite=tx.skips_nonfinite,
    )
