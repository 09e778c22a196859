"""The command: what it prints, what it saves, and one clear line for every mistake."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import matplotlib.image
import numpy as np
import optax
import pytest

import mtl_optax as mtl
from mtl_optax import _cli
from mtl_optax.examples import (
    comparison,
    costs,
    digits,
    models,
    plots,
    report,
    trainer,
)

PLOTS = ["summary.png", "losses.png", "weights.png", "cosine.png"]


@pytest.fixture(scope="module")
def found():
    """A made-up comparison on three tasks; nothing here needs a trained network."""
    random = np.random.default_rng(0)

    def outcome(tasks):
        steps = np.geomspace(2, 0.1, 40)[:, None]
        weights = random.dirichlet(np.ones(tasks), (2, 40))
        rows = random.normal(size=(2, 10, tasks, 5))
        return comparison.Outcome(
            learning_rate=3e-3,
            test=np.array([80, 85, 0.2][:tasks]) * random.uniform(0.9, 1.1, (2, tasks)),
            record=trainer.Record(
                losses=steps * random.uniform(0.8, 1.2, (2, 40, tasks)),
                task_weights=weights,
                gramians=np.einsum("slap,slbp->slab", rows, rows),
            ),
        )

    return comparison.Comparison(
        tasks=("CL", "CR", "RR"),
        higher_is_better=(True, True, False),
        num_epochs=2,
        single={
            "CL": outcome(1),
            "CR": outcome(1),
            "RR": outcome(1)._replace(test=np.array([[0.18], [0.17]])),
        },
        methods={
            "mean": outcome(3),
            "edm": outcome(3),
            # A system without weights, and without one set of task gradients.
            "look_ahead_jacobian": outcome(3)._replace(
                record=outcome(3).record._replace(task_weights=None, gramians=None)
            ),
        },
        costs={
            name: costs.Cost(ratio, (ratio, ratio), 0.5)
            for name, ratio in (("mean", 1), ("edm", 2), ("look_ahead_jacobian", 3))
        },
    )


def _assert_worth_looking_at(folder):
    for name in PLOTS:
        image = matplotlib.image.imread(folder / name)[..., :3]
        assert min(image.shape[:2]) > 400
        ink = np.mean(np.any(image < 0.95, axis=-1))
        colours = np.unique((image * 15).astype(int).reshape(-1, 3), axis=0)
        assert 0.01 < ink < 0.6, (name, ink)
        assert len(colours) > 20, (name, len(colours))
        assert image.std() > 0.05, name


def _one_line(captured):
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.err.startswith("mtl-optax")
    return captured.err


def test_list_shows_the_whole_registry(capsys):
    assert _cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for method in mtl.METHODS.values():
        (line,) = [x for x in out.splitlines() if x.startswith(f"{method.name} ")]
        assert method.summary in line
        assert method.paper in line
    header, *lines = out.splitlines()
    column = header.index("backward")
    assert {line[column - 2 : column] for line in lines} == {"  "}
    assert all(line[column] != " " for line in lines)


def test_list_as_markdown_is_a_table(capsys):
    assert _cli.main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(mtl.METHODS) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert lines[1].startswith("| --- |")


def test_list_of_claims(capsys):
    assert _cli.main(["list", "--claims"]) == 0
    out = capsys.readouterr().out.splitlines()
    for method in mtl.METHODS.values():
        (line,) = [x for x in out if x.startswith(f"{method.name} ")]
        assert line.count(" yes ") == len(method.claims)
        assert method.length in line
        assert method.peers in line


def test_cite(capsys):
    assert _cli.main(["cite", "cagrad,mgda", "cagrad"]) == 0
    out = capsys.readouterr().out
    assert out.strip() == f"{mtl.citation('cagrad')}\n\n{mtl.citation('mgda')}"


def test_version(capsys):
    assert _cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mtl_optax {mtl.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "--methods", "mean,madg"], 2, "unknown method 'madg'; did you mean"),
        (["demo", "--methods", "mean,xyz"], 2, "unknown method 'xyz'; there are"),
        (["demo", "--methods", "mean,pivrg"], 1, "pivrg needs delta_m, which the"),
        (["cite", "Nash-MTL", "XYZ"], 2, "did you mean 'nash_mtl'?"),
        (["demo", "--methods", ""], 2, "unknown method ''"),
        (["demo", "--tasks", "CL_XX"], 1, "unknown tasks 'CL_XX'"),
        (["demo", "--tasks", "CL"], 1, "nothing to combine"),
        (["demo", "--seeds", "0"], 2, "--seeds: expected a whole number from 1"),
        (["demo", "--epochs", "1.5"], 2, "--epochs: expected a whole number from 1"),
        (["demo", "--lr", "0.1,-1"], 2, "positive numbers joined by commas"),
        (["demo", "--lr", "nan"], 2, "positive numbers joined by commas"),
        (["demo", "--sedes", "3"], 2, "unrecognized arguments"),
        (["dmeo"], 2, "invalid choice: 'dmeo'"),
        ([], 2, "required"),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments, code, words):
    assert _cli.main(arguments) == code
    assert words in _one_line(capsys.readouterr())


@pytest.fixture
def no_training(monkeypatch):
    def compare(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(comparison, "compare", compare)


@pytest.mark.usefixtures("no_training")
def test_an_unwritable_folder_is_found_before_training(capsys, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    for folder in (in_the_way, in_the_way / "below"):
        assert _cli.main(["demo", "--out", str(folder)]) == 1
        assert f"cannot write to --out {folder}" in _one_line(capsys.readouterr())


@pytest.mark.slow
def test_plots_that_cannot_be_saved_are_one_line(capsys, tmp_path, monkeypatch, found):
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: found)
    (tmp_path / "summary.png").mkdir()
    assert _cli.main(["demo", "--quiet", "--out", str(tmp_path)]) == 1
    assert "cannot save plots" in _one_line(capsys.readouterr())


def test_a_missing_package_is_named_with_its_cure(capsys, monkeypatch, tmp_path):
    def compare(*_, **__):
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn.datasets")

    monkeypatch.setattr(comparison, "compare", compare)
    assert _cli.main(["demo", "--quiet", "--out", str(tmp_path)]) == 1
    line = _one_line(capsys.readouterr())
    assert 'pip install "mtl_optax[examples]"' in line
    assert "sklearn" in line


_WITHOUT = """
import sys
from mtl_optax._cli import main
assert main(["list"]) == 0
for package in ("flax", "matplotlib", "sklearn", "tqdm"):
    sys.modules[package] = None
    code = main(["demo", "--quiet", "--out", sys.argv[1]])
    print(package, code)
    for name in list(sys.modules):
        if name.startswith("mtl_optax.examples") or name == package:
            del sys.modules[name]
