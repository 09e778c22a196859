"""The Task Tensioner authors' logic experiment, for many seeds at once.

A tiny network learns logic functions of two bits: a shared ``Linear(2, 2)`` with a
sigmoid, and one ``Linear(2, 1)`` a task. The target of ``xor`` is scaled by 10, so its
loss and its gradients are some hundred times those of ``and``. Two batches of two
points an epoch, reshuffled every epoch; mean squared error; at most 2500 epochs.

The authors give the encoder and every head an SGD of its own, and step the heads from
the same encoder output before the encoder. All these gradients are taken at one point,
so the whole experiment is one optax chain:

    optax.chain(mtl.shared_only(combiner, encoder_mask), optax.sgd(0.05, momentum=0.9))

`train` is one run in one `lax.while_loop`; `run` maps it over seeds by `jax.vmap`,
where a finished run stands still until all are done.
``python -m mtl_optax.examples.logic`` prints all twelve settings that the authors' code
was run with beside what it gave.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree
from tqdm import tqdm

import mtl_optax as mtl
from mtl_optax.examples.models import encoder_mask

POINTS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
TARGETS = {
    "and": np.array([0, 0, 0, 1]),
    "xor": np.array([0, 1, 1, 0]),
    "or": np.array([0, 1, 1, 1]),
}
LEARNING_RATE, MOMENTUM = 0.05, 0.9
BATCHES, BATCH_SIZE = 2, 2
MAX_EPOCHS = 2500
MIN_ERROR = 1e-3
AUTHORS_SEED = 136

Params: TypeAlias = PyTree[Any]
LossFn: TypeAlias = Callable[[Params, Int[Array, " batch"]], Float[Array, " tasks"]]
Carry: TypeAlias = tuple[Params, optax.OptState]
Step: TypeAlias = Callable[
    [Carry, Int[Array, " batch"]], tuple[Carry, Float[Array, " tasks"]]
]


class LogicNet(nnx.Module):
    """Shared ``Linear(2, 2)`` and sigmoid, then ``Linear(2, 1)`` for each task.

    Weights and biases start uniform within ``1 / sqrt(fan_in)``, PyTorch's default.

    Args:
      tasks: names of the tasks, which name the heads.
      rngs: source of the initial values.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from mtl_optax.examples.logic import LogicNet
      >>> model = LogicNet(("xor", "and"), rngs=nnx.Rngs(jax.random.key(0)))
      >>> model(jnp.zeros((4, 2))).shape
      (4, 2)
    """

    def __init__(self, tasks: Sequence[str], *, rngs: nnx.Rngs) -> None:
        # Both layers have two inputs.
        uniform = functools.partial(_symmetric_uniform, bound=2**-0.5)
        linear = functools.partial(
            nnx.Linear, 2, kernel_init=uniform, bias_init=uniform, rngs=rngs
        )
        self.encoder = linear(2)
        self.heads = nnx.Dict({task: linear(1) for task in tasks})
        self.tasks = tuple(tasks)

    def __call__(self, x: Float[Array, "batch 2"]) -> Float[Array, "batch tasks"]:
        features = nnx.sigmoid(self.encoder(x))
        return jnp.concatenate([self.heads[t](features) for t in self.tasks], axis=-1)


def _symmetric_uniform(
    key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *, bound: float
) -> Array:
    return jax.random.uniform(key, tuple(shape), dtype, -bound, bound)


class Setting(NamedTuple):
    """One row of the experiment.

    Attributes:
      name: what the table prints.
      targets: pairs of task and scale of its target, in task order.
      alpha: of `mtl_optax.task_tensioner`; None trains with `mtl_optax.edm`.
      init_seed: initial values of all runs; None gives each run its own.
    """

    name: str
    targets: tuple[tuple[str, float | Array], ...]
    alpha: float | Array | None
    init_seed: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(task for task, _ in self.targets)


class Outcome(NamedTuple):
    """How runs ended; `run` adds a leading axis of seeds to every field.

    Attributes:
      converged_at: for each task, the index of the first epoch in which its error was
        below the threshold; -1 if none was.
      last_epoch: index of the last epoch that was run.
      finite: whether parameters and losses are free of NaN and inf at the end.
      losses: mean loss of each task in the last epoch.
      params: parameters at the end.
    """

    converged_at: Int[Array, "*seeds tasks"]
    last_epoch: Int[Array, "*seeds"]
    finite: Bool[Array, "*seeds"]
    losses: Float[Array, "*seeds tasks"]
    params: Params

    @property
    def converged(self) -> Bool[Array, "*seeds"]:
        """Whether every task converged."""
        return jnp.all(self.converged_at >= 0, axis=-1)


class Summary(NamedTuple):
    """One line of the table.

    Attributes:
      converged: runs in which every task converged.
      sound: runs without a crash or NaN.
      epochs: min, median, mean and max of the last epoch of converged runs.
    """

    converged: int
    sound: int
    epochs: tuple[float, float, float, float]


_X10 = (("xor", 10.0), ("and", 1.0))
_X1 = (("xor", 1.0), ("and", 1.0))
_REVERSED = (("and", 1.0), ("xor", 10.0))
_WITH_OR = (("xor", 10.0), ("and", 1.0), ("or", 1.0))

# The authors' code, run unmodified (PyTorch 2.13, CPU, float32) with shuffle seeds
# 0..39. A run that crashed counts as not converged.
AUTHORS: tuple[tuple[Setting, Summary], ...] = (
    (
        Setting("seed 136, edm", _X10, None, AUTHORS_SEED),
        Summary(40, 40, (282, 326, 324.6, 366)),
    ),
    (
        Setting("seed 136, alpha .3", _X10, 0.3, AUTHORS_SEED),
        Summary(40, 40, (137, 162, 165.9, 256)),
    ),
    (Setting("edm", _X10, None), Summary(28, 39, (251, 342, 469.5, 2412))),
    (Setting("alpha .3", _X10, 0.3), Summary(24, 39, (116, 180, 212.8, 723))),
    (
        Setting("alpha .3, and first", _REVERSED, 0.3),
        Summary(24, 37, (116, 180, 212.8, 723)),
    ),
    (Setting("alpha 0", _X10, 0.0), Summary(28, 30, (251, 342, 469.4, 2412))),
    (Setting("alpha .6", _X10, 0.6), Summary(25, 37, (105, 157, 171.0, 383))),
    (Setting("alpha 1", _X10, 1.0), Summary(18, 32, (96, 133, 186.1, 987))),
    (Setting("xor x 1, edm", _X1, None), Summary(32, 40, (322, 656, 705.0, 1525))),
    (Setting("xor x 1, alpha .3", _X1, 0.3), Summary(31, 39, (279, 464, 498.8, 783))),
    (
        Setting("with or, edm", _WITH_OR, None),
        Summary(32, 38, (516, 906, 1018.8, 2251)),
    ),
    (
        Setting("with or, alpha .3", _WITH_OR, 0.3),
        Summary(16, 32, (240, 474, 762.5, 2250)),
    ),
)


def make_optimizer(setting: Setting) -> optax.GradientTransformationExtraArgs:
    """The authors' training step of a setting, as one chain."""
    num_tasks = len(setting.tasks)
    if setting.alpha is None:
        combiner = mtl.edm(num_tasks)
    else:
        combiner = mtl.task_tensioner(num_tasks, alpha=setting.alpha)
    return optax.chain(
        mtl.shared_only(combiner, encoder_mask),
        optax.sgd(LEARNING_RATE, momentum=MOMENTUM),
    )


