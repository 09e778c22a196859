"""Law 10 over eight devices, in a process of its own: prints one JSON line a case.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python sharded_worker.py [all]

Every method steps from a filled history, once on one device and once sharded. With one
device the mesh is of one, for whoever tries there what will run on many.
"""

import functools
import inspect
import json
import sys
from typing import Any, NamedTuple

import broken
import jax
import jax.numpy as jnp
import laws
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mtl_optax as mtl

TASKS = 8
SHAPES = {"fsdp": (16, 6), "free": (3,), "tensor": (6, 16)}

# One spec a leaf of the parameters, behind the task axis; "tasks" shards that axis.
LAYOUTS = {
    "parameters": {"fsdp": P("x", None), "free": P(None), "tensor": P(None, "x")},
    "tasks": {name: P(*([None] * len(s))) for name, s in SHAPES.items()},
}
AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
FAST = (
    ("stacked", "Auto", "parameters"),
    ("stacked", "Explicit", "parameters"),
    ("stacked", "Explicit", "tasks"),
    ("lazy", "Explicit", "batch"),
    ("shard_map", "Auto", "parameters"),
)
SLOW = (
    ("stacked", "Auto", "tasks"),
    ("lazy", "Auto", "batch"),
    ("lazy", "Auto", "parameters and batch"),
    ("shard_map", "Explicit", "parameters"),
)


class Setting(NamedTuple):
    """A step to take: rows, losses, and the state before it."""

    params: Any
    rows: Any
    losses: Any
    state: Any


@functools.cache
def mesh(axes):
    return jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AXES[axes],))


def put(tree, axes, specs):
    return {
        n: jax.device_put(tree[n], NamedSharding(mesh(axes), specs[n])) for n in tree
    }


def replicated(tree, axes):
    return jax.device_put(tree, NamedSharding(mesh(axes), P()))


def placed(tree, axes, specs):
    """Leaf by leaf; a spec may stand for a whole subtree."""
    spread = jax.tree.map(
        lambda spec, below: jax.tree.map(lambda _: spec, below),
        specs,
        tree,
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh(axes), spec)),
        tree,
        spread,
    )


@functools.cache
def setting(method):
    """Rows, and a state after enough steps to fill a history."""
    rng = np.random.default_rng(10)
    rows = {
        n: rng.standard_normal((laws.STEPS, TASKS, *s)).astype(np.float32)
        for n, s in SHAPES.items()
    }
    losses = 10 ** rng.uniform(-1, 1, (laws.STEPS, TASKS)).astype(np.float32)
    params = {
        n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in SHAPES.items()
    }
    tx = method.make(TASKS)

    @laws.quick_jit
    def advance(rows, losses):
        def step(state, now):
            extras = laws.extras_of(method, TASKS, now[1], params, now[0])
            return tx.update(now[0], state, params, **extras)[1], None

        return jax.lax.scan(step, tx.init(params), (rows, losses))[0]

    before = [jax.tree.map(lambda x: x[:-1], each) for each in (rows, losses)]
    last = {n: jnp.asarray(x[-1]) for n, x in rows.items()}
    return Setting(params, last, jnp.asarray(losses[-1]), advance(*before))


def step_on_rows(method, rows, extras, state, params, **options):
    return method.make(TASKS, **options).update(rows, state, params, **extras)


def extras_at(method, rows=None):
    at = setting(method)
    rows = at.rows if rows is None else rows
    return laws.extras_of(method, TASKS, at.losses, at.params, rows)


def extra_specs(extras, specs):
    """Strengths are sharded as their kernel's channels, all else is everywhere.

    But for task gradients of other batches, which are sharded as these.
    """
    whole = {n: P(None, *spec) for n, spec in specs.items()}
    own = {"other_task_grads": (whole, whole)}
    return {
        name: {
            leaf: None if value is None else P(None, specs[leaf][-1])
            for leaf, value in extra.items()
        }
        if name == "strengths"
        else own.get(name, P())
        for name, extra in extras.items()
    }


def state_specs(state, whole):
    """Moments are sharded as rows, or as parameters; all else is everywhere."""

    def spec(path, leaf):
        for name, shape in SHAPES.items():
            if jax.tree_util.keystr(path).endswith(f"['{name}']"):
                if leaf.shape == (TASKS, *shape):
                    return whole[name]
                if leaf.shape == shape:
                    return P(*whole[name][1:])
        return P()

    return jax.tree_util.tree_map_with_path(spec, state)


def without_free(state):
    """A state whose moments of the leaf that is not sharded are zero."""

    def cleared(path, leaf):
        free = jax.tree_util.keystr(path).endswith("['free']")
        return jnp.zeros_like(leaf) if free else leaf

    return jax.tree_util.tree_map_with_path(cleared, state)


def loss_fn(params, x, y):
    h = jnp.tanh(x @ params["fsdp"] @ params["tensor"])
    shift = jnp.sum(params["free"])
    return jnp.mean(jnp.square(h[:, :TASKS] + shift - y), axis=0)


@functools.cache
def compiled_step(method):
    return laws.quick_jit(functools.partial(step_on_rows, method))


def step_on_batch(method, x, y, state, params):
    losses, grads = method.jacobian(loss_fn)(params, x, y)
    extras = laws.extras_of(method, TASKS, losses, params, grads)
    return method.make(TASKS).update(grads, state, params, **extras)


