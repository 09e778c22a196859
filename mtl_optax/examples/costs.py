"""What a training step costs under each system, beside plain training."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Key

from mtl_optax.examples.digits import draw_pairs, load_sources
from mtl_optax.examples.systems import BATCH_SIZE, PLAIN, make_system

_STEPS = 16


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
      ratio: seconds a step, as a multiple of plain training's in the same run.
      spread: lower and upper quartile of that ratio over rounds.
      megabytes: the compiled step's temporary memory and the optimiser's state.
    """

    ratio: float
    spread: tuple[float, float]
    megabytes: float


def measure_costs(
    names: Sequence[str],
    tasks: Sequence[str],
    *,
    rounds: int = 15,
    key: Key[Array, ""],
    on_system: Callable[[str], None] | None = None,
) -> dict[str, Cost]:
    """Times one run of each system, alternating, and reads its memory off the compiler.

    A system of several phases counts each of them alike. The network is tiny, so what
    is measured holds for tiny networks; `mtl_optax.bench.step_cost` has a larger one.

    Args:
      names: systems, as `make_system` takes them.
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      rounds: in each, every system runs once; medians are kept.
      key: of initial parameters and pairs.
      on_system: called on the host with each name before it is compiled.

    Returns:
      `Cost` by name; plain training is the unit.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.costs import measure_costs
      >>> found = measure_costs(["mean"], ("CL", "RR"), rounds=1, key=jax.random.key(0))
      >>> found["mean"].ratio > 0
      True
    """
    pairs = draw_pairs(load_sources().train, key, _STEPS * BATCH_SIZE)
    calls = {}
    for name in dict.fromkeys((PLAIN, *names)):
        if on_system is not None:
            on_system(name)
        system = make_system(name, tasks, num_epochs=1, look=False)
        state = system.init(system.start(key), 1e-3, key)
        epoch: Any = jax.jit(system.epoch).lower(state, pairs, 0).compile()
        size = epoch.memory_analysis().temp_size_in_bytes
        size += sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
        calls[name] = (epoch, state, system.phases, size / 1e6)

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, (epoch, state, phases, _) in calls.items():
            started = time.perf_counter()
            for phase in phases:
                jax.block_until_ready(epoch(state, pairs, phase))
            if number:  # the first round warms up
                taken = (time.perf_counter() - started) / len(phases)
                seconds[name].append(taken)
    unit = np.array(seconds[PLAIN])
    costs = {}
    for name in names:
        low, middle, high = np.percentile(np.array(seconds[name]) / unit, (25, 50, 75))
        costs[name] = Cost(float(middle), (float(low), float(high)), calls[name][3])
    return costs
