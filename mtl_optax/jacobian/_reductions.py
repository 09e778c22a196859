r"""A way around wrong sums in XLA's CPU back end.

From jaxlib 0.10.2 on, that back end fuses chains of sums (its YNN fusions), and gets
some long ones wrong: the derivative of a LayerNorm, or of anything else that subtracts
a mean and divides by a deviation, is off by up to 80 % under `vmap` or, in 0.12, in
plain training too. `XLA_FLAGS` with ``--xla_cpu_experimental_ynn_fusion_type=`` turns
these fusions off.

Losses are run so that the chains break where they would go wrong: what is computed and
then broadcast (and so summed on the way back) passes through a clamp to all numbers
there are, which changes nothing and which these fusions do not hold. This is done only
where a trial on the machine at hand shows the fault, so a mended release is left alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal
from jaxtyping import Array, PyTree

from mtl_optax.jacobian._trace import (
    CALLS,
    REMAT,
    call_equation,
    consts_of,
    open_jaxpr,
    scan_layout,
)

# Rows of 64 numbers: 1024 of them show the fault of 0.10.2, 4096 also that of 0.12.
_TRIAL = (4096, 64)

_BROADCASTS = frozenset(
    {"broadcast_in_dim", "add", "sub", "mul", "div", "max", "min", "pow", "select_n"}
)
_VIEWS = frozenset({"reshape", "broadcast_in_dim", "transpose", "convert_element_type"})


def sums_go_wrong(closed_jaxpr: Any) -> bool:
    """Whether these traced losses hold sums that this machine's XLA may get wrong.

    Of any size: tasks, and members of a `vmap` around everything, make them longer.
    """
    if jax.default_backend() != "cpu":
        return False
    jaxpr = open_jaxpr(closed_jaxpr)
    return _at_risk(jaxpr, [True] * len(jaxpr.invars)) and _trial_fails()


@functools.cache
def _trial_fails() -> bool:
    """Takes the derivative of a normalisation with and without what mends it."""
    with jax.ensure_compile_time_eval(), jax.disable_jit(False):
        keys = jax.random.split(jax.random.key(0))
        x = jax.random.normal(keys[0], _TRIAL, jnp.float32)
        cotangents = jax.random.normal(keys[1], (4, *_TRIAL), jnp.float32)

        def normalised(x: Array) -> Array:
            centred = x - x.mean(-1, keepdims=True)
            return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

        def swept(x: Array, cotangents: Array) -> Array:
            return jax.vmap(jax.vjp(normalised, x)[1])(cotangents)[0]

        def one(x: Array, cotangents: Array) -> Array:
            return jax.vjp(normalised, x)[1](cotangents[0])[0]

        def right(x: Array, cotangents: Array) -> Array:
            _, pullback = jax.vjp(with_right_sums(normalised), x)
            return jnp.stack([pullback(each)[0] for each in cotangents])

        wanted = np.asarray(jax.jit(right)(x, cotangents))
        found = [np.asarray(jax.jit(fn)(x, cotangents)) for fn in (swept, one)]
    errors = [np.abs(found[0] - wanted).max(), np.abs(found[1] - wanted[0]).max()]
    return bool(max(errors) > 1e-3 * np.abs(wanted).max())


def with_right_sums(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of a pytree, with its sums kept apart from one another."""

    def kept_apart(params: PyTree[Array], *rest: Any) -> Any:
        found: list[Any] = []

        def arrays(params: PyTree[Array]) -> list[Array]:
            leaves, treedef = jax.tree.flatten(fn(params, *rest))
            computed = [isinstance(leaf, jax.Array) for leaf in leaves]
            found[:] = leaves, treedef, computed
            return [x for x, y in zip(leaves, computed, strict=True) if y]

        closed = jax.make_jaxpr(arrays)(params)
        leaves, treedef, computed = found
        given = [jnp.asarray(leaf) for leaf in jax.tree.leaves(params)]
        jaxpr, consts = open_jaxpr(closed), consts_of(closed)
        outputs = iter(_run(jaxpr, consts, given, [True] * len(given)))
        # What is no array (a name in `aux`) is given back as it came.
        merged = zip(leaves, computed, strict=True)
        return treedef.unflatten([next(outputs) if y else x for x, y in merged])

    return kept_apart


