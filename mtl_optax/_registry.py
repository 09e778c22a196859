"""`METHODS`: one row a method, the single source of truth about it.

The test battery, the command line and the tables read it; nothing about a method is
written down anywhere else.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtl_optax import aggregators, weightings
from mtl_optax._arguments import check_num_tasks
from mtl_optax._transform import Combiner, sum_tasks
from mtl_optax.jacobian import look_ahead_jacobian, task_jacobian

Claim = Literal[
    "non_conflicting",
    "permutation_equivariant",
    "scale_equivariant",
    "row_scale_invariant",
    "stops_at_pareto_stationary",
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
      paper: authors, year and identifier.
      needs: the extra arguments that ``update`` reads: as in `Weighting.needs`, or
        ``"strengths"``.
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
          params: what strengths have to fit; without them no leaf has any.

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
        if "strengths" in self.needs:
            extras["strengths"] = jax.tree.map(
                lambda p: _example_strengths(num_tasks, jnp.shape(p)), params
            )
        return extras


def _example_strengths(num_tasks: int, shape: tuple[int, ...]) -> Any:
    """Channels go round among the tasks; None where a leaf is no kernel."""
    if len(shape) < 2:
        return None
    return jax.nn.one_hot(jnp.arange(shape[-1]) % num_tasks, num_tasks).T


def _row(
    factory: Callable[..., Combiner],
    *,
    name: str | None = None,
    summary: str,
    paper: str,
    cost: str,
    state_size: str,
    claims: frozenset[Claim],
    needs: frozenset[str] = frozenset(),
    jacobian: Callable[..., Callable[..., Any]] = task_jacobian,
    normalises: bool = False,
    exempt: tuple[Exemption, ...] = (),
) -> Method:
    weighting = factory(num_tasks=1).weighting
    kind: Kind = "aggregator" if weighting is None else "weighting"
    return Method(
        name=name or factory.__name__,
        factory=factory,
        kind=kind if jacobian is task_jacobian else "jacobian",
        summary=summary,
        paper=paper,
        needs=needs if weighting is None else weighting.needs,
        cost=cost,
        state_size=state_size,
        claims=claims,
        jacobian=jacobian,
        normalises=normalises,
        exempt=exempt,
    )


def _sum_tasks(num_tasks: int) -> Combiner:
    """What follows a Jacobian; with T given, as for every method."""
    check_num_tasks(num_tasks)
    return sum_tasks(num_tasks)


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
    _row(
        aggregators.priority_projection,
        summary="a channel's gradient may not hurt the task that leans on it most",
        paper="Jeong & Yoon 2024, arXiv:2406.02996",
        cost="T",
        state_size="0",
        claims=frozenset({"permutation_equivariant", "scale_equivariant"}),
        needs=frozenset({"strengths"}),
        exempt=(Exemption(9, "it looks at every entry of every row"),),
    ),
    _row(
        aggregators.scale_by_mao,
        summary="sum of every task's own Adam step (MAO)",
        paper="Hervella et al. 2024, doi:10.1016/j.neunet.2023.11.038",
        cost="T",
        state_size="2 * T * parameters",
        claims=frozenset({"permutation_equivariant"}),
        normalises=True,
        exempt=(
            Exemption(4, "one task alone is trained by Adam"),
            Exemption(9, "it looks at every entry of every row"),
        ),
    ),
    _row(
        _sum_tasks,
        name="look_ahead_jacobian",
        summary="gradients at each task's own point one step ahead, summed",
        paper="Lee & Son 2020, arXiv:2005.09910 (after the abstract)",
        cost="about 4 T",
        state_size="0",
        claims=frozenset({"permutation_equivariant"}),
        jacobian=functools.partial(look_ahead_jacobian, inner_learning_rate=0.01),
        exempt=(
            Exemption(4, "one task alone looks ahead too"),
            Exemption(9, "each task has a graph of its own, at its own point"),
        ),
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
