"""What a combined step costs beside plain training on the sum of the losses.

``python -m mtl_optax.bench.step_cost`` prints one row a method: time as a multiple of
the plain step (alternating runs, the smallest of each, so that a busy machine hurts
both alike) and the compiled step's temporary memory.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree
from tqdm import tqdm

import mtl_optax as mtl


class Cost(NamedTuple):
    """One row: a way of stepping, its time beside plain training, its memory."""

    way: str
    ratio: float
    megabytes: float


def make_problem(
    num_tasks: int, width: int, depth: int, batch: int
) -> tuple[PyTree[Array], Callable[..., Array], Array]:
    """A tanh MLP with one linear head a task and mean squared errors.

    Example:
      >>> params, loss_fn, x = make_problem(num_tasks=3, width=8, depth=2, batch=4)
      >>> loss_fn(params, x).shape
      (3,)
    """
    *trunk_keys, head_key, x_key = jax.random.split(jax.random.key(0), depth + 2)
    params = {
        "trunk": [
            jax.random.normal(k, (width, width)) / width**0.5 for k in trunk_keys
        ],
        "heads": jax.random.normal(head_key, (width, num_tasks)) / width**0.5,
    }

    def loss_fn(params: PyTree[Array], x: Array) -> Array:
        for kernel in params["trunk"]:
            x = jnp.tanh(x @ kernel)
        targets = jnp.arange(num_tasks, dtype=x.dtype)
        return jnp.mean(jnp.square(x @ params["heads"] - targets), axis=0)

    return params, loss_fn, jax.random.normal(x_key, (batch, width))


def measure(
    num_tasks: int,
    *,
    width: int = 512,
    depth: int = 8,
    batch: int = 256,
    repeats: int = 20,
    methods: Sequence[str] | None = None,
) -> list[Cost]:
    """Times every method, lazy and stacked, beside plain training.

    Args:
      num_tasks: T.
      width: of the MLP.
      depth: its number of shared layers.
      batch: examples a step.
      repeats: rounds; in each, every way runs once.
      methods: names in `mtl_optax.METHODS`; all by default.

    Returns:
      `Cost` of plain training first, then two a method.

    Example:
      >>> costs = measure(2, width=8, depth=1, batch=4, repeats=1, methods=["mean"])
      >>> [cost.way for cost in costs]
      ['plain', 'mean, lazy', 'mean, stacked']
    """
    params, loss_fn, x = make_problem(num_tasks, width, depth, batch)
    shared = {"trunk": True, "heads": False}

    def plain(tx: Any) -> Callable[..., Any]:
        def step(params: Any, state: Any, x: Array) -> Any:
            grads = jax.grad(lambda p: jnp.sum(loss_fn(p, x)))(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return step

    def combined(tx: Any, method: mtl.Method, stacked: bool) -> Callable[..., Any]:
        # Strengths only for what the combiner sees.
        extras = method.extras(num_tasks, {"trunk": params["trunk"]})

        def step(params: Any, state: Any, x: Array) -> Any:
            def grads_of(x: Array) -> Any:
                losses, task_grads = method.jacobian(loss_fn)(params, x)
                return losses, mtl.materialize(task_grads) if stacked else task_grads

            losses, task_grads = grads_of(x)
            given = {**extras, "losses": losses}
            if "other_task_grads" in method.needs:
                others = (jnp.roll(x, places, axis=1) for places in (1, 2))
                given["other_task_grads"] = tuple(grads_of(x)[1] for x in others)
            updates, state = tx.update(task_grads, state, params, **given)
            return optax.apply_updates(params, updates), state

        return step

    sgd = optax.sgd(1e-3)
    ways: dict[str, tuple[Any, Callable[..., Any]]] = {"plain": (sgd, plain(sgd))}
    for name in methods or mtl.METHODS:
        method = mtl.METHODS[name]
        tx = optax.chain(mtl.shared_only(method.make(num_tasks), shared), sgd)
        ways[f"{name}, lazy"] = (tx, combined(tx, method, stacked=False))
        ways[f"{name}, stacked"] = (tx, combined(tx, method, stacked=True))

    compiled = {}
    for way, (tx, step) in tqdm(ways.items(), desc="compiling", leave=False):
        state = tx.init(params)
        compiled[way] = (jax.jit(step).lower(params, state, x).compile(), state)
    seconds = dict.fromkeys(ways, np.inf)
    for _ in tqdm(range(repeats + 1), desc="measuring", leave=False):
        for way, (call, state) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(call(params, state, x))
            seconds[way] = min(seconds[way], time.perf_counter() - start)
    return [
        Cost(way, float(seconds[way] / seconds["plain"]), _temporary_megabytes(call))
        for way, (call, _) in compiled.items()
    ]


def _temporary_megabytes(compiled: Any) -> float:
    return float(compiled.memory_analysis().temp_size_in_bytes) / 1e6


def main() -> None:
    """Prints a Markdown table for each number of tasks asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8])
    parser.add_argument(
        "--methods", nargs="+", choices=tuple(mtl.METHODS), metavar="NAME"
    )
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    sizes = {"width": options.width, "depth": options.depth, "batch": options.batch}
    found = [
        measure(num_tasks, methods=options.methods, **sizes)
        for num_tasks in options.tasks
    ]
    heads = [f"T = {t}: time | memory" for t in options.tasks]
    print("| step |", " | ".join(heads), "|")
    print("|---|" + "---|---|" * len(heads))
    for row in zip(*found, strict=True):
        cells = [f"{cost.ratio:.1f} | {cost.megabytes:.1f} MB" for cost in row]
        print(f"| {row[0].way} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
