"""Methods with moments, or several batches, beyond what the laws ask of all.

`fixtures/torchjd_0_18_moments.json` holds TorchJD's weights on sequences of matrices.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import oracles_moments as oracles
import pytest
from oracles import simplex_weights

import mtl_optax as mtl
from mtl_optax.solvers import simplex_projection


def run(tx, rows, losses=None, **extras):
    """Updates ``[steps, P]`` and states of a run on ``[steps, T, P]``."""
    rows = jnp.asarray(rows)
    tasks = rows.shape[1]
    losses = jnp.ones(rows.shape[:2]) if losses is None else jnp.asarray(losses)

    def step(state, now):
        row, loss, extra = now
        if "other_task_grads" in extra:
            extra = {**extra, "other_task_grads": tuple(extra["other_task_grads"])}
        updates, state = tx.update(row, state, row[0], losses=loss, **extra)
        return state, (updates, state.aggregator)

    assert tasks == tx.num_tasks
    scan = functools.partial(jax.lax.scan, step, tx.init(rows[0, 0]))
    updates, states = laws.quick_jit(lambda xs: scan(xs)[1])((rows, losses, extras))
    return np.asarray(updates, np.float64), states


def draw(steps, tasks, size, seed=0):
    return np.random.default_rng([14, seed]).standard_normal((steps, tasks, size))


# ------------------------------------------------------------ projection on the simplex


@functools.cache
def projections():
    return laws.quick_jit(jax.vmap(simplex_projection))


@pytest.mark.parametrize("tasks", [1, 2, 5, 40])
def test_the_projection_is_the_closest_point(tasks, x64):
    rng = np.random.default_rng(tasks)
    points = rng.standard_normal((60, tasks)) * 10 ** rng.uniform(-3, 3, (60, 1))
    found = np.asarray(projections()(points, np.ones(points.shape, bool)))
    for v, w in zip(points, found, strict=True):
        # v - w is tau where w > 0 and less elsewhere: the conditions of optimality.
        slack = v - w
        tau = slack[w > 0].max()
        size = 1 + np.abs(v).max()
        assert w.min() >= 0
        np.testing.assert_allclose(w.sum(), 1, rtol=1e-12)
        np.testing.assert_allclose(slack[w > 0], tau, rtol=0, atol=1e-12 * size)
        assert slack.max() <= tau + 1e-12 * size
        np.testing.assert_allclose(w, oracles.project(v), rtol=0, atol=1e-10 * size)


def test_the_projection_keeps_what_lies_on_the_simplex():
    rng = np.random.default_rng(0)
    points = rng.dirichlet(np.ones(6), 50).astype(np.float32)
    points[:10, 2] = 0
    points[:10] /= points[:10].sum(1, keepdims=True)
    found = projections()(points, np.ones(points.shape, bool))
    np.testing.assert_allclose(found, points, atol=2e-7)


@pytest.mark.parametrize("shift", [0, 1e4, -1e6])
def test_the_projection_of_far_points(shift):
    """Sums of the entries themselves would lose the simplex to rounding."""
    point = np.float32([[0.5, 0.25, -0.5]]) + np.float32(shift)
    (found,) = projections()(point, np.ones((1, 3), bool))
    wanted = oracles.project(point[0].astype(np.float64))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    far = np.float32([[1e30, -1e30, 0.9e30]])
    np.testing.assert_array_equal(
        projections()(far, np.ones((1, 3), bool)), [[1, 0, 0]]
    )


def test_the_projection_leaves_absent_tasks_out():
    points = draw(1, 30, 5)[0].astype(np.float32)
    masks = np.random.default_rng(1).uniform(size=points.shape) < 0.6
    masks[:2] = False
    spoiled = np.where(masks, points, np.nan)
    spoiled[1::2] = np.where(masks[1::2], points[1::2], np.inf)
    found = np.asarray(projections()(spoiled, masks))
    for v, mask, w in zip(points.astype(np.float64), masks, found, strict=True):
        assert np.all(w[~mask] == 0)
        if mask.any():
            np.testing.assert_allclose(w[mask], oracles.project(v[mask]), atol=1e-6)
    assert not masks[0].any()


# ------------------------------------------------------------------------------ TorchJD

OURS = {
    "excess_mtl": {"robust_step_size": "step_size", "n_warmup_steps": "num_warmup"},
    "modo": {"gamma": "gamma", "rho": "rho"},
    "sdmgrad": {
        "lr": "step_size",
        "momentum": "momentum",
        "n_iter": "num_steps",
        "lambda_": "lam",
    },
}
CASES = ("base_2x3", "three_3x3", "rand_3x10")


@pytest.fixture(scope="module")
def torchjd(load_fixture):
    return load_fixture("torchjd_0_18_moments")["cases"]


def weights_of(name, options, rows):
    """On rows ``[steps, 3 batches, T, P]``."""
    tx = mtl.METHODS[name].make(rows.shape[2], **options)
    extras = {}
    if name != "excess_mtl":
        extras["other_task_grads"] = [rows[:, 1], rows[:, 2]]
    updates, states = run(tx, rows[:, 0], **extras)
    weights = np.asarray(states.info.task_weights)
    np.testing.assert_allclose(
        updates, np.einsum("kt,ktp->kp", weights, rows[:, 0]), rtol=1e-9, atol=1e-9
    )
    return weights


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_torchjds(case, torchjd, x64):
    rows = np.array(torchjd[case]["rows"])
    tasks = rows.shape[2]
    compared = 0
    for entry in torchjd[case]["runs"]:
        name, wanted = entry["method"], np.array(entry["weights"])
        options = {OURS[name][k]: v for k, v in entry["options"].items()}
        if options.get("step_size") == 10:
            continue  # below
        found = weights_of(name, options, rows)
        # TorchJD's weights of ExcessMTL sum to 1, and 1e-7 and 1e-8 are added to what
        # it divides by.
        found = found / tasks if name == "excess_mtl" else found
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-7, err_msg=str(entry))
        assert np.ptp(wanted, axis=0).max() > 1e-2  # there is something to see
        compared += 1
    assert compared == 6


@pytest.mark.parametrize("case", CASES)
def test_torchjds_step_size_does_not_solve_the_problem(case, torchjd, x64):
    """Of one batch: ours is at the optimum of ``|J^T (w + lam w0)|``, TorchJD's not."""
    rows = np.array(torchjd[case]["rows"])
    tasks = rows.shape[2]
    (J,) = rows[:1, 0]
    steps = np.broadcast_to(J, (12, 3, *J.shape))

    def length(weights):
        return np.linalg.norm(weights[-1] @ J)

    best = optimum_of_sdmgrad(J, 0.3) @ J
    found = length(weights_of("sdmgrad", {}, steps))
    jumping = length(weights_of("sdmgrad", {"step_size": 10.0}, steps))
    assert found < np.linalg.norm(best) * (1 + 1e-6)
    assert jumping > 1.1 * found
    # It is the same as TorchJD's as long as rounding has not been blown up.
    (entry,) = [e for e in torchjd[case]["runs"] if e["options"].get("lr") == 10]
    ours = weights_of("sdmgrad", {"step_size": 10.0}, rows)
    np.testing.assert_allclose(ours[0], entry["weights"][0], atol=1e-6)
    assert tasks == len(J)


