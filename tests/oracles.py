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


ORACLES = {
    "edm": edm,
    "mean": mean,
    "mgda": mgda,
    "task_tensioner": task_tensioner,
}
