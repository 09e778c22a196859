"""The only file that touches leaves of task gradients.

A tree of task gradients is shaped like the parameters. Its leaves are either stacked
arrays ``[T, *param.shape]`` or lazy leaves, which only know the operator (the Jacobian)
they belong to. Everything here takes both.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from mtl_optax._types import (
    Basis,
    DType,
    TaskGradients,
    TaskJacobian,
    TaskMask,
    Updates,
    Weights,
)

HIGHEST = lax.Precision.HIGHEST

# XLA's CPU back end is 5-8x slower on one dot over a long axis than on a loop over
# blocks of about this many columns: of fewer where many rows would fill the caches, and
# where there are few rows, whose products JAX 0.7 adds up one after the other.
_BLOCK = 16_384
_BLOCK_OF_FEW = 8192
_FEW = 8
_SMALLEST_BLOCK = 4096
_BLOCK_NUMBERS = 2**20


_REFUSAL = (
    "is a lazy task gradient: it lives inside one trace and only a combiner of "
    "mtl_optax can use it. Put the combiner before anything that computes with "
    "gradients (clip, adam) or wraps them (MultiSteps, apply_if_finite; for masked use "
    "mtl_optax.shared_only), call `tx.update` in the same jit-compiled function as "
    "`task_jacobian`, and return `updates`, not the task gradients; "
    "`mtl_optax.materialize(task_grads)` turns the tree into arrays of shape "
    "[T, *param.shape] that may cross a `jit` boundary."
)


class _LazyAttributeError(TypeError, AttributeError):
    """What a missing attribute of an array raises; `hasattr` still sees False."""


class _SpeakingType(type):
    """JAX names only the type of a value it refuses; so the type says what to do."""

    def __repr__(cls) -> str:
        return f"<class '{cls.__module__}.{cls.__qualname__}'>, which {_REFUSAL}"


class LazyTaskGradient(metaclass=_SpeakingType):
    """One leaf of a lazy tree of task gradients: a place in a Jacobian not yet formed.

    Opaque on purpose: it passes through anything that only moves leaves around
    (`optax.partition`, `optax.masked`, `nnx.Optimizer`), and raises in words at
    anything that would compute with it before a combiner has seen it.

    Attributes:
      operator: the Jacobian the leaf belongs to.
      index: the leaf's number among the leaves of the parameters.
      shape: ``(T, *param.shape)``, what `materialize` would give.
      dtype: the parameter's dtype.
      path: where the leaf stands in the parameters, for messages.
    """

    __slots__ = ("dtype", "index", "operator", "path", "shape")

    def __init__(
        self,
        operator: TaskJacobian,
        index: int,
        shape: tuple[int, ...],
        dtype: DType,
        path: str,
    ) -> None:
        self.operator = operator
        self.index = index
        self.shape = shape
        self.dtype = dtype
        self.path = path

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for length in self.shape:
            size *= length
        return size

    def __repr__(self) -> str:
        return (
            f"LazyTaskGradient({self.path or 'params'}, shape={self.shape}, "
            f"dtype={jnp.dtype(self.dtype).name})"
        )

    def __str__(self) -> str:
        return f"{self!r}, which {_REFUSAL}"  # messages of optax quote the value

    def __getattr__(self, name: str) -> NoReturn:
        # What only arrays have (g.mean(), g.real); probes for protocols stay plain.
        words = "" if name.startswith("_") else f": it {_REFUSAL}"
        raise _LazyAttributeError(f"{self!r} has no attribute {name!r}{words}")


def _refuse(self: LazyTaskGradient, *_: Any) -> NoReturn:
    raise TypeError(f"{self!r} {_REFUSAL}")


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv"),
    *("floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul"),
    *("neg", "pos", "abs", "lt", "le", "gt", "ge", "getitem", "len", "iter"),
    *("array", "float", "int", "index", "complex", "bool"),
):
    setattr(LazyTaskGradient, f"__{_name}__", _refuse)


def _operators(task_grads: TaskGradients) -> list[TaskJacobian]:
    """The operators of the lazy leaves, one a leaf."""
    leaves = jax.tree.leaves(task_grads)
    return [leaf.operator for leaf in leaves if isinstance(leaf, LazyTaskGradient)]


def is_lazy(task_grads: TaskGradients) -> bool:
    """Whether any leaf of the tree is lazy."""
    return bool(_operators(task_grads))


def flatten(tree: PyTree[Any]) -> tuple[list[Any], Any]:
    """`jax.tree.flatten`; typed, since JAX does not export the type of a structure."""
    leaves, treedef = jax.tree.flatten(tree)
    return leaves, treedef


def same_structure(a: Any, b: Any) -> bool:
    """Whether two tree structures (not trees) are equal."""
    return bool(a == b)


def lazy_tree(operator: TaskJacobian, params: PyTree[Any]) -> TaskGradients:
    """Makes lazy task gradients from an engine of your own.

    Every function and combiner of this package takes the tree; they ask the operator
    for a Gramian, a combination or rows, restricted to the leaves that reached them.

    Args:
      operator: anything with the members of `mtl_optax.TaskJacobian`. If it also has
        ``hold(task_mask=None)``, a method that takes a Gramian and then a combination
        takes both from what that returns: an operator that keeps what the Gramian
        leaves behind.
      params: the parameters, whose tree and shapes the result takes.

    Returns:
      a tree like `params` with lazy leaves.

    Raises:
      TypeError: if the operator lacks a member of the protocol.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> class Diagonal:  # two tasks, each the owner of one entry of one leaf
      ...     num_tasks, task_names, isolates = 2, ("a", "b"), True
      ...     losses = jnp.zeros(2)
      ...     rows = jnp.array([[2.0, 0.0], [0.0, 3.0]])
      ...     def restrict(self, leaves):
      ...         return self
      ...     def gramian(self, basis=None, task_mask=None):
      ...         rows = self.rows if basis is None else basis @ self.rows
      ...         return rows @ rows.T
      ...     def combine(self, weights):
      ...         return [weights @ self.rows]
      ...     def stack(self, *, isolated=False):
      ...         return [self.rows]
      >>> task_grads = mtl.lazy_tree(Diagonal(), {"w": jnp.zeros(2)})
      >>> tx = mtl.edm(num_tasks=2)
      >>> updates, _ = tx.update(task_grads, tx.init({"w": jnp.zeros(2)}))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['1.200', '1.200']
    """
    if not isinstance(operator, TaskJacobian):
        raise TypeError(
            f"lazy_tree: {type(operator).__name__} lacks members of "
            "mtl_optax.TaskJacobian (num_tasks, losses, task_names, isolates, gramian, "
            "combine, stack, restrict)."
        )
    paths_and_leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    lazy = [
        LazyTaskGradient(
            operator,
            index,
            (operator.num_tasks, *jnp.shape(leaf)),
            jnp.result_type(leaf),
            jax.tree_util.keystr(path),
        )
        for index, (path, leaf) in enumerate(paths_and_leaves)
    ]
    return jax.tree.unflatten(treedef, lazy)


def isolates(task_grads: TaskGradients) -> bool:
    """Whether `materialize` can keep one task's NaN out of the other rows."""
    return all(operator.isolates for operator in _operators(task_grads))


