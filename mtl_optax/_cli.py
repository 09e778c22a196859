"""The `mtl-optax` command: watch methods at work, and list them.

Whatever a user may do wrong ends in one line on standard error and a nonzero exit code.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

_INTERRUPTED = 130
_DEFAULT_METHODS = (
    "mean,mgda,edm,task_tensioner,scale_by_mao,look_ahead_jacobian,priority_projection"
)


class _UserError(Exception):
    """Something that the user can put right, in one line."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      the exit code: 0, 1 for what the user can put right, 2 for wrong arguments, 130
      when interrupted.

    Example:
      >>> from mtl_optax._cli import main
      >>> main(["list"])  # doctest: +ELLIPSIS
      method ...
      0
    """
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
        return 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return _complain("interrupted", _INTERRUPTED)
    except _UserError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in {
            "flax",
            "matplotlib",
            "sklearn",
            "tqdm",
        }:
            raise
        return _complain(
            f"{error.name} is not installed; this needs the examples' packages: "
            'pip install "mtl_optax[examples]"'
        )
    except BrokenPipeError:
        # The reader (`head`) went away: nothing to say, and no one to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _complain(message: str, code: int = 1) -> int:
    print(f"mtl-optax: {message}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mtl-optax",
        description="Combines task gradients, as one more link of an optax chain.",
    )
    parser.add_argument("--version", action=_ShowVersion)
    commands = parser.add_subparsers(
        required=True,
        metavar="{demo,list,cite,bench}",
        dest="command",
        parser_class=_Parser,
    )

    demo = commands.add_parser(
        "demo",
        help="train a network on two conflicting tasks under several methods",
        description="Trains a small Flax network to classify the top-left one of two "
        "overlaid handwritten digits and to reconstruct the other, under several ways "
        "of combining the two gradients; prints a table and saves plots.",
    )
    demo.add_argument(
        "--tasks",
        "--pair",
        default="CL_RR",
        metavar="NAME",
        help="two or three of CL and CR (classify left, right) and RR (reconstruct "
        "right), joined by underscores (default: %(default)s)",
    )
    demo.add_argument(
        "--methods",
        type=_names,
        default=_DEFAULT_METHODS,
        metavar="A,B",
        help="names from `mtl-optax list` (default: %(default)s)",
    )
    demo.add_argument(
        "--seeds",
        type=_at_least_one,
        default=8,
        metavar="N",
        help="runs of each method, trained at once (default: %(default)s)",
    )
    demo.add_argument(
        "--epochs",
        type=_at_least_one,
        default=20,
        metavar="N",
        help="passes over the training pairs (default: %(default)s)",
    )
    demo.add_argument(
        "--lr",
        type=_rates,
        default="0.001,0.003,0.01",
        metavar="X[,Y]",
        help="learning rate of Adam; of several, each method's own is chosen on "
        "validation pairs (default: %(default)s)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("mtl_optax_demo"),
        metavar="FOLDER",
        help="where plots go (default: ./%(default)s)",
    )
    demo.add_argument("--no-plots", action="store_true", help="print the table only")
    demo.add_argument(
        "--no-costs", action="store_true", help="do not measure what a step costs"
    )
    demo.add_argument("--quiet", action="store_true", help="no progress, table only")
    demo.set_defaults(run=_demo)

    listing = commands.add_parser("list", help="print all methods")
    listing.add_argument("--markdown", action="store_true", help="as a Markdown table")
    listing.add_argument(
        "--claims",
        action="store_true",
        help="what each promises, how long its update is, and what peers call it",
    )
    listing.set_defaults(run=_list)

    cite = commands.add_parser("cite", help="print the BibTeX of methods")
    cite.add_argument(
        "methods", type=_names, nargs="+", metavar="A", help="from `mtl-optax list`"
    )
    cite.set_defaults(run=_cite)

    bench = commands.add_parser(
        "bench",
        help="measure what balanced steps cost, beside plain ones and TorchJD",
        description=_BENCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "what",
        nargs="?",
        choices=tuple(_BENCHES),
        default="engine",
        help="engine, update or runs (default: %(default)s)",
    )
    bench.add_argument(
        "--models",
        type=_models,
        metavar="A,B",
        help="engine: of mlp, cnn, transformer, gnn (default: all)",
    )
    bench.add_argument(
        "--tasks",
        type=_task_numbers,
        metavar="N,M",
        help="engine: numbers of tasks (default: 2,8,40; with --quick 2,8)",
    )
    bench.add_argument(
        "--modes",
        type=_ways,
        metavar="A,B",
        help="engine: ways of taking task gradients, of those above (default: all)",
    )
    bench.add_argument(
        "--methods",
        type=_names,
        metavar="A,B",
        help="update, runs: names from `mtl-optax list` (default: all for update, "
        "mean,upgrad,cagrad,task_tensioner for runs)",
    )
    bench.add_argument(
        "--rounds",
        type=_at_least_one,
        metavar="N",
        help="how often each way runs, in turns with the others (default: 10, runs 5)",
    )
    bench.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="of runs for one network and number of tasks, one size or one method; "
        "slow ways get fewer rounds, and a line says so. Compiling is not counted "
        "(default: 60)",
    )
    bench.add_argument(
        "--quick",
        action="store_true",
        help="small sizes and few rounds, at most two minutes: shows that it works, "
        "not what it costs",
    )
    bench.add_argument(
        "--out",
        type=Path,
        default=Path("mtl_optax_bench"),
        metavar="FOLDER",
        help="where the CSV file and plots go (default: ./%(default)s)",
    )
    bench.add_argument("--no-plots", action="store_true", help="table and CSV only")
    bench.add_argument("--quiet", action="store_true", help="no progress")
    bench.set_defaults(run=_bench)
    return parser


class _ShowVersion(argparse.Action):
    """Prints the version, which only then is looked up."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import mtl_optax

        print(f"mtl_optax {mtl_optax.__version__}")
        parser.exit()


