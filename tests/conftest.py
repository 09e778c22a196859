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


# Each compiled program holds memory maps, of which Linux allows a process 65,530.
_MAPS = pathlib.Path("/proc/self/maps")
_MANY_MAPS = 20_000
_tests_run = 0


@pytest.fixture(autouse=True, scope="module")
def _forget_what_a_file_compiled():
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def _forget_what_many_tests_compiled():
    global _tests_run
    yield
    _tests_run += 1
    if _tests_run % 20 == 0 and _MAPS.exists():
        with _MAPS.open("rb") as maps:
            many = sum(1 for _ in maps) > _MANY_MAPS
        if many:
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
