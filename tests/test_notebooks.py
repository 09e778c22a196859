"""Every notebook runs from top to bottom, and is committed with its outputs."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


LONG = {"02_four_systems", "03_cost", "04_gramian_methods"}


def outputs(notebook):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= LONG


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in LONG))
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("MTL_OPTAX_SMOKE", "1")  # few epochs
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert pictures
    loud = [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    assert not loud, loud


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_keeps_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(
        cell.execution_count for cell in notebook.cells if cell.cell_type == "code"
    )
    assert not [o for o in outputs(notebook) if o.output_type == "error"]
    assert [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
