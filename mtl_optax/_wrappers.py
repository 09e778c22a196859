"""Transforms around combiners: shared parameters only, and broken tasks left out."""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Int, PyTree

from mtl_optax._arguments import check_transform, read_num_tasks
from mtl_optax._masks import merge_parts, part_of, read_mask
from mtl_optax._transform import (
    Combiner,
    read_losses,
    read_task_mask,
    sum_tasks,
)
from mtl_optax._tree import (
    all_finite,
    check_structure,
    check_task_axis,
    finite_rows,
    is_lazy,
    isolates,
    materialize,
    select,
)
from mtl_optax._types import Mask, Params, State, TaskGradients, TaskMask, Updates


class SharedOnlyState(NamedTuple):
    """State of `shared_only`: that of the wrapped transform."""

    shared: State


def shared_only(tx: optax.GradientTransformation, mask: Mask) -> Combiner:
    r"""Combines the shared parameters by `tx`; every other leaf gets the plain sum.

    .. math:: u_{shared} = \mathrm{tx}(J_{shared}), \qquad u_{head} = \sum_t g_{t,head}

    Balancing is meant for the parameters that tasks share. A head belongs to one task,
    so the sum over tasks is just its own gradient, at full length. `shared_mask` finds
    the mask. Everything marked shared is one vector: one Gramian, one history.

    Args:
      tx: a combiner. Put the optimiser after, as in ``chain(shared_only(combiner,
        mask), adam(1e-3))``: inside, it would not see the other leaves. To schedule a
        hyper-parameter, put the injection outside too: ``inject_hyperparams(lambda
        alpha: shared_only(task_tensioner(2, alpha), mask))(alpha=schedule)``.
      mask: a tree of bools like the parameters (or a prefix of it), True where shared;
        or a function of the parameters that returns one.

    Returns:
      a `Combiner`.

    Raises:
      TypeError: when the mask holds anything but bools.
      ValueError: when the mask marks no leaf, or around `skip_nonfinite_tasks`, which
        belongs outside (the sum for the heads would not be protected).

    Warns:
      UserWarning: when `tx` is not a combiner by itself.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> params = {"trunk": jnp.zeros(2), "head": jnp.zeros(1)}
      >>> g = {"trunk": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "head": jnp.ones((2, 1))}
      >>> tx = mtl.shared_only(mtl.edm(num_tasks=2), {"trunk": True, "head": False})
      >>> updates, _ = tx.update(g, tx.init(params), params)
      >>> updates["trunk"], updates["head"]
      (Array([0.6666667, 0.6666667], dtype=float32), Array([2.], dtype=float32))
    """
    check_transform("shared_only(tx, mask)", "tx", tx)
    if not isinstance(tx, Combiner):
        warnings.warn(
            "shared_only: tx is not a combiner by itself. Whatever else it holds (an "
            "optimiser, a clip) acts on the shared leaves alone, while the others get "
            "the raw sum of their gradients: put it after, as in "
            "chain(shared_only(combiner, mask), adam(1e-3)).",
            UserWarning,
            stacklevel=2,
        )
    elif tx.skips_nonfinite:
        raise ValueError(
            "shared_only around skip_nonfinite_tasks leaves the other leaves "
            "unprotected: write skip_nonfinite_tasks(shared_only(combiner, mask))."
        )
    inner = optax.with_extra_args_support(tx)
    heads = sum_tasks(getattr(tx, "num_tasks", None))

    def marks_of(tree: PyTree[Any]) -> list[bool]:
        return read_mask(
            "shared_only",
            mask,
            tree,
            if_none="there is nothing to combine: use mtl_optax.sum_tasks() alone",
        )

    def init(params: Params) -> SharedOnlyState:
        return SharedOnlyState(inner.init(part_of(params, marks_of(params), True)))

    def update(
        task_grads: TaskGradients,
        state: SharedOnlyState,
        params: Params | None = None,
        **extra: Any,
    ) -> tuple[Updates, SharedOnlyState]:
        if params is not None:
            check_structure(task_grads, params)
        marks = marks_of(task_grads if params is None else params)

        def of(wanted: bool) -> tuple[TaskGradients, Params | None]:
            own = None if params is None else part_of(params, marks, wanted)
            return part_of(task_grads, marks, wanted), own

        grads, own = of(True)
        shared, new_state = inner.update(grads, state.shared, own, **extra)
        if all(marks):
            return shared, SharedOnlyState(new_state)
        grads, own = of(False)
        others, _ = heads.update(grads, optax.EmptyState(), own, **extra)

        updates = merge_parts(shared, others, marks)
        return updates, SharedOnlyState(new_state)

    return Combiner(init, update, getattr(tx, "num_tasks", None))


