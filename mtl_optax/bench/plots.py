"""Pictures of what `mtl-optax bench` measured, one PNG each; no display is needed."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from mtl_optax.bench import engine_cost, many_runs, update_cost

# Okabe & Ito's colours, which colour-blind readers can tell apart.
_BLUE, _RED, _GREEN, _PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_ORANGE, _SKY, _BLACK, _GREY = "#E69F00", "#56B4E9", "#000000", "#7a7a7a"

# Of a way: colour, marker. What is TorchJD's is dashed.
_STYLES = {
    "plain": (_GREY, "o"),
    "default": (_BLACK, "o"),
    "layerwise": (_BLUE, "s"),
    "vmap": (_SKY, "^"),
    "unroll": (_GREEN, "v"),
    "map": (_ORANGE, "D"),
    "every_10": (_PINK, "P"),
    "features": (_RED, "X"),
    "torch": (_GREY, "s"),
    "backward": (_RED, "^"),
    "backward_by_leaf": (_ORANGE, "v"),
    "autogram": (_BLUE, "D"),
}
_LEAST_MEGABYTES = 0.01


def save_engine(rows: Sequence[engine_cost.Row], folder: Path) -> list[Path]:
    """Cost and memory against the number of tasks, a panel a network.

    Args:
      rows: what `engine_cost.measure` returned.
      folder: must exist.

    Returns:
      ``engine_time.png`` and ``engine_memory.png``.
    """
    return [
        _save(
            _engine(
                rows,
                lambda row: row.ratio,
                "gradient of a balanced step / of a plain one",
                "Cost of task gradients",
                "1: plain training in the same framework; median, 10 to 90 % of rounds",
                spread=True,
            ),
            folder / "engine_time.png",
        ),
        _save(
            _engine(
                rows,
                lambda row: max(row.megabytes, _LEAST_MEGABYTES),
                "temporary memory, MB",
                "Memory of task gradients",
                "by XLA's plan; of PyTorch: by how much the process grew",
                spread=False,
            ),
            folder / "engine_memory.png",
        ),
    ]


def save_update(rows: Sequence[update_cost.Row], folder: Path) -> list[Path]:
    """Bars of every method, ours beside TorchJD's, a panel a size: ``update.png``."""
    sizes = list(dict.fromkeys((row.tasks, row.parameters) for row in rows))
    methods = list(dict.fromkeys(row.ours for row in rows if row.ours))
    figure, axes = _figure(len(sizes), width=5.6, height=2.2 + 0.32 * len(methods))
    kinds = ((update_cost.OURS, _BLUE, -0.2), (update_cost.PEER, _ORANGE, 0.2))
    for axis, size in zip(axes, sizes, strict=True):
        for library, colour, offset in kinds:
            found = [
                (methods.index(row.ours) + offset, row)
                for row in rows
                if (row.tasks, row.parameters) == size
                and row.library == library
                and math.isfinite(row.over_floor)
            ]
            if found:
                places, shown = zip(*found, strict=True)
                axis.barh(
                    places,
                    [row.over_floor for row in shown],
                    0.38,
                    xerr=[
                        [max(row.over_floor - row.low, 0) for row in shown],
                        [max(row.high - row.over_floor, 0) for row in shown],
                    ],
                    error_kw={"elinewidth": 0.8, "ecolor": _GREY},
                    color=colour,
                    label=library,
                )
        axis.axvline(1, color=_GREY, linestyle="--", linewidth=1.2)
        axis.set_xscale("log")
        axis.set_yticks(range(len(methods)), methods)
        axis.set_ylim(len(methods) - 0.5, -0.5)
        axis.set_title(f"T = {size[0]}, P = {size[1]:,}", fontsize=11)
        axis.set_xlabel("time of an update / NumPy's G = g gᵀ, wᵀ g")
        _plain_log_ticks(axis.xaxis)
    _finish(
        figure,
        axes,
        "Cost of an update of stacked gradients",
        "1 (dashed): the floor; median, 10 to 90 % of rounds",
    )
    return [_save(figure, folder / "update.png")]


def save_runs(rows: Sequence[many_runs.Row], folder: Path) -> list[Path]:
    """Bars of the steps a second, by method and way: ``runs.png``."""
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, (axis,) = _figure(1, width=max(6.4, 2.2 * len(methods)), height=4.8)
    colours = (_BLUE, _GREEN, _ORANGE)
    for number, (way, colour) in enumerate(zip(many_runs.WAYS, colours, strict=True)):
        found = [row for row in rows if row.way == way and row.rounds]
        axis.bar(
            [methods.index(row.method) + 0.27 * (number - 1) for row in found],
            [row.steps_per_second for row in found],
            0.25,
            color=colour,
            label=way,
        )
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("training steps a second, all runs")
    note = f"{rows[0].seeds} seeds, {rows[0].steps} steps each; higher is better"
    _finish(figure, [axis], "Many seeds at once", note)
    return [_save(figure, folder / "runs.png")]


def _engine(
    rows: Sequence[engine_cost.Row],
    value: Callable[[engine_cost.Row], float],
    label: str,
    title: str,
    note: str,
    *,
    spread: bool,
) -> Figure:
    models = list(dict.fromkeys(row.model for row in rows))
    ways = list(dict.fromkeys(row.way for row in rows))
    figure, axes = _figure(len(models), width=5.0, height=5.2)
    for axis, model in zip(axes, models, strict=True):
        for number, way in enumerate(ways):
            found = [
                row
                for row in rows
                if (row.model, row.way) == (model, way) and math.isfinite(value(row))
            ]
            if not found:
                continue
            around = None
            if spread:
                around = [
                    [max(row.ratio - row.low, 0) for row in found],
                    [max(row.high - row.ratio, 0) for row in found],
                ]
            colour, marker = _STYLES[way]
            aside = 1.02 ** (
                number - len(ways) / 2
            )  # so that spreads can be told apart
            ours = way in engine_cost.OURS
            axis.errorbar(
                [row.tasks * aside for row in found],
                [value(row) for row in found],
                yerr=around,
                color=colour,
                marker=marker,
                markersize=7,
                markeredgecolor="white",
                linestyle="-" if ours else "--",
                linewidth=1.8,
                elinewidth=1.0,
                capsize=2,
                label=way if ours or way == "torch" else f"TorchJD {way}",
            )
        tasks = sorted({row.tasks for row in rows if row.model == model})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_locator(FixedLocator(tasks))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        _plain_log_ticks(axis.yaxis)
        axis.set_xlabel("number of tasks")
        axis.set_title(model, fontsize=11)
    axes[0].set_ylabel(label)
    _finish(figure, axes, title, note)
    return figure


def _plain_log_ticks(axis: Axis) -> None:
    """Numbers that people read, as many as fit, instead of powers of ten."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    subs = [1.0, 2.0, 5.0]
    if decades > 3:
        subs = [1.0]
    elif decades < 1:
        subs = [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _figure(panels: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    # Not pyplot: it would open windows, and keep every figure alive.
    figure = Figure(figsize=(max(width * panels, 6.4), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axis in axes:
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Sequence[Axes], title: str, note: str) -> None:
    handles: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    figure.legend(
        handles=list(handles.values()),
        loc="outside lower center",
        ncols=min(len(handles), int(figure.get_figwidth() / 1.5)),
        frameon=False,
        title=note,
        title_fontproperties={"size": 9},
    )


def _save(figure: Figure, file: Path) -> Path:
    figure.savefig(file, dpi=130)
    return file