def optimum_of_sdmgrad(J, lam):
    """Weights of the shortest ``(w + lam w0) J / (1 + lam)``, by quadprog."""
    corners = (J + lam * J.mean(0)) / (1 + lam)  # one a corner of the simplex
    w = simplex_weights(corners @ corners.T)
    return (w + lam / len(J)) / (1 + lam)


# ------------------------------------------------------------------ the authors' code

# Options of ours that make a method the authors' or LibMTL's.
AUTHORS = {
    "moco": {"lengths": "loss", "onto_simplex": "softmax"},
    "db_mtl": {"bias_correction": False},
    "excess_mtl": {},
    "sdmgrad": {"step_size": 5.0},
    "m_config": {},
    "m_config_in_turn": {},
}
NAMES = {
    "MoCo_beta": "beta",
    "MoCo_beta_sigma": "beta_sigma",
    "MoCo_gamma": "gamma",
    "MoCo_gamma_sigma": "gamma_sigma",
    "MoCo_rho": "rho",
    "DB_beta": "beta",
    "DB_beta_sigma": "beta_sigma",
    "robust_step_size": "step_size",
    "SDMGrad_lamda": "lam",
    "SDMGrad_niter": "num_steps",
}


@pytest.mark.parametrize("number", range(9))
def test_every_step_is_the_authors(number, load_fixture, x64):
    fixture = load_fixture("authors_moments")
    rows, losses = np.array(fixture["rows"]), np.array(fixture["losses"])
    assert len(fixture["runs"]) == 9
    entry = fixture["runs"][number]
    name = entry["method"]
    options = {NAMES[k]: v for k, v in entry["options"].items()} | AUTHORS[name]
    tx = mtl.METHODS[name.removesuffix("_in_turn")].make(rows.shape[2], **options)
    given, extras = rows[:, 0], {}
    if name == "m_config_in_turn":
        given, extras["fresh"] = in_turn(given)
    if name == "sdmgrad":
        extras["other_task_grads"] = [rows[:, 1], rows[:, 2]]
    updates, states = run(tx, given, losses, **extras)
    wanted = entry.get("update", entry.get("weights"))
    found = updates if "update" in entry else states.info.task_weights
    # They add 1e-8 here and there.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-7 * np.abs(wanted).max())