def make_loss_fn(setting: Setting) -> LossFn:
    """``loss_fn(params, batch) -> [T]``, where batch holds indices of `POINTS`."""
    graphdef = nnx.graphdef(LogicNet(setting.tasks, rngs=nnx.Rngs(jax.random.key(0))))
    targets = jnp.stack([TARGETS[task] * s for task, s in setting.targets], axis=-1)

    def loss_fn(params: Params, batch: Int[Array, " batch"]) -> Float[Array, " tasks"]:
        # Layers compute in the wider dtype of input and parameter.
        dtype = params["encoder"]["kernel"].dtype
        outputs = nnx.merge(graphdef, params)(jnp.asarray(POINTS, dtype)[batch])
        errors = outputs - jnp.asarray(targets, dtype)[batch]
        return jnp.mean(jnp.square(errors), axis=0)

    return loss_fn


def make_step(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs) -> Step:
    """One training step: ``((params, opt_state), batch) -> (the same, losses)``."""

    def step(carry: Carry, batch: Int[Array, " batch"]) -> tuple[Carry, Array]:
        params, opt_state = carry
        # With 15 parameters rows cost nothing: no need for a lazy tree.
        losses, task_grads = mtl.value_and_task_grads(loss_fn)(params, batch)
        updates, opt_state = tx.update(task_grads, opt_state, params, losses=losses)
        return (optax.apply_updates(params, updates), opt_state), losses

    return step


class _Loop(NamedTuple):
    params: Params
    opt_state: Any
    converged_at: Int[Array, " tasks"]
    losses: Float[Array, " tasks"]
    epoch: Int[Array, ""]