def lazy_task_names(task_grads: TaskGradients) -> tuple[str, ...] | None:
    """The tasks' names that a lazy tree knows, else None."""
    operators = _operators(task_grads)
    return operators[0].task_names if operators else None


def lazy_losses(task_grads: TaskGradients) -> Array | None:
    """The losses that a lazy tree knows, else None."""
    operators = _operators(task_grads)
    return operators[0].losses if operators else None


def state_dtype(params: PyTree[Any]) -> DType:
    """Dtype of a combiner's state: the parameters' own, float32 at least.

    Leaves without a dtype (the placeholders of `optax.tree_utils.tree_map_params`)
    are passed over.
    """
    dtypes = [
        jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        for leaf in jax.tree.leaves(params)
        if hasattr(leaf, "dtype") or isinstance(leaf, float)
    ]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return jnp.result_type(jnp.float32, *floating)


def check_structure(task_grads: TaskGradients, params: PyTree[Any]) -> None:
    """Raises unless task gradients have the tree structure of the parameters."""
    found, expected = jax.tree.structure(task_grads), jax.tree.structure(params)
    if not same_structure(found, expected):
        raise ValueError(
            "task gradients must have the structure of the parameters; expected "
            f"{expected}, got {found}."
        )


def check_task_axis(
    task_grads: TaskGradients, num_tasks: int, params: PyTree[Any] | None
) -> None:
    """Raises unless every leaf has the shape ``(num_tasks, *param.shape)``."""
    found = jax.tree_util.tree_leaves_with_path(task_grads)
    if not found:
        raise ValueError(
            "the combiner was given a tree without leaves: no task gradients reached "
            "it. Check the mask or the labels that stand before it."
        )
    if params is None:
        expected: list[Any] = [None] * len(found)
    else:
        check_structure(task_grads, params)
        expected = jax.tree.leaves(params)
    for (path, leaf), param in zip(found, expected, strict=True):
        where = f"leaf {jax.tree_util.keystr(path) or '(the whole tree)'}"
        shape = tuple(jnp.shape(leaf)) if not hasattr(leaf, "shape") else leaf.shape
        if param is None:
            good = len(shape) > 0 and shape[0] == num_tasks
            wanted = f"({num_tasks}, *param.shape)"
        else:
            wanted_shape = (num_tasks, *jnp.shape(param))
            good = tuple(shape) == wanted_shape
            wanted = str(wanted_shape)
        if good:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"{where} has dtype {leaf.dtype}; task gradients are real "
                    "floating-point numbers."
                )
            continue
        if param is not None and tuple(shape) == tuple(jnp.shape(param)):
            hint = (
                "It has the shape of the parameter itself, so the gradients are "
                "already reduced over tasks (the gradient of a summed loss, or a "
                "combiner earlier in the chain?). "
            )
        elif param is not None and tuple(shape[1:]) == tuple(jnp.shape(param)):
            hint = f"It holds {shape[0]} tasks. "
        else:
            hint = ""
        raise ValueError(
            f"{where}: expected shape {wanted}, one gradient a task with the task "
            f"first, got {tuple(shape)}. {hint}`mtl_optax.task_jacobian(loss_fn)` and "
            "`mtl_optax.stack_tasks` give task gradients in this form."
        )


