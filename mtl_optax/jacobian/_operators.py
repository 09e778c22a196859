"""The Jacobian of the task losses as a linear operator that is never stored.

Two operators share one protocol (`mtl_optax._types.TaskJacobian`): several losses of
one batch, and one batch a task.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from mtl_optax._tree import HIGHEST, gramian, scale_tree
from mtl_optax._types import Basis, Losses, TaskMask, Weights
from mtl_optax.jacobian._trace import Traits

Mode: TypeAlias = Literal["vmap", "unroll", "map"]

# Up to this many tasks a Python loop compiles fast and runs fastest on CPU.
UNROLL = 4

# Rows of so few tasks are stored for the Gramian up to this size: twice as fast as
# columns (measured on an MLP of 2M parameters, 2.0 against 4.1 plain steps for T = 2).
_STORED_BYTES = 64 * 2**20


def map_rows(fn: Callable[[Any], Any], rows: PyTree[Array], mode: Mode) -> Any:
    """Applies `fn` to every row of `rows`, in one of the three ways."""
    if mode == "vmap":
        return jax.vmap(fn)(rows)
    if mode == "map":
        return lax.map(fn, rows)
    length = jax.tree.leaves(rows)[0].shape[0]
    outs = [fn(jax.tree.map(lambda r, i=i: r[i], rows)) for i in range(length)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def split_unit(weights: Weights, losses: Losses) -> tuple[Array, Array]:
    """Largest magnitude of the weights, and the weights relative to it.

    A float16 cotangent far from 1 would overflow or vanish on its way back, so what
    goes through the network is at most 1 and the rest is applied afterwards.
    """
    largest = jnp.max(jnp.abs(weights))
    unit = jnp.where(largest > 0, largest, jnp.ones((), weights.dtype))
    return unit, like_losses(weights / unit, losses)


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
      mode: how rows are swept; None chooses.
      leaves: the leaves it is restricted to.
    """

    params: PyTree[Array]
    losses: Losses
    pullback: Callable[[Array], PyTree[Array]]
    task_names: tuple[str, ...]
    mode: Mode | None
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
      traits: what can be read off the traced losses.
    """

    function: Callable[[PyTree[Array]], Array]
    single: Callable[[PyTree[Array], int], Array] | None
    traits: Traits

    @property
    def isolates(self) -> bool:
        return self.single is not None

    def stack(self, *, isolated: bool = False) -> list[Array]:
        if isolated and self.single is not None:
            single = self.single
            rows = [
                self._pick(jax.grad(lambda p, t=t: single(p, t))(self.params))
                for t in range(self.num_tasks)
            ]
            return [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]
        basis = like_losses(jnp.eye(self.num_tasks), self.losses)
        mode = self._mode("vmap")
        return map_rows(lambda e: self._pick(self.pullback(e)), basis, mode)

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        by_rows = self.traits.low_precision or self.traits.reverse_only
        if by_rows or self._stores_rows():
            return gramian(self.stack(), basis=basis, task_mask=task_mask)
        return self._columns(basis, task_mask)

    def _stores_rows(self) -> bool:
        """A few short rows: faster stored than a column at a time."""
        leaves = jax.tree.leaves(self.params)
        size = sum(
            jnp.size(leaves[i]) * jnp.result_type(leaves[i]).itemsize
            for i in self.leaves
        )
        few = self.mode is None and self.num_tasks <= UNROLL
        return few and self.num_tasks * size <= _STORED_BYTES

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
            lambda c: pushforward(*pullback(c)), combine, self._mode("map")
        )
        if task_mask is not None:
            columns = jnp.where(task_mask, columns, jnp.zeros((), dtype))
        gram = jnp.matmul(columns, combine.T, precision=HIGHEST)
        return (gram + gram.T) / 2

    def _mode(self, many: Mode) -> Mode:
        if self.mode is not None:
            return self.mode
        if many == "vmap" and self.num_tasks <= UNROLL:
            return "unroll"
        loops_badly = self.traits.convolves and jax.default_backend() == "cpu"
        return "vmap" if loops_badly else many


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SeparateJacobian(BaseJacobian):
    """One batch a task: ``function(params, batch[t]) -> scalar``.

    Every row runs forward and backward on its own batch only, so the Gramian is taken
    from the rows: a column ``J (J^T c)`` would run every batch for every task.

    Attributes:
      function: the loss of one task as a function of the parameters and its batch.
      batches: the mapped arguments, task axis first.
    """

    function: Callable[[PyTree[Array], Any], Array]
    batches: Any

    isolates = True

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated  # rows never share a graph here
        row = jax.grad(self.function)
        return map_rows(
            lambda batch: self._pick(row(self.params, batch)),
            self.batches,
            self.mode or "vmap",
        )

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        return gramian(self.stack(), basis=basis, task_mask=task_mask)
