"""The toy problems: their formulas, whole runs of TorchJD's, and the table of runs."""

import csv
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import matplotlib.image
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax.examples import toy, toy_plots

run = functools.partial(toy.run, jit=laws.quick_jit)


@functools.cache
def at_points(function):
    return laws.quick_jit(jax.vmap(function))


def losses_at(problem, points):
    """``[..., T]``, in the points' precision where that is enabled."""
    return np.stack(at_points(problem.losses)(jnp.asarray(points)), axis=-1)


@functools.cache
def jacobian_of(losses):
    return jax.jacobian(losses)


def gradients_at(problem, points):
    """``[..., T, 2]``, by plain reverse mode."""
    rows = at_points(jacobian_of(problem.losses))(jnp.asarray(points))
    return np.stack(rows, axis=1)


# ------------------------------------------------------------------------ the formulas

AT_STARTS = [
    (0.65524, 7.90080),
    (0.0, 0.0),
    (0.79439, 6.69150),
    (0.03888, -4.75448),
    (-0.88311, 2.81429),
]


def test_the_toy_losses_at_the_starts(load_fixture, x64):
    found = losses_at(toy.TOY, np.array(toy.TOY.starts))
    np.testing.assert_allclose(found, AT_STARTS, atol=6e-6)
    wanted = load_fixture("torchjd_0_18_trajectories")["navon_toy"]["loss_at_inits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=1e-15)


def test_the_toy_losses_with_equal_scales(x64):
    one, two = toy.toy_losses(jnp.array([9.0, 9.0]), scale=1.0)
    np.testing.assert_allclose([one / 10, two], AT_STARTS[2], atol=6e-6)


@laws.quick_jit
def rows_at(x):
    losses, task_grads = mtl.task_jacobian(toy.toy_losses)(x)
    return losses, mtl.materialize(task_grads)


@pytest.mark.parametrize("x", [(0.0, 0.0), (-8.5, 7.5), (9.0, -1.0), (3.0, 0.0)])
def test_gradients_of_the_toy_losses(x, x64):
    """At x2 = 0, where both gates shut, it is the mean of both sides' slopes."""
    step = 1e-6
    moved = np.array([np.add(x, s * d) for d in np.eye(2) for s in (step, -step)])
    values = losses_at(toy.TOY, moved)
    wanted = np.stack([values[0] - values[1], values[2] - values[3]], 1) / (2 * step)
    losses, found = rows_at(jnp.array(x))
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-7)
    if x == (0.0, 0.0):
        np.testing.assert_allclose(losses, 0, atol=0)
        assert np.all(found[:, 0] == 0)
        assert np.all(found[:, 1] != 0)


def test_the_toy_losses_in_float32(x64):
    """Beside the valleys no digits are lost but those of the logarithms' argument."""
    rng = np.random.default_rng(0)
    x2 = rng.uniform(0.1, 9, 400)
    side = np.where(np.arange(400) % 2, -1, 1)
    beside = rng.choice([-1, 1], 400) * 10 ** rng.uniform(-3, 0, 400)
    x1 = side * (7 - 2 * np.tanh(x2)) + beside
    points = np.stack([x1, x2], axis=1).astype(np.float32)
    single = losses_at(toy.TOY, points)
    assert single.dtype == np.float32
    exact = losses_at(toy.TOY, points.astype(np.float64))
    bound = 1e-6 + 2.0**-23 / np.abs(beside)
    assert np.all(np.abs(single - exact) <= bound[:, None] * np.abs([1, 5]))


def test_gradients_are_finite_on_kinks_and_valley_floors():
    x2 = np.linspace(-9, 9, 37)
    floors = [np.stack([s * (7 - 2 * np.tanh(x2)), x2], axis=1) for s in (1, -1)]
    level = np.stack([np.linspace(-11, 11, 45), np.zeros(45)], axis=1)
    for points in (*floors, level):
        assert np.all(np.isfinite(losses_at(toy.TOY, points)))
        assert np.all(np.isfinite(gradients_at(toy.TOY, points)))


