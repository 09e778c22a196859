"""Comparing methods, and doubting the comparison."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Key, Num

from mtl_optax.metrics._inputs import Numbers, as_float, is_concrete

_Flags = Num[ArrayLike, "..."] | Bool[ArrayLike, "..."] | Sequence[Any]


def delta_m(
    metrics: Numbers,
    baseline: Numbers,
    higher_is_better: _Flags,
    *,
    convention: Literal["gain", "loss"] = "gain",
) -> Float[Array, "..."]:
    """Mean relative change against single-task baselines, in percent.

        gain:  100 / M * sum_k  s_k (metrics_k - baseline_k) / |baseline_k|
        loss:  the same with the opposite sign

    where ``s_k`` is +1 if a higher metric k is better and -1 if a lower one is.

    The literature publishes the same number with both signs under one name, so look
    before you compare: with ``"gain"``, *positive* is better than single-task training
    (Jeong & Yoon; LibMTL calls it Delta_p); with ``"loss"``, *negative* is better
    (Nash-MTL, FAMO, FairGrad: "Delta_m %, lower is better").

    Use it to put metrics with different units into one number beside a table of the
    metrics themselves. Do not let it decide alone: a metric with a small baseline
    outweighs the others, a task with many metrics counts many times (surface normals
    are 5 of the 9 metrics of NYUv2; some authors average within each task first, which
    is one call a task here), and digits lost in rounding a small baseline show
    (Cityscapes' 0.0125 printed to 4 decimals leaves 0.1 points open).

    The denominator is ``|baseline_k|`` so that a negative baseline (a reward, a log
    likelihood) keeps the sign right; the papers divide by ``baseline_k``, which is the
    same for their positive metrics.

    Args:
      metrics: ``[..., M]``, in the units of ``baseline``; any leading axes (methods,
        seeds). A NaN gives NaN.
      baseline: ``[..., M]``, the single-task results; leading axes broadcast against
        those of ``metrics``.
      higher_is_better: ``[M]`` bools (or 0/1), or one bool for all metrics.
      convention: ``"gain"`` (default, after Jeong & Yoon) or ``"loss"``.

    Returns:
      ``[...]``, percent, dtype of ``metrics``.

    Raises:
      ValueError: if shapes do not fit, ``convention`` is unknown, or a concrete
        baseline is zero (a traced one then gives inf or NaN).
      TypeError: if something is not real-valued, or a direction is not a bool.

    Example:
      Depth rmse, mIoU and normal error on NYUD-v2, plain training against single task:

      >>> from mtl_optax import metrics
      >>> single, multi = [0.667, 33.18, 20.75], [0.594, 38.67, 20.52]
      >>> gain = metrics.delta_m(multi, single, [False, True, False])
      >>> f"{gain:.2f}"
      '9.53'
      >>> loss = metrics.delta_m(multi, single, [False, True, False], convention="loss")
      >>> f"{loss:.2f}"
      '-9.53'

    References:
      Maninis et al., "Attentive Single-Tasking of Multiple Tasks", CVPR 2019 (the
      measure); Jeong & Yoon, CVPR 2024 (gain); Navon et al., "Multi-Task Learning as a
      Bargaining Game", ICML 2022 (loss).
    """
    if convention not in ("gain", "loss"):
        raise ValueError(
            f"delta_m: convention must be 'gain' (positive is better) or 'loss' "
            f"(negative is better), got {convention!r}"
        )
    raw_baseline = baseline
    metrics = as_float("metrics", metrics)
    baseline = as_float("baseline", baseline).astype(metrics.dtype)
    if metrics.ndim == 0 or metrics.shape[-1] == 0:
        raise ValueError(
            f"delta_m: metrics must have shape [..., M] with M >= 1, "
            f"got {metrics.shape}"
        )
    # A last axis of 1 would broadcast one task's baseline over all of them.
    if baseline.shape[-1:] != metrics.shape[-1:] or not _fits(
        baseline.shape, metrics.shape
    ):
        raise ValueError(
            f"delta_m: baseline must have shape [M] or broadcast against metrics, "
            f"{metrics.shape}, along leading axes only; got {baseline.shape}"
        )
    if is_concrete(raw_baseline):
        with jax.ensure_compile_time_eval():
            # In the dtype that divides: a tiny float32 may be zero in float16.
            divisor = as_float("baseline", raw_baseline).astype(metrics.dtype)
            has_zero = bool(jnp.any(divisor == 0))
        if has_zero:
            raise ValueError(
                "delta_m: every baseline must be nonzero (changes are relative to it), "
                f"got {raw_baseline}"
            )
    sign = _signs("delta_m", higher_is_better, metrics.shape[-1:], metrics.dtype)
    sign = jnp.broadcast_to(sign, metrics.shape)
    baseline = jnp.broadcast_to(baseline, metrics.shape)
    change = jnp.mean(sign * (metrics - baseline) / jnp.abs(baseline), axis=-1)
    return 100 * change if convention == "gain" else -100 * change


def mean_rank(metrics: Numbers, higher_is_better: _Flags) -> Float[Array, " methods"]:
    """Mean over metrics of each method's rank among the methods; 1 is best.

        rank_k(i) = 1 + #{j better than i} + #{j != i equal to i} / 2

    so ties share the average of the ranks they span, and NaN ranks below everything.

    Use it beside ``delta_m``: it does not care about units or small baselines. Do not
    compare mean ranks of two papers: **the number depends on the set of methods
    compared**, and adding a bad method changes every rank above it (the same
    equal-weighting row of NYUv2 has 8.89 among 12 methods and 17.44 among 21). It also
    ignores by how much a method is better, so noise counts as much as signal.

    Published tables count ties in other ways (the worst rank, mostly), which moves a
    mean rank by 0.1 or so; FAMO's NYUv2 table has none and is reproduced exactly.

    Args:
      metrics: ``[methods, M]``, any units.
      higher_is_better: ``[M]`` bools (or 0/1), or one bool for all metrics.

    Returns:
      ``[methods]`` in ``[1, methods]``, dtype of ``metrics``.

    Raises:
      ValueError: if shapes do not fit.
      TypeError: if something is not real-valued, or a direction is not a bool.

    Example:
      Accuracy (higher is better) and error of three methods; the first two tie once:

      >>> from mtl_optax import metrics
      >>> results = [[0.9, 3.0], [0.9, 2.0], [0.5, 9.0]]
      >>> metrics.mean_rank(results, [True, False]).tolist()
      [1.75, 1.25, 3.0]

    References:
      Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR
      2006 (average ranks); Liu et al., "FAMO", NeurIPS 2023 (its use here).
    """
    metrics = as_float("metrics", metrics)
    if metrics.ndim != 2 or 0 in metrics.shape:
        raise ValueError(
            f"mean_rank: metrics must have shape [methods, M], both >= 1, "
            f"got {metrics.shape}"
        )
    dtype = metrics.dtype
    sign = _signs("mean_rank", higher_is_better, metrics.shape[-1:], dtype)
    score = jnp.broadcast_to(sign, metrics.shape) * metrics
    mine, other = score[:, None], score[None, :]
    lost = jnp.isnan(score)
    better = (other > mine) | (lost[:, None] & ~lost[None, :])
    equal = (other == mine) | (lost[:, None] & lost[None, :])
    # Every method equals itself once, hence 1 + (equal - 1) / 2.
    num_better = jnp.sum(better, axis=1, dtype=dtype)
    num_equal = jnp.sum(equal, axis=1, dtype=dtype)
    return jnp.mean(num_better + (num_equal + 1) / 2, axis=-1)


def bootstrap_interval(
    values: Numbers,
    *,
    key: Key[Array, ""],
    confidence: float = 0.95,
    num_resamples: int = 2000,
    statistic: Callable[..., Array] = jnp.mean,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Percentile-bootstrap interval of a statistic over seeds (axis 0).

        s_b = statistic(values[i_b]),  i_b drawn with replacement, b = 1 ... B
        (low, high) = quantiles (1 -+ confidence) / 2 of s_1 ... s_B

    Use it for a statistic without a formula (a median, ``delta_m`` of a mean) and 20
    or more seeds. **Do not use it for the mean of few seeds**: there it is too narrow.
    For normal data a nominal 95 % interval was measured to hold the true mean in 75 %
    of cases at n = 3, 83 % at n = 5, 89 % at n = 8, 92 % at n = 20; use ``t_interval``
    (95 % at every n). At n = 1 it has no width at all, which says nothing about the
    seed's luck.

    Args:
      values: ``[n, ...]``, one row a seed. All columns share the draws, so
        correlation between them is kept. A NaN gives NaN.
      key: a typed key, ``jax.random.key(0)``; there is no default seed.
      confidence: nominal coverage in (0, 1); 0.95 by custom.
      num_resamples: B; 2000 by custom (Efron & Tibshirani advise at least 1000 for
        percentiles). Memory grows as ``B * values.size``.
      statistic: called as ``statistic(resample, axis=0)`` on ``[n, ...]``.

    Returns:
      ``(low, high)``, each of the statistic's shape, ``[...]`` for the mean.

    Raises:
      ValueError: if there is no seed, or ``confidence`` or ``num_resamples`` is out of
        range.
      TypeError: if ``values`` is not real-valued, or ``key`` is not a typed key.

    Example:
      >>> import jax
      >>> from mtl_optax import metrics
      >>> scores = [0.71, 0.74, 0.69, 0.73, 0.70]
      >>> low, high = metrics.bootstrap_interval(scores, key=jax.random.key(0))
      >>> f"{low:.2f} {high:.2f}"
      '0.70 0.73'

    References:
      Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    values = _per_seed("bootstrap_interval", values)
    _check_confidence("bootstrap_interval", confidence)
    if num_resamples < 1:
        raise ValueError(
            f"bootstrap_interval: num_resamples must be >= 1, got {num_resamples}"
        )
    if not jnp.issubdtype(getattr(key, "dtype", int), jax.dtypes.prng_key):
        raise TypeError(
            f"bootstrap_interval: key must be a typed key, as jax.random.key(0) makes, "
            f"got {key!r}"
        )
    n = values.shape[0]
    draws = jax.random.randint(key, (num_resamples, n), 0, n)
    resampled = jax.vmap(lambda rows: statistic(values[rows], axis=0))(draws)
    tail = (1 - confidence) / 2
    quantiles = jnp.asarray([tail, 1 - tail], resampled.dtype)
    ends = jnp.quantile(resampled, quantiles, axis=0)
    # Interpolating between equal numbers rounds; n = 1 must give the value itself.
    least = jnp.min(resampled, axis=0, keepdims=True)
    most = jnp.max(resampled, axis=0, keepdims=True)
    ends = jnp.clip(ends, least, most)
    return ends[0], ends[1]


def t_interval(
    values: Numbers, *, confidence: float = 0.95
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Student's t interval of the mean over seeds (axis 0).

        mean -+ t * std / sqrt(n),   t = quantile (1 + confidence) / 2 at n - 1 degrees

    Use it for the mean of 3 to 20 seeds, where ``bootstrap_interval`` is too narrow:
    exact for normal data at every n >= 2. Not for medians or other statistics, and not
    for few seeds of a strongly skewed measure (log-normal data with unit log-scale: a
    nominal 95 % interval held the mean in 82 % of cases at n = 5, the bootstrap in
    72 %), nor when one seed in ten diverges.

    Args:
      values: ``[n, ...]``, one row a seed. A NaN gives NaN.
      confidence: nominal coverage in (0, 1), a Python float; 0.95 by custom.

    Returns:
      ``(low, high)``, each ``[...]``; ``(-inf, inf)`` at n = 1, since one seed says
      nothing about spread.

    Raises:
      ValueError: if there is no seed, or ``confidence`` is out of range.
      TypeError: if ``values`` is not real-valued.

    Example:
      >>> from mtl_optax import metrics
      >>> low, high = metrics.t_interval([0.71, 0.74, 0.69, 0.73, 0.70])
      >>> f"{low:.2f} {high:.2f}"
      '0.69 0.74'

    References:
      Student, "The Probable Error of a Mean", Biometrika 1908.
    """
    values = _per_seed("t_interval", values)
    _check_confidence("t_interval", confidence)
    n = values.shape[0]
    mean = jnp.mean(values, axis=0)
    if n == 1:
        unbounded = jnp.full_like(mean, jnp.inf)
        return -unbounded, unbounded
    reach = _student_t(confidence, n - 1) / math.sqrt(n)
    half_width = reach * jnp.std(values, axis=0, ddof=1)
    return mean - half_width, mean + half_width


def winners(
    values: Numbers, intervals: Numbers, higher_is_better: ArrayLike
) -> Bool[Array, " methods"]:
    """Mask of the methods that cannot be told apart from the best one.

        best = the method with the best value
        winners[i] = the interval of i does not lie wholly on the worse side of best's

    Use it to print several rows in bold instead of one that was lucky. Overlap is a
    rough and cautious test: intervals that do not overlap differ, but overlapping ones
    may still differ significantly; if methods shared seeds, an interval of the paired
    differences sees more. With zero-width intervals (the bootstrap of one seed) every
    difference passes for real.

    Touching intervals overlap. A method whose value is NaN never wins; one whose
    interval is NaN is given the benefit of the doubt.

    Args:
      values: ``[methods]``, such as means over seeds.
      intervals: ``[methods, 2]``, (low, high) of each, in the same units.
      higher_is_better: one bool.

    Returns:
      ``[methods]`` bools, true at the best method; all false if every value is NaN.

    Raises:
      ValueError: if shapes do not fit, or a concrete interval has low > high.
      TypeError: if something is not real-valued, or the direction is not a bool.

    Example:
      >>> from mtl_optax import metrics
      >>> intervals = [[0.70, 0.80], [0.78, 0.84], [0.60, 0.70]]
      >>> metrics.winners([0.75, 0.81, 0.65], intervals, True).tolist()
      [True, True, False]

    References:
      Schenker & Gentleman, "On Judging the Significance of Differences by Examining
      the Overlap Between Confidence Intervals", The American Statistician 2001.
    """
    raw_intervals = intervals
    values = as_float("values", values)
    intervals = as_float("intervals", intervals)
    if values.ndim != 1 or 0 in values.shape:
        raise ValueError(
            f"winners: values must have shape [methods], methods >= 1, "
            f"got {values.shape}"
        )
    if intervals.shape != (*values.shape, 2):
        raise ValueError(
            f"winners: intervals must have shape {(*values.shape, 2)}, one (low, high) "
            f"a method, got {intervals.shape}"
        )
    if is_concrete(raw_intervals):
        with jax.ensure_compile_time_eval():
            ends = as_float("intervals", raw_intervals)
            swapped = bool(jnp.any(ends[:, 0] > ends[:, 1]))
        if swapped:
            raise ValueError(
                f"winners: every interval must be (low, high) with low <= high, "
                f"got {raw_intervals}"
            )
    sign = _signs("winners", higher_is_better, (), values.dtype)
    score = sign * values
    # With a negative sign the two ends change places.
    ends = sign * intervals
    low, high = jnp.min(ends, axis=-1), jnp.max(ends, axis=-1)
    present = ~jnp.isnan(score)
    best = jnp.argmax(jnp.where(present, score, -jnp.inf))
    # "Not below" rather than "overlaps": a comparison with NaN is false.
    return present & ~(high < low[best])


def clear_winner(
    values: Numbers, intervals: Numbers, higher_is_better: ArrayLike
) -> int | None:
    """Index of the best method, or ``None`` if another's interval overlaps its own.

        clear_winner = i  if  winners(values, intervals, ...) is true at i only

    Use it on the host, where a table or a command line must decide whether to name a
    winner; inside ``jit`` use ``winners``, whose cautions hold here too. A method that
    stands alone wins.

    Args:
      values: ``[methods]``, such as means over seeds; concrete.
      intervals: ``[methods, 2]``, (low, high) of each, in the same units; concrete.
      higher_is_better: one bool.

    Returns:
      A Python int, or ``None``.

    Raises:
      ValueError: as ``winners``.
      TypeError: as ``winners``, or if an argument is traced.

    Example:
      >>> from mtl_optax import metrics
      >>> metrics.clear_winner([0.75, 0.85], [[0.70, 0.80], [0.82, 0.88]], True)
      1
      >>> metrics.clear_winner([0.75, 0.81], [[0.70, 0.80], [0.78, 0.84]], True) is None
      True
    """
    if not is_concrete(values, intervals, higher_is_better):
        raise TypeError(
            "clear_winner: expected concrete arguments (it returns an int or None), "
            "got a traced one; inside jit use winners"
        )
    with jax.ensure_compile_time_eval():
        mask = winners(values, intervals, higher_is_better)
        return int(jnp.argmax(mask)) if int(jnp.sum(mask)) == 1 else None


def _fits(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``target`` without enlarging it."""
    try:
        return jnp.broadcast_shapes(shape, target) == target
    except ValueError:
        return False


def _signs(
    caller: str, higher_is_better: _Flags, shape: tuple[int, ...], dtype: jnp.dtype
) -> Float[Array, "..."]:
    """+1 where higher is better, else -1, from one flag or from ``shape`` flags."""
    flags = jnp.asarray(higher_is_better)
    expected = f"one bool or bools of shape {shape}" if shape else "one bool"
    if flags.shape not in ((), shape):
        raise ValueError(
            f"{caller}: higher_is_better must be {expected}, got shape {flags.shape}"
        )
    if flags.dtype == bool:
        return jnp.where(flags, 1, -1).astype(dtype)
    # 0/1 as published tables write it; -1/+1 would silently all count as true.
    if not jnp.issubdtype(flags.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: higher_is_better must be {expected}, got dtype {flags.dtype}"
        )
    if is_concrete(higher_is_better):
        with jax.ensure_compile_time_eval():
            concrete = jnp.asarray(higher_is_better)
            valid = bool(jnp.all((concrete == 0) | (concrete == 1)))
        if not valid:
            raise ValueError(
                f"{caller}: higher_is_better must be {expected} (or 0/1), "
                f"got {higher_is_better}"
            )
    return jnp.where(flags != 0, 1, -1).astype(dtype)


def _per_seed(caller: str, values: Numbers) -> Float[Array, "n ..."]:
    values = as_float("values", values)
    if values.ndim == 0 or values.shape[0] == 0:
        raise ValueError(
            f"{caller}: values must have shape [n, ...] with n >= 1 seeds, "
            f"got {values.shape}"
        )
    return values


def _check_confidence(caller: str, confidence: float) -> None:
    if is_concrete(confidence) and not 0 < confidence < 1:
        raise ValueError(
            f"{caller}: confidence must lie strictly between 0 and 1 (0.95, not 95), "
            f"got {confidence}"
        )


def _student_t(confidence: float, dof: int) -> float:
    """The t with P(|T| <= t) = confidence; Abramowitz & Stegun 26.7.3 and 26.7.4.

    On the host: the degrees of freedom are a static shape, and neither jax.scipy nor
    our dependencies have the quantile.
    """
    odd = dof % 2

    def central(angle: float) -> float:  # P(|T| <= sqrt(dof) tan(angle))
        cosine = math.cos(angle)
        term = cosine if odd else 1.0
        series = term if dof > 1 else 0.0
        for k in range(2 + odd, dof - 1, 2):
            term *= cosine**2 * (k - 1) / k
            series += term
        series *= math.sin(angle)
        return (angle + series) * 2 / math.pi if odd else series

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves down to the last bit of a double
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < confidence else (low, middle)
    return math.sqrt(dof) * math.tan(low)
