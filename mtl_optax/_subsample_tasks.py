"""`subsample_tasks`: a few tasks a step, drawn at random.

What CAGrad-Fast (Liu et al. 2021, arXiv:2110.14048, section 3.3) and people with fifty
tasks do, for any method: a Gramian of T tasks costs T backward passes, one of m drawn
tasks m.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from mtl_optax._arguments import check_count
from mtl_optax._random import uniform_by_task
from mtl_optax._some_tasks import some_tasks
from mtl_optax._transform import Combiner, read_losses, read_task_mask
from mtl_optax._tree import check_task_axis, scale_tree
from mtl_optax._types import Params, State, TaskGradients, TaskMask, Updates


class SubsampleTasksInfo(NamedTuple):
    """What to look at: the tasks that took part in the last step."""

    drawn_tasks: Bool[Array, " tasks"]


class SubsampleTasksState(NamedTuple):
    """State of `subsample_tasks`: that of the wrapped combiner."""

    inner: State
    info: SubsampleTasksInfo


def subsample_tasks(tx: Combiner, m: int, *, rescale: bool = False) -> Combiner:
    r"""Lets only m tasks, drawn anew at every step, take part in a combination.

    .. math:: u = \mathrm{tx}\big((g_t)_{t \in D}\big), \qquad
              D \subset \{1, \dots, T\}, \quad |D| = m

    D is uniform, without replacement; for tx the other tasks are absent in that step:
    they get no weight, and their history holds still.

    Of a lazy tree only the m drawn tasks' gradients are taken, so a Gramian costs m
    backward passes, not T; with ``in_axes`` the other tasks' batches are not even run
    (but for their losses, if those are used). The combination then costs what plain
    training on these tasks costs. Use it where T is large. A method on whole rows
    takes m backward passes too, but T rows of memory, the others zeros. It saves
    nothing of stacked gradients, which are there already, nor of a method that looks at
    the losses alone, which costs one backward pass anyway.

    Don't use it for tasks that must be balanced against each other at every step: the
    promises of a method (no task's loss rises, a Pareto-stationary stop) hold for the m
    drawn tasks only. Methods that look at change from step to step
    (`task_tensioner`) see each task only every ``T / m`` steps.

    Is the update right on average over draws? That of a mean of task gradients is
    (`mean`, `rlw`). That of a sum with weights that are each task's own
    (`constant_weights`, `sum_tasks`, `uncertainty_weighting`) is with ``rescale=True``,
    and too short by ``m / T`` without. All other methods weigh the tasks against each
    other, and are biased either way: a conflict counts only while both tasks are
    drawn. For those among them that sum up (`pcgrad`, `gradvac`) `rescale` gives about
    the length of the whole sum. Methods of a length of their own (`nash_mtl`), or
    whose weights sum to 1, need none.

    Args:
      tx: a combiner of `mtl_optax` that knows its number of tasks, wrappers included.
        The optimiser goes after, as in ``chain(subsample_tasks(cagrad(50), 8),
        adam(1e-3))``. `smooth_weights` goes inside. `shared_only` may stand on either
        side: outside, heads of all tasks take part at every step, by one more backward
        pass; inside, only those of drawn tasks. `skip_nonfinite_tasks` goes outside.
        Around `update_every` it saves nothing, since with every draw weights are made
        anew. Inside `per_group` every group draws for itself.
      m: number of tasks a step; with fewer present, all of them take part, and T or
        more is `tx` itself.
      rescale: multiply the update by the number of present tasks over that of drawn
        ones. ``task_weights`` are those before that.

    Returns:
      a `Combiner` whose ``update`` needs ``key=``, a fresh `jax.random.key` at every
      step; `tx`, if it is random, gets one made of it. The draw depends on the key and
      on which tasks are present alone. ``optax.tree_utils.tree_get(state,
      "drawn_tasks")`` tells who took part.

    Raises:
      TypeError: when `tx` is no combiner or does not know T, or m is not an int.
      ValueError: when m is not positive.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.subsample_tasks(mtl.mean(num_tasks=4), 2)
      >>> state = tx.init(jnp.zeros(4))
      >>> updates, state = tx.update(jnp.eye(4), state, key=jax.random.key(0))
      >>> int(state.info.drawn_tasks.sum()), updates.sort()
      (2, Array([0. , 0. , 0.5, 0.5], dtype=float32))

    References:
      Liu et al., `Conflict-Averse Gradient Descent for Multi-task Learning
      <https://arxiv.org/abs/2110.14048>`_, NeurIPS 2021; ``cagrad(num_sampled=)`` is
      their way, in which the tasks that are not drawn count as one more.
    """
    check_count("subsample_tasks: m", m)
    num_tasks = _tasks_of(tx)
    most = min(m, num_tasks)

    def init(params: Params) -> SubsampleTasksState:
        drawn = jnp.zeros((num_tasks,), bool)
        return SubsampleTasksState(tx.init(params), SubsampleTasksInfo(drawn))

    def update(
        task_grads: TaskGradients,
        state: SubsampleTasksState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        key: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[Updates, SubsampleTasksState]:
        if key is None:
            raise TypeError(
                "subsample_tasks draws tasks at random: call tx.update(..., key=key) "
                "with a fresh jax.random.key at every step."
            )
        check_task_axis(task_grads, num_tasks, params)
        asked = read_task_mask(task_mask, num_tasks)
        asked = jnp.ones((num_tasks,), bool) if asked is None else asked
        known = read_losses(losses, task_grads, num_tasks)
        drawn = _draw(jax.random.fold_in(key, 0), asked, most)
        if most < num_tasks:
            task_grads = some_tasks(task_grads, drawn, most)
        given = extra if known is None else {**extra, "losses": known}
        updates, inner = tx.update(
            task_grads,
            state.inner,
            params,
            task_mask=drawn,
            key=jax.random.fold_in(key, 1),
            **given,
        )
        if rescale:
            asked_for, taking_part = (jnp.sum(x.astype(float)) for x in (asked, drawn))
            updates = scale_tree(asked_for / jnp.maximum(taking_part, 1), updates)
        return updates, SubsampleTasksState(inner, SubsampleTasksInfo(drawn))

    return Combiner(
        init,
        update,
        num_tasks,
        scale=tx.scale,
        axis_name=tx.axis_name,
        skips_nonfinite=tx.skips_nonfinite,
    )


def _draw(key: jax.Array, present: TaskMask, m: int) -> TaskMask:
    """At most m of the present tasks, by their ranks: absent ones change nothing."""
    draws = jnp.where(present, uniform_by_task(key, present), jnp.inf)
    places = jnp.argsort(jnp.argsort(draws))
    return present & (places < m)


def _tasks_of(tx: Combiner) -> int:
    if not isinstance(tx, Combiner):
        raise TypeError(
            f"subsample_tasks: tx must be a combiner of mtl_optax, got {tx!r}. In a "
            "chain wrap the combiner alone, as in chain(subsample_tasks(edm(9), 3), "
            "adam(1e-3))."
        )
    if tx.num_tasks is None:
        raise TypeError(
            "subsample_tasks: tx does not know its number of tasks; give it to it, as "
            "in sum_tasks(9)."
        )
    return tx.num_tasks