# -------------------------------------------------------------- options and recurrences

OPTIONS = [
    ("excess_mtl", {"step_size": 0.5}, {"step_size": 0.5}),
    (
        "excess_mtl",
        {"step_size": 0.5, "num_warmup": 4},
        {"step_size": 0.5, "num_warmup": 4},
    ),
    ("moco", {"beta": 0.7}, {"beta": 0.7}),
    ("moco", {"gamma": 0.01}, {"gamma": 0.01}),
    ("moco", {"gamma": 0.01, "rho": 9.0}, {"gamma": 0.01, "rho": 9.0}),
    ("moco", {"beta_sigma": 0.5}, {"beta_sigma": 0.5}),
    ("moco", {"gamma_sigma": 0.5}, {"gamma_sigma": 0.5}),
    ("moco", {"lengths": "loss"}, {"by_loss": True}),
    ("moco", {"onto_simplex": "softmax"}, {"softmax": True}),
    ("db_mtl", {"beta": 0.3}, {"beta": 0.3}),
    ("db_mtl", {"beta_sigma": 0.5}, {"beta_sigma": 0.5}),
    ("db_mtl", {"bias_correction": False}, {"corrected": False}),
    ("m_config", {"b1": 0.5}, {"b1": 0.5}),
    ("m_config", {"b2": 0.9}, {"b2": 0.9}),
    ("m_config", {"eps": 0.1}, {"eps": 0.1}),
    ("modo", {"gamma": 0.01}, {"gamma": 0.01}),
    ("modo", {"gamma": 0.01, "rho": 9.0}, {"gamma": 0.01, "rho": 9.0}),
    ("sdmgrad", {"lam": 1.5}, {"lam": 1.5}),
    ("sdmgrad", {"preference": [4.0, 1, 2, 0.5]}, {"preference": [4.0, 1, 2, 0.5]}),
    ("sdmgrad", {"num_steps": 2}, {"num_steps": 2}),
    (
        "sdmgrad",
        {"num_steps": 2, "step_size": 0.1, "momentum": 0.0},
        {"num_steps": 2, "step_size": 0.1, "momentum": 0.0},
    ),
]