def _at_least_one(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1, got {text!r}"
        )
    return number


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(
            f"expected positive numbers joined by commas, got {text!r}"
        )
    return tuple(dict.fromkeys(rates))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return seconds


def _some_of(text: str, known: Sequence[str]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"unknown {name!r}; there are {', '.join(known)}"
            )
    return names


def _models(text: str) -> tuple[str, ...]:
    from mtl_optax.bench.models import MODELS

    return _some_of(text, tuple(MODELS))


def _ways(text: str) -> tuple[str, ...]:
    from mtl_optax.bench.engine_cost import WAYS

    return _some_of(text, WAYS)


def _task_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({_at_least_one(part) for part in text.split(",")}))
    if numbers[0] < 2:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers from 2 joined by commas, got {text!r}"
        )
    return numbers


def _names(text: str) -> tuple[str, ...]:
    from mtl_optax._arguments import unknown_method
    from mtl_optax._registry import METHODS

    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(unknown_method(unknown[0], METHODS))
    return names


_CLAIMS = {
    "no conflict": "non_conflicting",
    "blind to row scale": "row_scale_invariant",
    "scales along": "scale_equivariant",
    "linear in rows": "linear_under_scaling",
    "any order": "permutation_equivariant",
    "stops at Pareto": "stops_at_pareto_stationary",
}


