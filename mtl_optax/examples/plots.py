"""Pictures of a comparison, one PNG each; no display is needed."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
)

from mtl_optax.examples.comparison import Comparison, Outcome
from mtl_optax.examples.models import classifies
from mtl_optax.examples.report import estimate, metric_name
from mtl_optax.metrics import cosine_matrix

# Okabe & Ito's colours, which colour-blind readers can tell apart; grey is single task.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8B5A2B",
)
_MARKERS = "osD^vPX*"
_GREY = "#7a7a7a"
_MOST_POINTS = 60
_LINEAR_BELOW = 0.01

_MEANING = {
    "CL": "CL: classify the top-left digit",
    "CR": "CR: classify the bottom-right digit",
    "RR": "RR: reconstruct the bottom-right digit",
}


def save_plots(found: Comparison, folder: Path) -> list[Path]:
    """Draws the comparison into `folder`.

    Args:
      found: what `mtl_optax.examples.comparison.compare` returned.
      folder: must exist.

    Returns:
      the files: ``summary.png``, ``losses.png``, and, where any method has weights or
      one set of task gradients a step, ``weights.png`` and ``cosine.png``.
    """
    drawings: dict[str, Callable[[Comparison], Figure]] = {
        "summary.png": plot_summary,
        "losses.png": plot_losses,
        "weights.png": plot_weights,
        "cosine.png": plot_cosines,
    }
    files = []
    if all(o.record.task_weights is None for o in found.methods.values()):
        del drawings["weights.png"]
    if all(o.record.gramians is None for o in found.methods.values()):
        del drawings["cosine.png"]
    for name, draw in drawings.items():
        file = folder / name
        draw(found).savefig(file, dpi=130)
        files.append(file)
    return files


def plot_summary(found: Comparison) -> Figure:
    """Test metrics of every seed, one task against another."""
    pairs = list(itertools.combinations(range(len(found.tasks)), 2))
    figure, axes = _figure(len(pairs), width=7.2, height=5.6)
    for axis, (i, j) in zip(axes, pairs, strict=True):
        _grid(axis)
        axis.set_xscale("log")
        axis.set_yscale("log")
        # Single-task training: lines, and their 95 % intervals as bands.
        for k, line, band in (
            (i, axis.axvline, axis.axvspan),
            (j, axis.axhline, axis.axhspan),
        ):
            alone = estimate(_error(found, k, found.single[found.tasks[k]].test[:, 0]))
            line(alone.mean, color=_GREY, linestyle="--", linewidth=1.2, zorder=1)
            if math.isfinite(alone.half_width) and alone.low > 0:
                band(alone.low, alone.high, color=_GREY, alpha=0.15, lw=0, zorder=0)
        for name, outcome in found.methods.items():
            colour, marker = _style(found, name)
            x, y = (_error(found, k, outcome.test[:, k]) for k in (i, j))
            axis.scatter(x, y, s=26, color=colour, marker=marker, alpha=0.4, lw=0)
            centre = estimate(x), estimate(y)
            spread = [
                e.half_width if math.isfinite(e.half_width) else 0 for e in centre
            ]
            axis.errorbar(
                centre[0].mean,
                centre[1].mean,
                xerr=spread[0],
                yerr=spread[1],
                color=colour,
                marker=marker,
                markersize=9,
                markeredgecolor="white",
                elinewidth=1.6,
                capsize=3,
                zorder=4,
            )
        axis.margins(0.1)
        for k, set_label, scale in (
            (i, axis.set_xlabel, axis.xaxis),
            (j, axis.set_ylabel, axis.yaxis),
        ):
            task = found.tasks[k]
            what = f"{task} error %" if classifies(task) else metric_name(task)
            set_label(f"{what} on test pairs (log scale), better →")
            _plain_log_ticks(scale)
        # Better is to the right and up, as people expect of a picture like this.
        axis.invert_xaxis()
        axis.invert_yaxis()
    seeds = len(next(iter(found.methods.values())).test)
    _finish(
        figure,
        "Which way served both tasks?" if len(found.tasks) == 2 else "Test metrics",
        f"small: each of {seeds} seeds; large: mean with 95 % interval; "
        "dashed: one network a task, with its interval",
        _handles(found, lines=False),
    )
    return figure


def _error(
    found: Comparison, task: int, values: Float[np.ndarray, " seeds"]
) -> Float[np.ndarray, " seeds"]:
    """The metric as something that suits a log scale: small is good."""
    return 100 - values if classifies(found.tasks[task]) else values


def _plain_log_ticks(axis: Axis) -> None:
    """Numbers that people read, as many as fit, instead of powers of ten."""
    low, high = sorted(axis.get_view_interval())
    fine = math.log10(high / low) < 1
    subs = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=subs if fine else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_losses(found: Comparison) -> Figure:
    """Training loss of every task."""
    figure, axes = _figure(len(found.tasks), width=5.6, height=4.6)
    for i, (axis, task) in enumerate(zip(axes, found.tasks, strict=True)):
        _grid(axis)
        _draw_runs(axis, found, found.single[task], 0, _GREY, linestyle="--")
        for name, outcome in found.methods.items():
            _draw_runs(axis, found, outcome, i, _style(found, name)[0])
        axis.set_yscale("log")
        _plain_log_ticks(axis.yaxis)
        kind = "negative log likelihood" if classifies(task) else "mean squared error"
        axis.set_title(_MEANING[task], fontsize=11)
        axis.set_ylabel(f"training loss ({kind})")
    _finish(figure, "Losses", _smoothing(found), _handles(found))
    return figure


def plot_weights(found: Comparison) -> Figure:
    """The weights of the combination over time."""
    figure, axes = _figure(len(found.tasks), width=5.6, height=4.6)
    for i, (axis, task) in enumerate(zip(axes, found.tasks, strict=True)):
        _grid(axis)
        typical, lowest = [0.0], 0.0
        for name, outcome in found.methods.items():
            weights = outcome.record.task_weights
            if weights is not None:
                drawn = _draw(axis, found, weights[..., i], _style(found, name)[0])
                lowest = min(lowest, drawn)
                typical.append(abs(float(np.median(weights[..., i]))))
        title = f"weight of {task}"
        if sorted(typical)[1:2] < [0.1 * max(typical)]:
            # Weights may be zero or negative, so not a plain log scale.
            axis.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=0.5)
            ticks = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
            axis.yaxis.set_major_locator(FixedLocator([*-ticks, 0, *ticks]))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_ylim(bottom=min(1.2 * lowest, -_LINEAR_BELOW / 2))
            title += f" (log scale above {_LINEAR_BELOW:g})"
        axis.set_title(title, fontsize=11)
    axes[0].set_ylabel("weight in the update of the encoder")
    _finish(
        figure,
        "Weights of the task gradients",
        _smoothing(found),
        _handles(
            found, single=False, drawn=lambda o: o.record.task_weights is not None
        ),
    )
    return figure


def plot_cosines(found: Comparison) -> Figure:
    """Cosines of the angles between task gradients over time."""
    pairs = list(itertools.combinations(range(len(found.tasks)), 2))
    figure, axes = _figure(len(pairs), width=6.8, height=4.6, sharey=True)
    lowest = 0.0
    for axis, (i, j) in zip(axes, pairs, strict=True):
        _grid(axis)
        for name, outcome in found.methods.items():
            if outcome.record.gramians is None:
                continue
            gramians = np.asarray(outcome.record.gramians)
            cosines = np.asarray(cosine_matrix(gramians))[..., i, j]
            drawn = _draw(axis, found, cosines, _style(found, name)[0])
            lowest = min(lowest, drawn)
        axis.axhline(0, color="black", linewidth=1)
        axis.text(
            0.99,
            0.03,
            "below 0 the tasks conflict",
            transform=axis.transAxes,
            ha="right",
            color=_GREY,
        )
        axis.set_title(f"{found.tasks[i]} and {found.tasks[j]}", fontsize=11)
    # Only now: fixed limits would cut off what later panels add to the shared axis.
    top = axes[0].get_ylim()[1]
    axes[0].set_ylim(min(1.15 * lowest, -0.05), top)
    for axis in axes:
        axis.axhspan(-1, 0, color="#D55E00", alpha=0.06, lw=0, zorder=0)
    axes[0].set_ylabel("cosine of task gradients (encoder)")
    _finish(
        figure,
        "Do the tasks pull the encoder the same way?",
        _smoothing(found),
        _handles(found, single=False, drawn=lambda o: o.record.gramians is not None),
    )
    return figure


def _figure(
    panels: int, *, width: float, height: float, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would open windows, and keep every figure alive.
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, sharey=sharey, squeeze=False)
    return figure, list(axes[0])


def _grid(axis: Axes) -> None:
    axis.grid(True, color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _style(found: Comparison, name: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in all plots."""
    number = list(found.methods).index(name)
    return _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)]


