"""Lazy task gradients of which only some tasks' are ever taken.

An operator may have a method ``pick(tasks [m]) -> TaskJacobian`` of those tasks alone,
where that is cheaper than to leave the others out of a combination.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from mtl_optax._tree import present_rows, with_operators
from mtl_optax._types import (
    Basis,
    Losses,
    TaskGradients,
    TaskJacobian,
    TaskMask,
    Weights,
)


def some_tasks(task_grads: TaskGradients, drawn: TaskMask, m: int) -> TaskGradients:
    """The same task gradients, in which lazy rows of other tasks than `drawn` are zero.

    Args:
      task_grads: stacked or lazy; what is stacked stays as it is.
      drawn: at most `m` tasks.
      m: so many tasks' gradients are taken, also where fewer are drawn.
    """
    # Those that are drawn come first, in their order.
    tasks = jnp.argsort(~drawn, stable=True)[:m]

    def some(operator: Any) -> SomeTasks:
        picks = callable(getattr(operator, "pick", None))
        few = operator.pick(tasks) if picks else PickedTasks(operator, tasks)
        return SomeTasks(operator, few, tasks, drawn)

    return with_operators(task_grads, some)


@dataclasses.dataclass(frozen=True, eq=False)
class SomeTasks:
    """A Jacobian of T tasks, most of whose rows are zero.

    Attributes:
      whole: the Jacobian of all tasks.
      few: that of some.
      tasks: their numbers.
      drawn: those of `tasks` whose rows are not zero.
    """

    whole: TaskJacobian
    few: TaskJacobian
    tasks: Int[Array, " few"]
    drawn: TaskMask

    @property
    def num_tasks(self) -> int:
        return self.whole.num_tasks

    @property
    def losses(self) -> Losses:
        return self.whole.losses

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.whole.task_names

    @property
    def isolates(self) -> bool:
        return self.whole.isolates

    def restrict(self, leaves: Sequence[int]) -> "SomeTasks":
        whole, few = self.whole.restrict(leaves), self.few.restrict(leaves)
        return dataclasses.replace(self, whole=whole, few=few)

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        present = self.drawn if task_mask is None else self.drawn & task_mask
        own = present[self.tasks]
        if basis is not None:
            return self.few.gramian(basis[:, self.tasks], own)
        at = self._places
        gram = self.few.gramian(None, own)[at[:, None], at]
        both = present[:, None] & present[None, :]
        return jnp.where(both, gram, jnp.zeros((), gram.dtype))

    def combine(self, weights: Weights) -> list[Array]:
        present = jnp.where(self.drawn, weights, jnp.zeros((), weights.dtype))
        return self.few.combine(present[self.tasks])

    def stack(self, *, isolated: bool = False) -> list[Array]:
        if isolated:
            rows = self.whole.stack(isolated=True)
        else:
            rows = [x[self._places] for x in self.few.stack()]
        return [present_rows(x, self.drawn) for x in rows]

    def hold(self, task_mask: TaskMask | None = None) -> "SomeTasks":
        few: Any = self.few
        if not callable(getattr(few, "hold", None)):
            return self
        present = self.drawn if task_mask is None else self.drawn & task_mask
        return dataclasses.replace(self, few=few.hold(present[self.tasks]))

    @property
    def _places(self) -> Int[Array, " tasks"]:
        """Where each task stands among the few; anywhere, if it is not drawn."""
        return jnp.clip(jnp.cumsum(self.drawn) - 1, 0, self.tasks.shape[0] - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class PickedTasks:
    """Some tasks of any Jacobian, by its combinations alone."""

    base: TaskJacobian
    tasks: Int[Array, " few"]

    isolates = False

    @property
    def num_tasks(self) -> int:
        return self.tasks.shape[0]

    @property
    def losses(self) -> Losses:
        return self.base.losses[self.tasks]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(str(place) for place in range(self.num_tasks))

    def restrict(self, leaves: Sequence[int]) -> Self:
        return dataclasses.replace(self, base=self.base.restrict(leaves))

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        dtype = jnp.result_type(float)
        rows = jnp.eye(self.num_tasks, dtype=dtype) if basis is None else basis
        if task_mask is None:
            return self.base.gramian(self.spread(rows))
        rows = jnp.where(task_mask, rows, jnp.zeros((), rows.dtype))
        gram = self.base.gramian(self.spread(rows), self.spread(task_mask))
        if basis is None:
            both = task_mask[:, None] & task_mask[None, :]
            gram = jnp.where(both, gram, jnp.zeros((), gram.dtype))
        return gram

    def combine(self, weights: Weights) -> list[Array]:
        return self.base.combine(self.spread(weights))

    def stack(self, *, isolated: bool = False) -> list[Array]:
        del isolated
        return [x[self.tasks] for x in self.base.stack()]

    def spread(self, array: Array) -> Array:
        """``[..., m]`` to ``[..., T]``: zeros for all other tasks."""
        wide = jnp.zeros((*array.shape[:-1], self.base.num_tasks), array.dtype)
        return wide.at[..., self.tasks].set(array)
