"""Every method again, in float64 NumPy, written from the papers' equations.

An oracle takes the rows ``[steps, T, P]`` and the losses ``[steps, T]`` of one run and
gives the weights ``[steps, T]`` of every step (an aggregator's: the updates
``[steps, P]``). Nothing here is shared with the library.
"""

import numpy as np
import quadprog


def simplex_weights(gramian):
    """``argmin w^T G w`` on the simplex, by quadprog.

    Solved for ``y_t = w_t * |g_t|``, so that rows of different lengths do not matter.
    """
    size = len(gramian)
    lengths = np.sqrt(np.diag(gramian))
    if lengths.min() == 0:
        zero = (lengths == 0).astype(float)
        return zero / zero.sum()
    cosines = gramian / np.outer(lengths, lengths) + 1e-13 * np.eye(size)
    normal = lengths.min() / lengths
    bounds = np.concatenate([normal[:, None], np.eye(size)], axis=1)
    y = quadprog.solve_qp(cosines, np.zeros(size), bounds, np.eye(size + 1)[0], 1)[0]
    weights = np.maximum(y, 0) * normal
    return weights / weights.sum()


def mean(rows, losses):
    return np.full(losses.shape, 1 / losses.shape[1])


def mgda(rows, losses):
    return np.stack([simplex_weights(J @ J.T) for J in rows])


def _central(J):
    lengths = np.linalg.norm(J, axis=1)
    units = J / lengths[:, None]
    raw = simplex_weights(units @ units.T) / lengths
    return raw / raw.sum()


def edm(rows, losses):
    return np.stack([_central(J) for J in rows])


def task_tensioner(rows, losses, alpha=0.3, window=10):
    norms = np.linalg.norm(rows, axis=2)
    weights = []
    for k, (J, L) in enumerate(zip(rows, losses, strict=True)):
        w = _central(J)
        if k < window:
            weights.append(w)
            continue
        now = norms[k - window + 1 : k + 1].sum(0)
        before = norms[k - window : k].sum(0)
        p = now / before + np.log10(L)
        c = np.maximum(alpha / (1 + np.exp(-np.e * p + np.e)) + 1 - alpha, 0)
        d = w @ J
        apart = J - d
        v = d + (c / np.linalg.norm(apart, axis=1)) @ apart
        for g in J:
            along = g @ v
            if along < 0:
                square = g @ g
                v = square / (square - along) * (v - along / square * g)
        weights.append(np.linalg.lstsq(J.T, v, rcond=None)[0])
    return np.stack(weights)


def strengths_by_loss(losses, channels):
    """The strengths that the laws give a method that reads some."""
    x = losses / (1 + np.abs(losses))
    return 2 + np.sin(5 * np.outer(x, np.arange(channels) + 1))


# The laws' rows are one scalar, a vector of 5 and a kernel [3, 4], one after the other.
KERNEL, INPUTS, CHANNELS = 6, 3, 4


def priority_projection(rows, losses):
    """The updates, group by group and pair by pair."""
    updates = rows.sum(1)
    for k, L in enumerate(losses):
        owner = strengths_by_loss(L, CHANNELS).argmax(0)
        if len(set(owner)) == 1:
            continue
        G = rows[k, :, KERNEL:].reshape(len(L), INPUTS, CHANNELS)
        total = np.zeros((INPUTS, CHANNELS))
        for i in set(owner):
            own = G[i][:, owner == i].ravel()
            for j in range(len(L)):
                other = G[j][:, owner == i].ravel()
                if j != i and own @ other < 0:
                    other = other - (own @ other) / (own @ own) * own
                total[:, owner == i] += other.reshape(INPUTS, -1)
        updates[k, KERNEL:] = total.ravel()
    return updates


def scale_by_mao(rows, losses, b1=0.9, b2=0.999, eps=1e-8):
    m, v = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
    updates = []
    for k, g in enumerate(rows, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        steps = m / (1 - b1**k) / (np.sqrt(v / (1 - b2**k)) + eps)
        updates.append(steps.sum(0))
    return np.stack(updates)


def look_ahead_jacobian(rows, losses, inner_learning_rate=0.01):
    """``sum_t (I - a H_t)^2 g_t`` with the laws' curvature ``H_t = |g_t| diag(d)``."""
    bends = np.linspace(0, 0.05, rows.shape[2])
    lengths = np.linalg.norm(rows, axis=2, keepdims=True)
    return np.sum((1 - inner_learning_rate * lengths * bends) ** 2 * rows, axis=1)


ORACLES = {
    "edm": edm,
    "look_ahead_jacobian": look_ahead_jacobian,
    "mean": mean,
    "mgda": mgda,
    "priority_projection": priority_projection,
    "scale_by_mao": scale_by_mao,
    "task_tensioner": task_tensioner,
}