def accumulator(*arrays: Array) -> DType:
    """Dtype of sums over the arrays: their own, float32 at least."""
    # By dtype: a weakly typed float64 (a Python float under x64) would give float32.
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def varies_over(aval: Any) -> frozenset[Any]:
    """Mesh axes of a `jax.shard_map` over whose devices values of this type differ.

    Empty where JAX does not track that (``check_vma=False``).
    """
    tracked = getattr(aval, "manual_axis_type", None)  # older JAX: on the type itself
    found = getattr(aval, "vma", ()) if tracked is None else tracked.varying
    return frozenset(found)


def _axes_to_sum(x: Array, axis_name: Any) -> tuple[Any, ...]:
    """Those of the mesh axes `axis_name` of which every device holds a part of `x`.

    An array that every device holds whole counts once. Where JAX does not track that,
    all arrays count as parts.
    """
    names = axis_name if isinstance(axis_name, tuple | list) else (axis_name,)
    parts = varies_over(jax.typeof(x))
    return tuple(
        name
        for name in names
        if name in parts or name not in varies_over(jax.typeof(lax.axis_index(name)))
    )


def _by_axes(
    arrays: Sequence[Array], axis_name: Any
) -> dict[tuple[Any, ...], list[Array]]:
    """Groups arrays by the axes over which what is taken of them must be summed."""
    groups: dict[tuple[Any, ...], list[Array]] = {}
    for array in arrays:
        axes = () if axis_name is None else _axes_to_sum(array, axis_name)
        groups.setdefault(axes, []).append(array)
    return groups


def on_every_device(x: Array) -> Array:
    """`x` whole on every device, where the compiler chooses (Auto axes of a mesh).

    Small arrays over tasks would else be sharded as a sharded task axis is, and every
    product in a solver's loop would go through the network.
    """
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Auto not in mesh.axis_types:
        return x
    return lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def has_explicit_mesh(aval: Any) -> bool:
    """Whether the type says how its axes lie on a mesh."""
    return AxisType.Explicit in aval.sharding.mesh.axis_types


def _explicit_mesh(x: Array) -> Any | None:
    aval = jax.typeof(x)
    return aval.sharding.mesh if has_explicit_mesh(aval) else None


def task_axis_like(x: Array, other: Array) -> Array:
    """`x` with its first axis sharded as that of `other`: `vmap` takes no mixture."""
    mesh = _explicit_mesh(x)
    if mesh is None:
        return x
    return _shard_task_axis(x, mesh, jax.typeof(other).sharding.spec[0])


def whole_task_axis(x: Array) -> Array:
    """`x` with its first axis on every device, as a `scan` over tasks needs it."""
    mesh = _explicit_mesh(x)
    return x if mesh is None else _shard_task_axis(x, mesh, None)


def _shard_task_axis(x: Array, mesh: Any, axis: Any) -> Array:
    spec = PartitionSpec(axis, *jax.typeof(x).sharding.spec[1:])
    return jax.sharding.reshard(x, NamedSharding(mesh, spec))


def present_rows(x: Array, task_mask: TaskMask | None) -> Array:
    """Rows of absent tasks become zeros, whatever stood in them."""
    if task_mask is None:
        return x
    return choose_rows(task_mask, x, jnp.zeros((), x.dtype))


def choose_rows(task_mask: TaskMask, present: Array, absent: Array) -> Array:
    """Rows of present tasks from one array, of absent ones from the other."""
    mask = task_mask.reshape((-1,) + (1,) * (present.ndim - 1))
    return jnp.where(mask, present, absent)


def _leaf_gramian(x: Array, basis: Basis | None) -> Array:
    """Gramian of one stacked leaf in one product; safe for any sharding."""
    dtype = accumulator(x)
    if basis is not None:
        x = jnp.tensordot(basis.astype(dtype), x.astype(dtype), 1, precision=HIGHEST)
    mesh = _explicit_mesh(x)
    axes = tuple(range(1, x.ndim))
    return lax.dot_general(
        x,
        x,
        ((axes, axes), ((), ())),
        precision=HIGHEST,
        preferred_element_type=dtype,
        out_sharding=None
        if mesh is None
        else NamedSharding(mesh, PartitionSpec(None, None)),
    )


