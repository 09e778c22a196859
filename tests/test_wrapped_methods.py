"""The laws around wrappers: a loss weighting, a Gramian one with and without history.

Each wrapper stands around each of them (and around a method on whole rows, where it
takes one), and wrappers stand in one another as they are meant to. What a wrapper does
by itself is tested in its own file.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest

import mtl_optax as mtl

F = laws.Forms
NOBODY, EVERYTHING = frozenset(), frozenset({"lazy", "for a while"})


class Wrapped(NamedTuple):
    """A row, and which of the laws that are not for all hold for it."""

    method: Any
    holds: frozenset = EVERYTHING
    kinds: tuple = ("float32", "bfloat16", "mixed")


def in_two_groups(params):
    """Both of several parameters: in one dimension all gradients are parallel."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "w" in str(path), params)


def everything(params):
    return True


# name: wrap, whether it takes methods on whole rows, what it needs, laws that hold.
# Between its steps `accumulate_task_grads` gives updates of zero length, beside which
# `check_lazy` compares; and who was absent at the last of its micro-batches may have
# been there before. `update_every` remembers for whom its weights are.
WRAPPERS = {
    "smooth_weights": (mtl.smooth_weights, False, NOBODY, EVERYTHING),
    "subsample_tasks": (
        lambda tx: mtl.subsample_tasks(tx, 2),
        True,
        frozenset({"key"}),
        EVERYTHING,
    ),
    "accumulate_task_grads": (
        lambda tx: mtl.accumulate_task_grads(tx, 2),
        True,
        NOBODY,
        NOBODY,
    ),
    "accumulate_task_grads of one": (
        lambda tx: mtl.accumulate_task_grads(tx, 1),
        True,
        NOBODY,
        frozenset({"lazy"}),
    ),
    "update_every": (
        lambda tx: mtl.update_every(tx, 3),
        False,
        NOBODY,
        frozenset({"lazy"}),
    ),
    "per_group": (
        lambda tx: mtl.per_group(tx, in_two_groups),
        True,
        NOBODY,
        EVERYTHING,
    ),
    "shared_only": (
        lambda tx: mtl.shared_only(tx, everything),
        True,
        NOBODY,
        EVERYTHING,
    ),
    "skip_nonfinite_tasks": (mtl.skip_nonfinite_tasks, True, NOBODY, EVERYTHING),
}
AROUND = ("imtl_g", "uncertainty_weighting", "task_tensioner", "scale_by_mao")


def around(label, wrap, inside, needs=NOBODY):
    """A row whose combiner stands inside a wrapper."""
    method = mtl.METHODS[inside]
    return method._replace(
        name=f"{label}({inside})",
        factory=lambda num_tasks: wrap(method.make(num_tasks)),
        needs=method.needs | needs,
        claims=frozenset(),
    )


SINGLE = [
    Wrapped(around(label, wrap, inside, needs), holds)
    for label, (wrap, rows_too, needs, holds) in WRAPPERS.items()
    for inside in AROUND
    if rows_too or mtl.METHODS[inside].kind == "weighting"
]


def few_at_a_time(tx):
    """Adam's own state has the parameters' dtype, in bfloat16 too."""
    chain = optax.chain(mtl.subsample_tasks(tx, 2), optax.adam(0.1))
    return mtl.accumulate_task_grads(chain, 2, num_tasks=tx.num_tasks)


def safely(tx):
    shared = mtl.shared_only(mtl.smooth_weights(tx), everything)
    return mtl.skip_nonfinite_tasks(shared)


NESTED = [
    Wrapped(
        around(
            "update_every(smooth_weights)",
            lambda tx: mtl.update_every(mtl.smooth_weights(tx), 3),
            "cagrad",
        ),
        frozenset({"lazy"}),
    ),
    Wrapped(around("skip(shared_only(smooth_weights))", safely, "mgda")),
    Wrapped(
        around(
            "accumulate(chain(subsample_tasks, adam))",
            few_at_a_time,
            "imtl_g",
            frozenset({"key"}),
        ),
        NOBODY,
        ("float32",),
    ),
    Wrapped(
        around(
            "per_group(smooth_weights)",
            lambda tx: mtl.per_group(mtl.smooth_weights(tx), in_two_groups),
            "imtl_g",
        )
    ),
]
ROWS = SINGLE + NESTED
QUICK = {f"{label}(imtl_g)" for label in WRAPPERS}


def each(law=None, fast=QUICK):
    """One test a row; those that are not among `fast` are in the slow set."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(
                row,
                id=row.method.name,
                marks=() if row.method.name in fast else pytest.mark.slow,
            )
            for row in ROWS
            if law is None or law in row.holds
        ],
    )


every = each(fast={row.method.name for row in ROWS})


@every
def test_types(row):
    for kind in row.kinds[-1:]:
        laws.check_types(row.method, kind)


@pytest.mark.slow
@every
def test_types_in_every_precision(row, x64):
    for kind in (*row.kinds, "float64"):
        laws.check_types(row.method, kind)


@each()
def test_refuses_wrong_input(row):
    laws.check_wrong_input(row.method)


@each(fast=())
def test_compiles_once_and_continues_from_a_checkpoint(row):
    laws.check_compiles_once(row.method)
    laws.check_restored(
        row.method, lambda state: jax.tree.map(lambda x: jnp.array(np.array(x)), state)
    )


@each(fast=())
def test_finite(row):
    for num_tasks in (2, 3):
        laws.check_finite(row.method, num_tasks)


@each(law="lazy", fast={"subsample_tasks(imtl_g)"})
def test_stacked_is_lazy(row):
    laws.check_lazy(row.method, F("dict"))


@pytest.mark.slow
@pytest.mark.parametrize("form", [F("array"), F("one batch a task", masked=True)])
@each(law="lazy", fast=())
def test_stacked_is_lazy_in_other_forms(row, form):
    laws.check_lazy(row.method, form)


@each(fast={"smooth_weights(imtl_g)", "accumulate_task_grads(imtl_g)"})
def test_masked_is_absent(row):
    laws.check_absent(row.method)


@each(law="for a while", fast={"smooth_weights(imtl_g)", "subsample_tasks(imtl_g)"})
def test_masked_for_a_while(row):
    laws.check_absent_for_a_while(row.method)


@each(fast={"accumulate_task_grads(imtl_g)"})
def test_what_an_absent_row_holds_does_not_matter(row):
    """What is left of the law above where a state may move for others' sake."""
    rows, losses = laws.draws(3)
    masks = np.random.default_rng(13).uniform(size=losses.shape) < 0.7
    masks[:, 5:8] = False
    clean = laws.trajectories(row.method, rows, losses, masks)
    spoiled = np.where(masks[..., None], rows, np.nan)
    given = np.where(masks, losses, np.inf)
    run = laws.trajectories(row.method, spoiled, given, masks)
    np.testing.assert_array_equal(run.updates, clean.updates)
    laws.assert_bits_equal(run.states, clean.states)


def test_every_wrapper_stands_around_each_kind_of_method():
    kinds = {mtl.METHODS[name].kind for name in AROUND}
    assert kinds == {"weighting", "aggregator"}
    needs = [mtl.METHODS[name].needs for name in AROUND]
    assert {"losses"} in needs
    assert {"gramian"} in needs
    assert len(SINGLE) == 4 * len(WRAPPERS) - 2