def _handles(
    found: Comparison,
    *,
    lines: bool = True,
    single: bool = True,
    drawn: Callable[[Outcome], bool] = lambda outcome: True,
) -> list[Line2D]:
    handles = []
    for name, outcome in found.methods.items():
        if not drawn(outcome):
            continue
        colour, marker = _style(found, name)
        style: dict[str, Any] = {"linewidth": 2.2} if lines else {"linestyle": ""}
        if not lines:
            style |= {"marker": marker, "markersize": 8, "markeredgecolor": "white"}
        handles.append(Line2D([], [], color=colour, label=name, **style))
    if single:
        handles.append(Line2D([], [], color=_GREY, linestyle="--", label="single task"))
    return handles


def _finish(figure: Figure, title: str, note: str, handles: list[Line2D]) -> None:
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.legend(
        handles=handles,
        loc="outside lower center",
        # One row for as many as fit at about an inch and a half each.
        ncols=min(len(handles), int(figure.get_figwidth() / 1.4)),
        columnspacing=1.2,
        handlelength=1.6,
        frameon=False,
        title=note,
        title_fontproperties={"size": 9},
    )


def _draw_runs(
    axis: Axes,
    found: Comparison,
    outcome: Outcome,
    task: int,
    colour: str,
    **style: Any,
) -> None:
    _draw(axis, found, outcome.record.losses[..., task], colour, **style)


