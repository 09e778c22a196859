"""Which promises hold in float32, for us and for TorchJD on the same draws.

``python -m mtl_optax.bench.promises`` combines thousands of random task gradients:
conflicting or not, of lengths that differ by up to 1e6, times 1e-10 and 1e10. For each
method that says so in `mtl_optax.METHODS` it looks at the smallest cosine between a
task gradient and the update (``non_conflicting``), and at how far the update turns when
single gradients are scaled (``row_scale_invariant``).

``python mtl_optax/bench/promises.py --peer`` does the same for TorchJD 0.18, where no
JAX is needed. Rows go to ``--csv FILE``; further files are read, and join the table::

    python mtl_optax/bench/promises.py --peer --csv peer.csv
    python -m mtl_optax.bench.promises --csv ours.csv peer.csv
"""

import argparse
import csv
import importlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

TASKS = (2, 3, 5, 10, 20, 40)
SIZES = (10, 100)
FAMILIES = {"plain": 0.0, "conflicting": 0.9, "strongly conflicting": 0.99}
LENGTHS = (1.0, 1e2, 1e4, 1e6)
SCALES = (1.0, 1e-10, 1e10)

# An update that is shorter than this part of the longest weighted gradient is what
# rounding leaves of gradients that cancel: relative errors of eps in the addends are
# then cosines of about 1e-4, which is what counts as a conflict.
SHORT = 1e-3
CONFLICT = 1e-4

OURS = "mtl_optax"
# TorchJD's methods, and the part of the draws that each gets: Nash-MTL calls a convex
# solver twenty times, FairGrad one for least squares with many steps.
PEERS = {"MGDA": 1.0, "UPGrad": 1.0, "DualProj": 1.0, "NashMTL": 0.1, "FairGrad": 0.2}

Numbers: TypeAlias = npt.NDArray[np.floating[Any]]


class Cell(NamedTuple):
    """Draws of one kind.

    Attributes:
      tasks: T.
      size: P.
      family: of `FAMILIES`; the part of the mean row that is taken from every row.
      lengths: rows are multiplied by ``lengths ** U(0, 1)``.
      scale: and all of them by this.
    """

    tasks: int
    size: int
    family: str
    lengths: float
    scale: float


class Row(NamedTuple):
    """What a method did with the draws of one cell.

    Shares are of all draws; a cosine is NaN where there is none to look at.

    Attributes:
      library: ``mtl_optax`` or ``TorchJD, float32`` or ``float64``.
      method: its name there.
      torchjd: its name in TorchJD, empty where that has none.
      tasks, size, family, lengths, scale: the `Cell`.
      draws: how many.
      failed: share of draws that raised, or gave no finite update.
      left_out: share of draws with a finite update that is shorter than `SHORT` times
        the longest weighted row.
      conflicting: share of draws, not left out, with a cosine below ``-CONFLICT``.
      smallest_cosine: between a row and the update, over draws that are not left out.
      smallest_left_out: the same over those that are.
      roundings: the largest ``-cosine |u| / (eps sum_t |w_t g_t|)`` over all draws,
        none left out, with float32's eps: a conflict in units of what rounding may do
        to the sum. An exact solver stays at about 1, also where gradients cancel.
      residual: the largest ``solver_residual``.
      turned: the largest angle between the update and that for the same rows as first
        drawn (``lengths`` and ``scale`` 1), neither left out, in radians.
    """

    library: str
    method: str
    torchjd: str
    tasks: int
    size: int
    family: str
    lengths: float
    scale: float
    draws: int
    failed: float
    left_out: float
    conflicting: float
    smallest_cosine: float
    smallest_left_out: float
    roundings: float
    residual: float
    turned: float


class Combined(NamedTuple):
    """Updates ``[N, P]``, weights ``[N, T]`` and solver residuals ``[N]``."""

    updates: Numbers
    weights: Numbers
    residuals: Numbers


class _Seen(NamedTuple):
    """By draw: whether it is finite and long enough, its smallest cosine, its unit
    vector, and the conflict in roundings.
    """

    finite: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.bool_]
    smallest: Numbers
    units: Numbers
    roundings: Numbers


# -------------------------------------------------------------------------- the draws