@pytest.mark.parametrize(
    ("name", "options", "changed"),
    OPTIONS,
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_options_do_what_the_formulas_say(name, options, changed):
    method = mtl.METHODS[name]
    other = method._replace(factory=functools.partial(method.factory, **options))
    oracle = functools.partial(oracles.ORACLES[name], **changed)
    laws.check_oracle(other, oracle, 4)
    with pytest.raises(AssertionError):  # and not what the defaults say
        laws.check_oracle(other, oracles.ORACLES[name], 4)


WRONG = [
    (mtl.moco, {"beta": 1.5}, "beta must be at most 1"),
    (mtl.moco, {"lengths": "long"}, "lengths must be one of"),
    (mtl.moco, {"onto_simplex": "max"}, "onto_simplex must be one of"),
    (mtl.db_mtl, {"beta": 1.0}, "beta must be below 1"),
    (mtl.m_config, {"b1": 1.0}, "b1 must be below 1"),
    (mtl.m_config, {"b2": 1.0}, "b2 must be below 1"),
    (mtl.m_config, {"eps": 0.0}, "eps must be positive"),
    (mtl.sdmgrad, {"momentum": 1.0}, "momentum must be below 1"),
    (mtl.sdmgrad, {"preference": [1.0, 1.0]}, "one number a task"),
    (mtl.excess_mtl, {"step_size": np.inf}, "step_size must be finite"),
    (mtl.modo, {"gamma": np.inf}, "gamma must be finite"),
    (mtl.modo, {"scale": "mean"}, "scale must be 'paper' or 'norm'"),
]


@pytest.mark.parametrize(("factory", "options", "words"), WRONG)
def test_what_is_out_of_range_is_refused(factory, options, words):
    with pytest.raises(ValueError, match=words):
        factory(3, **options)


# ---------------------------------------------------------------------------- ExcessMTL


def test_a_task_that_comes_later_is_measured_by_itself():
    """Its first risk counts as 1, as did that of the others at their first step."""
    rows = np.ones((6, 2, 4)) * [[1.0], [1000.0]]
    masks = np.array([[True, False]] * 3 + [[True, True]] * 3)
    tx = mtl.excess_mtl(2, step_size=1.0)
    _, states = run(tx, rows, task_mask=masks)
    weights = np.asarray(states.info.task_weights)
    np.testing.assert_array_equal(weights[:3], [[1, 0]] * 3)
    # Constant gradients: the first task's risk at step k is 1 / sqrt(k) of the first.
    gaps = np.log(weights[3:, 1] / weights[3:, 0])
    moved = np.cumsum(1 / np.sqrt([1, 2, 3]) - 1 / np.sqrt([4, 5, 6]))
    kept = np.asarray(states.log_weights)
    np.testing.assert_allclose(kept[:3], 0, atol=1e-6)  # alone it holds what it had
    np.testing.assert_allclose(gaps, moved, rtol=1e-5)


def test_a_task_without_a_gradient_has_no_first_risk_yet():
    """TorchJD divides by 1e-7 then, and gives the task all weight for ever."""
    rows = draw(8, 3, 6)
    rows[:3, 1] = 0
    _, states = run(mtl.excess_mtl(3, step_size=1.0), rows)
    weights = np.asarray(states.info.task_weights)
    assert np.all(np.asarray(states.first_risk)[:3, 1] == 0)
    assert np.all(np.asarray(states.first_risk)[3:, 1] > 0)
    assert weights.min() > 0.05
    np.testing.assert_allclose(weights.sum(1), 3, rtol=1e-6)


def test_no_weight_is_lost_for_good():
    """One task is far behind for long; then it has arrived, and the other has not."""
    rows = np.ones((60, 2, 1))
    rows[1:20, 0] = 1e3
    rows[20:, 0] = 0
    rows[20:, 1] = 1e3
    _, states = run(mtl.excess_mtl(2, step_size=1.0), rows)
    weights = np.asarray(states.info.task_weights)
    assert weights[19, 1] == 0  # of float32
    assert weights[-1, 1] > 1.99


# --------------------------------------------------------------------------------- MoCo


def test_moco_finds_the_shortest_combination(x64):
    """Of gradients that stay the same, without noise."""
    J = draw(1, 4, 6)[0] / 3
    tx = mtl.moco(4, rho=0.0)
    updates, states = run(tx, np.broadcast_to(J, (3000, *J.shape)))
    wanted = simplex_weights(J @ J.T)
    np.testing.assert_allclose(states.shares[-1] / 4, wanted, atol=1e-6)
    np.testing.assert_allclose(updates[-1], wanted @ J, atol=1e-6)


def test_moco_averages_noise(x64):
    """Its update is nearer to the noiseless one than MGDA's on each batch."""
    J = draw(1, 3, 8, seed=1)[0] / 2
    noisy = J + draw(2000, 3, 8, seed=2) / 2
    updates, _ = run(mtl.moco(3, beta=0.02, gamma=0.02, rho=0.0), noisy)
    exact = simplex_weights(J @ J.T) @ J
    single = np.stack([simplex_weights(K @ K.T) @ K for K in noisy[-300:]])
    ours = np.linalg.norm(updates[-300:] - exact, axis=1).mean()
    assert ours < 0.4 * np.linalg.norm(single - exact, axis=1).mean()


def test_moco_of_losses():
    tx = mtl.moco(2, lengths="loss")
    g = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    with pytest.raises(TypeError, match="losses"):
        tx.update(g, tx.init(g[0]))
    for loss in (2.0, -2.0):  # one below zero counts by its size
        losses = jnp.array([loss, 7.0])
        _, state = tx.update(g, tx.init(g[0]), losses=losses)
        tracked = np.asarray(state.aggregator.tracked)
        np.testing.assert_allclose(tracked, [[0.12, 0.16], [0, 0]], rtol=1e-6)


# ------------------------------------------------------------------------------- DB-MTL


def test_db_mtl_starts_at_full_length():
    """The authors' code starts at a tenth."""
    J, L = draw(1, 3, 5), np.array([[0.1, 2.0, 30.0]])
    full, _ = run(mtl.db_mtl(3), J, L)
    short, _ = run(mtl.db_mtl(3, bias_correction=False), J, L)
    np.testing.assert_allclose(short, 0.1 * full, rtol=1e-5)
    logs = J[0] / L[0][:, None]
    lengths = np.linalg.norm(logs, axis=1)
    wanted = lengths.max() * (logs / lengths[:, None]).sum(0)
    np.testing.assert_allclose(full[0], wanted, rtol=1e-5)


def test_db_mtl_does_not_see_units():
    rows, losses = draw(5, 3, 7), 10 ** np.abs(draw(5, 3, 1, seed=1)[..., 0])
    units = np.array([1.0, 1e2, 1e5])
    one, _ = run(mtl.db_mtl(3), rows, losses)
    other, _ = run(mtl.db_mtl(3), rows * units[:, None], losses * units)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-6 * np.abs(one).max())


