"""`look_ahead_steps`: heads and shared parameters in turn, the latter looking ahead.

Lee & Son, "Single gradient step update for task balancing" (2020), arXiv:2005.09910.

**Built after the abstract, not checked against the paper**, as `look_ahead_jacobian`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_transform
from mtl_optax._masks import merge_parts, part_of, read_mask
from mtl_optax._touched import keep_untouched, touched_leaves
from mtl_optax._transform import read_task_mask
from mtl_optax._tree import materialize, weighted_sum
from mtl_optax._types import Mask, Params, State
from mtl_optax.jacobian._look_ahead import check_learning_rate, look_ahead_jacobian
from mtl_optax.jacobian._operators import RowMode
from mtl_optax.jacobian._task_jacobian import check_options, task_jacobian


class LookAheadState(NamedTuple):
    """State of `look_ahead_steps`: those of its two transforms."""

    shared: State
    heads: State


class LookAheadSteps(NamedTuple):
    """A training procedure of two alternating steps.

    Attributes:
      init: ``params -> opt_state``.
      step: ``(params, opt_state, *args, inner_batch=None, task_mask=None, **extra) ->
        (params, opt_state, losses [T])``, with aux ``(params, opt_state, (losses,
        aux))``.
    """

    init: Callable[[Params], LookAheadState]
    step: Callable[..., tuple[Params, LookAheadState, Any]]


def look_ahead_steps(
    loss_fn: Callable[..., Any],
    inner_learning_rate: float | Float[Array, ""],
    shared_tx: optax.GradientTransformation,
    heads_tx: optax.GradientTransformation,
    *,
    shared: Mask,
    heads_first: bool = True,
    first_order: bool = False,
    has_aux: bool = False,
    in_axes: Sequence[Any] | None = None,
    mode: RowMode | None = None,
) -> LookAheadSteps:
    r"""Trains heads and shared parameters in turn, the latter by looking ahead.

    .. math:: \phi \leftarrow \phi - \eta \sum_i \nabla_\phi L_i(\theta, \phi), \qquad
              \theta \leftarrow \theta - \beta \sum_i
              \frac{d}{d\theta} L_i(\theta'_i(\theta), \phi)

    The whole procedure of Lee & Son (2020) around `look_ahead_jacobian`, whose notes
    on when to use it hold here too. The second of the two steps sees what the first
    one changed.

    `sequential_task_steps` is another procedure with another turn-taking: there tasks
    step one after the other, each on all leaves it touches, and no gradients are
    combined; here all tasks step together, first on one half of the leaves and then on
    the other. It returns the step alone, because its state is that of one optimiser and
    ``tx.init(params)`` makes it; here two transforms see a part of the parameters each,
    and ``init`` makes both their states.

    **Built after the abstract, not checked against the paper**: the abstract says that
    shared and task-specific layers are trained separately, and gives neither their
    order nor optimisers nor learning rates. Here the heads go first by default, both
    steps see the same batch, and both optimisers are the caller's; the other decisions
    are listed in `look_ahead_jacobian`.

    Args:
      loss_fn: as for `task_jacobian`; its first argument holds the parameters.
      inner_learning_rate: as for `look_ahead_jacobian`.
      shared_tx: takes *task* gradients of the shared leaves, such as
        ``optax.chain(mtl.sum_tasks(2), optax.sgd(0.1))``; it receives ``losses=``.
      heads_tx: an ordinary optimiser; it takes the sum over tasks of the heads' plain
        gradients, which for a head of one task is its own.
      shared: as for `look_ahead_jacobian`, but never left out. If every leaf is shared,
        `heads_tx` has nothing to do.
      heads_first: whether the heads step before the shared leaves, which then look
        ahead with the new heads. If not, the heads' gradient is taken at the new shared
        parameters. Default: True, a choice of this package.
      first_order: as for `look_ahead_jacobian`.
      has_aux: `loss_fn` returns ``(losses, aux)``.
      in_axes: one batch a task, as for `task_jacobian`.
      mode: as for `look_ahead_jacobian`.

    Returns:
      `LookAheadSteps`: two pure functions for `jit` and `lax.scan`. ``init(params)``
      gives the state of the two transforms. ``step(params, opt_state, *args)`` gives
      ``(params, opt_state, losses [T])``, with aux ``(params, opt_state, (losses,
      aux))``. The losses are those at the look-ahead points, aux that of the parameters
      that the shared leaves step from (with `heads_first`, the new heads are among
      them). Keyword arguments of the step:

      * ``inner_batch``: that of `look_ahead_jacobian`, for this step.
      * ``task_mask``, ``[T]`` of bools: takes absent tasks out of both steps. A head
        leaf whose gradient, summed over present tasks, is zero everywhere keeps its
        value and its optimiser state, as untouched leaves do in
        `sequential_task_steps`, which says what becomes of Adam's step count. (Without
        a mask, a zero gradient still moves a head through momentum, as in optax.)
      * What else there is goes to `shared_tx` (``key=``, say).

    Raises:
      TypeError: if a transform is none, or was not called yet (``optax.adam``), or as
        `look_ahead_jacobian` does.
      ValueError: if no leaf is shared, if ``task_mask`` does not fit, or as
        `look_ahead_jacobian` does.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import mtl_optax as mtl
      >>> params = {"trunk": jnp.ones(2), "a": jnp.ones(1), "b": jnp.ones(1)}
      >>> def loss_fn(p, x):
      ...     h = x @ p["trunk"]
      ...     return jnp.mean((p["a"] * h - 2) ** 2), jnp.mean((p["b"] * h + 3) ** 2)
      >>> init, step = mtl.look_ahead_steps(
      ...     loss_fn,
      ...     0.05,
      ...     optax.chain(mtl.sum_tasks(2), optax.sgd(0.05)),
      ...     optax.sgd(0.1),
      ...     shared={"trunk": True, "a": False, "b": False},
      ... )
      >>> opt_state, x = init(params), jnp.eye(2)
      >>> for _ in range(40):
      ...     params, opt_state, losses = jax.jit(step)(params, opt_state, x)
      >>> bool(jnp.all(losses < 0.01))
      True

    References:
      Lee & Son, "Single gradient step update for task balancing", arXiv:2005.09910,
      2020 (abstract).
    """
    who = "look_ahead_steps"
    check_learning_rate(who, inner_learning_rate)
    check_options(mode, in_axes)
    check_transform(who, "shared_tx", shared_tx)
    check_transform(who, "heads_tx", heads_tx)
    if shared is None:
        raise TypeError(
            f"{who}: shared must say which leaves are shared: a tree of bools like the "
            "parameters, or a function of them; got None."
        )
    shared_update = optax.with_extra_args_support(shared_tx).update
    plain_jacobian = task_jacobian(loss_fn, has_aux=has_aux, in_axes=in_axes, mode=mode)

    def marks_of(params: Params) -> list[bool]:
        return read_mask(
            who,
            shared,
            params,
            if_none="nothing looks ahead: train the heads by an ordinary optimiser on "
            "the sum of the losses",
        )

    def init(params: Params) -> LookAheadState:
        marks = marks_of(params)
        return LookAheadState(
            shared_tx.init(part_of(params, marks, True)),
            heads_tx.init(part_of(params, marks, False)),
        )

    def step(
        params: Params,
        opt_state: LookAheadState,
        *args: Any,
        inner_batch: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Params, LookAheadState, Any]:
        marks = marks_of(params)

        def step_heads(params: Params, state: State) -> tuple[Params, State]:
            if all(marks):
                return params, state
            value, task_grads = plain_jacobian(params, *args)
            losses = value[0] if has_aux else value
            mask = read_task_mask(task_mask, losses.shape[0])
            task_grads = part_of(task_grads, marks, False)
            if mask is not None:
                # The rows of one task at a time: a NaN of an absent one stays out.
                task_grads = materialize(task_grads, isolated=True)
            grads = weighted_sum(jnp.ones_like(losses), task_grads, task_mask=mask)
            heads = part_of(params, marks, False)
            updates, new_state = heads_tx.update(grads, state, heads)
            new = optax.apply_updates(heads, updates), new_state
            if mask is not None:
                touched = touched_leaves(grads)
                new = keep_untouched(who, heads_tx, touched, new, (heads, state))
            heads, state = new
            return merge_parts(part_of(params, marks, True), heads, marks), state

        def step_shared(params: Params, state: State) -> tuple[Params, State, Any]:
            value, task_grads = look_ahead_jacobian(
                loss_fn,
                inner_learning_rate,
                shared=shared,
                first_order=first_order,
                inner_batch=inner_batch,
                has_aux=has_aux,
                in_axes=in_axes,
                mode=mode,
            )(params, *args)
            losses = value[0] if has_aux else value
            mask = read_task_mask(task_mask, losses.shape[0])
            more = extra if mask is None else {**extra, "task_mask": mask}
            trunk, own = part_of(params, marks, True), part_of(task_grads, marks, True)
            if mask is not None:
                own = materialize(own, isolated=True)
            updates, state = shared_update(own, state, trunk, losses=losses, **more)
            trunk = optax.apply_updates(trunk, updates)
            heads = part_of(params, marks, False)
            return merge_parts(trunk, heads, marks), state, value

        shared_state, heads_state = opt_state
        if heads_first:
            params, heads_state = step_heads(params, heads_state)
        params, shared_state, value = step_shared(params, shared_state)
        if not heads_first:
            params, heads_state = step_heads(params, heads_state)
        return params, LookAheadState(shared_state, heads_state), value

    return LookAheadSteps(init, step)
