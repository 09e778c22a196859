"""The sharding matrix: every way to shard a training step = one device.

{data-parallel, FSDP, tensor-parallel, sharded task axis} x {Auto, Explicit axes} x
{jit, shard_map} x {stacked, lazy} x combiners: update, weights and state, and what
moves between devices beside what plain training moves. See `sharding_matrix_worker`;
``pytest -s`` prints the matrix.
"""

import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

import pytest
import sharding_matrix_worker as worker

GATHERS = ("all-gather", "all-to-all", "collective-permute")
REDUCTIONS = ("all-reduce", "reduce-scatter")

# How many a step takes: the Tensioner further ones in two bases of T + 1 rows.
GRAMIANS = {"mean": 0, "mgda": 1, "fairgrad": 1, "task_tensioner": 3}

# Gramians of all leaves, in a basis of at most T + 1 rows, and other sums over tasks.
SMALL = 2 * len(worker.SHAPES) * (worker.TASKS + 1) ** 2

# Inputs of both layers, and cotangents of their outputs for every task.
LAYERS = worker.ROWS * (
    worker.INPUTS + worker.WIDTH + worker.TASKS * (worker.WIDTH + worker.TASKS)
)


def bare(shape):
    """A shape in any order, without axes of one."""
    return tuple(sorted(n for n in shape if n > 1))


# Of parameters that may be sharded, and of their rows.
PARAMETERS = {
    bare(shape)
    for name in ("inner", "bias", "outer")
    for shape in (worker.SHAPES[name], (worker.TASKS, *worker.SHAPES[name]))
}


def run(*arguments):
    flags = os.environ.get("XLA_FLAGS", "")
    eight = f"{flags} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": eight, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(worker.__file__)), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Matrix([json.loads(line) for line in done.stdout.splitlines()])


