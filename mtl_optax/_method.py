"""`Method`: what a row of the registry says about a method."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtl_optax._transform import Combiner
from mtl_optax.jacobian import task_jacobian

Claim = Literal[
    "non_conflicting",
    "permutation_equivariant",
    "scale_equivariant",
    "row_scale_invariant",
    "stops_at_pareto_stationary",
    "linear_under_scaling",
]

Kind = Literal["weighting", "aggregator", "jacobian"]


class Exemption(NamedTuple):
    """A law, by its number, that does not hold for a method, and why."""

    law: int
    reason: str


class Method(NamedTuple):
    """A row of the registry.

    Attributes:
      name: the public name, ``mtl_optax.<name>``.
      factory: builds the transform from ``num_tasks`` and keyword arguments.
      kind: ``"weighting"`` (Gramian and losses), ``"aggregator"`` (whole rows) or
        ``"jacobian"``: what is new is where task gradients are taken, and `factory`
        is the sum of them.
      summary: one line.
      paper: authors, year and identifier; `mtl_optax.citation` has the BibTeX.
      length: the update's length under ``scale="paper"``, in words.
      peers: what TorchJD 0.18 and LibMTL 1.1 call it; empty where neither has it.
      needs: the extra arguments that ``update`` reads: as in `Weighting.needs`,
        ``"strengths"``, ``"delta_m"`` or ``"other_task_grads"``.
      cost: backward passes a step on a lazy tree, in words.
      state_size: numbers kept from step to step, in words.
      claims: properties that hold for every input; the tests assert them, and hold a
        counter-example for each that is missing.

        * ``non_conflicting``: no task's loss rises along the negative update, to first
          order.
        * ``permutation_equivariant``: permuting tasks permutes weights.
        * ``scale_equivariant``: scaling all gradients by c > 0 scales the update by c.
        * ``row_scale_invariant``: the update's direction does not change when single
          gradients are scaled.
        * ``stops_at_pareto_stationary``: the update is zero exactly where some convex
          combination of the gradients is.
        * ``linear_under_scaling``: for factors c > 0 of the single gradients, the
          update is linear in c.
      jacobian: how task gradients are taken: ``loss_fn -> (params, *args) -> (losses,
        task_grads)``.
      normalises: whether the length of its update has nothing to do with that of the
        gradients, as Adam's.
      exempt: laws that do not hold for it, each with the reason. The tests leave
        these out, and hold that the law is indeed broken.
    """

    name: str
    factory: Callable[..., Combiner]
    kind: Kind
    summary: str
    paper: str
    length: str
    peers: str
    needs: frozenset[str]
    cost: str
    state_size: str
    claims: frozenset[Claim]
    jacobian: Callable[[Callable[..., Any]], Callable[..., Any]] = task_jacobian
    normalises: bool = False
    exempt: tuple[Exemption, ...] = ()

    def make(self, num_tasks: int, **options: Any) -> Combiner:
        """The transform with the method's defaults.

        Example:
          >>> import mtl_optax as mtl
          >>> mtl.METHODS["mgda"].make(3).num_tasks
          3
        """
        return self.factory(num_tasks=num_tasks, **options)

    def extras(
        self, num_tasks: int, params: PyTree[Any] | None = None
    ) -> dict[str, Any]:
        """Example values of the extra arguments that ``update`` needs.

        Args:
          num_tasks: T.
          params: what strengths and task gradients of other batches have to fit;
            without them no leaf has any.

        Example:
          >>> import mtl_optax as mtl
          >>> mtl.METHODS["task_tensioner"].extras(2)
          {'losses': Array([1., 2.], dtype=float32)}
        """
        extras: dict[str, Any] = {}
        if "losses" in self.needs:
            extras["losses"] = jnp.arange(1, num_tasks + 1, dtype=jnp.float32)
        if "key" in self.needs:
            extras["key"] = jax.random.key(0)
        if "delta_m" in self.needs:
            extras["delta_m"] = jnp.arange(num_tasks, dtype=jnp.float32)
        if "strengths" in self.needs:
            extras["strengths"] = jax.tree.map(
                lambda p: _example_strengths(num_tasks, jnp.shape(p)), params
            )
        if "other_task_grads" in self.needs:
            ones = jax.tree.map(
                lambda p: jnp.ones((num_tasks, *jnp.shape(p)), jnp.result_type(p)),
                params,
            )
            extras["other_task_grads"] = (ones, ones)
        return extras


def _example_strengths(num_tasks: int, shape: tuple[int, ...]) -> Any:
    """Channels go round among the tasks; None where a leaf is no kernel."""
    if len(shape) < 2:
        return None
    return jax.nn.one_hot(jnp.arange(shape[-1]) % num_tasks, num_tasks).T
