"""Every way of training the digits, behind one interface.

A method of the registry stands in a chain ``combiner, Adam`` and acts on the shared
encoder. Three systems are more than a combiner and are trained as their papers have it:

* ``priority_projection``: a network with one batch norm a task, two phases (Jeong &
  Yoon 2024). Beside it stands `CONTROL`: the same network on the plain sum.
* ``scale_by_mao``: in Adam's place, on all parameters (Hervella et al. 2024).
* ``look_ahead_jacobian``: heads first, then the encoder one step ahead (Lee & Son
  2020, after the abstract).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

import mtl_optax as mtl
from mtl_optax._look_ahead_steps import LookAheadSteps
from mtl_optax.examples.digits import Pairs
from mtl_optax.examples.models import encoder_mask, make_digits
from mtl_optax.examples.task_norm import (
    MixedState,
    make_mixed_epoch,
    make_task_norm_digits,
)
from mtl_optax.examples.trainer import (
    Record,
    TrainState,
    init_state,
    make_epoch,
    make_step_epoch,
)

BATCH_SIZE = 128
LOOK_EVERY = 4
LOOK_AHEAD = 0.03  # inner learning rate; from 0.3 on the digits overshoot

PLAIN = "plain"
CONTROL = "sum, task norms"

Rate: TypeAlias = float | Float[Array, ""]


class System(NamedTuple):
    """A way of training, as pure functions of one run.

    Attributes:
      network: the name of its architecture; systems that share it start alike.
      start: ``key -> `` what does not depend on the learning rate.
      init: ``(start, learning rate, key) -> state``; the rate stands in the state, so
        that runs under `vmap` can differ in it.
      epoch: ``(state, pairs, number from 0) -> (state, Record)``.
      measure: ``(state, pairs) -> {task: metric}``.
      phases: epoch numbers between which the cost of a step differs.
    """

    network: str
    start: Callable[[Key[Array, ""]], Any]
    init: Callable[[Any, Rate, Key[Array, ""]], Any]
    epoch: Callable[[Any, Pairs, int | Int[Array, ""]], tuple[Any, Record]]
    measure: Callable[[Any, Pairs], dict[str, Array]]
    phases: tuple[int, ...] = (0,)


def with_controls(methods: Sequence[str]) -> tuple[str, ...]:
    """The systems to train for these methods: each, and what it must be held against.

    Example:
      >>> from mtl_optax.examples.systems import with_controls
      >>> with_controls(["mean", "priority_projection"])
      ('mean', 'priority_projection', 'sum, task norms')
    """
    pairs = [
        (name, CONTROL) if name == "priority_projection" else (name,)
        for name in methods
    ]
    return tuple(name for pair in pairs for name in pair)


def make_system(
    name: str, tasks: Sequence[str], num_epochs: int, *, look: bool = True
) -> System:
    """Builds the system of that name.

    Args:
      name: a method of `mtl_optax.METHODS`, `CONTROL`, or `PLAIN` (Adam on the sum of
        the losses).
      tasks: see `mtl_optax.examples.digits.parse_tasks`.
      num_epochs: over which a schedule of phases runs.
      look: records Gramians now and then, where the system has one set of task
        gradients a step.

    Returns:
      a `System`.

    Raises:
      ValueError: when the method needs something that the digits do not give.

    Example:
      >>> import jax
      >>> from mtl_optax.examples.systems import make_system
      >>> system = make_system("scale_by_mao", ("CL", "RR"), num_epochs=1)
      >>> key = jax.random.key(0)
      >>> state = system.init(system.start(key), 1e-3, key)
    """
    tasks = tuple(sorted(tasks))
    if name in ("priority_projection", CONTROL):
        return _two_phases(tasks, num_epochs, control=name == CONTROL)
    if name == "look_ahead_jacobian":
        return _look_ahead(tasks)
    return _one_chain(name, tasks, look=look and len(tasks) > 1 and name != PLAIN)


def extras_of(name: str) -> Callable[[Key[Array, ""]], Mapping[str, Any]] | None:
    """How the trainer makes the arguments that a method needs besides losses.

    Raises:
      ValueError: when it needs something that the digits do not give.

    Example:
      >>> from mtl_optax.examples.systems import extras_of
      >>> extras_of("mgda") is None
      True
    """
    if name in ("priority_projection", CONTROL, PLAIN):
        return None
    given = {"gramian", "gramian_in_basis", "losses"}
    needed = set(mtl.METHODS[name].needs) - given
    if not needed:
        return None
    if needed == {"key"}:
        return lambda key: {"key": key}
    raise ValueError(
        f"{name} needs {', '.join(sorted(needed))}, which the digits do not give."
    )


def _adam(rate: Rate) -> optax.GradientTransformationExtraArgs:
    # A product is an array of its own: states are donated, and may hold two of these.
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1.0 * rate)
    return optax.with_extra_args_support(tx)


def _one_chain(name: str, tasks: tuple[str, ...], *, look: bool) -> System:
    """A combiner on the encoder, and Adam; MAO and the plain sum by themselves."""
    init, loss_fn, metric_fn = make_digits(tasks)

    def chain(rate: Rate) -> optax.GradientTransformationExtraArgs:
        if name == "scale_by_mao":
            scale = optax.inject_hyperparams(optax.scale_by_learning_rate)
            return optax.chain(mtl.scale_by_mao(len(tasks)), scale(learning_rate=rate))
        if name == PLAIN:
            return optax.chain(mtl.sum_tasks(len(tasks)), _adam(rate))
        combiner = mtl.METHODS[name].make(len(tasks))
        return optax.chain(mtl.shared_only(combiner, encoder_mask), _adam(rate))

    epoch = make_epoch(
        loss_fn,
        chain(0.0),
        BATCH_SIZE,
        # A lazy Gramian goes forward again for every column. For a few tasks of so
        # small a network it is cheaper to keep the rows; a sum needs none.
        stacked=name != PLAIN,
        look_at=encoder_mask if look else None,
        look_every=LOOK_EVERY,
        extras=extras_of(name),
    )
    return System(
        network="one encoder",
        start=init,
        init=lambda params, rate, key: init_state(params, chain(rate), key),
        epoch=lambda state, pairs, number: epoch(state, pairs),
        measure=lambda state, pairs: metric_fn(state.params, pairs),
    )


def _look_ahead(tasks: tuple[str, ...]) -> System:
    """Heads first; then the encoder, by the sum of gradients one step ahead."""
    init, loss_fn, metric_fn = make_digits(tasks)

    def steps(rate: Rate) -> LookAheadSteps:
        return mtl.look_ahead_steps(
            loss_fn,
            LOOK_AHEAD,
            optax.chain(mtl.sum_tasks(len(tasks)), _adam(rate)),
            _adam(rate),
            shared=encoder_mask,
        )

    epoch = make_step_epoch(steps(0.0).step, BATCH_SIZE)
    return System(
        network="one encoder",
        start=init,
        init=lambda params, rate, key: TrainState(
            params, steps(rate).init(params), key
        ),
        epoch=lambda state, pairs, number: epoch(state, pairs),
        measure=lambda state, pairs: metric_fn(state.params, pairs),
    )


def _two_phases(tasks: tuple[str, ...], num_epochs: int, *, control: bool) -> System:
    """Connection strength; the control has its network, but neither of its phases."""
    problem = make_task_norm_digits(tasks)
    phase_key = jax.random.key(0)  # the same for all runs, so that `cond` stays one
    if control:
        problem = problem._replace(strengths_of=lambda params, stats: {})

    def start(key: Key[Array, ""]) -> tuple[PyTree[Array], PyTree[Array]]:
        return problem.init(key)

    def init(start: Any, rate: Rate, key: Key[Array, ""]) -> MixedState:
        params, stats = start
        return MixedState(params, stats, _adam(rate).init(params), key)

    mixed = make_mixed_epoch(
        problem, _adam(0.0), BATCH_SIZE, num_epochs, phase_1=not control
    )

    def epoch(
        state: MixedState, pairs: Pairs, number: int | Int[Array, ""]
    ) -> tuple[MixedState, Record]:
        state, record = mixed(state, pairs, number, phase_key)
        return state, Record(record.losses, None, None)

    return System(
        network="task norms",
        start=start,
        init=init,
        epoch=epoch,
        measure=lambda state, pairs: problem.metric_fn(
            state.params, state.stats, pairs
        ),
        phases=(0,) if control else (0, num_epochs),
    )
