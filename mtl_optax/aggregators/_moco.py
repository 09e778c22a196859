"""MoCo: the shortest convex combination of gradients that are tracked over time.

Fernando et al. 2023, ICLR, "Mitigating Gradient Bias in Multi-objective Learning: A
Provably Convergent Approach", arXiv:2210.12624 (as in the authors' code). For every
task t, and with the projection P on the simplex:

    y_t <- y_t - beta_k (y_t - g_t)
    lambda <- P(lambda - gamma_k (y y^T + rho I) lambda),     u = sum_t lambda_t y_t
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mtl_optax._arguments import check_choice, check_nonnegative, check_num_tasks
from mtl_optax._moments import (
    column,
    inverse_or_zero,
    keep_absent,
    keep_shares,
    like,
    present_shares,
    row_norms,
    sound_rows,
    wide_rows,
    zero_rows,
)
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import HIGHEST, gramian, state_dtype, weighted_sum
from mtl_optax._types import (
    Aggregator,
    Losses,
    Params,
    TaskGradients,
    TaskMask,
    Updates,
    Weights,
)
from mtl_optax.solvers import simplex_projection

Lengths: TypeAlias = Literal["plain", "loss"]
OntoSimplex: TypeAlias = Literal["projection", "softmax"]

# Of a tracked gradient: beyond, its square would leave float32.
_LONGEST = 1e15


class MocoState(NamedTuple):
    """State of `moco`.

    Attributes:
      tracked: y, a gradient a task.
      shares: lambda, in units of an equal share.
      steps_seen: the number of steps each task was present.
    """

    tracked: TaskGradients
    shares: Float[Array, " tasks"]
    steps_seen: Int[Array, " tasks"]


def _at_length_of_loss(
    rows: TaskGradients, losses: Losses, axis_name: Any
) -> TaskGradients:
    """``|L_t| g_t / |g_t|``; a gradient of zero stays zero."""
    inverse = inverse_or_zero(row_norms(rows, axis_name))
    # In two steps: their product may leave float32.
    return jax.tree.map(
        lambda g: g * column(inverse, g) * column(jnp.abs(losses), g), rows
    )


def _descend(
    shares: Weights,
    tracked: TaskGradients,
    rates: Float[Array, " tasks"],
    rho: Array,
    axis_name: Any,
) -> Float[Array, " tasks"]:
    """``lambda - gamma (y y^T + rho I) lambda``; rows of absent tasks are zero."""
    longest = jnp.max(row_norms(tracked, axis_name)).astype(shares.dtype)
    unit = jnp.where(longest > 0, longest, 1)
    scaled = jax.tree.map(lambda y: y / unit.astype(y.dtype), tracked)
    gram = gramian(scaled, axis_name=axis_name).astype(shares.dtype)
    slope = jnp.matmul(gram, shares, precision=HIGHEST)
    slope = jnp.square(jnp.minimum(unit, _LONGEST)) * slope + rho * shares
    return shares - rates * slope


def moco(
    num_tasks: int,
    *,
    beta: float | jax.Array = 0.1,
    gamma: float | jax.Array = 0.1,
    rho: float | jax.Array = 0.1,
    beta_sigma: float | jax.Array = 0.0,
    gamma_sigma: float | jax.Array = 0.0,
    lengths: Lengths = "plain",
    onto_simplex: OntoSimplex = "projection",
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The shortest convex combination, of tracked gradients, approached step by step.

    .. math:: u = \sum_t \lambda_t y_t, \qquad
       y_t \leftarrow y_t - \beta_k (y_t - g_t), \qquad
       \lambda \leftarrow \Pi_\Delta\big(\lambda
       - \gamma_k (y y^\top + \rho I) \lambda\big)

    The weights that `mgda` finds on a small batch are biased, since they depend on the
    same noise as the gradients. Here both are smoothed: gradients by a running mean,
    weights by one small step of projected descent each time. Use it where batches are
    small and `mgda` is restless. It is not free of scale: ``gamma`` times the squared
    length of a gradient should be around 0.1 or less (long gradients make the weights
    jump from task to task; ``lengths="loss"`` helps). Tracking starts from zero, so the
    first updates are short; momentum in a following optimiser smooths a second time.

    Args:
      num_tasks: T.
      beta: rate of tracking, at most 1 (no smoothing). 0.1 in the authors' code.
      gamma: rate of the weights, not negative. 0.1 there.
      rho: pull towards equal weights, not negative. 0.1 there.
      beta_sigma: at a task's step k, its beta is divided by ``k ** beta_sigma``. 0.
      gamma_sigma: the same for gamma. 0.
      lengths: ``"plain"``, or ``"loss"``: every gradient is first brought to the length
        of its loss (needs losses; one below zero counts by its size).
      onto_simplex: ``"projection"`` as in the paper, or ``"softmax"``. LibMTL has
        ``moco(T, beta=0.5, rho=0.0, beta_sigma=0.5, gamma_sigma=0.5, lengths="loss",
        onto_simplex="softmax")``; while losses are around 1 or less, a softmax of such
        small numbers is nearly flat, and its weights nearly equal.
      scale: ``"paper"`` (weights sum to 1) or ``"norm"``; see `from_aggregator`.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which inner products are summed.

    Returns:
      a `Combiner`. **Memory**: T copies of the parameters, in float32 at least, and T
      gradients a step: a lazy tree is materialised, T backward passes. ``tracked`` and
      ``shares`` (times T) are in its state. Absent tasks' wait, and
      a gradient that is not finite is not remembered.

    Raises:
      ValueError: for an argument that is concrete and out of range.
      TypeError: when ``lengths="loss"`` is given no losses.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.moco(num_tasks=2, beta=0.5, rho=0.0)
      >>> g = {"w": jnp.array([[4.0, 0.0], [0.0, 2.0]])}
      >>> updates, state = tx.update(g, tx.init({"w": jnp.zeros(2)}))
      >>> state.aggregator.tracked["w"].tolist()
      [[2.0, 0.0], [0.0, 1.0]]
      >>> [f"{x:.3f}" for x in updates["w"]]  # 1/2 - (0.2, 0.05), projected, times y
      ['0.850', '0.575']

    References:
      Fernando et al., `Mitigating Gradient Bias in Multi-objective Learning: A Provably
      Convergent Approach <https://arxiv.org/abs/2210.12624>`_, ICLR 2023.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("beta", beta, at_most=1)
    decays = {"beta_sigma": beta_sigma, "gamma_sigma": gamma_sigma}
    for name, value in ({"gamma": gamma, "rho": rho} | decays).items():
        check_nonnegative(name, value)
    check_choice("lengths", lengths, get_args(Lengths))
    check_choice("onto_simplex", onto_simplex, get_args(OntoSimplex))

    def init(params: Params, num_tasks: int) -> MocoState:
        return MocoState(
            zero_rows(params, num_tasks),
            jnp.ones((num_tasks,), state_dtype(params)),
            jnp.zeros((num_tasks,), jnp.int32),
        )

    def update(
        rows: TaskGradients,
        state: MocoState,
        params: Params | None,
        *,
        losses: Losses | None,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Updates, MocoState]:
        del params, extra
        dtype = state.shares.dtype
        wide = wide_rows(rows, state.tracked)
        if lengths == "loss":
            if losses is None:
                raise TypeError(
                    "moco needs losses for lengths='loss': call tx.update(task_grads, "
                    f"state, params, losses=losses) with shape ({num_tasks},)."
                )
            wide = _at_length_of_loss(wide, losses, axis_name)
        seen = state.steps_seen + 1

        def rate(first: Any, sigma: Any) -> Float[Array, " tasks"]:
            decay = seen.astype(dtype) ** -jnp.asarray(sigma, dtype)
            return jnp.asarray(first, dtype) * decay

        def track(y: Array, g: Array) -> Array:
            return y - column(rate(beta, beta_sigma), y) * (y - g)

        tracked = jax.tree.map(track, state.tracked, wide)
        present = keep_absent(task_mask, tracked, jax.tree.map(jnp.zeros_like, tracked))
        shares = present_shares(state.shares, task_mask)
        point = _descend(
            shares,
            present,
            rate(gamma, gamma_sigma),
            jnp.asarray(rho, dtype),
            axis_name,
        )
        if onto_simplex == "projection":
            shares = simplex_projection(point, task_mask)
        else:
            shares = jax.nn.softmax(point, where=task_mask)
        updates = like(weighted_sum(shares, present), rows)
        known = sound_rows(wide, task_mask, axis_name)
        tracked, seen = keep_absent(
            known, (tracked, seen), (state.tracked, state.steps_seen)
        )
        kept = keep_shares(state.shares, shares, task_mask)
        return updates, MocoState(tracked, kept, seen)

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
