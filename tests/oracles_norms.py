"""Methods on lengths and entries of task gradients, again in float64 NumPy."""

ORACLES = {}