def _draw(
    axis: Axes,
    found: Comparison,
    values: Float[Array | np.ndarray, "seeds steps"],
    colour: str,
    **style: Any,
) -> float:
    """Mean over seeds as a line, their range as a band; returns the lowest point."""
    binned = _binned(values)
    epochs = (np.arange(binned.shape[1]) + 0.5) * found.num_epochs / binned.shape[1]
    middle = binned.mean(axis=0)
    marker = "o" if binned.shape[1] < 4 else None
    axis.plot(epochs, middle, color=colour, linewidth=2, marker=marker, **style)
    low, high = binned.min(axis=0), binned.max(axis=0)
    axis.fill_between(epochs, low, high, color=colour, alpha=0.15, lw=0)
    axis.set_xlabel("epoch")
    axis.set_xlim(0, found.num_epochs)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return float(low.min())


def _binned(
    values: Float[Array | np.ndarray, "seeds steps"],
) -> Float[np.ndarray, "seeds bins"]:
    """Means over equal stretches of steps."""
    values = np.asarray(values)
    bins = min(_MOST_POINTS, values.shape[1])
    parts = np.array_split(values, bins, axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def _smoothing(found: Comparison) -> str:
    seeds, steps = next(iter(found.methods.values())).record.losses.shape[:2]
    stretch = math.ceil(steps / min(_MOST_POINTS, steps))
    return f"means over about {stretch} steps; line: mean of {seeds} seeds, band: range"
