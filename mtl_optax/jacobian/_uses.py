"""How every parameter is used: a walk through the traced losses before they run.

A parameter is *understood* when all it does is to be the weight of layers: the operand
of a `dot_general`, of a convolution or of a table lookup, perhaps reshaped, transposed,
cast or sliced on its way, in the losses themselves or inside `jit`, `remat` and `scan`.
Every use is found by the parameter's variable; one use that is none of these, and the
parameter counts as not understood, with the reason in words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.sharding import AxisType
from jaxtyping import Array

from mtl_optax._tree import varies_over
from mtl_optax.jacobian._trace import (
    CALLS,
    REMAT,
    call_equation,
    open_jaxpr,
    scan_layout,
)

# Where an equation stands: its number, and those of the equations it lies inside.
Place: TypeAlias = tuple[int, ...]


class View(NamedTuple):
    """A rearrangement of a parameter: its transpose keeps inner products.

    Attributes:
      eqn: the equation, of one variable.
    """

    eqn: Any

    def apply(self, x: Array) -> Array:
        values = [v.val if isinstance(v, Literal) else x for v in self.eqn.invars]
        return call_equation(self.eqn, values)[0]

    def key(self) -> str:
        shape = self.eqn.outvars[0].aval.shape
        return f"{self.eqn.primitive.name} {self.eqn.params} {shape}"


class Loop(NamedTuple):
    """A scan on the way to a use.

    Attributes:
      length: of the scan.
      sliced: whether each round sees a slice of its own of the parameter (stacked
        layers), or all rounds the same parameter (weights shared over time).
    """

    length: int
    sliced: bool


class Use(NamedTuple):
    """One equation that reads a parameter as the weight of a layer.

    Attributes:
      leaf: number of the parameter.
      place: where the equation stands.
      eqn: the equation.
      operand: which of its inputs the parameter is.
      steps: views and loops from the parameter to that input, outermost first.
    """

    leaf: int
    place: Place
    eqn: Any
    operand: int
    steps: tuple[View | Loop, ...]

    @property
    def kind(self) -> str:
        return str(self.eqn.primitive.name)

    @property
    def loops(self) -> tuple[Loop, ...]:
        return tuple(step for step in self.steps if isinstance(step, Loop))

    @property
    def others(self) -> tuple[int, ...]:
        """Positions of the inputs that are neither the parameter nor literals."""
        return tuple(
            position
            for position, var in enumerate(self.eqn.invars)
            if position != self.operand and not isinstance(var, Literal)
        )

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of all rounds of its loops."""
        lengths = tuple(loop.length for loop in self.loops)
        return (*lengths, *self.eqn.outvars[0].aval.shape)

    @property
    def operand_dtype(self) -> Any:
        return self.eqn.invars[self.operand].aval.dtype

    def operand_of(self, param: Array) -> Array:
        """What the equation sees of the parameter, rounds of sliced loops first."""

        def run(steps: Sequence[View | Loop], x: Array) -> Array:
            if not steps:
                return x
            first, *rest = steps
            if isinstance(first, View):
                return run(rest, first.apply(x))
            return jax.vmap(lambda x: run(rest, x))(x) if first.sliced else run(rest, x)

        return run(self.steps, param)

    def key(self) -> tuple[Any, ...]:
        """Uses of one key have gradients of one form, which may be added up."""
        route = tuple(
            step.key() if isinstance(step, View) else "sliced"
            for step in self.steps
            if isinstance(step, View) or step.sliced
        )
        roles: Any = self.eqn.params.get("mode")
        if self.kind == "dot_general":
            roles = dot_roles(self).of_weight
        return self.kind, route, roles


class Found(NamedTuple):
    """What the walk found.

    Attributes:
      uses: for every parameter, its uses.
      unknown: why a parameter is not understood, by its number.
    """

    uses: tuple[tuple[Use, ...], ...]
    unknown: dict[int, str]


class DotRoles(NamedTuple):
    """Axes of a `dot_general` between an input and a weight, by their role.

    Attributes:
      batch: of the input, in the order of the weight's axes.
      free: of the input.
      contracted: of the input, in the order of the weight's axes.
      out_batch: of the output, in the order of the weight's axes.
      out_free: of the output, those that come from the input.
      out_features: of the output, those that come from the weight.
      of_weight: the weight's batch and contracted axes.
    """

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contracted: tuple[int, ...]
    out_batch: tuple[int, ...]
    out_free: tuple[int, ...]
    out_features: tuple[int, ...]
    of_weight: tuple[tuple[int, ...], tuple[int, ...]]


