"""Running traced losses with a probe or a tap at the output of chosen layers.

A probe is a zero that is added to a layer's output. The derivative with respect to it
is the cotangent of that output, from which, with the layer's input, everything about
the gradient of the layer's weight follows. A tap is a function that gives the layer's
output back as it is; what its own backward pass does is up to its maker.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array

from mtl_optax.jacobian._trace import (
    CALLS,
    REMAT,
    call_equation,
    consts_of,
    open_jaxpr,
    scan_layout,
)
from mtl_optax.jacobian._uses import Place, Use

# By place: the probes of layers, and what else their equations read.
Probes: TypeAlias = Mapping[Place, Array]
Inputs: TypeAlias = dict[Place, list[Array]]

# From a layer's output and what else its equation reads to the same output; by place.
Tap: TypeAlias = Callable[[Array, list[Array]], Array]
Taps: TypeAlias = Mapping[Place, Tap]


def zero_probes(uses: Sequence[Use]) -> dict[Place, Array]:
    """A zero for every use's output, of all rounds of the scans that it lies in."""
    return {
        use.place: jnp.zeros(use.output_shape, use.eqn.outvars[0].aval.dtype)
        for use in uses
    }


def run_probed(
    closed_jaxpr: Any,
    params: Sequence[Array],
    uses: Sequence[Use],
    probes: Probes,
    taps: Taps,
) -> tuple[list[Array], Inputs]:
    """The function's outputs with probes added, and the inputs of the probed layers.

    Args:
      closed_jaxpr: the traced function.
      params: its arguments.
      uses: the layers with a probe or a tap.
      probes: of `zero_probes`.
      taps: of the other layers.

    Returns:
      the outputs, and for every use the inputs at its positions `others`, with the
      rounds of scans along leading axes.
    """
    sites = {use.place: use for use in uses}
    probed = _Probed(sites, probes, taps)
    return _run(open_jaxpr(closed_jaxpr), consts_of(closed_jaxpr), params, (), probed)


class _Probed(NamedTuple):
    """Where something is set, and what."""

    sites: Mapping[Place, Use]
    probes: Probes
    taps: Taps

    def within(self, place: Place) -> "_Probed":
        sites = {at: x for at, x in self.sites.items() if at[: len(place)] == place}
        probes = {at: x for at, x in self.probes.items() if at in sites}
        return self._replace(sites=sites, probes=probes)


def _run(
    jaxpr: Any,
    consts: Sequence[Any],
    args: Sequence[Any],
    place: Place,
    probed: _Probed,
) -> tuple[list[Any], Inputs]:
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    known |= dict(zip(jaxpr.invars, args, strict=True))
    inputs: Inputs = {}

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else known[var]

    for number, eqn in enumerate(jaxpr.eqns):
        here = (*place, number)
        values = [read(var) for var in eqn.invars]
        within = probed.within(here)
        if here in probed.sites:
            (output,) = call_equation(eqn, values)
            others = [values[position] for position in probed.sites[here].others]
            if here in probed.taps:
                outputs = [probed.taps[here](output, others)]
            else:
                outputs, inputs[here] = [output + probed.probes[here]], others
        elif within.sites:
            outputs, found = _run_call(eqn, values, here, within)
            inputs |= found
        else:
            outputs = call_equation(eqn, values)
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars], inputs


def _run_call(
    eqn: Any,
    values: Sequence[Any],
    here: Place,
    probed: _Probed,
) -> tuple[list[Any], Inputs]:
    """An equation that holds other equations, probed layers among them."""
    name, inner = eqn.primitive.name, eqn.params["jaxpr"]
    body, consts = open_jaxpr(inner), consts_of(inner)

    def run(args: Sequence[Any], probes: Probes) -> tuple[list[Any], Inputs]:
        return _run(body, consts, args, here, probed._replace(probes=probes))

    if name in CALLS:
        return run(values, probed.probes)
    if name in REMAT:
        again = jax.checkpoint(
            run, policy=eqn.params["policy"], prevent_cse=eqn.params["prevent_cse"]
        )
        outputs, inputs = again(list(values), dict(probed.probes))
        return outputs, inputs
    if name != "scan":
        raise NotImplementedError(f"no probe can be set inside {name!r}.")
    layout = scan_layout(eqn)
    first = layout.num_consts
    last = first + layout.num_carry

    def round_(carry: list[Any], sliced: Any) -> tuple[list[Any], Any]:
        xs, probes = sliced
        outputs, inputs = run([*values[:first], *carry, *xs], probes)
        num_carry = layout.num_carry
        return outputs[:num_carry], (outputs[num_carry:], inputs)

    carry, (stacked, inputs) = lax.scan(
        round_,
        list(values[first:last]),
        (list(values[last:]), dict(probed.probes)),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *stacked], inputs
