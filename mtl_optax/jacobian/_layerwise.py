"""The layer-wise engine: task cotangents of every layer in one sweep, no gradients.

One forward pass and one sweep of T cotangents give, at the probe of every layer, what
its share of the Gramian needs (`_layers`); a parameter that is not understood
(`_uses`) has its task gradients carried by the same sweep, for itself alone.

Where nothing of the sweep is wanted afterwards, a layer is tapped instead: its share is
added up on the way back, and its cotangents are forgotten before the next layer's.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._tree import (
    accumulator,
    has_explicit_mesh,
    inner_products,
    mix_rows,
    varies_over,
)
from mtl_optax._types import Basis
from mtl_optax.jacobian._chunks import delayed, late_zero
from mtl_optax.jacobian._layers import (
    digest,
    digested_gramian,
    weight_gradient,
)
from mtl_optax.jacobian._plan import LeafPlan, layer_way
from mtl_optax.jacobian._probes import (
    Inputs,
    Products,
    Tap,
    run_probed,
    zero_probes,
)
from mtl_optax.jacobian._segments import mark, run_segments
from mtl_optax.jacobian._trace import CALLS, open_jaxpr
from mtl_optax.jacobian._uses import Place, View

# One array a plan, tasks first; None for a leaf that no loss reads.
Digests: TypeAlias = list[Array | None]


class Sweep(NamedTuple):
    """What several cotangents of the losses leave behind, those first.

    Attributes:
      cotangents: at the probes, by place.
      rows: task gradients of the leaves whose way is ``"direct"``, by leaf.
      gram: shares of the Gramian of tapped layers, a row for each cotangent.
    """

    cotangents: dict[Place, Array]
    rows: dict[int, Array]
    gram: Array


class Layers(NamedTuple):
    """A forward pass with probes, ready to be swept.

    Attributes:
      plans: one a leaf.
      params: all parameters.
      inputs: of the probed layers.
      pullback: ``cotangent [T] -> Sweep`` of that one.
      marked: plans of layers that `run_segments` stops at; their shares of the Gramian
        are no part of the sweep of one.
    """

    plans: tuple[LeafPlan, ...]
    params: Sequence[Array]
    inputs: Inputs
    pullback: Callable[[Array], Sweep]
    marked: tuple[LeafPlan, ...]


def run_layers(
    closed_jaxpr: Any,
    params: Sequence[Array],
    plans: Sequence[LeafPlan],
    products: Products,
    *,
    taps: int | None = None,
) -> Layers:
    """Runs the traced losses forward with a probe or a tap at every layer of the plans.

    Args:
      closed_jaxpr: the traced losses.
      params: their arguments.
      plans: of the leaves.
      products: see `run_probed`.
      taps: the number of cotangents that `sweep_layers` will be given, to tap layers
        where that is possible; by default all have probes.
    """
    tapped = [] if taps is None else _tapped(plans)
    places = {plan.uses[0].place for plan in tapped}
    large = taps is not None and sweeps_are_large(closed_jaxpr, plans, taps)
    marked = tuple(tapped) if large else ()
    uses = [use for plan in plans for use in plan.uses]
    direct = {plan.leaf: params[plan.leaf] for plan in plans if plan.way == "direct"}

    def losses(
        direct: dict[int, Array], probes: dict[Place, Array], row: Array
    ) -> tuple[Array, Inputs]:
        merged = [direct.get(leaf, param) for leaf, param in enumerate(params)]
        made = {
            plan.uses[0].place: _marked(number, row) if marked else _tap(plan, row)
            for number, plan in enumerate(tapped)
        }
        (vector,), inputs = run_probed(
            closed_jaxpr, merged, uses, probes, made, products
        )
        return vector, inputs

    probes = zero_probes([use for use in uses if use.place not in places])
    dtype = accumulator(*(params[plan.leaf] for plan in plans))
    row = jnp.zeros((0 if taps is None else taps,), dtype)

    def run() -> tuple[Callable[[Array], Any], Inputs]:
        _, vjp, inputs = jax.vjp(losses, direct, probes, row, has_aux=True)
        return vjp, inputs

    vjp, inputs = run()

    def pullback(cotangent: Array) -> Sweep:
        # Marked layers are swept with a forward pass of their own, of which what is
        # cheap need not be kept until then.
        rows, cotangents, gram = (run()[0] if marked else vjp)(cotangent)
        return Sweep(cotangents, rows, gram)

    probed = tuple(plan for plan in plans if plan not in tapped)
    return Layers(probed, params, inputs, pullback, marked)


def sweep_layers(layers: Layers, cotangents: Array) -> Sweep:
    """Sweeps all cotangents at once."""
    if not layers.marked:
        sweep: Sweep = jax.vmap(layers.pullback, axis_name=_TASKS)(cotangents)
        return sweep
    total: Array | None = None

    def meet(layer: int, all_tasks: Array, inputs: list[Array]) -> Array:
        nonlocal total
        if total is not None:
            # Else what is made of inputs alone would be made, and kept, from the start.
            inputs = [delayed(x, late_zero(total)) for x in inputs]
        share = _share(layers.marked[layer], all_tasks, inputs)
        total = share if total is None else total + share
        return late_zero(total)

    sweep = run_segments(layers.pullback, cotangents, meet)
    return sweep._replace(gram=sweep.gram if total is None else sweep.gram + total)


def combine_late(
    closed_jaxpr: Any,
    params: Sequence[Array],
    products: Products,
    cotangent: Float[Array, " tasks"],
) -> list[Array]:
    """The gradients of one cotangent that depends on a sweep, keeping little till then.

    The forward pass is made anew but for its products, once the cotangent is known.
    """

    def gradients(cotangent: Array) -> list[Array]:
        def losses(params: list[Array]) -> Array:
            (vector,), _ = run_probed(closed_jaxpr, params, (), {}, {}, products)
            return vector

        return list(jax.vjp(losses, list(params))[1](cotangent)[0])

    rows = run_segments(gradients, cotangent[None], zero=late_zero(cotangent))
    return [row[0] for row in rows]


# The task axis has a name inside a sweep, by which taps see all cotangents.
_TASKS = "mtl_optax_tasks"


def _can_tap(plan: LeafPlan) -> bool:
    """Whether one place sees all that its share of the Gramian depends on."""
    return len(plan.uses) == 1 and all(loop.sliced for loop in plan.uses[0].loops)


def _tap(plan: LeafPlan, row: Array) -> Tap:
    """Gives a layer's output back, and sends its share of the Gramian to `row`."""

    def back(cotangent: Array, row: Array, inputs: list[Array]) -> tuple[Array, Array]:
        all_tasks = lax.all_gather(cotangent, _TASKS)
        gram = _share(plan, all_tasks, inputs)
        # The cotangent waits for the share, lest XLA go on with it first and keep the
        # cotangents of all layers.
        own = gram[lax.axis_index(_TASKS)].astype(row.dtype)
        return delayed(cotangent, late_zero(gram)), own

    return _on_the_way_back(back, row)


