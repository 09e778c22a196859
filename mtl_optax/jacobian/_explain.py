"""`explain`: what is done with each parameter, why, and what it costs."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from mtl_optax._tree import LazyTaskGradient
from mtl_optax.jacobian._features import FeatureJacobian
from mtl_optax.jacobian._operators import Held, JointJacobian, SeparateJacobian
from mtl_optax.jacobian._plan import LeafPlan
from mtl_optax.jacobian._trace import forward_flops


class LeafCost(NamedTuple):
    """One parameter's share of the Gramian.

    Attributes:
      path: where it stands.
      shape: of the parameter.
      way: ``"kernel"``: through the Gram matrix of the layer's inputs, no gradient is
        formed. ``"rows"``: the layer's task gradients are formed. ``"lookup"``: only
        the rows of a table that were looked up. ``"direct"``: task gradients carried
        by the sweep, as for biases and for whatever is not understood as a layer.
        ``"unused"``: no loss reads it. ``"stored"``: task gradients of a mode that
        stores all. ``"column"``: a backward and a forward pass a task.
        ``"features"``: none, with `feature_jacobian`. ``"own"``: as an operator that
        is not this package's does.
      reason: why, in words.
      flops: operations for its inner products.
      bytes: held for them.
    """

    path: str
    shape: tuple[int, ...]
    way: str
    reason: str
    flops: int
    bytes: int


class Explanation(NamedTuple):
    """What `explain` found; print it.

    Attributes:
      num_tasks: T.
      gramian: how the Gramian is taken, in words.
      combination: how a combination follows, in words.
      plain_steps: floating-point operations of a Gramian and a combination as a
        multiple of a plain gradient's, counting products and convolutions only; None
        if not known. Methods that read a second Gramian, in a basis, where gradients
        nearly agree (`edm`, `krum`) then sweep twice if nothing is held.
      leaves: one a parameter.
    """

    num_tasks: int
    gramian: str
    combination: str
    plain_steps: float | None
    leaves: tuple[LeafCost, ...]

    def __str__(self) -> str:
        head = [
            f"{self.num_tasks} tasks",
            f"Gramian: {self.gramian}",
            f"combination: {self.combination}",
        ]
        if self.plain_steps is not None:
            head.append(
                f"both: about {self.plain_steps:.1f} plain gradients, by the "
                "operations of products"
            )
        names = ("parameter", "shape", "way", "MFLOP", "MB", "because")
        rows = [
            (
                leaf.path,
                " x ".join(map(str, leaf.shape)) or "scalar",
                leaf.way,
                _millions(leaf.flops),
                _millions(leaf.bytes),
                leaf.reason,
            )
            for leaf in self.leaves
        ]
        widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in (names, *rows)
        ]
        return "\n".join([*head, *(line.rstrip() for line in table)])


def _millions(number: int) -> str:
    millions = number / 1e6
    return f"{millions:.0f}" if millions >= 10 else f"{millions:.2g}"


def explain(task_grads: PyTree[Any]) -> Explanation:
    """Says how lazy task gradients will be turned into a Gramian and an update.

    Use it once, before training, where a step is slower or larger than you expect: it
    names for every parameter what was chosen, why, and its cost. Nothing is computed:
    everything follows from shapes. Choices are by operations and bytes, not by timing
    on your machine; ``task_jacobian(mode=...)`` overrides them.

    Args:
      task_grads: the lazy tree of `task_jacobian`, or a part of it, such as the shared
        parameters that a combiner will see.

    Returns:
      an `Explanation`; its text is a table.

    Raises:
      TypeError: for stacked arrays, of which nothing is left to choose.
      ValueError: for a tree without leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> def loss_fn(params, x):
      ...     y = jnp.tanh(x @ params["w"] + params["b"])
      ...     return (y**2).mean(), jnp.abs(y).mean(), y.mean()
      >>> params = {"b": jnp.zeros(256), "w": jnp.ones((256, 256))}
      >>> _, task_grads = mtl.task_jacobian(loss_fn)(params, jnp.ones((8, 256)))
      >>> print(mtl.explain(task_grads))
      3 tasks
      Gramian: layer by layer, from one sweep of all cotangents
      combination: from what the Gramian left behind
      both: about 1.7 plain gradients, by the operations of products
      parameter  shape      way     MFLOP   MB      because
      ['b']      256        direct  0.0046  0.0031  is used by `add`
      ['w']      256 x 256  kernel  0.17    0.025   8 examples, 256 x 256 weights
    """
    leaves = jax.tree.leaves(task_grads)
    if not leaves:
        raise ValueError("explain: the tree of task gradients has no leaves.")
    for leaf in leaves:
        if not isinstance(leaf, LazyTaskGradient):
            raise TypeError(
                "explain: expected the lazy tree of mtl_optax.task_jacobian, got a "
                f"{type(leaf).__name__}: these task gradients are arrays already, and "
                "their Gramian is one product of the stacked rows."
            )
    operator: Any = leaves[0].operator
    if any(leaf.operator is not operator for leaf in leaves):
        raise ValueError(
            "explain: the leaves belong to several Jacobians; explain them one by one."
        )
    if isinstance(operator, Held):
        operator = operator.base
    operator = operator.restrict([leaf.index for leaf in leaves])
    if not isinstance(operator, JointJacobian | SeparateJacobian):
        return _elsewhere(operator, leaves)
    if isinstance(operator, JointJacobian) and operator.by_layer:
        return _by_layer(operator, leaves)
    return _by_rows(operator, leaves)


def _by_layer(
    operator: JointJacobian, leaves: Sequence[LazyTaskGradient]
) -> Explanation:
    tasks, size = operator.num_tasks, operator.batch_size
    plans = operator.plans
    held = operator.holds(plans)
    sweeps = tasks
    words = "layer by layer, from one sweep of all cotangents"
    if size is not None and size < tasks:
        chunks = -(-tasks // size)
        sweeps = size * chunks * (chunks + 1) // 2
        words = (
            f"layer by layer, from sweeps of {size} cotangents; all pairs of the "
            f"{chunks} sweeps must meet, so the cotangents of {sweeps} tasks are swept "
            f"instead of {tasks}"
        )
    return Explanation(
        tasks,
        words,
        "from what the Gramian left behind" if held else "one more backward pass",
        _plain_steps(plans, sweeps, held, forward_flops(operator.traced)),
        tuple(
            LeafCost(leaf.path, leaf.shape[1:], p.way, p.reason, p.flops, p.bytes)
            for leaf, p in zip(leaves, plans, strict=True)
        ),
    )


def _plain_steps(
    plans: Sequence[LeafPlan], sweeps: int, held: bool, forward: int
) -> float | None:
    """Operations beside those of a plain gradient, which are thrice the forward's."""
    if not forward:
        return None
    layers = [plan for plan in plans if plan.size is not None and plan.way != "lookup"]
    sizes = [2 * math.prod(plan.size or ()) for plan in layers]
    # A sweep takes what goes on from a layer; of other products both derivatives.
    others = max(forward - sum(sizes), 0)
    total = forward + sweeps * (sum(sizes) + 2 * others)
    total += sum(plan.flops for plan in plans)
    if held:
        pairs = zip(layers, sizes, strict=True)
        total += sum(size for plan, size in pairs if plan.way == "kernel")
    else:
        total += 2 * forward
    return total / (3 * forward)