def make_rows(cell: Cell, number: int) -> npt.NDArray[np.float32]:
    """Task gradients ``[N, T, P]`` of one cell, in float32.

    Cells that differ in lengths and scale only hold the same rows, scaled. The first
    draws are the same however many there are.

    Example:
      >>> cell = Cell(tasks=3, size=10, family="plain", lengths=1.0, scale=1.0)
      >>> rows = make_rows(cell, 4)
      >>> longer = make_rows(cell._replace(lengths=100.0), 2)
      >>> factors = longer[..., 0] / rows[:2, :, 0]
      >>> rows.shape, bool(1 <= factors.min() < factors.max() <= 100)
      ((4, 3, 10), True)
    """
    seed = [cell.tasks, cell.size, list(FAMILIES).index(cell.family)]
    shape = (number, cell.tasks, cell.size)
    rows = np.random.default_rng([*seed, 0]).standard_normal(shape)
    powers = np.random.default_rng([*seed, 1]).uniform(size=(number, cell.tasks, 1))
    rows = rows - FAMILIES[cell.family] * rows.mean(axis=1, keepdims=True)
    rows = rows * cell.lengths**powers * cell.scale
    return rows.astype(np.float32)


def _groups(
    tasks: Iterable[int], *, every: bool = True
) -> Iterator[tuple[int, list[Cell]]]:
    """``(T, cells)``: the same rows, scaled; the first cell's are as they are drawn."""
    scaled = list(itertools.product(LENGTHS, SCALES))
    if not every:
        scaled = [how for how in scaled if 1 in how]
    for num_tasks, size, family in itertools.product(tasks, SIZES, FAMILIES):
        yield num_tasks, [Cell(num_tasks, size, family, *how) for how in scaled]


# ------------------------------------------------------------------ what became of them


def _look(rows: Numbers, found: Combined) -> _Seen:
    """In float64, from rows and updates as they are."""
    rows = rows.astype(np.float64)
    updates, weights = (x.astype(np.float64) for x in (found.updates, found.weights))
    finite = np.all(np.isfinite(updates), axis=-1)
    finite = finite & np.all(np.isfinite(weights), axis=-1)
    updates = np.where(finite[:, None], updates, 0)
    weights = np.where(finite[:, None], weights, 0)
    lengths = np.linalg.norm(rows, axis=-1)
    length = np.linalg.norm(updates, axis=-1)
    addends = np.abs(weights) * lengths
    kept = finite & (length > SHORT * addends.max(-1))
    units = updates / np.where(length > 0, length, 1)[:, None]
    smallest = np.min(np.einsum("ntp,np->nt", rows, units) / lengths, axis=-1)
    rounding = np.finfo(np.float32).eps * addends.sum(-1)
    roundings = -smallest * length / np.where(rounding > 0, rounding, 1)
    return _Seen(finite, kept, smallest, units, roundings)


def _angles(one: Numbers, other: Numbers) -> Numbers:
    """Between unit vectors; the cosine would lose small angles."""
    return 2 * np.arcsin(np.minimum(np.linalg.norm(one - other, axis=-1) / 2, 1))


def _row(
    names: tuple[str, str, str],
    cell: Cell,
    seen: _Seen,
    residuals: Numbers,
    first: _Seen | None,
    promised: bool = True,
) -> Row:
    """`first`: what became of the unscaled rows, or None where it does not matter."""
    left_out = seen.finite & ~seen.kept
    conflicting = seen.kept & (seen.smallest < -CONFLICT)
    turned = math.nan
    if first is not None:
        both = seen.kept & first.kept
        turned = float(np.max(_angles(seen.units, first.units)[both], initial=0))
    return Row(
        *names,
        **cell._asdict(),
        draws=len(seen.kept),
        failed=float(np.mean(~seen.finite)),
        left_out=float(np.mean(left_out)),
        conflicting=float(np.mean(conflicting)) if promised else math.nan,
        smallest_cosine=_least(seen.smallest[seen.kept]) if promised else math.nan,
        smallest_left_out=_least(seen.smallest[left_out]) if promised else math.nan,
        roundings=float(np.max(seen.roundings)) if promised else math.nan,
        residual=_worst(residuals),
        turned=turned,
    )


def _worst(residuals: Numbers) -> float:
    """NaN if there are none at all; a single NaN is as bad as can be."""
    if np.all(np.isnan(residuals)):
        return math.nan
    return float(np.max(np.where(np.isnan(residuals), np.inf, residuals)))


def _least(cosines: Numbers) -> float:
    return float(np.min(cosines)) if cosines.size else math.nan


# --------------------------------------------------------------------------------- ours