def _marked(layer: int, row: Array) -> Tap:
    """Gives a layer's output back, and marks its cotangent."""
    return _on_the_way_back(
        lambda cotangent, row, inputs: mark(cotangent, row, inputs, layer), row
    )


def _on_the_way_back(
    back: Callable[[Array, Array, list[Array]], tuple[Array, Array]], row: Array
) -> Tap:
    """A tap whose ``back(cotangent, row, inputs)`` gives those of output and row."""

    @jax.custom_vjp
    def tap(output: Array, inputs: list[Array], row: Array) -> Array:
        del inputs, row
        return output

    def forward(output: Array, inputs: list[Array], row: Array) -> tuple[Array, Any]:
        return output, (inputs, row)

    def backward(saved: Any, cotangent: Array) -> tuple[Array, None, Array]:
        inputs, row = saved
        cotangent, row = back(cotangent, row, inputs)
        return cotangent, None, row

    tap.defvjp(forward, backward)
    return lambda output, inputs: tap(output, inputs, row)


def _share(plan: LeafPlan, cotangents: Array, inputs: list[Array]) -> Array:
    """A tapped layer's share of the Gramian, from inside the rounds of its loops."""
    views = tuple(step for step in plan.uses[0].steps if isinstance(step, View))
    uses = [plan.uses[0]._replace(steps=views)]
    digests = digest(layer_way(plan), uses, [inputs], [cotangents])
    return digested_gramian(layer_way(plan), uses, [inputs], digests, digests)


# From this size on, cotangents of all tasks at one layer are not held several times:
# below it the loops cost up to a tenth of the time on CPU, and save little. On
# accelerators, which loops over a few tasks may leave idle, that is not calibrated.
_LARGE_BYTES = 10_000_000
_LARGE_BYTES_ELSEWHERE = 256_000_000


