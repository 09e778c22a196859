"""Comparing trade-offs: which are worth having, and how much a set of them covers."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mtl_optax.metrics._inputs import Numbers, as_float, at_least_float32, is_concrete


def pareto_filter(points: Numbers) -> Bool[Array, " points"]:
    """Mask of the points that no other point dominates.

        j dominates i  if  points_jm <= points_im for all m, and < for some m
        front[i] = no j dominates i

    Use it to drop, from runs with other methods, weights or seeds, those that are worse
    in everything than some run at hand. It sees no noise: of two runs that differ by
    luck one may vanish, so filter means over seeds, and look at ``winners`` too. The
    more losses, the less it filters: of 100 random points, about 5 are left with 2
    losses, and most with 10.

    Duplicates do not dominate each other: all are kept. A point with a NaN is never on
    the front, and dominates nobody.

    Args:
      points: ``[N, M]``, N points of M losses, lower is better; negate what is to be
        maximised. Compares in their dtype; memory grows as ``N * N * M``.

    Returns:
      ``[N]`` bools.

    Raises:
      ValueError: if ``points`` is no matrix, or there are no losses.
      TypeError: if ``points`` is not real-valued.

    Example:
      >>> from mtl_optax import metrics
      >>> losses = [[0.2, 0.9], [0.5, 0.5], [0.6, 0.5], [0.9, 0.1]]
      >>> metrics.pareto_filter(losses).tolist()
      [True, True, False, True]

    References:
      Sener & Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS
      2018, Definition 1.
    """
    points = _per_point("pareto_filter", points)
    ours, theirs = points[None, :], points[:, None]  # axes: their point, our point
    dominates = jnp.all(theirs <= ours, axis=-1) & jnp.any(theirs < ours, axis=-1)
    # A comparison with NaN is false, so such a point needs no mask to dominate nobody.
    return ~jnp.any(dominates, axis=0) & ~jnp.any(jnp.isnan(points), axis=-1)


def hypervolume(points: Numbers, reference: Numbers) -> Float[Array, ""]:
    """Volume of what the points dominate, up to a reference point.

        volume of  {x : points_i <= x <= reference for some i}

    Use it to put a set of trade-offs (one method at several weights, say) into one
    number: no set that misses a better trade-off has the highest. Bigger is better. The
    number depends on the reference and on the units of every loss, so compare only at
    the same reference, fixed before looking (losses at the start of training, or 1.1
    times the worst of all methods), and bring the losses to similar ranges first.

    A point that does not beat the reference in every loss adds nothing, nor does one
    with a NaN; one at -inf makes the volume infinite.

    Exact up to rounding, in at least float32, and only ever adding positive numbers.
    The work grows as ``N ** (M - 1)`` at worst (a sort and N steps for M = 2), as loops
    that skip dominated points; 100 points on a front took 0.5, 1, 30 and 800 ms of one
    CPU core at M = 3, 4, 5, 6. Memory grows as ``N * N``. Under ``jax.vmap`` the loops
    cannot skip, under ``jax.lax.map`` they can.

    Differentiable; at ties and on the edge of dominance, from one side.

    Args:
      points: ``[N, M]``, N points of M losses, lower is better; negate what is to be
        maximised, here and in ``reference``. N = 0 gives 0.
      reference: ``[M]``, finite, the worst loss that counts, in the same units.

    Returns:
      A scalar >= 0, dtype of ``points``, in the product of the losses' units.

    Raises:
      ValueError: if shapes do not fit, or a concrete reference is not finite (a traced
        one then gives NaN).
      TypeError: if something is not real-valued.

    Example:
      Two boxes, 1 x 3 and 2 x 1, which share 1 x 1; the third point is out of bounds:

      >>> from mtl_optax import metrics
      >>> losses = [[2.0, 0.0], [1.0, 2.0], [0.0, 5.0]]
      >>> float(metrics.hypervolume(losses, [3.0, 3.0]))
      4.0

    References:
      Zitzler & Thiele, "Multiobjective Evolutionary Algorithms: A Comparative Case
      Study and the Strength Pareto Approach", IEEE TEC 1999 (the measure); While et
      al., "A Faster Algorithm for Calculating Hypervolume", IEEE TEC 2006 (slicing one
      objective after the other).
    """
    raw_reference = reference
    points = _per_point("hypervolume", points)
    num_points, num_losses = points.shape
    dtype = points.dtype
    reference = as_float("reference", reference)
    if reference.shape != (num_losses,):
        raise ValueError(
            f"hypervolume: reference must have shape {(num_losses,)}, one worst value "
            f"a loss, got {reference.shape}"
        )
    if is_concrete(raw_reference):
        with jax.ensure_compile_time_eval():
            usable = bool(jnp.all(jnp.isfinite(as_float("reference", raw_reference))))
        if not usable:
            raise ValueError(
                f"hypervolume: reference must be finite, got {raw_reference}"
            )
    if num_points == 0:
        return jnp.zeros((), dtype)
    work = at_least_float32(dtype)
    points, reference = points.astype(work), reference.astype(work)
    # Every point that counts is a box between itself and the reference; what does not
    # count is a box without extent. False for NaN.
    counts = jnp.all(points < reference[None], axis=-1)
    endless = counts & jnp.any(jnp.isneginf(points), axis=-1)
    counts = counts & ~endless
    boxes = jnp.where(counts[:, None], reference[None] - points, 0)
    volume = _volume_of_boxes(boxes, counts)
    volume = jnp.where(jnp.any(endless), jnp.inf, volume)
    volume = jnp.where(jnp.all(jnp.isfinite(reference)), volume, jnp.nan)
    return volume.astype(dtype)


def _volume_of_boxes(
    boxes: Float[Array, "N M"], counts: Bool[Array, " N"]
) -> Float[Array, ""]:
    """Volume of the union of boxes that have one corner in common.

    Cuts across the last edge, longest first: down to the next longest, the section is
    the union of the boxes met so far, without that edge. A section is measured the
    same way, one edge less, until a grid over one or two edges can hold how far the
    boxes met so far reach along the first edge.
    """
    num_boxes, num_edges = boxes.shape
    if num_edges == 1:
        return jnp.max(boxes)
    # Slab k of an edge lies between the k-th longest and the next.
    orders = jnp.argsort(-boxes, axis=0)
    lengths = jnp.take_along_axis(boxes, orders, axis=0)
    thickness = lengths - jnp.concatenate([lengths[1:], jnp.zeros_like(lengths[:1])])
    ranks = jnp.argsort(orders, axis=0)
    slabs = jnp.arange(num_boxes)
    grid_edges = range(1, min(num_edges - 1, 3))

    def spread(values: Array, axis: int) -> Array:
        """A vector along one axis of the grid."""
        return jnp.expand_dims(values, [e - 1 for e in grid_edges if e - 1 != axis])

    cells = jnp.ones((1,) * len(grid_edges), boxes.dtype)
    for edge in grid_edges:
        cells = cells * spread(thickness[:, edge], edge - 1)

    def add_to_grid(reach: Array, new: Int[Array, ""]) -> Array:
        inside = jnp.ones((1,) * len(grid_edges), bool)
        for edge in grid_edges:
            inside = inside & spread(ranks[new, edge] <= slabs, edge - 1)
        return jnp.where(inside, jnp.maximum(reach, boxes[new, 0]), reach)

    def volume(last: int, present: Bool[Array, " N"]) -> Float[Array, ""]:
        """Of the boxes that are present, in the edges up to the last."""
        on_grid = last == len(grid_edges) + 1
        faces = boxes[:, :last]

        def cut(carry: tuple[Array, Array], new: Array) -> tuple[Any, Array]:
            met, section = carry
            face = faces[new][None]
            if on_grid:  # what was met is how far it reaches
                grows = present[new]

                def grow() -> tuple[Array, Array]:
                    reach = add_to_grid(met, new)
                    return reach, jnp.sum(reach * cells)
            else:  # which boxes were met, less those that others cover
                grows = present[new] & ~jnp.any(met & jnp.all(faces >= face, axis=1))

                def grow() -> tuple[Array, Array]:
                    uncovered = met & jnp.any(faces > face, axis=1)
                    these = uncovered.at[new].set(True)
                    return these, volume(last - 1, these)

            carry = jax.lax.cond(grows, grow, lambda: (met, section))
            return carry, carry[1]

        nothing = jnp.zeros(cells.shape, cells.dtype) if on_grid else slabs < 0
        start = nothing, jnp.zeros((), boxes.dtype)
        _, sections = jax.lax.scan(cut, start, orders[:, last])
        return jnp.sum(sections * thickness[:, last])

    return volume(num_edges - 1, counts)


def _per_point(caller: str, points: Numbers) -> Float[Array, "N M"]:
    points = as_float("points", points)
    if points.ndim != 2 or points.shape[1] == 0:
        raise ValueError(
            f"{caller}: points must have shape [N, M], M >= 1 losses a point, "
            f"got {points.shape}"
        )
    return points
