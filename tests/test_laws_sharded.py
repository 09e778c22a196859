"""Law 10: sharded over eight devices = one device. See `sharded_worker`."""

import json
import os
import pathlib
import subprocess
import sys

import broken
import laws
import pytest

import mtl_optax as mtl

WORKER = pathlib.Path(__file__).parent / "sharded_worker.py"


def run(*arguments, devices=8):
    """Cases and their errors: ``{method: {case: error}}``."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags = f"{flags} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(WORKER), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = {}
    for line in map(json.loads, done.stdout.splitlines()):
        results.setdefault(line["method"], {})[line["case"]] = line["error"]
    return results


@pytest.fixture(scope="module")
def results():
    return run()


def failures(cases):
    return {case: error for case, error in cases.items() if error}


@pytest.mark.parametrize("name", [m.name for m in laws.one_of_each_sort()])
def test_law_10_sharded_is_one_device(results, name):
    assert len(results[name]) >= 5
    assert not failures(results[name])


def test_law_10_collectives_of_the_gramian(results):
    assert len(results["gramian"]) == 2
    assert not failures(results["gramian"])


def test_law_10_is_tested(results):
    for method in broken.BROKEN["check_sharded"]:
        assert failures(results[f"broken {method.name}"])


@pytest.mark.slow
def test_law_10_on_a_mesh_of_one_device():
    found = run(devices=1)
    assert set(found) == {m.name for m in laws.one_of_each_sort()}
    assert not any(map(failures, found.values()))


@pytest.mark.slow
def test_law_10_in_every_layout_and_every_method():
    found = run("all")
    assert set(mtl.METHODS) <= set(found)
    for name, cases in found.items():
        assert len(cases) >= (4 if name in mtl.METHODS else 2), name
        assert not failures(cases), name
