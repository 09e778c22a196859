"""TorchJD 0.18 on given matrices: agreement where it is exact, and where it is wrong.

`fixtures/torchjd_0_18.json` holds TorchJD's outputs in float64. Its projections are
regularised (the entries ``_reg1e-10`` hardly), its MGDA stops early (``_tight`` later),
and CAGrad, FairGrad and Nash-MTL go through solvers that stop at 1e-4 to 1e-3. What an
exact answer is there, the conditions of optimality say, evaluated in NumPy.
"""

import functools

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest

import mtl_optax as mtl

CASES = (
    "base_2x3",
    "three_3x3",
    "rand_3x10",
    "scaled_3x10",
    "lowrank_4x3_r1",
    "zero_row_3x4",
)


@pytest.fixture(scope="module")
def torchjd(load_fixture):
    return load_fixture("torchjd_0_18")["cases"]


TASKS, SIZE = 5, 10  # all matrices are filled up to this, with tasks that are absent


@functools.cache
def compiled(factory, precision):
    """One program a method, for all matrices and for traced arguments."""

    def step(rows, mask, arguments):
        tx = factory(TASKS, **arguments)
        params = jnp.zeros(rows.shape[1:], rows.dtype)
        updates, state = tx.update(
            rows, tx.init(params), task_mask=mask, key=jax.random.key(0)
        )
        return updates, state.info.task_weights

    return laws.quick_jit(step)


def combine(factory, J, **arguments):
    """``(update, weights)`` of rows ``[T, P]`` in their own precision."""
    J = np.asarray(J)
    tasks, size = J.shape
    rows = np.full((TASKS, SIZE), np.nan, J.dtype)
    rows[:tasks] = np.pad(J, ((0, 0), (0, SIZE - size)))
    arguments = {
        name: np.pad(np.asarray(x, J.dtype), (0, TASKS - tasks) if np.ndim(x) else 0)
        for name, x in arguments.items()
    }
    step = compiled(factory, jnp.result_type(float).name)
    update, weights = step(rows, np.arange(TASKS) < tasks, arguments)
    return np.asarray(update)[:size], np.asarray(weights)[:tasks]


def apart(found, wanted):
    wanted = np.asarray(wanted)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def preference(num_tasks):
    """That of TorchJD's ``_pref`` entries."""
    weights = np.arange(1.0, num_tasks + 1)
    return weights / weights.sum()


# ------------------------------------------------------------ where TorchJD is exact

EXACT = {
    "Mean": mtl.mean,
    "Sum": mtl.constant_weights,
    "UPGrad_reg1e-10": mtl.upgrad,
    "DualProj_reg1e-10": mtl.dualproj,
    "AlignedMTL_min": mtl.aligned_mtl,
    "AlignedMTL_median": functools.partial(mtl.aligned_mtl, singular="median"),
    "AlignedMTL_rmse": functools.partial(mtl.aligned_mtl, singular="rmse"),
    "AlignedMTL_pref": mtl.aligned_mtl,
    "ConFIG": mtl.config,
    "ConFIG_pref": mtl.config,
    "IMTLG": mtl.imtl_g,
    "MGDA_tight": mtl.mgda,
    "PCD": mtl.pcd,
}
# Not exact, and by how much: a regularised Gramian, rows of lengths 1 to 100.
REGULARISED = {("scaled_3x10", "UPGrad_reg1e-10"): 3e-5}


@pytest.mark.parametrize("entry", EXACT)
@pytest.mark.parametrize("case", CASES)
def test_agreement_where_torchjd_is_exact(case, entry, torchjd, x64):
    J = np.array(torchjd[case]["J"])
    given = {"preference": preference(len(J))} if entry.endswith("pref") else {}
    update, _ = combine(EXACT[entry], J, **given)
    wanted = torchjd[case]["out"][entry]
    if not np.any(wanted):
        assert np.abs(update).max() < 1e-12
        return
    assert apart(update, wanted) < REGULARISED.get((case, entry), 1e-6)


def test_trimmed_mean(torchjd, x64):
    cases = {name: case for name, case in torchjd.items() if len(case["J"]) > 2}
    assert len(cases) == 5
    for case in cases.values():
        J = jnp.array(case["J"])
        tx = mtl.trimmed_mean(len(J), trim_number=1)
        update, _ = tx.update(J, tx.init(J[0]))
        np.testing.assert_allclose(update, case["out"]["TrimmedMean_1"], rtol=1e-12)


