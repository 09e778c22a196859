"""Complete examples, each a few short files.

Needs ``pip install "mtl_optax[examples]"``. Nothing of it is imported by the package
itself.
"""
