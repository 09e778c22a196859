"""Watching task gradients, through their Gramian."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mtl_optax.metrics._inputs import Numbers, as_float, at_least_float32, is_concrete

_Mask = Bool[Array, "..."] | Sequence[Any] | None


class CosineStatistics(NamedTuple):
    """What `cosine_statistics` says of the pairs of tasks; each is ``[...]``."""

    mean: Float[Array, "*batch"]
    min: Float[Array, "*batch"]
    max: Float[Array, "*batch"]
    share_negative: Float[Array, "*batch"]


def cosine_matrix(
    gramian: Numbers,
) -> Float[Array, "*batch tasks tasks"]:
    """Cosines of the angles between task gradients, from their Gramian.

        C_ab = G_ab / sqrt(G_aa) / sqrt(G_bb)

    with 0 in the row and column of a zero gradient, so a masked or solved task never
    gives NaN.

    Use it to look at conflict apart from scale. It cannot see more than the Gramian
    holds: angles below about 1e-3 are lost to float32 rounding.

    Dividing by one norm at a time keeps float32 in range for gradient norms from 1e-19
    to 1e19, where the product of two squared norms would overflow beyond 1e9.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients.

    Returns:
      ``[..., T, T]`` in [-1, 1]. NaN or infinite gradients give NaN, except opposite a
      zero gradient.

    Raises:
      ValueError: if the last two axes are not square.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients (3, 4), (0, 1) and (0, 0):

      >>> from mtl_optax import metrics
      >>> G = [[25.0, 4.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
      >>> [[round(c, 3) for c in row] for row in metrics.cosine_matrix(G).tolist()]
      [[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    gramian = _square("cosine_matrix", gramian)
    squared = jnp.diagonal(gramian, axis1=-2, axis2=-1)
    absent = squared <= 0  # false for NaN, which must stay visible
    norm = jnp.sqrt(jnp.where(absent, 1, squared))
    cosine = gramian / norm[..., :, None] / norm[..., None, :]
    either_absent = absent[..., :, None] | absent[..., None, :]
    return jnp.where(either_absent, 0, jnp.clip(cosine, -1, 1))


def cosine_statistics(gramian: Numbers, *, task_mask: _Mask = None) -> CosineStatistics:
    """Mean, least and greatest cosine between task gradients, and how many conflict.

        over pairs a < b of present tasks with nonzero gradients:
        mean, min, max of cos(g_a, g_b), and the share of pairs with cos(g_a, g_b) < 0

    Use it to log a run's conflict in four numbers a step, whatever the number of tasks.
    ``min`` sees one bad pair that ``mean`` hides, but falls by chance as tasks are
    added. Unlike ``conflicting_pairs``, pairs with a zero gradient are left out of the
    denominator, and there is no tolerance: orthogonal gradients count as negative when
    rounding says so.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients.
      task_mask: ``[..., T]`` bools, True where a task is present, leading axes
        broadcast; an absent task does not count, whatever (NaN too) its row holds. All
        tasks are present by default.

    Returns:
      ``CosineStatistics(mean, min, max, share_negative)``, each ``[...]``, dtype of
      ``gramian``. All four are NaN where there is no pair to speak of (a single task,
      say), so that ``jnp.nanmean`` over steps leaves that step out, and where a present
      gradient is not finite.

    Raises:
      ValueError: if the last two axes are not square, or the mask does not fit.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients (1, 0), (-1, 1) and (0, 1):

      >>> from mtl_optax import metrics
      >>> G = [[1.0, -1.0, 0.0], [-1.0, 2.0, 1.0], [0.0, 1.0, 1.0]]
      >>> [f"{x:.2f}" for x in metrics.cosine_statistics(G)]
      ['0.00', '-0.71', '0.71', '0.33']
      >>> found = metrics.cosine_statistics(G, task_mask=[False, True, True])
      >>> [f"{x:.2f}" for x in found]
      ['0.71', '0.71', '0.71', '0.00']

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
      Definition 1.
    """
    gramian = _square("cosine_statistics", gramian)
    dtype, shape = gramian.dtype, gramian.shape[:-1]
    squared = jnp.diagonal(gramian, axis1=-2, axis2=-1)
    counts = _present("cosine_statistics", task_mask, shape) & ~(squared <= 0)
    pairs = jnp.triu(counts[..., :, None] & counts[..., None, :], k=1)
    # In float32, since bfloat16 counts to 256 only.
    work = at_least_float32(dtype)
    cosine = cosine_matrix(gramian.astype(work))
    number = jnp.sum(pairs, axis=(-2, -1), dtype=work)
    broken = jnp.any(pairs & jnp.isnan(cosine), axis=(-2, -1))

    def share(values: Array) -> Array:
        total = jnp.sum(jnp.where(pairs, values, 0), axis=(-2, -1), dtype=work)
        return total / jnp.maximum(number, 1)

    return CosineStatistics(
        *(
            jnp.where((number == 0) | broken, jnp.nan, value).astype(dtype)
            for value in (
                share(cosine),
                jnp.min(jnp.where(pairs, cosine, 1), axis=(-2, -1), initial=1),
                jnp.max(jnp.where(pairs, cosine, -1), axis=(-2, -1), initial=-1),
                share((cosine < 0).astype(work)),
            )
        )
    )


def conflicting_pairs(gramian: Numbers, *, tol: float = 0.0) -> Float[Array, "*batch"]:
    """Share of task pairs whose gradients conflict.

        #{a < b : cos(g_a, g_b) < -tol} / (T (T - 1) / 2)

    Use it to see how much tasks disagree at one step. It counts, and does not weigh: a
    cosine of -0.01 counts as much as -1. Exactly orthogonal gradients have a cosine of
    rounding noise, negative half of the time, so give a ``tol`` (1e-6 in float32) where
    they can occur.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients.
      tol: how far below zero a cosine must lie, in [0, 1); 0 after the definition of
        Yu et al.

    Returns:
      ``[...]`` in [0, 1]; 0 for a single task. A zero gradient conflicts with none but
      its pairs are counted in the denominator; NaN is not a conflict.

    Raises:
      ValueError: if the last two axes are not square, or ``tol`` is out of range.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients (1, 0), (-1, 1) and (0, 1): of three pairs only the first conflicts.

      >>> from mtl_optax import metrics
      >>> G = [[1.0, -1.0, 0.0], [-1.0, 2.0, 1.0], [0.0, 1.0, 1.0]]
      >>> f"{metrics.conflicting_pairs(G):.3f}"
      '0.333'

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
      Definition 1.
    """
    gramian = _square("conflicting_pairs", gramian)
    num_tasks = gramian.shape[-1]
    num_pairs = max(num_tasks * (num_tasks - 1) // 2, 1)
    conflicts = jnp.sum(_conflicts("conflicting_pairs", gramian, tol), axis=(-2, -1))
    return conflicts.astype(gramian.dtype) / num_pairs


def share_of_conflicting_steps(
    gramians: Numbers, *, tol: float = 0.0, axis: int = 0
) -> Float[Array, "*batch"]:
    """Share of steps in which at least one pair of task gradients conflicts.

        #{s : some a < b has cos(g_a, g_b) < -tol at step s} / steps

    Use it to ask whether a run needs more than the plain sum. The more tasks, the
    sooner some pair conflicts by chance (random gradients: 1/2 for two tasks, 7/8 for
    three in high dimension), so never compare it across numbers of tasks;
    ``conflicting_pairs`` averaged over steps may be compared.

    Args:
      gramians: ``[steps, T, T]``, one Gramian a step; more leading axes (seeds) may
        surround ``axis``.
      tol: how far below zero a cosine must lie, in [0, 1); see ``conflicting_pairs``.
      axis: the axis of the steps, among those before the last two; the first by
        default, as ``lax.scan`` stacks them.

    Returns:
      ``[...]``, the leading axes without ``axis``, in [0, 1]. Zero and NaN gradients do
      not conflict.

    Raises:
      ValueError: if the last two axes are not square, there is no step, or ``tol`` or
        ``axis`` is out of range.
      TypeError: if ``gramians`` is not real-valued.

    Example:
      >>> from mtl_optax import metrics
      >>> steps = [[[1.0, -0.5], [-0.5, 1.0]], [[1.0, 0.5], [0.5, 1.0]]]
      >>> float(metrics.share_of_conflicting_steps(steps))
      0.5

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020.
    """
    gramians = _square("share_of_conflicting_steps", gramians)
    leading = gramians.shape[:-2]
    if not -len(leading) <= axis < len(leading):
        raise ValueError(
            f"share_of_conflicting_steps: axis must name one of the axes {leading} "
            f"before the last two of gramians, {gramians.shape}; got {axis}"
        )
    if leading[axis] == 0:
        raise ValueError(
            f"share_of_conflicting_steps: expected at least one step along axis "
            f"{axis}, got gramians of shape {gramians.shape}"
        )
    found = _conflicts("share_of_conflicting_steps", gramians, tol).any(axis=(-2, -1))
    return jnp.mean(found, axis=axis, dtype=gramians.dtype)


def magnitude_similarity(gramian: Numbers) -> Float[Array, "*batch tasks tasks"]:
    """How alike the lengths of task gradients are, pair by pair.

        S_ab = 2 |g_a| |g_b| / (|g_a|^2 + |g_b|^2)

    1 for equal lengths, towards 0 as one gradient dominates: 0.2 at a ratio of 10.

    Use it to ask whether a plain sum listens to all tasks, apart from where their
    gradients point (``cosine_matrix``). If it is small and cosines are not negative,
    weights that level lengths are worth a try before anything that resolves conflict.

    A zero gradient is unlike any other (0), and like another zero gradient (1, so that
    the diagonal is 1 throughout). Computed from the ratio of the two lengths, so that
    nothing overflows.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients; only the diagonal is
        read, and what is not positive there counts as zero.

    Returns:
      ``[..., T, T]`` in [0, 1], symmetric. NaN in the row and column of a NaN gradient,
      and between infinite ones.

    Raises:
      ValueError: if the last two axes are not square.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients of lengths 1, 2 and 0:

      >>> from mtl_optax import metrics
      >>> G = [[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
      >>> found = metrics.magnitude_similarity(G).tolist()
      >>> [[round(s, 3) for s in row] for row in found]
      [[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 1.0]]

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
      Definition 2.
    """
    ratio = _length_ratios(_square("magnitude_similarity", gramian))
    return 2 * ratio / (1 + ratio**2)


def curvature_bounding(gramian: Numbers) -> Float[Array, "*batch tasks tasks"]:
    """Multi-task curvature bounding measure of pairs of task gradients.

        X_ab = (1 - cos(g_a, g_b)^2) |g_a - g_b|^2 / |g_a + g_b|^2

    Use it with ``cosine_matrix`` and ``magnitude_similarity`` to look for the three
    conditions under which PCGrad's step on two tasks provably beats the plain one: the
    cosine is below minus the magnitude similarity, the loss curves along the plain step
    by at least X times the gradient's Lipschitz constant, and the step is long enough.
    The smaller X, the easier the second. It says nothing about curvature itself.

    0 on the diagonal, and beside a zero gradient (which has no angle). Between exactly
    opposite gradients it is 0 too, though X has no limit where their lengths agree as
    well: near there it takes any value up to 4, and rounding decides.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients.

    Returns:
      ``[..., T, T]``, at least 0, symmetric. NaN or infinite gradients give NaN, except
      opposite a zero gradient.

    Raises:
      ValueError: if the last two axes are not square.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients (1, 0) and (-1, 1): (1 - 1/2) * 5 / 1.

      >>> from mtl_optax import metrics
      >>> G = [[1.0, -1.0], [-1.0, 2.0]]
      >>> found = metrics.curvature_bounding(G).tolist()
      >>> [[round(x, 3) for x in row] for row in found]
      [[0.0, 2.5], [2.5, 0.0]]

    References:
      Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Definition 5
      and Theorem 2.
    """
    gramian = _square("curvature_bounding", gramian)
    ratio, cosine = _length_ratios(gramian), cosine_matrix(gramian)
    # Both squares in units of the longer one's, as sums of what is not negative:
    # 1 + r^2 -+ 2 r cos would cancel.
    unequal, twice = (1 - ratio) ** 2, 2 * ratio
    difference = unequal + twice * (1 - cosine)
    total = unequal + twice * (1 + cosine)
    opposite = total == 0
    spread = (1 - cosine) * (1 + cosine)
    measure = spread * difference / jnp.where(opposite, 1, total)
    squared = jnp.diagonal(gramian, axis1=-2, axis2=-1)
    absent = squared <= 0
    angleless = absent[..., :, None] | absent[..., None, :]
    same = jnp.eye(gramian.shape[-1], dtype=bool)
    same = jnp.broadcast_to(same, gramian.shape) & ~jnp.isnan(cosine)
    return jnp.where(angleless | opposite | same, 0, measure)


def condition_number(
    gramian: Numbers, *, task_mask: _Mask = None
) -> Float[Array, "*batch"]:
    """Condition number of the Gramian of task gradients.

        largest eigenvalue / smallest eigenvalue,
        inf where  smallest <= tasks * eps * largest

    1 for orthogonal gradients of equal length; both conflict and one gradient's
    dominance raise it, and it does not say which (``cosine_matrix`` and
    ``magnitude_similarity`` do). Agreement raises it too: two equal gradients have inf.

    **The paper's number is the square root of this one**: Senushkin et al. take the
    largest over the smallest singular value of the matrix of gradients itself.

    Use it to see how near task gradients come to depending on one another, and how much
    a method that inverts the Gramian may magnify rounding. The Gramian holds no more
    than its dtype does: in float32 everything above about 8e6 / T reads inf.

    Args:
      gramian: ``[..., T, T]``, inner products of task gradients; eps is its dtype's.
      task_mask: ``[..., T]`` bools, True where a task is present, leading axes
        broadcast; the number is that of the present tasks' rows and columns alone. All
        tasks are present by default.

    Returns:
      ``[...]``, at least 1, dtype of ``gramian``. One task with a nonzero gradient
      gives 1. A zero gradient makes it inf, be it one of many or all there are. NaN
      where a present gradient is not finite, and where no task is present.

    Raises:
      ValueError: if the last two axes are not square, or the mask does not fit.
      TypeError: if ``gramian`` is not real-valued.

    Example:
      Gradients (1, 0), (1, 1) and (2, 2); the last two depend on each other:

      >>> from mtl_optax import metrics
      >>> G = [[1.0, 1.0, 2.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0]]
      >>> float(metrics.condition_number(G))
      inf
      >>> found = metrics.condition_number(G, task_mask=[True, True, False])
      >>> f"{found:.2f}, as the paper counts {found ** 0.5:.2f}"
      '6.85, as the paper counts 2.62'

    References:
      Senushkin et al., "Independent Component Alignment for Multi-Task Learning",
      CVPR 2023.
    """
    gramian = _square("condition_number", gramian)
    dtype, num_tasks = gramian.dtype, gramian.shape[-1]
    present = _present("condition_number", task_mask, gramian.shape[:-1])
    if num_tasks == 0:
        return jnp.full(gramian.shape[:-2], jnp.nan, dtype)
    both = present[..., :, None] & present[..., None, :]
    number = jnp.sum(present, axis=-1)
    counted = jnp.where(both, gramian, 0).astype(at_least_float32(dtype))
    finite = jnp.all(jnp.isfinite(counted), axis=(-2, -1))
    counted = jnp.where(finite[..., None, None], counted, 0)
    # To unit size: eigenvalues are at most T times the largest entry, and may overflow.
    size = jnp.max(jnp.abs(counted), axis=(-2, -1), keepdims=True)
    scaled = counted / jnp.where(size > 0, size, 1)
    values = jnp.linalg.eigvalsh(scaled)
    # Ascending, and an absent task adds a zero; a smallest one that rounding made
    # negative changes places with it, but is as singular.
    position = jnp.clip(num_tasks - number, 0, num_tasks - 1)
    smallest = jnp.take_along_axis(values, position[..., None], axis=-1)[..., 0]
    largest = values[..., -1]
    threshold = number.astype(values.dtype) * float(jnp.finfo(dtype).eps) * largest
    singular = ~(smallest > threshold)
    ratio = jnp.where(singular, jnp.inf, largest / jnp.where(singular, 1, smallest))
    return jnp.where(finite & (number > 0), ratio, jnp.nan).astype(dtype)


def _square(caller: str, gramian: Numbers) -> Float[Array, "*batch tasks tasks"]:
    gramian = as_float("gramian", gramian)
    if gramian.ndim < 2 or gramian.shape[-1] != gramian.shape[-2]:
        raise ValueError(
            f"{caller}: a Gramian must have shape [..., T, T], got {gramian.shape}"
        )
    return gramian


def _conflicts(
    caller: str, gramian: Float[Array, "*batch tasks tasks"], tol: float
) -> Bool[Array, "*batch tasks tasks"]:
    """Which pairs a < b conflict."""
    if is_concrete(tol) and not 0 <= tol < 1:
        raise ValueError(f"{caller}: tol must lie in [0, 1), got {tol}")
    return jnp.triu(cosine_matrix(gramian) < -tol, k=1)


def _present(
    caller: str, task_mask: _Mask, shape: tuple[int, ...]
) -> Bool[Array, "*batch tasks"]:
    """The mask, or all tasks, as bools of the shape ``[..., T]``."""
    if task_mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(task_mask)
    fits = mask.shape[-1:] == shape[-1:] and mask.ndim <= len(shape)
    if fits:
        aligned = shape[len(shape) - mask.ndim :]
        fits = all(m in (1, n) for m, n in zip(mask.shape, aligned, strict=True))
    if not fits or mask.dtype != bool:
        raise ValueError(
            f"{caller}: task_mask must be bools of shape {shape[-1:]}, True where the "
            f"task is present, or broadcast against {shape} along leading axes; got "
            f"{mask.dtype} of shape {mask.shape}"
        )
    return jnp.broadcast_to(mask, shape)


def _length_ratios(
    gramian: Float[Array, "*batch tasks tasks"],
) -> Float[Array, "*batch tasks tasks"]:
    """The shorter over the longer of two gradients; 1 between two zeros."""
    squared = jnp.diagonal(gramian, axis1=-2, axis2=-1)
    absent = squared <= 0  # false for NaN, which must stay visible
    # The root's own gradient is infinite at 0.
    norm = jnp.where(absent, 0, jnp.sqrt(jnp.where(absent, 1, squared)))
    shorter = jnp.minimum(norm[..., :, None], norm[..., None, :])
    longer = jnp.maximum(norm[..., :, None], norm[..., None, :])
    zeros = longer == 0
    return jnp.where(zeros, 1, shorter / jnp.where(zeros, 1, longer))
