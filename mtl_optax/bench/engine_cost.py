"""What the gradient of a balanced step costs, for every way of taking the Jacobian.

For each network of `mtl_optax.bench.models` and number of tasks: plain training (the
gradient of the summed losses, which is the unit), every mode of
`mtl_optax.task_jacobian`, the two ways round the Gramian (weights that are kept for ten
steps, and the Gramian at the shared features), and TorchJD's two engines on the same
network. ``mtl-optax bench engine`` prints, saves and draws it.

What is timed is one function, compiled where it is JAX's, that returns the losses and
the combined gradient, without an optimiser. All weigh tasks by the inverse length of
their gradients, which costs next to nothing, so that it is engines that are compared.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

import mtl_optax as mtl
from mtl_optax.bench import torch_peer
from mtl_optax.bench.models import MODELS, Problem
from mtl_optax.bench.tables import markdown, number
from mtl_optax.bench.timing import (
    UNWATCHED,
    Timing,
    Watch,
    Way,
    alternate,
    in_words,
    peak_megabytes,
    physical_bytes,
    ratio,
)

PLAIN = "plain"
DEFAULT = "default"
MODES = ("layerwise", "vmap", "unroll", "map")
EVERY, STEPS = "every_10", 10
FEATURES = "features"
OURS = (PLAIN, DEFAULT, *MODES, EVERY, FEATURES)
WAYS = (*OURS, *torch_peer.WAYS)
TASKS = (2, 8, 40)

NOTES = """\
time: by plain training in the same framework (plain, torch), median over rounds.
/ default: by our default, in the same rounds; ms: one step.
FLOPs: by plain training's, XLA's count (of every_10, with all branches); >=: there are
loops, whose bodies count only once.
memory: temporary arrays by XLA's plan, which uses the room of returned gradients first
and does not count it; of PyTorch, by how much the process grew.
compile: to trace and to compile.
differs: relative distance of the combined gradient from our default's (of torch, from
plain's). All weigh tasks by inverse norms; features takes these norms at the features,
so that its gradient is another.
"""

# Of the machine's memory; a way that needs more could end the whole process.
_MOST_MEMORY = 0.6
# Exact ways differ by rounding, which a Gramian of long rows makes larger; not by this.
_MOST_DIFFERENCE = 1e-3


class Row(NamedTuple):
    """One way on one network with one number of tasks; NaN where there is no number.

    Attributes:
      model: of `MODELS`.
      tasks: T.
      way: of `WAYS`.
      ratio: time as a multiple of plain training in the same framework; the median.
      low, high: 10 % and 90 % of that over rounds.
      over_default: time as a multiple of our default's in the same rounds.
      milliseconds: of one step; the median.
      rounds: how many.
      flops: as a multiple of plain training's, by XLA's count.
      loops: whether there are loops, whose bodies XLA counts once only: then `flops` is
        too small.
      megabytes: temporary memory by XLA's plan; of PyTorch, by how much the process
        grew in the first run.
      compile_seconds: to trace and to compile.
      differs: relative distance of the combined gradient from our default's (of plain
        gradients, from ours).
      note: what went wrong, or was left out.
    """

    model: str
    tasks: int
    way: str
    ratio: float
    low: float
    high: float
    over_default: float
    milliseconds: float
    rounds: int
    flops: float
    loops: bool
    megabytes: float
    compile_seconds: float
    differs: float
    note: str


class _Ready(NamedTuple):
    """A way that can run.

    Attributes:
      way: what is timed.
      gradient: ``() -> `` the gradient of its last run, in the order of the parameters.
      megabytes: ``() -> `` memory, known after the first run at the latest.
    """

    way: Way
    gradient: Callable[[], list[np.ndarray[Any, Any]]]
    megabytes: Callable[[], float]
    flops: float = math.nan
    loops: bool = False
    compile_seconds: float = math.nan


def inverse_norms(num_tasks: int) -> mtl.Combiner:
    """Weighs every task by the inverse length of its gradient.

    Example:
      >>> tx = inverse_norms(2)
      >>> g = jnp.array([[3.0, 4.0], [0.0, 2.0]])
      >>> tx.update(g, tx.init(jnp.zeros(2)))[0]
      Array([0.6, 1.8], dtype=float32)
    """

    def update(gramian: Array, state: tuple[()], **_: Any) -> tuple[Array, tuple[()]]:
        return jax.lax.rsqrt(jnp.diag(gramian)), state

    needs = frozenset({"gramian"})
    method = mtl.Weighting(lambda num_tasks, dtype: (), update, needs)
    return mtl.from_weighting(method, num_tasks)


def measure(
    models: Sequence[str] = tuple(MODELS),
    tasks: Sequence[int] = TASKS,
    *,
    ways: Sequence[str] = WAYS,
    rounds: int = 10,
    budget: float = 60.0,
    small: bool = False,
    watch: Watch = UNWATCHED,
) -> list[Row]:
    """Times every way on every network, in turns.

    Args:
      models: names in `MODELS`.
      tasks: numbers of tasks.
      ways: names in `WAYS`; plain training is added where it is the unit.
      rounds: in each, every way runs once.
      budget: seconds of runs for one network and number of tasks; slow ways get fewer
        rounds, or one. Compiling is not counted.
      small: networks that show that it works, not what it costs.
      watch: told what goes on.

    Returns:
      a `Row` for each network, number of tasks and way.

    Example:
      >>> rows = measure(["mlp"], [2], ways=["vmap"], rounds=1, small=True)
      >>> [(row.way, row.note) for row in rows]
      [('plain', ''), ('vmap', '')]
    """
    ways = with_units(ways)
    missing = torch_peer.why_missing() if set(ways) - set(OURS) else ""
    if missing:
        watch.say(missing)
        ways = [way for way in ways if way in OURS]
    rows = []
    for model, num_tasks in itertools.product(models, tasks):
        kind = MODELS[model]
        problem = kind.make(num_tasks, kind.small if small else kind.full)
        found = _cell(problem, ways, rounds, budget, watch)
        for row in found:
            if row.note:
                watch.say(f"{model}, T = {num_tasks}, {row.way}: {row.note}")
        rows += found
    return rows


def with_units(ways: Sequence[str]) -> list[str]:
    """The ways in their order, and the units they are measured by.

    Example:
      >>> with_units(["autogram", "map"])
      ['plain', 'map', 'torch', 'autogram']
    """
    wanted = set(ways)
    if wanted & set(OURS):
        wanted.add(PLAIN)
    if wanted & set(torch_peer.WAYS):
        wanted.add(torch_peer.PLAIN)
    return [way for way in WAYS if way in wanted]


def _cell(
    problem: Problem,
    ways: Sequence[str],
    rounds: int,
    budget: float,
    watch: Watch,
) -> list[Row]:
    where = f"{problem.model}, T = {problem.num_tasks}"
    ready: dict[str, _Ready] = {}
    notes = dict.fromkeys(ways, "")
    peer = None
    for name in ways:
        watch.part(f"{where}: compiling {name}")
        try:
            if name in OURS:
                ready[name] = _prepare(problem, name)
            else:
                peer = peer or torch_peer.make_peer(problem)
                ready[name] = _prepare_peer(problem, peer, name)
                if name == torch_peer.PLAIN:
                    notes[name] = torch_peer.use_best_threads(peer.ways[name].run)
        except Exception as error:
            notes[name] = in_words(error)

    differs: dict[str, float] = {}
    compared_with: dict[bool, list[np.ndarray[Any, Any]]] = {}

    def on_run(name: str) -> None:
        # Right after its first run: PyTorch's ways share where gradients are left.
        if name not in differs:
            differs[name] = math.nan
            gradient = ready[name].gradient()
            summed = name in (PLAIN, torch_peer.PLAIN)
            reference = compared_with.setdefault(summed, gradient)
            differs[name] = _distance(gradient, reference)
        watch.run(f"{where}: {name}")

    timings = alternate(
        [one.way for one in ready.values()], rounds, budget=budget, on_run=on_run
    )
    nothing = Timing(np.array([]), "")
    default = timings.get(DEFAULT, nothing)
    rows = []
    for name in ways:
        timing = timings.get(name, nothing)
        unit = timings.get(PLAIN if name in OURS else torch_peer.PLAIN, nothing)
        middle, low, high = ratio(timing, unit)
        one = ready.get(name)
        ran = bool(len(timing.seconds))
        wrong = ""
        if name != FEATURES and differs.get(name, 0.0) > _MOST_DIFFERENCE:
            wrong = f"another gradient: differs by {differs[name]:.0e}"
        flops, plain = (r.flops if r else math.nan for r in (one, ready.get(PLAIN)))
        rows.append(
            Row(
                model=problem.model,
                tasks=problem.num_tasks,
                way=name,
                ratio=middle,
                low=low,
                high=high,
                over_default=ratio(timing, default).median,
                milliseconds=1e3 * float(np.median(timing.seconds))
                if ran
                else math.nan,
                rounds=len(timing.seconds),
                flops=flops / plain,
                loops=one.loops if one else False,
                megabytes=one.megabytes() if one else math.nan,
                compile_seconds=one.compile_seconds if one else math.nan,
                differs=differs.get(name, math.nan),
                note="; ".join(filter(None, (notes[name], timing.note, wrong))),
            )
        )
    return rows


def _distance(
    one: list[np.ndarray[Any, Any]], other: list[np.ndarray[Any, Any]]
) -> float:
    pairs = list(zip(one, other, strict=True))
    distance = sum(float(np.sum(np.square(a - b))) for a, b in pairs)
    length = sum(float(np.sum(np.square(b))) for _, b in pairs)
    return math.sqrt(distance / length)


# ----------------------------------------------------------------------------- our side


def make_step(problem: Problem, way: str) -> tuple[Callable[..., Any], Any]:
    """A way as ``step(params, state, batch) -> (gradient, state, losses)``, its state.

    Args:
      problem: of `mtl_optax.bench.models`.
      way: of `OURS`.
    """
    if way == PLAIN:

        def summed(params: PyTree[Array], batch: Any) -> tuple[Array, Array]:
            losses = problem.loss_fn(params, batch)
            return jnp.sum(losses), losses

        def plain(params: PyTree[Array], state: Any, batch: Any) -> Any:
            grads, losses = jax.grad(summed, has_aux=True)(params, batch)
            return grads, state, losses

        return plain, ()

    tx = inverse_norms(problem.num_tasks)
    if way == EVERY:
        tx = mtl.update_every(tx, STEPS)
    if way == FEATURES:
        jacobian = mtl.feature_jacobian(problem.encoder, problem.heads)
    else:
        mode: Any = way if way in MODES else None
        jacobian = mtl.task_jacobian(problem.loss_fn, mode=mode)

    def step(params: PyTree[Array], state: Any, batch: Any) -> Any:
        losses, task_grads = jacobian(params, batch)
        updates, state = tx.update(task_grads, state, params, losses=losses)
        return updates, state, losses

    return step, tx.init(problem.params)


def _prepare(problem: Problem, name: str) -> _Ready:
    step, first_state = make_step(problem, name)
    start = time.perf_counter()
    compiled: Any = (
        jax.jit(step).lower(problem.params, first_state, problem.batch).compile()
    )
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    size = memory.temp_size_in_bytes
    _check_memory(size + memory.output_size_in_bytes)
    last: list[Any] = []

    def run() -> None:
        state = first_state
        for _ in range(STEPS if name == EVERY else 1):
            gradient, state, losses = compiled(problem.params, state, problem.batch)
        last[:] = [jax.block_until_ready((gradient, losses))[0]]

    return _Ready(
        Way(name, run, calls=STEPS if name == EVERY else 1, unit=name == PLAIN),
        gradient=lambda: [np.asarray(leaf) for leaf in jax.tree.leaves(last)],
        megabytes=lambda: size / 1e6,
        flops=float((compiled.cost_analysis() or {}).get("flops", math.nan)),
        loops=" while(" in (compiled.as_text() or ""),
        compile_seconds=seconds,
    )


def _check_memory(size: float) -> None:
    most = _MOST_MEMORY * physical_bytes()
    if size > most:
        raise MemoryError(f"needs {size / 1e9:.1f} GB, may take {most / 1e9:.1f} GB")


# ----------------------------------------------------------------------- PyTorch's side


def _prepare_peer(problem: Problem, peer: torch_peer.Peer, name: str) -> _Ready:
    if name.startswith("backward"):  # rows, and their copy in one matrix
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
        _check_memory(2 * problem.num_tasks * size)
    way = peer.ways[name]
    grown: list[float] = []

    def run() -> None:
        if grown:
            way.run()
        else:
            grown.append(peak_megabytes(way.run))

    return _Ready(
        Way(name, run, unit=name == torch_peer.PLAIN),
        gradient=way.gradient,
        megabytes=lambda: grown[0] if grown else math.nan,
    )


# ---------------------------------------------------------------------------- the table


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table a network, one row a number of tasks and way."""
    heads = [
        "T",
        "way",
        "time",
        "10-90 %",
        "/ default",
        "ms",
        "FLOPs",
        "memory",
        "compile",
        "differs",
        "note",
    ]

    def cells(row: Row) -> list[str]:
        return [
            str(row.tasks),
            row.way,
            number(row.ratio, ".2f"),
            f"{row.low:.2f}-{row.high:.2f}" if row.rounds > 1 else "",
            number(row.over_default, ".2f"),
            number(row.milliseconds, ".1f"),
            (">= " if row.loops else "") + number(row.flops, ".2f"),
            number(row.megabytes, ".1f" if row.megabytes >= 10 else ".2g", " MB"),
            number(row.compile_seconds, ".1f", " s"),
            "" if row.way == FEATURES else number(row.differs, ".0e"),
            row.note,
        ]

    models = dict.fromkeys(row.model for row in rows)
    parts = [
        f"{model}\n\n"
        + markdown(heads, [cells(row) for row in rows if row.model == model])
        for model in models
    ]
    return "\n\n".join([*parts, NOTES.rstrip()])
