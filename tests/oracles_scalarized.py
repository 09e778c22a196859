"""Weightings that minimise one number made of the losses, again in float64 NumPy."""

import numpy as np


class Adam:
    """Kingma & Ba 2015, algorithm 1, a number a task."""

    def __init__(self, learning_rate, size, weight_decay=0.0):
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.m, self.v, self.k = np.zeros(size), np.zeros(size), 0

    def step(self, gradient, values):
        gradient = gradient + self.weight_decay * values
        self.k += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m = self.m / (1 - 0.9**self.k)
        v = self.v / (1 - 0.999**self.k)
        return values - self.learning_rate * m / (np.sqrt(v) + 1e-8)


def uncertainty_weighting(rows, losses, learning_rate=0.025):
    s, adam, weights = (
        np.zeros(losses.shape[1]),
        Adam(learning_rate, losses.shape[1]),
        [],
    )
    for L in losses:
        weights.append(np.exp(-s) / 2)
        s = adam.step((1 - np.exp(-s) * L) / 2, s)
    return np.stack(weights)


def imtl_l(rows, losses, learning_rate=0.025):
    s, adam = np.zeros(losses.shape[1]), Adam(learning_rate, losses.shape[1])
    weights = []
    for L in losses:
        weights.append(np.exp(s))
        s = adam.step(np.exp(s) * L - 1, s)
    return np.stack(weights)


def scale_invariant(rows, losses, preference=1.0):
    return preference / losses


def gls(rows, losses):
    tasks = losses.shape[1]
    return np.prod(losses, 1, keepdims=True) ** (1 / tasks) / (tasks * losses)


def stch(rows, losses, mu=1.0, preference=None, reference=0.0):
    preference = 1 / losses.shape[1] if preference is None else np.array(preference)
    heights = preference * (losses - np.array(reference)) / mu
    shares = np.exp(heights - heights.max(1, keepdims=True))
    return preference * shares / shares.sum(1, keepdims=True)


def log_stch(rows, losses, mu=1.0, reference=1.0):
    """The authors' code for multi-task learning, but for its factor T."""
    powers = (losses / np.array(reference)) ** (1 / mu)
    return powers / powers.sum(1, keepdims=True) / losses


def cosmos(rows, losses, penalty=2.0, preference=None):
    tasks = losses.shape[1]
    r = np.full(tasks, 1 / tasks) if preference is None else np.array(preference)
    weights = []
    for L in losses:
        product, lengths = r @ L, np.linalg.norm(r) * np.linalg.norm(L)
        slope = r / lengths - product * L / (lengths * (L @ L))
        weights.append(r - penalty * slope)
    return np.stack(weights)


def pbi(rows, losses, theta=5.0, preference=None, reference=0.0):
    r = np.ones(losses.shape[1]) if preference is None else np.array(preference)
    r = r / np.linalg.norm(r)
    weights = []
    for f in losses - np.array(reference):
        across = f - (f @ r) * r
        # The projection off the ray is symmetric, and leaves `across` as it is.
        weights.append(r + theta * across / np.linalg.norm(across))
    return np.stack(weights)


ORACLES = {
    "cosmos": cosmos,
    "gls": gls,
    "imtl_l": imtl_l,
    "pbi": pbi,
    "scale_invariant": scale_invariant,
    "stch": stch,
    "uncertainty_weighting": uncertainty_weighting,
}
