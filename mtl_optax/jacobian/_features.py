r"""`feature_jacobian`: the Gramian of task gradients with respect to shared features.

MGDA-UB (Sener & Koltun 2018, arXiv:1810.04650), and the cheap forms of IMTL-G (Liu et
al. 2021) and Aligned-MTL (Senushkin et al. 2023): with features z = enc(theta),

    c_t = grad_z L_t,   J_t = c_t dz/dtheta,   |w J| <= |dz/dtheta| |sum_t w_t c_t|
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun
from jaxtyping import Array, PyTree

from mtl_optax._tree import flatten, gramian, lazy_tree
from mtl_optax._types import Basis, Losses, Params, TaskJacobian, TaskMask, Weights
from mtl_optax.jacobian._losses import at_least_float32, form_of, loss_vector
from mtl_optax.jacobian._operators import UNROLL, RowMode, like_losses, map_rows
from mtl_optax.jacobian._reductions import sums_go_wrong, with_right_sums
from mtl_optax.jacobian._task_jacobian import task_jacobian
from mtl_optax.jacobian._trace import call_equation, read_traits


def feature_jacobian(
    encoder: Callable[..., Any],
    heads: Callable[..., Any],
    *,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""Task gradients whose Gramian is taken at the features that the tasks share.

    .. math:: z = \mathrm{enc}(\theta), \qquad c_t = \nabla_z L_t, \qquad
              G_{st} = \langle c_s, c_t \rangle, \qquad \|J^\top w\|^2 \le
              \sigma_{max}(\partial z / \partial \theta)^2 \, w^\top G w

    It replaces `task_jacobian` where a network is an encoder and heads, and any
    combiner follows. Only the heads are swept once a task; the encoder runs forward
    once and backward once, so a balanced step costs about what a plain one does,
    whatever T. The update itself is exact (the task gradients of all parameters,
    weighted); what is approximate is the Gramian that weights come from: conflicts and
    lengths at the features, not at the parameters.

    Use it under `shared_only` for many tasks on a large encoder: ``mgda`` is then
    MGDA-UB of Sener & Koltun, ``imtl_g`` and ``aligned_mtl`` their authors' cheap
    forms. Don't use it where a method's promise must hold to the letter: `mgda` or
    `upgrad` are free of conflict at the features, and at the parameters only as far as
    the encoder's Jacobian keeps angles (it is exact where
    :math:`\partial z / \partial \theta \; \partial z / \partial \theta^\top` is a
    multiple of the identity). Nor where the features hold more numbers than the encoder
    has parameters (T copies of them are stored), or where the heads cost more than the
    encoder: there is little to save.

    Lengths are those at the features too. Methods whose update does not grow with the
    gradients (`nash_mtl`, `fairgrad`, `pivrg`) make one of another length than with
    `task_jacobian`; ``scale="norm"`` makes them comparable. The Gramian does not depend
    on the leaves that a combiner is given: parameters that `encoder` and `heads` both
    use count by what the features do alone, a head's own gradients not at all. What
    needs whole rows (`materialize`, methods without a Gramian, `per_group` with several
    groups, a combiner with `axis_name`) gets exact ones, for a backward pass a task.

    Args:
      encoder: ``(params, *args) -> features``, an array or a tree of arrays, real
        floating-point numbers all of them; what heads need besides, they take from
        `params` and `args`.
      heads: ``(params, features, *args) -> losses``, in the forms that `task_jacobian`
        takes. Losses in a tuple, list or dict are swept one by one, each through its
        own head alone; an array ``[T]`` is swept as a whole T times, which computes
        every head T times over: cheap for one matrix that holds all heads, dear for
        heads with layers of their own.
      has_aux: both return a pair, ``(features, aux)`` and ``(losses, aux)``.

    Returns:
      a function of ``(params, *args)`` that gives ``(losses [T], task_grads)``, with
      aux ``((losses, (encoder's aux, heads' aux)), task_grads)``; task gradients are
      lazy, like the parameters. Keyword arguments go to both functions.

    Raises:
      ValueError: when called, if there are no features, if no loss depends on them, or
        as `task_jacobian` does.
      TypeError: if features, losses or parameters are not real floating-point numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> import mtl_optax as mtl
      >>> params = {"trunk": jnp.eye(2), "a": jnp.ones(2), "b": jnp.array([1.0, -1.0])}
      >>> def encoder(params, x):
      ...     return x @ params["trunk"]
      >>> def heads(params, z, x):
      ...     return {"a": z @ params["a"], "b": 2 * z @ params["b"]}
      >>> jacobian = mtl.feature_jacobian(encoder, heads)
      >>> losses, task_grads = jacobian(params, jnp.array([3.0, 0.0]))
      >>> mtl.gramian(task_grads)
      Array([[2., 0.],
             [0., 8.]], dtype=float32)
      >>> shared = {"trunk": True, "a": False, "b": False}
      >>> tx = mtl.shared_only(mtl.mgda(num_tasks=2), shared)
      >>> updates, state = tx.update(task_grads, tx.init(params), params)
      >>> state.shared.info.task_weights
      Array([0.8, 0.2], dtype=float32)

    References:
      Sener & Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018.
    """

    def losses_and_task_grads(params: Params, *args: Any, **kwargs: Any) -> Any:
        def losses_and_features(params: Params, *args: Any, **kwargs: Any) -> Any:
            out = encoder(params, *args, **kwargs)
            features, aux = _split("encoder", "(features, aux)", out, has_aux)
            _check_features(features)
            losses, more = losses_of(features, params, *args, **kwargs)
            return losses, (features, (aux, more))

        def losses_of(
            features: PyTree[Array], params: Params, *args: Any, **kwargs: Any
        ) -> tuple[Any, Any]:
            out = heads(params, features, *args, **kwargs)
            losses, aux = _split("heads", "(losses, aux)", out, has_aux)
            if getattr(losses, "ndim", None) == 0:
                raise ValueError(
                    "feature_jacobian: heads returned one scalar, so there is nothing "
                    "to balance. Return one loss a task, as an array [T] or a tuple, "
                    "list or dict of scalars."
                )
            return losses, aux

        exact = task_jacobian(losses_and_features, has_aux=True)
        (losses, (features, aux)), task_grads = exact(params, *args, **kwargs)
        operator = FeatureJacobian(
            jax.tree.leaves(task_grads)[0].operator,
            _trace_heads(lambda z: losses_of(z, params, *args, **kwargs)[0], features),
        )
        task_grads = lazy_tree(operator, params)
        return ((losses, aux) if has_aux else losses), task_grads

    return losses_and_task_grads


