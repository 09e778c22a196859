"""Multi-task gradient combination for JAX, as links of an optax chain."""

from importlib.metadata import version as _version

from mtl_optax import metrics, solvers
from mtl_optax._accumulate_task_grads import accumulate_task_grads
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
from mtl_optax._smooth_weights import smooth_weights
from mtl_optax._subsample_tasks import subsample_tasks
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
from mtl_optax.aggregators import (
    db_mtl,
    excess_mtl,
    graddrop,
    m_config,
    moco,
    modo,
    priority_projection,
    scale_by_mao,
    sdmgrad,
    trimmed_mean,
)
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
    config,
    constant_weights,
    cosmos,
    dualproj,
    dwa,
    edm,
    fairgrad,
    famo,
    gls,
    go4align,
    gradnorm,
    gradvac,
    imgrad,
    imtl,
    imtl_g,
    imtl_l,
    krum,
    ldc_mtl,
    mean,
    mgda,
    nash_mtl,
    ntkmtl_sr,
    pbi,
    pcd,
    pcgrad,
    pivrg,
    relobralo,
    rlw,
    scale_invariant,
    softadapt,
    stch,
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
    "accumulate_task_grads",
    "aligned_mtl",
    "cagrad",
    "check_chain",
    "citation",
    "config",
    "connection_strength",
    "constant_weights",
    "cosmos",
    "db_mtl",
    "dualproj",
    "dwa",
    "edm",
    "excess_mtl",
    "explain",
    "fairgrad",
    "famo",
    "feature_jacobian",
    "from_aggregator",
    "from_weighting",
    "gls",
    "go4align",
    "graddrop",
    "gradnorm",
    "gradvac",
    "gramian",
    "imgrad",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "lazy_tree",
    "ldc_mtl",
    "look_ahead_jacobian",
    "look_ahead_steps",
    "m_config",
    "mao",
    "materialize",
    "mean",
    "metrics",
    "mgda",
    "moco",
    "modo",
    "nash_mtl",
    "ntkmtl_sr",
    "pbi",
    "pcd",
    "pcgrad",
    "per_group",
    "per_task",
    "phase_schedule",
    "pivrg",
    "priority_projection",
    "relobralo",
    "rlw",
    "scale_by_mao",
    "scale_invariant",
    "sdmgrad",
    "sequential_task_steps",
    "shared_mask",
    "shared_only",
    "skip_nonfinite_tasks",
    "smooth_weights",
    "softadapt",
    "solvers",
    "stack_tasks",
    "stch",
    "subsample_tasks",
    "sum_tasks",
    "task_jacobian",
    "task_tensioner",
    "task_touches",
    "trimmed_mean",
    "uncertainty_weighting",
    "unstack_tasks",
    "update_every",
    "upgrad",
    "value_and_task_grads",
    "weighted_sum",
]
