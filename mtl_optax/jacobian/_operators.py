"""The Jacobian of the task losses as a linear operator that is never stored.

Three operators share one protocol (`mtl_optax._types.TaskJacobian`): several losses of
one batch, one batch a task, and a Jacobian of which something is held.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from mtl_optax._some_tasks import PickedTasks
from mtl_optax._tree import (
    HIGHEST,
    gramian,
    in_columns,
    mirrored,
    mix_rows,
    present_rows,
    scale_tree,
)
from mtl_optax._types import Basis, Losses, TaskJacobian, TaskMask, Weights
from mtl_optax.jacobian._layerwise import (
    Digests,
    Layers,
    combine_late,
    digest_sweep,
    run_layers,
    sweep_combination,
    sweep_gramian,
    sweep_gramian_in_basis,
    sweep_layers,
    sweeps_are_large,
)
from mtl_optax.jacobian._plan import LeafPlan, plan_leaves
from mtl_optax.jacobian._probes import Products
from mtl_optax.jacobian._trace import Traits, open_jaxpr
from mtl_optax.jacobian._uses import Found

Mode: TypeAlias = Literal["layerwise", "vmap", "unroll", "map"]
RowMode: TypeAlias = Literal["vmap", "unroll", "map"]

# Up to this many tasks a Python loop compiles fast and runs fastest on CPU.
UNROLL = 4

# Up to this many, compiling them one by one is worth what it saves on CPU.
_UNROLL_CONVOLUTIONS = 64
_UNROLL_SCATTERS = 16

# Meeting in pairs, more sweeps than these cost more than a backward and a forward pass
# for every task.
_PAIRED = 7

# What a Gramian leaves behind is held for the combination up to this size, and up to
# so many tasks: a backward pass is then less than 4 % of the step.
_HELD_BYTES = 384 * 2**20
_HELD_TASKS = 16

# Rows of parameters that are no layers' are stored up to this size, where tasks are
# swept a few at a time.
_ROWS_BYTES = 64 * 2**20


def map_rows(
    fn: Callable[[Any], Any],
    rows: PyTree[Array],
    mode: RowMode,
    batch_size: int | None = None,
) -> Any:
    """Applies `fn` to every row of `rows`, in one of the three ways.

    With `batch_size`, to so many at once.
    """
    length = jax.tree.leaves(rows)[0].shape[0]
    if mode == "unroll":
        outs = [fn(jax.tree.map(lambda r, i=i: r[i], rows)) for i in range(length)]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)
    if mode == "map" or (batch_size is not None and batch_size < length):
        return lax.map(fn, rows, batch_size=batch_size)
    return jax.vmap(fn)(rows)


def split_unit(weights: Weights, losses: Losses) -> tuple[Array, Array]:
    """Largest magnitude of the weights, and the weights relative to it.

    A float16 cotangent far from 1 would overflow or vanish on its way back, so what
    goes through the network is at most 1 and the rest is applied afterwards.
    """
    largest = jnp.max(jnp.abs(weights), axis=-1)
    unit = jnp.where(largest > 0, largest, jnp.ones((), weights.dtype))
    return unit, like_losses(weights / unit[..., None], losses)


def like_losses(array: Array, losses: Losses) -> Array:
    """The array in the losses' dtype, and varying over the mesh axes they vary over.

    Inside `jax.shard_map` a cotangent must vary as its output does.
    """
    return array.astype(losses.dtype) + jnp.zeros_like(losses)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BaseJacobian:
    """What both operators share.

    Attributes:
      params: where the Jacobian is taken.
      losses: there.
      pullback: ``cotangent [T] -> gradient``, sharing the forward pass of `losses`; a
        combination costs what plain training costs.
      leaves: the leaves it is restricted to.
    """

    params: PyTree[Array]
    losses: Losses
    pullback: Callable[[Array], PyTree[Array]]
    task_names: tuple[str, ...]
    leaves: tuple[int, ...]

    @property
    def num_tasks(self) -> int:
        return len(self.task_names)

    def restrict(self, leaves: Sequence[int]) -> Self:
        return dataclasses.replace(self, leaves=tuple(leaves))

    def combine(self, weights: Weights) -> list[Array]:
        unit, cotangent = split_unit(weights, self.losses)
        return scale_tree(unit, self._pick(self.pullback(cotangent)))

    def _pick(self, grads: PyTree[Array]) -> list[Array]:
        leaves = jax.tree.leaves(grads)
        return [leaves[index] for index in self.leaves]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class JointJacobian(BaseJacobian):
    """Several losses of one batch: ``function(params) -> [T]``.

    Attributes:
      function: the losses as a function of the parameters alone.
      single: ``(params, t) -> scalar``, the loss of task ``t`` with no other loss in
        its graph; None where the losses came as one array.
      traced: `function` of the parameters' leaves as a jaxpr.
      traits: what can be read off it.
      found: how it uses each parameter.
      products: what the products of its forward pass gave, for other passes; empty
        where no parameter is a layer's, and outside of a trace, where every pass
        computes its own.
      mode: how the Gramian and rows are taken; None chooses.
      batch_size: how many tasks are swept at once; None for all.
      late: whether a combination follows a Gramian of sweeps that are large, and so
        keeps little of the forward pass till then; `hold` says it.
    """

    function: Callable[[PyTree[Array]], Array]
    single: Callable[[PyTree[Array], int], Array] | None
    traced: Any
    traits: Traits
    found: Found
    products: Products
    mode: Mode | None = None
    batch_size: int | None = None
    late: bool = False

    @property
    def isolates(self) -> bool:
        return self.single is not None

    def combine(self, weights: Weights) -> list[Array]:
        if not self.late:
            return super().combine(weights)
        unit, cotangent = split_unit(weights, self.losses)
        grads = combine_late(self.traced, self._params, self.products, cotangent)
        return scale_tree(unit, [grads[leaf] for leaf in self.leaves])

    def stack(self, *, isolated: bool = False) -> list[Array]:
        if isolated and self.single is not None:
            single = self.single
            rows = [
                self._pick(jax.grad(lambda p, t=t: single(p, t))(self.params))
                for t in range(self.num_tasks)
            ]
            return [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]
        return self.rows(like_losses(jnp.eye(self.num_tasks), self.losses))

    def rows(self, cotangents: Array) -> list[Array]:
        """One row for each of the cotangents ``[K, T]``."""
        return map_rows(
            lambda e: self._pick(self.pullback(e)),
            cotangents,
            self._row_mode(cotangents.shape[0]),
            self.batch_size,
        )

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        if self.by_layer:
            return self._by_layer(basis, task_mask)
        if self.takes_columns:
            return self._columns(basis, task_mask)
        return gramian(self.stack(), basis=basis, task_mask=task_mask)

    def hold(self, task_mask: TaskMask | None = None) -> TaskJacobian:
        """The same Jacobian, holding what saves a later combination a backward pass.

        That is all rows where they are stored anyway, and the cotangents of the layers
        where there are few.
        """
        if self.stores_rows:
            return hold_rows(self, task_mask)
        plans = self.plans
        if not self.holds(plans):
            return self.after_large_sweeps(plans, self.num_tasks)
        basis = like_losses(jnp.eye(self.num_tasks), self.losses)
        return hold_sweep(self, task_mask, *self.sweep(plans, basis))

    def pick(self, tasks: Int[Array, " few"]) -> "PickedJoint":
        """Some tasks alone: as many cotangents."""
        return PickedJoint(self, tasks)

    @property
    def stores_rows(self) -> bool:
        """Whether all rows are in memory at once."""
        if self.mode == "map":
            return not self.takes_columns
        if self.mode is None and self.batch_size is not None and not self.takes_columns:
            # Where there are hardly any layers, pairs of sweeps save nothing.
            plans = self.plans
            rows = sum(plan.left for plan in plans if plan.way == "direct")
            return rows <= _ROWS_BYTES and 2 * rows > sum(plan.left for plan in plans)
        return self.mode in ("vmap", "unroll")

    @property
    def by_layer(self) -> bool:
        """Whether the Gramian is taken from what layers see."""
        return not (self.stores_rows or self.takes_columns)

    @property
    def takes_columns(self) -> bool:
        """Whether the Gramian is taken a few columns at a time.

        Columns need forward mode, and are not exact in low precision.
        """
        if self.traits.low_precision or self.traits.reverse_only:
            return False
        if self.mode is None and self.batch_size is not None:
            return self.num_tasks > _PAIRED * self.batch_size
        return self.mode == "map"

    def holds(self, plans: Sequence[LeafPlan], count: int | None = None) -> bool:
        """Whether `hold` keeps what layers leave behind of so many tasks, or of all."""
        small = sum(plan.left for plan in plans) <= _HELD_BYTES
        swept = self.num_tasks if count is None else count
        few = swept <= _HELD_TASKS and self.batch_size is None
        return self.mode is None and few and small

    @property
    def plans(self) -> tuple[LeafPlan, ...]:
        """What is done for each leaf when the Gramian is taken layer by layer."""
        return self.plans_for(self.num_tasks)

    def plans_for(self, count: int) -> tuple[LeafPlan, ...]:
        """The same, where so many tasks are swept."""
        return plan_leaves(self.found, self.leaves, self._params, count)

    @property
    def _params(self) -> list[Array]:
        return [jnp.asarray(param) for param in jax.tree.leaves(self.params)]

    @property
    def _unrolls(self) -> bool:
        """Whether tasks are swept one by one: what XLA does badly on CPU."""
        if self.traits.ragged:
            return True
        most = _UNROLL_SCATTERS if self.traits.scatters else 0
        most = _UNROLL_CONVOLUTIONS if self.traits.convolves else most
        return self.num_tasks <= most and jax.default_backend() == "cpu"

    def _layers(self, plans: Sequence[LeafPlan], *, taps: int | None = None) -> Layers:
        return run_layers(self.traced, self._params, plans, self.products, taps=taps)

    def after_large_sweeps(self, plans: Sequence[LeafPlan], count: int) -> Self:
        """The same, whose combinations follow a Gramian of so many sweeps.

        Effects, such as printing, are not repeated for it.
        """
        at_once = self.by_layer and self.batch_size is None and not self._unrolls
        can_wait = bool(self.products) and not open_jaxpr(self.traced).effects
        late = at_once and can_wait and sweeps_are_large(self.traced, plans, count)
        return dataclasses.replace(self, late=late)

    def sweep(
        self, plans: Sequence[LeafPlan], cotangents: Array
    ) -> tuple[Layers, Digests]:
        """What a forward pass and a sweep of the cotangents ``[K, T]`` leave behind."""
        layers = self._layers(plans)
        return layers, self._sweep(layers, cotangents)

    def _sweep(self, layers: Layers, cotangents: Array) -> Digests:
        swept = (
            map_rows(layers.pullback, cotangents, "unroll")
            if self._unrolls
            else sweep_layers(layers, cotangents)
        )
        return digest_sweep(layers, swept)

    def _by_layer(self, basis: Basis | None, task_mask: TaskMask | None) -> Array:
        cotangents = jnp.eye(self.num_tasks) if basis is None else basis
        unit, cotangents = split_unit(cotangents, self.losses)
        if task_mask is not None:
            zero = jnp.zeros((), cotangents.dtype)
            cotangents = jnp.where(task_mask, cotangents, zero)
        count = cotangents.shape[0]
        if self.batch_size is not None and self.batch_size < count:
            layers = self._layers(self.plans)
            gram = _in_pairs(
                layers, lambda c: self._sweep(layers, c), cotangents, self.batch_size
            )
        elif self._unrolls:
            layers = self._layers(self.plans)
            digests = self._sweep(layers, cotangents)
            gram = sweep_gramian(layers, digests, digests)
        else:
            layers = self._layers(self.plans, taps=count)
            swept = sweep_layers(layers, cotangents)
            digests = digest_sweep(layers, swept)
            gram = swept.gram + sweep_gramian(layers, digests, digests)
        gram = jnp.broadcast_to(gram, (count, count))
        if task_mask is not None and basis is None:
            both = task_mask[:, None] & task_mask[None, :]
            gram = jnp.where(both, gram, jnp.zeros((), gram.dtype))
        unit = unit.astype(gram.dtype)
        gram = unit[:, None] * gram * unit[None, :]
        return mirrored(gram)

    def _columns(self, basis: Basis | None, task_mask: TaskMask | None) -> Array:
        """``C J (C J)^T``, a column ``J (J^T c)`` at a time: one row in memory."""
        flat, treedef = jax.tree.flatten(self.params)

        def function(chosen: list[Array]) -> Array:
            merged = list(flat)
            for index, leaf in zip(self.leaves, chosen, strict=True):
                merged[index] = leaf
            return self.function(jax.tree.unflatten(treedef, merged))

        chosen = [flat[index] for index in self.leaves]
        dtype = self.losses.dtype
        combine = jnp.eye(self.num_tasks) if basis is None else basis
        combine = like_losses(combine, self.losses)
        if task_mask is not None:
            combine = jnp.where(task_mask, combine, jnp.zeros((), dtype))
        # Traced anew at full precision: on accelerators the losses' own products may
        # run in TF32 or bfloat16, which a Gramian of near-parallel rows can't bear.
        with jax.default_matmul_precision("highest"):
            _, pullback = jax.vjp(function, chosen)
            _, pushforward = jax.linearize(function, chosen)
        columns = map_rows(
            lambda c: pushforward(*pullback(c)), combine, "map", self.batch_size
        )
        if task_mask is not None:
            columns = jnp.where(task_mask, columns, jnp.zeros((), dtype))
        gram = jnp.matmul(columns, combine.T, precision=HIGHEST)
        return mirrored(gram)

    def _row_mode(self, count: int) -> RowMode:
        if self.mode is not None and self.mode != "layerwise":
            return self.mode
        few = count <= UNROLL and self.batch_size is None
        return "unroll" if few or self.traits.ragged else "vmap"


def _in_pairs(
    layers: Layers,
    sweep: Callable[[Array], Digests],
    cotangents: Array,
    batch_size: int,
) -> Array:
    """The Gramian from sweeps of a few cotangents, two of them in memory at a time.

    Every pair of sweeps meets once, so with n of them n (n + 1) / 2 are run.
    """
    count = cotangents.shape[0]
    n = -(-count // batch_size)
    padded = jnp.pad(cotangents, ((0, n * batch_size - count), (0, 0)))
    chunks = padded.reshape(n, batch_size, -1)
    dtype = jnp.result_type(jnp.float32, cotangents.dtype)

    def put(total: Array, block: Array, i: Any, j: Any) -> Array:
        block = jnp.broadcast_to(block.astype(dtype), (batch_size, batch_size))
        return lax.dynamic_update_slice(total, block, (i * batch_size, j * batch_size))

    def row(total: Array, i: Array) -> tuple[Array, None]:
        left = sweep(chunks[i])

        def meet(total: Array, j: Array) -> tuple[Array, None]:
            def block(total: Array) -> Array:
                return put(total, sweep_gramian(layers, left, sweep(chunks[j])), i, j)

            # A `cond` of a static loop, since one of unknown length has no gradient.
            return lax.cond(j > i, block, lambda total: total, total), None

        total = put(total, sweep_gramian(layers, left, left), i, i)
        return lax.scan(meet, total, jnp.arange(n))

    start = jnp.zeros((n * batch_size, n * batch_size), dtype)
    gram = lax.scan(row, start, jnp.arange(n))[0]
    block = jnp.arange(n * batch_size) // batch_size
    gram = jnp.where(block[:, None] <= block[None, :], gram, gram.T)
    return gram[:count, :count]


def present(rows: Any, task_mask: TaskMask | None) -> Any:
    """Zeros for absent tasks, whatever overflowed there: a weight of 0 keeps NaN."""
    return jax.tree.map(lambda x: present_rows(x, task_mask), rows)


@dataclasses.dataclass(frozen=True, eq=False)
class PickedJoint(PickedTasks):
    """Some tasks of several losses of one batch."""

    base: JointJacobian

    @property
    def leaves(self) -> tuple[int, ...]:
        return self.base.leaves

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        if self.base.stores_rows:
            return gramian(self.stack(), basis=basis, task_mask=task_mask)
        return super().gramian(basis, task_mask)

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated
        return self.base.rows(self._cotangents)

    def hold(self, task_mask: TaskMask | None = None) -> TaskJacobian:
        """As that of all tasks."""
        if self.base.stores_rows:
            return hold_rows(self, task_mask)
        plans = self.base.plans_for(self.num_tasks)
        if not self.base.holds(plans, self.num_tasks):
            base = self.base.after_large_sweeps(plans, self.num_tasks)
            return dataclasses.replace(self, base=base)
        swept = self.base.sweep(plans, self._cotangents)
        return hold_sweep(self, task_mask, *swept)

    @property
    def _cotangents(self) -> Array:
        return like_losses(self.spread(jnp.eye(self.num_tasks)), self.base.losses)


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A Jacobian of which something is held; rows are those of `base`."""

    base: "JointJacobian | SeparateJacobian | PickedJoint"

    @property
    def num_tasks(self) -> int:
        return self.base.num_tasks

    @property
    def losses(self) -> Losses:
        return self.base.losses

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.base.task_names

    @property
    def isolates(self) -> bool:
        return self.base.isolates

    def stack(self, *, isolated: bool = False) -> list[Array]:
        return self.base.stack(isolated=isolated)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldRows(Held):
    """All rows are held; `columns` are the same rows, `in_columns`."""

    rows: list[Array]
    columns: list[Array]

    def restrict(self, leaves: Sequence[int]) -> "HeldRows":
        at = [self.base.leaves.index(leaf) for leaf in leaves]
        rows, columns = [self.rows[k] for k in at], [self.columns[k] for k in at]
        return HeldRows(self.base.restrict(leaves), rows, columns)

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        return gramian(self.columns, basis=basis, task_mask=task_mask)

    def combine(self, weights: Weights) -> list[Array]:
        return [mix_rows(weights, rows) for rows in self.rows]


