"""Running traced losses with a probe or a tap at the output of chosen layers.

A probe is a zero that is added to a layer's output. The derivative with respect to it
is the cotangent of that output, from which, with the layer's input, everything about
the gradient of the layer's weight follows. A tap is a function that gives the layer's
output back as it is; what its own backward pass does is up to its maker. What products
gave in one forward pass can be given to another.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal
from jax.sharding import Sharding
from jaxtyping import Array

from mtl_optax.jacobian._trace import (
    CALLS,
    PRODUCTS,
    REMAT,
    call_equation,
    consts_of,
    names_inside,
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

# By place: what equations that are costly gave in another forward pass.
Products: TypeAlias = Mapping[Place, Array]


def zero_probes(uses: Sequence[Use]) -> dict[Place, Array]:
    """A zero for every use's output, of all rounds of the scans that it lies in."""
    return {
        use.place: jnp.zeros(use.output_shape, use.eqn.outvars[0].aval.dtype)
        for use in uses
    }


def run_keeping(
    closed_jaxpr: Any, params: Sequence[Array]
) -> tuple[list[Array], Products]:
    """The function's outputs, and what its products gave outside loops and `remat`.

    XLA would merge another forward pass with this one only as long as it rewrites both
    alike, which it does not where there are layer norms.
    """
    products: dict[Place, Array] = {}
    probed = _Probed({}, {}, {}, {}, products)
    jaxpr, consts = open_jaxpr(closed_jaxpr), consts_of(closed_jaxpr)
    outputs, _ = _run(jaxpr, consts, params, (), probed)
    return outputs, products


def run_probed(
    closed_jaxpr: Any,
    params: Sequence[Array],
    uses: Sequence[Use],
    probes: Probes,
    taps: Taps,
    products: Products,
) -> tuple[list[Array], Inputs]:
    """The function's outputs with probes added, and the inputs of the probed layers.

    Args:
      closed_jaxpr: the traced function.
      params: its arguments.
      uses: the layers with a probe or a tap.
      probes: of `zero_probes`.
      taps: of the other layers.
      products: of `run_keeping` at the same arguments, or none; they are not computed
        again.

    Returns:
      the outputs, and for every use the inputs at its positions `others`, with the
      rounds of scans along leading axes.
    """
    sites = {use.place: use for use in uses}
    probed = _Probed(sites, probes, taps, products, None)
    return _run(open_jaxpr(closed_jaxpr), consts_of(closed_jaxpr), params, (), probed)


class _Probed(NamedTuple):
    """Where something is set, and what; which products are known, or to be kept."""

    sites: Mapping[Place, Use]
    probes: Probes
    taps: Taps
    products: Products
    kept: dict[Place, Array] | None

    def within(self, place: Place) -> "_Probed":
        def inside(at: Place) -> bool:
            return at[: len(place)] == place

        return self._replace(
            sites={at: x for at, x in self.sites.items() if inside(at)},
            probes={at: x for at, x in self.probes.items() if inside(at)},
            products={at: x for at, x in self.products.items() if inside(at)},
        )

    def keeps(self, eqn: Any) -> bool:
        """Whether an equation is a call to keep products of."""
        called = self.kept is not None and eqn.primitive.name in CALLS
        return called and bool(names_inside(eqn) & PRODUCTS) and not _shards(eqn)


def _shards(eqn: Any) -> bool:
    """Whether a call says how its inputs or outputs are sharded."""
    given = (eqn.params.get(name) or () for name in ("in_shardings", "out_shardings"))
    return any(isinstance(each, Sharding) for some in given for each in some)


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
            output = _output(eqn, values, within.products.get(here))
            others = [values[position] for position in probed.sites[here].others]
            if here in probed.taps:
                outputs = [probed.taps[here](output, others)]
            else:
                outputs, inputs[here] = [output + probed.probes[here]], others
        elif here in within.products:
            outputs = [_output(eqn, values, within.products[here])]
        elif within.sites or within.products or within.keeps(eqn):
            outputs, found = _run_call(eqn, values, here, within)
            inputs |= found
        else:
            outputs = call_equation(eqn, values)
        if probed.kept is not None and eqn.primitive.name in PRODUCTS:
            (probed.kept[here],) = outputs
        known.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars], inputs


def _output(eqn: Any, values: Sequence[Any], product: Array | None) -> Array:
    """Of an equation of one output, which may be known but for its derivatives.

    A known output stands for a function of the values; whoever differentiates twice
    must let it vary with them the second time, as it does that comes from a trace.
    """
    if product is None:
        return jnp.asarray(call_equation(eqn, list(values))[0])

    @jax.custom_jvp
    def known(product: Array, *values: Any) -> Array:
        del values
        return product

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        product, *values = primals
        own = tangents[1:]
        moving = [k for k, t in enumerate(own) if not isinstance(t, SymbolicZero)]

        def output(*moved: Any) -> Array:
            merged = dict(enumerate(values)) | dict(zip(moving, moved, strict=True))
            return jnp.asarray(call_equation(eqn, list(merged.values()))[0])

        at, along = ([each[k] for k in moving] for each in (values, own))
        zero = jnp.zeros_like(product)
        return product, jax.jvp(output, at, along)[1] if moving else zero

    known.defjvp(derivative, symbolic_zeros=True)
    return known(product, *values)


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
