"""The toy problems on which papers compare methods, for every method at once.

* `TOY`: two tasks with valleys, a plateau and a curved ridge (Liu et al. 2021, CAGrad;
  here scaled as by Navon et al. 2022, Nash-MTL). Two numbers, five starts, Adam.
* `EWQ` and `CQF`: two quadratics that agree, and two that don't (TorchJD's); SGD.

`run` is one method from all starts of a problem: a `vmap` of one `lax.scan`, in one
`jit`. ``python -m mtl_optax.examples.toy`` runs every method that can be run on a
vector of two parameters, prints a table, and saves it and two pictures.
"""

import argparse
import csv
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key
from tqdm import tqdm

import mtl_optax as mtl

NUM_TASKS = 2
TOY_SCALE = 0.1  # of the first loss, by Navon et al.; Liu et al. have 1
_FLOOR = 5e-6  # below it the logarithms of the toy problem are flat
_KEPT = 400

Point: TypeAlias = Float[Array, "2"]
TwoLosses: TypeAlias = tuple[Float[Array, ""], Float[Array, ""]]
Points: TypeAlias = Float[np.ndarray, "points 2"]


class Problem(NamedTuple):
    """Two losses of two numbers, and how papers run methods on them.

    Attributes:
      name: what the pictures say.
      losses: ``x [2] -> (loss, loss)``.
      starts: where runs begin.
      optimizer: ``learning rate -> `` what follows the combiner.
      learning_rate: as published.
      steps: as published.
      front: the Pareto set in the space of parameters, a line through these points (or
        one point).
      tolerance: an end this near to `front` has reached it.
      units: one of each loss, to compare changes of the two.
      box: the part of the plane that pictures show: ``(x1 from, to), (x2 from, to)``.
    """

    name: str
    losses: Callable[[Point], TwoLosses]
    starts: tuple[tuple[float, float], ...]
    optimizer: Callable[[float], optax.GradientTransformation]
    learning_rate: float
    steps: int
    front: Points
    tolerance: float
    units: tuple[float, float]
    box: tuple[tuple[float, float], tuple[float, float]]


class Run(NamedTuple):
    """One method on one problem, from all starts.

    Attributes:
      steps: numbers of the steps that were kept, from 0, the start, to the last.
      points: parameters after these steps.
      losses: at `points`.
    """

    steps: Int[np.ndarray, " kept"]
    points: Float[np.ndarray, "starts kept 2"]
    losses: Float[np.ndarray, "starts kept tasks"]


class End(NamedTuple):
    """How a method ended from one start; see `summarize`."""

    start: tuple[float, float]
    point: tuple[float, float]
    losses: tuple[float, float]
    distance: float
    reached: bool
    gain: float


# ----------------------------------------------------------------------- the problems


def toy_losses(x: Point, *, scale: float = TOY_SCALE) -> TwoLosses:
    r"""The two-task toy problem of Liu et al. 2021, scaled as by Navon et al. 2022.

    .. math:: L_1 = s (c_1 f_1 + c_2 g_1), \qquad L_2 = c_1 f_2 + c_2 g_2

    Logarithmic valleys :math:`f` where :math:`x_2 > 0`, parabolas :math:`g` where
    :math:`x_2 < 0`, and gates :math:`c_1, c_2 \ge 0` of which one is open at a time;
    both are shut at :math:`x_2 = 0`.

    Args:
      x: the two parameters; the losses have their dtype.
      scale: of the first loss.

    Returns:
      the two losses. Gradients are finite everywhere: in a valley's flat bottom they
      are 0, and at :math:`x_2 = 0` the mean of those on either side (PyTorch's clamp in
      the authors' code has their sum there: twice as much).

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.toy import toy_losses
      >>> [round(float(loss), 4) for loss in toy_losses(jnp.array([-8.5, 7.5]))]
      [0.6552, 7.9008]

    References:
      Liu et al., Conflict-Averse Gradient Descent, arXiv:2110.14048, 2021; Navon et
      al., Multi-Task Learning as a Bargaining Game, arXiv:2202.01017, 2022.

    The sign in the second valley is that of the authors' code, not of their appendix.
    """
    x1, x2 = x[0], x[1]
    # In this order x1 + 7 and 7 - x1 are exact near the valleys, where float32 would
    # otherwise lose what the logarithms are taken of.
    f1 = _valley(jnp.tanh(x2) - 0.5 * (x1 + 7))
    f2 = _valley(0.5 * (7 - x1) - jnp.tanh(x2))
    bowl = 0.1 * (x2 + 8) ** 2
    g1 = ((x1 - 7) ** 2 + bowl) / 10 - 20
    g2 = ((x1 + 7) ** 2 + bowl) / 10 - 20
    c1 = jnp.maximum(jnp.tanh(0.5 * x2), 0)
    c2 = jnp.maximum(jnp.tanh(-0.5 * x2), 0)
    return scale * (f1 * c1 + g1 * c2), f2 * c1 + g2 * c2