def test_db_mtl_of_a_loss_below_zero():
    """The logarithm has no value; in the authors' code it is NaN."""
    rows = draw(1, 2, 5)
    one, _ = run(mtl.db_mtl(2), rows, [[0.5, 2.0]])
    other, _ = run(mtl.db_mtl(2), rows, [[0.5, -2.0]])
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["db_mtl", "m_config", "moco", "excess_mtl"])
def test_moments_of_low_precision_are_kept_in_float32(name):
    """Small steps would be lost in bfloat16: 1 + 0.001 is 1 there."""
    tx = mtl.METHODS[name].make(2)
    state = tx.init(jnp.zeros(3, jnp.bfloat16))
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    rows = jnp.ones((2, 3), jnp.bfloat16)
    updates, _ = tx.update(rows, state, rows[0], losses=jnp.ones(2))
    assert updates.dtype == jnp.bfloat16


# ----------------------------------------------------------------------------- M-ConFIG


def in_turn(rows):
    """One task's gradient is new at every step; the others' rows hold NaN."""
    fresh = np.eye(rows.shape[1], dtype=bool)[np.arange(len(rows)) % rows.shape[1]]
    return np.where(fresh[..., None], rows, np.nan), fresh


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_one_gradient_a_step(tasks, x64):
    rows = draw(20, tasks, 9)
    stale, fresh = in_turn(rows)
    found, _ = run(mtl.m_config(tasks), stale, fresh=fresh)
    wanted = oracles.m_config(rows, None, fresh=fresh)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)
    assert np.all(found[: tasks - 1] == 0)
    assert np.all(np.abs(found[tasks - 1 :]).max(1) > 0.01)
    # At the first combination every momentum is its task's only gradient.
    g = oracles.config(rows[:tasks][fresh[:tasks]])
    np.testing.assert_allclose(found[tasks - 1], g / (np.abs(g) + 1e-8), rtol=1e-9)