def hold_rows(
    base: "JointJacobian | SeparateJacobian | PickedJoint", task_mask: TaskMask | None
) -> HeldRows:
    """A Jacobian with its rows held."""
    rows: list[Array] = present(base.stack(), task_mask)
    columns: list[Array] = in_columns(rows)
    return HeldRows(base, rows, columns)


@dataclasses.dataclass(frozen=True, eq=False)
class HeldSweep(Held):
    """What one sweep of all tasks left behind is held.

    Attributes:
      layers, digests: see `sweep`.
      columns: the digests again, `in_columns`.
    """

    layers: Layers
    digests: Digests
    columns: Digests

    def restrict(self, leaves: Sequence[int]) -> "HeldSweep":
        at = [self.base.leaves.index(leaf) for leaf in leaves]
        layers = self.layers._replace(plans=tuple(self.layers.plans[k] for k in at))
        digests, columns = [self.digests[k] for k in at], [self.columns[k] for k in at]
        return HeldSweep(self.base.restrict(leaves), layers, digests, columns)

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        if basis is not None:
            columns = present(self.columns, task_mask)
            if task_mask is not None:
                basis = jnp.where(task_mask, basis, jnp.zeros((), basis.dtype))
            count = basis.shape[0]
            gram = sweep_gramian_in_basis(self.layers, self.digests, columns, basis)
            return mirrored(jnp.broadcast_to(gram, (count, count)))
        gram = sweep_gramian(self.layers, self.digests, self.digests)
        gram = jnp.broadcast_to(gram, (self.num_tasks, self.num_tasks))
        if task_mask is not None:
            both = task_mask[:, None] & task_mask[None, :]
            gram = jnp.where(both, gram, jnp.zeros((), gram.dtype))
        return mirrored(gram)

    def combine(self, weights: Weights) -> list[Array]:
        unit, weights = split_unit(weights, self.losses)
        combined = sweep_combination(self.layers, self.digests, self.columns, weights)
        return scale_tree(unit, combined)


