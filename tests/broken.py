"""Deliberately broken methods: every law has to catch its own.

Rows like those of `mtl_optax.METHODS`. `BROKEN` maps the name of a law's function in
`laws` to methods that it must refuse; all other laws may accept them.
"""

import jax
import jax.numpy as jnp

import mtl_optax as mtl
from mtl_optax import Aggregator, Combiner, Weighting

GRAMIAN = frozenset({"gramian"})


def row(factory, claims=(), needs=GRAMIAN, kind="weighting"):
    return mtl.Method(
        name=factory.__name__,
        factory=factory,
        kind=kind,
        summary="deliberately broken",
        paper="",
        length="",
        peers="",
        needs=needs,
        cost="",
        state_size="",
        claims=frozenset(claims),
    )


def stateless(weigh, needs=GRAMIAN):
    """A weighting from ``weigh(gramian, losses, task_mask) -> weights``."""

    def factory(num_tasks):
        def update(gramian, state, *, losses, task_mask, **extra):
            return weigh(gramian, losses, task_mask), state

        weighting = Weighting(lambda num_tasks, dtype: (), update, needs)
        return mtl.from_weighting(weighting, num_tasks)

    return factory


def around(change, num_tasks):
    """`mtl.mean` with ``change(updates, state, task_grads, params, extra)`` after."""
    inner = mtl.mean(num_tasks)

    def update(task_grads, state, params=None, **extra):
        updates, new = inner.update(task_grads, state, params, **extra)
        return change(updates, new, task_grads, params, extra)

    return Combiner(inner.init, update, num_tasks)


# ------------------------------------------------------------------------ 1. types


def forgets_dtype(num_tasks):
    def change(updates, state, *_):
        return jax.tree.map(lambda u: u.astype(jnp.float32), updates), state

    return around(change, num_tasks)


def forgets_structure(num_tasks):
    return around(lambda u, state, *_: (jax.tree.leaves(u), state), num_tasks)


def keeps_the_task_axis(num_tasks):
    return around(lambda u, s, g, *_: (mtl.materialize(g), s), num_tasks)


def counting(first, advance):
    """A mean with a state of its own, which may change from step to step."""

    def factory(num_tasks):
        inner = mtl.mean(num_tasks)

        def update(task_grads, state, params=None, **extra):
            updates, _ = inner.update(task_grads, inner.init(params), params, **extra)
            return updates, advance(state)

        return Combiner(lambda params: first(), update, num_tasks)

    return factory


weak_state = counting(lambda: jnp.asarray(0.0), lambda s: s + jnp.ones(()))
growing_state = counting(lambda: jnp.zeros(1), lambda s: jnp.append(s, 1.0))
widening_state = counting(
    lambda: jnp.zeros((), jnp.int32), lambda s: s.astype(jnp.float32)
)


def _shared():
    zeros = jnp.zeros(3)
    return (zeros, zeros)


one_array_twice = counting(_shared, lambda s: s)


def random_by_trace(num_tasks):
    """A Python counter: it moves when traced, or in each eager call."""
    calls = []

    def change(updates, state, *_):
        calls.append(0)
        return jax.tree.map(lambda u: u * len(calls), updates), state

    return around(change, num_tasks)


# -------------------------------------------------------------- 3-6. what it computes


def prefers_lazy(num_tasks):
    def change(updates, state, task_grads, *_):
        arrays = all(isinstance(g, jax.Array) for g in jax.tree.leaves(task_grads))
        factor = 1.0 if arrays else 1.001
        return jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates), state

    return around(change, num_tasks)


drops_the_last = stateless(lambda g, x, m: jnp.ones(len(m)).at[-1].set(0))
turns_round = stateless(lambda g, x, m: -jnp.ones(len(m)))
divides_by_the_norm = stateless(lambda g, x, m: 1 / jnp.sqrt(jnp.diag(g)))
takes_the_root_of_losses = stateless(
    lambda g, x, m: jnp.log(x), frozenset({"gramian", "losses"})
)


# ------------------------------------------------------------------------ 7. claims


def everything_claimed(num_tasks):
    """The first row, plus a constant, minus the others by their lengths."""

    def init(params, num_tasks):
        return ()

    def update(rows, state, params, **extra):
        def one(g):
            rest = jnp.sum(g[1:], 0) if g.shape[0] > 1 else 0 * g[0]
            return 0.5 + g[0] - 2 * rest

        return jax.tree.map(one, rows), state

    return mtl.from_aggregator(Aggregator(init, update), num_tasks)


# ----------------------------------------------------------------------- 8. solvers


def _reporting(weigh):
    def factory(num_tasks):
        def init(num_tasks, dtype):
            return {"solver_residual": jnp.zeros((), dtype)}

        def update(gramian, state, *, task_mask, **extra):
            weights, residual = weigh(gramian)
            return weights, {"solver_residual": residual.astype(gramian.dtype)}

        return mtl.from_weighting(Weighting(init, update, GRAMIAN), num_tasks)

    return factory


def _few_steps(gramian):
    """Frank-Wolfe, stopped after three steps."""
    size = gramian.shape[0]
    weights = jnp.full(size, 1 / size, gramian.dtype)
    for k in range(3):
        vertex = jax.nn.one_hot(
            jnp.argmin(gramian @ weights), size, dtype=weights.dtype
        )
        weights = weights + 2 / (k + 3) * (vertex - weights)
    slope = gramian @ weights
    return weights, (weights @ slope - jnp.min(slope)) / jnp.trace(gramian)