def _valley(x: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.log(jnp.maximum(jnp.abs(x), _FLOOR)) + 6


def toy_front(points: int = 201) -> Points:
    r"""The Pareto set of the toy problem: where a mean of the gradients is zero.

    With :math:`x_2 < 0` the first component of that mean is zero for the weights
    :math:`(7 \pm x_1) / 14` (times what scales the losses); the second then says

    .. math:: 0.02 (x_2 + 8) c_2 + \big( (49 - x_1^2) / 10 - 20
              + (x_2 + 8)^2 / 100 \big) c_2' = 0.

    Papers draw the straight line :math:`x_2 = -8.3552`, which touches it at
    :math:`x_1 = 0`; its ends are 0.08 lower.

    Args:
      points: how many, at equal steps of :math:`x_1` from -7 to 7.

    Returns:
      the points.

    Example:
      >>> from mtl_optax.examples.toy import toy_front
      >>> toy_front(3).round(4).tolist()
      [[-7.0, -8.4345], [0.0, -8.3551], [7.0, -8.4345]]
    """
    x1 = np.linspace(-7, 7, points)
    low, high = np.full(points, -9.0), np.full(points, -7.0)
    for _ in range(60):
        x2 = (low + high) / 2
        gate = np.tanh(-x2 / 2)
        bowls = (49 - x1**2) / 10 - 20 + (x2 + 8) ** 2 / 100
        slope = 0.02 * (x2 + 8) * gate - bowls * (1 - gate**2) / 2
        low, high = np.where(slope < 0, x2, low), np.where(slope < 0, high, x2)
    return np.stack([x1, (low + high) / 2], axis=1)


def ewq_losses(x: Point) -> TwoLosses:
    r"""Element-wise quadratic: :math:`(x_1^2, x_2^2)`.

    The tasks never conflict; each has its best on an axis, both at 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.toy import ewq_losses
      >>> [float(loss) for loss in ewq_losses(jnp.array([3.0, -2.0]))]
      [9.0, 4.0]
    """
    return x[0] ** 2, x[1] ** 2


_ANGLE = np.pi / 16
_CENTRES = ((1.0, 0.0), (-1.0, 0.0))


def _form(angle: float, long: float, short: float) -> Float[np.ndarray, "2 2"]:
    """``B B^T`` of ``B = rotation(angle) diag(long, short)``."""
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin], [sin, cos]])
    return rotation @ np.diag([long**2, short**2]) @ rotation.T


_FORMS = (_form(_ANGLE, 1.0, 0.1), _form(-_ANGLE, 3**0.5, 0.1))


def cqf_losses(x: Point) -> TwoLosses:
    r"""Convex quadratic forms :math:`(x - u_i)^\top B_i B_i^\top (x - u_i)`.

    Two long valleys that cross at a small angle, with their best at (1, 0) and (-1, 0).

    Example:
      >>> import jax.numpy as jnp
      >>> from mtl_optax.examples.toy import cqf_losses
      >>> [round(float(loss), 3) for loss in cqf_losses(jnp.array([1.0, 0.0]))]
      [0.0, 11.545]
    """
    away = [x - jnp.asarray(centre, x.dtype) for centre in _CENTRES]
    forms = [jnp.asarray(form, x.dtype) for form in _FORMS]
    return away[0] @ forms[0] @ away[0], away[1] @ forms[1] @ away[1]


