"""Weightings that follow the losses from step to step, again in float64 NumPy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from oracles_scalarized import Adam


def _softmax(x):
    raised = np.exp(x - x.max())
    return raised / raised.sum()


def dwa(rows, losses, window=25, temperature=2.0):
    weights = np.ones(losses.shape)
    for k in range(2 * window, len(losses)):
        end = k // window * window  # of the last complete window
        latest = losses[end - window : end].mean(0)
        older = losses[end - 2 * window : end - window].mean(0)
        weights[k] = losses.shape[1] * _softmax(latest / older / temperature)
    return weights


# Forward differences of the first derivative, from a table (orders 1 to 5).
DIFFERENCES = {
    1: [-1, 1],
    2: [-3 / 2, 2, -1 / 2],
    3: [-11 / 6, 3, -3 / 2, 1 / 3],
    4: [-25 / 12, 4, -3, 4 / 3, -1 / 4],
    5: [-137 / 60, 5, -5, 10 / 3, -5 / 4, 1 / 5],
}


def softadapt(rows, losses, beta=0.1, window=5, variant="original"):
    weights = []
    for k in range(len(losses)):
        recent = losses[max(0, k + 1 - window) : k + 1]
        slopes = np.zeros(losses.shape[1])
        if len(recent) == window:
            slopes = np.array(DIFFERENCES[window - 1]) @ recent
        if variant == "normalized" and slopes.any():
            slopes = slopes / np.abs(slopes).sum()
        raw = np.exp(beta * (slopes - slopes.max()))
        if variant == "loss_weighted":
            raw = raw * recent.mean(0)
        weights.append(raw / raw.sum())
    return np.stack(weights)


def relobralo(rows, losses, alpha=0.999, temperature=1.0, rho=0.9999):
    # The laws pass the same key at every step, and one number for all tasks.
    drawn = jax.random.uniform(jax.random.key(0), (), jnp.float32)
    keeps = bool(drawn < rho)
    tasks = losses.shape[1]
    weights = [np.ones(tasks)]
    for k in range(1, len(losses)):
        recent = tasks * _softmax(losses[k] / (temperature * losses[k - 1]))
        since_start = tasks * _softmax(losses[k] / (temperature * losses[0]))
        past = weights[-1] if keeps else since_start
        share = alpha if k > 1 else 0
        weights.append(share * past + (1 - share) * recent)
    return np.stack(weights)


def famo(
    rows, losses, learning_rate=0.025, weight_decay=1e-3, min_losses=0.0, after=None
):
    """`after`: losses ``[steps, T]`` after each step, else those of the next batch."""
    s = np.zeros(losses.shape[1])
    adam, weights = Adam(learning_rate, len(s), weight_decay), []
    logs = np.log(losses - min_losses + 1e-8)
    logs_after = logs[1:] if after is None else np.log(after - min_losses + 1e-8)
    for k in range(len(losses)):
        if k:
            z, falls = _softmax(s), logs[k - 1] - logs_after[k - 1]
            jacobian = np.diag(z) - np.outer(z, z)
            s = adam.step(jacobian @ falls, s)
        raw = _softmax(s) / np.exp(logs[k])
        weights.append(raw / raw.sum())
    return np.stack(weights)


def ldc_mtl(
    rows,
    losses,
    penalty=0.01,
    learning_rate=1e-3,
    normalization="none",
    discrepancy="weighted",
):
    """Derivatives by hand: of ``|x|`` it is the sign, of the sigmoid s (1 - s)."""
    tasks = losses.shape[1]
    s, weights = np.ones(tasks), []
    adam = Adam(learning_rate, tasks)
    for L in losses:
        sigma = 1 / (1 + np.exp(-s))
        tau = sigma if discrepancy == "weighted" else np.ones(tasks)
        if normalization == "none":
            values, by_loss = L, np.ones(tasks)
        elif normalization == "rescaled":
            by_loss = losses[0].min() / losses[0]
            values = L * by_loss
        else:
            values, by_loss = np.log(L) - np.log(losses[0]), 1 / L
        apart = np.diff(tau * values)
        apart[np.abs(apart) < 1e-12 * np.abs(values).max()] = 0  # rounding is no sign
        signs = np.sign(apart)
        pushed = np.zeros(tasks)  # by the penalty: d |tau l| / d (tau_t l_t)
        pushed[1:] += signs
        pushed[:-1] -= signs
        weights.append((sigma / sigma.sum() + penalty * tau * pushed) * by_loss)
        slope = values / sigma.sum()
        if discrepancy == "weighted":
            slope = slope + penalty * pushed * values
        s = adam.step(slope * sigma * (1 - sigma), s)
    return np.stack(weights)


def best_groups(points, num_groups):
    """Means of the best division of sorted points into intervals, trying them all."""
    order = np.argsort(points)
    in_row = points[order]
    best, found = math.inf, None
    for cuts in itertools.combinations(range(1, len(points)), num_groups - 1):
        parts = np.split(in_row, cuts)
        spread = sum(((part - part.mean()) ** 2).sum() for part in parts)
        if spread < best:
            best = spread
            found = np.concatenate([np.full(len(p), p.mean()) for p in parts])
    means = np.empty_like(found)
    means[order] = found
    return means


def go4align(rows, losses, num_groups=2, step_size=1e-4):
    tasks = losses.shape[1]
    p, weights = np.full(tasks, 1 / tasks), []
    for L in losses:
        p = p * np.exp(-step_size * L)
        p = p / p.sum()
        weights.append(best_groups(L.sum() / L * p, min(num_groups, tasks)))
    return np.stack(weights)


ORACLES = {
    "dwa": dwa,
    "famo": famo,
    "go4align": go4align,
    "ldc_mtl": ldc_mtl,
    "relobralo": relobralo,
    "softadapt": softadapt,
}
