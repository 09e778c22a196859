"""Methods on lengths and entries of task gradients, again in float64 NumPy."""

import jax
import numpy as np
from oracles_scalarized import Adam

# Sizes of the laws' leaves, in the order of their names.
LEAVES = (1, 5, 12)


def gradnorm(rows, losses, alpha=1.5, learning_rate=0.025, initial_losses=None):
    size = losses.shape[1]
    w, adam, weights = np.ones(size), Adam(learning_rate, size), []
    first = losses[0] if initial_losses is None else np.array(initial_losses)
    for J, L in zip(rows, losses, strict=True):
        weights.append(w)
        lengths = np.linalg.norm(J, axis=1)
        rates = (L / first) / np.mean(L / first)
        target = np.mean(w * lengths) * rates**alpha
        w = adam.step(np.sign(w * lengths - target) * lengths, w)
        w = np.maximum(w, 1e-3)  # our own bound
        w = size * w / w.sum()
    return np.stack(weights)


def imtl(rows, losses, learning_rate=0.025):
    """The paper's closed form on scaled gradients: the first task's weight last."""
    size = losses.shape[1]
    s, adam, weights = np.zeros(size), Adam(learning_rate, size), []
    for J, L in zip(rows, losses, strict=True):
        scaled = np.exp(s)[:, None] * J
        units = scaled / np.linalg.norm(scaled, axis=1)[:, None]
        D, U = scaled[0] - scaled[1:], units[0] - units[1:]
        others = np.linalg.solve(U @ D.T, U @ scaled[0])
        alpha = np.array([1 - others.sum(), *others])
        alpha = alpha * min(1, 100 / np.abs(alpha).sum())  # our own bound
        alpha = alpha if units[0] @ (alpha @ scaled) > 0 else -alpha
        weights.append(alpha * np.exp(s))
        s = adam.step(np.exp(s) * L - 1, s)
    return np.stack(weights)


def config(rows, losses, preference=None):
    """By the pseudo-inverse of the unit rows themselves."""
    wanted = np.ones(losses.shape[1]) if preference is None else np.array(preference)
    weights = []
    for J in rows:
        units = J / np.linalg.norm(J, axis=1)[:, None]
        d = np.linalg.pinv(units) @ wanted
        d = d / np.linalg.norm(d)
        u = np.sum(J @ d) * d
        weights.append(np.linalg.lstsq(J.T, u, rcond=None)[0])
    return np.stack(weights)


def trimmed_mean(rows, losses, trim_number=1):
    size = rows.shape[1]
    trimmed = min(trim_number, (size - 1) // 2)
    return np.sort(rows, axis=1)[:, trimmed : size - trimmed].mean(1)


def _uniforms():
    """The draws of the laws' key, `jax.random.key(0)`, one an entry, leaf by leaf."""
    key = jax.random.key(0)
    shapes = ((), (5,), (3, 4))
    draws = [
        np.ravel(jax.random.uniform(jax.random.fold_in(key, number), shape, np.float32))
        for number, shape in enumerate(shapes)
    ]
    assert tuple(map(len, draws)) == LEAVES
    return np.concatenate(draws).astype(float)


def graddrop(rows, losses, leak=0.0, f=lambda share: share):
    draws = _uniforms()
    leak = np.broadcast_to(leak, losses.shape[1])[:, None]
    updates = []
    for J in rows:
        purity = (1 + J.sum(0) / np.abs(J).sum(0)) / 2
        up = f(purity) > draws
        kept = np.where(up, J > 0, J < 0)
        updates.append(np.sum((leak + (1 - leak) * kept) * J, axis=0))
    return np.stack(updates)


ORACLES = {
    "gradnorm": gradnorm,
    "imtl": imtl,
    "config": config,
    "trimmed_mean": trimmed_mean,
    "graddrop": graddrop,
}