def _leaf_gramian_blocked(x: Array, basis: Basis | None) -> Array:
    """Gramian of one unsharded stacked leaf, summed over blocks of its columns."""
    return _in_blocks([x], lambda rows: _leaf_gramian(rows, basis))


def _in_blocks(arrays: Sequence[Array], product: Callable[..., Array]) -> Array:
    """Sums a product of ``[rows, *shape]`` arrays over blocks of their columns."""
    flat = [_flat(x) for x in arrays]
    block = _block_of(max(x.shape[0] for x in flat))
    whole = flat[0].shape[1] // block
    if whole < 2:
        return product(*flat)
    head = whole * block

    def add_block(i: Array, total: Array) -> Array:
        start = (jnp.zeros((), i.dtype), i * block)
        blocks = [lax.dynamic_slice(x, start, (x.shape[0], block)) for x in flat]
        return total + product(*blocks)

    tail = product(*[x[:, head:] for x in flat])
    return lax.fori_loop(0, whole, add_block, tail)


def _block_of(count: int) -> int:
    """Columns that are taken at a time of so many rows."""
    if count < _FEW:
        return _BLOCK_OF_FEW
    return min(_BLOCK, max(_SMALLEST_BLOCK, _BLOCK_NUMBERS // count))


def in_columns(task_grads: TaskGradients) -> TaskGradients:
    """Stacked leaves as ``[T, n]``, for Gramians of which some are taken in loops.

    Where each loop reshaped them, XLA would make and keep them once for each form.
    """

    def flat(leaf: Any) -> Any:
        if isinstance(leaf, LazyTaskGradient):
            return leaf
        array = jnp.asarray(leaf)
        return _flat(array) if _blocks_help(array) else array

    leaves, treedef = flatten(task_grads)
    return jax.tree.unflatten(treedef, [flat(leaf) for leaf in leaves])


def _flat(x: Array) -> Float[Array, "rows n"]:
    return x.reshape(x.shape[0], -1)


def _blocks_help(x: Array) -> bool:
    # Blocks reshape a leaf, which would gather a sharded one; in a process with one
    # device nothing is sharded but by its type, and only XLA's CPU back end needs them.
    alone = jax.default_backend() == "cpu" and jax.device_count() == 1
    return alone and _explicit_mesh(x) is None


def mirrored(gram: Array) -> Array:
    """Exactly symmetric: both halves are read from one.

    A mean of both, or a choice between them, is computed twice where XLA fuses it with
    products, and rounds twice in different ways.
    """
    row = jnp.arange(gram.shape[0])
    low, high = jnp.minimum(row[:, None], row), jnp.maximum(row[:, None], row)
    return gram[low, high]


def inner_products(x: Array, y: Array) -> Array:
    """``[A, B]``: inner products of the rows of ``x [A, *s]`` with those of ``y``."""
    dtype = accumulator(x, y)
    mesh = _explicit_mesh(x)

    def product(a: Array, b: Array) -> Array:
        axes = tuple(range(1, a.ndim))
        return lax.dot_general(
            a,
            b,
            ((axes, axes), ((), ())),
            precision=HIGHEST,
            preferred_element_type=dtype,
            out_sharding=None
            if mesh is None
            else NamedSharding(mesh, PartitionSpec(None, None)),
        )

    blocks = _blocks_help(x) and _blocks_help(y)
    return _in_blocks([x, y], product) if blocks else product(x, y)


def _stacked_gramian(
    leaves: Sequence[Array], basis: Basis | None, task_mask: TaskMask | None
) -> Array:
    dtype = accumulator(*leaves)
    grams = []
    for x in leaves:
        one = _leaf_gramian_blocked if _blocks_help(x) else _leaf_gramian
        grams.append(one(present_rows(x, task_mask), basis).astype(dtype))
    total = grams[0]
    for gram in grams[1:]:
        total = total + gram
    return mirrored(total)


def cross_gramian(
    first: TaskGradients, second: TaskGradients, axis_name: Any | None = None
) -> Float[Array, "tasks tasks"]:
    """``J_1 J_2^T`` of two stacked trees of one structure; it is not symmetric.

    Inside `jax.shard_map`, `axis_name` names the axes over which leaves are sharded.
    """
    parts = []
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        axes = () if axis_name is None else _axes_to_sum(x, axis_name)
        part = inner_products(x, y)
        parts.append(lax.psum(part, axes) if axes else part)
    total = sum(parts, jnp.zeros((), accumulator(*parts)))
    return on_every_device(total)


def _by_operator(
    leaves: Sequence[Any],
) -> tuple[list[tuple[TaskJacobian, list[int]]], list[int]]:
    """Groups positions of lazy leaves by their operator; the rest is stacked."""
    groups: dict[int, tuple[TaskJacobian, list[int]]] = {}
    stacked: list[int] = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, LazyTaskGradient):
            operator = leaf.operator
            groups.setdefault(id(operator), (operator, []))[1].append(position)
        else:
            stacked.append(position)
    return list(groups.values()), stacked


def _restricted(operator: TaskJacobian, leaves: Sequence[Any]) -> TaskJacobian:
    return operator.restrict([leaf.index for leaf in leaves])


def gramian(
    task_grads: TaskGradients,
    *,
    basis: Basis | None = None,
    labels: PyTree[Hashable] | None = None,
    task_mask: TaskMask | None = None,
    axis_name: Any | None = None,
) -> Any:
    r"""Inner products of the task gradients over all leaves.

    .. math:: G_{st} = \langle g_s, g_t \rangle, \qquad G = J J^\top \in R^{T \times T}

    Use it to look at conflicts, or to build a method of your own. The products are
    taken at full precision (`jax.lax.Precision.HIGHEST`, float32 at least), leaf by
    leaf, without flattening the tree, so sharded leaves stay where they are.

    Args:
      task_grads: stacked arrays ``[T, *param.shape]``, or the lazy tree of
        `task_jacobian`, whose `mode` says how (by default layer by layer).
      basis: ``[K, T]``; the Gramian of ``basis @ J``. The combinations are formed
        *before* the inner products, so that a difference of nearly equal gradients
        is not lost to cancellation.
      labels: a tree like the parameters with one hashable label a leaf: one Gramian
        a label, each over its own leaves.
      task_mask: ``[T]`` of bools; an absent task counts as zeros, whatever (NaN
        included) stands in its stacked row. In a lazy tree a NaN may reach the other
        tasks through the network they share (`skip_nonfinite_tasks` is for that).
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which the local Gramians are summed.

    Returns:
      ``[T, T]`` (``[K, K]`` with a basis), float32 or float64, or a dict of these by
      label. In float32, norms must lie between about 1e-17 and 3e18: their squares
      vanish below (such a task then counts as one with a zero gradient) and overflow
      above (weights from such a Gramian are NaN).

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> mtl.gramian(g)
      Array([[25.,  4.],
             [ 4.,  1.]], dtype=float32)
      >>> mtl.gramian(g, basis=jnp.array([[1.0, -1.0]]))
      Array([[18.]], dtype=float32)
    """
    if labels is not None:
        return {
            label: gramian(
                chosen, basis=basis, task_mask=task_mask, axis_name=axis_name
            )
            for label, chosen in _by_label(task_grads, labels).items()
        }
    leaves = jax.tree.leaves(task_grads)
    num_tasks = _tasks_of("gramian", task_grads)
    task_mask = _mask_of("gramian", task_mask, num_tasks)
    if basis is not None:
        basis = jnp.asarray(basis)
        if basis.ndim != 2 or basis.shape[1] != num_tasks or not _is_real(basis):
            raise ValueError(
                f"gramian: basis must hold real numbers of shape [K, {num_tasks}], one "
                f"row a combination of {num_tasks} tasks; got {basis.dtype} of shape "
                f"{basis.shape}."
            )
    if axis_name is not None:
        # From rows: an operator's own Gramian goes through the losses, and so through
        # their collectives, which may have summed it already.
        return _summed_gramian(materialize(leaves), basis, task_mask, axis_name)
    groups, stacked = _by_operator(leaves)
    grams = [
        _restricted(op, [leaves[i] for i in at]).gramian(basis, task_mask)
        for op, at in groups
    ]
    if stacked:
        arrays = [jnp.asarray(leaves[i]) for i in stacked]
        given = None if basis is None else on_every_device(basis)
        grams.append(on_every_device(_stacked_gramian(arrays, given, task_mask)))
    total = grams[0]
    for gram in grams[1:]:
        total = total + gram
    return total


def _is_real(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)


def _tasks_of(caller: str, task_grads: TaskGradients) -> int:
    """The number of tasks, the same in all leaves."""
    found = jax.tree_util.tree_leaves_with_path(task_grads)
    if not found:
        raise ValueError(f"{caller}: the tree of task gradients has no leaves.")
    lengths: dict[int, str] = {}
    for path, leaf in found:
        shape = leaf.shape if hasattr(leaf, "shape") else jnp.shape(leaf)
        where = jax.tree_util.keystr(path) or "(the whole tree)"
        if not shape:
            raise ValueError(
                f"{caller}: leaf {where} is a scalar; expected task gradients of shape "
                "[T, *param.shape], one gradient a task with the task first."
            )
        lengths.setdefault(shape[0], where)
    given_pair = isinstance(task_grads, tuple) and is_lazy(task_grads)
    if given_pair and not isinstance(found[0][1], LazyTaskGradient):
        raise ValueError(
            f"{caller}: expected task gradients, got a tuple of arrays and task "
            "gradients: is it the pair (losses, task_grads) of task_jacobian? Pass its "
            "second member."
        )
    if len(lengths) > 1:
        said = ", ".join(f"{n} in leaf {where}" for n, where in lengths.items())
        raise ValueError(
            f"{caller}: the leaves differ in the number of tasks, their first axis: "
            f"{said}; expected task gradients of shape [T, *param.shape]."
        )
    return next(iter(lengths))


def _mask_of(caller: str, task_mask: Any, num_tasks: int) -> TaskMask | None:
    if task_mask is None:
        return None
    mask = jnp.asarray(task_mask)
    if mask.shape != (num_tasks,) or mask.dtype != bool:
        raise ValueError(
            f"{caller}: task_mask must hold {num_tasks} bools, one a task; got "
            f"{mask.dtype} of shape {mask.shape}."
        )
    return mask


def _weights_of(weights: Any, num_tasks: int) -> Weights:
    if isinstance(weights, Mapping | LazyTaskGradient):
        raise TypeError(
            f"weighted_sum: expected weights [{num_tasks}] first and task gradients "
            f"second, got a {type(weights).__name__} as weights."
        )
    array = jnp.asarray(weights)
    if array.shape != (num_tasks,) or not _is_real(array):
        raise ValueError(
            f"weighted_sum: weights must be {num_tasks} real numbers, one a task; got "
            f"{array.dtype} of shape {array.shape}."
        )
    return array


def _summed_gramian(
    rows: Sequence[Array], basis: Basis | None, task_mask: TaskMask | None, axis: Any
) -> Array:
    """Gramian of rows of which the devices of a `jax.shard_map` hold parts."""
    grams = [
        lax.psum(gram, axes) if axes else gram
        for axes, arrays in _by_axes(rows, axis).items()
        for gram in [_stacked_gramian(arrays, basis, task_mask)]
    ]
    dtype = accumulator(*grams)
    return sum((gram.astype(dtype) for gram in grams), jnp.zeros((), dtype))


def _by_label(
    task_grads: TaskGradients, labels: PyTree[Hashable]
) -> dict[Hashable, list[Any]]:
    leaves, treedef = flatten(task_grads)
    label_leaves, label_treedef = flatten(labels)
    if not same_structure(treedef, label_treedef):
        raise ValueError(
            "gramian: labels must have the structure of the task gradients; expected "
            f"{treedef}, got {label_treedef}."
        )
    groups: dict[Hashable, list[Any]] = {}
    for leaf, label in zip(leaves, label_leaves, strict=True):
        groups.setdefault(label, []).append(leaf)
    return groups


def mix_rows(weights: Array, x: Array, *, widen: bool = False) -> Array:
    """Mixes the rows of one stacked leaf by ``weights [T]``, or K times by ``[T, K]``.

    The result has the leaf's dtype; with `widen`, that of the sum (float32 at least).
    """
    dtype = accumulator(x)
    mesh = _explicit_mesh(x)
    out = lax.dot_general(
        weights.astype(dtype),
        x,
        (((0,), (0,)), ((), ())),
        precision=HIGHEST,
        preferred_element_type=dtype,
        out_sharding=None
        if mesh is None
        else NamedSharding(
            mesh,
            PartitionSpec(
                *[None] * (weights.ndim - 1), *jax.typeof(x).sharding.spec[1:]
            ),
        ),
    )
    return out if widen else out.astype(x.dtype)


def weighted_sum(
    weights: Weights,
    task_grads: TaskGradients,
    *,
    task_mask: TaskMask | None = None,
) -> Updates:
    r"""Combines task gradients with given weights into one tree like the parameters.

    .. math:: u = \sum_t w_t g_t = J^\top w

    Args:
      weights: ``[T]``.
      task_grads: stacked or lazy; a lazy tree costs one backward pass.
      task_mask: ``[T]`` of bools; absent tasks are left out. A NaN in an absent
        stacked row does no harm; in a lazy tree it may reach the others through the
        network they share (`skip_nonfinite_tasks` is for that).

    Returns:
      a tree like the parameters, each leaf in its own dtype (accumulated in float32
      at least).

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> g = {"w": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> mtl.weighted_sum(jnp.array([0.5, 2.0]), g)
      {'w': Array([1.5, 4. ], dtype=float32)}
    """
    num_tasks = _tasks_of("weighted_sum", task_grads)
    weights = _weights_of(weights, num_tasks)
    task_mask = _mask_of("weighted_sum", task_mask, num_tasks)
    if task_mask is not None:
        weights = jnp.where(task_mask, weights, jnp.zeros((), weights.dtype))
    leaves, treedef = flatten(task_grads)
    groups, stacked = _by_operator(leaves)
    out: list[Any] = [None] * len(leaves)
    for operator, at in groups:
        combined = _restricted(operator, [leaves[i] for i in at]).combine(weights)
        for position, array in zip(at, combined, strict=True):
            out[position] = array
    for position in stacked:
        rows = present_rows(jnp.asarray(leaves[position]), task_mask)
        out[position] = mix_rows(on_every_device(weights), rows)
    return jax.tree.unflatten(treedef, out)


def hold(task_grads: TaskGradients, task_mask: TaskMask | None = None) -> TaskGradients:
    """The same task gradients, of which a later `weighted_sum` may be cheaper.

    For whoever takes a Gramian and then a combination: an operator with a method
    ``hold`` keeps what its Gramian leaves behind, if that is worth its memory.
    """

    def held(operator: Any) -> TaskJacobian:
        keeps = callable(getattr(operator, "hold", None))
        return operator.hold(task_mask) if keeps else operator

    return with_operators(task_grads, held)


def with_operators(
    task_grads: TaskGradients, change: Callable[[TaskJacobian], TaskJacobian]
) -> TaskGradients:
    """The same leaves, the lazy ones of other operators; stacked ones stay as they are.

    What is changed is an operator seen only at the leaves that are there.
    """
    leaves, treedef = flatten(task_grads)
    out = list(leaves)
    for operator, at in _by_operator(leaves)[0]:
        changed = change(_restricted(operator, [leaves[i] for i in at]))
        for i in at:
            leaf = leaves[i]
            out[i] = LazyTaskGradient(
                changed, leaf.index, leaf.shape, leaf.dtype, leaf.path
            )
    return jax.tree.unflatten(treedef, out)


def materialize(task_grads: TaskGradients, *, isolated: bool = False) -> TaskGradients:
    """Turns a lazy tree into stacked arrays ``[T, *param.shape]``.

    For methods that look at every entry, and for taking task gradients out of a
    `jit`-compiled function. It costs one backward pass a task and stores the whole
    Jacobian; stacked leaves are returned as they are.

    Args:
      task_grads: lazy or stacked.
      isolated: take every task's gradient from its own loss alone, so that a NaN in
        one task cannot reach the rows of the others (`skip_nonfinite_tasks` uses
        it). Needs a ``loss_fn`` that returns a tuple, list or dict of scalars.

    Returns:
      a tree of arrays ``[T, *param.shape]``.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> losses_fn = lambda w: (w @ w, w.sum())
      >>> _, task_grads = mtl.task_jacobian(losses_fn)(jnp.array([1.0, 2.0]))
      >>> mtl.materialize(task_grads)
      Array([[2., 4.],
             [1., 1.]], dtype=float32)
    """
    leaves, treedef = flatten(task_grads)
    groups, _ = _by_operator(leaves)
    out = list(leaves)
    for operator, at in groups:
        rows = _restricted(operator, [leaves[i] for i in at]).stack(isolated=isolated)
        for position, array in zip(at, rows, strict=True):
            out[position] = array
    return jax.tree.unflatten(treedef, out)


def all_finite(tree: PyTree[Any]) -> Array:
    """Scalar bool: every entry of every floating-point leaf is finite."""
    flags = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.ones((), bool)


def finite_rows(task_grads: TaskGradients) -> TaskMask:
    """``[T]`` of bools: the stacked rows in which every entry is finite."""
    flags = [
        jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim)))
        for g in jax.tree.leaves(task_grads)
    ]
    return jnp.all(jnp.stack(flags), axis=0)


