"""Multi-task gradient combination for JAX, as links of an optax chain."""

from importlib.metadata import version as _version

from mtl_optax import metrics, solvers
from mtl_optax._check import check_chain
from mtl_optax._registry import METHODS, Method
from mtl_optax._transform import (
    Combiner,
    from_aggregator,
    from_weighting,
    sum_tasks,
)
from mtl_optax._tree import (
    gramian,
    lazy_tree,
    materialize,
    stack_tasks,
    unstack_tasks,
    weighted_sum,
)
from mtl_optax._types import Aggregator, TaskJacobian, Weighting
from mtl_optax._wrappers import shared_only, skip_nonfinite_tasks
from mtl_optax.jacobian import shared_mask, task_jacobian, value_and_task_grads
from mtl_optax.weightings import edm, mean, mgda, task_tensioner

__version__ = _version("mtl_optax")

__all__ = [
    "METHODS",
    "Aggregator",
    "Combiner",
    "Method",
    "TaskJacobian",
    "Weighting",
    "check_chain",
    "edm",
    "from_aggregator",
    "from_weighting",
    "gramian",
    "lazy_tree",
    "materialize",
    "mean",
    "metrics",
    "mgda",
    "shared_mask",
    "shared_only",
    "skip_nonfinite_tasks",
    "solvers",
    "stack_tasks",
    "sum_tasks",
    "task_jacobian",
    "task_tensioner",
    "unstack_tasks",
    "value_and_task_grads",
    "weighted_sum",
]