class Matrix(NamedTuple):
    """Cells as the worker printed them."""

    cells: list

    def of(self, **wanted):
        return [c for c in self.cells if wanted.items() <= c.items()]

    def plain(self, cell):
        """Collectives of plain training in the same place, None without such a step."""
        place = {key: cell[key] for key in ("layout", "axes", "where")}
        found = self.of(**place, combiner="plain")
        return found[0].get("collectives", []) if found else None

    def runs(self):
        """Cells that hold a step of a combiner."""
        return [c for c in self.cells if c["combiner"] in worker.COMBINERS]

    def __str__(self):
        names = [n for n in worker.COMBINERS if self.of(combiner=n)]
        head = ["layout", "axes", "where", "form", *names, "what moves"]
        lines = [head]
        for key, group in itertools.groupby(
            (c for c in self.cells if "where" in c), place_of
        ):
            group = {c["combiner"]: c for c in group}
            shown = group.get(worker.ONE_COMBINER) or next(iter(group.values()))
            lines.append(
                [
                    *key,
                    *(outcome(group.get(n)) for n in names),
                    shown.get("reason") or in_words(shown.get("collectives", [])),
                ]
            )
        for cell in self.of(combiner="gramian"):
            words = in_words(cell.get("collectives", []))
            place = [cell["layout"], cell["axes"], "jit", "Gramian of rows"]
            lines.append([*place, *[""] * len(names), words])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = [
            "  ".join(w.ljust(n) for w, n in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        title = (
            "Largest relative difference from one device, and the collectives of the "
            f"step under {worker.ONE_COMBINER}: operations (numbers in them; loops "
            "count once)"
        )
        errors = [
            f"{describe(cell)}: {cell['error']}"
            for cell in self.cells
            if cell.get("error")
        ]
        return "\n".join(["", title, *padded, *errors])


def place_of(cell):
    return cell["layout"], cell["axes"], cell["where"], cell["form"]


def outcome(cell):
    if cell is None:
        return ""
    if "reason" in cell:
        return "-"
    if cell["error"]:
        return "ERROR"
    return f"{max(cell[what] for what in ('update', 'weights', 'state')):.0e}"


def totals(collectives):
    """``{kind: (operations, numbers in them)}``."""
    found = {}
    for kind, shapes in collectives:
        count, moved = found.get(kind, (0, 0))
        found[kind] = count + 1, moved + sum(map(math.prod, shapes))
    return found


def shapes_in(collectives, kinds):
    return [s for kind, shapes in collectives if kind in kinds for s in shapes]


def in_words(collectives):
    return ", ".join(
        f"{kind} {count} ({moved})"
        for kind, (count, moved) in sorted(totals(collectives).items())
    )


def describe(cell):
    keys = ("layout", "axes", "where", "form", "combiner")
    return ", ".join(str(cell[key]) for key in keys if key in cell)


# ---------------------------------------------------------------------------- checks


def check_equal(matrix):
    for cell in matrix.runs():
        if "reason" not in cell:
            for what in ("update", "weights", "state"):
                assert cell[what] <= worker.TOLERANCE, (
                    f"{describe(cell)}: {what} differs by {cell[what]:.1e}\n{matrix}"
                )


def check_complete(matrix, places, forms):
    """A cell is run or says why not."""
    wanted = {(*place, form) for place in places for form in forms}
    assert {place_of(c) for c in matrix.runs()} == wanted
    failed = [describe(c) for c in matrix.cells if c.get("error")]
    assert not failed, f"{failed}\n{matrix}"
    assert all(len(c["reason"]) > 20 for c in matrix.cells if "reason" in c)


def check_collectives(matrix):
    """A Gramian moves what as many plain steps move as it has rows, and itself.

    It gathers no parameter and no row of one that plain training does not. Layer by
    layer, the inputs and the cotangents of layers are gathered where a batch is
    sharded: of the layers alone, and in place of sums of gradients.
    """
    for cell in matrix.runs():
        stacked, gramians = cell["form"] == "stacked", GRAMIANS[cell["combiner"]]
        passes = worker.TASKS if stacked else 1 + gramians * (worker.TASKS + 1)
        layers = 0 if stacked else gramians * LAYERS
        plain = matrix.plain(cell)
        if "reason" in cell or plain is None:
            continue
        where = f"{describe(cell)}: {in_words(cell['collectives'])}\n{matrix}"
        before = {bare(shape) for shape in shapes_in(plain, GATHERS)}
        found = shapes_in(cell["collectives"], GATHERS)
        assert not PARAMETERS & {bare(shape) for shape in found} - before, where
        if stacked:
            assert {bare(shape) for shape in found} <= before, where
        moved = {
            kinds: sum(map(math.prod, shapes_in(cell["collectives"], kinds)))
            for kinds in (GATHERS, REDUCTIONS)
        }
        once = {kinds: sum(map(math.prod, shapes_in(plain, kinds))) for kinds in moved}
        assert moved[GATHERS] <= passes * once[GATHERS] + layers, where
        assert moved[REDUCTIONS] <= passes * once[REDUCTIONS] + SMALL, where
        if not (gramians or stacked):
            assert all(moved[kinds] <= once[kinds] for kinds in once), where


def check_task_axis(matrix):
    """Where the task axis is sharded, its rows move, and nothing inside a solver."""
    at_most = 4 * len(worker.SHAPES)
    for cell in matrix.runs():
        if cell["layout"] == "task axis" and "reason" not in cell:
            found = len(cell["collectives"])
            assert found <= at_most, f"{describe(cell)}: {found}\n{matrix}"


def check_gramians(matrix):
    """Of stacked rows sharded as the parameters: one sum of T x T, nothing gathered."""
    tasks = worker.TASKS
    cells = matrix.of(combiner="gramian")
    assert {c["layout"] for c in cells} >= {"FSDP", "tensor-parallel"}
    for cell in cells:
        assert cell["gramian"] <= worker.TOLERANCE, describe(cell)
        ((kind, shapes),) = cell["collectives"]
        assert kind == "all-reduce", matrix
        assert all(shape == [tasks, tasks] for shape in shapes), matrix


def check(matrix, places, forms):
    print(matrix)
    check_complete(matrix, places, forms)
    check_equal(matrix)
    check_collectives(matrix)
    check_task_axis(matrix)
    check_gramians(matrix)
    # Averaging updates in place of task gradients is another method.
    (control,) = matrix.of(combiner="control")
    assert control["update"] > 0.01


def test_sharded_is_one_device():
    check(run(), worker.FAST_PLACES, worker.FORMS)


@pytest.mark.slow
def test_sharded_is_one_device_in_every_cell():
    check(run("all"), worker.PLACES, worker.FORMS + worker.OTHER_FORMS)


# ------------------------------------------------------------- the checks themselves

PLACE = {"layout": "FSDP", "axes": "Auto", "where": "jit"}
PLAIN = PLACE | {
    "form": "-",
    "combiner": "plain",
    "error": "",
    "collectives": [["all-gather", [[32, 64]]], ["all-reduce", [[32, 64], [4]]]],
}
GOOD = PLACE | {
    "form": "lazy",
    "combiner": "mgda",
    "error": "",
    "update": 1e-7,
    "weights": 1e-7,
    "state": 1e-7,
    "collectives": [["all-gather", [[64, 32]]], ["all-reduce", [[4, 4]]]],
}
GATHERED_ROWS = [["all-gather", [[4, 32, 64]]]]
MANY_SUMS = [["all-reduce", [[32, 64]]]] * 7


def check_pair(cell):
    matrix = Matrix([PLAIN, cell])
    check_complete(matrix, [tuple(PLACE.values())], ["lazy"])
    check_equal(matrix)
    check_collectives(matrix)


def test_the_checks_pass_what_is_right():
    check_pair(GOOD)


@pytest.mark.parametrize(
    "wrong",
    [
        {"update": 2e-5},
        {"weights": 2e-5},
        {"state": float("nan")},
        {"error": "TypeError"},
        {"where": "shard_map"},
        {"collectives": GATHERED_ROWS},
        {"collectives": MANY_SUMS},
        {"combiner": "mean", "collectives": MANY_SUMS[:2]},
        {"form": "stacked"},
    ],
    ids=str,
)
def test_the_checks_see_what_is_wrong(wrong):
    with pytest.raises(AssertionError):
        check_pair(GOOD | wrong)
