"""The sharding matrix over eight devices, in a process of its own.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python sharding_matrix_worker.py [all]

Prints one JSON line a cell: how far update, weights and state are from those of one
device, and which collectives the compiled step holds. `test_sharding_matrix` reads it.
"""

import functools
import itertools
import json
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import laws
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mtl_optax as mtl

TASKS, STEPS = 4, 3
# Few rows and wide layers, where the layer-wise Gramian forms no gradient of them.
ROWS, INPUTS, WIDTH = 16, 32, 64
SHAPES = {
    "inner": (INPUTS, WIDTH),
    "bias": (WIDTH,),
    "outer": (WIDTH, TASKS),
    "shift": (TASKS,),
}
TOLERANCE = 1e-5

AXES = {"Auto": AxisType.Auto, "Explicit": AxisType.Explicit}
WHERE = ("jit", "shard_map")
FORMS = ("stacked", "lazy", "lazy layerwise")
OTHER_FORMS = ("lazy vmap", "lazy unroll", "lazy map")
# FairGrad's weights follow the scale of the Gramian, of which most are independent.
ONE_COMBINER = "fairgrad"
COMBINERS = ("mean", "mgda", ONE_COMBINER, "task_tensioner")


class Layout(NamedTuple):
    """Where a network lies.

    Attributes:
      mesh: its axes and their lengths.
      params: one spec a leaf.
      batch: what the batch's rows are sharded over.
      summed: the mesh axis over which parameters are sharded, for ``axis_name=``.
    """

    mesh: dict[str, int]
    params: dict[str, P]
    batch: str | None
    summed: str | None


EVERYWHERE = dict.fromkeys(SHAPES, P())
BY_MODEL = {
    "inner": P(None, "model"),
    "bias": P("model"),
    "outer": P("model", None),
    "shift": P(),
}
LAYOUTS = {
    "data-parallel": Layout({"data": 8}, EVERYWHERE, "data", None),
    "FSDP": Layout(
        {"data": 8},
        {
            "inner": P("data", None),
            "bias": P("data"),
            "outer": P("data", None),
            "shift": P(),
        },
        "data",
        "data",
    ),
    "tensor-parallel": Layout({"model": 8}, BY_MODEL, None, "model"),
    "data x tensor": Layout({"data": 2, "model": 4}, BY_MODEL, "data", "model"),
    "task axis": Layout({"data": 2, "tasks": 4}, EVERYWHERE, None, None),
}

PLACES = tuple(itertools.product(LAYOUTS, AXES, WHERE))
FAST_PLACES = (
    ("data-parallel", "Auto", "jit"),
    ("FSDP", "Explicit", "jit"),
    ("FSDP", "Explicit", "shard_map"),
    ("tensor-parallel", "Explicit", "jit"),
    ("tensor-parallel", "Explicit", "shard_map"),
    ("task axis", "Auto", "jit"),
)

# What a cell cannot mean.
SENSELESS = {
    ("task axis", "jit", "lazy"): "a lazy tree has no rows that could be sharded",
    ("task axis", "shard_map", "stacked"): "a device would hold a part of the tasks, "
    "a combiner takes all: gather the rows before it",
    ("task axis", "shard_map", "lazy"): "a lazy tree has no rows that could be sharded",
}


@functools.cache
def mesh(layout: str, axes: str) -> Any:
    shape = LAYOUTS[layout].mesh
    types = (AXES[axes],) * len(shape)
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=types)


def placed(tree: Any, layout: str, axes: str, specs: Any) -> Any:
    """Leaves by one spec, or by one a name."""
    where = mesh(layout, axes)
    if isinstance(specs, P):
        return jax.device_put(tree, NamedSharding(where, specs))
    return {n: jax.device_put(tree[n], NamedSharding(where, specs[n])) for n in SHAPES}


