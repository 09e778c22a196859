"""Rows of numbers as a Markdown table and as a CSV file."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table that can be read as it is: columns are padded.

    Example:
      >>> print(markdown(["way", "time"], [["plain", "1.00"], ["map", "12.00"]]))
      | way   | time  |
      |-------|-------|
      | plain | 1.00  |
      | map   | 12.00 |
    """
    lines = [[cell.replace("|", "/") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(heads, *lines, strict=True)]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    heads, *rest = (
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in (heads, *lines)
    )
    return "\n".join([heads, rule, *rest])


def number(value: float, form: str, unit: str = "") -> str:
    """A number as a cell; an empty one where there is none.

    Example:
      >>> number(1.234, ".1f", " s"), number(float("nan"), ".1f", " s")
      ('1.2 s', '')
    """
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


def save_csv(rows: Sequence[Any], path: Path) -> Path:
    """Writes named tuples of one kind, with their fields as the first line."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0]._fields)
        writer.writerows(rows)
    return path