class TracedHeads(NamedTuple):
    """The losses as a function of the features.

    Attributes:
      features: where they are taken.
      jaxpr: from the features to one scalar a task, or to one array ``[T]``.
      separate: whether they are scalars.
    """

    features: list[Array]
    jaxpr: Any
    separate: bool


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureJacobian:
    """A Jacobian in all but its Gramian, which is that of the features.

    Attributes:
      exact: the Jacobian with respect to the parameters.
      heads: what is between the features and the losses.
    """

    exact: TaskJacobian
    heads: TracedHeads

    @property
    def num_tasks(self) -> int:
        return self.exact.num_tasks

    @property
    def losses(self) -> Losses:
        return self.exact.losses

    @property
    def task_names(self) -> tuple[str, ...]:
        return self.exact.task_names

    @property
    def isolates(self) -> bool:
        return self.exact.isolates

    def restrict(self, leaves: Sequence[int]) -> Self:
        return dataclasses.replace(self, exact=self.exact.restrict(leaves))

    def combine(self, weights: Weights) -> list[Array]:
        return self.exact.combine(weights)

    def stack(self, *, isolated: bool = False) -> list[Array]:
        return self.exact.stack(isolated=isolated)

    def gramian(
        self, basis: Basis | None = None, task_mask: TaskMask | None = None
    ) -> Array:
        rows = self._one_by_one() if self.heads.separate else self._together()
        return gramian(rows, basis=basis, task_mask=task_mask)

    def _one_by_one(self) -> list[Array]:
        """Gradients of the features, each through what its own loss needs."""
        rows = [
            jax.grad(_only(self.heads.jaxpr, task))(self.heads.features)
            for task in range(self.num_tasks)
        ]
        return [jnp.stack(leaf) for leaf in zip(*rows, strict=True)]

    def _together(self) -> list[Array]:
        function = jaxpr_as_fun(self.heads.jaxpr)
        _, pullback = jax.vjp(lambda z: function(*z)[0], self.heads.features)
        basis = like_losses(jnp.eye(self.num_tasks), self.losses)
        mode: RowMode = "unroll" if self.num_tasks <= UNROLL else "vmap"
        rows: list[Array] = map_rows(lambda e: pullback(e)[0], basis, mode)
        return rows


