"""`accumulate_task_grads`: one combination of the task gradients of k micro-batches.

As `optax.MultiSteps`, but before the combination: methods are not linear, so the mean
of k combinations is not the combination of the mean.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_count, check_transform, read_num_tasks
from mtl_optax._cond import cond_when_any
from mtl_optax._transform import Combiner, read_losses, read_task_mask
from mtl_optax._tree import (
    check_task_axis,
    choose_rows,
    materialize,
    state_dtype,
)
from mtl_optax._types import Params, State, TaskGradients, Updates


class AccumulateTaskGradsState(NamedTuple):
    """State of `accumulate_task_grads`.

    Attributes:
      inner: that of the wrapped transform.
      summed_grads: each task's gradients, ``[T, *param.shape]`` a leaf, summed over the
        micro-batches since the last step; float32 at least.
      summed_losses: each task's losses, summed likewise.
      times_present: the number of these micro-batches in which a task was present.
      micro_batch: number of the next micro-batch, modulo k; 0 right after a step.
    """

    inner: State
    summed_grads: TaskGradients
    summed_losses: Float[Array, " tasks"]
    times_present: Int[Array, " tasks"]
    micro_batch: Int[Array, ""]


def accumulate_task_grads(
    tx: optax.GradientTransformation, k: int, num_tasks: int | None = None
) -> Combiner:
    r"""Averages each task's gradients over k micro-batches before they are combined.

    .. math:: u_k = \mathrm{tx}(\bar g_1, \dots, \bar g_T), \qquad
              \bar g_t = \frac{1}{k} \sum_{j=1}^{k} g_t^{(j)}, \qquad
              u_1 = \dots = u_{k-1} = 0

    For batches that do not fit in memory: with losses that are means over k
    micro-batches of one size, the k-th update is that of the one large batch, up to
    rounding. `optax.MultiSteps` after a combiner is something else: it averages
    combinations, each made of the conflicts of a small batch. Don't use it to save
    time (it takes every task's gradients, T backward passes, at every micro-batch), nor
    where the parameters leave no room for T more copies of them: a lazy tree is
    materialised, and the sums take T copies in float32 (beside float64 parameters in
    float64). For a method that looks at the losses alone, ``chain(combiner,
    MultiSteps(adam(1e-3), k))`` is nearly the same, and takes one copy.

    Args:
      tx: a combiner, any wrapper or a whole chain. Wrap the chain with its optimiser,
        ``accumulate_task_grads(chain(cagrad(3), adam(1e-3)), k, num_tasks=3)``: then
        Adam too takes one step in k. After it, Adam would take k, and the zero updates
        in between move the parameters by its momentum and fade it.
        `shared_only` and `per_group` go inside. Outside go `skip_nonfinite_tasks`,
        so that a broken micro-batch is left out alone (inside, it costs the task all
        k), and `subsample_tasks`, which takes m backward passes a micro-batch; each
        task's mean is then over the micro-batches in which it was drawn.
      k: number of micro-batches a step; 1 is `tx` itself, on materialised gradients.
      num_tasks: T; needed when `tx` is not itself a combiner of this package.

    Returns:
      a `Combiner` with `AccumulateTaskGradsState`, used as `tx` is, once a
      micro-batch. It calls `tx`, inside a `lax.cond`, at every k-th; else the update is
      zero and the state of `tx` is what it was. ``optax.tree_utils.tree_get(state,
      "micro_batch")`` is 0 right after such a step. Under `jax.vmap` (over seeds, say)
      the `lax.cond` stays one.

      An absent task's mean is over the micro-batches in which it was present; one that
      was in none is absent for `tx`. So if a task's examples are spread unevenly, each
      micro-batch counts alike. Losses are averaged in the same way (give them to all
      micro-batches or to none). ``key=`` and all other arguments reach `tx` as they
      are at the k-th micro-batch, but for ``losses_again`` (`famo`) and ``fresh``
      (`m_config`), which speak of one micro-batch and are refused.

    Raises:
      TypeError: when T is not known, or k is not an int.
      ValueError: when k is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.accumulate_task_grads(mtl.edm(num_tasks=2), 2)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), state)
      >>> updates, int(state.micro_batch)
      (Array([0., 0.], dtype=float32), 1)
      >>> updates, state = tx.update(jnp.array([[4.0, 0.0], [0.0, 5.0]]), state)
      >>> updates, int(state.micro_batch)  # of [[3, 0], [0, 3]]
      (Array([1.5, 1.5], dtype=float32), 0)
    """
    check_count("accumulate_task_grads: k", k)
    check_transform("accumulate_task_grads", "tx", tx)
    tasks = read_num_tasks("accumulate_task_grads", num_tasks, tx)
    wrapped = optax.with_extra_args_support(tx)

    def init(params: Params) -> AccumulateTaskGradsState:
        return AccumulateTaskGradsState(
            wrapped.init(params),
            jax.tree.map(
                lambda p: jnp.zeros((tasks, *jnp.shape(p)), state_dtype(p)), params
            ),
            jnp.zeros((tasks,), state_dtype(params)),
            jnp.zeros((tasks,), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def update(
        task_grads: TaskGradients,
        state: AccumulateTaskGradsState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Updates, AccumulateTaskGradsState]:
        check_task_axis(task_grads, tasks, params)
        given = read_task_mask(task_mask, tasks)
        mask = jnp.ones((tasks,), bool) if given is None else given
        known = read_losses(losses, task_grads, tasks)
        rows = materialize(task_grads)
        for name in ("losses_again", "fresh"):
            if extra.get(name) is not None:
                raise TypeError(
                    f"accumulate_task_grads: {name} belongs to one micro-batch, "
                    "and the others would not be told of it. Leave it out"
                    + ("; task_mask says who is absent." if name == "fresh" else ".")
                )

        def add(total: Array, new: Array) -> Array:
            return choose_rows(mask, total + new.astype(total.dtype), total)

        grads = jax.tree.map(add, state.summed_grads, rows)
        times = state.times_present + mask.astype(jnp.int32)
        sums = state.summed_losses
        if known is not None:
            sums = add(sums, known)
            extra = {**extra, "losses": _mean(sums, times)}

        def step() -> tuple[Updates, State]:
            means = jax.tree.map(
                lambda total, new: _mean(total, times).astype(new.dtype), grads, rows
            )
            return wrapped.update(
                means, state.inner, params, task_mask=times > 0, **extra
            )

        due = state.micro_batch == k - 1
        like, _ = jax.eval_shape(step)
        nothing = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), like)
        updates, inner = cond_when_any(due, step, (nothing, state.inner))

        def begin(total: Array) -> Array:
            return jnp.where(due, jnp.zeros((), total.dtype), total)

        return updates, AccumulateTaskGradsState(
            inner,
            jax.tree.map(begin, grads),
            begin(sums),
            begin(times),
            (state.micro_batch + 1) % k,
        )

    return Combiner(
        init, update, tasks, skips_nonfinite=getattr(tx, "skips_nonfinite", False)
    )


def _mean(total: Array, times: Int[Array, " tasks"]) -> Array:
    """Of each task's sum; zero where it was never present."""
    count = jnp.maximum(times, 1).astype(total.dtype)
    return total / count.reshape(-1, *[1] * (total.ndim - 1))