def test_excess_mtl(torchjd, x64):
    """Three calls: the rows, twice as long, in reverse. TorchJD's weights sum to 1."""
    for case in torchjd.values():
        J = np.array(case["J"])
        tx = mtl.excess_mtl(len(J), step_size=1.0, raw_first_risk=True)
        state = tx.init(J[0])
        step = jax.jit(tx.update)
        for rows, wanted in zip(
            (J, 2 * J, J[::-1]), case["out"]["ExcessMTL_steps"], strict=True
        ):
            update, state = step(jnp.asarray(rows), state)
            assert apart(np.asarray(update) / len(J), wanted) < 1e-6


KRUM = {
    selected: functools.partial(mtl.krum, num_selected=selected, num_byzantine=1)
    for selected in (1, 3, 4)
}


def test_krum(torchjd):
    """Of three, TorchJD takes the fourth row; it ties with the second, taken here."""
    case = torchjd["lowrank_4x3_r1"]
    J = np.array(case["J"], np.float32)
    np.testing.assert_allclose(combine(KRUM[1], J)[0], case["out"]["Krum_1_1"])
    third = np.array(case["out"]["Krum_1_3"]) + (J[1] - J[3]) / 3
    np.testing.assert_allclose(combine(KRUM[3], J)[0], third, rtol=1e-6)


def test_values_that_torchjd_pins(torchjd):
    """From its own unit tests; two tasks, so no order matters."""
    J = np.array(torchjd["base_2x3"]["J"], np.float32)
    for factory in (mtl.pcgrad, mtl.gradvac):
        update, weights = combine(factory, J)
        np.testing.assert_allclose(update, [0.5848, 3.8012, 3.8012], atol=1e-4)
        np.testing.assert_allclose(weights, [2.2222, 1.5789], atol=1e-4)
    rows = [[1, 1, 1], [1, 0, 1], [75, -666, 23], [1, 2, 3], [2, 0, 1]]
    update, weights = combine(KRUM[4], np.float32(rows))
    np.testing.assert_allclose(update, [1.25, 0.75, 1.5])
    np.testing.assert_allclose(weights, [0.25, 0.25, 0, 0.25, 0.25])
    update, weights = combine(mtl.upgrad, np.float32([[-1, 1], [2, 4]]))
    np.testing.assert_allclose(update, [0.5, 2.5], rtol=1e-6)
    _, weights = combine(mtl.upgrad, np.ones((5, 5), np.float32))
    np.testing.assert_allclose(weights, np.full(5, 1 / 5), rtol=1e-6)


def test_pcgrad_is_upgrad_for_two_tasks():
    rng = np.random.default_rng(0)
    for J in rng.standard_normal((20, 2, 5)).astype(np.float32):
        one, _ = combine(mtl.pcgrad, J)
        other, _ = combine(mtl.upgrad, J, preference=np.ones(2))
        np.testing.assert_allclose(one, other, atol=1e-5)


# ------------------------------------- where TorchJD carries the error of its solvers


def root_residual(J, x, alpha):
    """Of ``G x = x^(-1 / alpha)``, relative to the sizes that are added up."""
    G = J @ J.T
    right = x ** (-1 / alpha)
    return np.max(np.abs(G @ x - right) / (np.abs(G) @ x))


SOLID = [c for c in CASES if c != "zero_row_3x4"]


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
@pytest.mark.parametrize("case", SOLID)
def test_fairgrad_solves_its_equation(case, alpha, torchjd, x64):
    J = np.array(torchjd[case]["J"])
    update, x = combine(mtl.fairgrad, J, alpha=alpha)
    assert root_residual(J, x, alpha) < 1e-10
    assert apart(update, torchjd[case]["out"][f"FairGrad_{alpha}"]) < 5e-3
    _, x = combine(mtl.fairgrad, J.astype(np.float32), alpha=alpha)
    assert root_residual(J, x.astype(np.float64), alpha) < 1e-5


@pytest.mark.parametrize("case", SOLID)
def test_nash_is_fairgrad_at_its_own_length(case, torchjd, x64):
    J = np.array(torchjd[case]["J"])
    update, a = combine(mtl.nash_mtl, J)
    frobenius = np.linalg.norm(J @ J.T)
    length = min(1, np.sqrt(frobenius * len(J)))
    _, x = combine(mtl.fairgrad, J, alpha=1.0)
    np.testing.assert_allclose(np.linalg.norm(update), length, rtol=1e-9)
    np.testing.assert_allclose(a / a.sum(), x / x.sum(), rtol=1e-9)
    # The CCP rounds of TorchJD stop at 1e-3 on even rows, sooner on uneven ones.
    off = 2e-3 if case != "scaled_3x10" else 0.2
    assert apart(update, torchjd[case]["out"]["NashMTL"]) < off


