"""Priority projection: a channel's gradient may not hurt the task that owns it.

Phase 2 of connection-strength optimisation (Jeong & Yoon, "Quantifying Task Priority
for Multi-Task Optimization", CVPR 2024, Algorithm 1). Output channels of a shared layer
fall into groups by the task with the largest connection strength there; within group i

    G_ij <- G_ij - min(0, <G_ii, G_ij>) / |G_ii|^2 * G_ii,     u = sum_j G_ij

where ``G_ij`` is task j's gradient on the channels of group i, as one vector.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from mtl_optax._masks import is_masked
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import path_names, weighted_sum, whole_task_axis
from mtl_optax._types import Aggregator, Params, TaskGradients, TaskMask, Updates

_MISSING: Any = object()


def _find_strengths(strengths: PyTree[Any], rows: TaskGradients) -> list[Array | None]:
    """Strengths leaf by leaf of `rows`, from a tree that may lack leaves; checked."""
    leaves = jax.tree_util.tree_leaves_with_path(strengths)
    given = {path_names(path): jnp.asarray(leaf) for path, leaf in leaves}
    found: list[Array | None] = []
    known = []
    for path, row in jax.tree_util.tree_leaves_with_path(rows, is_leaf=is_masked):
        names = path_names(path)
        known.append(".".join(path_names(path, variables=True)))
        # NNX states hold variables, whose array stands one step further down.
        place = names if names in given else path_names(path, variables=True)
        strength = given.pop(place, None)
        if is_masked(row):
            continue  # a leaf that another transform takes care of
        found.append(strength)
        if strength is None:
            continue
        where = f"strengths of leaf {'.'.join(place) or '(the whole tree)'}"
        if row.ndim < 2:
            raise ValueError(f"{where}: expected None, since a scalar has no channels.")
        wanted = (row.shape[0], row.shape[-1])
        if strength.shape != wanted:
            raise ValueError(
                f"{where}: expected (T, C_out) = {wanted}, got {strength.shape}."
            )
        if not jnp.issubdtype(strength.dtype, jnp.floating):
            raise TypeError(
                f"{where}: expected floating-point numbers, got {strength.dtype}."
            )
    if given:
        unknown = ", ".join(".".join(place) for place in given)
        raise ValueError(
            f"strengths of leaf {unknown}: the parameters have no such leaf. There "
            f"are: {', '.join(known)}."
        )
    return found


def _owners(
    strengths: Float[Array, "tasks channels"], task_mask: TaskMask
) -> Float[Array, "tasks channels"]:
    """1 where the task has priority (the first of equals), else 0."""
    counts = task_mask[:, None] & ~jnp.isnan(strengths)
    lowest = jnp.full((), -jnp.inf, strengths.dtype)
    owner = jnp.argmax(jnp.where(counts, strengths, lowest), axis=0)
    return (jnp.arange(strengths.shape[0])[:, None] == owner).astype(strengths.dtype)


def _project(
    rows: Float[Array, "tasks *inputs channels"],
    owned: Float[Array, "tasks channels"],
    axis_name: Any,
) -> Float[Array, "*inputs channels"]:
    """The sum over tasks of the projected gradients of one leaf."""
    wide = rows.astype(jnp.result_type(jnp.float32, rows.dtype))
    owned = owned.astype(wide.dtype)
    one = jnp.ones((), wide.dtype)
    inputs = tuple(range(wide.ndim - 2))

    def over_devices(reduce: Any, x: Array) -> Array:
        return x if axis_name is None else reduce(x, axis_name)

    def unit_of(largest: Array) -> Array:
        largest = over_devices(lax.pmax, largest)
        return jnp.where(largest > 0, largest, one)

    # G_ii of all groups i in one array. Loops over tasks: XLA's CPU back end is ten
    # times slower on sums over a first axis. Products and sums, no `dot`: they run at
    # full precision and for any sharding.
    def add_own(own: Array, task: tuple[Array, Array]) -> tuple[Array, None]:
        row, mine = task
        return own + row * mine, None

    own, _ = lax.scan(add_own, jnp.zeros_like(wide[0]), (wide, owned))
    # Units are taken out, each group's and each row's, so that squares stay in range.
    largest = jnp.max(jnp.abs(own), axis=inputs, initial=0)
    unit = unit_of(jnp.max(largest * owned, axis=1, initial=0))
    own = own / jnp.sum(unit[:, None] * owned, axis=0)
    lengths = unit_of(
        jnp.max(jnp.abs(wide), axis=tuple(range(1, wide.ndim)), initial=0)
    )

    # <G_ii, G_ij>, channel by channel and then over the whole of each group.
    def product(own: Array, task: tuple[Array, Array]) -> tuple[Array, Array]:
        row, length = task
        return own, jnp.sum(own * (row / length), axis=inputs)

    _, products = lax.scan(product, own, (wide, lengths))
    squares = jnp.sum(jnp.sum(jnp.square(own), axis=inputs) * owned, axis=1)
    squares = over_devices(lax.psum, squares)
    groups = jnp.sum(products[None, :, :] * owned[:, None, :], axis=2)
    groups = over_devices(lax.psum, groups)

    # A layer that belongs to one task alone has nothing to disentangle.
    channels = over_devices(lax.psum, jnp.sum(owned, axis=1))
    several = jnp.sum((channels > 0).astype(one.dtype)) > 1
    hurt = several & (groups < 0)
    share = groups / jnp.where(squares > 0, squares, one)[:, None]
    taken = jnp.sum(jnp.where(hurt, share * lengths, 0 * one), axis=1)
    removed = own * jnp.sum(taken[:, None] * owned, axis=0)
    total = weighted_sum(jnp.ones(len(wide), wide.dtype), wide)
    return (total - removed).astype(rows.dtype)


def priority_projection(
    num_tasks: int, *, scale: LengthScale = "paper", axis_name: Any = None
) -> Combiner:
    r"""Sums task gradients after taking out what hurts a channel's own task.

    .. math::

        u = \sum_j \Bigl( G_{ij} - \frac{\min(0, \langle G_{ii}, G_{ij} \rangle)}
        {\|G_{ii}\|^2} G_{ii} \Bigr) \quad \text{on the channels of group } i

    The output channels of a shared layer are grouped by the task that leans most on
    them (`connection_strength`); a channel's owner keeps its gradient, and the others
    lose what points against it. The projection is over each group as a whole, not a
    channel at a time: channels of one task may still see conflict among themselves.
    Use it late in training, mixed with `sequential_task_steps` by `phase_schedule`, as
    the authors do; it needs a network with task-specific batch norms
    (`mtl_optax.layers.TaskBatchNorm`). It does nothing where no strengths are given.

    Args:
      num_tasks: T.
      scale: ``"paper"`` (the sum) or ``"norm"``; see `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which inner products are summed; strengths are sharded as their channels.

    Returns:
      a `Combiner`. Its ``update`` takes ``strengths=``: a tree like the parameters with
      a ``[T, C_out]`` array for each kernel that has priorities, and None, or no key at
      all, elsewhere (None alone: nowhere). Leaves without strengths, and layers that
      belong to one task altogether (as at initialisation, when all strengths are
      equal), get the plain sum. Of equal strengths the first task's counts. Absent
      tasks own nothing, nor does a task where its strength is NaN. Strengths at leaves
      that another transform takes care of (`shared_only`) are passed over. A lazy tree
      is materialised: T backward passes.

    Raises:
      TypeError: when ``strengths`` is missing, or holds anything but floating-point
        numbers.
      ValueError: when an array of strengths has another shape than ``(T, C_out)``, or
        stands where the parameters have no leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.priority_projection(num_tasks=2)
      >>> params = {"kernel": jnp.zeros((1, 3)), "bias": jnp.zeros(3)}
      >>> g = {
      ...     "kernel": jnp.array([[[1.0, 1.0, 1.0]], [[-3.0, 2.0, 5.0]]]),
      ...     "bias": jnp.ones((2, 3)),
      ... }
      >>> strengths = {"kernel": jnp.array([[0.3, 0.3, 0.4], [0.1, 0.1, 0.8]])}
      >>> updates, _ = tx.update(g, tx.init(params), params, strengths=strengths)
      >>> updates["kernel"], updates["bias"]
      (Array([[-1.5,  3.5,  6. ]], dtype=float32), Array([2., 2., 2.], dtype=float32))

    Differs from the authors' code: strengths are an argument, so a dense layer (the
    1 x 1 case) has priorities too where they are given.

    References:
      Jeong & Yoon, `Quantifying Task Priority for Multi-Task Optimization
      <https://arxiv.org/abs/2406.02996>`_, CVPR 2024.
    """

    def init(params: Params, num_tasks: int) -> tuple[()]:
        del params, num_tasks
        return ()

    def update(
        rows: TaskGradients,
        state: tuple[()],
        params: Params | None,
        *,
        task_mask: TaskMask,
        strengths: PyTree[Any] = _MISSING,
        **extra: Any,
    ) -> tuple[Updates, tuple[()]]:
        del params, extra
        if strengths is _MISSING:
            raise TypeError(
                "priority_projection needs connection strengths: call tx.update(..., "
                "strengths=tree) with an array (T, C_out) at each kernel that has "
                "priorities (mtl_optax.connection_strength gives it), and None or "
                "nothing elsewhere."
            )
        leaves, treedef = jax.tree.flatten(rows)

        def one(g: Array, strength: Array | None) -> Array:
            if strength is None:
                return weighted_sum(jnp.ones(num_tasks), g)
            return _project(whole_task_axis(g), _owners(strength, task_mask), axis_name)

        found = _find_strengths(strengths, rows)
        updates = [one(g, s) for g, s in zip(leaves, found, strict=True)]
        return jax.tree.unflatten(treedef, updates), state

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
