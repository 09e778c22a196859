"""From a method's mathematics to an optax transform.

`from_weighting` and `from_aggregator` hold everything methods have in common: the
checks, absent tasks, the scale convention, the state's layout. A method adds two
functions.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_choice, check_num_tasks
from mtl_optax._tree import (
    check_task_axis,
    gramian,
    hold,
    in_columns,
    lazy_losses,
    lazy_task_names,
    materialize,
    norm,
    one_level,
    present_rows,
    same_structure,
    scale_tree,
    state_dtype,
    weighted_sum,
)
from mtl_optax._types import (
    Aggregator,
    Gramian,
    Losses,
    Params,
    State,
    TaskGradients,
    TaskMask,
    Updates,
    Weighting,
    Weights,
)

Scale: TypeAlias = Literal["paper", "mean", "sum", "norm"]
LengthScale: TypeAlias = Literal["paper", "norm"]


class Combiner(optax.GradientTransformationExtraArgs):
    """An optax transform that combines task gradients, and knows how it does so.

    Attributes:
      init, update: as of any `optax.GradientTransformationExtraArgs`; `update` takes
        the keyword arguments ``losses``, ``task_mask`` and ``key`` and swallows others.
      num_tasks: the number of tasks.
      weighting: the weighting inside, or None; wrappers take it to pieces.
      scale: the scale convention.
      axis_name: mesh axes over which Gramians are summed, or None.
      skips_nonfinite: whether it leaves broken tasks out (`skip_nonfinite_tasks`).
    """

    num_tasks: int | None = None
    weighting: Weighting | None = None
    scale: Scale = "paper"
    axis_name: Any = None
    skips_nonfinite: bool = False

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        num_tasks: int | None = None,
        weighting: Weighting | None = None,
        scale: Scale = "paper",
        axis_name: Any = None,
        *,
        skips_nonfinite: bool = False,
    ) -> "Combiner":
        self = super().__new__(cls, init, update)
        self.num_tasks = num_tasks
        self.weighting = weighting
        self.scale = scale
        self.axis_name = axis_name
        self.skips_nonfinite = skips_nonfinite
        return self


class LossInfo(NamedTuple):
    """What to look at after a step of a method that never sees the whole Gramian."""

    task_weights: Float[Array, " tasks"]


class GramianInfo(NamedTuple):
    """What to look at after a step of a method that sees the Gramian.

    Attributes:
      task_weights: the weights of the combination; zero for absent tasks.
      task_conflict: share of pairs of present tasks whose gradients have a negative
        inner product.
    """

    task_weights: Float[Array, " tasks"]
    task_conflict: Float[Array, ""]


class CombinerState(NamedTuple):
    """State of a transform made by `from_weighting`.

    Attributes:
      weighting: what the method needs at its next step.
      info: what a person looks at.
    """

    weighting: State
    info: LossInfo | GramianInfo


class AggregatorState(NamedTuple):
    """State of a transform made by `from_aggregator`."""

    aggregator: State


def from_weighting(
    weighting: Weighting,
    num_tasks: int,
    *,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Makes an optax transform from two functions on a ``[T, T]`` matrix.

    .. math:: u = \sum_t w_t g_t, \qquad w = \mathrm{weighting}(J J^\top, L, history)

    Every method of this package that needs only the Gramian or the losses is built so;
    use it to add your own. For methods that look at whole rows, see `from_aggregator`.

    Args:
      weighting: the method; see `mtl_optax.Weighting`.
      num_tasks: T, static and always given: it is never guessed from shapes.
      scale: length of the update. ``"paper"``: the authors' own; ``"mean"``: weights
        sum to 1; ``"sum"``: weights sum to the number of present tasks; ``"norm"``:
        the update is as long as the plain mean gradient (one more combination), so
        that methods can be compared at one learning rate. A weight sum that is not
        positive is left as it is.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which local Gramians are summed.

    Returns:
      a `Combiner`. Its ``update(task_grads, state, params=None, *, losses=None,
      task_mask=None, **extra)`` takes stacked or lazy task gradients, ``losses`` as
      ``[T]`` or in the form `loss_fn` returned them (a lazy tree knows its own), and
      ``task_mask [T]``: an absent task (False) counts as not existing, whatever its
      row holds. (A loss that is itself NaN, as a mean over no labels is, can reach the
      other rows through the network they share, before any combiner: guard it with
      `jnp.where`, or wrap the combiner in `skip_nonfinite_tasks`.)

    Raises:
      ValueError, TypeError: at trace time, for a wrong number of tasks, gradients that
        are already reduced, a missing task axis or missing losses.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> def by_norm(num_tasks):
      ...     def update(gramian, state, *, losses, task_mask, **extra):
      ...         return 1 / jnp.sqrt(jnp.diag(gramian)), state
      ...     needs = frozenset({"gramian"})
      ...     method = mtl.Weighting(lambda t, dtype: (), update, needs)
      ...     return mtl.from_weighting(method, num_tasks)
      >>> tx = by_norm(2)
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 2.0]])}
      >>> updates, state = tx.update(g, tx.init({"w": jnp.zeros(2)}))
      >>> updates["w"]
      Array([0.6, 1.8], dtype=float32)
    """
    check_num_tasks(num_tasks)
    check_choice("scale", scale, get_args(Scale))
    unknown = weighting.needs - {"gramian", "gramian_in_basis", "losses", "key"}
    if unknown:
        raise ValueError(f"Weighting.needs names unknown inputs: {sorted(unknown)}.")
    method = WeightedMethod(weighting, num_tasks, scale, axis_name)

    def update(
        task_grads: TaskGradients,
        state: CombinerState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Updates, CombinerState]:
        told = method.read(task_grads, state, params, losses, task_mask, extra)
        if method.sees_gramian and axis_name is not None:
            # Gramians over several devices are taken from rows, which serve twice.
            task_grads = materialize(task_grads)
        elif "gramian" in weighting.needs:
            # A Gramian in a basis alone may sweep fewer combinations than tasks.
            task_grads = hold(task_grads, told.given_mask)
        weights, state = method.weigh(task_grads, state, told, extra)
        return method.combine(weights, task_grads, state, told)

    return Combiner(method.init, update, num_tasks, weighting, scale, axis_name)


