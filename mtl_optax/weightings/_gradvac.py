"""GradVac: gradient vaccine.

PCGrad with a target above zero: every pair's cosine is lifted to a running mean of what
it has been (Wang et al. 2021, arXiv:2010.05874, equations 2 and 3).

    p_i = g_i;  for j != i in random order:  phi = cos(p_i, g_j);  if phi < phi_ij:
        p_i <- p_i + |p_i| (phi_ij sqrt(1 - phi^2) - phi sqrt(1 - phi_ij^2))
                     / (|g_j| sqrt(1 - phi_ij^2))  g_j
        phi_ij <- (1 - beta) phi_ij + beta phi
    u = sum_i p_i
"""

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mtl_optax._arguments import check_choice, check_nonnegative, check_num_tasks
from mtl_optax._per_group import leaf_labels, module_labels, per_group
from mtl_optax._random import orders_by_task
from mtl_optax._transform import Combiner, Scale, from_weighting
from mtl_optax._tree import HIGHEST
from mtl_optax._types import DType, Gramian, TaskMask, Weighting, Weights
from mtl_optax.solvers import UnitRows, unit_rows

Group: TypeAlias = Literal["whole", "layer", "leaf"]


# Above it the formula has a pole: a pair that was parallel for long and then is not
# would be lifted by any multiple of its length.
_LARGEST_TARGET = 0.99


class GradvacState(NamedTuple):
    """What the next step needs: ``targets[i, j]``, the running mean of cosines."""

    targets: Float[Array, "tasks tasks"]


def _vaccinate_in_turn(
    rows: UnitRows, targets: Array, orders: Array, beta: Array
) -> tuple[Array, Array]:
    """Coefficients of the ``p_i`` in unit task gradients, and the new targets.

    All tasks take their k-th turn at once; each goes by its own order.
    """
    size, dtype = rows.norms.shape[0], rows.norms.dtype
    own = jnp.arange(size)
    tiny = jnp.finfo(dtype).tiny
    # In `jax.shard_map` what a loop carries must vary as the problem does.
    targets = targets + jnp.zeros_like(rows.cosines)

    def turn(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        lifted, targets = carry
        other = orders[:, k]
        valid = (other != own) & rows.active & rows.active[other]
        along = jnp.sum(lifted * rows.cosines[other], axis=1)
        squares = jnp.sum(
            lifted * jnp.matmul(lifted, rows.cosines, precision=HIGHEST), axis=1
        )
        # What is left of a gradient that the others cancel is rounding, and its angles
        # mean nothing.
        added = jnp.sum(jnp.abs(lifted), axis=1)
        real = squares > 4 * size * jnp.finfo(dtype).eps * added**2
        lengths = jnp.sqrt(jnp.where(real | ~jnp.isfinite(squares), squares, 0))
        cosine = jnp.clip(along / jnp.maximum(lengths, tiny), -1, 1)
        cosine = jnp.where(lengths == 0, 0, cosine)
        usual = targets[own, other]
        target = jnp.minimum(usual, _LARGEST_TARGET)
        missing = jnp.sqrt(1 - target**2)
        lift = target * jnp.sqrt(1 - cosine**2) - cosine * missing
        lift = jnp.where(valid & (cosine < target), lengths * lift / missing, 0)
        # A gradient that is not finite leaves no trace in the targets.
        known = valid & jnp.isfinite(cosine)
        seen = jnp.where(known, beta * (cosine - usual), 0)
        return lifted.at[own, other].add(lift), targets.at[own, other].add(seen)

    return lax.fori_loop(0, size, turn, (jnp.diag(rows.norms), targets))


def gradvac(
    num_tasks: int,
    *,
    beta: float | jax.Array = 0.5,
    group: Group = "whole",
    scale: Scale = "paper",
    axis_name: Any = None,
) -> Combiner:
    r"""The sum of task gradients, each turned towards the others as usual for the pair.

    .. math:: p_i \leftarrow p_i + \frac{\|p_i\| \big(\hat\phi_{ij} \sqrt{1 - \phi^2}
       - \phi \sqrt{1 - \hat\phi_{ij}^2}\big)}{\|g_j\| \sqrt{1 - \hat\phi_{ij}^2}} g_j
       \quad \text{where } \phi = \cos(p_i, g_j) < \hat\phi_{ij}, \qquad u = \sum_i p_i

    Where `pcgrad` only removes conflicts, this asks of every pair as much agreement as
    it has had on average: for tasks that are related, such as languages of one
    translation model. With unrelated tasks the targets stay near zero and it is PCGrad.
    The result depends on a random order, conflicts with third tasks remain possible,
    and long gradients dominate.

    Args:
      num_tasks: T.
      beta: how fast the targets follow, in [0, 1]; may be traced. 0.5 in TorchJD and
        LibMTL; 0 keeps the targets at zero.
      group: one combination of everything, or one a layer or a leaf, each with targets
        of its own. A layer is all leaves whose path is the same but for its last name
        (top-level arrays are one layer together). The last two store the whole
        Jacobian, and their state holds a `CombinerState` a group.
      scale: see `from_weighting`; ``"paper"`` sums the turned gradients.
      axis_name: see `from_weighting`.

    Returns:
      a `Combiner`; ``update`` needs ``key=``, a fresh `jax.random.key` at every step,
      for the orders. Its state holds the targets, ``[T, T]``. Losses are not needed.
      A zero gradient takes no part. Parallel tasks add up; exactly opposite ones
      project each other to zero while their target is not positive.

    Raises:
      ValueError: if beta is concrete and outside [0, 1], or for an unknown group.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> tx = mtl.gradvac(num_tasks=2)
      >>> g = {"w": jnp.array([[1.0, 0.0], [-1.0, 1.0]])}
      >>> updates, _ = tx.update(g, tx.init({"w": jnp.zeros(2)}), key=jax.random.key(0))
      >>> [f"{x:.3f}" for x in updates["w"]]
      ['0.500', '1.500']

    References:
      Wang et al., `Gradient Vaccine: Investigating and Improving Multi-task
      Optimization in Massively Multilingual Models
      <https://arxiv.org/abs/2010.05874>`_, ICLR 2021.

    Differs from TorchJD's and LibMTL's code, which it follows else: no absolute
    epsilon, so that small gradients are treated as large ones are; and no pair is
    turned to a cosine above 0.99, where the formula grows without bound.
    """
    check_num_tasks(num_tasks)
    check_nonnegative("beta", beta, at_most=1)
    check_choice("group", group, get_args(Group))

    def init(num_tasks: int, dtype: DType) -> GradvacState:
        return GradvacState(jnp.zeros((num_tasks, num_tasks), dtype))

    def update(
        gramian: Gramian,
        state: GradvacState,
        *,
        task_mask: TaskMask,
        key: jax.Array,
        **extra: Any,
    ) -> tuple[Weights, GradvacState]:
        del extra
        rows = unit_rows(gramian, task_mask)
        lifted, targets = _vaccinate_in_turn(
            rows,
            state.targets,
            orders_by_task(key, task_mask),
            jnp.asarray(beta, gramian.dtype),
        )
        return jnp.sum(lifted, axis=0) * rows.inverse, GradvacState(targets)

    whole = from_weighting(
        Weighting(init, update, frozenset({"gramian", "key"})),
        num_tasks,
        scale=scale,
        axis_name=axis_name,
    )
    if group == "whole":
        return whole
    return per_group(whole, module_labels if group == "layer" else leaf_labels)