def norm(tree: PyTree[Any], axis_name: Any | None = None) -> Float[Array, ""]:
    """Euclidean length of a tree, safe for entries whose squares leave float32.

    Inside `jax.shard_map`, `axis_name` names the axes over which leaves are sharded.
    """
    leaves = jax.tree.leaves(tree)
    dtype = accumulator(*leaves)
    largest = jnp.max(
        jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(dtype) for x in leaves])
    )
    if axis_name is not None:
        # Also over arrays that every device holds whole: their largest is the same.
        largest = lax.pmax(largest, axis_name)
    unit = jnp.where(largest > 0, largest, jnp.ones((), dtype))
    total = jnp.zeros((), dtype)
    for axes, arrays in _by_axes(leaves, axis_name).items():
        squares = [jnp.sum(jnp.square(x.astype(dtype) / unit)) for x in arrays]
        part = jnp.sum(jnp.stack(squares))
        total = total + (lax.psum(part, axes) if axes else part)
    return unit * jnp.sqrt(total)


def scale_tree(factor: Array, tree: PyTree[Any]) -> Any:
    """``factor * tree`` in the wider dtype, each leaf returned in its own."""
    return jax.tree.map(
        lambda x: (factor * x.astype(jnp.result_type(factor.dtype, x.dtype))).astype(
            x.dtype
        ),
        tree,
    )


