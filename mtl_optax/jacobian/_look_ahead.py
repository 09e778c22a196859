r"""`look_ahead_jacobian`: task gradients taken one step ahead of the parameters.

Lee & Son, "Single gradient step update for task balancing" (2020), arXiv:2005.09910.

.. math:: \theta'_i = \theta - \alpha \nabla_\theta L_i(\theta, \phi), \qquad
          J_i = \nabla_\theta L_i(\theta'_i, \phi)

**Built after the abstract, not checked against the paper**: what the abstract leaves
open was decided here, and is listed in the docstring of `look_ahead_jacobian`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mtl_optax._arguments import check_nonnegative
from mtl_optax._masks import read_mask
from mtl_optax._tree import flatten, gramian, lazy_tree, same_structure
from mtl_optax._types import Basis, Mask, Params, TaskMask
from mtl_optax.jacobian._losses import (
    check_dependence,
    check_params,
    loss_vector,
    scalar_loss,
    split_aux,
)
from mtl_optax.jacobian._operators import UNROLL, BaseJacobian, RowMode, map_rows
from mtl_optax.jacobian._task_jacobian import batches_by_task, check_options
from mtl_optax.jacobian._trace import read_traits


def look_ahead_jacobian(
    loss_fn: Callable[..., Any],
    inner_learning_rate: float | Float[Array, ""],
    *,
    shared: Mask | None = None,
    first_order: bool = False,
    inner_batch: Any = None,
    has_aux: bool = False,
    in_axes: Sequence[Any] | None = None,
    mode: RowMode | None = None,
) -> Callable[..., Any]:
    r"""Task gradients taken after one gradient step of the task's own (Lee & Son 2020).

    .. math:: \theta'_i = \theta - \alpha \nabla_\theta L_i(\theta, \phi), \qquad
              J_{i,\theta} = \frac{d}{d\theta} L_i(\theta'_i(\theta), \phi), \qquad
              J_{i,\phi} = \nabla_\phi L_i(\theta, \phi)

    with shared parameters :math:`\theta` and heads :math:`\phi`. It replaces
    `task_jacobian`: what comes back is the same lazy tree, and any combiner takes it.

    **Built after the abstract, not checked against the paper**: the paper's algorithm,
    learning rates and experiments were not available. What the abstract leaves open was
    decided as follows.

    * Order of the derivative: through the inner step (second order), because the
      abstract speaks of gradient-based meta-learning; ``first_order=True`` stops it.
    * Inner and outer batch: the same; `inner_batch` gives the inner step its own.
    * Heads in the outer loss: held fixed, since the abstract trains them separately.
    * Inner steps move the shared parameters only, each task's from the same point.
    * Heads before or after the shared parameters: neither here (their rows are plain
      gradients at the current point); before, in `look_ahead_steps`, selectable.
    * Sum or mean over tasks: left to the combiner; `sum_tasks` is the plainest.
    * Learning rates: none is known. Start with `inner_learning_rate` equal to the
      outer one.
    * Outer optimiser: any; the inner step is plain gradient descent.

    Use it where one task is much steeper than the others: a task whose curvature is
    :math:`a` has its gradient damped by :math:`(1 - \alpha a)^2` (first order:
    :math:`1 - \alpha a`). Don't use it with an :math:`\alpha` that is not below
    :math:`1 / \lambda_{max}` of every task: for steeper tasks the factor grows again
    and has no bound (first order: it also turns the gradient round). Nor where a step
    must be cheap: each task costs 3.6 to 3.9 plain gradients (first order 1.8 to 2;
    counted in FLOPs on a dense network), and no two tasks share a backward pass. Low
    precision may lose the inner step: in bfloat16 a change of less than 0.2 % of a
    parameter rounds to none.

    **Memory**: a combination, too, holds about T copies of the shared parameters,
    because every task has a graph of its own and all of them wait for the backward
    pass. Measured for parameters of 4.2 MB at T = 2, 4, 8 and 16: 13, 30, 52 and 105 MB
    of temporary memory, with ``mode="map"`` 16, 23, 36 and 65 MB.

    Args:
      loss_fn: as for `task_jacobian`; its first argument holds the parameters.
      inner_learning_rate: :math:`\alpha`, not negative; may be traced. With 0, losses
        and gradients are those of `task_jacobian`.
      shared: a tree of bools like the parameters (or a prefix of it), True where
        shared; or a function of the parameters that returns one, as in `shared_only`.
        Default: every leaf is shared, also the heads, which then look ahead as well.
      first_order: take the gradient at :math:`\theta'_i` as it is, without the
        derivative of the inner step. Default: False, after the abstract.
      inner_batch: what the inner step sees in place of the positional arguments after
        the parameters: the argument itself if there is one, a tuple with one entry each
        if there are several. Keyword arguments stay the same. May be traced, so build
        this function inside the training step. Default: the same batch.
      has_aux: `loss_fn` returns ``(losses, aux)``. aux is that of the *current*
        parameters and the outer batch, so that batch statistics are the plain ones.
      in_axes: one batch a task, as for `task_jacobian`; `inner_batch` is mapped alike.
      mode: how tasks are swept: ``"unroll"`` (a Python loop in which each task computes
        its own loss only), ``"vmap"`` or ``"map"`` (`lax.map`: least memory from T = 4
        on, see above). For losses of one batch, the last two compute *all* heads at
        every task's point, and a NaN in one task reaches the inner steps of all;
        unrolled, tuple, list and dict losses keep it to its own row.
        Default: unrolled up to 4 tasks and vmapped beyond, as in `task_jacobian`; with
        `in_axes` vmapped; unrolled wherever there are convolutions on CPU, because
        there XLA is slow with one kernel a task.

    Returns:
      a function of `loss_fn`'s arguments that gives ``(losses [T], task_grads)``, with
      aux ``((losses, aux), task_grads)``. The losses are those at the look-ahead
      points. A combination is one backward pass through all tasks. A Gramian stores
      the rows and forgets them; if you have room for them, a method that takes one
      costs 3.7 plain gradients a task instead of 6.2 when it is given
      ``mtl.materialize(task_grads)``.

    Raises:
      ValueError: for a negative `inner_learning_rate` or a `mode` that does not exist;
        when called, if the mask marks no leaf or does not fit, if `inner_batch` does
        not fit the arguments, or as `task_jacobian` does.
      TypeError: for an `inner_learning_rate` that is no number, a mask that holds
        anything but bools, or as `task_jacobian` does.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> def loss_fn(s):  # curvatures 1 and 10
      ...     return {"flat": 0.5 * jnp.sum(s**2), "steep": 5 * jnp.sum(s**2)}
      >>> losses, task_grads = mtl.look_ahead_jacobian(loss_fn, 0.05)(jnp.ones(2))
      >>> mtl.materialize(task_grads)  # 1 * 0.95^2 and 10 * 0.5^2
      Array([[0.9025, 0.9025],
             [2.5   , 2.5   ]], dtype=float32)

    References:
      Lee & Son, "Single gradient step update for task balancing", arXiv:2005.09910,
      2020 (abstract).
    """
    who = "look_ahead_jacobian"
    check_learning_rate(who, inner_learning_rate)
    check_options(mode, in_axes, modes=get_args(RowMode))

    def losses_and_task_grads(params: Params, *args: Any, **kwargs: Any) -> Any:
        check_params(params)
        params = jax.tree.map(jnp.asarray, params)
        leaves = jax.tree.leaves(params)
        marks = [True] * len(leaves)
        if shared is not None:
            marks = read_mask(
                who,
                shared,
                params,
                if_none="there is nothing to look ahead with: use "
                "mtl_optax.task_jacobian for plain task gradients",
            )
        inner_args = _inner_args(who, inner_batch, args)

        def call(params: Params, args: Sequence[Any]) -> Any:
            return loss_fn(params, *args, **kwargs)

        tasks, aux = (
            _joint_tasks(call, params, args, inner_args, has_aux)
            if in_axes is None
            else _separate_tasks(
                call, params, args, inner_args, has_aux, tuple(in_axes)
            )
        )
        look = _look_ahead(tasks, marks, inner_learning_rate, first_order)
        operator = _operator(tasks, look, params, mode)
        task_grads = lazy_tree(operator, params)
        losses = operator.losses
        return ((losses, aux) if has_aux else losses), task_grads

    return losses_and_task_grads


class _Tasks(NamedTuple):
    """The tasks' losses, one at a time.

    Attributes:
      outer: ``(params, task) -> scalar``.
      inner: the same on the inner batch.
      batches: what `task` is taken from, task axis first; None where it is a number.
      names: of the tasks.
      isolated: whether `outer` of a Python int holds no other task's loss.
      convolves: whether there are convolutions.
    """

    outer: Callable[[Params, Any], Array]
    inner: Callable[[Params, Any], Array]
    batches: Any | None
    names: tuple[str, ...]
    isolated: bool
    convolves: bool

    def choose(self, mode: RowMode | None) -> RowMode:
        """The mode asked for, or the default."""
        few = self.batches is None and len(self.names) <= UNROLL
        slow = self.convolves and jax.default_backend() == "cpu"
        return mode or ("unroll" if few or slow else "vmap")

    def map(self, fn: Callable[[Any], Any], mode: RowMode) -> Any:
        """Applies `fn` to every task and stacks what it returns."""
        if self.batches is not None:
            return map_rows(fn, self.batches, mode)
        if mode != "unroll":
            return map_rows(fn, jnp.arange(len(self.names)), mode)
        # A Python int, unlike an entry of an array, says which loss can be left out.
        outs = [fn(task) for task in range(len(self.names))]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _joint_tasks(
    call: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    inner_args: Sequence[Any],
    has_aux: bool,
) -> tuple[_Tasks, Any]:
    def losses_of(params: Params, args: Sequence[Any]) -> Any:
        return split_aux(call(params, args), has_aux)[0]

    def form(args: Sequence[Any]) -> tuple[tuple[str, ...], bool, Any]:
        found: dict[str, Any] = {}

        def vector(params: Params) -> Array:
            out, found["names"], found["separable"] = loss_vector(
                losses_of(params, args)
            )
            return out

        traits = read_traits(jax.make_jaxpr(vector)(params))
        check_dependence(traits.depends)
        return found["names"], found["separable"], traits

    names, separable, traits = form(args)
    if inner_args is not args:
        inner_names, _, _ = form(inner_args)
        if inner_names != names:
            raise ValueError(
                f"look_ahead_jacobian: loss_fn gives the tasks {names} on the batch "
                f"and {inner_names} on inner_batch; expected the same."
            )

    def at(args: Sequence[Any]) -> Callable[[Params, Any], Array]:
        def loss(params: Params, task: Any) -> Array:
            losses = losses_of(params, args)
            if separable and isinstance(task, int):
                return scalar_loss(jax.tree.leaves(losses)[task])
            return loss_vector(losses)[0][task]

        return loss

    aux = split_aux(call(params, args), has_aux)[1] if has_aux else None
    tasks = _Tasks(at(args), at(inner_args), None, names, separable, traits.convolves)
    return tasks, aux


def _separate_tasks(
    call: Callable[..., Any],
    params: Params,
    args: Sequence[Any],
    inner_args: Sequence[Any],
    has_aux: bool,
    in_axes: tuple[Any, ...],
) -> tuple[_Tasks, Any]:
    def read(args: Sequence[Any]) -> tuple[list[Any], int, Callable[..., Any]]:
        mapped, batches = batches_by_task((params, *args), in_axes, [0])

        def loss_and_aux(params: Params, batch: Any) -> tuple[Array, Any]:
            merged = [params, *args]
            for position, value in zip(mapped, batch, strict=True):
                merged[position] = value
            loss, aux = split_aux(call(merged[0], merged[1:]), has_aux)
            return scalar_loss(loss), aux

        return batches, jax.tree.leaves(batches)[0].shape[0], loss_and_aux

    batches, num_tasks, loss_and_aux = read(args)

    def all_losses(params: Params) -> tuple[Array, Any]:
        return jax.vmap(loss_and_aux, in_axes=(None, 0))(params, batches)

    traits = read_traits(jax.make_jaxpr(lambda p: all_losses(p)[0])(params))
    check_dependence(traits.depends)
    aux = all_losses(params)[1] if has_aux else None

    def outer(params: Params, task: Any) -> Array:
        return loss_and_aux(params, task[0])[0]

    inner, every = outer, [batches]
    if inner_args is not args:
        inner_batches, found, inner_loss_and_aux = read(inner_args)
        if found != num_tasks:
            raise ValueError(
                f"look_ahead_jacobian: inner_batch holds {found} tasks, the batch "
                f"{num_tasks}; in_axes={in_axes} maps both."
            )
        every = [batches, inner_batches]

        def inner(params: Params, task: Any) -> Array:
            return inner_loss_and_aux(params, task[1])[0]

    names = tuple(str(t) for t in range(num_tasks))
    return _Tasks(outer, inner, every, names, True, traits.convolves), aux


def _look_ahead(
    tasks: _Tasks,
    marks: Sequence[bool],
    rate: Any,
    first_order: bool,
) -> Callable[[Params, Any], tuple[Array, Array]]:
    """``(params, task) -> (loss ahead, plain loss)``; their gradients add up to a row.

    The first depends on the shared leaves alone, the second on the others alone.
    """

    def look(params: Params, task: Any) -> tuple[Array, Array]:
        leaves, treedef = flatten(params)

        def join(theta: Sequence[Array], phi: Sequence[Array]) -> Params:
            of = {True: iter(theta), False: iter(phi)}
            return jax.tree.unflatten(treedef, [next(of[mark]) for mark in marks])

        theta = [leaf for leaf, mark in zip(leaves, marks, strict=True) if mark]
        phi = [leaf for leaf, mark in zip(leaves, marks, strict=True) if not mark]
        frozen = [lax.stop_gradient(leaf) for leaf in phi]
        grads = jax.grad(lambda theta: tasks.inner(join(theta, frozen), task))(theta)
        if first_order:
            grads = [lax.stop_gradient(g) for g in grads]
        ahead = [
            (x - rate * g).astype(x.dtype) for x, g in zip(theta, grads, strict=True)
        ]
        outer = tasks.outer(join(ahead, frozen), task)
        if not phi:
            return outer, jnp.zeros_like(outer)
        here = [lax.stop_gradient(leaf) for leaf in theta]
        return outer, tasks.outer(join(here, phi), task)

    return look


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class _LookAheadJacobian(BaseJacobian):
    """Rows that share no graph: each is taken from its own task's scalar function.

    One joint backward pass a row would run through every task's graph, T times.

    Attributes:
      tasks: how to go over the tasks.
      row: ``(params, task) -> scalar`` whose gradient is the row of the task.
      isolates: whether a row, and the inner step before it, holds no other task's
        loss; a mode that goes over all tasks in one graph does not.
      mode: how tasks are swept; None chooses.
    """

    tasks: _Tasks
    row: Callable[[PyTree[Array], Any], Array]
    isolates: bool
    mode: RowMode | None

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated  # rows are as isolated as the losses were
        gradient = jax.grad(self.row)
        return self.tasks.map(
            lambda task: self._pick(gradient(self.params, task)),
            self.tasks.choose(self.mode),
        )

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        return gramian(self.stack(), basis=basis, task_mask=task_mask)


def _operator(
    tasks: _Tasks,
    look: Callable[[Params, Any], tuple[Array, Array]],
    params: Params,
    mode: RowMode | None,
) -> _LookAheadJacobian:
    chosen = tasks.choose(mode)
    isolates = tasks.batches is not None or (tasks.isolated and chosen == "unroll")

    def all_rows(params: Params) -> tuple[Array, Array]:
        ahead, plain = tasks.map(lambda task: look(params, task), chosen)
        return ahead + plain, ahead

    _, vjp, losses = jax.vjp(all_rows, params, has_aux=True)
    return _LookAheadJacobian(
        params=params,
        losses=losses,
        pullback=lambda cotangent: vjp(cotangent)[0],
        task_names=tasks.names,
        mode=mode,
        leaves=tuple(range(len(jax.tree.leaves(params)))),
        tasks=tasks,
        row=lambda params, task: jnp.add(*look(params, task)),
        isolates=isolates,
    )


def _inner_args(who: str, inner_batch: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inner step's positional arguments after the parameters."""
    if inner_batch is None:
        return args
    if not args:
        raise ValueError(
            f"{who}: inner_batch stands for the positional arguments after the "
            "parameters, but the function was called without any."
        )
    if len(args) == 1:
        inner: tuple[Any, ...] = (inner_batch,)
    elif isinstance(inner_batch, (tuple, list)) and len(inner_batch) == len(args):
        inner = tuple(inner_batch)
    else:
        got = type(inner_batch).__name__
        if isinstance(inner_batch, (tuple, list)):
            got = f"{got} of {len(inner_batch)}"
        raise ValueError(
            f"{who}: inner_batch must be a tuple with one entry for each of the "
            f"{len(args)} positional arguments after the parameters, got {got}."
        )
    for position, (ours, theirs) in enumerate(zip(inner, args, strict=True)):
        found, expected = jax.tree.structure(ours), jax.tree.structure(theirs)
        if not same_structure(found, expected):
            raise ValueError(
                f"{who}: inner_batch must have the structure of what it stands for, "
                f"argument {position + 1}; expected {expected}, got {found}."
            )
    return inner


def check_learning_rate(who: str, value: Any) -> None:
    """Raises unless the inner learning rate is a scalar that is not negative."""
    if callable(value) or not (
        hasattr(value, "dtype") or isinstance(value, (int, float))
    ):
        raise TypeError(
            f"{who}: inner_learning_rate must be a number or a scalar array (of a "
            f"schedule, its value at this step), got {type(value).__name__}."
        )
    if jnp.ndim(value) != 0:  # of a traced value too
        raise ValueError(
            f"{who}: inner_learning_rate must be a scalar, got shape "
            f"{jnp.shape(value)}."
        )
    dtype = jnp.result_type(value)
    if dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{who}: inner_learning_rate must be a real number, got dtype {dtype}."
        )
    check_nonnegative(f"{who}: inner_learning_rate", value, below=float("inf"))
