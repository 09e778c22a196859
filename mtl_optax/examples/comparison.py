"""Trains the digits under several ways of combining task gradients.

Each is measured against one network a task.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from mtl_optax import METHODS, Combiner, mean, shared_only
from mtl_optax.examples.digits import Pairs, draw_pairs, load_sources
from mtl_optax.examples.models import (
    LossFn,
    classifies,
    encoder_mask,
    make_digits,
)
from mtl_optax.examples.trainer import Record, init_state, make_epoch, train
from mtl_optax.metrics import delta_m

BATCH_SIZE = 128
TRAIN_PAIRS = 4096
HELD_OUT_PAIRS = 2000
LOOK_EVERY = 4


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
      methods: one network for all tasks, by method.
    """

    tasks: tuple[str, ...]
    higher_is_better: tuple[bool, ...]
    num_epochs: int
    single: dict[str, Outcome]
    methods: dict[str, Outcome]

    @property
    def baseline(self) -> Float[np.ndarray, " tasks"]:
        """Single-task test metrics, mean over seeds."""
        return np.array([self.single[task].test.mean() for task in self.tasks])


class _Data(NamedTuple):
    train: Pairs
    validation: Pairs
    test: Pairs


class _Network(NamedTuple):
    """A network for some tasks: every seed's first parameters, losses and metrics."""

    tasks: tuple[str, ...]
    keys: Key[Array, " seeds"]
    params: PyTree[Array]
    loss_fn: LossFn
    measure: Callable[[PyTree[Array], Pairs], dict[str, Array]]


def compare(
    tasks: Sequence[str],
    methods: Sequence[str],
    *,
    num_seeds: int = 8,
    num_epochs: int = 20,
    learning_rates: Sequence[float] = (1e-3, 3e-3, 1e-2),
    train_pairs: int = TRAIN_PAIRS,
    key: Key[Array, ""],
    on_epoch: Callable[[str], None] | None = None,
) -> Comparison:
    """Trains one network a task, then one for all tasks under each method.

    The seeds and learning rates of one method train in one `vmap`. Seeds differ in
    initial parameters and minibatches, and all methods start from the same ones. The
    learning rate is chosen for each method by its mean over seeds on validation pairs:
    a single task by its own metric, a method by Delta_m. The combination acts on the
    shared encoder; heads get their own gradient.

    Args:
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      methods: names in `mtl_optax.METHODS`.
      num_seeds: runs of each method.
      num_epochs: passes over the training pairs.
      learning_rates: of Adam, to choose from.
      train_pairs: number of training pairs, the same for all runs.
      key: where all randomness comes from.
      on_epoch: called on the host after every epoch with a label.

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

    def run(
        label: str, network: _Network, combiner: Combiner, **options: Any
    ) -> _Lanes:
        def tick(*_: Any) -> None:
            if on_epoch is not None:
                on_epoch(label)

        return _train_lanes(network, data, combiner, rates, num_epochs, tick, **options)

    single, reference = {}, []
    for task in tasks:
        lanes = run(f"{task} alone", _network((task,), keys), mean(num_tasks=1))
        value = lanes.validation.mean(axis=1)[:, 0]
        best = int(np.argmax(value if classifies(task) else -value))
        single[task] = lanes.at(best, rates)
        reference.append(value[best])

    higher = tuple(classifies(task) for task in tasks)
    network = _network(tasks, keys)
    outcomes = {}
    for name in methods:
        combiner = METHODS[name].make(len(tasks))
        lanes = run(name, network, combiner, extras=extras_of(name))
        value = lanes.validation.mean(axis=1)
        gain = np.asarray(delta_m(value, np.array(reference), higher))
        outcomes[name] = lanes.at(int(np.argmax(gain)), rates)
    return Comparison(tasks, higher, num_epochs, single, outcomes)


def extras_of(name: str) -> Callable[[Key[Array, ""]], Mapping[str, Any]] | None:
    """How the trainer makes the arguments that a method needs besides losses.

    Raises:
      ValueError: when it needs something that this comparison does not have.

    Example:
      >>> from mtl_optax.examples.comparison import extras_of
      >>> extras_of("mgda") is None
      True
    """
    needed = set(METHODS[name].extras(2)) - {"losses"}
    if not needed:
        return None
    if needed == {"key"}:
        return lambda key: {"key": key}
    raise ValueError(
        f"{name} needs {', '.join(sorted(needed))}, which this comparison cannot give."
    )


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


def _network(tasks: tuple[str, ...], keys: Key[Array, " seeds"]) -> _Network:
    init, loss_fn, metric_fn = make_digits(tasks)
    # Not under jit: the layers' random draws compile one by one and only once for all
    # networks, which takes a tenth of the time.
    params = jax.tree.map(lambda *x: jnp.stack(x), *[init(key) for key in keys])
    measure = jax.jit(jax.vmap(metric_fn, in_axes=(0, None)))
    return _Network(tasks, keys, params, loss_fn, measure)


def _train_lanes(
    network: _Network,
    data: _Data,
    combiner: Combiner,
    rates: Float[np.ndarray, " rates"],
    num_epochs: int,
    on_epoch: Callable[..., None],
    extras: Callable[[Key[Array, ""]], Mapping[str, Any]] | None = None,
) -> _Lanes:
    num_rates, num_seeds = len(rates), len(network.keys)
    shared = shared_only(combiner, encoder_mask)

    def chain(rate: Any) -> optax.GradientTransformationExtraArgs:
        # The rate stands in the state, so that runs under `vmap` can differ in it.
        adam = optax.inject_hyperparams(optax.adam)(learning_rate=rate)
        return optax.chain(shared, adam)

    # Indexing copies, also where there is only one rate: what trains is donated, and
    # the next method starts from the same parameters.
    seed = jnp.tile(jnp.arange(num_seeds), num_rates)
    states = jax.vmap(lambda p, rate, key: init_state(p, chain(rate), key))(
        jax.tree.map(lambda x: x[seed], network.params),
        jnp.repeat(jnp.asarray(rates), num_seeds),
        network.keys[seed],
    )
    epoch = make_epoch(
        network.loss_fn,
        chain(0.0),
        BATCH_SIZE,
        # A lazy Gramian goes forward again for every column. For a few tasks of so
        # small a network it is cheaper to keep the rows.
        stacked=True,
        look_at=encoder_mask if len(network.tasks) > 1 else None,
        look_every=LOOK_EVERY,
        extras=extras,
    )
    states, record = train(
        epoch,
        states,
        data.train,
        num_epochs,
        over_seeds=True,
        donate=True,
        on_epoch=on_epoch,
    )

    def by_lane(x: Array) -> np.ndarray:
        return np.asarray(x).reshape(num_rates, num_seeds, *x.shape[1:])

    def measured(pairs: Pairs) -> np.ndarray:
        values = network.measure(states.params, pairs)
        return by_lane(jnp.stack([values[task] for task in network.tasks], axis=-1))

    return _Lanes(
        measured(data.validation),
        measured(data.test),
        jax.tree.map(by_lane, record),
    )
