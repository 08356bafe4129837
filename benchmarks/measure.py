"""Measuring side by side. The contenders take turns in one run, and only their ratio counts."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy

T = TypeVar("T")
Contender = tuple[Callable[[], object], Callable[[], object]]
"""A function that prepares a round and is not timed, and a function that is timed."""

Times = dict[str, list[float]]
"""Seconds of each contender, round by round."""


MARGIN = 0.15
"""The part of the smallest by which the medians of runs may differ before a figure is said to move."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much work a measurement may take.

    Attributes:
        rounds: turns of each contender, after one turn to warm up.
        quick: use small states and few points, to finish within minutes.
    """

    rounds: int = 7
    quick: bool = False

    def twice(self) -> Scale:
        """The same scale with twice the rounds, for short and noisy measurements."""
        return Scale(2 * self.rounds, self.quick)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report.

    Attributes:
        what: what was measured.
        value: the median.
        goal: the value that it must not exceed; None for no goal.
        detail: the figures behind the value, as text.
        unit: `x` for a ratio, `s` for seconds.
        low, high: the quartiles, the widest of several runs; None if they were not measured.
        runs: the medians of several runs, each in a process of its own; none if there was one run.
    """

    what: str
    value: float
    goal: float | None
    detail: str
    unit: str = "x"
    low: float | None = None
    high: float | None = None
    runs: Sequence[float] = ()

    @property
    def moves(self) -> bool:
        """Whether runs differ by more than `MARGIN`, so that a single one tells little."""
        return bool(self.runs) and max(self.runs) > (1 + MARGIN) * min(self.runs)

    @property
    def holds(self) -> bool:
        """Whether the value does not exceed the goal; true without a goal."""
        return self.goal is None or self.value <= self.goal


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds of one operation as work grows.

    Attributes:
        what: the operation.
        unit: what the work is counted in, such as tensors.
        points: pairs of a number of units and seconds.
    """

    what: str
    unit: str
    points: Sequence[tuple[float, float]]

    @property
    def fixed(self) -> float:
        """Seconds that the fitted line takes for no work."""
        return max(0.0, self._line()[1])

    @property
    def each(self) -> float:
        """Seconds that the fitted line adds for each unit."""
        return max(0.0, self._line()[0])

    @property
    def power(self) -> float:
        """The exponent between the last two points. 1 is proportional, and 0 is constant."""
        (n, t), (more, longer) = self.points[-2:]
        return math.log(longer / t) / math.log(more / n)

    def _line(self) -> tuple[float, float]:
        sizes, seconds = zip(*self.points, strict=True)
        slope, start = numpy.polyfit(sizes, seconds, 1, w=1 / numpy.array(seconds))
        return float(slope), float(start)


@dataclass(frozen=True, slots=True)
class Table:
    """A comparison that is not a list of ratios."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(slots=True)
class Section:
    """The results of one group of measurements.

    Attributes:
        measured: when, and how busy the machine was just before.
    """

    results: list[Result] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    measured: str = ""


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> Times:
    """Time the contenders in turns, after one round to warm up. Another contender begins each round.

    Returns:
        Seconds of each contender, round by round.
    """
    times: Times = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name in rotated([*contenders], i):
            prepare, run = contenders[name]
            prepare()
            start = time.perf_counter()
            kept = run()
            elapsed = time.perf_counter() - start
            del kept
            if i:
                times[name].append(elapsed)
    return times


def rotated(items: Sequence[T], by: int) -> list[T]:
    """The same items in the same order, beginning at another one.

    A contender leaves memory and a busy disk behind. They should not always meet the same next contender.
    """
    by %= max(len(items), 1)
    return [*items[by:], *items[:by]]


def ratio(
    what: str, times: Mapping[str, Sequence[float]], ours: str, peer: str, goal: float | None, name: str = ""
) -> Result:
    """The median of the ratios of all rounds. What slows the machine for a while slows both contenders."""
    ratios = [a / b for a, b in zip(times[ours], times[peer], strict=True)]
    low, high = middle_half(ratios)
    mine, other = statistics.median(times[ours]), statistics.median(times[peer])
    detail = f"{spoken(mine)} against {spoken(other)} of {name or peer}"
    return Result(what, statistics.median(ratios), goal=goal, detail=detail, low=low, high=high)


def absolute(what: str, seconds: Sequence[float], goal: float | None, detail: str = "") -> Result:
    """The result for the median of seconds."""
    low, high = middle_half(seconds)
    median = statistics.median(seconds)
    return Result(what, median, goal=goal, detail=detail or spoken(median), unit="s", low=low, high=high)


def together(runs: Sequence[Section]) -> Section:
    """One section of several runs of a group: the medians of their medians. Tables and notes are those of the last run."""
    results = []
    for several in zip(*(section.results for section in runs), strict=True):
        medians = [one.value for one in several]
        middle = sorted(several, key=lambda one: one.value)[len(several) // 2]
        lows = [one.low for one in several if one.low is not None]
        highs = [one.high for one in several if one.high is not None]
        results.append(
            replace(
                middle,
                value=statistics.median(medians),
                low=min(lows, default=None),
                high=max(highs, default=None),
                runs=medians,
            )
        )
    return replace(runs[-1], results=results)


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def spoken(seconds: float) -> str:
    """A text for seconds, such as `12 ms` or `1.3 s`."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.{0 if seconds >= 0.01 else 1}f} ms"
    return f"{seconds:.1f} s"
