"""Multi-task gradient combination for JAX, as links of an optax chain."""

from importlib.metadata import version as _version

from mtl_optax import metrics, solvers
from mtl_optax._aliases import mao
from mtl_optax._check import check_chain
from mtl_optax._citations import citation
from mtl_optax._connection_strength import connection_strength
from mtl_optax._look_ahead_steps import look_ahead_steps
from mtl_optax._method import Method
from mtl_optax._per_group import per_group
from mtl_optax._per_task import per_task
from mtl_optax._phase_schedule import phase_schedule
from mtl_optax._registry import METHODS
from mtl_optax._sequential_task_steps import sequential_task_steps
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
from mtl_optax._update_every import update_every
from mtl_optax._wrappers import shared_only, skip_nonfinite_tasks
from mtl_optax.aggregators import priority_projection, scale_by_mao
from mtl_optax.jacobian import (
    Explanation,
    explain,
    feature_jacobian,
    look_ahead_jacobian,
    shared_mask,
    task_jacobian,
    task_touches,
    value_and_task_grads,
)
from mtl_optax.weightings import (
    aligned_mtl,
    cagrad,
    constant_weights,
    dualproj,
    edm,
    fairgrad,
    gradvac,
    imgrad,
    imtl_g,
    krum,
    mean,
    mgda,
    nash_mtl,
    ntkmtl_sr,
    pcd,
    pcgrad,
    pivrg,
    rlw,
    task_tensioner,
    uncertainty_weighting,
    upgrad,
)

__version__ = _version("mtl_optax")

__all__ = [
    "METHODS",
    "Aggregator",
    "Combiner",
    "Explanation",
    "Method",
    "TaskJacobian",
    "Weighting",
    "aligned_mtl",
    "cagrad",
    "check_chain",
    "citation",
    "connection_strength",
    "constant_weights",
    "dualproj",
    "edm",
    "explain",
    "fairgrad",
    "feature_jacobian",
    "from_aggregator",
    "from_weighting",
    "gradvac",
    "gramian",
    "imgrad",
    "imtl_g",
    "krum",
    "lazy_tree",
    "look_ahead_jacobian",
    "look_ahead_steps",
    "mao",
    "materialize",
    "mean",
    "metrics",
    "mgda",
    "nash_mtl",
    "ntkmtl_sr",
    "pcd",
    "pcgrad",
    "per_group",
    "per_task",
    "phase_schedule",
    "pivrg",
    "priority_projection",
    "rlw",
    "scale_by_mao",
    "sequential_task_steps",
    "shared_mask",
    "shared_only",
    "skip_nonfinite_tasks",
    "solvers",
    "stack_tasks",
    "sum_tasks",
    "task_jacobian",
    "task_tensioner",
    "task_touches",
    "uncertainty_weighting",
    "unstack_tasks",
    "update_every",
    "upgrad",
    "value_and_task_grads",
    "weighted_sum",
]
