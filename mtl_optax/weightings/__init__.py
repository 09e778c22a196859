"""Methods that turn the Gramian, the losses and their history into weights."""

from mtl_optax.weightings._aligned_mtl import aligned_mtl
from mtl_optax.weightings._cagrad import cagrad
from mtl_optax.weightings._constant_weights import constant_weights
from mtl_optax.weightings._dualproj import dualproj
from mtl_optax.weightings._edm import edm
from mtl_optax.weightings._fairgrad import fairgrad
from mtl_optax.weightings._gradvac import gradvac
from mtl_optax.weightings._imgrad import imgrad
from mtl_optax.weightings._imtl_g import imtl_g
from mtl_optax.weightings._krum import krum
from mtl_optax.weightings._mean import mean
from mtl_optax.weightings._mgda import mgda
from mtl_optax.weightings._nash_mtl import nash_mtl
from mtl_optax.weightings._ntkmtl_sr import ntkmtl_sr
from mtl_optax.weightings._pcd import pcd
from mtl_optax.weightings._pcgrad import pcgrad
from mtl_optax.weightings._pivrg import pivrg
from mtl_optax.weightings._rlw import rlw
from mtl_optax.weightings._task_tensioner import task_tensioner
from mtl_optax.weightings._uncertainty_weighting import uncertainty_weighting
from mtl_optax.weightings._upgrad import upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "constant_weights",
    "dualproj",
    "edm",
    "fairgrad",
    "gradvac",
    "imgrad",
    "imtl_g",
    "krum",
    "mean",
    "mgda",
    "nash_mtl",
    "ntkmtl_sr",
    "pcd",
    "pcgrad",
    "pivrg",
    "rlw",
    "task_tensioner",
    "uncertainty_weighting",
    "upgrad",
]