def test_absent_is_not_stale(x64):
    """A stale task's momentum takes part, an absent one's does not, and both wait."""
    rows = draw(12, 3, 9)
    fresh = np.ones((12, 3), bool)
    masks = np.ones((12, 3), bool)
    fresh[5:9, 1] = False
    masks[5:9, 1] = False
    stale, states = run(mtl.m_config(3), rows, fresh=fresh)
    absent, others = run(mtl.m_config(3), rows, task_mask=masks)
    np.testing.assert_allclose(stale, oracles.m_config(rows, None, fresh=fresh))
    assert np.all(np.linalg.norm(stale[5:9] - absent[5:9], axis=1) > 1e-2)
    for name in ("momenta", "momenta_seen"):
        np.testing.assert_array_equal(getattr(states, name), getattr(others, name))
    # An absent task is absent even if its gradient is said to be new.
    again, _ = run(mtl.m_config(3), rows, task_mask=masks, fresh=fresh | True)
    np.testing.assert_array_equal(again, absent)


def test_one_task_of_m_config_is_adam():
    import optax

    rows = draw(30, 1, 6)
    found, _ = run(mtl.m_config(1), rows)
    adam = optax.scale_by_adam()
    state, wanted = adam.init(jnp.zeros(6)), []
    for g in jnp.asarray(rows[:, 0]):
        update, state = adam.update(g, state)
        wanted.append(update)
    np.testing.assert_allclose(found, np.stack(wanted), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [jnp.ones(2, bool), jnp.ones(3), jnp.ones((3, 1), bool)]
)
def test_fresh_must_be_bools_a_task(wrong):
    tx = mtl.m_config(3)
    with pytest.raises(ValueError, match=r"fresh: expected bools of shape \(3,\)"):
        tx.update(jnp.ones((3, 2)), tx.init(jnp.zeros(2)), fresh=wrong)


# --------------------------------------------------------------------- MoDo and SDMGrad


def test_independent_samples_are_right_on_average(x64):
    """Noise of one batch with itself draws weights to the quieter task; of two not."""
    J = np.array([[1.0, 0.0, 0, 0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0, 0, 0, 0]])
    noise = draw(3000, 3 * 2, 8, seed=3).reshape(3000, 3, 2, 8)
    rows = J + noise * np.array([[0.2], [1.0]])  # the second task's gradient is noisy
    options = {"gamma": 0.01, "rho": 0.0}
    apart = weights_of("modo", options, rows)[1000:].mean(0)
    alike = weights_of("modo", options, rows[:, [0, 1, 1]])[1000:].mean(0)
    # Both rows have length 1, so the shortest combination has equal weights.
    np.testing.assert_allclose(apart, 0.5, atol=0.06)
    assert alike[0] > 0.8


