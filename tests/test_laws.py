"""The table of methods x laws: every registered method obeys every law of the design.

The laws are functions in `laws`; `test_laws_are_tested` runs each on a deliberately
broken method. Law 10 on eight devices is in `test_laws_sharded`.
"""

import pickle

import broken
import jax
import jax.numpy as jnp
import laws
import numpy as np
import orbax.checkpoint
import pytest
from oracles import ORACLES

import mtl_optax as mtl

METHODS = list(mtl.METHODS.values())
F = laws.Forms


def exempt(method):
    return {exemption.law for exemption in method.exempt}


def each(methods, law=None, fast=METHODS):
    """One test a method, but for those whose row exempts it from the law.

    Methods that are not among `fast` are tested in the slow set.
    """
    bound = [
        pytest.param(m, marks=() if m in fast else pytest.mark.slow, id=m.name)
        for m in methods
        if law not in exempt(m)
    ]
    return pytest.mark.parametrize("method", bound)


every = each(METHODS)
# Laws that compile with default options take seconds a method: the whole in-graph
# solver goes through all of XLA's passes.
every_compiled = each(METHODS, fast=laws.one_of_each_sort())
every_kind = each(METHODS, fast=laws.one_of_each_kind())
tasks = pytest.mark.parametrize(
    "num_tasks",
    [pytest.param(t, marks=() if t == 3 else pytest.mark.slow) for t in laws.TASKS],
)


# -------------------------------------------------------------------------- law 1


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "mixed"])
@every
def test_law_1_types(method, kind):
    laws.check_types(method, kind)


@every
def test_law_1_types_in_float64(method, x64):
    laws.check_types(method, "float64")
    laws.check_types(method, "mixed")


# -------------------------------------------------------------------------- law 2


@every_compiled
def test_law_2_compiles_once(method):
    laws.check_compiles_once(method)


@every
def test_law_2_and_asks_for_full_precision(method):
    laws.check_precision(method)


# -------------------------------------------------------------------- laws 3 and 12


@every_kind
def test_law_3_stacked_is_lazy(method):
    laws.check_lazy(method, F("dict"))


OTHER_FORMS = [
    F("array"),
    F("dict", masked=True),
    F("one batch a task"),
    F("array", jnp.bfloat16),
]
RARE_FORMS = [
    F("array", masked=True),
    F("one batch a task", masked=True),
    F("dict", jnp.bfloat16),
    F("one batch a task", jnp.bfloat16),
    F("array", jnp.bfloat16, masked=True),
]


def form_name(form):
    masked = ", masked" if form.masked else ""
    return f"{form.losses} {jnp.dtype(form.dtype).name}{masked}"


