"""The glossary: words, shapes and the two contracts every method is written to.

======================  ===========================  =================================
word                    shape                        meaning
======================  ===========================  =================================
``T`` / ``num_tasks``   static ``int``               number of tasks
losses                  ``[T]``                      one scalar a task
task gradients          tree, leaves ``[T, *p]``     rows of the Jacobian, task first
Gramian                 ``[T, T]``                   inner products of task gradients
weights                 ``[T]``                      update = ``sum_t w[t] * grad[t]``
task mask               ``[T]`` of bools             ``False``: the task is absent
======================  ===========================  =================================
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Bool, Float, PyTree

Params: TypeAlias = PyTree[Any]
Updates: TypeAlias = PyTree[Any]
State: TypeAlias = Any
DType: TypeAlias = Any

# Which leaves of the parameters are shared (True), by a tree or by a function.
Mask: TypeAlias = PyTree[bool] | Callable[[Params], PyTree[bool]]

Losses: TypeAlias = Float[Array, " tasks"]
Weights: TypeAlias = Float[Array, " tasks"]
TaskMask: TypeAlias = Bool[Array, " tasks"]
Gramian: TypeAlias = Float[Array, "tasks tasks"]
Basis: TypeAlias = Float[Array, "rows tasks"]
Scalar: TypeAlias = Float[Array, ""]

# A tree like the parameters: stacked arrays `[T, *param.shape]`, or lazy leaves.
TaskGradients: TypeAlias = PyTree[Any]


class Weighting(NamedTuple):
    """A method that turns the Gramian, the losses and its history into weights.

    Attributes:
      init: ``(num_tasks, dtype) -> state``; arrays only, of fixed shape and dtype.
      update: ``(gramian, state, *, losses, task_mask, key=None, **extra) ->
        (weights [T], state)``. ``task_mask`` is always a ``[T]`` array of bools.
        ``gramian`` and ``losses`` are ``None`` where `needs` does not name them.
      needs: what `update` reads, of ``{"gramian", "losses", "gramian_in_basis",
        "key"}``; what is not named is not computed. ``"gramian_in_basis"`` passes
        the function ``gramian_in_basis(basis [K, T]) -> [K, K]``, the Gramian of
        ``basis @ J`` with the combinations formed before the inner products.
    """

    init: Callable[[int, DType], State]
    update: Callable[..., tuple[Weights, State]]
    needs: frozenset[str]


class Aggregator(NamedTuple):
    """A method that needs whole rows of the Jacobian.

    Attributes:
      init: ``(params, num_tasks) -> state``; arrays only, of fixed shape and dtype.
      update: ``(stacked task gradients, state, params, *, losses, task_mask,
        key=None, **extra) -> (updates, state)``.
    """

    init: Callable[[Params, int], State]
    update: Callable[..., tuple[Updates, State]]


@runtime_checkable
class TaskJacobian(Protocol):
    """The ``[T, P]`` Jacobian as a linear operator: what a lazy leaf points to.

    Leaves are numbered as in ``jax.tree.leaves`` of the parameters. Lists of arrays
    go by the leaves that the operator was restricted to, in that order.
    """

    @property
    def num_tasks(self) -> int: ...

    @property
    def losses(self) -> Losses: ...

    @property
    def task_names(self) -> tuple[str, ...]: ...

    @property
    def isolates(self) -> bool:
        """Whether ``stack(isolated=True)`` keeps one task's NaN out of the others."""
        ...

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Float[Array, "rows rows"]:
        """Gramian of ``J``, or of ``basis @ J``; a masked task counts as zeros."""
        ...

    def combine(self, weights: Weights) -> list[Array]:
        """``weights @ J``, one backward pass."""
        ...

    def stack(self, *, isolated: bool = False) -> list[Array]:
        """The rows themselves, ``[T, *param.shape]`` a leaf."""
        ...

    def restrict(self, leaves: Sequence[int]) -> "TaskJacobian":
        """The same operator, seen only at these leaves."""
        ...
