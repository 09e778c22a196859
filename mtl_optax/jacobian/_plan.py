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
        "kernel": _kernel_cost(size, num_tasks, width),
        "rows": _rows_cost(size, num_tasks, width),
    }
    if 0 in size:
        return direct("it is empty")
    way = min(costs, key=lambda way: costs[way][0] + _FLOPS_PER_BYTE * costs[way][1])
    flops, held = costs[way]
    narrow = f"{size.examples} examples, {size.inputs} x {size.outputs} weights"
    swept = sum(math.prod(use.output_shape) for use in uses)
    read = 0 if way == "rows" else size.pieces * size.examples * size.inputs
    left = width * (num_tasks * max(swept, entries if way == "rows" else 0) + read)
    return LeafPlan(leaf, way, narrow, uses, size, flops, held, left)


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


def _kernel_cost(size: Size, num_tasks: int, width: int) -> tuple[int, int]:
    pieces, n, inputs, outputs = size
    held = num_tasks * n * outputs
    flops = n * n * inputs + n * held + num_tasks * held
    return 2 * pieces * flops, width * (n * n + held)


def _rows_cost(size: Size, num_tasks: int, width: int) -> tuple[int, int]:
    pieces, n, inputs, outputs = size
    held = num_tasks * inputs * outputs
    return 2 * pieces * (n * held + num_tasks * held), width * held
