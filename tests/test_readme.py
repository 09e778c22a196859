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


def test_the_methods_table_is_the_registrys(capsys):
    from mtl_optax import _cli

    assert _cli.main(["list", "--markdown"]) in (0, None)
    written = capsys.readouterr().out.strip()
    table = re.search(
        r"<!-- methods:[^>]*-->\n(.*?)\n<!-- /methods -->", README, re.DOTALL
    )
    assert table is not None
    assert table.group(1).strip() == written


def test_the_cost_table_has_every_method():
    costs = README.split("## What it costs")[1].split("\n## ")[0]
    for name in mtl.METHODS:
        assert f"| {name}, lazy |" in costs
        assert f"| {name}, stacked |" in costs


@pytest.mark.parametrize("extra", ["examples", "test"])
def test_both_set_up_commands_stand_there_once(extra):
    lines = [line for line in README.splitlines() if f'-e ".[{extra}]"' in line]
    assert len(lines) == 1
    assert lines[0].startswith("    python3 -m venv .venv && ")
