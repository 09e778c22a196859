"""The layer-wise engine: task cotangents of every layer in one sweep, no gradients.

One forward pass and one sweep of T cotangents give, at the probe of every layer, what
its share of the Gramian needs (`_layers`); a parameter that is not understood
(`_uses`) has its task gradients carried by the same sweep, for itself alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mtl_optax._tree import inner_products, mix_rows
from mtl_optax.jacobian._layers import (
    digest,
    digested_gramian,
    weight_gradient,
)
from mtl_optax.jacobian._plan import LeafPlan
from mtl_optax.jacobian._probes import Inputs, run_probed, zero_probes
from mtl_optax.jacobian._uses import Place

# One array a plan, tasks first; None for a leaf that no loss reads.
Digests: TypeAlias = list[Array | None]


class Sweep(NamedTuple):
    """What several cotangents of the losses leave behind, those first.

    Attributes:
      cotangents: at the probes, by place.
      rows: task gradients of the leaves whose way is ``"direct"``, by leaf.
    """

    cotangents: dict[Place, Array]
    rows: dict[int, Array]


class Layers(NamedTuple):
    """A forward pass with probes, ready to be swept.

    Attributes:
      plans: one a leaf.
      params: all parameters.
      inputs: of the probed layers.
      pullback: ``cotangent [T] -> Sweep`` of that one.
    """

    plans: tuple[LeafPlan, ...]
    params: Sequence[Array]
    inputs: Inputs
    pullback: Callable[[Array], Sweep]


def run_layers(
    closed_jaxpr: Any, params: Sequence[Array], plans: Sequence[LeafPlan]
) -> Layers:
    """Runs the traced losses forward with a probe at every layer of the plans."""
    uses = [use for plan in plans for use in plan.uses]
    direct = {plan.leaf: params[plan.leaf] for plan in plans if plan.way == "direct"}

    def losses(
        direct: dict[int, Array], probes: dict[Place, Array]
    ) -> tuple[Array, Inputs]:
        merged = [direct.get(leaf, param) for leaf, param in enumerate(params)]
        (vector,), inputs = run_probed(closed_jaxpr, merged, uses, probes)
        return vector, inputs

    _, vjp, inputs = jax.vjp(losses, direct, zero_probes(uses), has_aux=True)

    def pullback(cotangent: Array) -> Sweep:
        rows, cotangents = vjp(cotangent)
        return Sweep(cotangents, rows)

    return Layers(tuple(plans), params, inputs, pullback)


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
            digests.append(digest(plan.way, plan.uses, inputs, cotangents))
    return digests


def sweep_gramian(layers: Layers, left: Digests, right: Digests) -> Array:
    """Inner products of the task gradients of two digests.

    Only a zero where no leaf of the plans is used.
    """
    grams = []
    for plan, a, b in zip(layers.plans, left, right, strict=True):
        if plan.way == "unused" or a is None or b is None:
            continue
        if plan.way == "direct":
            grams.append(inner_products(a, b))
        else:
            inputs = [layers.inputs[use.place] for use in plan.uses]
            grams.append(digested_gramian(plan.way, plan.uses, inputs, a, b))
    dtype = jnp.result_type(jnp.float32, *(gram.dtype for gram in grams))
    return sum((gram.astype(dtype) for gram in grams), jnp.zeros((), dtype))


def sweep_combination(
    layers: Layers, digests: Digests, weights: Float[Array, " tasks"]
) -> list[Array]:
    """``weights @ J`` from a digest, one array a plan."""
    combined = []
    for plan, rows in zip(layers.plans, digests, strict=True):
        param = layers.params[plan.leaf]
        if plan.way == "unused" or rows is None:
            combined.append(jnp.zeros_like(param))
        elif plan.way == "direct":
            combined.append(mix_rows(weights, rows))
        else:
            inputs = [layers.inputs[use.place] for use in plan.uses]
            mixed = mix_rows(weights, rows, widen=True)
            combined.append(weight_gradient(plan.way, plan.uses, inputs, mixed, param))
    return combined