def dot_roles(use: Use) -> DotRoles:
    contract, batch = use.eqn.params["dimension_numbers"]
    x_at, w_at = 1 - use.operand, use.operand
    x_ndim = use.eqn.invars[x_at].aval.ndim
    w_ndim = use.eqn.invars[w_at].aval.ndim
    by_weight = sorted(zip(batch[w_at], batch[x_at], range(len(batch[0])), strict=True))
    contracted = sorted(zip(contract[w_at], contract[x_at], strict=True))
    taken_x = {*batch[x_at], *contract[x_at]}
    free = tuple(a for a in range(x_ndim) if a not in taken_x)
    num_features = w_ndim - len(batch[w_at]) - len(contract[w_at])
    # The output's axes: batch, then free ones of the left operand, then of the right.
    first = len(batch[0])
    counts = (len(free), num_features) if x_at == 0 else (num_features, len(free))
    left = tuple(range(first, first + counts[0]))
    right = tuple(range(first + counts[0], first + sum(counts)))
    out_free, out_features = (left, right) if x_at == 0 else (right, left)
    return DotRoles(
        batch=tuple(x for _, x, _ in by_weight),
        free=free,
        contracted=tuple(x for _, x in contracted),
        out_batch=tuple(position for _, _, position in by_weight),
        out_free=out_free,
        out_features=out_features,
        of_weight=(
            tuple(w for w, _, _ in by_weight),
            tuple(w for w, _ in contracted),
        ),
    )


class _Tag(NamedTuple):
    """Marks a variable as a view of a parameter."""

    leaf: int
    steps: tuple[View | Loop, ...]


def find_uses(closed_jaxpr: Any) -> Found:
    """Finds all uses of every input of a traced function."""
    jaxpr = open_jaxpr(closed_jaxpr)
    found: list[list[Use]] = [[] for _ in jaxpr.invars]
    unknown: dict[int, str] = {}
    tags = {var: _Tag(leaf, ()) for leaf, var in enumerate(jaxpr.invars)}
    _walk(jaxpr, tags, (), found, unknown, [True] * len(jaxpr.outvars))
    for tag in _tags_of(jaxpr.outvars, tags):
        if tag is not None:
            unknown.setdefault(tag.leaf, "is a loss itself")
    return Found(tuple(map(tuple, found)), unknown)


def _tags_of(variables: Sequence[Any], tags: dict[Any, _Tag]) -> list[_Tag | None]:
    return [None if isinstance(v, Literal) else tags.get(v) for v in variables]


def _walk(
    jaxpr: Any,
    tags: dict[Any, _Tag],
    place: Place,
    found: list[list[Use]],
    unknown: dict[int, str],
    wanted: Sequence[bool],
) -> None:
    """Only what wanted outputs are made of: an aux may read parameters too."""
    read = _read_by(jaxpr, wanted)
    for number, eqn in enumerate(jaxpr.eqns):
        if not read.intersection(eqn.outvars):
            continue
        here = (*place, number)
        incoming = _tags_of(eqn.invars, tags)
        tagged = [(at, tag) for at, tag in enumerate(incoming) if tag is not None]
        if not tagged:
            continue
        name = eqn.primitive.name
        if name in CALLS or name in REMAT:
            inner = open_jaxpr(eqn.params["jaxpr"])
            inner_tags = _pass_on(inner.invars, incoming)
            outer = [var in read for var in eqn.outvars]
            _walk(inner, inner_tags, here, found, unknown, outer)
            outgoing = _tags_of(inner.outvars, inner_tags)
            tags |= _pass_on(eqn.outvars, outgoing)
        elif name == "scan":
            _walk_scan(eqn, incoming, here, found, unknown)
        elif _is_view(eqn):
            ((_, tag),) = tagged
            tags[eqn.outvars[0]] = _Tag(tag.leaf, (*tag.steps, View(eqn)))
        else:
            for at, tag in tagged:
                use = Use(tag.leaf, here, eqn, at, tag.steps)
                reason = _refusal(use, [other for k, other in tagged if k != at])
                if reason is None:
                    found[tag.leaf].append(use)
                else:
                    unknown.setdefault(tag.leaf, reason)


