"""Every method again, in float64 NumPy, written from the papers' equations.

An oracle takes the rows ``[steps, T, P]`` and the losses ``[steps, T]`` of one run and
gives the weights ``[steps, T]`` of every step (an aggregator's: the updates
``[steps, P]``). Nothing here is shared with the library.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracles_histories
import oracles_moments
import oracles_norms
import oracles_scalarized
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


def constant_weights(rows, losses):
    return np.ones(losses.shape)


def _uniforms(size, pairs):
    """The draws of the laws' key, `jax.random.key(0)`, a task or a pair of tasks."""
    key = jax.random.key(0)
    keys = [jax.random.fold_in(key, i) for i in range(size)]
    if not pairs:
        return np.array([jax.random.uniform(k) for k in keys])
    return np.array(
        [
            [jax.random.uniform(jax.random.fold_in(k, j)) for j in range(size)]
            for k in keys
        ]
    )


def rlw(rows, losses):
    key = jax.random.key(0)
    dtype = jnp.result_type(float)
    draws = [
        jax.random.normal(jax.random.fold_in(key, i), (), dtype)
        for i in range(losses.shape[1])
    ]
    raw = np.exp(np.array(draws, np.float64))
    return np.broadcast_to(raw / raw.sum(), losses.shape)


def _nonnegative(C, b):
    """``argmin z^T C z / 2 + b^T z`` over ``z >= 0``, by quadprog."""
    size = len(C)
    jittered = C + 1e-13 * np.eye(size)
    return np.maximum(
        quadprog.solve_qp(jittered, -b, np.eye(size), np.zeros(size))[0], 0
    )


def _projected(J, reference):
    """``argmin v^T G v`` over ``v >= reference``, in lengths of rows."""
    lengths = np.linalg.norm(J, axis=1)
    C = (J @ J.T) / np.outer(lengths, lengths)
    scaled = reference * lengths
    height = np.abs(scaled).max()
    return reference + height * _nonnegative(C, C @ scaled / height) / lengths


def _preferred(losses, preference):
    size = losses.shape[1]
    return np.full(size, 1 / size) if preference is None else np.array(preference)


def dualproj(rows, losses, preference=None):
    return np.stack([_projected(J, _preferred(losses, preference)) for J in rows])


def upgrad(rows, losses, preference=None):
    each = np.diag(_preferred(losses, preference))
    return np.stack([sum(_projected(J, one) for one in each) for J in rows])


def _root(J, alpha, omega):
    """``G x = (omega / x)^(1 / alpha)`` by Newton's method on ``log x``'s potential."""
    lengths = np.linalg.norm(J, axis=1)
    C = (J @ J.T) / np.outer(lengths, lengths)
    # x = y / length:  C y = (omega length / y)^(1 / alpha) / length
    log_scale = np.log(omega * lengths) / alpha - np.log(lengths)
    y = np.exp(log_scale * alpha / (1 + alpha))

    def slope(y):
        return C @ y - np.exp(log_scale - np.log(y) / alpha)

    for _ in range(500):
        right = np.exp(log_scale - np.log(y) / alpha)
        step = -np.linalg.solve(C + np.diag(right / y / alpha), slope(y))
        size = min(1.0, 0.9 / max(np.max(-step / y), 1e-300))
        while slope(y + size * step) @ step > 1e-12 * abs(slope(y) @ step):
            size /= 2
            if size < 1e-12:
                break
        y = y + size * step
        if np.max(np.abs(size * step) / y) < 1e-13:
            break
    return y / lengths


def fairgrad(rows, losses, alpha=1.0):
    ones = np.ones(losses.shape[1])
    return np.stack([_root(J, alpha, ones) for J in rows])


def nash_mtl(rows, losses, max_norm=1.0):
    weights = []
    for J, a in zip(rows, fairgrad(rows, losses), strict=True):
        a = a * np.sqrt(np.linalg.norm(J @ J.T))
        weights.append(a * min(1, max_norm / np.linalg.norm(a @ J)))
    return np.stack(weights)


def pivrg(rows, losses, bound=2.0, floor=10.0):
    weights = []
    for J, L in zip(rows, losses, strict=True):
        behind = 30 * L / (1 + np.abs(L))  # as the laws give it
        raw = np.exp(behind / max(np.ptp(behind) / np.log(bound), floor))
        weights.append(_root(J, 2.0, len(L) * raw / raw.sum()))
    return np.stack(weights)


def imtl_g(rows, losses):
    """The closed form of the paper: equal projections, the first task's weight last."""
    weights = []
    for J in rows:
        units = J / np.linalg.norm(J, axis=1)[:, None]
        if len(J) == 1:
            weights.append(np.ones(1))
            continue
        D, U = J[0] - J[1:], units[0] - units[1:]
        others = np.linalg.solve(U @ D.T, U @ J[0])
        w = np.array([1 - others.sum(), *others])
        w = w * min(1, 100 / np.abs(w).sum())  # our own bound
        weights.append(w if units[0] @ (w @ J) > 0 else -w)
    return np.stack(weights)


def aligned_mtl(rows, losses):
    """By the singular value decomposition: ``sigma_min U V^T`` in place of J."""
    size = losses.shape[1]
    weights = []
    for J in rows:
        U, sigma, Vt = np.linalg.svd(J, full_matrices=False)
        aligned = sigma.min() * U @ Vt
        weights.append(np.linalg.lstsq(J.T, aligned.mean(0), rcond=None)[0])
    assert all(len(w) == size for w in weights)
    return np.stack(weights)


