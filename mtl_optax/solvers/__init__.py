"""Exact small convex programs on Gramians, solved inside the graph."""

from mtl_optax.solvers._averse import averse_weights
from mtl_optax.solvers._central_direction import (
    CentralDirection,
    central_direction,
    centred_rows,
)
from mtl_optax.solvers._dual_cone import dual_cone_projection
from mtl_optax.solvers._equal_projections import (
    Projections,
    conflict_free_weights,
    equal_projections,
    impartial_weights,
)
from mtl_optax.solvers._graded_eigh import graded_eigh
from mtl_optax.solvers._min_norm import min_norm_point
from mtl_optax.solvers._positive_root import positive_root
from mtl_optax.solvers._simplex_norm import simplex_norm
from mtl_optax.solvers._simplex_projection import simplex_projection
from mtl_optax.solvers._simplex_qp import SolverInfo, simplex_qp
from mtl_optax.solvers._sorted_rows import sorted_rows
from mtl_optax.solvers._unit_rows import UnitRows, unit_rows

__all__ = [
    "CentralDirection",
    "Projections",
    "SolverInfo",
    "UnitRows",
    "averse_weights",
    "central_direction",
    "centred_rows",
    "conflict_free_weights",
    "dual_cone_projection",
    "equal_projections",
    "graded_eigh",
    "impartial_weights",
    "min_norm_point",
    "positive_root",
    "simplex_norm",
    "simplex_projection",
    "simplex_qp",
    "sorted_rows",
    "unit_rows",
]
