"""Weightings that follow the losses from step to step, again in float64 NumPy."""

ORACLES = {}