def test_one_batch_given_twice_is_mgda(x64):
    J = draw(1, 3, 5, seed=4)[0] / 2
    steps = np.broadcast_to(J, (2000, 3, *J.shape))
    wanted = simplex_weights(J @ J.T)
    options = {"modo": {"rho": 0.0}, "sdmgrad": {"lam": 0.0}}
    for name, given in options.items():
        found = weights_of(name, given, steps)[-1]
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_sdmgrad_goes_to_its_preference():
    rows = draw(3, 9, 5).reshape(3, 3, 3, 5).astype(np.float32)
    tx = mtl.sdmgrad(3, lam=1e6, preference=[4.0, 1.0, 3.0])
    extras = {"other_task_grads": [rows[:, 1], rows[:, 2]]}
    _, states = run(tx, rows[:, 0], **extras)
    wanted = np.array([4, 1, 3]) / 8
    np.testing.assert_allclose(states.info.task_weights, [wanted] * 3, atol=1e-5)
    # Of the tasks that are present.
    masks = np.array([[True, False, True]] * 3)
    _, states = run(tx, rows[:, 0], task_mask=masks, **extras)
    wanted = np.array([4, 0, 3]) / 7
    np.testing.assert_allclose(states.info.task_weights, [wanted] * 3, atol=1e-5)


def test_sdmgrad_where_samples_disagree():
    """Every diagonal entry is negative: there is no length to divide by."""
    rows = draw(1, 3, 5).astype(np.float32)
    extras = {"other_task_grads": [rows, -rows]}
    _, states = run(mtl.sdmgrad(3), rows, **extras)
    np.testing.assert_allclose(states.info.task_weights[0], 1 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_other_batches_may_be_lazy(name):
    """And the steps are those of the stacked rows."""
    tx = mtl.METHODS[name].make(3)
    params = laws.mlp_params()
    batches = [laws.mlp_batch(rows=n) for n in (8, 9, 10)]
    jacobian = mtl.task_jacobian(laws.mlp_dict)

    @laws.quick_jit
    def both(params):
        lazy = [jacobian(params, *batch)[1] for batch in batches]
        rows = [mtl.materialize(g) for g in lazy]
        return [
            tx.update(g[0], tx.init(params), params, other_task_grads=(g[1], g[2]))
            for g in (lazy, rows)
        ]

    one, two = both(params)
    laws.assert_trees_close(one, two, 1e-5, name)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_other_batches_in_a_part_of_the_tree(name):
    """`shared_only` sees a part; whole trees are given, and cut to it."""
    tx = mtl.METHODS[name].make(2)
    rng = np.random.default_rng(5)
    one, two, three = (
        {
            "head": jnp.asarray(rng.standard_normal((2, 3)), jnp.float32),
            "trunk": jnp.asarray(rng.standard_normal((2, 4)), jnp.float32),
        }
        for _ in range(3)
    )
    params = {"head": jnp.zeros(3), "trunk": jnp.zeros(4)}
    shared = mtl.shared_only(tx, {"head": False, "trunk": True})
    found, _ = shared.update(
        one, shared.init(params), params, other_task_grads=(two, three)
    )
    wanted, _ = tx.update(
        one["trunk"],
        tx.init(params["trunk"]),
        other_task_grads=(two["trunk"], three["trunk"]),
    )
    np.testing.assert_allclose(found["trunk"], wanted, rtol=1e-6)
    np.testing.assert_allclose(found["head"], one["head"].sum(0), rtol=1e-6)


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        (None, TypeError, "other_task_grads=.*got NoneType"),
        ("rows", TypeError, "got dict"),
        (("rows",), TypeError, "two more batches.*a tuple of 1"),
        (("rows", "short"), ValueError, r"other_task_grads: leaf \['w'\].*\(2, 3\)"),
        (("rows", "other"), ValueError, "other_task_grads: .*structure"),
        (("rows", "ints"), TypeError, "other_task_grads: .*int32"),
    ],
)
def test_other_batches_must_be_a_pair_that_fits(name, given, kind, words):
    trees = {
        "rows": {"w": jnp.ones((2, 3))},
        "short": {"w": jnp.ones((1, 3))},
        "other": {"v": jnp.ones((2, 3))},
        "ints": {"w": jnp.ones((2, 3), jnp.int32)},
    }
    if isinstance(given, tuple):
        given = tuple(trees[n] for n in given)
    elif given is not None:
        given = trees[given]
    tx = mtl.METHODS[name].make(2)
    with pytest.raises(kind, match=f"(?s){words}"):
        tx.update(trees["rows"], tx.init({"w": jnp.zeros(3)}), other_task_grads=given)