@pytest.mark.parametrize(
    "form",
    [
        form if form.losses != "array" else pytest.param(form, marks=pytest.mark.slow)
        for form in OTHER_FORMS
    ],
    ids=form_name,
)
@each(laws.one_of_each_kind(), fast=laws.one_of_each_sort())
def test_law_3_whatever_the_losses(method, form):
    laws.check_lazy(method, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", [F("dict"), *OTHER_FORMS, *RARE_FORMS], ids=form_name)
@pytest.mark.parametrize("num_tasks", [2, 6])
@each(laws.one_of_each_kind())
def test_law_3_in_every_form(method, num_tasks, form):
    laws.check_lazy(method, form, num_tasks)


@pytest.mark.slow
@pytest.mark.parametrize("form", [F("dict", masked=True), F("array", jnp.bfloat16)])
@every
def test_law_3_masked_and_in_low_precision(method, form):
    laws.check_lazy(method, form)


# -------------------------------------------------------------------------- law 4


@each(METHODS, law=4, fast=laws.one_of_each_kind())
def test_law_4_one_task_is_plain_training(method):
    laws.check_one_task(method)


# -------------------------------------------------------------------------- law 6


@tasks
@every
def test_law_6_finite(method, num_tasks):
    laws.check_finite(method, num_tasks)


@pytest.mark.slow
@every
def test_law_6_finite_for_many_tasks(method):
    laws.check_finite(method, 20)


# -------------------------------------------------------------------- laws 5 and 7


CLAIMED = [(m, c) for m in METHODS for c in laws.CLAIMS if c in m.claims]
UNCLAIMED = [(m, c) for m in METHODS for c in laws.CLAIMS if c not in m.claims]

# Inputs `(rows [T, <= 18], losses [T])`, the same at every step, on which a method that
# does not make the claim breaks it. One of them does so for each such method.
COUNTER_EXAMPLES = {
    "non_conflicting": [
        ([[10, 0], [-1, 1]], [1, 1]),  # the long row wins
        ([[1, 0], [-10, 1]], [1, 1]),
        ([[-2, 3, -2], [-2, -3, -3], [2, -1, 2]], [1, 10, 1]),
        ([[1], [-1], [1]], [1, 1, 1]),  # equal projections on all: there are none
    ],
    "permutation_equivariant": [
        ([[3, 0, 1], [-1, 2, 0]], [2, 1]),
        ([[-2, 3, -2], [-2, -3, -3], [2, -1, 2]], [1, 10, 1]),
    ],
    "scale_equivariant": [
        ([[3, 0], [0, 1]], [10, 0.1]),
        ([[3, 0, 0], [-1, 1, 0], [0, 1, 2]], [10, 1, 0.1]),
        ([[1e-6, 0], [-1, 1]], [1, 1]),  # about an absolute epsilon
    ],
    "row_scale_invariant": [
        ([[3, 0], [0, 1]], [10, 0.1]),
        ([[3, 0, 0], [1, 1, 0], [0, 1, 2]], [10, 1, 0.1]),
        ([[3e-9, 0], [0, 1]], [1, 1]),  # below Adam's epsilon
        ([[1, 0, 0], [1, 1, 0], [0, 1, 3]], [1, 1, 1]),
        ([[1e-6, 0], [-1, 1]], [1, 1]),  # about an absolute epsilon
        ([[1], [-1], [1]], [1, 1, 1]),  # what they agree on may turn round
    ],
    "stops_at_pareto_stationary": [
        ([[1, 0], [-2, 0]], [1, 1]),  # opposite
        ([[0, 0], [1, 1]], [1, 1]),  # one task has arrived
        ([[1, 0], [0, 1], [-1, -2]], [1, 10, 0.1]),
    ],
    "linear_under_scaling": [
        ([[3, 0], [0, 1]], [10, 0.1]),
        ([[3, 0, 0], [-1, 1, 0], [0, 1, 2]], [10, 1, 0.1]),
        ([[1, 0, 0], [1, 1, 0], [0, 1, 3]], [1, 1, 1]),
        ([[*[0] * 17, 100], [30, *[0] * 17]], [1, 1]),  # a step of 0.01 goes far
        ([[1e-6, 0], [-1, 1]], [1, 1]),  # about an absolute epsilon
        ([[3e-4, 0], [-1, 1]], [1, 1]),  # to and fro about an absolute epsilon
    ],
}


@tasks
@pytest.mark.parametrize(
    ("method", "claim"), CLAIMED, ids=lambda x: getattr(x, "name", x)
)
def test_law_7_claims_hold(method, claim, num_tasks):
    laws.check_claim(method, claim, num_tasks)


@pytest.mark.parametrize(
    ("method", "claim"),
    [
        pytest.param(
            *pair,
            marks=() if pair[0] in laws.one_of_each_kind() else pytest.mark.slow,
        )
        for pair in UNCLAIMED
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_law_7_what_is_not_claimed_is_refuted(method, claim):
    laws.check_refuted(method, claim, COUNTER_EXAMPLES[claim])


def test_law_7_knows_every_claim():
    known = set(laws.CLAIMS)
    assert known == set(COUNTER_EXAMPLES)
    assert known == set(mtl.Method.__annotations__["claims"].__args__[0].__args__)
    assert all(m.claims <= known for m in METHODS)


# -------------------------------------------------------------------------- law 8


def test_law_8_every_method_has_an_oracle():
    assert set(ORACLES) == set(mtl.METHODS)


@tasks
@every
def test_law_8_solvers_and_oracles(method, num_tasks):
    laws.check_solver(method, num_tasks)
    laws.check_oracle(method, ORACLES[method.name], num_tasks)


@every_kind
def test_law_8_oracles_in_float64(method, x64):
    laws.check_oracle(method, ORACLES[method.name], 3, np.float64, 1e-7)


# -------------------------------------------------------------------------- law 9

WEIGHTINGS = [m for m in METHODS if m.kind == "weighting"]
LOSS_ONLY = [m for m in WEIGHTINGS if not laws.sees_gramian(m)]


@each(METHODS, law=9, fast=laws.one_of_each_sort())
def test_law_9_memory_does_not_grow_with_tasks(method):
    laws.check_memory(method)


@each([m for m in laws.one_of_each_kind() if m.kind == "weighting"])
def test_law_9_memory_beside_stacked(method):
    laws.check_memory_beside_stacked(method)


@pytest.mark.parametrize("place", laws.PLACES)
@each(LOSS_ONLY, fast=laws.one_of_each_kind())
def test_law_9_one_backward_pass(method, place):
    laws.check_one_backward_pass(method, place)


# ------------------------------------------------------------------------- law 10


def through_numpy(folder):
    """Leaves by ``np.savez``, the structure by `pickle`."""

    def save_and_restore(state):
        leaves, _ = jax.tree.flatten(state)
        np.savez(folder / "state.npz", *leaves)
        # The structure of a fresh `init` would do as well.
        skeleton = pickle.dumps(jax.tree.map(np.zeros_like, jax.device_get(state)))
        treedef = jax.tree.structure(pickle.loads(skeleton))
        with np.load(folder / "state.npz") as saved:
            return treedef.unflatten([jnp.asarray(saved[n]) for n in saved.files])

    return save_and_restore


def through_orbax(folder):
    def save_and_restore(state):
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            tree = {"state": state, "step": jnp.zeros((), jnp.int32)}
            checkpointer.save(folder / "orbax", tree)
            checkpointer.wait_until_finished()
            like = jax.tree.map(orbax.checkpoint.utils.to_shape_dtype_struct, tree)
            return checkpointer.restore(folder / "orbax", like)["state"]

    return save_and_restore


@pytest.mark.parametrize("way", [through_numpy, through_orbax])
@every_compiled
def test_law_10_a_restored_checkpoint_continues(method, way, tmp_path):
    laws.check_restored(method, way(tmp_path))


# ------------------------------------------------------------------------- law 11


@every
def test_law_11_wrong_input(method):
    laws.check_wrong_input(method)


@every
def test_law_11_wrong_arguments(method):
    laws.check_wrong_arguments(method)


# ------------------------------------------------------------------------- law 12


@every_kind
def test_law_12_masked_is_absent(method):
    laws.check_absent(method)


@every
def test_law_12_masked_for_a_while(method):
    laws.check_absent_for_a_while(method)


# ------------------------------------------------- other options, and the wrappers


def around(name, wrap):
    """A row whose combiner stands inside a wrapper."""
    method = mtl.METHODS["task_tensioner"]
    return method._replace(
        name=name,
        factory=lambda num_tasks: wrap(mtl.task_tensioner(num_tasks)),
        claims=frozenset(),
    )


WRAPPED = [
    around("shared_only", lambda tx: mtl.shared_only(tx, lambda params: True)),
    around("skip_nonfinite_tasks", mtl.skip_nonfinite_tasks),
    around(
        "shared_only in skip_nonfinite_tasks",
        lambda tx: mtl.skip_nonfinite_tasks(mtl.shared_only(tx, lambda params: True)),
    ),
]
# What `scale` does is the same for all methods of a kind.
VARIANTS = [
    variant
    for method in METHODS
    for variant in laws.variants(method)
    if "scale=" not in variant.name or method in laws.one_of_each_kind()
]


@pytest.mark.slow
@each(VARIANTS + WRAPPED)
def test_laws_hold_for_other_options(method):
    laws.check_types(method, "mixed")
    laws.check_compiles_once(method)
    if 4 not in exempt(method):
        laws.check_one_task(method)
    laws.check_wrong_input(method)
    for form in (F("dict"), F("dict", masked=True)):
        laws.check_lazy(method, form)
    for num_tasks in (2, 3):
        laws.check_finite(method, num_tasks)
    laws.check_absent(method)
    laws.check_absent_for_a_while(method)


# -------------------------------------------------------------- the laws themselves


# Those of law 10 are held by `sharded_worker`.
EXEMPTIONS = [(m, x) for m in METHODS for x in m.exempt if x.law != 10]
LAWS = {4: laws.check_one_task, 9: laws.check_memory}


@pytest.mark.parametrize(("method", "exemption"), EXEMPTIONS)
def test_an_exemption_is_needed(method, exemption):
    """A row exempts a method from a law only with a reason, and only if need be."""
    assert exemption.reason.strip()
    with pytest.raises(AssertionError):
        LAWS[exemption.law](method)


def lossy(state):
    """A checkpoint that keeps four digits."""

    def round_floats(x):
        return x.astype(jnp.float16).astype(x.dtype) if x.dtype == "float32" else x

    return jax.tree.map(round_floats, state)


# What a law is called with on a broken method, where the method alone is not enough.
ARGUMENTS = {
    "check_types": [("bfloat16",)],
    "check_lazy": [(F("array"),)],
    "check_finite": [(3,)],
    "check_claim": [(claim, 3) for claim in laws.CLAIMS],
    "check_refuted": [
        (claim, COUNTER_EXAMPLES[claim])
        for claim in laws.CLAIMS
        if claim in mtl.METHODS["mgda"].claims
    ],
    "check_solver": [(3,)],
    "check_oracle": [(ORACLES["mgda"], 3)],
    "check_one_backward_pass": [(place,) for place in laws.PLACES],
    "check_restored": [(lossy,)],
}


@pytest.mark.parametrize(
    ("law", "method", "arguments"),
    [
        pytest.param(law, method, arguments, id=f"{law}-{method.name}-{number}")
        for law, methods in broken.BROKEN.items()
        if law != "check_sharded"
        for method in methods
        for number, arguments in enumerate(ARGUMENTS.get(law, [()]))
    ],
)
def test_laws_are_tested(law, method, arguments):
    """Each law fails on a method that breaks it."""
    with pytest.raises(AssertionError):
        getattr(laws, law)(method, *arguments)


def test_every_law_has_a_broken_method():
    functions = {n for n in vars(laws) if n.startswith("check_")}
    assert functions | {"check_sharded"} == set(broken.BROKEN)
