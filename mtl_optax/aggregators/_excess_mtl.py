"""ExcessMTL: more weight to tasks that are far from where they will converge.

He et al. 2024, ICML, "Robust Multi-Task Learning with Excess Risks", arXiv:2402.02009
(equations 6, 7 and 9; what is scaled by what from the authors' code). Entry by entry,
for every task t:

    S_t <- S_t + g_t^2,     e_t = sum g_t^2 / sqrt(S_t + 1e-7)
    w <- T softmax(log w + eta e / e_first),     u = sum_t w_t g_t
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_count, check_nonnegative, check_num_tasks
from mtl_optax._moments import (
    count_present,
    keep_absent,
    row_norms,
    sound_rows,
    wide_rows,
    zero_rows,
)
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import state_dtype, weighted_sum
from mtl_optax._types import (
    Aggregator,
    Params,
    TaskGradients,
    TaskMask,
    Updates,
    Weights,
)

_EPS = 1e-7
# Of an excess risk to the first: beyond, differences would leave float32.
_LARGEST_RATIO = 1e30
_LARGEST_SQUARE = 1e38


class ExcessInfo(NamedTuple):
    """What to look at after a step.

    Attributes:
      task_weights: the weights of the combination; zero for absent tasks.
      excess_risks: estimates of how far each task is from its optimum.
    """

    task_weights: Float[Array, " tasks"]
    excess_risks: Float[Array, " tasks"]


class ExcessState(NamedTuple):
    """State of `excess_mtl`.

    Attributes:
      squares_sum: of every task's gradient, entry by entry.
      first_risk: what excess risks are measured by.
      risks_seen: how many steps of a task `first_risk` is the mean of.
      log_weights: zeros at first; absent tasks' hold still.
      info: what a person looks at.
    """

    squares_sum: TaskGradients
    first_risk: Float[Array, " tasks"]
    risks_seen: Int[Array, " tasks"]
    log_weights: Float[Array, " tasks"]
    info: ExcessInfo


def _excess_risks(
    rows: TaskGradients, squares_sum: TaskGradients, axis_name: Any
) -> Float[Array, " tasks"]:
    """``e [T]``: squared lengths of ``g / (S + eps)^(1/4)``, so that none overflows."""
    roots = jax.tree.map(
        lambda g, s: g / jnp.sqrt(jnp.sqrt(s + _EPS)), rows, squares_sum
    )
    return jnp.square(row_norms(roots, axis_name))


def _follow(
    log_weights: Float[Array, " tasks"],
    steps: Float[Array, " tasks"],
    task_mask: TaskMask,
) -> tuple[Weights, Float[Array, " tasks"]]:
    """Weights that sum to the number of present tasks, and their logarithms to keep."""
    moved = jax.nn.log_softmax(log_weights + steps, where=task_mask)
    # Present tasks share out what they held together, so absent ones keep their part.
    held = jax.nn.logsumexp(log_weights, where=task_mask)
    kept = jnp.where(task_mask, moved + held, log_weights)
    weights = jnp.where(task_mask, jnp.exp(moved), 0)
    return count_present(task_mask, weights.dtype) * weights, kept


def excess_mtl(
    num_tasks: int,
    *,
    step_size: float | jax.Array = 0.01,
    num_warmup: int = 1,
    raw_first_risk: bool = False,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Weights that grow with a task's distance from its own optimum.

    .. math:: u = \sum_t w_t g_t, \qquad
       w \leftarrow T \, \mathrm{softmax}\Big(\log w + \eta \frac{e}{e^0}\Big), \qquad
       e_t = \sum g_t^2 \big/ \sqrt{\textstyle\sum_k g_{t,k}^2}

    The excess risk ``e``, a loss less what it could be at best, is estimated from
    gradients, with AdaGrad's sum of squares as the Hessian. A task with noisy labels
    keeps a large loss for ever, yet its excess risk falls: so it does not take over, as
    with weights that follow losses. Use it where labels of some tasks are bad. Weights
    move slowly and one way: a task that stays behind gains at every step. It does not
    look at conflict.

    Args:
      num_tasks: T.
      step_size: eta, not negative; 0.01 in the authors' code (1 in TorchJD).
      num_warmup: over how many steps of its own a task's first risk is averaged; for
        so long it counts as 1. 1 in the authors' code, three epochs in their paper.
      raw_first_risk: of a task's first step take the risk itself instead of 1. It puts
        nearly all weight on the longest gradient at once; TorchJD's default does so.
      scale: ``"paper"`` (weights sum to the number of present tasks) or ``"norm"``; see
        `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which risks are summed.

    Returns:
      a `Combiner`. **Memory**: T copies of the parameters, in float32 at least, and T
      gradients a step: a lazy tree is materialised, T backward passes. ``task_weights``
      and ``excess_risks`` are in its state. A task that comes later is measured by its
      own first risk, and so is one whose gradient was zero until then. A
      gradient that is not finite is not remembered.

    Raises:
      ValueError: when `step_size` is concrete and negative or not finite, or
        `num_warmup` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.excess_mtl(num_tasks=2, step_size=1.0)
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for second in (4.0, 3.0):  # the second task's gradient falls
      ...     g = {"w": jnp.array([[3.0, 0.0], [0.0, second]])}
      ...     updates, state = tx.update(g, state)
      >>> [f"{x:.2f}" for x in state.aggregator.info.excess_risks]  # 9 / sqrt(18), 9/5
      ['2.12', '1.80']
      >>> [f"{x:.2f}" for x in updates["w"]]  # risks were 3 and 4: ratios 0.71, 0.45
      ['3.38', '2.62']

    References:
      He et al., `Robust Multi-Task Learning with Excess Risks
      <https://arxiv.org/abs/2402.02009>`_, ICML 2024.

    Differs from the authors' code: weights are kept as logarithms, so that none
    overflows or is lost for good; a first risk of zero waits for one that is not.
    (TorchJD's weights sum to 1; its ``n_warmup_steps=1`` is as here, its default of 0
    is ``raw_first_risk=True``.)
    """
    check_num_tasks(num_tasks)
    check_nonnegative("step_size", step_size)
    check_count("num_warmup", num_warmup)

    def init(params: Params, num_tasks: int) -> ExcessState:
        dtype = state_dtype(params)

        def zeros() -> Array:
            return jnp.zeros((num_tasks,), dtype)

        return ExcessState(
            zero_rows(params, num_tasks),
            zeros(),
            jnp.zeros((num_tasks,), jnp.int32),
            zeros(),
            ExcessInfo(zeros(), zeros()),
        )

    def update(
        rows: TaskGradients,
        state: ExcessState,
        params: Params | None,
        *,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Updates, ExcessState]:
        del params, extra
        wide = wide_rows(rows, state.squares_sum)
        # Rows of absent tasks are zeros: their sums do not move.
        squares = jax.tree.map(
            lambda s, g: jnp.minimum(s + g * g, _LARGEST_SQUARE),
            state.squares_sum,
            wide,
        )
        risk = _excess_risks(wide, squares, axis_name)
        risk = risk.astype(state.first_risk.dtype)

        first, seen = state.first_risk, state.risks_seen
        warming = seen < num_warmup
        first = jnp.where(warming, first + (risk - first) / (seen + 1), first)
        first = jnp.where(first > 0, first, risk)
        ratio = jnp.minimum(risk / jnp.where(first > 0, first, 1), _LARGEST_RATIO)
        ratio = jnp.where(warming, 1, ratio)
        if raw_first_risk:
            ratio = jnp.where(seen == 0, jnp.minimum(risk, _LARGEST_RATIO), ratio)
        steps = jnp.asarray(step_size, risk.dtype) * ratio
        known = sound_rows(wide, task_mask, axis_name)
        steps = jnp.where(known, steps, 0)
        weights, log_weights = _follow(state.log_weights, steps, task_mask)
        now = (squares, first, jnp.minimum(seen + 1, num_warmup))
        before = (state.squares_sum, state.first_risk, seen)
        squares, first, seen = keep_absent(known, now, before)
        info = ExcessInfo(weights, risk)
        updates = weighted_sum(weights, rows)
        return updates, ExcessState(squares, first, seen, log_weights, info)

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
