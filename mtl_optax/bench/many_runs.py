"""Many seeds at once: whole training runs under one `vmap`, and the other ways.

The two digits of `mtl_optax.examples` are trained for some steps, from many seeds, in
three ways that do the same: one compiled call in which every run is a `lax.scan` and
all runs stand under `vmap`; compiled scans one after the other; and a Python loop over
compiled steps. ``mtl-optax bench runs`` prints, saves and draws it.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int, Key, PyTree

import mtl_optax as mtl
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
from mtl_optax.examples.digits import Pairs, draw_pairs, load_sources
from mtl_optax.examples.models import encoder_mask, make_digits
from mtl_optax.examples.systems import BATCH_SIZE, extras_of
from mtl_optax.examples.trainer import draw_batches

METHODS = ("mean", "upgrad", "cagrad", "task_tensioner")
VMAP, SCANS, LOOP = "one vmap", "scan by scan", "step by step"
WAYS = (VMAP, SCANS, LOOP)

NOTES = """\
/ one vmap: time of all runs by that of the one vmap, median over rounds.
differs: the largest difference of a parameter after training.
"""

_TASKS = ("CL", "RR")
_RATE = 3e-3


class Row(NamedTuple):
    """One way of training many seeds under one method.

    Attributes:
      method: its name.
      way: of `WAYS`.
      seeds, steps: runs, and steps of each.
      steps_per_second: of all runs together; the median.
      over_vmap: time as a multiple of the one `vmap`'s; the median.
      low, high: 10 % and 90 % of that over rounds.
      rounds: how many.
      compile_seconds: to trace and to compile.
      differs: largest difference of a parameter, of any run, from the one `vmap`'s.
      note: what went wrong, or was left out.
    """

    method: str
    way: str
    seeds: int
    steps: int
    steps_per_second: float
    over_vmap: float
    low: float
    high: float
    rounds: int
    compile_seconds: float
    differs: float
    note: str


class _Run(NamedTuple):
    """What a run carries, and the places of its minibatches."""

    params: PyTree[Array]
    opt_state: Any
    key: Key[Array, ""]


class _Problem(NamedTuple):
    start: Callable[[Key[Array, ""]], tuple[_Run, Int[Array, "steps batch"]]]
    step: Callable[[_Run, Pairs, Int[Array, " batch"]], _Run]
    pairs: Pairs


def measure(
    methods: Sequence[str] = METHODS,
    *,
    seeds: int = 64,
    steps: int = 40,
    rounds: int = 5,
    budget: float = 120.0,
    watch: Watch = UNWATCHED,
) -> list[Row]:
    """Times the three ways in turns.

    Args:
      methods: names in `mtl_optax.METHODS`.
      seeds: runs of each method.
      steps: of each run.
      rounds: in each, every way trains all seeds once.
      budget: seconds of runs for one method.
      watch: told what goes on.

    Returns:
      a `Row` for each method and way.

    Example:
      >>> measure([])
      []
    """
    rows = []
    for method in methods:
        found = _cell(method, seeds, steps, rounds, budget, watch)
        for row in found:
            if row.note:
                watch.say(f"{row.method}, {row.way}: {row.note}")
        rows += found
    return rows


def _make_problem(method: str, steps: int) -> _Problem:
    init, loss_fn, _ = make_digits(_TASKS)
    pairs = draw_pairs(load_sources().train, jax.random.key(0), steps * BATCH_SIZE)
    combine = mtl.shared_only(mtl.METHODS[method].make(len(_TASKS)), encoder_mask)
    tx = optax.chain(combine, optax.adam(_RATE))
    extras = extras_of(method)

    def start(key: Key[Array, ""]) -> tuple[_Run, Int[Array, "steps batch"]]:
        params_key, order_key, key = jax.random.split(key, 3)
        params = init(params_key)
        order = draw_batches(order_key, pairs, BATCH_SIZE)
        return _Run(params, tx.init(params), key), order

    def step(run: _Run, pairs: Pairs, chosen: Int[Array, " batch"]) -> _Run:
        key, extras_key = jax.random.split(run.key)
        batch = jax.tree.map(lambda x: x[chosen], pairs)
        losses, task_grads = mtl.task_jacobian(loss_fn)(run.params, batch)
        more = {} if extras is None else extras(extras_key)
        updates, opt_state = tx.update(
            task_grads, run.opt_state, run.params, losses=losses, **more
        )
        return _Run(optax.apply_updates(run.params, updates), opt_state, key)

    return _Problem(start, step, pairs)


def _cell(
    method: str,
    seeds: int,
    steps: int,
    rounds: int,
    budget: float,
    watch: Watch,
) -> list[Row]:
    problem = _make_problem(method, steps)
    pairs = problem.pairs
    starts = jax.jit(jax.vmap(problem.start))(
        jax.random.split(jax.random.key(1), seeds)
    )
    one_by_one = [jax.tree.map(lambda x, i=i: x[i], starts) for i in range(seeds)]

    def train(run: _Run, order: Int[Array, "steps batch"], pairs: Pairs) -> _Run:
        def body(run: _Run, chosen: Array) -> tuple[_Run, None]:
            return problem.step(run, pairs, chosen), None

        return lax.scan(body, run, order)[0]

    def at_once(train: Any) -> Any:
        return train(*starts, pairs)

    def scans(train: Any) -> list[Any]:
        return [train(*one, pairs) for one in one_by_one]

    def loop(step: Any) -> list[Any]:
        ends = []
        for run, order in one_by_one:
            for chosen in np.asarray(order):
                run = step(run, pairs, chosen)
            ends.append(run)
        return ends

    run, order = one_by_one[0]
    makers: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
        VMAP: (at_once, jax.vmap(train, in_axes=(0, 0, None)), (*starts, pairs)),
        SCANS: (scans, train, (run, order, pairs)),
        LOOP: (loop, problem.step, (run, pairs, order[0])),
    }
    ways, seconds, ends, failed = [], {}, {}, {}
    for name, (drive, function, arguments) in makers.items():
        watch.part(f"{method}: compiling {name}")
        start = time.perf_counter()
        try:
            compiled = jax.jit(function).lower(*arguments).compile()
        except Exception as error:
            failed[name] = in_words(error)
            continue
        seconds[name] = time.perf_counter() - start

        def all_runs(name: str = name, drive: Any = drive, of: Any = compiled) -> None:
            ends[name] = jax.block_until_ready(drive(of))

        ways.append(Way(name, all_runs, unit=name == VMAP))
    timings = alternate(
        ways, rounds, budget=budget, on_run=lambda name: watch.run(f"{method}: {name}")
    )
    nothing = Timing(np.array([]), "")
    rows = []
    for name in WAYS:
        timing = timings.get(name, nothing._replace(note=failed.get(name, "")))
        took = float(np.median(timing.seconds)) if len(timing.seconds) else math.nan
        middle, low, high = ratio(timing, timings.get(VMAP, nothing))
        rows.append(
            Row(
                method=method,
                way=name,
                seeds=seeds,
                steps=steps,
                steps_per_second=seeds * steps / took,
                over_vmap=middle,
                low=low,
                high=high,
                rounds=len(timing.seconds),
                compile_seconds=seconds.get(name, math.nan),
                differs=_distance(ends.get(name), ends.get(VMAP)),
                note=timing.note,
            )
        )
    return rows


def _distance(some: Any, others: Any) -> float:
    """The largest difference of a parameter at the end."""
    if some is None or others is None:
        return math.nan
    one, other = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *(run.params for run in end))
        if isinstance(end, list)
        else end.params
        for end in (some, others)
    )
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.max(np.abs(a - b))) for a, b in pairs)


def table(rows: Sequence[Row]) -> str:
    """Markdown: one row a method and way."""
    heads = [
        "method",
        "way",
        "runs x steps",
        "steps a second",
        "/ one vmap",
        "10-90 %",
        "compile",
        "differs",
        "note",
    ]
    cells = [
        [
            row.method,
            row.way,
            f"{row.seeds} x {row.steps}",
            number(row.steps_per_second, ".0f"),
            number(row.over_vmap, ".2f"),
            f"{row.low:.2f}-{row.high:.2f}" if row.rounds > 1 else "",
            number(row.compile_seconds, ".1f", " s"),
            number(row.differs, ".0e"),
            row.note,
        ]
        for row in rows
    ]
    return f"{markdown(heads, cells)}\n\n{NOTES.rstrip()}"