def _by_rows(
    operator: JointJacobian | SeparateJacobian, leaves: Sequence[LazyTaskGradient]
) -> Explanation:
    tasks, together = operator.num_tasks, operator.batch_size
    if operator.stores_rows:
        way, reason, rows = "stored", "of all tasks", tasks
        swept = "" if together is None else f", swept {together} at a time"
        words = f"all rows are stored (mode={operator.mode!r}{swept})"
        combination = "from the rows"
    else:
        way, reason, rows = "column", "of one task at a time", 1
        words = (
            "a backward and a forward pass for every task, "
            f"{together or 1} at a time: about {4 * tasks / 3:.0f} plain gradients"
        )
        combination = "one more backward pass"

    def cost(leaf: LazyTaskGradient) -> LeafCost:
        held = rows * leaf.size // tasks * jnp.dtype(leaf.dtype).itemsize
        flops = 2 * tasks * leaf.size
        return LeafCost(leaf.path, leaf.shape[1:], way, reason, flops, held)

    return Explanation(tasks, words, combination, None, tuple(map(cost, leaves)))


def _elsewhere(operator: Any, leaves: Sequence[LazyTaskGradient]) -> Explanation:
    """Where no Gramian is taken of these leaves, or by somebody else's operator."""
    if isinstance(operator, FeatureJacobian):
        size = sum(x.size for x in operator.heads.features)
        way, reason = "features", "its share is not looked at"
        words = f"at the features, {size} numbers a task, from a sweep of the heads"
    else:
        way, reason = "own", "as its operator does"
        words = f"{type(operator).__name__} takes it in its own way"
    return Explanation(
        operator.num_tasks,
        words,
        "one more backward pass",
        None,
        tuple(LeafCost(x.path, x.shape[1:], way, reason, 0, 0) for x in leaves),
    )
