"""Promises hold numerically: random draws of all lengths and scales, in float32.

The draws and what is looked at are those of `mtl_optax.bench.promises`.
"""

import functools
import math

import laws
import pytest

import mtl_optax as mtl
from mtl_optax.bench import promises

NON_CONFLICTING, INVARIANT = (
    [name for name, m in mtl.METHODS.items() if claim in m.claims]
    for claim in ("non_conflicting", "row_scale_invariant")
)
ANY = [name for name in mtl.METHODS if name in {*NON_CONFLICTING, *INVARIANT}]

# Scaling rows by factors that are no powers of two rounds every entry by half an eps,
# 6e-8, and so do the Gramian and the sum. With 10 T <= P gaussian rows are close to
# orthogonal (the Gramian's condition is below 10) and a direction moves by a few of
# these, 1e-6 at most as measured: this leaves a margin of ten. Elsewhere the condition,
# up to 1e7, multiplies it.
TURNED = 1e-5


def least_cosine(row):
    """What counts as a conflict.

    With as many tasks as parameters or more, strongly conflicting rows nearly cancel
    (the Gramian's condition is a few thousand and more), and its rounding turns an
    update of a thousandth of their length by a few times as much.
    """
    return -promises.CONFLICT if row.tasks < row.size else -10 * promises.CONFLICT


def well_conditioned(row):
    return row.family == "plain" and 10 * row.tasks <= row.size


@functools.cache
def measured(method, tasks, draws):
    jit = laws.quick_jit
    return promises.ours(draws, tasks=[tasks], methods=[method], jit=jit)


def check(method, tasks, draws):
    """Every cell of `method`; the failures name the cell."""
    rows = measured(method, tasks, draws)
    assert sum(row.draws for row in rows) == 72 * draws
    broken = []
    for row in rows:
        found = {"failed": row.failed > 0}
        # Not every method has a solver.
        found["residual"] = not math.isnan(row.residual) and row.residual >= 1e-5
        if method in NON_CONFLICTING:
            found["smallest_cosine"] = row.smallest_cosine < least_cosine(row)
        if method in INVARIANT and well_conditioned(row):
            found["turned"] = not row.turned < TURNED
        broken += [(name, getattr(row, name), row) for name in found if found[name]]
    lines = [f"{name} = {value:.2g} in {row}" for name, value, row in broken]
    assert not broken, f"{len(broken)} promises broken:\n" + "\n".join(lines[:10])


# Every method at one of two numbers of tasks.
@pytest.mark.parametrize(("at", "method"), list(enumerate(ANY)), ids=ANY)
def test_promises_hold_on_a_few_draws(at, method):
    check(method, tasks=(2, 5)[at % 2], draws=2)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", promises.TASKS)
@pytest.mark.parametrize("method", ANY)
def test_promises_hold_on_thousands_of_draws(method, tasks):
    check(method, tasks, draws=20)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", promises.TASKS)
@pytest.mark.parametrize("method", NON_CONFLICTING)
def test_conflicts_are_rounding_also_where_gradients_cancel(method, tasks):
    """No draw is left out: in units of eps times the sum of what is added up."""
    worst = max(measured(method, tasks, 20), key=lambda row: row.roundings)
    assert worst.roundings < 8, worst