class Told(NamedTuple):
    """What a weighting is told besides the task gradients, checked.

    Attributes:
      losses: in the state's dtype, one for absent tasks; None where there are none.
      mask: the task mask.
      given_mask: the same, or None where none was given.
    """

    losses: Losses | None
    mask: TaskMask
    given_mask: TaskMask | None


class WeightedMethod(NamedTuple):
    """The steps of a combiner made by `from_weighting`, for whoever takes it to pieces.

    Attributes:
      weighting, num_tasks, scale, axis_name: the arguments of `from_weighting`.
    """

    weighting: Weighting
    num_tasks: int
    scale: Scale
    axis_name: Any

    @property
    def sees_gramian(self) -> bool:
        return bool(self.weighting.needs & {"gramian", "gramian_in_basis"})

    def init(self, params: Params) -> CombinerState:
        dtype = state_dtype(params)
        weights = jnp.zeros((self.num_tasks,), dtype)
        info = (
            GramianInfo(weights, jnp.zeros((), dtype))
            if "gramian" in self.weighting.needs
            else LossInfo(weights)
        )
        return CombinerState(self.weighting.init(self.num_tasks, dtype), info)

    def read(
        self,
        task_grads: TaskGradients,
        state: CombinerState,
        params: Params | None,
        losses: Any,
        task_mask: Any,
        extra: Mapping[str, Any],
    ) -> Told:
        """Checks what `update` was given."""
        num_tasks, needs = self.num_tasks, self.weighting.needs
        check_task_axis(task_grads, num_tasks, params)
        dtype = state.info.task_weights.dtype
        given_mask = read_task_mask(task_mask, num_tasks)
        mask = jnp.ones((num_tasks,), bool) if given_mask is None else given_mask
        known = read_losses(losses, task_grads, num_tasks)
        if known is None and "losses" in needs:
            raise TypeError(
                "this combiner needs the task losses: call tx.update(task_grads, "
                "state, params, losses=losses) with losses of shape "
                f"({num_tasks},), or pass the lazy tree of task_jacobian, which "
                "knows them."
            )
        if "key" in needs and extra.get("key") is None:
            raise TypeError(
                "this combiner is random: call tx.update(..., key=key) with a fresh "
                "jax.random.key at every step."
            )
        if known is not None:
            known = lax.stop_gradient(known.astype(dtype))
            known = jnp.where(mask, known, jnp.ones((), dtype))
        return Told(known, mask, given_mask)

    def weigh(
        self,
        task_grads: TaskGradients,
        state: CombinerState,
        told: Told,
        extra: Mapping[str, Any],
    ) -> tuple[Weights, CombinerState]:
        """The weights, but for the length that ``scale="norm"`` gives; the new state.

        Its `info` does not hold the weights yet.
        """
        weighting, mask = self.weighting, told.mask
        dtype = state.info.task_weights.dtype

        rows = in_columns(task_grads) if self.sees_gramian else task_grads

        def gramian_in_basis(basis: Array | None) -> Array:
            gram = gramian(
                rows,
                basis=basis,
                task_mask=told.given_mask,
                axis_name=self.axis_name,
            )
            # Weights are constants to whoever differentiates through an update.
            return lax.stop_gradient(gram).astype(dtype)

        gram = gramian_in_basis(None) if "gramian" in weighting.needs else None
        if "gramian_in_basis" in weighting.needs:
            extra = {**extra, "gramian_in_basis": gramian_in_basis}
        weights, inner = weighting.update(
            gram,
            state.weighting,
            losses=told.losses if "losses" in weighting.needs else None,
            task_mask=mask,
            **extra,
        )
        _check_contract(weights, self.num_tasks, state.weighting, inner)
        weights = jnp.where(mask, weights.astype(dtype), jnp.zeros((), dtype))
        if self.scale in ("mean", "sum"):
            weights = weights * _to_sum(weights, mask, self.scale)
        info = state.info
        if gram is not None:
            info = GramianInfo(info.task_weights, _conflict(gram, mask))
        return weights, CombinerState(inner, info)

    def combine(
        self,
        weights: Weights,
        task_grads: TaskGradients,
        state: CombinerState,
        told: Told,
    ) -> tuple[Updates, CombinerState]:
        """The weighted sum, and the state with the weights in its `info`."""
        updates = weighted_sum(weights, task_grads, task_mask=told.given_mask)
        if self.scale == "norm":
            factor, updates = _to_mean_length(
                updates, task_grads, told.mask, told.given_mask, self.axis_name
            )
            weights = weights * factor.astype(weights.dtype)
        info = state.info._replace(task_weights=weights)
        return updates, CombinerState(state.weighting, info)


