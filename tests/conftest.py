"""What the whole test suite shares."""

import json
import pathlib

import jax
import pytest

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture
def x64():
    """64-bit numbers for one test."""
    if hasattr(jax, "enable_x64"):
        context = jax.enable_x64(True)
    else:  # jax < 0.8
        from jax.experimental import enable_x64

        context = enable_x64(True)
    with context:
        yield


@pytest.fixture(scope="session")
def load_fixture():
    """Reads ``tests/fixtures/<name>.json``."""

    def load(name):
        return json.loads((FIXTURES / f"{name}.json").read_text())

    return load
