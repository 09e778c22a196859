"""What `update` costs on task gradients that are already there, stacked.

Every method of `mtl_optax.METHODS` on ``[T, P]`` gradients, TorchJD's aggregator where
it has the same method, and NumPy's floor, below which nothing that needs a Gramian can
be expected to fall: ``g @ g.T``, then ``w @ g``. ``mtl-optax bench update`` prints,
saves and draws it.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mtl_optax as mtl
from mtl_optax.bench import torch_peer
from mtl_optax.bench.tables import markdown, number
from mtl_optax.bench.timing import (
    UNWATCHED,
    Timing,
    Watch,
    Way,
    alternate,
    in_words,
    ratio,
)

FLOOR = "numpy"
OURS = "mtl_optax"
PEER = "TorchJD"
SIZES = ((3, 4_000_000), (16, 1_000_000), (40, 256_000))
SMALL = ((3, 20_000), (8, 10_000))

NOTES = """\
/ floor: time by that of NumPy's g @ g.T; w @ g, median over rounds.
/ ours: TorchJD's time by that of our method, in the same rounds.
memory: temporary arrays by XLA's plan; compile: to trace and to compile.
"""

_COLUMNS = 1000  # of the one matrix that all parameters are


class Row(NamedTuple):
    """One method in one library; NaN where there is no number.

    Attributes:
      tasks, parameters: T and P.
      library: `OURS`, `PEER` or `FLOOR`.
      method: its name there.
      ours: the name of our method that it is beside, or is.
      milliseconds: of one update; the median.
      over_floor: time as a multiple of NumPy's floor; the median.
      low, high: 10 % and 90 % of that over rounds.
      over_ours: time as a multiple of our method's in the same rounds.
      rounds: how many.
      megabytes: temporary memory by XLA's plan.
      compile_seconds: to trace and to compile.
      note: what went wrong, or was left out.
    """

    tasks: int
    parameters: int
    library: str
    method: str
    ours: str
    milliseconds: float = math.nan
    over_floor: float = math.nan
    low: float = math.nan
    high: float = math.nan
    over_ours: float = math.nan
    rounds: int = 0
    megabytes: float = math.nan
    compile_seconds: float = math.nan
    note: str = ""


class _Ready(NamedTuple):
    row: Row
    run: Callable[[], Any]


def draw(num_tasks: int, size: int) -> np.ndarray[Any, Any]:
    """Task gradients ``[T, P]`` that conflict, of lengths that differ by up to 10.

    Example:
      >>> rows = draw(3, 1000)
      >>> rows.shape, rows.dtype, bool((rows @ rows.T).min() < 0)
      ((3, 1000), dtype('float32'), True)
    """
    random = np.random.default_rng(num_tasks)
    rows = random.standard_normal((num_tasks, size), np.float32)
    rows -= np.float32(0.9) * rows.mean(axis=0)
    rows *= 10 ** random.uniform(0, 1, (num_tasks, 1)).astype(np.float32)
    return rows


def measure(
    sizes: Sequence[tuple[int, int]] = SIZES,
    *,
    methods: Sequence[str] | None = None,
    rounds: int = 10,
    budget: float = 60.0,
    watch: Watch = UNWATCHED,
) -> list[Row]:
    """Times every method in turns.

    Args:
      sizes: pairs T, P; P is a multiple of 1000.
      methods: names in `mtl_optax.METHODS`; by default all whose update is their own.
      rounds: in each, every method runs once.
      budget: seconds of runs for one size; slow methods get fewer rounds, or one.
      watch: told what goes on.

    Returns:
      a `Row` for each size and method, the floor first.

    Example:
      >>> rows = measure([(2, 1000)], methods=["mgda"], rounds=1)
      >>> [row.method for row in rows][:2]
      ['floor', 'mgda']
    """
    missing = torch_peer.why_missing()
    if missing:
        watch.say(missing)
    names = list(methods or mtl.METHODS)
    for name in [name for name in names if not _stands_alone(name)]:
        watch.say(f"{name} is left out: on given task gradients it is the plain sum")
        names.remove(name)
    rows = []
    for num_tasks, size in sizes:
        found = _cell(num_tasks, size, names, not missing, rounds, budget, watch)
        for row in found:
            if row.note:
                where = f"T = {row.tasks}, P = {row.parameters}"
                watch.say(f"{where}, {row.library} {row.method}: {row.note}")
        rows += found
    return rows


def count_parts(methods: Sequence[str] | None = None) -> int:
    """How many ways `measure` prepares for one size.

    Example:
      >>> count_parts(["mgda", "edm"]) == 2 + (torch_peer.why_missing() == "")
      True
    """
    names = [name for name in methods or mtl.METHODS if _stands_alone(name)]
    peers = [name for name in names if peer_name(mtl.METHODS[name])]
    return len(names) + (0 if torch_peer.why_missing() else len(peers))


def _stands_alone(name: str) -> bool:
    return mtl.METHODS[name].kind != "jacobian"


def peer_name(method: mtl.Method) -> str:
    """TorchJD's aggregator for a method, or nothing; of several, the last.

    What it calls a scalarization weighs losses; what takes more batches is a weighting.

    Example:
      >>> peer_name(mtl.METHODS["nash_mtl"]), peer_name(mtl.METHODS["edm"])
      ('NashMTL', '')
    """
    if method.needs & {"losses", "other_task_grads"}:
        return ""
    for names in method.peers.split("; "):
        if names.startswith(f"{PEER} "):
            return names.removeprefix(f"{PEER} ").split(", ")[-1]
    return ""


def _cell(
    num_tasks: int,
    size: int,
    methods: Sequence[str],
    with_peer: bool,
    rounds: int,
    budget: float,
    watch: Watch,
) -> list[Row]:
    where = f"T = {num_tasks}, P = {size}"
    gradients = draw(num_tasks, size)
    weights = np.full(num_tasks, 1 / num_tasks, np.float32)

    def floor() -> None:
        _ = gradients @ gradients.T
        _ = weights @ gradients

    stacked = jnp.asarray(gradients.reshape(num_tasks, -1, _COLUMNS))
    ready = [_Ready(Row(num_tasks, size, FLOOR, "floor", ""), floor)]
    failed = []

    def prepare(library: str, method: str, ours: str) -> None:
        watch.part(f"{where}: preparing {library} {method}")
        row = Row(num_tasks, size, library, method, ours)
        try:
            if library == OURS:
                ready.append(_prepare(row, stacked))
            else:
                ready.append(_prepare_peer(row, gradients))
        except Exception as error:
            failed.append(row._replace(note=in_words(error)))

    if with_peer:
        note = torch_peer.use_best_threads(torch_peer.make_aggregator("Sum", gradients))
        if note:
            watch.say(f"{where}, {PEER}: {note}")
    for name in methods:
        prepare(OURS, name, name)
        peer = peer_name(mtl.METHODS[name])
        if with_peer and peer:
            prepare(PEER, peer, name)
    ways = [
        Way(f"{r.library} {r.method}", run, unit=r.library == FLOOR) for r, run in ready
    ]
    timings = alternate(
        ways, rounds, budget=budget, on_run=lambda name: watch.run(f"{where}: {name}")
    )
    by_row = {one.row: timings[way.name] for one, way in zip(ready, ways, strict=True)}
    nothing = Timing(np.array([]), "")
    ours = {r.ours: t for r, t in by_row.items() if r.library == OURS}
    unit = timings[ways[0].name]
    found = []
    for blank, timing in by_row.items():
        median, low, high = ratio(timing, unit)
        ran = bool(len(timing.seconds))
        found.append(
            blank._replace(
                milliseconds=1e3 * float(np.median(timing.seconds))
                if ran
                else math.nan,
                over_floor=median,
                low=low,
                high=high,
                over_ours=ratio(timing, ours.get(blank.ours, nothing)).median,
                rounds=len(timing.seconds),
                note=timing.note,
            )
        )
    return found + failed


def _prepare(row: Row, stacked: jax.Array) -> _Ready:
    method = mtl.METHODS[row.method]
    params = jnp.zeros(stacked.shape[1:], stacked.dtype)
    tx = method.make(row.tasks)
    extras = {"losses": jnp.ones(row.tasks), **method.extras(row.tasks, params)}

    def update(grads: Any, state: Any, params: Any, extras: Any) -> Any:
        return tx.update(grads, state, params, **extras)

    start = time.perf_counter()
    arguments = (stacked, tx.init(params), params, extras)
    compiled: Any = jax.jit(update).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    # A step of training, not the very first one: histories have begun.
    _, state = compiled(*arguments)
    memory = compiled.memory_analysis().temp_size_in_bytes
    row = row._replace(megabytes=memory / 1e6, compile_seconds=seconds)
    return _Ready(
        row,
        lambda: jax.block_until_ready(compiled(stacked, state, params, extras)),
    )


def _prepare_peer(row: Row, gradients: np.ndarray[Any, Any]) -> _Ready:
    aggregate = torch_peer.make_aggregator(row.method, gradients)
    aggregate()  # histories begin, as on our side
    return _Ready(row, aggregate)


def table(rows: Sequence[Row]) -> str:
    """Markdown: one row a size and method, ours beside TorchJD's."""
    heads = [
        "T",
        "P",
        "method",
        "ms",
        "/ floor",
        "10-90 %",
        "TorchJD's ms",
        "/ ours",
        "memory",
        "compile",
        "note",
    ]
    peers = {(r.tasks, r.parameters, r.ours): r for r in rows if r.library == PEER}
    cells = []
    for row in rows:
        if row.library == PEER:
            continue
        peer = peers.get((row.tasks, row.parameters, row.ours))
        notes = [
            row.note,
            f"{PEER} {peer.method}: {peer.note}" if peer and peer.note else "",
        ]
        cells.append(
            [
                str(row.tasks),
                str(row.parameters),
                row.method,
                number(row.milliseconds, ".1f"),
                number(row.over_floor, ".2f"),
                f"{row.low:.2f}-{row.high:.2f}" if row.rounds > 1 else "",
                number(peer.milliseconds if peer else math.nan, ".1f"),
                number(peer.over_ours if peer else math.nan, ".2f"),
                number(row.megabytes, ".1f", " MB"),
                number(row.compile_seconds, ".1f", " s"),
                "; ".join(note for note in notes if note),
            ]
        )
    return f"{markdown(heads, cells)}\n\n{NOTES.rstrip()}"