def cqf_front(points: int = 201) -> Points:
    """The Pareto set of the quadratic forms: the best point of every mean of the two.

    Example:
      >>> from mtl_optax.examples.toy import cqf_front
      >>> (cqf_front()[[0, -1]].round(6) + 0.0).tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    # Near the ends the best point runs fast, so not equal steps of the weight.
    weights = (1 - np.cos(np.linspace(0, np.pi, points))) / 2
    found = []
    for weight in weights:
        parts = weight * _FORMS[0], (1 - weight) * _FORMS[1]
        pull = parts[0] @ _CENTRES[0] + parts[1] @ _CENTRES[1]
        found.append(np.linalg.solve(parts[0] + parts[1], pull))
    return np.stack(found)


TOY = Problem(
    name="two-task toy problem",
    losses=toy_losses,
    starts=((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0)),
    optimizer=optax.adam,
    learning_rate=1e-3,
    steps=35_000,
    front=toy_front(),
    tolerance=0.3,
    units=(TOY_SCALE, 1.0),
    box=((-11, 11), (-11, 11)),
)
EWQ = Problem(
    name="element-wise quadratic",
    losses=ewq_losses,
    starts=((3.0, -2.0), (0.0, -3.0), (-4.0, 4.0), (-3.0, 4.0), (-3.5, -0.75)),
    optimizer=optax.sgd,
    learning_rate=0.075,
    steps=50,
    front=np.zeros((1, 2)),
    tolerance=0.15,
    units=(1.0, 1.0),
    box=((-5, 5), (-5, 5)),
)
CQF = Problem(
    name="convex quadratic forms",
    losses=cqf_losses,
    starts=((0.5, 0.5), (-1.0, 7.0), (0.0, 0.0), (1.0, 6.0)),
    optimizer=optax.sgd,
    learning_rate=0.05,
    steps=500,
    front=cqf_front(),
    tolerance=0.05,
    units=(1.0, 1.0),
    box=((-4, 4), (-1, 8)),
)
PROBLEMS = {"toy": TOY, "ewq": EWQ, "cqf": CQF}


# ----------------------------------------------------------------------------- running


class _Way(NamedTuple):
    """A method, taken to what a step needs."""

    combiner: mtl.Combiner
    jacobian: Callable[..., Any] = mtl.task_jacobian
    extras: Mapping[str, Any] = {}
    is_optimizer: bool = False


def _read_way(method: str | mtl.Combiner, scale: str | None) -> _Way:
    if isinstance(method, mtl.Combiner):
        if scale is not None:
            raise ValueError("a combiner has its scale already: give it there.")
        return _Way(method)
    if method not in mtl.METHODS:
        raise ValueError(f"unknown method {method!r}; there are {', '.join(_names())}.")
    row = mtl.METHODS[method]
    extras = row.extras(NUM_TASKS, jnp.zeros(2))
    if "strengths" in extras and extras["strengths"] is None:
        raise ValueError(
            f"{method} acts on channels by their strengths, and a vector of two "
            "parameters has none."
        )
    options = {"scale": scale} if scale and _takes_scale(row, scale) else {}
    return _Way(
        row.make(NUM_TASKS, **options), row.jacobian, extras, _is_optimizer(row)
    )


def _names() -> list[str]:
    return list(mtl.METHODS)


def _is_optimizer(row: mtl.Method) -> bool:
    """Whether it normalises entry by entry, as MAO does: then no Adam behind it."""
    return row.normalises and row.kind == "aggregator"


def _takes_scale(row: mtl.Method, scale: str) -> bool:
    """A method without weights only knows the lengths "paper" and "norm"."""
    known = "scale" in inspect.signature(row.factory).parameters
    return known and (row.kind == "weighting" or scale in ("paper", "norm"))


def _make_path(
    way: _Way, problem: Problem, learning_rate: float, steps: int
) -> Callable[[Point, Key[Array, ""]], Float[Array, "steps 2"]]:
    """``(start, key) -> `` the points after each step."""
    if way.is_optimizer:
        step_size = optax.scale_by_learning_rate(learning_rate)
    else:
        step_size = problem.optimizer(learning_rate)
    tx = optax.chain(way.combiner, step_size)
    jacobian = way.jacobian(problem.losses)

    def path(start: Point, key: Key[Array, ""]) -> Float[Array, "steps 2"]:
        def step(
            carry: tuple[Point, Any], number: Int[Array, ""]
        ) -> tuple[tuple[Point, Any], Point]:
            x, state = carry
            losses, task_grads = jacobian(x)
            # Two rows of two numbers are cheaper kept than computed again.
            rows = mtl.materialize(task_grads)
            # What a method does not need it swallows, and XLA leaves out.
            given = dict(way.extras) | {
                "losses": losses,
                # Every batch is alike: there is no noise here.
                "other_task_grads": (rows, rows),
                "key": jax.random.fold_in(key, number),
            }
            updates, state = tx.update(rows, state, x, **given)
            x = optax.apply_updates(x, updates)
            return (x, state), x

        return lax.scan(step, (start, tx.init(start)), jnp.arange(steps))[1]

    return path


def run(
    method: str | mtl.Combiner,
    problem: Problem,
    *,
    steps: int | None = None,
    learning_rate: float | None = None,
    scale: str | None = None,
    keep: int | Sequence[int] = _KEPT,
    key: Key[Array, ""] | None = None,
    jit: Callable[..., Callable[..., Any]] = jax.jit,
) -> Run:
    """Runs one method from all starts of a problem at once, in one compiled call.

    An aggregator that normalises by itself (`mtl_optax.Method.normalises`), as MAO
    does, stands in the place of the problem's optimiser; all others stand before it.

    Args:
      method: a name in `mtl_optax.METHODS`, which then takes task gradients in its own
        way, or a combiner for two tasks.
      problem: for example `TOY`.
      steps: how many; by default as published.
      learning_rate: of the problem's optimiser; by default as published.
      scale: makes lengths comparable, see `mtl_optax.from_weighting`; methods that
        cannot take it keep their own. Adam hardly notices.
      keep: how many steps to return, evenly spread, or which.
      key: of a random method: each start and step gets a fresh one.
      jit: `jax.jit`, or the same with other options.

    Returns:
      a `Run`, of NumPy arrays.

    Raises:
      ValueError: for an unknown method, for one that needs what a vector of two
        parameters does not have, and for a `scale` beside a combiner.

    Example:
      >>> from mtl_optax.examples.toy import EWQ, run
      >>> found = run("mean", EWQ, keep=[0, 50])
      >>> found.points[0].round(3)
      array([[ 3.   , -2.   ],
             [ 0.061, -0.041]], dtype=float32)
    """
    steps = problem.steps if steps is None else steps
    rate = problem.learning_rate if learning_rate is None else learning_rate
    if isinstance(keep, int):
        kept = np.unique(np.linspace(0, steps, keep).round().astype(int))
    else:
        kept = np.asarray(keep)
    path = _make_path(_read_way(method, scale), problem, rate, steps)
    starts = jnp.asarray(problem.starts, float)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(starts))

    def every(
        starts: Float[Array, "starts 2"], keys: Key[Array, " starts"]
    ) -> tuple[Float[Array, "starts kept 2"], Float[Array, "starts kept tasks"]]:
        after = jax.vmap(path)(starts, keys)
        points = jnp.concatenate([starts[:, None], after], axis=1)[:, kept]
        losses = jax.vmap(jax.vmap(problem.losses))(points)
        return points, jnp.stack(losses, axis=-1)

    points, losses = jit(every)(starts, keys)
    return Run(kept, np.asarray(points), np.asarray(losses))


def why_not(method: str, problem: Problem, *, scale: str | None = None) -> str | None:
    """Why a method cannot be run on a problem, or None if it can.

    Only looks at shapes: nothing is compiled.

    Example:
      >>> from mtl_optax.examples.toy import EWQ, why_not
      >>> why_not("mgda", EWQ) is None
      True
    """
    try:
        path = _make_path(_read_way(method, scale), problem, 1.0, 2)
        jax.eval_shape(path, jnp.zeros(2), jax.random.key(0))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


# ------------------------------------------------------------------------- summarising


def distance_to_front(
    points: Float[np.ndarray, "*some 2"], front: Points
) -> Float[np.ndarray, "*some"]:
    """How far points are from a line through the points of a front.

    Example:
      >>> import numpy as np
      >>> from mtl_optax.examples.toy import distance_to_front
      >>> line = np.array([[0.0, 0.0], [2.0, 0.0]])
      >>> distance_to_front(np.array([[1.0, 3.0], [5.0, 4.0]]), line).tolist()
      [3.0, 5.0]
    """
    begin = front[:-1] if len(front) > 1 else front
    along = front[1:] - begin if len(front) > 1 else np.zeros_like(front)
    from_begin = points[..., None, :] - begin
    length = np.sum(along**2, axis=-1)
    share = np.sum(from_begin * along, axis=-1) / np.where(length > 0, length, 1)
    away = from_begin - np.clip(share, 0, 1)[..., None] * along
    return np.min(np.linalg.norm(away, axis=-1), axis=-1)


def summarize(found: Run, problem: Problem) -> list[End]:
    """How a run ended, for each start.

    Args:
      found: what `run` returned.
      problem: what it ran on.

    Returns:
      for each start an `End`: the last point and its losses; its distance to the Pareto
      set, in parameters; whether that is at most ``problem.tolerance`` (never for NaN);
      and the gain of the task that gained least, in ``problem.units``: negative if a
      task lost.

    Example:
      >>> from mtl_optax.examples.toy import EWQ, run, summarize
      >>> end = summarize(run("mean", EWQ, steps=10), EWQ)[0]
      >>> end.reached, round(end.distance, 2)
      (False, 1.65)
    """
    last = found.points[:, -1].astype(np.float64)
    distances = distance_to_front(last, problem.front)
    gains = (found.losses[:, 0] - found.losses[:, -1]) / np.array(problem.units)
    return [
        End(
            start=start,
            point=(float(point[0]), float(point[1])),
            losses=(float(losses[0]), float(losses[1])),
            distance=float(distance),
            reached=bool(distance <= problem.tolerance),
            gain=float(np.min(gain)),
        )
        for start, point, losses, distance, gain in zip(
            problem.starts, last, found.losses[:, -1], distances, gains, strict=True
        )
    ]


def format_table(found: Mapping[str, Run], problem: Problem) -> str:
    """A Markdown table: one line a method, one column a start.

    Example:
      >>> from mtl_optax.examples.toy import EWQ, format_table, run
      >>> problem = EWQ._replace(starts=((3.0, -2.0),))
      >>> print(format_table({"mean": run("mean", problem)}, problem))
      | method | reached | least gain | from (3, -2) |
      | --- | --- | --- | --- |
      | `mean` | 1 of 1 | +4.0 | **0.00, 0.00** (+4.0) |
    """
    header = ["method", "reached", "least gain"]
    header += [f"from ({x:g}, {y:g})" for x, y in problem.starts]
    lines = [header, ["---"] * len(header)]
    for name, one in found.items():
        ends = summarize(one, problem)
        lines.append(
            [
                f"`{name}`",
                f"{sum(end.reached for end in ends)} of {len(ends)}",
                f"{np.min([end.gain for end in ends]):+.1f}",
                *map(_cell, ends),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(end: End) -> str:
    # Adding 0 turns -0 into 0.
    losses = ", ".join(f"{round(loss, 2) + 0.0:.2f}" for loss in end.losses)
    return f"{f'**{losses}**' if end.reached else losses} ({end.gain:+.1f})"


def save_csv(found: Mapping[str, Run], problem: Problem, file: Path) -> None:
    """Writes the ends of all runs, one line a method and start."""
    header = ["method", "steps", "start_x1", "start_x2", "x1", "x2", "loss_1", "loss_2"]
    header += ["distance_to_front", "reached_front", "least_gain"]
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(header)
        for name, one in found.items():
            for end in summarize(one, problem):
                numbers = [*end.start, *end.point, *end.losses, end.distance]
                cells = [f"{number:.7g}" for number in numbers]
                reached = str(end.reached).lower()
                last = int(one.steps[-1])
                writer.writerow([name, last, *cells, reached, f"{end.gain:.7g}"])


# ----------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> None:
    """Runs methods on a problem, prints the table, saves it and two pictures.

    Args:
      argv: arguments without the program's name; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mtl_optax.examples.toy",
        description="Runs methods on a toy problem of multi-task optimisation.",
    )
    parser.add_argument(
        "--methods",
        metavar="A,B",
        help="names from `mtl-optax list` (default: all that can be run)",
    )
    parser.add_argument(
        "--problem", choices=PROBLEMS, default="toy", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="(default: as published; 35000 for toy)"
    )
    parser.add_argument(
        "--lr", type=float, metavar="X", help="(default: as published; 0.001 for toy)"
    )
    parser.add_argument(
        "--scale",
        choices=("paper", "mean", "sum", "norm"),
        help="length of the updates, where a method takes it (default: its own)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("mtl_optax_toy"),
        metavar="FOLDER",
        help="where the pictures and the table go (default: ./%(default)s)",
    )
    options = parser.parse_args(argv)
    problem = PROBLEMS[options.problem]
    if options.methods is None:
        names = _names()
    else:
        names = list(dict.fromkeys(name.strip() for name in options.methods.split(",")))
        for name in names:
            if name not in mtl.METHODS:
                known = ", ".join(_names())
                parser.error(f"unknown method {name!r}; there are {known}")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps: expected a whole number from 1, got {options.steps}")
    options.out.mkdir(parents=True, exist_ok=True)

    reasons = {name: why_not(name, problem, scale=options.scale) for name in names}
    to_run = [name for name in names if reasons[name] is None]
    if not to_run:
        parser.error("; ".join(str(reason) for reason in reasons.values()))
    one = functools.partial(
        run,
        problem=problem,
        steps=options.steps,
        learning_rate=options.lr,
        scale=options.scale,
    )
    found = {}
    # Silent unless someone watches.
    with tqdm(to_run, unit="method", leave=False, disable=None) as bar:
        for name in bar:
            bar.set_description(name)
            found[name] = one(name)

    table = "\n".join(_report(found, problem, reasons, options))
    print(table)
    stem = options.problem
    (options.out / f"{stem}.md").write_text(table + "\n", encoding="utf-8")
    save_csv(found, problem, options.out / f"{stem}.csv")
    from mtl_optax.examples.toy_plots import save_plots

    files = save_plots(found, problem, options.out, stem)
    files += [options.out / f"{stem}.md", options.out / f"{stem}.csv"]
    print(f"\nSaved: {', '.join(str(file) for file in files)}")