def _read_by(jaxpr: Any, wanted: Sequence[bool]) -> set[Any]:
    """Variables that the wanted outputs are made of."""
    outputs = zip(jaxpr.outvars, wanted, strict=True)
    read = {var for var, is_wanted in outputs if is_wanted and _is_variable(var)}
    for eqn in reversed(jaxpr.eqns):
        if read.intersection(eqn.outvars):
            read.update(filter(_is_variable, eqn.invars))
    return read


def _is_variable(var: Any) -> bool:
    return not isinstance(var, Literal)


def _pass_on(variables: Sequence[Any], tags: Sequence[_Tag | None]) -> dict[Any, _Tag]:
    pairs = zip(variables, tags, strict=True)
    return {var: tag for var, tag in pairs if tag is not None}


def _walk_scan(
    eqn: Any,
    incoming: Sequence[_Tag | None],
    here: Place,
    found: list[list[Use]],
    unknown: dict[int, str],
) -> None:
    layout = scan_layout(eqn)
    body = open_jaxpr(eqn.params["jaxpr"])
    carried = range(layout.num_consts, layout.num_consts + layout.num_carry)
    inside: list[_Tag | None] = []
    for at, tag in enumerate(incoming):
        if tag is not None and at in carried:
            unknown.setdefault(tag.leaf, "is carried through a `scan`")
            tag = None
        elif tag is not None:
            loop = Loop(eqn.params["length"], sliced=at >= carried.stop)
            tag = _Tag(tag.leaf, (*tag.steps, loop))
        inside.append(tag)
    inner_tags = _pass_on(body.invars, inside)
    _walk(body, inner_tags, here, found, unknown, [True] * len(body.outvars))
    for tag in _tags_of(body.outvars, inner_tags):
        if tag is not None:
            unknown.setdefault(tag.leaf, "is given back by a `scan`")


_REARRANGING = frozenset(
    {"reshape", "transpose", "squeeze", "slice", "rev", "neg", "copy", "copy_p"}
    | {"sharding_constraint"}
)


def _is_view(eqn: Any) -> bool:
    """Whether an equation moves entries about without adding or repeating any."""
    if sum(not isinstance(v, Literal) for v in eqn.invars) != 1:
        return False
    (source,) = (v for v in eqn.invars if not isinstance(v, Literal))
    name = eqn.primitive.name
    if name == "convert_element_type":
        return bool(jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating))
    if name == "broadcast_in_dim":
        return bool(eqn.outvars[0].aval.size == source.aval.size)
    return name in _REARRANGING


def _refusal(use: Use, others: Sequence[_Tag]) -> str | None:
    """Why an equation is not understood as a layer, or None where it is."""
    name, eqn = use.kind, use.eqn
    if others:
        return f"meets a parameter in `{name}`"
    aval = eqn.outvars[0].aval
    if jnp.issubdtype(aval.dtype, jnp.complexfloating):
        return f"meets complex numbers in `{name}`"
    if varies_over(aval):
        return "varies over the devices of a `shard_map`"
    mesh = aval.sharding.mesh if getattr(aval, "sharding", None) is not None else None
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        return "is used on a mesh with explicit axes"
    if name == "dot_general":
        return None if use.others else "is multiplied by a number"
    if name == "conv_general_dilated" and use.operand == 1:
        return None
    if name == "gather":
        return None if is_lookup(use) else "is indexed otherwise than by rows"
    if name == "broadcast_in_dim":
        return "is repeated along other axes, as a bias is"
    return f"is used by `{name}`"


def is_lookup(use: Use) -> bool:
    """Whether a `gather` takes whole rows of a table by their number."""
    numbers = use.eqn.params["dimension_numbers"]
    table, out = use.eqn.invars[0].aval, use.eqn.outvars[0].aval
    rows = (1, *table.shape[1:])
    trailing = tuple(range(out.ndim - table.ndim + 1, out.ndim))
    return (
        use.operand == 0
        and not any(loop.sliced for loop in use.loops)
        and tuple(numbers.start_index_map) == (0,)
        and tuple(numbers.collapsed_slice_dims) == (0,)
        and not numbers.operand_batching_dims
        and tuple(use.eqn.params["slice_sizes"]) == rows
        and tuple(numbers.offset_dims) == trailing
    )
