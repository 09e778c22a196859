"""The README's own code runs, and its tables are those the registry writes."""

import pathlib
import re

import pytest

import mtl_optax as mtl

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_readmes_code_runs_from_top_to_bottom():
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    namespace = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md, block {number}", "exec"), namespace)


@pytest.mark.parametrize(
    ("marker", "options"), [("methods", []), ("claims", ["--claims"])]
)
def test_the_tables_of_methods_are_the_registrys(marker, options, capsys):
    from mtl_optax import _cli

    assert _cli.main(["list", "--markdown", *options]) in (0, None)
    written = capsys.readouterr().out.strip()
    table = re.search(
        rf"<!-- {marker}:[^>]*-->\n(.*?)\n<!-- /{marker} -->", README, re.DOTALL
    )
    assert table is not None
    assert table.group(1).strip() == written


def test_the_cost_tables_have_every_method():
    """Gramian methods by their own mathematics, one of them and all others whole."""
    costs = README.split("## What it costs")[1].split("\n## ")[0]
    for method in mtl.METHODS.values():
        if method.needs & {"gramian", "gramian_in_basis"}:
            assert f"| {method.name} |" in costs
        elif method.cost == "1":
            assert "| mean, lazy |" in costs
        else:
            assert f"| {method.name}, lazy |" in costs


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_both_set_up_commands_stand_there_once(extra):
    lines = [line for line in README.splitlines() if f'-e ".[{extra}]"' in line]
    assert len(lines) == 1
    assert lines[0].startswith("    python3 -m venv .venv && ")