@functools.cache
def problem() -> tuple[Any, Any]:
    """Parameters, and one batch a step."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    params = {n: normal(*s) / 4 for n, s in SHAPES.items()}
    return params, [(normal(ROWS, INPUTS), normal(ROWS, TASKS)) for _ in range(STEPS)]


def network(
    params: Any,
    x: Any,
    y: Any,
    whole: Callable[[Any], Any] = lambda params: params,
    project: Callable[..., Any] = jnp.matmul,
    average: Callable[[Any], Any] = lambda losses: losses,
) -> Any:
    """The losses ``[T]``; the other arguments are what a layout makes one write."""
    params = whole(params)
    h = jnp.tanh(x @ params["inner"] + params["bias"])
    out = project(h, params["outer"]) + params["shift"]
    return average(jnp.mean(jnp.square(out - y) * (1 + jnp.arange(TASKS)), axis=0))


def losses_of(layout: str, axes: str, where: str) -> Callable[..., Any]:
    """The network as its author writes it for a layout."""
    at = LAYOUTS[layout]
    by_model, by_data = "model" in at.mesh, at.batch is not None
    given: dict[str, Any] = {}
    if where == "jit" and axes == "Explicit":
        if layout == "FSDP":
            given["whole"] = functools.partial(
                jax.sharding.reshard,
                out_shardings=NamedSharding(mesh(layout, axes), P()),
            )
        if by_model:
            given["project"] = functools.partial(
                jnp.matmul,
                out_sharding=NamedSharding(mesh(layout, axes), P(at.batch, None)),
            )
    if where == "shard_map":
        if layout == "FSDP":
            given["whole"] = lambda params: {
                name: lax.all_gather(param, "data", tiled=True)
                if at.params[name] != P()
                else param
                for name, param in params.items()
            }
        if by_model:
            given["project"] = lambda h, w: lax.psum(h @ w, "model")
        # With `check_vma`, gradients of averaged losses are summed by themselves.
        if by_data:
            given["average"] = lambda losses: lax.pmean(losses, "data")
    return functools.partial(network, **given)


def task_gradients(losses: Callable[..., Any], form: str) -> Callable[..., Any]:
    if form == "stacked":
        return mtl.value_and_task_grads(losses)
    mode = form.removeprefix("lazy").strip() or None
    return mtl.task_jacobian(losses, mode=mode)


def combiner(name: str, **options: Any) -> Any:
    return mtl.METHODS[name].make(TASKS, **options)


def step_of(layout: str, axes: str, where: str, form: str, name: str) -> Any:
    """``(params, x, y, state) -> (updates, state)``, or of plain training.

    Of the layout by tasks, `x` holds the rows and `y` the losses.
    """
    at = LAYOUTS[layout]
    inside = where == "shard_map"
    if layout == "task axis":

        def step(params: Any, rows: Any, losses: Any, state: Any) -> Any:
            return combiner(name).update(rows, state, params, losses=losses)

        return step
    losses = losses_of(layout, axes, where)
    if name == "plain":

        def step(params: Any, x: Any, y: Any, state: Any) -> Any:
            value, pullback = jax.vjp(lambda p: losses(p, x, y), params)
            return pullback(jnp.ones_like(value))[0], value

    else:
        options = {"axis_name": at.summed} if inside and name != "mean" else {}
        tx = combiner(name, **options)

        def step(params: Any, x: Any, y: Any, state: Any) -> Any:
            value, grads = task_gradients(losses, form)(params, x, y)
            return tx.update(grads, state, params, losses=value)

    if not inside:
        return step
    batch = P(at.batch, None)
    return jax.shard_map(
        step,
        mesh=mesh(layout, axes),
        in_specs=(at.params, batch, batch, P()),
        out_specs=(at.params, P()),
    )


@functools.cache
def rows_of_one_device() -> list[Any]:
    """Losses and stacked task gradients at every step, by `jax.jacrev`."""
    params, batches = problem()
    both = jax.jit(
        lambda p, x, y: (network(p, x, y), jax.jacrev(lambda p: network(p, x, y))(p))
    )
    return [both(params, x, y) for x, y in batches]


@functools.cache
def on_one_device(name: str) -> list[Any]:
    """Updates and states of every step, from stacked rows on one device."""
    params, _ = problem()
    tx = combiner(name)
    update = laws.quick_jit(lambda g, s, x: tx.update(g, s, params, losses=x))
    found, state = [], tx.init(params)
    for losses, rows in rows_of_one_device():
        updates, state = update(rows, state, losses)
        found.append(jax.device_get((updates, state)))
    return found


# ----------------------------------------------------------------------- collectives

COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)"
    r"(?:-start)?\("
)


def collectives(compiled: Any) -> list[tuple[str, list[list[int]]]]:
    """Kind and shapes of every collective of a compiled program; loops count once."""
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append(
                (match[2], [[int(n) for n in s.split(",") if n] for s in shapes])
            )
    return found


# ----------------------------------------------------------------------------- cells


def arguments(layout: str, axes: str, step: int) -> tuple[Any, Any, Any]:
    """Parameters and batch of a step; rows and losses, where the layout is by tasks."""
    params, batches = problem()
    at = LAYOUTS[layout]
    here = placed(params, layout, axes, at.params)
    if layout == "task axis":
        losses, rows = rows_of_one_device()[step]
        by_task = {n: P("tasks", *([None] * len(s))) for n, s in SHAPES.items()}
        return (
            here,
            placed(rows, layout, axes, by_task),
            placed(losses, layout, axes, P()),
        )
    return here, *(placed(v, layout, axes, P(at.batch, None)) for v in batches[step])


def difference(found: Any, wanted: Any) -> float:
    """The largest, relative to the largest entry of the leaf or of a tree of arrays."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if not np.issubdtype(b.dtype, np.inexact):
            np.testing.assert_array_equal(a, b)
        elif b.size:
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            size = max(np.abs(b).max(), np.finfo(np.float32).tiny)
            worst = max(worst, float(np.abs(a - b).max() / size))
    return worst