"""


def test_without_an_extra_the_command_says_so_and_list_works(tmp_path):
    """In a process of its own, where the packages cannot be imported at all."""
    done = _python("-c", _WITHOUT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    packages = ("flax", "matplotlib", "sklearn", "tqdm")
    assert [line for line in done.stdout.splitlines() if line.endswith(" 1")] == [
        f"{package} 1" for package in packages
    ]
    complaints = done.stderr.splitlines()
    assert len(complaints) == 4
    for package, line in zip(packages, complaints, strict=True):
        assert line.startswith(f"mtl-optax: {package}")
        assert line.endswith('pip install "mtl_optax[examples]"')


def test_interruption_is_one_line_and_130(capsys, monkeypatch, tmp_path):
    def compare(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "compare", compare)
    assert _cli.main(["demo", "--quiet", "--out", str(tmp_path)]) == 130
    assert _one_line(capsys.readouterr()) == "mtl-optax: interrupted\n"


def test_the_whole_demo_in_small(capsys, tmp_path):
    out = tmp_path / "new" / "folder"
    arguments = [
        "--seeds=2",
        "--epochs=1",
        "--lr=0.003",
        "--methods=mgda",
        "--no-costs",
    ]
    assert _cli.main(["demo", *arguments, "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no bar where nobody watches
    (row,) = [x for x in captured.out.splitlines() if x.startswith("mgda ")]
    assert row.count("±") == 5
    assert not row.endswith("MB")
    assert "(num_tasks=2), mask)" in captured.out
    assert "positive is better" in captured.out
    assert all(str(out / name) in captured.out for name in PLOTS)
    _assert_worth_looking_at(out)


@pytest.mark.slow
def test_three_tasks_have_plots_too(found, tmp_path):
    assert [file.name for file in plots.save_plots(found, tmp_path)] == PLOTS
    _assert_worth_looking_at(tmp_path)


def test_without_plots_nothing_is_written(capsys, tmp_path, monkeypatch, found):
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    assert _cli.main(["demo", "--quiet", "--no-plots"]) == 0
    assert "Plots" not in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def _with_tests(found, tests):
    methods = {
        name: found.methods["edm"]._replace(test=np.array(test))
        for name, test in tests.items()
    }
    single = {
        task: found.single[task]._replace(test=np.array([[b], [b]]))
        for task, b in zip(("CL", "RR"), (90.0, 0.2), strict=True)
    }
    return comparison.Comparison(("CL", "RR"), (True, False), 2, single, methods, {})


def test_figures_of_the_table(found):
    """By hand: CL 81 is -10 % of 90, RR 0.21 is -5 % of 0.2."""
    made = _with_tests(found, {"a": [[81, 0.21], [81, 0.21]], "b": [[90, 0.2]] * 2})
    a, b = report.make_rows(made)
    assert a.gain.mean == pytest.approx(-7.5, abs=1e-4)
    assert a.worst.mean == pytest.approx(-10, abs=1e-4)
    assert (a.rank.mean, b.rank.mean) == (2, 1)
    assert b.gain.mean == pytest.approx(0, abs=1e-4)


def test_a_winner_is_named_only_when_no_interval_overlaps(found):
    clear = {"a": [[80.0, 0.3], [80.5, 0.301]], "b": [[89.0, 0.21], [89.1, 0.2101]]}
    made = _with_tests(found, clear)
    served, gained = report.verdict(made, report.make_rows(made))
    assert served.startswith("Served both tasks best")
    assert ": b, " in served
    assert ": b, " in gained
    close = {"a": [[80.0, 0.3], [90.0, 0.2]], "b": [[89.0, 0.21], [81.0, 0.29]]}
    made = _with_tests(found, close)
    for line in report.verdict(made, report.make_rows(made)):
        assert line.startswith("No clear winner")
        assert "a, b overlap" in line


def test_one_seed_has_no_interval_and_no_winner(found):
    made = _with_tests(found, {"a": [[80.0, 0.3]], "b": [[89.0, 0.21]]})
    rows = report.make_rows(made)
    assert all("No clear winner" in line for line in report.verdict(made, rows))
    assert "89.0 ± ?" in report.format_table(made, rows)


def _python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        check=False,
        **options,
    )


RECIPES = [*_cli._RECIPES, "edm", "pcgrad"]


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
def test_the_printed_recipe_runs(method):
    words, _, code = _cli._recipe(method, ("CL", "RR"), 3e-3).partition("\n\n")
    assert method in words
    init, loss_fn, _ = models.make_digits(("CL", "RR"))
    pairs = digits.draw_pairs(digits.load_sources().test, jax.random.key(0), 128)
    given = {
        "jax": jax,
        "optax": optax,
        "mtl": mtl,
        "loss_fn": loss_fn,
        "params": init(jax.random.key(0)),
        "batch": pairs,
        "pairs": pairs,
    }
    exec(textwrap.dedent(code), given)
    losses = given["record"].losses if "record" in given else given["losses"]
    assert losses.shape[-1] == 2


@pytest.mark.slow
def test_the_demo_as_a_user_runs_it(tmp_path):
    start = time.monotonic()
    done = _python("-m", "mtl_optax", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    systems = _cli._DEFAULT_METHODS.split(",")
    for name in ("single task", *systems, "sum, task norms"):
        (row,) = [x for x in done.stdout.splitlines() if x.startswith(f"{name}  ")]
        assert row.count("±") == (2 if name == "single task" else 5)
        assert row.endswith("-" if name == "single task" else "MB")
    _assert_worth_looking_at(tmp_path / "mtl_optax_demo")
    # The limit is 4 minutes on 2 free cores; a busy machine gets twice that.
    assert time.monotonic() - start < 480


@pytest.mark.slow
def test_the_demo_ends_at_ctrl_c(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "mtl_optax", "demo", "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells have their background jobs ignore it, which children would inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdout.readline()  # training is about to begin
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    # Where the signal arrives inside an `exec`, as imports have them, Python itself
    # ends by it in the end; a shell shows 130 for both.
    assert process.returncode in (130, -signal.SIGINT)
    assert errors == "mtl-optax: interrupted\n"