def _list(arguments: argparse.Namespace) -> None:
    from mtl_optax._registry import METHODS

    if arguments.claims:
        claims = _CLAIMS.values()
        header = [
            "method",
            *_CLAIMS,
            "update's length",
            "state",
            "in TorchJD 0.18, LibMTL 1.1",
        ]
        lines = [
            [
                method.name,
                *("yes" if claim in method.claims else "-" for claim in claims),
                method.length,
                method.state_size,
                method.peers or "-",
            ]
            for method in METHODS.values()
        ]
    else:
        header = ["method", "backward passes", "reads", "what it does", "paper"]
        lines = []
        for method in METHODS.values():
            reads = sorted(n.replace("_in_basis", "") for n in method.needs)
            lines.append(
                [
                    method.name,
                    method.cost,
                    ", ".join(dict.fromkeys(reads)) or "-",
                    method.summary,
                    method.paper,
                ]
            )
    if arguments.markdown:
        lines = [[f"`{name}`", *cells] for name, *cells in lines]
        lines = [header, ["---"] * len(header), *lines]
        cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        _say("\n".join(f"| {' | '.join(line)} |" for line in cells))
        return
    lines = [header, *lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (c.ljust(w) for c, w in zip(line, widths, strict=True))
        _say("  ".join(padded).rstrip())


def _cite(arguments: argparse.Namespace) -> None:
    from mtl_optax._citations import citation

    names = [name for group in arguments.methods for name in group]
    _say("\n\n".join(citation(name) for name in dict.fromkeys(names)))


def _demo(arguments: argparse.Namespace) -> None:
    from mtl_optax.examples.digits import parse_tasks

    try:
        tasks = parse_tasks(arguments.tasks)
    except ValueError as error:
        raise _UserError(str(error)) from None
    if len(tasks) < 2:
        raise _UserError(
            f"--tasks {arguments.tasks}: there is nothing to combine; name two or "
            "three tasks, for example CL_RR"
        )
    from mtl_optax.examples.comparison import compare
    from mtl_optax.examples.systems import extras_of, with_controls

    try:
        for name in arguments.methods:
            extras_of(name)
    except ValueError as error:
        raise _UserError(str(error)) from None
    # Before minutes of training, not after.
    save_plots: Callable[..., list[Path]] | None = None
    if not arguments.no_plots:
        _check_writable(arguments.out)
        from mtl_optax.examples.plots import save_plots

    import jax

    from mtl_optax.examples import report

    runs = len(arguments.lr) * arguments.seeds
    if not arguments.quiet:
        _say(
            f"{'_'.join(tasks)}: one network for each task alone, and one for all "
            f"tasks under {', '.join(arguments.methods)}.\n"
            f"{_count(arguments.seeds, 'seed')} x "
            f"{_count(len(arguments.lr), 'learning rate')} ({_count(runs, 'run')} at "
            f"once), {_count(arguments.epochs, 'epoch')}."
        )
        sys.stdout.flush()
    systems = with_controls(arguments.methods)
    total = (len(tasks) + len(systems)) * arguments.epochs
    total += 0 if arguments.no_costs else len(systems) + 1
    with _Progress(total, arguments.quiet) as bar:
        found = compare(
            tasks,
            arguments.methods,
            num_seeds=arguments.seeds,
            num_epochs=arguments.epochs,
            learning_rates=arguments.lr,
            with_costs=not arguments.no_costs,
            key=jax.random.key(0),
            on_epoch=bar.advance,
            on_cost=lambda name: bar.advance(f"cost of {name}"),
        )

    rows = report.make_rows(found)
    _say("\n" + report.format_table(found, rows))
    _say("\n" + "\n".join(_notes(arguments)))
    _say("\n" + "\n".join(report.verdict(found, rows)))
    if save_plots is not None:
        try:
            files = save_plots(found, arguments.out)
        except OSError as error:
            raise _UserError(f"cannot save plots: {error}") from None
        _say(f"\nPlots: {', '.join(str(file) for file in files)}")
    own = [
        row
        for row in rows
        if row.name in arguments.methods and math.isfinite(row.worst.mean)
    ]
    if not own:
        return
    best = max(own, key=lambda row: row.worst.mean)
    _say("\n" + _recipe(best.name, tasks, best.learning_rate))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _notes(arguments: argparse.Namespace) -> list[str]:
    notes = [
        f"± is the 95 % t interval of the mean over {arguments.seeds} seeds.",
        "Delta_m: mean over tasks of the change against the single-task mean (taken as "
        "exact); positive is better.",
        "worst task: the same, of the task that lost most, seed by seed.",
        "rank: 1 is best, among the methods shown; its mean is over tasks.",
        "conflicts: share of steps in which task gradients on the encoder point "
        "against each other.",
    ]
    if arguments.seeds == 1:
        notes[0] = "One seed says nothing about chance: run more for intervals."
    if len(arguments.lr) > 1:
        notes.append("lr: of Adam, chosen for each method on validation pairs.")
    else:
        notes.append("lr: of Adam, the same for all methods.")
    if not arguments.no_costs:
        notes.append(
            "time, memory: of one step of this small network, beside Adam on the "
            "summed loss (1 x); memory is temporary arrays and optimiser state."
        )
    if "priority_projection" in arguments.methods:
        notes.append(
            "priority_projection: with a batch norm a task and two phases; 'sum, task "
            "norms' is the same network on the plain sum, so the difference is its own."
        )
    return notes


_MASK = "mask = mtl.shared_mask(loss_fn, params, batch)"
_STEP = (
    "opt_state = tx.init(params)",
    "losses, task_grads = mtl.task_jacobian(loss_fn)(params, batch)",
    "updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)",
)
_RECIPES = {
    "scale_by_mao": ("tx = mtl.mao({rate:g}, num_tasks={tasks})", *_STEP),
    "look_ahead_jacobian": (
        _MASK,
        "combine = optax.chain(mtl.sum_tasks({tasks}), optax.adam({rate:g}))",
        "init, step = mtl.look_ahead_steps(",
        "    loss_fn, {ahead:g}, combine, optax.adam({rate:g}), shared=mask",
        ")",
        "params, opt_state, losses = step(params, init(params), batch)",
    ),
    "priority_projection": (
        "# with a network of your own: see the README; with the network and the pairs",
        "# of digits in mtl_optax.examples:",
        "from mtl_optax.examples import task_norm",
        "problem, tx = task_norm.make_task_norm_digits({names}), optax.adam({rate:g})",
        "epoch = task_norm.make_mixed_epoch(problem, tx, 128, num_epochs=20)",
        "state = task_norm.init_mixed_state(problem, tx, jax.random.key(0))",
        "state, record = epoch(state, pairs, 0, jax.random.key(1))  # epoch 0",
    ),
}


def _recipe(method: str, tasks: Sequence[str], rate: float) -> str:
    """How to have the same in a chain of one's own."""
    from mtl_optax._registry import METHODS
    from mtl_optax.examples.systems import LOOK_AHEAD

    combiner = [
        _MASK,
        f"combine = mtl.shared_only(mtl.{method}(num_tasks={{tasks}}), mask)",
        "tx = optax.chain(combine, optax.adam({rate:g}))",
        *_STEP,
    ]
    if method in METHODS and "key" in METHODS[method].needs:
        combiner[-1:] = [
            "key = jax.random.key(0)  # a fresh one at every step",
            _STEP[-1].replace("losses=losses", "losses=losses, key=key"),
        ]
    lines = [
        line.format(rate=rate, tasks=len(tasks), names=tuple(tasks), ahead=LOOK_AHEAD)
        for line in _RECIPES.get(method, combiner)
    ]
    return "\n".join(
        [
            f"The same in your own training, with {method} for example (loss_fn "
            "returns one scalar a task):",
            "",
            *(f"    {line}" for line in lines),
        ]
    )


class _Plan(NamedTuple):
    """A measurement: in how many parts, how, and what becomes of its rows.

    Attributes:
      parts: how often `measure` tells its watch of a new part.
      measure: ``watch -> rows``.
      table: ``rows -> text``.
    """

    parts: int
    measure: Callable[[Any], list[Any]]
    table: Callable[[Sequence[Any]], str]


def _bench(arguments: argparse.Namespace) -> None:
    what = arguments.what
    plan_of, takes = _BENCHES[what]
    for option in ("models", "tasks", "modes", "methods"):
        if getattr(arguments, option) is not None and option not in takes:
            fitting = ", ".join(f"--{name}" for name in takes)
            raise _UserError(f"bench {what} takes no --{option}, but {fitting}")
    # Before minutes of measuring, not after.
    _check_writable(arguments.out)
    save_plots: Callable[..., list[Path]] | None = None
    if not arguments.no_plots:
        from mtl_optax.bench import plots

        save_plots = getattr(plots, f"save_{what}")
    from mtl_optax.bench.tables import save_csv
    from mtl_optax.bench.timing import Watch, surroundings

    plan: _Plan = plan_of(arguments)
    _say(surroundings())
    if arguments.quick:
        _say("Small sizes: this shows that it works, not what it costs.")
    sys.stdout.flush()
    with _Progress(plan.parts, arguments.quiet, "part") as bar:
        rows = plan.measure(Watch(part=bar.advance, run=bar.label, say=bar.say))
    _say("\n" + plan.table(rows))
    try:
        files = [save_csv(rows, arguments.out / f"{what}.csv")]
        if save_plots is not None:
            files += save_plots(rows, arguments.out)
    except OSError as error:
        raise _UserError(f"cannot save: {error}") from None
    _say(f"\nFiles: {', '.join(str(file) for file in files)}")


def _given(arguments: argparse.Namespace, quick: dict[str, Any]) -> dict[str, Any]:
    """Rounds and budget: as asked for, or quick ones, or the measurement's own."""
    given = quick if arguments.quick else {}
    for name in ("rounds", "budget"):
        if getattr(arguments, name) is not None:
            given = given | {name: getattr(arguments, name)}
    return given


def _plan_engine(arguments: argparse.Namespace) -> _Plan:
    from mtl_optax.bench import engine_cost
    from mtl_optax.bench.models import MODELS

    models = arguments.models or tuple(MODELS)
    tasks = arguments.tasks or ((2, 8) if arguments.quick else engine_cost.TASKS)
    ways = engine_cost.with_units(arguments.modes or engine_cost.WAYS)
    options = _given(arguments, {"rounds": 3, "budget": 3.0, "small": True})
    return _Plan(
        len(models) * len(tasks) * len(ways),
        lambda watch: engine_cost.measure(
            models, tasks, ways=ways, watch=watch, **options
        ),
        engine_cost.table,
    )


def _plan_update(arguments: argparse.Namespace) -> _Plan:
    from mtl_optax.bench import update_cost

    methods = arguments.methods
    sizes = update_cost.SMALL if arguments.quick else update_cost.SIZES
    options = _given(arguments, {"rounds": 3, "budget": 10.0})
    return _Plan(
        len(sizes) * update_cost.count_parts(methods),
        lambda watch: update_cost.measure(
            sizes, methods=methods, watch=watch, **options
        ),
        update_cost.table,
    )


def _plan_runs(arguments: argparse.Namespace) -> _Plan:
    from mtl_optax.bench import many_runs

    methods = arguments.methods or many_runs.METHODS[: 2 if arguments.quick else None]
    quick = {"rounds": 3, "budget": 10.0, "seeds": 8, "steps": 10}
    options = _given(arguments, quick)
    return _Plan(
        len(methods) * len(many_runs.WAYS),
        lambda watch: many_runs.measure(methods, watch=watch, **options),
        many_runs.table,
    )


# What is measured: how it is planned, and which options choose what is measured.
_BENCHES: dict[str, tuple[Callable[[argparse.Namespace], _Plan], tuple[str, ...]]] = {
    "engine": (_plan_engine, ("models", "tasks", "modes")),
    "update": (_plan_update, ("methods",)),
    "runs": (_plan_runs, ("methods",)),
}

_BENCH = """\
Measures, in alternating runs of one call, and prints medians with their spread:

engine  the gradient of a balanced step beside that of plain training (= 1), for four
        networks and several numbers of tasks, with every way of taking task gradients.
        mlp is 12 tanh layers of 1024, batch 64; cnn 3 blocks on 32 x 32 pixels, batch
        32; transformer 4 layers of 256 on 64 tokens, batch 16; gnn 4 rounds of width
        128 on 16 graphs of 64 nodes.
          plain             plain training on the summed losses
          default           mtl.task_jacobian(loss_fn)
          layerwise, vmap, unroll, map
                            its modes
          every_10          the default under mtl.update_every(tx, 10)
          features          mtl.feature_jacobian(encoder, heads)
          torch             plain training in PyTorch
          backward          TorchJD's autojac.backward and jac_to_grad
          backward_by_leaf  the same with optimize_gramian_computation=True
          autogram          TorchJD's autogram.Engine
update  every method's update of stacked task gradients, beside NumPy's
        G = g @ g.T; w @ g (= 1) and TorchJD's aggregators
runs    many seeds of a small network: one vmap of whole scanned runs, beside scans one
        by one and a Python loop over compiled steps

TorchJD is optional:
  pip install --extra-index-url https://download.pytorch.org/whl/cpu -e ".[bench]"
"""


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _UserError(
            f"cannot write to --out {folder}: {error.strerror or error}"
        ) from None


class _Progress:
    """A bar on standard error, one step a part; silent unless someone watches."""

    def __init__(self, total: int, quiet: bool, unit: str = "epoch") -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            file=sys.stderr,
            disable=quiet or not sys.stderr.isatty(),
            unit=unit,
            leave=False,
        )

    def __enter__(self) -> Self:
        self._bar.set_description("compiling")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, label: str) -> None:
        self._bar.set_description(label, refresh=False)
        self._bar.update()

    def label(self, label: str) -> None:
        self._bar.set_description(label)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line, file=sys.stderr)


def _say(text: str) -> None:
    """Prints, also where the terminal's encoding lacks a character."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.replace("±", "+-").encode(encoding, "replace").decode(encoding)
    print(text)
