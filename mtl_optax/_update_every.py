"""`update_every`: weights made anew every k steps, and kept in between.

Nash-MTL's ``update_weights_every`` (Navon et al. 2022, arXiv:2202.01017) and the idea
of PSMGD (Xu et al. 2024, arXiv:2412.10961): the weights of a combination move slowly,
so a step that keeps the last ones is nearly as good, and costs what plain training
costs.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mtl_optax._arguments import check_count
from mtl_optax._cond import cond_when_any
from mtl_optax._transform import Combiner, CombinerState, method_of
from mtl_optax._types import Params, TaskGradients, Updates, Weights


class UpdateEveryState(NamedTuple):
    """State of `update_every`.

    Attributes:
      inner: that of the wrapped combiner; its history and what its `info` says of the
        Gramian are of the last step that took one, its ``task_weights`` of this step.
      kept_weights: the last weights made, without the length of ``scale="norm"``.
      made_for: the tasks that were present when they were made; none before that.
      phase: number of the next step, modulo k; weights are made anew at 0.
    """

    inner: CombinerState
    kept_weights: Float[Array, " tasks"]
    made_for: Bool[Array, " tasks"]
    phase: Int[Array, ""]


def update_every(tx: Combiner, k: int) -> Combiner:
    r"""Makes the weights of a combination anew every k steps only.

    .. math:: u_s = J_s^\top w_{\lfloor s / k \rfloor}, \qquad
              w_i = \mathrm{weighting}(J_{ik} J_{ik}^\top, \dots)

    The Gramian, which costs a backward pass a task, is taken inside a `lax.cond` at
    every k-th step. In between a step costs what plain training costs: one backward
    pass of the losses weighted as before (with ``scale="norm"`` two, since the length
    follows the gradients at every step). For T tasks a step then costs about
    ``1 + T / k`` plain ones on average, down to ``1 + T / (3 k)`` where the Gramian is
    cheapest.

    Use it where T is large and the weights move slowly, with a lazy tree of
    `task_jacobian`; of stacked gradients, which are there already, it only spares the
    method's own arithmetic. Don't use it where the promise of a method (no task's loss
    rises) must hold at every step: weights of another step do not keep it. Nor where
    weights are random on purpose (`rlw`, `pcgrad`): they are then drawn every k steps.
    Nor with convolutions on CPU: XLA runs backward convolutions inside a `lax.cond`
    tens of times slower, which can cost more than it saves; there choose in Python
    between two compiled steps, the balanced one and ``jax.grad`` of ``weights @
    losses``.

    It goes innermost: ``shared_only(update_every(tx, k), mask)``,
    ``skip_nonfinite_tasks(shared_only(update_every(tx, k), mask))``. Inside `per_group`
    it works, but saves little: that takes all task gradients at every step.

    Args:
      tx: a combiner whose method is a weighting: made by `from_weighting`, as all of
        `METHODS` that need no more than the Gramian are.
      k: number of steps from one set of weights to the next; 1 is `tx` itself.

    Returns:
      a `Combiner` with `UpdateEveryState`. The first step always makes weights. A
      method's history moves only when weights are made, so a window of n steps spans
      ``n k`` of training (`task_tensioner`, `gradvac`, `pcd`). Its ``update`` takes, in
      addition, ``step=``, an integer scalar that stands for its own count: weights are
      made when ``step % k == 0``, e.g. for several combiners in one rhythm, or to go
      on with another one's. All else is as for `tx`; a random method wants its
      ``key=`` at every step and uses it when it makes weights.

      They are also made anew, out of turn, when the ``task_mask`` is not the one they
      were made for, so that an absent task counts as not existing, and when the last
      ones were not finite. A mask that changes at every step thus saves nothing. Under
      `jax.vmap` (over seeds, say) the `lax.cond` stays one: if any member needs
      weights, the arithmetic is done for all, and the others keep theirs. Members in
      one rhythm save as one run does; masks of their own make them all pay together.

    Raises:
      TypeError: when `tx` has no weights to keep (a method on whole rows, a wrapper or
        a chain), or k is not an int.
      ValueError: when k is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.update_every(mtl.imtl_g(num_tasks=2), 10)
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([[2.0, 0.0], [0.0, 1.0]]), state)
      >>> state.inner.info.task_weights
      Array([0.33333334, 0.6666667 ], dtype=float32)
      >>> updates, state = tx.update(jnp.array([[3.0, 0.0], [0.0, 3.0]]), state)
      >>> updates  # of the same weights
      Array([1., 2.], dtype=float32)

    References:
      Navon et al., `Multi-Task Learning as a Bargaining Game
      <https://arxiv.org/abs/2202.01017>`_, ICML 2022 (``update_weights_every``).
      Xu et al., `PSMGD: Periodic Stochastic Multi-Gradient Descent for Fast
      Multi-Objective Optimization <https://arxiv.org/abs/2412.10961>`_, 2024.
    """
    check_count("update_every: k", k)
    method = method_of(
        tx, "update_every({}, 10)", "to keep", "shared_only({}, mask), and once"
    )

    def init(params: Params) -> UpdateEveryState:
        inner = method.init(params)
        weights = inner.info.task_weights
        return UpdateEveryState(
            inner,
            jnp.zeros_like(weights),
            jnp.zeros(weights.shape, bool),
            jnp.zeros((), jnp.int32),
        )

    def update(
        task_grads: TaskGradients,
        state: UpdateEveryState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        step: Any = None,
        **extra: Any,
    ) -> tuple[Updates, UpdateEveryState]:
        if not isinstance(state, UpdateEveryState):
            raise TypeError(
                "update_every: expected an UpdateEveryState, as its own `init` makes, "
                f"got {type(state).__name__}. Was it made, or saved, before the "
                "combiner was wrapped?"
            )
        if extra.get("losses_again") is not None:
            raise TypeError(
                "update_every: leave losses_again out: the batch that they belong to "
                "is not the one that weights were last made of."
            )
        if step is not None:
            extra = {**extra, "step": step}
        told = method.read(task_grads, state.inner, params, losses, task_mask, extra)
        phase = state.phase if step is None else _phase_of(step, k)
        kept = state.kept_weights, state.inner
        due = (
            (phase == 0)
            | jnp.any(told.mask != state.made_for)
            | ~jnp.all(jnp.isfinite(state.kept_weights))
        )

        def make() -> tuple[Weights, CombinerState]:
            return method.weigh(task_grads, state.inner, told, extra)

        weights, inner = cond_when_any(due, make, kept)
        weights = lax.stop_gradient(weights)
        updates, inner = method.combine(weights, task_grads, inner, told)
        return updates, UpdateEveryState(
            inner,
            jnp.copy(weights),  # no array twice: donated states hold each once
            told.mask,  # the same as before, where nothing was due
            (phase + 1) % k,
        )

    return Combiner(
        init, update, method.num_tasks, scale=method.scale, axis_name=method.axis_name
    )


def _phase_of(step: Any, k: int) -> Int[Array, ""]:
    found = jnp.asarray(step)
    if found.ndim or not jnp.issubdtype(found.dtype, jnp.integer):
        raise TypeError(
            "update_every: step must be an integer scalar, the number of the training "
            f"step; got {found.dtype} of shape {found.shape}."
        )
    wide = found.astype(jnp.result_type(found.dtype, jnp.int32))
    return (wide % k).astype(jnp.int32)
