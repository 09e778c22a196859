"""The comparison in words: one table, and what may be concluded from it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from mtl_optax.examples.comparison import Comparison
from mtl_optax.examples.costs import Cost
from mtl_optax.examples.models import classifies
from mtl_optax.metrics import (
    clear_winner,
    delta_m,
    mean_rank,
    share_of_conflicting_steps,
    t_interval,
    winners,
)

_CONFLICT_TOLERANCE = 1e-6


class Estimate(NamedTuple):
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      name: the method.
      learning_rate: of Adam, as validation chose it.
      metrics: test metric of each task.
      gain: Delta_m in percent; positive is better than single-task training.
      worst: change of the task that lost most, in percent, in the same sense.
      rank: mean rank among the methods.
      conflicts: share of looked-at steps with conflicting task gradients, in percent;
        None where no one set of task gradients was looked at.
      cost: seconds and memory of a step; None if not measured.
    """

    name: str
    learning_rate: float
    metrics: tuple[Estimate, ...]
    gain: Estimate
    worst: Estimate
    rank: Estimate
    conflicts: float | None
    cost: Cost | None


def estimate(values: Float[np.ndarray, " seeds"]) -> Estimate:
    """Mean and 95 % Student t interval over seeds; without end for one seed.

    Example:
      >>> import numpy as np
      >>> from mtl_optax.examples.report import estimate
      >>> [round(x, 2) for x in estimate(np.array([1.0, 2.0, 3.0]))]
      [2.0, -0.48, 4.48]
    """
    low, high = t_interval(values)
    return Estimate(float(np.mean(values)), float(low), float(high))


def make_rows(found: Comparison) -> list[Row]:
    """Everything the table shows, method by method."""
    tests = np.stack([outcome.test for outcome in found.methods.values()])
    ranks = np.stack(
        [
            np.asarray(mean_rank(seed, found.higher_is_better))
            for seed in tests.swapaxes(0, 1)
        ]
    )
    rows = []
    for number, (name, outcome) in enumerate(found.methods.items()):
        changes = _changes(found, outcome.test)
        conflicts = None
        if outcome.record.gramians is not None:
            share = share_of_conflicting_steps(
                np.asarray(outcome.record.gramians), tol=_CONFLICT_TOLERANCE, axis=1
            )
            conflicts = 100 * float(np.mean(share))
        rows.append(
            Row(
                name=name,
                learning_rate=outcome.learning_rate,
                metrics=tuple(estimate(column) for column in outcome.test.T),
                gain=estimate(changes.mean(axis=1)),
                worst=estimate(changes.min(axis=1)),
                rank=estimate(ranks[:, number]),
                conflicts=conflicts,
                cost=found.costs.get(name),
            )
        )
    return rows


def _changes(
    found: Comparison, test: Float[np.ndarray, "seeds tasks"]
) -> Float[np.ndarray, "seeds tasks"]:
    """Each task's change against single-task training, percent; positive is better."""
    return np.stack(
        [
            np.asarray(delta_m(test[:, [i]], found.baseline[[i]], higher))
            for i, higher in enumerate(found.higher_is_better)
        ],
        axis=1,
    )


def metric_name(task: str) -> str:
    """What a task is measured by.

    Example:
      >>> from mtl_optax.examples.report import metric_name
      >>> metric_name("CL"), metric_name("RR")
      ('CL accuracy %', 'RR RMSE')
    """
    return f"{task} accuracy %" if classifies(task) else f"{task} RMSE"


def format_table(
    found: Comparison, rows: Sequence[Row], *, plus_minus: str = "±"
) -> str:
    """The table as aligned text; every ``a ± b`` is a mean and its 95 % interval."""

    def cell(e: Estimate, digits: int, sign: str = "") -> str:
        spread = f"{e.half_width:.{digits}f}" if np.isfinite(e.half_width) else "?"
        return f"{e.mean:{sign}.{digits}f} {plus_minus} {spread}"

    digits = [1 if classifies(task) else 3 for task in found.tasks]
    header = ["", *map(metric_name, found.tasks), "Delta_m %", "worst task %"]
    header += ["mean rank", "conflicts %", "lr"]
    better = ["", *("higher" if h else "lower" for h in found.higher_is_better)]
    better += ["higher", "higher", "lower", "", ""]
    alone = [estimate(found.single[task].test[:, 0]) for task in found.tasks]
    rates = {found.single[task].learning_rate for task in found.tasks}
    single = ["single task", *map(cell, alone, digits), "0", "0", "-", "-"]
    single.append(" / ".join(f"{found.single[t].learning_rate:g}" for t in found.tasks))
    if len(rates) == 1:
        single[-1] = f"{rates.pop():g}"
    if found.costs:
        header += ["time", "memory"]
        better += ["", ""]
        single += ["-", "-"]
    lines = [header, ["better:", *better[1:]], single]
    for row in rows:
        lines.append(
            [
                row.name,
                *map(cell, row.metrics, digits),
                cell(row.gain, 1, "+"),
                cell(row.worst, 1, "+"),
                cell(row.rank, 1),
                "-" if row.conflicts is None else f"{row.conflicts:.0f}",
                f"{row.learning_rate:g}",
            ]
        )
        if row.cost is not None:
            lines[-1] += [f"{row.cost.ratio:.1f} x", f"{row.cost.megabytes:.1f} MB"]
    return align(lines, rule_after=(1, 2))


def align(lines: Sequence[Sequence[str]], rule_after: Sequence[int] = (0,)) -> str:
    """Lines of cells as text: first column to the left, the others to the right.

    Example:
      >>> from mtl_optax.examples.report import align
      >>> print(align([["method", "n"], ["mean", "10"]]))
      method   n
      ----------
      mean    10
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for number, line in enumerate(lines):
        cells = [line[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells).rstrip())
        if number in rule_after:
            text.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(text)


def verdict(found: Comparison, rows: Sequence[Row]) -> list[str]:
    """What may be concluded; names no winner whose interval overlaps another's."""
    tasks = "both tasks" if len(found.tasks) == 2 else f"all {len(found.tasks)} tasks"
    return [
        _one_verdict(
            rows,
            lambda row: row.worst,
            f"Served {tasks} best (its worst task lost least)",
            f"as to which served {tasks} best (whose worst task lost least)",
        ),
        _one_verdict(rows, lambda row: row.gain, "Best Delta_m", "by Delta_m"),
    ]


def _one_verdict(
    rows: Sequence[Row], of: Callable[[Row], Estimate], clear: str, unclear: str
) -> str:
    broken = [row.name for row in rows if not np.isfinite(of(row).mean)]
    rows = [row for row in rows if row.name not in broken]
    if not rows:
        return f"{clear}: none, no method trained to finite metrics."
    if any(not np.isfinite(of(row).half_width) for row in rows):
        return f"No clear winner {unclear}: one seed has no interval."
    values = [of(row).mean for row in rows]
    intervals = [[of(row).low, of(row).high] for row in rows]
    best = rows[int(np.argmax(values))]
    if len(rows) == 1:
        return f"{clear}: nothing to compare {best.name} with."
    if clear_winner(values, intervals, True) is not None:
        return (
            f"{clear}: {best.name}, {of(best).mean:+.1f} %; no other method's interval "
            "overlaps its own."
        )
    tied = np.flatnonzero(np.asarray(winners(values, intervals, True)))
    names = ", ".join(rows[int(i)].name for i in tied)
    return f"No clear winner {unclear}: the intervals of {names} overlap."