def cell(layout: str, axes: str, where: str, form: str, name: str) -> dict[str, Any]:
    """Runs one combiner for a few steps; how far it is from one device."""
    state = () if name == "plain" else combiner(name).init(problem()[0])
    state = placed(state, layout, axes, P())
    step = laws.quick_jit(step_of(layout, axes, where, form, name))
    compiled = step.lower(*arguments(layout, axes, 0), state).compile()
    report: dict[str, Any] = {"collectives": collectives(compiled)}
    if name == "plain":
        return report
    report |= {"update": 0.0, "weights": 0.0, "state": 0.0}
    for number, (updates, wanted) in enumerate(on_one_device(name)):
        found, state = compiled(*arguments(layout, axes, number), state)
        state = placed(jax.device_get(state), layout, axes, P())
        differences = {
            "update": difference(jax.device_get(found), updates),
            "weights": difference(
                laws.weights_of(jax.device_get(state)), laws.weights_of(wanted)
            ),
            "state": difference(state_of(jax.device_get(state)), state_of(wanted)),
        }
        for what, value in differences.items():
            report[what] = max(report[what], value)
    return report


def state_of(state: Any) -> Any:
    """The state but for residuals of solvers, which are rounding and nothing else."""
    return [
        leaf for p, leaf in laws.paths_and_leaves(state) if "solver_residual" not in p
    ]


def gramian_cell(layout: str, axes: str) -> dict[str, Any]:
    """Collectives of the Gramian alone, of stacked rows sharded as parameters are."""
    specs = {n: P(None, *spec) for n, spec in LAYOUTS[layout].params.items()}
    _, rows = rows_of_one_device()[0]
    here = placed(rows, layout, axes, specs)
    compiled = jax.jit(mtl.gramian).lower(here).compile()
    flat = np.concatenate(
        [np.asarray(rows[n], np.float64).reshape(TASKS, -1) for n in SHAPES], axis=1
    )
    return {
        "gramian": difference(np.asarray(compiled(here)), flat @ flat.T),
        "collectives": collectives(compiled),
    }


def control_cell() -> dict[str, Any]:
    """What must differ: every device combines its own rows, updates are averaged."""
    params, batches = problem()
    tx = combiner(ONE_COMBINER)

    def step(params: Any, x: Any, y: Any) -> Any:
        value, grads = mtl.value_and_task_grads(network)(params, x, y)
        updates, _ = tx.update(grads, tx.init(params), params, losses=value)
        return lax.pmean(updates, "data")

    inside = jax.shard_map(
        step,
        mesh=mesh("data-parallel", "Auto"),
        in_specs=(P(), P("data", None), P("data", None)),
        out_specs=P(),
        check_vma=False,
    )
    found = laws.quick_jit(inside)(params, *batches[0])
    return {
        "update": difference(jax.device_get(found), on_one_device(ONE_COMBINER)[0][0])
    }


def report(
    what: dict[str, Any], run: Callable[..., dict[str, Any]], *args: Any
) -> None:
    try:
        found = run(*args) | {"error": ""}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:1500]}
    print(json.dumps(what | found), flush=True)


def main() -> None:
    assert jax.device_count() == 8
    everything = sys.argv[1:] == ["all"]
    report({"combiner": "control"}, control_cell)
    places = PLACES if everything else FAST_PLACES
    forms = FORMS + OTHER_FORMS if everything else FORMS
    for layout, axes in dict.fromkeys(place[:2] for place in places):
        if LAYOUTS[layout].summed:
            what = {"layout": layout, "axes": axes, "combiner": "gramian"}
            report(what, gramian_cell, layout, axes)
    for layout, axes, where in places:
        here = {"layout": layout, "axes": axes, "where": where}
        if layout != "task axis":
            plain = here | {"form": "-", "combiner": "plain"}
            report(plain, cell, layout, axes, where, "-", "plain")
        for form in forms:
            reason = SENSELESS.get((layout, where, form.partition(" ")[0]))
            names = COMBINERS if everything and form in FORMS else (ONE_COMBINER,)
            for name in names:
                what = here | {"form": form, "combiner": name}
                if reason:
                    print(json.dumps(what | {"reason": reason}), flush=True)
                else:
                    report(what, cell, layout, axes, where, form, name)


if __name__ == "__main__":
    main()
