"""What the mathematics of a method costs, beside the Gramian it is given.

A method that needs the Gramian is a computation on a ``[T, T]`` matrix. This times it
alone, as a multiple of one Gramian of stacked task gradients with a million parameters
in the same run, and the seconds XLA takes to compile a whole update.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import mtl_optax as mtl


class WeightingCost(NamedTuple):
    """Cost of one method's own mathematics.

    Attributes:
      method: its name.
      ratios: median time of its weights over that of one Gramian, a number of tasks.
      seconds: compile times, a number of tasks.
    """

    method: str
    ratios: tuple[float, ...]
    seconds: tuple[float, ...]


def draw(num_tasks: int, size: int = 256) -> jax.Array:
    """Task gradients of different lengths that conflict."""
    rng = np.random.default_rng(num_tasks)
    rows = rng.standard_normal((num_tasks, size))
    rows = rows - 0.9 * rows.mean(0)
    lengths = 10 ** rng.uniform(0, 2, (num_tasks, 1))
    return jnp.asarray(rows * lengths, jnp.float32)


def weigh(method: mtl.Method, num_tasks: int) -> Callable[[jax.Array], Any]:
    """The method on its own ``[T, T]`` matrix, as ``weigh(gramian)``."""
    weighting = method.make(num_tasks).weighting
    assert weighting is not None
    extras = {"losses": None, **method.extras(num_tasks)}
    state = weighting.init(num_tasks, jnp.float32)
    mask = jnp.ones(num_tasks, bool)

    def in_basis(gramian: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda basis: basis @ gramian @ basis.T

    def weights(gramian: jax.Array) -> Any:
        given = extras
        if "gramian_in_basis" in method.needs:
            given = extras | {"gramian_in_basis": in_basis(gramian)}
        return weighting.update(gramian, state, task_mask=mask, **given)

    return weights


def compile_seconds(method: mtl.Method, num_tasks: int) -> float:
    """What XLA takes for one whole ``update`` of stacked task gradients."""
    tx = method.make(num_tasks)
    params = {"b": jnp.zeros(64), "w": jnp.zeros((64, 64))}
    grads = jax.tree.map(lambda p: jnp.zeros((num_tasks, *p.shape)), params)

    def update(grads: Any, state: Any, extras: Any) -> Any:
        return tx.update(grads, state, params, **extras)

    jax.clear_caches()
    extras = method.extras(num_tasks, params)
    lowered = jax.jit(update).lower(grads, tx.init(params), extras)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def measure(
    tasks: Sequence[int] = (4, 40, 64, 128),
    *,
    parameters: int = 1_000_000,
    repeats: int = 15,
    methods: Sequence[str] | None = None,
) -> list[WeightingCost]:
    """Times every Gramian method.

    Args:
      tasks: numbers of tasks.
      parameters: of the Gramian it is compared with.
      repeats: rounds; in each, the Gramian and every method run once.
      methods: names in `mtl_optax.METHODS`; by default all that need a Gramian.

    Returns:
      a `WeightingCost` a method.

    Example:
      >>> measure((2,), parameters=100, repeats=1, methods=["ntkmtl_sr"])[0].method
      'ntkmtl_sr'
    """
    rows = [
        row
        for row in mtl.METHODS.values()
        if row.needs & {"gramian", "gramian_in_basis"}
        and (methods is None or row.name in methods)
    ]
    seconds = np.zeros((len(rows), len(tasks)))
    times = np.zeros((len(rows) + 1, len(tasks), repeats + 1))
    for column, num_tasks in enumerate(tasks):
        stacked = jnp.ones((num_tasks, parameters), jnp.float32)
        calls: list[tuple[Any, jax.Array]] = [
            (jax.jit(lambda x: mtl.gramian({"w": x})).lower(stacked).compile(), stacked)
        ]
        matrix = mtl.gramian({"w": draw(num_tasks)})
        for number, row in enumerate(
            tqdm(rows, desc=f"T = {num_tasks}", leave=False, disable=None)
        ):
            calls.append(
                (jax.jit(weigh(row, num_tasks)).lower(matrix).compile(), matrix)
            )
            seconds[number, column] = compile_seconds(row, num_tasks)
        for turn in range(repeats + 1):
            for number, (call, argument) in enumerate(calls):
                start = time.perf_counter()
                jax.block_until_ready(call(argument))
                times[number, column, turn] = time.perf_counter() - start
    middle = np.median(times[:, :, 1:], axis=-1)
    return [
        WeightingCost(row.name, tuple(middle[n + 1] / middle[0]), tuple(seconds[n]))
        for n, row in enumerate(rows)
    ]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 40, 64, 128])
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    found = measure(
        options.tasks, parameters=options.parameters, repeats=options.repeats
    )
    heads = [f"T = {t}" for t in options.tasks]
    heads += [f"compile, T = {t}" for t in options.tasks]
    print(f"| weights / Gramian | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for row in found:
        cells = [f"{x:.3f}" for x in row.ratios] + [f"{x:.1f} s" for x in row.seconds]
        print(f"| {row.method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