def train(
    setting: Setting,
    params: Params,
    order: Int[Array, "epochs 4"],
    tx: optax.GradientTransformationExtraArgs | None = None,
) -> Outcome:
    """One run, until every task has converged once or the epochs are over.

    A task has converged in the first epoch in which the sum of its batch losses,
    divided by batches x points x tasks, is below 1e-3: the authors' rule, which grows
    milder with the number of tasks.

    Args:
      setting: tasks and scales; names the optimiser too, if `tx` is None.
      params: initial parameters of `LogicNet`.
      order: the order of the points in every epoch; its length bounds the epochs.
      tx: another optimiser.

    Returns:
      an `Outcome`. Pure: it may be put under `jax.jit` and `jax.vmap`.

    Example:
      >>> import jax
      >>> from mtl_optax.examples import logic
      >>> setting = logic.AUTHORS[1][0]
      >>> params = logic.authors_params(136, setting.tasks)
      >>> outcome = jax.jit(logic.train, static_argnums=0)(
      ...     setting, params, logic.authors_shuffles(0))
      >>> outcome.converged_at, outcome.last_epoch  # `and` first, then `xor`
      (Array([155, 109], dtype=int32), Array(155, dtype=int32))
    """
    num_tasks = len(setting.tasks)
    tx = make_optimizer(setting) if tx is None else tx
    step = make_step(make_loss_fn(setting), tx)
    count = BATCHES * BATCH_SIZE * num_tasks
    order = jnp.asarray(order)

    def goes_on(loop: _Loop) -> Bool[Array, ""]:
        return (loop.epoch < order.shape[0]) & jnp.any(loop.converged_at < 0)

    def one_epoch(loop: _Loop) -> _Loop:
        batches = order[loop.epoch].reshape(BATCHES, BATCH_SIZE)
        carry, losses = lax.scan(step, (loop.params, loop.opt_state), batches)
        below = jnp.sum(losses, axis=0) / count < MIN_ERROR
        newly = below & (loop.converged_at < 0)
        return _Loop(
            *carry,
            converged_at=jnp.where(newly, loop.epoch, loop.converged_at),
            losses=jnp.mean(losses, axis=0),
            epoch=loop.epoch + 1,
        )

    loop = lax.while_loop(
        goes_on,
        one_epoch,
        _Loop(
            params=params,
            opt_state=tx.init(params),
            converged_at=jnp.full((num_tasks,), -1, jnp.int32),
            losses=jnp.zeros((num_tasks,), params["encoder"]["kernel"].dtype),
            epoch=jnp.zeros((), jnp.int32),
        ),
    )
    ends = [*jax.tree.leaves(loop.params), loop.losses]
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in ends]))
    return Outcome(loop.converged_at, loop.epoch - 1, finite, loop.losses, loop.params)


@functools.partial(jax.jit, static_argnames=("tasks",))
def _run(
    tasks: tuple[str, ...],
    scales: tuple[float, ...],
    alpha: float | None,
    params: Params,
    orders: Array,
) -> Outcome:
    # Scales and alpha are traced, so settings that differ in them share a compilation.
    setting = Setting("", tuple(zip(tasks, scales, strict=True)), alpha)
    return jax.vmap(functools.partial(train, setting))(params, orders)


def run(
    setting: Setting,
    params: Params,
    orders: Int[Array, "seeds epochs 4"],
) -> Outcome:
    """`train` for many seeds in one compiled call.

    Args:
      setting: as of `train`.
      params: initial parameters with a leading axis of seeds; see `random_start` and
        `authors_start`.
      orders: data orders, one a seed.

    Returns:
      an `Outcome` with a leading axis of seeds.

    Example:
      >>> import jax
      >>> from mtl_optax.examples import logic
      >>> setting = logic.AUTHORS[2][0]
      >>> start = logic.random_start(jax.random.key(0), setting, 3, epochs=5)
      >>> logic.run(setting, *start).last_epoch
      Array([4, 4, 4], dtype=int32)
    """
    scales = tuple(scale for _, scale in setting.targets)
    return _run(setting.tasks, scales, setting.alpha, params, orders)


@functools.partial(jax.jit, static_argnames=("setting", "seeds", "epochs"))
def random_start(
    key: Array, setting: Setting, seeds: int, *, epochs: int = MAX_EPOCHS
) -> tuple[Params, Int[Array, "seeds epochs 4"]]:
    """Initial parameters and data orders for `run`, drawn by `jax.random`."""
    init_key, order_key = jax.random.split(key)

    def one_order(key: Array) -> Int[Array, "epochs 4"]:
        keys = jax.random.split(key, epochs)
        return jax.vmap(lambda k: jax.random.permutation(k, len(POINTS)))(keys)

    params = jax.vmap(
        lambda k: nnx.to_pure_dict(
            nnx.state(LogicNet(setting.tasks, rngs=nnx.Rngs(k)), nnx.Param)
        )
    )(jax.random.split(init_key, seeds))
    return params, jax.vmap(one_order)(jax.random.split(order_key, seeds))


