"""The house: who imports whom, what is public, what states are made of."""

import ast
import doctest
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest

import mtl_optax as mtl
from mtl_optax import metrics, solvers, weightings

ROOT = pathlib.Path(mtl.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# A module imports from floors below its own, or from its own floor.
FLOORS = [
    {"metrics"},
    {"_types", "_arguments"},
    {"_tree", "_masks", "_touched", "_random", "_cond", "_some_tasks"},
    {"solvers", "jacobian"},
    {
        "_transform",
        "_wrappers",
        "_update_every",
        "_smooth_weights",
        "_subsample_tasks",
        "_accumulate_task_grads",
        "_solved",
        "_learned",
        "_moments",
        "_other_batches",
        "_scalarized",
        "_per_task",
        "_per_group",
        "_look_ahead_steps",
        "_sequential_task_steps",
        "_phase_schedule",
        "_connection_strength",
    },
    {"weightings", "aggregators"},
    {"_registry", "_method", "_citations", "_check", "_aliases"},
    {"__init__"},
    {"layers"},
    {"examples", "bench"},
    {"_cli"},
    {"__main__"},
]
FLOOR = {part: number for number, floor in enumerate(FLOORS) for part in floor}


def part_of(path):
    """The top-level part of the house that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path):
    """Absolute names of everything a file imports, and where."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((f"{node.module}.{a.name}", node.lineno) for a in node.names)


def parts_imported(path):
    for name, line in imports(path):
        parts = name.split(".")
        if parts[0] == "mtl_optax":
            part = parts[1] if len(parts) > 1 else "__init__"
            yield part if part in FLOOR else "__init__", line


def test_every_file_stands_in_the_house():
    assert {part_of(path) for path in FILES} <= set(FLOOR)
    outside = [
        str(path.relative_to(ROOT.parent))
        for path in ROOT.parent.glob("*.py")
        if path.name != "conftest.py"
    ]
    if (ROOT.parent / "pyproject.toml").exists():
        assert outside == []


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = part_of(path)
    for part, line in parts_imported(path):
        if part == "metrics":  # a leaf of its own, for whoever wants it
            continue
        assert FLOOR[part] <= FLOOR[own], f"{path.name}:{line}: {own} imports {part}"
    if own == "metrics":
        assert {part for part, _ in parts_imported(path)} <= {"metrics"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_private_names_cross_modules(path):
    """A module may be private, and then its names are public in the package."""
    for name, line in imports(path):
        *parts, last = name.split(".")
        if parts[:1] != ["mtl_optax"] or not last.startswith("_"):
            continue
        module = ROOT.joinpath(*parts[1:], last)
        is_module = module.with_suffix(".py").exists() or module.is_dir()
        assert is_module, f"{path.name}:{line}: {name}"


def test_methods_do_not_import_each_other():
    for part in ("weightings", "aggregators"):
        for path in (ROOT / part).glob("_[!_]*.py"):
            for name, line in imports(path):
                for other in ("mtl_optax.weightings", "mtl_optax.aggregators"):
                    assert not name.startswith(other), f"{path.name}:{line}"


def test_the_file_of_a_method_has_an_underscore():
    for part in ("weightings", "aggregators"):
        for path in (ROOT / part).glob("*.py"):
            assert path.name.startswith("_"), path


def test_init_defines_nothing():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Expr, ast.Assign)
    assert all(isinstance(node, allowed) for node in tree.body)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            assert node.targets[0].id in ("__all__", "__version__")


# ------------------------------------------------------------------- the public JAX API

# `jax.core` is public for these names only (and not for long); the rest of it moved to
# `jax.extend.core`.
CORE = {"Tracer"}
BANNED = (
    "jax._src",
    "jax.interpreters",
    "jax.lib",
    "jaxlib",
    "optax._src",
    "flax.core",
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_public_apis(path):
    for name, line in imports(path):
        assert not name.startswith(BANNED), f"{path}:{line}: {name}"
        if name.startswith("jax.core."):
            assert name.split(".")[2] in CORE, f"{path}:{line}: {name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert not dotted.startswith(BANNED), f"{path}:{node.lineno}: {dotted}"
            if dotted.startswith("jax.core."):
                assert dotted.split(".")[2] in CORE, f"{path}:{node.lineno}: {dotted}"
            if dotted.startswith(("jax.", "optax.")):
                private = [p for p in dotted.split(".") if p.startswith("_")]
                assert not private, f"{path}:{node.lineno}: {dotted}"


# ------------------------------------------------------------------------- public names

CORE_PARTS = FLOOR.keys() - {"layers", "examples", "bench", "_cli", "__main__"}


def test_the_core_needs_no_optional_package():
    allowed = {"jax", "jaxtyping", "optax", "chex", "mtl_optax"}
    for path in FILES:
        if part_of(path) in CORE_PARTS:
            for name, line in imports(path):
                top = name.split(".")[0]
                standard = top in __import__("sys").stdlib_module_names
                assert standard or top in allowed | {"numpy"}, f"{path}:{line}: {name}"


def test_all_is_sorted_complete_and_importable():
    for module in (mtl, weightings, solvers):
        assert len(set(module.__all__)) == len(module.__all__)
        for name in module.__all__:
            assert hasattr(module, name), name
    public = {
        name
        for name, value in vars(mtl).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == {
        name for name in mtl.__all__ if not inspect.ismodule(getattr(mtl, name))
    }


FUNCTIONS = [
    pytest.param(value, id=f"{module.__name__}.{name}")
    for module in (mtl, solvers, weightings, metrics)
    for name, value in vars(module).items()
    if inspect.isfunction(value)
    and not name.startswith("_")
    and name in getattr(module, "__all__", [name])
    and value.__module__.startswith("mtl_optax")
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_public_functions_have_a_docstring_with_an_example(function):
    text = inspect.getdoc(function)
    assert text, "no docstring"
    assert "Example:" in text
    assert doctest.DocTestParser().get_examples(text), "no example to run"
    assert (
        "Args:" in text
        or not inspect.signature(function).parameters
        or ("those of `task_jacobian`" in text)
    )


def test_public_types_have_a_docstring():
    for name in mtl.__all__:
        value = getattr(mtl, name)
        if inspect.isclass(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name}: the default one"


def test_the_package_is_typed():
    assert (ROOT / "py.typed").exists()


# ----------------------------------------------------------------------------- registry


def factories():
    names = set(weightings.__all__)
    if (ROOT / "aggregators" / "__init__.py").exists():
        names |= set(importlib.import_module("mtl_optax.aggregators").__all__)
    return names


def test_every_method_is_registered_and_public():
    combiners = {name for name, m in mtl.METHODS.items() if m.kind != "jacobian"}
    assert combiners == factories()
    assert set(mtl.METHODS) <= set(mtl.__all__)
    for name, row in mtl.METHODS.items():
        assert isinstance(row, mtl.Method)
        assert row.name == name
        if row.kind == "jacobian":
            assert row.jacobian.func is getattr(mtl, name)
        else:
            assert row.factory is getattr(mtl, name)
            assert row.jacobian is mtl.task_jacobian
            assert row.kind in ("weighting", "aggregator")
        known = {"gramian", "losses", "gramian_in_basis", "key", "strengths", "delta_m"}
        assert row.needs <= known | {"other_task_grads"}
        for text in (row.summary, row.paper, row.length, row.cost, row.state_size):
            assert text.strip(), name
        assert mtl.citation(name).startswith("@")


PARAMS = {"w": jnp.ones((3, 2), jnp.bfloat16), "b": jnp.ones(2)}


def is_namedtuple_of_arrays(node):
    if isinstance(node, jax.Array):
        return True
    if isinstance(node, dict):  # shaped like the parameters
        return all(is_namedtuple_of_arrays(child) for child in node.values())
    if isinstance(node, tuple):  # a NamedTuple, or the states of an optax chain
        return all(is_namedtuple_of_arrays(child) for child in node)
    return False


WRAPPED = {name: row.make for name, row in mtl.METHODS.items()} | {
    "sum_tasks": lambda num_tasks: mtl.sum_tasks(),
    "shared_only": lambda n: mtl.shared_only(mtl.edm(n), {"w": True, "b": False}),
    "skip_nonfinite_tasks": lambda n: mtl.skip_nonfinite_tasks(mtl.task_tensioner(n)),
    "update_every": lambda n: mtl.update_every(mtl.task_tensioner(n), 3),
    "smooth_weights": lambda n: mtl.smooth_weights(mtl.task_tensioner(n)),
    "subsample_tasks": lambda n: mtl.subsample_tasks(mtl.task_tensioner(n), 2),
    "accumulate_task_grads": lambda n: mtl.accumulate_task_grads(mtl.edm(n), 2),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_states_are_namedtuples_of_arrays(name):
    tx = WRAPPED[name](3)
    assert isinstance(tx, mtl.Combiner)
    state = tx.init(PARAMS)
    assert hasattr(state, "_fields")
    stripped = getattr(state, "shared", state)
    assert is_namedtuple_of_arrays(stripped), state
    leaves = jax.tree.leaves(state)
    assert not any(leaf.weak_type for leaf in leaves), "weakly typed: compiles twice"
    assert len({id(leaf) for leaf in leaves}) == len(leaves), "donated twice"
    for leaf in leaves:
        assert leaf.dtype in (jnp.float32, jnp.int32, jnp.bool_, jnp.uint32)


@pytest.mark.parametrize("name", mtl.METHODS)
@pytest.mark.parametrize(
    ("num_tasks", "error", "words"),
    [
        (0, ValueError, "num_tasks must be at least 1, got 0"),
        (-2, ValueError, "num_tasks must be at least 1, got -2"),
        (2.0, TypeError, "num_tasks must be an int, got float"),
        ("2", TypeError, "num_tasks must be an int, got str"),
        (None, TypeError, "num_tasks must be an int, got NoneType"),
        (True, TypeError, "num_tasks must be an int, got bool"),
        (jnp.array(2), TypeError, "num_tasks must be a Python int.*static_args"),
    ],
)
def test_num_tasks_must_be_a_positive_int(name, num_tasks, error, words):
    with pytest.raises(error, match=words):
        mtl.METHODS[name].make(num_tasks)


def test_num_tasks_is_always_given():
    for row in mtl.METHODS.values():
        with pytest.raises(TypeError, match="num_tasks"):
            row.factory()
