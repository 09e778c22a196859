"""What can be read off the traced losses before anything is computed."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

# Calls whose body may be walked in place: they take and give what the body does.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMAT = frozenset({"remat", "remat2", "checkpoint"})

# What costs most of a forward pass. Plain training keeps what they multiply, for the
# gradients of their weights.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


class Traits(NamedTuple):
    """Facts about a traced ``params -> losses [T]`` that decide how to differentiate.

    Attributes:
      depends: whether any loss depends on the parameters at all.
      low_precision: whether anything is computed in less than 32 bits; forward and
        backward mode then round differently, and a Gramian by columns is not exact.
      reverse_only: whether it holds a `jax.custom_vjp`, which has no forward mode.
      convolves: whether it holds a convolution, which XLA's CPU back end runs very
        slowly inside loops.
      scatters: whether it holds a scatter (a sum over segments), which that back end
        runs slowly with a task axis.
      ragged: whether it holds a ragged product, which JAX does not batch.
    """

    depends: bool
    low_precision: bool
    reverse_only: bool
    convolves: bool
    scatters: bool
    ragged: bool


def read_traits(closed_jaxpr: Any) -> Traits:
    jaxpr = open_jaxpr(closed_jaxpr)
    equations = list(_walk(jaxpr))
    names = {eqn.primitive.name for eqn in equations}
    outputs = [v.aval for eqn in equations for v in eqn.outvars]
    return Traits(
        depends=any(_depends(jaxpr, [True] * len(jaxpr.invars))),
        low_precision=any(_is_low(a) for a in [v.aval for v in jaxpr.invars] + outputs),
        reverse_only=any(name.startswith("custom_vjp") for name in names),
        convolves="conv_general_dilated" in names,
        scatters=any(name.startswith("scatter") for name in names),
        ragged=any(name.startswith("ragged_dot") for name in names),
    )


def forward_flops(jaxpr: Any) -> int:
    """Operations of all products and convolutions, as often as loops repeat them."""
    total = 0
    for eqn in open_jaxpr(jaxpr).eqns:
        size = eqn.outvars[0].aval.size if eqn.outvars else 0
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * size * math.prod(shape[axis] for axis in contracted)
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            spec = eqn.params["dimension_numbers"].rhs_spec
            total += 2 * size * kernel.size // max(kernel.shape[spec[0]], 1)
        else:
            inside = [forward_flops(inner) for inner in _inner(eqn)]
            often = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += often * max(inside, default=0)  # of a `cond`, the longer branch
    return total


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def consts_of(jaxpr: Any) -> list[Any]:
    """The constants that a jaxpr carries with it, if it does."""
    return list(getattr(jaxpr, "consts", None) or ())


_EMPTY = jax.make_jaxpr(lambda: ())().jaxpr


def call_equation(eqn: Any, values: list[Any]) -> list[Any]:
    """Evaluates one equation on values for all of its inputs, literals included.

    As a jaxpr of its own, since the parameters of primitives' own `bind` change
    between JAX releases.
    """
    variables = [v for v in eqn.invars if not isinstance(v, Literal)]
    given = [
        x for v, x in zip(eqn.invars, values, strict=True) if not isinstance(v, Literal)
    ]
    inputs = dict(zip(variables, given, strict=True))
    alone = _EMPTY.replace(
        invars=list(inputs), outvars=eqn.outvars, eqns=[eqn], effects=eqn.effects
    )
    return list(jaxpr_as_fun(ClosedJaxpr(alone, ()))(*inputs.values()))


def first_output(closed_jaxpr: Any) -> Any:
    """The same with its first output alone; equations keep their numbers."""
    jaxpr = open_jaxpr(closed_jaxpr)
    alone = _EMPTY.replace(
        constvars=jaxpr.constvars,
        invars=jaxpr.invars,
        outvars=jaxpr.outvars[:1],
        eqns=jaxpr.eqns,
        effects=jaxpr.effects,
    )
    return ClosedJaxpr(alone, consts_of(closed_jaxpr))


class ScanLayout(NamedTuple):
    """How many inputs of a scan are constants and carried; the rest is sliced."""

    num_consts: int
    num_carry: int


def scan_layout(eqn: Any) -> ScanLayout:
    """Read off shapes, since the names of a scan's parameters change between releases.

    What is sliced or stacked has one axis more outside than inside.
    """
    body = open_jaxpr(eqn.params["jaxpr"])
    num_carry = _same_shapes(eqn.outvars, body.outvars)
    return ScanLayout(_same_shapes(eqn.invars, body.invars) - num_carry, num_carry)


def _same_shapes(outer: list[Any], inner: list[Any]) -> int:
    pairs = zip(outer, inner, strict=True)
    return sum(a.aval.shape == b.aval.shape for a, b in pairs)


def _is_low(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.finfo(dtype).bits < 32
    )


def _inner(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = open_jaxpr(item)
            if hasattr(inner, "eqns") and hasattr(inner, "invars"):
                yield inner


def names_inside(eqn: Any) -> set[str]:
    """Of an equation and of all that it holds."""
    inside = (each for inner in _inner(eqn) for each in _walk(inner))
    return {eqn.primitive.name, *(each.primitive.name for each in inside)}


def _walk(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in _inner(eqn):
            yield from _walk(inner)


def _depends(jaxpr: Any, seeds: list[bool]) -> list[bool]:
    """Which outputs can depend on the seeded inputs; errs on the side of yes."""
    known = dict(zip(jaxpr.invars, seeds, strict=True))

    def get(var: Any) -> bool:
        return False if isinstance(var, Literal) else known.get(var, False)

    for eqn in jaxpr.eqns:
        incoming = [get(var) for var in eqn.invars]
        inner = next(_inner(eqn), None)
        # A call has the inputs and outputs of what it calls; loops have not.
        is_call = (
            inner is not None
            and eqn.primitive.name not in ("scan", "while", "cond")
            and len(inner.invars) == len(eqn.invars)
            and len(inner.outvars) == len(eqn.outvars)
        )
        outgoing = (
            _depends(inner, incoming) if is_call else [any(incoming)] * len(eqn.outvars)
        )
        known.update(zip(eqn.outvars, outgoing, strict=True))
    return [get(var) for var in jaxpr.outvars]
