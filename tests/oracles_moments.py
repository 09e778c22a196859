"""Methods with moments, or several batches, again in float64 NumPy."""

import numpy as np


def excess_mtl(rows, losses, step_size=0.01, num_warmup=1):
    """He et al. 2024: equations 6, 7 and 9, with weights that sum to T."""
    tasks = rows.shape[1]
    squares, log_w = np.zeros(rows.shape[1:]), np.zeros(tasks)
    weights, seen = [], []
    for J in rows:
        squares = squares + J**2
        risk = np.sum(J**2 / np.sqrt(squares + 1e-7), axis=1)
        if len(seen) < num_warmup:
            seen.append(risk)
        else:
            log_w = log_w + step_size * risk / np.mean(seen, axis=0)
        w = np.exp(log_w - log_w.max())
        weights.append(tasks * w / w.sum())
    return np.stack(weights)


def project(v):
    """On the simplex, by bisection on the threshold."""
    low, high = v.max() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        if np.maximum(v - middle, 0).sum() > 1:
            low = middle
        else:
            high = middle
    return np.maximum(v - (low + high) / 2, 0)


def moco(
    rows,
    losses,
    beta=0.1,
    gamma=0.1,
    rho=0.1,
    beta_sigma=0.0,
    gamma_sigma=0.0,
    by_loss=False,
    softmax=False,
):
    tasks = rows.shape[1]
    y, lam = np.zeros(rows.shape[1:]), np.full(tasks, 1 / tasks)
    updates = []
    for k, (J, L) in enumerate(zip(rows, losses, strict=True), start=1):
        if by_loss:
            J = J / np.linalg.norm(J, axis=1, keepdims=True) * L[:, None]
        y = y - beta / k**beta_sigma * (y - J)
        point = lam - gamma / k**gamma_sigma * ((y @ y.T + rho * np.eye(tasks)) @ lam)
        if softmax:
            lam = np.exp(point - point.max())
            lam = lam / lam.sum()
        else:
            lam = project(point)
        updates.append(lam @ y)
    return np.stack(updates)


def db_mtl(rows, losses, beta=0.9, beta_sigma=0.0, corrected=True):
    m, start, updates = np.zeros(rows.shape[1:]), 1.0, []
    for k, (J, L) in enumerate(zip(rows, losses, strict=True), start=1):
        kept = beta / k**beta_sigma
        m = kept * m + (1 - kept) * J / (L[:, None] + 1e-8)
        start = start * kept
        mean = m / (1 - start) if corrected else m
        lengths = np.linalg.norm(mean, axis=1)
        updates.append(lengths.max() * np.sum(mean / lengths[:, None], axis=0))
    return np.stack(updates)


def config(J):
    """Liu, Chu & Thuerey 2025, equation 2, on the rows themselves."""
    units = J / np.linalg.norm(J, axis=1, keepdims=True)
    direction = np.linalg.pinv(units) @ np.ones(len(J))
    direction = direction / np.linalg.norm(direction)
    return np.sum(J @ direction) * direction


def m_config(rows, losses, b1=0.9, b2=0.999, eps=1e-8, fresh=None):
    tasks = rows.shape[1]
    fresh = np.ones(rows.shape[:2], bool) if fresh is None else fresh
    m, counts = np.zeros(rows.shape[1:]), np.zeros(tasks)
    pseudo = squares = np.zeros(rows.shape[2])
    k, updates = 0, []
    for J, new in zip(rows, fresh, strict=True):
        m = np.where(new[:, None], b1 * m + (1 - b1) * J, m)
        counts = counts + new
        if counts.min() == 0:
            updates.append(np.zeros(rows.shape[2]))
            continue
        k += 1
        g = config(m / (1 - b1**counts)[:, None])
        before, pseudo = pseudo, (1 - b1**k) * g
        squares = b2 * squares + (1 - b2) * ((pseudo - b1 * before) / (1 - b1)) ** 2
        updates.append(g / (np.sqrt(squares / (1 - b2**k)) + eps))
    return np.stack(updates)


def other_batches(rows):
    """The task gradients that the laws give a method that reads more batches.

    Leaf by leaf of the laws' tree: 1, 5 and 12 entries.
    """
    places = np.concatenate([np.arange(n) for n in (1, 5, 12)])
    return [rows * (1 + 0.2 * np.sin(places + phase)) for phase in (1.0, 2.0)]


def modo(rows, losses, gamma=0.1, rho=0.1):
    tasks = rows.shape[1]
    lam, weights = np.full(tasks, 1 / tasks), []
    for one, two in zip(*other_batches(rows), strict=True):
        lam = project(lam - gamma * (one @ (two.T @ lam) + rho * lam))
        weights.append(lam)
    return np.stack(weights)


def sdmgrad(
    rows,
    losses,
    lam=0.3,
    step_size=1.0,
    momentum=0.5,
    num_steps=20,
    preference=None,
):
    tasks = rows.shape[1]
    w0 = np.ones(tasks) if preference is None else np.asarray(preference, float)
    w0 = w0 / w0.sum()
    w, weights = np.full(tasks, 1 / tasks), []
    for one, two in zip(*other_batches(rows), strict=True):
        A = one @ two.T
        A = A / np.mean(np.sqrt(np.maximum(np.diag(A), 0))) ** 2
        z = np.zeros(tasks)
        for _ in range(num_steps):
            z = momentum * z + A @ (w + lam * w0)
            w = project(w - step_size * z)
        weights.append((w + lam * w0) / (1 + lam))
    return np.stack(weights)


ORACLES = {
    "db_mtl": db_mtl,
    "excess_mtl": excess_mtl,
    "m_config": m_config,
    "moco": moco,
    "modo": modo,
    "sdmgrad": sdmgrad,
}
