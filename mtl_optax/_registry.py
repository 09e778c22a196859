"""`METHODS`: one row a method, the single source of truth about it.

The test battery, the command line and the tables read it; nothing about a method is
written down anywhere else.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtl_optax import weightings
from mtl_optax._transform import Combiner

Claim = Literal[
    "non_conflicting",
    "permutation_equivariant",
    "scale_equivariant",
    "row_scale_invariant",
    "stops_at_pareto_stationary",
]


class Method(NamedTuple):
    """A row of the registry.

    Attributes:
      name: the public name, ``mtl_optax.<name>``.
      factory: builds the transform from ``num_tasks`` and keyword arguments.
      kind: ``"weighting"`` (Gramian and losses) or ``"aggregator"`` (whole rows).
      summary: one line.
      paper: authors, year and identifier.
      needs: what it reads, as in `Weighting.needs`.
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
    """

    name: str
    factory: Callable[..., Combiner]
    kind: Literal["weighting", "aggregator"]
    summary: str
    paper: str
    needs: frozenset[str]
    cost: str
    state_size: str
    claims: frozenset[Claim]

    def make(self, num_tasks: int, **options: Any) -> Combiner:
        """The transform with the method's defaults.

        Example:
          >>> import mtl_optax as mtl
          >>> mtl.METHODS["mgda"].make(3).num_tasks
          3
        """
        return self.factory(num_tasks=num_tasks, **options)

    def extras(self, num_tasks: int) -> dict[str, Any]:
        """Example values of the extra arguments that ``update`` needs.

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
        return extras


def _row(
    factory: Callable[..., Combiner],
    *,
    summary: str,
    paper: str,
    cost: str,
    state_size: str,
    claims: frozenset[Claim],
) -> Method:
    weighting = factory(num_tasks=1).weighting
    return Method(
        name=factory.__name__,
        factory=factory,
        kind="aggregator" if weighting is None else "weighting",
        summary=summary,
        paper=paper,
        needs=frozenset() if weighting is None else weighting.needs,
        cost=cost,
        state_size=state_size,
        claims=claims,
    )


_ROWS = (
    _row(
        weightings.mean,
        summary="every task counts alike (the baseline)",
        paper="Kurin et al. 2022, arXiv:2201.04122",
        cost="1",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
    ),
    _row(
        weightings.mgda,
        summary="shortest convex combination of the task gradients",
        paper="Désidéri 2012; Sener & Koltun 2018, arXiv:1810.04650",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {
                "non_conflicting",
                "permutation_equivariant",
                "scale_equivariant",
                "stops_at_pareto_stationary",
            }
        ),
    ),
    _row(
        weightings.edm,
        summary="equal angles with the task gradients (central direction)",
        paper="Katrutsa et al. 2020, arXiv:2007.06937",
        cost="Gramian + 1",
        state_size="0",
        claims=frozenset(
            {
                "non_conflicting",
                "permutation_equivariant",
                "scale_equivariant",
                "row_scale_invariant",
            }
        ),
    ),
    _row(
        weightings.task_tensioner,
        summary="central direction, moved by each task's convergence behaviour",
        paper="Nakamura, Grassi & Wolf 2022, arXiv:2204.06698",
        cost="Gramian + 1",
        state_size="T * (window + 4)",
        claims=frozenset(),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