# ------------------------------------------------------------------------ tasks' shares


@pytest.mark.parametrize("name", ["moco", "modo", "sdmgrad"])
def test_a_task_that_comes_back_has_the_share_it_left_with(name):
    """Present tasks share out what they held; nothing goes to or from absent ones."""
    rows = draw(9, 3, 6, seed=6).astype(np.float32) / 3
    masks = np.ones((9, 3), bool)
    masks[3:6, 1] = False
    tx = mtl.METHODS[name].make(3)
    extras = {"task_mask": masks}
    if name != "moco":
        extras["other_task_grads"] = [rows, rows]
    _, states = run(tx, rows, **extras)
    shares = np.asarray(states.shares)
    assert 0.05 < shares[2, 1] < 2.9
    np.testing.assert_array_equal(shares[3:6, 1], shares[2, 1])
    np.testing.assert_allclose(shares.sum(1), 3, rtol=1e-5)


def test_tasks_that_hold_nothing_start_anew_when_they_are_alone():
    """The third task's gradient is so short that it takes all shares."""
    rows = np.array([[[100.0, 0, 0], [0, 100, 0], [0, 0, 1e-3]]] * 4)
    masks = np.array([[True] * 3] * 2 + [[True, True, False]] * 2)
    updates, states = run(mtl.moco(3, beta=1.0, rho=0.0), rows, task_mask=masks)
    np.testing.assert_allclose(states.shares[1], [0, 0, 3], atol=1e-6)
    np.testing.assert_allclose(updates[2], [50, 50, 0], rtol=1e-5)
    assert np.all(np.isfinite(np.asarray(states.shares)))


# -------------------------------------------------------------------- broken gradients


BREAKS = {"nan": np.nan, "inf": np.inf, "large": 1e30}


@pytest.mark.parametrize("what", BREAKS)
@pytest.mark.parametrize(
    "name", ["db_mtl", "excess_mtl", "m_config", "moco", "modo", "sdmgrad"]
)
def test_a_broken_gradient_is_not_remembered(name, what):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((30, 3, 6)).astype(np.float32)
    rows[4:6, 1] = BREAKS[what]
    rows = jnp.asarray(rows)
    method = mtl.METHODS[name]
    extras = {"losses": jnp.ones((30, 3))}
    if "other_task_grads" in method.needs:
        extras["other_task_grads"] = [rows, rows[:, :, ::-1]]
    updates, states = run(method.make(3), rows, **extras)
    assert np.all(np.isfinite(updates[8:]))
    for path, leaf in laws.history(jax.tree.map(lambda x: x[-1], states)):
        assert np.all(np.isfinite(leaf)), path


def test_a_broken_loss_is_not_remembered():
    rows = jnp.asarray(np.random.default_rng(3).standard_normal((9, 3, 6)), jnp.float32)
    losses = jnp.ones((9, 3)).at[2, 1].set(jnp.nan)
    for tx in (mtl.db_mtl(3), mtl.moco(3, lengths="loss")):
        updates, _ = run(tx, rows, losses=losses)
        assert np.all(np.isfinite(updates[4:]))
