"""The benchmarks: the networks are what they say, the ways agree, the tables are what
was measured. Nothing here looks at how long anything takes.
"""

import csv
import importlib
import importlib.util
import itertools
import sys

import jax
import matplotlib.image
import numpy as np
import pytest

import mtl_optax as mtl
from mtl_optax import _cli
from mtl_optax.bench import (
    engine_cost,
    many_runs,
    models,
    plots,
    tables,
    timing,
    torch_peer,
    update_cost,
)

needs_torch = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "torchjd")),
    reason="PyTorch and TorchJD are optional",
)


def small(model, num_tasks=3):
    return models.MODELS[model].make(num_tasks, models.MODELS[model].small)


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


# ------------------------------------------------------ the networks, in float64 NumPy


def _dense(p, x):
    return x @ p["kernel"] + p["bias"]


def _relu(x):
    return np.maximum(x, 0)


def _norm(p, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p["bias"]


def _mlp(p, batch, sizes):
    x = batch["x"]
    for layer in p["layers"]:
        x = np.tanh(_dense(layer, x))
    return x


def _cnn(p, batch, sizes):
    x = batch["images"]
    for layer in p["convs"]:
        n, h, w, _ = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        y = np.zeros((n, h, w, layer["kernel"].shape[-1])) + layer["bias"]
        for i, j in itertools.product(range(3), range(3)):
            y += padded[:, i : i + h, j : j + w] @ layer["kernel"][i, j]
        y = _relu(y)
        x = sum(y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    return _relu(_dense(p["dense"], x.reshape(len(x), -1)))


def _transformer(p, batch, sizes):
    x = p["tokens"][batch["tokens"]] + p["places"]
    size = sizes.width // sizes.num_heads
    for layer in p["layers"]:
        seen = _norm(layer["norm_1"], x)
        query, key, value = (
            _dense(layer["attention"][name], seen) for name in ("query", "key", "value")
        )
        mixed = np.zeros_like(x)
        for n, head in itertools.product(range(len(x)), range(sizes.num_heads)):
            one = slice(head * size, (head + 1) * size)
            odds = np.exp(query[n, :, one] @ key[n, :, one].T / np.sqrt(size))
            mixed[n, :, one] = odds / odds.sum(1, keepdims=True) @ value[n, :, one]
        x = x + _dense(layer["attention"]["out"], mixed)
        hidden = _dense(layer["up"], _norm(layer["norm_2"], x))
        inner = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
        x = x + _dense(layer["down"], 0.5 * hidden * (1 + np.tanh(inner)))
    return _norm(p["norm"], x).mean(1)


def _gnn(p, batch, sizes):
    x = _relu(_dense(p["embed"], batch["nodes"]))
    edges = np.zeros((len(x), len(x)))
    np.add.at(edges, (batch["receivers"], batch["senders"]), 1)
    graphs = np.arange(len(x)) // sizes.nodes
    assert not edges[graphs[:, None] != graphs].any()
    assert np.all(edges.sum(1) == sizes.degree)
    for layer in p["rounds"]:
        received = edges @ _relu(_dense(layer["message"], x)) / sizes.degree
        x = _relu(_dense(layer["from_node"], x) + _dense(layer["from_edges"], received))
    return np.stack([x[graphs == n].mean(0) for n in range(sizes.batch)])


ENCODERS = {"mlp": _mlp, "cnn": _cnn, "transformer": _transformer, "gnn": _gnn}


def in_float64(tree):
    def convert(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(np.float64) if leaf.dtype.kind == "f" else leaf

    return jax.tree.map(convert, tree)


@pytest.mark.parametrize("model", models.MODELS)
def test_networks_are_what_they_say(model):
    problem = small(model)
    assert problem.num_tasks == 3
    params, batch = in_float64(problem.params), in_float64(problem.batch)
    features = ENCODERS[model](params, batch, problem.sizes)
    errors = _dense(params["heads"], features) - batch["targets"]
    losses = jax.jit(problem.loss_fn)(problem.params, problem.batch)
    np.testing.assert_allclose(losses, np.mean(errors**2, axis=0), rtol=2e-5)
    again = problem.encoder(problem.params, problem.batch)
    np.testing.assert_allclose(again, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", models.MODELS)
def test_full_sizes_are_those_of_the_table(model):
    """By shapes alone: the parameters of 12 layers of 1024, and so on."""
    kind = models.MODELS[model]
    shapes = jax.eval_shape(lambda: kind.make(2, kind.full).params)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    conv = 9 * (3 * 32 + 32 * 64 + 64 * 128) + 32 + 64 + 128
    layer = 12 * 256**2 + 4 * 256 + 1024 + 256 + 4 * 256
    known = {
        "mlp": 12 * (1024**2 + 1024) + 2 * 1025,
        "cnn": conv + 2048 * 256 + 256 + 2 * 257,
        "transformer": 4 * layer + 512 + (64 + 1000) * 256 + 2 * 257,
        "gnn": 17 * 128 + 4 * 3 * (128**2 + 128) + 2 * 129,
    }
    assert count == known[model]


@needs_torch
@pytest.mark.parametrize("model", models.MODELS)
def test_pytorch_has_the_same_networks_and_gradients(model):
    problem = small(model)
    peer = torch_peer.make_peer(problem)
    rows = jax.jacrev(problem.loss_fn)(problem.params, problem.batch)
    rows = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(rows)]
    gramian = sum(r.reshape(3, -1) @ r.reshape(3, -1).T for r in rows)
    losses = problem.loss_fn(problem.params, problem.batch)
    np.testing.assert_allclose(peer.losses(), losses, rtol=1e-5)
    np.testing.assert_allclose(peer.gramian(), gramian, rtol=1e-4, atol=1e-5)
    assert tuple(peer.ways) == torch_peer.WAYS
    for name, way in peer.ways.items():
        weights = np.ones(3) if name == "torch" else gramian.diagonal() ** -0.5
        way.run()
        way.run()  # the second must not add to the first
        for one, other in zip(way.gradient(), rows, strict=True):
            wanted = np.tensordot(weights, other, 1)
            np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=2e-6)


@needs_torch
@pytest.mark.parametrize("alone", [True, False])
def test_pytorch_gets_the_threads_that_suit_it(clock, monkeypatch, alone):
    import torch

    before = torch.get_num_threads()
    monkeypatch.setattr(torch_peer, "_all_threads", lambda: 4)
    try:
        one, _ = clock("one", [2])
        many, _ = clock("many", [1 if alone else 30])
        note = torch_peer.use_best_threads(
            lambda: (one if torch.get_num_threads() == 1 else many).run()
        )
        assert torch.get_num_threads() == (4 if alone else 1)
        assert note == ("" if alone else "1 thread, faster here than 4")
    finally:
        torch.set_num_threads(before)


# -------------------------------------------------------------------------- the timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def way(name, seconds, **options):
        log = []

        def run():
            log.append(name)
            now[0] += seconds[min(len(log), len(seconds)) - 1]

        return timing.Way(name, run, **options), log

    return way


def test_every_way_runs_once_a_round(clock):
    (one, log_1), (two, log_2) = clock("a", [9, 2, 2, 3, 4]), clock("b", [1])
    seen = []
    found = timing.alternate([one, two], 3, on_run=seen.append)
    assert found["a"].seconds.tolist() == [2, 3, 4]  # the warm-up is left out
    assert found["b"].seconds.tolist() == [1, 1, 1]
    assert len(log_1) == len(log_2) == 5
    assert seen == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]
    assert timing.ratio(found["a"], found["b"]) == pytest.approx((3, 2.2, 3.8))


@pytest.mark.parametrize("size", [3, 6, 7])
def test_no_way_follows_the_same_other_all_the_time(clock, size):
    names = [str(n) for n in range(size)]
    seen = []
    ways = [clock(name, [1])[0] for name in names]
    timing.alternate(ways, size, budget=float("inf"), on_run=seen.append)
    rounds = np.reshape(seen[2 * size :], (size, size))
    assert all(sorted(order) == names for order in rounds.tolist())
    assert all(sorted(order) == names for order in rounds.T.tolist())
    pairs = [pair for order in rounds.tolist() for pair in itertools.pairwise(order)]
    assert max(pairs.count(pair) for pair in pairs) <= 2


def test_slow_ways_get_what_fast_ones_leave_and_a_note(clock):
    unit, _ = clock("unit", [1], unit=True)
    slow, _ = clock("slow", [20])
    hopeless, log = clock("hopeless", [500])
    found = timing.alternate([unit, slow, hopeless], 10, budget=150)
    assert len(found["unit"].seconds) == 10
    # 140 s are left: half of them for three runs of 20 s, the rest for one of 500 s.
    assert found["slow"].seconds.tolist() == [20] * 3
    assert found["slow"].note == "3 of 10 rounds, of 20.0 s each"
    assert found["hopeless"].seconds.tolist() == [500]
    assert found["hopeless"].note == "one run only, of 500.0 s"
    assert len(log) == 1
    assert timing.ratio(found["slow"], found["unit"]).median == 20


def test_a_unit_that_is_slow_itself_has_a_median_and_takes_nothing_from_others(clock):
    unit, _ = clock("unit", [100], unit=True)
    quick, _ = clock("quick", [1])
    found = timing.alternate([unit, quick], 10, budget=50)
    assert len(found["unit"].seconds) == 3
    assert found["unit"].note == "3 of 10 rounds, of 100.0 s each"
    assert len(found["quick"].seconds) == 3  # never oftener than its unit
    assert found["quick"].note == ""


def test_many_calls_in_a_run_are_divided_by(clock):
    way, _ = clock("a", [20], calls=10)
    found = timing.alternate([way], 2, budget=30)["a"]
    assert found.seconds.tolist() == [2]
    assert found.note == "1 of 2 rounds, of 20.0 s each"


def test_what_fails_does_not_stop_the_others():
    calls = []

    def later():
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("now\nand why")

    ways = [timing.Way("later", later), timing.Way("well", lambda: None)]
    found = timing.alternate(ways, 5)
    assert len(found["well"].seconds) == 5
    assert found["later"].note == "failed: ValueError: now"
    assert len(found["later"].seconds) == 4


def test_memory_in_use_is_seen():
    # The kernel may take pages from the process meanwhile, so once in three is enough.
    tries = [timing.peak_megabytes(lambda: np.ones(20_000_000).sum()) for _ in range(3)]
    assert np.isnan(tries[0]) or any(100 < found < 400 for found in tries)


# --------------------------------------------------------------------------- the engine

EXACT = [way for way in engine_cost.OURS if way != engine_cost.FEATURES]


@pytest.mark.parametrize("way", EXACT)
def test_ways_give_the_same_gradient(way):
    problem = small("mlp")
    rows = jax.jacrev(problem.loss_fn)(problem.params, problem.batch)
    rows = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(rows)]
    squares = sum(np.sum(r.reshape(3, -1) ** 2, axis=1) for r in rows)
    weights = np.ones(3) if way == "plain" else squares**-0.5
    step, state = engine_cost.make_step(problem, way)
    for _ in range(2):
        gradient, state, losses = jax.jit(step)(problem.params, state, problem.batch)
    np.testing.assert_allclose(
        losses, problem.loss_fn(problem.params, problem.batch), rtol=1e-6
    )
    for one, other in zip(jax.tree.leaves(gradient), rows, strict=True):
        wanted = np.tensordot(weights, other, 1)
        np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-6)


