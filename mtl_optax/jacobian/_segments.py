"""A backward pass of all tasks, a few at a time from one marked layer to the next.

At a marked layer the cotangents of all tasks are in memory at once, since every pair of
tasks meets there. What lies between two such layers is each task's own, so it is run
for a few tasks after the other, and what it needs on its way is held for these few.
Results take the room of what they were made from, where that has their shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, Primitive
from jaxtyping import Array, Float, PyTree

from mtl_optax.jacobian._chunks import a_few_at_a_time, delayed
from mtl_optax.jacobian._trace import (
    CALLS,
    PRODUCTS,
    call_equation,
    names_inside,
    open_jaxpr,
)

# ``mark(cotangent, thread, *inputs, layer=k) -> cotangent, thread``
_mark = Primitive("mtl_optax_mark")
_mark.multiple_results = True
_mark.def_abstract_eval(lambda cotangent, thread, *inputs, layer: [cotangent, thread])

# What is cheap enough to be computed anew for each segment that reads it.
_CHEAP_NAMES = """
    abs add and broadcast_in_dim ceil clamp convert_element_type copy copy_p cos div
    eq erf exp exp2 expand_dims expm1 floor ge gt integer_pow is_finite le log log1p
    logistic lt max min mul ne neg not or pow reshape round rsqrt select_n sign sin
    sqrt square squeeze stop_gradient sub tanh transpose xor