def _tapped(plans: Sequence[LeafPlan]) -> list[LeafPlan]:
    return [plan for plan in plans if _can_tap(plan)]


def sweeps_are_large(closed_jaxpr: Any, plans: Sequence[LeafPlan], count: int) -> bool:
    """Whether tasks are swept a few at a time between the tapped layers."""
    tapped = _tapped(plans)
    if not tapped:
        return False
    outputs = [plan.uses[0].eqn.outvars[0].aval for plan in tapped]
    largest = count * max(aval.size * aval.dtype.itemsize for aval in outputs)
    on_cpu = jax.default_backend() == "cpu"
    return largest >= (_LARGE_BYTES if on_cpu else _LARGE_BYTES_ELSEWHERE) and all(
        _is_in_the_open(closed_jaxpr, plan.uses[0].place) for plan in tapped
    )


def _is_in_the_open(closed_jaxpr: Any, place: Place) -> bool:
    """Whether an equation is in no loop and no `remat`, nor split by its type."""
    eqn = open_jaxpr(closed_jaxpr).eqns[place[0]]
    if len(place) == 1:
        aval = eqn.outvars[0].aval
        return not (varies_over(aval) or has_explicit_mesh(aval))
    return eqn.primitive.name in CALLS and _is_in_the_open(
        eqn.params["jaxpr"], place[1:]
    )


def digest_sweep(layers: Layers, sweep: Sweep) -> Digests:
    """What Gramian and combination need of a sweep."""
    digests: Digests = []
    for plan in layers.plans:
        if plan.way == "direct":
            digests.append(sweep.rows[plan.leaf])
        elif plan.way == "unused":
            digests.append(None)
        else:
            cotangents = [sweep.cotangents[use.place] for use in plan.uses]
            inputs = [layers.inputs[use.place] for use in plan.uses]
            digests.append(digest(layer_way(plan), plan.uses, inputs, cotangents))
    return digests


def sweep_gramian(layers: Layers, left: Digests, right: Digests) -> Array:
    """Inner products of the task gradients of two digests.

    Only a zero where no leaf of the plans is used.
    """
    shares = [
        _layer_gramian(layers, plan, a, b)
        for plan, a, b in zip(layers.plans, left, right, strict=True)
        if a is not None and b is not None
    ]
    return _total(shares)


def sweep_gramian_in_basis(
    layers: Layers, digests: Digests, columns: Digests, basis: Basis
) -> Array:
    """The same of combinations of one digest, formed for one layer after the other.

    `columns` is the digest too, `in_columns`.
    """
    shares: list[Array] = []
    for plan, rows, flat in zip(layers.plans, digests, columns, strict=True):
        if rows is None or flat is None:
            continue
        if shares:
            basis = delayed(basis, late_zero(shares[-1]))
        mixed = mix_rows(basis.T, flat, widen=True)
        mixed = mixed.reshape(basis.shape[0], *rows.shape[1:])
        shares.append(_layer_gramian(layers, plan, mixed, mixed))
    return _total(shares)


def _layer_gramian(layers: Layers, plan: LeafPlan, left: Array, right: Array) -> Array:
    if plan.way == "direct":
        return inner_products(left, right)
    inputs = [layers.inputs[use.place] for use in plan.uses]
    return digested_gramian(layer_way(plan), plan.uses, inputs, left, right)


def _total(shares: Sequence[Array]) -> Array:
    dtype = jnp.result_type(jnp.float32, *(share.dtype for share in shares))
    return sum((share.astype(dtype) for share in shares), jnp.zeros((), dtype))


def sweep_combination(
    layers: Layers,
    digests: Digests,
    columns: Digests,
    weights: Float[Array, " tasks"],
) -> list[Array]:
    """``weights @ J`` from a digest, one array a plan.

    `columns` is the digest too, `in_columns`.
    """
    combined = []
    for plan, rows, flat in zip(layers.plans, digests, columns, strict=True):
        param = layers.params[plan.leaf]
        if plan.way == "unused" or rows is None or flat is None:
            combined.append(jnp.zeros_like(param))
        elif plan.way == "direct":
            combined.append(mix_rows(weights, flat).reshape(rows.shape[1:]))
        else:
            inputs = [layers.inputs[use.place] for use in plan.uses]
            mixed = mix_rows(weights, flat, widen=True).reshape(rows.shape[1:])
            combined.append(
                weight_gradient(layer_way(plan), plan.uses, inputs, mixed, param)
            )
    return combined