def _holds_equations(eqn: Any) -> bool:
    name = eqn.primitive.name
    return name in CALLS or name in REMAT or name == "scan"


class _Given:
    """Which variables of a jaxpr are its arguments, or those rearranged.

    These are left alone, so that layers stay recognisable.
    """

    def __init__(self, jaxpr: Any, given: Sequence[bool]) -> None:
        self._known = {v for v, x in zip(jaxpr.invars, given, strict=True) if x}
        self._known.update(jaxpr.constvars)

    def of(self, eqn: Any) -> list[bool]:
        return [isinstance(v, Literal) or v in self._known for v in eqn.invars]

    def broadcast(self, eqn: Any) -> list[bool]:
        """Which inputs an equation broadcasts, so that they must be kept apart."""
        given, name = self.of(eqn), eqn.primitive.name
        if name in _VIEWS and given[0]:
            self._known.update(eqn.outvars)
        if name not in _BROADCASTS:
            return [False] * len(given)
        size = eqn.outvars[0].aval.size
        return [
            not x and v.aval.ndim > 0 and v.aval.size < size and _is_real(v.aval)
            for x, v in zip(given, eqn.invars, strict=True)
        ]


def _is_real(aval: Any) -> bool:
    return jnp.issubdtype(aval.dtype, jnp.floating)


def _inside(eqn: Any, given: Sequence[bool]) -> list[bool]:
    """Which arguments of the equations inside are arguments of the losses."""
    if eqn.primitive.name != "scan":
        return list(given)
    first, carried = scan_layout(eqn)
    return [x and not first <= k < first + carried for k, x in enumerate(given)]


def _at_risk(jaxpr: Any, given: Sequence[bool]) -> bool:
    known = _Given(jaxpr, given)
    for eqn in jaxpr.eqns:
        if _holds_equations(eqn):
            inner = open_jaxpr(eqn.params["jaxpr"])
            if _at_risk(inner, _inside(eqn, known.of(eqn))):
                return True
        elif any(known.broadcast(eqn)):
            return True
    return False


def _run(
    jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], given: Sequence[bool]
) -> list[Any]:
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))
    known = _Given(jaxpr, given)

    def read(var: Any) -> Any:
        return var.val if isinstance(var, Literal) else values[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if _holds_equations(eqn):
            outputs = _run_call(eqn, inputs, _inside(eqn, known.of(eqn)))
        else:
            pairs = zip(inputs, known.broadcast(eqn), strict=True)
            outputs = call_equation(eqn, [_apart(x) if y else x for x, y in pairs])
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _apart(x: Array) -> Array:
    most = jnp.asarray(jnp.inf, x.dtype)
    return lax.clamp(-most, x, most)


def _run_call(eqn: Any, inputs: Sequence[Any], given: Sequence[bool]) -> list[Any]:
    """An equation that holds other equations."""
    name, inner = eqn.primitive.name, eqn.params["jaxpr"]
    body, consts = open_jaxpr(inner), consts_of(inner)
    if name in CALLS:
        return _run(body, consts, inputs, given)
    if name in REMAT:
        again = jax.checkpoint(
            lambda *args: _run(body, consts, args, given),
            policy=eqn.params["policy"],
            prevent_cse=eqn.params["prevent_cse"],
        )
        return list(again(*inputs))
    first, carried = scan_layout(eqn)
    last = first + carried

    def round_(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = _run(body, consts, [*inputs[:first], *carry, *xs], given)
        return outputs[:carried], outputs[carried:]

    carry, stacked = lax.scan(
        round_,
        list(inputs[first:last]),
        list(inputs[last:]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *stacked]
