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


ORACLES = {"uncertainty_weighting": uncertainty_weighting}
