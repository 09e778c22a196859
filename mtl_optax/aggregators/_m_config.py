"""M-ConFIG: a conflict-free direction of the tasks' momenta, scaled as Adam's.

Liu, Chu & Thuerey 2025, ICLR, "ConFIG: Towards Conflict-free Training of Physics
Informed Neural Networks", arXiv:2408.11104 (momentum version, as in the authors' code).
At step k, of which task t had a new gradient at k_t:

    m_t <- b1 m_t + (1 - b1) g_t  where it is new,   h_t = m_t / (1 - b1^k_t)
    d = pinv(rows h_t / |h_t|) 1,     g = (sum_t h_t . d) d / |d|^2
    p = (1 - b1^k) g,     v <- b2 v + (1 - b2) ((p - b1 p_before) / (1 - b1))^2
    u = g / (sqrt(v / (1 - b2^k)) + eps)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mtl_optax._arguments import check_nonnegative, check_num_tasks, check_positive
from mtl_optax._learned import LARGEST_GRADIENT
from mtl_optax._moments import (
    column,
    keep_absent,
    like,
    sound_rows,
    wide_rows,
    zero_row,
    zero_rows,
)
from mtl_optax._transform import Combiner, from_aggregator
from mtl_optax._tree import gramian, state_dtype, weighted_sum
from mtl_optax._types import (
    Aggregator,
    Params,
    TaskGradients,
    TaskMask,
    Updates,
)
from mtl_optax.solvers import conflict_free_weights, unit_rows


class MConfigState(NamedTuple):
    """State of `m_config`.

    Attributes:
      momenta: m, one a task.
      pseudo_momentum: p, the momentum that would have given the last combination.
      pseudo_squares: v, of the gradients that would have given p.
      momenta_seen: the number of new gradients of each task.
      combinations: the number of steps that p and v have seen.
    """

    momenta: TaskGradients
    pseudo_momentum: Updates
    pseudo_squares: Updates
    momenta_seen: Int[Array, " tasks"]
    combinations: Int[Array, ""]


def _read_fresh(fresh: Any, task_mask: TaskMask) -> TaskMask:
    if fresh is None:
        return task_mask
    fresh = jnp.asarray(fresh)
    if fresh.shape != task_mask.shape or fresh.dtype != jnp.bool_:
        raise ValueError(
            f"fresh: expected bools of shape {task_mask.shape}, True where the task's "
            f"gradient is new, got {fresh.dtype} of shape {fresh.shape}."
        )
    return fresh & task_mask


def m_config(
    num_tasks: int,
    *,
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    eps: float | jax.Array = 1e-8,
    axis_name: Any = None,
) -> Combiner:
    r"""The direction at equal angles with the tasks' momenta, with Adam's step size.

    .. math::

        u = \frac{g}{\sqrt{\hat v} + \epsilon}, \qquad
        g = \Big(\sum_t \hat m_t^\top d\Big) d, \qquad
        d = \mathcal{U}\big( [\mathcal{U}(\hat m_1), \dots, \mathcal{U}(\hat m_T)]^{+}
        \mathbf{1} \big)

    where U makes a vector one of unit length, and v is a running mean of squares of the
    gradients that would have given g by plain momentum. Momenta change slowly, so not
    every task needs a new gradient at every step: with ``fresh=`` one backward pass, of
    one task in turn, is enough. Use it for physics-informed networks of a few losses
    whose gradients cost much. It is an optimiser: put a learning rate behind it, no
    Adam. After the division entry by entry nothing is promised about conflict. Use it
    on all parameters, heads too: under `shared_only` heads would get their plain sum,
    by no optimiser.

    Args:
      num_tasks: T.
      b1: decay of the momenta; 0.9 in the authors' code, as in Adam.
      b2: decay of the squares; 0.999, as in Adam.
      eps: added outside the root; 1e-8, as in Adam.
      axis_name: inside `jax.shard_map` with sharded parameters, the mesh axes over
        which inner products are summed.

    Returns:
      a `Combiner`. **Memory**: T + 2 copies of the parameters, in float32 at least. Its
      ``update`` takes ``fresh=``, ``[T]`` of bools (default: all True): the momentum of
      a task that is not fresh stays as it is and takes part all the same, whatever
      stands in its row. Until every present task has had a gradient, updates are zero.
      An absent task (``task_mask``) takes no part, and its momentum waits; a gradient
      longer than 1e18, or not finite, is not fresh. To save
      backward passes give stacked rows, zeros for all tasks but the fresh one; a lazy
      tree is materialised, T backward passes.

    Raises:
      ValueError: for ``b1`` or ``b2`` outside [0, 1), for ``eps`` not positive, and at
        trace time for ``fresh`` that are no ``[T]`` bools.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.m_config(num_tasks=2)
      >>> state = tx.init({"w": jnp.zeros(2)})
      >>> first = {"w": jnp.array([[3.0, 0.0], [0.0, 0.0]])}
      >>> updates, state = tx.update(first, state, fresh=jnp.array([True, False]))
      >>> updates["w"].tolist()  # nothing is known of the second task yet
      [0.0, 0.0]
      >>> second = {"w": jnp.array([[0.0, 0.0], [-4.0, 4.0]])}
      >>> updates, state = tx.update(second, state, fresh=jnp.array([False, True]))
      >>> [f"{x:.2f}" for x in updates["w"]]  # every entry as Adam's first step
      ['1.00', '1.00']

    References:
      Liu, Chu & Thuerey, `ConFIG: Towards Conflict-free Training of Physics Informed
      Neural Networks <https://arxiv.org/abs/2408.11104>`_, ICLR 2025.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("b1", b1, below=1)
    check_nonnegative("b2", b2, below=1)
    check_positive("eps", eps)

    def init(params: Params, num_tasks: int) -> MConfigState:
        return MConfigState(
            zero_rows(params, num_tasks),
            zero_row(params),
            zero_row(params),
            jnp.zeros((num_tasks,), jnp.int32),
            jnp.zeros((), jnp.int32),
        )

    def update(
        rows: TaskGradients,
        state: MConfigState,
        params: Params | None,
        *,
        task_mask: TaskMask,
        fresh: Any = None,
        **extra: Any,
    ) -> tuple[Updates, MConfigState]:
        del params, extra
        wide = wide_rows(rows, state.momenta)
        asked = _read_fresh(fresh, task_mask)
        new = sound_rows(wide, asked, axis_name, below=LARGEST_GRADIENT)
        dtype = state_dtype(state.pseudo_momentum)
        beta, gamma = jnp.asarray(b1, dtype), jnp.asarray(b2, dtype)

        def decayed(m: Array, g: Array) -> Array:
            b = beta.astype(m.dtype)
            return b * m + (1 - b) * g

        moved = jax.tree.map(decayed, state.momenta, wide)
        momenta = keep_absent(new, moved, state.momenta)
        seen = state.momenta_seen + new.astype(jnp.int32)

        # Never divided by zero: a task without any gradient has a momentum of zero.
        filled = 1 - beta ** jnp.maximum(seen, 1).astype(dtype)
        part = keep_absent(task_mask, momenta, jax.tree.map(jnp.zeros_like, momenta))
        corrected = jax.tree.map(lambda m: m / column(filled, m), part)
        gram = gramian(corrected, axis_name=axis_name).astype(dtype)
        weights = conflict_free_weights(
            unit_rows(gram, task_mask), jnp.ones_like(filled)
        )
        combined = weighted_sum(weights, corrected)

        count = state.combinations + 1
        fill = 1 - beta ** count.astype(dtype)
        pseudo = jax.tree.map(lambda g: fill.astype(g.dtype) * g, combined)

        def add_square(v: Array, p: Array, before: Array) -> Array:
            b, c = beta.astype(v.dtype), gamma.astype(v.dtype)
            gradient = (p - b * before) / (1 - b)
            gradient = jnp.clip(gradient, -LARGEST_GRADIENT, LARGEST_GRADIENT)
            return c * v + (1 - c) * jnp.square(gradient)

        squares = jax.tree.map(
            add_square, state.pseudo_squares, pseudo, state.pseudo_momentum
        )
        correction = 1 - gamma ** count.astype(dtype)

        def normalised(g: Array, v: Array) -> Array:
            root = jnp.sqrt(v / correction.astype(v.dtype))
            return g / (root + jnp.asarray(eps, v.dtype))

        steps = jax.tree.map(normalised, combined, squares)
        ready = jnp.any(task_mask) & jnp.all(jnp.where(task_mask, seen > 0, True))
        steps = jax.tree.map(lambda u: jnp.where(ready, u, jnp.zeros_like(u)), steps)

        def chosen(a: Array, b: Array) -> Array:
            # A scalar condition would ask for two arrays that are sharded alike.
            return jnp.where(ready.reshape((1,) * a.ndim), a, b)

        after = MConfigState(momenta, pseudo, squares, seen, count)
        waiting = state._replace(momenta=momenta, momenta_seen=seen)
        return like(steps, rows), jax.tree.map(chosen, after, waiting)

    # No `scale="norm"`: it would bring back the gradients' lengths.
    return from_aggregator(Aggregator(init, update), num_tasks, axis_name=axis_name)
