"""Reading what loss functions return, and the parameters they are given."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from mtl_optax._tree import one_level


def split_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    """What `loss_fn` returned as losses and aux, which is None where there is none."""
    if not has_aux:
        return out, None
    if not isinstance(out, tuple) or len(out) != 2:
        raise TypeError(
            "with has_aux=True loss_fn must return a tuple (losses, aux), got "
            f"{form_of(out)}."
        )
    return out


def form_of(out: Any) -> str:
    """A value's type for messages; of a tuple also its length."""
    name = type(out).__name__
    return f"{name} of {len(out)}" if isinstance(out, tuple | list) else name


def loss_vector(losses: Any) -> tuple[Array, tuple[str, ...], bool]:
    """The losses as ``[T]``, the tasks' names, and whether they came separately."""
    if hasattr(losses, "ndim") and hasattr(losses, "dtype"):
        if losses.ndim == 0:
            raise ValueError(
                "loss_fn returned one scalar, so there is nothing to balance: the "
                "losses seem to be summed already. Return one loss a task, as an "
                "array [T] or a tuple, list or dict of scalars; for one batch a task "
                "use in_axes=(None, 0)."
            )
        if losses.ndim != 1 or losses.shape[0] == 0:
            raise ValueError(
                "loss_fn must return one scalar a task: an array of shape [T] or a "
                "tuple, list or dict of scalars; got an array of shape "
                f"{losses.shape}. Reduce each task's loss to a scalar first."
            )
        names = tuple(str(t) for t in range(losses.shape[0]))
        return at_least_float32(losses, "the losses"), names, False
    names_list, scalars, _ = one_level(losses)
    if not scalars or (len(scalars) == 1 and scalars[0] is losses):
        raise ValueError(
            "loss_fn must return an array [T] or a tuple, list or dict of scalars, "
            f"got {type(losses).__name__}."
        )
    checked = []
    for name, loss in zip(names_list, scalars, strict=True):
        if not _is_scalar(loss):
            if not hasattr(loss, "shape"):
                raise ValueError(
                    f"the loss of task {name!r} must be a scalar, got a "
                    f"{type(loss).__name__}. If loss_fn returns (losses, aux), pass "
                    "has_aux=True."
                )
            raise ValueError(
                f"the loss of task {name!r} must be a scalar, got shape {loss.shape}. "
                "Reduce it first, e.g. with jnp.mean."
            )
        checked.append(at_least_float32(jnp.asarray(loss), f"the loss {name!r}"))
    return jnp.stack(checked), tuple(names_list), True


def scalar_loss(loss: Any) -> Array:
    """The loss of one task, where `loss_fn` sees one task only."""
    if not _is_scalar(loss):
        raise ValueError(
            "with in_axes, loss_fn sees one task and must return one scalar, got "
            f"shape {jax.tree.map(jnp.shape, loss)}."
        )
    return at_least_float32(jnp.asarray(loss), "the loss")


def _is_scalar(loss: Any) -> bool:
    return jax.tree_util.all_leaves([loss]) and jnp.ndim(loss) == 0


def at_least_float32(losses: Array, what: str) -> Array:
    """Real floating-point losses in float32 at least; `what` is for messages."""
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"{what} must be real floating-point numbers, got dtype {losses.dtype}."
        )
    return losses.astype(jnp.result_type(jnp.float32, losses.dtype))


def check_params(params: PyTree[Any]) -> None:
    """Raises unless every leaf is a real floating-point array or number."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("task_jacobian: the differentiated argument has no leaves.")
    for path, leaf in leaves:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, float):
            raise TypeError(
                f"parameter leaf {jax.tree_util.keystr(path)} is a "
                f"{type(leaf).__name__}, expected an array."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"parameter leaf {jax.tree_util.keystr(path)} has dtype "
                f"{jnp.result_type(leaf)}; only real floating-point parameters can be "
                "differentiated. Pass the others (step counts, random keys, batch "
                "statistics) as another argument; of a Flax NNX model, split off the "
                "parameters with nnx.split(model, nnx.Param, ...)."
            )


def check_dependence(depends: bool) -> None:
    """Raises unless some loss depends on the parameters."""
    if not depends:
        raise ValueError(
            "the Jacobian is zero everywhere: no loss depends on the differentiated "
            "argument. Does loss_fn use a model or parameters from outside instead of "
            "its argument, or does argnums name the wrong one?"
        )