def ours(
    number: int = 20,
    *,
    tasks: Sequence[int] = TASKS,
    methods: Sequence[str] | None = None,
    jit: Callable[..., Any] | None = None,
) -> list[Row]:
    """Every method that promises one of the two, on `number` draws a cell.

    Args:
      number: draws a cell; there are 72 cells a number of tasks.
      tasks: numbers of tasks.
      methods: names in `mtl_optax.METHODS`; by default all that promise.
      jit: what compiles; `jax.jit` by default.

    Returns:
      a `Row` for each cell and method.

    Example:
      >>> rows = ours(1, tasks=[2], methods=["mgda"])
      >>> len(rows), max(row.conflicting for row in rows)
      (72, 0.0)
    """
    import mtl_optax as mtl

    promises = {"non_conflicting", "row_scale_invariant"}
    if methods is None:
        methods = [name for name, m in mtl.METHODS.items() if m.claims & promises]
    found = []
    for num_tasks, name in _progress(list(itertools.product(tasks, methods))):
        method = mtl.METHODS[name]
        combine = _compiled(method, num_tasks, jit)
        torchjd = "".join(
            peer.removeprefix("TorchJD ")
            for peer in method.peers.split("; ")
            if peer.startswith("TorchJD ")
        )
        for _, cells in _groups([num_tasks]):
            rows = np.stack([make_rows(cell, number) for cell in cells])
            # One shape, so one program: zeros at the end change nothing.
            spare = max(SIZES) - rows.shape[-1]
            padded = np.pad(rows, [(0, 0)] * 3 + [(0, spare)])
            results = combine(padded.reshape(-1, *padded.shape[2:]))
            first = None
            for at, cell in enumerate(cells):
                one = slice(at * number, (at + 1) * number)
                now = Combined(*(np.asarray(x)[one] for x in results))
                seen = _look(padded[at], now)
                first = first or seen
                found.append(
                    _row(
                        (OURS, method.name, torchjd),
                        cell,
                        seen,
                        now.residuals,
                        first if "row_scale_invariant" in method.claims else None,
                        promised="non_conflicting" in method.claims,
                    )
                )
    return found


def _compiled(
    method: Any, num_tasks: int, jit: Callable[..., Any] | None
) -> Callable[[Numbers], Combined]:
    """One program for stacked gradients ``[N, T, P]``."""
    import jax
    import jax.numpy as jnp
    import optax

    tx = method.make(num_tasks)

    def one(rows: Any) -> Combined:
        params = jnp.zeros(rows.shape[1:], rows.dtype)
        extras = {"losses": jnp.ones(num_tasks), **method.extras(num_tasks, params)}
        updates, state = tx.update(rows, tx.init(params), params, **extras)
        weights: Any = optax.tree_utils.tree_get(state, "task_weights")
        weights = jnp.ones(num_tasks) if weights is None else weights
        residual = optax.tree_utils.tree_get(state, "solver_residual", jnp.nan)
        return Combined(updates, weights, residual)

    return (jit or jax.jit)(jax.vmap(one))


# ------------------------------------------------------------------------------ TorchJD


def peer(
    number: int = 10,
    *,
    tasks: Sequence[int] = TASKS,
    methods: Sequence[str] = tuple(PEERS),
) -> list[Row]:
    """TorchJD's methods with their defaults, in float32 and float64.

    Only where either the lengths or the scale is 1, to save time.

    Args:
      number: draws a cell, of which slow methods get a part (`PEERS`).
      tasks: numbers of tasks.
      methods: names in TorchJD.

    Returns:
      a `Row` for each cell, method and precision.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    found = []
    groups = _groups(tasks, every=False)
    steps = list(itertools.product(groups, methods))
    for (num_tasks, cells), name in _progress(steps):
        draws = max(1, round(number * PEERS[name]))
        for precision in ("float32", "float64"):
            combine = _torchjd(name, num_tasks, getattr(torch, precision))
            first = None
            for cell in cells:
                rows = make_rows(cell, draws)
                now = combine(rows)
                seen = _look(rows, now)
                first = first or seen
                names = (f"TorchJD, {precision}", name, name)
                found.append(_row(names, cell, seen, now.residuals, first))
    return found


def _torchjd(name: str, num_tasks: int, dtype: Any) -> Callable[[Numbers], Combined]:
    """A method of TorchJD, one draw after the other; what raises gives NaN."""
    torch = importlib.import_module("torch")
    library = importlib.import_module("torchjd.aggregation")
    aggregator = {
        "NashMTL": lambda: library.NashMTL(n_tasks=num_tasks),
        "FairGrad": lambda: library.FairGrad(alpha=1.0),
    }.get(name, getattr(library, name))()

    def one(rows: Numbers) -> tuple[Numbers, Numbers]:
        if hasattr(aggregator, "reset"):
            aggregator.reset()
        matrix = torch.from_numpy(rows).to(dtype)
        try:
            weights = aggregator.weighting(matrix)
        except Exception:
            return np.full(rows.shape[1], np.nan), np.full(len(rows), np.nan)
        return (weights @ matrix).numpy(), weights.numpy()

    def combine(rows: Numbers) -> Combined:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            updates, weights = zip(*map(one, rows), strict=True)
        none = np.full(len(rows), np.nan)
        return Combined(np.stack(updates), np.stack(weights), none)

    return combine


def _progress(steps: list[Any]) -> Iterator[Any]:
    """With a bar where there is tqdm; TorchJD's environment may lack it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(steps)
    return iter(tqdm(steps, desc="promises", leave=False))


