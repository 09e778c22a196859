"""Methods with moments, or several batches, again in float64 NumPy."""

ORACLES = {}
