r"""Inner products of task gradients of one layer, from its input and its cotangents.

For a layer :math:`y = x W` with inputs :math:`X [N, I]` and task cotangents
:math:`D_t [N, O]` the gradient of task t is :math:`X^\top D_t`, and

.. math:: \langle X^\top D_a, X^\top D_b \rangle = \langle D_a, (X X^\top) D_b \rangle

The right side forms no gradient: it is the cheaper one where the layer is wide and N is
small, the left side otherwise. A convolution is one such layer for every offset of its
kernel, whose gradients lie in different entries; a table lookup's gradient is zero but
for the rows that were looked up.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._tree import HIGHEST, accumulator, inner_products
from mtl_optax._types import DType
from mtl_optax.jacobian._chunks import TOGETHER, a_few_at_a_time, late_zero, rounds_of
from mtl_optax.jacobian._trace import call_equation
from mtl_optax.jacobian._uses import Use, dot_roles

# How the inner products of a layer are taken, from what its probes give.
LayerWay: TypeAlias = Literal["kernel", "rows", "lookup"]


# More tasks than these take them in a loop, lest the program grow with their number.
_UNROLLED = 32


class Size(NamedTuple):
    """What one layer's share of the Gramian is made of.

    Attributes:
      pieces: parts of the weight whose gradients share no entry.
      examples: N, over which a gradient is summed (batch, positions, rounds of a loop).
      inputs: I; the number of rows of a table.
      outputs: O.
    """

    pieces: int
    examples: int
    inputs: int
    outputs: int


def size_of(uses: Sequence[Use]) -> Size:
    """Sizes of a layer whose uses all have one key."""
    sizes = [_size(use) for use in uses]
    return sizes[0]._replace(examples=sum(size.examples for size in sizes))


def _size(use: Use) -> Size:
    rounds = math.prod(loop.length for loop in use.loops if not loop.sliced)
    stacked = math.prod(loop.length for loop in use.loops if loop.sliced)
    out = use.eqn.outvars[0].aval.shape
    weight = use.eqn.invars[use.operand].aval.shape
    if use.kind == "dot_general":
        roles = dot_roles(use)
        x = use.eqn.invars[1 - use.operand].aval.shape
        pieces = math.prod(x[axis] for axis in roles.batch)
        examples = math.prod(x[axis] for axis in roles.free)
        inputs = math.prod(x[axis] for axis in roles.contracted)
        outputs = math.prod(out[axis] for axis in roles.out_features)
    elif use.kind == "gather":
        pieces, inputs, outputs = 1, weight[0], math.prod(weight[1:])
        examples = math.prod(out) // max(outputs, 1)
    else:
        spec = use.eqn.params["dimension_numbers"].rhs_spec
        inputs, outputs = weight[spec[1]], weight[spec[0]]
        pieces = math.prod(weight[axis] for axis in spec[2:])
        examples = math.prod(out) // max(outputs, 1)
    return Size(stacked * pieces, rounds * examples, inputs, outputs)


def digest(
    way: LayerWay,
    uses: Sequence[Use],
    inputs: Sequence[Sequence[Array]],
    cotangents: Sequence[Array],
) -> Float[Array, "tasks *form"]:
    """What the layer's inner products and its combination need of task cotangents.

    It is linear in them: by ``"kernel"``, the cotangents as ``[T, B, N, O]``; by
    ``"rows"``, the gradients as ``[T, B, O, I]`` (of a convolution, as the equation
    sees its kernel); by ``"lookup"``, the gradients of the rows that were looked up
    as ``[T, N, O]``.

    Args:
      way: how the layer's inner products are taken.
      uses: of the layer's weight, all of one key.
      inputs: for each use, what its equation reads beside the weight.
      cotangents: for each use, of its output, tasks first.
    """
    if way == "lookup":
        return _looked_up(uses, inputs, cotangents)
    if uses[0].kind == "conv_general_dilated":
        (use,), ((x,),), (d,) = uses, inputs, cotangents
        if way == "kernel":
            return _channels_last(use, d)
        if jax.default_backend() != "cpu":
            return jax.vmap(lambda each: _convolution_gradient(use, x, each))(d)
        # A Python loop: XLA's CPU back end runs convolutions badly in any other.
        return jnp.stack([_convolution_gradient(use, x, each) for each in d])
    dense = _dense_cotangents(uses, cotangents)
    return dense if way == "kernel" else _rows(_dense_inputs(uses, inputs), dense)


def digested_gramian(
    way: LayerWay,
    uses: Sequence[Use],
    inputs: Sequence[Sequence[Array]],
    left: Array,
    right: Array,
) -> Float[Array, "left right"]:
    """``<g_a, g_b>`` of one layer, for digests a of `left` and b of `right`."""
    if way != "kernel":
        return inner_products(left, right)
    dtype = accumulator(left, right)
    axes = ((2,), (2,)), ((0,), (0,))
    seen = (
        [_dense_inputs(uses, inputs)]
        if uses[0].kind == "dot_general"
        else [x[None] for x in _offsets(uses[0], inputs[0][0])]
    )
    kernels = [_dot(x, x, axes, dtype) for x in seen]
    kernel = sum(kernels[1:], kernels[0])  # [B, N, N]

    def columns(some: Array) -> Array:
        axes = ((2,), (2,)), ((0,), (1,))
        through = _dot(kernel, some, axes, dtype)  # [B, N, t, O]
        return inner_products(left, jnp.moveaxis(through, 2, 0))

    # A few tasks at a time: all would take as much memory as their cotangents again.
    count = right.shape[0]
    if count <= _UNROLLED:
        starts = range(0, count, TOGETHER)
        parts = [columns(right[first : first + TOGETHER]) for first in starts]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 1)

    rounds, size = rounds_of(count)

    def put(chunk: Array, gram: Array) -> Array:
        first = jnp.minimum(chunk * size, count - size)
        some = columns(lax.dynamic_slice_in_dim(right, first, size))
        return lax.dynamic_update_slice_in_dim(gram, some, first, 1)

    zeros = [late_zero(x).astype(dtype) for x in (kernel, left, right)]
    gram: Array = jnp.broadcast_to(sum(zeros), (left.shape[0], count))
    return lax.fori_loop(0, rounds, put, gram)


def weight_gradient(
    way: LayerWay,
    uses: Sequence[Use],
    inputs: Sequence[Sequence[Array]],
    combined: Array,
    param: Array,
) -> Array:
    """A combination of digests as a gradient of the parameter."""
    use = uses[0]
    if way == "lookup":
        rows, _, ranks = _looked_at(uses, inputs)
        row_of_rank = jnp.zeros_like(rows).at[ranks].set(rows)
        table = jnp.zeros((size_of(uses).inputs, combined.shape[-1]), combined.dtype)
        combined = table.at[row_of_rank].add(combined)
        combined = combined.reshape(use.eqn.invars[0].aval.shape)
        _, transpose = jax.vjp(use.operand_of, param)
    elif use.kind == "conv_general_dilated":
        if way == "kernel":
            d = _channels_first(use, combined)
            combined = _convolution_gradient(use, inputs[0][0], d)
        _, transpose = jax.vjp(use.operand_of, param)
    else:
        if way == "kernel":
            combined = _rows(_dense_inputs(uses, inputs), combined[None])[0]
        _, transpose = jax.vjp(lambda w: _weight_form(use, w), param)
    (gradient,) = transpose(combined.astype(use.operand_dtype))
    return jnp.asarray(gradient)


def _rows(x: Array, d: Array) -> Float[Array, "tasks pieces outputs inputs"]:
    dtype = accumulator(x, d)
    axes = ((1,), (1,)), ((0,), (0,))

    def of(some: Array) -> Array:
        return jax.vmap(lambda one: _dot(one, x, axes, dtype))(some)

    if jax.default_backend() != "cpu":
        return of(d)
    # On CPU such a product copies its cotangents first, so it takes a few at a time.
    (rows,) = a_few_at_a_time(lambda some: [of(some[0])], [d])
    return rows


def _dot(a: Array, b: Array, axes: Any, dtype: DType) -> Array:
    return lax.dot_general(a, b, axes, precision=HIGHEST, preferred_element_type=dtype)


def _weight_form(use: Use, param: Array) -> Float[Array, "pieces outputs inputs"]:
    """A dense weight as ``[B, O, I]``: a mere rearrangement of the parameter."""
    w, sliced = use.operand_of(param), sum(loop.sliced for loop in use.loops)
    batch, contracted = dot_roles(use).of_weight
    taken = {*batch, *contracted}
    outputs = [axis for axis in range(w.ndim - sliced) if axis not in taken]
    groups = [[axis + sliced for axis in axes] for axes in (batch, outputs, contracted)]
    return _grouped(w, [*range(sliced), *groups[0]], *groups[1:])


def _convolution_gradient(use: Use, x: Array, d: Array) -> Array:
    """Gradient of a convolution's kernel."""
    kernel = use.eqn.invars[1].aval
    (gradient,) = jax.linear_transpose(
        lambda w: call_equation(use.eqn, [x, w])[0],
        jax.ShapeDtypeStruct(kernel.shape, kernel.dtype),
    )(d.astype(use.eqn.outvars[0].aval.dtype))
    return jnp.asarray(gradient)


