"""What can be read off the traced losses before anything is computed."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import Literal


class Traits(NamedTuple):
    """Facts about a traced ``params -> losses [T]`` that decide how to differentiate.

    Attributes:
      depends: whether any loss depends on the parameters at all.
      low_precision: whether anything is computed in less than 32 bits; forward and
        backward mode then round differently, and a Gramian by columns is not exact.
      reverse_only: whether it holds a `jax.custom_vjp`, which has no forward mode.
      convolves: whether it holds a convolution, which XLA's CPU back end runs very
        slowly inside loops.
    """

    depends: bool
    low_precision: bool
    reverse_only: bool
    convolves: bool


def read_traits(closed_jaxpr: Any) -> Traits:
    jaxpr = _open(closed_jaxpr)
    equations = list(_walk(jaxpr))
    names = {eqn.primitive.name for eqn in equations}
    outputs = [v.aval for eqn in equations for v in eqn.outvars]
    return Traits(
        depends=any(_depends(jaxpr, [True] * len(jaxpr.invars))),
        low_precision=any(_is_low(a) for a in [v.aval for v in jaxpr.invars] + outputs),
        reverse_only=any(name.startswith("custom_vjp") for name in names),
        convolves="conv_general_dilated" in names,
    )


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


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
            inner = _open(item)
            if hasattr(inner, "eqns") and hasattr(inner, "invars"):
                yield inner


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