stops_early = _reporting(_few_steps)


# -------------------------------------------------------------------------- 9. cost


def stores_everything(num_tasks):
    def change(updates, state, task_grads, *_):
        rows = mtl.materialize(task_grads)
        return jax.tree.map(lambda g: jnp.sort(g, axis=0)[0], rows), state

    return around(change, num_tasks)


def looks_twice(num_tasks):
    inner = mtl.mean(num_tasks)

    def update(task_grads, state, params=None, **extra):
        updates, state = inner.update(task_grads, state, params, **extra)
        weights = jnp.arange(1.0, num_tasks + 1)
        again = mtl.weighted_sum(weights, task_grads)
        return jax.tree.map(jnp.maximum, updates, again), state

    return Combiner(inner.init, update, num_tasks)


# ---------------------------------------------------------- 10. sharding, checkpoints


def contracts_sharded_axes(num_tasks):
    """Its Gramian is an einsum, which explicit mesh axes refuse."""

    def update(task_grads, state, params=None, **extra):
        gram = sum(jnp.einsum("i...,j...->ij", g, g) for g in task_grads.values())
        weights = jnp.diag(gram) / jnp.sum(gram)
        return mtl.weighted_sum(weights, task_grads), state

    return Combiner(lambda params: (), update, num_tasks)


def forgets_axis_name(num_tasks, axis_name=None):
    return divides_by_the_norm(num_tasks)


# ------------------------------------------------------------------- 11. wrong input


def takes_anything(num_tasks, strength=0.5):
    def update(task_grads, state, params=None, **extra):
        return jax.tree.map(lambda g: strength * g[0], task_grads), state

    return Combiner(lambda params: (), update, num_tasks)


def checks_without_words(num_tasks):
    def update(task_grads, state, params=None, *, losses=None, task_mask=None, **extra):
        for g in jax.tree.leaves(task_grads):
            if g.ndim == 0 or g.shape[0] != num_tasks:
                raise ValueError("bad shape")
        return jax.tree.map(lambda g: g[0], task_grads), state

    return Combiner(lambda params: (), update, num_tasks)


# ------------------------------------------------------------------------ 12. masks


def counts_the_absent(num_tasks):
    inner = mtl.mean(num_tasks)

    def update(task_grads, state, params=None, *, task_mask=None, **extra):
        factor = 1.0 if task_mask is None else jnp.mean(task_mask)
        updates, state = inner.update(
            task_grads, state, params, task_mask=task_mask, **extra
        )
        return jax.tree.map(lambda u: u * factor, updates), state

    return Combiner(inner.init, update, num_tasks)


def remembers_the_absent(num_tasks):
    """History moves for every task, absent or not."""

    def init(num_tasks, dtype):
        return jnp.zeros(num_tasks, dtype)

    def update(gramian, state, *, task_mask, **extra):
        return task_mask / jnp.maximum(jnp.sum(task_mask), 1), state + 1

    return mtl.from_weighting(Weighting(init, update, GRAMIAN), num_tasks)


def ignores_masks(num_tasks):
    inner = mtl.mean(num_tasks)

    def update(task_grads, state, params=None, *, task_mask=None, **extra):
        return inner.update(task_grads, state, params, **extra)

    return Combiner(inner.init, update, num_tasks)


ALL = (
    "non_conflicting",
    "permutation_equivariant",
    "scale_equivariant",
    "row_scale_invariant",
    "stops_at_pareto_stationary",
)

BROKEN = {
    "check_types": [
        row(forgets_dtype),
        row(forgets_structure),
        row(keeps_the_task_axis),
        row(weak_state),
        row(growing_state),
        row(widening_state),
    ],
    "check_compiles_once": [
        row(one_array_twice),
        row(weak_state),
        row(random_by_trace),
    ],
    "check_precision": [row(contracts_sharded_axes)],
    "check_lazy": [row(prefers_lazy)],
    "check_one_task": [row(drops_the_last), row(turns_round)],
    "check_finite": [
        row(divides_by_the_norm),
        row(takes_the_root_of_losses, needs=frozenset({"gramian", "losses"})),
    ],
    "check_claim": [row(everything_claimed, ALL, frozenset(), "aggregator")],
    "check_refuted": [row(mtl.mgda)],
    "check_solver": [row(stops_early)],
    "check_oracle": [row(stops_early), row(drops_the_last)],
    "check_memory": [row(stores_everything)],
    "check_memory_beside_stacked": [row(stores_everything)],
    "check_one_backward_pass": [row(looks_twice, needs=frozenset())],
    "check_restored": [row(mtl.task_tensioner, needs=frozenset({"losses"}))],
    "check_sharded": [row(contracts_sharded_axes), row(forgets_axis_name)],
    "check_wrong_input": [row(takes_anything), row(checks_without_words)],
    "check_wrong_arguments": [row(takes_anything)],
    "check_absent": [row(counts_the_absent), row(ignores_masks)],
    "check_absent_for_a_while": [row(remembers_the_absent), row(ignores_masks)],
}