"""
_CHEAP = frozenset(_CHEAP_NAMES.split())
# These take all tasks at once: in a loop a convolution is slow on CPU, and another loop
# has as many more rounds.
_WHOLE = frozenset({"conv_general_dilated", "scan", "while"})


def mark(
    cotangent: Array, thread: Array, inputs: Sequence[Array], layer: int
) -> tuple[Array, Array]:
    """The cotangent; `run_segments` stops here for all tasks to meet.

    JAX forgets a mark of which no output is made, so there is a second result to make
    one of: zeros like `thread`.
    """
    marked, end = _mark.bind(cotangent, thread, *inputs, layer=layer)
    return marked, end


def run_segments(
    forward_and_back: Callable[[Array], PyTree[Array]],
    cotangents: Float[Array, "tasks losses"],
    meet: Callable[[int, Array, list[Array]], Array] | None = None,
    *,
    zero: Array | None = None,
) -> PyTree[Array]:
    """``jax.vmap(forward_and_back)(cotangents)``, with layers that are marked inside.

    Args:
      forward_and_back: from one cotangent to what its backward pass gives; it may call
        `mark`. The forward pass must be inside: what is cheap of it is not kept.
      cotangents: tasks first.
      meet: ``(layer, cotangents of all tasks there, inputs) -> zero``, a scalar that
        whatever follows waits for; where layers are marked.
      zero: what is cheap waits for it from the start.
    """
    traced, shapes = jax.make_jaxpr(forward_and_back, return_shape=True)(cotangents[0])
    jaxpr = traced.jaxpr
    shared = _Shared(dict(zip(jaxpr.constvars, traced.consts, strict=True)), zero)
    rows = {jaxpr.invars[0]: cotangents}
    zeros: dict[Any, Array] = {}  # what to wait for before rows are used
    last = {v: n for n, eqn in enumerate(jaxpr.eqns) for v in _variables(eqn.invars)}
    last |= dict.fromkeys(_variables(jaxpr.outvars), len(jaxpr.eqns))
    segment: list[Any] = []
    ahead: set[Any] = set()  # what the segment will give

    def stacked(var: Any) -> Array:
        if not isinstance(var, Literal) and var in rows:
            return rows[var]
        (value,) = shared.values([var])
        return jnp.broadcast_to(value, (cotangents.shape[0], *jnp.shape(value)))

    def run(now: int) -> None:
        left = [v for eqn in segment for v in eqn.outvars if last.get(v, -1) >= now]
        done = {v for v in rows if last.get(v, -1) < now}
        rows.update(_run_segment(list(segment), left, done, rows, zeros, shared))
        segment.clear()
        ahead.clear()

    for number, eqn in enumerate(jaxpr.eqns):
        if eqn.primitive is _mark:
            run(number)
            cotangent, thread, *inputs = eqn.invars
            marked, end = eqn.outvars
            rows[marked] = stacked(cotangent)
            both = _variables([cotangent, marked])  # two names of one array
            last.update(dict.fromkeys(both, max(last.get(v, -1) for v in both)))
            shared.known[end] = jnp.zeros_like(shared.values([thread])[0])
            if meet is None:
                raise ValueError("a layer is marked, and nothing meets there.")
            layer = eqn.params["layer"]
            shared.zero = meet(layer, rows[marked], shared.values(inputs))
            zeros[marked] = shared.zero
        elif any(v in rows or v in ahead for v in _variables(eqn.invars)):
            segment.append(eqn)
            ahead.update(eqn.outvars)
        else:
            shared.add(eqn)
    run(len(jaxpr.eqns))
    leaves = [stacked(var) for var in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


class _Shared:
    """Values that are the same for all tasks, as equations are walked through.

    Attributes:
      known: those that are kept.
      zero: what to wait for before anything is computed anew.
    """

    def __init__(self, known: dict[Any, Array], zero: Array | None) -> None:
        self.known = known
        self.zero = zero
        self._cheap: dict[Any, tuple[int, Any]] = {}  # equations, numbered
        self._forward: dict[Any, Array] = {}  # cheap values of the forward pass itself

    def add(self, eqn: Any) -> None:
        """The next equation of such values alone."""
        if _is_cheap(eqn):
            numbered = len(self._cheap), eqn
            self._cheap.update(dict.fromkeys(eqn.outvars, numbered))
            return
        values = self._compute(eqn.invars, self._forward, None)
        if eqn.primitive.name in PRODUCTS:
            pairs = zip(eqn.invars, values, strict=True)
            self.known.update((v, x) for v, x in pairs if not isinstance(v, Literal))
        self.known.update(zip(eqn.outvars, call_equation(eqn, values), strict=True))

    def values(self, variables: Sequence[Any]) -> list[Array]:
        """What is cheap is computed now, once `zero` is known."""
        return self._compute(variables, {}, self.zero)

    def _compute(
        self, variables: Sequence[Any], found: dict[Any, Array], zero: Array | None
    ) -> list[Array]:
        needed: dict[int, Any] = {}
        look = _variables(variables)
        while look:
            var = look.pop()
            if var in found or var in self.known:
                continue
            number, eqn = self._cheap[var]
            if number not in needed:
                needed[number] = eqn
                look += _variables(eqn.invars)

        def get(var: Any, *, late: bool = False) -> Any:
            if isinstance(var, Literal):
                return var.val
            if var in found:
                return found[var]
            value = self.known[var]
            return value if zero is None or not late else delayed(value, zero)

        for _, eqn in sorted(needed.items()):
            inputs = [get(var, late=True) for var in eqn.invars]
            found.update(zip(eqn.outvars, call_equation(eqn, inputs), strict=True))
        return [get(var) for var in variables]


def _is_cheap(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in CALLS:
        return all(_is_cheap(inner) for inner in open_jaxpr(eqn.params["jaxpr"]).eqns)
    return name in _CHEAP


def _variables(found: Sequence[Any]) -> list[Any]:
    return [var for var in found if not isinstance(var, Literal)]


def _run_segment(
    segment: Sequence[Any],
    left: Sequence[Any],
    done: set[Any],
    rows: dict[Any, Array],
    zeros: dict[Any, Array],
    shared: _Shared,
) -> dict[Any, Array]:
    """What equations leave behind, tasks first, in the room of what is done with."""
    if not left:
        return {}
    read = dict.fromkeys(v for eqn in segment for v in _variables(eqn.invars))
    inside = {v for eqn in segment for v in eqn.outvars}
    given = [v for v in read if v in rows]
    same = [v for v in read if v not in rows and v not in inside]
    common = dict(zip(same, shared.values(same), strict=True))

    def of_one(own: list[Array]) -> list[Array]:
        values = common | dict(zip(given, own, strict=True))
        for var in given:
            if var in zeros:
                values[var] = delayed(values[var], zeros[var])
        for eqn in segment:
            inputs = [
                v.val if isinstance(v, Literal) else values[v] for v in eqn.invars
            ]
            values.update(zip(eqn.outvars, call_equation(eqn, inputs), strict=True))
        return [values[var] for var in left]

    of_all, own = jax.vmap(of_one), [rows[var] for var in given]
    if any(_WHOLE & names_inside(eqn) for eqn in segment):
        results = of_all(own)
    else:
        free = [number for number, var in enumerate(given) if var in done]
        results = a_few_at_a_time(of_all, own, free)
    return dict(zip(left, results, strict=True))