def _dense_inputs(
    uses: Sequence[Use], inputs: Sequence[Sequence[Array]]
) -> Float[Array, "pieces examples inputs"]:
    """The inputs of all uses of a `dot_general`, one after the other."""
    found = []
    for use, (x,) in zip(uses, inputs, strict=True):
        roles, (sliced, shared) = dot_roles(use), _loop_axes(use)
        batch, free, contracted = (
            [axis + len(use.loops) for axis in axes]
            for axes in (roles.batch, roles.free, roles.contracted)
        )
        found.append(_grouped(x, [*sliced, *batch], [*shared, *free], contracted))
    return found[0] if len(found) == 1 else jnp.concatenate(found, 1)


def _dense_cotangents(
    uses: Sequence[Use], cotangents: Sequence[Array]
) -> Float[Array, "tasks pieces examples outputs"]:
    found = []
    for use, d in zip(uses, cotangents, strict=True):
        roles, (sliced, shared) = dot_roles(use), _loop_axes(use, after=1)
        batch, free, features = (
            [axis + len(use.loops) + 1 for axis in axes]
            for axes in (roles.out_batch, roles.out_free, roles.out_features)
        )
        pieces, examples = [*sliced, *batch], [*shared, *free]
        found.append(_grouped(d, [0], pieces, examples, features))
    return found[0] if len(found) == 1 else jnp.concatenate(found, 2)