def pcgrad(rows, losses):
    orders = np.argsort(_uniforms(losses.shape[1], pairs=True), axis=1)
    updates = []
    for J in rows:
        total = 0
        for i, g in enumerate(J):
            for j in orders[i]:
                if j != i and g @ J[j] < 0:
                    g = g - (g @ J[j]) / (J[j] @ J[j]) * J[j]
            total = total + g
        updates.append(np.linalg.lstsq(J.T, total, rcond=None)[0])
    return np.stack(updates)


def gradvac(rows, losses, beta=0.5):
    size = losses.shape[1]
    orders = np.argsort(_uniforms(size, pairs=True), axis=1)
    target = np.zeros((size, size))
    updates = []
    for J in rows:
        total = 0
        for i, g in enumerate(J):
            for j in orders[i]:
                if j == i:
                    continue
                phi = g @ J[j] / np.linalg.norm(g) / np.linalg.norm(J[j])
                goal = target[i, j]
                if phi < goal:
                    lift = goal * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - goal**2)
                    lift = lift * np.linalg.norm(g) / np.linalg.norm(J[j])
                    g = g + lift / np.sqrt(1 - goal**2) * J[j]
                target[i, j] = (1 - beta) * goal + beta * phi
            total = total + g
        updates.append(np.linalg.lstsq(J.T, total, rcond=None)[0])
    return np.stack(updates)


def krum(rows, losses, broken=0, power=2):
    size = losses.shape[1]
    neighbours = min(max(size - broken - 2, 1), size - 1)
    weights = []
    for J in rows:
        gaps = np.linalg.norm(J[:, None] - J, axis=-1) ** power
        nearest = np.sort(gaps + np.diag(np.full(size, np.inf)), axis=1)
        weights.append(np.eye(size)[np.argmin(nearest[:, :neighbours].sum(1))])
    return np.stack(weights)


def pcd(rows, losses, tau=0.02, beta=0.999, eps=1e-8):
    usual = np.zeros(losses.shape[1])
    weights = []
    for k, J in enumerate(rows, start=1):
        usual = beta * usual + (1 - beta) * np.sum(J**2, axis=1)
        factors = 1 / np.sqrt(usual / (1 - beta**k) + eps)
        scaled = J * factors[:, None]
        others, lead = scaled[1:], scaled[0]
        lengths = np.linalg.norm(others, axis=1)
        units = others / lengths[:, None]
        mu = _nonnegative(units @ units.T, units @ lead - tau * lengths) / lengths
        v = np.array([1, *mu])
        length = np.linalg.norm(v @ scaled)
        weights.append(v * factors * np.linalg.norm(J[0]) / length)
    return np.stack(weights)


def ntkmtl_sr(rows, losses):
    lengths = np.linalg.norm(rows, axis=2)
    return np.sqrt(np.mean(lengths**2, axis=1, keepdims=True)) / lengths


def _averse(J, c, linear, radius):
    """``g_0 + c |g_0| g_w / |g_w|``; w by a search over ``m = |g_w|``.

    For given m, ``radius (w^T G w / m + m) / 2 + linear . w`` is a quadratic program;
    as a function of m it is convex.
    """
    G = J @ J.T
    size = len(J)

    def best(m):
        lengths = np.sqrt(np.diag(G))
        C = G / np.outer(lengths, lengths) * radius / m + 1e-14 * np.eye(size)
        normal = lengths.min() / lengths
        bounds = np.concatenate([normal[:, None], np.eye(size)], axis=1)
        start = np.eye(size + 1)[0]
        cost = linear / lengths / lengths.min()
        top = np.abs(C).max()
        y = quadprog.solve_qp(C / top, -cost / top, bounds, start, 1)[0]
        w = np.maximum(y, 0) * normal
        return w / w.sum()

    low, high = 1e-9 * np.sqrt(np.diag(G).max()), np.sqrt(np.diag(G).max())
    for _ in range(100):
        m = np.sqrt(low * high)
        w = best(m)
        if np.sqrt(max(w @ G @ w, 0)) > m:
            low = m
        else:
            high = m
    g0 = J.mean(0)
    step = c * np.linalg.norm(g0) / np.linalg.norm(w @ J)
    return 1 / size + step * w


def cagrad(rows, losses, c=0.4):
    weights = []
    for J in rows:
        g0 = J.mean(0)
        weights.append(_averse(J, c, J @ g0, c * np.linalg.norm(g0)))
    return np.stack(weights)


def imgrad(rows, losses, c=0.8, offset=1.5):
    weights = []
    for J in rows:
        g0, point = J.mean(0), simplex_weights(J @ J.T) @ J
        cosine = g0 @ point / np.linalg.norm(g0) / np.linalg.norm(point)
        radius = cosine * c * np.linalg.norm(g0)
        weights.append(_averse(J, c, (offset - cosine) * J @ g0, radius))
    return np.stack(weights)


ORACLES = {
    "aligned_mtl": aligned_mtl,
    "cagrad": cagrad,
    "constant_weights": constant_weights,
    "dualproj": dualproj,
    "edm": edm,
    "fairgrad": fairgrad,
    "gradvac": gradvac,
    "imgrad": imgrad,
    "imtl_g": imtl_g,
    "krum": krum,
    "look_ahead_jacobian": look_ahead_jacobian,
    "mean": mean,
    "mgda": mgda,
    "nash_mtl": nash_mtl,
    "ntkmtl_sr": ntkmtl_sr,
    "pcd": pcd,
    "pcgrad": pcgrad,
    "pivrg": pivrg,
    "priority_projection": priority_projection,
    "rlw": rlw,
    "scale_by_mao": scale_by_mao,
    "task_tensioner": task_tensioner,
    "upgrad": upgrad,
    **oracles_scalarized.ORACLES,
    **oracles_histories.ORACLES,
    **oracles_norms.ORACLES,
    **oracles_moments.ORACLES,
}