@pytest.mark.parametrize("c", [0.1, 0.4, 0.5, 1.0])
@pytest.mark.parametrize("case", SOLID)
def test_cagrad_has_no_duality_gap(case, c, torchjd, x64):
    """The worst task's gain is what no direction in the ball can exceed."""
    J = np.array(torchjd[case]["J"])
    update, weights = combine(mtl.cagrad, J, c=c)
    g0 = J.mean(0)
    radius = c * np.linalg.norm(g0)
    assert np.linalg.norm(update - g0) <= radius * (1 + 1e-9)
    w = weights - 1 / len(J)
    w = w / w.sum()
    bound = (w @ J) @ g0 + radius * np.linalg.norm(w @ J)
    size = np.linalg.norm(g0) * np.linalg.norm(J, axis=1).max()
    assert bound - (J @ update).min() < 1e-9 * size
    assert w.min() > -1e-12
    assert apart(update, torchjd[case]["out"][f"CAGrad_{c}"]) < 2e-3


# ------------------------------------------------------------- where TorchJD is wrong


def cosines(J, update):
    return J @ update / np.linalg.norm(J, axis=1) / np.linalg.norm(update)


@pytest.mark.parametrize("ratio", [1, 30, 1e3, 1e6])
def test_projections_do_not_conflict_however_long_a_row(ratio):
    """TorchJD's UPGrad has a cosine of -0.036 at 30, -0.84 at 1000."""
    J = np.float32([[-4, 1, 1], [6, 1, 1]]) * np.float32([[ratio], [1]])
    for factory in (mtl.upgrad, mtl.dualproj):
        update, _ = combine(factory, J)
        assert cosines(J, update).min() > -1e-6


@pytest.mark.parametrize("size", [1e-10, 1e-3, 1e10])
def test_no_absolute_thresholds(size):
    """TorchJD's UPGrad and DualProj are the mean at 1e-3, its CAGrad zero."""
    J = np.float32([[-4, 1, 1], [6, 1, 1]])
    for factory in (mtl.upgrad, mtl.dualproj, mtl.cagrad, mtl.imtl_g):
        update, _ = combine(factory, J)
        scaled, _ = combine(factory, J * np.float32(size))
        np.testing.assert_allclose(scaled / size, update, rtol=1e-5, atol=1e-5)


def test_a_dead_task_does_not_freeze_cagrad(torchjd, x64):
    """TorchJD's is zero as soon as one gradient is."""
    J = np.array(torchjd["zero_row_3x4"]["J"])
    assert not np.any(torchjd["zero_row_3x4"]["out"]["CAGrad_0.5"])
    update, _ = combine(mtl.cagrad, J, c=0.5)
    g0 = J.mean(0)
    assert np.linalg.norm(update - g0) <= 0.5 * np.linalg.norm(g0) * (1 + 1e-9)
    # Among directions in the ball, the best for the two tasks that are alive.
    alive = J[[0, 2]]
    rng = np.random.default_rng(0)
    others = rng.standard_normal((20000, 4))
    others = others / np.linalg.norm(others, axis=1, keepdims=True)
    others = g0 + 0.5 * np.linalg.norm(g0) * others
    assert (alive @ update).min() > (others @ alive.T).min(1).max() - 1e-9


def test_a_dead_task_takes_no_part_in_a_bargain(torchjd, x64):
    """TorchJD's Nash-MTL gives the mean direction."""
    J = np.array(torchjd["zero_row_3x4"]["J"])
    for factory in (mtl.nash_mtl, mtl.fairgrad):
        update, _ = combine(factory, J)
        alone, _ = combine(factory, J[[0, 2]])
        np.testing.assert_allclose(update, alone, rtol=1e-9)
    wanted = torchjd["zero_row_3x4"]["out"]["FairGrad_1"]
    assert apart(combine(mtl.fairgrad, J)[0], wanted) < 2e-3


@pytest.mark.parametrize("ratio", [1, 10, 1e3, 1e6])
def test_a_bargain_does_not_see_the_lengths_of_rows(ratio):
    """TorchJD's cosine falls from 0.28 to 0.15 at 10 and to -0.8 at 1000."""
    J = np.float32([[-4, 1, 1], [6, 1, 1]]) * np.float32([[ratio], [1]])
    for factory in (mtl.nash_mtl, mtl.fairgrad):
        update, _ = combine(factory, J)
        np.testing.assert_allclose(cosines(J, update), 0.28180, atol=2e-5)


@pytest.mark.parametrize("rows", [[[1, 2, 3]], [[0, 0, 0], [0, 0, 0]]])
def test_nash_takes_one_row_and_no_gradient(rows):
    """TorchJD's raises."""
    update, _ = combine(mtl.nash_mtl, np.float32(rows))
    assert np.all(np.isfinite(update))
    if np.any(rows):
        np.testing.assert_allclose(cosines(np.float32(rows), update), 1, rtol=1e-6)