def _report(
    found: Mapping[str, Run],
    problem: Problem,
    reasons: Mapping[str, str | None],
    options: argparse.Namespace,
) -> list[str]:
    """The table, and what has to be known to read it."""
    steps = int(next(iter(found.values())).steps[-1])
    rate = problem.learning_rate if options.lr is None else options.lr
    units = " and ".join(f"{unit:g}" for unit in problem.units)
    lines = [
        f"{problem.name}: {steps} steps of {problem.optimizer.__name__}, learning rate "
        f"{rate:g}",
        "",
        format_table(found, problem),
        "",
        "A cell: the last two losses (gain of the task that gained least, in units of "
        f"{units}); negative: a task lost.",
        f"Bold: reached the Pareto set, its distance in parameters is at most "
        f"{problem.tolerance:g}.",
    ]
    own = [name for name in found if _is_optimizer(mtl.METHODS[name])]
    if own:
        lines.append(
            f"In the place of {problem.optimizer.__name__}, with the same rate: "
            f"{_join(own)}."
        )
    if options.scale is not None:
        without = [
            name for name in found if not _takes_scale(mtl.METHODS[name], options.scale)
        ]
        lines.append(f"Scale {options.scale!r}; without: {_join(without) or 'none'}.")
    lines += [f"Left out: {reason}" for reason in reasons.values() if reason]
    return lines


def _join(names: Sequence[str]) -> str:
    return ", ".join(names)


if __name__ == "__main__":
    main()