def _loop_axes(use: Use, after: int = 0) -> tuple[list[int], list[int]]:
    """Axes of loops whose rounds have slices of their own, and of the others."""
    axes = list(enumerate(use.loops, start=after))
    return [k for k, loop in axes if loop.sliced], [k for k, x in axes if not x.sliced]


def _grouped(x: Array, *groups: Sequence[int]) -> Array:
    """Transposes and merges axes: one axis a group."""
    order = [axis for group in groups for axis in group]
    shape = [math.prod(x.shape[axis] for axis in group) for group in groups]
    return jnp.transpose(x, order).reshape(shape)


def _channels_last(use: Use, d: Array) -> Float[Array, "tasks 1 examples outputs"]:
    spec = use.eqn.params["dimension_numbers"].out_spec
    order = (spec[0], *spec[2:], spec[1])
    d = jnp.transpose(d, (0, *[axis + 1 for axis in order]))
    return d.reshape(d.shape[0], 1, -1, d.shape[-1])


def _channels_first(use: Use, d: Float[Array, "1 examples outputs"]) -> Array:
    """What `_channels_last` did, undone for one row."""
    spec = use.eqn.params["dimension_numbers"].out_spec
    order = (spec[0], *spec[2:], spec[1])
    shape = use.eqn.outvars[0].aval.shape
    d = d.reshape([shape[axis] for axis in order])
    return jnp.transpose(d, [order.index(axis) for axis in range(len(order))])


def _offsets(use: Use, x: Array) -> Iterator[Float[Array, "examples inputs"]]:
    """What each offset of a convolution's kernel sees of the input."""
    given = use.eqn.params
    spec = given["dimension_numbers"]
    x = jnp.transpose(x, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    padding = [(0, 0, 0), *[(*pair, 0) for pair in given["padding"]], (0, 0, 0)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    strides = given["window_strides"]
    positions = [use.eqn.outvars[0].aval.shape[axis] for axis in spec.out_spec[2:]]
    kernel = [use.eqn.invars[1].aval.shape[axis] for axis in spec.rhs_spec[2:]]
    for offset in np.ndindex(*kernel):
        start = [k * gap for k, gap in zip(offset, given["rhs_dilation"], strict=True)]
        stop = [
            first + (count - 1) * stride + 1
            for first, count, stride in zip(start, positions, strides, strict=True)
        ]
        window = (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)
        yield lax.slice(x, *window).reshape(-1, x.shape[-1])


def _looked_at(
    uses: Sequence[Use], inputs: Sequence[Sequence[Array]]
) -> tuple[Array, Array, Array]:
    """The rows looked up, whether a gradient reaches them, and a number for each."""
    eqn = uses[0].eqn
    found = []
    for (ids,) in inputs:
        # Of a table of more rows than narrow ids can name, the last is not their last.
        last = min(eqn.invars[0].aval.shape[0] - 1, jnp.iinfo(ids.dtype).max)
        near = jnp.clip(ids.reshape(-1), 0, last)
        wide = jnp.promote_types(ids.dtype, jnp.int32)
        found.append((near.astype(wide), near == ids.reshape(-1)))
    rows = jnp.concatenate([near for near, _ in found])
    inside = jnp.concatenate([same for _, same in found])
    if eqn.params["mode"] == lax.GatherScatterMode.CLIP:
        inside = jnp.ones_like(inside)
    _, ranks = jnp.unique(rows, return_inverse=True, size=rows.shape[0])
    return rows, inside, ranks.reshape(-1)


def _looked_up(
    uses: Sequence[Use],
    inputs: Sequence[Sequence[Array]],
    cotangents: Sequence[Array],
) -> Float[Array, "tasks examples outputs"]:
    """The rows of a table's gradients that are not zero, in any fixed order."""
    _, inside, ranks = _looked_at(uses, inputs)
    flat = [
        d.reshape(d.shape[0], ids.size, -1)
        for (ids,), d in zip(inputs, cotangents, strict=True)
    ]
    dtype = accumulator(*flat)
    d = jnp.concatenate(flat, 1).astype(dtype)
    d = jnp.where(inside[None, :, None], d, jnp.zeros((), dtype))
    return jnp.zeros_like(d).at[:, ranks].add(d)
