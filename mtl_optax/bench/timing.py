"""Alternating runs in one call: what every comparison here is timed with.

Each round runs every way once, in an order that changes, and a way's time is divided by
that of its unit in the same round. So a busy machine hurts all alike, and no way always
runs after the same other (whose threads may not be asleep yet).
"""

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import numpy.typing as npt

Seconds: TypeAlias = npt.NDArray[np.float64]

_MEGABYTE = 1e6
_FEWEST = 3  # rounds of a unit: fewer have no median


def _nothing(label: str) -> None:
    del label


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


class Watch(NamedTuple):
    """How a measurement tells what it does.

    Attributes:
      part: called with a label when one of its parts begins: a way is compiled.
      run: called with a label after each run.
      say: called with a line on everything that fails or is left out; standard error
        by default.
    """

    part: Callable[[str], None] = _nothing
    run: Callable[[str], None] = _nothing
    say: Callable[[str], None] = _complain


UNWATCHED = Watch()


class Way(NamedTuple):
    """Something to be timed.

    Attributes:
      name: of which no other way has the same.
      run: does it, and returns when it is done.
      calls: how many steps `run` makes; times are for one.
      unit: whether others are measured by it: it runs in every round.
    """

    name: str
    run: Callable[[], Any]
    calls: int = 1
    unit: bool = False


class Timing(NamedTuple):
    """What became of a way.

    Attributes:
      seconds: of one step, in the rounds it took part in: the first ones.
      note: why these are fewer than was asked for, or none; empty if all is well.
    """

    seconds: Seconds
    note: str


class Ratio(NamedTuple):
    """A way's time by that of another, round by round: median, 10 % and 90 %."""

    median: float
    low: float
    high: float


def alternate(
    ways: Sequence[Way],
    rounds: int,
    *,
    budget: float = float("inf"),
    on_run: Callable[[str], None] | None = None,
) -> dict[str, Timing]:
    """Times all ways in turns.

    Args:
      ways: at least one.
      rounds: how often each runs, besides once or twice to warm up.
      budget: seconds for all rounds of all ways. All have an equal right to it, and
        what the fast ones leave goes to the slow ones; a way too slow for all rounds
        runs in fewer, and one that cannot have any keeps the time of its warm-up.
        Units run thrice at least, and no way oftener than they do.
      on_run: called on the host with a way's name after each of its runs.

    Returns:
      a `Timing` a way. What raises has no times, and the error as its note.

    Example:
      >>> found = alternate([Way("a", lambda: 0), Way("b", lambda: 1 / 0)], rounds=3)
      >>> found["a"].seconds.shape, found["a"].note
      ((3,), '')
      >>> found["b"].seconds.shape, found["b"].note
      ((0,), 'failed: ZeroDivisionError: division by zero')
    """
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    notes = dict.fromkeys(seconds, "")

    def timed(way: Way) -> float | None:
        try:
            return _seconds(way)
        except Exception as error:
            notes[way.name] = in_words(error)
            return None
        finally:
            if on_run is not None:
                on_run(way.name)

    firsts = {}
    for way in ways:
        first = timed(way)
        if first is not None and first * way.calls * rounds < budget / len(ways):
            first = timed(way)  # the very first run may be a slow one
        if first is not None:
            firsts[way.name] = first
    limits = _limits([w for w in ways if w.name in firsts], firsts, rounds, budget)
    most = min(
        [limits.get(way.name, rounds) for way in ways if way.unit], default=rounds
    )
    for way in ways:
        limit = limits.get(way.name, rounds)
        whole = f"{firsts.get(way.name, 0.0) * way.calls:.1f} s"
        if limit == 0:
            seconds[way.name].append(firsts[way.name])
            notes[way.name] = f"one run only, of {whole}"
        elif limit < (rounds if way.unit else most):
            notes[way.name] = f"{limit} of {rounds} rounds, of {whole} each"
    for number in range(rounds):
        for way in _turns(ways, number):
            if number < limits.get(way.name, 0):
                now = timed(way)
                seconds[way.name] += [] if now is None else [now]
    return {
        name: Timing(np.array(seconds[name], np.float64), note)
        for name, note in notes.items()
    }


def _limits(
    ways: Sequence[Way], firsts: Mapping[str, float], rounds: int, budget: float
) -> dict[str, int]:
    """In how many rounds each way may take part: units choose first, then the fastest.

    Each may use an equal part of what is left.
    """
    limits = {}
    most = rounds
    ordered = sorted(ways, key=lambda way: (not way.unit, firsts[way.name] * way.calls))
    for place, way in enumerate(ordered):
        whole = max(firsts[way.name] * way.calls, 1e-9)
        share = budget / (len(ordered) - place)
        fit = int(min(most, share / whole))
        if way.unit:
            fit = most = max(fit, min(_FEWEST, most))
        limits[way.name] = fit
        budget -= min(fit * whole, share)  # what units need beyond, no other pays for
    return limits


def ratio(timing: Timing, unit: Timing) -> Ratio:
    """How often one goes into the other, over the rounds that both took part in.

    NaN where there is none.

    Example:
      >>> one = Timing(np.array([2.0, 3.0, 8.0]), "")
      >>> ratio(one, Timing(np.array([1.0, 1.0, 2.0]), "")).median
      3.0
    """
    both = min(len(timing.seconds), len(unit.seconds))
    if both == 0:
        return Ratio(np.nan, np.nan, np.nan)
    quotients = timing.seconds[:both] / unit.seconds[:both]
    low, median, high = np.percentile(quotients, (10, 50, 90))
    return Ratio(float(median), float(low), float(high))


def in_words(error: Exception) -> str:
    """An error as a note: its kind and its first line.

    Example:
      >>> in_words(ValueError("too large"))
      'failed: ValueError: too large'
    """
    lines = str(error).splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:120]}"


def _seconds(way: Way) -> float:
    start = time.perf_counter()
    way.run()
    return (time.perf_counter() - start) / way.calls


def _turns(ways: Sequence[Way], number: int) -> Iterator[Way]:
    """The order of one round: first, last, second, ..., all moved on by a round.

    Over as many rounds as there are ways, every way stands once in every place, and has
    no other way before it more than twice.
    """
    size = len(ways)
    for place in range(size):
        half = place // 2
        yield ways[((half if place % 2 == 0 else size - 1 - half) + number) % size]


# -------------------------------------------------------------------------- the machine


def surroundings() -> str:
    """What the figures were measured on, in one line.

    Example:
      >>> print(surroundings())
      jax ..., ... cores...
    """
    cores = os.cpu_count() or 1
    version = importlib.metadata.version("jax")
    words = f"jax {version}, {jax.default_backend()}, {cores} cores"
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = "; something else runs, so expect noise" if load > cores / 2 else ""
        words += f", load average {load:.1f}{busy}"
    return words


def physical_bytes() -> float:
    """The machine's memory; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return float("inf")


def peak_megabytes(run: Callable[[], Any]) -> float:
    """By how much memory in use grows while `run` runs; NaN where Linux does not tell.

    For what has no compiler to ask. What the allocator kept from before is not counted,
    so small numbers are too small.

    Example:
      >>> found = peak_megabytes(lambda: np.ones(10_000_000).sum())
      >>> found >= 0 or np.isnan(found)
      True
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the old peak
        before = _status("VmRSS")
        run()
        return max(_status("VmHWM") - before, 0.0)
    except OSError:
        return float("nan")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024 / _MEGABYTE
    raise OSError(f"no {field}")