def _trace_heads(
    losses_of: Callable[[PyTree[Array]], Any], features: PyTree[Array]
) -> TracedHeads:
    leaves, treedef = flatten(features)
    separate = []

    def outputs(leaves: list[Array]) -> list[Array]:
        losses = losses_of(jax.tree.unflatten(treedef, leaves))
        vector, _, apart = loss_vector(losses)
        separate.append(apart)
        if not apart:
            return [vector]
        scalars = [jnp.asarray(x) for x in jax.tree.leaves(losses)]
        return [at_least_float32(x, "the loss") for x in scalars]

    # On accelerators the heads' own products may run in TF32 or bfloat16, which a
    # Gramian of near-parallel rows can't bear.
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(outputs)(leaves)
        if sums_go_wrong(jaxpr):
            jaxpr = jax.make_jaxpr(with_right_sums(outputs))(leaves)
    if not read_traits(jaxpr).depends:
        raise ValueError(
            "feature_jacobian: no loss depends on the features that encoder returned. "
            "Does heads use features from outside instead of its argument?"
        )
    return TracedHeads(leaves, jaxpr, separate[-1])


def _only(closed_jaxpr: Any, place: int) -> Callable[[list[Array]], Array]:
    """One output of a jaxpr as a function, with nothing that it does not need.

    Tracing the heads anew for every task would take T^2 heads' time at compiling.
    """
    jaxpr = closed_jaxpr.jaxpr
    output = jaxpr.outvars[place]
    wanted = {id(output)}
    steps: list[Any] = []
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in wanted for variable in equation.outvars):
            steps.append(equation)
            wanted.update(id(variable) for variable in equation.invars)

    def function(inputs: list[Array]) -> Array:
        values = dict(zip(map(id, jaxpr.constvars), closed_jaxpr.consts, strict=True))
        values.update(zip(map(id, jaxpr.invars), inputs, strict=True))

        def read(variable: Any) -> Any:
            literal = isinstance(variable, Literal)
            return variable.val if literal else values[id(variable)]

        for step in reversed(steps):
            results = call_equation(step, [read(v) for v in step.invars])
            values.update(zip(map(id, step.outvars), results, strict=True))
        return jnp.asarray(read(output))

    return function


def _split(who: str, form: str, out: Any, has_aux: bool) -> tuple[Any, Any]:
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            f"feature_jacobian: with has_aux=True {who} must return a tuple {form}, "
            f"got {form_of(out)}."
        )
    return out


def _check_features(features: PyTree[Any]) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(features)
    if not leaves:
        raise ValueError(
            "feature_jacobian: encoder returned no features: expected an array or a "
            f"tree of arrays, got {features!r}."
        )
    for path, leaf in leaves:
        name = f"feature {jax.tree_util.keystr(path)}" if path else "the feature"
        if not hasattr(leaf, "dtype"):
            raise TypeError(
                f"feature_jacobian: {name} is a {type(leaf).__name__}, expected an "
                "array. If encoder returns (features, aux), pass has_aux=True (heads "
                "then return (losses, aux))."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"feature_jacobian: {name} has dtype {leaf.dtype}; features are real "
                "floating-point numbers. Let heads make what is not (masks, counts) "
                "from their own arguments, or return it as aux."
            )
