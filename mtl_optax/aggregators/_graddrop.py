"""GradDrop: gradient sign dropout.

At every entry one sign is drawn, and gradients of the other sign are dropped (Chen et
al. 2020, NeurIPS, arXiv:2010.06808, algorithm 1).

    P = (1 + sum_t g_t / sum_t |g_t|) / 2,   U uniform on [0, 1)
    M_t = 1[f(P) > U] 1[g_t > 0] + 1[f(P) < U] 1[g_t < 0]
    u = sum_t (l_t + (1 - l_t) M_t) g_t
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from mtl_optax._arguments import check_nonnegative, check_num_tasks, read_numbers
from mtl_optax._transform import Combiner, LengthScale, from_aggregator
from mtl_optax._tree import mix_rows
from mtl_optax._types import Aggregator, Params, TaskGradients, Updates


def _read_leak(leak: Any, num_tasks: int) -> Array | np.ndarray:
    """One leak or one a task as an array, checked where it is concrete."""
    numbers, traced = read_numbers(leak)
    if numbers.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"leak: expected one number, or one a task, shape ({num_tasks},), got "
            f"shape {numbers.shape}."
        )
    if not traced:
        for number in np.ravel(numbers):
            check_nonnegative("leak", number, at_most=1)
    return numbers


def _drop(
    rows: Float[Array, "tasks *shape"],
    leak: Float[Array, " tasks"],
    purity: Callable[[Array], Array],
    key: PRNGKeyArray,
) -> Float[Array, "*shape"]:
    """The combination of one leaf."""
    wide = rows.astype(jnp.result_type(jnp.float32, rows.dtype))
    # Of the positive numbers and of the negative: the sum, and what leaks of it.
    shares = jnp.stack([jnp.ones_like(leak), leak], axis=1)
    positive, positive_leak = mix_rows(shares, jnp.maximum(wide, 0))
    negative, negative_leak = mix_rows(shares, jnp.minimum(wide, 0))
    total = positive - negative
    # P without the subtraction: exactly 0 and 1 where all signs agree.
    probability = purity(positive / jnp.where(total > 0, total, 1))
    uniform = jax.random.uniform(key, rows.shape[1:], jnp.float32)
    kept = jnp.where(
        probability > uniform, positive + negative_leak, negative + positive_leak
    )
    return kept.astype(rows.dtype)


def graddrop(
    num_tasks: int,
    *,
    leak: float | Sequence[float] | Array = 0.0,
    f: Callable[[Array], Array] | None = None,
    scale: LengthScale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The sum of the gradients that have, entry by entry, a sign that was drawn.

    .. math:: u = \sum_t (\ell_t + (1 - \ell_t) M_t) \, g_t, \qquad
       M_t = \mathbb 1 [f(P) > U] \, \mathbb 1 [g_t > 0] +
             \mathbb 1 [f(P) < U] \, \mathbb 1 [g_t < 0], \qquad
       P = \frac12 \Big( 1 + \frac{\sum_t g_t}{\sum_t |g_t|} \Big)

    The positive sign is drawn with the probability that the positive numbers' share of
    all magnitudes gives it. An entry on which tasks agree is left as it is; one on
    which they cancel is moved, this way or that: noise that drives training away from
    points where tasks merely hold each other. Use it where conflicts are many and
    small, entry by entry; steps are longer than the sum of the gradients. The noise
    does not fade, so let the learning rate do so.

    Args:
      num_tasks: T.
      leak: the share of each task's gradient that is never dropped, from 0 to 1; one
        number, or one a task. 0 in the paper's algorithm without leaks.
      f: a rising function from [0, 1] to [0, 1] that makes a probability of the purity
        P; default: the identity. A steep one is nearer to a vote than to a draw.
      scale: ``"paper"`` or ``"norm"``, see `from_weighting`.
      axis_name: see `from_weighting`. Inside `jax.shard_map` every device draws for
        its own part, by the key that it is given: fold its `jax.lax.axis_index` in.

    Returns:
      a `Combiner`, without state. ``update`` needs ``key=``, a fresh `jax.random.key` a
      step; an absent task does not change the draws. A lazy tree is materialised, T
      backward passes.

    Raises:
      TypeError: when ``key=`` is missing.
      ValueError: when `leak` is concrete and not within [0, 1], or no number a task.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.graddrop(num_tasks=2)
      >>> g = {"w": jnp.array([[1.0, -3.0, 2.0], [4.0, -1.0, -2.0]])}
      >>> state = tx.init({"w": jnp.zeros(3)})
      >>> update = lambda key: tx.update(g, state, key=jax.random.key(key))[0]["w"]
      >>> update(0)[:2]  # tasks agree
      Array([ 5., -4.], dtype=float32)
      >>> sorted({float(update(key)[2]) for key in range(9)})  # they do not
      [-2.0, 2.0]

    References:
      Chen et al., `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
      Sign Dropout <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020.

    Differs from the paper: there it is a layer, on the gradients at an activation,
    whose own signs count and whose batch is summed first. Here, as in TorchJD, it looks
    at the parameters' gradients.
    """
    check_num_tasks(num_tasks)
    given = _read_leak(leak, num_tasks)
    purity = (lambda share: share) if f is None else f

    def init(params: Params, num_tasks: int) -> tuple[()]:
        del params, num_tasks
        return ()

    def update(
        rows: TaskGradients,
        state: tuple[()],
        params: Params | None,
        *,
        key: PRNGKeyArray | None = None,
        **extra: Any,
    ) -> tuple[Updates, tuple[()]]:
        del params, extra
        if key is None:
            raise TypeError(
                "graddrop is random: call tx.update(..., key=key) with a fresh "
                "jax.random.key at every step."
            )
        leaks = jnp.broadcast_to(jnp.asarray(given, float), (num_tasks,))
        leaves, treedef = jax.tree.flatten(rows)
        # Absent tasks' rows are zeros, which have no sign.
        updates = [
            _drop(g, leaks, purity, jax.random.fold_in(key, number))
            for number, g in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, updates), state

    return from_aggregator(
        Aggregator(init, update), num_tasks, scale=scale, axis_name=axis_name
    )