# ---------------------------------------------------------------------------- the table


def save(rows: Iterable[Row], path: Path) -> None:
    """Writes rows as CSV; `load` reads them."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def load(path: Path) -> list[Row]:
    """Reads what `save` wrote.

    Example:
      >>> import tempfile
      >>> cell = Cell(2, 10, "plain", 1.0, 1e-10)
      >>> row = Row("mtl_optax", "mgda", "MGDA", *cell, 5, 0, 0, 0, 0.5, 0.5, 0, 0, 0)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save([row], Path(folder, "rows.csv"))
      ...     load(Path(folder, "rows.csv")) == [row]
      True
    """
    kinds = Row.__annotations__.values()
    with path.open(newline="") as file:
        return [
            Row(*(kind(x) for kind, x in zip(kinds, line, strict=True)))
            for line in itertools.islice(csv.reader(file), 1, None)
        ]


COLUMNS = {f"lengths to {ratio:g}": (ratio, 1.0) for ratio in LENGTHS} | {
    f"times {scale:g}": (1.0, scale) for scale in SCALES if scale != 1
}


def table(rows: Sequence[Row]) -> str:
    """One Markdown table: how often each method's updates conflict, and how badly.

    Of draws with T <= P, where some direction helps every task; with more tasks than
    parameters there may be none, and any update conflicts that is not zero. A cell
    holds the share of draws that conflict and the smallest cosine; the last column the
    share of draws, of all in the row, whose update is too short to judge, and of those
    without any.

    Example:
      >>> cell = Cell(2, 10, "plain", 1.0, 1.0)
      >>> row = Row("mtl_optax", "edm", "", *cell, 5, 0, 0, 0, 0.5, 0.5, 0, 0, 0)
      >>> print(table([row]))
      | method | library | lengths to 1 | ... | times 1e+10 | left out, failed |
      |---|---|---|---|---|---|---|---|---|
      | edm | mtl_optax | 0 %, 0.5 | ... | 0 %, 0 % |
    """
    promised = [
        row for row in rows if row.tasks <= row.size and not math.isnan(row.conflicting)
    ]
    named = {row.torchjd: row.method for row in promised if row.library == OURS}
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in promised:
        method = named.get(row.torchjd, row.method) if row.torchjd else row.method
        groups.setdefault((method, row.library), []).append(row)
    order = list(dict.fromkeys(method for method, _ in groups))
    heads = ["method", "library", *COLUMNS, "left out, failed"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for method, library in sorted(groups, key=lambda key: (order.index(key[0]), key)):
        group = groups[method, library]
        shown = []
        for lengths, scale in COLUMNS.values():
            cell = [r for r in group if (r.lengths, r.scale) == (lengths, scale)]
            share = _share(cell, "conflicting")
            cosines = np.array([row.smallest_cosine for row in cell])
            least = _least(cosines[~np.isnan(cosines)])
            shown.append(f"{share}, {least:.1g}" if cell else "")
        both = f"{_share(group, 'left_out')}, {_share(group, 'failed')}"
        lines.append("| " + " | ".join([method, library, *shown, both]) + " |")
    return "\n".join(lines)


def _share(rows: Sequence[Row], of: str) -> str:
    total = sum(row.draws for row in rows)
    share = sum(getattr(row, of) * row.draws for row in rows) / max(total, 1)
    return f"{100 * share:.2g} %"


def main() -> None:
    """Prints the table, and saves what it was made from."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--draws", type=int, help="of each kind; 20, and 10 of TorchJD by default"
    )
    parser.add_argument("--peer", action="store_true", help="measure TorchJD instead")
    parser.add_argument(
        "--csv",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="the first is written; the others are read, and join the table",
    )
    options = parser.parse_args()
    given = () if options.draws is None else (options.draws,)
    rows = (peer if options.peer else ours)(*given)
    if options.csv:
        save(rows, options.csv[0])
    for path in options.csv[1:]:
        rows = rows + load(path)
    print(table(rows))


if __name__ == "__main__":
    main()