@pytest.mark.parametrize("name", ["toy", "cqf", "ewq"])
def test_a_mean_of_the_gradients_is_zero_on_the_front(name, x64):
    problem = toy.PROBLEMS[name]
    one, two = gradients_at(problem, problem.front).swapaxes(0, 1)
    one = one / problem.units[0]
    # The shortest mean of two vectors, in closed form.
    apart = np.sum((one - two) ** 2, axis=1)
    weight = np.sum(two * (two - one), axis=1) / np.where(apart > 0, apart, 1)
    weight = np.clip(weight, 0, 1)[:, None]
    shortest = weight * one + (1 - weight) * two
    np.testing.assert_allclose(shortest, 0, atol=1e-9)


@pytest.mark.parametrize("name", ["toy", "cqf", "ewq"])
def test_nothing_is_better_than_the_front(name, x64):
    problem = toy.PROBLEMS[name]
    grid = [np.linspace(*side, 120) for side in problem.box]
    plane = np.stack(np.meshgrid(*grid), axis=-1).reshape(-1, 2)
    front = losses_at(problem, problem.front)
    others = losses_at(problem, plane)
    assert not np.any(np.all(others[:, None] < front - 1e-9, axis=-1))


def test_the_line_that_papers_draw_is_near_the_front(x64):
    front = toy.toy_front()
    np.testing.assert_allclose(front[:, 1], -8.3552, atol=0.08)
    np.testing.assert_allclose(front[100], [0, -8.3552], atol=1e-4)
    line = np.stack([front[:, 0], np.full(len(front), -8.3552)], axis=1)
    assert np.all(toy.distance_to_front(line, front) < toy.TOY.tolerance / 3)
    gradients = gradients_at(toy.TOY, line) / np.array([[toy.TOY_SCALE], [1]])
    weight = ((front[:, 0] + 7) / 14)[:, None]
    mean = weight * gradients[:, 0] + (1 - weight) * gradients[:, 1]
    np.testing.assert_allclose(mean, 0, atol=3e-3)  # beside slopes of up to 2.8


def test_distance_to_a_front():
    line = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0]])
    points = np.array([[1.0, 0.5], [-3.0, 4.0], [2.5, 1.0], [np.nan, 0.0]])
    found = toy.distance_to_front(points, line)
    np.testing.assert_allclose(found, [0.5, 5, 0.5, np.nan])
    np.testing.assert_allclose(toy.distance_to_front(points[1], line[:1]), 5)


# ------------------------------------------------------------------------ whole runs


class Reference(NamedTuple):
    """A method whose runs TorchJD 0.18 has given, and how near ours come.

    Tolerances are at least twice what was measured; those above 1e-5 are for
    TorchJD's own solvers, which stop that far from the optimum.

    Attributes:
      name: in the fixture.
      method: in the registry.
      ewq: largest difference of points on `toy.EWQ`; None: not in the fixture.
      toy: the same on `toy.TOY`; None: not in the fixture.
      options: of the method, on both problems.
      toy_options: of the method, on `toy.TOY` only.
      ewq_until: by start, from which step on the runs part, on `toy.EWQ`.
      toy_until: the same on `toy.TOY`, where some runs bounce in a valley, or go along
        a ridge, and a start moved by 1e-13 ends more than 1e-6 away.
    """

    name: str
    method: str
    ewq: float | None
    toy: float | None
    options: Mapping[str, Any] = {}
    toy_options: Mapping[str, Any] = {}
    ewq_until: Mapping[int, int] = {}
    toy_until: Mapping[int, int] = {}


