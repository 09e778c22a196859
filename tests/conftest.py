"""What the whole test suite shares."""

import json
import os
import pathlib

import jax
import pytest

# Most of the time goes into compiling small programs, which XLA does three times faster
# without optimising them. Whoever sets a level gets it: so does one of CI's two runs.
_LEVEL = "--xla_backend_optimization_level"
if _LEVEL not in os.environ.get("XLA_FLAGS", ""):
    flags = [f"{_LEVEL}=0"]
    if jax.__version_info__ < (0, 11):  # later versions don't know it, and would abort
        flags.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


@pytest.fixture(autouse=True, scope="module")
def _forget_what_was_compiled():
    """Each compiled program holds memory maps, of which a process may have 65,530."""
    yield
    jax.clear_caches()


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