def method_of(tx: Any, call: str, purpose: str, inside: str) -> WeightedMethod:
    """What `from_weighting` made `tx` of, for the wrapper of that `call`.

    Raises TypeError where there are no weights; `inside` says where the wrapper goes.
    """
    who = call.partition("(")[0]
    if not isinstance(tx, Combiner):
        raise TypeError(
            f"{who}: tx must be a combiner of mtl_optax, got {tx!r}. In a chain wrap "
            f"the combiner alone, as in chain({call.format('edm(2)')}, adam(1e-3))."
        )
    if tx.weighting is None or tx.num_tasks is None:
        raise TypeError(
            f"{who}: tx has no weights {purpose}. A method on whole rows "
            "(from_aggregator, sum_tasks) has none; of a wrapper put it inside, as in "
            f"{inside.format(call.format('cagrad(3)'))}."
        )
    return WeightedMethod(tx.weighting, tx.num_tasks, tx.scale, tx.axis_name)


def from_aggregator(
    aggregator: Aggregator,
    num_tasks: int,
    *,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Makes an optax transform from a method that looks at whole task gradients.

    .. math:: u = A(J), \qquad J \in R^{T \times P}

    A lazy tree is materialised: such a method costs T backward passes and T copies of
    the gradients. Use `from_weighting` wherever the Gramian is enough.

    Args:
      aggregator: the method; see `mtl_optax.Aggregator`. It must honour ``task_mask``
        itself; rows of absent tasks reach it as zeros.
      num_tasks: T, static.
      scale: ``"paper"`` or ``"norm"`` (as long as the plain mean gradient); there are
        no weights for the other two.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which ``scale="norm"`` sums lengths.

    Returns:
      a `Combiner`, used as that of `from_weighting`.

    Raises:
      ValueError: for ``scale="mean"`` or ``"sum"``, and for wrong shapes.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> def median(num_tasks):
      ...     def update(task_grads, state, params, *, losses, task_mask, **extra):
      ...         return jax.tree.map(lambda g: jnp.median(g, 0), task_grads), state
      ...     method = mtl.Aggregator(lambda params, num_tasks: (), update)
      ...     return mtl.from_aggregator(method, num_tasks)
      >>> tx = median(3)
      >>> g = {"w": jnp.array([[1.0], [2.0], [9.0]])}
      >>> tx.update(g, tx.init({"w": jnp.zeros(1)}))[0]
      {'w': Array([2.], dtype=float32)}
    """
    check_num_tasks(num_tasks)
    if scale not in ("paper", "norm"):
        raise ValueError(
            "a method on whole rows has no weights to rescale: scale must be 'paper' "
            f"or 'norm', got {scale!r}."
        )

    def init(params: Params) -> AggregatorState:
        return AggregatorState(aggregator.init(params, num_tasks))

    def update(
        task_grads: TaskGradients,
        state: AggregatorState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Updates, AggregatorState]:
        check_task_axis(task_grads, num_tasks, params)
        given_mask = read_task_mask(task_mask, num_tasks)
        mask = jnp.ones((num_tasks,), bool) if given_mask is None else given_mask
        known = read_losses(losses, task_grads, num_tasks)
        if known is not None:
            known = jnp.where(mask, known, jnp.ones((), known.dtype))
        rows = materialize(task_grads)
        if given_mask is not None:
            rows = jax.tree.map(lambda g: present_rows(g, mask), rows)
        updates, inner = aggregator.update(
            rows, state.aggregator, params, losses=known, task_mask=mask, **extra
        )
        _check_updates(updates, rows)
        _check_state("aggregator", state.aggregator, inner)
        if scale == "norm":
            _, updates = _to_mean_length(updates, rows, mask, given_mask, axis_name)
        return updates, AggregatorState(inner)

    return Combiner(init, update, num_tasks, None, scale, axis_name)


def sum_tasks(num_tasks: int | None = None) -> Combiner:
    r"""The plain sum of task gradients, for heads and as the baseline to beat.

    .. math:: u = \sum_t g_t

    It is what training on the sum of the losses does. Use it for the leaves that a
    combiner should not touch: ``optax.partition({"shared": tx, "heads":
    mtl.sum_tasks()}, labels)``; `shared_only` does so for you. It carries no state.

    Args:
      num_tasks: T, checked when given; by default the length of the leading axis.

    Returns:
      a `Combiner`; ``task_mask`` leaves absent tasks out.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.sum_tasks()
      >>> tx.update({"w": jnp.array([[1.0], [2.0]])}, tx.init({"w": jnp.zeros(1)}))[0]
      {'w': Array([3.], dtype=float32)}
    """

    def init(params: Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        task_grads: TaskGradients,
        state: optax.EmptyState,
        params: Params | None = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        **extra: Any,
    ) -> tuple[Updates, optax.EmptyState]:
        del extra
        leaves = jax.tree.leaves(task_grads)
        tasks = num_tasks
        if tasks is None:
            # A leaf without any axis has no tasks; the check below says so.
            tasks = leaves[0].shape[0] if leaves and leaves[0].shape else 1
        check_task_axis(task_grads, tasks, params)
        read_losses(losses, task_grads, tasks)  # not needed, but wrong is wrong
        mask = read_task_mask(task_mask, tasks)
        ones = jnp.ones((tasks,), jnp.float32)
        return weighted_sum(ones, task_grads, task_mask=mask), state

    if num_tasks is not None:
        check_num_tasks(num_tasks)
    return Combiner(init, update, num_tasks)


def read_task_mask(task_mask: Any, num_tasks: int) -> TaskMask | None:
    """The task mask as ``[T]`` bools, or None when none was given."""
    if task_mask is None:
        return None
    if not hasattr(task_mask, "ndim"):  # by task, in pytree order, as losses may be
        leaves = jax.tree.leaves(task_mask)
        traced = any(isinstance(leaf, jax.Array) for leaf in leaves)
        task_mask = jnp.stack(leaves) if traced else np.array(leaves)
    if task_mask.shape != (num_tasks,) or task_mask.dtype != jnp.bool_:
        raise ValueError(
            f"task_mask: expected bools of shape ({num_tasks},), True where the task "
            f"is present, got {task_mask.dtype} of shape {task_mask.shape}."
        )
    return jnp.asarray(task_mask)


def read_losses(
    losses: Any, task_grads: TaskGradients, num_tasks: int
) -> Losses | None:
    """The losses as ``[T]``, from the argument or else from a lazy tree."""
    if losses is None:
        losses = lazy_losses(task_grads)
        if losses is None:
            return None
    names = lazy_task_names(task_grads)
    if isinstance(losses, Mapping) and names is not None:
        given = tuple(one_level(losses)[0])
        if given != names and set(names) != {str(t) for t in range(num_tasks)}:
            raise ValueError(
                f"losses: the task gradients belong to the tasks {names}, the losses "
                f"given to {given}."
            )
    if not hasattr(losses, "ndim"):
        scalars = [jnp.asarray(x) for x in jax.tree.leaves(losses)]
        if not scalars or any(x.ndim for x in scalars):
            shapes = jax.tree.map(jnp.shape, losses)
            raise ValueError(
                f"losses: expected {num_tasks} scalars or an array of shape "
                f"({num_tasks},), got {shapes}."
            )
        losses = jnp.stack(scalars)
    losses = jnp.asarray(losses)
    if losses.shape != (num_tasks,):
        raise ValueError(
            f"losses: expected shape ({num_tasks},), one loss a task, got "
            f"{losses.shape}."
        )
    if not jnp.issubdtype(losses.dtype, jnp.number) or jnp.iscomplexobj(losses):
        raise TypeError(f"losses: expected real numbers, got dtype {losses.dtype}.")
    return losses


def _check_contract(
    weights: Array, num_tasks: int, before: State, after: State
) -> None:
    """What a weighting returned has the shapes it promised."""
    if weights.shape != (num_tasks,):
        raise ValueError(
            f"the weighting returned weights of shape {weights.shape}, expected "
            f"({num_tasks},), one a task."
        )
    _check_state("weighting", before, after)


def _check_state(what: str, before: State, after: State) -> None:
    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(before, after)
    except AssertionError as error:
        raise ValueError(
            f"the {what}'s state must keep its structure, shapes and dtypes from init "
            f"on: {error}"
        ) from error


def _check_updates(updates: Updates, rows: TaskGradients) -> None:
    """An aggregator's updates have the parameters' shapes."""
    wanted = [g.shape[1:] for g in jax.tree.leaves(rows)]
    found = [jnp.shape(u) for u in jax.tree.leaves(updates)]
    # Leaf by leaf: the containers of some libraries have an equality of their own.
    alike = same_structure(jax.tree.structure(updates), jax.tree.structure(rows))
    if not alike or found != wanted:
        raise ValueError(
            "the aggregator returned updates of shapes "
            f"{jax.tree.map(jnp.shape, updates)}, expected "
            f"{jax.tree.map(lambda g: g.shape[1:], rows)}."
        )


def _to_sum(weights: Weights, mask: TaskMask, scale: Scale) -> Array:
    total = jnp.sum(weights)
    target = jnp.sum(mask.astype(weights.dtype)) if scale == "sum" else 1.0
    safe = jnp.where(total > 0, total, jnp.ones((), weights.dtype))
    return jnp.where(total > 0, target / safe, jnp.ones((), weights.dtype))


def _to_mean_length(
    updates: Updates,
    task_grads: TaskGradients,
    mask: TaskMask,
    given_mask: TaskMask | None,
    axis_name: Any = None,
) -> tuple[Array, Updates]:
    """Rescales `updates` to the length of the mean gradient of present tasks."""
    present = mask.astype(float)  # float64 where that is enabled
    mean = weighted_sum(
        present / jnp.maximum(jnp.sum(present), 1.0), task_grads, task_mask=given_mask
    )
    length, target = norm(updates, axis_name), norm(mean, axis_name)
    one = jnp.ones((), length.dtype)
    factor = jnp.where(length > 0, target / jnp.where(length > 0, length, one), one)
    return factor, scale_tree(factor, updates)


def _conflict(gram: Gramian, mask: TaskMask) -> Array:
    """Share of pairs of present tasks with a negative inner product."""
    pairs = mask[:, None] & mask[None, :] & ~jnp.eye(mask.shape[0], dtype=bool)
    count = jnp.sum(pairs.astype(gram.dtype))
    conflicts = jnp.sum((pairs & (gram < 0)).astype(gram.dtype))
    return conflicts / jnp.maximum(count, jnp.ones((), gram.dtype))