# One line a method; the learning rates are in the fixture.
REFERENCES = [
    # What the fixture calls mean is the sum on the toy problem: Adam's eps tells.
    Reference(
        "mean",
        "mean",
        1e-14,
        1e-6,
        toy_options={"scale": "sum"},
        toy_until={0: 500, 2: 1000},
    ),
    Reference("mgda", "mgda", 1e-13, 1e-9),
    Reference("upgrad", "upgrad", 1e-14, 0.02, toy_until={2: 500}),
    Reference("dualproj", "dualproj", 1e-14, None),
    # TorchJD's stands still where one gradient is zero; ours goes on.
    Reference("cagrad", "cagrad", 1e-6, None, options={"c": 0.5}, ewq_until={1: 5}),
    # TorchJD's pseudo-inverse takes the last, short gradient for zero, and jumps.
    Reference("imtl_g", "imtl_g", 1e-13, 5e-3, ewq_until={4: 50}, toy_until={0: 500}),
    Reference("aligned_mtl", "aligned_mtl", 1e-13, 1e-6, toy_until={4: 500}),
    Reference(
        "fairgrad1",
        "fairgrad",
        None,
        0.05,
        options={"alpha": 1.0},
        toy_until={1: 1000, 2: 1000, 4: 1000},
    ),
]


def cases(of):
    return [pytest.param(r, id=r.name) for r in REFERENCES if of(r) is not None]


def same_runs(problem, found, until):
    """Each start, and how many of the kept steps are to be the same."""
    for start in range(len(problem.starts)):
        yield start, int(np.sum(found.steps < until.get(start, np.inf)))


@pytest.mark.parametrize("reference", cases(lambda r: r.ewq))
def test_the_quadratic_as_torchjd_runs_it(reference, load_fixture, x64):
    given = load_fixture("torchjd_0_18_trajectories")["runs"][f"EWQ/{reference.name}"]
    assert [list(start) for start in toy.EWQ.starts] == given["inits"]
    combiner = mtl.METHODS[reference.method].make(2, **reference.options)
    found = run(
        combiner,
        toy.EWQ,
        learning_rate=given["lr"],
        steps=given["n"],
        keep=range(0, given["n"] + 1, given["xs_every"]),
    )
    for start, until in same_runs(toy.EWQ, found, reference.ewq_until):
        np.testing.assert_allclose(
            found.points[start, :until],
            np.array(given["xs"])[start, :until],
            rtol=0,
            atol=reference.ewq,
            err_msg=f"from start {start}",
        )


def as_the_authors(x):
    """Where both gates are shut, the authors' gradient is the sum of both sides'."""
    at_kink = x[1] == 0
    return tuple(
        jnp.where(at_kink, 2 * loss - jax.lax.stop_gradient(loss), loss)
        for loss in toy.toy_losses(x)
    )


@pytest.mark.parametrize("reference", cases(lambda r: r.toy))
def test_the_toy_problem_as_torchjd_runs_it(reference, load_fixture, x64):
    given = load_fixture("torchjd_0_18_trajectories")["navon_toy"]
    assert given["scale"] == toy.TOY_SCALE
    assert [list(start) for start in toy.TOY.starts] == given["inits"]
    runs = given["runs"][reference.name]
    kept = [look["step"] for look in runs[0]]
    options = {**reference.options, **reference.toy_options}
    combiner = mtl.METHODS[reference.method].make(2, **options)
    problem = toy.TOY._replace(losses=as_the_authors)
    found = run(combiner, problem, learning_rate=1e-2, steps=kept[-1], keep=kept)
    np.testing.assert_array_equal(found.steps, kept)
    points, losses = (
        np.array([[look[what] for look in one] for one in runs])
        for what in ("x", "loss")
    )
    for start, until in same_runs(toy.TOY, found, reference.toy_until):
        for ours, theirs, atol in (
            (found.points, points, reference.toy),
            (found.losses, losses, 10 * reference.toy),
        ):
            np.testing.assert_allclose(
                ours[start, :until],
                theirs[start, :until],
                rtol=0,
                atol=atol,
                err_msg=f"from start {start}",
            )


# --------------------------------------------------------------------- every method