class SkipNonfiniteInfo(NamedTuple):
    """Counters of `skip_nonfinite_tasks`.

    Attributes:
      skipped_tasks: for each task, the number of steps it was left out of.
      skipped_steps: steps without any update.
    """

    skipped_tasks: Int[Array, " tasks"]
    skipped_steps: Int[Array, ""]


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite_tasks`."""

    inner: State
    info: SkipNonfiniteInfo


def skip_nonfinite_tasks(
    tx: optax.GradientTransformation, num_tasks: int | None = None
) -> Combiner:
    """Leaves a task out of the step in which its loss or gradient is not finite.

    One broken task need not cost the others their step: it is treated as absent, as
    with ``task_mask``. How well that works depends on what reaches the transform:

    * **Stacked gradients**: rows with NaN or inf are removed.
    * **Lazy gradients of tuple, list or dict losses** (or one batch a task): the
      combined update is tested; only when it is broken are task gradients taken again,
      each from its own loss alone, inside a `lax.cond`.
    * **Lazy gradients of one ``[T]`` array**: a task whose loss is not finite gets no
      weight. Where that is not enough, because ``0 * inf`` reaches every row through
      the shared graph, the step is skipped and counted. The cure is in `loss_fn`:
      guard the argument itself with `jnp.where` (``jnp.where(ok, x, 1.0)`` *before*
      the log or the division), or return the losses as a tuple or dict.

    A skipped step gives a zero update and keeps the state of `tx`. Note that a zero
    update still moves parameters through Adam's momentum if Adam comes after; wrap the
    whole chain to hold it still.

    Args:
      tx: a combiner, or a chain that starts with one; `shared_only` goes inside.
      num_tasks: T; needed when `tx` is not itself a combiner of this package.

    Returns:
      a `Combiner` with `SkipNonfiniteState`; read
      ``optax.tree_utils.tree_get(state, "skipped_tasks")``.

    Raises:
      TypeError: when T is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.skip_nonfinite_tasks(mtl.mgda(num_tasks=2))
      >>> g = {"w": jnp.array([[3.0, 4.0], [jnp.nan, 1.0]])}
      >>> updates, state = tx.update(g, tx.init({"w": jnp.zeros(2)}))
      >>> updates["w"], state.info.skipped_tasks
      (Array([3., 4.], dtype=float32), Array([0, 1], dtype=int32))
    """
    tasks = read_num_tasks("skip_nonfinite_tasks", num_tasks, tx)
    inner_tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> SkipNonfiniteState:
        info = SkipNonfiniteInfo(
            jnp.zeros((tasks,), jnp.int32), jnp.zeros((), jnp.int32)
        )
        return SkipNonfiniteState(inner_tx.init(params), info)

    def update(
        task_grads: TaskGradients,
        state: SkipNonfiniteState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Updates, SkipNonfiniteState]:
        check_task_axis(task_grads, tasks, params)
        asked = read_task_mask(task_mask, tasks)
        asked = jnp.ones((tasks,), bool) if asked is None else asked
        known = read_losses(losses, task_grads, tasks)
        mask = asked if known is None else asked & jnp.isfinite(known)

        def step(grads: TaskGradients, mask: TaskMask) -> tuple[Updates, State]:
            more = {} if known is None else {"losses": known}
            return inner_tx.update(
                grads, state.inner, params, task_mask=mask, **more, **extra
            )

        if not is_lazy(task_grads):
            mask = mask & finite_rows(task_grads)
            updates, inner = step(task_grads, mask)
        else:
            updates, inner = step(task_grads, mask)
            if isolates(task_grads):

                def one_by_one() -> tuple[Updates, State, TaskMask]:
                    rows = materialize(task_grads, isolated=True)
                    finite = mask & finite_rows(rows)
                    return *step(rows, finite), finite

                whole = all_finite(updates) & _stays_finite(state.inner, inner)
                updates, inner, mask = lax.cond(
                    whole, lambda: (updates, inner, mask), one_by_one
                )

        usable = jnp.any(mask) & all_finite(updates) & _stays_finite(state.inner, inner)
        updates = select(usable, updates, jax.tree.map(jnp.zeros_like, updates))
        inner = select(usable, inner, state.inner)
        info = SkipNonfiniteInfo(
            state.info.skipped_tasks + (asked & ~mask).astype(jnp.int32),
            state.info.skipped_steps + (~usable).astype(jnp.int32),
        )
        return updates, SkipNonfiniteState(inner, info)

    return Combiner(init, update, tasks, skips_nonfinite=True)


def _stays_finite(before: State, after: State) -> Array:
    """A state that was finite still is."""
    return all_finite(after) | ~all_finite(before)
