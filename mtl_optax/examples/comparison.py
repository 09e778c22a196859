"""Trains the digits under several ways of combining task gradients.

Each is measured against one network a task.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mtl_optax.examples.costs import Cost, measure_costs
from mtl_optax.examples.digits import Pairs, draw_pairs, load_sources
from mtl_optax.examples.models import classifies
from mtl_optax.examples.systems import System, make_system, with_controls
from mtl_optax.examples.trainer import Record, train
from mtl_optax.metrics import delta_m

TRAIN_PAIRS = 4096
HELD_OUT_PAIRS = 2000


class Outcome(NamedTuple):
    """All seeds of one way of training, at the learning rate that validation chose.

    Attributes:
      learning_rate: of Adam.
      test: each seed's metrics, tasks in sorted order.
      record: losses, weights and Gramians of all steps, seeds first.
    """

    learning_rate: float
    test: Float[np.ndarray, "seeds tasks"]
    record: Record


class Comparison(NamedTuple):
    """What `compare` returns.

    Attributes:
      tasks: in sorted order, as the columns of every `Outcome.test`.
      higher_is_better: per task.
      num_epochs: passes over the training pairs.
      single: one network for each task alone, by task.
      methods: one network for all tasks, by method (and controls).
      costs: what a step costs, by method; empty if it was not measured.
    """

    tasks: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    num_epochs: int
    single: dict[str, Outcome]
    methods: dict[str, Outcome]
    costs: dict[str, Cost]

    @property
    def baseline(self) -> Float[np.ndarray, " tasks"]:
        """Single-task test metrics, mean over seeds."""
        return np.array([self.single[task].test.mean() for task in self.tasks])


class _Data(NamedTuple):
    train: Pairs
    validation: Pairs
    test: Pairs


def compare(
    tasks: Sequence[str],
    methods: Sequence[str],
    *,
    num_seeds: int = 8,
    num_epochs: int = 20,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    train_pairs: int = TRAIN_PAIRS,
    with_costs: bool = False,
    key: Key[Array, ""],
    on_epoch: Callable[[str], None] | None = None,
    on_cost: Callable[[str], None] | None = None,
) -> Comparison:
    """Trains one network a task, then one for all tasks under each method.

    The seeds and learning rates of one method train in one `vmap`. Seeds differ in
    initial parameters and minibatches, and all methods start from the same ones. The
    learning rate is chosen for each method by its mean over seeds on validation pairs:
    a single task by its own metric, a method by Delta_m. The combination acts on the
    shared encoder; heads get their own gradient. `mtl_optax.examples.systems` says how
    systems that are more than a combiner are trained.

    Args:
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      methods: names in `mtl_optax.METHODS`.
      num_seeds: runs of each method.
      num_epochs: passes over the training pairs.
      learning_rates: of Adam, to choose from.
      train_pairs: number of training pairs, the same for all runs.
      with_costs: also measures what a step of each costs.
      key: where all randomness comes from.
      on_epoch: called on the host after every epoch with a label.
      on_cost: called on the host before each system's cost is measured.

    Returns:
      a `Comparison`.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.comparison import compare
      >>> found = compare(
      ...     ("CL", "RR"),
      ...     ["mean"],
      ...     num_seeds=2,
      ...     num_epochs=1,
      ...     learning_rates=[3e-3],
      ...     train_pairs=256,
      ...     key=jax.random.key(0),
      ... )
      >>> found.methods["mean"].test.shape
      (2, 2)
    """
    tasks = tuple(sorted(tasks))
    *draws, runs = jax.random.split(key, 4)
    sources = load_sources()
    sizes = (train_pairs, HELD_OUT_PAIRS, HELD_OUT_PAIRS)
    data = _Data(
        *(
            draw_pairs(source, draw, size)
            for source, draw, size in zip(sources, draws, sizes, strict=True)
        )
    )
    keys = jax.random.split(runs, num_seeds)
    rates = np.asarray(learning_rates, np.float32)
    starts: dict[Any, Any] = {}

    def run(label: str, name: str, tasks: tuple[str, ...]) -> _Lanes:
        def tick(*_: Any) -> None:
            if on_epoch is not None:
                on_epoch(label)

        system = make_system(name, tasks, num_epochs)
        if (system.network, tasks) not in starts:
            # Not under jit: the layers' random draws compile one by one and only once
            # for all networks, which takes a tenth of the time.
            every = [system.start(key) for key in keys]
            starts[system.network, tasks] = jax.tree.map(
                lambda *x: jnp.stack(x), *every
            )
        start = starts[system.network, tasks]
        return _train_lanes(system, start, keys, tasks, data, rates, num_epochs, tick)

    single, reference = {}, []
    for task in tasks:
        lanes = run(f"{task} alone", "mean", (task,))
        value = lanes.validation.mean(axis=1)[:, 0]
        best = int(np.argmax(value if classifies(task) else -value))
        single[task] = lanes.at(best, rates)
        reference.append(value[best])

    higher = tuple(classifies(task) for task in tasks)
    names = with_controls(methods)
    outcomes = {}
    for name in names:
        lanes = run(name, name, tasks)
        value = lanes.validation.mean(axis=1)
        gain = np.asarray(delta_m(value, np.array(reference), higher))
        outcomes[name] = lanes.at(int(np.argmax(gain)), rates)
    costs: dict[str, Cost] = {}
    if with_costs:
        costs = measure_costs(names, tasks, key=key, on_system=on_cost)
    return Comparison(tasks, higher, num_epochs, single, outcomes, costs)


class _Lanes(NamedTuple):
    """Every learning rate times every seed of one method."""

    validation: Float[np.ndarray, "rates seeds tasks"]
    test: Float[np.ndarray, "rates seeds tasks"]
    record: Record

    def at(self, best: int, rates: Float[np.ndarray, " rates"]) -> Outcome:
        record = jax.tree.map(lambda x: x[best], self.record)
        # Ten digits of a float32 are noise.
        rate = float(np.format_float_scientific(rates[best]))
        return Outcome(rate, self.test[best], record)


def _train_lanes(
    system: System,
    start: Any,
    keys: Key[Array, " seeds"],
    tasks: tuple[str, ...],
    data: _Data,
    rates: Float[np.ndarray, " rates"],
    num_epochs: int,
    on_epoch: Callable[..., None],
) -> _Lanes:
    num_rates, num_seeds = len(rates), len(keys)
    # Indexing copies, also where there is only one rate: what trains is donated, and
    # the next method starts from the same parameters.
    seed = jnp.tile(jnp.arange(num_seeds), num_rates)
    states = jax.vmap(system.init)(
        jax.tree.map(lambda x: x[seed], start),
        jnp.repeat(jnp.asarray(rates), num_seeds),
        keys[seed],
    )
    states, record = train(
        system.epoch,
        states,
        data.train,
        num_epochs,
        over_seeds=True,
        donate=True,
        on_epoch=on_epoch,
        numbered=True,
    )
    measure = jax.jit(jax.vmap(system.measure, in_axes=(0, None)))

    def by_lane(x: Array) -> np.ndarray:
        return np.asarray(x).reshape(num_rates, num_seeds, *x.shape[1:])

    def measured(pairs: Pairs) -> np.ndarray:
        values = measure(states, pairs)
        return by_lane(jnp.stack([values[task] for task in tasks], axis=-1))

    return _Lanes(
        measured(data.validation),
        measured(data.test),
        jax.tree.map(by_lane, record),
    )