def test_features_weigh_by_the_norms_at_the_features():
    problem = small("mlp")
    features = problem.encoder(problem.params, problem.batch)
    at = jax.jacrev(problem.heads, argnums=1)(problem.params, features, problem.batch)
    weights = np.sum(np.asarray(at, np.float64) ** 2, axis=(1, 2)) ** -0.5
    rows = jax.jacrev(problem.loss_fn)(problem.params, problem.batch)
    step, state = engine_cost.make_step(problem, "features")
    gradient = jax.jit(step)(problem.params, state, problem.batch)[0]
    for one, other in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(rows), strict=True
    ):
        wanted = np.tensordot(weights, np.asarray(other, np.float64), 1)
        np.testing.assert_allclose(one, wanted, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def engine_rows():
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    ways = ["map", "every_10", "features"]
    return engine_cost.measure(
        ["mlp"], [2, 3], ways=ways, rounds=2, small=True, watch=watch
    )


def test_rows_are_what_was_measured(engine_rows):
    ways = ["plain", "map", "every_10", "features"]
    assert [(row.tasks, row.way) for row in engine_rows] == [
        (tasks, way) for tasks in (2, 3) for way in ways
    ]
    for row in engine_rows:
        assert (row.model, row.rounds, row.note) == ("mlp", 2, "")
        assert 0 < row.low <= row.ratio <= row.high
        assert min(row.milliseconds, row.compile_seconds) > 0
        assert row.megabytes >= 0
        assert row.flops >= 1
        if row.way == "plain":
            assert (row.ratio, row.low, row.high, row.flops) == (1, 1, 1, 1)
        elif row.way != "features":
            assert row.differs < 1e-5
    (loops, *_) = [row for row in engine_rows if row.way == "map"]
    assert loops.loops


def test_what_a_way_takes_from_memory_may_not_end_the_process(monkeypatch):
    monkeypatch.setattr(engine_cost, "physical_bytes", lambda: 1e3)
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    rows = engine_cost.measure(
        ["mlp"], [2], ways=["plain"], rounds=1, small=True, watch=watch
    )
    assert "MemoryError: needs 0.0 GB" in rows[0].note
    assert np.isnan(rows[0].ratio)
    assert rows[0].note in said[0]


def test_a_way_that_cannot_be_compiled_is_a_line_and_a_row(monkeypatch):
    make_step = engine_cost.make_step

    def broken(problem, way):
        if way == "vmap":
            raise ValueError("no such thing")
        return make_step(problem, way)

    monkeypatch.setattr(engine_cost, "make_step", broken)
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    rows = engine_cost.measure(
        ["mlp"], [2], ways=["vmap"], rounds=1, small=True, watch=watch
    )
    assert [row.way for row in rows] == ["plain", "vmap"]
    assert said == ["mlp, T = 2, vmap: failed: ValueError: no such thing"]
    assert "no such thing" in engine_cost.table(rows)


def test_a_way_that_gives_another_gradient_is_called_out(monkeypatch):
    make_step = engine_cost.make_step

    def wrong(problem, way):
        step, state = make_step(problem, way)
        if way != "vmap":
            return step, state

        def twice(*arguments):
            gradient, state, losses = step(*arguments)
            return jax.tree.map(lambda g: 1.5 * g, gradient), state, losses

        return twice, state

    monkeypatch.setattr(engine_cost, "make_step", wrong)
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    engine_cost.measure(
        ["mlp"], [2], ways=["default", "vmap"], rounds=1, small=True, watch=watch
    )
    assert said == ["mlp, T = 2, vmap: another gradient: differs by 5e-01"]


@pytest.mark.usefixtures("no_torch")
def test_without_pytorch_a_line_says_so_and_our_side_runs():
    assert "torch is not installed" in torch_peer.why_missing()
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    rows = engine_cost.measure(
        ["mlp"], [2], ways=["plain", "autogram"], rounds=1, small=True, watch=watch
    )
    assert [row.way for row in rows] == ["plain"]
    assert said == [torch_peer.why_missing()]
    assert "pip install --extra-index-url https" in said[0]


@needs_torch
def test_torchjd_stands_beside_us():
    rows = engine_cost.measure(
        ["mlp"], [2], ways=["default", "backward", "autogram"], rounds=1, small=True
    )
    assert [row.way for row in rows] == [
        "plain",
        "default",
        "torch",
        "backward",
        "autogram",
    ]
    for row in rows:
        assert row.differs < 1e-5
        assert row.ratio > 0
        assert row.over_default > 0
        if row.way in ("plain", "torch"):
            assert row.ratio == 1


# -------------------------------------------------------------- stacked gradients, runs


@pytest.fixture(scope="module")
def update_rows():
    return update_cost.measure([(3, 1000)], methods=["mean", "krum"], rounds=2)


def test_updates_are_measured_by_the_floor(update_rows):
    floor, *rest = update_rows
    assert (floor.library, floor.over_floor) == ("numpy", 1)
    assert [row.method for row in rest if row.library == "mtl_optax"] == [
        "mean",
        "krum",
    ]
    for row in rest:
        assert row.rounds == 2
        assert 0 < row.low <= row.over_floor <= row.high
        assert row.over_ours > 0
        assert row.note == ""


def test_a_jacobian_is_no_update():
    said = []
    watch = timing.UNWATCHED._replace(say=said.append)
    update_cost.measure(
        [(2, 1000)], methods=["look_ahead_jacobian"], rounds=1, watch=watch
    )
    assert any("look_ahead_jacobian is left out" in line for line in said)


@needs_torch
def test_torchjd_has_an_aggregator_for_every_peer():
    rows = update_cost.draw(4, 50)
    peers = {name: update_cost.peer_name(row) for name, row in mtl.METHODS.items()}
    assert sum(map(bool, peers.values())) >= 14
    for name, peer in peers.items():
        if peer and name != "nash_mtl":  # its solver is slow to start
            update = torch_peer.make_aggregator(peer, rows)()
            assert update.shape == (50,), name
            assert np.all(np.isfinite(update)), name
    np.testing.assert_allclose(
        torch_peer.make_aggregator(peers["mean"], rows)(), rows.mean(0), rtol=1e-5
    )


@pytest.fixture(scope="module")
def run_rows():
    return many_runs.measure(["mgda"], seeds=2, steps=3, rounds=1)


@pytest.mark.slow
def test_all_ways_of_many_runs_end_alike(run_rows):
    assert tuple(row.way for row in run_rows) == many_runs.WAYS
    for row in run_rows:
        assert row.differs < 1e-4
        assert row.steps_per_second > 0
        assert (row.seeds, row.steps, row.rounds) == (2, 3, 1)
    assert run_rows[0].over_vmap == 1


# -------------------------------------------------------------- tables, files, pictures


def _read(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_files_hold_all_columns(engine_rows, update_rows, tmp_path):
    for rows in (engine_rows, update_rows):
        head, *lines = _read(tables.save_csv(rows, tmp_path / "rows.csv"))
        assert tuple(head) == type(rows[0])._fields
        assert len(lines) == len(rows)
        for line, row in zip(lines, rows, strict=True):
            assert line == [str(value) for value in row]


def test_tables_show_every_row(engine_rows, update_rows):
    lines = engine_cost.table(engine_rows).splitlines()
    shown = [line for line in lines if line.startswith("| 2 ")]
    assert [line.split("|")[2].strip() for line in shown] == [
        row.way for row in engine_rows if row.tasks == 2
    ]
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "mlp" in lines
    text = update_cost.table(update_rows)
    assert "| krum " in text
    assert "| floor " in text


def _assert_worth_looking_at(files):
    for file in files:
        image = matplotlib.image.imread(file)[..., :3]
        assert min(image.shape[:2]) > 300, file
        ink = np.mean(np.any(image < 0.95, axis=-1))
        assert 0.01 < ink < 0.6, (file, ink)
        assert image.std() > 0.05, file


def test_plots(engine_rows, update_rows, tmp_path):
    runs = [
        many_runs.Row("mgda", way, 2, 3, 100.0 + n, 1.0, 1.0, 1.0, 1, 1.0, 0.0, "")
        for n, way in enumerate(many_runs.WAYS)
    ]
    # A row without any number is left out of the picture, and nothing else.
    nothing = engine_rows[0]._replace(
        way="vmap", ratio=np.nan, low=np.nan, high=np.nan, megabytes=np.nan
    )
    files = [
        *plots.save_engine([*engine_rows, nothing], tmp_path),
        *plots.save_update(update_rows, tmp_path),
        *plots.save_runs(runs, tmp_path),
    ]
    assert [file.name for file in files] == [
        "engine_time.png",
        "engine_memory.png",
        "update.png",
        "runs.png",
    ]
    _assert_worth_looking_at(files)


# -------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("no_torch")
def test_bench_engine_as_a_command(capsys, tmp_path):
    options = ["--models=mlp", "--tasks=3,2", "--modes=vmap", "--rounds=1", "--quick"]
    assert _cli.main(["bench", *options, "--out", str(tmp_path / "new")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # what was asked for is all there is, and no bar
    assert captured.out.startswith("jax ")
    assert "not what it costs" in captured.out
    for name in ("engine.csv", "engine_time.png", "engine_memory.png"):
        assert (tmp_path / "new" / name).exists()
        assert str(tmp_path / "new" / name) in captured.out
    head, *lines = _read(tmp_path / "new" / "engine.csv")
    assert [(line[head.index("tasks")], line[head.index("way")]) for line in lines] == [
        (tasks, way) for tasks in ("2", "3") for way in ("plain", "vmap")
    ]


@pytest.mark.usefixtures("no_torch")
def test_bench_update_as_a_command(capsys, tmp_path):
    options = ["update", "--methods=mean", "--quick", "--no-plots", "--quiet"]
    assert _cli.main(["bench", *options, "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("torch is not installed")
    assert [file.name for file in tmp_path.iterdir()] == ["update.csv"]
    assert "| mean " in captured.out


@pytest.mark.slow
def test_bench_runs_as_a_command(capsys, tmp_path):
    options = ["runs", "--methods=mean", "--quick", "--rounds=1"]
    assert _cli.main(["bench", *options, "--out", str(tmp_path)]) == 0
    assert "| one vmap " in capsys.readouterr().out
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["runs.csv", "runs.png"]


@pytest.mark.slow
def test_the_quick_bench_in_full(capsys, tmp_path):
    assert _cli.main(["bench", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for model in models.MODELS:
        assert f"\n{model}\n" in out
    assert "failed" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["bench", "engines"], 2, "invalid choice: 'engines'"),
        (["bench", "--models", "mlp,rnn"], 2, "unknown 'rnn'; there are mlp, cnn"),
        (["bench", "--modes", "lazy"], 2, "unknown 'lazy'; there are plain, default"),
        (["bench", "--tasks", "1,2"], 2, "expected whole numbers from 2"),
        (["bench", "--tasks", "two"], 2, "expected a whole number from 1, got 'two'"),
        (["bench", "--budget", "0"], 2, "expected a positive number, got '0'"),
        (["bench", "--rounds", "0"], 2, "expected a whole number from 1"),
        (["bench", "update", "--modes", "map"], 1, "bench update takes no --modes"),
        (["bench", "--methods", "mean"], 1, "takes no --methods, but --models"),
        (["bench", "runs", "--methods", "madg"], 2, "did you mean"),
    ],
)
def test_mistakes_end_in_one_line(capsys, arguments, code, words):
    assert _cli.main(arguments) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("mtl-optax")
    assert words in error