def test_only_what_needs_channels_is_left_out():
    left_out = {name for name in mtl.METHODS if toy.why_not(name, toy.TOY) is not None}
    assert left_out == {n for n, row in mtl.METHODS.items() if "strengths" in row.needs}


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["paper", "mean", "sum", "norm"])
def test_a_scale_leaves_no_method_out(scale):
    plain = {name for name in mtl.METHODS if toy.why_not(name, toy.EWQ) is None}
    assert all(toy.why_not(name, toy.EWQ, scale=scale) is None for name in plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", mtl.METHODS)
def test_every_method_moves_and_stays_finite(name):
    reason = toy.why_not(name, toy.TOY)
    if reason is not None:
        pytest.skip(reason)
    found = run(name, toy.TOY, steps=300, learning_rate=1e-2, keep=4)
    assert found.points.shape == found.losses.shape == (5, 4, 2)
    assert np.all(np.isfinite(found.points))
    assert np.all(np.isfinite(found.losses))
    np.testing.assert_allclose(found.points[:, 0], toy.TOY.starts)
    moved = np.linalg.norm(found.points[:, -1] - found.points[:, 0], axis=-1)
    if name == "scale_invariant":  # 1 / loss, and some starts have losses below zero
        moved = moved[found.losses[:, 0].min(-1) > 0]
    assert len(moved)
    assert np.all(moved > 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mgda", "edm", "task_tensioner"])
def test_what_reaches_the_front_as_published(name):
    ends = toy.summarize(toy.run(name, toy.TOY), toy.TOY)
    assert all(end.reached and end.gain > 0 for end in ends)


@pytest.mark.slow
def test_the_mean_gets_stuck_as_published():
    ends = toy.summarize(toy.run("mean", toy.TOY), toy.TOY)
    assert [end.reached for end in ends[1:]] == [True, False, True, True]


def test_an_aggregator_that_normalises_replaces_the_optimizer():
    found = run("scale_by_mao", toy.EWQ, steps=1, keep=2)
    start = np.array(toy.EWQ.starts)
    np.testing.assert_allclose(
        found.points[:, 1], start - 0.075 * np.sign(start), rtol=1e-5
    )


def test_other_ways_of_taking_gradients_are_taken():
    found = run("look_ahead_jacobian", toy.EWQ, steps=1, keep=2)
    damped = 2 * (1 - 2 * 0.01) ** 2  # a step of 0.01 ahead, second order
    start = np.array(toy.EWQ.starts)
    np.testing.assert_allclose(
        found.points[:, 1], start * (1 - 0.075 * damped), rtol=1e-5
    )
    # The losses are those here, not those ahead.
    np.testing.assert_allclose(found.losses[:, 0], start**2, rtol=1e-6)


def a_coin(num_tasks):
    def update(gramian, state, *, losses, task_mask, key, **extra):
        return jax.random.uniform(key, (num_tasks,)), state

    weighting = mtl.Weighting(lambda num_tasks, dtype: (), update, frozenset({"key"}))
    return mtl.from_weighting(weighting, num_tasks)


def test_random_methods_get_a_fresh_key_each_start_and_step():
    slopes = toy.EWQ._replace(losses=lambda x: (x[0], x[1]), learning_rate=1.0)
    found = run(a_coin(2), slopes, steps=6, keep=range(7))
    drawn = -np.diff(found.points, axis=1)
    assert np.unique(drawn.round(6)).size > drawn.size - 3
    assert np.array_equal(run(a_coin(2), slopes, steps=6, keep=7).points, found.points)
    other = run(a_coin(2), slopes, steps=6, keep=7, key=jax.random.key(1))
    assert not np.any(np.isclose(other.points[:, 1:], found.points[:, 1:]))


def test_scales_change_lengths():
    one = {s: run("mgda", toy.EWQ, scale=s, steps=1, keep=2) for s in ("sum", "norm")}
    step = {s: np.diff(r.points, axis=1)[:, 0] for s, r in one.items()}
    start = np.array(toy.EWQ.starts)
    wanted = 0.075 * np.linalg.norm(start, axis=1)  # of the mean gradient
    moving = np.all(start != 0, axis=1)  # else the shortest mean is 0
    lengths = np.linalg.norm(step["norm"], axis=1)
    np.testing.assert_allclose(lengths[moving], wanted[moving], rtol=1e-5)
    assert not np.allclose(step["sum"], step["norm"], rtol=0.1)


def test_what_cannot_be_run_says_why():
    with pytest.raises(ValueError, match="priority_projection acts on channels"):
        toy.run("priority_projection", toy.TOY)
    with pytest.raises(ValueError, match="unknown method 'medium'; there are mean, "):
        toy.run("medium", toy.TOY)
    with pytest.raises(ValueError, match="has its scale already"):
        toy.run(mtl.mean(2), toy.TOY, scale="sum")
    assert "unknown method" in toy.why_not("medium", toy.TOY)


# ----------------------------------------------------------------------- the summary


def a_run(problem, ends, starts=None):
    """A run of one step that ends where it is told to."""
    starts = problem.starts if starts is None else starts
    points = np.stack([np.array(starts), np.array(ends)], axis=1).astype(np.float64)
    losses = losses_at(problem, points.reshape(-1, 2)).reshape(points.shape)
    return toy.Run(np.array([0, 1]), points, losses)


def test_the_summary():
    ends = [(-7.0, -8.35), (7.2, -8.43), (0.0, -8.0), (8.0, -8.4), (np.nan, 0.0)]
    found = toy.summarize(a_run(toy.TOY, ends), toy.TOY)
    assert [end.reached for end in found] == [True, True, False, False, False]
    np.testing.assert_allclose(
        [e.distance for e in found[1:4]], [0.2, 0.355, 1], atol=0.01
    )
    # In units of a tenth and one: L1 falls from .655 to -.04, L2 from 7.9 to -20.
    assert found[0].gain == pytest.approx(10 * (0.65524 + 0.04), abs=0.05)
    assert found[1].gain == pytest.approx(-0.16, abs=0.01)  # L2 rose
    table = toy.format_table({"mean": a_run(toy.TOY, ends)}, toy.TOY).splitlines()
    assert table[2].startswith("| `mean` | 2 of 5 | +nan | **-0.04, -19.99** (+7.0) |")


def test_the_command(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    names = "mean,scale_by_mao,priority_projection"
    toy.main(["--methods", names, "--steps", "20", "--out", str(out)])
    text = capsys.readouterr()
    assert "| `mean` | 0 of 5 |" in text.out
    assert "20 steps of adam, learning rate 0.001" in text.out
    assert "Left out: priority_projection acts on channels" in text.out
    assert "In the place of adam, with the same rate: scale_by_mao." in text.out
    with (out / "toy.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == ["mean"] * 5 + ["scale_by_mao"] * 5
    assert float(lines[0]["start_x1"]) == -8.5
    assert lines[0]["reached_front"] == "false"
    assert (out / "toy.md").read_text() in text.out
    for name in ("toy_paths.png", "toy_losses.png"):
        picture = matplotlib.image.imread(out / name)
        assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "mean,medium"], "unknown method 'medium'; there are mean, "),
        (["--methods", "priority_projection"], "acts on channels"),
        (["--steps", "0"], "expected a whole number from 1"),
        (["--problem", "sphere"], "invalid choice: 'sphere'"),
    ],
)
def test_wrong_arguments(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        toy.main([*arguments, "--out", str(tmp_path)])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 7])
def test_as_many_panels_as_methods(count):
    found = {f"method {i}": a_run(toy.CQF, [(0, 4)] * 4) for i in range(count)}
    for draw in (toy_plots.plot_paths, toy_plots.plot_losses):
        figure = draw(found, toy.CQF)
        shown = [axis for axis in figure.axes if axis.get_visible()]
        titles = [axis.get_title().splitlines()[0] for axis in shown]
        assert titles == list(found)