def batch():
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)
    return x, jnp.asarray(rng.standard_normal((32, TASKS)), jnp.float32)


@functools.cache
def on_one_device(method, form):
    at = setting(method)
    if form == "lazy":
        step = functools.partial(step_on_batch, method)
        return laws.quick_jit(step)(*batch(), at.state, at.params)
    return compiled_step(method)(at.rows, extras_at(method), at.state, at.params)


def check_sharded(method, form, axes, layout):
    """Raises AssertionError unless sharded over eight devices = one device."""
    at = setting(method)
    specs = LAYOUTS.get(layout)
    state = replicated(at.state, axes)
    extras = replicated(extras_at(method), axes)
    if form != "shard_map":
        wanted = on_one_device(method, form)
    if form == "stacked":
        lead = "x" if layout == "tasks" else None
        whole = {n: P(lead, *spec) for n, spec in specs.items()}
        rows, params = put(at.rows, axes, whole), put(at.params, axes, specs)
        found = compiled_step(method)(rows, extras, state, params)
    elif form == "lazy":
        step = laws.quick_jit(functools.partial(step_on_batch, method))
        x, y = (
            jax.device_put(v, NamedSharding(mesh(axes), P("x", None))) for v in batch()
        )
        if layout == "batch":
            params = replicated(at.params, axes)
        else:
            params = put(at.params, axes, LAYOUTS["parameters"])
        found = step(x, y, state, params)
    else:
        names = inspect.signature(method.factory).parameters
        options = {"axis_name": "x"} if "axis_name" in names else {}
        assert options or not laws.sees_gramian(method), "no axis_name"
        whole = {n: P(None, *spec) for n, spec in specs.items()}
        held = state_specs(at.state, whole)
        # The leaf that every device holds would be counted eight times.
        zero = {**at.rows, "free": 0 * at.rows["free"]}
        inside = jax.shard_map(
            functools.partial(step_on_rows, method, **options),
            mesh=mesh(axes),
            in_specs=(whole, extra_specs(extras, specs), held, specs),
            out_specs=(specs, held),
            check_vma=False,
        )
        rows, params = put(zero, axes, whole), put(at.params, axes, specs)
        started = without_free(at.state)
        extras = extras_at(method, zero)
        extras = placed(extras, axes, extra_specs(extras, specs))
        state = placed(started, axes, held)
        found = laws.quick_jit(inside)(rows, extras, state, params)
        extras = extras_at(method, zero)
        wanted = compiled_step(method)(zero, extras, started, at.params)
    found, wanted = jax.device_get(found), jax.device_get(wanted)
    size = max(np.linalg.norm(u) for u in jax.tree.leaves(wanted[0]))
    for name in SHAPES:
        error = np.abs(found[0][name] - wanted[0][name]).max() / size
        assert error < 1e-5, f"update of {name!r} differs by {error:.1e}"
    laws.assert_trees_close(found[1], wanted[1], 1e-5, "state")


def check_not_sharded(*case):
    """Raises AssertionError if the law holds for a method that is exempt from it."""
    try:
        check_sharded(*case)
    except AssertionError:
        return
    raise AssertionError("sharded is one device: it needs no exemption from law 10")


def check_collectives(axes):
    """The Gramian of FSDP-sharded rows: one all-reduce of T x T, nothing gathered."""
    shapes = {"fsdp": (TASKS, 64, 32), "free": (TASKS, 3)}
    specs = {"fsdp": P(None, "x", None), "free": P(None, None)}
    rows = put({n: jnp.ones(s) for n, s in shapes.items()}, axes, specs)
    text = jax.jit(mtl.gramian).lower(rows).compile().as_text()
    reduces = [x for x in text.splitlines() if " all-reduce(" in x]
    assert len(reduces) == 1, f"{len(reduces)} all-reduces"
    assert f"f32[{TASKS},{TASKS}]" in reduces[0], reduces[0]
    for other in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {other}(" not in text, f"the Gramian needs an {other}"


def report(name, case, check, *args):
    try:
        check(*args)
        message = ""
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:2000]
    print(json.dumps({"method": name, "case": case, "error": message}), flush=True)


def main():
    assert jax.device_count() in (1, 8)
    alone = jax.device_count() == 1
    everything = sys.argv[1:] == ["all"]
    first = laws.one_of_each_kind() if everything else laws.one_of_each_sort()
    for axes in () if alone else AXES:
        report("gramian", f"collectives, {axes}", check_collectives, axes)
    for method in mtl.METHODS.values():
        # Methods of one kind meet sharded arrays in the same places.
        if everything:
            cases = SLOW if method in first else FAST
        else:
            cases = FAST if method in first else ()
        for case in cases:
            exempt = case[0] == "shard_map" and 10 in {x.law for x in method.exempt}
            check = check_not_sharded if exempt and not alone else check_sharded
            report(method.name, ", ".join(case), check, method, *case)
    if not everything and not alone:
        for method in broken.BROKEN["check_sharded"]:
            for case in FAST[1], FAST[-1]:
                name = f"broken {method.name}"
                report(name, ", ".join(case), check_sharded, method, *case)


if __name__ == "__main__":
    main()
