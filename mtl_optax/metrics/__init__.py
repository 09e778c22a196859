"""Measures of a multi-task result, and how sure of them one can be.

Four kinds of pure function, none of which trains anything:

- comparing methods: ``delta_m``, ``mean_rank``;
- doubting the comparison: ``bootstrap_interval``, ``t_interval``, ``winners``,
  ``clear_winner``;
- comparing trade-offs: ``pareto_filter``, ``hypervolume``;
- watching gradients: ``cosine_matrix``, ``cosine_statistics``, ``conflicting_pairs``,
  ``share_of_conflicting_steps``, ``magnitude_similarity``, ``curvature_bounding``,
  ``condition_number``.

Arrays and (nested) Python lists are both accepted. A floating-point input keeps its
dtype; integers become JAX's default float. Values are checked wherever they are
concrete, shapes always.
"""

from mtl_optax.metrics._gradients import (
    CosineStatistics,
    condition_number,
    conflicting_pairs,
    cosine_matrix,
    cosine_statistics,
    curvature_bounding,
    magnitude_similarity,
    share_of_conflicting_steps,
)
from mtl_optax.metrics._pareto import hypervolume, pareto_filter
from mtl_optax.metrics._quality import (
    bootstrap_interval,
    clear_winner,
    delta_m,
    mean_rank,
    t_interval,
    winners,
)

__all__ = [
    "CosineStatistics",
    "bootstrap_interval",
    "clear_winner",
    "condition_number",
    "conflicting_pairs",
    "cosine_matrix",
    "cosine_statistics",
    "curvature_bounding",
    "delta_m",
    "hypervolume",
    "magnitude_similarity",
    "mean_rank",
    "pareto_filter",
    "share_of_conflicting_steps",
    "t_interval",
    "winners",
]