def authors_params(seed: int, tasks: Sequence[str]) -> Params:
    """The initial values PyTorch draws after ``torch.manual_seed(seed)``.

    NumPy's legacy generator is the same Mersenne twister, and PyTorch makes a float32
    of the low 24 bits of each draw; so the authors' runs can be compared one by one,
    without PyTorch. They draw the encoder, then the heads: and, xor, or.

    Example:
      >>> from mtl_optax.examples.logic import authors_params
      >>> authors_params(136, ("xor", "and"))["encoder"]["bias"]
      Array([0.20681947, 0.24147725], dtype=float32)
    """
    draws = np.random.RandomState(seed).randint(0, 2**32, 64, np.uint64)
    bound = np.float32(2**-0.5).astype(np.float64)
    # One rounding at the end, as a fused multiply-add has it.
    values = ((draws % 2**24) / 2**24 * (2 * bound) - bound).astype(np.float32)

    def linear(start: int, outputs: int) -> Params:
        # PyTorch keeps a weight as [out, in] and draws it before the bias.
        kernel, bias = np.split(values[start : start + 3 * outputs], [2 * outputs])
        return {
            "kernel": jnp.asarray(kernel.reshape(outputs, 2).T),
            "bias": jnp.asarray(bias),
        }

    drawn = [task for task in TARGETS if task in tasks]
    heads = {task: linear(6 + 3 * i, 1) for i, task in enumerate(drawn)}
    return {"encoder": linear(0, 2), "heads": heads}


def authors_shuffles(
    seed: int, epochs: int = MAX_EPOCHS
) -> Int[np.ndarray, "epochs 4"]:
    """The authors' data order after ``numpy.random.seed(seed)``.

    Example:
      >>> from mtl_optax.examples.logic import authors_shuffles
      >>> authors_shuffles(0, epochs=3)
      array([[2, 3, 1, 0],
             [2, 1, 3, 0],
             [0, 2, 3, 1]], dtype=int32)
    """
    generator = np.random.RandomState(seed)
    order = np.arange(len(POINTS))
    orders = np.empty((epochs, len(POINTS)), np.int32)
    for epoch in range(epochs):
        generator.shuffle(order)  # goes on from the order of the epoch before
        orders[epoch] = order
    return orders


def authors_start(
    setting: Setting, seeds: Iterable[int], *, epochs: int = MAX_EPOCHS
) -> tuple[Params, Int[Array, "seeds epochs 4"]]:
    """Initial parameters and data orders for `run`, those of the authors' runs."""
    seeds = list(seeds)
    starts = [
        authors_params(
            seed if setting.init_seed is None else setting.init_seed, setting.tasks
        )
        for seed in seeds
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    return params, jnp.stack([authors_shuffles(seed, epochs) for seed in seeds])


def summarize(outcome: Outcome) -> Summary:
    """Counts and epochs of one setting, over seeds."""
    converged, epochs = np.asarray(outcome.converged), np.asarray(outcome.last_epoch)
    done = epochs[converged] if converged.any() else np.array([np.nan])
    return Summary(
        converged=int(np.sum(converged)),
        sound=int(np.sum(np.asarray(outcome.finite))),
        epochs=(
            float(np.min(done)),
            float(np.median(done)),
            float(np.mean(done)),
            float(np.max(done)),
        ),
    )


def format_table(rows: Iterable[tuple[Setting, Summary, Summary]], seeds: int) -> str:
    """The table: our figures and, in a second line, those of the authors' code."""
    lines = [
        f"Logic experiment, {seeds} seeds a setting",
        f"{'tasks, target scales':26}{'method':20}{'converged':>10}{'no crash':>10}"
        f"  last epoch: min  median    mean    max",
    ]
    for setting, ours, theirs in rows:
        scales = ", ".join(f"{task} x {scale:g}" for task, scale in setting.targets)
        lines.append(f"{scales:26}{setting.name:20}" + _figures(ours))
        lines.append(f"{'':26}{'  authors':20}" + _figures(theirs))
    return "\n".join(lines)


def _figures(summary: Summary) -> str:
    low, median, mean, high = summary.epochs
    return (
        f"{summary.converged:>10}{summary.sound:>10}"
        f"{low:>17.0f}{median:>8.0f}{mean:>8.1f}{high:>7.0f}"
    )


def main(num_seeds: int = 40) -> None:
    """Runs all settings on the authors' own draws and prints the table."""
    seeds = range(num_seeds)
    rows = []
    with tqdm(AUTHORS, unit="setting", leave=False) as bar:
        for setting, theirs in bar:
            bar.set_description(setting.name)
            outcome = run(setting, *authors_start(setting, seeds))
            rows.append((setting, summarize(outcome), theirs))
    print(format_table(rows, num_seeds))


if __name__ == "__main__":
    main()
