"""Exact small quadratic programs on the simplex, solved inside the graph."""

from mtl_optax.solvers._central_direction import (
    CentralDirection,
    central_direction,
    centred_rows,
)
from mtl_optax.solvers._min_norm import min_norm_point
from mtl_optax.solvers._simplex_qp import SolverInfo, simplex_qp

__all__ = [
    "CentralDirection",
    "SolverInfo",
    "central_direction",
    "centred_rows",
    "min_norm_point",
    "simplex_qp",
]