def select(pred: Array, on_true: PyTree[Any], on_false: PyTree[Any]) -> PyTree[Any]:
    """Leafwise ``where`` with one scalar predicate."""
    return jax.tree.map(lambda a, b: jnp.where(pred, a, b), on_true, on_false)


def path_names(path: Sequence[Any], *, variables: bool = False) -> tuple[str, ...]:
    """A leaf's place by names alone, the same in a dict and in other containers.

    With `variables`, the place of the variable that holds the leaf, if one does.
    """
    if variables and path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def one_level(tree: PyTree[Any]) -> tuple[list[str], list[Any], Callable[..., Any]]:
    """Names, children and rebuilding function of a container's first level."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is not tree
    )
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in paths]

    def rebuild(children: Sequence[Any]) -> Any:
        return jax.tree.unflatten(treedef, children)

    return names, [child for _, child in paths], rebuild


def stack_tasks(grads: Mapping[str, PyTree[Any]] | Sequence[PyTree[Any]]) -> Updates:
    """Stacks one gradient tree a task into one tree with a leading task axis.

    For code that already holds its gradients by task, as ``{"ics": g, "residual": g}``
    in physics-informed training.

    Args:
      grads: a dict, list or tuple of gradient trees of one structure. The task order
        is pytree order: the **sorted** keys of a dict, whatever order it was written
        in (so ``"t10"`` comes before ``"t2"``); an `OrderedDict` keeps its own.

    Returns:
      a tree with leaves ``[T, *param.shape]``.

    Raises:
      ValueError: without tasks, or when two trees differ in structure or shape.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> grads = {"residual": {"w": jnp.zeros(3)}, "ics": {"w": jnp.ones(3)}}
      >>> mtl.stack_tasks(grads)["w"]
      Array([[1., 1., 1.],
             [0., 0., 0.]], dtype=float32)
    """
    names, trees, _ = one_level(grads)
    if not trees or (len(trees) == 1 and trees[0] is grads):
        raise ValueError(
            "stack_tasks: expected a dict, list or tuple with one gradient tree a "
            f"task, got {type(grads).__name__} without tasks."
        )
    first, treedef = jax.tree_util.tree_flatten_with_path(trees[0])
    for name, tree in zip(names[1:], trees[1:], strict=True):
        leaves, other = flatten(tree)
        if not same_structure(other, treedef):
            raise ValueError(
                f"stack_tasks: the gradients of task {name!r} have the structure "
                f"{other}, those of task {names[0]!r} {treedef}."
            )
        for (path, expected), leaf in zip(first, leaves, strict=True):
            if jnp.shape(leaf) != jnp.shape(expected):
                raise ValueError(
                    f"stack_tasks: leaf {jax.tree_util.keystr(path)} of task {name!r} "
                    f"has shape {jnp.shape(leaf)}, that of task {names[0]!r} "
                    f"{jnp.shape(expected)}."
                )
    return jax.tree.map(lambda *rows: jnp.stack(rows), *trees)


def unstack_tasks(
    task_grads: TaskGradients, like: Mapping[str, Any] | Sequence[Any] | None = None
) -> Any:
    """The inverse of `stack_tasks`: one gradient tree a task.

    Args:
      task_grads: stacked or lazy (a lazy tree is materialised).
      like: a dict, list or tuple with one entry a task, whose form the result takes,
        e.g. the dict of losses. A list of strings names the tasks in pytree order
        (sorted). Default: a list.

    Returns:
      a dict or list of trees like the parameters.

    Raises:
      ValueError: when `like` does not hold one entry a task.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> rows = {"w": jnp.array([[1.0], [0.0]])}
      >>> mtl.unstack_tasks(rows, like={"residual": 0, "ics": 0})["ics"]
      {'w': Array([1.], dtype=float32)}
    """
    stacked = materialize(task_grads)
    leaves = jax.tree.leaves(stacked)
    if not leaves:
        raise ValueError("unstack_tasks: the tree of task gradients has no leaves.")
    num_tasks = leaves[0].shape[0]
    trees = [jax.tree.map(lambda g, t=t: g[t], stacked) for t in range(num_tasks)]
    if like is None:
        return trees
    if not isinstance(like, Mapping) and all(isinstance(n, str) for n in like):
        like = dict.fromkeys(like)
    names, _, rebuild = one_level(like)
    if len(names) != num_tasks:
        raise ValueError(
            f"unstack_tasks: the gradients hold {num_tasks} tasks, `like` names "
            f"{len(names)}: {names}."
        )
    return rebuild(trees)