def hold_sweep(
    base: "JointJacobian | PickedJoint",
    task_mask: TaskMask | None,
    layers: Layers,
    digests: Digests,
) -> HeldSweep:
    """A Jacobian with the digests of its sweep held."""
    digests = present(digests, task_mask)
    columns: Digests = in_columns(digests)
    return HeldSweep(base, layers, digests, columns)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SeparateJacobian(BaseJacobian):
    """One batch a task: ``function(params, batch[t]) -> scalar``.

    Every row runs forward and backward on its own batch only, so the Gramian is taken
    from the rows: a column ``J (J^T c)`` would run every batch for every task.

    Attributes:
      function: the loss of one task as a function of the parameters and its batch.
      batches: the mapped arguments, task axis first.
      mode: how rows are taken; None chooses.
      batch_size: how many tasks are swept at once; None for all.
    """

    function: Callable[[PyTree[Array], Any], Array]
    batches: Any
    mode: Mode | None = None
    batch_size: int | None = None

    isolates = True
    stores_rows = True

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated  # rows never share a graph here
        row = jax.grad(self.function)
        return map_rows(
            lambda batch: self._pick(row(self.params, batch)),
            self.batches,
            "vmap" if self.mode is None or self.mode == "layerwise" else self.mode,
            self.batch_size,
        )

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        return gramian(self.stack(), basis=basis, task_mask=task_mask)

    def hold(self, task_mask: TaskMask | None = None) -> TaskJacobian:
        """The same Jacobian with its rows held: a Gramian stores them anyway."""
        return hold_rows(self, task_mask)

    def pick(self, tasks: Int[Array, " few"]) -> "SeparateJacobian":
        """Some tasks alone, on their own batches."""
        batches = jax.tree.map(lambda x: x[tasks], self.batches)
        each = jax.vmap(self.function, in_axes=(None, 0))

        def pullback(cotangent: Array) -> PyTree[Array]:
            # Another forward pass: that of all tasks goes back through all of them.
            _, vjp = jax.vjp(lambda params: each(params, batches), self.params)
            return vjp(cotangent)[0]

        return dataclasses.replace(
            self,
            batches=batches,
            losses=self.losses[tasks],
            pullback=pullback,
            task_names=tuple(str(place) for place in range(tasks.shape[0])),
        )
