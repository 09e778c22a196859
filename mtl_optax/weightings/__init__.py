"""Methods that turn the Gramian, the losses and their history into weights."""

from mtl_optax.weightings._edm import edm
from mtl_optax.weightings._mean import mean
from mtl_optax.weightings._mgda import mgda
from mtl_optax.weightings._task_tensioner import task_tensioner

__all__ = ["edm", "mean", "mgda", "task_tensioner"]
