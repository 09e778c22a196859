"""Methods that turn the Gramian, the losses and their history into weights."""

from mtl_optax.weightings._aligned_mtl import aligned_mtl
from mtl_optax.weightings._cagrad import cagrad
from mtl_optax.weightings._config import config
from mtl_optax.weightings._constant_weights import constant_weights
from mtl_optax.weightings._cosmos import cosmos
from mtl_optax.weightings._dualproj import dualproj
from mtl_optax.weightings._dwa import dwa
from mtl_optax.weightings._edm import edm
from mtl_optax.weightings._fairgrad import fairgrad
from mtl_optax.weightings._famo import famo
from mtl_optax.weightings._gls import gls
from mtl_optax.weightings._go4align import go4align
from mtl_optax.weightings._gradnorm import gradnorm
from mtl_optax.weightings._gradvac import gradvac
from mtl_optax.weightings._imgrad import imgrad
from mtl_optax.weightings._imtl import imtl
from mtl_optax.weightings._imtl_g import imtl_g
from mtl_optax.weightings._imtl_l import imtl_l
from mtl_optax.weightings._krum import krum
from mtl_optax.weightings._ldc_mtl import ldc_mtl
from mtl_optax.weightings._mean import mean
from mtl_optax.weightings._mgda import mgda
from mtl_optax.weightings._nash_mtl import nash_mtl
from mtl_optax.weightings._ntkmtl_sr import ntkmtl_sr
from mtl_optax.weightings._pbi import pbi
from mtl_optax.weightings._pcd import pcd
from mtl_optax.weightings._pcgrad import pcgrad
from mtl_optax.weightings._pivrg import pivrg
from mtl_optax.weightings._relobralo import relobralo
from mtl_optax.weightings._rlw import rlw
from mtl_optax.weightings._scale_invariant import scale_invariant
from mtl_optax.weightings._softadapt import softadapt
from mtl_optax.weightings._stch import stch
from mtl_optax.weightings._task_tensioner import task_tensioner
from mtl_optax.weightings._uncertainty_weighting import uncertainty_weighting
from mtl_optax.weightings._upgrad import upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config",
    "constant_weights",
    "cosmos",
    "dualproj",
    "dwa",
    "edm",
    "fairgrad",
    "famo",
    "gls",
    "go4align",
    "gradnorm",
    "gradvac",
    "imgrad",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "ldc_mtl",
    "mean",
    "mgda",
    "nash_mtl",
    "ntkmtl_sr",
    "pbi",
    "pcd",
    "pcgrad",
    "pivrg",
    "relobralo",
    "rlw",
    "scale_invariant",
    "softadapt",
    "stch",
    "task_tensioner",
    "uncertainty_weighting",
    "upgrad",
]
