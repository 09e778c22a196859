"""Methods that look at whole task gradients."""

from mtl_optax.aggregators._db_mtl import db_mtl
from mtl_optax.aggregators._excess_mtl import excess_mtl
from mtl_optax.aggregators._graddrop import graddrop
from mtl_optax.aggregators._m_config import m_config
from mtl_optax.aggregators._moco import moco
from mtl_optax.aggregators._modo import modo
from mtl_optax.aggregators._priority_projection import priority_projection
from mtl_optax.aggregators._scale_by_mao import scale_by_mao
from mtl_optax.aggregators._sdmgrad import sdmgrad
from mtl_optax.aggregators._trimmed_mean import trimmed_mean

__all__ = [
    "db_mtl",
    "excess_mtl",
    "graddrop",
    "m_config",
    "moco",
    "modo",
    "priority_projection",
    "scale_by_mao",
    "sdmgrad",
    "trimmed_mean",
]
