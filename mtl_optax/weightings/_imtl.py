"""IMTL: impartial multi-task learning, losses and gradients.

IMTL-L brings the losses to one size with learned scales, then IMTL-G finds the update
with equal projections on all task directions (Liu et al. 2021, ICLR, section 3).

    IMTL-L:  s <- s - Adam(d / ds sum_t (exp(s_t) L_t - s_t))
    IMTL-G:  u = sum_t a_t exp(s_t) g_t,  sum_t a_t = 1,
             <u, g_t / |g_t|> equal for all t
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mtl_optax._learned import (
    LARGEST_LOG,
    Learned,
    LearningRate,
    OptimizerOf,
    init_learned,
    learn,
    make_optimizer,
)
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._types import DType, Gramian, Losses, TaskMask, Weighting, Weights
from mtl_optax.solvers import UnitRows, impartial_weights, unit_rows

# Of the logarithms of two tasks' factors apart: shares are found from their ratios.
_LARGEST_RATIO = 40.0


class IMTLState(NamedTuple):
    """State of `imtl`: the logarithms of the losses' scales, and how they are learned.

    Attributes:
      scales: what each task has learned; ``learned_values`` are s.
    """

    scales: Learned


def _scaled_weights(rows: UnitRows, log_scales: Float[Array, " tasks"]) -> Weights:
    """``a_t exp(s_t)``, with the shares ``a_t`` of IMTL-G for ``exp(s_t) g_t``."""
    lowest = jnp.min(log_scales, where=rows.active, initial=jnp.inf)
    highest = jnp.max(log_scales, where=rows.active, initial=-jnp.inf)
    middle = jnp.where(jnp.any(rows.active), (lowest + highest) / 2, 0)
    apart = jnp.clip(log_scales - middle, -_LARGEST_RATIO, _LARGEST_RATIO)
    factors = jnp.where(rows.active, jnp.exp(apart), 1)
    scaled = rows._replace(norms=rows.norms * factors, inverse=rows.inverse / factors)
    return impartial_weights(scaled) * factors * jnp.exp(middle)


def imtl(
    num_tasks: int,
    *,
    learning_rate: LearningRate = 0.025,
    optimizer: OptimizerOf = optax.adam,
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""Equal projections on all task directions, of losses brought to one size.

    .. math:: u = \sum_t \alpha_t e^{s_t} g_t, \qquad
       \Big\langle u, \frac{g_t}{\|g_t\|} \Big\rangle \text{ equal for all } t, \qquad
       \sum_t \alpha_t = 1, \qquad s \leftarrow s - \mathrm{Adam}\big(e^s L - 1\big)

    At rest ``exp(s_t)`` is one over the task's loss. The direction is that of `imtl_g`
    whatever the scales are: they set the length alone. So on shared parameters use it
    instead of `imtl_g` where the update shall not get shorter as losses fall; under an
    optimiser that takes lengths away, as Adam does, the two hardly differ. (The scaled
    losses would also train the heads; `shared_only` gives these their own gradients.)

    Args:
      num_tasks: T.
      learning_rate: of ``s``, not negative; or an optax schedule of a task's own number
        of steps. As for `imtl_l`.
      optimizer: of ``s``: a function of the learning rate.
      scale: see `from_weighting`.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`. ``learned_values`` in its state are ``s``, 0 at first, when it is
      `imtl_g`, kept between -60 and 60. Losses must be positive: below zero ``s``
      climbs. A task whose gradient is zero has no weight for that step, but its ``s``
      is learned; batches whose loss is not finite do not move ``s``. Dependent rows: as
      `imtl_g`.

    Raises:
      ValueError: when `learning_rate` is concrete and negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.imtl(num_tasks=2, learning_rate=0.5)
      >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, 3.0]])}
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> for _ in range(2):
      ...     updates, state = tx.update(g, state, losses=jnp.array([0.1, 0.1]))
      >>> [f"{u:.2f}" for u in updates["w"]]  # exp(0.5) times what imtl_g gives
      ['2.47', '2.47']

    References:
      Liu et al., `Towards Impartial Multi-task Learning
      <https://openreview.net/forum?id=IMPnRXEWpvr>`_, ICLR 2021.

    Differs from the authors' code as `imtl_g` does; ``s`` has an optimiser of its own.
    """
    learner = make_optimizer(optimizer, learning_rate)

    def init(num_tasks: int, dtype: DType) -> IMTLState:
        return IMTLState(init_learned(learner, jnp.zeros((num_tasks,), dtype)))

    def update(
        gramian: Gramian,
        state: IMTLState,
        *,
        losses: Losses,
        task_mask: TaskMask,
        **extra: Any,
    ) -> tuple[Weights, IMTLState]:
        del extra
        s = state.scales.learned_values
        weights = _scaled_weights(unit_rows(gramian, task_mask), s)
        sound = task_mask & jnp.isfinite(losses)
        slope = jnp.exp(s) * losses - 1
        moved = learn(learner, slope, state.scales, sound, limit=LARGEST_LOG)
        return weights, IMTLState(moved)

    return from_weighting(
        Weighting(init, update, frozenset({"gramian", "losses"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
