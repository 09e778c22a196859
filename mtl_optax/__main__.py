"""``python -m mtl_optax`` is the `mtl-optax` command."""

from mtl_optax._cli import main

if __name__ == "__main__":
    raise SystemExit(main())
