"""How each parameter's share of the Gramian is taken: the cheapest way, from shapes."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from mtl_optax.jacobian._layers import LayerWay, Size, size_of
from mtl_optax.jacobian._uses import Found, Use

Way: TypeAlias = LayerWay | Literal["direct", "unused"]

# Operations that take as long as moving one byte; measured on CPU, see `bench`.
_FLOPS_PER_BYTE = 4


class LeafPlan(NamedTuple):
    """What is done for one parameter, and what it costs beside the sweeps.

    Attributes:
      leaf: its number.
      way: ``"kernel"`` (inner products through the Gram matrix of the layer's inputs;
        no gradient is formed), ``"rows"`` (one layer's task gradients, formed and
        forgotten), ``"lookup"`` (only the rows of a table that were looked up),
        ``"direct"`` (the sweep carries its task gradients), ``"unused"``.
      reason: why.
      uses: the layers to probe; empty where the way is ``"direct"``.
      size: of the layer, if it is one.
      flops: floating-point operations for its inner products.
      bytes: that are held for them at once.
      left: bytes that a sweep of all tasks leaves behind, for a combination to follow.
    """

    leaf: int
    way: Way
    reason: str
    uses: tuple[Use, ...]
    size: Size | None
    flops: int
    bytes: int
    left: int


def layer_way(plan: LeafPlan) -> LayerWay:
    """The way of a leaf that has one as a layer."""
    if plan.way == "direct" or plan.way == "unused":
        raise ValueError(f"leaf {plan.leaf} is no layer but {plan.way!r}.")
    return plan.way


def plan_leaves(
    found: Found, leaves: Sequence[int], params: Sequence[Any], num_tasks: int
) -> tuple[LeafPlan, ...]:
    """A plan for each of these leaves."""
    return tuple(_plan(leaf, found, params[leaf], num_tasks) for leaf in leaves)


def _plan(leaf: int, found: Found, param: Any, num_tasks: int) -> LeafPlan:
    uses = found.uses[leaf]
    entries = math.prod(param.shape)
    width = param.dtype.itemsize

    def direct(reason: str) -> LeafPlan:
        flops = 2 * num_tasks**2 * entries
        size = num_tasks * entries * width
        return LeafPlan(leaf, "direct", reason, (), None, flops, size, size)

    if leaf in found.unknown:
        return direct(found.unknown[leaf])
    if not uses:
        return LeafPlan(leaf, "unused", "no loss reads it", (), None, 0, 0, 0)
    if len({use.key() for use in uses}) > 1:
        return direct(f"its {len(uses)} uses differ in form")
    size = size_of(uses)
    if uses[0].kind == "gather":
        return _plan_table(leaf, uses, size, num_tasks, width) or direct(
            f"{size.examples} lookups are many beside {size.inputs} rows"
        )
    if uses[0].kind == "conv_general_dilated":
        reason = _odd_convolution(uses)
        if reason is not None:
            return direct(reason)
    costs: dict[LayerWay, tuple[int, int]] = {
        "kernel": _kernel_cost(uses, size, num_tasks),
        "rows": _rows_cost(size, num_tasks),
    }
    if 0 in size:
        return direct("it is empty")
    byte = _FLOPS_PER_BYTE * width
    way = min(costs, key=lambda way: costs[way][0] + byte * costs[way][1])
    flops, held = costs[way]
    narrow = f"{size.examples} examples, {size.inputs} x {size.outputs} weights"
    swept = sum(math.prod(use.output_shape) for use in uses)
    read = 0 if way == "rows" else size.pieces * size.examples * size.inputs
    left = width * (num_tasks * max(swept, entries if way == "rows" else 0) + read)
    return LeafPlan(leaf, way, narrow, uses, size, flops, width * held, left)


def _plan_table(
    leaf: int, uses: tuple[Use, ...], size: Size, num_tasks: int, width: int
) -> LeafPlan | None:
    if 2 * size.examples > size.inputs:
        return None
    entries = size.examples * size.outputs
    return LeafPlan(
        leaf,
        "lookup",
        f"{size.examples} of {size.inputs} rows are looked up",
        uses,
        size,
        (num_tasks + 2 * num_tasks**2) * entries,
        2 * num_tasks * entries * width,
        num_tasks * entries * width,
    )


def _odd_convolution(uses: Sequence[Use]) -> str | None:
    """Why a convolution is no dense layer for every offset, or None where it is."""
    given = uses[0].eqn.params
    if len(uses) > 1:
        return "is the kernel of several convolutions"
    if uses[0].loops:
        return "is the kernel of a convolution inside a `scan`"
    if given["feature_group_count"] > 1 or given["batch_group_count"] > 1:
        return "is the kernel of a grouped convolution"
    if any(gap > 1 for gap in given["lhs_dilation"]):
        return "is the kernel of a transposed convolution"
    return None


def _kernel_cost(uses: Sequence[Use], size: Size, tasks: int) -> tuple[int, int]:
    """Operations, and numbers held at once."""
    pieces, n, inputs, outputs = size
    seen, cotangents = n * n * inputs, tasks * n * outputs
    through = (n + tasks) * cotangents
    if uses[0].kind == "conv_general_dilated":  # one matrix for all offsets
        return 2 * (pieces * seen + through), n * n + cotangents
    return 2 * pieces * (seen + through), pieces * (n * n + cotangents)


def _rows_cost(size: Size, tasks: int) -> tuple[int, int]:
    pieces, n, inputs, outputs = size
    rows = pieces * tasks * inputs * outputs
    return 2 * (n + tasks) * rows, rows
