"""Pictures of runs on a toy problem: one panel a method, no display is needed."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mtl_optax.examples.toy import Problem, Run, summarize

# Okabe & Ito's colours, which colour-blind readers can tell apart; each has a marker.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKERS = "osD^v"
_FRONT = "black"
_COLUMNS = 5
_PANEL = 2.75


def save_plots(
    found: Mapping[str, Run], problem: Problem, folder: Path, stem: str
) -> list[Path]:
    """Draws the runs of all methods into `folder`.

    Args:
      found: by method, what `mtl_optax.examples.toy.run` returned.
      problem: what they ran on.
      folder: must exist.
      stem: how the files' names begin.

    Returns:
      the files: ``<stem>_paths.png`` and ``<stem>_losses.png``.
    """
    drawings: dict[str, Callable[[Mapping[str, Run], Problem], Figure]] = {
        "paths": plot_paths,
        "losses": plot_losses,
    }
    files = []
    for name, draw in drawings.items():
        file = folder / f"{stem}_{name}.png"
        draw(found, problem).savefig(file, dpi=110)
        files.append(file)
    return files


def plot_paths(found: Mapping[str, Run], problem: Problem) -> Figure:
    """Paths in the space of parameters, over the mean loss."""
    figure, axes = _panels(found, problem, ("parameter $x_1$", "parameter $x_2$"))
    x1, x2, mean = _mean_loss(problem)
    # Each shade has as much of the plane as any other, whatever the losses' shape.
    levels = np.unique(np.quantile(mean, np.linspace(0, 1, 13)))
    for axis, one in zip(axes, found.values(), strict=False):
        axis.contourf(x1, x2, mean, levels, cmap="Greys_r", alpha=0.45, zorder=0)
        _front(axis, problem.front)
        _paths(axis, one.points)
        axis.set_xlim(*problem.box[0])
        axis.set_ylim(*problem.box[1])
    _finish(figure, problem, "paths over the mean loss (dark: low)")
    return figure


def plot_losses(found: Mapping[str, Run], problem: Problem) -> Figure:
    """Paths in the space of losses."""
    figure, axes = _panels(found, problem, ("loss $L_1$", "loss $L_2$"))
    at_front = jax.jit(jax.vmap(problem.losses))(jnp.asarray(problem.front, float))
    front = np.stack(at_front, axis=-1)
    starts = [one.losses[:, :1] for one in found.values()]
    every = np.concatenate([front, np.concatenate(starts).reshape(-1, 2)])
    low, high = every.min(axis=0), every.max(axis=0)
    margin = 0.08 * (high - low)
    for axis, one in zip(axes, found.values(), strict=False):
        axis.grid(True, color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        _front(axis, front)
        _paths(axis, one.losses)
        axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
        axis.set_ylim(low[1] - margin[1], high[1] + margin[1])
    _finish(figure, problem, "paths of the losses (better: down and to the left)")
    return figure


def _mean_loss(
    problem: Problem, points: int = 161
) -> tuple[
    Float[np.ndarray, " points"],
    Float[np.ndarray, " points"],
    Float[np.ndarray, "points points"],
]:
    x1, x2 = (np.linspace(low, high, points) for low, high in problem.box)
    plane = jnp.asarray(np.stack(np.meshgrid(x1, x2), axis=-1), float)
    losses = jax.jit(jax.vmap(jax.vmap(problem.losses)))(plane)
    return x1, x2, np.mean(losses, axis=0)


def _panels(
    found: Mapping[str, Run], problem: Problem, labels: tuple[str, str]
) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, max(len(found), 2))
    rows = math.ceil(len(found) / columns)
    # Not pyplot: it would open windows, and keep every figure alive.
    size = (_PANEL * columns, _PANEL * rows + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    axes = list(grid.flat)
    for axis, (name, one) in zip(axes, found.items(), strict=False):
        ends = summarize(one, problem)
        reached = sum(end.reached for end in ends)
        axis.set_title(f"{name}\n{reached} of {len(ends)} reached", fontsize=10)
    for axis in axes[len(found) :]:
        axis.set_visible(False)
    for column in range(min(columns, len(found))):
        lowest = [axis for axis in grid[:, column] if axis.get_visible()][-1]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(labels[0])
    for axis in grid[:, 0]:
        axis.set_ylabel(labels[1])
    return figure, axes


def _front(axis: Axes, front: Float[np.ndarray, "points 2"]) -> None:
    if len(front) == 1:
        axis.plot(*front.T, "+", color=_FRONT, markersize=13, mew=2.5, zorder=2)
    else:
        axis.plot(*front.T, color=_FRONT, linewidth=4, alpha=0.75, zorder=2)


def _paths(axis: Axes, paths: Float[np.ndarray, "starts kept 2"]) -> None:
    for number, path in enumerate(paths):
        colour = _COLOURS[number % len(_COLOURS)]
        axis.plot(*path.T, color="white", linewidth=3, zorder=3)
        axis.plot(*path.T, color=colour, linewidth=1.6, zorder=4)
        marker = _MARKERS[number % len(_MARKERS)]
        axis.plot(*path[0], marker, color=colour, mfc="white", ms=6, mew=1.5, zorder=5)
        axis.plot(*path[-1], marker, color=colour, mec="white", ms=9, mew=1, zorder=6)


def _finish(figure: Figure, problem: Problem, title: str) -> None:
    figure.suptitle(f"{problem.name}: {title}", fontsize=13, fontweight="bold")
    whole = len(problem.front) > 1
    front = Line2D(
        [],
        [],
        color=_FRONT,
        linewidth=4 if whole else 0,
        alpha=0.75,
        marker=None if whole else "+",
        markersize=12,
        markeredgewidth=2.5,
        label="Pareto front",
    )
    handles = [front]
    for number, start in enumerate(problem.starts):
        colour = _COLOURS[number % len(_COLOURS)]
        marker = _MARKERS[number % len(_MARKERS)]
        label = f"from ({start[0]:g}, {start[1]:g})"
        handles.append(Line2D([], [], color=colour, marker=marker, label=label))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), int(figure.get_figwidth() / 1.7)),
        frameon=False,
        title="hollow: start; filled: end; title: how many ended on the Pareto front",
        title_fontproperties={"size": 9},
    )
